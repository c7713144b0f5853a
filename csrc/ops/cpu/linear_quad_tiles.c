/* Many rows times a rounded weight (formula: quad_tiles.h). x is rounded once for all threads, in blocks of rows; each tile of
 * work takes a few panels of weights and a stretch of row blocks, and runs register tiles over KC input channels at a time.
 * Where the tile does not read weights as they are stored, each thread unpacks them into a block that stays in its cache.
 *
 * Memory: rounded x and one block per thread, from ctx->scratch, given back before returning. */
#include "ops/cpu/linear_quads.h"

#include "ops/cpu/quad_tiles.h"

enum {
    KC = 1024,          /* most input channels per block, a multiple of 64: two panels of them stay in L1 */
    KC_UNPACKED = 512,  /* the same where weights are unpacked */
    FEW_BLOCKS = 8,
    CHUNK_ROWS = 288,   /* most rows per tile of work */
    CHUNK_PANELS = 8,   /* most panels per tile of work */
    GROUP_ROWS = 1152   /* most rows rounded at a time */
};

typedef struct tiles_job {
    const b2_cpu_kernels *kernels;
    const b2_quad_tiles *tiles;
    b2_tensor out;                /* [rows, n] of the present group of rows */
    b2_tensor x;                  /* [rows, k] of it */
    const b2_weight *w;
    b2_epilogue epilogue;         /* residual is that of the present group */
    b2_quad_block rounded;        /* of all row blocks, one after another */
    int64_t units;                /* of k */
    int64_t group_units;          /* of one rounding of x */
    int64_t blocks, blocks_per_chunk, row_chunks;
    int64_t panels, panels_per_chunk;
    int64_t threads;
    b2_slots slots;
} tiles_job;

/* Row blocks differ by one row at most: block i starts at row i * rows / blocks. */
static int64_t block_start(const tiles_job *job, int64_t block)
{
    return block * job->x.rows / job->blocks;
}

static int are_few_blocks(const tiles_job *job)
{
    return job->blocks_per_chunk <= FEW_BLOCKS;
}

/* The block of `rows` rows that starts at row `first`, from `unit` on, where a group begins. */
static b2_quad_block block_at(const tiles_job *job, int64_t first, int64_t rows, int64_t unit)
{
    int64_t bytes = B2_QUAD_UNIT * job->tiles->value_bytes;
    int64_t group = first * b2_ceil_div(job->units, job->group_units) + unit / job->group_units * rows;
    return (b2_quad_block){job->rounded.values + (first * job->units + unit * rows) * bytes, job->rounded.scales + group,
                           job->rounded.offsets + group};
}

static void round_tile(void *argument, int64_t index, int worker)
{
    tiles_job *job = argument;
    (void)worker;
    int64_t first = block_start(job, index), rows = block_start(job, index + 1) - first;
    b2_quad_block block = block_at(job, first, rows, 0);
    job->tiles->round_rows(&block, job->x.data + first * job->x.ld, job->x.ld, (int)rows, job->x.cols,
                           job->w->column_scales, job->w->dtype);
}

/* ---- tiles ---- */

typedef struct chunk {
    int64_t block, block_end; /* row blocks */
    int64_t panel, panel_end;
    char *unpacked;           /* scratch: [2][KC_UNPACKED][16] values */
    float *tiles;             /* scratch: [CHUNK_PANELS / tile panels][row blocks][tile rows][32] */
} chunk;

static size_t unpacked_bytes(const b2_quad_tiles *tiles)
{
    return (size_t)2 * KC_UNPACKED * B2_PANEL * (size_t)tiles->value_bytes;
}

static size_t chunk_scratch(const b2_quad_tiles *tiles)
{
    int64_t rows = b2_ceil_div(CHUNK_ROWS, tiles->tile_rows) * tiles->tile_rows;
    return unpacked_bytes(tiles) +
           (size_t)(CHUNK_PANELS / tiles->tile_panels * rows * B2_QUAD_TILE_COLUMNS) * sizeof(float);
}

static const char *stored_at(const tiles_job *job, int64_t panel, int64_t unit)
{
    return (const char *)job->w->data + (panel * job->units + unit) * b2_quad_unit_bytes(job->w->dtype);
}

/* Whether the last panel of the chunk is not alone. */
static int are_two(const tiles_job *job, const chunk *chunk, int64_t panel)
{
    return job->tiles->tile_panels == 2 && panel + 1 < chunk->panel_end;
}

/* The operand of panels [panel, panel + 2) from unit u0 on; of a single panel twice that one. */
static b2_quad_operand enter_panels(const tiles_job *job, const chunk *chunk, int64_t panel, int64_t u0, int64_t units)
{
    const b2_quad_tiles *tiles = job->tiles;
    b2_quad_operand operand;
    int i4 = job->w->dtype == B2_I4, two = are_two(job, chunk, panel);
    void (*unpack)(char *, const uint8_t *, int64_t) = i4 ? tiles->unpack_i4 : tiles->unpack_i8;
    for (int i = 0; i < 2; i++) {
        int64_t from = panel + (two ? i : 0);
        const char *stored = stored_at(job, from, u0);
        char *unpacked = chunk->unpacked + (two ? i : 0) * (int64_t)unpacked_bytes(tiles) / 2;
        if (unpack && (i == 0 || two))
            unpack(unpacked, (const uint8_t *)stored, units);
        operand.values[i] = unpack ? unpacked : stored;
        operand.scales[i] = i4 ? (const uint16_t *)job->w->scales + (from * job->units + u0) * B2_PANEL : NULL;
    }
    return operand;
}

static void finish_tile(const tiles_job *job, float *tile, int64_t row, int64_t rows, int64_t panel, int two)
{
    int64_t column = panel * B2_PANEL, cols = b2_min64(two ? 2 * B2_PANEL : B2_PANEL, job->w->n - column);
    b2_epilogue e = job->epilogue;
    e.scales = job->w->dtype == B2_I8 ? (const float *)job->w->scales + column : NULL;
    e.bias = e.bias ? e.bias + column : NULL;
    e.residual = e.residual ? e.residual + row * e.residual_ld + column : NULL;
    job->kernels->finish(job->out.data + row * job->out.ld + column, job->out.ld, tile, B2_QUAD_TILE_COLUMNS, rows, cols,
                         &e);
}

/* Units per block of k: as even as can be, and whole groups. */
static int64_t block_units(const tiles_job *job)
{
    int unpacks = job->w->dtype == B2_I4 || job->tiles->unpack_i8;
    int64_t most = (unpacks ? KC_UNPACKED : KC) / B2_QUAD_UNIT;
    int64_t even = b2_ceil_div(job->units, b2_ceil_div(job->units, most));
    return b2_ceil_div(even, job->group_units) * job->group_units;
}

/* What is read after some units of a panel, or NULL. */
typedef struct upcoming {
    int64_t panel, unit, units;
} upcoming;

/* Piece `i` of what comes next: half of a panel's units. */
static const char *piece_of(const tiles_job *job, const upcoming *next, int64_t i)
{
    int64_t panel = next->panel + i / 2;
    if (i >= 2 * job->tiles->tile_panels || panel >= job->panels)
        return NULL;
    return stored_at(job, panel, next->unit) + i % 2 * next->units * b2_quad_unit_bytes(job->w->dtype) / 2;
}

/* The first row blocks ask for a piece each; where they are fewer than pieces, the rest is asked for in one go. */
static void ask_for_rest(const tiles_job *job, const upcoming *next, int64_t i)
{
    const char *piece;
    for (; (piece = piece_of(job, next, i)); i++)
        for (int64_t at = 0; at < next->units * b2_quad_unit_bytes(job->w->dtype) / 2; at += 64)
            __builtin_prefetch(piece + at, 0, 2);
}

static float *run_panels(const tiles_job *job, const chunk *chunk, int64_t panel, int64_t u0, int64_t units,
                         const upcoming *next, float *tile)
{
    b2_quad_operand operand = enter_panels(job, chunk, panel, u0, units);
    for (int64_t i = chunk->block; i < chunk->block_end; i++) {
        int64_t first = block_start(job, i), rows = block_start(job, i + 1) - first;
        b2_quad_block x = block_at(job, first, rows, u0);
        const char *piece = piece_of(job, next, i - chunk->block);
        job->tiles->tile(tile, &x, &operand, job->w->dtype, (int)rows, units, u0 == 0, piece);
        if (u0 + units == job->units)
            finish_tile(job, tile, first, rows, panel, are_two(job, chunk, panel));
        tile += job->tiles->tile_rows * B2_QUAD_TILE_COLUMNS;
    }
    ask_for_rest(job, next, chunk->block_end - chunk->block);
    return tile;
}

/* The panels that the chunk begins with which this thread will probably take next. */
static int64_t panel_after(const tiles_job *job, const chunk *chunk)
{
    return chunk->panel + job->threads * job->panels_per_chunk;
}

/* Few row blocks: panel after panel as they lie in memory. The sums of a panel stay in L1. */
static void run_by_panel(const tiles_job *job, const chunk *chunk, int64_t step)
{
    for (int64_t p = chunk->panel; p < chunk->panel_end; p += job->tiles->tile_panels)
        for (int64_t u0 = 0; u0 < job->units; u0 += step) {
            int64_t after = p + job->tiles->tile_panels < chunk->panel_end ? p + job->tiles->tile_panels
                                                                           : panel_after(job, chunk);
            int last = u0 + step >= job->units;
            upcoming next = {last ? after : p, last ? 0 : u0 + step, b2_min64(step, job->units - (last ? 0 : u0 + step))};
            run_panels(job, chunk, p, u0, b2_min64(step, job->units - u0), &next, chunk->tiles);
        }
}

/* Many: a stretch of k after another, so that x of all row blocks stays in L2. */
static void run_by_units(const tiles_job *job, const chunk *chunk, int64_t step)
{
    for (int64_t u0 = 0; u0 < job->units; u0 += step) {
        float *tile = chunk->tiles;
        for (int64_t p = chunk->panel; p < chunk->panel_end; p += job->tiles->tile_panels) {
            upcoming next = {p + job->tiles->tile_panels, u0, b2_min64(step, job->units - u0)};
            if (next.panel >= chunk->panel_end) {
                int last = u0 + step >= job->units;
                next.panel = last ? panel_after(job, chunk) : chunk->panel;
                next.unit = last ? 0 : u0 + step;
                next.units = b2_min64(step, job->units - next.unit);
            }
            tile = run_panels(job, chunk, p, u0, b2_min64(step, job->units - u0), &next, tile);
        }
    }
}

static void chunk_tile(void *argument, int64_t index, int worker)
{
    tiles_job *job = argument;
    char *scratch = b2_slot_claim(&job->slots, worker);
    int64_t row_chunk = index % job->row_chunks, panel = index / job->row_chunks * job->panels_per_chunk;
    chunk chunk = {.block = row_chunk * job->blocks_per_chunk,
                   .block_end = b2_min64(job->blocks, (row_chunk + 1) * job->blocks_per_chunk),
                   .panel = panel,
                   .panel_end = b2_min64(job->panels, panel + job->panels_per_chunk),
                   .unpacked = scratch,
                   .tiles = (float *)(void *)(scratch + unpacked_bytes(job->tiles))};
    (are_few_blocks(job) ? run_by_panel : run_by_units)(job, &chunk, block_units(job));
    b2_slot_release(&job->slots, scratch);
}

static int run_group(b2_ctx *ctx, tiles_job *job, b2_err *err)
{
    /* Rough costs for choosing tiles, never for results. */
    const double ns_per_op = 1.0 / 300, ns_per_rounding = 0.3;
    int step = job->tiles->tile_panels;
    job->blocks = b2_ceil_div(job->x.rows, job->tiles->tile_rows);
    if (b2_cpu_run(ctx, job->blocks, round_tile, job, (double)(job->x.rows * job->x.cols) * ns_per_rounding, err) < 0)
        return -1;
    job->row_chunks = b2_ceil_div(job->blocks, b2_ceil_div(CHUNK_ROWS, job->tiles->tile_rows));
    job->blocks_per_chunk = b2_ceil_div(job->blocks, job->row_chunks);
    double panel_ns = 2.0 * (double)job->x.rows * (double)(job->w->k * B2_PANEL) * ns_per_op;
    int64_t units = b2_ceil_div(job->panels, step);
    int64_t tiles = b2_cpu_tile_count(ctx, units, panel_ns * step, 50e3);
    job->panels_per_chunk = b2_ceil_div(units, tiles) * step;
    if (!are_few_blocks(job)) /* whose sums are kept for one pair of panels only */
        job->panels_per_chunk = b2_min64(CHUNK_PANELS, job->panels_per_chunk);
    job->threads = b2_pool_threads(ctx->pool);
    return b2_cpu_run(ctx, job->row_chunks * b2_ceil_div(job->panels, job->panels_per_chunk), chunk_tile, job,
                      panel_ns * (double)job->panels, err);
}

/* ---- */

static int take_scratch(b2_ctx *ctx, tiles_job *job, int64_t rows, b2_err *err)
{
    size_t units = (size_t)(rows * job->units), groups = (size_t)(rows * b2_ceil_div(job->units, job->group_units));
    job->rounded.values = b2_arena_take(ctx->scratch, units, (size_t)(B2_QUAD_UNIT * job->tiles->value_bytes), err);
    job->rounded.scales = b2_arena_take(ctx->scratch, groups, sizeof(float), err);
    job->rounded.offsets = b2_arena_take(ctx->scratch, groups, sizeof(int32_t), err);
    if (!job->rounded.values || !job->rounded.scales || !job->rounded.offsets)
        return -1;
    return b2_slots_take(&job->slots, ctx, chunk_scratch(job->tiles), err);
}

size_t b2_cpu_quads_many_scratch(const b2_ctx *ctx, int64_t max_rows, int64_t max_width)
{
    const b2_quad_tiles *tiles = b2_cpu_quad_tiles_of(ctx);
    size_t units = (size_t)(b2_min64(GROUP_ROWS, max_rows) * b2_ceil_div(max_width, B2_QUAD_UNIT));
    return b2_arena_cost(units, (size_t)(B2_QUAD_UNIT * tiles->value_bytes)) + b2_arena_cost(units, sizeof(float)) +
           b2_arena_cost(units, sizeof(int32_t)) +
           (size_t)b2_cpu_planned_threads(ctx) * b2_arena_cost(chunk_scratch(tiles), 1);
}

static int run_all(b2_ctx *ctx, tiles_job *job, b2_err *err)
{
    b2_tensor x = job->x, out = job->out;
    const float *residual = job->epilogue.residual;
    int64_t count = b2_ceil_div(x.rows, GROUP_ROWS);
    if (take_scratch(ctx, job, b2_ceil_div(x.rows, count), err) < 0)
        return -1;
    for (int64_t i = 0; i < count; i++) {
        int64_t row = i * x.rows / count, rows = (i + 1) * x.rows / count - row;
        job->x = b2_rows(x, row, rows);
        job->out = b2_rows(out, row, rows);
        job->epilogue.residual = residual ? residual + row * job->epilogue.residual_ld : NULL;
        if (run_group(ctx, job, err) < 0)
            return -1;
    }
    return 0;
}

int b2_cpu_quads_many(b2_ctx *ctx, b2_tensor out, b2_tensor x, const b2_weight *w, const b2_epilogue *epilogue,
                      b2_err *err)
{
    tiles_job job = {.kernels = b2_cpu_kernels_of(ctx), .tiles = b2_cpu_quad_tiles_of(ctx), .out = out, .x = x, .w = w,
                     .epilogue = *epilogue};
    job.units = b2_ceil_div(w->k, B2_QUAD_UNIT);
    job.group_units = b2_quad_group(w->dtype) / B2_QUAD_UNIT;
    job.panels = b2_ceil_div(w->n, B2_PANEL);
    size_t mark = b2_arena_mark(ctx->scratch);
    int status = run_all(ctx, &job, err);
    b2_arena_reset(ctx->scratch, mark);
    return status;
}
