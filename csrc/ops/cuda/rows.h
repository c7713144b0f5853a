/* What kernels over rows share: a block per row, sums over a block, four elements at a time where addresses allow. */
#ifndef B2_OPS_CUDA_ROWS_H
#define B2_OPS_CUDA_ROWS_H

#include "ops/cuda/cuda.h"

enum { B2_WARP = 32, B2_WARPS_MOST = 32 };
#define B2_WHOLE_WARP 0xffffffffu

struct b2_sum {
    template <class T> static __device__ __forceinline__ T of(T a, T b) { return a + b; }
};

/* The larger; NaN if either is. */
struct b2_nan_max {
    static __device__ __forceinline__ float of(float a, float b) { return b > a || b != b ? b : a; }
};

template <class OP, class T> static __device__ __forceinline__ T b2_warp_reduce(T x)
{
#pragma unroll
    for (int step = B2_WARP / 2; step > 0; step /= 2)
        x = OP::of(x, __shfl_xor_sync(B2_WHOLE_WARP, x, step));
    return x;
}

/* Over all threads of the block, which is whole warps: the same bits in each. `parts` [B2_WARPS_MOST] in shared memory is not
 * used for anything else in the kernel. */
template <class OP, class T> static __device__ __forceinline__ T b2_block_reduce(T x, T *parts)
{
    int warp = (int)threadIdx.x / B2_WARP, warps = (int)blockDim.x / B2_WARP;
    x = b2_warp_reduce<OP>(x);
    if (warps == 1)
        return x;
    if (threadIdx.x % B2_WARP == 0)
        parts[warp] = x;
    __syncthreads();
    T all = parts[0];
    for (int w = 1; w < warps; w++)
        all = OP::of(all, parts[w]);
    return all;
}

/* Whether every row begins at a multiple of 16 bytes, so that 4 columns can be read together (the last ones of a row too:
 * `cols` is a multiple of 4). */
static inline bool b2_by_fours(const void *data, int64_t ld, int64_t cols)
{
    return (uintptr_t)data % 16 == 0 && ld % 4 == 0 && cols % 4 == 0;
}

static inline bool b2_by_fours_of(b2_tensor t)
{
    return b2_by_fours(t.data, t.ld, t.cols);
}

static __device__ __forceinline__ float4 b2_load4(const float *at)
{
    return *reinterpret_cast<const float4 *>(at);
}

static __device__ __forceinline__ void b2_store4(float *at, float4 value)
{
    *reinterpret_cast<float4 *>(at) = value;
}

/* Threads for `work` pieces of a row: whole warps, at most `most`. */
static inline unsigned b2_threads_for(int64_t work, unsigned most)
{
    int64_t whole = (work + B2_WARP - 1) / B2_WARP * B2_WARP;
    return whole < B2_WARP ? (unsigned)B2_WARP : whole > (int64_t)most ? most : (unsigned)whole;
}

#endif
