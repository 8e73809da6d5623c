// The CPU kernels with the baseline instruction set of the target.
#define ADAI_CPU_KERNELS kernels_default
#include "adai_cpu_kernels.h"
