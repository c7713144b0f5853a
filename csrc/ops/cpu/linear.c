/* out [N, Dout] = act(x [N, Din] . w^T + bias) + residual.
 *
 * Several ways, chosen by the weight and by the number of rows; all but the last two compute every element as one chain of
 * fused multiply-adds over ascending k, so the choice never shows in the result:
 *   stream  few rows (one register tile): every weight is read once, straight from its panel;
 *   tiles   more rows: x is packed once for all threads; each tile of work widens a pair of panels into a block that stays
 *           in the cache and runs register tiles over them, KC (PAIR_KC) steps of k at a time. Partial sums are stored and
 *           reloaded exactly;
 *   rows    as tiles, for weights in B2_ROWS: the panels are made on the way;
 *   pairs   as tiles, for weights in B2_PAIRS met by many rows (b2_rows_are), where the processor multiplies bfloat16: x
 *           is rounded to bfloat16 as well, an element is one chain over ascending pairs of k. Fewer rows are limited by
 *           memory and keep fp32;
 *   blas    fp32 B2_ROWS with item_rows: OpenBLAS on one item and a fixed stretch of columns at a time.
 *
 * Memory: packed x and one block per thread, from ctx->scratch, given back before returning. */
#include "ops/cpu/blas.h"
#include "ops/cpu/common.h"
#include "ops/cpu/linear_quads.h"
#include "ops/cpu/quads.h"

enum {
    KC = 256,               /* steps of k per block */
    PAIR_KC = 512,          /* the same of bfloat16 pairs: half as large, and nothing is widened */
    CHUNK_PANELS = 8,       /* most panels per tile of work */
    CHUNK_ROWS = 280,       /* most rows per tile of work */
    GROUP_ROWS = 1120,      /* rows packed at a time */
    FROM_DRAM = 4 << 20,    /* weights of so many bytes are not in a cache: fewer streams side by side are faster there */
    BLAS_COLUMNS = 256      /* columns per call of OpenBLAS: part of what defines its results */
};

/* Rough costs for choosing tiles, never for results. */
static const double NS_PER_FLOP = 1.0 / 80, NS_PER_BYTE = 1.0 / 12;

typedef struct linear_job {
    const b2_cpu_kernels *kernels;
    const b2_pair_kernels *pairs; /* NULL: fp32 arithmetic */
    b2_tensor out;             /* [rows, n] of the present group */
    b2_tensor x;               /* [rows, k] of the present group */
    const b2_weight *w;
    b2_epilogue epilogue;      /* residual is that of the present group */
    const char *packed;        /* x as row blocks [k][rows of the block], one after another: fp32, or bfloat16 pairs
                                * [ceil(k/2)][rows of the block][2] */
    int64_t kc;                /* steps of k per block */
    int64_t blocks;            /* row blocks of the group */
    int64_t blocks_per_chunk;
    int64_t row_chunks;
    int64_t panels;            /* of w */
    int64_t panels_per_chunk;
    int panels_at_once;        /* stream: read side by side */
    int64_t item_rows;
    b2_slots slots;
} linear_job;

/* Row blocks differ by one row at most: block i starts at row i * rows / blocks. */
static int64_t block_start(const linear_job *job, int64_t block)
{
    return block * job->x.rows / job->blocks;
}

/* Step k0 (even where pairs count) of the packed block of `rows` rows that begins with row `first`. */
static char *packed_at(const linear_job *job, int64_t first, int64_t rows, int64_t k0)
{
    int64_t k = job->x.cols;
    if (job->pairs)
        return (char *)job->packed + (first * ((k + 1) / 2) + k0 / 2 * rows) * 4;
    return (char *)job->packed + (first * k + k0 * rows) * 4;
}

static void pack_tile(void *argument, int64_t index, int worker)
{
    linear_job *job = argument;
    (void)worker;
    int64_t first = block_start(job, index), rows = block_start(job, index + 1) - first;
    const float *x = job->x.data + first * job->x.ld;
    void *to = packed_at(job, first, rows, 0);
    if (job->pairs)
        job->pairs->pack_rows(to, x, job->x.ld, (int)rows, job->x.cols);
    else
        job->kernels->pack_rows(to, x, job->x.ld, (int)rows, job->x.cols);
}

/* Packs x for the present group; a single row is used where it lies. */
static int pack_x(b2_ctx *ctx, linear_job *job, float *buffer, b2_err *err)
{
    job->blocks = b2_ceil_div(job->x.rows, job->kernels->tile_rows);
    if (job->x.rows == 1 && !job->pairs) {
        job->packed = (const char *)job->x.data;
        return 0;
    }
    job->packed = (const char *)buffer;
    double cost = (double)(job->x.rows * job->x.cols) * 0.7;
    return b2_cpu_run(ctx, job->blocks, pack_tile, job, cost, err);
}

/* The epilogue for the rows from `row` and the columns from `column`. */
static void finish_part(const linear_job *job, int64_t row, int64_t column, int64_t rows, int64_t cols, const float *c,
                        int64_t c_ld)
{
    b2_epilogue e = job->epilogue;
    e.bias = e.bias ? e.bias + column : NULL;
    e.residual = e.residual ? e.residual + row * e.residual_ld + column : NULL;
    job->kernels->finish(job->out.data + row * job->out.ld + column, job->out.ld, c, c_ld, rows, cols, &e);
}

/* ---- stream ---- */

static size_t panel_size(const b2_weight *w)
{
    int64_t k = w->layout == B2_PAIRS ? (w->k + 1) / 2 * 2 : w->k;
    return (size_t)(k * B2_PANEL) * b2_dtype_size(w->dtype);
}

static const char *panel_at(const b2_weight *w, int64_t panel)
{
    return (const char *)w->data + (size_t)panel * panel_size(w);
}

static void stream_tile(void *argument, int64_t index, int worker)
{
    linear_job *job = argument;
    (void)worker;
    int rows = (int)job->x.rows, at_once = job->panels_at_once;
    int64_t end = b2_min64(job->panels, (index + 1) * job->panels_per_chunk);
    float c[B2_TILE_ROWS_MAX * 4 * B2_PANEL]; /* [rows][width * 16] */
    for (int64_t p = index * job->panels_per_chunk; p < end;) {
        int width = end - p >= at_once ? at_once : 1;
        job->kernels->stream(c, (const float *)(const void *)job->packed, job->w, panel_at(job->w, p), rows, width);
        finish_part(job, 0, p * B2_PANEL, rows, b2_min64(width * B2_PANEL, job->w->n - p * B2_PANEL), c,
                    (int64_t)width * B2_PANEL);
        p += width;
    }
}

static int run_stream(b2_ctx *ctx, linear_job *job, b2_err *err)
{
    double panel_bytes = (double)panel_size(job->w);
    int at_once = job->kernels->stream_panels((int)job->x.rows);
    if (at_once > 2 && panel_bytes * (double)job->panels > FROM_DRAM)
        at_once = 2;
    job->panels_at_once = at_once;
    double panel_flops = 2.0 * (double)(job->w->k * B2_PANEL) * (double)job->x.rows;
    double panel_ns = panel_bytes * NS_PER_BYTE + panel_flops * NS_PER_FLOP;
    int64_t units = b2_ceil_div(job->panels, at_once);
    int64_t tiles = b2_cpu_tile_count(ctx, units, panel_ns * at_once, 10e3);
    job->panels_per_chunk = b2_ceil_div(units, tiles) * at_once;
    return b2_cpu_run(ctx, b2_ceil_div(job->panels, job->panels_per_chunk), stream_tile, job,
                      panel_ns * (double)job->panels, err);
}

/* ---- tiles ---- */

/* Scratch of one thread: widened panels [2][KC][16] and register tiles between two blocks of k,
 * [CHUNK_PANELS / tile_panels][blocks per chunk][tile rows][tile columns]. */
static size_t widened_floats(void)
{
    return (size_t)2 * KC * B2_PANEL;
}

static size_t chunk_scratch(const b2_cpu_kernels *kernels)
{
    int64_t blocks = b2_ceil_div(CHUNK_ROWS, kernels->tile_rows);
    size_t tiles = (size_t)(blocks * kernels->tile_rows) * CHUNK_PANELS * B2_PANEL;
    return (widened_floats() + tiles) * sizeof(float);
}

typedef struct chunk {
    int64_t block, block_end; /* row blocks */
    int64_t panel, panel_end;
    float *widened, *tiles;   /* scratch */
} chunk;

/* Where steps [k0, ...) of a panel lie; k0 is even. */
static const char *block_at(const b2_weight *w, int64_t panel, int64_t k0)
{
    return panel_at(w, panel) + (size_t)(k0 * B2_PANEL) * b2_dtype_size(w->dtype);
}

/* The block of panels that is read after this one, or this one again. */
static const char *block_after(const linear_job *job, const chunk *chunk, int64_t panel, int64_t k0)
{
    if (panel + job->kernels->tile_panels < chunk->panel_end)
        return block_at(job->w, panel + job->kernels->tile_panels, k0);
    return block_at(job->w, chunk->panel, k0 + job->kc < job->w->k ? k0 + job->kc : k0);
}

/* The first row block of a chunk brings the panels in: widened into the buffers, or (fp32) left where they lie. */
static void enter_panels(const linear_job *job, const chunk *chunk, b2_panels *b, float *tile, const float *a, int rows,
                         int64_t panel, int64_t k0, int64_t kc)
{
    const b2_weight *w = job->w;
    int two = job->kernels->tile_panels == 2 && panel + 1 < chunk->panel_end;
    *b = (b2_panels){.at = {chunk->widened, chunk->widened + KC * B2_PANEL}};
    if (w->layout == B2_ROWS) {
        for (int i = 0; i <= two; i++) {
            int64_t first = (panel + i) * B2_PANEL;
            job->kernels->widen_rows(b->at[i], (const char *)w->data + (size_t)(first * w->k) * b2_dtype_size(w->dtype),
                                     w->dtype, w->k, b2_min64(B2_PANEL, w->n - first), k0, kc);
        }
        job->kernels->tile(tile, a, b->at[0], two ? b->at[1] : b->at[0], rows, kc, k0 == 0);
        return;
    }
    if (w->layout == B2_PAIRS) {
        for (int i = 0; i <= two; i++)
            job->kernels->widen_pairs(b->at[i], block_at(w, panel + i, k0), kc);
        job->kernels->tile(tile, a, b->at[0], two ? b->at[1] : b->at[0], rows, kc, k0 == 0);
        return;
    }
    size_t next = two ? panel_size(w) : 0;
    const char *from = block_at(w, panel, k0);
    b2_stored stored = {{from, from + next}, w->dtype, block_after(job, chunk, panel, k0), next};
    job->kernels->tile_from(tile, a, &stored, b, rows, kc, k0 == 0);
}

/* One register tile of bfloat16 pairs, straight from the panels; the chunk's first row block asks for the next ones. */
static void pair_tile(const linear_job *job, const chunk *chunk, float *tile, const char *a, int64_t rows, int64_t block,
                      int64_t panel, int64_t k0, int64_t kc)
{
    size_t second = panel + 1 < chunk->panel_end ? panel_size(job->w) : 0;
    const char *from = block_at(job->w, panel, k0);
    const char *next = block == chunk->block ? block_after(job, chunk, panel, k0) : NULL;
    job->pairs->tile(tile, (const uint16_t *)(const void *)a, from, from + second, (int)rows, (kc + 1) / 2, k0 == 0, next,
                     second);
}

static void run_block_of_k(const linear_job *job, const chunk *chunk, int64_t k0, int64_t kc)
{
    const b2_cpu_kernels *kernels = job->kernels;
    int step = kernels->tile_panels, columns = step * B2_PANEL;
    float *tile = chunk->tiles;
    for (int64_t p = chunk->panel; p < chunk->panel_end; p += step) {
        b2_panels b;
        int64_t cols = b2_min64(b2_min64(columns, (chunk->panel_end - p) * B2_PANEL), job->w->n - p * B2_PANEL);
        for (int64_t i = chunk->block; i < chunk->block_end; i++) {
            int64_t first = block_start(job, i), rows = block_start(job, i + 1) - first;
            const char *packed = packed_at(job, first, rows, k0);
            const float *a = (const float *)(const void *)packed;
            if (job->pairs)
                pair_tile(job, chunk, tile, packed, rows, i, p, k0, kc);
            else if (i == chunk->block)
                enter_panels(job, chunk, &b, tile, a, (int)rows, p, k0, kc);
            else
                kernels->tile(tile, a, b.at[0], b.at[1], (int)rows, kc, k0 == 0);
            if (k0 + kc == job->w->k)
                finish_part(job, first, p * B2_PANEL, rows, cols, tile, columns);
            tile += kernels->tile_rows * columns;
        }
    }
}

static void chunk_tile(void *argument, int64_t index, int worker)
{
    linear_job *job = argument;
    float *scratch = b2_slot_claim(&job->slots, worker);
    int64_t row_chunk = index % job->row_chunks, panel = index / job->row_chunks * job->panels_per_chunk;
    chunk chunk = {.block = row_chunk * job->blocks_per_chunk,
                   .block_end = b2_min64(job->blocks, (row_chunk + 1) * job->blocks_per_chunk),
                   .panel = panel,
                   .panel_end = b2_min64(job->panels, panel + job->panels_per_chunk),
                   .widened = scratch,
                   .tiles = scratch + widened_floats()};
    for (int64_t k0 = 0; k0 < job->w->k; k0 += job->kc)
        run_block_of_k(job, &chunk, k0, b2_min64(job->kc, job->w->k - k0));
    b2_slot_release(&job->slots, scratch);
}

static int run_chunks(b2_ctx *ctx, linear_job *job, b2_err *err)
{
    int64_t most_blocks = b2_ceil_div(CHUNK_ROWS, job->kernels->tile_rows);
    job->row_chunks = b2_ceil_div(job->blocks, most_blocks);
    job->blocks_per_chunk = b2_ceil_div(job->blocks, job->row_chunks);
    int step = job->kernels->tile_panels;
    double flops = 2.0 * (double)job->x.rows * (double)(job->w->k * B2_PANEL);
    double panel_ns = flops * NS_PER_FLOP + (double)(job->w->k * B2_PANEL) * 0.1;
    int64_t units = b2_ceil_div(job->panels, step);
    int64_t tiles = b2_cpu_tile_count(ctx, units, panel_ns * step, 50e3);
    job->panels_per_chunk = b2_min64(CHUNK_PANELS, b2_ceil_div(units, tiles) * step);
    return b2_cpu_run(ctx, job->row_chunks * b2_ceil_div(job->panels, job->panels_per_chunk), chunk_tile, job,
                      panel_ns * (double)job->panels, err);
}

/* ---- blas ---- */

static void blas_tile(void *argument, int64_t index, int worker)
{
    linear_job *job = argument;
    const b2_weight *w = job->w;
    int64_t items = job->x.rows / job->item_rows;
    int64_t row = index % items * job->item_rows, column = index / items * BLAS_COLUMNS;
    int64_t cols = b2_min64(BLAS_COLUMNS, w->n - column);
    int through_scratch = job->epilogue.residual != NULL; /* which may be `out`: do not write over it */
    float *c = through_scratch ? b2_slot_claim(&job->slots, worker) : job->out.data + row * job->out.ld + column;
    int64_t c_ld = through_scratch ? cols : job->out.ld;
    b2_blas_sgemm_nt(job->item_rows, cols, w->k, job->x.data + row * job->x.ld, job->x.ld,
                     (const float *)w->data + column * w->k, w->k, c, c_ld);
    finish_part(job, row, column, job->item_rows, cols, c, c_ld);
    if (through_scratch)
        b2_slot_release(&job->slots, c);
}

static size_t blas_scratch(int64_t item_rows)
{
    return (size_t)item_rows * BLAS_COLUMNS * sizeof(float);
}

static int run_blas(b2_ctx *ctx, linear_job *job, b2_err *err)
{
    if (job->epilogue.residual && b2_slots_take(&job->slots, ctx, blas_scratch(job->item_rows), err) < 0)
        return -1;
    int64_t tiles = job->x.rows / job->item_rows * b2_ceil_div(job->w->n, BLAS_COLUMNS);
    double cost = 2.0 * (double)job->x.rows * (double)job->w->k * (double)job->w->n * NS_PER_FLOP;
    return b2_cpu_run(ctx, tiles, blas_tile, job, cost, err);
}

/* ---- */

/* May the activations of a product with a rounded weight be fine ones? */
static int are_few(const b2_ctx *ctx, int64_t rows)
{
    return ctx->rows_are == B2_ROWS_COUNTED ? rows <= B2_QUAD_FEW_ROWS : ctx->rows_are == B2_ROWS_APART;
}

static int run_own(b2_ctx *ctx, linear_job *job, const b2_linear_opts *opts, b2_err *err)
{
    b2_tensor x = job->x, out = job->out;
    int64_t group = b2_min64(GROUP_ROWS, x.rows);
    if (job->w->layout == B2_PAIRS && !are_few(ctx, x.rows))
        job->pairs = b2_cpu_pairs_of(ctx);
    job->kc = job->pairs ? PAIR_KC : KC;
    int streams = x.rows <= job->kernels->tile_rows && job->w->layout != B2_ROWS && !job->pairs;
    float *buffer = NULL;
    if ((x.rows > 1 || job->pairs) && !(buffer = b2_arena_take(ctx->scratch, (size_t)(group * x.cols), sizeof(float), err)))
        return -1;
    if (!streams && b2_slots_take(&job->slots, ctx, chunk_scratch(job->kernels), err) < 0)
        return -1;
    for (int64_t row = 0; row < x.rows; row += group) {
        int64_t rows = b2_min64(group, x.rows - row);
        job->x = b2_rows(x, row, rows);
        job->out = b2_rows(out, row, rows);
        if (opts->residual.data)
            job->epilogue.residual = opts->residual.data + row * opts->residual.ld;
        if (pack_x(ctx, job, buffer, err) < 0 ||
            (streams ? run_stream(ctx, job, err) : run_chunks(ctx, job, err)) < 0)
            return -1;
    }
    return 0;
}

int b2_cpu_linear(b2_ctx *ctx, b2_tensor out, b2_tensor x, const b2_weight *w, const b2_linear_opts *opts, b2_err *err)
{
    if (w->k < 1 || w->n < 1)
        return b2_fail(err, B2_E_VALUE, "linear: weight %s is empty: [%lld, %lld]", w->name ? w->name : "",
                       (long long)w->n, (long long)w->k);
    linear_job job = {.kernels = b2_cpu_kernels_of(ctx), .out = out, .x = x, .w = w, .item_rows = opts->item_rows};
    job.panels = b2_ceil_div(w->n, B2_PANEL);
    job.epilogue = (b2_epilogue){.bias = opts->bias && opts->bias->data ? opts->bias->data : NULL,
                                 .residual = opts->residual.data,
                                 .residual_ld = opts->residual.ld,
                                 .act = opts->act};
    if (w->layout == B2_QUADS && are_few(ctx, x.rows))
        return b2_cpu_quads_few(ctx, out, x, w, &job.epilogue, err);
    if (w->layout == B2_QUADS)
        return b2_cpu_quads_many(ctx, out, x, w, &job.epilogue, err);
    size_t mark = b2_arena_mark(ctx->scratch);
    int blas = w->layout == B2_ROWS && w->dtype == B2_F32 && opts->item_rows > 0;
    int status = blas ? run_blas(ctx, &job, err) : run_own(ctx, &job, opts, err);
    b2_arena_reset(ctx->scratch, mark);
    return status;
}

size_t b2_cpu_linear_scratch(const b2_ctx *ctx, int64_t max_rows, int64_t max_width)
{
    size_t threads = (size_t)b2_cpu_planned_threads(ctx);
    size_t own = b2_arena_cost((size_t)(b2_min64(GROUP_ROWS, max_rows) * max_width), sizeof(float)) +
                 threads * b2_arena_cost(chunk_scratch(b2_cpu_kernels_of(ctx)), 1);
    size_t blas = threads * b2_arena_cost(blas_scratch(max_rows), 1);
    size_t quads = b2_cpu_quads_few_scratch(max_rows, max_width);
    size_t many = b2_cpu_quads_many_scratch(ctx, max_rows, max_width);
    quads = quads > many ? quads : many;
    own = own > quads ? own : quads;
    return own > blas ? own : blas;
}
