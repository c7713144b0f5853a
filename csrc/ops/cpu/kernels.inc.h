/* All kernels, compiled once for each instruction set: the including file names the set and the table. */
#include "ops/cpu/kernels.h"
#include "ops/cpu/simd.h"

#include "ops/cpu/math.inc.h"

#include "ops/cpu/gemm.inc.h"

#include "ops/cpu/rows.inc.h"

#include "ops/cpu/attention.inc.h"

const b2_cpu_kernels B2_KERNELS = {
    .tile_rows = TILE_ROWS,
    .tile_panels = TILE_PANELS,
    .pack_rows = pack_rows,
    .widen_rows = widen_rows,
    .widen_pairs = widen_pairs,
    .tile = tile,
    .row_tile = row_tile,
    .tile_from = tile_from,
    .stream = stream,
    .stream_panels = stream_panels,
    .finish = finish,
    .norm_row = norm_row,
    .rms_norm_row = rms_norm_row,
    .gate_row = gate_row,
    .softmax_row = softmax_row,
    .log_softmax_row = log_softmax_row,
    .top_k_row = top_k_row,
    .row_is_finite = row_is_finite,
    .add_row = add_row,
    .pack_keys = pack_keys,
    .pack_values = pack_values,
    .rotate_row = rotate_row,
    .divide_row = divide_row,
    .fma_peak = fma_peak,
};
