/* The softmax weights of an attention, for people who look at them: weights[i][j] = softmax over the keys j that query i
 * sees of scale * (q_i . k_j) + distance bias, zero where a key is not seen.
 *
 * Written for clearness: nothing that generates waits for it. The scores are made in the caller's array itself, so there
 * is no scratch. Its sums run in another order than those of attention.c: same weights, not the same last bit. */
#include <math.h>

#include "ops/cpu/common.h"

typedef struct weights_job {
    const b2_attention_args *args;
    float *weights;         /* row after row [H, T_b, keys_b] */
    int64_t block, blocks;  /* queries of a tile; tiles of a head of the longest row */
} weights_job;

/* One row of the batch. */
typedef struct row_view {
    int64_t row, queries, keys;
} row_view;

static row_view view_row(const b2_attention_args *a, int64_t row)
{
    return (row_view){.row = row,
                      .queries = (int64_t)a->q_offsets[row + 1] - a->q_offsets[row],
                      .keys = (int64_t)a->prefix_lens[row] + (a->suffix_lens ? a->suffix_lens[row] : 0)};
}

static const float *key_of(const b2_attention_args *a, int64_t row, int64_t j)
{
    int64_t prefix = a->prefix_lens[row];
    if (j < prefix)
        return a->k.data + (a->prefix_starts[row] + j) * a->k.ld;
    return a->k_suffix.data + (int64_t)a->suffix_slots[row * a->suffix_ld + j - prefix] * a->k_suffix.ld;
}

/* `here`: the place of the query among the keys. */
static int is_seen(const b2_attention_args *a, const row_view *v, int64_t here, int64_t j)
{
    return (!a->causal || j <= here) && (a->window == 0 || j > here - a->window) &&
           (!a->key_mask || a->key_mask[v->row * a->key_mask_ld + j]);
}

static float bias_of(const b2_attention_args *a, int64_t head, int64_t distance)
{
    const int64_t last = a->distance_limit - 1;
    distance = distance < -last ? -last : distance > last ? last : distance;
    return a->distance_bias[head * (2 * last + 1) + distance + last];
}

static float dot(const float *a, const float *b, int n)
{
    enum { LANES = 8 };
    float sums[LANES] = {0}, sum = 0.0f;
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++)
            sums[l] += a[i + l] * b[i + l];
    for (; i < n; i++)
        sum += a[i] * b[i];
    for (int l = 0; l < LANES; l++)
        sum += sums[l];
    return sum;
}

/* s [n]: scores, -Inf where not seen, become weights. */
static void softmax(float *s, int64_t n, float most)
{
    double sum = 0.0;
    for (int64_t j = 0; j < n; j++) {
        s[j] = most > -INFINITY ? expf(s[j] - most) : 0.0f;
        sum += s[j];
    }
    for (int64_t j = 0; j < n && sum > 0.0; j++)
        s[j] = (float)(s[j] / sum);
}

static void weigh(const b2_attention_args *a, const row_view *v, int64_t head, int64_t i, float *out)
{
    int64_t group = a->heads / a->kv_heads, here = v->keys - v->queries + i;
    const float *q = a->q.data + (a->q_offsets[v->row] + i) * a->q.ld + head * a->head_dim;
    float most = -INFINITY;
    for (int64_t j = 0; j < v->keys; j++) {
        if (!is_seen(a, v, here, j)) {
            out[j] = -INFINITY;
            continue;
        }
        out[j] = a->scale * dot(q, key_of(a, v->row, j) + head / group * a->head_dim, a->head_dim);
        if (a->distance_bias)
            out[j] += bias_of(a, head, j - here);
        most = out[j] > most ? out[j] : most;
    }
    softmax(out, v->keys, most);
}

/* Some queries of one head of one row; none where the row is shorter than the longest. */
static void weights_tile(void *argument, int64_t index, int worker)
{
    const weights_job *job = argument;
    const b2_attention_args *a = job->args;
    int64_t first = index % job->blocks * job->block, head = index / job->blocks % a->heads;
    float *out = job->weights;
    row_view v = view_row(a, 0);
    for (int64_t row = 0; row < index / job->blocks / a->heads; v = view_row(a, ++row))
        out += a->heads * v.queries * v.keys;
    (void)worker;
    for (int64_t i = first; i < v.queries && i < first + job->block; i++)
        weigh(a, &v, head, i, out + (head * v.queries + i) * v.keys);
}

int b2_cpu_attention_weights(b2_ctx *ctx, float *weights, const b2_attention_args *args, b2_err *err)
{
    int64_t queries = 1, keys = 1;
    double key_ns = 10.0 + 0.3 * args->head_dim, cost_ns = 0.0;
    for (int64_t row = 0; row < args->rows; row++) {
        row_view v = view_row(args, row);
        queries = v.queries > queries ? v.queries : queries;
        keys = v.keys > keys ? v.keys : keys;
        cost_ns += (double)(v.queries * v.keys * args->heads) * key_ns;
    }
    int64_t blocks = b2_cpu_tile_count(ctx, queries, (double)keys * key_ns, 20e3);
    int64_t block = (queries + blocks - 1) / blocks;
    weights_job job = {args, weights, block, (queries + block - 1) / block};
    return b2_cpu_run(ctx, args->rows * args->heads * job.blocks, weights_tile, &job, cost_ns, err);
}
