/* Few rows times a quantised weight (formula: quads.h): the rows become whole numbers of 16 bits once, then every weight
 * is read once, straight from its panel.
 *
 * Memory: the whole numbers and their sums, from ctx->scratch. */
#include "ops/cpu/linear_quads.h"

#include "ops/cpu/quads.h"

enum { MOST_K = 65536, QUAD_BYTES = 8 };

typedef struct quads_job {
    const b2_cpu_kernels *kernels;
    const b2_quad_kernels *quads;
    b2_tensor out;          /* [M, n] */
    b2_tensor x;            /* [M, k] */
    const b2_weight *w;
    const b2_epilogue *epilogue;
    b2_quad_panels panels;  /* the first one */
    b2_quad_rows rows;
    char *values;           /* of `rows`, to be written */
    float *scales;          /* [M] */
    int32_t *sums;          /* [blocks][M], then [groups][M] where groups are narrow */
    double *wide;           /* [groups][M] */
    int64_t panel_count, panels_per_tile;
    int at_once;
} quads_job;

static void quantise_tile(void *argument, int64_t index, int worker)
{
    quads_job *job = argument;
    (void)worker;
    job->quads->quantise_row(job->values, job->sums, job->scales + index, job->x.data + index * job->x.ld,
                             job->w->column_scales, job->w->k, (int)index, (int)job->x.rows);
}

/* Sums of blocks become offsets of groups. In place: group g lies before its blocks or on the first of them. */
static void sum_groups(quads_job *job)
{
    int64_t rows = job->x.rows, zero = job->w->dtype == B2_I8 ? 128 : 8;
    const b2_quad_panels *p = &job->panels;
    for (int64_t g = 0; g < p->groups; g++) {
        int64_t end = b2_min64(p->blocks, (g + 1) * p->group_blocks);
        for (int64_t r = 0; r < rows; r++) {
            int64_t sum = 0;
            for (int64_t b = g * p->group_blocks; b < end; b++)
                sum += job->sums[b * rows + r];
            if (job->wide)
                job->wide[g * rows + r] = -(double)(zero * sum);
            else
                job->sums[g * rows + r] = (int32_t)(-zero * sum);
        }
    }
}

static int take_rows(b2_ctx *ctx, quads_job *job, b2_err *err)
{
    size_t rows = (size_t)job->x.rows, blocks = (size_t)job->panels.blocks;
    job->values = b2_arena_take(ctx->scratch, rows * blocks, B2_QUAD_BLOCK / 4 * QUAD_BYTES, err);
    job->sums = b2_arena_take(ctx->scratch, rows * blocks, sizeof *job->sums, err);
    job->scales = b2_arena_take(ctx->scratch, rows, sizeof *job->scales, err);
    if (job->panels.group_blocks * B2_QUAD_BLOCK > B2_QUAD_NARROW &&
        !(job->wide = b2_arena_take(ctx->scratch, rows * (size_t)job->panels.groups, sizeof *job->wide, err)))
        return -1;
    return job->values && job->sums && job->scales ? 0 : -1;
}

static int quantise(b2_ctx *ctx, quads_job *job, b2_err *err)
{
    if (take_rows(ctx, job, err) < 0 ||
        b2_cpu_run(ctx, job->x.rows, quantise_tile, job, (double)(job->x.rows * job->x.cols) * 0.3, err) < 0)
        return -1;
    sum_groups(job);
    job->rows = (b2_quad_rows){.values = job->values,
                               .scales = job->scales,
                               .narrow = job->wide ? NULL : job->sums,
                               .wide = job->wide,
                               .rows = (int)job->x.rows};
    return 0;
}

size_t b2_cpu_quads_few_scratch(int64_t max_rows, int64_t max_width)
{
    size_t rows = (size_t)b2_min64(max_rows, B2_QUAD_FEW_ROWS), blocks = (size_t)b2_ceil_div(max_width, B2_QUAD_BLOCK);
    return b2_arena_cost(rows * blocks, B2_QUAD_BLOCK / 4 * QUAD_BYTES) + b2_arena_cost(rows * blocks, sizeof(int32_t)) +
           b2_arena_cost(rows, sizeof(float)) + b2_arena_cost(rows * blocks, sizeof(double));
}

static size_t panel_bytes(const quads_job *job)
{
    size_t elements = (size_t)job->panels.blocks * B2_QUAD_BLOCK * B2_PANEL;
    return job->w->dtype == B2_I8 ? elements : elements / 2;
}

static size_t panel_scale_bytes(const quads_job *job)
{
    return (size_t)job->panels.groups * B2_PANEL * (job->w->dtype == B2_I8 ? sizeof(float) : sizeof(uint16_t));
}

static void finish_panels(const quads_job *job, const float *c, int64_t panel, int width)
{
    int64_t column = panel * B2_PANEL;
    b2_epilogue e = *job->epilogue;
    e.bias = e.bias ? e.bias + column : NULL;
    e.residual = e.residual ? e.residual + column : NULL;
    job->kernels->finish(job->out.data + column, job->out.ld, c, (int64_t)width * B2_PANEL, job->x.rows,
                         b2_min64((int64_t)width * B2_PANEL, job->w->n - column), &e);
}

static void stream_tile(void *argument, int64_t index, int worker)
{
    quads_job *job = argument;
    (void)worker;
    float c[B2_QUAD_FEW_ROWS * 2 * B2_PANEL]; /* [rows][width * 16] */
    int64_t end = b2_min64(job->panel_count, (index + 1) * job->panels_per_tile);
    for (int64_t p = index * job->panels_per_tile; p < end;) {
        int width = end - p >= job->at_once ? job->at_once : 1;
        b2_quad_panels w = job->panels;
        w.data += (size_t)p * panel_bytes(job);
        w.scales = (const char *)w.scales + (size_t)p * panel_scale_bytes(job);
        job->quads->stream(c, &job->rows, &w, width);
        finish_panels(job, c, p, width);
        p += width;
    }
}

static int stream(b2_ctx *ctx, quads_job *job, b2_err *err)
{
    job->at_once = job->quads->stream_panels(job->w->dtype, (int)job->x.rows);
    double panel_ns = (double)panel_bytes(job) * (1.0 / 16 + (double)job->x.rows / 64);
    int64_t units = b2_ceil_div(job->panel_count, job->at_once);
    int64_t tiles = b2_cpu_tile_count(ctx, units, panel_ns * job->at_once, 5e3);
    job->panels_per_tile = b2_ceil_div(units, tiles) * job->at_once;
    return b2_cpu_run(ctx, b2_ceil_div(job->panel_count, job->panels_per_tile), stream_tile, job,
                      panel_ns * (double)job->panel_count, err);
}

static int few(b2_ctx *ctx, b2_tensor out, b2_tensor x, const b2_weight *w, const b2_epilogue *epilogue, b2_err *err)
{
    int64_t blocks = b2_ceil_div(w->k, B2_QUAD_BLOCK), group_blocks = b2_ceil_div(w->group, B2_QUAD_BLOCK);
    quads_job job = {.kernels = b2_cpu_kernels_of(ctx),
                     .quads = b2_cpu_quads_of(ctx),
                     .out = out,
                     .x = x,
                     .w = w,
                     .epilogue = epilogue,
                     .panels = {.data = w->data,
                                .scales = w->scales,
                                .dtype = w->dtype,
                                .blocks = blocks,
                                .group_blocks = group_blocks,
                                .groups = b2_ceil_div(blocks, group_blocks)},
                     .panel_count = b2_ceil_div(w->n, B2_PANEL)};
    size_t mark = b2_arena_mark(ctx->scratch);
    int status = quantise(ctx, &job, err) < 0 || stream(ctx, &job, err) < 0 ? -1 : 0;
    b2_arena_reset(ctx->scratch, mark);
    return status;
}

int b2_cpu_quads_few(b2_ctx *ctx, b2_tensor out, b2_tensor x, const b2_weight *w, const b2_epilogue *epilogue,
                     b2_err *err)
{
    if (w->k > MOST_K)
        return b2_fail(err, B2_E_UNSUPPORTED, "%s: %lld input channels, a quantised weight may have %d",
                       w->name ? w->name : "weight", (long long)w->k, (int)MOST_K);
    /* Parts of like size: 16 rows as 8 and 8 read the weights as often as 15 and 1, and compute less at a time. */
    int64_t parts = b2_ceil_div(x.rows, B2_QUAD_FEW_ROWS), at_once = b2_ceil_div(x.rows, parts);
    for (int64_t row = 0; row < x.rows; row += at_once) {
        int64_t rows = b2_min64(at_once, x.rows - row);
        b2_epilogue part = *epilogue;
        if (part.residual)
            part.residual += row * part.residual_ld;
        if (few(ctx, b2_rows(out, row, rows), b2_rows(x, row, rows), w, &part, err) < 0)
            return -1;
    }
    return 0;
}
