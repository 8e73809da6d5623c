// The CUDA kernels; adai_cuda.h says how tensors become chunks, adai_math.h has the formulas.
//
// Only what HIP has as well is used: nothing assumes how many threads a warp has. No atomics, no copies and no waiting:
// the lists of tensors travel as kernel arguments, which a CUDA graph records by value.
#include "adai_cuda_chunks.h"

namespace adai::cuda {
namespace {

constexpr int64_t MAX_BLOCKS = int64_t{1} << 23;  // of a launch: HIP allows 2^32 threads

// What a thread requests before it computes: of each tensor of a step, and in all where it observes. With 32 to 76
// registers, 3 blocks or more run on a multiprocessor at once and have 60 to 120 KiB in flight; an H200 needs about 26
// to keep its memory busy (4.8 TB/s, 700 ns, 132 multiprocessors), a B200 about 43.
constexpr int STEP_VECTORS = 2;
constexpr int OBSERVE_BYTES = 64;

// -- observe ----------------------------------------------------------------------------------------------------------

struct ObserveArguments {
  double* partials;
  int64_t column_stride;
  Table<2> table;  // gradients, parameters
};

template <bool COUPLED, class GRAD, class PARAM>
__global__ void __launch_bounds__(THREADS) observe_chunks(const ObserveArguments arguments) {
  const auto& table = arguments.table;
  const Chunk chunk(table, blockIdx.x);
  const GRAD* grads = chunk.of<GRAD>(table.lists[0]);
  const PARAM* params = COUPLED ? chunk.of<PARAM>(table.lists[1]) : nullptr;
  const bool are_aligned = is_aligned(grads) && is_aligned(params);
  double grad_grad = 0.0, grad_param = 0.0, param_param = 0.0;
  for_each_tile<OBSERVE_BYTES / sizeof(Vector<GRAD>) / (COUPLED ? 2 : 1)>(chunk.count, are_aligned, [&](auto tile) {
    GRAD g[tile.NUM];
    PARAM theta[tile.NUM];
    tile.load(grads, g);
    if (COUPLED) tile.load(params, theta);
#pragma unroll
    for (int i = 0; i < tile.NUM; ++i) {
      // float64 holds these products without rounding, so that fma has the bits of a product and a sum.
      const double gradient = widen(g[i]);
      grad_grad = fma(gradient, gradient, grad_grad);
      if (COUPLED) {
        const double param = widen(theta[i]);
        grad_param = fma(gradient, param, grad_param);
        param_param = fma(param, param, param_param);
      }
    }
  });

  double* partials = arguments.partials + blockIdx.x;
  const double columns[NUM_NORMS] = {grad_grad, grad_param, param_param};
#pragma unroll
  for (int column = 0; column < (COUPLED ? NUM_NORMS : 1); ++column) {
    const double sum = block_sum(columns[column]);
    if (threadIdx.x == 0) partials[column * arguments.column_stride] = sum;
  }
}

// -- advance ----------------------------------------------------------------------------------------------------------

struct AdvanceArguments {
  double* partials;
  const float *inverse_means, *coefficient, *lr;
  const bool *is_finite, *is_live;
  Hyper hyper;
  Table<5> table;  // parameters, gradients, exp_avgs, exp_avg_sqs, beta1_prods
};

template <class VARIANT, class PARAM, class GRAD>
__device__ double advance_chunk(const AdvanceArguments& arguments, const Chunk& chunk, const Step& step) {
  PARAM* params = chunk.of<PARAM>(arguments.table.lists[0]);
  const GRAD* grads = chunk.of<GRAD>(arguments.table.lists[1]);
  float* exp_avgs = chunk.of<float>(arguments.table.lists[2]);
  float* exp_avg_sqs = chunk.of<float>(arguments.table.lists[3]);
  float* beta1_prods = VARIANT::HAS_PRODUCT ? chunk.of<float>(arguments.table.lists[4]) : nullptr;
  const bool are_aligned = is_aligned(params) && is_aligned(grads) && is_aligned(exp_avgs) &&
                           is_aligned(exp_avg_sqs) && is_aligned(beta1_prods);
  double sum = 0.0;
  for_each_tile<STEP_VECTORS>(chunk.count, are_aligned, [&](auto tile) {
    PARAM theta[tile.NUM];
    GRAD g[tile.NUM];
    float m[tile.NUM], v[tile.NUM], P[tile.NUM];
    tile.load(params, theta);
    tile.load(grads, g);
    tile.load(exp_avgs, m);
    tile.load(exp_avg_sqs, v);
    if (VARIANT::HAS_PRODUCT) tile.load(beta1_prods, P);
#pragma unroll
    for (int i = 0; i < tile.NUM; ++i) {
      float theta_i = widen(theta[i]);
      adai::advance<VARIANT>(theta_i, widen(g[i]), m[i], v[i], P[i], arguments.hyper, step);
      narrow(theta_i, theta[i]);
      sum += v[i];  // of elements beyond the end: 0
    }
    tile.store(theta, params);
    tile.store(m, exp_avgs);
    tile.store(v, exp_avg_sqs);
    if (VARIANT::HAS_PRODUCT) tile.store(P, beta1_prods);
  });
  return sum;
}

template <class PARAM>
__device__ void decay_chunk(PARAM* params, int count, const Step& step) {
  for_each_tile<STEP_VECTORS>(count, is_aligned(params), [&](auto tile) {
    PARAM theta[tile.NUM];
    tile.load(params, theta);
#pragma unroll
    for (int i = 0; i < tile.NUM; ++i) {
      float theta_i = widen(theta[i]);
      adai::decay(theta_i, step);
      narrow(theta_i, theta[i]);
    }
    tile.store(theta, params);
  });
}

// In the order of advance_chunk, so that equal exp_avg_sqs have equal sums.
__device__ double sum_chunk(const float* exp_avg_sqs, int count) {
  double sum = 0.0;
  for_each_tile<STEP_VECTORS>(count, is_aligned(exp_avg_sqs), [&](auto tile) {
    float v[tile.NUM];
    tile.load(exp_avg_sqs, v);
#pragma unroll
    for (int i = 0; i < tile.NUM; ++i) sum += v[i];
  });
  return sum;
}

template <class VARIANT, class PARAM, class GRAD>
__global__ void __launch_bounds__(THREADS) advance_chunks(const AdvanceArguments arguments) {
  const Chunk chunk(arguments.table, blockIdx.x);
  const Hyper& hyper = arguments.hyper;
  const Step step = step_of(hyper, *arguments.coefficient, *arguments.lr, arguments.inverse_means[chunk.slot]);
  double sum;
  if (*arguments.is_live) {
    sum = advance_chunk<VARIANT, PARAM, GRAD>(arguments, chunk, step);
  } else {
    sum = sum_chunk(chunk.of<float>(arguments.table.lists[3]), chunk.count);
    if (*arguments.is_finite && hyper.decoupled_decay != 0.0f) {
      decay_chunk(chunk.of<PARAM>(arguments.table.lists[0]), chunk.count, step);
    }
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) arguments.partials[blockIdx.x] = sum;
}

struct SumArguments {
  double* partials;
  Table<1> table;  // exp_avg_sqs
};

__global__ void __launch_bounds__(THREADS) sum_chunks(const SumArguments arguments) {
  const Chunk chunk(arguments.table, blockIdx.x);
  const double sum = block_sum(sum_chunk(chunk.of<float>(arguments.table.lists[0]), chunk.count));
  if (threadIdx.x == 0) arguments.partials[blockIdx.x] = sum;
}

// -- second stage -----------------------------------------------------------------------------------------------------

// Block (i, column) adds up the partials of tensor i of this launch.
struct AddArguments {
  static constexpr int CAPACITY = 480;  // within 4 KiB, which a launch copies

  const double* partials;
  int64_t column_stride;
  int num_columns;  // the others are 0
  double* sums;
  int64_t first_partials[CAPACITY + 1];
};

__global__ void __launch_bounds__(THREADS) add_partials(const AddArguments arguments) {
  const int column = blockIdx.y;
  double sum = 0.0;
  if (column < arguments.num_columns) {
    const double* partials = arguments.partials + column * arguments.column_stride;
    const int64_t end = arguments.first_partials[blockIdx.x + 1];
#pragma unroll 8
    for (int64_t i = arguments.first_partials[blockIdx.x] + threadIdx.x; i < end; i += THREADS) sum += partials[i];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) arguments.sums[int64_t{blockIdx.x} * gridDim.y + column] = sum;
}

// -- launches ---------------------------------------------------------------------------------------------------------

template <class ARGUMENTS>
const char* launch_kernel(void (*kernel)(ARGUMENTS), dim3 blocks, const ARGUMENTS& arguments, void* stream) {
  static_assert(sizeof(ARGUMENTS) <= MAX_ARGUMENT_BYTES, "the arguments of a kernel have a limit");
  kernel<<<blocks, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(arguments);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// `partials` has num_columns rows, of one number for each chunk; `sums` one row of out_columns for each tensor.
const char* add_all_partials(const std::vector<int64_t>& num_elements, const double* partials, int num_columns,
                             int out_columns, double* sums, void* stream) {
  const int64_t num_tensors = static_cast<int64_t>(num_elements.size());
  AddArguments arguments;
  arguments.partials = partials;
  arguments.column_stride = num_chunks(num_elements);
  arguments.num_columns = num_columns;
  int64_t first_partial = 0;
  for (int64_t start = 0; start < num_tensors; start += arguments.CAPACITY) {
    const int num_blocks = static_cast<int>(std::min<int64_t>(arguments.CAPACITY, num_tensors - start));
    for (int i = 0; i < num_blocks; ++i) {
      arguments.first_partials[i] = first_partial;
      first_partial += num_chunks(num_elements[start + i]);
    }
    arguments.first_partials[num_blocks] = first_partial;
    arguments.sums = sums + start * out_columns;
    if (const char* error = launch_kernel(add_partials, dim3(num_blocks, out_columns), arguments, stream)) return error;
  }
  return nullptr;
}

template <class CALL>
const char* with_dtype(Dtype dtype, const CALL& call) {
  switch (dtype) {
    case Dtype::bfloat16: return call(BFloat16{});
    case Dtype::float16: return call(Float16{});
    default: return call(float{});
  }
}

template <bool COUPLED, bool HAS_PRODUCT, class CALL>
const char* with_dampening(Dampening dampening, const CALL& call) {
  switch (dampening) {
    case Dampening::one: return call(Variant<COUPLED, Dampening::one, HAS_PRODUCT>{});
    case Dampening::zero: return call(Variant<COUPLED, Dampening::zero, HAS_PRODUCT>{});
    default: return call(Variant<COUPLED, Dampening::between, HAS_PRODUCT>{});
  }
}

template <class CALL>
const char* with_variant(const Advanced& x, const CALL& call) {
  const bool has_product = !x.beta1_prods.empty();
  if (x.hyper.coupled_decay != 0.0f) {
    return has_product ? with_dampening<true, true>(x.dampening, call) : with_dampening<true, false>(x.dampening, call);
  }
  return has_product ? with_dampening<false, true>(x.dampening, call) : with_dampening<false, false>(x.dampening, call);
}

}  // namespace

const char* observe(const Observed& x, double* partials, double* sums, void* stream) {
  ObserveArguments arguments;
  arguments.column_stride = num_chunks(x.num_elements);
  for (const Launch& launch : plan_launches(x.num_elements, arguments.table.CAPACITY, MAX_BLOCKS)) {
    arguments.partials = partials + launch.first_chunk;
    arguments.table.set_sizes(x.num_elements, launch);
    arguments.table.set_list(0, x.grads, launch);
    arguments.table.set_list(1, x.params, launch);
    const char* error = with_dtype(x.grad_dtype, [&](auto grad) {
      using GRAD = decltype(grad);
      const dim3 blocks(static_cast<unsigned>(launch.num_chunks));
      if (x.params.empty()) return launch_kernel(observe_chunks<false, GRAD, float>, blocks, arguments, stream);
      return with_dtype(x.param_dtype, [&](auto param) {
        return launch_kernel(observe_chunks<true, GRAD, decltype(param)>, blocks, arguments, stream);
      });
    });
    if (error) return error;
  }
  return add_all_partials(x.num_elements, partials, x.params.empty() ? 1 : NUM_NORMS, NUM_NORMS, sums, stream);
}

const char* advance(const Advanced& x, double* partials, double* sums, void* stream) {
  AdvanceArguments arguments;
  arguments.coefficient = x.coefficient;
  arguments.lr = x.lr;
  arguments.is_finite = x.is_finite;
  arguments.is_live = x.is_live;
  arguments.hyper = x.hyper;
  for (const Launch& launch : plan_launches(x.num_elements, arguments.table.CAPACITY, MAX_BLOCKS)) {
    arguments.partials = partials + launch.first_chunk;
    arguments.inverse_means = x.inverse_means + launch.first_tensor;
    arguments.table.set_sizes(x.num_elements, launch);
    arguments.table.set_list(0, x.params, launch);
    arguments.table.set_list(1, x.grads, launch);
    arguments.table.set_list(2, x.exp_avgs, launch);
    arguments.table.set_list(3, x.exp_avg_sqs, launch);
    arguments.table.set_list(4, x.beta1_prods, launch);
    const char* error = with_variant(x, [&](auto variant) {
      return with_dtype(x.param_dtype, [&](auto param) {
        return with_dtype(x.grad_dtype, [&](auto grad) {
          const auto kernel = advance_chunks<decltype(variant), decltype(param), decltype(grad)>;
          return launch_kernel(kernel, dim3(static_cast<unsigned>(launch.num_chunks)), arguments, stream);
        });
      });
    });
    if (error) return error;
  }
  return add_all_partials(x.num_elements, partials, 1, 1, sums, stream);
}

const char* sum(const Summed& x, double* partials, double* sums, void* stream) {
  SumArguments arguments;
  for (const Launch& launch : plan_launches(x.num_elements, arguments.table.CAPACITY, MAX_BLOCKS)) {
    arguments.partials = partials + launch.first_chunk;
    arguments.table.set_sizes(x.num_elements, launch);
    arguments.table.set_list(0, x.exp_avg_sqs, launch);
    const dim3 blocks(static_cast<unsigned>(launch.num_chunks));
    if (const char* error = launch_kernel(sum_chunks, blocks, arguments, stream)) return error;
  }
  return add_all_partials(x.num_elements, partials, 1, 1, sums, stream);
}

}  // namespace adai::cuda
