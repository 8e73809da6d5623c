// Element types of parameters, gradients and states, for the CPU and CUDA kernels; independent of torch.
#pragma once

#include "adai_math.h"

namespace adai {

// States of eight_bits are those of mixed8: first moments in bfloat16, second moments in records, 1 - P in 8 bits.
enum class Dtype : int32_t { float32, bfloat16, float16, eight_bits };

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
