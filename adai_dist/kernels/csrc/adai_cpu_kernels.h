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
constexpr int64_t BLOCK_ELEMENTS = 256;
constexpr int64_t PREFETCH_ELEMENTS = 256;
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

// Random words of elements whose indices are consecutive.
struct Consecutive {
  uint32_t first, seed;
};

// Random words in an array.
struct Listed {
  const uint32_t* __restrict__ words;
};

ADAI_FUNCTION uint32_t word_of(const Consecutive& words, int64_t i) {
  return mixed((words.first + static_cast<uint32_t>(i)) ^ words.seed);
}

ADAI_FUNCTION uint32_t word_of(const Listed& words, int64_t i) { return words.words[i]; }

// The memory that the next block is converted from.
struct NextBlock {
  struct Stream {
    const char* data;
    int64_t element_bytes;
  };
  Stream streams[6];
  int num_streams = 0;

  void add(const void* data, int64_t element_bytes, int64_t start) {
    if (data == nullptr) return;
    streams[num_streams++] = {static_cast<const char*>(data) + start * element_bytes, element_bytes};
  }
};

// A block with states in bfloat16.
template <class WORDS>
struct LowBlock : Block {
  WORDS words;
  float settled;
  NextBlock next;
  const uint16_t* __restrict__ low_m;
  const uint16_t* __restrict__ low_v;
  const uint16_t* __restrict__ low_q;
};

// A block with states of mixed8.
template <class WORDS>
struct MixedBlock : Block {
  WORDS words;
  float settled;
  NextBlock next;
  const uint16_t* __restrict__ low_m;
  Record* records;
  uint8_t* __restrict__ q;
};

ADAI_FUNCTION void prefetch(const NextBlock& next, int64_t start) {
  for (int k = 0; k < next.num_streams; ++k) {
    const NextBlock::Stream& stream = next.streams[k];
    const char* line = stream.data + (start - PREFETCH_ELEMENTS) * stream.element_bytes;
    __builtin_prefetch(line, 1);
    if (stream.element_bytes == 4) __builtin_prefetch(line + 64, 1);
  }
}

template <class VARIANT, class WORDS>
ADAI_FUNCTION void prefetch(const LowBlock<WORDS>& block, int64_t start) {
  prefetch(block.next, start);
}

template <class VARIANT, class WORDS>
ADAI_FUNCTION void prefetch(const MixedBlock<WORDS>& block, int64_t start) {
  prefetch(block.next, start);
}

// The states are rounded, but still float32: 1 - P in place of P.
template <class VARIANT, class WORDS>
ADAI_FUNCTION void advance_lanes(const LowBlock<WORDS>& block, int64_t start, int64_t n, const Hyper& hyper,
                                 const Step& step, double (&lanes)[LANES]) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const int64_t i = start + j;
    float theta = block.theta[i], m = widen(BFloat16{block.low_m[i]}), v = widen(BFloat16{block.low_v[i]});
    float P = VARIANT::HAS_PRODUCT ? product_of(BFloat16{block.low_q[i]}) : 0.0f;
    advance<VARIANT>(theta, block.grad[i], m, v, P, hyper, step);
    block.theta[i] = theta;
    const uint32_t bits = word_of(block.words, i);
    block.m[i] = rounded_to_bfloat16(m, bits);
    v = rounded_to_bfloat16(v, bits >> 16);
    block.v[i] = v;
    if (VARIANT::HAS_PRODUCT) {
      const float q = P > block.settled ? 1.0f - P : 1.0f;
      block.P[i] = rounded_to_bfloat16(q, bits ^ (bits >> 16));
    }
    lanes[j] += static_cast<double>(v);
  }
}

// A conversion of 8-bit numbers has a loop of its own: in one with float32, vectors of all types would have as many
// elements as fit of the narrowest.
ADAI_FUNCTION void widened(const uint8_t* codes, int32_t (&wide)[LANES]) {
#pragma omp simd
  for (int64_t j = 0; j < LANES; ++j) wide[j] = codes[j];
}

ADAI_FUNCTION void packed(const int32_t (&wide)[LANES], uint8_t* codes) {
#pragma omp simd
  for (int64_t j = 0; j < LANES; ++j) codes[j] = static_cast<uint8_t>(wide[j]);
}

// Steps the elements of a record, or none. First moments are rounded, but still float32.
template <class VARIANT, class WORDS>
ADAI_FUNCTION void advance_lanes(const MixedBlock<WORDS>& block, int64_t start, int64_t n, const Hyper& hyper,
                                 const Step& step, double (&lanes)[LANES]) {
  static_assert(LANES == RECORD_ELEMENTS, "each lane has one element of a record");
  if (n == 0) return;
  Record& record = block.records[start / RECORD_ELEMENTS];
  const float old_scale = widen(record.scale);
  int32_t v_codes[LANES], q_codes[LANES] = {};
  float new_v[LANES], new_q[LANES];
  uint32_t bits[LANES];
  widened(record.codes, v_codes);
  if (VARIANT::HAS_PRODUCT) widened(block.q + start, q_codes);
  uint32_t largest = 0;  // the bits of floats without sign have their order, and NaN is the largest
#pragma omp simd reduction(max : largest)
  for (int64_t j = 0; j < LANES; ++j) {
    const int64_t i = start + j;
    float theta = block.theta[i], m = widen(BFloat16{block.low_m[i]}), v = ratio_of(v_codes[j]) * old_scale;
    float P = VARIANT::HAS_PRODUCT ? 1.0f - complement_of(q_codes[j]) : 0.0f;
    advance<VARIANT>(theta, block.grad[i], m, v, P, hyper, step);
    block.theta[i] = theta;
    bits[j] = word_of(block.words, i);
    block.m[i] = rounded_to_bfloat16(m, bits[j]);
    new_v[j] = v;
    new_q[j] = P > block.settled ? 1.0f - P : 1.0f;
    const uint32_t pattern = static_cast<uint32_t>(bits_of(v)) & 0x7fffffff;
    largest = pattern > largest ? pattern : largest;
  }
  const float scale = scale_of(float_of(static_cast<int32_t>(largest)), bits[0] >> 16), inverse = inverse_of(scale);
  record.scale.bits = static_cast<uint16_t>(static_cast<uint32_t>(bits_of(scale)) >> 16);
#pragma omp simd
  for (int64_t j = 0; j < LANES; ++j) {
    const bool is_largest = static_cast<uint32_t>(bits_of(new_v[j])) == largest && scale > 0.0f;
    v_codes[j] = is_largest ? 255 : code_of_ratio(new_v[j] * inverse, bits[j] >> 16);
    lanes[j] += static_cast<double>(ratio_of(v_codes[j]) * scale);
  }
  packed(v_codes, record.codes);
  if (!VARIANT::HAS_PRODUCT) return;
#pragma omp simd
  for (int64_t j = 0; j < LANES; ++j) q_codes[j] = code_of_complement(new_q[j], bits[j] ^ (bits[j] >> 16));
  packed(q_codes, block.q + start);
}

template <class VARIANT, class BLOCK>
void advance_block(const BLOCK& arguments, int64_t n, const Hyper& hyper_, const Step& step_, double (&lanes_)[LANES]) {
  const BLOCK block = arguments;
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

template <class BLOCK>
using AdvanceBlock = void (*)(const BLOCK&, int64_t, const Hyper&, const Step&, double (&)[LANES]);

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

// Number of elements from `start` on whose global indices are consecutive and have the same high 32 bits.
int64_t num_consecutive(const Origin& origin, int64_t start) {
  const int64_t in_run = origin.run - start % origin.run;
  const int64_t before_carry = (int64_t{1} << 32) - static_cast<uint32_t>(index_of(origin, start));
  return in_run < before_carry ? in_run : before_carry;
}

// Random words of n elements from `start` on.
void fill(uint32_t* words, uint32_t stream, const Origin& origin, int64_t start, int64_t n) {
  for (int64_t i = 0; i < n;) {
    const uint64_t index = index_of(origin, start + i);
    const uint32_t first = static_cast<uint32_t>(index), seed = seed_of(stream, index);
    const int64_t consecutive = num_consecutive(origin, start + i), count = consecutive < n - i ? consecutive : n - i;
    uint32_t* next = words + i;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) next[j] = mixed((first + static_cast<uint32_t>(j)) ^ seed);
    i += count;
  }
}

template <class T>
void rounded_randomly(const float* buffer, const uint32_t* words, T* to, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) round_randomly(buffer[j], words[j], to[j]);
}

using adai::joined;
using adai::split;

ADAI_FUNCTION void split(float master, Float16& rounded, int16_t& remainder) {
  narrow(master, rounded);
  remainder = remainder_of(master, widen(rounded), rounded);
}

ADAI_FUNCTION float joined(Float16 rounded, int16_t remainder) { return joined(widen(rounded), rounded, remainder); }

// The parameters of a block as float32: the parameters themselves, or a copy that write_params() converts back.
template <class T>
float* read_params(const Chunk& chunk, int64_t start, int64_t n, float* buffer) {
  const T* from = static_cast<const T*>(chunk.param) + start;
  if (chunk.remainder == nullptr) return const_cast<float*>(widened(from, n, buffer));
  const int16_t* remainder = chunk.remainder + start;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) buffer[j] = joined(from[j], remainder[j]);
  return buffer;
}

template <class T>
void write_params(const float* theta, const Rounding& rounding, const Chunk& chunk, int64_t start, int64_t n) {
  T* to = static_cast<T*>(chunk.param) + start;
  if (chunk.remainder == nullptr) {
    uint32_t words[BLOCK_ELEMENTS];
    fill(words, rounding.streams[1], rounding.origin, chunk.start + start, n);
    return rounded_randomly(theta, words, to, n);
  }
  int16_t* remainder = chunk.remainder + start;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) split(theta[j], to[j], remainder[j]);
}

float* params_of(const Chunk& chunk, Dtype dtype, int64_t start, int64_t n, float* buffer) {
  switch (dtype) {
    case Dtype::bfloat16: return read_params<BFloat16>(chunk, start, n, buffer);
    case Dtype::float16: return read_params<Float16>(chunk, start, n, buffer);
    default: return static_cast<float*>(chunk.param) + start;
  }
}

void store_params(const float* theta, const Rounding& rounding, const Chunk& chunk, Dtype dtype, int64_t start,
                  int64_t n) {
  if (dtype == Dtype::bfloat16) write_params<BFloat16>(theta, rounding, chunk, start, n);
  if (dtype == Dtype::float16) write_params<Float16>(theta, rounding, chunk, start, n);
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
      const float* param = params_of(chunk, dtypes.param, start, n, param_buffer);
      observe_block<true>(grad, param, n, coefficient, coupled_decay, lanes);
    }
  }
  return {sum_of(lanes.grad_grad), sum_of(lanes.grad_param), sum_of(lanes.param_param), sum_of(lanes.expected)};
}

template <class T>
ADAI_FUNCTION void sum_lanes(const T* v, int64_t n, double (&lanes)[LANES]) {
  for (int64_t start = 0; start < n; start += LANES) {
    const int64_t count = n - start < LANES ? n - start : LANES;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) lanes[j] += static_cast<double>(widen(v[start + j]));
  }
}

ADAI_FUNCTION void sum_lanes(const Record* records, int64_t n, double (&lanes)[LANES]) {
  for (const Record* record = records; record < records + n / RECORD_ELEMENTS; ++record) {
    const float scale = widen(record->scale);
    int32_t codes[LANES];
    widened(record->codes, codes);
#pragma omp simd
    for (int64_t j = 0; j < LANES; ++j) lanes[j] += static_cast<double>(ratio_of(codes[j]) * scale);
  }
}

double sum(const void* exp_avg_sq, Dtype state, int64_t num_elements) {
  double lanes[LANES] = {};
  switch (state) {
    case Dtype::eight_bits: sum_lanes(static_cast<const Record*>(exp_avg_sq), num_elements, lanes); break;
    case Dtype::bfloat16: sum_lanes(static_cast<const BFloat16*>(exp_avg_sq), num_elements, lanes); break;
    default: sum_lanes(static_cast<const float*>(exp_avg_sq), num_elements, lanes);
  }
  return sum_of(lanes);
}

ADAI_FUNCTION int64_t bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// Drops the low bits of rounded numbers.
void pack(const float* buffer, BFloat16* to, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) to[j].bits = static_cast<uint16_t>(static_cast<uint32_t>(bits_of(buffer[j])) >> 16);
}

// The states of a chunk in bfloat16.
struct LowStates {
  template <class WORDS>
  using BlockOf = LowBlock<WORDS>;

  BFloat16 *m, *v, *q;

  explicit LowStates(const Chunk& chunk)
      : m(static_cast<BFloat16*>(chunk.exp_avg)),
        v(static_cast<BFloat16*>(chunk.exp_avg_sq)),
        q(static_cast<BFloat16*>(chunk.beta1_prod)) {}

  void add_to(NextBlock& next, int64_t start) const {
    next.add(m, 2, start);
    next.add(v, 2, start);
    next.add(q, 2, start);
  }

  template <class WORDS>
  BlockOf<WORDS> block(const Block& wide, WORDS words, float settled, const NextBlock& next, int64_t start) const {
    const auto low = [&](const BFloat16* x) { return reinterpret_cast<const uint16_t*>(x + start); };
    return {wide, words, settled, next, low(m), low(v), low(q)};
  }

  void store(const Block& wide, int64_t start, int64_t n) const {
    pack(wide.m, m + start, n);
    pack(wide.v, v + start, n);
    if (q != nullptr) pack(wide.P, q + start, n);
  }
};

// The states of a chunk in mixed8, of which steps write all but the first moments.
struct MixedStates {
  template <class WORDS>
  using BlockOf = MixedBlock<WORDS>;

  BFloat16* m;
  Record* v;
  uint8_t* q;

  explicit MixedStates(const Chunk& chunk)
      : m(static_cast<BFloat16*>(chunk.exp_avg)),
        v(static_cast<Record*>(chunk.exp_avg_sq)),
        q(static_cast<uint8_t*>(chunk.beta1_prod)) {}

  void add_to(NextBlock& next, int64_t start) const {
    next.add(m, 2, start);
    next.add(v, 1, start / RECORD_ELEMENTS * static_cast<int64_t>(sizeof(Record)));
    next.add(q, 1, start);
  }

  template <class WORDS>
  BlockOf<WORDS> block(const Block& wide, WORDS words, float settled, const NextBlock& next, int64_t start) const {
    const auto low_m = reinterpret_cast<const uint16_t*>(m + start);
    return {wide, words, settled, next, low_m, v + start / RECORD_ELEMENTS, q + start};
  }

  void store(const Block& wide, int64_t start, int64_t n) const { pack(wide.m, m + start, n); }
};

template <class BLOCK>
AdvanceBlock<BLOCK> advance_block_of(const Hyper& hyper, bool has_product) {
  using Advance = AdvanceBlock<BLOCK>;
  return with_variant(hyper, has_product,
                      [](auto variant) -> Advance { return advance_block<decltype(variant), BLOCK>; });
}

template <class STATES>
double advance_low(const Chunk& chunk, const Dtypes& dtypes, const Hyper& hyper, const Step& step,
                   const Rounding& rounding) {
  using ConsecutiveBlock = typename STATES::template BlockOf<Consecutive>;
  using ListedBlock = typename STATES::template BlockOf<Listed>;
  const auto advance_consecutive = advance_block_of<ConsecutiveBlock>(hyper, chunk.beta1_prod != nullptr);
  const auto advance_listed = advance_block_of<ListedBlock>(hyper, chunk.beta1_prod != nullptr);
  const STATES states(chunk);
  float grad_buffer[BLOCK_ELEMENTS], param_buffer[BLOCK_ELEMENTS];
  float wide_m[BLOCK_ELEMENTS], wide_v[BLOCK_ELEMENTS], wide_q[BLOCK_ELEMENTS];
  uint32_t words[BLOCK_ELEMENTS];
  double lanes[LANES] = {};
  for (int64_t start = 0; start < chunk.num_elements; start += BLOCK_ELEMENTS) {
    const int64_t n = block_elements(chunk, start);
    const float* grad = block_of(chunk.grad, dtypes.grad, start, n, grad_buffer);
    float* theta = params_of(chunk, dtypes.param, start, n, param_buffer);
    const Block wide{theta, grad, wide_m, wide_v, wide_q};
    NextBlock next;
    next.add(chunk.param, bytes_of(dtypes.param), start + BLOCK_ELEMENTS);
    next.add(chunk.grad, bytes_of(dtypes.grad), start + BLOCK_ELEMENTS);
    next.add(chunk.remainder, 2, start + BLOCK_ELEMENTS);
    states.add_to(next, start + BLOCK_ELEMENTS);
    const uint64_t index = index_of(rounding.origin, chunk.start + start);
    if (num_consecutive(rounding.origin, chunk.start + start) >= n) {
      const Consecutive consecutive{static_cast<uint32_t>(index), seed_of(rounding.streams[0], index)};
      const auto block = states.block(wide, consecutive, rounding.settled, next, start);
      advance_consecutive(block, n, hyper, step, lanes);
    } else {
      fill(words, rounding.streams[0], rounding.origin, chunk.start + start, n);
      const auto block = states.block(wide, Listed{words}, rounding.settled, next, start);
      advance_listed(block, n, hyper, step, lanes);
    }
    states.store(wide, start, n);
    store_params(theta, rounding, chunk, dtypes.param, start, n);
  }
  return sum_of(lanes);
}

double advance(const Chunk& chunk, const Dtypes& dtypes, const Hyper& hyper, const Step& step,
               const Rounding& rounding) {
  if (dtypes.state == Dtype::eight_bits) return advance_low<MixedStates>(chunk, dtypes, hyper, step, rounding);
  if (dtypes.state == Dtype::bfloat16) return advance_low<LowStates>(chunk, dtypes, hyper, step, rounding);
  using Advance = AdvanceBlock<Block>;
  const auto block_function = [](auto variant) -> Advance { return advance_block<decltype(variant), Block>; };
  const Advance advance_next = with_variant(hyper, chunk.beta1_prod != nullptr, block_function);
  float *m = static_cast<float*>(chunk.exp_avg), *v = static_cast<float*>(chunk.exp_avg_sq);
  float grad_buffer[BLOCK_ELEMENTS], param_buffer[BLOCK_ELEMENTS];
  double lanes[LANES] = {};
  for (int64_t start = 0; start < chunk.num_elements; start += BLOCK_ELEMENTS) {
    const int64_t n = block_elements(chunk, start);
    const float* grad = block_of(chunk.grad, dtypes.grad, start, n, grad_buffer);
    float* theta = params_of(chunk, dtypes.param, start, n, param_buffer);
    float* P = chunk.beta1_prod == nullptr ? nullptr : static_cast<float*>(chunk.beta1_prod) + start;
    advance_next({theta, grad, m + start, v + start, P}, n, hyper, step, lanes);
    store_params(theta, rounding, chunk, dtypes.param, start, n);
  }
  return sum_of(lanes);
}

void decay(const Chunk& chunk, const Dtypes& dtypes, const Step& step, const Rounding& rounding) {
  float buffer[BLOCK_ELEMENTS];
  for (int64_t start = 0; start < chunk.num_elements; start += BLOCK_ELEMENTS) {
    const int64_t n = block_elements(chunk, start);
    float* theta = params_of(chunk, dtypes.param, start, n, buffer);
    for (int64_t j = 0; j < n; ++j) adai::decay(theta[j], step);
    store_params(theta, rounding, chunk, dtypes.param, start, n);
  }
}

}  // namespace

Kernels ADAI_CPU_KERNELS() { return {observe, advance, decay, sum}; }

}  // namespace cpu
}  // namespace adai
