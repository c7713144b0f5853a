#define B2_QUAD_TILES b2_quad_tiles_generic
#include "ops/cpu/quad_tiles.inc.h"
