/* out [M, n] = act(x . w^T + bias) + residual for many rows, on the tensor cores: x has been rounded to 16 bits (linear.cu),
 * weights are F16, BF16, I8 or I4, sums are fp32. Whole numbers become float16 (exactly) on their way into the tensor cores;
 * the scales of I4 multiply the sum of each group, those of I8 the whole sum.
 *
 * How: a block computes CHANNELS output channels (A of the tensor cores) for 32, 64 or 128 rows of x (B). Tiles of BLOCK
 * columns of both arrive in shared memory STAGES - 1 ahead. They lie there as [row][32 columns] side by side, from which a
 * lane reads eight neighbouring columns at once, so that no two lanes of a quarter warp meet in a bank. Where the grid would
 * leave most of the card idle, blockIdx.z shares out the columns; another kernel adds the parts.
 *
 * A row's result does not depend on the other rows, but (through the parts) on how many there are.
 *
 * Memory: parts from ctx->activations, given back before returning. */
#include "ops/cuda/mma.h"
#include "ops/cuda/products.h"

enum {
    THREADS = 256,
    CHANNELS = 128,
    HALF_BLOCK = 32, /* columns that lie together */
    HALVES = 2,
    BLOCK = HALF_BLOCK * HALVES,
    STAGES = 3,
    WARP_ROWS = 32,  /* rows of x that a warp takes */
    FRAGMENTS = WARP_ROWS / 8,
    SUM_LD = CHANNELS + 4, /* of the sums of a tile in shared memory: no two lanes of a warp in one bank */
    MOST_PARTS = 8
};

/* Bytes of 32 columns of one output channel. */
static __host__ __device__ constexpr int channel_bytes(int type)
{
    return type == B2_I4 ? 16 : type == B2_I8 ? 32 : 64;
}

struct tiles {
    b2_product p;
    b2_rounded x;
    float *parts;          /* [gridDim.z, rows, n], or NULL */
    int blocks, per_part;  /* of BLOCK columns: in all, and of one part */
};

template <int TYPE, int ROWS> struct stage_of {
    unsigned char w[HALVES][CHANNELS][channel_bytes(TYPE)];
    uint16_t x[HALVES][ROWS][HALF_BLOCK];
    uint16_t scales[HALVES][TYPE == B2_I4 ? CHANNELS : 8];
};

/* Begins to copy block `block` of columns. */
template <int TYPE, int ROWS>
static __device__ __forceinline__ void fetch(stage_of<TYPE, ROWS> *stage, const tiles &a, int row, int channel, int block)
{
    enum { PIECES = channel_bytes(TYPE) / 16 };
    int64_t ld_bytes = (int64_t)a.p.ld / HALF_BLOCK * channel_bytes(TYPE);
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
        int column = block * BLOCK + half * HALF_BLOCK;
#pragma unroll
        for (int step = 0; step < CHANNELS * PIECES; step += THREADS) {
            int i = step + (int)threadIdx.x;
            if (CHANNELS * PIECES < THREADS && i >= CHANNELS * PIECES)
                break;
            bool there = channel + i / PIECES < a.p.n && column < a.p.ld;
            int64_t from = (channel + i / PIECES) * ld_bytes + column / HALF_BLOCK * channel_bytes(TYPE) + i % PIECES * 16;
            b2_copy16(&stage->w[half][i / PIECES][i % PIECES * 16], (const char *)a.p.w + (there ? from : 0),
                      there ? 16 : 0);
        }
#pragma unroll
        for (int step = 0; step < ROWS * 4; step += THREADS) {
            int i = step + (int)threadIdx.x;
            if (ROWS * 4 < THREADS && i >= ROWS * 4)
                break;
            bool there = row + i / 4 < a.p.rows && column < a.p.ld;
            const uint16_t *from = a.x.x + (there ? (row + i / 4) * (int64_t)a.p.ld + column + i % 4 * 8 : 0);
            b2_copy16(&stage->x[half][i / 4][i % 4 * 8], from, there ? 16 : 0);
        }
    }
}

/* The scale of I4 that this thread brings for block `block`: of channel threadIdx.x / 2, half threadIdx.x % 2. */
static __device__ __forceinline__ uint16_t fetch_scale(const tiles &a, int channel, int block)
{
    int groups = a.p.ld / B2_CUDA_GROUP, group = block * HALVES + (int)threadIdx.x % HALVES;
    channel += (int)threadIdx.x / HALVES;
    bool there = channel < a.p.n && group < groups;
    return there ? ((const uint16_t *)a.p.scales)[channel * (int64_t)groups + group] : 0;
}

/* Eight columns of an output channel as four pairs of 16 bits. */
template <int TYPE> static __device__ __forceinline__ void read_channel(uint32_t out[4], const unsigned char *w)
{
    int t = (int)threadIdx.x % 4;
    if (TYPE == B2_I4) {
        b2_widen_int4(out, *(const uint32_t *)(w + t * 4));
    } else if (TYPE == B2_I8) {
        uint2 eight = *(const uint2 *)(w + t * 8);
        b2_widen_int8(out, eight.x);
        b2_widen_int8(out + 2, eight.y);
    } else {
        uint4 eight = *(const uint4 *)(w + t * 16);
        out[0] = eight.x, out[1] = eight.y, out[2] = eight.z, out[3] = eight.w;
    }
}

/* acc += 32 columns, for the warp's 16 TALL channels from `channel` of the tile on and its 32 rows from `row` on. */
template <int TYPE, int ROWS, int TALL>
static __device__ __forceinline__ void multiply(float acc[TALL][FRAGMENTS][4], const stage_of<TYPE, ROWS> *stage, int half,
                                                int channel, int row)
{
    int lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint4 b[FRAGMENTS];
#pragma unroll
    for (int j = 0; j < FRAGMENTS; j++)
        b[j] = *(const uint4 *)&stage->x[half][row + j * 8 + g][t * 8];
#pragma unroll
    for (int i = 0; i < TALL; i++) {
        int low_channel = channel + i * 16 + g;
        uint32_t low[4], high[4];
        read_channel<TYPE>(low, stage->w[half][low_channel]);
        read_channel<TYPE>(high, stage->w[half][low_channel + 8]);
        if (TYPE == B2_I4) {
            float scale = b2_from_half(stage->scales[half][low_channel]);
            float other = b2_from_half(stage->scales[half][low_channel + 8]);
#pragma unroll
            for (int j = 0; j < FRAGMENTS; j++) {
                float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                b2_mma<0>(sums, low[0], high[0], low[1], high[1], b[j].x, b[j].y);
                b2_mma<0>(sums, low[2], high[2], low[3], high[3], b[j].z, b[j].w);
                acc[i][j][0] = fmaf(sums[0], scale, acc[i][j][0]);
                acc[i][j][1] = fmaf(sums[1], scale, acc[i][j][1]);
                acc[i][j][2] = fmaf(sums[2], other, acc[i][j][2]);
                acc[i][j][3] = fmaf(sums[3], other, acc[i][j][3]);
            }
        } else {
#pragma unroll
            for (int j = 0; j < FRAGMENTS; j++) {
                b2_mma<TYPE == B2_BF16>(acc[i][j], low[0], high[0], low[1], high[1], b[j].x, b[j].y);
                b2_mma<TYPE == B2_BF16>(acc[i][j], low[2], high[2], low[3], high[3], b[j].z, b[j].w);
            }
        }
    }
}

/* The end of the elements of a tile, sums [ROWS][SUM_LD]: neighbouring threads have neighbouring channels. */
template <int TYPE, int ROWS>
static __device__ __forceinline__ void finish(const tiles &a, const float *sums, int first_row, int first_channel)
{
    int channel = first_channel + (int)threadIdx.x % CHANNELS, line = (int)threadIdx.x / CHANNELS;
    if (channel >= a.p.n)
        return;
    float scale = TYPE == B2_I8 && !a.parts ? ((const float *)a.p.scales)[channel] : 1.0f;
#pragma unroll 2
    for (; line < ROWS && first_row + line < a.p.rows; line += THREADS / CHANNELS) {
        int row = first_row + line;
        float value = sums[line * SUM_LD + (int)threadIdx.x % CHANNELS];
        if (a.parts)
            a.parts[((int64_t)blockIdx.z * a.p.rows + row) * a.p.n + channel] = value;
        else
            b2_finish(a.p, row, channel, a.x.scales ? __fmul_rn(value, a.x.scales[row]) : value, scale);
    }
}

template <int TYPE, int ROWS> __global__ void __launch_bounds__(THREADS, 2) tiles_kernel(tiles a)
{
    enum { ACROSS = ROWS / WARP_ROWS, TALL = ACROSS }; /* warps side by side over rows; 8 / ACROSS over channels */
    typedef stage_of<TYPE, ROWS> stage_type;
    B2_DYNAMIC_SHARED(stage_type, ring);
    int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int row = (int)blockIdx.x * ROWS, channel = (int)blockIdx.y * CHANNELS;
    int warp_row = warp % ACROSS * WARP_ROWS, warp_channel = warp / ACROSS * 16 * TALL;
    int first = (int)blockIdx.z * a.per_part, end = min(first + a.per_part, a.blocks);
    float acc[TALL][FRAGMENTS][4] = {};

    uint16_t scale = 0; /* of the block that is copied next but one: it is stored a block after it is asked for */
    for (int i = 0; i < STAGES - 1; i++) {
        if (first + i < end)
            fetch<TYPE, ROWS>(ring + i, a, row, channel, first + i);
        b2_copy_commit();
        if (TYPE == B2_I4)
            ring[i].scales[threadIdx.x % HALVES][threadIdx.x / HALVES] = fetch_scale(a, channel, first + i);
    }
    for (int block = first; block < end; block++) {
        int stage = (block - first) % STAGES, free_stage = (block - first + STAGES - 1) % STAGES;
        b2_copy_wait<STAGES - 2>();
        __syncthreads();
        if (TYPE == B2_I4 && block > first) /* read after the next barrier at the earliest */
            ring[(block - first + STAGES - 2) % STAGES].scales[threadIdx.x % HALVES][threadIdx.x / HALVES] = scale;
        if (TYPE == B2_I4)
            scale = fetch_scale(a, channel, block + STAGES - 1);
        if (block + STAGES - 1 < end)
            fetch<TYPE, ROWS>(ring + free_stage, a, row, channel, block + STAGES - 1);
        b2_copy_commit();
#pragma unroll 1 /* both at once would not fit into 128 registers */
        for (int half = 0; half < HALVES; half++)
            multiply<TYPE, ROWS, TALL>(acc, ring + stage, half, warp_channel, warp_row);
    }
    b2_copy_wait<0>();
    __syncthreads(); /* the ring is free */
    float *sums = (float *)ring;
#pragma unroll
    for (int i = 0; i < TALL; i++)
#pragma unroll
        for (int j = 0; j < FRAGMENTS; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                sums[(warp_row + j * 8 + 2 * t + e % 2) * SUM_LD + warp_channel + i * 16 + g + e / 2 * 8] = acc[i][j][e];
    __syncthreads();
    finish<TYPE, ROWS>(a, sums, row, channel);
}

/* ---- host ---- */

typedef void (*tiles_fn)(tiles);

/* Shared memory: the ring, and after it has been used the sums. */
template <int TYPE, int ROWS> static tiles_fn kernel_with(size_t *shared)
{
    size_t ring = STAGES * sizeof(stage_of<TYPE, ROWS>), sums = sizeof(float) * ROWS * SUM_LD;
    *shared = ring > sums ? ring : sums;
    return tiles_kernel<TYPE, ROWS>;
}

template <int TYPE> static tiles_fn kernel_of(int rows, size_t *shared)
{
    return rows == 32   ? kernel_with<TYPE, 32>(shared)
           : rows == 64 ? kernel_with<TYPE, 64>(shared)
                        : kernel_with<TYPE, 128>(shared);
}

/* Into how many parts to cut the columns, so that the card has work: each at least four blocks long, and what the parts
 * take must fit into the arena. */
static int parts_of(const b2_ctx *ctx, const b2_product *p, int grid, int blocks)
{
    size_t part = (size_t)p->rows * (size_t)p->n * sizeof(float), left = b2_products_left(ctx);
    int parts = b2_least(MOST_PARTS, 2 * b2_cuda_of(ctx)->multiprocessors / grid);
    parts = b2_least(parts, blocks / 4);
    parts = b2_least(parts, left < 64 ? 0 : (int64_t)((left - 64) / part));
    return parts > 1 ? parts : 1;
}

int b2_products_tiles(b2_ctx *ctx, const b2_product *p, b2_dtype dtype, const b2_rounded *x, b2_err *err)
{
    size_t mark = b2_arena_mark(ctx->activations), shared;
    tiles a = {.p = *p, .x = *x, .parts = NULL, .blocks = b2_div_up(p->ld, BLOCK), .per_part = 0};
    int channel_tiles = b2_div_up(p->n, CHANNELS);
    int rows = p->rows <= 32 ? 32 : p->rows <= 64 || b2_div_up(p->rows, 128) * channel_tiles < 66 ? 64 : 128;
    tiles_fn kernel = dtype == B2_F16    ? kernel_of<B2_F16>(rows, &shared)
                      : dtype == B2_BF16 ? kernel_of<B2_BF16>(rows, &shared)
                      : dtype == B2_I8   ? kernel_of<B2_I8>(rows, &shared)
                                         : kernel_of<B2_I4>(rows, &shared);
    int row_tiles = b2_div_up(p->rows, rows), parts = parts_of(ctx, p, row_tiles * channel_tiles, a.blocks);
    a.per_part = b2_div_up(a.blocks, parts);
    parts = b2_div_up(a.blocks, a.per_part);
    if (parts > 1) {
        a.parts = (float *)b2_cuda_take(ctx, (size_t)parts * (size_t)p->rows * (size_t)p->n, sizeof(float), err);
        if (!a.parts)
            return -1;
    }
    int status = b2_cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared),
                               "tiles shared memory", err);
    if (status == 0) {
        dim3 grid((unsigned)row_tiles, (unsigned)channel_tiles, (unsigned)parts);
        B2_LAUNCH(kernel, grid, dim3(THREADS), shared, b2_cuda_stream(ctx), a);
        status = b2_cuda_launched("tiles", err);
    }
    if (status == 0 && parts > 1)
        status = b2_products_join(ctx, p, a.parts, parts, p->n, x->scales,
                                  dtype == B2_I8 ? (const float *)p->scales : NULL, err);
    b2_arena_reset(ctx->activations, mark);
    return status;
}
