#define B2_SIMD_AVX512
#define B2_QUAD_TILES b2_quad_tiles_avx512
#include "ops/cpu/quad_tiles.inc.h"
