#define B2_SIMD_AVX2
#define B2_QUAD_TILES b2_quad_tiles_avx2
#include "ops/cpu/quad_tiles.inc.h"
