/* Texts against the pictures of an index: out[t][n] = max over q of text t . vector q of picture n.
 *
 * With few texts reading the records is all the time there is, so each tile of records is read from memory once, by the
 * first group of texts, and from the cache by the others. The products are those of the streaming kernels for few rows,
 * because vectors lie in records as the weights of a layer do; but panel by panel, though the kernels can read several
 * side by side: records are then read from one end to the other, which prefetching follows (95 % of the machine's read
 * rate instead of 80 %), and memory is slower than one chain of multiply-adds.
 *
 * Memory: the packed texts, owned by the call; they are small beside the records. */
#include "core/memory.h"
#include "ops/cpu/common.h"

enum {
    TILE_BYTES = 128 << 10, /* of records: stays in the second-level cache while the groups of texts pass */
    GROUP_MOST = B2_TILE_ROWS_MAX /* of texts; not below B2_QUAD_FEW_ROWS */
};

_Static_assert((int)GROUP_MOST >= (int)B2_QUAD_FEW_ROWS, "a group of texts of either dtype fits");

typedef struct search_job {
    const b2_cpu_kernels *kernels;
    const b2_quad_kernels *quads;
    b2_tensor out;             /* [T, N] */
    b2_tensor texts;           /* [T, P] */
    const b2_records *records;
    b2_weight weight;          /* F16: what the streaming kernel wants to know of it */
    int64_t group;             /* texts that go through a kernel together */
    int64_t pictures_per_tile;
    float *packed;             /* F16: [groups][P][rows of the group]; owned by the call */
    char *values;              /* I8: [groups] of b2_quad_rows.values; owned by the call */
    float *scales;             /* I8: [T] */
    int32_t *sums;             /* I8: [T][blocks], then at the beginning of each group its [rows] of narrow */
    double *wide;              /* I8: [T], NULL where narrow will do */
    int64_t blocks;            /* I8: ceil(P / 32) */
} search_job;

static int64_t rows_of_group(const search_job *job, int64_t first)
{
    return b2_min64(job->group, job->texts.rows - first);
}

/* best [16] folded to its largest. Written lane by lane, so that it becomes maxima of whole vectors. */
static float largest(float best[B2_PANEL])
{
    for (int step = B2_PANEL / 2; step > 0; step /= 2)
        for (int i = 0; i < step; i++)
            best[i] = best[i + step] > best[i] ? best[i + step] : best[i];
    return best[0];
}

/* Products of a group with panel number `panel` of a record: c [rows][16]. */
static void products(const search_job *job, float *c, int64_t first, int64_t rows, const char *record, int64_t panel)
{
    const b2_records *r = job->records;
    const char *at = record + panel * b2_record_panel_bytes(r);
    if (r->dtype == B2_F16) {
        job->kernels->stream(c, job->packed + first * r->width, &job->weight, at, (int)rows, 1);
        return;
    }
    const char *scales = record + b2_record_panels(r) * b2_record_panel_bytes(r);
    b2_quad_rows x = {.values = job->values + (size_t)(first * job->blocks) * B2_QUAD_BLOCK * sizeof(int16_t),
                      .scales = job->scales + first,
                      .narrow = job->wide ? NULL : job->sums + first * job->blocks,
                      .wide = job->wide ? job->wide + first : NULL,
                      .rows = (int)rows};
    b2_quad_panels w = {.data = (const uint8_t *)at,
                        .scales = scales + panel * B2_PANEL * (int64_t)sizeof(float),
                        .dtype = B2_I8,
                        .blocks = job->blocks,
                        .group_blocks = job->blocks,
                        .groups = 1};
    job->quads->stream(c, &x, &w, 1);
}

static void score_picture(const search_job *job, int64_t first, int64_t rows, int64_t picture)
{
    const b2_records *r = job->records;
    const char *record = (const char *)r->data + picture * b2_record_bytes(r);
    float best[GROUP_MOST][B2_PANEL], c[GROUP_MOST * B2_PANEL];
    for (int64_t p = 0; p < b2_record_panels(r); p++) {
        products(job, c, first, rows, record, p);
        for (int64_t t = 0; t < rows; t++)
            for (int i = 0; i < B2_PANEL; i++)
                best[t][i] = p == 0 || c[t * B2_PANEL + i] > best[t][i] ? c[t * B2_PANEL + i] : best[t][i];
    }
    for (int64_t t = 0; t < rows; t++)
        job->out.data[(first + t) * job->out.ld + picture] = largest(best[t]);
}

static void search_tile(void *argument, int64_t index, int worker)
{
    const search_job *job = argument;
    (void)worker;
    int64_t begin = index * job->pictures_per_tile;
    int64_t end = b2_min64(job->records->pictures, begin + job->pictures_per_tile);
    for (int64_t first = 0; first < job->texts.rows; first += job->group) {
        int64_t rows = rows_of_group(job, first);
        for (int64_t n = begin; n < end; n++)
            score_picture(job, first, rows, n);
    }
}

static int pack_halves(search_job *job, b2_err *err)
{
    const b2_tensor x = job->texts;
    job->group = job->kernels->tile_rows;
    job->weight = (b2_weight){.k = x.cols, .n = job->records->queries, .dtype = B2_F16, .layout = B2_PANELS};
    job->packed = b2_alloc((size_t)x.rows * (size_t)x.cols, sizeof(float), "texts of a search", err);
    if (!job->packed)
        return -1;
    for (int64_t first = 0; first < x.rows; first += job->group)
        job->kernels->pack_rows(job->packed + first * x.cols, x.data + first * x.ld, x.ld,
                                (int)rows_of_group(job, first), x.cols);
    return 0;
}

/* The offsets of a group, - 128 * the sum of each row (quads.h). sums begins as [blocks][rows]. */
static void sum_rows(search_job *job, int64_t first, int64_t rows)
{
    int32_t *sums = job->sums + first * job->blocks;
    for (int64_t t = 0; t < rows; t++) {
        int64_t sum = 0;
        for (int64_t b = 0; b < job->blocks; b++)
            sum += sums[b * rows + t];
        if (job->wide)
            job->wide[first + t] = -128.0 * (double)sum;
        else
            sums[t] = (int32_t)(-128 * sum); /* of block 0, row t: nobody reads it after */
    }
}

static int pack_quads(search_job *job, b2_err *err)
{
    const b2_tensor x = job->texts;
    size_t rows = (size_t)x.rows, blocks = (size_t)(x.cols + B2_QUAD_BLOCK - 1) / B2_QUAD_BLOCK;
    job->group = B2_QUAD_FEW_ROWS;
    job->blocks = (int64_t)blocks;
    job->values = b2_alloc_zeroed(rows * blocks * B2_QUAD_BLOCK, sizeof(int16_t), "texts of a search", err);
    job->scales = b2_alloc(rows, sizeof(float), "scales of a search", err);
    job->sums = b2_alloc(rows * blocks, sizeof(int32_t), "sums of a search", err);
    if (!job->values || !job->scales || !job->sums)
        return -1;
    if (blocks * B2_QUAD_BLOCK > B2_QUAD_NARROW && !(job->wide = b2_alloc(rows, sizeof(double), "sums of a search", err)))
        return -1;
    for (int64_t first = 0; first < x.rows; first += job->group) {
        int64_t count = rows_of_group(job, first);
        char *values = job->values + (size_t)(first * job->blocks) * B2_QUAD_BLOCK * sizeof(int16_t);
        for (int64_t t = 0; t < count; t++)
            job->quads->quantise_row(values, job->sums + first * job->blocks, job->scales + first + t,
                                     x.data + (first + t) * x.ld, NULL, x.cols, (int)t, (int)count);
        sum_rows(job, first, count);
    }
    return 0;
}

static int search(b2_ctx *ctx, search_job *job, b2_err *err)
{
    const b2_records *r = job->records;
    int64_t bytes = b2_record_bytes(r);
    job->pictures_per_tile = bytes < TILE_BYTES ? TILE_BYTES / bytes : 1;
    double picture_ns = (double)bytes * (1.0 / 16 + (double)job->texts.rows / 64);
    return b2_cpu_run(ctx, (r->pictures + job->pictures_per_tile - 1) / job->pictures_per_tile, search_tile, job,
                      picture_ns * (double)r->pictures, err);
}

int b2_cpu_picture_scores(b2_ctx *ctx, b2_tensor out, b2_tensor texts, const b2_records *records, b2_err *err)
{
    search_job job = {.kernels = b2_cpu_kernels_of(ctx),
                      .quads = b2_cpu_quads_of(ctx),
                      .out = out,
                      .texts = texts,
                      .records = records};
    int status = records->dtype == B2_I8 ? pack_quads(&job, err) : pack_halves(&job, err);
    if (status == 0)
        status = search(ctx, &job, err);
    b2_free(job.packed);
    b2_free(job.values);
    b2_free(job.scales);
    b2_free(job.sums);
    b2_free(job.wide);
    return status;
}
