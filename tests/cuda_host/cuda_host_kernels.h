/* What kernels are written in: the keywords, the built-in variables, barriers, shuffles, atomics, vectors, and the launch. */
#ifndef CUDA_HOST_KERNELS_H
#define CUDA_HOST_KERNELS_H

#include <math.h>
#include <string.h>

#include <algorithm>
#include <functional>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__ static
#define __align__(n) __attribute__((aligned(n)))
/* Thread-local of the host thread that runs the block, and so static. The library has no thread-local variables beside
 * cuda_host_now, so its whole thread-local segment is shared memory, and can be filled with NaN without knowing what lies
 * in it. */
#define __shared__ thread_local

/* Dynamic shared memory: B2_DYNAMIC_SHARED of ops/cuda/cuda.h gives it a name. */
extern __thread unsigned char cuda_host_dynamic_shared[];

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

/* What the thread that runs now knows of itself. */
struct cuda_host_thread {
    uint3 thread, block;
    dim3 block_dim, grid_dim;
};
extern __thread cuda_host_thread *cuda_host_now;

#define threadIdx (cuda_host_now->thread)
#define blockIdx (cuda_host_now->block)
#define blockDim (cuda_host_now->block_dim)
#define gridDim (cuda_host_now->grid_dim)
constexpr int warpSize = 32;

/* ---- barriers and warps; every one knows the line it stands in ---- */

enum cuda_host_kind { CUDA_HOST_SYNC, CUDA_HOST_SHUFFLE, CUDA_HOST_BALLOT, CUDA_HOST_SUM, CUDA_HOST_MIN, CUDA_HOST_MAX };

/* Waits for all living threads of the block; returns how many of them came with a `value` that is not 0. */
int cuda_host_barrier(int value, const char *file, int line);
/* Waits for all living lanes of `mask`. SHUFFLE: the value of lane `source` (all ones if it is not there); BALLOT: the
 * lanes with a value; SUM, MIN, MAX: of all values, as signed numbers. */
uint64_t cuda_host_warp(int kind, unsigned mask, uint64_t value, int source, const char *file, int line);
int cuda_host_lane(void);
[[noreturn]] void cuda_host_trap(const char *file, int line);

#define CUDA_HOST_AT const char *file = __builtin_FILE(), int line = __builtin_LINE()

static inline void __syncthreads(CUDA_HOST_AT)
{
    cuda_host_barrier(0, file, line);
}
static inline int __syncthreads_count(int value, CUDA_HOST_AT)
{
    return cuda_host_barrier(value, file, line);
}
static inline int __syncthreads_or(int value, CUDA_HOST_AT)
{
    return cuda_host_barrier(value, file, line) > 0;
}
static inline int __syncthreads_and(int value, CUDA_HOST_AT)
{
    return cuda_host_barrier(!value, file, line) == 0;
}
static inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_HOST_AT)
{
    cuda_host_warp(CUDA_HOST_SYNC, mask, 0, 0, file, line);
}
static inline unsigned __ballot_sync(unsigned mask, int value, CUDA_HOST_AT)
{
    return (unsigned)cuda_host_warp(CUDA_HOST_BALLOT, mask, value != 0, 0, file, line);
}
static inline int __any_sync(unsigned mask, int value, CUDA_HOST_AT)
{
    return cuda_host_warp(CUDA_HOST_BALLOT, mask, value != 0, 0, file, line) != 0;
}
static inline int __all_sync(unsigned mask, int value, CUDA_HOST_AT)
{
    return cuda_host_warp(CUDA_HOST_BALLOT, mask, value == 0, 0, file, line) == 0;
}
template <class T> static inline T __reduce_add_sync(unsigned mask, T value, CUDA_HOST_AT)
{
    return (T)cuda_host_warp(CUDA_HOST_SUM, mask, (uint64_t)(int64_t)value, 0, file, line);
}
template <class T> static inline T __reduce_max_sync(unsigned mask, T value, CUDA_HOST_AT)
{
    return (T)cuda_host_warp(CUDA_HOST_MAX, mask, (uint64_t)(int64_t)value, 0, file, line);
}
template <class T> static inline T __reduce_min_sync(unsigned mask, T value, CUDA_HOST_AT)
{
    return (T)cuda_host_warp(CUDA_HOST_MIN, mask, (uint64_t)(int64_t)value, 0, file, line);
}

template <class T> static inline T cuda_host_shuffle(unsigned mask, T value, int source, const char *file, int line)
{
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "shuffles move up to 8 bytes");
    uint64_t bits = 0;
    memcpy((void *)&bits, (const void *)&value, sizeof value);
    bits = cuda_host_warp(CUDA_HOST_SHUFFLE, mask, bits, source, file, line);
    memcpy((void *)&value, (const void *)&bits, sizeof value);
    return value;
}
template <class T> static inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_HOST_AT)
{
    int first = cuda_host_lane() & ~(width - 1);
    return cuda_host_shuffle(mask, value, first | (source & (width - 1)), file, line);
}
template <class T> static inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_HOST_AT)
{
    int lane = cuda_host_lane(), first = lane & ~(width - 1), source = lane - (int)delta;
    return cuda_host_shuffle(mask, value, source < first ? lane : source, file, line);
}
template <class T> static inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_HOST_AT)
{
    int lane = cuda_host_lane(), last = lane | (width - 1), source = lane + (int)delta;
    return cuda_host_shuffle(mask, value, source > last ? lane : source, file, line);
}
template <class T> static inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, CUDA_HOST_AT)
{
    int lane = cuda_host_lane(), last = lane | (width - 1), source = lane ^ bits;
    return cuda_host_shuffle(mask, value, source > last ? lane : source, file, line);
}

static inline void __trap(CUDA_HOST_AT)
{
    cuda_host_trap(file, line);
}
static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline void __nanosleep(unsigned) {}

/* ---- atomics: one thread runs at a time ---- */

template <class T, class F> static inline T cuda_host_atomic(T *at, F change)
{
    T before = *at;
    *at = change(before);
    return before;
}
template <class T> using cuda_host_same = typename std::common_type<T>::type;
template <class T> static inline T atomicAdd(T *at, cuda_host_same<T> value)
{
    return cuda_host_atomic(at, [=](T now) { return (T)(now + value); });
}
template <class T> static inline T atomicSub(T *at, cuda_host_same<T> value)
{
    return cuda_host_atomic(at, [=](T now) { return (T)(now - value); });
}
template <class T> static inline T atomicMax(T *at, cuda_host_same<T> value)
{
    return cuda_host_atomic(at, [=](T now) { return now > value ? now : value; });
}
template <class T> static inline T atomicMin(T *at, cuda_host_same<T> value)
{
    return cuda_host_atomic(at, [=](T now) { return now < value ? now : value; });
}
template <class T> static inline T atomicExch(T *at, cuda_host_same<T> value)
{
    return cuda_host_atomic(at, [=](T) { return value; });
}
template <class T> static inline T atomicCAS(T *at, cuda_host_same<T> expected, cuda_host_same<T> value)
{
    return cuda_host_atomic(at, [=](T now) { return now == expected ? value : now; });
}
template <class T> static inline T atomicOr(T *at, cuda_host_same<T> value)
{
    return cuda_host_atomic(at, [=](T now) { return (T)(now | value); });
}
template <class T> static inline T atomicAnd(T *at, cuda_host_same<T> value)
{
    return cuda_host_atomic(at, [=](T now) { return (T)(now & value); });
}
static inline unsigned atomicInc(unsigned *at, unsigned most)
{
    return cuda_host_atomic(at, [=](unsigned now) { return now >= most ? 0u : now + 1; });
}

/* ---- numbers ---- */

using std::max;
using std::min;
/* glibc has declared functions of these names. */
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __powf(x, y) powf(x, y)
static inline float __fdividef(float x, float y) { return x / y; }
static inline float __fdiv_rn(float x, float y) { return x / y; }
static inline float __frcp_rn(float x) { return 1.0f / x; }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float __fadd_rn(float x, float y) { return x + y; }
static inline float __fsub_rn(float x, float y) { return x - y; }
static inline float __fmul_rn(float x, float y) { return x * y; }
static inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
static inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
static inline double rsqrt(double x) { return 1.0 / sqrt(x); }
static inline float __double2float_rn(double x) { return (float)x; }
static inline int __float2int_rn(float x) { return (int)rintf(x); }
static inline int __float2int_rz(float x) { return (int)x; }
static inline float __int2float_rn(int x) { return (float)x; }
static inline float __uint2float_rn(unsigned x) { return (float)x; }

template <class To, class From> static inline To cuda_host_bits(From from)
{
    static_assert(sizeof(To) == sizeof(From), "the same number of bits");
    To to;
    memcpy((void *)&to, (const void *)&from, sizeof to);
    return to;
}
static inline int __float_as_int(float x) { return cuda_host_bits<int>(x); }
static inline unsigned __float_as_uint(float x) { return cuda_host_bits<unsigned>(x); }
static inline float __int_as_float(int x) { return cuda_host_bits<float>(x); }
static inline float __uint_as_float(unsigned x) { return cuda_host_bits<float>(x); }
static inline long long __double_as_longlong(double x) { return cuda_host_bits<long long>(x); }
static inline double __longlong_as_double(long long x) { return cuda_host_bits<double>(x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __ffsll(long long x) { return __builtin_ffsll(x); }
static inline unsigned __brev(unsigned x)
{
    unsigned y = 0;
    for (int i = 0; i < 32; i++)
        y |= (x >> i & 1u) << (31 - i);
    return y;
}
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector)
{
    uint64_t both = (uint64_t)b << 32 | a;
    unsigned out = 0;
    for (int i = 0; i < 4; i++) {
        unsigned pick = selector >> (4 * i) & 0xf, byte = (unsigned)(both >> (8 * (pick & 7))) & 0xff;
        out |= (pick & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << (8 * i);
    }
    return out;
}
static inline int __dp4a(int a, int b, int c)
{
    for (int i = 0; i < 4; i++)
        c += (int)(int8_t)(a >> (8 * i)) * (int)(int8_t)(b >> (8 * i));
    return c;
}
static inline unsigned __dp4a(unsigned a, unsigned b, unsigned c)
{
    for (int i = 0; i < 4; i++)
        c += (a >> (8 * i) & 0xff) * (b >> (8 * i) & 0xff);
    return c;
}
static inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift)
{
    return (unsigned)(((uint64_t)high << 32 | low) >> (shift & 31));
}
static inline int __mulhi(int a, int b) { return (int)((int64_t)a * b >> 32); }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }

template <class T> static inline T __ldg(const T *at) { return *at; }
template <class T> static inline T __ldcs(const T *at) { return *at; }
template <class T> static inline T __ldcg(const T *at) { return *at; }
template <class T> static inline T __ldca(const T *at) { return *at; }
template <class T> static inline T __ldlu(const T *at) { return *at; }
template <class T> static inline void __stcs(T *at, T value) { *at = value; }
template <class T> static inline void __stcg(T *at, T value) { *at = value; }
template <class T> static inline void __stwt(T *at, T value) { *at = value; }

/* ---- vectors; an address that is no multiple of their alignment fails the launch, as on a card (fibers.cpp) ---- */

#define CUDA_HOST_VECTORS(T, NAME, A2, A4)                                                                            \
    struct __align__(A2) NAME##2 { T x, y; };                                                                         \
    struct NAME##3 { T x, y, z; };                                                                                    \
    struct __align__(A4) NAME##4 { T x, y, z, w; };                                                                   \
    static inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }                                                 \
    static inline NAME##3 make_##NAME##3(T x, T y, T z) { return {x, y, z}; }                                         \
    static inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }
#define CUDA_HOST_VECTORS_UINT(T, NAME, A2, A4)                                                                       \
    struct __align__(A2) NAME##2 { T x, y; };                                                                         \
    struct __align__(A4) NAME##4 { T x, y, z, w; };                                                                   \
    static inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }                                                 \
    static inline uint3 make_##NAME##3(T x, T y, T z) { return {x, y, z}; }                                           \
    static inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUDA_HOST_VECTORS(float, float, 8, 16)
CUDA_HOST_VECTORS(int, int, 8, 16)
CUDA_HOST_VECTORS_UINT(unsigned, uint, 8, 16)
CUDA_HOST_VECTORS(short, short, 4, 8)
CUDA_HOST_VECTORS(unsigned short, ushort, 4, 8)
CUDA_HOST_VECTORS(signed char, char, 2, 4)
CUDA_HOST_VECTORS(unsigned char, uchar, 2, 4)
struct __align__(16) double2 { double x, y; };
static inline double2 make_double2(double x, double y) { return {x, y}; }
struct __align__(16) longlong2 { long long x, y; };
struct __align__(16) ulonglong2 { unsigned long long x, y; };

/* ---- launches ---- */

/* One argument of a launch: pointers in it must not be the host's. Returns 0, or -1 with the error set. */
int cuda_host_check_argument(const char *kernel, int index, const void *argument, size_t bytes, cudaStream_t stream);
cudaError_t cuda_host_enqueue(const char *name, const void *kernel, dim3 grid, dim3 block, size_t shared,
                              cudaStream_t stream, std::function<void()> body);

/* kernel<<<grid, block, shared, stream>>>(args...) */
template <class... P, class... A>
cudaError_t cuda_host_launch(const char *name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared,
                             cudaStream_t stream, A &&...args)
{
    static_assert(sizeof...(P) == sizeof...(A), "as many arguments as the kernel has parameters");
    std::tuple<typename std::decay<P>::type...> held(static_cast<typename std::decay<P>::type>(args)...);
    int index = 0, bad = 0;
    std::apply([&](auto &...each) {
        ((bad = bad ? bad : cuda_host_check_argument(name, index++, &each, sizeof each, stream)), ...);
    }, held);
    if (bad)
        return cudaPeekAtLastError();
    return cuda_host_enqueue(name, (const void *)kernel, grid, block, shared, stream,
                             [kernel, held] { std::apply(kernel, held); });
}

/* What B2_LAUNCH of ops/cuda/cuda.h is here. */
#define b2_host_launch(kernel, ...) cuda_host_launch(#kernel, kernel, __VA_ARGS__)

cudaError_t cuda_host_allow_shared(const void *kernel, int bytes);

template <class K> static inline cudaError_t cudaFuncSetAttribute(K *kernel, cudaFuncAttribute attribute, int value)
{
    return attribute == cudaFuncAttributeMaxDynamicSharedMemorySize
               ? cuda_host_allow_shared((const void *)kernel, value)
               : cudaSuccess;
}
template <class K>
static inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, K *, int threads, size_t shared)
{
    *blocks = threads > 1024 || shared > 232448 ? 0 : std::max(1, std::min(2048 / threads, 8));
    return cudaSuccess;
}
template <class T> static inline cudaError_t cudaMalloc(T **data, size_t bytes)
{
    return cudaMalloc((void **)data, bytes);
}
template <class T> static inline cudaError_t cudaMallocHost(T **data, size_t bytes)
{
    return cudaMallocHost((void **)data, bytes);
}
template <class T> static inline cudaError_t cudaHostAlloc(T **data, size_t bytes, unsigned flags)
{
    return cudaHostAlloc((void **)data, bytes, flags);
}

#endif
