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

// Conversions to float32 are exact. Those of Float16 are defined with the kernels, because GPUs have instructions for
// them; adai_rounding.h rounds to the others.
ADAI_FUNCTION float widen(float x) { return x; }

ADAI_FUNCTION float widen(BFloat16 x) { return float_of(static_cast<int32_t>(uint32_t{x.bits} << 16)); }

}  // namespace adai
