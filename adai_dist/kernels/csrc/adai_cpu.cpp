// torch.ops.adai_dist.{observe, advance, sums} on the CPU; adai_dist/kernels/ops.py documents the operators.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "adai_arguments.h"
#include "adai_cpu.h"

namespace adai {
namespace cpu {
namespace {

// The fewest elements for which waking a thread pays off.
constexpr int64_t ELEMENTS_PER_THREAD = 1 << 15;

// The instruction set that torch itself uses; ATEN_CPU_CAPABILITY restricts it.
const Kernels& kernels() {
  static const Kernels chosen = [] {
#if defined(__x86_64__)
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return kernels_avx512();
    if (capability == "AVX2") return kernels_avx2();
#endif
    return kernels_default();
  }();
  return chosen;
}

// The address of element `start` of a tensor.
void* address(const at::Tensor& tensor, int64_t start) {
  return static_cast<char*>(tensor.data_ptr()) + start * tensor.element_size();
}

// The address of the second moment of element `start`; in records, that of the record that begins with it.
void* moment_address(const at::Tensor& exp_avg_sq, int64_t start) {
  if (dtype_of(exp_avg_sq) != Dtype::eight_bits) return address(exp_avg_sq, start);
  return static_cast<Record*>(exp_avg_sq.data_ptr()) + start / RECORD_ELEMENTS;
}

// Calls `of_chunk(tensor, start, num_elements, chunk)` for every chunk of every tensor, on all threads.
template <class F>
void for_each_chunk(const std::vector<int64_t>& first_chunks, at::TensorList tensors, const F& of_chunk) {
  int64_t num_elements = 1;
  for (const at::Tensor& tensor : tensors) num_elements += num_elements_of(tensor);
  const int64_t num_chunks = first_chunks.back();
  const int64_t chunks_per_thread = std::max<int64_t>(1, num_chunks * ELEMENTS_PER_THREAD / num_elements);
  at::parallel_for(0, num_chunks, chunks_per_thread, [&](int64_t begin, int64_t end) {
    size_t tensor = std::upper_bound(first_chunks.begin(), first_chunks.end(), begin) - first_chunks.begin() - 1;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (first_chunks[tensor + 1] <= chunk) ++tensor;
      const int64_t start = (chunk - first_chunks[tensor]) * CHUNK_ELEMENTS;
      of_chunk(tensor, start, std::min(CHUNK_ELEMENTS, num_elements_of(tensors[tensor]) - start), chunk);
    }
  });
}

// The index of the first chunk of each tensor, followed by the number of chunks.
std::vector<int64_t> first_chunks_of(at::TensorList tensors) {
  std::vector<int64_t> first_chunks{0};
  for (const at::Tensor& tensor : tensors) {
    first_chunks.push_back(first_chunks.back() + (num_elements_of(tensor) + CHUNK_ELEMENTS - 1) / CHUNK_ELEMENTS);
  }
  return first_chunks;
}

// Adds up the chunks of each tensor in order.
at::Tensor sums_of(const std::vector<double>& of_chunks, const std::vector<int64_t>& first_chunks) {
  at::Tensor sums = at::zeros({static_cast<int64_t>(first_chunks.size()) - 1}, at::kDouble);
  double* of_tensors = sums.data_ptr<double>();
  for (size_t i = 0; i + 1 < first_chunks.size(); ++i) {
    for (int64_t chunk = first_chunks[i]; chunk < first_chunks[i + 1]; ++chunk) of_tensors[i] += of_chunks[chunk];
  }
  return sums;
}

// Sums the samples among n elements of v, starting at element `start` of the tensor.
double sample_sum(const at::Tensor& exp_avg_sq, int64_t start, int64_t n, int64_t distance) {
  const void* v = moment_address(exp_avg_sq, start);
  const Dtype state = dtype_of(exp_avg_sq);
  if (distance == 1) return kernels().sum(v, state, n);
  double sum = 0.0;
  for (int64_t k = (distance - start % distance) % distance; k < n; k += distance) {
    switch (state) {
      case Dtype::eight_bits: sum += second_moment(static_cast<const Record*>(v), k); break;
      case Dtype::bfloat16: sum += second_moment(static_cast<const BFloat16*>(v), k); break;
      default: sum += second_moment(static_cast<const float*>(v), k);
    }
  }
  return sum;
}

// Sums the samples of each tensor, chunk by chunk as advance does.
std::vector<double> samples_of(at::TensorList exp_avg_sqs) {
  std::vector<double> sums(exp_avg_sqs.size());
  for (size_t i = 0; i < sums.size(); ++i) {
    const int64_t num_elements = num_elements_of(exp_avg_sqs[i]), distance = sample_distance(num_elements);
    for (int64_t start = 0; start < num_elements; start += CHUNK_ELEMENTS) {
      sums[i] += sample_sum(exp_avg_sqs[i], start, std::min(CHUNK_ELEMENTS, num_elements - start), distance);
    }
  }
  return sums;
}

// The sums that the last step returned, for the exp_avg_sqs that have not been written to since.
class KeptSums {
 public:
  KeptSums(at::TensorList exp_avg_sqs, const at::Tensor& kept)
      : samples_(samples_of(exp_avg_sqs)), kept_(samples_.empty() ? nullptr : kept.data_ptr<double>()) {}

  bool is_kept(size_t i) const { return kept_[i * NUM_KEPT + SAMPLE_SUM] == samples_[i]; }  // false for NaN

  // Writes the kept sums into every stride-th number.
  void fill(double* sums, int64_t stride) const {
    for (size_t i = 0; i < samples_.size(); ++i) {
      if (is_kept(i)) sums[i * stride] = kept_[i * NUM_KEPT];
    }
  }

 private:
  const std::vector<double> samples_;
  const double* const kept_;
};

// The sum of n elements of exp_avg_sq from `start` on, at most a chunk.
double chunk_sum(const at::Tensor& exp_avg_sq, int64_t start, int64_t n) {
  return kernels().sum(moment_address(exp_avg_sq, start), dtype_of(exp_avg_sq), n);
}

int16_t* remainder_at(at::TensorList remainders, size_t i, int64_t start) {
  return remainders.empty() ? nullptr : static_cast<int16_t*>(address(remainders[i], start));
}

at::Tensor observe(at::TensorList grads, at::TensorList params, at::TensorList remainders, at::TensorList exp_avg_sqs,
                   const at::Tensor& kept, const at::Tensor& coefficient, double coupled_decay) {
  check_observe(grads, params, remainders, exp_avg_sqs, kept, coefficient);
  const Dtypes dtypes{dtype_of(params), dtype_of(grads), dtype_of(exp_avg_sqs)};
  const float c = grads.empty() ? 1.0f : *coefficient.data_ptr<float>();
  const float decay = static_cast<float>(coupled_decay);
  const std::vector<int64_t> first_chunks = first_chunks_of(grads);
  const KeptSums kept_sums(exp_avg_sqs, kept);
  std::vector<Sums> of_chunks(first_chunks.back());
  std::vector<double> v_sums(first_chunks.back());
  for_each_chunk(first_chunks, grads, [&](size_t i, int64_t start, int64_t n, int64_t chunk) {
    void* param = params.empty() ? nullptr : address(params[i], start);
    const Chunk of_tensor{param, address(grads[i], start), nullptr, nullptr, nullptr,
                          remainder_at(remainders, i, start), start, n};
    of_chunks[chunk] = kernels().observe(of_tensor, dtypes, c, decay);
    if (exp_avg_sqs.empty() || kept_sums.is_kept(i)) return;
    v_sums[chunk] = chunk_sum(exp_avg_sqs[i], start, n);
  });
  at::Tensor sums = at::zeros({static_cast<int64_t>(grads.size()), NUM_OBSERVED}, at::kDouble);
  double* of_tensor = sums.data_ptr<double>();
  for (size_t i = 0; i < grads.size(); ++i, of_tensor += NUM_OBSERVED) {
    for (int64_t chunk = first_chunks[i]; chunk < first_chunks[i + 1]; ++chunk) {
      of_tensor[0] += of_chunks[chunk].grad_grad;
      of_tensor[V_SUM] += v_sums[chunk];
      of_tensor[2] += of_chunks[chunk].grad_param;
      of_tensor[3] += of_chunks[chunk].param_param;
      of_tensor[4] += of_chunks[chunk].expected;
    }
  }
  kept_sums.fill(sums.data_ptr<double>() + V_SUM, NUM_OBSERVED);
  return sums;
}

at::Tensor advance(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                   at::TensorList beta1_prods, at::TensorList remainders, const at::Tensor& inverse_means,
                   const at::Tensor& coefficient, const at::Tensor& lr, const at::Tensor& is_finite,
                   const at::Tensor& is_live, at::TensorList rounding_inputs, at::ArrayRef<double> hyperparameters) {
  check_advance(params, grads, exp_avgs, exp_avg_sqs, beta1_prods, remainders);
  check_step(inverse_means, coefficient, lr, is_finite, is_live, params);
  const bool rounds = is_rounding(params, exp_avgs, remainders);
  if (rounds) check_rounding(rounding_inputs, params);
  const Hyper hyper = checked_hyper(hyperparameters);
  const Dtypes dtypes{dtype_of(params), dtype_of(grads), dtype_of(exp_avg_sqs)};
  const bool live = *is_live.data_ptr<bool>();
  const float c = *coefficient.data_ptr<float>();
  const float rate = *is_finite.data_ptr<bool>() ? *lr.data_ptr<float>() : 0.0f;
  const float* inverse_mean = inverse_means.data_ptr<float>();
  const RoundingInputs inputs = rounds ? rounding_inputs_of(rounding_inputs) : RoundingInputs{};
  const std::vector<int64_t> first_chunks = first_chunks_of(params);
  std::vector<double> of_chunks(first_chunks.back()), samples(first_chunks.back());
  for_each_chunk(first_chunks, params, [&](size_t i, int64_t start, int64_t n, int64_t chunk) {
    const auto at = [&](at::TensorList tensors) { return tensors.empty() ? nullptr : address(tensors[i], start); };
    const Chunk of_tensor{at(params),      at(grads), at(exp_avgs), moment_address(exp_avg_sqs[i], start),
                          at(beta1_prods), remainder_at(remainders, i, start), start, n};
    const Step step = step_of(hyper, c, rate, inverse_mean[i]);
    const Rounding rounding = rounds ? rounding_of(inputs, static_cast<int64_t>(i)) : Rounding{};
    if (live) {
      of_chunks[chunk] = kernels().advance(of_tensor, dtypes, hyper, step, rounding);
    } else {
      if (step.decay_factor != 1.0f) kernels().decay(of_tensor, dtypes, step, rounding);
      of_chunks[chunk] = chunk_sum(exp_avg_sqs[i], start, n);
    }
    const int64_t distance = sample_distance(params[i].numel());
    samples[chunk] = distance == 1 ? of_chunks[chunk] : sample_sum(exp_avg_sqs[i], start, n, distance);
  });
  for (const auto& written : {params, exp_avgs, exp_avg_sqs, beta1_prods, remainders}) bump_versions(written);
  at::Tensor kept = at::zeros({static_cast<int64_t>(params.size()), NUM_KEPT}, at::kDouble);
  double* row = kept.data_ptr<double>();
  for (size_t i = 0; i < params.size(); ++i, row += NUM_KEPT) {
    for (int64_t chunk = first_chunks[i]; chunk < first_chunks[i + 1]; ++chunk) {
      row[0] += of_chunks[chunk];
      row[SAMPLE_SUM] += samples[chunk];
    }
  }
  return kept;
}

at::Tensor sums(at::TensorList exp_avg_sqs, const at::Tensor& kept) {
  check_sums(exp_avg_sqs, kept);
  const std::vector<int64_t> first_chunks = first_chunks_of(exp_avg_sqs);
  const KeptSums kept_sums(exp_avg_sqs, kept);
  std::vector<double> of_chunks(first_chunks.back());
  for_each_chunk(first_chunks, exp_avg_sqs, [&](size_t i, int64_t start, int64_t n, int64_t chunk) {
    if (kept_sums.is_kept(i)) return;
    of_chunks[chunk] = chunk_sum(exp_avg_sqs[i], start, n);
  });
  at::Tensor sums = sums_of(of_chunks, first_chunks);
  kept_sums.fill(sums.data_ptr<double>(), 1);
  return sums;
}

}  // namespace
}  // namespace cpu
}  // namespace adai

TORCH_LIBRARY_IMPL(adai_dist, CPU, library) {
  library.impl("observe", &adai::cpu::observe);
  library.impl("advance", &adai::cpu::advance);
  library.impl("sums", &adai::cpu::sums);
}
