/* Attention of many queries of a row in fp32: prompts, the Q-Former, T5, and pictures where nothing may be rounded.
 *
 * A block of 128 threads per 16 R queries and head goes over the row's keys in tiles of 32, counted from its first one, with
 * an online softmax (attention_few.cu has the formula). Thread (y, x), y < 16, x < 8, has the queries y, y + 16, ... and of
 * each tile the keys x, x + 8, ...; of the output four columns of every 32. The eight threads of a query are neighbours in a
 * warp, so that softmax needs no barrier. Tiles that none of the block's queries sees are left out, and so is what they hold;
 * a key that a query does not see is a weight of 0 that multiplies nothing.
 *
 * Memory: shared only: Q, K and V tiles with 4 floats between their rows, which keeps their reads free of bank conflicts. */
#include "ops/cuda/attention.h"

namespace {

enum { THREADS = 128, ACROSS = 8, DOWN = THREADS / ACROSS, KEYS = 32, KEYS_EACH = KEYS / ACROSS, GAP = 4 };

template <int R, int WIDTH> struct tiles {
    static const int QUERIES = DOWN * R, LD = WIDTH + GAP, WEIGHTS_LD = KEYS + GAP, COLUMNS = WIDTH / KEYS;
    static const int FLOATS = (QUERIES + 2 * KEYS) * LD + QUERIES * WEIGHTS_LD;
    static const size_t BYTES = FLOATS * sizeof(float) + KEYS * sizeof(int);
    float *q, *k, *v; /* [QUERIES, KEYS, KEYS][LD] */
    float *weights;   /* [QUERIES][WEIGHTS_LD] */
    int *shown;       /* [KEYS] */

    __device__ __forceinline__ tiles()
    {
        B2_DYNAMIC_SHARED(float, block);
        q = block;
        k = q + QUERIES * LD;
        v = k + KEYS * LD;
        weights = v + KEYS * LD;
        shown = (int *)(weights + QUERIES * WEIGHTS_LD);
    }
};

/* Rows of queries [first, first + QUERIES) of the row; zero behind its end. */
template <int R, int WIDTH>
__device__ __forceinline__ void load_queries(const b2_attention_view &a, const b2_attention_row &row, int head, int first,
                                             const tiles<R, WIDTH> &t)
{
    for (int p = threadIdx.x; p < t.QUERIES * (WIDTH / 4); p += THREADS) {
        int i = p / (WIDTH / 4), d = p % (WIDTH / 4) * 4;
        float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (first + i < row.queries)
            x = b2_attention_load(a.q + (int64_t)(row.first_query + first + i) * a.q_ld + (int64_t)head * a.head_dim, d,
                                  a.head_dim, a.by_four);
        *(float4 *)(t.q + i * t.LD + d) = x;
    }
}

/* Keys [first, first + KEYS) and their values; zero where there is none or the mask hides it. */
template <class K, int R, int WIDTH>
__device__ __forceinline__ void load_keys(const b2_attention_view &a, const b2_attention_row &row, int head, int first,
                                          const tiles<R, WIDTH> &t)
{
    int64_t offset = (int64_t)(head / (a.heads / a.kv_heads)) * a.head_dim;
    for (int p = threadIdx.x; p < KEYS * (WIDTH / 4); p += THREADS) {
        int j = p / (WIDTH / 4), d = p % (WIDTH / 4) * 4;
        float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f), y = x;
        int shown = first + j < row.keys && b2_attention_shown(a, row, first + j);
        if (shown) {
            const K *key, *value;
            b2_attention_find_key(a, row, first + j, &key, &value);
            x = b2_attention_load(key + offset, d, a.head_dim, a.by_four);
            y = b2_attention_load(value + offset, d, a.head_dim, a.by_four);
        }
        *(float4 *)(t.k + j * t.LD + d) = x;
        *(float4 *)(t.v + j * t.LD + d) = y;
        if (d == 0)
            t.shown[j] = shown;
    }
}

__device__ __forceinline__ float largest_of_query(float x)
{
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 4));
}

__device__ __forceinline__ float sum_of_query(float x)
{
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    x += __shfl_xor_sync(0xffffffffu, x, 2);
    return x + __shfl_xor_sync(0xffffffffu, x, 4);
}

/* score[r][c] = q[y + 16 r] . k[x + 8 c] */
template <int R, int WIDTH>
__device__ __forceinline__ void multiply_keys(const tiles<R, WIDTH> &t, int x, int y, float score[R][KEYS_EACH])
{
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int c = 0; c < KEYS_EACH; c++)
            score[r][c] = 0.0f;
#pragma unroll 4
    for (int d = 0; d < WIDTH; d += 4) {
        float4 q[R], k[KEYS_EACH];
#pragma unroll
        for (int r = 0; r < R; r++)
            q[r] = *(const float4 *)(t.q + (y + DOWN * r) * t.LD + d);
#pragma unroll
        for (int c = 0; c < KEYS_EACH; c++)
            k[c] = *(const float4 *)(t.k + (x + ACROSS * c) * t.LD + d);
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int c = 0; c < KEYS_EACH; c++) {
                score[r][c] = __fmaf_rn(q[r].x, k[c].x, score[r][c]);
                score[r][c] = __fmaf_rn(q[r].y, k[c].y, score[r][c]);
                score[r][c] = __fmaf_rn(q[r].z, k[c].z, score[r][c]);
                score[r][c] = __fmaf_rn(q[r].w, k[c].w, score[r][c]);
            }
    }
}

/* out[r] += weights[y + 16 r] . v; CAREFUL: a weight of 0 multiplies nothing. */
template <int R, int WIDTH, bool CAREFUL>
__device__ __forceinline__ void add_values(const tiles<R, WIDTH> &t, int x, int y, float4 out[R][WIDTH / KEYS])
{
#pragma unroll 4
    for (int j = 0; j < KEYS; j++) {
        float weight[R];
#pragma unroll
        for (int r = 0; r < R; r++)
            weight[r] = t.weights[(y + DOWN * r) * t.WEIGHTS_LD + j];
#pragma unroll
        for (int c = 0; c < t.COLUMNS; c++) {
            float4 v = *(const float4 *)(t.v + j * t.LD + c * KEYS + 4 * x);
#pragma unroll
            for (int r = 0; r < R; r++) {
                if (CAREFUL && weight[r] == 0.0f)
                    continue;
                out[r][c].x = __fmaf_rn(weight[r], v.x, out[r][c].x);
                out[r][c].y = __fmaf_rn(weight[r], v.y, out[r][c].y);
                out[r][c].z = __fmaf_rn(weight[r], v.z, out[r][c].z);
                out[r][c].w = __fmaf_rn(weight[r], v.w, out[r][c].w);
            }
        }
    }
}

template <class K, int R, int WIDTH>
__global__ void __launch_bounds__(THREADS) tiles_kernel(b2_attention_view a, int blocks_per_row)
{
    tiles<R, WIDTH> t;
    b2_attention_row row = b2_attention_row_of(a, blockIdx.x / blocks_per_row);
    int head = blockIdx.y, begin = (int)(blockIdx.x % blocks_per_row) * t.QUERIES;
    int x = threadIdx.x % ACROSS, y = threadIdx.x / ACROSS;
    if (begin >= row.queries || row.queries <= B2_ATTENTION_FEW)
        return;
    int last = begin + t.QUERIES < row.queries ? begin + t.QUERIES - 1 : row.queries - 1;
    int first_key = b2_attention_first(a, row, begin) / KEYS * KEYS, end_key = b2_attention_end(a, row, last);
    load_queries(a, row, head, begin, t);
    float4 out[R][t.COLUMNS];
    float most[R], sum[R];
    int first[R], end[R];
#pragma unroll
    for (int r = 0; r < R; r++) {
        int i = begin + y + DOWN * r;
        most[r] = -INFINITY;
        sum[r] = 0.0f;
        first[r] = b2_attention_first(a, row, i);
        end[r] = i < row.queries ? b2_attention_end(a, row, i) : 0;
#pragma unroll
        for (int c = 0; c < t.COLUMNS; c++)
            out[r][c] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    for (int tile = first_key; tile < end_key; tile += KEYS) {
        float score[R][KEYS_EACH];
        __syncthreads();
        load_keys<K>(a, row, head, tile, t);
        __syncthreads();
        multiply_keys<R, WIDTH>(t, x, y, score);
        int hidden = 0;
#pragma unroll
        for (int r = 0; r < R; r++) {
            float larger = most[r];
#pragma unroll
            for (int c = 0; c < KEYS_EACH; c++) {
                int j = tile + x + ACROSS * c, seen = j >= first[r] && j < end[r] && t.shown[x + ACROSS * c];
                float s = a.scale * score[r][c];
                if (seen && a.distance_bias)
                    s = __fadd_rn(s, b2_attention_bias(a, row, head, begin + y + DOWN * r, j));
                hidden |= !seen;
                score[r][c] = seen ? s : -INFINITY;
                larger = fmaxf(larger, score[r][c]);
            }
            larger = largest_of_query(larger);
            float reference = b2_attention_reference(larger), keep = expf(most[r] - reference), added = 0.0f;
            most[r] = larger;
#pragma unroll
            for (int c = 0; c < KEYS_EACH; c++) {
                float weight = expf(score[r][c] - reference);
                added += weight;
                t.weights[(y + DOWN * r) * t.WEIGHTS_LD + x + ACROSS * c] = weight;
            }
            sum[r] = __fmaf_rn(sum[r], keep, sum_of_query(added));
#pragma unroll
            for (int c = 0; c < t.COLUMNS; c++) {
                out[r][c].x *= keep;
                out[r][c].y *= keep;
                out[r][c].z *= keep;
                out[r][c].w *= keep;
            }
        }
        __syncwarp();
        if (__any_sync(0xffffffffu, hidden))
            add_values<R, WIDTH, true>(t, x, y, out);
        else
            add_values<R, WIDTH, false>(t, x, y, out);
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
        int i = begin + y + DOWN * r;
        if (i >= row.queries)
            continue;
        float *to = a.out + (int64_t)(row.first_query + i) * a.out_ld + (int64_t)head * a.head_dim;
        float divisor = sum[r] == 0.0f ? 1.0f : sum[r];
#pragma unroll
        for (int c = 0; c < t.COLUMNS; c++) {
            int d = c * KEYS + 4 * x;
            float4 o = make_float4(out[r][c].x / divisor, out[r][c].y / divisor, out[r][c].z / divisor,
                                   out[r][c].w / divisor);
            if (a.by_four && d < a.head_dim) {
                *(float4 *)(to + d) = o;
                continue;
            }
            if (d < a.head_dim)
                to[d] = o.x;
            if (d + 1 < a.head_dim)
                to[d + 1] = o.y;
            if (d + 2 < a.head_dim)
                to[d + 2] = o.z;
            if (d + 3 < a.head_dim)
                to[d + 3] = o.w;
        }
    }
}

template <class K, int R, int WIDTH>
int launch_of(b2_ctx *ctx, const b2_attention_view *a, int64_t most_queries, b2_err *err)
{
    typedef tiles<R, WIDTH> t;
    int64_t blocks = (most_queries + t::QUERIES - 1) / t::QUERIES;
    cudaError_t status = cudaFuncSetAttribute(tiles_kernel<K, R, WIDTH>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              (int)t::BYTES);
    if (b2_cuda_check(status, "attention: shared memory", err) < 0)
        return -1;
    B2_LAUNCH((tiles_kernel<K, R, WIDTH>), dim3((unsigned)(a->rows * blocks), (unsigned)a->heads), dim3(THREADS), t::BYTES,
              b2_cuda_stream(ctx), *a, (int)blocks);
    return b2_cuda_launched("attention", err);
}

template <int R, int WIDTH>
int launch(b2_ctx *ctx, const b2_attention_view *a, int64_t most_queries, b2_err *err)
{
    if (a->keys == B2_F16)
        return launch_of<b2_half_key, R, WIDTH>(ctx, a, most_queries, err);
    if (a->keys == B2_BF16)
        return launch_of<b2_bfloat_key, R, WIDTH>(ctx, a, most_queries, err);
    return launch_of<float, R, WIDTH>(ctx, a, most_queries, err);
}

template <int R> int launch_by_width(b2_ctx *ctx, const b2_attention_view *a, int64_t most_queries, b2_err *err)
{
    if (a->head_dim <= 32)
        return launch<R, 32>(ctx, a, most_queries, err);
    if (a->head_dim <= 64)
        return launch<R, 64>(ctx, a, most_queries, err);
    if (a->head_dim <= 96)
        return launch<R, 96>(ctx, a, most_queries, err);
    return launch<R, 128>(ctx, a, most_queries, err);
}

} // namespace

/* More queries to a block read keys less often; fewer make more blocks. A query's sums are the same. */
int b2_attention_tiles(b2_ctx *ctx, const b2_attention_view *view, int64_t most_queries, b2_err *err)
{
    int64_t blocks = view->rows * view->heads * ((most_queries + 4 * DOWN - 1) / (4 * DOWN));
    if (most_queries > 2 * DOWN && blocks >= b2_cuda_of(ctx)->multiprocessors)
        return launch_by_width<4>(ctx, view, most_queries, err);
    return launch_by_width<2>(ctx, view, most_queries, err);
}
