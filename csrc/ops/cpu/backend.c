/* One table of operations per instruction set: the same drivers over different kernels. */
#include <string.h>

#include "ops/cpu/common.h"
#include "ops/cpu/cpu_ops.h"

static size_t scratch_bytes(const b2_ctx *ctx, int64_t max_rows, int64_t max_width, int64_t max_keys, int max_head_dim)
{
    size_t linear = b2_cpu_linear_scratch(ctx, max_rows, max_width);
    size_t attention = b2_cpu_attention_scratch(ctx, max_keys, max_head_dim);
    return linear > attention ? linear : attention;
}

static int copy(b2_ctx *ctx, void *to, const void *from, size_t bytes, b2_err *err)
{
    (void)ctx, (void)err;
    memcpy(to, from, bytes);
    return 0;
}

static void wait_for_nothing(b2_ctx *ctx)
{
    (void)ctx;
}

static int step(b2_ctx *ctx, b2_step_shape shape, b2_step_fn body, void *argument, b2_err *err)
{
    (void)shape;
    return body(ctx, argument, err);
}

static int note_finite(b2_ctx *ctx, const char *stage, int layer, b2_tensor x, b2_err *err)
{
    int64_t bad = -1;
    if (b2_cpu_check_finite(ctx, &bad, x, err) < 0)
        return -1;
    return bad < 0 ? 0 : b2_fail_finite(err, stage, layer, bad);
}

/* On fp32 weights as the file stores them our kernels are as fast as OpenBLAS with AVX2 and twice as fast with AVX-512
 * (benchmarks/NOTES.md), and their bits do not depend on what an item is. Without wide vectors OpenBLAS, which brings
 * its own, is far ahead. */
#define BACKEND(NAME, KERNELS, QUADS, TILES, PAIRS, BLAS)                                                             \
    {                                                                                                               \
        .ops = {.name = NAME,                                                                                       \
                .items_by_blas = BLAS,                                                                              \
                .linear = b2_cpu_linear,                                                                            \
                .layer_norm = b2_cpu_layer_norm,                                                                    \
                .rms_norm = b2_cpu_rms_norm,                                                                        \
                .gate = b2_cpu_gate,                                                                                \
                .rope = b2_cpu_rope,                                                                                \
                .attention = b2_cpu_attention,                                                                      \
                .attention_weights = b2_cpu_attention_weights,                                                      \
                .embedding = b2_cpu_embedding,                                                                      \
                .patches = b2_cpu_patches,                                                                          \
                .copy_rows = b2_cpu_copy_rows,                                                                      \
                .add_rows = b2_cpu_add_rows,                                                                        \
                .reduce_rows = b2_cpu_reduce_rows,                                                                  \
                .unit_rows = b2_cpu_unit_rows,                                                                      \
                .top_k = b2_cpu_top_k,                                                                              \
                .log_softmax = b2_cpu_log_softmax,                                                                  \
                .check_finite = b2_cpu_check_finite,                                                                \
                .note_finite = note_finite,                                                                         \
                .picture_scores = b2_cpu_picture_scores,                                                            \
                .upload = copy,                                                                                     \
                .download = copy,                                                                                   \
                .wait = wait_for_nothing,                                                                           \
                .step = step,                                                                                       \
                .scratch_bytes = scratch_bytes},                                                                    \
        .kernels = KERNELS,                                                                                         \
        .quads = QUADS,                                                                                             \
        .quad_tiles = TILES,                                                                                        \
        .pairs = PAIRS                                                                                              \
    }

static const b2_cpu_backend generic =
    BACKEND("cpu generic", &b2_cpu_kernels_generic, &b2_quad_kernels_generic, &b2_quad_tiles_generic, NULL, 1);
#if defined(__x86_64__)
static const b2_cpu_backend avx2 =
    BACKEND("cpu avx2", &b2_cpu_kernels_avx2, &b2_quad_kernels_avx2, &b2_quad_tiles_avx2, NULL, 0);
static const b2_cpu_backend avx512 =
    BACKEND("cpu avx512", &b2_cpu_kernels_avx512, &b2_quad_kernels_avx2, &b2_quad_tiles_avx512, NULL, 0);
static const b2_cpu_backend avx512_vnni =
    BACKEND("cpu avx512_vnni", &b2_cpu_kernels_avx512, &b2_quad_kernels_vnni, &b2_quad_tiles_vnni, NULL, 0);
static const b2_cpu_backend avx512_bf16 = BACKEND("cpu avx512_bf16", &b2_cpu_kernels_avx512, &b2_quad_kernels_vnni,
                                                  &b2_quad_tiles_vnni, &b2_pair_kernels_bf16, 0);
#endif

const b2_ops *b2_cpu_ops(b2_isa isa)
{
    static const b2_cpu_backend *const backends[B2_ISA_COUNT] = {
        &generic,
#if defined(__x86_64__)
        &avx2, &avx512, &avx512_vnni, &avx512_bf16,
#endif
    };
    return &backends[isa]->ops;
}
