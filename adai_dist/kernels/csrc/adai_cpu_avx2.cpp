// The CPU kernels with AVX2.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif
#define ADAI_CPU_KERNELS kernels_avx2
#include "adai_cpu_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
