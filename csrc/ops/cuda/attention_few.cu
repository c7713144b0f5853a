/* Attention of few queries of a row: a decoded token looks at all that was before it.
 *
 * A block of 32 groups of 8 lanes per query and head. Group u goes over keys u, u + 32, ... of a segment of 512 with an online
 * softmax (m, l, o): s = scale q.k + bias, m' = max(m, s), l' = l e^(m-m') + e^(s-m'), o' = o e^(m-m') + e^(s-m') v. The
 * groups' results, then the segments', are merged in fixed order. Where few blocks would leave the card idle, each segment
 * has a block of its own and a second kernel merges them: the same sums in the same order.
 * The launch does not depend on the lengths when it is recorded, which are read from device memory.
 *
 * Memory: partial results in ctx->activations, given back at the end of the call. */
#include "ops/cuda/attention.h"

namespace {

enum {
    THREADS = 256,
    WARPS = THREADS / 32,
    LANES = 8,
    GROUPS = THREADS / LANES,
    AT_ONCE = 2, /* keys of a group whose loads are under way together */
    SEGMENT = 512,
    MOST_SEGMENTS = 16
};

/* Running softmax of a query: largest score, sum of exponentials, and elsewhere the sum of values. */
struct running {
    float most, sum;
};

/* What the two sides of a merge are multiplied with. */
struct shares {
    float mine, other;
};

__device__ __forceinline__ shares merge(running *r, float most, float sum)
{
    float larger = fmaxf(r->most, most), reference = b2_attention_reference(larger);
    shares s = {expf(r->most - reference), expf(most - reference)};
    r->most = larger;
    r->sum = __fmaf_rn(r->sum, s.mine, __fmul_rn(sum, s.other));
    return s;
}

/* By name, so that every kernel rounds alike. */
__device__ __forceinline__ float mixed(float mine, float other, shares s)
{
    return __fmaf_rn(mine, s.mine, __fmul_rn(other, s.other));
}

/* FOUR: elements come in fours (lane l has [32 step + 4 l, + 4)), else one by one (lane l has 8 step + l). */
template <int STEPS, bool FOUR> struct held {
    static const int COUNT = FOUR ? 4 * STEPS : STEPS;
    float at[COUNT];

    __device__ __forceinline__ static int column(int i, int lane)
    {
        return FOUR ? i / 4 * 4 * LANES + 4 * lane + i % 4 : i * LANES + lane;
    }

    template <class K> __device__ __forceinline__ void load(const K *row, int lane, int width)
    {
        if constexpr (FOUR) {
#pragma unroll
            for (int i = 0; i < COUNT; i += 4) {
                int d = column(i, lane);
                float4 x = d < width ? b2_attention_load(row, d, width, 1) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                at[i] = x.x;
                at[i + 1] = x.y;
                at[i + 2] = x.z;
                at[i + 3] = x.w;
            }
        } else {
#pragma unroll
            for (int i = 0; i < COUNT; i++)
                at[i] = column(i, lane) < width ? b2_key_float(row[column(i, lane)]) : 0.0f;
        }
    }

    __device__ __forceinline__ void clear()
    {
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            at[i] = 0.0f;
    }
};

__device__ __forceinline__ float sum_of_group(float x)
{
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    x += __shfl_xor_sync(0xffffffffu, x, 2);
    return x + __shfl_xor_sync(0xffffffffu, x, 4);
}

/* o, r: the group's running result over its keys of [first, end). All lanes of a warp stay together. */
template <class K, int STEPS, bool FOUR>
__device__ __forceinline__ void read_keys(const b2_attention_view &a, const b2_attention_row &row, int head, int i, int first,
                                          int end, const held<STEPS, FOUR> &q, held<STEPS, FOUR> *o, running *r)
{
    typedef held<STEPS, FOUR> part;
    int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
    int64_t offset = (int64_t)(head / (a.heads / a.kv_heads)) * a.head_dim;
    for (int base = first; base < end; base += AT_ONCE * GROUPS) {
        part k[AT_ONCE], v[AT_ONCE];
        float score[AT_ONCE];
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            int j = base + u * GROUPS + group;
            k[u].clear();
            v[u].clear();
            score[u] = -INFINITY;
            if (j < end && b2_attention_shown(a, row, j)) {
                const K *key, *value;
                b2_attention_find_key(a, row, j, &key, &value);
                k[u].load(key + offset, lane, a.head_dim);
                v[u].load(value + offset, lane, a.head_dim);
                score[u] = 0.0f;
            }
        }
        float larger = r->most;
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            float product = 0.0f;
#pragma unroll
            for (int d = 0; d < part::COUNT; d++)
                product += q.at[d] * k[u].at[d];
            product = a.scale * sum_of_group(product);
            if (score[u] == 0.0f)
                score[u] = a.distance_bias ? product + b2_attention_bias(a, row, head, i, base + u * GROUPS + group) : product;
            larger = fmaxf(larger, score[u]);
        }
        float reference = b2_attention_reference(larger), keep = expf(r->most - reference);
        r->most = larger;
        r->sum *= keep;
#pragma unroll
        for (int d = 0; d < part::COUNT; d++)
            o->at[d] *= keep;
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            float weight = expf(score[u] - reference);
            r->sum += weight;
#pragma unroll
            for (int d = 0; d < part::COUNT; d++)
                o->at[d] += weight * v[u].at[d];
        }
    }
}

/* The groups of a warp become one, in all of its lanes. */
template <int STEPS, bool FOUR> __device__ __forceinline__ void merge_groups(held<STEPS, FOUR> *o, running *r)
{
#pragma unroll
    for (int step = LANES; step < 32; step *= 2) {
        float most = __shfl_xor_sync(0xffffffffu, r->most, step), sum = __shfl_xor_sync(0xffffffffu, r->sum, step);
        shares s = merge(r, most, sum);
#pragma unroll
        for (int d = 0; d < held<STEPS, FOUR>::COUNT; d++)
            o->at[d] = mixed(o->at[d], __shfl_xor_sync(0xffffffffu, o->at[d], step), s);
    }
}

/* partial [tokens, heads, segments][Dh + 2]: o, then most and sum. NULL: one block does all segments and writes out. */
template <class K, int STEPS, bool FOUR>
__global__ void __launch_bounds__(THREADS) few_kernel(b2_attention_view a, float *partial)
{
    typedef held<STEPS, FOUR> part;
    __shared__ float of_warp[WARPS][B2_ATTENTION_WIDEST], most_of_warp[WARPS], sum_of_warp[WARPS];
    int64_t token = blockIdx.x;
    int head = blockIdx.y, lane = threadIdx.x % LANES, warp = threadIdx.x / 32, column = threadIdx.x;
    b2_attention_row row = b2_attention_row_of(a, b2_attention_find_row(a, token));
    if (row.queries > B2_ATTENTION_FEW)
        return;
    int i = (int)(token - row.first_query);
    int first = b2_attention_first(a, row, i), end = b2_attention_end(a, row, i);
    part q;
    q.load(a.q + token * a.q_ld + (int64_t)head * a.head_dim, lane, a.head_dim);
    running all = {-INFINITY, 0.0f};
    float out = 0.0f;
    for (int segment = blockIdx.z; segment * SEGMENT < end; segment += gridDim.z) {
        int from = segment * SEGMENT, to = from + SEGMENT < end ? from + SEGMENT : end;
        part o;
        running r = {-INFINITY, 0.0f};
        o.clear();
        read_keys<K, STEPS, FOUR>(a, row, head, i, from > first ? from : first, to, q, &o, &r);
        merge_groups<STEPS, FOUR>(&o, &r);
        __syncthreads();
        if (threadIdx.x % 32 < LANES) {
#pragma unroll
            for (int d = 0; d < part::COUNT; d++)
                if (part::column(d, lane) < a.head_dim)
                    of_warp[warp][part::column(d, lane)] = o.at[d];
            most_of_warp[warp] = r.most;
            sum_of_warp[warp] = r.sum;
        }
        __syncthreads();
        running block = {most_of_warp[0], sum_of_warp[0]};
        float value = column < a.head_dim ? of_warp[0][column] : 0.0f;
        for (int w = 1; w < WARPS; w++) {
            shares s = merge(&block, most_of_warp[w], sum_of_warp[w]);
            if (column < a.head_dim)
                value = mixed(value, of_warp[w][column], s);
        }
        if (partial) {
            float *to_segment = partial + ((token * a.heads + head) * gridDim.z + segment) * (a.head_dim + 2);
            if (column < a.head_dim)
                to_segment[column] = value;
            if (column == 0) {
                to_segment[a.head_dim] = block.most;
                to_segment[a.head_dim + 1] = block.sum;
            }
            return;
        }
        shares s = merge(&all, block.most, block.sum);
        out = mixed(out, value, s);
    }
    if (!partial && column < a.head_dim)
        a.out[token * a.out_ld + (int64_t)head * a.head_dim + column] = all.sum == 0.0f ? 0.0f : out / all.sum;
}

__global__ void __launch_bounds__(B2_ATTENTION_WIDEST) merge_kernel(b2_attention_view a, const float *partial, int segments)
{
    int64_t token = blockIdx.x;
    int head = blockIdx.y, column = threadIdx.x;
    b2_attention_row row = b2_attention_row_of(a, b2_attention_find_row(a, token));
    if (row.queries > B2_ATTENTION_FEW)
        return;
    int end = b2_attention_end(a, row, (int)(token - row.first_query));
    running all = {-INFINITY, 0.0f};
    float out = 0.0f;
    for (int segment = 0; segment * SEGMENT < end; segment++) {
        const float *from = partial + ((token * a.heads + head) * segments + segment) * (a.head_dim + 2);
        shares s = merge(&all, from[a.head_dim], from[a.head_dim + 1]);
        if (column < a.head_dim)
            out = mixed(out, from[column], s);
    }
    if (column < a.head_dim)
        a.out[token * a.out_ld + (int64_t)head * a.head_dim + column] = all.sum == 0.0f ? 0.0f : out / all.sum;
}

template <int STEPS, bool FOUR> void launch(const b2_attention_view *a, float *partial, dim3 grid, cudaStream_t stream)
{
    if (a->keys == B2_F16)
        B2_LAUNCH((few_kernel<b2_half_key, STEPS, FOUR>), grid, dim3(THREADS), 0, stream, *a, partial);
    else if (a->keys == B2_BF16)
        B2_LAUNCH((few_kernel<b2_bfloat_key, STEPS, FOUR>), grid, dim3(THREADS), 0, stream, *a, partial);
    else
        B2_LAUNCH((few_kernel<float, STEPS, FOUR>), grid, dim3(THREADS), 0, stream, *a, partial);
}

void launch_by_width(const b2_attention_view *a, float *partial, dim3 grid, cudaStream_t stream)
{
    int width = a->head_dim;
    if (a->by_four && width <= 32)
        launch<1, true>(a, partial, grid, stream);
    else if (a->by_four && width <= 64)
        launch<2, true>(a, partial, grid, stream);
    else if (a->by_four && width <= 96)
        launch<3, true>(a, partial, grid, stream);
    else if (a->by_four)
        launch<4, true>(a, partial, grid, stream);
    else if (width <= 32)
        launch<4, false>(a, partial, grid, stream);
    else
        launch<16, false>(a, partial, grid, stream);
}

/* Blocks that keep the card busy. */
int64_t enough_blocks(const b2_ctx *ctx)
{
    return 2 * (int64_t)b2_cuda_of(ctx)->multiprocessors;
}

} // namespace

/* Whatever the lengths are: a recorded step has to be ready for the longest. */
size_t b2_attention_few_scratch(const b2_ctx *ctx)
{
    return b2_arena_cost((size_t)enough_blocks(ctx) * MOST_SEGMENTS * (B2_ATTENTION_WIDEST + 2), sizeof(float));
}

int b2_attention_few(b2_ctx *ctx, const b2_attention_view *view, int64_t tokens, int64_t most_keys, b2_err *err)
{
    int64_t blocks = tokens * view->heads, segments = (most_keys + SEGMENT - 1) / SEGMENT;
    cudaStream_t stream = b2_cuda_stream(ctx);
    float *partial = NULL;
    size_t mark = b2_arena_mark(ctx->activations);
    if (segments > 1 && segments <= MOST_SEGMENTS && blocks < enough_blocks(ctx)) {
        partial = (float *)b2_cuda_take(ctx, (size_t)(blocks * segments * (view->head_dim + 2)), sizeof *partial, err);
        if (!partial)
            return -1;
    }
    launch_by_width(view, partial, dim3((unsigned)tokens, (unsigned)view->heads, partial ? (unsigned)segments : 1), stream);
    if (b2_cuda_launched("attention of few queries", err) < 0)
        return -1;
    if (!partial)
        return 0;
    B2_LAUNCH(merge_kernel, dim3((unsigned)tokens, (unsigned)view->heads), dim3(B2_ATTENTION_WIDEST), 0, stream, *view,
              (const float *)partial, (int)segments);
    b2_arena_reset(ctx->activations, mark);
    return b2_cuda_launched("attention of few queries: merge", err);
}
