/* Values of a row and their places as 64-bit keys, the better the larger: a NaN below everything, equal values by ascending
 * place, so that all keys of a row are different. A block sorts lists of them. */
#ifndef B2_OPS_CUDA_KEYS_H
#define B2_OPS_CUDA_KEYS_H

#include "ops/cuda/cuda.h"

typedef unsigned long long b2_key;

/* Larger for larger values; 0 for NaN. -0 is equal to 0. */
static __device__ __forceinline__ unsigned b2_order_of(float x)
{
    unsigned bits = __float_as_uint(x == 0.0f ? 0.0f : x);
    return x != x ? 0u : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static __device__ __forceinline__ b2_key b2_key_of(float x, int64_t place)
{
    return (b2_key)b2_order_of(x) << 32 | (b2_key)(~(unsigned)place);
}

/* A list of keys in shared memory. */
struct b2_shared_keys {
    b2_key *keys;
    __device__ b2_key get(int i) const { return keys[i]; }
    __device__ void put(int i, b2_key key) const { keys[i] = key; }
};

/* The largest first. Bitonic, of any length: what would stand behind the end is the smallest of all and never moves. */
template <class LIST> static __device__ void b2_sort_keys(LIST list, int n)
{
    for (int size = 2; size < 2 * n; size *= 2) {
        for (int step = size / 2; step > 0; step /= 2) {
            for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) {
                /* The first pass of each size compares with the mirror image, so that all of them sort alike. */
                int other = step == size / 2 ? i ^ (size - 1) : i ^ step;
                if (other <= i || other >= n)
                    continue;
                b2_key a = list.get(i), b = list.get(other);
                if (a < b) {
                    list.put(i, b);
                    list.put(other, a);
                }
            }
            __syncthreads();
        }
    }
}

#endif
