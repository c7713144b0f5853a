/* Small kernels, right ones and wrong ones, that show what the stand-in does. Each function below returns the message of
 * the first error, "" for none; `out` is what the device holds in the end. */
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

#include <string>

#define LAUNCH(kernel, ...) b2_host_launch(kernel, __VA_ARGS__)
#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

std::string message;

const char *told(cudaError_t status)
{
    cudaGetLastError();
    message = status == cudaSuccess ? "" : cudaGetErrorString(status);
    return message.c_str();
}

/* out[i] = sum of x over the block, by warps. */
__global__ void block_sums(float *out, const float *x, int n)
{
    __shared__ float parts[32];
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    float sum = i < n ? x[i] : 0.0f;
    for (int step = 16; step > 0; step /= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (threadIdx.x % 32 == 0)
        parts[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0.0f;
    for (int w = 0; w < (int)(blockDim.x + 31) / 32; w++)
        sum += parts[w];
    if (i < n)
        out[i] = sum;
}

/* Threads beyond n leave at once; the others go on through barriers and shuffles of whole warps. */
__global__ void leave_early(float *out, int n)
{
    int i = (int)threadIdx.x;
    if (i >= n)
        return;
    float below = __shfl_up_sync(0xffffffffu, (float)i, 1);
    __syncthreads();
    out[i] = i % 32 == 0 ? -1.0f : below;
}

/* Reads what nobody wrote: NaN in static and in dynamic shared memory, in every block. */
__global__ void read_shared(float *out)
{
    __shared__ float fixed[8];
    float *dynamic = reinterpret_cast<float *>(cuda_host_dynamic_shared);
    out[2 * blockIdx.x] = fixed[3];
    out[2 * blockIdx.x + 1] = dynamic[1];
    fixed[3] = dynamic[1] = 1.0f;
}

__global__ void two_barriers(float *out)
{
    if (threadIdx.x < 16)
        __syncthreads();
    else
        __syncthreads();
    out[threadIdx.x] = 1.0f;
}

__global__ void barrier_and_shuffle(float *out)
{
    if (threadIdx.x % 2 == 0)
        __syncthreads();
    out[threadIdx.x] = __shfl_sync(0xffffffffu, (float)threadIdx.x, 0);
}

__global__ void different_shuffles(float *out)
{
    float x = (float)threadIdx.x;
    if (threadIdx.x < 7)
        out[threadIdx.x] = __shfl_sync(0xffffffffu, x, 0);
    else
        out[threadIdx.x] = __shfl_down_sync(0xffffffffu, x, 1);
}

__global__ void behind_shared(float *out)
{
    float *dynamic = reinterpret_cast<float *>(cuda_host_dynamic_shared);
    dynamic[threadIdx.x] = 1.0f;
    out[threadIdx.x] = dynamic[threadIdx.x];
}

__global__ void behind_allocation(float *out, int n)
{
    if (threadIdx.x == 0)
        out[n] = 1.0f;
}

__global__ void misaligned(float *out, int offset)
{
    *reinterpret_cast<float4 *>(out + offset) = make_float4(0.0f, 1.0f, 2.0f, 3.0f);
}

__global__ void stopped(float *out)
{
    out[0] = 1.0f;
    if (threadIdx.x == 5)
        __trap();
}

/* Wrong without a barrier between the write and the read of the neighbour's element, whichever comes first. */
__global__ void race(float *out)
{
    __shared__ float row[64];
    row[threadIdx.x] = (float)threadIdx.x;
    out[blockIdx.x * 64 + threadIdx.x] = row[(threadIdx.x + (blockIdx.x % 2 ? 63 : 1)) % 64];
}

__global__ void add(float *out, const float *x, float y)
{
    out[threadIdx.x] = x[threadIdx.x] + y;
}

__global__ void warp_words(unsigned *out)
{
    unsigned lane = threadIdx.x;
    out[lane] = __ballot_sync(0xffffffffu, lane % 3 == 0);
    out[32 + lane] = (unsigned)__reduce_add_sync(0xffffffffu, (int)lane - 16);
    out[64 + lane] = (unsigned)__reduce_max_sync(0xffffffffu, -(int)lane);
    out[96 + lane] = __shfl_down_sync(0xffffffffu, lane, 3, 8);
    out[128 + lane] = lane < 4 ? __shfl_sync(0xfu, lane, 2) : 99u;
    out[160 + lane] = (unsigned)__syncthreads_count(lane % 5 == 0);
    atomicAdd(out + 192, lane);
}

template <class T> __global__ void convert(float *out, const float *x, int n)
{
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x)
        out[i] = (float)T(x[i]);
}

/* Device memory with what `out` holds, whatever `work` does with it, and back. */
template <class F> const char *with_device(float *out, int n, F work)
{
    float *data;
    cudaError_t status = cudaMalloc(&data, sizeof(float) * (size_t)n);
    if (status != cudaSuccess)
        return told(status);
    cudaMemcpy(data, out, sizeof(float) * (size_t)n, cudaMemcpyHostToDevice);
    status = work(data);
    if (status == cudaSuccess)
        status = cudaMemcpy(out, data, sizeof(float) * (size_t)n, cudaMemcpyDeviceToHost);
    std::string first = told(status);
    cudaFree(data);
    cudaGetLastError();
    message = first;
    return message.c_str();
}

} /* namespace */

EXPORT const char *run_block_sums(float *out, int n, int threads)
{
    return with_device(out, n, [=](float *data) {
        return LAUNCH(block_sums, (unsigned)((n + threads - 1) / threads), (unsigned)threads, 0, nullptr, data, data, n);
    });
}
EXPORT const char *run_leave_early(float *out, int n, int threads)
{
    return with_device(out, n, [=](float *data) { return LAUNCH(leave_early, 1, (unsigned)threads, 0, nullptr, data, n); });
}
EXPORT const char *run_read_shared(float *out, int n)
{
    return with_device(out, n, [=](float *data) { return LAUNCH(read_shared, (unsigned)(n / 2), 1, 16, nullptr, data); });
}
EXPORT const char *run_wrong(float *out, int which)
{
    return with_device(out, 32, [=](float *data) {
        switch (which) {
        case 0: return LAUNCH(two_barriers, 1, 32, 0, nullptr, data);
        case 1: return LAUNCH(barrier_and_shuffle, 1, 32, 0, nullptr, data);
        case 2: return LAUNCH(different_shuffles, 1, 32, 0, nullptr, data);
        case 3: return LAUNCH(behind_shared, 1, 32, 31 * sizeof(float), nullptr, data);
        case 4: return LAUNCH(behind_allocation, 1, 32, 0, nullptr, data, 32);
        case 5: return LAUNCH(misaligned, 1, 1, 0, nullptr, data, 1);
        case 6: return LAUNCH(stopped, 1, 32, 0, nullptr, data);
        case 7: return LAUNCH(add, 1, 32, 0, nullptr, data, out, 1.0f);
        case 8: return LAUNCH(add, 1, 2048, 0, nullptr, data, data, 1.0f);
        case 9: return LAUNCH(add, 1, 32, 64 << 10, nullptr, data, data, 1.0f);
        case 10: return LAUNCH(add, 0, 32, 0, nullptr, data, data, 1.0f);
        case 11: return cudaMemcpy(out, data, 33 * sizeof(float), cudaMemcpyDeviceToHost);
        case 12: return cudaMemcpy(data, out, 32 * sizeof(float), cudaMemcpyDeviceToDevice);
        default: {
            float *more;
            return cudaMalloc(&more, (size_t)1 << 50);
        }
        }
    });
}
EXPORT const char *run_race(float *out)
{
    return with_device(out, 256, [=](float *data) { return LAUNCH(race, 4, 64, 0, nullptr, data); });
}
EXPORT const char *run_warp_words(float *out)
{
    return with_device(out, 193, [=](float *data) {
        cudaMemset(data, 0, 193 * sizeof *data);
        return LAUNCH(warp_words, 1, 32, 0, nullptr, reinterpret_cast<unsigned *>(data));
    });
}
EXPORT const char *run_convert(float *out, int n, int bfloat16)
{
    return with_device(out, n, [=](float *data) {
        return bfloat16 ? LAUNCH(convert<__nv_bfloat16>, 1, 32, 0, nullptr, data, data, n)
                        : LAUNCH(convert<__half>, 1, 32, 0, nullptr, data, data, n);
    });
}

/* A graph of a copy from pinned memory, a launch and a copy back, replayed with another input each time: out[i] becomes
 * x + 1 of replay i. `early` writes the next input before the replay is waited for, and so spoils it. */
EXPORT const char *run_graph(float *out, int replays, int early)
{
    float *x, *y, *device;
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaMallocHost(&x, sizeof *x);
    cudaMallocHost(&y, sizeof *y);
    cudaMalloc(&device, sizeof *device);
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
    cudaMemcpyAsync(device, x, sizeof *x, cudaMemcpyHostToDevice, stream);
    LAUNCH(add, 1, 1, 0, stream, device, device, 1.0f);
    cudaMemcpyAsync(y, device, sizeof *y, cudaMemcpyDeviceToHost, stream);
    cudaError_t status = cudaStreamEndCapture(stream, &graph);
    if (status == cudaSuccess)
        status = cudaGraphInstantiate(&exec, graph, 0);
    for (int i = 0; i < replays && status == cudaSuccess; i++) {
        *x = (float)i;
        status = cudaGraphLaunch(exec, stream);
        if (early)
            *x = -100.0f;
        if (status == cudaSuccess)
            status = cudaStreamSynchronize(stream);
        out[i] = *y;
    }
    told(status);
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
    cudaFree(device);
    cudaFreeHost(x);
    cudaFreeHost(y);
    return message.c_str();
}

/* What may not be done while a stream is captured. */
EXPORT const char *run_sync_in_capture(void)
{
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
    cudaStreamSynchronize(stream);
    cudaError_t status = cudaStreamEndCapture(stream, &graph);
    cudaStreamDestroy(stream);
    return told(status);
}

/* Device memory belongs to its device. */
EXPORT const char *run_other_device(float *out)
{
    return with_device(out, 32, [=](float *data) {
        cudaSetDevice(1);
        cudaError_t status = LAUNCH(add, 1, 32, 0, nullptr, data, data, 1.0f);
        cudaSetDevice(0);
        return status;
    });
}

/* An address of device memory, which the host must not read. */
EXPORT float *device_address(void)
{
    float *data = nullptr;
    cudaMalloc(&data, 64);
    return data;
}
