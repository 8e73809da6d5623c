// The loops of the CPU kernels. Each adai_cpu_<instruction set>.cpp includes this file once, with its instructions
// enabled. Everything has internal linkage, so that the linker cannot merge code for different processors.
//
// Sums use LANES float64 accumulators for every vector width, so that results depend only on the elements. Low
// precision is converted to float32 block by block, within the L1 cache.

#include "adai_cpu.h"

namespace adai {
namespace cpu {
namespace {

constexpr int64_t LANES = 32;
constexpr int64_t BLOCK_ELEMENTS = 512;
constexpr int64_t PREFETCH_ELEMENTS = 128;
constexpr int64_t CACHE_LINE_ELEMENTS = 16;
static_assert(BLOCK_ELEMENTS % LANES == 0, "a block begins with the first lane");

ADAI_FUNCTION double sum_of(const double (&lanes)[LANES]) {
  double sums[LANES];
  for (int64_t j = 0; j < LANES; ++j) sums[j] = lanes[j];
  for (int64_t width = LANES / 2; width > 0; width /= 2) {
    for (int64_t j = 0; j < width; ++j) sums[j] += sums[j + width];
  }
  return sums[0];
}

// -- float16, without branches so that loops vectorise ---------------------------------------------------------------

using adai::narrow;
using adai::widen;

ADAI_FUNCTION float widen(Float16 x) {
  const uint32_t sign = (x.bits & uint32_t{0x8000}) << 16;
  const int32_t magnitude = x.bits & 0x7fff;
  const float subnormal = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // 2^-24
  const int32_t rebias = magnitude >= 0x7c00 ? 224 << 23 : 112 << 23;              // keeps infinity and NaN
  const int32_t normal = magnitude * (1 << 13) + rebias;
  return float_of((magnitude < 0x400 ? bits_of(subnormal) : normal) | static_cast<int32_t>(sign));
}

ADAI_FUNCTION void narrow(float x, Float16& to) {
  const uint32_t bits = static_cast<uint32_t>(bits_of(x));
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const float in_place = float_of(static_cast<int32_t>(magnitude)) + 0.5f;  // moves a subnormal's bits to the end
  const uint32_t subnormal = static_cast<uint32_t>(bits_of(in_place) - bits_of(0.5f));
  const uint32_t beyond = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;  // 2^-14
  to.bits = static_cast<uint16_t>((magnitude >= 0x47800000 ? beyond : finite) | ((bits >> 16) & 0x8000));  // 2^16
}

// -- loops over at most a block of float32 ----------------------------------------------------------------------------

struct ObserveLanes {
  double grad_grad[LANES] = {}, grad_param[LANES] = {}, param_param[LANES] = {}, expected[LANES] = {};
};

template <bool HAS_PARAM>
ADAI_FUNCTION void observe_lanes(const float* grad, const float* param, int64_t n, float coefficient,
                                 float coupled_decay, ObserveLanes& lanes) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const double g = grad[j];
    lanes.grad_grad[j] += g * g;
    if (HAS_PARAM) {
      const double theta = param[j];
      lanes.grad_param[j] += g * theta;
      lanes.param_param[j] += theta * theta;
      const double e = effective<true>(grad[j], param[j], coefficient, coupled_decay);
      lanes.expected[j] += e * e;
    }
  }
}

template <bool HAS_PARAM>
void observe_block(const float* grad, const float* param, int64_t n, float coefficient, float coupled_decay,
                   ObserveLanes& lanes) {
  ObserveLanes local = lanes;
  int64_t i = 0;
  const auto observe_next = [&](int64_t count) {
    observe_lanes<HAS_PARAM>(grad + i, HAS_PARAM ? param + i : nullptr, count, coefficient, coupled_decay, local);
  };
  for (; i + LANES <= n; i += LANES) {
    for (int64_t j = i; j < i + LANES; j += CACHE_LINE_ELEMENTS) {
      __builtin_prefetch(grad + j + 2 * PREFETCH_ELEMENTS);  // twice as far ahead as in advance, which is slower
      if (HAS_PARAM) __builtin_prefetch(param + j + 2 * PREFETCH_ELEMENTS);
    }
    observe_next(LANES);
  }
  observe_next(n - i);
  lanes = local;
}

struct Block {
  float* __restrict__ theta;
  const float* __restrict__ grad;
  float* __restrict__ m;
  float* __restrict__ v;
  float* __restrict__ P;
};

// Hardware prefetchers do not follow five streams well. A prefetch beyond the end of a tensor is harmless.
template <class VARIANT>
ADAI_FUNCTION void prefetch(const Block& block, int64_t start) {
  for (int64_t i = start; i < start + LANES; i += CACHE_LINE_ELEMENTS) {
    __builtin_prefetch(block.grad + i);
    __builtin_prefetch(block.theta + i, 1);
    __builtin_prefetch(block.m + i, 1);
    __builtin_prefetch(block.v + i, 1);
    if (VARIANT::HAS_PRODUCT) __builtin_prefetch(block.P + i, 1);
  }
}

// Steps n <= LANES elements from `start` on.
template <class VARIANT>
ADAI_FUNCTION void advance_lanes(const Block& block, int64_t start, int64_t n, const Hyper& hyper, const Step& step,
                                 double (&lanes)[LANES]) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const int64_t i = start + j;
    // Copies: references into the arrays would store every intermediate result.
    float theta = block.theta[i], m = block.m[i], v = block.v[i], P = VARIANT::HAS_PRODUCT ? block.P[i] : 0.0f;
    advance<VARIANT>(theta, block.grad[i], m, v, P, hyper, step);
    block.theta[i] = theta;
    block.m[i] = m;
    block.v[i] = v;
    if (VARIANT::HAS_PRODUCT) block.P[i] = P;
    lanes[j] += static_cast<double>(v);
  }
}

template <class VARIANT>
void advance_block(const Block& arguments, int64_t n, const Hyper& hyper_, const Step& step_, double (&lanes_)[LANES]) {
  const Block block = arguments;
  const Hyper hyper = hyper_;
  const Step step = step_;
  double lanes[LANES];
  for (int64_t j = 0; j < LANES; ++j) lanes[j] = lanes_[j];
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    prefetch<VARIANT>(block, i + PREFETCH_ELEMENTS);
    advance_lanes<VARIANT>(block, i, LANES, hyper, step, lanes);
  }
  advance_lanes<VARIANT>(block, i, n - i, hyper, step, lanes);
  for (int64_t j = 0; j < LANES; ++j) lanes_[j] = lanes[j];
}

using AdvanceBlock = void (*)(const Block&, int64_t, const Hyper&, const Step&, double (&)[LANES]);

// -- chunks of any dtype ----------------------------------------------------------------------------------------------

// Returns a block as float32: the block itself, or a converted copy in `buffer`.
template <class T>
ADAI_FUNCTION const float* widened(const T* from, int64_t n, float* buffer) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) buffer[j] = widen(from[j]);
  return buffer;
}

ADAI_FUNCTION const float* widened(const float* from, int64_t, float*) { return from; }

const float* block_of(const void* data, Dtype dtype, int64_t start, int64_t n, float* buffer) {
  switch (dtype) {
    case Dtype::bfloat16: return widened(static_cast<const BFloat16*>(data) + start, n, buffer);
    case Dtype::float16: return widened(static_cast<const Float16*>(data) + start, n, buffer);
    default: return widened(static_cast<const float*>(data) + start, n, buffer);
  }
}

template <class T>
ADAI_FUNCTION void narrowed(const float* buffer, T* to, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) narrow(buffer[j], to[j]);
}

// Writes a block that block_of() converted back to its source.
void write_back(const float* buffer, void* data, Dtype dtype, int64_t start, int64_t n) {
  if (dtype == Dtype::bfloat16) narrowed(buffer, static_cast<BFloat16*>(data) + start, n);
  if (dtype == Dtype::float16) narrowed(buffer, static_cast<Float16*>(data) + start, n);
}

ADAI_FUNCTION int64_t block_elements(const Chunk& chunk, int64_t start) {
  const int64_t left = chunk.num_elements - start;
  return left < BLOCK_ELEMENTS ? left : BLOCK_ELEMENTS;
}

Sums observe(const Chunk& chunk, const Dtypes& dtypes, float coefficient, float coupled_decay) {
  float grad_buffer[BLOCK_ELEMENTS], param_buffer[BLOCK_ELEMENTS];
  ObserveLanes lanes;
  for (int64_t start = 0; start < chunk.num_elements; start += BLOCK_ELEMENTS) {
    const int64_t n = block_elements(chunk, start);
    const float* grad = block_of(chunk.grad, dtypes.grad, start, n, grad_buffer);
    if (chunk.param == nullptr) {
      observe_block<false>(grad, nullptr, n, 0.0f, 0.0f, lanes);
    } else {
      const float* param = block_of(chunk.param, dtypes.param, start, n, param_buffer);
      observe_block<true>(grad, param, n, coefficient, coupled_decay, lanes);
    }
  }
  return {sum_of(lanes.grad_grad), sum_of(lanes.grad_param), sum_of(lanes.param_param), sum_of(lanes.expected)};
}

double advance(const Chunk& chunk, const Dtypes& dtypes, const Hyper& hyper, const Step& step) {
  const auto block_function = [](auto variant) -> AdvanceBlock { return advance_block<decltype(variant)>; };
  const AdvanceBlock advance_next = with_variant(hyper, chunk.beta1_prod != nullptr, block_function);
  float grad_buffer[BLOCK_ELEMENTS], param_buffer[BLOCK_ELEMENTS];
  double lanes[LANES] = {};
  for (int64_t start = 0; start < chunk.num_elements; start += BLOCK_ELEMENTS) {
    const int64_t n = block_elements(chunk, start);
    const float* grad = block_of(chunk.grad, dtypes.grad, start, n, grad_buffer);
    float* theta = const_cast<float*>(block_of(chunk.param, dtypes.param, start, n, param_buffer));
    float* P = chunk.beta1_prod == nullptr ? nullptr : chunk.beta1_prod + start;
    advance_next({theta, grad, chunk.exp_avg + start, chunk.exp_avg_sq + start, P}, n, hyper, step, lanes);
    write_back(theta, chunk.param, dtypes.param, start, n);
  }
  return sum_of(lanes);
}

void decay(const Chunk& chunk, const Dtypes& dtypes, const Step& step) {
  float buffer[BLOCK_ELEMENTS];
  for (int64_t start = 0; start < chunk.num_elements; start += BLOCK_ELEMENTS) {
    const int64_t n = block_elements(chunk, start);
    float* theta = const_cast<float*>(block_of(chunk.param, dtypes.param, start, n, buffer));
    for (int64_t j = 0; j < n; ++j) adai::decay(theta[j], step);
    write_back(theta, chunk.param, dtypes.param, start, n);
  }
}

double sum(const float* exp_avg_sq, int64_t num_elements) {
  double lanes[LANES] = {};
  for (int64_t start = 0; start < num_elements; start += LANES) {
    const int64_t n = num_elements - start < LANES ? num_elements - start : LANES;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) lanes[j] += static_cast<double>(exp_avg_sq[start + j]);
  }
  return sum_of(lanes);
}

}  // namespace

Kernels ADAI_CPU_KERNELS() { return {observe, advance, decay, sum}; }

}  // namespace cpu
}  // namespace adai
