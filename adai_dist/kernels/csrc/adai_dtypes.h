// Element types of parameters and gradients, for the CPU and CUDA kernels; independent of torch.
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

// Conversions to float32 are exact; those from float32 round to nearest, ties to even. Those of Float16 are defined
// with the kernels, because GPUs have instructions for them.
ADAI_FUNCTION float widen(float x) { return x; }

ADAI_FUNCTION float widen(BFloat16 x) { return float_of(static_cast<int32_t>(uint32_t{x.bits} << 16)); }

ADAI_FUNCTION void narrow(float x, float& to) { to = x; }

ADAI_FUNCTION void narrow(float x, BFloat16& to) {
  const uint32_t bits = static_cast<uint32_t>(bits_of(x));
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

}  // namespace adai
