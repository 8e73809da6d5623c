// torch.ops.adai_dist.{observe, advance, sums} on CUDA; adai_dist/kernels/ops.py documents the operators. Nothing here
// synchronises with the device.
#include "adai_cuda.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "adai_arguments.h"

namespace {

std::vector<int64_t> sizes_of(at::TensorList tensors) {
  std::vector<int64_t> num_elements;
  num_elements.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) num_elements.push_back(adai::num_elements_of(tensor));
  return num_elements;
}

std::vector<const void*> read_from(at::TensorList tensors) {
  std::vector<const void*> pointers;
  pointers.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) pointers.push_back(tensor.const_data_ptr());
  return pointers;
}

std::vector<void*> written_to(at::TensorList tensors) {
  std::vector<void*> pointers;
  pointers.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) pointers.push_back(tensor.mutable_data_ptr());
  return pointers;
}

adai::cuda::States states_of(at::TensorList exp_avg_sqs, const at::Tensor& kept) {
  return {read_from(exp_avg_sqs), adai::dtype_of(exp_avg_sqs), kept.const_data_ptr<double>()};
}

// Allocates the partials and the result, and enqueues the kernels.
template <class LISTS, class ENQUEUE>
at::Tensor enqueued(const LISTS& lists, at::TensorList tensors, at::IntArrayRef shape, const ENQUEUE& enqueue) {
  const auto options = at::TensorOptions().dtype(at::kDouble).device(tensors[0].device());
  const at::Tensor sums = at::empty(shape, options);
  const at::Tensor partials = at::empty({adai::cuda::num_partials(lists)}, options);
  const char* error = enqueue(lists, partials.mutable_data_ptr<double>(), sums.mutable_data_ptr<double>(),
                              c10::cuda::getCurrentCUDAStream().stream());
  TORCH_CHECK(error == nullptr, "the kernel must start, got the CUDA error: ", error);
  return sums;
}

at::Tensor observe(at::TensorList grads, at::TensorList params, at::TensorList remainders, at::TensorList exp_avg_sqs,
                   const at::Tensor& kept, const at::Tensor& coefficient, double coupled_decay) {
  adai::check_observe(grads, params, remainders, exp_avg_sqs, kept, coefficient);
  TORCH_CHECK_VALUE(!grads.empty(), "grads must have a tensor, got none");
  const c10::cuda::CUDAGuard guard(grads[0].device());
  adai::cuda::Observed lists;
  lists.num_elements = sizes_of(grads);
  lists.grads = read_from(grads);
  lists.params = read_from(params);
  lists.remainders = read_from(remainders);
  lists.states = states_of(exp_avg_sqs, kept);
  lists.grad_dtype = adai::dtype_of(grads);
  lists.param_dtype = adai::dtype_of(params);
  lists.coefficient = coefficient.const_data_ptr<float>();
  lists.coupled_decay = static_cast<float>(coupled_decay);
  return enqueued(lists, grads, {static_cast<int64_t>(grads.size()), adai::NUM_OBSERVED}, adai::cuda::observe);
}

at::Tensor advance(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                   at::TensorList beta1_prods, at::TensorList remainders, const at::Tensor& inverse_means,
                   const at::Tensor& coefficient, const at::Tensor& lr, const at::Tensor& is_finite,
                   const at::Tensor& is_live, at::TensorList rounding, at::ArrayRef<double> hyperparameters) {
  adai::check_advance(params, grads, exp_avgs, exp_avg_sqs, beta1_prods, remainders);
  adai::check_step(inverse_means, coefficient, lr, is_finite, is_live, params);
  const bool rounds = adai::is_rounding(params, exp_avgs, remainders);
  if (rounds) adai::check_rounding(rounding, params);
  const adai::Hyper hyper = adai::checked_hyper(hyperparameters);
  if (params.empty()) return at::empty({0, adai::NUM_KEPT}, lr.options().dtype(at::kDouble));
  const c10::cuda::CUDAGuard guard(params[0].device());
  adai::cuda::Advanced lists;
  lists.num_elements = sizes_of(params);
  lists.params = written_to(params);
  lists.grads = read_from(grads);
  lists.exp_avgs = written_to(exp_avgs);
  lists.exp_avg_sqs = written_to(exp_avg_sqs);
  lists.beta1_prods = written_to(beta1_prods);
  lists.remainders = written_to(remainders);
  lists.param_dtype = adai::dtype_of(params);
  lists.grad_dtype = adai::dtype_of(grads);
  lists.state_dtype = adai::dtype_of(exp_avg_sqs);
  lists.rounding = rounds ? adai::rounding_inputs_of(rounding) : adai::RoundingInputs{};
  lists.inverse_means = inverse_means.const_data_ptr<float>();
  lists.coefficient = coefficient.const_data_ptr<float>();
  lists.lr = lr.const_data_ptr<float>();
  lists.is_finite = is_finite.const_data_ptr<bool>();
  lists.is_live = is_live.const_data_ptr<bool>();
  lists.hyper = hyper;
  const int64_t num_tensors = static_cast<int64_t>(params.size());
  const at::Tensor kept = enqueued(lists, params, {num_tensors, adai::NUM_KEPT}, adai::cuda::advance);
  for (const at::TensorList& written : {params, exp_avgs, exp_avg_sqs, beta1_prods, remainders}) {
    adai::bump_versions(written);
  }
  return kept;
}

at::Tensor sums(at::TensorList exp_avg_sqs, const at::Tensor& kept) {
  adai::check_sums(exp_avg_sqs, kept);
  TORCH_CHECK_VALUE(!exp_avg_sqs.empty(), "exp_avg_sqs must have a tensor, got none");
  const c10::cuda::CUDAGuard guard(exp_avg_sqs[0].device());
  const adai::cuda::Summed lists{sizes_of(exp_avg_sqs), states_of(exp_avg_sqs, kept)};
  return enqueued(lists, exp_avg_sqs, {static_cast<int64_t>(exp_avg_sqs.size())}, adai::cuda::sum);
}

}  // namespace

TORCH_LIBRARY_IMPL(adai_dist, CUDA, library) {
  library.impl("observe", &observe);
  library.impl("advance", &advance);
  library.impl("sums", &sums);
}
