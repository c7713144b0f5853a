/* What a library beside ours would do on the stand-in's devices: memory of its own, streams of its own. For tests, by ctypes.
 * Functions return 0 or what CUDA says. */
#include "cuda_runtime.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

/* runtime.cpp */
extern "C" size_t cuda_host_bytes_copied(cudaMemcpyKind kind);
extern "C" size_t cuda_host_pinned_bytes(void);
extern "C" void cuda_host_fail_allocations_after(long count);
extern "C" long cuda_host_allocations_refused(void);

EXPORT int caller_alloc(int device, size_t bytes, void **data)
{
    cudaError_t status = cudaSetDevice(device);
    return status == cudaSuccess ? cudaMalloc(data, bytes) : status;
}

/* Memory that host and all devices may use. */
EXPORT int caller_alloc_managed(int device, size_t bytes, void **data)
{
    cudaError_t status = cudaSetDevice(device);
    return status == cudaSuccess ? cudaMallocManaged(data, bytes, cudaMemAttachGlobal) : status;
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

/* Pinned memory of the host that somebody has. */
EXPORT size_t caller_pinned_bytes(void)
{
    return cuda_host_pinned_bytes();
}

/* `count` more allocations succeed, on devices and of pinned memory, and none after them; below 0: as many as fit. */
EXPORT void caller_fail_allocations_after(long count)
{
    cuda_host_fail_allocations_after(count);
}

/* Since then. */
EXPORT long caller_allocations_refused(void)
{
    return cuda_host_allocations_refused();
}

EXPORT size_t caller_free_bytes(int device)
{
    size_t free_bytes = 0, total = 0;
    cudaSetDevice(device);
    cudaMemGetInfo(&free_bytes, &total);
    return free_bytes;
}
