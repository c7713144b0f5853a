/* Packing, unpacking and conversion of weights. See weights.h for who owns what. */
#include "ops/weights.h"

#include <stdatomic.h>
#include <string.h>

#include "core/memory.h"
#include "ops/half.h"

static uint16_t load_u16(const void *src, int64_t i)
{
    uint16_t value;
    memcpy(&value, (const char *)src + 2 * i, sizeof value);
    return value;
}

/* src [count] as fp32 */
static void to_f32(float *dst, const void *src, b2_dtype dtype, int64_t count)
{
    if (dtype == B2_F32)
        memcpy(dst, src, (size_t)count * sizeof *dst);
    else if (dtype == B2_F16)
        for (int64_t i = 0; i < count; i++)
            dst[i] = b2_f16_to_f32(load_u16(src, i));
    else
        for (int64_t i = 0; i < count; i++)
            dst[i] = b2_bf16_to_f32(load_u16(src, i));
}

static int is_finite(float value)
{
    return (b2_f32_to_bits(value) & 0x7f800000u) != 0x7f800000u;
}

/* Stores fp32 as `dtype`; returns how many finite values became infinite. */
static int64_t from_f32(void *dst, b2_dtype dtype, const float *src, int64_t count)
{
    int64_t overflows = 0;
    if (dtype == B2_F32) {
        memcpy(dst, src, (size_t)count * sizeof *src);
        return 0;
    }
    for (int64_t i = 0; i < count; i++) {
        uint16_t half = dtype == B2_F16 ? b2_f32_to_f16(src[i]) : b2_f32_to_bf16(src[i]);
        uint16_t infinity = dtype == B2_F16 ? 0x7c00 : 0x7f80;
        overflows += (half & 0x7fff) == infinity && is_finite(src[i]);
        memcpy((char *)dst + 2 * i, &half, sizeof half);
    }
    return overflows;
}

int64_t b2_convert(void *dst, b2_dtype dst_dtype, const void *src, b2_dtype src_dtype, int64_t count)
{
    enum { BLOCK = 256 };
    float block[BLOCK];
    int64_t overflows = 0;
    if (dst_dtype == src_dtype) {
        memcpy(dst, src, (size_t)count * b2_dtype_size(dst_dtype));
        return 0;
    }
    for (int64_t i = 0; i < count; i += BLOCK) {
        int64_t n = count - i < BLOCK ? count - i : BLOCK;
        to_f32(block, (const char *)src + (size_t)i * b2_dtype_size(src_dtype), src_dtype, n);
        overflows += from_f32((char *)dst + (size_t)i * b2_dtype_size(dst_dtype), dst_dtype, block, n);
    }
    return overflows;
}

static int overflowed(const b2_weight *w, b2_dtype dtype, int64_t count, b2_err *err)
{
    return b2_fail(err, B2_E_NUMERIC, "%s: %lld values of %s are too large for %s", w->name ? w->name : "weight",
                   (long long)count, b2_dtype_name(w->dtype), b2_dtype_name(dtype));
}

static size_t panel_elements(int64_t n, int64_t k)
{
    return (size_t)((n + B2_PANEL - 1) / B2_PANEL) * (size_t)k * B2_PANEL;
}

/* ---- packing ---- */

enum { STRIP = 64 }; /* columns that are converted and then transposed at a time: sixteen rows of them stay in L1 */

typedef struct pack_job {
    const b2_weight *src;
    char *dst;
    b2_dtype dtype;
    int64_t panels, panels_per_tile;
    atomic_llong overflows;
} pack_job;

/* dst [count][16] from strip [16][STRIP], elements of 2 or 4 bytes */
static void transpose2(uint16_t *restrict dst, const uint16_t *restrict strip, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        for (int r = 0; r < B2_PANEL; r++)
            dst[i * B2_PANEL + r] = strip[r * STRIP + i];
}

static void transpose4(uint32_t *restrict dst, const uint32_t *restrict strip, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        for (int r = 0; r < B2_PANEL; r++)
            dst[i * B2_PANEL + r] = strip[r * STRIP + i];
}

static int64_t pack_panel(const pack_job *job, int64_t panel)
{
    const b2_weight *src = job->src;
    size_t size = b2_dtype_size(job->dtype), src_size = b2_dtype_size(src->dtype);
    int64_t k = src->k, first = panel * B2_PANEL, overflows = 0;
    int64_t rows = src->n - first < B2_PANEL ? src->n - first : B2_PANEL;
    _Alignas(64) char strip[B2_PANEL * STRIP * 4] = {0};
    for (int64_t j = 0; j < k; j += STRIP) {
        int64_t count = k - j < STRIP ? k - j : STRIP;
        for (int64_t r = 0; r < rows; r++)
            overflows += b2_convert(strip + (size_t)(r * STRIP) * size, job->dtype,
                                    (const char *)src->data + (size_t)((first + r) * k + j) * src_size, src->dtype,
                                    count);
        void *to = job->dst + (size_t)((panel * k + j) * B2_PANEL) * size;
        if (size == 4)
            transpose4(to, (const void *)strip, count);
        else
            transpose2(to, (const void *)strip, count);
    }
    return overflows;
}

static void pack_tile(void *argument, int64_t index, int worker)
{
    pack_job *job = argument;
    (void)worker;
    int64_t end = (index + 1) * job->panels_per_tile, overflows = 0;
    end = end < job->panels ? end : job->panels;
    for (int64_t p = index * job->panels_per_tile; p < end; p++)
        overflows += pack_panel(job, p);
    if (overflows)
        atomic_fetch_add(&job->overflows, overflows);
}

int b2_weight_pack(b2_weight *dst, const b2_weight *src, b2_format format, b2_pool *pool, b2_cancel *cancel,
                   b2_err *err)
{
    b2_dtype dtype = format.dtype;
    enum { ELEMENTS_PER_TILE = 1 << 18 };
    if (src->layout != B2_ROWS || !src->data)
        return b2_fail(err, B2_E_INTERNAL, "%s: only a matrix in rows can be packed", src->name ? src->name : "weight");
    char *data = b2_alloc(panel_elements(src->n, src->k), b2_dtype_size(dtype), src->name ? src->name : "weight", err);
    if (!data)
        return -1;
    pack_job job = {.src = src, .dst = data, .dtype = dtype, .panels = (src->n + B2_PANEL - 1) / B2_PANEL};
    job.panels_per_tile = 1 + ELEMENTS_PER_TILE / (src->k * B2_PANEL + 1);
    int64_t tiles = (job.panels + job.panels_per_tile - 1) / job.panels_per_tile;
    int status = b2_pool_run(pool, tiles, pack_tile, &job, cancel, err);
    int64_t overflows = atomic_load(&job.overflows);
    if (status == 0 && overflows > 0)
        status = overflowed(src, dtype, overflows, err);
    if (status < 0) {
        b2_free(data);
        return -1;
    }
    *dst = *src;
    dst->data = data;
    dst->dtype = dtype;
    dst->layout = B2_PANELS;
    dst->owned = 1;
    return 0;
}

int b2_weight_copy(b2_weight *dst, const b2_weight *src, b2_dtype dtype, b2_err *err)
{
    const char *name = src->name ? src->name : "weight";
    if (src->layout != B2_ROWS || !src->data)
        return b2_fail(err, B2_E_INTERNAL, "%s: only a matrix in rows can be copied", name);
    char *data = b2_alloc((size_t)(src->n * src->k), b2_dtype_size(dtype), name, err);
    if (!data)
        return -1;
    int64_t overflows = b2_convert(data, dtype, src->data, src->dtype, src->n * src->k);
    if (overflows > 0) {
        b2_free(data);
        return overflowed(src, dtype, overflows, err);
    }
    *dst = *src;
    dst->data = data;
    dst->dtype = dtype;
    dst->owned = 1;
    return 0;
}

int b2_weight_unpack(void *out, const b2_weight *w, b2_err *err)
{
    size_t size = b2_dtype_size(w->dtype);
    if (!w->data)
        return b2_fail(err, B2_E_INTERNAL, "%s: the weight is absent", w->name ? w->name : "weight");
    if (w->layout == B2_ROWS) {
        memcpy(out, w->data, (size_t)(w->n * w->k) * size);
        return 0;
    }
    for (int64_t i = 0; i < w->n; i++)
        for (int64_t j = 0; j < w->k; j++) {
            int64_t at = (i / B2_PANEL * w->k + j) * B2_PANEL + i % B2_PANEL;
            memcpy((char *)out + (size_t)(i * w->k + j) * size, (const char *)w->data + (size_t)at * size, size);
        }
    return 0;
}

void b2_weight_release(b2_weight *w)
{
    if (w->owned)
        b2_free((void *)w->data);
    w->data = NULL;
    w->owned = 0;
}
