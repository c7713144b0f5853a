/* What the drivers (linear.c, attention.c, rows.c) share: finding the kernels, running tiles, scratch per worker. */
#ifndef B2_OPS_CPU_COMMON_H
#define B2_OPS_CPU_COMMON_H

#include <stdatomic.h>

#include "core/pool.h"
#include "core/integers.h"
#include "ops/cpu/kernels.h"
#include "ops/cpu/quad_tiles.h"
#include "ops/cpu/quads.h"
#include "ops/ops.h"

/* ctx->ops points at the first member of one of these. */
typedef struct b2_cpu_backend {
    b2_ops ops;
    const b2_cpu_kernels *kernels;
    const b2_quad_kernels *quads;    /* few rows */
    const b2_quad_tiles *quad_tiles; /* many */
    const b2_pair_kernels *pairs;    /* NULL: no bfloat16 arithmetic */
} b2_cpu_backend;

static inline const b2_cpu_kernels *b2_cpu_kernels_of(const b2_ctx *ctx)
{
    return ((const b2_cpu_backend *)(const void *)ctx->ops)->kernels;
}

static inline const b2_quad_kernels *b2_cpu_quads_of(const b2_ctx *ctx)
{
    return ((const b2_cpu_backend *)(const void *)ctx->ops)->quads;
}

static inline const b2_quad_tiles *b2_cpu_quad_tiles_of(const b2_ctx *ctx)
{
    return ((const b2_cpu_backend *)(const void *)ctx->ops)->quad_tiles;
}

static inline const b2_pair_kernels *b2_cpu_pairs_of(const b2_ctx *ctx)
{
    return ((const b2_cpu_backend *)(const void *)ctx->ops)->pairs;
}

/* Runs the tiles; on the calling thread alone when all of them together cost less than waking another one
 * (`cost_ns`: an estimate for one thread). */
int b2_cpu_run(b2_ctx *ctx, int64_t tiles, b2_tile_fn fn, void *argument, double cost_ns, b2_err *err);

/* How many tiles to cut `units` of work into: enough to share out evenly, each at least `min_ns` long. */
int64_t b2_cpu_tile_count(const b2_ctx *ctx, int64_t units, double unit_ns, double min_ns);

/* Blocks of scratch, one per thread at work. A tile claims a block, so that a pool that is resized between planning
 * and running can never index outside of it. */
typedef struct b2_slots {
    char *base; /* count blocks of `bytes`; lies in the context's arena */
    size_t bytes;
    int count;
    atomic_uchar busy[B2_MAX_THREADS];
} b2_slots;

/* One block for each thread, or as many as still fit into the arena (at least one, or -1). */
int b2_slots_take(b2_slots *slots, b2_ctx *ctx, size_t bytes, b2_err *err);
void *b2_slot_claim(b2_slots *slots, int worker);
void b2_slot_release(b2_slots *slots, void *block);

/* Threads that scratch is planned for. */
int b2_cpu_planned_threads(const b2_ctx *ctx);

size_t b2_cpu_linear_scratch(const b2_ctx *ctx, int64_t max_rows, int64_t max_width);
size_t b2_cpu_attention_scratch(const b2_ctx *ctx, int64_t max_keys, int max_head_dim);

int b2_cpu_linear(b2_ctx *ctx, b2_tensor out, b2_tensor x, const b2_weight *w, const b2_linear_opts *opts, b2_err *err);
int b2_cpu_attention(b2_ctx *ctx, const b2_attention_args *args, b2_err *err);
int b2_cpu_attention_weights(b2_ctx *ctx, float *weights, const b2_attention_args *args, b2_err *err);
int b2_cpu_layer_norm(b2_ctx *ctx, b2_tensor out, b2_tensor x, const b2_weight *gamma, const b2_weight *beta, float eps,
                      b2_err *err);
int b2_cpu_rms_norm(b2_ctx *ctx, b2_tensor out, b2_tensor x, const b2_weight *gamma, float eps, b2_err *err);
int b2_cpu_gate(b2_ctx *ctx, b2_tensor out, b2_tensor gate, b2_tensor up, b2_act act, b2_err *err);
int b2_cpu_rope(b2_ctx *ctx, b2_tensor x, const int32_t *positions, const float *inv_freq, int rotary_dim, int head_dim,
                float scaling, b2_err *err);
int b2_cpu_embedding(b2_ctx *ctx, b2_tensor out, const b2_weight *table, const int32_t *ids, int32_t offset,
                     int accumulate, b2_err *err);
int b2_cpu_patches(b2_ctx *ctx, b2_tensor out, b2_pictures pictures, int64_t patch, b2_err *err);
int b2_cpu_copy_rows(b2_ctx *ctx, b2_tensor out, const int32_t *out_rows, b2_tensor x, const int32_t *x_rows, int64_t n,
                     b2_err *err);
int b2_cpu_add_rows(b2_ctx *ctx, b2_tensor out, b2_tensor x, b2_err *err);
int b2_cpu_reduce_rows(b2_ctx *ctx, b2_tensor out, b2_tensor x, b2_reduction reduction, b2_err *err);
int b2_cpu_unit_rows(b2_ctx *ctx, b2_tensor out, b2_tensor x, b2_err *err);
int b2_cpu_top_k(b2_ctx *ctx, float *values, int32_t *ids, b2_tensor x, int k, b2_err *err);
int b2_cpu_log_softmax(b2_ctx *ctx, b2_tensor x, b2_err *err);
int b2_cpu_check_finite(b2_ctx *ctx, int64_t *first_bad_row, b2_tensor x, b2_err *err);
int b2_cpu_picture_scores(b2_ctx *ctx, b2_tensor out, b2_tensor texts, const b2_records *records, b2_err *err);

#endif
