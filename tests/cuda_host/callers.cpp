/* What a library beside ours would do on the stand-in's devices: memory of its own, streams of its own. For tests, by ctypes.
 * Functions return 0 or what CUDA says. */
#include "cuda_runtime.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

extern "C" size_t cuda_host_bytes_copied(cudaMemcpyKind kind); /* runtime.cpp */

EXPORT int caller_alloc(int device, size_t bytes, void **data)
{
    cudaError_t status = cudaSetDevice(device);
    return status == cudaSuccess ? cudaMalloc(data, bytes) : status;
}

EXPORT int caller_free(void *data)
{
    return cudaFree(data);
}

EXPORT int caller_stream(int device, cudaStream_t *stream)
{
    cudaError_t status = cudaSetDevice(device);
    return status == cudaSuccess ? cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking) : status;
}

/* Put off, from memory that stays as it is until then. */
EXPORT int caller_fill(void *to, const void *from, size_t bytes, cudaStream_t stream)
{
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream);
}

EXPORT int caller_move(void *to, const void *from, size_t bytes, cudaStream_t stream)
{
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
}

/* `later` goes on when `first` has done what it has been given. */
EXPORT int caller_order(cudaStream_t later, cudaStream_t first)
{
    cudaEvent_t event;
    cudaError_t status = cudaEventCreate(&event);
    if (status != cudaSuccess)
        return status;
    status = cudaEventRecord(event, first);
    if (status == cudaSuccess)
        status = cudaStreamWaitEvent(later, event, 0);
    cudaEventDestroy(event);
    return status;
}

EXPORT int caller_read(void *to, const void *from, size_t bytes, cudaStream_t stream)
{
    cudaError_t status = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream);
    return status == cudaSuccess ? cudaStreamSynchronize(stream) : status;
}

/* Bytes of all copies of this kind so far, ours and the callers'. */
EXPORT size_t caller_bytes_copied(int kind)
{
    return cuda_host_bytes_copied((cudaMemcpyKind)kind);
}

EXPORT size_t caller_free_bytes(int device)
{
    size_t free_bytes = 0, total = 0;
    cudaSetDevice(device);
    cudaMemGetInfo(&free_bytes, &total);
    return free_bytes;
}
