// torch.ops.adai_dist.{observe, advance, sums} on the CPU; the schemas, and what they mean, are in
// adai_dist/kernels/ops.py.
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

// Fewer elements than this are not worth waking a thread for.
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

// Elements `start` onwards of a tensor.
void* address(const at::Tensor& tensor, int64_t start) {
  return static_cast<char*>(tensor.data_ptr()) + start * tensor.element_size();
}

// Calls `of_chunk(tensor, start, num_elements, chunk)` for every chunk of every tensor, on all threads.
template <class F>
void for_each_chunk(const std::vector<int64_t>& first_chunks, at::TensorList tensors, const F& of_chunk) {
  int64_t num_elements = 1;
  for (const at::Tensor& tensor : tensors) num_elements += tensor.numel();
  const int64_t num_chunks = first_chunks.back();
  const int64_t chunks_per_thread = std::max<int64_t>(1, num_chunks * ELEMENTS_PER_THREAD / num_elements);
  at::parallel_for(0, num_chunks, chunks_per_thread, [&](int64_t begin, int64_t end) {
    size_t tensor = std::upper_bound(first_chunks.begin(), first_chunks.end(), begin) - first_chunks.begin() - 1;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (first_chunks[tensor + 1] <= chunk) ++tensor;
      const int64_t start = (chunk - first_chunks[tensor]) * CHUNK_ELEMENTS;
      of_chunk(tensor, start, std::min(CHUNK_ELEMENTS, tensors[tensor].numel() - start), chunk);
    }
  });
}

// The number of the first chunk of each tensor, and the number of all chunks behind.
std::vector<int64_t> first_chunks_of(at::TensorList tensors) {
  std::vector<int64_t> first_chunks{0};
  for (const at::Tensor& tensor : tensors) {
    first_chunks.push_back(first_chunks.back() + (tensor.numel() + CHUNK_ELEMENTS - 1) / CHUNK_ELEMENTS);
  }
  return first_chunks;
}

// The sum over the chunks of each tensor, in their order.
at::Tensor sums_of(const std::vector<double>& of_chunks, const std::vector<int64_t>& first_chunks) {
  at::Tensor sums = at::zeros({static_cast<int64_t>(first_chunks.size()) - 1}, at::kDouble);
  double* of_tensors = sums.data_ptr<double>();
  for (size_t i = 0; i + 1 < first_chunks.size(); ++i) {
    for (int64_t chunk = first_chunks[i]; chunk < first_chunks[i + 1]; ++chunk) of_tensors[i] += of_chunks[chunk];
  }
  return sums;
}

at::Tensor observe(at::TensorList grads, at::TensorList params) {
  check_observe(grads, params);
  const Options options{dtype_of(params), dtype_of(grads), !params.empty(), false, Dampening::one};
  const std::vector<int64_t> first_chunks = first_chunks_of(grads);
  std::vector<Sums> of_chunks(first_chunks.back());
  for_each_chunk(first_chunks, grads, [&](size_t i, int64_t start, int64_t n, int64_t chunk) {
    void* param = params.empty() ? nullptr : address(params[i], start);
    of_chunks[chunk] = kernels().observe({param, address(grads[i], start), nullptr, nullptr, nullptr, n}, options);
  });
  at::Tensor sums = at::zeros({static_cast<int64_t>(grads.size()), 3}, at::kDouble);
  double* of_tensor = sums.data_ptr<double>();
  for (size_t i = 0; i < grads.size(); ++i, of_tensor += 3) {
    for (int64_t chunk = first_chunks[i]; chunk < first_chunks[i + 1]; ++chunk) {
      of_tensor[0] += of_chunks[chunk].grad_grad;
      of_tensor[1] += of_chunks[chunk].grad_param;
      of_tensor[2] += of_chunks[chunk].param_param;
    }
  }
  return sums;
}

at::Tensor advance(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                   at::TensorList beta1_prods, const at::Tensor& inverse_means, const at::Tensor& coefficient,
                   const at::Tensor& lr, const at::Tensor& is_finite, const at::Tensor& is_live,
                   at::ArrayRef<double> hyperparameters) {
  check_advance(params, grads, exp_avgs, exp_avg_sqs, beta1_prods);
  check_step(inverse_means, coefficient, lr, is_finite, is_live, params);
  const Hyper hyper = hyper_of(hyperparameters);
  const Options options{dtype_of(params), dtype_of(grads), hyper.coupled_decay != 0.0f, !beta1_prods.empty(),
                        dampening_of(hyper)};
  const bool live = *is_live.data_ptr<bool>();
  const float c = *coefficient.data_ptr<float>();
  const float rate = *is_finite.data_ptr<bool>() ? *lr.data_ptr<float>() : 0.0f;
  const float* inverse_mean = inverse_means.data_ptr<float>();
  const std::vector<int64_t> first_chunks = first_chunks_of(params);
  std::vector<double> of_chunks(first_chunks.back());
  for_each_chunk(first_chunks, params, [&](size_t i, int64_t start, int64_t n, int64_t chunk) {
    const auto state = [&](at::TensorList states) { return static_cast<float*>(address(states[i], start)); };
    const Chunk of_tensor{address(params[i], start), address(grads[i], start), state(exp_avgs), state(exp_avg_sqs),
                          options.has_product ? state(beta1_prods) : nullptr, n};
    const Step step = step_of(hyper, c, rate, inverse_mean[i]);
    if (live) {
      of_chunks[chunk] = kernels().advance(of_tensor, options, hyper, step);
      return;
    }
    if (step.decay_factor != 1.0f) kernels().decay(of_tensor, options, step);
    of_chunks[chunk] = kernels().sum(of_tensor.exp_avg_sq, n);
  });
  for (const at::TensorList& written : {params, exp_avgs, exp_avg_sqs, beta1_prods}) bump_versions(written);
  return sums_of(of_chunks, first_chunks);
}

at::Tensor sums(at::TensorList exp_avg_sqs) {
  check_sums(exp_avg_sqs);
  const std::vector<int64_t> first_chunks = first_chunks_of(exp_avg_sqs);
  std::vector<double> of_chunks(first_chunks.back());
  for_each_chunk(first_chunks, exp_avg_sqs, [&](size_t i, int64_t start, int64_t n, int64_t chunk) {
    of_chunks[chunk] = kernels().sum(static_cast<const float*>(address(exp_avg_sqs[i], start)), n);
  });
  return sums_of(of_chunks, first_chunks);
}

}  // namespace
}  // namespace cpu
}  // namespace adai

TORCH_LIBRARY_IMPL(adai_dist, CPU, library) {
  library.impl("observe", &adai::cpu::observe);
  library.impl("advance", &adai::cpu::advance);
  library.impl("sums", &adai::cpu::sums);
}
