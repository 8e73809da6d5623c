// States in 8 bits, shared by the CPU and CUDA kernels; adai_dist/eight_bits.py is the specification.
#pragma once

#include <cmath>

#include "adai_rounding.h"

namespace adai {

constexpr int RECORD_ELEMENTS = 32;

// The second moments of RECORD_ELEMENTS consecutive elements.
struct Record {
  uint8_t codes[RECORD_ELEMENTS];
  BFloat16 scale;
};
static_assert(sizeof(Record) == RECORD_ELEMENTS + 2, "records are contiguous in memory");

// Rounds x to its upper neighbour with a probability of its distance from the lower one.
ADAI_FUNCTION bool rounds_up(float x, float lower, float upper, uint32_t bits) {
  return static_cast<float>(bits & 0xffff) * 1.52587890625e-5f * (upper - lower) < x - lower;  // 2^-16
}

// The number, in units of the scale, of a code from 0 to 255.
ADAI_FUNCTION float ratio_of(int32_t code) {
  const float root = static_cast<float>(code) * (1.0f / 255.0f), square = root * root;
  return square * square;
}

// Element i of second moments of any type.
template <class T>
ADAI_FUNCTION float second_moment(const T* v, int64_t i) {
  return widen(v[i]);
}

ADAI_FUNCTION float second_moment(const Record* records, int64_t i) {
  const Record& record = records[i / RECORD_ELEMENTS];
  return ratio_of(record.codes[i % RECORD_ELEMENTS]) * widen(record.scale);
}

// The scale of a record: its largest number, rounded; `bits` are those of its first element.
ADAI_FUNCTION float scale_of(float largest, uint32_t bits) {
  const float scale = rounded_to_bfloat16(largest, bits);
  return scale < 1.17549435e-38f ? 0.0f : scale;  // 2^-126
}

ADAI_FUNCTION float inverse_of(float scale) { return scale > 0.0f ? 1.0f / scale : 0.0f; }

// The code of a second moment over the scale; that of the largest one in a record is 255.
ADAI_FUNCTION int32_t code_of_ratio(float ratio, uint32_t bits) {
  const float root = sqrtf(sqrtf(ratio)) * 255.0f;
  const int32_t below = root > 0.0f ? static_cast<int32_t>(root < 254.0f ? root : 254.0f) : 0;
  return below + rounds_up(ratio, ratio_of(below), ratio_of(below + 1), bits);
}

// 1 - P, on a grid that is evenly spaced in the bits of float32.
constexpr int32_t GRID_STEP = 349525, GRID_START = 0x3f800000 - 254 * GRID_STEP;

ADAI_FUNCTION float on_grid(int32_t index) { return float_of(GRID_START + index * GRID_STEP); }

ADAI_FUNCTION float complement_of(int32_t code) { return code == 0 ? 0.0f : on_grid(code - 1); }

ADAI_FUNCTION int32_t code_of_complement(float q, uint32_t bits) {
  const float steps = static_cast<float>(bits_of(q) - GRID_START) * (1.0f / GRID_STEP);
  const int32_t below = steps > 0.0f ? static_cast<int32_t>(steps < 253.0f ? steps : 253.0f) : 0;
  const int32_t above_zero = below + 1 + rounds_up(q, on_grid(below), on_grid(below + 1), bits);
  return q == 0.0f ? 0 : above_zero;
}

}  // namespace adai
