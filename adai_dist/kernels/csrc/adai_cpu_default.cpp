// The CPU kernels with the instructions that every processor of the target has.
#define ADAI_CPU_KERNELS kernels_default
#include "adai_cpu_kernels.h"
