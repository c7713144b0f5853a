/* Rows of a table as fp32: out[i] = table[ids[i] + offset], or += . The table lies in B2_ROWS (as a checkpoint stores it) or in
 * B2_STRIDED, in any dtype. A block per row. */
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ops/cuda/cuda_ops.h"
#include "ops/cuda/rows.h"

namespace {

enum { THREADS = 256 };

/* What a kernel knows of a table. */
struct table {
    const void *data;
    int64_t ld;               /* elements between two rows; even for I4 */
    const void *scales;       /* I8: F32 [n]; I4: F16 [n][groups] */
    const float *column_scales;
    int64_t group, groups;
};

__device__ __forceinline__ float scaled(const table &t, float scale, int q, int64_t j)
{
    float value = scale * (float)q;
    return t.column_scales ? value * t.column_scales[j] : value;
}

template <int DTYPE> __device__ __forceinline__ float element(const table &t, int64_t row, int64_t j)
{
    switch (DTYPE) {
    case B2_F16: return __half2float(((const __half *)t.data)[row * t.ld + j]);
    case B2_BF16: return __bfloat162float(((const __nv_bfloat16 *)t.data)[row * t.ld + j]);
    case B2_I8:
        return scaled(t, ((const float *)t.scales)[row * t.groups + j / t.group],
                      ((const int8_t *)t.data)[row * t.ld + j], j);
    case B2_I4: {
        int byte = ((const uint8_t *)t.data)[(row * t.ld + j) / 2];
        float scale = __half2float(((const __half *)t.scales)[row * t.groups + j / t.group]);
        return scaled(t, scale, (j % 2 ? byte >> 4 : byte & 15) - 8, j);
    }
    default: return ((const float *)t.data)[row * t.ld + j];
    }
}

/* Four columns from j, a multiple of 4, of a row that begins at a multiple of 4 elements: one load. */
template <int DTYPE> __device__ __forceinline__ float4 elements(const table &t, int64_t row, int64_t j)
{
    int64_t at = row * t.ld + j;
    switch (DTYPE) {
    case B2_F16: {
        uint2 bits = *reinterpret_cast<const uint2 *>((const __half *)t.data + at);
        return make_float4(__half2float(__ushort_as_half((unsigned short)bits.x)),
                           __half2float(__ushort_as_half((unsigned short)(bits.x >> 16))),
                           __half2float(__ushort_as_half((unsigned short)bits.y)),
                           __half2float(__ushort_as_half((unsigned short)(bits.y >> 16))));
    }
    case B2_BF16: {
        uint2 bits = *reinterpret_cast<const uint2 *>((const __nv_bfloat16 *)t.data + at);
        return make_float4(__uint_as_float(bits.x << 16), __uint_as_float(bits.x & 0xffff0000u),
                           __uint_as_float(bits.y << 16), __uint_as_float(bits.y & 0xffff0000u));
    }
    case B2_I8: {
        char4 q = *reinterpret_cast<const char4 *>((const int8_t *)t.data + at);
        float scale = ((const float *)t.scales)[row * t.groups + j / t.group];
        return make_float4(scaled(t, scale, q.x, j), scaled(t, scale, q.y, j + 1), scaled(t, scale, q.z, j + 2),
                           scaled(t, scale, q.w, j + 3));
    }
    case B2_I4: {
        unsigned q = *reinterpret_cast<const uint16_t *>((const uint8_t *)t.data + at / 2);
        float scale = __half2float(((const __half *)t.scales)[row * t.groups + j / t.group]);
        return make_float4(scaled(t, scale, (int)(q & 15) - 8, j), scaled(t, scale, (int)(q >> 4 & 15) - 8, j + 1),
                           scaled(t, scale, (int)(q >> 8 & 15) - 8, j + 2), scaled(t, scale, (int)(q >> 12) - 8, j + 3));
    }
    default: return b2_load4((const float *)t.data + at);
    }
}

template <int DTYPE, bool FOURS, bool ADD>
__global__ void __launch_bounds__(THREADS) embedding_kernel(b2_tensor out, table t, const int32_t *ids, int32_t offset)
{
    int64_t row = (int64_t)ids[blockIdx.x] + offset;
    float *to = out.data + (int64_t)blockIdx.x * out.ld;
    if (row < 0)
        return;
    if (FOURS) {
        for (int64_t j = 4 * (int64_t)threadIdx.x; j < out.cols; j += 4 * (int64_t)blockDim.x) {
            float4 value = elements<DTYPE>(t, row, j);
            if (ADD) {
                float4 before = b2_load4(to + j);
                value = make_float4(before.x + value.x, before.y + value.y, before.z + value.z, before.w + value.w);
            }
            b2_store4(to + j, value);
        }
    } else {
        for (int64_t j = threadIdx.x; j < out.cols; j += blockDim.x) {
            float value = element<DTYPE>(t, row, j);
            to[j] = ADD ? to[j] + value : value;
        }
    }
}

template <int DTYPE>
void launch(cudaStream_t stream, b2_tensor out, const table &t, const int32_t *ids, int32_t offset, bool add)
{
    /* Four elements of the table are 16 to 2 bytes: the block of a weight begins at a multiple of 16 or more. */
    bool fours = b2_by_fours_of(out) && t.ld % 4 == 0 && (uintptr_t)t.data % 16 == 0;
    dim3 grid((unsigned)out.rows), block(b2_threads_for(fours ? out.cols / 4 : out.cols, THREADS));
    if (fours && add)
        B2_LAUNCH((embedding_kernel<DTYPE, true, true>), grid, block, 0, stream, out, t, ids, offset);
    else if (fours)
        B2_LAUNCH((embedding_kernel<DTYPE, true, false>), grid, block, 0, stream, out, t, ids, offset);
    else if (add)
        B2_LAUNCH((embedding_kernel<DTYPE, false, true>), grid, block, 0, stream, out, t, ids, offset);
    else
        B2_LAUNCH((embedding_kernel<DTYPE, false, false>), grid, block, 0, stream, out, t, ids, offset);
}

} // namespace

int b2_cuda_embedding(b2_ctx *ctx, b2_tensor out, const b2_weight *w, const int32_t *ids, int32_t offset, int accumulate,
                      b2_err *err)
{
    cudaStream_t stream = b2_cuda_stream(ctx);
    if (w->layout != B2_ROWS && w->layout != B2_STRIDED)
        return b2_fail(err, B2_E_INTERNAL, "embedding: %s is not in a layout of devices", w->name ? w->name : "the table");
    const int32_t *which = (const int32_t *)b2_cuda_index(ctx, ids, (size_t)out.rows * sizeof *ids, err);
    if (!which)
        return -1;
    table t = {w->data, w->layout == B2_ROWS ? w->k : b2_strided_ld(w->k), w->scales, w->column_scales, w->group, 0};
    t.groups = w->group ? (w->k + w->group - 1) / w->group : 0;
    switch (w->dtype) {
    case B2_F16: launch<B2_F16>(stream, out, t, which, offset, accumulate); break;
    case B2_BF16: launch<B2_BF16>(stream, out, t, which, offset, accumulate); break;
    case B2_I8: launch<B2_I8>(stream, out, t, which, offset, accumulate); break;
    case B2_I4: launch<B2_I4>(stream, out, t, which, offset, accumulate); break;
    default: launch<B2_F32>(stream, out, t, which, offset, accumulate); break;
    }
    return b2_cuda_launched("embedding", err);
}
