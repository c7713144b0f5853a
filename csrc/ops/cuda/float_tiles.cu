/* out [M, n] = act(x . w^T + bias) + residual for many rows and weights of F32, in fp32: every element is one chain of fused
 * multiply-adds over ascending columns starting from 0, as on the CPU, whatever the rows beside it are.
 *
 * A block of 256 threads computes SIDE x SIDE elements, each thread PER x PER of them, PER = SIDE / 16, DEPTH columns at a
 * time; the next ones are on their way to registers meanwhile. Takes no scratch. */
#include "ops/cuda/products.h"

enum { THREADS = 256, DEPTH = 16, ACROSS = 16 };

template <int SIDE> struct __align__(16) float_stage {
    float x[DEPTH][SIDE + 4]; /* transposed: neighbouring rows side by side */
    float w[DEPTH][SIDE + 4];
};

/* Four columns each of SIDE * DEPTH / 4 / THREADS rows of x and of w. */
template <int SIDE> struct float_pieces {
    enum { COUNT = (SIDE * DEPTH / 4 + THREADS - 1) / THREADS };
    float4 x[COUNT], w[COUNT];
};

template <int SIDE>
static __device__ __forceinline__ void fetch(float_pieces<SIDE> &to, const b2_product &p, int row, int channel, int column)
{
    float4 none = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < float_pieces<SIDE>::COUNT; i++) {
        int at = i * THREADS + (int)threadIdx.x, line = at / (DEPTH / 4), j = column + at % (DEPTH / 4) * 4;
        bool inside = line < SIDE && j < p.ld;
        to.x[i] = inside && row + line < p.rows ? b2_load_x(p, row + line, j) : none;
        to.w[i] = inside && channel + line < p.n
                      ? *(const float4 *)((const float *)p.w + (channel + line) * (int64_t)p.ld + j)
                      : none;
    }
}

template <int SIDE>
static __device__ __forceinline__ void put(float_stage<SIDE> *stage, const float_pieces<SIDE> &from)
{
#pragma unroll
    for (int i = 0; i < float_pieces<SIDE>::COUNT; i++) {
        int at = i * THREADS + (int)threadIdx.x, line = at / (DEPTH / 4), j = at % (DEPTH / 4) * 4;
        if (line >= SIDE)
            break;
        stage->x[j][line] = from.x[i].x, stage->w[j][line] = from.w[i].x;
        stage->x[j + 1][line] = from.x[i].y, stage->w[j + 1][line] = from.w[i].y;
        stage->x[j + 2][line] = from.x[i].z, stage->w[j + 2][line] = from.w[i].z;
        stage->x[j + 3][line] = from.x[i].w, stage->w[j + 3][line] = from.w[i].w;
    }
}

/* Which rows (of thread ty) and channels (of tx) are a thread's: stretches of up to four, that are read together. */
template <int SIDE> static __device__ __forceinline__ int line_of(int t, int i)
{
    enum { PER = SIDE / ACROSS, TOGETHER = PER < 4 ? PER : 4 };
    return i / TOGETHER * (ACROSS * TOGETHER) + t * TOGETHER + i % TOGETHER;
}

template <int SIDE> static __device__ __forceinline__ void read_lines(float out[SIDE / ACROSS], const float *from, int t)
{
    enum { PER = SIDE / ACROSS };
    if constexpr (PER == 2) {
        float2 two = *(const float2 *)(from + t * 2);
        out[0] = two.x, out[1] = two.y;
    } else {
#pragma unroll
        for (int i = 0; i < PER; i += 4) {
            float4 four = *(const float4 *)(from + line_of<SIDE>(t, i));
            out[i] = four.x, out[i + 1] = four.y, out[i + 2] = four.z, out[i + 3] = four.w;
        }
    }
}

template <int SIDE>
static __device__ __forceinline__ void multiply(float acc[SIDE / ACROSS][SIDE / ACROSS], const float_stage<SIDE> *stage)
{
    enum { PER = SIDE / ACROSS };
    int tx = (int)threadIdx.x % ACROSS, ty = (int)threadIdx.x / ACROSS;
#pragma unroll
    for (int k = 0; k < DEPTH; k++) {
        float x[PER], w[PER];
        read_lines<SIDE>(x, stage->x[k], ty);
        read_lines<SIDE>(w, stage->w[k], tx);
#pragma unroll
        for (int i = 0; i < PER; i++)
#pragma unroll
            for (int j = 0; j < PER; j++)
                acc[i][j] = fmaf(x[i], w[j], acc[i][j]);
    }
}

template <int SIDE> __global__ void __launch_bounds__(THREADS) float_tiles_kernel(b2_product p)
{
    enum { PER = SIDE / ACROSS };
    __shared__ float_stage<SIDE> stages[2];
    __shared__ float mine[PER][THREADS]; /* of each thread: registers have no index, and the end of an element is long */
    int row = (int)blockIdx.x * SIDE, channel = (int)blockIdx.y * SIDE;
    float acc[PER][PER] = {};
    float_pieces<SIDE> next;
    fetch<SIDE>(next, p, row, channel, 0);
    put<SIDE>(&stages[0], next);
    int stage = 0;
    for (int column = 0; column < p.ld; column += DEPTH) {
        __syncthreads();
        bool more = column + DEPTH < p.ld;
        if (more)
            fetch<SIDE>(next, p, row, channel, column + DEPTH);
        multiply<SIDE>(acc, &stages[stage]);
        if (more) /* its readers were done before the barrier above */
            put<SIDE>(&stages[stage ^ 1], next);
        stage ^= 1;
    }
    int tx = (int)threadIdx.x % ACROSS, ty = (int)threadIdx.x / ACROSS;
#pragma unroll
    for (int i = 0; i < PER; i++) {
#pragma unroll
        for (int j = 0; j < PER; j++)
            mine[j][threadIdx.x] = acc[i][j];
        int line = row + line_of<SIDE>(ty, i);
        if (line >= p.rows)
            continue;
#pragma unroll 1
        for (int j = 0; j < PER; j++) {
            int column = channel + line_of<SIDE>(tx, j);
            if (column < p.n)
                b2_finish(p, line, column, mine[j][threadIdx.x], 1.0f);
        }
    }
}

int b2_products_float_tiles(b2_ctx *ctx, const b2_product *p, b2_err *err)
{
    /* The largest tiles that still give every multiprocessor one. */
    int side = 128, least = b2_cuda_of(ctx)->multiprocessors;
    while (side > 32 && b2_div_up(p->rows, side) * (int64_t)b2_div_up(p->n, side) < least)
        side /= 2;
    void (*kernel)(b2_product) = side == 32   ? float_tiles_kernel<32>
                                 : side == 64 ? float_tiles_kernel<64>
                                              : float_tiles_kernel<128>;
    dim3 grid((unsigned)b2_div_up(p->rows, side), (unsigned)b2_div_up(p->n, side));
    B2_LAUNCH(kernel, grid, dim3(THREADS), 0, b2_cuda_stream(ctx), *p);
    return b2_cuda_launched("float_tiles", err);
}
