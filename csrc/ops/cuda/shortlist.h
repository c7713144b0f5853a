/* Of each row of logits what a search looks at: the largest logit, the sum of exponentials, the k best candidates, and the logits
 * of ids that its rules may change, which are no candidates. A few hundred bytes go to the host and not the row.
 *
 * A block per row. Each thread has the largest of its own share; the k-th largest of those bounds the k-th largest of the row
 * from below, so that few are collected (by value, then ascending id) and sorted. Where more than ROOM are as large, the row is
 * crowded. Listed logits are -Inf while candidates are looked for, and put back.
 *
 * The sum has the bits of b2_scores_log_softmax (generate/scores.c): blocks of 1024, each the sum of 16 lanes in fp32, their
 * sums in double one after another; the same polynomial, each operation rounded. */
#ifndef B2_OPS_CUDA_SHORTLIST_H
#define B2_OPS_CUDA_SHORTLIST_H

#include "ops/cuda/cuda.h"
#include "ops/cuda/keys.h"
#include "ops/cuda/rows.h"

enum { B2_SHORTLIST_THREADS = 512, B2_SHORTLIST_ROOM = 2048 /* for keys that are collected */ };

namespace b2_shortlist_of_row {

enum { THREADS = B2_SHORTLIST_THREADS, LANES = 16, HALVES = THREADS / LANES };
const int64_t SUM_BLOCK = 1024, BLOCKS_MOST = 1024;
const unsigned ROOM = B2_SHORTLIST_ROOM;

/* exp_negative of generate/scores.c. */
static __device__ __forceinline__ float exp_negative(float x)
{
    const float to_integer = 12582912.0f;
    float clipped = x >= -87.0f ? x : -87.0f;
    float shifted = __fadd_rn(__fmul_rn(clipped, 1.44269504f), to_integer), n = __fsub_rn(shifted, to_integer);
    float r = __fsub_rn(__fsub_rn(clipped, __fmul_rn(n, 0.693359375f)), __fmul_rn(n, -2.12194440e-4f));
    const float terms[] = {8.3333333e-3f, 4.1666667e-2f, 1.6666667e-1f, 0.5f, 1.0f, 1.0f};
    float p = 1.3888889e-3f;
#pragma unroll
    for (int i = 0; i < 6; i++)
        p = __fadd_rn(__fmul_rn(p, r), terms[i]);
    return __fmul_rn(p, __uint_as_float((__float_as_uint(shifted) << 23) + 0x3f800000u));
}

/* Of elements [0, n) at x, n <= SUM_BLOCK, by 16 lanes; both halves of a warp come together. The result is in lane 0. */
static __device__ __forceinline__ double sum_of_block(const float *x, int n, float top)
{
    int lane = (int)threadIdx.x % LANES, whole = n / LANES * LANES;
    float mine = 0.0f;
    for (int i = lane; i < whole; i += LANES)
        mine = __fadd_rn(mine, exp_negative(__fsub_rn(x[i], top)));
    double sum = 0.0;
    for (int i = whole; i < n; i++)
        sum += (double)exp_negative(__fsub_rn(x[i], top));
    for (int j = 0; j < LANES; j++)
        sum += (double)__shfl_sync(B2_WHOLE_WARP, mine, j, LANES);
    return sum;
}

/* The blocks' sums are added in rounds of BLOCKS_MOST, in their order. */
static __device__ void add_up(double *to, const float *row, int64_t cols, float top, double *block_sums)
{
    int half = (int)threadIdx.x / LANES;
    int64_t blocks = (cols + SUM_BLOCK - 1) / SUM_BLOCK;
    double sum = 0.0;
    for (int64_t first = 0; first < blocks; first += BLOCKS_MOST) {
        int count = (int)(blocks - first < BLOCKS_MOST ? blocks - first : BLOCKS_MOST);
        /* As many rounds for both halves of a warp. */
        for (int base = half / 2 * 2; base < count; base += HALVES) {
            int b = base + half % 2;
            int64_t at = (first + b) * SUM_BLOCK, left = b < count ? cols - at : 0;
            double part = sum_of_block(row + at, (int)(left < SUM_BLOCK ? left : SUM_BLOCK), top);
            if (threadIdx.x % LANES == 0 && b < count)
                block_sums[b] = part;
        }
        __syncthreads();
        for (int b = 0; threadIdx.x == 0 && b < count; b++)
            sum += block_sums[b];
        __syncthreads();
    }
    if (threadIdx.x == 0)
        *to = sum;
}

static __device__ __forceinline__ float largest_of_share(const float *row, int64_t cols)
{
    float most = -INFINITY;
    for (int64_t j = threadIdx.x; j < cols; j += THREADS)
        most = fmaxf(most, row[j]);
    return most;
}

/* The least that a key has to be so that at least k are as large: from the threads' shares. 0 where there are too few. */
static __device__ __forceinline__ b2_key bound_of(float mine, int64_t cols, int k, b2_key *kept)
{
    b2_shared_keys list = {kept};
    kept[threadIdx.x] = (int64_t)threadIdx.x < cols ? (b2_key)b2_order_of(mine) << 32 : 0;
    __syncthreads();
    b2_sort_keys(list, THREADS);
    b2_key bound = kept[k - 1];
    __syncthreads();
    return bound;
}

static_assert(BLOCKS_MOST <= ROOM && THREADS <= ROOM && (int)B2_SHORTLIST_MOST <= THREADS, "lists find room in shared memory");

} // namespace b2_shortlist_of_row

/* Row i of x, by the B2_SHORTLIST_THREADS threads of a block. all.listed is there already. */
static __device__ void b2_shortlist_row(const b2_tensor &x, const b2_shortlist_parts &all, int64_t i, int adds_up)
{
    using namespace b2_shortlist_of_row;
    __shared__ b2_key kept[ROOM];
    __shared__ float largest[B2_WARPS_MOST];
    __shared__ unsigned count;
    int64_t ld = all.listed_ld;
    int k = all.k;
    float *row = x.data + i * x.ld, *listed_values = all.listed_values + i * ld;
    const int32_t *listed = all.listed + i * ld;
    for (int64_t j = threadIdx.x; j < ld; j += THREADS)
        listed_values[j] = listed[j] >= 0 && listed[j] < x.cols ? row[listed[j]] : 0.0f;
    float mine = largest_of_share(row, x.cols), top = b2_block_reduce<b2_nan_max>(mine, largest);
    if (adds_up)
        add_up(all.sums + i, row, x.cols, top, (double *)kept);
    if (threadIdx.x == 0) {
        all.tops[i] = top;
        count = 0;
    }
    __syncthreads();
    if (ld > 0) {
        for (int64_t j = threadIdx.x; j < ld; j += THREADS)
            if (listed[j] >= 0 && listed[j] < x.cols)
                row[listed[j]] = -INFINITY;
        __syncthreads();
        mine = largest_of_share(row, x.cols);
    }
    b2_key bound = bound_of(mine, x.cols, k, kept);
    for (int64_t j = threadIdx.x; j < x.cols; j += THREADS) {
        b2_key key = b2_key_of(row[j], j);
        unsigned at = key >= bound && row[j] > -INFINITY ? atomicAdd(&count, 1u) : ROOM;
        if (at < ROOM)
            kept[at] = key;
    }
    __syncthreads();
    int found = (int)(count < ROOM ? count : ROOM);
    b2_shared_keys list = {kept};
    b2_sort_keys(list, found);
    for (int c = (int)threadIdx.x; c < k; c += THREADS) {
        int32_t id = c < found ? (int32_t)~(unsigned)kept[c] : -1;
        all.ids[i * k + c] = id;
        all.values[i * k + c] = id >= 0 ? row[id] : -INFINITY;
    }
    if (threadIdx.x == 0)
        all.crowded[i] = count > ROOM;
    for (int64_t j = threadIdx.x; j < ld; j += THREADS)
        if (listed[j] >= 0 && listed[j] < x.cols)
            row[listed[j]] = listed_values[j];
}

#endif
