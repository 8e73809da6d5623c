// The CPU kernels with AVX-512.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define ADAI_CPU_KERNELS kernels_avx512
#include "adai_cpu_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
