// The CUDA kernels as plain functions, and how lists of tensors are cut into launches. Neither torch nor CUDA is
// included, so that the cutting can be compiled and tested on any machine.
//
// A tensor is cut into chunks of CHUNK_ELEMENTS, and each block of threads takes one chunk. Chunks are numbered through
// all tensors of a call; chunk number i writes its float64 sums as partial number i, and a second kernel adds up the
// partials of each tensor. Which elements meet in which order follows from their index within the tensor alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "adai_dtypes.h"

namespace adai::cuda {

// A block lasts long enough to hide its start and end, and a small model has enough of them to fill a large GPU.
constexpr int64_t CHUNK_ELEMENTS = int64_t{1} << 15;

constexpr int64_t num_chunks(int64_t num_elements) {
  return num_elements / CHUNK_ELEMENTS + (num_elements % CHUNK_ELEMENTS != 0);
}

inline int64_t num_chunks(const std::vector<int64_t>& num_elements) {
  int64_t sum = 0;
  for (const int64_t n : num_elements) sum += num_chunks(n);
  return sum;
}

// A run of chunks for one launch: of consecutive tensors, or a part of one tensor that is too large for a launch.
struct Launch {
  int64_t first_tensor, num_tensors;
  int64_t first_chunk, num_chunks;  // numbered through all tensors of the call
  int64_t num_skipped;              // leading chunks of the first tensor that are left to other launches
};

// Cut a list of tensors into launches, in order. Every chunk is in exactly one of them; empty tensors have none.
inline std::vector<Launch> plan_launches(const std::vector<int64_t>& num_elements, int64_t max_tensors,
                                         int64_t max_chunks) {
  std::vector<Launch> launches;
  Launch launch{};
  const auto finish = [&](int64_t next_tensor, int64_t num_skipped) {
    if (launch.num_chunks > 0) launches.push_back(launch);
    launch = {next_tensor, 0, launch.first_chunk + launch.num_chunks, 0, num_skipped};
  };
  for (int64_t tensor = 0; tensor < static_cast<int64_t>(num_elements.size()); ++tensor) {
    if (launch.num_tensors == max_tensors || launch.num_chunks == max_chunks) finish(tensor, 0);
    ++launch.num_tensors;
    int64_t left = num_chunks(num_elements[tensor]);
    for (; left > max_chunks - launch.num_chunks; launch.num_tensors = 1) {
      left -= max_chunks - launch.num_chunks;
      launch.num_chunks = max_chunks;
      finish(tensor, num_chunks(num_elements[tensor]) - left);
    }
    launch.num_chunks += left;
  }
  finish(0, 0);
  return launches;
}

// Tensors without gaps, the same elements in the same order in each list; pointers to device memory.

// The exp_avg_sqs that are read where their samples are not what was kept.
struct States {
  std::vector<const void*> exp_avg_sqs;
  const double* kept;  // what advance has left, shape (number of tensors, NUM_KEPT)
};

struct Observed {
  std::vector<int64_t> num_elements;
  std::vector<const void*> grads;
  std::vector<const void*> params;  // empty: no coupled decay, and the columns that need them are 0
  States states;                    // none: no sums of them
  Dtype grad_dtype, param_dtype;
  const float* coefficient;
  float coupled_decay;
};

struct Advanced {
  std::vector<int64_t> num_elements;
  std::vector<void*> params;
  std::vector<const void*> grads;
  std::vector<void*> exp_avgs, exp_avg_sqs;
  std::vector<void*> beta1_prods;  // empty: retired, 1 - P is 1
  Dtype param_dtype, grad_dtype;
  const float *inverse_means, *coefficient, *lr;  // the first with one entry for each tensor
  const bool *is_finite, *is_live;
  Hyper hyper;
};

struct Summed {
  std::vector<int64_t> num_elements;
  States states;
};

// Float64 that the functions below need at `partials`, device memory.
inline int64_t num_partials(const Observed& x) {
  const int64_t num_tensors = static_cast<int64_t>(x.num_elements.size());
  return num_chunks(x.num_elements) * NUM_OBSERVED + num_tensors;  // behind: which sums of v are out of date
}

inline int64_t num_partials(const Advanced& x) { return num_chunks(x.num_elements); }

inline int64_t num_partials(const Summed& x) {
  return num_chunks(x.num_elements) + static_cast<int64_t>(x.num_elements.size());
}

// Sums of each tensor, shape (number of tensors, NUM_OBSERVED), float64. An exp_avg_sq is read where its samples are not
// what was kept. Enqueued on `stream`, a cudaStream_t, without waiting. Returns what went wrong, or nullptr.
const char* observe(const Observed& x, double* partials, double* sums, void* stream);

// One step in place; `kept`, shape (number of tensors, NUM_KEPT), float64, is for the next observe. Where is_live is
// false nothing but the decoupled decay happens, where is_finite is false nothing at all. Otherwise as observe.
const char* advance(const Advanced& x, double* partials, double* kept, void* stream);

// The sums of the exp_avg_sqs as they are, to the bit what `advance` returned when it wrote them.
const char* sum(const Summed& x, double* partials, double* sums, void* stream);

}  // namespace adai::cuda
