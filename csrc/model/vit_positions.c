/* Positions of the vision encoder for pictures of any size: the learned table, or its grid interpolated.
 *
 *     out[y][x] = sum over m, n in -1..2 of  c_m(fy) c_n(fx) grid[clamp(iy + m)][clamp(ix + n)]
 *     where i + f = (place + 0.5) * (size of the grid / size of the output) - 0.5,  i = floor,
 *     c the four coefficients of cubic convolution with A = -0.75
 *
 * in float32 with the operations of torch's upsample_bicubic2d (align_corners False, no antialiasing). The class token's
 * position is taken as it is. The table is made anew for each call: that costs a thousandth of the encoder's work on the
 * same pictures and keeps the model immutable. */
#include <math.h>
#include <string.h>

#include "model/stage.h"
#include "model/vit.h"

/* Four places of the grid and what each counts. */
typedef struct taps {
    int64_t at[4];
    float weight[4];
} taps;

static float cubic_near(float x) /* |x| <= 1 */
{
    const float a = -0.75f;
    return ((a + 2.0f) * x - (a + 3.0f)) * x * x + 1.0f;
}

static float cubic_far(float x) /* 1 < |x| < 2 */
{
    const float a = -0.75f;
    return ((a * x - 5.0f * a) * x + 8.0f * a) * x - 4.0f * a;
}

static taps taps_of(int64_t place, int64_t out_size, int64_t grid)
{
    float scale = (float)grid / (float)out_size;
    float source = scale * ((float)place + 0.5f) - 0.5f, whole = floorf(source), f = source - whole;
    taps t = {.weight = {cubic_far(f + 1.0f), cubic_near(f), cubic_near(1.0f - f), cubic_far(2.0f - f)}};
    for (int i = 0; i < 4; i++) {
        int64_t at = (int64_t)whole - 1 + i;
        t.at[i] = at < 0 ? 0 : at >= grid ? grid - 1 : at;
    }
    return t;
}

static int64_t grid_of(const b2_vit *vit)
{
    return vit->config.image_size / vit->config.patch_size;
}

static int is_trained_grid(const b2_vit *vit, int64_t height, int64_t width)
{
    return height / vit->config.patch_size == grid_of(vit) && width / vit->config.patch_size == grid_of(vit);
}

/* out [D] = the table at taps y, x; `patches` [grid*grid, D] */
static void interpolate(float *out, const float *patches, int64_t grid, int64_t dim, const taps *y, const taps *x)
{
    for (int64_t d = 0; d < dim; d++)
        out[d] = 0.0f;
    for (int m = 0; m < 4; m++)
        for (int n = 0; n < 4; n++) {
            const float *row = patches + (y->at[m] * grid + x->at[n]) * dim, weight = y->weight[m] * x->weight[n];
            for (int64_t d = 0; d < dim; d++)
                out[d] += weight * row[d];
        }
}

size_t b2_vit_positions_scratch(const b2_vit *vit, int64_t height, int64_t width)
{
    if (is_trained_grid(vit, height, width))
        return 0;
    int64_t dim = vit->config.hidden_size, grid = grid_of(vit);
    return b2_arena_cost((size_t)(b2_vit_tokens(&vit->config, height, width) * dim), sizeof(float)) +
           b2_arena_cost((size_t)((1 + grid * grid) * dim), sizeof(float)); /* the table, where it is not on the host */
}

int b2_vit_positions(b2_ctx *ctx, const b2_vit *vit, b2_tensor *positions, int64_t height, int64_t width, b2_err *err)
{
    int64_t dim = vit->config.hidden_size, grid = grid_of(vit);
    int64_t down = height / vit->config.patch_size, across = width / vit->config.patch_size;
    b2_tensor own = b2_tensor_of((float *)vit->position_embedding.data, 1 + grid * grid, dim); /* F32 */
    *positions = own;
    if (is_trained_grid(vit, height, width))
        return 0;
    float *table = own.data, *made = b2_arena_take(ctx->scratch, (size_t)((1 + down * across) * dim), sizeof *made, err);
    if (!made)
        return -1;
    if (!b2_on_host(ctx)) {
        table = b2_arena_take(ctx->scratch, (size_t)(own.rows * dim), sizeof *table, err);
        if (!table || b2_download_rows(ctx, b2_tensor_of(table, own.rows, dim), own, err) < 0)
            return -1;
    }
    memcpy(made, table, (size_t)dim * sizeof *table);
    for (int64_t i = 0; i < down; i++) {
        taps y = taps_of(i, down, grid);
        for (int64_t j = 0; j < across; j++) {
            taps x = taps_of(j, across, grid);
            interpolate(made + (1 + i * across + j) * dim, table + dim, grid, dim, &y, &x);
        }
    }
    return b2_bring_in(ctx, positions, b2_tensor_of(made, 1 + down * across, dim), err);
}
