#define B2_SIMD_AVX512
#define B2_QUAD_KERNELS b2_quad_kernels_vnni
#include "ops/cpu/quads.inc.h"
