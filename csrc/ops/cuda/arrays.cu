/* Arrays of callers, of any float type and any strides: to = from, element by element, in the device's stream of arrivals.
 *
 *     to[sum i_d t_d] = float32(from[sum i_d f_d])
 *
 * Owns nothing; both arrays are the caller's until b2_cuda_settle. */
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <string.h>

#include "ops/cuda/device.h"

namespace {

/* What a launch is told: axes with strides of both sides. */
struct moved_array {
    float *to;
    const void *from;
    int ndim;
    int64_t count;
    int64_t shape[B2_ARRAY_AXES], to_strides[B2_ARRAY_AXES], from_strides[B2_ARRAY_AXES];
};

__device__ inline float widened(float value)
{
    return value;
}

__device__ inline float widened(double value)
{
    return (float)value;
}

__device__ inline float widened(__half value)
{
    return __half2float(value);
}

__device__ inline float widened(__nv_bfloat16 value)
{
    return __bfloat162float(value);
}

template <class T> __global__ void convert_kernel(moved_array a)
{
    int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < a.count; i += step) {
        int64_t rest = i, to = 0, from = 0;
        for (int d = a.ndim - 1; d >= 0; d--) {
            int64_t next = rest / a.shape[d], place = rest - next * a.shape[d];
            to += place * a.to_strides[d];
            from += place * a.from_strides[d];
            rest = next;
        }
        a.to[to] = widened(((const T *)a.from)[from]);
    }
}

template <class T> void launch(const moved_array &a, cudaStream_t stream)
{
    enum { THREADS = 256, EACH = 4 };
    const int64_t most = 4096, blocks = (a.count + THREADS * EACH - 1) / (THREADS * EACH);
    unsigned grid = (unsigned)(blocks < most ? blocks : most);
    B2_LAUNCH(convert_kernel<T>, dim3(grid), dim3(THREADS), 0, stream, a);
}

} // namespace

int b2_cuda_convert(b2_device *device, const b2_device_array *to, const b2_device_array *from, b2_err *err)
{
    cudaStream_t stream = (cudaStream_t)(uintptr_t)b2_cuda_arrivals(device);
    moved_array a;
    memset(&a, 0, sizeof a);
    a.to = (float *)to->data;
    a.from = from->data;
    a.ndim = from->ndim;
    a.count = 1;
    for (int d = 0; d < from->ndim; d++) {
        a.shape[d] = from->shape[d];
        a.to_strides[d] = to->strides[d];
        a.from_strides[d] = from->strides[d];
        a.count *= from->shape[d];
    }
    b2_cuda_device_guard on(device->index);
    if (b2_cuda_check(on.status, "arrays", err) < 0)
        return -1;
    if (a.count == 0)
        return 0;
    if (from->bits == 16 && from->brain)
        launch<__nv_bfloat16>(a, stream);
    else if (from->bits == 16)
        launch<__half>(a, stream);
    else if (from->bits == 32)
        launch<float>(a, stream);
    else
        launch<double>(a, stream);
    return b2_cuda_launched("convert", err);
}
