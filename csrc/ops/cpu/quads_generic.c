#define B2_QUAD_KERNELS b2_quad_kernels_generic
#include "ops/cpu/quads.inc.h"
