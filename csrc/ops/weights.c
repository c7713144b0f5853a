/* Packing, unpacking and conversion of weights. See weights.h for who owns what. */
#include "ops/weights.h"

#include <stdatomic.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/cpu.h"
#include "core/integers.h"
#include "core/memory.h"
#include "ops/half.h"
#include "ops/quantise.h"

static uint16_t load_u16(const void *src, int64_t i)
{
    uint16_t value;
    memcpy(&value, (const char *)src + 2 * i, sizeof value);
    return value;
}

/* ---- float16 to fp32: an instruction that the compiler does not find in b2_f16_to_f32, and whose bits are the same ---- */

static void widen_plain(float *dst, const char *src, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        dst[i] = b2_f16_to_f32(load_u16(src, i));
}

#if defined(__x86_64__)
__attribute__((target("avx512f"))) static void widen_avx512(float *dst, const char *src, int64_t count)
{
    int64_t i = 0;
    for (; i + 16 <= count; i += 16)
        _mm512_storeu_ps(dst + i, _mm512_cvtph_ps(_mm256_loadu_si256((const void *)(src + 2 * i))));
    widen_plain(dst + i, src + 2 * i, count - i);
}

__attribute__((target("avx,f16c"))) static void widen_f16c(float *dst, const char *src, int64_t count)
{
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128((const void *)(src + 2 * i))));
    widen_plain(dst + i, src + 2 * i, count - i);
}

static void widen_f16(float *dst, const char *src, int64_t count)
{
    if (__builtin_cpu_supports("avx512f"))
        widen_avx512(dst, src, count);
    else if (__builtin_cpu_supports("f16c"))
        widen_f16c(dst, src, count);
    else
        widen_plain(dst, src, count);
}
#else
static void widen_f16(float *dst, const char *src, int64_t count)
{
    widen_plain(dst, src, count);
}
#endif

/* src [count] as fp32 */
static void to_f32(float *dst, const void *src, b2_dtype dtype, int64_t count)
{
    if (dtype == B2_F32)
        memcpy(dst, src, (size_t)count * sizeof *dst);
    else if (dtype == B2_F16)
        widen_f16(dst, src, count);
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

B2_CLONES int64_t b2_convert(void *dst, b2_dtype dst_dtype, const void *src, b2_dtype src_dtype, int64_t count)
{
    enum { BLOCK = 256 };
    float block[BLOCK];
    int64_t overflows = 0;
    if (dst_dtype == src_dtype) {
        memcpy(dst, src, (size_t)count * b2_dtype_size(dst_dtype));
        return 0;
    }
    if (dst_dtype == B2_F32 && (uintptr_t)dst % sizeof(float) == 0) {
        to_f32(dst, src, src_dtype, count);
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

/* ---- the block of a packed weight ---- */

static size_t data_bytes(const b2_weight *w)
{
    size_t rows = (size_t)b2_round_up(w->n, B2_PANEL);
    switch (w->layout) {
    case B2_ROWS: return (size_t)(w->n * w->k) * b2_dtype_size(w->dtype);
    case B2_PANELS: return rows * (size_t)w->k * b2_dtype_size(w->dtype);
    case B2_PAIRS: return rows * (size_t)b2_round_up(w->k, 2) * sizeof(uint16_t);
    case B2_QUADS: return rows * (size_t)b2_round_up(w->k, 32) / (w->dtype == B2_I4 ? 2 : 1);
    case B2_STRIDED: return (size_t)(w->n * b2_strided_ld(w->k)) * (w->dtype == B2_I4 ? 1 : b2_dtype_size(w->dtype)) /
                            (w->dtype == B2_I4 ? 2 : 1);
    }
    return 0;
}

b2_weight_parts b2_weight_parts_of(const b2_weight *w)
{
    int strided = w->layout == B2_STRIDED;
    int64_t unit = strided ? 256 : 64;
    b2_weight_parts parts = {.bytes = (size_t)b2_round_up((int64_t)data_bytes(w), unit)};
    if (!b2_dtype_is_quantised(w->dtype))
        return parts;
    int64_t scales = (strided ? w->n : b2_round_up(w->n, B2_PANEL)) * ((w->k + w->group - 1) / w->group);
    parts.scales = parts.bytes;
    parts.column_scales = parts.scales + (size_t)b2_round_up(scales * (w->dtype == B2_I4 ? 2 : 4), unit);
    parts.bytes = parts.column_scales + (size_t)b2_round_up(w->k * (int64_t)sizeof(float), unit);
    return parts;
}

void b2_weight_place(b2_weight *w, const void *block, int has_column_scales)
{
    b2_weight_parts parts = b2_weight_parts_of(w);
    const char *base = block;
    w->data = base;
    w->scales = parts.scales ? base + parts.scales : NULL;
    w->column_scales = parts.column_scales && has_column_scales ? (const void *)(base + parts.column_scales) : NULL;
}

/* ---- packing ---- */

enum { STRIP = 64 }; /* columns that are converted and then transposed at a time: sixteen rows of them stay in L1 */

typedef struct pack_job {
    const b2_weight *src;
    const b2_weight *dst;
    char *data; /* dst's */
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

static void transpose4(uint32_t *restrict dst, const uint32_t *restrict strip, int64_t strip_ld, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        for (int r = 0; r < B2_PANEL; r++)
            dst[i * B2_PANEL + r] = strip[r * strip_ld + i];
}

static int64_t pack_panel(const pack_job *job, int64_t panel)
{
    const b2_weight *src = job->src, *dst = job->dst;
    size_t size = b2_dtype_size(dst->dtype), src_size = b2_dtype_size(src->dtype);
    int64_t unit = dst->layout == B2_PAIRS ? 2 : 1; /* columns that lie side by side */
    int64_t k = src->k, first = panel * B2_PANEL, overflows = 0;
    int64_t rows = src->n - first < B2_PANEL ? src->n - first : B2_PANEL;
    _Alignas(64) char strip[B2_PANEL * STRIP * 4] = {0};
    for (int64_t j = 0; j < k; j += STRIP) {
        int64_t count = k - j < STRIP ? k - j : STRIP;
        if (count % unit != 0)
            memset(strip, 0, sizeof strip);
        for (int64_t r = 0; r < rows; r++)
            overflows += b2_convert(strip + (size_t)(r * STRIP) * size, dst->dtype,
                                    (const char *)src->data + (size_t)((first + r) * k + j) * src_size, src->dtype,
                                    count);
        void *to = job->data + (size_t)((panel * b2_round_up(k, unit) + j) * B2_PANEL) * size;
        if (unit == 2)
            transpose4(to, (const void *)strip, STRIP / 2, (count + 1) / 2);
        else if (size == 4)
            transpose4(to, (const void *)strip, STRIP, count);
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

static int pack_halves(const b2_weight *dst, char *data, const b2_weight *src, b2_pool *pool, b2_cancel *cancel,
                       b2_err *err)
{
    enum { ELEMENTS_PER_TILE = 1 << 18 };
    pack_job job = {.src = src, .dst = dst, .data = data, .panels = b2_ceil_div(src->n, B2_PANEL)};
    job.panels_per_tile = 1 + ELEMENTS_PER_TILE / (src->k * B2_PANEL + 1);
    int64_t tiles = (job.panels + job.panels_per_tile - 1) / job.panels_per_tile;
    if (b2_pool_run(pool, tiles, pack_tile, &job, cancel, err) < 0)
        return -1;
    int64_t overflows = atomic_load(&job.overflows);
    return overflows > 0 ? overflowed(src, dst->dtype, overflows, err) : 0;
}

/* What lies between two parts: the same weight gives the same bytes, in files too. */
static void clear_ends(char *block, const b2_weight *w)
{
    b2_weight_parts parts = b2_weight_parts_of(w);
    memset(block + parts.bytes - 64, 0, 64);
    if (parts.scales) {
        memset(block + parts.scales - 64, 0, 64);
        memset(block + parts.column_scales - 64, 0, 64);
    }
}

static int fits(b2_format format)
{
    switch (format.layout) {
    case B2_PANELS: return !b2_dtype_is_quantised(format.dtype);
    case B2_PAIRS: return format.dtype == B2_BF16;
    case B2_QUADS: return b2_dtype_is_quantised(format.dtype);
    default: return 0;
    }
}

int b2_weight_pack(b2_weight *dst, const b2_weight *src, b2_format format, b2_pool *pool, b2_cancel *cancel,
                   b2_err *err)
{
    const char *name = src->name ? src->name : "weight";
    if (src->layout != B2_ROWS || !src->data)
        return b2_fail(err, B2_E_INTERNAL, "%s: only a matrix in rows can be packed", name);
    if (!fits(format))
        return b2_fail(err, B2_E_INTERNAL, "%s: %s has no layout %d", name, b2_dtype_name(format.dtype),
                       (int)format.layout);
    b2_weight packed = *src;
    packed.dtype = format.dtype;
    packed.layout = format.layout;
    packed.group = format.dtype == B2_I8 ? b2_round_up(src->k, 32) : format.dtype == B2_I4 ? 32 : 0;
    char *block = b2_alloc_huge(b2_weight_parts_of(&packed).bytes, 1, name, err);
    if (!block)
        return -1;
    clear_ends(block, &packed);
    b2_weight_place(&packed, block, 1);
    packed.owned = 1;
    int status = format.layout == B2_QUADS ? b2_quantise(block, &packed, src, pool, cancel, err)
                                           : pack_halves(&packed, block, src, pool, cancel, err);
    if (status < 0) {
        b2_free(block);
        return -1;
    }
    *dst = packed;
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

/* ---- reading ---- */

/* Byte offset of element (i, j) of a weight that is not quantised. */
static size_t element_at(const b2_weight *w, int64_t i, int64_t j)
{
    int64_t at = i * w->k + j;
    if (w->layout == B2_STRIDED)
        at = i * b2_strided_ld(w->k) + j;
    if (w->layout == B2_PANELS)
        at = (i / B2_PANEL * w->k + j) * B2_PANEL + i % B2_PANEL;
    if (w->layout == B2_PAIRS)
        at = ((i / B2_PANEL * b2_round_up(w->k, 2) + j / 2 * 2) * B2_PANEL + i % B2_PANEL * 2) + j % 2;
    return (size_t)at * b2_dtype_size(w->dtype);
}

static void read_quads(float *out, const b2_weight *w, int64_t i, int64_t first, int64_t count)
{
    int64_t panel = i / B2_PANEL, lane = i % B2_PANEL, groups = (w->k + w->group - 1) / w->group;
    const uint8_t *data = (const uint8_t *)w->data + panel * b2_round_up(w->k, 32) * B2_PANEL / (w->dtype == B2_I4 ? 2 : 1);
    for (int64_t n = 0; n < count; n++) {
        int64_t j = first + n, scale = (panel * groups + j / w->group) * B2_PANEL + lane;
        float value;
        if (w->dtype == B2_I8) {
            int q = data[(j / 4 * B2_PANEL + lane) * 4 + j % 4] - 128;
            value = ((const float *)w->scales)[scale] * (float)q;
        } else {
            int byte = data[(j / 8 * B2_PANEL + lane) * 4 + j % 4];
            int q = (j % 8 < 4 ? byte & 15 : byte >> 4) - 8;
            value = b2_f16_to_f32(((const uint16_t *)w->scales)[scale]) * (float)q;
        }
        out[n] = w->column_scales ? value * w->column_scales[j] : value;
    }
}

/* Quantised, in B2_STRIDED. */
static void read_strided(float *out, const b2_weight *w, int64_t i, int64_t first, int64_t count)
{
    int64_t ld = b2_strided_ld(w->k), groups = (w->k + w->group - 1) / w->group;
    for (int64_t n = 0; n < count; n++) {
        int64_t j = first + n, scale = i * groups + j / w->group;
        float value;
        if (w->dtype == B2_I8) {
            value = ((const float *)w->scales)[scale] * (float)((const int8_t *)w->data)[i * ld + j];
        } else {
            int byte = ((const uint8_t *)w->data)[(i * ld + j) / 2], q = (j % 2 ? byte >> 4 : byte & 15) - 8;
            value = b2_f16_to_f32(((const uint16_t *)w->scales)[scale]) * (float)q;
        }
        out[n] = w->column_scales ? value * w->column_scales[j] : value;
    }
}

void b2_weight_read_part(float *out, const b2_weight *w, int64_t i, int64_t first, int64_t count)
{
    if (w->layout == B2_QUADS) {
        read_quads(out, w, i, first, count);
        return;
    }
    if (w->layout == B2_STRIDED && b2_dtype_is_quantised(w->dtype)) {
        read_strided(out, w, i, first, count);
        return;
    }
    if (w->layout == B2_ROWS || w->layout == B2_STRIDED) {
        to_f32(out, (const char *)w->data + element_at(w, i, first), w->dtype, count);
        return;
    }
    for (int64_t j = 0; j < count; j++)
        to_f32(out + j, (const char *)w->data + element_at(w, i, first + j), w->dtype, 1);
}

void b2_weight_read_row(float *out, const b2_weight *w, int64_t i)
{
    b2_weight_read_part(out, w, i, 0, w->k);
}

int b2_weight_unpack(void *out, const b2_weight *w, b2_err *err)
{
    if (!w->data)
        return b2_fail(err, B2_E_INTERNAL, "%s: the weight is absent", w->name ? w->name : "weight");
    if (w->memory) {
        b2_weight here;
        if (b2_weight_fetch(&here, w, err) < 0)
            return -1;
        int status = b2_weight_unpack(out, &here, err);
        b2_weight_release(&here);
        return status;
    }
    if (w->layout == B2_ROWS) {
        memcpy(out, w->data, data_bytes(w));
        return 0;
    }
    if (b2_dtype_is_quantised(w->dtype)) {
        for (int64_t i = 0; i < w->n; i++)
            b2_weight_read_row((float *)out + i * w->k, w, i);
        return 0;
    }
    size_t size = b2_dtype_size(w->dtype);
    for (int64_t i = 0; i < w->n; i++)
        for (int64_t j = 0; j < w->k; j++)
            memcpy((char *)out + (size_t)(i * w->k + j) * size, (const char *)w->data + element_at(w, i, j), size);
    return 0;
}

void b2_weight_release(b2_weight *w)
{
    if (w->owned)
        b2_memory_free(w->memory, (void *)w->data);
    w->memory = NULL;
    w->data = w->scales = NULL;
    w->column_scales = NULL;
    w->owned = 0;
}
