// Device code shared by the kernels in adai_cuda.cu: float16 conversions, lists of tensors as kernel arguments, and the
// reading, writing, rounding and summation of a chunk by the threads of a block.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "adai_cuda.h"

#define DEVICE_FUNCTION static __device__ __forceinline__

namespace adai::cuda {

constexpr int THREADS = 256;
constexpr int VECTOR_ELEMENTS = 4;  // consecutive elements per access of a thread: 16 bytes of float32

// The limit of a kernel's arguments, which CUDA 12.1 raised for architectures from 7.0 on.
#define ADAI_FIRST_OF(first, ...) first
#define ADAI_LOWEST_ARCHITECTURE(...) ADAI_FIRST_OF(__VA_ARGS__, 0)
#if defined(CUDART_VERSION) && CUDART_VERSION >= 12010 && ADAI_LOWEST_ARCHITECTURE(__CUDA_ARCH_LIST__) >= 700
constexpr int64_t MAX_ARGUMENT_BYTES = 32764;
#else
constexpr int64_t MAX_ARGUMENT_BYTES = 4096;
#endif
constexpr int64_t MAX_SCALAR_BYTES = 192;  // arguments other than lists

using adai::joined;
using adai::product_of;
using adai::round_randomly;
using adai::second_moment;
using adai::split;
using adai::widen;

DEVICE_FUNCTION float widen(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }
DEVICE_FUNCTION void narrow(float x, Float16& to) { to.bits = __half_as_ushort(__float2half_rn(x)); }

DEVICE_FUNCTION void split(float master, Float16& rounded, int16_t& remainder) {
  narrow(master, rounded);
  remainder = remainder_of(master, widen(rounded), rounded);
}

DEVICE_FUNCTION float joined(Float16 rounded, int16_t remainder) { return joined(widen(rounded), rounded, remainder); }

DEVICE_FUNCTION float product_of(float P) { return P; }

DEVICE_FUNCTION float product_of(uint8_t code) { return 1.0f - complement_of(code); }

DEVICE_FUNCTION void round_randomly(float q, uint32_t bits, uint8_t& code) {
  code = static_cast<uint8_t>(code_of_complement(q, bits));
}

// The types of the other states beside second moments of a type.
template <class MOMENT>
using FirstMoment = std::conditional_t<std::is_same<MOMENT, Record>::value, BFloat16, MOMENT>;
template <class MOMENT>
using Product = std::conditional_t<std::is_same<MOMENT, Record>::value, uint8_t, MOMENT>;

// -- lists of tensors -------------------------------------------------------------------------------------------------

// The tensors of a launch as kernel arguments. Block b takes chunk b - first_blocks[slot] of the tensor at `slot`.
template <int NUM_LISTS>
struct Table {
  static constexpr int64_t TENSOR_BYTES = (NUM_LISTS + 2) * 8;
  static constexpr int CAPACITY = static_cast<int>((MAX_ARGUMENT_BYTES - MAX_SCALAR_BYTES) / TENSOR_BYTES);

  void* lists[NUM_LISTS][CAPACITY];
  int64_t num_elements[CAPACITY];
  int64_t first_blocks[CAPACITY];
  int num_tensors;

  template <class POINTER>
  void set_list(int list, const std::vector<POINTER>& pointers, const Launch& launch) {
    for (int64_t slot = 0; slot < launch.num_tensors && !pointers.empty(); ++slot) {
      lists[list][slot] = const_cast<void*>(static_cast<const void*>(pointers[launch.first_tensor + slot]));
    }
  }

  void set_sizes(const std::vector<int64_t>& all_num_elements, const Launch& launch) {
    num_tensors = static_cast<int>(launch.num_tensors);
    int64_t first_block = -launch.num_skipped;
    for (int slot = 0; slot < num_tensors; ++slot) {
      num_elements[slot] = all_num_elements[launch.first_tensor + slot];
      first_blocks[slot] = first_block;
      first_block += num_chunks(num_elements[slot]);
    }
  }

  // The last tensor that begins at or before this block; an empty tensor begins where the next one does.
  __device__ int slot_of(int64_t block) const {
    int low = 0, high = num_tensors;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first_blocks[middle] <= block) low = middle;
      else high = middle;
    }
    return low;
  }
};

// The elements of a block.
struct Chunk {
  int slot;
  int64_t offset;  // of the first element, in its tensor
  int count;

  template <class TABLE>
  __device__ Chunk(const TABLE& table, int64_t block) : slot(table.slot_of(block)) {
    offset = (block - table.first_blocks[slot]) * CHUNK_ELEMENTS;
    const int64_t left = table.num_elements[slot] - offset;
    count = static_cast<int>(left < CHUNK_ELEMENTS ? left : CHUNK_ELEMENTS);
  }

  // The elements in the tensor of a list.
  template <class T>
  __device__ T* of(void* const* list) const {
    return static_cast<T*>(list[slot]) + (std::is_same<T, Record>::value ? offset / RECORD_ELEMENTS : offset);
  }
};

// -- elements of a chunk ----------------------------------------------------------------------------------------------

template <class T>
struct alignas(VECTOR_ELEMENTS * sizeof(T)) Vector {
  T elements[VECTOR_ELEMENTS];
};

template <class T>
DEVICE_FUNCTION bool is_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(Vector<T>) == 0;
}

DEVICE_FUNCTION bool is_aligned(const Record*) { return true; }

// The codes of a vector of second moments.
struct alignas(2) Codes {
  uint8_t elements[VECTOR_ELEMENTS];
};

// The elements that the threads take at once: NUM per thread, in vectors of consecutive elements; vector i of a thread
// follows its vector i - 1 at a distance of THREADS vectors. A thread thus has the same elements in the same order for
// every tile size. A whole tile is accessed in vectors, a partial one element by element up to `count`, unless it is
// known at run time to be whole.
template <int NUM_VECTORS, bool IS_WHOLE_>
struct Tile {
  static constexpr bool IS_WHOLE = IS_WHOLE_;
  static constexpr int NUM = NUM_VECTORS * VECTOR_ELEMENTS;
  static constexpr int ELEMENTS = NUM * THREADS;

  int first, count;  // in the chunk
  bool in_vectors;   // whether a partial tile is whole and aligned

  // Index in the chunk of element i of this thread.
  __device__ int index(int i) const {
    const int vector = i / VECTOR_ELEMENTS * THREADS + static_cast<int>(threadIdx.x);
    return first + vector * VECTOR_ELEMENTS + i % VECTOR_ELEMENTS;
  }

  // Elements beyond `count` read as 0.
  template <class T>
  __device__ void load(const T* chunk, T (&x)[NUM]) const {
#pragma unroll
    for (int i = 0; i < NUM; i += VECTOR_ELEMENTS) {
      Vector<T> vector{};
      if (IS_WHOLE || in_vectors) {
        vector = *reinterpret_cast<const Vector<T>*>(chunk + index(i));
      } else {
#pragma unroll
        for (int k = 0; k < VECTOR_ELEMENTS; ++k) {
          if (index(i + k) < count) vector.elements[k] = chunk[index(i + k)];
        }
      }
#pragma unroll
      for (int k = 0; k < VECTOR_ELEMENTS; ++k) x[i + k] = vector.elements[k];
    }
  }

  template <class T>
  __device__ void store(const T (&x)[NUM], T* chunk) const {
#pragma unroll
    for (int i = 0; i < NUM; i += VECTOR_ELEMENTS) {
      Vector<T> vector;
#pragma unroll
      for (int k = 0; k < VECTOR_ELEMENTS; ++k) vector.elements[k] = x[i + k];
      if (IS_WHOLE || in_vectors) {
        *reinterpret_cast<Vector<T>*>(chunk + index(i)) = vector;
      } else {
#pragma unroll
        for (int k = 0; k < VECTOR_ELEMENTS; ++k) {
          if (index(i + k) < count) chunk[index(i + k)] = x[i + k];
        }
      }
    }
  }
};

// The second moments of a tile as float32.
template <class TILE, class T>
DEVICE_FUNCTION void load_moments(const TILE& tile, const T* chunk, float (&v)[TILE::NUM]) {
  T stored[TILE::NUM];
  tile.load(chunk, stored);
#pragma unroll
  for (int i = 0; i < TILE::NUM; ++i) v[i] = widen(stored[i]);
}

template <class TILE>
DEVICE_FUNCTION void load_moments(const TILE& tile, const Record* chunk, float (&v)[TILE::NUM]) {
#pragma unroll
  for (int i = 0; i < TILE::NUM; i += VECTOR_ELEMENTS) {
    const int index = tile.index(i);
    const bool is_inside = TILE::IS_WHOLE || index < tile.count;  // as the rest of its record
    const Record* record = chunk + (is_inside ? index / RECORD_ELEMENTS : 0);
    Codes codes{};
    if (is_inside) codes = *reinterpret_cast<const Codes*>(record->codes + index % RECORD_ELEMENTS);
    const float scale = is_inside ? widen(record->scale) : 0.0f;
#pragma unroll
    for (int k = 0; k < VECTOR_ELEMENTS; ++k) v[i + k] = ratio_of(codes.elements[k]) * scale;
  }
}

// Calls body(tile) for partial tiles that cover the elements of a chunk from `first` on.
template <class BODY>
DEVICE_FUNCTION void for_each_part(int count, bool are_aligned, const BODY& body, int first = 0) {
  using Part = Tile<1, false>;
  for (; first < count; first += Part::ELEMENTS) {
    body(Part{first, count, are_aligned && first + Part::ELEMENTS <= count});
  }
}

// Calls body(tile) for tiles that cover a chunk. All are partial unless `may_be_whole`.
template <int NUM_VECTORS, class BODY>
DEVICE_FUNCTION void for_each_tile(int count, bool are_aligned, const BODY& body, bool may_be_whole = true) {
  using Whole = Tile<NUM_VECTORS, true>;
  int first = 0;
  if (are_aligned && may_be_whole) {
    for (; first + Whole::ELEMENTS <= count; first += Whole::ELEMENTS) body(Whole{first, count, true});
  }
  for_each_part(count, are_aligned && !may_be_whole, body, first);
}

// -- rounding ---------------------------------------------------------------------------------------------------------

template <class T>
constexpr bool IS_LOW = !std::is_same<T, float>::value;

// Random words of the elements of a chunk; see Origin.
class Randomness {
 public:
  float settled;

  // Without inputs, the words must not be used.
  __device__ Randomness(const RoundingInputs& inputs, int64_t num_elements, const Chunk& chunk) {
    const bool has_inputs = inputs.streams != nullptr;
    const Rounding contiguous{{}, {0, int64_t{1} << 62, 0}, 0.0f};
    const Rounding rounding = has_inputs ? rounding_of(inputs, chunk.slot) : contiguous;
    const Origin& origin = rounding.origin;
    settled = rounding.settled;
    streams_[0] = rounding.streams[0];
    streams_[1] = rounding.streams[1];
    const bool is_divided = has_inputs && origin.run < num_elements;  // 64-bit divisions are slow
    const int64_t num_runs = is_divided ? chunk.offset / origin.run : 0;
    const int64_t position = chunk.offset - num_runs * origin.run, left = origin.run - position;
    first_ = static_cast<uint64_t>(origin.start + num_runs * origin.stride + position);
    next_ = static_cast<uint64_t>(origin.start + (num_runs + 1) * origin.stride);
    stride_ = static_cast<uint64_t>(origin.stride);
    num_before_next_ = static_cast<int>(left < CHUNK_ELEMENTS ? left : CHUNK_ELEMENTS);
    run_ = static_cast<int>(origin.run < CHUNK_ELEMENTS ? origin.run : CHUNK_ELEMENTS);
    inverse_run_ = is_divided ? 1.0f / static_cast<float>(run_) : 0.0f;
  }

  // Whether the indices of a chunk are consecutive; otherwise, its tiles must be partial.
  __device__ bool is_consecutive(int count) const { return count <= num_before_next_; }

  template <class TILE>
  __device__ void fill(const TILE& tile, int stream, uint32_t (&words)[TILE::NUM]) const {
    if (TILE::IS_WHOLE) {
      const uint32_t first = static_cast<uint32_t>(first_), seed = seed_of(streams_[stream], first_);
      const uint32_t carried_seed = seed_of(streams_[stream], first_ + (uint64_t{1} << 32));
#pragma unroll
      for (int i = 0; i < TILE::NUM; ++i) {
        const uint32_t low = first + static_cast<uint32_t>(tile.index(i));
        words[i] = mixed(low ^ (low < first ? carried_seed : seed));
      }
    } else {
#pragma unroll
      for (int i = 0; i < TILE::NUM; ++i) {
        const uint64_t index = index_of(tile.index(i));
        words[i] = mixed(static_cast<uint32_t>(index) ^ seed_of(streams_[stream], index));
      }
    }
  }

 private:
  uint32_t streams_[STREAM_WORDS];
  uint64_t first_, next_, stride_;  // indices of the first element of the chunk, and of the next run
  int num_before_next_, run_;       // elements before the next run, and in a run; at most CHUNK_ELEMENTS
  float inverse_run_;

  __device__ uint64_t index_of(int i) const {
    const int beyond = i - num_before_next_;
    if (beyond < 0) return first_ + static_cast<uint64_t>(i);
    // The exact quotient is at least 1 / (2 * run) from an integer, and less than 2^-7 / run from the computed one.
    const int num_runs = static_cast<int>((static_cast<float>(beyond) + 0.5f) * inverse_run_);
    return next_ + static_cast<uint64_t>(num_runs) * stride_ + static_cast<uint64_t>(beyond - num_runs * run_);
  }
};

// The parameters of a tile as float32; `remainder` is used if there are remainders.
template <class PARAM>
DEVICE_FUNCTION float param_of(PARAM param, int16_t remainder, bool has_remainders) {
  if constexpr (IS_LOW<PARAM>) {
    if (has_remainders) return joined(param, remainder);
  }
  return widen(param);
}

// Writes the parameters of a tile, split if there are remainders.
template <class TILE, class PARAM>
DEVICE_FUNCTION void store_params(const TILE& tile, const float (&theta)[TILE::NUM], PARAM* params,
                                  int16_t* remainders, const Randomness* randomness) {
  if constexpr (IS_LOW<PARAM>) {
    PARAM rounded[TILE::NUM];
    if (remainders) {
      int16_t remainder[TILE::NUM];
#pragma unroll
      for (int i = 0; i < TILE::NUM; ++i) split(theta[i], rounded[i], remainder[i]);
      tile.store(remainder, remainders);
    } else {
      uint32_t words[TILE::NUM];
      randomness->fill(tile, 1, words);
#pragma unroll
      for (int i = 0; i < TILE::NUM; ++i) round_randomly(theta[i], words[i], rounded[i]);
    }
    tile.store(rounded, params);
  } else {
    tile.store(theta, params);
  }
}

// Rounds and writes the second moments of a tile, and replaces them by what is stored; 0 beyond the end. All threads of
// the block take part.
template <class TILE, class T>
DEVICE_FUNCTION void store_moments(const TILE& tile, float (&v)[TILE::NUM], const uint32_t (&words)[TILE::NUM],
                                   T* chunk) {
  T stored[TILE::NUM];
#pragma unroll
  for (int i = 0; i < TILE::NUM; ++i) {
    if constexpr (IS_LOW<T>) round_randomly(v[i], words[i] >> 16, stored[i]);
    else stored[i] = v[i];
    v[i] = widen(stored[i]);
  }
  tile.store(stored, chunk);
}

template <class TILE>
DEVICE_FUNCTION void store_moments(const TILE& tile, float (&v)[TILE::NUM], const uint32_t (&words)[TILE::NUM],
                                   Record* chunk) {
  static_assert(TILE::NUM == VECTOR_ELEMENTS, "a thread has one part of a record");
  constexpr unsigned THREADS_OF_RECORD = RECORD_ELEMENTS / VECTOR_ELEMENTS;
  __shared__ uint32_t largest_of[THREADS], words_of[THREADS];
  uint32_t largest = 0;  // the bits of floats without sign have their order, and NaN is the largest
#pragma unroll
  for (int i = 0; i < TILE::NUM; ++i) {
    const uint32_t pattern = static_cast<uint32_t>(bits_of(v[i])) & 0x7fffffff;
    largest = pattern > largest ? pattern : largest;
  }
  __syncthreads();  // the previous tile may still be read
  largest_of[threadIdx.x] = largest;
  words_of[threadIdx.x] = words[0];
  __syncthreads();
  const unsigned first = threadIdx.x / THREADS_OF_RECORD * THREADS_OF_RECORD;
#pragma unroll
  for (unsigned k = 0; k < THREADS_OF_RECORD; ++k) {
    largest = largest_of[first + k] > largest ? largest_of[first + k] : largest;
  }
  const float scale = scale_of(float_of(static_cast<int32_t>(largest)), words_of[first] >> 16);
  const float inverse = inverse_of(scale);
  Codes codes;
#pragma unroll
  for (int i = 0; i < TILE::NUM; ++i) {
    const bool is_largest = static_cast<uint32_t>(bits_of(v[i])) == largest && scale > 0.0f;
    const int32_t code = is_largest ? 255 : code_of_ratio(v[i] * inverse, words[i] >> 16);
    codes.elements[i] = static_cast<uint8_t>(code);
    v[i] = ratio_of(code) * scale;
  }
  const int index = tile.index(0);
  if (!TILE::IS_WHOLE && index >= tile.count) return;
  Record* record = chunk + index / RECORD_ELEMENTS;
  *reinterpret_cast<Codes*>(record->codes + index % RECORD_ELEMENTS) = codes;
  if (threadIdx.x == first) {
    record->scale.bits = static_cast<uint16_t>(static_cast<uint32_t>(bits_of(scale)) >> 16);
  }
}

// -- sums -------------------------------------------------------------------------------------------------------------

// Adds up one number per thread in a fixed order; thread 0 has the sum.
DEVICE_FUNCTION double block_sum(double x) {
  __shared__ double terms[THREADS];
  __syncthreads();  // thread 0 may still be reading the terms of the previous sum
  terms[threadIdx.x] = x;
  for (unsigned stride = THREADS / 2; stride > 0; stride /= 2) {
    __syncthreads();
    if (threadIdx.x < stride) terms[threadIdx.x] += terms[threadIdx.x + stride];
  }
  return terms[0];
}

}  // namespace adai::cuda
