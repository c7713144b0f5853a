#include "model/prefix.h"

#include <string.h>

#include "core/memory.h"

b2_prefix *b2_prefix_create(const void *model, const b2_kv_cache *like, int64_t length, b2_err *err)
{
    b2_prefix *prefix = b2_alloc_zeroed(1, sizeof *prefix, "prefix", err);
    if (!prefix)
        return NULL;
    prefix->model = model;
    prefix->length = length;
    prefix->ids = b2_alloc((size_t)length, sizeof *prefix->ids, "prefix ids", err);
    prefix->rule_ids = b2_alloc((size_t)length, sizeof *prefix->rule_ids, "prefix ids", err);
    if (prefix->ids && prefix->rule_ids &&
        b2_kv_cache_create(&prefix->cache, like->memory, like->dtype, like->layers, like->width, length, err) == 0)
        return prefix;
    b2_prefix_release(prefix);
    return NULL;
}

void b2_prefix_release(b2_prefix *prefix)
{
    if (!prefix)
        return;
    b2_kv_cache_release(&prefix->cache);
    b2_free(prefix->ids);
    b2_free(prefix->rule_ids);
    b2_free(prefix);
}

/* Rows from `first` on, to be copied as they are: two elements of 16 bits as one of 32. */
static b2_tensor from_row(const b2_kv_cache *cache, b2_tensor t, int64_t first)
{
    if (cache->dtype != B2_F32)
        t = b2_tensor_of(t.data, t.rows, t.cols / 2);
    return b2_rows(t, first, t.rows - first);
}

int b2_prefix_copy(b2_ctx *ctx, const b2_kv_cache *to, int64_t first, const b2_kv_cache *from, const int32_t *rows,
                   int64_t n, b2_err *err)
{
    for (int i = 0; i < to->layers; i++)
        if (b2_copy_rows(ctx, from_row(to, b2_kv_cache_keys(to, i), first), NULL,
                         from_row(from, b2_kv_cache_keys(from, i), 0), rows, n, err) < 0 ||
            b2_copy_rows(ctx, from_row(to, b2_kv_cache_values(to, i), first), NULL,
                         from_row(from, b2_kv_cache_values(from, i), 0), rows, n, err) < 0)
            return -1;
    return 0;
}

int b2_prefix_head(b2_prefix **head, b2_ctx *ctx, const b2_prefix *prefix, int64_t length, b2_err *err)
{
    b2_prefix *p = b2_prefix_create(prefix->model, &prefix->cache, length, err);
    if (!p)
        return -1;
    /* No masked pads: every token takes one position. */
    p->next_position = prefix->next_position - (prefix->length - length);
    memcpy(p->ids, prefix->ids, (size_t)length * sizeof *p->ids);
    memcpy(p->rule_ids, prefix->rule_ids, (size_t)length * sizeof *p->rule_ids);
    if (b2_prefix_copy(ctx, &p->cache, 0, &prefix->cache, NULL, length, err) < 0) {
        b2_wait(ctx);
        b2_prefix_release(p);
        return -1;
    }
    *head = p;
    return 0;
}
