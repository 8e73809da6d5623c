// Adaptive Inertia for one element in float32, shared by the CPU loops, their tails and the CUDA kernels.
//
// adai_dist/equations.py is the specification and has the legend of the symbols; operations have the names and the
// order that they have there. Functions take scalar references and have their booleans as template arguments, so that
// the compiler can vectorise the loop around them.
//
// Only +, -, *, /, comparisons and bit operations are used, which every processor rounds correctly. Compiled without
// contraction and without fast-math, an element therefore has the same bits in a vector, in a tail and on a GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define ADAI_FUNCTION static __host__ __device__ __forceinline__
#else
// Always inline: the CPU sources are compiled for several instruction sets, and the linker would merge the copies.
#define ADAI_FUNCTION static inline __attribute__((always_inline))
#endif

namespace adai {

// Dampening d, as far as it selects operations.
enum class Dampening { one, zero, between };

// The formulas of a step; a template argument.
template <bool COUPLED_, Dampening DAMPENING_, bool HAS_PRODUCT_>
struct Variant {
  static constexpr bool COUPLED = COUPLED_;          // weight decay enters the gradient
  static constexpr Dampening DAMPENING = DAMPENING_;
  static constexpr bool HAS_PRODUCT = HAS_PRODUCT_;  // P is stored; otherwise 1 - P is 1
};

// The exponent of a power, and its split into 12 leading bits and the rest.
struct Exponent {
  float whole, high, low;
};

// The scalars of a variant, X(type, name), in the order of KERNEL_SCALARS in adai_dist/hyper.py.
#define ADAI_HYPER(X)           \
  X(float, beta0)               \
  X(float, beta2)               \
  X(float, one_minus_beta2)     \
  X(float, max_inertia)         \
  X(float, coupled_decay)       \
  X(float, decoupled_decay)     \
  X(Exponent, dampening)        \
  X(Exponent, inertia_exponent) \
  X(float, lr_factor)

struct Hyper {
#define ADAI_FIELD(TYPE, NAME) TYPE NAME;
  ADAI_HYPER(ADAI_FIELD)
#undef ADAI_FIELD
};

#define ADAI_ONE(TYPE, NAME) +1
constexpr size_t NUM_HYPER = 0 ADAI_HYPER(ADAI_ONE);
#undef ADAI_ONE

// The scalars of a step of one tensor; see StepScalars in equations.py.
struct Step {
  float coefficient, decay_factor, step_size, inverse_mean;
};

ADAI_FUNCTION int32_t bits_of(float x) {
  int32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

ADAI_FUNCTION float float_of(int32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

ADAI_FUNCTION void round_to(float& scalar, double x) { scalar = static_cast<float>(x); }

ADAI_FUNCTION void round_to(Exponent& a, double x) {
  a.whole = static_cast<float>(x);
  a.high = float_of(bits_of(a.whole) & ~0xfff);
  a.low = static_cast<float>(x - a.high);
}

// Rounds NUM_HYPER float64 values, once per call of an operator.
ADAI_FUNCTION Hyper hyper_of(const double* values) {
  Hyper hyper;
#define ADAI_ROUND(TYPE, NAME) round_to(hyper.NAME, *values++);
  ADAI_HYPER(ADAI_ROUND)
#undef ADAI_ROUND
  return hyper;
}

// x^a for x >= 0 and 0 < a < 1, within 2 units in the last place. x below 2^-126 is taken as 0, infinity as 2^128.
//
// With x = 2^k * z and sqrt(1/2) <= z < sqrt(2): x^a = 2^(a * (k + log2 z)). The product a * k needs more than 24 bits;
// k has 8 and the leading part of a has 12, so that their product is exact. The polynomials are minimax fits of degrees
// 8 and 5.
ADAI_FUNCTION float power(float x, const Exponent& a) {
  const int32_t k = (bits_of(x) - 0x3f3504f3) >> 23;
  const float r = float_of(bits_of(x) - k * (1 << 23)) - 1.0f;
  float p = 0.12542647123336792f;
  p = p * r + -0.21028926968574524f;
  p = p * r + 0.2173660397529602f;
  p = p * r + -0.2385212779045105f;
  p = p * r + 0.2876587212085724f;
  p = p * r + -0.3607211410999298f;
  p = p * r + 0.4809224307537079f;
  p = p * r + -0.7213471531867981f;
  p = p * r + 1.442694902420044f;
  const float k_float = static_cast<float>(k);
  const float leading = k_float * a.high;
  const float rest = k_float * a.low + a.whole * (r * p);
  const float rounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float n = ((leading + rest) + rounder) - rounder;
  const float f = (leading - n) + rest;
  float e = 0.00015476022963412106f;
  e = e * f + 0.0013400382595136762f;
  e = e * f + 0.009618004783987999f;
  e = e * f + 0.055503275245428085f;
  e = e * f + 0.24022650718688965f;
  e = e * f + 0.6931471824645996f;
  e = e * f + 1.0f;
  const float result = float_of(bits_of(e) + static_cast<int32_t>(n) * (1 << 23));
  return x < 1.17549435e-38f ? 0.0f : result;
}

// Computes the scalars of a step; lr_factor is beta0^(1 - d).
ADAI_FUNCTION Step step_of(const Hyper& hyper, float coefficient, float lr, float inverse_mean) {
  return {coefficient, 1.0f - lr * hyper.decoupled_decay, lr * -hyper.lr_factor, inverse_mean};
}

// The effective gradient g.
template <bool COUPLED>
ADAI_FUNCTION float effective(float gradient, float theta, float coefficient, float coupled_decay) {
  const float g = gradient * coefficient;
  return COUPLED ? g + theta * coupled_decay : g;
}

// One step of one element, in place on theta, m, v and P; `gradient` is the raw gradient.
template <class VARIANT>
ADAI_FUNCTION void advance(float& theta, float gradient, float& m, float& v, float& P, const Hyper& hyper,
                           const Step& step) {
  const float g = effective<VARIANT::COUPLED>(gradient, theta, step.coefficient, hyper.coupled_decay);
  theta = theta * step.decay_factor;

  v = v * hyper.beta2;
  v = v + (hyper.one_minus_beta2 * g) * g;

  float r = v * step.inverse_mean;
  if (VARIANT::DAMPENING != Dampening::one) r = power(r, hyper.inertia_exponent);
  float beta1 = 1.0f - r * hyper.beta0;
  beta1 = beta1 > 0.0f ? beta1 : 0.0f;
  beta1 = beta1 < hyper.max_inertia ? beta1 : hyper.max_inertia;

  float one_minus_beta1 = 1.0f - beta1;
  if (VARIANT::DAMPENING == Dampening::between) one_minus_beta1 = power(one_minus_beta1, hyper.dampening);
  m = m * beta1;
  m = m + (VARIANT::DAMPENING == Dampening::zero ? g : one_minus_beta1 * g);

  float update = m;
  if (VARIANT::HAS_PRODUCT) {
    P = P * beta1;
    update = m / (1.0f - P);
  }
  theta = theta + update * step.step_size;
}

template <class CALL>
static inline auto with_flag(bool flag, const CALL& call) {
  return flag ? call(std::true_type{}) : call(std::false_type{});
}

// Returns call(Variant<...>{}) with the formulas that these hyperparameters need; on the host.
template <class CALL>
static inline auto with_variant(const Hyper& hyper, bool has_product, const CALL& call) {
  return with_flag(hyper.coupled_decay != 0.0f, [&](auto coupled) {
    return with_flag(has_product, [&](auto product) {
      constexpr bool COUPLED = decltype(coupled)::value, HAS_PRODUCT = decltype(product)::value;
      if (hyper.dampening.whole == 1.0f) return call(Variant<COUPLED, Dampening::one, HAS_PRODUCT>{});
      if (hyper.dampening.whole == 0.0f) return call(Variant<COUPLED, Dampening::zero, HAS_PRODUCT>{});
      return call(Variant<COUPLED, Dampening::between, HAS_PRODUCT>{});
    });
  });
}

// Columns of the result of observe, one row per tensor: <gradient, gradient>, sum(v), <gradient, theta>,
// <theta, theta>, and <g, g> of the effective gradient.
constexpr int NUM_OBSERVED = 5, V_SUM = 1;

// Columns of the result of advance, which the next observe receives as `kept`: sum(v), and the sum of samples of v.
constexpr int NUM_KEPT = 2, SAMPLE_SUM = 1;

// The distance between samples of v, whose sum detects writes by others: every element of a small tensor, else about
// 128 samples. A sample costs a CPU about a microsecond, as it misses both the cache and the TLB. The distance is odd,
// which spreads the samples over the columns of a matrix.
ADAI_FUNCTION int64_t sample_distance(int64_t num_elements) {
  return num_elements <= 2048 ? 1 : (num_elements / 128) | 1;
}

// A step that does not count: only decoupled decay applies (unless a gradient is non-finite).
ADAI_FUNCTION void decay(float& theta, const Step& step) { theta = theta * step.decay_factor; }

}  // namespace adai
