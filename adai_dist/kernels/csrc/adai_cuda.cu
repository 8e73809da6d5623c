// The CUDA kernels; adai_cuda.h describes the chunks, adai_math.h has the formulas.
//
// The code is restricted to features of HIP and assumes no warp size. It has no atomics, copies or synchronisation:
// lists of tensors are kernel arguments, which a CUDA graph records by value.
#include "adai_cuda_chunks.h"

namespace adai::cuda {
namespace {

constexpr int64_t MAX_BLOCKS = int64_t{1} << 23;  // per launch: HIP allows 2^32 threads

// Data that a thread requests before it computes: vectors per tensor in advance, bytes in all in observe. In advance, 2
// or more blocks are resident per multiprocessor, which the launch bounds ensure, with 64 KiB or more in flight in
// float32; an H200 needs about 26 KiB to saturate its memory (4.8 TB/s, 700 ns, 132 multiprocessors), a B200 about
// 43 KiB. Rounding needs more registers per element: with 16-bit parameters or states, 16 to 28 KiB are in flight.
constexpr int STEP_VECTORS = 2;
constexpr int LOW_STEP_VECTORS = 1;
constexpr int MIN_BLOCKS = 2;
constexpr int OBSERVE_BYTES = 64;

// -- observe ----------------------------------------------------------------------------------------------------------

// Sums the samples of a whole tensor with all threads of a block; thread 0 has the sum.
template <class MOMENT>
__device__ double sample_sum(const MOMENT* v, int64_t num_elements) {
  const int64_t distance = sample_distance(num_elements);
  double sum = 0.0;
  for (int64_t i = threadIdx.x * distance; i < num_elements; i += THREADS * distance) sum += second_moment(v, i);
  return block_sum(sum);
}

// Block i detects whether the exp_avg_sq of tensor i of this launch has been written to.
struct DetectArguments {
  static constexpr int CAPACITY = 250;  // within 4 KiB, as each launch copies its arguments

  const double* kept;
  double* is_stale;
  const void* exp_avg_sqs[CAPACITY];
  int64_t num_elements[CAPACITY];
};

template <class MOMENT>
__global__ void __launch_bounds__(THREADS) detect_writes(const DetectArguments arguments) {
  const MOMENT* v = static_cast<const MOMENT*>(arguments.exp_avg_sqs[blockIdx.x]);
  const double sum = sample_sum(v, arguments.num_elements[blockIdx.x]);
  if (threadIdx.x == 0) {
    const bool is_kept = arguments.kept[blockIdx.x * NUM_KEPT + SAMPLE_SUM] == sum;  // false for NaN
    arguments.is_stale[blockIdx.x] = is_kept ? 0.0 : 1.0;
  }
}

// Sums in the order of advance_chunk, so that equal exp_avg_sqs have equal sums.
template <class MOMENT>
__device__ double sum_chunk(const MOMENT* exp_avg_sqs, int count) {
  double sum = 0.0;
  for_each_tile<STEP_VECTORS>(count, is_aligned(exp_avg_sqs), [&](auto tile) {
    float v[tile.NUM];
    load_moments(tile, exp_avg_sqs, v);
#pragma unroll
    for (int i = 0; i < tile.NUM; ++i) sum += v[i];
  });
  return sum;
}

struct ObserveArguments {
  double* partials;
  int64_t column_stride;
  const double* is_stale;  // null without exp_avg_sqs
  const float* coefficient;
  float coupled_decay;
  bool has_remainders;
  Table<4> table;  // gradients, parameters, exp_avg_sqs, remainders
};

template <bool COUPLED, class GRAD, class PARAM, class MOMENT>
__global__ void __launch_bounds__(THREADS) observe_chunks(const ObserveArguments arguments) {
  const auto& table = arguments.table;
  const Chunk chunk(table, blockIdx.x);
  const GRAD* grads = chunk.of<GRAD>(table.lists[0]);
  const PARAM* params = COUPLED ? chunk.of<PARAM>(table.lists[1]) : nullptr;
  const float coefficient = COUPLED ? *arguments.coefficient : 1.0f;
  const bool has_remainders = COUPLED && IS_LOW<PARAM> && arguments.has_remainders;
  const int16_t* remainders = has_remainders ? chunk.of<int16_t>(table.lists[3]) : nullptr;
  const bool are_aligned = is_aligned(grads) && is_aligned(params) && is_aligned(remainders);
  double grad_grad = 0.0, v_sum = 0.0, grad_param = 0.0, param_param = 0.0, expected = 0.0;
  for_each_tile<OBSERVE_BYTES / sizeof(Vector<GRAD>) / (COUPLED ? 2 : 1)>(chunk.count, are_aligned, [&](auto tile) {
    GRAD g[tile.NUM];
    PARAM theta[tile.NUM];
    int16_t remainder[tile.NUM] = {};
    tile.load(grads, g);
    if (COUPLED) tile.load(params, theta);
    if (has_remainders) tile.load(remainders, remainder);
#pragma unroll
    for (int i = 0; i < tile.NUM; ++i) {
      // These products are exact in float64, so that fma has the bits of a product and a sum.
      const double gradient = widen(g[i]);
      grad_grad = fma(gradient, gradient, grad_grad);
      if (COUPLED) {
        const float theta_i = param_of(theta[i], remainder[i], has_remainders);
        const double param = theta_i;
        grad_param = fma(gradient, param, grad_param);
        param_param = fma(param, param, param_param);
        const double e = effective<true>(widen(g[i]), theta_i, coefficient, arguments.coupled_decay);
        expected = fma(e, e, expected);
      }
    }
  });
  if (arguments.is_stale && arguments.is_stale[chunk.slot] != 0.0) {
    v_sum = sum_chunk(chunk.of<MOMENT>(table.lists[2]), chunk.count);
  }

  double* partials = arguments.partials + blockIdx.x;
  const double columns[NUM_OBSERVED] = {grad_grad, v_sum, grad_param, param_param, expected};
#pragma unroll
  for (int column = 0; column < (COUPLED ? NUM_OBSERVED : V_SUM + 1); ++column) {
    const double sum = block_sum(columns[column]);
    if (threadIdx.x == 0) partials[column * arguments.column_stride] = sum;
  }
}

// -- advance ----------------------------------------------------------------------------------------------------------

struct AdvanceArguments {
  double* partials;
  const float *inverse_means, *coefficient, *lr;
  const bool *is_finite, *is_live;
  RoundingInputs rounding;
  Hyper hyper;
  bool has_remainders;
  Table<6> table;  // parameters, gradients, exp_avgs, exp_avg_sqs, beta1_prods, remainders
};

template <class VARIANT, class PARAM, class GRAD, class MOMENT>
__device__ double advance_chunk(const AdvanceArguments& arguments, const Chunk& chunk, const Step& step,
                                int16_t* remainders, const Randomness* randomness) {
  PARAM* params = chunk.of<PARAM>(arguments.table.lists[0]);
  const GRAD* grads = chunk.of<GRAD>(arguments.table.lists[1]);
  auto* exp_avgs = chunk.of<FirstMoment<MOMENT>>(arguments.table.lists[2]);
  auto* exp_avg_sqs = chunk.of<MOMENT>(arguments.table.lists[3]);
  auto* beta1_prods = VARIANT::HAS_PRODUCT ? chunk.of<Product<MOMENT>>(arguments.table.lists[4]) : nullptr;
  const bool are_aligned = is_aligned(params) && is_aligned(grads) && is_aligned(exp_avgs) &&
                           is_aligned(exp_avg_sqs) && is_aligned(beta1_prods) && is_aligned(remainders);
  constexpr bool ROUNDS = IS_LOW<PARAM> || IS_LOW<MOMENT>;
  const bool may_be_whole = !ROUNDS || randomness->is_consecutive(chunk.count);
  double sum = 0.0;
  for_each_tile<ROUNDS ? LOW_STEP_VECTORS : STEP_VECTORS>(chunk.count, are_aligned, [&](auto tile) {
    PARAM param[tile.NUM];
    GRAD g[tile.NUM];
    FirstMoment<MOMENT> m[tile.NUM];
    Product<MOMENT> P[tile.NUM];
    float v[tile.NUM];
    int16_t remainder[tile.NUM] = {};
    tile.load(params, param);
    if (remainders) tile.load(remainders, remainder);
    tile.load(grads, g);
    tile.load(exp_avgs, m);
    load_moments(tile, exp_avg_sqs, v);
    if (VARIANT::HAS_PRODUCT) tile.load(beta1_prods, P);
    uint32_t words[tile.NUM];
    if (IS_LOW<MOMENT>) randomness->fill(tile, 0, words);
    float theta[tile.NUM];
#pragma unroll
    for (int i = 0; i < tile.NUM; ++i) {
      theta[i] = param_of(param[i], remainder[i], remainders != nullptr);
      float m_i = widen(m[i]), P_i = VARIANT::HAS_PRODUCT ? product_of(P[i]) : 0.0f;
      adai::advance<VARIANT>(theta[i], widen(g[i]), m_i, v[i], P_i, arguments.hyper, step);
      if constexpr (IS_LOW<MOMENT>) {
        round_randomly(m_i, words[i], m[i]);
        round_randomly(P_i > randomness->settled ? 1.0f - P_i : 1.0f, words[i] ^ (words[i] >> 16), P[i]);
      } else {
        m[i] = m_i;
        P[i] = P_i;
      }
    }
    store_params(tile, theta, params, remainders, randomness);
    tile.store(m, exp_avgs);
    store_moments(tile, v, words, exp_avg_sqs);
#pragma unroll
    for (int i = 0; i < tile.NUM; ++i) sum += v[i];  // 0 beyond the end
    if (VARIANT::HAS_PRODUCT) tile.store(P, beta1_prods);
  }, may_be_whole);
  return sum;
}

// Rare, and therefore in partial tiles alone, which compile faster.
template <class PARAM>
__device__ void decay_chunk(PARAM* params, int count, const Step& step, int16_t* remainders,
                            const Randomness* randomness) {
  for_each_part(count, is_aligned(params) && is_aligned(remainders), [&](auto tile) {
    PARAM param[tile.NUM];
    int16_t remainder[tile.NUM] = {};
    tile.load(params, param);
    if (remainders) tile.load(remainders, remainder);
    float theta[tile.NUM];
#pragma unroll
    for (int i = 0; i < tile.NUM; ++i) {
      theta[i] = param_of(param[i], remainder[i], remainders != nullptr);
      adai::decay(theta[i], step);
    }
    store_params(tile, theta, params, remainders, randomness);
  });
}

template <class VARIANT, class PARAM, class GRAD, class MOMENT>
__global__ void __launch_bounds__(THREADS, MIN_BLOCKS) advance_chunks(const AdvanceArguments arguments) {
  const auto& table = arguments.table;
  const Chunk chunk(table, blockIdx.x);
  const Hyper& hyper = arguments.hyper;
  const Step step = step_of(hyper, *arguments.coefficient, *arguments.lr, arguments.inverse_means[chunk.slot]);
  const bool has_remainders = IS_LOW<PARAM> && arguments.has_remainders;
  int16_t* remainders = has_remainders ? chunk.of<int16_t>(table.lists[5]) : nullptr;
  const Randomness randomness(arguments.rounding, table.num_elements[chunk.slot], chunk);
  double sum;
  if (*arguments.is_live) {
    sum = advance_chunk<VARIANT, PARAM, GRAD, MOMENT>(arguments, chunk, step, remainders, &randomness);
  } else {
    sum = sum_chunk(chunk.of<MOMENT>(table.lists[3]), chunk.count);
    if (*arguments.is_finite && step.decay_factor != 1.0f) {
      decay_chunk(chunk.of<PARAM>(table.lists[0]), chunk.count, step, remainders, &randomness);
    }
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) arguments.partials[blockIdx.x] = sum;
}

struct SumArguments {
  double* partials;
  const double* is_stale;
  Table<1> table;  // exp_avg_sqs
};

template <class MOMENT>
__global__ void __launch_bounds__(THREADS) sum_chunks(const SumArguments arguments) {
  const Chunk chunk(arguments.table, blockIdx.x);
  if (arguments.is_stale[chunk.slot] == 0.0) return;  // the partial is not used
  const double sum = block_sum(sum_chunk(chunk.of<MOMENT>(arguments.table.lists[0]), chunk.count));
  if (threadIdx.x == 0) arguments.partials[blockIdx.x] = sum;
}

// -- second stage -----------------------------------------------------------------------------------------------------

// Block (i, column) adds up the partials of tensor i of this launch in one column.
struct AddArguments {
  static constexpr int CAPACITY = 160;  // within 4 KiB, as each launch copies its arguments

  const double* partials;
  int64_t column_stride;
  int num_columns;  // further columns are 0
  double* sums;
  int v_sum_column;
  const double *kept, *is_stale;  // the kept sum of v is used unless stale; null to use none
  int64_t first_partials[CAPACITY + 1];
  const void* sampled[CAPACITY];  // in advance the new exp_avg_sqs, else null
  int64_t num_elements[CAPACITY];
};

template <class MOMENT>
__global__ void __launch_bounds__(THREADS) add_partials(const AddArguments arguments) {
  const int tensor = blockIdx.x, column = blockIdx.y;
  double sum = 0.0;
  if (column < arguments.num_columns) {
    const double* partials = arguments.partials + column * arguments.column_stride;
    const int64_t end = arguments.first_partials[tensor + 1];
#pragma unroll 8
    for (int64_t i = arguments.first_partials[tensor] + threadIdx.x; i < end; i += THREADS) sum += partials[i];
    sum = block_sum(sum);
  } else if (arguments.sampled[tensor]) {
    sum = sample_sum(static_cast<const MOMENT*>(arguments.sampled[tensor]), arguments.num_elements[tensor]);
  }
  if (threadIdx.x != 0) return;
  const bool may_be_kept = arguments.kept && column == arguments.v_sum_column;
  if (may_be_kept && arguments.is_stale[tensor] == 0.0) sum = arguments.kept[tensor * NUM_KEPT];
  arguments.sums[int64_t{tensor} * gridDim.y + column] = sum;
}

// -- launches ---------------------------------------------------------------------------------------------------------

template <class CALL>
const char* with_dtype(Dtype dtype, const CALL& call) {
  switch (dtype) {
    case Dtype::bfloat16: return call(BFloat16{});
    case Dtype::float16: return call(Float16{});
    default: return call(float{});
  }
}

// Calls with the type of second moments.
template <class CALL>
const char* with_state(Dtype dtype, const CALL& call) {
  switch (dtype) {
    case Dtype::eight_bits: return call(Record{});
    case Dtype::bfloat16: return call(BFloat16{});
    default: return call(float{});
  }
}

template <class ARGUMENTS>
const char* launch_kernel(void (*kernel)(ARGUMENTS), dim3 blocks, const ARGUMENTS& arguments, void* stream) {
  static_assert(sizeof(ARGUMENTS) <= MAX_ARGUMENT_BYTES, "the arguments exceed the limit of a kernel");
  kernel<<<blocks, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(arguments);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

RoundingInputs inputs_from(const RoundingInputs& inputs, int64_t first_tensor) {
  if (inputs.streams == nullptr) return inputs;
  return {inputs.streams + first_tensor * STREAM_WORDS, inputs.origins + first_tensor * ORIGIN_WORDS,
          inputs.settled + first_tensor};
}

// The partials, num_columns rows of one number per chunk, and the sums made from them.
struct Totals {
  const double* partials;
  int num_columns;
  int out_columns;  // of `sums`, which has one row per tensor
  double* sums;
  int v_sum_column = 0;
  const double *kept = nullptr, *is_stale = nullptr;
  const std::vector<void*>* sampled = nullptr;
  Dtype sampled_dtype = Dtype::float32;
};

const char* add_all_partials(const std::vector<int64_t>& num_elements, const Totals& totals, void* stream) {
  const int64_t num_tensors = static_cast<int64_t>(num_elements.size());
  AddArguments arguments;
  arguments.partials = totals.partials;
  arguments.column_stride = num_chunks(num_elements);
  arguments.num_columns = totals.num_columns;
  arguments.v_sum_column = totals.v_sum_column;
  int64_t first_partial = 0;
  for (int64_t start = 0; start < num_tensors; start += arguments.CAPACITY) {
    const int num_blocks = static_cast<int>(std::min<int64_t>(arguments.CAPACITY, num_tensors - start));
    for (int i = 0; i < num_blocks; ++i) {
      arguments.first_partials[i] = first_partial;
      arguments.sampled[i] = totals.sampled ? (*totals.sampled)[start + i] : nullptr;
      arguments.num_elements[i] = num_elements[start + i];
      first_partial += num_chunks(num_elements[start + i]);
    }
    arguments.first_partials[num_blocks] = first_partial;
    arguments.sums = totals.sums + start * totals.out_columns;
    arguments.kept = totals.kept ? totals.kept + start * NUM_KEPT : nullptr;
    arguments.is_stale = totals.is_stale ? totals.is_stale + start : nullptr;
    const dim3 blocks(num_blocks, totals.out_columns);
    const char* error = with_state(totals.sampled_dtype, [&](auto state) {
      return launch_kernel(add_partials<decltype(state)>, blocks, arguments, stream);
    });
    if (error) return error;
  }
  return nullptr;
}

const char* detect_all_writes(const States& x, const std::vector<int64_t>& num_elements, double* is_stale,
                              void* stream) {
  const int64_t num_tensors = static_cast<int64_t>(x.exp_avg_sqs.size());
  DetectArguments arguments;
  for (int64_t start = 0; start < num_tensors; start += arguments.CAPACITY) {
    const int num_blocks = static_cast<int>(std::min<int64_t>(arguments.CAPACITY, num_tensors - start));
    for (int i = 0; i < num_blocks; ++i) {
      arguments.exp_avg_sqs[i] = x.exp_avg_sqs[start + i];
      arguments.num_elements[i] = num_elements[start + i];
    }
    arguments.kept = x.kept + start * NUM_KEPT;
    arguments.is_stale = is_stale + start;
    const char* error = with_state(x.dtype, [&](auto state) {
      return launch_kernel(detect_writes<decltype(state)>, dim3(num_blocks), arguments, stream);
    });
    if (error) return error;
  }
  return nullptr;
}

}  // namespace

const char* observe(const Observed& x, double* partials, double* sums, void* stream) {
  ObserveArguments arguments;
  arguments.column_stride = num_chunks(x.num_elements);
  arguments.coefficient = x.coefficient;
  arguments.coupled_decay = x.coupled_decay;
  arguments.has_remainders = !x.remainders.empty();
  double* is_stale = x.states.exp_avg_sqs.empty() ? nullptr : partials + arguments.column_stride * NUM_OBSERVED;
  if (const char* error = detect_all_writes(x.states, x.num_elements, is_stale, stream)) return error;
  for (const Launch& launch : plan_launches(x.num_elements, arguments.table.CAPACITY, MAX_BLOCKS)) {
    arguments.partials = partials + launch.first_chunk;
    arguments.table.set_sizes(x.num_elements, launch);
    arguments.table.set_list(0, x.grads, launch);
    arguments.table.set_list(1, x.params, launch);
    arguments.table.set_list(2, x.states.exp_avg_sqs, launch);
    arguments.table.set_list(3, x.remainders, launch);
    arguments.is_stale = is_stale ? is_stale + launch.first_tensor : nullptr;
    const char* error = with_state(x.states.dtype, [&](auto state) {
      return with_dtype(x.grad_dtype, [&](auto grad) {
        using GRAD = decltype(grad);
        using MOMENT = decltype(state);
        const dim3 blocks(static_cast<unsigned>(launch.num_chunks));
        if (x.params.empty()) {
          return launch_kernel(observe_chunks<false, GRAD, float, MOMENT>, blocks, arguments, stream);
        }
        return with_dtype(x.param_dtype, [&](auto param) {
          return launch_kernel(observe_chunks<true, GRAD, decltype(param), MOMENT>, blocks, arguments, stream);
        });
      });
    });
    if (error) return error;
  }
  const int num_columns = x.params.empty() ? V_SUM + 1 : NUM_OBSERVED;
  const double* kept = is_stale ? x.states.kept : nullptr;
  return add_all_partials(x.num_elements, {partials, num_columns, NUM_OBSERVED, sums, V_SUM, kept, is_stale}, stream);
}

const char* advance(const Advanced& x, double* partials, double* kept, void* stream) {
  AdvanceArguments arguments;
  arguments.coefficient = x.coefficient;
  arguments.lr = x.lr;
  arguments.is_finite = x.is_finite;
  arguments.is_live = x.is_live;
  arguments.hyper = x.hyper;
  arguments.has_remainders = !x.remainders.empty();
  for (const Launch& launch : plan_launches(x.num_elements, arguments.table.CAPACITY, MAX_BLOCKS)) {
    arguments.partials = partials + launch.first_chunk;
    arguments.inverse_means = x.inverse_means + launch.first_tensor;
    arguments.rounding = inputs_from(x.rounding, launch.first_tensor);
    arguments.table.set_sizes(x.num_elements, launch);
    arguments.table.set_list(0, x.params, launch);
    arguments.table.set_list(1, x.grads, launch);
    arguments.table.set_list(2, x.exp_avgs, launch);
    arguments.table.set_list(3, x.exp_avg_sqs, launch);
    arguments.table.set_list(4, x.beta1_prods, launch);
    arguments.table.set_list(5, x.remainders, launch);
    const char* error = with_variant(x.hyper, !x.beta1_prods.empty(), [&](auto variant) {
      return with_dtype(x.param_dtype, [&](auto param) {
        return with_dtype(x.grad_dtype, [&](auto grad) {
          return with_state(x.state_dtype, [&](auto state) {
            const auto kernel = advance_chunks<decltype(variant), decltype(param), decltype(grad), decltype(state)>;
            return launch_kernel(kernel, dim3(static_cast<unsigned>(launch.num_chunks)), arguments, stream);
          });
        });
      });
    });
    if (error) return error;
  }
  const Totals totals{partials, 1, NUM_KEPT, kept, 0, nullptr, nullptr, &x.exp_avg_sqs, x.state_dtype};
  return add_all_partials(x.num_elements, totals, stream);
}

const char* sum(const Summed& x, double* partials, double* sums, void* stream) {
  SumArguments arguments;
  double* is_stale = partials + num_chunks(x.num_elements);
  if (const char* error = detect_all_writes(x.states, x.num_elements, is_stale, stream)) return error;
  for (const Launch& launch : plan_launches(x.num_elements, arguments.table.CAPACITY, MAX_BLOCKS)) {
    arguments.partials = partials + launch.first_chunk;
    arguments.is_stale = is_stale + launch.first_tensor;
    arguments.table.set_sizes(x.num_elements, launch);
    arguments.table.set_list(0, x.states.exp_avg_sqs, launch);
    const dim3 blocks(static_cast<unsigned>(launch.num_chunks));
    const char* error = with_state(x.states.dtype, [&](auto state) {
      return launch_kernel(sum_chunks<decltype(state)>, blocks, arguments, stream);
    });
    if (error) return error;
  }
  return add_all_partials(x.num_elements, {partials, 1, 1, sums, 0, x.states.kept, is_stale}, stream);
}

}  // namespace adai::cuda
