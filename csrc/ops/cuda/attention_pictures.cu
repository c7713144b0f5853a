/* Attention of many queries that sees every key, in 16-bit operands with fp32 sums: pictures (257 x 88), by tensor cores.
 *
 * A warp has 16 queries of a head, a block up to 6 warps, so that three blocks have all queries of a picture of 257 patches.
 * Keys and values pass in tiles of 64: cp.async brings the fp32 rows of the next tile while the present one, rounded to 16
 * bits, is multiplied (mma.sync m16n8k16). Per 32 keys: scores S = Q K^T in the registers of the warp, online
 * softmax (attention_few.cu has the formula; exponents of 2, the scale folded in), the weights rounded, O += P V.
 * q, k, v beyond 65504 become infinite in fp16, as they are upstream.
 *
 * Fragments are those of mma.h, with g = lane / 4 and t = lane % 4.
 *
 * Memory: shared only. */
#include "ops/cuda/attention.h"
#include "ops/cuda/mma.h"

namespace {

enum {
    KEYS = 64,   /* of a tile */
    STRIP = 32,  /* keys between two rescalings */
    ROWS = 16,   /* queries of a warp */
    WARPS = 6,   /* at most: three blocks are the 17 times 16 queries of a picture, and two find room beside each other */
    GAP = 8      /* elements between two rows of a tile: rows begin in different banks, at multiples of 16 bytes */
};

template <int BF16> __device__ __forceinline__ uint32_t round_two(float x, float y)
{
    return BF16 ? b2_to_bfloat(x) | (uint32_t)b2_to_bfloat(y) << 16 : b2_to_half(x) | (uint32_t)b2_to_half(y) << 16;
}

template <int BF16> __device__ __forceinline__ void multiply(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    b2_mma<BF16>(c, a[0], a[1], a[2], a[3], b0, b1);
}

#ifdef __CUDACC__
/* Four matrices of 8 rows x 16 bytes; lane l names row l % 8 of matrix l / 8, and gets elements (g, 2t), (g, 2t + 1) of each. */
__device__ __forceinline__ void load_matrices(uint32_t r[4], const void *row)
{
    uint32_t at = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

/* The same of each matrix transposed: elements (2t, g), (2t + 1, g). */
__device__ __forceinline__ void load_transposed(uint32_t r[4], const void *row)
{
    uint32_t at = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}
#else
void load_matrices(uint32_t r[4], const void *row)
{
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (int m = 0; m < 4; m++)
        memcpy(&r[m], (const char *)__shfl_sync(0xffffffffu, row, 8 * m + g) + 4 * t, 4);
}

void load_transposed(uint32_t r[4], const void *row)
{
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (int m = 0; m < 4; m++)
        for (int i = 0; i < 2; i++)
            memcpy((char *)&r[m] + 2 * i, (const char *)__shfl_sync(0xffffffffu, row, 8 * m + 2 * t + i) + 2 * g, 2);
}
#endif

/* ---- the kernel ---- */

/* WIDTH: head width rounded up to a multiple of 16. */
template <int WIDTH> struct tile {
    static const int LD = WIDTH + GAP;
    static const size_t BYTES = 2 * KEYS * (LD * sizeof(uint16_t) + WIDTH * sizeof(float));
    float4 *fresh_k, *fresh_v; /* [KEYS][Dh] as they come */
    uint16_t *k, *v;           /* [KEYS][LD] rounded, zero where the head or the keys end */

    __device__ __forceinline__ tile()
    {
        B2_DYNAMIC_SHARED(float4, block);
        fresh_k = block;
        fresh_v = fresh_k + KEYS * WIDTH / 4;
        k = (uint16_t *)(fresh_v + KEYS * WIDTH / 4);
        v = k + KEYS * LD;
    }
};

template <int WIDTH>
__device__ __forceinline__ void fetch(const b2_attention_view &a, const b2_attention_row &row, int64_t offset, int first,
                                      const tile<WIDTH> &t)
{
    int fours = a.head_dim / 4, count = row.keys - first < KEYS ? row.keys - first : KEYS;
    for (int p = threadIdx.x; p < count * fours; p += blockDim.x) {
        int j = p / fours, d = p % fours;
        b2_copy16(t.fresh_k + p, (const float *)a.k + (row.prefix_start + first + j) * a.k_ld + offset + 4 * d, 16);
        b2_copy16(t.fresh_v + p, (const float *)a.v + (row.prefix_start + first + j) * a.v_ld + offset + 4 * d, 16);
    }
    b2_copy_commit();
}

template <int BF16, int WIDTH>
__device__ __forceinline__ void round_tile(const b2_attention_view &a, const b2_attention_row &row, int first,
                                           const tile<WIDTH> &t)
{
    int fours = a.head_dim / 4, count = row.keys - first < KEYS ? row.keys - first : KEYS;
    for (int p = threadIdx.x; p < KEYS * (WIDTH / 4); p += blockDim.x) {
        int j = p / (WIDTH / 4), d = p % (WIDTH / 4);
        float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f), y = x;
        if (j < count && d < fours) {
            x = t.fresh_k[j * fours + d];
            y = t.fresh_v[j * fours + d];
        }
        *(uint2 *)(t.k + j * t.LD + 4 * d) = make_uint2(round_two<BF16>(x.x, x.y), round_two<BF16>(x.z, x.w));
        *(uint2 *)(t.v + j * t.LD + 4 * d) = make_uint2(round_two<BF16>(y.x, y.y), round_two<BF16>(y.z, y.w));
    }
}

/* A fragments of 16 queries from `first`; zero where the row or the head ends. */
template <int BF16, int WIDTH>
__device__ __forceinline__ void load_queries(const b2_attention_view &a, const b2_attention_row &row, int head, int first,
                                             uint32_t q[WIDTH / 16][4])
{
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int step = 0; step < WIDTH / 16; step++)
#pragma unroll
        for (int part = 0; part < 4; part++) {
            int i = first + g + part % 2 * 8, d = 16 * step + part / 2 * 8 + 2 * t;
            float2 x = make_float2(0.0f, 0.0f);
            if (i < row.queries && d < a.head_dim)
                x = *(const float2 *)(a.q + (int64_t)(row.first_query + i) * a.q_ld + (int64_t)head * a.head_dim + d);
            q[step][part] = round_two<BF16>(x.x, x.y);
        }
}

/* s [STRIP / 8][4]: C fragments of the 16 queries' products with keys [strip, strip + STRIP) of the tile. */
template <int BF16, int WIDTH>
__device__ __forceinline__ void multiply_keys(const tile<WIDTH> &tile, int strip, const uint32_t q[WIDTH / 16][4],
                                              float s[STRIP / 8][4])
{
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < STRIP / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            s[n][i] = 0.0f;
#pragma unroll
    for (int step = 0; step < WIDTH / 16; step++)
#pragma unroll
        for (int n = 0; n < STRIP / 8; n += 2) {
            uint32_t b[4]; /* of key groups n and n + 1: both halves of the 16 elements */
            int key = strip + 8 * n + lane / 16 * 8 + lane % 8, d = 16 * step + lane / 8 % 2 * 8;
            load_matrices(b, tile.k + key * tile.LD + d);
            multiply<BF16>(s[n], q[step], b[0], b[1]);
            multiply<BF16>(s[n + 1], q[step], b[2], b[3]);
        }
}

/* o [WIDTH / 8][4] += p . v for the strip; p: weights as C fragments. */
template <int BF16, int WIDTH>
__device__ __forceinline__ void add_values(const tile<WIDTH> &tile, int strip, const float p[STRIP / 8][4],
                                           float o[WIDTH / 8][4])
{
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < STRIP / 16; step++) {
        uint32_t a[4] = {round_two<BF16>(p[2 * step][0], p[2 * step][1]), round_two<BF16>(p[2 * step][2], p[2 * step][3]),
                         round_two<BF16>(p[2 * step + 1][0], p[2 * step + 1][1]),
                         round_two<BF16>(p[2 * step + 1][2], p[2 * step + 1][3])};
#pragma unroll
        for (int n = 0; n < WIDTH / 8; n += 2) {
            uint32_t b[4];
            int key = strip + 16 * step + lane / 8 % 2 * 8 + lane % 8, d = 8 * n + lane / 16 * 8;
            load_transposed(b, tile.v + key * tile.LD + d);
            multiply<BF16>(o[n], a, b[0], b[1]);
            multiply<BF16>(o[n + 1], a, b[2], b[3]);
        }
    }
}

/* Over the four lanes that share a query. */
__device__ __forceinline__ float largest_of_query(float x)
{
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float sum_of_query(float x)
{
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

/* Scores of `left` keys become weights; o is brought to the new reference. most, sum [2]: of queries g and g + 8; most is a
 * product, not yet scaled; sum is this lane's share. */
template <int WIDTH>
__device__ __forceinline__ void soften(float s[STRIP / 8][4], int left, float scale2, float most[2], float sum[2],
                                       float o[WIDTH / 8][4])
{
    int t = threadIdx.x % 4;
    float larger[2] = {most[0], most[1]}, keep[2];
#pragma unroll
    for (int n = 0; n < STRIP / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (8 * n + 2 * t + i % 2 >= left)
                s[n][i] = -INFINITY;
            larger[i / 2] = fmaxf(larger[i / 2], s[n][i]);
        }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        larger[r] = largest_of_query(larger[r]);
        keep[r] = exp2f(scale2 * (most[r] - larger[r]));
        most[r] = larger[r];
        sum[r] *= keep[r];
    }
    if (__any_sync(0xffffffffu, keep[0] != 1.0f || keep[1] != 1.0f)) {
#pragma unroll
        for (int n = 0; n < WIDTH / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                o[n][i] *= keep[i / 2];
    }
#pragma unroll
    for (int n = 0; n < STRIP / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            s[n][i] = exp2f(scale2 * (s[n][i] - larger[i / 2]));
            sum[i / 2] += s[n][i];
        }
}

/* scale2 = scale * log2(e), above 0. */
template <int BF16, int WIDTH>
__global__ void __launch_bounds__(32 * WARPS, 2)
    pictures_kernel(b2_attention_view a, int blocks_per_row, float scale2)
{
    tile<WIDTH> tile;
    b2_attention_row row = b2_attention_row_of(a, blockIdx.x / blocks_per_row);
    int warps = blockDim.x / 32, begin = (int)(blockIdx.x % blocks_per_row) * warps * ROWS, head = blockIdx.y;
    if (begin >= row.queries || row.queries <= B2_ATTENTION_FEW)
        return;
    int first = begin + threadIdx.x / 32 * ROWS, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    int64_t offset = (int64_t)(head / (a.heads / a.kv_heads)) * a.head_dim;
    uint32_t q[WIDTH / 16][4];
    float o[WIDTH / 8][4], most[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            o[n][i] = 0.0f;
    fetch<WIDTH>(a, row, offset, 0, tile);
    load_queries<BF16, WIDTH>(a, row, head, first, q);
    for (int key = 0; key < row.keys; key += KEYS) {
        b2_copy_wait<0>();
        __syncthreads();
        round_tile<BF16, WIDTH>(a, row, key, tile);
        __syncthreads();
        if (key + KEYS < row.keys)
            fetch<WIDTH>(a, row, offset, key + KEYS, tile);
        for (int strip = 0; strip < KEYS && key + strip < row.keys; strip += STRIP) {
            float s[STRIP / 8][4];
            multiply_keys<BF16, WIDTH>(tile, strip, q, s);
            soften<WIDTH>(s, row.keys - key - strip, scale2, most, sum, o);
            add_values<BF16, WIDTH>(tile, strip, s, o);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int i = first + g + 8 * r;
        float total = sum_of_query(sum[r]), divisor = total == 0.0f ? 1.0f : total;
        if (i >= row.queries)
            continue;
        float *to = a.out + (int64_t)(row.first_query + i) * a.out_ld + (int64_t)head * a.head_dim;
#pragma unroll
        for (int n = 0; n < WIDTH / 8; n++)
            if (8 * n + 2 * t < a.head_dim)
                *(float2 *)(to + 8 * n + 2 * t) = make_float2(o[n][2 * r] / divisor, o[n][2 * r + 1] / divisor);
    }
}

template <int BF16, int WIDTH>
int launch(b2_ctx *ctx, const b2_attention_view *a, int64_t most_queries, b2_err *err)
{
    int64_t pieces = (most_queries + ROWS - 1) / ROWS, blocks = (pieces + WARPS - 1) / WARPS;
    int64_t warps = (pieces + blocks - 1) / blocks;
    cudaError_t status = cudaFuncSetAttribute(pictures_kernel<BF16, WIDTH>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              (int)tile<WIDTH>::BYTES);
    if (b2_cuda_check(status, "attention of pictures: shared memory", err) < 0)
        return -1;
    B2_LAUNCH((pictures_kernel<BF16, WIDTH>), dim3((unsigned)(a->rows * blocks), (unsigned)a->heads),
              dim3((unsigned)(32 * warps)), tile<WIDTH>::BYTES, b2_cuda_stream(ctx), *a, (int)blocks,
              a->scale * 1.44269504f);
    return b2_cuda_launched("attention of pictures", err);
}

template <int BF16> int launch_by_width(b2_ctx *ctx, const b2_attention_view *a, int64_t most_queries, b2_err *err)
{
    if (a->head_dim <= 64)
        return launch<BF16, 64>(ctx, a, most_queries, err);
    if (a->head_dim <= 96)
        return launch<BF16, 96>(ctx, a, most_queries, err);
    return launch<BF16, 128>(ctx, a, most_queries, err);
}

} // namespace

int b2_attention_pictures(b2_ctx *ctx, const b2_attention_view *view, int64_t most_queries, b2_dtype operands, b2_err *err)
{
    return operands == B2_BF16 ? launch_by_width<1>(ctx, view, most_queries, err)
                               : launch_by_width<0>(ctx, view, most_queries, err);
}
