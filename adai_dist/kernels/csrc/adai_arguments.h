// Checks and conversions of the operators' arguments, shared by the torch bindings for CPU and CUDA.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include "adai_eight_bits.h"

namespace adai {

inline Hyper checked_hyper(c10::ArrayRef<double> values) {
  TORCH_CHECK(values.size() == NUM_HYPER, "hyper must have ", NUM_HYPER, " numbers, got ", values.size());
  return hyper_of(values.data());
}

// The dtype of a checked tensor, or of a checked list; an empty list may have any.
inline Dtype dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kByte: return Dtype::eight_bits;
    case at::kBFloat16: return Dtype::bfloat16;
    case at::kHalf: return Dtype::float16;
    default: return Dtype::float32;
  }
}

inline Dtype dtype_of(at::TensorList tensors) { return tensors.empty() ? Dtype::float32 : dtype_of(tensors[0]); }

// The number of elements of a tensor, or of those whose second moments are in the records of a tensor.
inline int64_t num_elements_of(const at::Tensor& tensor) {
  const int64_t record_bytes = static_cast<int64_t>(sizeof(Record));
  return tensor.scalar_type() == at::kByte ? tensor.numel() / record_bytes * RECORD_ELEMENTS : tensor.numel();
}

// Whether both can be traversed in one order of memory. Strides of dimensions of size 1 do not matter.
inline bool same_layout(const at::Tensor& a, const at::Tensor& b) {
  if (a.sizes() != b.sizes()) return false;
  if (a.strides() == b.strides() || a.numel() == 0) return true;
  for (int64_t dim = 0; dim < a.dim(); ++dim) {
    if (a.size(dim) != 1 && a.stride(dim) != b.stride(dim)) return false;
  }
  return true;
}

inline void check_dtype(const char* name, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, name,
                   " must be float32, bfloat16 or float16, got ", dtype);
}

inline void check_state_dtype(const char* name, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16, name, " must be float32 or bfloat16, got ", dtype);
}

// The list that the others must match: one device, one dtype, dense without overlaps.
inline void check_leading_list(const char* name, at::TensorList tensors) {
  for (const at::Tensor& tensor : tensors) {
    TORCH_CHECK(tensor.device() == tensors[0].device(), name, " must be on one device, got ", tensors[0].device(),
                " and ", tensor.device());
    TORCH_CHECK_TYPE(tensor.scalar_type() == tensors[0].scalar_type(), name, " must have one dtype, got ",
                     tensors[0].scalar_type(), " and ", tensor.scalar_type());
    TORCH_CHECK_VALUE(tensor.is_non_overlapping_and_dense(), name, " must be dense without overlaps, got sizes ",
                      tensor.sizes(), " with strides ", tensor.strides());
  }
}

// A list that matches the leading one in number of tensors, sizes and strides.
inline void check_list(const char* name, at::TensorList tensors, const char* leading_name, at::TensorList leading) {
  TORCH_CHECK_VALUE(tensors.size() == leading.size(), name, " must have as many tensors as ", leading_name, ", ",
                    leading.size(), ", got ", tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor &tensor = tensors[i], &other = leading[i];
    TORCH_CHECK(tensor.device() == other.device(), name, " must be on the device of ", leading_name, ", ",
                other.device(), ", got ", tensor.device());
    TORCH_CHECK_TYPE(tensor.scalar_type() == tensors[0].scalar_type(), name, " must have one dtype, got ",
                     tensors[0].scalar_type(), " and ", tensor.scalar_type());
    TORCH_CHECK_VALUE(same_layout(tensor, other), name, " must have sizes and strides of ", leading_name, ", ",
                      other.sizes(), " and ", other.strides(), ", got ", tensor.sizes(), " and ", tensor.strides());
  }
}

inline bool are_records(at::TensorList exp_avg_sqs) {
  return !exp_avg_sqs.empty() && exp_avg_sqs[0].scalar_type() == at::kByte;
}

// Second moments: float32, bfloat16, or uint8, which are records of contiguous tensors.
inline void check_second_moments(at::TensorList exp_avg_sqs, const char* leading_name, at::TensorList leading) {
  const char* name = "exp_avg_sqs";
  if (!are_records(exp_avg_sqs)) {
    check_list(name, exp_avg_sqs, leading_name, leading);
    if (!exp_avg_sqs.empty()) check_state_dtype(name, exp_avg_sqs[0].scalar_type());
    return;
  }
  TORCH_CHECK_VALUE(exp_avg_sqs.size() == leading.size(), name, " must have as many tensors as ", leading_name, ", ",
                    leading.size(), ", got ", exp_avg_sqs.size());
  for (size_t i = 0; i < exp_avg_sqs.size(); ++i) {
    const at::Tensor &records = exp_avg_sqs[i], &other = leading[i];
    TORCH_CHECK(records.device() == other.device(), name, " must be on the device of ", leading_name, ", ",
                other.device(), ", got ", records.device());
    TORCH_CHECK_TYPE(records.scalar_type() == at::kByte, name, " must have one dtype, got Byte and ",
                     records.scalar_type());
    TORCH_CHECK_VALUE(records.is_contiguous() && other.is_contiguous() && other.numel() % RECORD_ELEMENTS == 0 &&
                          records.numel() == other.numel() / RECORD_ELEMENTS * static_cast<int64_t>(sizeof(Record)),
                      name, " of uint8 must be contiguous, with ", sizeof(Record), " bytes for ", RECORD_ELEMENTS,
                      " elements of ", leading_name, ", got sizes ", records.sizes(), " for ", other.sizes(),
                      " with strides ", other.strides());
  }
}

inline void check_remainders(at::TensorList remainders, at::TensorList params) {
  if (remainders.empty()) return;
  TORCH_CHECK_VALUE(remainders.size() == params.size(), "remainders must have as many tensors as params, ",
                    params.size(), ", or none, got ", remainders.size());
  for (size_t i = 0; i < remainders.size(); ++i) {
    const at::Tensor &remainder = remainders[i], &param = params[i];
    TORCH_CHECK_TYPE(remainder.scalar_type() == at::kShort && param.scalar_type() != at::kFloat,
                     "remainders must be int16, of bfloat16 or float16 params, got ", remainder.scalar_type(), " of ",
                     param.scalar_type());
    TORCH_CHECK(remainder.device() == param.device(), "remainders must be on the device of params, ", param.device(),
                ", got ", remainder.device());
    TORCH_CHECK_VALUE(same_layout(remainder, param), "remainders must have sizes and strides of params, ",
                      param.sizes(), " and ", param.strides(), ", got ", remainder.sizes(), " and ",
                      remainder.strides());
  }
}

// A tensor of scalars, read on the device of the lists.
inline void check_scalars(const char* name, const at::Tensor& tensor, at::ScalarType dtype, int64_t num_elements,
                          at::Device device) {
  TORCH_CHECK_VALUE(tensor.numel() == num_elements && tensor.is_contiguous(), name, " must be contiguous with ",
                    num_elements, " elements, got sizes ", tensor.sizes(), " with strides ", tensor.strides());
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, " must be ", dtype, ", got ", tensor.scalar_type());
  TORCH_CHECK(tensor.device() == device, name, " must be on ", device, ", got ", tensor.device());
}

// Arguments of observe; params, remainders and exp_avg_sqs may be empty.
inline void check_observe(at::TensorList grads, at::TensorList params, at::TensorList remainders,
                          at::TensorList exp_avg_sqs, const at::Tensor& kept, const at::Tensor& coefficient) {
  check_leading_list("grads", grads);
  if (!params.empty()) check_list("params", params, "grads", grads);
  check_remainders(remainders, params);
  if (!exp_avg_sqs.empty()) check_second_moments(exp_avg_sqs, "grads", grads);
  if (grads.empty()) return;
  check_dtype("grads", grads[0].scalar_type());
  if (!params.empty()) check_dtype("params", params[0].scalar_type());
  check_scalars("coefficient", coefficient, at::kFloat, 1, grads[0].device());
  check_scalars("kept", kept, at::kDouble, static_cast<int64_t>(exp_avg_sqs.size()) * NUM_KEPT, grads[0].device());
}

// Whether a step rounds a list of tensors, and therefore reads the argument `rounding`.
inline bool is_rounding(at::TensorList params, at::TensorList exp_avgs, at::TensorList remainders) {
  if (params.empty()) return false;
  return exp_avgs[0].scalar_type() != at::kFloat || (params[0].scalar_type() != at::kFloat && remainders.empty());
}

// Lists of advance; beta1_prods and remainders may be empty.
inline void check_advance(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                          at::TensorList exp_avg_sqs, at::TensorList beta1_prods, at::TensorList remainders) {
  check_leading_list("params", params);
  check_list("grads", grads, "params", params);
  check_list("exp_avgs", exp_avgs, "params", params);
  check_second_moments(exp_avg_sqs, "params", params);
  if (!beta1_prods.empty()) check_list("beta1_prods", beta1_prods, "params", params);
  check_remainders(remainders, params);
  if (params.empty()) return;
  check_dtype("params", params[0].scalar_type());
  check_dtype("grads", grads[0].scalar_type());
  check_state_dtype("exp_avgs", exp_avgs[0].scalar_type());
  const at::ScalarType others = are_records(exp_avg_sqs) ? at::kByte : exp_avgs[0].scalar_type();
  const bool are_mixed = others == at::kByte && exp_avgs[0].scalar_type() == at::kBFloat16;
  for (const at::TensorList& states : {exp_avg_sqs, beta1_prods}) {
    TORCH_CHECK_TYPE(states.empty() || (states[0].scalar_type() == others && (are_mixed || others != at::kByte)),
                     "exp_avgs, exp_avg_sqs and beta1_prods must have one dtype, or be bfloat16, uint8 and uint8, got ",
                     exp_avgs[0].scalar_type(), " and ", states[0].scalar_type());
  }
}

// The argument `rounding`: streams, origins and settled, see Rounding in rounding.py.
inline void check_rounding(at::TensorList rounding, at::TensorList params) {
  TORCH_CHECK_VALUE(rounding.size() == 3, "rounding must have 3 tensors for bfloat16 states, and for params in low "
                    "precision without remainders, got ", rounding.size());
  const int64_t num_tensors = static_cast<int64_t>(params.size());
  check_scalars("streams", rounding[0], at::kInt, num_tensors * STREAM_WORDS, params[0].device());
  check_scalars("origins", rounding[1], at::kLong, num_tensors * ORIGIN_WORDS, params[0].device());
  check_scalars("settled", rounding[2], at::kFloat, num_tensors, params[0].device());
}

// Scalars of advance.
inline void check_step(const at::Tensor& inverse_means, const at::Tensor& coefficient, const at::Tensor& lr,
                       const at::Tensor& is_finite, const at::Tensor& is_live, at::TensorList params) {
  if (params.empty()) return;
  const at::Device device = params[0].device();
  check_scalars("inverse_means", inverse_means, at::kFloat, params.size(), device);
  check_scalars("coefficient", coefficient, at::kFloat, 1, device);
  check_scalars("lr", lr, at::kFloat, 1, device);
  check_scalars("is_finite", is_finite, at::kBool, 1, device);
  check_scalars("is_live", is_live, at::kBool, 1, device);
}

inline RoundingInputs rounding_inputs_of(at::TensorList rounding) {
  return {rounding[0].const_data_ptr<int32_t>(), rounding[1].const_data_ptr<int64_t>(),
          rounding[2].const_data_ptr<float>()};
}

// Arguments of sums.
inline void check_sums(at::TensorList exp_avg_sqs, const at::Tensor& kept) {
  check_leading_list("exp_avg_sqs", exp_avg_sqs);
  if (exp_avg_sqs.empty()) return;
  if (!are_records(exp_avg_sqs)) check_state_dtype("exp_avg_sqs", exp_avg_sqs[0].scalar_type());
  for (const at::Tensor& records : exp_avg_sqs) {
    TORCH_CHECK_VALUE(!are_records(exp_avg_sqs) || records.numel() % static_cast<int64_t>(sizeof(Record)) == 0,
                      "exp_avg_sqs of uint8 must have records of ", sizeof(Record), " bytes, got sizes ",
                      records.sizes());
  }
  check_scalars("kept", kept, at::kDouble, static_cast<int64_t>(exp_avg_sqs.size()) * NUM_KEPT,
                exp_avg_sqs[0].device());
}

// Increments the version counters, by which autograd and cached sums of states detect the write.
inline void bump_versions(at::TensorList tensors) {
  for (const at::Tensor& tensor : tensors) {
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace adai
