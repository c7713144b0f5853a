#include "ops/ops.h"

/* Shapes are checked here, once for every backend. */

#define SHAPE(t) (long long)(t).rows, (long long)(t).cols

static int check_view(const char *op, const char *name, b2_tensor t, b2_err *err)
{
    if (t.rows < 0 || t.cols < 0 || t.ld < t.cols || (!t.data && t.rows * t.cols > 0))
        return b2_fail(err, B2_E_INTERNAL, "%s: %s is not a view: [%lld, %lld], row distance %lld", op, name, SHAPE(t),
                       (long long)t.ld);
    return 0;
}

static int check_shape(const char *op, const char *name, b2_tensor t, int64_t rows, int64_t cols, b2_err *err)
{
    if (check_view(op, name, t, err) < 0)
        return -1;
    if (t.rows != rows || t.cols != cols)
        return b2_fail(err, B2_E_VALUE, "%s: %s: expected shape [%lld, %lld], found [%lld, %lld]", op, name,
                       (long long)rows, (long long)cols, SHAPE(t));
    return 0;
}

static int check_vector(const char *op, const char *name, const b2_weight *w, int64_t n, b2_err *err)
{
    if (!w || !w->data)
        return 0;
    if (w->n != n || w->k != 1 || w->dtype != B2_F32 || w->layout != B2_ROWS)
        return b2_fail(err, B2_E_VALUE, "%s: %s: expected F32 [%lld], found %s [%lld, %lld]", op, name, (long long)n,
                       b2_dtype_name(w->dtype), (long long)w->n, (long long)w->k);
    return 0;
}

int b2_linear(b2_ctx *ctx, b2_tensor out, b2_tensor x, const b2_weight *w, const b2_linear_opts *opts, b2_err *err)
{
    if (check_view("linear", "x", x, err) < 0)
        return -1;
    if (!w || !w->data)
        return b2_fail(err, B2_E_INTERNAL, "linear: the weight is absent");
    if (w->k != x.cols)
        return b2_fail(err, B2_E_VALUE, "linear: x [%lld, %lld] does not fit weight %s [%lld, %lld]", SHAPE(x),
                       w->name ? w->name : "", (long long)w->n, (long long)w->k);
    if (check_shape("linear", "out", out, x.rows, w->n, err) < 0 ||
        check_vector("linear", "bias", opts->bias, w->n, err) < 0)
        return -1;
    if (opts->residual.data && check_shape("linear", "residual", opts->residual, x.rows, w->n, err) < 0)
        return -1;
    if (opts->item_rows < 0 || (opts->item_rows > 0 && x.rows % opts->item_rows != 0))
        return b2_fail(err, B2_E_VALUE, "linear: %lld rows are no multiple of %lld rows per item", (long long)x.rows,
                       (long long)opts->item_rows);
    return x.rows == 0 ? 0 : ctx->ops->linear(ctx, out, x, w, opts, err);
}

int b2_layer_norm(b2_ctx *ctx, b2_tensor out, b2_tensor x, const b2_weight *gamma, const b2_weight *beta, float eps,
                  b2_err *err)
{
    if (check_view("layer_norm", "x", x, err) < 0 || check_shape("layer_norm", "out", out, x.rows, x.cols, err) < 0 ||
        check_vector("layer_norm", "gamma", gamma, x.cols, err) < 0 ||
        check_vector("layer_norm", "beta", beta, x.cols, err) < 0)
        return -1;
    return x.rows == 0 ? 0 : ctx->ops->layer_norm(ctx, out, x, gamma, beta, eps, err);
}

int b2_rms_norm(b2_ctx *ctx, b2_tensor out, b2_tensor x, const b2_weight *gamma, float eps, b2_err *err)
{
    if (check_view("rms_norm", "x", x, err) < 0 || check_shape("rms_norm", "out", out, x.rows, x.cols, err) < 0 ||
        check_vector("rms_norm", "gamma", gamma, x.cols, err) < 0)
        return -1;
    return x.rows == 0 ? 0 : ctx->ops->rms_norm(ctx, out, x, gamma, eps, err);
}

int b2_gate(b2_ctx *ctx, b2_tensor out, b2_tensor gate, b2_tensor up, b2_act act, b2_err *err)
{
    if (check_view("gate", "gate", gate, err) < 0 || check_shape("gate", "up", up, gate.rows, gate.cols, err) < 0 ||
        check_shape("gate", "out", out, gate.rows, gate.cols, err) < 0)
        return -1;
    return gate.rows == 0 ? 0 : ctx->ops->gate(ctx, out, gate, up, act, err);
}

static int check_attention_rows(const b2_attention_args *a, b2_err *err)
{
    for (int64_t b = 0; b < a->rows; b++) {
        int64_t queries = (int64_t)a->q_offsets[b + 1] - a->q_offsets[b];
        int64_t suffix = a->suffix_lens ? a->suffix_lens[b] : 0;
        int64_t keys = a->prefix_lens[b] + suffix;
        if (queries < 0 || a->prefix_lens[b] < 0 || suffix < 0 || (a->causal && queries > keys) ||
            a->prefix_starts[b] < 0 || (int64_t)a->prefix_starts[b] + a->prefix_lens[b] > a->k.rows ||
            (a->suffix_lens && suffix > a->suffix_ld) || (a->key_mask && keys > a->key_mask_ld))
            return b2_fail(err, B2_E_VALUE, "attention: row %lld: %lld queries, prefix %lld + %lld of %lld, suffix %lld",
                           (long long)b, (long long)queries, (long long)a->prefix_starts[b],
                           (long long)a->prefix_lens[b], (long long)a->k.rows, (long long)suffix);
        for (int64_t s = 0; s < suffix; s++) {
            int32_t slot = a->suffix_slots[b * a->suffix_ld + s];
            if (slot < 0 || slot >= a->k_suffix.rows)
                return b2_fail(err, B2_E_INDEX, "attention: row %lld: suffix slot %d of %lld", (long long)b, (int)slot,
                               (long long)a->k_suffix.rows);
        }
    }
    if (a->q_offsets[0] != 0 || a->q_offsets[a->rows] != a->q.rows)
        return b2_fail(err, B2_E_VALUE, "attention: q_offsets run from %d to %d, expected 0 to %lld",
                       (int)a->q_offsets[0], (int)a->q_offsets[a->rows], (long long)a->q.rows);
    return 0;
}

int b2_rope(b2_ctx *ctx, b2_tensor x, const int32_t *positions, const float *inv_freq, int rotary_dim, int head_dim,
            float scaling, b2_err *err)
{
    if (check_view("rope", "x", x, err) < 0)
        return -1;
    if (head_dim < 1 || x.cols % head_dim != 0 || rotary_dim < 2 || rotary_dim > head_dim || rotary_dim % 2 != 0)
        return b2_fail(err, B2_E_VALUE, "rope: %d of %d elements of each head, x [%lld, %lld]", rotary_dim, head_dim,
                       SHAPE(x));
    return x.rows == 0 ? 0 : ctx->ops->rope(ctx, x, positions, inv_freq, rotary_dim, head_dim, scaling, err);
}

/* All but the values and the output. */
static int check_attention(const b2_ctx *ctx, const b2_attention_args *a, b2_err *err)
{
    if (a->heads < 1 || a->kv_heads < 1 || a->heads % a->kv_heads != 0 || a->head_dim < 1)
        return b2_fail(err, B2_E_VALUE, "attention: %d heads over %d key heads of width %d", a->heads, a->kv_heads,
                       a->head_dim);
    if (a->keys != B2_F32 && !ctx->ops->store_rows)
        return b2_fail(err, B2_E_UNSUPPORTED, "attention: %s does not read %s keys", ctx->ops->name, b2_dtype_name(a->keys));
    if (a->window < 0 || (a->window > 0 && a->scale == 0.0f))
        return b2_fail(err, B2_E_VALUE, "attention: a window of %lld keys with scale %g", (long long)a->window,
                       (double)a->scale);
    int64_t width = (int64_t)a->heads * a->head_dim, kv_width = (int64_t)a->kv_heads * a->head_dim;
    if (check_shape("attention", "q", a->q, a->q.rows, width, err) < 0 ||
        check_shape("attention", "k", a->k, a->k.rows, kv_width, err) < 0)
        return -1;
    if (a->suffix_lens && check_shape("attention", "k_suffix", a->k_suffix, a->k_suffix.rows, kv_width, err) < 0)
        return -1;
    if (a->distance_bias && a->distance_limit < 1)
        return b2_fail(err, B2_E_VALUE, "attention: distance_limit: expected at least 1, found %lld",
                       (long long)a->distance_limit);
    return check_attention_rows(a, err);
}

int b2_attention(b2_ctx *ctx, const b2_attention_args *a, b2_err *err)
{
    int64_t kv_width = (int64_t)a->kv_heads * a->head_dim;
    if (check_attention(ctx, a, err) < 0 || check_shape("attention", "out", a->out, a->q.rows, a->q.cols, err) < 0 ||
        check_shape("attention", "v", a->v, a->k.rows, kv_width, err) < 0)
        return -1;
    if (a->suffix_lens && check_shape("attention", "v_suffix", a->v_suffix, a->k_suffix.rows, kv_width, err) < 0)
        return -1;
    return a->q.rows == 0 ? 0 : ctx->ops->attention(ctx, a, err);
}

int b2_attention_weights(b2_ctx *ctx, float *weights, const b2_attention_args *a, b2_err *err)
{
    if (check_attention(ctx, a, err) < 0)
        return -1;
    return a->q.rows == 0 ? 0 : ctx->ops->attention_weights(ctx, weights, a, err);
}

int b2_embedding(b2_ctx *ctx, b2_tensor out, const b2_weight *table, const int32_t *ids, int32_t offset, int accumulate,
                 b2_err *err)
{
    if (check_shape("embedding", "out", out, out.rows, table->k, err) < 0)
        return -1;
    for (int64_t i = 0; i < out.rows; i++)
        if ((int64_t)ids[i] + offset >= table->n)
            return b2_fail(err, B2_E_INDEX, "embedding: id %d at position %lld is outside %s, which has %lld rows",
                           (int)(ids[i] + offset), (long long)i, table->name ? table->name : "the table", (long long)table->n);
    return out.rows == 0 ? 0 : ctx->ops->embedding(ctx, out, table, ids, offset, accumulate, err);
}

int b2_patches(b2_ctx *ctx, b2_tensor out, b2_pictures p, int64_t patch, b2_err *err)
{
    if (patch < 1 || p.height < patch || p.width < patch || p.channels < 1)
        return b2_fail(err, B2_E_VALUE, "patches: pictures of %lld x %lld, patch %lld, channels %lld",
                       (long long)p.height, (long long)p.width, (long long)patch, (long long)p.channels);
    int64_t cells = p.height / patch * (p.width / patch);
    if (check_shape("patches", "out", out, p.count * cells, p.channels * patch * patch, err) < 0)
        return -1;
    return p.count == 0 ? 0 : ctx->ops->patches(ctx, out, p, patch, err);
}

static int check_row_list(const char *name, const int32_t *rows, int64_t n, b2_tensor t, b2_err *err)
{
    if (!rows && n > t.rows)
        return b2_fail(err, B2_E_INDEX, "copy_rows: %lld rows of %s, which has %lld", (long long)n, name,
                       (long long)t.rows);
    for (int64_t i = 0; rows && i < n; i++)
        if (rows[i] < 0 || rows[i] >= t.rows)
            return b2_fail(err, B2_E_INDEX, "copy_rows: row %d of %s, which has %lld", (int)rows[i], name,
                           (long long)t.rows);
    return 0;
}

int b2_copy_rows(b2_ctx *ctx, b2_tensor out, const int32_t *out_rows, b2_tensor x, const int32_t *x_rows, int64_t n,
                 b2_err *err)
{
    if (check_view("copy_rows", "x", x, err) < 0 || check_shape("copy_rows", "out", out, out.rows, x.cols, err) < 0 ||
        check_row_list("out", out_rows, n, out, err) < 0 || check_row_list("x", x_rows, n, x, err) < 0)
        return -1;
    return n == 0 ? 0 : ctx->ops->copy_rows(ctx, out, out_rows, x, x_rows, n, err);
}

int b2_store_rows(b2_ctx *ctx, b2_tensor out, b2_dtype dtype, const int32_t *out_rows, b2_tensor x, b2_err *err)
{
    if (dtype == B2_F32)
        return b2_copy_rows(ctx, out, out_rows, x, NULL, x.rows, err);
    if (check_view("store_rows", "x", x, err) < 0 || check_shape("store_rows", "out", out, out.rows, x.cols, err) < 0 ||
        check_row_list("out", out_rows, x.rows, out, err) < 0)
        return -1;
    if (!ctx->ops->store_rows || (dtype != B2_F16 && dtype != B2_BF16))
        return b2_fail(err, B2_E_UNSUPPORTED, "store_rows: %s does not store %s", ctx->ops->name, b2_dtype_name(dtype));
    return x.rows == 0 ? 0 : ctx->ops->store_rows(ctx, out, dtype, out_rows, x, err);
}

int b2_add_rows(b2_ctx *ctx, b2_tensor out, b2_tensor x, b2_err *err)
{
    if (check_shape("add_rows", "out", out, out.rows, x.cols, err) < 0 || check_view("add_rows", "x", x, err) < 0)
        return -1;
    if (x.rows < 1 || out.rows % x.rows != 0)
        return b2_fail(err, B2_E_VALUE, "add_rows: %lld rows are no multiple of %lld", (long long)out.rows,
                       (long long)x.rows);
    return out.rows == 0 ? 0 : ctx->ops->add_rows(ctx, out, x, err);
}

int b2_reduce_rows(b2_ctx *ctx, b2_tensor out, b2_tensor x, b2_reduction reduction, b2_err *err)
{
    if (check_view("reduce_rows", "x", x, err) < 0 || check_shape("reduce_rows", "out", out, out.rows, x.cols, err) < 0)
        return -1;
    if (out.rows == 0 ? x.rows != 0 : x.rows == 0 || x.rows % out.rows != 0)
        return b2_fail(err, B2_E_VALUE, "reduce_rows: %lld rows are no multiple of %lld", (long long)x.rows,
                       (long long)out.rows);
    return out.rows == 0 ? 0 : ctx->ops->reduce_rows(ctx, out, x, reduction, err);
}

int b2_unit_rows(b2_ctx *ctx, b2_tensor out, b2_tensor x, b2_err *err)
{
    if (check_view("unit_rows", "x", x, err) < 0 || check_shape("unit_rows", "out", out, x.rows, x.cols, err) < 0)
        return -1;
    return x.rows == 0 ? 0 : ctx->ops->unit_rows(ctx, out, x, err);
}

int b2_top_k(b2_ctx *ctx, float *values, int32_t *ids, b2_tensor x, int k, b2_err *err)
{
    if (check_view("top_k", "x", x, err) < 0)
        return -1;
    if (k < 1 || k > x.cols)
        return b2_fail(err, B2_E_VALUE, "top_k: k = %d of %lld values", k, (long long)x.cols);
    return x.rows == 0 ? 0 : ctx->ops->top_k(ctx, values, ids, x, k, err);
}

int b2_log_softmax(b2_ctx *ctx, b2_tensor x, b2_err *err)
{
    if (check_view("log_softmax", "x", x, err) < 0)
        return -1;
    return x.rows == 0 || x.cols == 0 ? 0 : ctx->ops->log_softmax(ctx, x, err);
}

int b2_make_shortlist(b2_ctx *ctx, b2_shortlist *list, b2_tensor x, void *there, void *here, b2_err *err)
{
    if (check_view("shortlist", "x", x, err) < 0)
        return -1;
    if (list->k < 1 || list->k > B2_SHORTLIST_MOST || list->k > x.cols)
        return b2_fail(err, B2_E_VALUE, "shortlist: k = %d of %lld values", list->k, (long long)x.cols);
    if (!ctx->ops->shortlist)
        return b2_fail(err, B2_E_UNSUPPORTED, "shortlist: %s has its logits on the host", ctx->ops->name);
    return x.rows == 0 ? 0 : ctx->ops->shortlist(ctx, list, x, there, here, err);
}

int b2_choose(b2_ctx *ctx, const b2_choice *choice, const b2_choice_tables *tables, b2_tensor logits, b2_err *err)
{
    if (check_view("choose", "logits", logits, err) < 0)
        return -1;
    if (choice->k < 1 || choice->k > B2_SHORTLIST_MOST || choice->beams < 1 || logits.rows % choice->beams != 0)
        return b2_fail(err, B2_E_VALUE, "choose: k = %d, %lld rows of %d beams", choice->k, (long long)logits.rows,
                       choice->beams);
    return logits.rows == 0 || !ctx->ops->choose ? 0 : ctx->ops->choose(ctx, choice, tables, logits, err);
}

int b2_check_finite(b2_ctx *ctx, int64_t *first_bad_row, b2_tensor x, b2_err *err)
{
    *first_bad_row = -1;
    if (check_view("check_finite", "x", x, err) < 0)
        return -1;
    return x.rows == 0 ? 0 : ctx->ops->check_finite(ctx, first_bad_row, x, err);
}

int b2_note_finite(b2_ctx *ctx, const char *stage, int layer, b2_tensor x, b2_err *err)
{
    if (check_view(stage, "hidden states", x, err) < 0)
        return -1;
    return x.rows == 0 ? 0 : ctx->ops->note_finite(ctx, stage, layer, x, err);
}

size_t b2_scratch_bytes(const b2_ctx *ctx, int64_t max_rows, int64_t max_width, int64_t max_keys, int max_head_dim)
{
    return ctx->ops->scratch_bytes(ctx, max_rows, max_width, max_keys, max_head_dim);
}

int b2_picture_scores(b2_ctx *ctx, b2_tensor out, b2_tensor texts, const b2_records *r, b2_err *err)
{
    enum { MOST_WIDTH = 65536, MOST_QUERIES = 65536 };
    if (r->dtype != B2_F16 && r->dtype != B2_I8)
        return b2_fail(err, B2_E_TYPE, "picture_scores: records of F16 or I8, found %s", b2_dtype_name(r->dtype));
    if (r->pictures < 0 || r->queries < 1 || r->queries > MOST_QUERIES || r->width < 1 || r->width > MOST_WIDTH)
        return b2_fail(err, B2_E_VALUE, "picture_scores: %lld records of %lld vectors of %lld", (long long)r->pictures,
                       (long long)r->queries, (long long)r->width);
    if (check_shape("picture_scores", "texts", texts, texts.rows, r->width, err) < 0 ||
        check_shape("picture_scores", "out", out, texts.rows, r->pictures, err) < 0)
        return -1;
    return texts.rows == 0 || r->pictures == 0 ? 0 : ctx->ops->picture_scores(ctx, out, texts, r, err);
}

/* ---- memory ---- */

int b2_upload(b2_ctx *ctx, void *to, const void *from, size_t bytes, b2_err *err)
{
    return bytes == 0 ? 0 : ctx->ops->upload(ctx, to, from, bytes, err);
}

int b2_download(b2_ctx *ctx, void *to, const void *from, size_t bytes, b2_err *err)
{
    return bytes == 0 ? 0 : ctx->ops->download(ctx, to, from, bytes, err);
}

typedef int (*copy_fn)(b2_ctx *ctx, void *to, const void *from, size_t bytes, b2_err *err);

static int move_rows(b2_ctx *ctx, copy_fn copy, b2_tensor to, b2_tensor from, b2_err *err)
{
    int64_t together = to.ld == to.cols && from.ld == from.cols ? from.rows : 1;
    if (check_shape("copy", "from", from, to.rows, to.cols, err) < 0)
        return -1;
    for (int64_t i = 0; i < from.rows; i += together)
        if (copy(ctx, to.data + i * to.ld, from.data + i * from.ld, (size_t)(together * from.cols) * sizeof *to.data,
                 err) < 0)
            return -1;
    return 0;
}

int b2_upload_rows(b2_ctx *ctx, b2_tensor to, b2_tensor from, b2_err *err)
{
    return move_rows(ctx, b2_upload, to, from, err);
}

int b2_download_rows(b2_ctx *ctx, b2_tensor to, b2_tensor from, b2_err *err)
{
    return move_rows(ctx, b2_download, to, from, err);
}

/* Whether operations may use it where it lies. */
static int is_inner(const b2_ctx *ctx, b2_tensor outer)
{
    if (b2_on_host(ctx) || !outer.data)
        return 1;
    return outer.ld == outer.cols && (uintptr_t)outer.data % B2_OUTER_ALIGNMENT == 0 &&
           ctx->memory->holds(ctx->memory, outer.data);
}

int b2_room_for(b2_ctx *ctx, b2_tensor *inner, b2_tensor outer, b2_err *err)
{
    *inner = outer;
    if (is_inner(ctx, outer))
        return 0;
    float *data = b2_arena_take(ctx->activations, (size_t)(outer.rows * outer.cols), sizeof *data, err);
    *inner = b2_tensor_of(data, outer.rows, outer.cols);
    return data ? 0 : -1;
}

int b2_bring_in(b2_ctx *ctx, b2_tensor *in, b2_tensor outer, b2_err *err)
{
    if (b2_room_for(ctx, in, outer, err) < 0)
        return -1;
    return in->data == outer.data ? 0 : b2_upload_rows(ctx, *in, outer, err);
}

int b2_hand_over(b2_ctx *ctx, b2_tensor outer, b2_tensor inner, b2_err *err)
{
    return !outer.data || inner.data == outer.data ? 0 : b2_download_rows(ctx, outer, inner, err);
}

size_t b2_outer_bytes(const b2_ctx *ctx, int64_t rows, int64_t cols)
{
    return b2_on_host(ctx) ? 0 : b2_arena_cost((size_t)(rows * cols), sizeof(float));
}

void b2_wait(b2_ctx *ctx)
{
    ctx->ops->wait(ctx);
}

int b2_finish(b2_ctx *ctx, b2_err *err)
{
    return b2_on_host(ctx) ? 0 : ctx->ops->finish(ctx, err);
}

int b2_ctx_reserve(b2_ctx *ctx, size_t bytes, b2_err *err)
{
    if (b2_arena_reserve(ctx->scratch, bytes, err) < 0)
        return -1;
    return ctx->activations == ctx->scratch ? 0 : b2_arena_reserve(ctx->activations, bytes, err);
}

int b2_step_run(b2_ctx *ctx, b2_step_shape shape, b2_step_fn body, void *argument, b2_err *err)
{
    if (shape.repeats)
        *shape.repeats = 0;
    return ctx->ops->step(ctx, shape, body, argument, err);
}
