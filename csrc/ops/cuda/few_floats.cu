/* out [M, n] = act(x . w^T + bias) + residual for M <= 16 rows and weights of F32, in fp32.
 *
 * A warp takes CHANNELS output channels; each lane four columns of them, 128 columns a step, copied into a ring of its own in
 * shared memory STAGES steps ahead. x comes through the first cache. An element is the sum over lanes (by halves) of each
 * lane's chain over ascending columns: it depends on neither the other rows nor their number. Takes no scratch. */
#include "ops/cuda/mma.h"
#include "ops/cuda/products.h"

enum { MOST_ROWS = 8, WARPS = 4, THREADS = 32 * WARPS, CHANNELS = 4, STAGES = 5, STEP = 128,
       RING_BYTES = STAGES * CHANNELS * THREADS * 16 };

/* Begins to copy a lane's four columns of the warp's channels. */
static __device__ __forceinline__ void fetch(float4 *stage, const b2_product &p, int channel, int column)
{
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) {
        bool there = channel + i < p.n && column < p.ld;
        const float *from = (const float *)p.w + (there ? (channel + i) * (int64_t)p.ld + column : 0);
        b2_copy16(stage + i * THREADS + threadIdx.x, from, there ? 16 : 0);
    }
}

template <int ROWS>
static __device__ __forceinline__ void run_step(float acc[CHANNELS][ROWS], const float4 *stage, const b2_product &p,
                                                int column)
{
    float4 w[CHANNELS];
#pragma unroll
    for (int i = 0; i < CHANNELS; i++)
        w[i] = stage[i * THREADS + threadIdx.x];
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        float4 x = b2_load_x(p, min(row, p.rows - 1), column);
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) {
            float sum = fmaf(x.x, w[i].x, acc[i][row]);
            sum = fmaf(x.y, w[i].y, sum);
            sum = fmaf(x.z, w[i].z, sum);
            acc[i][row] = fmaf(x.w, w[i].w, sum);
        }
    }
}

template <int ROWS> __global__ void __launch_bounds__(THREADS, 2) few_floats_kernel(b2_product p)
{
    int first = (int)blockIdx.y * MOST_ROWS; /* the second eight rows find the weights in the second cache */
    p.out += first * p.out_ld;
    p.x += first * p.x_ld;
    p.residual = p.residual ? p.residual + first * p.residual_ld : NULL;
    p.rows = min(p.rows - first, (int)MOST_ROWS);
    B2_DYNAMIC_SHARED(float4, ring);
    int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    int channel = ((int)blockIdx.x * WARPS + warp) * CHANNELS;
    float acc[CHANNELS][ROWS] = {};
    for (int i = 0; i < STAGES - 1; i++) {
        fetch(ring + i * CHANNELS * THREADS, p, channel, i * STEP + lane * 4);
        b2_copy_commit();
    }
    int stage = 0;
    for (int column = 0; column < p.ld; column += STEP) {
        b2_copy_wait<STAGES - 2>();
        fetch(ring + (stage == 0 ? STAGES - 1 : stage - 1) * CHANNELS * THREADS, p, channel,
              column + (STAGES - 1) * STEP + lane * 4);
        b2_copy_commit();
        run_step<ROWS>(acc, ring + stage * CHANNELS * THREADS, p, column + lane * 4);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    static_assert(MOST_ROWS * CHANNELS <= 32, "a lane for every element");
    float mine = 0.0f;
#pragma unroll
    for (int row = 0; row < ROWS; row++)
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) {
            float sum = acc[i][row];
#pragma unroll
            for (int other = 16; other > 0; other /= 2)
                sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, other));
            if (lane == row * CHANNELS + i)
                mine = sum;
        }
    int row = lane / CHANNELS;
    channel += lane % CHANNELS;
    if (row < p.rows && channel < p.n)
        b2_finish(p, row, channel, mine, 1.0f);
}

typedef void (*few_floats_fn)(b2_product);

int b2_products_few_floats(b2_ctx *ctx, const b2_product *p, b2_err *err)
{
    few_floats_fn kernel = p->rows == 1   ? few_floats_kernel<1>
                           : p->rows == 2 ? few_floats_kernel<2>
                           : p->rows <= 4 ? few_floats_kernel<4>
                                          : few_floats_kernel<MOST_ROWS>;
    dim3 grid((unsigned)b2_div_up(p->n, WARPS * CHANNELS), (unsigned)b2_div_up(p->rows, MOST_ROWS));
    B2_LAUNCH(kernel, grid, dim3(THREADS), RING_BYTES, b2_cuda_stream(ctx), *p);
    return b2_cuda_launched("few_floats", err);
}
