// The CUDA kernels on the CPU, as C functions that tests/test_cuda_source.py calls.
#include ADAI_CUDA_SOURCE  // adai_cuda.cu with its launches replaced by calls of emulated::launch

using namespace adai;
using namespace adai::cuda;

template <class POINTER>
static std::vector<POINTER> listed(void* const* pointers, int64_t num_tensors) {
  std::vector<POINTER> list;
  for (int64_t i = 0; pointers && i < num_tensors; ++i) list.push_back(static_cast<POINTER>(pointers[i]));
  return list;
}

extern "C" {

void set_descending(bool value) { emulated::descending = value; }

// Writes (tensor, offset, count) of the chunk of every block, in the order of partials. Returns the number of chunks.
int64_t chunks(const int64_t* num_elements, int64_t num_tensors, int64_t max_tensors, int64_t max_chunks,
               int64_t (*result)[3]) {
  const std::vector<int64_t> sizes(num_elements, num_elements + num_tensors);
  int64_t num_results = 0;
  static Table<6> table;
  for (const Launch& launch : plan_launches(sizes, max_tensors ? max_tensors : table.CAPACITY, max_chunks)) {
    if (launch.first_chunk != num_results || launch.num_tensors > table.CAPACITY) return -1;
    table.set_sizes(sizes, launch);
    for (int64_t block = 0; block < launch.num_chunks; ++block, ++num_results) {
      const Chunk chunk(table, block);
      result[num_results][0] = launch.first_tensor + chunk.slot;
      result[num_results][1] = chunk.offset;
      result[num_results][2] = chunk.count;
    }
  }
  return num_results;
}

// dtypes: gradients, parameters, states.
const char* observe(const int64_t* num_elements, int64_t num_tensors, void* const* grads, void* const* params,
                    void* const* remainders, void* const* exp_avg_sqs, const int32_t* dtypes, const double* kept,
                    const float* coefficient, float coupled_decay, double* sums) {
  Observed x;
  x.num_elements.assign(num_elements, num_elements + num_tensors);
  x.grads = listed<const void*>(grads, num_tensors);
  x.params = listed<const void*>(params, num_tensors);
  x.remainders = listed<const void*>(remainders, num_tensors);
  x.states = {listed<const void*>(exp_avg_sqs, num_tensors), static_cast<Dtype>(dtypes[2]), kept};
  x.grad_dtype = static_cast<Dtype>(dtypes[0]);
  x.param_dtype = static_cast<Dtype>(dtypes[1]);
  x.coefficient = coefficient;
  x.coupled_decay = coupled_decay;
  std::vector<double> partials(static_cast<size_t>(num_partials(x)));
  return observe(x, partials.data(), sums, nullptr);
}

// lists: params, grads, exp_avgs, exp_avg_sqs, beta1_prods, remainders. dtypes: params, grads, states. scalars:
// coefficient, lr. flags: is_finite, is_live. rounding: streams, origins, settled, or null.
const char* advance(const int64_t* num_elements, int64_t num_tensors, void* const* const* lists, const int32_t* dtypes,
                    const float* inverse_means, const float* scalars, const bool* flags, const void* const* rounding,
                    const double* hyper, double* sums) {
  Advanced x;
  x.num_elements.assign(num_elements, num_elements + num_tensors);
  x.params = listed<void*>(lists[0], num_tensors);
  x.grads = listed<const void*>(lists[1], num_tensors);
  x.exp_avgs = listed<void*>(lists[2], num_tensors);
  x.exp_avg_sqs = listed<void*>(lists[3], num_tensors);
  x.beta1_prods = listed<void*>(lists[4], num_tensors);
  x.remainders = listed<void*>(lists[5], num_tensors);
  x.param_dtype = static_cast<Dtype>(dtypes[0]);
  x.grad_dtype = static_cast<Dtype>(dtypes[1]);
  x.state_dtype = static_cast<Dtype>(dtypes[2]);
  x.rounding = {};
  if (rounding) {
    x.rounding = {static_cast<const int32_t*>(rounding[0]), static_cast<const int64_t*>(rounding[1]),
                  static_cast<const float*>(rounding[2])};
  }
  x.inverse_means = inverse_means;
  x.coefficient = &scalars[0];
  x.lr = &scalars[1];
  x.is_finite = &flags[0];
  x.is_live = &flags[1];
  x.hyper = hyper_of(hyper);
  std::vector<double> partials(static_cast<size_t>(num_partials(x)));
  return advance(x, partials.data(), sums, nullptr);
}

const char* sum(const int64_t* num_elements, int64_t num_tensors, void* const* exp_avg_sqs, int32_t dtype,
                const double* kept, double* sums) {
  const States states{listed<const void*>(exp_avg_sqs, num_tensors), static_cast<Dtype>(dtype), kept};
  const Summed x{{num_elements, num_elements + num_tensors}, states};
  std::vector<double> partials(static_cast<size_t>(num_partials(x)));
  return sum(x, partials.data(), sums, nullptr);
}

}  // extern "C"
