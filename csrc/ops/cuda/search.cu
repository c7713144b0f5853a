/* What searches ask of a device: the k largest of a row, whether rows are finite, and texts against the pictures of an index.
 *
 * top_k: a value and its place become one 64-bit key, the better the larger (a NaN below everything, equal values by ascending
 * place), so that keys are all different. The k-th largest is found digit by digit with a histogram of each digit (usually
 * after the four digits of the value), all keys from it on are collected, and sorted. A block per row; what is collected lies
 * in the outputs themselves.
 *
 * picture_scores: a warp per record; the texts of a group in shared memory as fp32. */
#include <cuda_fp16.h>

#include "ops/cuda/cuda_ops.h"
#include "ops/cuda/keys.h"
#include "ops/cuda/rows.h"

namespace {

/* ---- top k ---- */

enum { TOP_THREADS = 512, DIGITS = 256, SORTED_MOST = 4096 /* in shared memory */ };

/* Counts, largest digit first, until `wanted` is within a digit's count: that digit, and how many of it are wanted. By the
 * first warp, 8 digits to a lane. */
__device__ void find_digit(const unsigned *counts, unsigned wanted, unsigned *digit, unsigned *rest)
{
    int lane = (int)threadIdx.x;
    unsigned mine = 0;
    for (int i = 0; i < DIGITS / B2_WARP; i++)
        mine += counts[DIGITS - 1 - (lane * (DIGITS / B2_WARP) + i)];
    unsigned before = mine;
    for (int step = 1; step < B2_WARP; step *= 2) {
        unsigned other = __shfl_up_sync(B2_WHOLE_WARP, before, (unsigned)step);
        before += lane >= step ? other : 0u;
    }
    before -= mine;
    if (before >= wanted || before + mine < wanted)
        return;
    for (int i = 0; i < DIGITS / B2_WARP; i++) {
        unsigned d = (unsigned)(DIGITS - 1 - (lane * (DIGITS / B2_WARP) + i));
        if (before + counts[d] >= wanted) {
            *digit = d;
            *rest = wanted - before;
            return;
        }
        before += counts[d];
    }
}

/* A list of keys as values and ids in the outputs. */
struct keys_in_outputs {
    float *orders; /* the key's upper half as bits */
    int32_t *ids;  /* its lower half */
    __device__ b2_key get(int i) const { return (b2_key)__float_as_uint(orders[i]) << 32 | (unsigned)ids[i]; }
    __device__ void put(int i, b2_key key) const
    {
        orders[i] = __uint_as_float((unsigned)(key >> 32));
        ids[i] = (int32_t)(unsigned)key;
    }
};

/* Keys from `least` on, in any order, into the list. */
template <class LIST>
__device__ void collect(LIST list, const float *row, int64_t cols, b2_key least, unsigned *count)
{
    for (int64_t j = threadIdx.x; j < cols; j += blockDim.x) {
        b2_key key = b2_key_of(row[j], j);
        if (key >= least)
            list.put((int)atomicAdd(count, 1u), key);
    }
    __syncthreads();
}

template <bool SHARED>
__global__ void __launch_bounds__(TOP_THREADS) top_k_kernel(float *values, int32_t *ids, b2_tensor x, int k)
{
    B2_DYNAMIC_SHARED(b2_key, kept);
    __shared__ unsigned counts[DIGITS], digit, rest, collected;
    const float *row = x.data + (int64_t)blockIdx.x * x.ld;
    values += (int64_t)blockIdx.x * k;
    ids += (int64_t)blockIdx.x * k;
    b2_key prefix = 0, known = 0; /* the digits of the k-th key that are found, and where they are */
    unsigned wanted = (unsigned)k;
    for (int shift = 56; shift >= 0; shift -= 8) {
        for (int d = (int)threadIdx.x; d < DIGITS; d += (int)blockDim.x)
            counts[d] = 0;
        __syncthreads();
        for (int64_t j = threadIdx.x; j < x.cols; j += blockDim.x) {
            b2_key key = b2_key_of(row[j], j);
            if ((key & known) == prefix)
                atomicAdd(counts + (unsigned)(key >> shift & (DIGITS - 1)), 1u);
        }
        __syncthreads();
        if (threadIdx.x < B2_WARP)
            find_digit(counts, wanted, &digit, &rest);
        __syncthreads();
        prefix |= (b2_key)digit << shift;
        known |= (b2_key)(DIGITS - 1) << shift;
        wanted = rest;
        bool all = wanted == counts[digit]; /* every key that begins so is among the k */
        __syncthreads();
        if (all)
            break;
    }
    if (threadIdx.x == 0)
        collected = 0;
    __syncthreads();
    keys_in_outputs outputs = {values, ids};
    if (SHARED) {
        b2_shared_keys list = {kept};
        collect(list, row, x.cols, prefix, &collected);
        b2_sort_keys(list, k);
        for (int i = (int)threadIdx.x; i < k; i += (int)blockDim.x)
            outputs.put(i, list.get(i));
    } else {
        collect(outputs, row, x.cols, prefix, &collected);
        b2_sort_keys(outputs, k);
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < k; i += (int)blockDim.x) {
        int32_t place = ~ids[i];
        ids[i] = place;
        values[i] = row[place];
    }
}

/* ---- finite ---- */

enum { THREADS = 256 };

__global__ void __launch_bounds__(THREADS) check_finite_kernel(b2_key *first_bad, b2_tensor x)
{
    const float *row = x.data + (int64_t)blockIdx.x * x.ld;
    int bad = 0;
    for (int64_t j = threadIdx.x; j < x.cols; j += blockDim.x)
        bad |= (__float_as_uint(row[j]) & 0x7f800000u) == 0x7f800000u;
    if (__syncthreads_or(bad) && threadIdx.x == 0)
        atomicMin(first_bad, (b2_key)blockIdx.x);
}

/* ---- texts and pictures ---- */

enum {
    TEXTS = 8,          /* that a warp takes together */
    SEARCH_THREADS = 128,
    STAGED_MOST = 1024, /* columns of a text that lie in shared memory */
    BLOCKS_PER_SM = 8
};

/* Columns of `x` [T, P], 0 where it ends: from shared memory, [TEXTS][padded], or as it lies. */
struct staged_texts {
    const float *data;
    int padded;
    __device__ __forceinline__ float one(int t, int64_t j) const { return data[t * padded + (int)j]; }
    __device__ __forceinline__ float4 four(int t, int64_t j) const { return b2_load4(data + t * padded + (int)j); }
};

struct far_texts {
    b2_tensor x;
    int64_t first;
    __device__ __forceinline__ float one(int t, int64_t j) const
    {
        return first + t < x.rows && j < x.cols ? x.data[(first + t) * x.ld + j] : 0.0f;
    }
    __device__ __forceinline__ float4 four(int t, int64_t j) const
    {
        return make_float4(one(t, j), one(t, j + 1), one(t, j + 2), one(t, j + 3));
    }
};

/* Sums `count` numbers over lanes that differ in the bits from `bit` up to 16, the lower lane keeping the first half of them at
 * each bit: as many shuffles as numbers, not five times as many. */
template <int COUNT, int BIT> struct fold {
    static __device__ __forceinline__ void over(float *sums)
    {
        bool upper = threadIdx.x & BIT;
#pragma unroll
        for (int i = 0; i < COUNT / 2; i++) {
            float keep = upper ? sums[i + COUNT / 2] : sums[i], give = upper ? sums[i] : sums[i + COUNT / 2];
            sums[i] = keep + __shfl_xor_sync(B2_WHOLE_WARP, give, BIT);
        }
        fold<COUNT / 2, BIT * 2>::over(sums);
    }
};
template <int COUNT> struct fold<COUNT, B2_WARP> {
    static __device__ __forceinline__ void over(float *) {}
};

/* The largest product of a text with the 16 vectors of an F16 panel, [P][16]. Lanes 2i and 2i + 1 have 8 vectors each of
 * columns i, i + 16, ... Returns that of text (bit 1, bit 2, bit 3 of the lane) = (4, 2, 1). */
template <class X> __device__ __forceinline__ float panel_f16(const X &x, const char *panel, int64_t width)
{
    int lane = (int)threadIdx.x % B2_WARP;
    float sums[TEXTS * 8] = {0.0f};
    for (int64_t j = lane / 2; j < width; j += B2_WARP / 2) {
        uint4 bits = __ldcs(reinterpret_cast<const uint4 *>(panel) + 2 * j + lane % 2);
        unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
        float w[8];
#pragma unroll
        for (int i = 0; i < 8; i++)
            w[i] = __half2float(__ushort_as_half((unsigned short)(words[i / 2] >> (16 * (i % 2)))));
#pragma unroll
        for (int t = 0; t < TEXTS; t++) {
            float a = x.one(t, j);
#pragma unroll
            for (int i = 0; i < 8; i++)
                sums[t * 8 + i] += a * w[i];
        }
    }
    fold<TEXTS * 8, 2>::over(sums); /* four times: 4 of a text's 8 vectors are left, bit 4 says which */
    float most = fmaxf(fmaxf(sums[0], sums[1]), fmaxf(sums[2], sums[3]));
    most = fmaxf(most, __shfl_xor_sync(B2_WHOLE_WARP, most, 16));
    return fmaxf(most, __shfl_xor_sync(B2_WHOLE_WARP, most, 1));
}

/* The same of an I8 panel, [P/4][16][4] of q + 128: lanes 4i to 4i + 3 have 4 vectors each of columns 4i to 4i + 3, and so on.
 * Returns that of text (bit 2, bit 3, bit 4 of the lane) = (4, 2, 1). */
template <class X>
__device__ __forceinline__ float panel_i8(const X &x, const char *panel, const float *scales, int64_t width)
{
    int lane = (int)threadIdx.x % B2_WARP;
    float sums[TEXTS * 4] = {0.0f};
    for (int64_t j = lane / 4; 4 * j < width; j += B2_WARP / 4) {
        uint4 bits = __ldcs(reinterpret_cast<const uint4 *>(panel) + 4 * j + lane % 4);
        unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (int t = 0; t < TEXTS; t++) {
            float4 a = x.four(t, 4 * j);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float sum = a.x * (float)((int)(words[i] & 0xff) - 128);
                sum += a.y * (float)((int)(words[i] >> 8 & 0xff) - 128);
                sum += a.z * (float)((int)(words[i] >> 16 & 0xff) - 128);
                sums[t * 4 + i] += sum + a.w * (float)((int)(words[i] >> 24) - 128);
            }
        }
    }
    fold<TEXTS * 4, 4>::over(sums); /* three times: the 4 vectors of a text */
    float4 scale = b2_load4(scales + 4 * (lane % 4));
    float most = fmaxf(fmaxf(sums[0] * scale.x, sums[1] * scale.y), fmaxf(sums[2] * scale.z, sums[3] * scale.w));
    most = fmaxf(most, __shfl_xor_sync(B2_WHOLE_WARP, most, 1));
    return fmaxf(most, __shfl_xor_sync(B2_WHOLE_WARP, most, 2));
}

/* What a kernel knows of records. */
struct records {
    const char *data;
    int64_t count, width, bytes, panel_bytes;
    int panels;
};

template <bool I8, class X>
__device__ __forceinline__ void score(b2_tensor out, int64_t first, const X &x, const records &r)
{
    int lane = (int)threadIdx.x % B2_WARP, warps = SEARCH_THREADS / B2_WARP;
    int low = I8 ? 2 : 1; /* the bit of the lane that says 4 of the text */
    int text = 4 * (lane >> low & 1) + 2 * (lane >> (low + 1) & 1) + (lane >> (low + 2) & 1);
    bool writes = (lane & ~(7 << low)) == 0 && first + text < out.rows;
    for (int64_t n = (int64_t)blockIdx.x * warps + threadIdx.x / B2_WARP; n < r.count; n += (int64_t)gridDim.x * warps) {
        const char *record = r.data + n * r.bytes;
        const float *scales = reinterpret_cast<const float *>(record + r.panels * r.panel_bytes);
        float most = -INFINITY;
        for (int p = 0; p < r.panels; p++) {
            const char *panel = record + p * r.panel_bytes;
            most = fmaxf(most, I8 ? panel_i8(x, panel, scales + p * B2_PANEL, r.width) : panel_f16(x, panel, r.width));
        }
        if (writes)
            out.data[(first + text) * out.ld + n] = most;
    }
}

/* blockIdx.y: a group of TEXTS texts. */
template <bool I8, bool STAGED>
__global__ void __launch_bounds__(SEARCH_THREADS) picture_scores_kernel(b2_tensor out, b2_tensor texts, records r, int padded)
{
    B2_DYNAMIC_SHARED(float, shared);
    int64_t first = (int64_t)blockIdx.y * TEXTS;
    far_texts far = {texts, first};
    if (STAGED) {
        for (int i = (int)threadIdx.x; i < TEXTS * padded; i += SEARCH_THREADS)
            shared[i] = far.one(i / padded, i % padded);
        __syncthreads();
        staged_texts near = {shared, padded};
        score<I8>(out, first, near, r);
    } else {
        score<I8>(out, first, far, r);
    }
}

} // namespace

int b2_cuda_top_k(b2_ctx *ctx, float *values, int32_t *ids, b2_tensor x, int k, b2_err *err)
{
    dim3 grid((unsigned)x.rows), block(b2_threads_for(x.cols / 4, TOP_THREADS));
    if (k <= SORTED_MOST)
        B2_LAUNCH(top_k_kernel<true>, grid, block, (size_t)k * sizeof(b2_key), b2_cuda_stream(ctx), values, ids, x, k);
    else
        B2_LAUNCH(top_k_kernel<false>, grid, block, 0, b2_cuda_stream(ctx), values, ids, x, k);
    return b2_cuda_launched("top_k", err);
}

int b2_cuda_check_finite(b2_ctx *ctx, int64_t *first_bad_row, b2_tensor x, b2_err *err)
{
    size_t mark = b2_arena_mark(ctx->activations);
    b2_key *device = (b2_key *)b2_cuda_take(ctx, 1, sizeof *device, err), found = 0;
    int status = -1;
    if (device && b2_cuda_check(cudaMemsetAsync(device, 0xff, sizeof *device, b2_cuda_stream(ctx)), "check_finite", err) == 0) {
        B2_LAUNCH(check_finite_kernel, dim3((unsigned)x.rows), dim3(b2_threads_for(x.cols, THREADS)), 0, b2_cuda_stream(ctx),
                  device, x);
        status = b2_cuda_launched("check_finite", err) < 0 ? -1 : b2_cuda_download(ctx, &found, device, sizeof found, err);
    }
    b2_arena_reset(ctx->activations, mark);
    *first_bad_row = found == ~(b2_key)0 || status < 0 ? -1 : (int64_t)found;
    return status;
}

size_t b2_cuda_rows_scratch(const b2_ctx *ctx, int64_t max_rows, int64_t max_width)
{
    (void)ctx, (void)max_rows, (void)max_width;
    return b2_arena_cost(1, sizeof(b2_key));
}

int b2_cuda_picture_scores(b2_ctx *ctx, b2_tensor out, b2_tensor texts, const b2_records *given, b2_err *err)
{
    cudaStream_t stream = b2_cuda_stream(ctx);
    records r = {(const char *)given->data, given->pictures, given->width, b2_record_bytes(given),
                 b2_record_panel_bytes(given), (int)b2_record_panels(given)};
    int64_t warps = SEARCH_THREADS / B2_WARP, needed = (r.count + warps - 1) / warps;
    int64_t most = BLOCKS_PER_SM * (int64_t)b2_cuda_of(ctx)->multiprocessors;
    dim3 grid((unsigned)(needed < most ? needed : most), (unsigned)((texts.rows + TEXTS - 1) / TEXTS));
    bool staged = r.width <= STAGED_MOST, i8 = given->dtype == B2_I8;
    int padded = staged ? (int)b2_strided_ld(r.width) : 0;
    size_t bytes = (size_t)TEXTS * (size_t)padded * sizeof(float);
    if (i8 && staged)
        B2_LAUNCH((picture_scores_kernel<true, true>), grid, dim3(SEARCH_THREADS), bytes, stream, out, texts, r, padded);
    else if (i8)
        B2_LAUNCH((picture_scores_kernel<true, false>), grid, dim3(SEARCH_THREADS), bytes, stream, out, texts, r, padded);
    else if (staged)
        B2_LAUNCH((picture_scores_kernel<false, true>), grid, dim3(SEARCH_THREADS), bytes, stream, out, texts, r, padded);
    else
        B2_LAUNCH((picture_scores_kernel<false, false>), grid, dim3(SEARCH_THREADS), bytes, stream, out, texts, r, padded);
    return b2_cuda_launched("picture_scores", err);
}
