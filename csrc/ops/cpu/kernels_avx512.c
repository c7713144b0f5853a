#define B2_SIMD_AVX512
#define B2_KERNELS b2_cpu_kernels_avx512
#include "ops/cpu/kernels.inc.h"
