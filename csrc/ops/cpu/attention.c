/* Multi-head attention: out = softmax(scale * q . k^T + distance bias, over the visible keys) . v.
 *
 * One code path for a picture, a prompt and a decoded token. For each row and each key head: list the visible keys
 * (those masked out are left out here and touch nothing afterwards), pack K as [Dh][16] panels and V as [keys][16]
 * panels, then for each block of queries: register tiles for the scores, softmax, register tiles for P.V. Rows with the same
 * prefix (the beams of a picture) follow each other head by head, and the prefix stays packed for all of them. Keys and values
 * of one head are short pieces of long rows, which no hardware prefetcher finds: those of the next head are asked for
 * while the present ones are packed.
 *
 * Same bits however the queries are cut into blocks: a score is one chain over d; the maximum does not depend on
 * order; sums add key j (counted among the visible keys from the row's first) to lane j mod 16; an output is one chain
 * over the keys that its query sees. Under a causal mask a block's queries see different numbers of keys: they share
 * a tile up to the number that the first one sees and go on alone from there. Keys before a query's window keep their
 * places and get a weight of 0, which changes no bit of what the others add up to.
 *
 * Memory: one block of scratch per thread from ctx->scratch. */
#include <math.h>
#include <string.h>

#include "ops/cpu/common.h"

static const double NS_PER_FLOP = 1.0 / 60, MOST_NS = 10e6;

typedef struct attention_job {
    const b2_cpu_kernels *kernels;
    const b2_attention_args *args;
    int64_t max_keys;       /* longest row, rounded up to 32 */
    int64_t chunks;         /* pieces that the queries of a (row, key head) are cut into; 1 unless they are many */
    int64_t siblings;       /* consecutive rows that have their prefix in common; divides rows */
    int64_t units;          /* key heads of all groups of siblings */
    int64_t units_per_tile;
    b2_slots slots;
} attention_job;

/* Scratch of one thread. */
typedef struct workspace {
    const float **k_rows; /* [max_keys] visible keys of the row */
    const float **v_rows; /* [max_keys] */
    int32_t *visible;     /* [max_keys + 1]: of the first j keys, how many are visible */
    int32_t *places;      /* [max_keys]: where each visible key stands among all keys of the row */
    float *keys;          /* [max_keys / 16][Dh][16] */
    float *values;        /* [ceil(Dh / 16)][max_keys][16] */
    float *scores;        /* [tile rows][max_keys] */
    float *tile;          /* [tile rows][tile columns] */
    int64_t kept;         /* keys that are packed already: those of the siblings' prefix, or 0 */
} workspace;

typedef struct head_work {
    int64_t row;
    int64_t keys;    /* all keys of the row */
    int64_t seen;    /* those that the mask shows */
    int64_t queries; /* T */
    int64_t first_query;
    int64_t kv_head;
} head_work;

static size_t part(size_t *total, size_t count, size_t size)
{
    size_t at = *total;
    *total += b2_arena_cost(count, size);
    return at;
}

/* Lays the workspace out at `base` (which may be NULL when only the size is wanted). */
static size_t lay_out(workspace *space, char *base, int64_t max_keys, int head_dim, int tile_rows)
{
    size_t keys = (size_t)max_keys, rows = (size_t)tile_rows, width = (size_t)head_dim, total = 0;
    size_t k_rows = part(&total, keys, sizeof(float *)), v_rows = part(&total, keys, sizeof(float *));
    size_t visible = part(&total, keys + 1, sizeof(int32_t)), places = part(&total, keys, sizeof(int32_t));
    size_t packed_keys = part(&total, keys * width, sizeof(float));
    size_t values = part(&total, keys * (size_t)b2_round_up(head_dim, B2_TILE_COLUMNS_MAX), sizeof(float));
    size_t scores = part(&total, rows * keys, sizeof(float));
    size_t tile = part(&total, rows * B2_TILE_COLUMNS_MAX, sizeof(float));
    if (base)
        *space = (workspace){(void *)(base + k_rows),      (void *)(base + v_rows), (void *)(base + visible),
                             (void *)(base + places),      (void *)(base + packed_keys), (void *)(base + values),
                             (void *)(base + scores),      (void *)(base + tile),   0};
    return total;
}

static const float *key_row(b2_tensor prefix, b2_tensor suffix, const b2_attention_args *a, int64_t row, int64_t j)
{
    int64_t prefix_len = a->prefix_lens[row];
    if (j < prefix_len)
        return prefix.data + (a->prefix_starts[row] + j) * prefix.ld;
    return suffix.data + (int64_t)a->suffix_slots[row * a->suffix_ld + j - prefix_len] * suffix.ld;
}

static void list_keys(head_work *work, const b2_attention_args *a, workspace *space)
{
    const uint8_t *mask = a->key_mask ? a->key_mask + work->row * a->key_mask_ld : NULL;
    int32_t seen = 0;
    for (int64_t j = 0; j < work->keys; j++) {
        space->visible[j] = seen;
        if (mask && !mask[j])
            continue;
        space->k_rows[seen] = key_row(a->k, a->k_suffix, a, work->row, j);
        space->v_rows[seen] = key_row(a->v, a->v_suffix, a, work->row, j);
        space->places[seen] = (int32_t)j;
        seen++;
    }
    space->visible[work->keys] = seen;
    work->seen = seen;
}

static void ask_for(const float *const *rows, int64_t count, int64_t offset, int width)
{
    enum { LINE = 64 / sizeof(float) };
    for (int64_t j = 0; j < count; j++)
        for (int i = 0; i < width + LINE - 1; i += LINE)
            __builtin_prefetch(rows[j] + offset + (i < width ? i : width - 1));
}

/* Packs the visible keys and values but those that are there already. `next`: the following key head comes next. */
static void pack_head(const attention_job *job, const head_work *work, workspace *space, int next)
{
    int width = job->args->head_dim;
    int64_t offset = work->kv_head * width;
    for (int64_t j = space->kept / B2_PANEL * B2_PANEL; j < work->seen; j += B2_PANEL) {
        int64_t count = b2_min64(B2_PANEL, work->seen - j);
        if (next)
            ask_for(space->k_rows + j, count, offset + width, width);
        job->kernels->pack_keys(space->keys + j * width, space->k_rows + j, count, offset, width);
    }
    for (int64_t j = space->kept; j < work->seen; j += B2_PANEL) {
        int64_t count = b2_min64(B2_PANEL, work->seen - j);
        if (next)
            ask_for(space->v_rows + j, count, offset + width, width);
        job->kernels->pack_values(space->values + j * B2_PANEL, space->v_rows + j, count, job->max_keys, offset, width);
    }
}

/* How many of the listed keys query i of the row sees. */
static int64_t keys_seen(const attention_job *job, const head_work *work, const workspace *space, int64_t i)
{
    return job->args->causal ? space->visible[work->keys - work->queries + i + 1] : work->seen;
}

/* How many of the listed keys lie before the window of query i. */
static int64_t keys_before(const attention_job *job, const head_work *work, const workspace *space, int64_t i)
{
    int64_t first = job->args->window > 0 ? work->keys - work->queries + i + 1 - job->args->window : 0;
    return first > 0 ? space->visible[first] : 0;
}

static void hide_keys(float *scores, int64_t count, float scale)
{
    for (int64_t j = 0; j < count; j++)
        scores[j] = scale < 0.0f ? INFINITY : -INFINITY;
}

/* scores [rows][max_keys] of q [rows, Dh] for keys [0, count) */
static void score(const attention_job *job, workspace *space, const float *q, int64_t q_ld, int rows, int64_t count)
{
    const b2_cpu_kernels *kernels = job->kernels;
    int width = job->args->head_dim, columns = kernels->tile_panels * B2_PANEL;
    for (int64_t j = 0; j < count; j += columns) {
        const float *b0 = space->keys + j * width, *b1 = j + B2_PANEL < count ? b0 + B2_PANEL * width : b0;
        kernels->row_tile(space->scores + j, job->max_keys, q, q_ld, b0, b1, rows, width);
    }
}

/* s [seen] = scale * s + bias of each key's distance from query i of the row. */
static void add_distance_bias(const b2_attention_args *a, const head_work *work, const workspace *space, float *s,
                              int64_t seen, int64_t head, int64_t i)
{
    const int64_t last = a->distance_limit - 1, here = work->keys - work->queries + i;
    const float *bias = a->distance_bias + head * (2 * last + 1) + last; /* of distance 0 */
    for (int64_t j = 0; j < seen; j++) {
        int64_t distance = space->places[j] - here;
        distance = distance < -last ? -last : distance > last ? last : distance;
        s[j] = a->scale * s[j] + bias[distance];
    }
}

static float softmax(const attention_job *job, const head_work *work, const workspace *space, float *s, int64_t seen,
                     int64_t head, int64_t i)
{
    const b2_attention_args *a = job->args;
    if (seen == 0)
        return 0.0f;
    if (!a->distance_bias)
        return job->kernels->softmax_row(s, seen, a->scale);
    add_distance_bias(a, work, space, s, seen, head, i);
    return job->kernels->softmax_row(s, seen, 1.0f);
}

/* out = weights . V / sums; `shared` keys in common, query r goes on alone to seen[r]. */
static void mix(const attention_job *job, const workspace *space, float *out, int64_t out_ld, int rows,
                const int64_t *seen, const float *sums)
{
    const b2_cpu_kernels *kernels = job->kernels;
    int width = job->args->head_dim, columns = kernels->tile_panels * B2_PANEL;
    int64_t shared = seen[0], panel = job->max_keys * B2_PANEL;
    for (int d = 0; d < width; d += columns) {
        const float *v0 = space->values + d / B2_PANEL * panel, *v1 = d + B2_PANEL < width ? v0 + panel : v0;
        kernels->row_tile(space->tile, columns, space->scores, job->max_keys, v0, v1, rows, shared);
        for (int r = 0; r < rows; r++) {
            float *c = space->tile + r * columns;
            if (seen[r] > shared)
                kernels->tile(c, space->scores + r * job->max_keys + shared, v0 + shared * B2_PANEL,
                              v1 + shared * B2_PANEL, 1, seen[r] - shared, 0);
            if (seen[r] > 0)
                kernels->divide_row(out + r * out_ld + d, c, b2_min64(columns, width - d), sums[r]);
            else
                for (int i = 0; i < columns && d + i < width; i++)
                    out[r * out_ld + d + i] = 0.0f;
        }
    }
}

static void attend_block(const attention_job *job, const head_work *work, workspace *space, int64_t head,
                         int64_t first, int rows)
{
    const b2_attention_args *a = job->args;
    int64_t seen[B2_TILE_ROWS_MAX], before[B2_TILE_ROWS_MAX], most = 0;
    float sums[B2_TILE_ROWS_MAX];
    for (int r = 0; r < rows; r++) {
        seen[r] = keys_seen(job, work, space, first + r);
        before[r] = keys_before(job, work, space, first + r);
        seen[r] = before[r] < seen[r] ? seen[r] : 0;
        most = seen[r] > most ? seen[r] : most;
    }
    int64_t row = work->first_query + first, column = head * a->head_dim;
    score(job, space, a->q.data + row * a->q.ld + column, a->q.ld, rows, most);
    for (int r = 0; r < rows; r++)
        hide_keys(space->scores + r * job->max_keys, seen[r] > 0 ? before[r] : 0, a->scale);
    for (int r = 0; r < rows; r++)
        sums[r] = softmax(job, work, space, space->scores + r * job->max_keys, seen[r], head, first + r);
    mix(job, space, a->out.data + row * a->out.ld + column, a->out.ld, rows, seen, sums);
}

/* One key head of one row, or the chunk of its queries that is meant. */
static void attend_row(const attention_job *job, int64_t row, int64_t kv_head, int64_t chunk, int next, workspace *space)
{
    const b2_attention_args *a = job->args;
    int64_t group = a->heads / a->kv_heads;
    head_work work = {.row = row,
                      .keys = (int64_t)a->prefix_lens[row] + (a->suffix_lens ? a->suffix_lens[row] : 0),
                      .queries = (int64_t)a->q_offsets[row + 1] - a->q_offsets[row],
                      .first_query = a->q_offsets[row],
                      .kv_head = kv_head};
    int64_t blocks = (work.queries + job->kernels->tile_rows - 1) / job->kernels->tile_rows;
    int64_t block = chunk * blocks / job->chunks, block_end = (chunk + 1) * blocks / job->chunks;
    if (block == block_end)
        return;
    list_keys(&work, a, space);
    pack_head(job, &work, space, next);
    space->kept = space->visible[a->prefix_lens[row]];
    for (int64_t g = 0; g < group; g++)
        for (int64_t b = block; b < block_end; b++) {
            int64_t first = b * work.queries / blocks, end = (b + 1) * work.queries / blocks;
            attend_block(job, &work, space, work.kv_head * group + g, first, (int)(end - first));
        }
}

static void attention_tile(void *argument, int64_t index, int worker)
{
    attention_job *job = argument;
    const b2_attention_args *a = job->args;
    char *block = b2_slot_claim(&job->slots, worker);
    workspace space;
    lay_out(&space, block, job->max_keys, a->head_dim, job->kernels->tile_rows);
    int64_t chunk = index % job->chunks, first = index / job->chunks * job->units_per_tile;
    int64_t end = b2_min64(job->units, first + job->units_per_tile);
    for (int64_t unit = first; unit < end; unit++) {
        int64_t row = unit / a->kv_heads * job->siblings, kv_head = unit % a->kv_heads;
        int next = unit + 1 < end && kv_head + 1 < a->kv_heads;
        space.kept = 0;
        for (int64_t r = row; r < row + job->siblings; r++)
            attend_row(job, r, kv_head, chunk, next, &space);
    }
    b2_slot_release(&job->slots, block);
}

/* Whether two rows see the same keys in the same prefix. */
static int are_siblings(const b2_attention_args *a, int64_t row, int64_t other)
{
    if (a->prefix_starts[row] != a->prefix_starts[other] || a->prefix_lens[row] != a->prefix_lens[other])
        return 0;
    return !a->key_mask || memcmp(a->key_mask + row * a->key_mask_ld, a->key_mask + other * a->key_mask_ld,
                                  (size_t)a->prefix_lens[row]) == 0;
}

/* How many rows each group has, if all have equally many; else 1. */
static int64_t count_siblings(const b2_attention_args *a)
{
    int64_t count = 1;
    while (a->prefix_lens[0] > 0 && count < a->rows && are_siblings(a, 0, count))
        count++;
    if (a->rows % count != 0)
        return 1;
    for (int64_t row = 0; row < a->rows; row++)
        if (!are_siblings(a, row, row / count * count))
            return 1;
    return count;
}

static int64_t padded_keys(int64_t keys)
{
    return b2_round_up(keys < 1 ? 1 : keys, B2_TILE_COLUMNS_MAX);
}

int b2_cpu_attention(b2_ctx *ctx, const b2_attention_args *args, b2_err *err)
{
    attention_job job = {.kernels = b2_cpu_kernels_of(ctx), .args = args};
    double flops = 0;
    for (int64_t b = 0; b < args->rows; b++) {
        int64_t keys = (int64_t)args->prefix_lens[b] + (args->suffix_lens ? args->suffix_lens[b] : 0);
        int64_t queries = (int64_t)args->q_offsets[b + 1] - args->q_offsets[b];
        job.max_keys = keys > job.max_keys ? keys : job.max_keys;
        /* Packing a key and a value costs about what eight queries cost. */
        flops += 4.0 * (double)keys * ((double)(queries * args->heads) + 8.0 * args->kv_heads) * args->head_dim;
    }
    job.max_keys = padded_keys(job.max_keys);
    job.siblings = count_siblings(args);
    job.units = args->rows / job.siblings * args->kv_heads;
    /* Each piece packs the keys again: cut only where a head alone would make cancelling slow. */
    job.chunks = 1 + (int64_t)(flops * NS_PER_FLOP / (double)(args->rows * args->kv_heads) / MOST_NS);
    double unit_ns = flops * NS_PER_FLOP / (double)job.units;
    int64_t tiles = b2_cpu_tile_count(ctx, job.units, unit_ns, 20e3);
    job.units_per_tile = job.chunks > 1 ? 1 : (job.units + tiles - 1) / tiles;
    tiles = (job.units + job.units_per_tile - 1) / job.units_per_tile * job.chunks;
    size_t mark = b2_arena_mark(ctx->scratch);
    size_t bytes = lay_out(NULL, NULL, job.max_keys, args->head_dim, job.kernels->tile_rows);
    if (b2_slots_take(&job.slots, ctx, bytes, err) < 0)
        return -1;
    int status = b2_cpu_run(ctx, tiles, attention_tile, &job, flops * NS_PER_FLOP, err);
    b2_arena_reset(ctx->scratch, mark);
    return status;
}

size_t b2_cpu_attention_scratch(const b2_ctx *ctx, int64_t max_keys, int max_head_dim)
{
    size_t bytes = lay_out(NULL, NULL, padded_keys(max_keys), max_head_dim, b2_cpu_kernels_of(ctx)->tile_rows);
    return (size_t)b2_cpu_planned_threads(ctx) * b2_arena_cost(bytes, 1);
}
