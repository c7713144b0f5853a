/* What the kernels of products need of the machine below C++: copies into shared memory that nobody waits for, products on
 * the tensor cores (mma.sync, sm_80 and later), and whole numbers into float16.
 *
 * Built for the host, copies are done at once and a tensor core's product is computed by the lanes of the warp from the
 * same fragments, so that everything around the instruction is the code that a card runs.
 *
 * Fragments of one 16 x 8 x 16 product, of lane = 4 g + t: a[0] = A[g][2t, 2t+1], a[1] = A[g+8][2t, 2t+1],
 * a[2] = A[g][2t+8, 2t+9], a[3] = A[g+8][2t+8, 2t+9]; b[0] = B[2t, 2t+1][g], b[1] = B[2t+8, 2t+9][g]; c[0] = C[g][2t],
 * c[1] = C[g][2t+1], c[2] = C[g+8][2t], c[3] = C[g+8][2t+1]. A sum has no order, so the kernels give slot 2t, 2t+1, 2t+8,
 * 2t+9 to neighbouring columns of a matrix that one lane has loaded together: the same columns on both sides. */
#ifndef B2_OPS_CUDA_MMA_H
#define B2_OPS_CUDA_MMA_H

#include "ops/cuda/cuda.h"

#ifdef CUDA_HOST

#include "ops/half.h"

/* `bytes` (16, or 0 for zeros) from device to shared memory, both at multiples of 16. */
static inline void b2_copy16(void *shared, const void *from, int bytes)
{
    if (bytes)
        memcpy(shared, from, 16);
    else
        memset(shared, 0, 16);
}

static inline void b2_copy_commit() {}

template <int PENDING> static inline void b2_copy_wait() {}

static inline void b2_prefetch_l2(const void *) {}

template <int BF16> static inline float b2_host_half(uint32_t pair, int upper)
{
    uint16_t bits = (uint16_t)(upper ? pair >> 16 : pair);
    return BF16 ? b2_bf16_to_f32(bits) : b2_f16_to_f32(bits);
}

template <int BF16>
static inline void b2_mma(float c[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1)
{
    __shared__ uint32_t a[8][32][4], b[8][32][2]; /* [warps][lanes] */
    int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
    memcpy(a[warp][lane], mine, sizeof a[warp][lane]);
    memcpy(b[warp][lane], mine + 4, sizeof b[warp][lane]);
    __syncwarp();
    for (int i = 0; i < 4; i++) {
        int row = i / 2, column = 2 * t + i % 2;
        double sum = c[i];
        for (int k = 0; k < 16; k++)
            sum += (double)b2_host_half<BF16>(a[warp][4 * g + k % 8 / 2][row + k / 8 * 2], k % 2) *
                   b2_host_half<BF16>(b[warp][4 * column + k % 8 / 2][k / 8], k % 2);
        c[i] = (float)sum;
    }
    __syncwarp();
}

static inline uint32_t b2_half2_sub(uint32_t x, uint32_t y)
{
    uint32_t low = b2_f32_to_f16(b2_host_half<0>(x, 0) - b2_host_half<0>(y, 0));
    uint32_t high = b2_f32_to_f16(b2_host_half<0>(x, 1) - b2_host_half<0>(y, 1));
    return low | high << 16;
}

static inline uint32_t b2_and_or(uint32_t x, uint32_t mask, uint32_t bits)
{
    return (x & mask) | bits;
}

static inline uint32_t b2_half2_fma(uint32_t x, uint32_t y, uint32_t z)
{
    uint32_t low = b2_f32_to_f16(fmaf(b2_host_half<0>(x, 0), b2_host_half<0>(y, 0), b2_host_half<0>(z, 0)));
    uint32_t high = b2_f32_to_f16(fmaf(b2_host_half<0>(x, 1), b2_host_half<0>(y, 1), b2_host_half<0>(z, 1)));
    return low | high << 16;
}

static inline uint16_t b2_to_half(float x)
{
    return b2_f32_to_f16(x);
}

static inline float b2_from_half(uint16_t bits)
{
    return b2_f16_to_f32(bits);
}

static inline uint16_t b2_to_bfloat(float x)
{
    return b2_f32_to_bf16(x);
}

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

static __device__ __forceinline__ void b2_copy16(void *shared, const void *from, int bytes)
{
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"((unsigned)__cvta_generic_to_shared(shared)),
                 "l"(from), "r"(bytes)
                 : "memory");
}

static __device__ __forceinline__ void b2_copy_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Waits until all but the last PENDING committed groups of this thread have arrived: for this thread. Others need a barrier
 * after it. */
template <int PENDING> static __device__ __forceinline__ void b2_copy_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

static __device__ __forceinline__ void b2_prefetch_l2(const void *at)
{
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}

/* c += A B in fp32 */
template <int BF16>
static __device__ __forceinline__ void b2_mma(float c[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                              uint32_t b1)
{
    if (BF16)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                     "{%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                     "{%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* x - y of two float16 each */
static __device__ __forceinline__ uint32_t b2_half2_sub(uint32_t x, uint32_t y)
{
    uint32_t out;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(x), "r"(y));
    return out;
}

/* x & mask | bits, in one instruction: left to itself the compiler makes two of it where both are constants. */
static __device__ __forceinline__ uint32_t b2_and_or(uint32_t x, uint32_t mask, uint32_t bits)
{
    uint32_t out;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(x), "r"(mask), "r"(bits));
    return out;
}

/* x y + z of two float16 each */
static __device__ __forceinline__ uint32_t b2_half2_fma(uint32_t x, uint32_t y, uint32_t z)
{
    uint32_t out;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(x), "r"(y), "r"(z));
    return out;
}

static __device__ __forceinline__ uint16_t b2_to_half(float x)
{
    return __half_as_ushort(__float2half_rn(x));
}

static __device__ __forceinline__ float b2_from_half(uint16_t bits)
{
    return __half2float(__ushort_as_half(bits));
}

static __device__ __forceinline__ uint16_t b2_to_bfloat(float x)
{
    return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

#endif

/* Four int8 into four float16: columns 0, 1 and 2, 3. 0x6400 + n is float16's 1024 + n. */
static __device__ __forceinline__ void b2_widen_int8(uint32_t out[2], uint32_t four)
{
    four ^= 0x80808080u; /* q + 128 */
    out[0] = b2_half2_sub(__byte_perm(four, 0x64646464u, 0x4140), 0x64806480u);
    out[1] = b2_half2_sub(__byte_perm(four, 0x64646464u, 0x4342), 0x64806480u);
}

/* Eight int4 (q + 8) into eight float16: columns 0, 4, then 1, 5, then 2, 6, then 3, 7: see b2_int4_order. The odd ones are
 * left where they are, sixteen times as large: (1024 + 16 (q + 8)) / 16 - 72 = q. */
static __device__ __forceinline__ void b2_widen_int4(uint32_t out[4], uint32_t eight)
{
    uint32_t upper = eight >> 8;
    out[0] = b2_half2_sub(b2_and_or(eight, 0x000f000fu, 0x64006400u), 0x64086408u);
    out[1] = b2_half2_fma(b2_and_or(eight, 0x00f000f0u, 0x64006400u), 0x2c002c00u, 0xd480d480u);
    out[2] = b2_half2_sub(b2_and_or(upper, 0x000f000fu, 0x64006400u), 0x64086408u);
    out[3] = b2_half2_fma(b2_and_or(upper, 0x00f000f0u, 0x64006400u), 0x2c002c00u, 0xd480d480u);
}

/* The columns of x in the order in which b2_widen_int4 gives those of the weight: of eight, column i goes to place
 * 2 (i mod 4) + i / 4. */
static __device__ __forceinline__ void b2_int4_order(uint16_t out[8], const uint16_t in[8])
{
    for (int i = 0; i < 8; i++)
        out[2 * (i % 4) + i / 4] = in[i];
}

#endif
