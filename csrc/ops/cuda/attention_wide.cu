/* Attention in heads of any width, written for clearness: no model of BLIP-2 has heads wider than 128.
 *
 * A block per query and head. Keys come in chunks of 128: every warp makes the scores of some, then all threads add up the
 * columns of the output, with an online softmax from chunk to chunk (attention_few.cu has the formula).
 *
 * Memory: shared only: the query, the output so far and a chunk's scores. */
#include "ops/cuda/attention.h"

namespace {

enum { THREADS = 256, WARPS = THREADS / 32, CHUNK = 128 };

template <class K> __global__ void __launch_bounds__(THREADS) wide_kernel(b2_attention_view a)
{
    __shared__ float scores[CHUNK];
    B2_DYNAMIC_SHARED(float, q);
    float *out = q + a.head_dim;
    int64_t token = blockIdx.x;
    int head = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int64_t column = (int64_t)head * a.head_dim, offset = (int64_t)(head / (a.heads / a.kv_heads)) * a.head_dim;
    b2_attention_row row = b2_attention_row_of(a, b2_attention_find_row(a, token));
    int i = (int)(token - row.first_query), end = b2_attention_end(a, row, i);
    float most = -INFINITY, sum = 0.0f;
    for (int d = threadIdx.x; d < a.head_dim; d += THREADS) {
        q[d] = a.q[token * a.q_ld + column + d];
        out[d] = 0.0f;
    }
    for (int from = b2_attention_first(a, row, i); from < end; from += CHUNK) {
        int count = from + CHUNK < end ? CHUNK : end - from;
        const K *key, *value;
        __syncthreads();
        for (int j = warp; j < count; j += WARPS) {
            float score = 0.0f;
            int shown = b2_attention_shown(a, row, from + j);
            if (shown) {
                b2_attention_find_key(a, row, from + j, &key, &value);
                for (int d = lane; d < a.head_dim; d += 32)
                    score += q[d] * b2_key_float(key[offset + d]);
            }
            for (int step = 16; step > 0; step /= 2)
                score += __shfl_xor_sync(0xffffffffu, score, step);
            score *= a.scale;
            if (shown && a.distance_bias)
                score += b2_attention_bias(a, row, head, i, from + j);
            if (lane == 0)
                scores[j] = shown ? score : -INFINITY;
        }
        __syncthreads();
        float larger = most;
        for (int j = 0; j < count; j++)
            larger = fmaxf(larger, scores[j]);
        float reference = b2_attention_reference(larger), keep = expf(most - reference);
        most = larger;
        sum *= keep;
        for (int j = 0; j < count; j++)
            sum += expf(scores[j] - reference);
        for (int d = threadIdx.x; d < a.head_dim; d += THREADS) {
            float o = out[d] * keep;
            for (int j = 0; j < count; j++) {
                if (scores[j] == -INFINITY)
                    continue;
                b2_attention_find_key(a, row, from + j, &key, &value);
                o += expf(scores[j] - reference) * b2_key_float(value[offset + d]);
            }
            out[d] = o;
        }
    }
    for (int d = threadIdx.x; d < a.head_dim; d += THREADS)
        a.out[token * a.out_ld + column + d] = sum == 0.0f ? 0.0f : out[d] / sum;
}

} // namespace

int b2_attention_wide(b2_ctx *ctx, const b2_attention_view *view, int64_t tokens, b2_err *err)
{
    size_t bytes = 2 * (size_t)view->head_dim * sizeof(float);
    if (bytes + CHUNK * sizeof(float) > b2_cuda_of(ctx)->shared_per_block)
        return b2_fail(err, B2_E_UNSUPPORTED, "attention: heads of width %d do not fit in this device's shared memory",
                       view->head_dim);
    void (*kernel)(b2_attention_view) = view->keys == B2_F16    ? wide_kernel<b2_half_key>
                                        : view->keys == B2_BF16 ? wide_kernel<b2_bfloat_key>
                                                                : wide_kernel<float>;
    cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (b2_cuda_check(status, "attention: shared memory", err) < 0)
        return -1;
    B2_LAUNCH(kernel, dim3((unsigned)tokens, (unsigned)view->heads), dim3(THREADS), bytes, b2_cuda_stream(ctx), *view);
    return b2_cuda_launched("attention in wide heads", err);
}
