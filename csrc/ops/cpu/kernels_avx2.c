#define B2_SIMD_AVX2
#define B2_KERNELS b2_cpu_kernels_avx2
#include "ops/cpu/kernels.inc.h"
