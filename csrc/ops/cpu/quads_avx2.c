#define B2_SIMD_AVX2
#define B2_QUAD_KERNELS b2_quad_kernels_avx2
#include "ops/cpu/quads.inc.h"
