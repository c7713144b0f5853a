/* Multi-head attention: out = softmax(scale * q . k^T + distance bias, over the visible keys) . v. Brings the arguments to the
 * device and gives each row to the kernel that its lengths choose (attention.h).
 *
 * Memory: copies of the small arrays (b2_cuda_index); what a kernel needs besides is its own. */
#include "ops/cuda/attention.h"
#include "ops/cuda/cuda_ops.h"

namespace {

/* Of all rows. Numbers that the host arrays hold: no launch of a recorded step may depend on them but for the queries, which
 * the shapes of its tensors fix. */
struct extent {
    int64_t fewest_queries, most_queries, most_keys;
};

extent measure(const b2_attention_args *args)
{
    extent e = {INT64_MAX, 0, 0};
    for (int64_t b = 0; b < args->rows; b++) {
        int64_t queries = (int64_t)args->q_offsets[b + 1] - args->q_offsets[b];
        int64_t keys = (int64_t)args->prefix_lens[b] + (args->suffix_lens ? args->suffix_lens[b] : 0);
        e.fewest_queries = queries < e.fewest_queries && queries > 0 ? queries : e.fewest_queries;
        e.most_queries = queries > e.most_queries ? queries : e.most_queries;
        e.most_keys = keys > e.most_keys ? keys : e.most_keys;
    }
    return e;
}

int by_four(b2_tensor t)
{
    return t.ld % 4 == 0 && (uintptr_t)t.data % 16 == 0;
}

int all_by_four(const b2_attention_args *args)
{
    int suffix = !args->suffix_lens || (by_four(args->k_suffix) && by_four(args->v_suffix));
    return args->head_dim % 4 == 0 && by_four(args->out) && by_four(args->q) && by_four(args->k) && by_four(args->v) && suffix;
}

/* Device copy of `count` elements of a host array; leaves NULL where there is none. 0 or -1. */
template <class T> int copy(b2_ctx *ctx, const T **to, const T *host, int64_t count, b2_err *err)
{
    *to = NULL;
    if (!host)
        return 0;
    *to = (const T *)b2_cuda_index(ctx, host, (size_t)count * sizeof(T), err);
    return *to ? 0 : -1;
}

int view_of(b2_ctx *ctx, b2_attention_view *view, const b2_attention_args *args, b2_err *err)
{
    b2_attention_view v = {};
    v.out = args->out.data;
    v.out_ld = args->out.ld;
    v.q = args->q.data;
    v.q_ld = args->q.ld;
    v.keys = args->keys;
    v.k = args->k.data;
    v.k_ld = args->k.ld;
    v.v = args->v.data;
    v.v_ld = args->v.ld;
    v.rows = args->rows;
    v.key_mask_ld = args->key_mask_ld;
    v.distance_last = args->distance_limit - 1;
    v.window = args->window;
    v.scale = args->scale;
    v.causal = args->causal;
    v.heads = args->heads;
    v.kv_heads = args->kv_heads;
    v.head_dim = args->head_dim;
    v.by_four = all_by_four(args);
    int64_t distances = args->heads * (2 * args->distance_limit - 1);
    if (copy(ctx, &v.q_offsets, args->q_offsets, args->rows + 1, err) < 0 ||
        copy(ctx, &v.prefix_starts, args->prefix_starts, args->rows, err) < 0 ||
        copy(ctx, &v.prefix_lens, args->prefix_lens, args->rows, err) < 0 ||
        copy(ctx, &v.key_mask, args->key_mask, args->rows * args->key_mask_ld, err) < 0 ||
        copy(ctx, &v.distance_bias, args->distance_bias, distances, err) < 0)
        return -1;
    if (args->suffix_lens) {
        v.k_suffix = args->k_suffix.data;
        v.k_suffix_ld = args->k_suffix.ld;
        v.v_suffix = args->v_suffix.data;
        v.v_suffix_ld = args->v_suffix.ld;
        v.suffix_ld = args->suffix_ld;
        if (copy(ctx, &v.suffix_lens, args->suffix_lens, args->rows, err) < 0 ||
            copy(ctx, &v.suffix_slots, args->suffix_slots, args->rows * args->suffix_ld, err) < 0)
            return -1;
    }
    *view = v;
    return 0;
}

/* What keys of a row can come to when a recorded step is repeated. */
int64_t bound_of_keys(const b2_ctx *ctx, const b2_attention_args *args, const extent *e)
{
    if (!b2_cuda_of(ctx)->arrays_change)
        return e->most_keys;
    return args->k.rows + (args->suffix_lens ? args->suffix_ld : 0);
}

/* Whether this is a picture, or as plain as one, whose operands may be rounded. */
int is_plain(const b2_attention_args *args, const b2_attention_view *view)
{
    return args->operands != B2_F32 && args->keys == B2_F32 && args->scale > 0.0f && view->by_four && !args->causal && !args->window && !args->key_mask &&
           !args->distance_bias && !args->suffix_lens;
}

} // namespace

int b2_cuda_attention(b2_ctx *ctx, const b2_attention_args *args, b2_err *err)
{
    b2_attention_view view;
    extent e = measure(args);
    if (view_of(ctx, &view, args, err) < 0)
        return -1;
    if (args->head_dim > B2_ATTENTION_WIDEST)
        return b2_attention_wide(ctx, &view, args->q.rows, err);
    if (e.fewest_queries <= B2_ATTENTION_FEW &&
        b2_attention_few(ctx, &view, args->q.rows, bound_of_keys(ctx, args, &e), err) < 0)
        return -1;
    if (e.most_queries <= B2_ATTENTION_FEW)
        return 0;
    if (is_plain(args, &view))
        return b2_attention_pictures(ctx, &view, e.most_queries, args->operands, err);
    return b2_attention_tiles(ctx, &view, e.most_queries, err);
}

int b2_cuda_attention_weights(b2_ctx *ctx, float *weights, const b2_attention_args *args, b2_err *err)
{
    b2_attention_view view;
    size_t mark = b2_arena_mark(ctx->scratch);
    int64_t *offsets = (int64_t *)b2_arena_take(ctx->scratch, (size_t)args->rows, sizeof *offsets, err);
    const int64_t *offsets_there;
    if (!offsets || view_of(ctx, &view, args, err) < 0)
        return -1;
    int64_t offset = 0;
    for (int64_t b = 0; b < args->rows; b++) {
        int64_t keys = (int64_t)args->prefix_lens[b] + (args->suffix_lens ? args->suffix_lens[b] : 0);
        offsets[b] = offset;
        offset += args->heads * ((int64_t)args->q_offsets[b + 1] - args->q_offsets[b]) * keys;
    }
    if (copy(ctx, &offsets_there, (const int64_t *)offsets, args->rows, err) < 0)
        return -1;
    b2_arena_reset(ctx->scratch, mark);
    return b2_attention_weigh(ctx, &view, weights, offsets_there, args->q.rows, err);
}

size_t b2_cuda_attention_scratch(const b2_ctx *ctx, int64_t max_rows, int64_t max_width, int64_t max_keys, int max_head_dim)
{
    (void)max_width;
    (void)max_keys;
    (void)max_head_dim;
    /* The offsets of attention_weights come from the other arena, which is planned alike. */
    return b2_attention_few_scratch(ctx) + b2_arena_cost((size_t)max_rows, sizeof(int64_t));
}
