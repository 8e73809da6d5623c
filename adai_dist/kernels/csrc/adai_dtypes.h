// The element types of parameters and gradients, for the CPU and CUDA kernels; torch-free.
#pragma once

#include "adai_math.h"

namespace adai {

enum class Dtype : int32_t { float32, bfloat16, float16 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// Conversions are exact to float32, and round to nearest, ties to even, from it. Those of Float16 are where the
// kernels are: GPUs have instructions for them.
ADAI_FUNCTION float widen(float x) { return x; }

ADAI_FUNCTION float widen(BFloat16 x) { return float_of(static_cast<int32_t>(uint32_t{x.bits} << 16)); }

ADAI_FUNCTION void narrow(float x, float& to) { to = x; }

ADAI_FUNCTION void narrow(float x, BFloat16& to) {
  const uint32_t bits = static_cast<uint32_t>(bits_of(x));
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

}  // namespace adai
