/* Operations on rows: each row is one unit of work and is computed alike wherever it stands. No scratch. */
#include <math.h>
#include <string.h>

#include "ops/cpu/common.h"
#include "ops/weights.h"

typedef struct rows_job {
    const b2_cpu_kernels *kernels;
    b2_tensor out, x, up;
    const float *gamma, *beta;
    float eps;
    b2_act act;
    const b2_weight *table;
    const int32_t *ids, *out_rows, *x_rows;
    int32_t offset;
    int accumulate;
    b2_pictures pictures;
    int64_t patch;
    const int32_t *positions;
    const float *inv_freq;
    int rotary_dim, head_dim;
    float scaling;
    float *values;
    int32_t *top_ids;
    int k;
    b2_reduction reduction;
    atomic_llong first_bad;
    void (*row)(struct rows_job *job, int64_t row);
    int64_t count, per_tile;
} rows_job;

static void rows_tile(void *argument, int64_t index, int worker)
{
    rows_job *job = argument;
    (void)worker;
    int64_t end = (index + 1) * job->per_tile;
    end = end < job->count ? end : job->count;
    for (int64_t i = index * job->per_tile; i < end; i++)
        job->row(job, i);
}

static int run_rows(b2_ctx *ctx, rows_job *job, int64_t count, double row_ns, b2_err *err)
{
    int64_t tiles = b2_cpu_tile_count(ctx, count, row_ns, 10e3);
    job->count = count;
    job->per_tile = (count + tiles - 1) / tiles;
    return b2_cpu_run(ctx, (count + job->per_tile - 1) / job->per_tile, rows_tile, job, row_ns * (double)count, err);
}

static const float *vector_of(const b2_weight *w)
{
    return w && w->data ? w->data : NULL;
}

static void norm_one(rows_job *job, int64_t i)
{
    job->kernels->norm_row(job->out.data + i * job->out.ld, job->x.data + i * job->x.ld, job->gamma, job->beta,
                           job->x.cols, job->eps);
}

int b2_cpu_layer_norm(b2_ctx *ctx, b2_tensor out, b2_tensor x, const b2_weight *gamma, const b2_weight *beta, float eps,
                      b2_err *err)
{
    rows_job job = {.kernels = b2_cpu_kernels_of(ctx), .out = out, .x = x, .gamma = vector_of(gamma),
                    .beta = vector_of(beta), .eps = eps, .row = norm_one};
    return run_rows(ctx, &job, x.rows, (double)x.cols * 0.3, err);
}

/* The angles of a token are the same in all of its heads: a block of them at a time, then every head. */
static void rope_one(rows_job *job, int64_t i)
{
    enum { BLOCK = 64 };
    float cosines[BLOCK], sines[BLOCK];
    int half = job->rotary_dim / 2;
    float position = (float)(job->positions[i] > 0 ? job->positions[i] : 0);
    for (int first = 0; first < half; first += BLOCK) {
        int count = half - first < BLOCK ? half - first : BLOCK;
        for (int j = 0; j < count; j++) {
            float angle = position * job->inv_freq[first + j];
            cosines[j] = cosf(angle) * job->scaling;
            sines[j] = sinf(angle) * job->scaling;
        }
        for (int64_t head = 0; head < job->x.cols; head += job->head_dim) {
            float *x = job->x.data + i * job->x.ld + head + first;
            job->kernels->rotate_row(x, x + half, cosines, sines, count);
        }
    }
}

int b2_cpu_rope(b2_ctx *ctx, b2_tensor x, const int32_t *positions, const float *inv_freq, int rotary_dim, int head_dim,
                float scaling, b2_err *err)
{
    rows_job job = {.kernels = b2_cpu_kernels_of(ctx), .x = x, .positions = positions, .inv_freq = inv_freq,
                    .rotary_dim = rotary_dim, .head_dim = head_dim, .scaling = scaling, .row = rope_one};
    return run_rows(ctx, &job, x.rows, (double)x.cols * 0.3 + rotary_dim * 12.0, err);
}

static void rms_norm_one(rows_job *job, int64_t i)
{
    job->kernels->rms_norm_row(job->out.data + i * job->out.ld, job->x.data + i * job->x.ld, job->gamma, job->x.cols,
                               job->eps);
}

int b2_cpu_rms_norm(b2_ctx *ctx, b2_tensor out, b2_tensor x, const b2_weight *gamma, float eps, b2_err *err)
{
    rows_job job = {.kernels = b2_cpu_kernels_of(ctx), .out = out, .x = x, .gamma = vector_of(gamma), .eps = eps,
                    .row = rms_norm_one};
    return run_rows(ctx, &job, x.rows, (double)x.cols * 0.2, err);
}

static void gate_one(rows_job *job, int64_t i)
{
    job->kernels->gate_row(job->out.data + i * job->out.ld, job->x.data + i * job->x.ld, job->up.data + i * job->up.ld,
                           job->x.cols, job->act);
}

int b2_cpu_gate(b2_ctx *ctx, b2_tensor out, b2_tensor gate, b2_tensor up, b2_act act, b2_err *err)
{
    rows_job job = {.kernels = b2_cpu_kernels_of(ctx), .out = out, .x = gate, .up = up, .act = act, .row = gate_one};
    return run_rows(ctx, &job, gate.rows, (double)gate.cols * 0.6, err);
}

static void embed_one(rows_job *job, int64_t i)
{
    enum { PART = 512 };
    float *out = job->out.data + i * job->out.ld, part[PART];
    const b2_weight *table = job->table;
    int64_t id = (int64_t)job->ids[i] + job->offset;
    if (id < 0)
        return;
    if (!job->accumulate) {
        b2_weight_read_row(out, table, id);
        return;
    }
    for (int64_t j = 0; j < table->k; j += PART) {
        int64_t count = table->k - j < PART ? table->k - j : PART;
        b2_weight_read_part(part, table, id, j, count);
        job->kernels->add_row(out + j, part, count);
    }
}

int b2_cpu_embedding(b2_ctx *ctx, b2_tensor out, const b2_weight *table, const int32_t *ids, int32_t offset,
                     int accumulate, b2_err *err)
{
    rows_job job = {.kernels = b2_cpu_kernels_of(ctx), .out = out, .table = table, .ids = ids, .offset = offset,
                    .accumulate = accumulate, .row = embed_one};
    return run_rows(ctx, &job, out.rows, (double)table->k * 2, err);
}

static void patch_one(rows_job *job, int64_t i)
{
    const b2_pictures *p = &job->pictures;
    int64_t across = p->width / job->patch, cells = p->height / job->patch * across;
    int64_t picture = i / cells, cell = i % cells;
    float *out = job->out.data + i * job->out.ld;
    for (int64_t c = 0; c < p->channels; c++)
        for (int64_t y = 0; y < job->patch; y++) {
            int64_t line = (picture * p->channels + c) * p->height + cell / across * job->patch + y;
            memcpy(out, p->data + line * p->width + cell % across * job->patch, (size_t)job->patch * sizeof *out);
            out += job->patch;
        }
}

int b2_cpu_patches(b2_ctx *ctx, b2_tensor out, b2_pictures pictures, int64_t patch, b2_err *err)
{
    rows_job job = {.out = out, .pictures = pictures, .patch = patch, .row = patch_one};
    return run_rows(ctx, &job, out.rows, (double)out.cols * 0.3, err);
}

static void copy_one(rows_job *job, int64_t i)
{
    const float *from = job->x.data + (job->x_rows ? job->x_rows[i] : i) * job->x.ld;
    memmove(job->out.data + (job->out_rows ? job->out_rows[i] : i) * job->out.ld, from,
            (size_t)job->x.cols * sizeof *from);
}

/* On one thread: the same output row may be named twice, and then the last one stays. */
int b2_cpu_copy_rows(b2_ctx *ctx, b2_tensor out, const int32_t *out_rows, b2_tensor x, const int32_t *x_rows, int64_t n,
                     b2_err *err)
{
    rows_job job = {.out = out, .x = x, .out_rows = out_rows, .x_rows = x_rows};
    if (b2_cancel_poll(ctx->cancel))
        return b2_fail(err, B2_E_CANCEL, "cancelled");
    for (int64_t i = 0; i < n; i++)
        copy_one(&job, i);
    return 0;
}

static void add_one(rows_job *job, int64_t i)
{
    job->kernels->add_row(job->out.data + i * job->out.ld, job->x.data + i % job->x.rows * job->x.ld, job->x.cols);
}

int b2_cpu_add_rows(b2_ctx *ctx, b2_tensor out, b2_tensor x, b2_err *err)
{
    rows_job job = {.kernels = b2_cpu_kernels_of(ctx), .out = out, .x = x, .row = add_one};
    return run_rows(ctx, &job, out.rows, (double)x.cols * 0.2, err);
}

static void reduce_one(rows_job *job, int64_t i)
{
    int64_t count = job->x.rows / job->out.rows, cols = job->x.cols;
    const float *from = job->x.data + i * count * job->x.ld;
    float *to = job->out.data + i * job->out.ld;
    memcpy(to, from, (size_t)cols * sizeof *to);
    for (int64_t row = 1; row < count; row++) {
        from += job->x.ld;
        for (int64_t c = 0; c < cols; c++)
            to[c] = job->reduction == B2_MEAN ? to[c] + from[c] : from[c] > to[c] ? from[c] : to[c];
    }
    for (int64_t c = 0; c < cols && job->reduction == B2_MEAN; c++)
        to[c] /= (float)count;
}

int b2_cpu_reduce_rows(b2_ctx *ctx, b2_tensor out, b2_tensor x, b2_reduction reduction, b2_err *err)
{
    rows_job job = {.out = out, .x = x, .reduction = reduction, .row = reduce_one};
    return run_rows(ctx, &job, out.rows, (double)(x.rows / out.rows * x.cols) * 0.5, err);
}

static void unit_one(rows_job *job, int64_t i)
{
    const float *x = job->x.data + i * job->x.ld;
    float *out = job->out.data + i * job->out.ld;
    double squares = 0.0;
    for (int64_t c = 0; c < job->x.cols; c++)
        squares += (double)x[c] * x[c];
    float length = fmaxf((float)sqrt(squares), 1e-12f);
    for (int64_t c = 0; c < job->x.cols; c++)
        out[c] = x[c] / length;
}

int b2_cpu_unit_rows(b2_ctx *ctx, b2_tensor out, b2_tensor x, b2_err *err)
{
    rows_job job = {.out = out, .x = x, .row = unit_one};
    return run_rows(ctx, &job, x.rows, (double)x.cols * 1.0, err);
}

static void top_one(rows_job *job, int64_t i)
{
    job->kernels->top_k_row(job->values + i * job->k, job->top_ids + i * job->k, job->x.data + i * job->x.ld,
                            job->x.cols, job->k);
}

int b2_cpu_top_k(b2_ctx *ctx, float *values, int32_t *ids, b2_tensor x, int k, b2_err *err)
{
    rows_job job = {.kernels = b2_cpu_kernels_of(ctx), .x = x, .values = values, .top_ids = ids, .k = k, .row = top_one};
    return run_rows(ctx, &job, x.rows, (double)x.cols * 0.3, err);
}

static void log_softmax_one(rows_job *job, int64_t i)
{
    job->kernels->log_softmax_row(job->x.data + i * job->x.ld, job->x.cols);
}

int b2_cpu_log_softmax(b2_ctx *ctx, b2_tensor x, b2_err *err)
{
    rows_job job = {.kernels = b2_cpu_kernels_of(ctx), .x = x, .row = log_softmax_one};
    return run_rows(ctx, &job, x.rows, (double)x.cols * 0.5, err);
}

static void check_one(rows_job *job, int64_t i)
{
    if (job->kernels->row_is_finite(job->x.data + i * job->x.ld, job->x.cols))
        return;
    long long before = atomic_load(&job->first_bad);
    while (i < before && !atomic_compare_exchange_weak(&job->first_bad, &before, i)) {
    }
}

int b2_cpu_check_finite(b2_ctx *ctx, int64_t *first_bad_row, b2_tensor x, b2_err *err)
{
    rows_job job = {.kernels = b2_cpu_kernels_of(ctx), .x = x, .row = check_one};
    atomic_init(&job.first_bad, INT64_MAX);
    if (run_rows(ctx, &job, x.rows, (double)x.cols * 0.15, err) < 0)
        return -1;
    long long bad = atomic_load(&job.first_bad);
    *first_bad_row = bad == INT64_MAX ? -1 : bad;
    return 0;
}
