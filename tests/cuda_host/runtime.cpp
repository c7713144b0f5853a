/* Memory, streams, events and graphs of the stand-in.
 *
 * Devices: each has a stretch of addresses. Host code cannot touch them: they are opened while queued work runs and
 * closed after. An allocation is followed by a fence; who writes into it is found out when the work is done.
 *
 * Streams are queues. Work is done when somebody waits for it: cudaStreamSynchronize, cudaDeviceSynchronize, a copy to
 * pageable memory, the default stream, cudaFree. A copy from pageable host memory takes its bytes at once, one from
 * pinned memory when it is done, as on a card: so pinned memory that is written too early shows. A graph is a queue that
 * was kept.
 *
 * One lock over everything; kernels run under it. */
#include "host.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

namespace {

constexpr size_t ADDRESSES = (size_t)64 << 30, ALIGNMENT = 512, FENCE = 256, POISON_MOST = (size_t)32 << 20;
constexpr int DEVICES_MOST = 16;

struct block {
    size_t bytes;    /* asked for */
    size_t reserved; /* with the fence */
    bool managed = false; /* all devices may use it */
};

struct device {
    char *base = nullptr;
    size_t top = 0, used = 0; /* bytes from base that were ever in use; bytes asked for */
    std::map<size_t, block> blocks;
    CUstream_st *default_stream = nullptr;
};

/* One recording of an event. */
struct mark {
    CUstream_st *stream;
    bool done;
    double milliseconds;
};

typedef std::function<std::string()> work; /* returns "" or what went wrong */

/* Of a loop. */
struct condition {
    cudaGraphConditionalHandle handle;
    unsigned at_launch, now;
};

struct host {
    std::recursive_mutex lock;
    device devices[DEVICES_MOST];
    int count = 0;
    size_t memory = 0;
    bool eager = false, closed = true;
    std::set<CUstream_st *> streams;
    std::map<char *, size_t> pinned;
    std::map<const void *, int> shared_allowed;
    cudaError_t last = cudaSuccess;
    std::string failure; /* of the last launch that failed */
    std::map<pthread_t, int> current;
    std::map<cudaGraphConditionalHandle, std::weak_ptr<condition>> conditions;
    size_t copied[4] = {}; /* bytes, by kind */
    long allocations_left = -1; /* until there is no memory for any; below 0: as many as fit */
    long refused = 0;           /* of those since then */
    unsigned long long counts[CUDA_HOST_COUNTS] = {};
};

size_t number(const char *name, size_t otherwise)
{
    const char *text = getenv(name);
    return text && *text ? (size_t)strtoull(text, nullptr, 10) : otherwise;
}

host *create()
{
    host *h = new host();
    h->count = (int)std::min(number("BLIP2C_CUDA_HOST_DEVICES", 2), (size_t)DEVICES_MOST);
    h->memory = std::min(number("BLIP2C_CUDA_HOST_MEMORY", (size_t)4 << 30), ADDRESSES / 2);
    h->eager = number("CUDA_LAUNCH_BLOCKING", 0) == 1;
    for (int i = 0; i < h->count; i++) {
        void *at = mmap(nullptr, ADDRESSES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED)
            abort();
        h->devices[i].base = static_cast<char *>(at);
    }
    return h;
}

host &the()
{
    static host *h = create(); /* never freed: threads may still be in it when the process ends */
    return *h;
}

struct locked {
    std::lock_guard<std::recursive_mutex> guard;
    locked() : guard(the().lock) {}
};

cudaError_t error(cudaError_t code)
{
    if (code != cudaSuccess)
        the().last = code;
    return code;
}

cudaError_t launch_failed(const std::string &what)
{
    the().failure = what;
    return error(cudaErrorLaunchFailure);
}

/* ---- addresses ---- */

void protect(int how)
{
    host &h = the();
    for (int i = 0; i < h.count; i++)
        if (h.devices[i].top)
            mprotect(h.devices[i].base, h.devices[i].top, how);
    h.closed = how == PROT_NONE;
}

/* Device memory may be touched while one of these lives. */
struct opened {
    bool was_closed;
    opened() : was_closed(the().closed)
    {
        if (was_closed)
            protect(PROT_READ | PROT_WRITE);
    }
    ~opened()
    {
        if (was_closed)
            protect(PROT_NONE);
    }
};

int device_of(const void *data)
{
    host &h = the();
    const char *at = static_cast<const char *>(data);
    for (int i = 0; i < h.count; i++)
        if (at >= h.devices[i].base && at < h.devices[i].base + ADDRESSES)
            return i;
    return -1;
}

/* The allocation that [data, data + bytes) lies in, or NULL. */
const block *allocation_of(const void *data, size_t bytes)
{
    int i = device_of(data);
    if (i < 0)
        return nullptr;
    const device &d = the().devices[i];
    size_t offset = (size_t)(static_cast<const char *>(data) - d.base);
    auto after = d.blocks.upper_bound(offset);
    if (after == d.blocks.begin())
        return nullptr;
    --after;
    return offset + bytes <= after->first + after->second.bytes ? &after->second : nullptr;
}

bool in_allocation(const void *data, size_t bytes)
{
    return allocation_of(data, bytes) != nullptr;
}

bool is_managed(const void *data)
{
    const block *found = allocation_of(data, 1);
    return found && found->managed;
}

bool is_pinned(const void *data)
{
    host &h = the();
    char *at = static_cast<char *>(const_cast<void *>(data));
    auto after = h.pinned.upper_bound(at);
    if (after == h.pinned.begin())
        return false;
    --after;
    return at < after->first + after->second;
}

/* Who wrote behind an allocation? Called with memory opened. */
std::string check_fences()
{
    host &h = the();
    for (int i = 0; i < h.count; i++)
        for (const auto &entry : h.devices[i].blocks) {
            const char *fence = h.devices[i].base + entry.first + entry.second.bytes;
            for (size_t j = 0; j < FENCE; j++)
                if (fence[j] != (char)0xff)
                    return "wrote " + std::to_string(j) + " bytes behind an allocation of " +
                           std::to_string(entry.second.bytes) + " bytes";
        }
    return "";
}

size_t find_place(const device &d, size_t reserved)
{
    size_t at = 0;
    for (const auto &entry : d.blocks) {
        if (entry.first - at >= reserved)
            return at;
        at = entry.first + entry.second.reserved;
    }
    return at;
}

} /* namespace */

struct CUgraph_st {
    std::vector<work> steps;
    std::vector<std::shared_ptr<condition>> conditions;
    std::vector<std::shared_ptr<CUgraph_st>> bodies; /* of its loops */
    CUgraph_st *body = nullptr;                      /* what a node's parameters point to */
};
struct CUgraphExec_st {
    std::vector<work> steps;
    int device;
};
struct CUevent_st {
    std::shared_ptr<mark> last;
    int device;
};
struct CUstream_st {
    int device;
    bool blocking; /* with the default stream */
    std::deque<work> queue;
    CUgraph_st *capture = nullptr;
    bool capture_is_body = false; /* it belongs to another graph */
    bool invalidated = false;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
    pthread_t capturer;
};

namespace {

int current_device()
{
    auto found = the().current.find(pthread_self());
    return found == the().current.end() ? 0 : found->second;
}

CUstream_st *new_stream(int index, bool blocking)
{
    CUstream_st *stream = new CUstream_st();
    stream->device = index;
    stream->blocking = blocking;
    the().streams.insert(stream);
    return stream;
}

CUstream_st *resolve(cudaStream_t stream)
{
    if (stream && stream != cudaStreamLegacy)
        return the().streams.count(stream) ? stream : nullptr;
    device &d = the().devices[current_device()];
    if (!d.default_stream)
        d.default_stream = new_stream(current_device(), false);
    return d.default_stream;
}

bool is_default(const CUstream_st *stream)
{
    return the().devices[stream->device].default_stream == stream;
}

/* Does what is queued, up to where `until` is done. */
cudaError_t drain(CUstream_st *stream, const mark *until = nullptr)
{
    if (stream->queue.empty())
        return cudaSuccess;
    opened memory;
    while (!stream->queue.empty() && !(until && until->done)) {
        work next = std::move(stream->queue.front());
        stream->queue.pop_front();
        std::string wrong = next();
        if (!wrong.empty()) {
            stream->queue.clear();
            return launch_failed(wrong);
        }
    }
    return cudaSuccess;
}

cudaError_t drain_device(int index, bool blocking_only)
{
    cudaError_t status = cudaSuccess;
    for (CUstream_st *stream : the().streams)
        if (stream->device == index && (!blocking_only || stream->blocking || is_default(stream))) {
            cudaError_t one = drain(stream);
            status = status == cudaSuccess ? one : status;
        }
    return status;
}

/* What must not happen while a stream of this process is captured (unless it was begun as relaxed, or by another thread as
 * its own affair). */
cudaError_t unless_capturing()
{
    cudaError_t status = cudaSuccess;
    for (CUstream_st *stream : the().streams)
        if (stream->capture && stream->mode != cudaStreamCaptureModeRelaxed &&
            (stream->mode == cudaStreamCaptureModeGlobal || pthread_equal(stream->capturer, pthread_self()))) {
            stream->invalidated = true;
            status = cudaErrorStreamCaptureUnsupported;
        }
    return error(status);
}

cudaError_t enqueue(CUstream_st *stream, work job)
{
    if (stream->capture) {
        if (stream->invalidated)
            return error(cudaErrorStreamCaptureInvalidated);
        stream->capture->steps.push_back(std::move(job));
        return cudaSuccess;
    }
    /* The default stream waits for those that block with it, and they for it. */
    cudaError_t status = is_default(stream)  ? drain_device(stream->device, true)
                         : stream->blocking && the().devices[stream->device].default_stream
                             ? drain(the().devices[stream->device].default_stream)
                             : cudaSuccess;
    stream->queue.push_back(std::move(job));
    if (status == cudaSuccess && the().eager)
        status = drain(stream);
    return status;
}

double milliseconds()
{
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e3 * (double)t.tv_sec + 1e-6 * (double)t.tv_nsec;
}

/* Which side each end of a copy must be on; cudaMemcpyDefault finds out. */
bool direction_fits(const void *to, const void *from, cudaMemcpyKind kind)
{
    bool to_device = device_of(to) >= 0, from_device = device_of(from) >= 0;
    switch (kind) {
    case cudaMemcpyHostToHost: return !to_device && !from_device;
    case cudaMemcpyHostToDevice: return to_device && !from_device;
    case cudaMemcpyDeviceToHost: return !to_device && from_device;
    case cudaMemcpyDeviceToDevice: return to_device && from_device;
    case cudaMemcpyDefault: return true;
    }
    return false;
}

void copy_lines(char *to, size_t to_pitch, const char *from, size_t from_pitch, size_t width, size_t height)
{
    for (size_t y = 0; y < height; y++)
        memmove(to + y * to_pitch, from + y * from_pitch, width);
}

struct copy {
    char *to;
    const char *from;
    size_t to_pitch, from_pitch, width, height;
};

cudaError_t copy_on(const copy &c, cudaMemcpyKind kind, cudaStream_t handle, bool wait)
{
    CUstream_st *stream = resolve(handle);
    if (!stream)
        return error(cudaErrorInvalidResourceHandle);
    if (wait && unless_capturing() != cudaSuccess)
        return cudaErrorStreamCaptureUnsupported;
    if (c.width == 0 || c.height == 0)
        return cudaSuccess;
    size_t to_bytes = (c.height - 1) * c.to_pitch + c.width, from_bytes = (c.height - 1) * c.from_pitch + c.width;
    if (!direction_fits(c.to, c.from, kind))
        return error(cudaErrorInvalidMemcpyDirection);
    bool to_device = device_of(c.to) >= 0, from_device = device_of(c.from) >= 0;
    if (to_device != from_device)
        the().counts[to_device ? CUDA_HOST_TO_DEVICE : CUDA_HOST_TO_HOST] += c.width * c.height;
    if (c.width > c.to_pitch || c.width > c.from_pitch || (to_device && !in_allocation(c.to, to_bytes)) ||
        (from_device && !in_allocation(c.from, from_bytes)))
        return error(cudaErrorInvalidValue);
    the().copied[2 * from_device + to_device] += c.width * c.height;
    work job;
    if (!from_device && !is_pinned(c.from) && !stream->capture) {
        /* Pageable: the bytes that are there now. */
        auto held = std::make_shared<std::vector<char>>(c.width * c.height);
        copy_lines(held->data(), c.width, c.from, c.from_pitch, c.width, c.height);
        job = [c, held] {
            copy_lines(c.to, c.to_pitch, held->data(), c.width, c.width, c.height);
            return std::string();
        };
    } else {
        job = [c] {
            copy_lines(c.to, c.to_pitch, c.from, c.from_pitch, c.width, c.height);
            return std::string();
        };
    }
    cudaError_t status = enqueue(stream, job);
    bool pageable_end = !to_device && !is_pinned(c.to);
    if (status == cudaSuccess && !stream->capture && (wait || pageable_end))
        status = drain(stream);
    return status;
}

cudaError_t fill_on(void *data, int value, size_t bytes, cudaStream_t handle)
{
    CUstream_st *stream = resolve(handle);
    if (!stream)
        return error(cudaErrorInvalidResourceHandle);
    if (bytes == 0)
        return cudaSuccess;
    if (!in_allocation(data, bytes))
        return error(cudaErrorInvalidValue);
    return enqueue(stream, [=] {
        memset(data, value, bytes);
        return std::string();
    });
}

} /* namespace */

extern "C" void cuda_host_fail_allocations_after(long count)
{
    locked guard;
    the().allocations_left = count;
    the().refused = 0;
}

extern "C" long cuda_host_allocations_refused(void)
{
    locked guard;
    return the().refused;
}

extern "C" size_t cuda_host_pinned_bytes(void)
{
    locked guard;
    size_t bytes = 0;
    for (const auto &entry : the().pinned)
        bytes += entry.second;
    return bytes;
}

/* Whether this allocation is to fail; all of them do after the first. */
static bool allocation_fails(void)
{
    long &left = the().allocations_left;
    if (left > 0)
        left--;
    else if (left == 0)
        the().refused++;
    return the().refused > 0;
}

extern "C" size_t cuda_host_bytes_copied(cudaMemcpyKind kind)
{
    locked guard;
    return the().copied[kind];
}

/* ---- launches ---- */

/* A small number beside the padding of a struct, in which anything may be left, the upper half of an address too. */
static bool may_be_padded(uintptr_t word)
{
    return (word & 0xffffffffu) < 1u << 16;
}

/* A word of an argument that is the address of mapped memory of the host is a pointer that a card could not follow. */
static bool is_host_address(uintptr_t word)
{
    static const uintptr_t lowest = (uintptr_t)1 << 40, page = (uintptr_t)sysconf(_SC_PAGESIZE);
    unsigned char resident;
    if (word < lowest || word >> 47 || device_of(reinterpret_cast<void *>(word)) >= 0 ||
        is_pinned(reinterpret_cast<void *>(word)))
        return false;
    return mincore(reinterpret_cast<void *>(word & ~(page - 1)), 1, &resident) == 0;
}

int cuda_host_check_argument(const char *kernel, int index, const void *argument, size_t bytes, cudaStream_t handle)
{
    locked guard;
    CUstream_st *stream = resolve(handle);
    for (size_t at = 0; stream && at + sizeof(uintptr_t) <= bytes; at += sizeof(uintptr_t)) {
        uintptr_t word;
        memcpy(&word, static_cast<const char *>(argument) + at, sizeof word);
        int owner = device_of(reinterpret_cast<void *>(word));
        bool elsewhere = owner >= 0 && owner != stream->device && !is_managed(reinterpret_cast<void *>(word));
        const char *what = may_be_padded(word)     ? nullptr
                           : elsewhere             ? "a pointer into another device"
                           : is_host_address(word) ? "a pointer of the host"
                                                   : nullptr;
        if (!what)
            continue;
        launch_failed(std::string(kernel) + ": argument " + std::to_string(index) + ": " + what);
        return -1;
    }
    return 0;
}

cudaError_t cuda_host_enqueue(const char *name, const void *kernel, dim3 grid, dim3 block, size_t shared,
                              cudaStream_t handle, std::function<void()> body)
{
    locked guard;
    CUstream_st *stream = resolve(handle);
    if (!stream)
        return error(cudaErrorInvalidResourceHandle);
    uint64_t threads = (uint64_t)block.x * block.y * block.z;
    if (threads < 1 || threads > 1024 || block.z > 64 || grid.x < 1 || grid.x > 0x7fffffffu || grid.y < 1 ||
        grid.y > 65535 || grid.z < 1 || grid.z > 65535)
        return error(cudaErrorInvalidConfiguration);
    auto allowed = the().shared_allowed.find(kernel);
    if (shared > (size_t)(allowed == the().shared_allowed.end() ? 48 << 10 : allowed->second))
        return error(cudaErrorInvalidValue);
    if (stream->device != current_device())
        return error(cudaErrorInvalidResourceHandle);
    the().counts[CUDA_HOST_LAUNCHES] += !stream->capture;
    std::string called = name;
    return enqueue(stream, [=] {
        std::string wrong = cuda_host_run(called.c_str(), grid, block, shared, body);
        if (wrong.empty() && !(wrong = check_fences()).empty())
            wrong = called + ": " + wrong;
        return wrong;
    });
}

cudaError_t cuda_host_allow_shared(const void *kernel, int bytes)
{
    locked guard;
    if (bytes < 0 || bytes > CUDA_HOST_SHARED_MOST)
        return error(cudaErrorInvalidValue);
    the().shared_allowed[kernel] = std::max(bytes, 48 << 10);
    return cudaSuccess;
}

extern "C" {

cudaError_t cudaGetLastError(void)
{
    locked guard;
    cudaError_t last = the().last;
    the().last = cudaSuccess;
    return last;
}

cudaError_t cudaPeekAtLastError(void)
{
    locked guard;
    return the().last;
}

#define NAMES(X)                                                                                                      \
    X(cudaSuccess, "no error")                                                                                        \
    X(cudaErrorInvalidValue, "invalid argument")                                                                      \
    X(cudaErrorMemoryAllocation, "out of memory")                                                                     \
    X(cudaErrorInvalidConfiguration, "invalid configuration argument")                                                \
    X(cudaErrorInvalidMemcpyDirection, "invalid copy direction for memcpy")                                           \
    X(cudaErrorNoDevice, "no CUDA-capable device is detected")                                                        \
    X(cudaErrorInvalidDevice, "invalid device ordinal")                                                               \
    X(cudaErrorInvalidResourceHandle, "invalid resource handle")                                                      \
    X(cudaErrorIllegalState, "the operation cannot be performed in the present state")                                \
    X(cudaErrorNotReady, "device not ready")                                                                          \
    X(cudaErrorLaunchFailure, "unspecified launch failure")                                                           \
    X(cudaErrorNotSupported, "operation not supported")                                                               \
    X(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing")                          \
    X(cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture")

const char *cudaGetErrorName(cudaError_t code)
{
    switch (code) {
#define NAME(CODE, TEXT) case CODE: return #CODE;
        NAMES(NAME)
#undef NAME
    default: return "unrecognized error code";
    }
}

const char *cudaGetErrorString(cudaError_t code)
{
    locked guard;
    if (code == cudaErrorLaunchFailure && !the().failure.empty())
        return the().failure.c_str();
    switch (code) {
#define TEXT(CODE, TEXT) case CODE: return TEXT;
        NAMES(TEXT)
#undef TEXT
    default: return "unrecognized error code";
    }
}

cudaError_t cudaDriverGetVersion(int *version)
{
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version)
{
    *version = CUDART_VERSION;
    return cudaSuccess;
}

/* ---- devices ---- */

cudaError_t cudaGetDeviceCount(int *count)
{
    *count = the().count;
    return *count ? cudaSuccess : error(cudaErrorNoDevice);
}

cudaError_t cudaGetDevice(int *index)
{
    locked guard;
    *index = current_device();
    return the().count ? cudaSuccess : error(cudaErrorNoDevice);
}

cudaError_t cudaSetDevice(int index)
{
    locked guard;
    if (index < 0 || index >= the().count)
        return error(the().count ? cudaErrorInvalidDevice : cudaErrorNoDevice);
    the().current[pthread_self()] = index;
    return cudaSuccess;
}

cudaError_t cudaSetDeviceFlags(unsigned)
{
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void)
{
    locked guard;
    cudaError_t status = unless_capturing();
    return status == cudaSuccess ? drain_device(current_device(), false) : status;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int index)
{
    if (index < 0 || index >= the().count)
        return error(cudaErrorInvalidDevice);
    *properties = cudaDeviceProp();
    cudaDeviceProp &p = *properties;
    snprintf(p.name, sizeof p.name, "host stand-in %d", index);
    p.totalGlobalMem = the().memory;
    p.sharedMemPerBlock = 48 << 10;
    p.sharedMemPerBlockOptin = CUDA_HOST_SHARED_MOST;
    p.sharedMemPerMultiprocessor = 228 << 10;
    p.reservedSharedMemPerBlock = 1 << 10;
    p.regsPerBlock = p.regsPerMultiprocessor = 65536;
    p.warpSize = 32;
    p.maxThreadsPerBlock = 1024;
    p.maxThreadsPerMultiProcessor = 2048;
    p.maxBlocksPerMultiProcessor = 32;
    p.maxGridSize[0] = 0x7fffffff;
    p.maxGridSize[1] = p.maxGridSize[2] = 65535;
    p.major = 9;
    p.multiProcessorCount = 4; /* few, so that grids that are planned by it stay small */
    p.l2CacheSize = 50 << 20;
    p.memoryBusWidth = 5120;
    p.asyncEngineCount = 1;
    p.concurrentKernels = p.unifiedAddressing = p.canMapHostMemory = 1;
    p.pciBusID = index;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int index)
{
    cudaDeviceProp p;
    cudaError_t status = cudaGetDeviceProperties(&p, index);
    if (status != cudaSuccess)
        return status;
    switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = (int)p.sharedMemPerBlock; return cudaSuccess;
    case cudaDevAttrWarpSize: *value = p.warpSize; return cudaSuccess;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; return cudaSuccess;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = (int)p.sharedMemPerMultiprocessor; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)p.sharedMemPerBlockOptin; return cudaSuccess;
    }
    return error(cudaErrorInvalidValue);
}

/* ---- memory ---- */

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total)
{
    locked guard;
    if (!the().count)
        return error(cudaErrorNoDevice);
    *total = the().memory;
    *free_bytes = the().memory - the().devices[current_device()].used;
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **data, size_t bytes)
{
    locked guard;
    *data = nullptr;
    if (!the().count)
        return error(cudaErrorNoDevice);
    cudaError_t status = unless_capturing();
    if (status != cudaSuccess || bytes == 0)
        return status;
    device &d = the().devices[current_device()];
    if (bytes > the().memory || d.used + bytes > the().memory || allocation_fails())
        return error(cudaErrorMemoryAllocation);
    size_t reserved = (bytes + FENCE + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT, at = find_place(d, reserved);
    if (at + reserved > ADDRESSES)
        return error(cudaErrorMemoryAllocation);
    d.blocks[at] = {bytes, reserved, false};
    d.used += bytes;
    d.top = std::max(d.top, (at + reserved + 65536) & ~(size_t)65535);
    if (!the().closed)
        protect(PROT_READ | PROT_WRITE); /* the new top too */
    opened memory;
    memset(d.base + at, 0xff, std::min(bytes, POISON_MOST));
    memset(d.base + at + bytes, 0xff, FENCE);
    *data = d.base + at;
    return cudaSuccess;
}

cudaError_t cudaMallocManaged(void **data, size_t bytes, unsigned flags)
{
    locked guard;
    cudaError_t status = flags == cudaMemAttachGlobal ? cudaMalloc(data, bytes) : error(cudaErrorInvalidValue);
    if (status == cudaSuccess && *data)
        const_cast<block *>(allocation_of(*data, 1))->managed = true;
    return status;
}

cudaError_t cudaFree(void *data)
{
    locked guard;
    if (!data)
        return cudaSuccess;
    int index = device_of(data);
    if (index < 0)
        return error(cudaErrorInvalidValue);
    cudaError_t status = unless_capturing();
    if (status == cudaSuccess)
        status = drain_device(index, false);
    device &d = the().devices[index];
    auto found = d.blocks.find((size_t)(static_cast<char *>(data) - d.base));
    if (found == d.blocks.end())
        return error(cudaErrorInvalidValue);
    opened memory;
    std::string wrong = check_fences();
    /* What is read after it was freed is NaN, or zeros where whole pages went back to the system. */
    memset(data, 0xff, std::min(found->second.bytes, POISON_MOST));
    if (found->second.bytes > POISON_MOST)
        madvise(static_cast<char *>(data) + POISON_MOST, found->second.bytes - POISON_MOST, MADV_DONTNEED);
    d.used -= found->second.bytes;
    d.blocks.erase(found);
    return wrong.empty() ? status : launch_failed(wrong);
}

cudaError_t cudaHostAlloc(void **data, size_t bytes, unsigned)
{
    locked guard;
    *data = allocation_fails() ? nullptr : aligned_alloc(4096, (bytes + 4096) & ~(size_t)4095);
    if (!*data)
        return error(cudaErrorMemoryAllocation);
    the().pinned[static_cast<char *>(*data)] = std::max(bytes, (size_t)1);
    return cudaSuccess;
}

cudaError_t cudaMallocHost(void **data, size_t bytes)
{
    return cudaHostAlloc(data, bytes, cudaHostAllocDefault);
}

cudaError_t cudaFreeHost(void *data)
{
    locked guard;
    if (!data)
        return cudaSuccess;
    if (!the().pinned.count(static_cast<char *>(data)))
        return error(cudaErrorInvalidValue);
    for (int i = 0; i < the().count; i++)
        drain_device(i, false);
    the().pinned.erase(static_cast<char *>(data));
    free(data);
    return cudaSuccess;
}

cudaError_t cudaHostRegister(void *data, size_t bytes, unsigned)
{
    locked guard;
    if (!data || !bytes || is_pinned(data))
        return error(cudaErrorInvalidValue);
    the().pinned[static_cast<char *>(data)] = bytes;
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *data)
{
    locked guard;
    return the().pinned.erase(static_cast<char *>(data)) ? cudaSuccess : error(cudaErrorInvalidValue);
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *data)
{
    locked guard;
    int index = device_of(data);
    *attributes = cudaPointerAttributes();
    attributes->device = index >= 0 ? index : current_device();
    attributes->type = is_managed(data)         ? cudaMemoryTypeManaged
                       : in_allocation(data, 1) ? cudaMemoryTypeDevice
                       : is_pinned(data)        ? cudaMemoryTypeHost
                                                : cudaMemoryTypeUnregistered;
    if (index >= 0)
        attributes->devicePointer = const_cast<void *>(data);
    else
        attributes->hostPointer = const_cast<void *>(data);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind)
{
    locked guard;
    return copy_on({static_cast<char *>(to), static_cast<const char *>(from), bytes, bytes, bytes, 1}, kind, nullptr,
                   true);
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream)
{
    locked guard;
    return copy_on({static_cast<char *>(to), static_cast<const char *>(from), bytes, bytes, bytes, 1}, kind, stream,
                   false);
}

cudaError_t cudaMemcpy2D(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                         cudaMemcpyKind kind)
{
    locked guard;
    return copy_on({static_cast<char *>(to), static_cast<const char *>(from), to_pitch, from_pitch, width, height}, kind,
                   nullptr, true);
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t stream)
{
    locked guard;
    return copy_on({static_cast<char *>(to), static_cast<const char *>(from), to_pitch, from_pitch, width, height}, kind,
                   stream, false);
}

cudaError_t cudaMemset(void *data, int value, size_t bytes)
{
    locked guard;
    cudaError_t status = unless_capturing();
    return status == cudaSuccess ? fill_on(data, value, bytes, nullptr) : status;
}

cudaError_t cudaMemsetAsync(void *data, int value, size_t bytes, cudaStream_t stream)
{
    locked guard;
    return fill_on(data, value, bytes, stream);
}

/* ---- streams and events ---- */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags)
{
    locked guard;
    if (!the().count)
        return error(cudaErrorNoDevice);
    *stream = new_stream(current_device(), !(flags & cudaStreamNonBlocking));
    return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t *stream)
{
    return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int)
{
    return cudaStreamCreateWithFlags(stream, flags);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    locked guard;
    if (!the().streams.count(stream))
        return error(cudaErrorInvalidResourceHandle);
    cudaError_t status = drain(stream);
    the().streams.erase(stream);
    delete stream->capture;
    delete stream;
    return status;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle)
{
    locked guard;
    CUstream_st *stream = resolve(handle);
    if (!stream)
        return error(cudaErrorInvalidResourceHandle);
    cudaError_t status = unless_capturing();
    the().counts[CUDA_HOST_WAITS]++;
    return status == cudaSuccess ? drain(stream) : status;
}

/* Some of it is done at each question, so that who asks again and again comes to an end. */
cudaError_t cudaStreamQuery(cudaStream_t handle)
{
    locked guard;
    CUstream_st *stream = resolve(handle);
    if (!stream)
        return error(cudaErrorInvalidResourceHandle);
    if (stream->queue.empty())
        return cudaSuccess;
    cudaError_t status = drain(stream);
    return status == cudaSuccess ? cudaErrorNotReady : status;
}

cudaError_t cudaStreamGetDevice(cudaStream_t handle, int *index)
{
    locked guard;
    CUstream_st *stream = resolve(handle);
    if (!stream)
        return error(cudaErrorInvalidResourceHandle);
    *index = stream->device;
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned)
{
    locked guard;
    *event = new CUevent_st{nullptr, current_device()};
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event)
{
    return cudaEventCreateWithFlags(event, cudaEventDefault);
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    locked guard;
    delete event;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle)
{
    locked guard;
    CUstream_st *stream = resolve(handle);
    if (!stream || stream->device != event->device)
        return error(cudaErrorInvalidResourceHandle);
    if (stream->capture) {
        stream->invalidated = true;
        return error(cudaErrorStreamCaptureUnsupported);
    }
    auto recorded = std::make_shared<mark>(mark{stream, false, 0.0});
    event->last = recorded;
    return enqueue(stream, [recorded] {
        recorded->done = true;
        recorded->milliseconds = milliseconds();
        return std::string();
    });
}

static cudaError_t finish(const std::shared_ptr<mark> &recorded)
{
    return !recorded || recorded->done || !the().streams.count(recorded->stream)
               ? cudaSuccess
               : drain(recorded->stream, recorded.get());
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned)
{
    locked guard;
    CUstream_st *stream = resolve(handle);
    if (!stream)
        return error(cudaErrorInvalidResourceHandle);
    if (stream->capture) {
        stream->invalidated = true;
        return error(cudaErrorStreamCaptureUnsupported);
    }
    std::shared_ptr<mark> recorded = event->last;
    return enqueue(stream, [recorded] { return finish(recorded) == cudaSuccess ? std::string() : the().failure; });
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    locked guard;
    the().counts[CUDA_HOST_WAITS]++;
    return finish(event->last);
}

cudaError_t cudaEventQuery(cudaEvent_t event)
{
    locked guard;
    if (!event->last || event->last->done)
        return cudaSuccess;
    cudaError_t status = finish(event->last);
    return status == cudaSuccess ? cudaErrorNotReady : status;
}

cudaError_t cudaEventElapsedTime(float *out, cudaEvent_t start, cudaEvent_t end)
{
    locked guard;
    if (!start->last || !end->last)
        return error(cudaErrorInvalidResourceHandle);
    if (!start->last->done || !end->last->done)
        return error(cudaErrorNotReady);
    *out = (float)(end->last->milliseconds - start->last->milliseconds);
    return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void *argument)
{
    locked guard;
    CUstream_st *stream = resolve(handle);
    if (!stream)
        return error(cudaErrorInvalidResourceHandle);
    return enqueue(stream, [=] {
        function(argument);
        return std::string();
    });
}

/* ---- graphs ---- */

static void begin_capture(CUstream_st *stream, CUgraph_st *graph, bool is_body, cudaStreamCaptureMode mode)
{
    stream->capture = graph;
    stream->capture_is_body = is_body;
    stream->invalidated = false;
    stream->mode = mode;
    stream->capturer = pthread_self();
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode)
{
    locked guard;
    if (!stream || stream == cudaStreamLegacy || !the().streams.count(stream))
        return error(cudaErrorStreamCaptureUnsupported);
    if (stream->capture)
        return error(cudaErrorIllegalState);
    cudaError_t status = drain(stream);
    begin_capture(stream, new CUgraph_st(), false, mode);
    return status;
}

cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t stream, cudaGraph_t graph, const cudaGraphNode_t *,
                                          const cudaGraphEdgeData *, size_t count, cudaStreamCaptureMode mode)
{
    locked guard;
    if (!stream || stream == cudaStreamLegacy || !the().streams.count(stream))
        return error(cudaErrorStreamCaptureUnsupported);
    if (stream->capture)
        return error(cudaErrorIllegalState);
    if (!graph || count != 0 || !graph->steps.empty())
        return error(cudaErrorInvalidValue);
    cudaError_t status = drain(stream);
    begin_capture(stream, graph, true, mode);
    return status;
}

cudaError_t cudaGraphCreate(cudaGraph_t *graph, unsigned flags)
{
    *graph = nullptr;
    if (flags != 0)
        return error(cudaErrorInvalidValue);
    *graph = new CUgraph_st();
    return cudaSuccess;
}

cudaError_t cudaGraphConditionalHandleCreate(cudaGraphConditionalHandle *handle, cudaGraph_t graph, unsigned value,
                                             unsigned flags)
{
    locked guard;
    if (!graph || flags != cudaGraphCondAssignDefault)
        return error(cudaErrorInvalidValue);
    auto &all = the().conditions;
    *handle = all.empty() ? 1 : all.rbegin()->first + 1;
    graph->conditions.push_back(std::make_shared<condition>(condition{*handle, value, value}));
    all[*handle] = graph->conditions.back();
    return cudaSuccess;
}

cudaError_t cudaGraphAddNode(cudaGraphNode_t *node, cudaGraph_t graph, const cudaGraphNode_t *, const cudaGraphEdgeData *,
                             size_t count, cudaGraphNodeParams *params)
{
    locked guard;
    std::shared_ptr<condition> held;
    for (const auto &one : graph->conditions)
        if (one->handle == params->conditional.handle)
            held = one;
    if (params->type != cudaGraphNodeTypeConditional || params->conditional.type != cudaGraphCondTypeWhile ||
        params->conditional.size != 1 || count != 0 || !graph->steps.empty() || !held)
        return error(cudaErrorInvalidValue);
    auto body = std::make_shared<CUgraph_st>();
    graph->bodies.push_back(body);
    graph->body = body.get();
    graph->steps.push_back([held, body] {
        for (held->now = held->at_launch; held->now;)
            for (const work &step : body->steps) {
                std::string wrong = step();
                if (!wrong.empty())
                    return wrong;
            }
        return std::string();
    });
    *node = nullptr;
    params->conditional.phGraph_out = &graph->body;
    return cudaSuccess;
}

void cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned value)
{
    locked guard;
    auto found = the().conditions.find(handle);
    std::shared_ptr<condition> held = found == the().conditions.end() ? nullptr : found->second.lock();
    if (held)
        held->now = value;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph)
{
    locked guard;
    *graph = nullptr;
    if (!the().streams.count(stream) || !stream->capture)
        return error(cudaErrorIllegalState);
    if (!stream->invalidated)
        *graph = stream->capture;
    else if (!stream->capture_is_body)
        delete stream->capture;
    stream->capture = nullptr;
    return stream->invalidated ? error(cudaErrorStreamCaptureInvalidated) : cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus *status)
{
    locked guard;
    CUstream_st *stream = resolve(handle);
    if (!stream)
        return error(cudaErrorInvalidResourceHandle);
    *status = !stream->capture      ? cudaStreamCaptureStatusNone
              : stream->invalidated ? cudaStreamCaptureStatusInvalidated
                                    : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long)
{
    locked guard;
    if (!graph)
        return error(cudaErrorInvalidValue);
    *exec = new CUgraphExec_st{graph->steps, current_device()};
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t handle)
{
    locked guard;
    CUstream_st *stream = resolve(handle);
    if (!exec || !stream || stream->capture)
        return error(cudaErrorInvalidValue);
    if (stream->device != exec->device)
        return error(cudaErrorInvalidResourceHandle);
    cudaError_t status = cudaSuccess;
    the().counts[CUDA_HOST_GRAPHS]++;
    for (size_t i = 0; i < exec->steps.size() && status == cudaSuccess; i++)
        status = enqueue(stream, exec->steps[i]);
    return status;
}

__attribute__((visibility("default"))) unsigned long long cuda_host_count(int what)
{
    locked guard;
    return what < 0 || what >= CUDA_HOST_COUNTS ? 0 : the().counts[what];
}

cudaError_t cudaGraphUpload(cudaGraphExec_t exec, cudaStream_t)
{
    return exec ? cudaSuccess : error(cudaErrorInvalidValue);
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    locked guard;
    delete graph;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec)
{
    locked guard;
    for (int i = 0; i < the().count; i++)
        drain_device(i, false);
    delete exec;
    return cudaSuccess;
}

} /* extern "C" */
