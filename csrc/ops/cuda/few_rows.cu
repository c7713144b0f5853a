/* out [M, n] = act(x . w^T + bias) + residual for M <= 16 rows and weights of F16, BF16, I8 or I4: what a step of decoding
 * does, limited by reading the weights once.
 *
 * Activations lose nothing: x is split into float16 high and low parts (with a power of two for each row and chunk of
 * columns, so that nothing overflows; 2^-23 of an element or 2^-40 of the largest is what is dropped) or into three bfloat16
 * parts (exact), and the tensor cores multiply each part with the weights as they are stored: A is 16 output channels, B up
 * to 8 rows of x. Whole numbers of I8 and I4 are exact in float16; scales come after the sum: in I4 after each group.
 *
 * How: a block streams tiles of 16 output channels. Its 8 warps share out the columns, STEP<TYPE> at a time; every lane
 * copies 16 bytes of channels g and g + 8 into a ring in shared memory, STAGES steps ahead and on across tiles, and reads
 * back its own bytes. Where all of x fits into shared memory beside the ring, a block keeps it and runs all chunks; else each
 * block has one chunk and the sums of chunks are added by a second kernel.
 *
 * Same bits: an element is the sum over chunks (ascending) of the sum over warps (ascending) of a warp's steps. Chunks and
 * steps depend on k and the weight's type alone, so a row's result depends neither on the other rows nor on their number up
 * to 16, nor on the card.
 *
 * Memory: sums of chunks from ctx->activations, given back before returning. */
#include "ops/cuda/mma.h"
#include "ops/cuda/products.h"

enum {
    WARPS = 8,
    THREADS = 32 * WARPS,
    STAGES = 5,
    TILE = 16,          /* output channels of a tile: rows of A */
    GROUP_ROWS = 8,     /* rows of x that one tensor-core product takes: columns of B */
    MOST_CHUNK = 2560,  /* columns of a chunk at most */
    CHUNK_UNIT = 256,   /* chunks are multiples of it */
    RING_BYTES = STAGES * 2 * THREADS * 16,
    SUM_LD = 20,        /* distance of two rows of x among the sums of warps: no two lanes of a warp in one bank */
    MOST_PAIRS = 64     /* rows times chunks that a block stages */
};

/* Columns that a warp takes in one step: 16 bytes of each of its 4 lanes of a channel. */
static __host__ __device__ constexpr int step_columns(int type)
{
    return type == B2_I8 ? 64 : type == B2_I4 ? 128 : 32;
}

/* Parts that x is split into. */
static __host__ __device__ constexpr int planes(int type)
{
    return type == B2_BF16 ? 3 : 2;
}

/* Elements between chunks' ends that keep lanes out of each other's banks: they read 16 bytes at [row][t], for I8 at
 * [row][2t]. */
static __host__ __device__ constexpr int plane_padding(int type)
{
    return type == B2_I8 ? 8 : 32;
}

struct few_rows {
    b2_product p;
    float *parts;         /* [chunks, rows, n]: blocks have one chunk, blockIdx.y; NULL: all */
    int chunk;            /* columns */
    int chunks;
    int tiles, tiles_per_block;
};

struct block_plan {
    int first_chunk, end_chunk, tile_end, steps; /* steps: of one tile and chunk */
};

/* Where a warp is on its way through the block's tiles, chunks and steps, and where this lane finds its part of the weights:
 * the pointers are moved, not computed, from step to step. */
struct cursor {
    int tile, chunk, step;
    int room;                   /* columns of the chunk from the warp's first one on: <= 0: this step has none */
    const char *w[2];           /* 16 bytes of channels g and g + 8; beyond the last channel: of the last */
    const uint16_t *scales[2];  /* I4: of the lane's group of these channels (t counts groups) */
};

static __device__ __forceinline__ int64_t row_bytes(int type, int ld)
{
    return type == B2_I4 ? ld / 2 : type == B2_I8 ? ld : 2 * (int64_t)ld;
}

/* To the first step of the cursor's tile and chunk. */
template <int TYPE> static __device__ __forceinline__ void enter(cursor &at, const few_rows &a, const block_plan &plan)
{
    int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int first = at.chunk * a.chunk, column = first + warp * step_columns(TYPE);
    at.step = 0;
    at.room = at.tile < plan.tile_end ? min(a.chunk, a.p.ld - first) - warp * step_columns(TYPE) : 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int64_t channel = min(at.tile * TILE + half * 8 + g, a.p.n - 1);
        at.w[half] = (const char *)a.p.w + channel * row_bytes(TYPE, a.p.ld) + row_bytes(TYPE, column) + t * 16;
        if (TYPE == B2_I4)
            at.scales[half] = (const uint16_t *)a.p.scales + channel * (a.p.ld / B2_CUDA_GROUP) + column / B2_CUDA_GROUP + t;
    }
}

template <int TYPE> static __device__ __forceinline__ void advance(cursor &at, const few_rows &a, const block_plan &plan)
{
    if (++at.step == plan.steps) {
        if (++at.chunk == plan.end_chunk) {
            at.chunk = plan.first_chunk;
            at.tile++;
        }
        enter<TYPE>(at, a, plan);
        return;
    }
    at.room -= WARPS * step_columns(TYPE);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        at.w[half] += WARPS * 64; /* four lanes' 16 bytes of each warp */
        if (TYPE == B2_I4)
            at.scales[half] += WARPS * 4;
    }
}

/* Where a lane's 16 bytes lie in the ring. Lanes of I4 read four bytes of each other's: the order keeps them out of one
 * bank. */
template <int TYPE> static __device__ __forceinline__ int ring_slot()
{
    int lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4;
    return (int)threadIdx.x - lane + (TYPE == B2_I4 ? g * 4 + (t ^ (g >> 1 & 3)) : lane);
}

/* Begins to copy the weights of a step; zeros where it has none. */
template <int TYPE> static __device__ __forceinline__ void fetch(uint4 *stage, const cursor &at)
{
    int t = (int)threadIdx.x % 4, slot = ring_slot<TYPE>();
    bool there = at.room > t * (step_columns(TYPE) / 4);
    b2_copy16(stage + slot, at.w[0], there ? 16 : 0);
    b2_copy16(stage + THREADS + slot, at.w[1], there ? 16 : 0);
    if (TYPE == B2_I4 && t == 0 && there) {
        b2_prefetch_l2(at.scales[0]);
        b2_prefetch_l2(at.scales[1]);
    }
}

/* ---- x into parts of 16 bits ---- */

/* Splits eight columns of a row: out[plane] as four words. */
template <int TYPE> static __device__ __forceinline__ void split(uint4 out[planes(TYPE)], float4 low, float4 high, float scale)
{
    float v[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int plane = 0; plane < planes(TYPE); plane++) {
        uint16_t h[8], ordered[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (TYPE == B2_BF16) { /* cut off, not rounded: eight bits at a time are all of a float's 24 */
                float part = __uint_as_float(__float_as_uint(v[i]) & 0xffff0000u);
                h[i] = (uint16_t)(__float_as_uint(part) >> 16);
                v[i] -= part;
            } else {
                h[i] = b2_to_half(plane == 0 ? v[i] * scale : v[i]);
                v[i] = v[i] * (plane == 0 ? scale : 1.0f) - b2_from_half(h[i]);
            }
        }
        if (TYPE == B2_I4)
            b2_int4_order(ordered, h);
        else
#pragma unroll
            for (int i = 0; i < 8; i++)
                ordered[i] = h[i];
        out[plane] = make_uint4(ordered[0] | (unsigned)ordered[1] << 16, ordered[2] | (unsigned)ordered[3] << 16,
                                ordered[4] | (unsigned)ordered[5] << 16, ordered[6] | (unsigned)ordered[7] << 16);
    }
}

/* Eight columns of a row that a thread stages; the next ones are THREADS * 8 further on. */
struct octet {
    int row, column, chunk; /* column and chunk: of the block's */
};

static __device__ __forceinline__ void settle(octet &at, int columns, int chunk)
{
    while (at.column >= columns) {
        at.column -= columns;
        at.chunk = 0;
        at.row++;
    }
    while (at.column >= (at.chunk + 1) * chunk)
        at.chunk++;
}

/* All rows and the block's chunks into x [planes][rows][x_ld]; inverse [rows * chunks of the block]. */
template <int TYPE>
static __device__ void stage_x(uint16_t *x, int x_ld, float *inverse, unsigned *most, const few_rows &a,
                               const block_plan &plan)
{
    int chunks = plan.end_chunk - plan.first_chunk, columns = chunks * a.chunk, first = plan.first_chunk * a.chunk;
    octet start = {0, (int)threadIdx.x * 8, 0};
    settle(start, columns, a.chunk);
    if (TYPE != B2_BF16) {
        if (threadIdx.x < MOST_PAIRS)
            most[threadIdx.x] = 0;
        __syncthreads();
        for (octet at = start; at.row < a.p.rows;) { /* a warp's 32 octets lie in one row and chunk */
            unsigned largest = max(b2_largest(b2_load_x(a.p, at.row, first + at.column)),
                                   b2_largest(b2_load_x(a.p, at.row, first + at.column + 4)));
            largest = __reduce_max_sync(0xffffffffu, largest);
            if (threadIdx.x % 32 == 0)
                atomicMax(&most[at.row * chunks + at.chunk], largest);
            at.column += THREADS * 8;
            settle(at, columns, a.chunk);
        }
        __syncthreads();
    }
    for (octet at = start; at.row < a.p.rows;) {
        float scale = 1.0f, back = 1.0f;
        uint4 parts[planes(TYPE)];
        if (TYPE != B2_BF16)
            b2_row_scale(&scale, &back, most[at.row * chunks + at.chunk]);
        split<TYPE>(parts, b2_load_x(a.p, at.row, first + at.column), b2_load_x(a.p, at.row, first + at.column + 4), scale);
        if (at.column == at.chunk * a.chunk)
            inverse[at.row * chunks + at.chunk] = back;
#pragma unroll
        for (int plane = 0; plane < planes(TYPE); plane++)
            *(uint4 *)(x + (plane * a.p.rows + at.row) * x_ld + at.column) = parts[plane];
        at.column += THREADS * 8;
        settle(at, columns, a.chunk);
    }
    __syncthreads();
}

/* ---- products ---- */

/* acc += 32 columns: eight of each lane, `w` those of channels g and g + 8 as float16, x at the same ones. */
template <int TYPE, int GROUPS>
static __device__ __forceinline__ void multiply(float acc[GROUPS][4], const uint32_t low[4], const uint32_t high[4],
                                                const uint16_t *x, int x_ld, int rows)
{
    int g = (int)threadIdx.x % 32 / 4;
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        int row = min(group * GROUP_ROWS + g, rows - 1); /* what is computed of rows beyond the last is left */
#pragma unroll
        for (int plane = 0; plane < planes(TYPE); plane++) {
            uint4 b = *(const uint4 *)(x + (plane * rows + row) * x_ld);
            b2_mma<TYPE == B2_BF16>(acc[group], low[0], high[0], low[1], high[1], b.x, b.y);
            b2_mma<TYPE == B2_BF16>(acc[group], low[2], high[2], low[3], high[3], b.z, b.w);
        }
    }
}

template <int GROUPS> static __device__ __forceinline__ void clear(float acc[GROUPS][4])
{
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            acc[group][i] = 0.0f;
}

/* I4: the scales of the lane's group of channels g (low half) and g + 8, for the lanes to hand round. */
static __device__ __forceinline__ unsigned fetch_scales(const cursor &at)
{
    int t = (int)threadIdx.x % 4;
    return at.room > t * B2_CUDA_GROUP ? *at.scales[0] | (unsigned)*at.scales[1] << 16 : 0;
}

/* acc += one step. `x` points to the step's first column of the first row and plane. */
template <int TYPE, int GROUPS>
static __device__ __forceinline__ void run_step(float acc[GROUPS][4], const uint4 *stage, const uint16_t *x, int x_ld,
                                                int rows, unsigned scales)
{
    int lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4;
    if constexpr (TYPE == B2_I4) {
        const uint32_t *words = (const uint32_t *)(stage + threadIdx.x - lane);
#pragma unroll
        for (int group = 0; group < 4; group++) {
            int at = (g * 4 + (group ^ (g >> 1 & 3))) * 4 + t;
            uint32_t low[4], high[4];
            float sums[GROUPS][4];
            b2_widen_int4(low, words[at]);
            b2_widen_int4(high, words[THREADS * 4 + at]);
            clear<GROUPS>(sums);
            multiply<TYPE, GROUPS>(sums, low, high, x + group * B2_CUDA_GROUP + t * 8, x_ld, rows);
            unsigned both = __shfl_sync(0xffffffffu, scales, g * 4 + group);
            float scale = b2_from_half((uint16_t)both), other = b2_from_half((uint16_t)(both >> 16));
#pragma unroll
            for (int i = 0; i < GROUPS; i++) {
                acc[i][0] = fmaf(sums[i][0], scale, acc[i][0]);
                acc[i][1] = fmaf(sums[i][1], scale, acc[i][1]);
                acc[i][2] = fmaf(sums[i][2], other, acc[i][2]);
                acc[i][3] = fmaf(sums[i][3], other, acc[i][3]);
            }
        }
    } else {
        uint4 a = stage[threadIdx.x], b = stage[THREADS + threadIdx.x];
        uint32_t first[4] = {a.x, a.y, a.z, a.w}, second[4] = {b.x, b.y, b.z, b.w};
        if constexpr (TYPE == B2_I8) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint32_t low[4], high[4];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    b2_widen_int8(low + 2 * i, first[2 * half + i]);
                    b2_widen_int8(high + 2 * i, second[2 * half + i]);
                }
                multiply<TYPE, GROUPS>(acc, low, high, x + t * 16 + half * 8, x_ld, rows);
            }
        } else {
            multiply<TYPE, GROUPS>(acc, first, second, x + t * 8, x_ld, rows);
        }
    }
}

/* The warps' sums of a tile and chunk into one; thread = 16 * row of x + channel owns an element across chunks. */
template <int TYPE, int GROUPS>
static __device__ __forceinline__ void end_chunk(float *sums, float &total, const float acc[GROUPS][4],
                                                 const float *inverse, const few_rows &a, const block_plan &plan,
                                                 const cursor &at)
{
    enum { WARP_SUMS = GROUPS * GROUP_ROWS * SUM_LD };
    int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            sums[warp * WARP_SUMS + (group * GROUP_ROWS + 2 * t + i % 2) * SUM_LD + g + i / 2 * 8] = acc[group][i];
    __syncthreads();
    int row = (int)threadIdx.x / TILE, channel = at.tile * TILE + (int)threadIdx.x % TILE;
    if (row >= a.p.rows || channel >= a.p.n)
        return;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++)
        sum = __fadd_rn(sum, sums[w * WARP_SUMS + row * SUM_LD + threadIdx.x % TILE]);
    sum = __fmul_rn(sum, inverse[row * (plan.end_chunk - plan.first_chunk) + at.chunk - plan.first_chunk]);
    if (a.parts) {
        a.parts[((int64_t)at.chunk * a.p.rows + row) * a.p.n + channel] = sum;
        return;
    }
    total = at.chunk == 0 ? sum : __fadd_rn(total, sum);
    if (at.chunk + 1 == a.chunks)
        b2_finish(a.p, row, channel, total, TYPE == B2_I8 ? ((const float *)a.p.scales)[channel] : 1.0f);
}

/* Blocks that a multiprocessor's registers hold at once. */
static __host__ __device__ constexpr int blocks_at_once(int type, int groups)
{
    return type == B2_I4 || groups == 2 ? 2 : 3;
}

/* Shared memory: ring [STAGES][2][THREADS] of 16 bytes, sums [2][WARPS][8 GROUPS][SUM_LD], inverse [MOST_PAIRS],
 * most [MOST_PAIRS], x [planes][rows][columns + padding]. */
static constexpr size_t fixed_shared(int groups)
{
    return RING_BYTES + sizeof(float) * (2 * WARPS * GROUP_ROWS * SUM_LD * groups + 2 * MOST_PAIRS);
}

template <int TYPE, int GROUPS>
__global__ void __launch_bounds__(THREADS, blocks_at_once(TYPE, GROUPS)) few_rows_kernel(few_rows a)
{
    B2_DYNAMIC_SHARED(unsigned char, shared);
    enum { SUMS = WARPS * GROUP_ROWS * SUM_LD * GROUPS };
    uint4 *ring = (uint4 *)shared;
    float *sums = (float *)(shared + RING_BYTES), *inverse = sums + 2 * SUMS;
    unsigned *most = (unsigned *)(inverse + MOST_PAIRS);
    uint16_t *x = (uint16_t *)(most + MOST_PAIRS);

    block_plan plan;
    plan.first_chunk = a.parts ? blockIdx.y : 0;
    plan.end_chunk = a.parts ? blockIdx.y + 1 : a.chunks;
    plan.steps = (a.chunk + WARPS * step_columns(TYPE) - 1) / (WARPS * step_columns(TYPE));
    cursor at;
    at.tile = (int)blockIdx.x * a.tiles_per_block, at.chunk = plan.first_chunk;
    plan.tile_end = min(at.tile + a.tiles_per_block, a.tiles);
    enter<TYPE>(at, a, plan);
    cursor ahead = at;
    int x_ld = (plan.end_chunk - plan.first_chunk) * a.chunk + plane_padding(TYPE);

    for (int i = 0; i < STAGES - 1; i++) {
        fetch<TYPE>(ring + i * 2 * THREADS, ahead);
        b2_copy_commit();
        advance<TYPE>(ahead, a, plan);
    }
    unsigned scales = TYPE == B2_I4 ? fetch_scales(at) : 0;
    stage_x<TYPE>(x, x_ld, inverse, most, a, plan);
    x += (int)threadIdx.x / 32 * step_columns(TYPE);

    float acc[GROUPS][4], total = 0.0f;
    int stage = 0, parity = 0;
    clear<GROUPS>(acc);
    while (at.tile < plan.tile_end) {
        b2_copy_wait<STAGES - 2>();
        if (TYPE == B2_I4)
            __syncwarp(); /* what the other lanes copied has arrived; what they read is read */
        fetch<TYPE>(ring + (stage == 0 ? STAGES - 1 : stage - 1) * 2 * THREADS, ahead);
        b2_copy_commit();
        advance<TYPE>(ahead, a, plan);
        cursor now = at;
        unsigned present = scales;
        advance<TYPE>(at, a, plan);
        if (TYPE == B2_I4)
            scales = fetch_scales(at);
        if (now.room > 0)
            run_step<TYPE, GROUPS>(acc, ring + stage * 2 * THREADS,
                                   x + (now.chunk - plan.first_chunk) * a.chunk + now.step * (WARPS * step_columns(TYPE)),
                                   x_ld, a.p.rows, present);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        if (now.step + 1 == plan.steps) {
            end_chunk<TYPE, GROUPS>(sums + parity * SUMS, total, acc, inverse, a, plan, now);
            parity ^= 1;
            clear<GROUPS>(acc);
        }
    }
}

/* ---- host ---- */

typedef void (*few_rows_fn)(few_rows);

static few_rows_fn kernel_of(b2_dtype dtype, int groups)
{
    switch (dtype) {
    case B2_F16: return groups == 1 ? few_rows_kernel<B2_F16, 1> : few_rows_kernel<B2_F16, 2>;
    case B2_BF16: return groups == 1 ? few_rows_kernel<B2_BF16, 1> : few_rows_kernel<B2_BF16, 2>;
    case B2_I8: return groups == 1 ? few_rows_kernel<B2_I8, 1> : few_rows_kernel<B2_I8, 2>;
    default: return groups == 1 ? few_rows_kernel<B2_I4, 1> : few_rows_kernel<B2_I4, 2>;
    }
}

/* Chunks of like size. */
static int chunk_columns(int ld)
{
    return b2_div_up(b2_div_up(ld, b2_div_up(ld, MOST_CHUNK)), CHUNK_UNIT) * CHUNK_UNIT;
}

static size_t shared_bytes(b2_dtype dtype, int rows, int columns)
{
    int groups = rows > GROUP_ROWS ? 2 : 1;
    return fixed_shared(groups) + (size_t)planes(dtype) * (size_t)rows * (size_t)(columns + plane_padding(dtype)) * 2;
}

static int launch(b2_ctx *ctx, const few_rows *plan, b2_dtype dtype, int columns, b2_err *err)
{
    const b2_cuda *cuda = b2_cuda_of(ctx);
    few_rows a = *plan;
    int groups = a.p.rows > GROUP_ROWS ? 2 : 1, split = a.parts ? a.chunks : 1;
    size_t bytes = shared_bytes(dtype, a.p.rows, columns);
    /* As many blocks as the card holds at once, with like work: bandwidth is shared out by blocks. */
    int resident = b2_least(blocks_at_once(dtype, groups), (int64_t)((cuda->shared_per_block + 1024) / (bytes + 1024)));
    a.tiles = b2_div_up(a.p.n, TILE);
    a.tiles_per_block = b2_div_up((int64_t)a.tiles * split, (int64_t)cuda->multiprocessors * (resident > 1 ? resident : 1));
    few_rows_fn kernel = kernel_of(dtype, groups);
    if (b2_cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes),
                      "few_rows shared memory", err) < 0)
        return -1;
    dim3 grid((unsigned)b2_div_up(a.tiles, a.tiles_per_block), (unsigned)split);
    B2_LAUNCH(kernel, grid, dim3(THREADS), bytes, cuda->stream, a);
    return b2_cuda_launched("few_rows", err);
}

static int run_split(b2_ctx *ctx, few_rows *a, b2_dtype dtype, b2_err *err)
{
    size_t mark = b2_arena_mark(ctx->activations);
    a->parts = (float *)b2_cuda_take(ctx, (size_t)a->chunks * (size_t)a->p.rows * (size_t)a->p.n, sizeof(float), err);
    const float *channel_scales = dtype == B2_I8 ? (const float *)a->p.scales : NULL;
    int status = a->parts && launch(ctx, a, dtype, a->chunk, err) == 0
                     ? b2_products_join(ctx, &a->p, a->parts, a->chunks, a->p.n, NULL, channel_scales, err)
                     : -1;
    b2_arena_reset(ctx->activations, mark);
    return status;
}

/* The most rows of x that can be staged in `columns` columns at a time. */
static int rows_that_fit(const b2_cuda *cuda, b2_dtype dtype, int rows, int columns)
{
    while (rows > 1 && shared_bytes(dtype, rows, columns) > cuda->shared_per_block)
        rows--;
    return shared_bytes(dtype, rows, columns) > cuda->shared_per_block ? 0 : rows;
}

/* The rows from the first on that one launch takes (as many as it can), or -1. */
static int run_some(b2_ctx *ctx, const b2_product *p, b2_dtype dtype, b2_err *err)
{
    const b2_cuda *cuda = b2_cuda_of(ctx);
    few_rows a = {.p = *p, .parts = NULL, .chunk = chunk_columns(p->ld), .chunks = 0, .tiles = 0, .tiles_per_block = 0};
    a.chunks = b2_div_up(p->ld, a.chunk);
    int all = rows_that_fit(cuda, dtype, b2_least(p->rows, a.chunks > MOST_PAIRS ? 0 : MOST_PAIRS / a.chunks),
                            a.chunks * a.chunk);
    int one = a.chunks > 1 ? rows_that_fit(cuda, dtype, p->rows, a.chunk) : 0;
    size_t row_parts = (size_t)a.chunks * (size_t)p->n * sizeof(float), left = b2_products_left(ctx);
    one = b2_least(one, left < 64 ? 0 : (int64_t)((left - 64) / row_parts));
    if (all == 0 && one == 0)
        return b2_fail(err, B2_E_UNSUPPORTED, "linear: %d input channels are more than this device's kernels take", p->k);
    int rows = all >= one ? all : one;
    a.p = b2_product_rows(*p, 0, rows);
    int status = all >= one ? launch(ctx, &a, dtype, a.chunks * a.chunk, err) : run_split(ctx, &a, dtype, err);
    return status < 0 ? -1 : rows;
}

int b2_products_few(b2_ctx *ctx, const b2_product *p, b2_dtype dtype, b2_err *err)
{
    for (int row = 0; row < p->rows;) {
        b2_product rest = b2_product_rows(*p, row, p->rows - row);
        int done = run_some(ctx, &rest, dtype, err);
        if (done < 0)
            return -1;
        row += done;
    }
    return 0;
}

size_t b2_products_few_scratch(int64_t max_rows, int64_t max_width)
{
    size_t rows = (size_t)b2_least(max_rows, B2_CUDA_FEW_ROWS), chunks = (size_t)b2_div_up(max_width, MOST_CHUNK / 2);
    return b2_arena_cost(chunks * rows * (size_t)max_width, sizeof(float));
}
