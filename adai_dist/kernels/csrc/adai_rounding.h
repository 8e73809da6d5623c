// Rounding to 16 bits, shared by the CPU and CUDA kernels; adai_dist/rounding.py is the specification.
#pragma once

#include "adai_dtypes.h"

namespace adai {

// Global indices of the elements of a tensor: element i has start + (i / run) * stride + i % run.
struct Origin {
  int64_t start, run, stride;
};

ADAI_FUNCTION uint64_t index_of(const Origin& origin, int64_t i) {
  return static_cast<uint64_t>(origin.start + i / origin.run * origin.stride + i % origin.run);
}

constexpr int ORIGIN_WORDS = 3, STREAM_WORDS = 2;

// The inputs of the rounding of one tensor in a step; see Rounding in rounding.py.
struct Rounding {
  uint32_t streams[STREAM_WORDS];
  Origin origin;
  float settled;
};

// The same for a list of tensors.
struct RoundingInputs {
  const int32_t* streams;
  const int64_t* origins;
  const float* settled;
};

ADAI_FUNCTION Rounding rounding_of(const RoundingInputs& inputs, int64_t i) {
  const int32_t* streams = inputs.streams + i * STREAM_WORDS;
  const int64_t* origin = inputs.origins + i * ORIGIN_WORDS;
  return {{static_cast<uint32_t>(streams[0]), static_cast<uint32_t>(streams[1])},
          {origin[0], origin[1], origin[2]},
          inputs.settled[i]};
}

// The hash function lowbias32.
ADAI_FUNCTION uint32_t mixed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// The part of a hashed word that is the same for all elements whose indices differ in their low 32 bits only.
ADAI_FUNCTION uint32_t seed_of(uint32_t stream, uint64_t index) {
  return stream ^ (static_cast<uint32_t>(index >> 32) * 0x9e3779b9u);
}

// Stochastic rounding to bfloat16 with the low 16 bits of `bits`, still as float32.
ADAI_FUNCTION float rounded_to_bfloat16(float x, uint32_t bits) {
  const uint32_t pattern = static_cast<uint32_t>(bits_of(x));
  const uint32_t rounded = (pattern + (bits & 0xffff)) & 0xffff0000;
  return float_of(static_cast<int32_t>((pattern & 0x7fffffff) > 0x7f800000 ? 0x7fc00000 : rounded));
}

ADAI_FUNCTION void round_randomly(float x, uint32_t bits, BFloat16& to) {
  to.bits = static_cast<uint16_t>(static_cast<uint32_t>(bits_of(rounded_to_bfloat16(x, bits))) >> 16);
}

ADAI_FUNCTION void round_randomly(float x, uint32_t bits, Float16& to) {
  const uint32_t pattern = static_cast<uint32_t>(bits_of(x)), magnitude = pattern & 0x7fffffff;
  const float size = float_of(static_cast<int32_t>(magnitude));
  const uint32_t largest = 0x7bff, carried = (magnitude - (112u << 23) + ((bits & 0xffff) >> 3)) >> 13;
  const uint32_t normal = carried < largest ? carried : largest;
  const bool is_subnormal = magnitude < 0x38800000;  // 2^-14
  const float noise = static_cast<float>((bits & 0xffff) >> 3) * 1.220703125e-4f;  // 2^-13
  const float scaled = (is_subnormal ? size : 0.0f) * 16777216.0f + noise;         // 2^24
  const uint32_t subnormal = static_cast<uint32_t>(static_cast<int32_t>(scaled));
  const uint32_t finite = is_subnormal ? subnormal : normal;
  const uint32_t beyond = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  const uint32_t rounded = size < 65520.0f ? finite : beyond;
  to.bits = static_cast<uint16_t>(rounded | ((pattern >> 16) & 0x8000));
}

// Master weights: a rounded number and a remainder. Those of Float16 need conversions, which are defined with the
// kernels.
ADAI_FUNCTION void split(float master, BFloat16& rounded, int16_t& remainder) {
  const uint32_t pattern = static_cast<uint32_t>(bits_of(master));
  const bool is_nan = (pattern & 0x7fffffff) > 0x7f800000;
  rounded.bits = static_cast<uint16_t>(is_nan ? 0x7fc0 : (pattern + 0x8000) >> 16);  // ties away from 0
  remainder = static_cast<int16_t>(is_nan ? 0 : pattern & 0xffff);
}

ADAI_FUNCTION float joined(BFloat16 rounded, int16_t remainder) {
  return float_of(static_cast<int32_t>((uint32_t{rounded.bits} << 16) + static_cast<uint32_t>(int32_t{remainder})));
}

// 2^-15 of the spacing of float16, and its inverse.
ADAI_FUNCTION int32_t unit_exponent(Float16 rounded) {
  const int32_t exponent = (rounded.bits >> 10) & 0x1f;
  return (exponent < 1 ? 1 : exponent > 30 ? 30 : exponent) + 87;
}

ADAI_FUNCTION int16_t remainder_of(float master, float widened, Float16 rounded) {
  const float error = (master - widened) * float_of((254 - unit_exponent(rounded)) * (1 << 23));
  const float rounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const bool is_finite = (rounded.bits & 0x7c00) != 0x7c00;
  return static_cast<int16_t>(static_cast<int32_t>(is_finite ? (error + rounder) - rounder : 0.0f));
}

ADAI_FUNCTION float joined(float widened, Float16 rounded, int16_t remainder) {
  return widened + static_cast<float>(remainder) * float_of(unit_exponent(rounded) * (1 << 23));
}

// beta1_prod in bfloat16 is stored as Q = 1 - P.
ADAI_FUNCTION float product_of(BFloat16 q) { return 1.0f - widen(q); }

}  // namespace adai
