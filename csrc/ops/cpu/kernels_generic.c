#define B2_KERNELS b2_cpu_kernels_generic
#include "ops/cpu/kernels.inc.h"
