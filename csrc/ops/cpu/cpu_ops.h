/* The CPU backend: the table of operations for one instruction set. */
#ifndef B2_OPS_CPU_H
#define B2_OPS_CPU_H

#include "core/cpu.h"
#include "ops/ops.h"

/* Never NULL for an instruction set that b2_isa_choose accepts. The table is constant. */
const b2_ops *b2_cpu_ops(b2_isa isa);

#endif
