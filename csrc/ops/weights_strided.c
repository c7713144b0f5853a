/* Weights for devices: B2_STRIDED blocks, made strip by strip on the host and sent to where they are to lie. Values are those
 * that the processor would hold: quantised ones are rounded as B2_QUADS and then only moved. */
#include <string.h>

#include "core/memory.h"
#include "core/pool.h"
#include "ops/weights.h"

enum { STRIP_BYTES = 8 << 20 };

static size_t row_bytes(const b2_weight *w)
{
    int64_t ld = b2_strided_ld(w->k);
    return w->dtype == B2_I4 ? (size_t)ld / 2 : (size_t)ld * b2_dtype_size(w->dtype);
}

static int put(b2_memory *memory, void *to, const void *from, size_t bytes, b2_err *err)
{
    if (memory)
        return memory->upload(memory, to, from, bytes, err);
    memcpy(to, from, bytes);
    return 0;
}

/* to [ld] = q of row i of a weight in B2_QUADS. */
static void read_quads_row(uint8_t *to, const b2_weight *w, int64_t i)
{
    int64_t panel = i / B2_PANEL, lane = i % B2_PANEL, ld = b2_strided_ld(w->k);
    if (w->dtype == B2_I8) {
        const uint8_t *data = (const uint8_t *)w->data + panel * ld * B2_PANEL;
        for (int64_t j = 0; j < ld; j++)
            to[j] = (uint8_t)(data[(j / 4 * B2_PANEL + lane) * 4 + j % 4] - 128);
        return;
    }
    const uint8_t *data = (const uint8_t *)w->data + panel * ld / 2 * B2_PANEL;
    for (int64_t j = 0; j < ld; j += 2) {
        int shift = j % 8 < 4 ? 0 : 4;
        const uint8_t *pair = data + (j / 8 * B2_PANEL + lane) * 4 + j % 4;
        to[j / 2] = (uint8_t)((pair[0] >> shift & 15) | (pair[1] >> shift & 15) << 4);
    }
}

/* to [rows of ld] = rows [first, first + count) of src in dst's dtype; returns how many values were too large for it. */
static int64_t fill_strip(char *to, const b2_weight *dst, const b2_weight *src, int64_t first, int64_t count)
{
    size_t bytes = row_bytes(dst), size = b2_dtype_size(src->dtype);
    int64_t overflows = 0;
    for (int64_t r = 0; r < count; r++, to += bytes) {
        int64_t i = first + r;
        if (src->layout == B2_QUADS) {
            read_quads_row((uint8_t *)to, src, i);
            continue;
        }
        memset(to, 0, bytes);
        if (src->layout == B2_ROWS) {
            overflows += b2_convert(to, dst->dtype, (const char *)src->data + (size_t)(i * src->k) * size, src->dtype, src->k);
            continue;
        }
        enum { PART = 256 };
        float part[PART];
        for (int64_t j = 0; j < src->k; j += PART) {
            int64_t n = src->k - j < PART ? src->k - j : PART;
            b2_weight_read_part(part, src, i, j, n);
            overflows += b2_convert(to + (size_t)j * b2_dtype_size(dst->dtype), dst->dtype, part, B2_F32, n);
        }
    }
    return overflows;
}

static int send_rows(const b2_weight *dst, const b2_weight *src, b2_cancel *cancel, b2_err *err)
{
    size_t bytes = row_bytes(dst);
    if (src->layout == B2_ROWS && src->dtype == dst->dtype && src->k == b2_strided_ld(src->k))
        return put(dst->memory, (void *)dst->data, src->data, (size_t)src->n * bytes, err);
    int64_t strip = bytes > STRIP_BYTES ? 1 : (int64_t)(STRIP_BYTES / bytes), overflows = 0;
    strip = strip < src->n ? strip : src->n;
    char *rows = b2_alloc((size_t)strip, bytes, src->name ? src->name : "weight", err);
    int status = rows ? 0 : -1;
    for (int64_t i = 0; status == 0 && i < src->n; i += strip) {
        int64_t count = src->n - i < strip ? src->n - i : strip;
        overflows += fill_strip(rows, dst, src, i, count);
        status = b2_cancel_poll(cancel) ? b2_fail(err, B2_E_CANCEL, "cancelled")
                                        : put(dst->memory, (char *)dst->data + (size_t)i * bytes, rows,
                                              (size_t)count * bytes, err);
    }
    b2_free(rows);
    if (status == 0 && overflows > 0)
        return b2_fail(err, B2_E_NUMERIC, "%s: %lld values of %s are too large for %s", src->name ? src->name : "weight",
                       (long long)overflows, b2_dtype_name(src->dtype), b2_dtype_name(dst->dtype));
    return status;
}

/* Scales [panel][group][16] become [n][group]. */
static int send_scales(const b2_weight *dst, const b2_weight *src, b2_err *err)
{
    int64_t groups = (src->k + src->group - 1) / src->group;
    size_t size = src->dtype == B2_I4 ? 2 : 4;
    char *rows = b2_alloc((size_t)(src->n * groups), size, "scales", err);
    if (!rows)
        return -1;
    for (int64_t i = 0; i < src->n; i++)
        for (int64_t g = 0; g < groups; g++)
            memcpy(rows + (size_t)(i * groups + g) * size,
                   (const char *)src->scales + (size_t)((i / B2_PANEL * groups + g) * B2_PANEL + i % B2_PANEL) * size, size);
    int status = put(dst->memory, (void *)dst->scales, rows, (size_t)(src->n * groups) * size, err);
    b2_free(rows);
    if (status == 0 && src->column_scales)
        status = put(dst->memory, (void *)dst->column_scales, src->column_scales, (size_t)src->k * sizeof(float), err);
    return status;
}

/* src is in dst's dtype where that is quantised. */
static int stride(b2_weight *dst, const b2_weight *src, b2_dtype dtype, b2_memory *memory, b2_cancel *cancel, b2_err *err)
{
    b2_weight w = *src;
    w.dtype = dtype;
    w.layout = B2_STRIDED;
    w.group = b2_dtype_is_quantised(dtype) ? src->group : 0;
    w.memory = memory;
    w.owned = 1;
    void *block = b2_memory_alloc(memory, b2_weight_parts_of(&w).bytes, 1, src->name ? src->name : "weight", err);
    if (!block)
        return -1;
    b2_weight_place(&w, block, src->column_scales != NULL);
    if (send_rows(&w, src, cancel, err) < 0 || (w.group > 0 && send_scales(&w, src, err) < 0)) {
        b2_memory_free(memory, block);
        return -1;
    }
    *dst = w;
    return 0;
}

int b2_weight_stride(b2_weight *dst, const b2_weight *src, b2_dtype dtype, b2_memory *memory, b2_pool *pool,
                     b2_cancel *cancel, b2_err *err)
{
    if (!src->data || src->memory || src->layout == B2_STRIDED)
        return b2_fail(err, B2_E_INTERNAL, "%s: only a matrix on the host can be moved", src->name ? src->name : "weight");
    if (!b2_dtype_is_quantised(dtype) || src->layout == B2_QUADS)
        return stride(dst, src, src->layout == B2_QUADS ? src->dtype : dtype, memory, cancel, err);
    b2_weight packed;
    if (b2_weight_pack(&packed, src, (b2_format){dtype, B2_QUADS}, pool, cancel, err) < 0)
        return -1;
    int status = stride(dst, &packed, dtype, memory, cancel, err);
    b2_weight_release(&packed);
    return status;
}

int b2_weight_move(b2_weight *w, b2_memory *memory, b2_err *err)
{
    size_t bytes = (size_t)(w->n * w->k) * b2_dtype_size(w->dtype);
    if (w->layout != B2_ROWS || w->memory)
        return b2_fail(err, B2_E_INTERNAL, "%s: only rows on the host can be moved", w->name ? w->name : "weight");
    void *block = b2_memory_alloc(memory, bytes, 1, w->name ? w->name : "weight", err);
    if (!block || put(memory, block, w->data, bytes, err) < 0) {
        b2_memory_free(memory, block);
        return -1;
    }
    b2_weight_release(w);
    w->data = block;
    w->memory = memory;
    w->owned = 1;
    return 0;
}

int b2_weight_fetch(b2_weight *copy, const b2_weight *w, b2_err *err)
{
    size_t bytes = b2_weight_parts_of(w).bytes;
    size_t present = w->layout == B2_ROWS ? (size_t)(w->n * w->k) * b2_dtype_size(w->dtype) : bytes;
    void *block = b2_alloc(bytes, 1, w->name ? w->name : "weight", err);
    if (!block || w->memory->download(w->memory, block, w->data, present, err) < 0) {
        b2_free(block);
        return -1;
    }
    *copy = *w;
    copy->memory = NULL;
    copy->owned = 1;
    b2_weight_place(copy, block, w->column_scales != NULL);
    return 0;
}
