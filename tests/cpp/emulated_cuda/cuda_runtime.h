// The part of the CUDA runtime that adai_cuda.cu uses, on the CPU: the threads of a block are coroutines that switch at
// every barrier, so that the results and memory accesses of a kernel can be tested without a GPU.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

inline dim3 threadIdx, blockIdx, gridDim;

namespace emulated {

constexpr size_t STACK_BYTES = size_t{1} << 16;

// A coroutine that runs kernels in an endless loop, and stops at barriers and at the end of each block.
struct Thread {
  ucontext_t start;
  jmp_buf position;
  std::vector<char> stack;
  bool has_started = false, is_done = false;
};

inline bool descending = false;  // run threads from the last to the first: a race shows as a different result
inline jmp_buf scheduler;
inline Thread* current = nullptr;
inline void (*run_kernel)(const void*) = nullptr;
inline const void* kernel_arguments = nullptr;

inline void stop() {
  if (_setjmp(current->position) == 0) _longjmp(scheduler, 1);
}

inline void thread_main() {
  for (;;) {
    run_kernel(kernel_arguments);
    current->is_done = true;
    stop();
  }
}

inline void resume(Thread& thread) {
  current = &thread;
  if (_setjmp(scheduler) != 0) return;
  if (thread.has_started) _longjmp(thread.position, 1);
  thread.has_started = true;
  thread.stack.resize(STACK_BYTES);
  getcontext(&thread.start);
  thread.start.uc_stack.ss_sp = thread.stack.data();
  thread.start.uc_stack.ss_size = thread.stack.size();
  makecontext(&thread.start, thread_main, 0);
  setcontext(&thread.start);
}

inline void run_block(std::vector<Thread>& threads) {
  for (Thread& thread : threads) thread.is_done = false;
  for (size_t num_done = 0; num_done == 0;) {
    for (size_t turn = 0; turn < threads.size(); ++turn) {
      const size_t i = descending ? threads.size() - 1 - turn : turn;
      threadIdx.x = static_cast<unsigned>(i);
      resume(threads[i]);
    }
    for (const Thread& thread : threads) num_done += thread.is_done;
    if (num_done != 0 && num_done != threads.size()) {
      std::fputs("some threads of a block ended while others wait at a barrier\n", stderr);
      std::abort();
    }
  }
}

// kernel<<<blocks, num_threads, shared_bytes, stream>>>(arguments)
template <class ARGUMENTS>
void launch(void (*kernel)(ARGUMENTS), dim3 blocks, int num_threads, size_t, cudaStream_t, const ARGUMENTS& arguments) {
  struct Call {
    void (*kernel)(ARGUMENTS);
    const ARGUMENTS& arguments;
  };
  const Call call{kernel, arguments};
  kernel_arguments = &call;
  run_kernel = [](const void* x) { static_cast<const Call*>(x)->kernel(static_cast<const Call*>(x)->arguments); };
  static std::vector<Thread> threads(static_cast<size_t>(num_threads));
  gridDim = blocks;
  for (blockIdx.y = 0; blockIdx.y < blocks.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < blocks.x; ++blockIdx.x) run_block(threads);
  }
}

}  // namespace emulated

inline void __syncthreads() { emulated::stop(); }
