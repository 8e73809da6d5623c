// Interface of the CUDA kernels, and the division of lists of tensors into launches. It includes neither torch nor
// CUDA, so that the division can be compiled and tested on any machine.
//
// A tensor is divided into chunks of CHUNK_ELEMENTS, and each block of threads takes one chunk. Chunks are numbered
// across all tensors of a call; chunk i writes its float64 sums as partial i, and a second kernel adds up the partials
// of each tensor. The order of summation depends only on the index of an element within its tensor.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "adai_eight_bits.h"

namespace adai::cuda {

// Large enough to amortise the start and end of a block, small enough for a small model to fill a large GPU.
constexpr int64_t CHUNK_ELEMENTS = int64_t{1} << 15;

constexpr int64_t num_chunks(int64_t num_elements) {
  return num_elements / CHUNK_ELEMENTS + (num_elements % CHUNK_ELEMENTS != 0);
}

inline int64_t num_chunks(const std::vector<int64_t>& num_elements) {
  int64_t sum = 0;
  for (const int64_t n : num_elements) sum += num_chunks(n);
  return sum;
}

// A range of chunks for one launch: consecutive tensors, or a part of one tensor that is too large for a launch.
struct Launch {
  int64_t first_tensor, num_tensors;
  int64_t first_chunk, num_chunks;  // numbered across all tensors of the call
  int64_t num_skipped;              // leading chunks of the first tensor that belong to other launches
};

// Divides a list of tensors into launches, in order. Every chunk is in exactly one of them; empty tensors have none.
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

// Pointers to device memory; tensors are dense, with elements in the same order in each list.

// The exp_avg_sqs; one is read only if the sum of its samples differs from the kept one.
struct States {
  std::vector<const void*> exp_avg_sqs;
  Dtype dtype;         // float32, bfloat16 or eight_bits
  const double* kept;  // the result of advance, shape (number of tensors, NUM_KEPT)
};

struct Observed {
  std::vector<int64_t> num_elements;
  std::vector<const void*> grads;
  std::vector<const void*> params;      // empty: no coupled decay, and their columns are 0
  std::vector<const void*> remainders;  // of master weights; empty without
  States states;                        // empty: no sums of v
  Dtype grad_dtype, param_dtype;
  const float* coefficient;
  float coupled_decay;
};

struct Advanced {
  std::vector<int64_t> num_elements;
  std::vector<void*> params;
  std::vector<const void*> grads;
  std::vector<void*> exp_avgs, exp_avg_sqs;
  std::vector<void*> beta1_prods;  // empty if retired: 1 - P is 1; 1 - P unless float32
  std::vector<void*> remainders;   // of master weights; empty without
  Dtype param_dtype, grad_dtype, state_dtype;
  RoundingInputs rounding;  // null if neither states nor parameters are rounded stochastically
  const float *inverse_means, *coefficient, *lr;  // inverse_means has one entry per tensor
  const bool *is_finite, *is_live;
  Hyper hyper;
};

struct Summed {
  std::vector<int64_t> num_elements;
  States states;
};

// Number of float64 values that the functions below need at `partials`, in device memory.
inline int64_t num_partials(const Observed& x) {
  const int64_t num_tensors = static_cast<int64_t>(x.num_elements.size());
  return num_chunks(x.num_elements) * NUM_OBSERVED + num_tensors;  // at the end: which sums of v are stale
}

inline int64_t num_partials(const Advanced& x) { return num_chunks(x.num_elements); }

inline int64_t num_partials(const Summed& x) {
  return num_chunks(x.num_elements) + static_cast<int64_t>(x.num_elements.size());
}

// Computes `sums`, shape (number of tensors, NUM_OBSERVED), float64. Enqueued on `stream`, a cudaStream_t, without
// synchronising. Returns an error message or nullptr.
const char* observe(const Observed& x, double* partials, double* sums, void* stream);

// Takes one step in place and computes `kept`, shape (number of tensors, NUM_KEPT), float64, for the next observe. If
// is_live is false, only decoupled decay applies; if is_finite is false, nothing changes. Enqueued as observe.
const char* advance(const Advanced& x, double* partials, double* kept, void* stream);

// Computes the current sums of the exp_avg_sqs, with the bits that `advance` returned when it wrote them.
const char* sum(const Summed& x, double* partials, double* sums, void* stream);

}  // namespace adai::cuda
