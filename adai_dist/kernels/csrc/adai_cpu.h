// Interface of the CPU kernels: independent of torch, compiled once per instruction set, selected at run time.
#pragma once

#include <cstdint>

#include "adai_eight_bits.h"

namespace adai {
namespace cpu {

// Tensors are stepped and summed in chunks, on all threads; the order of summation within a chunk is fixed.
constexpr int64_t CHUNK_ELEMENTS = 1 << 14;

// A run of elements of one parameter, at most CHUNK_ELEMENTS long.
struct Chunk {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* beta1_prod;    // null if retired; 1 - P unless float32
  int16_t* remainder;  // of master weights; null for none
  int64_t start;       // index of the first element in its tensor
  int64_t num_elements;
};

struct Dtypes {
  Dtype param, grad, state;
};

struct Sums {
  double grad_grad, grad_param, param_param, expected;
};

struct Kernels {
  // Inner products of one chunk, the last of the effective gradient; without a parameter, all but the first are 0.
  Sums (*observe)(const Chunk&, const Dtypes&, float coefficient, float coupled_decay);
  // Steps one chunk; returns the sum of the new exp_avg_sq.
  double (*advance)(const Chunk&, const Dtypes&, const Hyper&, const Step&, const Rounding&);
  // Decays the parameter in a step that does not count.
  void (*decay)(const Chunk&, const Dtypes&, const Step&, const Rounding&);
  // Sums a chunk of exp_avg_sq in the order of advance.
  double (*sum)(const void* exp_avg_sq, Dtype state, int64_t num_elements);
};

Kernels kernels_default();
#if defined(__x86_64__)
Kernels kernels_avx2();
Kernels kernels_avx512();
#endif

}  // namespace cpu
}  // namespace adai
