/* out [N, Dout] = act(x [N, Din] . w^T + bias) + residual on a device: which kernels.
 *
 *   few rows (1..16)          few_rows.cu, few_floats.cu: activations lose nothing; a row's result is the same however many
 *                             of up to 16 rows there are
 *   more, F16, BF16           x is rounded to the weight's type (float16 with a power of two for each row), then cuBLASLt
 *                             where there is one, else tiles.cu
 *   more, I8, I4              x to float16 likewise, tiles.cu
 *   more, F32                 cuBLASLt, else float_tiles.cu: fp32 either way
 *
 * Above 16 rows a row's result depends on no other row's values; it may depend, in its last bits, on how many there are,
 * since cuBLASLt and tiles.cu choose by shape. ctx->rows_are and item_rows change nothing here.
 *
 * Memory: rounded rows, products before their residual where that lies in `out`, and the library's work space, from
 * ctx->activations, for at most GROUP_ROWS rows at a time. */
#include "ops/cuda/cublas.h"
#include "ops/cuda/cuda_ops.h"
#include "ops/cuda/mma.h"
#include "ops/cuda/products.h"

enum { GROUP_ROWS = 4096, THREADS = 256, JOIN_PER_THREAD = 4, JOIN_COLUMNS = THREADS * JOIN_PER_THREAD };

/* ---- rounding ---- */

/* One block, one row of x: out [rows, ld], scales [rows]. */
template <int TYPE> __global__ void __launch_bounds__(THREADS) round_rows_kernel(b2_product p, uint16_t *out, float *scales)
{
    __shared__ unsigned most;
    int row = (int)blockIdx.x;
    float scale = 1.0f, inverse = 1.0f;
    if (TYPE != B2_BF16) {
        if (threadIdx.x == 0)
            most = 0;
        __syncthreads();
        unsigned largest = 0;
        for (int j = (int)threadIdx.x * 4; j < p.ld; j += THREADS * 4)
            largest = max(largest, b2_largest(b2_load_x(p, row, j)));
        largest = __reduce_max_sync(0xffffffffu, largest);
        if (threadIdx.x % 32 == 0)
            atomicMax(&most, largest);
        __syncthreads();
        b2_row_scale(&scale, &inverse, most);
        if (threadIdx.x == 0)
            scales[row] = inverse;
    }
    for (int j = (int)threadIdx.x * 8; j < p.ld; j += THREADS * 8) {
        float4 low = b2_load_x(p, row, j), high = b2_load_x(p, row, j + 4);
        float v[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        uint16_t h[8], ordered[8];
#pragma unroll
        for (int i = 0; i < 8; i++)
            h[i] = TYPE == B2_BF16 ? b2_to_bfloat(v[i]) : b2_to_half(v[i] * scale);
        if (TYPE == B2_I4)
            b2_int4_order(ordered, h);
        else
#pragma unroll
            for (int i = 0; i < 8; i++)
                ordered[i] = h[i];
        *(uint4 *)(out + row * (int64_t)p.ld + j) =
            make_uint4(ordered[0] | (unsigned)ordered[1] << 16, ordered[2] | (unsigned)ordered[3] << 16,
                       ordered[4] | (unsigned)ordered[5] << 16, ordered[6] | (unsigned)ordered[7] << 16);
    }
}

static int round_rows(b2_ctx *ctx, b2_rounded *rounded, const b2_product *p, b2_dtype dtype, b2_err *err)
{
    uint16_t *x = (uint16_t *)b2_cuda_take(ctx, (size_t)p->rows * (size_t)p->ld, sizeof(uint16_t), err);
    float *scales = (float *)b2_cuda_take(ctx, (size_t)p->rows, sizeof(float), err);
    if (!x || !scales)
        return -1;
    void (*kernel)(b2_product, uint16_t *, float *) = dtype == B2_BF16 ? round_rows_kernel<B2_BF16>
                                                      : dtype == B2_I4 ? round_rows_kernel<B2_I4>
                                                                       : round_rows_kernel<B2_F16>;
    B2_LAUNCH(kernel, dim3((unsigned)p->rows), dim3(THREADS), 0, b2_cuda_stream(ctx), *p, x, scales);
    rounded->x = x;
    rounded->scales = dtype == B2_BF16 ? NULL : scales;
    return b2_cuda_launched("round_rows", err);
}

/* ---- joining ---- */

__global__ void __launch_bounds__(THREADS) join_kernel(b2_product p, const float *parts, int count, int64_t part_ld,
                                                       const float *row_scales, const float *channel_scales, int columns)
{
    int row = (int)(blockIdx.x / (unsigned)columns), first = (int)(blockIdx.x % (unsigned)columns) * JOIN_COLUMNS;
    float row_scale = row_scales ? row_scales[row] : 1.0f;
#pragma unroll
    for (int i = 0; i < JOIN_PER_THREAD; i++) {
        int column = first + i * THREADS + (int)threadIdx.x;
        if (column >= p.n)
            continue;
        const float *part = parts + row * part_ld + column;
        float sum = part[0];
        for (int c = 1; c < count; c++)
            sum = __fadd_rn(sum, part[c * (int64_t)p.rows * part_ld]);
        b2_finish(p, row, column, __fmul_rn(sum, row_scale), channel_scales ? channel_scales[column] : 1.0f);
    }
}

int b2_products_join(b2_ctx *ctx, const b2_product *p, const float *parts, int count, int64_t part_ld,
                     const float *row_scales, const float *channel_scales, b2_err *err)
{
    int columns = b2_div_up(p->n, JOIN_COLUMNS);
    B2_LAUNCH(join_kernel, dim3((unsigned)(p->rows * columns)), dim3(THREADS), 0, b2_cuda_stream(ctx), *p, parts, count,
              part_ld, row_scales, channel_scales, columns);
    return b2_cuda_launched("join", err);
}

/* ---- cuBLASLt ---- */

/* Is there anything left to do when out holds x . w^T? */
static int is_bare(const b2_product *p)
{
    return !p->bias && !p->residual && p->act == B2_ACT_NONE;
}

/* 0, 1 where the library can't do this product, or -1. `x` [rows, ld] of dtype. */
static int by_library(b2_ctx *ctx, const b2_product *p, b2_dtype dtype, const void *x, int64_t x_ld,
                      const float *row_scales, b2_err *err)
{
    size_t mark = b2_arena_mark(ctx->activations);
    float *sums = p->out;
    int64_t sums_ld = p->out_ld;
    if (p->residual == p->out) {
        if (b2_arena_cost((size_t)p->rows * (size_t)p->n, sizeof(float)) > b2_products_left(ctx))
            return 1;
        sums = (float *)b2_cuda_take(ctx, (size_t)p->rows * (size_t)p->n, sizeof(float), err);
        sums_ld = p->n;
        if (!sums)
            return -1;
    }
    b2_cublas_product product = {.out = sums, .out_ld = sums_ld, .x = x, .x_ld = x_ld, .w = p->w, .w_ld = p->ld,
                                 .dtype = dtype, .rows = p->rows, .n = p->n, .k = dtype == B2_F32 ? p->k : p->ld};
    int status = b2_cublas_multiply(ctx, &product, err);
    if (status == 0 && (row_scales || !is_bare(p)))
        status = b2_products_join(ctx, p, sums, 1, sums_ld, row_scales, NULL, err);
    b2_arena_reset(ctx->activations, mark);
    return status;
}

/* ---- */

static int many_floats(b2_ctx *ctx, const b2_product *p, b2_err *err)
{
    int status = p->column_scales ? 1 : by_library(ctx, p, B2_F32, p->x, p->x_ld, NULL, err);
    return status == 1 ? b2_products_float_tiles(ctx, p, err) : status;
}

static int many_halves(b2_ctx *ctx, const b2_product *p, b2_dtype dtype, b2_err *err)
{
    b2_rounded x;
    if (round_rows(ctx, &x, p, dtype, err) < 0)
        return -1;
    int status = b2_dtype_is_quantised(dtype) ? 1 : by_library(ctx, p, dtype, x.x, p->ld, x.scales, err);
    return status == 1 ? b2_products_tiles(ctx, p, dtype, &x, err) : status;
}

static int multiply(b2_ctx *ctx, const b2_product *p, b2_dtype dtype, b2_err *err)
{
    if (p->rows <= B2_CUDA_FEW_ROWS)
        return dtype == B2_F32 ? b2_products_few_floats(ctx, p, err) : b2_products_few(ctx, p, dtype, err);
    for (int row = 0; row < p->rows; row += GROUP_ROWS) {
        size_t mark = b2_arena_mark(ctx->activations);
        b2_product part = b2_product_rows(*p, row, b2_least(GROUP_ROWS, p->rows - row));
        int status = dtype == B2_F32 ? many_floats(ctx, &part, err) : many_halves(ctx, &part, dtype, err);
        b2_arena_reset(ctx->activations, mark);
        if (status < 0)
            return -1;
    }
    return 0;
}

/* For few rows the weights are what is waited for: they take as long as some hundred. */
static double work_of(const b2_product *p, b2_dtype dtype)
{
    const double few = 256.0, float_costs = 8.0;
    double rows = p->rows < few ? few : p->rows;
    return rows * p->n * p->k * (dtype == B2_F32 ? float_costs : 1.0);
}

static int check_weight(const b2_weight *w, int64_t rows, b2_err *err)
{
    enum { MOST = 1 << 30 };
    const char *name = w->name ? w->name : "weight";
    if (w->layout != B2_STRIDED)
        return b2_fail(err, B2_E_INTERNAL, "linear: %s is not held as devices read it (layout %d)", name, (int)w->layout);
    if (w->k < 1 || w->n < 1)
        return b2_fail(err, B2_E_VALUE, "linear: weight %s is empty: [%lld, %lld]", name, (long long)w->n,
                       (long long)w->k);
    if (w->k > MOST || w->n > MOST || rows > MOST)
        return b2_fail(err, B2_E_UNSUPPORTED, "linear: %lld rows times %s [%lld, %lld]: more than %d", (long long)rows, name,
                       (long long)w->n, (long long)w->k, (int)MOST);
    return 0;
}

int b2_cuda_linear(b2_ctx *ctx, b2_tensor out, b2_tensor x, const b2_weight *w, const b2_linear_opts *opts, b2_err *err)
{
    if (check_weight(w, x.rows, err) < 0)
        return -1;
    b2_product p = {};
    p.out = out.data;
    p.out_ld = out.ld;
    p.x = x.data;
    p.x_ld = x.ld;
    p.w = w->data;
    p.scales = w->scales;
    p.column_scales = w->column_scales;
    p.bias = opts->bias && opts->bias->data ? (const float *)opts->bias->data : NULL;
    p.residual = opts->residual.data;
    p.residual_ld = opts->residual.ld;
    p.rows = (int)x.rows;
    p.n = (int)w->n;
    p.k = (int)w->k;
    p.ld = (int)b2_strided_ld(w->k);
    p.act = opts->act;
    p.aligned = (uintptr_t)x.data % 16 == 0 && x.ld % 4 == 0;
    return multiply(ctx, &p, w->dtype, err) < 0 ? -1 : b2_cuda_pace_on(ctx, work_of(&p, w->dtype), err);
}

size_t b2_cuda_linear_scratch(const b2_ctx *ctx, int64_t max_rows, int64_t max_width)
{
    (void)ctx;
    size_t rows = (size_t)b2_least(max_rows, GROUP_ROWS), width = (size_t)b2_strided_ld(max_width);
    size_t few = b2_products_few_scratch(max_rows, max_width);
    size_t sums = b2_arena_cost(rows * width, sizeof(float)), most = B2_CUBLAS_SPACE;
    size_t library = sums < most ? sums : most;
    size_t many = b2_arena_cost(rows * width, sizeof(uint16_t)) + b2_arena_cost(rows, sizeof(float)) + sums + library;
    return few > many ? few : many;
}
