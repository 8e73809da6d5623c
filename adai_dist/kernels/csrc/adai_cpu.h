// The CPU kernels as the glue sees them: torch-free, compiled once per instruction set, chosen when they run.
#pragma once

#include <cstdint>

#include "adai_dtypes.h"

namespace adai {
namespace cpu {

// Tensors are stepped and summed in chunks, by as many threads as there are; a chunk is always summed in one order.
constexpr int64_t CHUNK_ELEMENTS = 1 << 14;

// A run of elements of one parameter, at most CHUNK_ELEMENTS long.
struct Chunk {
  void* param;
  const void* grad;
  float* exp_avg;
  float* exp_avg_sq;
  float* beta1_prod;  // null where it is retired
  int64_t num_elements;
};

struct Dtypes {
  Dtype param, grad;
};

struct Sums {
  double grad_grad, grad_param, param_param, expected;
};

struct Kernels {
  // Inner products of one chunk; those with the parameter are 0 where it is null. The last is the squared norm of the
  // effective gradient.
  Sums (*observe)(const Chunk&, const Dtypes&, float coefficient, float coupled_decay);
  // One step of one chunk; returns the sum of the new exp_avg_sq.
  double (*advance)(const Chunk&, const Dtypes&, const Hyper&, const Step&);
  // The parameter's part in a step that does not count.
  void (*decay)(const Chunk&, const Dtypes&, const Step&);
  // The sum of a chunk of exp_avg_sq, added up as advance does.
  double (*sum)(const float* exp_avg_sq, int64_t num_elements);
};

Kernels kernels_default();
#if defined(__x86_64__)
Kernels kernels_avx2();
Kernels kernels_avx512();
#endif

}  // namespace cpu
}  // namespace adai
