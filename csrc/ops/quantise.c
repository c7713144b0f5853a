/* Rounding of weights: w[i][j] = c[j] * s[i][g] * q[i][j].
 *
 * c[j], the column scale, is the root mean square of column j: the columns of w / c are then alike, and a channel whose
 * activations are large and whose weights are small for that (a planted outlier) is rounded as finely as the others. It
 * needs no data, and x * c is what meets the rounded weights. Since the columns have unit size, float16 scales of groups
 * can neither overflow nor lose bits for ordinary weights.
 *
 * int8: one scale per output channel, the largest |w / c| over 127. int4: groups of 32 input channels; the group's scale is
 * the best in the sense of least squares for one of the roundings that scales from a small set, of either sign, would give:
 * its largest element may become -8 or 7, or be clipped.
 *
 * All sums have a fixed order: the bytes do not depend on threads or instruction sets. Memory: 1/c while it runs. */
#include "ops/quantise.h"

#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "core/cpu.h"
#include "core/integers.h"
#include "core/memory.h"
#include "ops/half.h"
#include "ops/weights.h"

/* Helpers of the functions that have clones must become part of them. */
#define INLINE static inline __attribute__((always_inline))

enum {
    STRIP = 64,      /* columns of a panel that are rounded at a time */
    COLUMNS = 256,   /* columns whose size one tile finds */
    GROUP = 32,
    CANDIDATES = 14
};

/* A row of unit columns this small is nothing beside the others. */
static const float NOTHING = 1e-30f;

typedef struct quantise_job {
    const b2_weight *src;
    b2_dtype dtype;
    uint8_t *data;          /* of dst, and so are scales and column_scales */
    void *scales;
    float *column_scales;   /* [k] */
    float *inverse;         /* [k] = 1 / column_scales */
    int64_t panels, panels_per_tile;
    atomic_llong not_finite;
} quantise_job;

static const char *row_at(const b2_weight *src, int64_t row, int64_t column)
{
    return (const char *)src->data + (size_t)(row * src->k + column) * b2_dtype_size(src->dtype);
}

/* ---- column scales ---- */

static int64_t count_not_finite(const float *x, int64_t count)
{
    int32_t bad = 0;
    for (int64_t i = 0; i < count; i++)
        bad += (b2_f32_to_bits(x[i]) & 0x7f800000u) == 0x7f800000u;
    return bad;
}

B2_CLONES static void column_tile(void *argument, int64_t index, int worker)
{
    quantise_job *job = argument;
    const b2_weight *src = job->src;
    (void)worker;
    int64_t first = index * COLUMNS, count = b2_min64(COLUMNS, src->k - first), bad = 0;
    float x[COLUMNS];
    double squares[COLUMNS] = {0};
    for (int64_t i = 0; i < src->n; i++) {
        b2_convert(x, B2_F32, row_at(src, i, first), src->dtype, count);
        bad += count_not_finite(x, count);
        for (int64_t j = 0; j < count; j++)
            squares[j] += (double)x[j] * (double)x[j];
    }
    if (bad)
        atomic_fetch_add(&job->not_finite, bad);
    for (int64_t j = 0; j < count; j++) {
        float scale = (float)sqrt(squares[j] / (double)src->n);
        scale = scale >= FLT_MIN ? scale : 1.0f; /* a column of zeros; one of subnormals counts as such */
        job->column_scales[first + j] = scale;
        job->inverse[first + j] = 1.0f / scale;
    }
}

/* ---- rounding ---- */

/* strip [16][STRIP] = columns [column, column + count) of a panel over their column scales; zeros beyond n and count. */
INLINE void load_strip(float *strip, const quantise_job *job, int64_t panel, int64_t column, int64_t count)
{
    const b2_weight *src = job->src;
    int64_t rows = b2_min64(B2_PANEL, src->n - panel * B2_PANEL);
    if (rows < B2_PANEL || count < STRIP)
        memset(strip, 0, (size_t)(B2_PANEL * STRIP) * sizeof *strip);
    for (int64_t r = 0; r < rows; r++) {
        float *x = strip + r * STRIP;
        b2_convert(x, B2_F32, row_at(src, panel * B2_PANEL + r, column), src->dtype, count);
        for (int64_t j = 0; j < count; j++)
            x[j] *= job->inverse[column + j];
    }
}

/* Nearest integer, ties to even, of |x| < 2^22. */
INLINE int32_t nearest(float x)
{
    return (int32_t)b2_f32_to_bits(x + 12582912.0f) - 0x4b400000;
}

INLINE float clamp(float x, float low, float high)
{
    x = x < low ? low : x;
    return x > high ? high : x;
}

/* Divides in any case: a division that may not happen keeps the compiler from making vectors. */
INLINE float divide_or_zero(float a, float b, int divide)
{
    float quotient = a / (divide ? b : 1.0f);
    return divide ? quotient : 0.0f;
}

INLINE void row_scales(float scales[B2_PANEL], float inverse[B2_PANEL], const quantise_job *job, int64_t panel)
{
    float strip[B2_PANEL * STRIP], most[B2_PANEL] = {0};
    for (int64_t j = 0; j < job->src->k; j += STRIP) {
        load_strip(strip, job, panel, j, b2_min64(STRIP, job->src->k - j));
        for (int r = 0; r < B2_PANEL; r++)
            for (int i = 0; i < STRIP; i++) {
                float size = fabsf(strip[r * STRIP + i]);
                most[r] = size > most[r] ? size : most[r];
            }
    }
    for (int r = 0; r < B2_PANEL; r++) {
        scales[r] = most[r] < NOTHING ? 0.0f : most[r] / 127.0f;
        inverse[r] = most[r] < NOTHING ? 0.0f : 127.0f / most[r];
    }
}

B2_CLONES static void int8_panel(const quantise_job *job, int64_t panel)
{
    int64_t k = job->src->k, padded = (k + 31) / 32 * 32;
    float strip[B2_PANEL * STRIP], inverse[B2_PANEL];
    _Alignas(4) uint8_t q[B2_PANEL * STRIP];
    row_scales((float *)job->scales + panel * B2_PANEL, inverse, job, panel);
    for (int64_t j = 0; j < k; j += STRIP) {
        load_strip(strip, job, panel, j, b2_min64(STRIP, k - j));
        for (int r = 0; r < B2_PANEL; r++)
            for (int i = 0; i < STRIP; i++) /* 127 / most may be a bit too large: hold |q| <= 127 */
                q[r * STRIP + i] =
                    (uint8_t)(nearest(clamp(strip[r * STRIP + i] * inverse[r], -127.0f, 127.0f)) + 128);
        uint8_t *to = job->data + (panel * padded + j) * B2_PANEL;
        for (int64_t quad = 0; quad < b2_min64(STRIP, padded - j) / 4; quad++)
            for (int r = 0; r < B2_PANEL; r++)
                memcpy(to + (quad * B2_PANEL + r) * 4, q + r * STRIP + quad * 4, 4);
    }
}

/* Sixteen rows of one group side by side: x [32][16]. */
typedef float group_values[GROUP][B2_PANEL];

/* What comes of rounding x * inverse for every candidate: xq = sum of x * q, qq = sum of q * q. The best scale for these q is
 * their quotient, and it lowers the squared error by xq^2 / qq. Candidates inside of channels: sums of one candidate
 * alone would wait for each other. */
typedef struct trials {
    float inverse[CANDIDATES][B2_PANEL], xq[CANDIDATES][B2_PANEL], qq[CANDIDATES][B2_PANEL];
} trials;

INLINE void try_scales(trials *t, group_values x)
{
    memset(t->xq, 0, sizeof t->xq);
    memset(t->qq, 0, sizeof t->qq);
    for (int i = 0; i < GROUP; i++)
        for (int c = 0; c < CANDIDATES; c++)
            for (int r = 0; r < B2_PANEL; r++) {
                float q = clamp(x[i][r] * t->inverse[c][r], -8.0f, 7.0f) + 12582912.0f;
                q -= 12582912.0f;
                t->xq[c][r] += x[i][r] * q;
                t->qq[c][r] += q * q;
            }
}

/* The element of each row that is largest by size, with its sign. */
INLINE void extremes(float extreme[B2_PANEL], group_values x)
{
    memset(extreme, 0, B2_PANEL * sizeof *extreme);
    for (int i = 0; i < GROUP; i++)
        for (int r = 0; r < B2_PANEL; r++)
            extreme[r] = fabsf(x[i][r]) > fabsf(extreme[r]) ? x[i][r] : extreme[r];
}

/* scales [16] as float16 bits */
INLINE void group_scales(uint16_t scales[B2_PANEL], group_values x)
{
    /* What the largest element is to become. */
    static const float targets[CANDIDATES] = {-8.0f, -7.5f, -7.0f, -8.5f, -9.0f, -9.5f, -6.5f,
                                              7.0f,  7.5f,  6.5f,  8.0f,  8.5f,  6.0f,  9.0f};
    float extreme[B2_PANEL], best[B2_PANEL] = {0}, scale[B2_PANEL] = {0};
    trials t;
    extremes(extreme, x);
    for (int c = 0; c < CANDIDATES; c++)
        for (int r = 0; r < B2_PANEL; r++)
            t.inverse[c][r] = divide_or_zero(targets[c], extreme[r], fabsf(extreme[r]) >= NOTHING);
    try_scales(&t, x);
    for (int c = 0; c < CANDIDATES; c++)
        for (int r = 0; r < B2_PANEL; r++) {
            float gain = divide_or_zero(t.xq[c][r] * t.xq[c][r], t.qq[c][r], t.qq[c][r] > 0.0f);
            float quotient = divide_or_zero(t.xq[c][r], t.qq[c][r], t.qq[c][r] > 0.0f);
            scale[r] = gain > best[r] ? quotient : scale[r];
            best[r] = gain > best[r] ? gain : best[r];
        }
    for (int r = 0; r < B2_PANEL; r++)
        scales[r] = b2_f32_to_f16(clamp(scale[r], -65504.0f, 65504.0f));
}

INLINE void int4_group(uint8_t *to, uint16_t scales[B2_PANEL], const float *strip)
{
    group_values x;
    uint8_t q[GROUP][B2_PANEL];
    float inverse[B2_PANEL];
    for (int i = 0; i < GROUP; i++)
        for (int r = 0; r < B2_PANEL; r++)
            x[i][r] = strip[r * STRIP + i];
    group_scales(scales, x);
    for (int r = 0; r < B2_PANEL; r++) {
        float scale = b2_f16_to_f32(scales[r]);
        inverse[r] = divide_or_zero(1.0f, scale, scale != 0.0f);
    }
    for (int i = 0; i < GROUP; i++)
        for (int r = 0; r < B2_PANEL; r++)
            q[i][r] = (uint8_t)(nearest(clamp(x[i][r] * inverse[r], -8.0f, 7.0f)) + 8);
    for (int i = 0; i < GROUP; i += 8)
        for (int r = 0; r < B2_PANEL; r++)
            for (int b = 0; b < 4; b++)
                *to++ = (uint8_t)(q[i + b][r] | q[i + 4 + b][r] << 4);
}

B2_CLONES static void int4_panel(const quantise_job *job, int64_t panel)
{
    int64_t k = job->src->k, groups = (k + GROUP - 1) / GROUP;
    float strip[B2_PANEL * STRIP];
    for (int64_t j = 0; j < k; j += STRIP) {
        load_strip(strip, job, panel, j, b2_min64(STRIP, k - j));
        for (int64_t g = j / GROUP; g < b2_min64(groups, (j + STRIP) / GROUP); g++)
            int4_group(job->data + (panel * groups + g) * (GROUP / 2) * B2_PANEL,
                       (uint16_t *)job->scales + (panel * groups + g) * B2_PANEL, strip + g * GROUP - j);
    }
}

static void panel_tile(void *argument, int64_t index, int worker)
{
    quantise_job *job = argument;
    (void)worker;
    int64_t end = b2_min64(job->panels, (index + 1) * job->panels_per_tile);
    for (int64_t p = index * job->panels_per_tile; p < end; p++) {
        if (job->dtype == B2_I8)
            int8_panel(job, p);
        else
            int4_panel(job, p);
    }
}

static int run(quantise_job *job, b2_pool *pool, b2_cancel *cancel, b2_err *err)
{
    const b2_weight *src = job->src;
    if (b2_pool_run(pool, (src->k + COLUMNS - 1) / COLUMNS, column_tile, job, cancel, err) < 0)
        return -1;
    long long bad = atomic_load(&job->not_finite);
    if (bad)
        return b2_fail(err, B2_E_NUMERIC, "%s: %lld values are NaN or infinite: they can't be rounded to %s",
                       src->name ? src->name : "weight", bad, b2_dtype_name(job->dtype));
    return b2_pool_run(pool, (job->panels + job->panels_per_tile - 1) / job->panels_per_tile, panel_tile, job, cancel,
                       err);
}

int b2_quantise(char *block, const b2_weight *dst, const b2_weight *src, b2_pool *pool, b2_cancel *cancel, b2_err *err)
{
    enum { ELEMENTS_PER_TILE = 1 << 17 };
    b2_weight_parts parts = b2_weight_parts_of(dst);
    quantise_job job = {.src = src, .dtype = dst->dtype, .data = (uint8_t *)block,
                        .scales = block + parts.scales, .column_scales = (float *)(void *)(block + parts.column_scales)};
    job.panels = b2_ceil_div(src->n, B2_PANEL);
    job.panels_per_tile = 1 + ELEMENTS_PER_TILE / (src->k * B2_PANEL + 1);
    if (!(job.inverse = b2_alloc((size_t)src->k, sizeof(float), "column scales", err)))
        return -1;
    atomic_init(&job.not_finite, 0);
    int status = run(&job, pool, cancel, err);
    b2_free(job.inverse);
    return status;
}
