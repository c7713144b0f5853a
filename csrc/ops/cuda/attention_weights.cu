/* The softmax weights of an attention, for people who look at them: weights[i][j] = softmax over the keys j that query i sees
 * of scale * (q_i . k_j) + distance bias, zero where a key is not seen.
 *
 * A block per query and head; the scores are made in the caller's array itself. Its sums run in another order than those of
 * the other kernels: same weights, not the same last bit. */
#include "ops/cuda/attention.h"

namespace {

enum { THREADS = 256, WARPS = THREADS / 32 };

struct largest_of {
    __device__ __forceinline__ static float of(float a, float b) { return fmaxf(a, b); }
};
struct sum_of {
    __device__ __forceinline__ static float of(float a, float b) { return a + b; }
};

/* Of all threads' x, in every thread. */
template <class F> __device__ __forceinline__ float fold(float x, float *of_warp)
{
    for (int step = 16; step > 0; step /= 2)
        x = F::of(x, __shfl_xor_sync(0xffffffffu, x, step));
    __syncthreads();
    if (threadIdx.x % 32 == 0)
        of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    x = of_warp[0];
    for (int w = 1; w < WARPS; w++)
        x = F::of(x, of_warp[w]);
    return x;
}

/* Each lane makes the score of a key, so that widths need not be multiples of anything. */
template <class K>
__global__ void __launch_bounds__(THREADS) weights_kernel(b2_attention_view a, float *weights, const int64_t *offsets)
{
    __shared__ float of_warp[WARPS];
    int64_t token = blockIdx.x;
    int head = blockIdx.y;
    int64_t offset = (int64_t)(head / (a.heads / a.kv_heads)) * a.head_dim;
    b2_attention_row row = b2_attention_row_of(a, b2_attention_find_row(a, token));
    int i = (int)(token - row.first_query), first = b2_attention_first(a, row, i), end = b2_attention_end(a, row, i);
    const float *q = a.q + token * a.q_ld + (int64_t)head * a.head_dim;
    float *out = weights + offsets[row.row] + ((int64_t)head * row.queries + i) * row.keys;
    float most = -INFINITY, sum = 0.0f;
    for (int j = threadIdx.x; j < row.keys; j += THREADS) {
        float score = -INFINITY;
        if (j >= first && j < end && b2_attention_shown(a, row, j)) {
            const K *key, *value;
            b2_attention_find_key(a, row, j, &key, &value);
            score = 0.0f;
            for (int d = 0; d < a.head_dim; d++)
                score += q[d] * b2_key_float(key[offset + d]);
            score *= a.scale;
            if (a.distance_bias)
                score += b2_attention_bias(a, row, head, i, j);
        }
        out[j] = score;
        most = fmaxf(most, score);
    }
    most = fold<largest_of>(most, of_warp);
    float reference = b2_attention_reference(most);
    for (int j = threadIdx.x; j < row.keys; j += THREADS) {
        float weight = expf(out[j] - reference);
        out[j] = weight;
        sum += weight;
    }
    sum = fold<sum_of>(sum, of_warp);
    for (int j = threadIdx.x; j < row.keys; j += THREADS)
        out[j] = sum == 0.0f ? 0.0f : out[j] / sum;
}

} // namespace

int b2_attention_weigh(b2_ctx *ctx, const b2_attention_view *view, float *weights, const int64_t *offsets, int64_t tokens,
                       b2_err *err)
{
    void (*kernel)(b2_attention_view, float *, const int64_t *) = view->keys == B2_F16    ? weights_kernel<b2_half_key>
                                                                  : view->keys == B2_BF16 ? weights_kernel<b2_bfloat_key>
                                                                                          : weights_kernel<float>;
    B2_LAUNCH(kernel, dim3((unsigned)tokens, (unsigned)view->heads), dim3(THREADS), 0, b2_cuda_stream(ctx), *view,
              weights, offsets);
    return b2_cuda_launched("attention weights", err);
}
