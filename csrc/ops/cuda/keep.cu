/* Keys and values into a cache of 16 bits: out[rows[i]] = x[i], rounded to the nearest, ties to even.
 *
 * float16 ends at 65504. What is larger becomes NaN and not Inf: a key of -Inf would only look as if nobody saw it, and the answer
 * would be wrong without a word; a NaN reaches the layer's output, where it is noticed. Owns nothing. */
#include "ops/cuda/cuda_ops.h"
#include "ops/cuda/mma.h"
#include "ops/cuda/rows.h"

namespace {

enum { THREADS = 256, NOT_A_NUMBER = 0x7e00 };

template <bool BRAIN> __device__ __forceinline__ uint16_t kept(float x)
{
    if (BRAIN)
        return b2_to_bfloat(x);
    uint16_t half = b2_to_half(x);
    return (half & 0x7fff) < 0x7c00 ? half : (uint16_t)NOT_A_NUMBER;
}

/* A block per row; FOURS: four elements at a time. */
template <bool BRAIN, bool FOURS>
__global__ void __launch_bounds__(THREADS) store_kernel(uint16_t *out, int64_t out_ld, const int32_t *rows, b2_tensor x)
{
    const float *from = x.data + (int64_t)blockIdx.x * x.ld;
    uint16_t *to = out + (int64_t)rows[blockIdx.x] * out_ld;
    for (int64_t j = (FOURS ? 4 : 1) * (int64_t)threadIdx.x; j < x.cols; j += (FOURS ? 4 : 1) * (int64_t)blockDim.x) {
        if (FOURS) {
            float4 v = b2_load4(from + j);
            *(uint2 *)(to + j) = make_uint2(kept<BRAIN>(v.x) | (unsigned)kept<BRAIN>(v.y) << 16,
                                            kept<BRAIN>(v.z) | (unsigned)kept<BRAIN>(v.w) << 16);
        } else {
            to[j] = kept<BRAIN>(from[j]);
        }
    }
}

} // namespace

int b2_cuda_store_rows(b2_ctx *ctx, b2_tensor out, b2_dtype dtype, const int32_t *out_rows, b2_tensor x, b2_err *err)
{
    bool fours = b2_by_fours_of(x) && (uintptr_t)out.data % 8 == 0 && out.ld % 4 == 0;
    const int32_t *rows = (const int32_t *)b2_cuda_index(ctx, out_rows, (size_t)x.rows * sizeof *rows, err);
    void (*kernel)(uint16_t *, int64_t, const int32_t *, b2_tensor) =
        dtype == B2_BF16 ? (fours ? store_kernel<true, true> : store_kernel<true, false>)
                         : (fours ? store_kernel<false, true> : store_kernel<false, false>);
    if (!rows)
        return -1;
    dim3 block(b2_threads_for(fours ? x.cols / 4 : x.cols, THREADS));
    B2_LAUNCH(kernel, dim3((unsigned)x.rows), block, 0, b2_cuda_stream(ctx), (uint16_t *)out.data, out.ld, rows, x);
    return b2_cuda_launched("store_rows", err);
}
