/* Devices and their memory: blocks, and copies that are done when they return.
 *
 * Blocks that are freed go on a list, from which the next request of about that size is served: cudaMalloc and cudaFree
 * wait for the whole device, and scratch and caches of calls that follow each other have the same sizes. What is large or too
 * much goes back at once, and all of it where the device has nothing left.
 *
 * Uploads go through two pinned stages in turn: while one is on its way to the device the other is filled, which for a
 * mapped checkpoint is when it is read from the disk. */
#include <string.h>

#include "ops/cuda/device.h"

static const size_t stage_bytes = (size_t)16 << 20;
static const size_t largest_idle = (size_t)256 << 20, most_idle = (size_t)1 << 30;

struct b2_cuda_block {
    b2_cuda_block *next;
    void *data;
    size_t bytes;
    cudaEvent_t busy; /* of an idle block: others may use it until then; NULL: nobody does */
};

namespace {

class locked {
    pthread_mutex_t *lock;

public:
    explicit locked(pthread_mutex_t *l) : lock(l) { pthread_mutex_lock(lock); }
    ~locked() { pthread_mutex_unlock(lock); }
    locked(const locked &) = delete;
    locked &operator=(const locked &) = delete;
};

b2_cuda_device *device_of(b2_memory *memory)
{
    return (b2_cuda_device *)((char *)memory - offsetof(b2_cuda_device, memory));
}

/* ---- blocks ---- */

/* cudaFree waits for whatever is under way on the device. */
void drop_block(b2_cuda_block *block)
{
    if (block->busy)
        cudaEventDestroy(block->busy);
    cudaFree(block->data);
    b2_free(block);
}

void free_idle(b2_cuda_device *d)
{
    while (d->idle) {
        b2_cuda_block *block = d->idle;
        d->idle = block->next;
        drop_block(block);
    }
    d->idle_bytes = 0;
}

/* The smallest idle block of at least `bytes` that is not twice as large; taken off the list. */
b2_cuda_block *take_idle(b2_cuda_device *d, size_t bytes)
{
    b2_cuda_block **best = NULL;
    for (b2_cuda_block **at = &d->idle; *at; at = &(*at)->next)
        if ((*at)->bytes >= bytes && (*at)->bytes <= 2 * bytes && (!best || (*at)->bytes < (*best)->bytes))
            best = at;
    if (!best)
        return NULL;
    b2_cuda_block *block = *best;
    *best = block->next;
    d->idle_bytes -= block->bytes;
    if (block->busy) {
        cudaEventSynchronize(block->busy);
        cudaEventDestroy(block->busy);
        block->busy = NULL;
    }
    return block;
}

int no_memory(const b2_cuda_device *d, size_t bytes, const char *what, b2_err *err)
{
    size_t free_bytes = 0, total = 0;
    cudaGetLastError();
    cudaMemGetInfo(&free_bytes, &total);
    return b2_fail(err, B2_E_MEMORY, "%s: could not allocate %zu bytes on cuda:%d, which has %zu of %zu bytes free", what,
                   bytes, d->base.index, free_bytes, total);
}

b2_cuda_block *make_block(b2_cuda_device *d, size_t bytes, const char *what, b2_err *err)
{
    b2_cuda_block *block = (b2_cuda_block *)b2_alloc_zeroed(1, sizeof *block, what, err);
    if (!block)
        return NULL;
    block->bytes = bytes;
    cudaError_t status = cudaMalloc(&block->data, bytes);
    if (status == cudaErrorMemoryAllocation && d->idle) {
        cudaGetLastError();
        free_idle(d);
        status = cudaMalloc(&block->data, bytes);
    }
    if (status == cudaSuccess)
        return block;
    if (status == cudaErrorMemoryAllocation)
        no_memory(d, bytes, what, err);
    else
        b2_cuda_check(status, what, err);
    b2_free(block);
    return NULL;
}

void *alloc_block(b2_memory *memory, size_t bytes, const char *what, b2_err *err)
{
    b2_cuda_device *d = device_of(memory);
    locked hold(&d->lock);
    b2_cuda_device_guard on(d->base.index);
    if (b2_cuda_check(on.status, what, err) < 0)
        return NULL;
    bytes = bytes == 0 ? 256 : (bytes + 255) / 256 * 256;
    b2_cuda_block *block = take_idle(d, bytes);
    if (!block && !(block = make_block(d, bytes, what, err)))
        return NULL;
    block->next = d->live;
    d->live = block;
    return block->data;
}

/* Off the list of live blocks; NULL where it is not on it. */
b2_cuda_block *take_live(b2_cuda_device *d, const void *data)
{
    b2_cuda_block **at = &d->live;
    while (*at && (*at)->data != data)
        at = &(*at)->next;
    b2_cuda_block *block = *at;
    if (block)
        *at = block->next;
    return block;
}

void keep_idle(b2_cuda_device *d, b2_cuda_block *block)
{
    if (d->closed || block->bytes > largest_idle || d->idle_bytes + block->bytes > most_idle) {
        drop_block(block);
        return;
    }
    block->next = d->idle;
    d->idle = block;
    d->idle_bytes += block->bytes;
}

void free_block(b2_memory *memory, void *data)
{
    b2_cuda_device *d = device_of(memory);
    locked hold(&d->lock);
    b2_cuda_device_guard on(d->base.index);
    b2_cuda_block *block = take_live(d, data);
    if (block)
        keep_idle(d, block);
}

int holds(b2_memory *memory, const void *data)
{
    cudaPointerAttributes where;
    if (cudaPointerGetAttributes(&where, data) != cudaSuccess) {
        cudaGetLastError();
        return 0;
    }
    return where.type == cudaMemoryTypeManaged ||
           (where.type == cudaMemoryTypeDevice && where.device == device_of(memory)->base.index);
}

void destroy(b2_cuda_device *d)
{
    pthread_mutex_destroy(&d->lock);
    b2_free(d);
}

/* ---- copies ---- */

int open_stages(b2_cuda_device *d, b2_err *err)
{
    for (int i = 0; i < B2_CUDA_STAGES; i++) {
        if (!d->stage[i] && b2_cuda_pinned(&d->stage[i], stage_bytes, err) < 0)
            return -1;
        if (!d->staged[i] &&
            b2_cuda_check(cudaEventCreateWithFlags(&d->staged[i], cudaEventDisableTiming), "event", err) < 0)
            return -1;
    }
    return 0;
}

int upload(b2_memory *memory, void *to, const void *from, size_t bytes, b2_err *err)
{
    b2_cuda_device *d = device_of(memory);
    locked hold(&d->lock);
    b2_cuda_device_guard on(d->base.index);
    if (b2_cuda_check(on.status, "upload", err) < 0 || open_stages(d, err) < 0)
        return -1;
    for (size_t at = 0; at < bytes; at += stage_bytes, d->stage_now = (d->stage_now + 1) % B2_CUDA_STAGES) {
        int i = d->stage_now; /* goes on from call to call: most tensors fill less than one */
        size_t count = bytes - at < stage_bytes ? bytes - at : stage_bytes;
        if (b2_cuda_check(cudaEventSynchronize(d->staged[i]), "upload", err) < 0)
            return -1;
        memcpy(d->stage[i], (const char *)from + at, count);
        if (b2_cuda_check(cudaMemcpyAsync((char *)to + at, d->stage[i], count, cudaMemcpyHostToDevice, d->copies),
                          "upload", err) < 0 ||
            b2_cuda_check(cudaEventRecord(d->staged[i], d->copies), "upload", err) < 0)
            return -1;
    }
    return 0;
}

int download(b2_memory *memory, void *to, const void *from, size_t bytes, b2_err *err)
{
    b2_cuda_device *d = device_of(memory);
    locked hold(&d->lock);
    b2_cuda_device_guard on(d->base.index);
    if (b2_cuda_check(on.status, "download", err) < 0 ||
        b2_cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, d->copies), "download", err) < 0)
        return -1;
    return b2_cuda_check(cudaStreamSynchronize(d->copies), "download", err);
}

} // namespace

int b2_cuda_pinned(void **data, size_t bytes, b2_err *err)
{
    cudaError_t status = cudaMallocHost(data, bytes);
    if (status != cudaErrorMemoryAllocation)
        return b2_cuda_check(status, "pinned memory", err);
    cudaGetLastError();
    *data = NULL;
    return b2_fail(err, B2_E_MEMORY, "pinned memory: could not allocate %zu bytes on the host", bytes);
}

/* ---- life ---- */

int b2_cuda_after_arrivals(b2_cuda_device *d, cudaStream_t stream, b2_err *err)
{
    return b2_cuda_check(cudaEventRecord(d->arrived, d->copies), "upload", err) < 0
               ? -1
               : b2_cuda_check(cudaStreamWaitEvent(stream, d->arrived, 0), "upload", err);
}

uint64_t b2_cuda_arrivals(b2_device *device)
{
    return (uint64_t)(uintptr_t)((b2_cuda_device *)device)->copies;
}

int b2_cuda_settle(b2_device *device, b2_err *err)
{
    b2_cuda_device *d = (b2_cuda_device *)device;
    b2_cuda_device_guard on(device->index);
    cudaEvent_t event = NULL;
    int status = b2_cuda_check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "arrays", err);
    if (status < 0)
        return -1;
    {
        locked hold(&d->lock); /* somebody may close the device; it is not held while one waits */
        status = b2_cuda_check(cudaEventRecord(event, d->copies), "arrays", err);
    }
    status = status < 0 ? -1 : b2_cuda_check(cudaEventSynchronize(event), "arrays", err);
    cudaEventDestroy(event);
    return status;
}

void *b2_cuda_lend(b2_device *device, size_t bytes, b2_err *err)
{
    return device->memory->alloc(device->memory, bytes, "a result", err);
}

/* An event after all that was put into the default stream; NULL where that cannot be had. */
static cudaEvent_t event_of_others(void)
{
    cudaEvent_t event = NULL;
    if (cudaEventCreateWithFlags(&event, cudaEventDisableTiming) != cudaSuccess)
        event = NULL;
    else if (cudaEventRecord(event, cudaStreamLegacy) != cudaSuccess) {
        cudaEventDestroy(event);
        event = NULL;
    }
    if (!event)
        cudaGetLastError();
    return event;
}

void b2_cuda_give_back(b2_device *device, void *data, b2_export exported)
{
    b2_cuda_device *d = (b2_cuda_device *)device;
    int last;
    {
        locked hold(&d->lock);
        b2_cuda_device_guard on(d->base.index);
        b2_cuda_block *block = take_live(d, data);
        if (exported == B2_TO_ANY_STREAM)
            cudaDeviceSynchronize();
        if (block && exported == B2_TO_DEFAULT_STREAM && !d->closed && !(block->busy = event_of_others()))
            drop_block(block);
        else if (block)
            keep_idle(d, block);
        last = d->closed == 2 && !d->live;
    }
    if (last)
        destroy(d);
}

b2_device *b2_cuda_device_open(int index, b2_err *err)
{
    int count = 0;
    if (b2_cuda_check(cudaGetDeviceCount(&count), "cuda", err) < 0)
        return NULL;
    if (index < 0 || index >= count) {
        b2_fail(err, B2_E_VALUE, "device: cuda:%d, there %s %d CUDA device%s", index, count == 1 ? "is" : "are", count,
                count == 1 ? "" : "s");
        return NULL;
    }
    b2_cuda_device *d = (b2_cuda_device *)b2_alloc_zeroed(1, sizeof *d, "device", err);
    if (!d)
        return NULL;
    d->memory.alloc = alloc_block;
    d->memory.free = free_block;
    d->memory.upload = upload;
    d->memory.download = download;
    d->memory.holds = holds;
    d->base.index = index;
    d->base.memory = &d->memory;
    d->base.ops = &b2_cuda_table;
    pthread_mutex_init(&d->lock, NULL);
    b2_cuda_device_guard on(index);
    if (b2_cuda_check(on.status, "cuda", err) == 0 &&
        b2_cuda_check(cudaStreamCreateWithFlags(&d->copies, cudaStreamNonBlocking), "stream", err) == 0 &&
        b2_cuda_check(cudaEventCreateWithFlags(&d->arrived, cudaEventDisableTiming), "event", err) == 0)
        return &d->base;
    if (d->copies)
        cudaStreamDestroy(d->copies);
    destroy(d);
    return NULL;
}

void b2_cuda_device_close(b2_device *device)
{
    b2_cuda_device *d = (b2_cuda_device *)device;
    int lent;
    if (!d)
        return;
    {
        b2_cuda_device_guard on(d->base.index);
        {
            locked hold(&d->lock);
            d->closed = 1;
        }
        b2_cuda_queues_destroy(d); /* which gives blocks back and takes the lock for it */
        locked hold(&d->lock);     /* an array's copy to the host may be under way */
        cudaStreamSynchronize(d->copies);
        free_idle(d);
        for (int i = 0; i < B2_CUDA_STAGES; i++) {
            if (d->staged[i])
                cudaEventDestroy(d->staged[i]);
            if (d->stage[i])
                cudaFreeHost(d->stage[i]);
        }
        cudaEventDestroy(d->arrived);
        cudaStreamDestroy(d->copies);
        d->copies = NULL; /* what is still lent is copied in the default stream */
        d->arrived = NULL;
        d->closed = 2;
        lent = d->live != NULL;
    }
    if (!lent)
        destroy(d);
}
