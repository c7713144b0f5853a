/* Queues: a stream, the copies of host arrays that its operations read, what it has noted of NaN and Inf, and copies in the
 * order of the stream.
 *
 * Host arrays are copied into one of two chunks of pinned memory and from there to its twin on the device. A full chunk makes
 * way for the other one, once the work that reads the other is done. Of what was copied last, a table remembers where: a
 * step's arrays are handed to every layer, and travel once. While a step is recorded they go into memory of its own. */
#include <string.h>

#include "ops/cuda/cuda_ops.h"
#include "ops/cuda/device.h"
#include "ops/cuda/indices.h"

enum { CHUNKS = 2, REMEMBERED = 256, ALIGNMENT = 256, SHARE = 16, BOUNCE = 1 << 20, MOST_NOTES = 4096 };
static const size_t least_chunk = (size_t)1 << 20;

struct remembered {
    const void *host;
    size_t bytes, at;
};

struct chunk {
    char *host, *device; /* [size], owned; device from the device's memory */
    size_t size, used;
    remembered table[REMEMBERED];
};

struct b2_cuda_indices {
    chunk chunks[CHUNKS];
    int now;
    chunk retired[32]; /* outgrown; freed when the queue is given back */
    int retired_count;
    b2_cuda_recording *recording; /* NULL: none is made */
};

/* The first of all that were noted: note << 32 | row, where `note` is the place in the list. Notes are made in the order of
 * the work, so the least is the first. */
struct b2_cuda_notes {
    struct {
        const char *stage;
        int layer;
    } list[MOST_NOTES];
    int count;
    unsigned long long *device; /* [1] */
    unsigned long long *host;   /* [1], pinned */
    char *bounce;               /* [BOUNCE], pinned: small downloads */
};

static const unsigned long long NOTHING = ~0ull;

/* ---- host arrays ---- */

static void chunk_release(b2_cuda_device *d, chunk *c)
{
    if (c->host)
        cudaFreeHost(c->host);
    if (c->device)
        d->memory.free(&d->memory, c->device);
    memset(c, 0, sizeof *c);
}

static int chunk_create(b2_cuda_device *d, chunk *c, size_t size, b2_err *err)
{
    memset(c, 0, sizeof *c);
    if (b2_cuda_pinned((void **)&c->host, size, err) < 0)
        return -1;
    c->device = (char *)d->memory.alloc(&d->memory, size, "arrays of indices", err);
    c->size = size;
    if (c->device)
        return 0;
    chunk_release(d, c);
    return -1;
}

static size_t padded(size_t bytes)
{
    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

/* The chunk to write to next: empty, and so large that one operation's arrays cannot fill it. What the present one holds
 * stays as it is. */
static int next_chunk(b2_cuda *q, size_t bytes, b2_err *err)
{
    b2_cuda_indices *x = q->indices;
    chunk *c = &x->chunks[x->now = (x->now + 1) % CHUNKS];
    size_t size = least_chunk;
    while (size < SHARE * bytes)
        size *= 2;
    if (c->size >= size) {
        c->used = 0;
        memset(c->table, 0, sizeof c->table);
        return b2_cuda_check(cudaStreamSynchronize(q->stream), "arrays of indices", err);
    }
    if (c->size > 0) {
        if (x->retired_count == (int)(sizeof x->retired / sizeof *x->retired))
            return b2_fail(err, B2_E_INTERNAL, "arrays of indices: outgrown too often");
        x->retired[x->retired_count++] = *c;
        memset(c, 0, sizeof *c);
    }
    return chunk_create(b2_cuda_device_of(q), c, size, err);
}

static size_t place_of(const void *host)
{
    return ((uintptr_t)host >> 4) * 0x9E3779B97F4A7C15u >> 40 & (REMEMBERED - 1);
}

static const void *copy_now(b2_cuda *q, const void *host, size_t bytes, b2_err *err)
{
    b2_cuda_indices *x = q->indices;
    chunk *c = &x->chunks[x->now];
    if ((c->used + bytes > c->size || SHARE * bytes > c->size)) {
        if (next_chunk(q, bytes, err) < 0)
            return NULL;
        c = &x->chunks[x->now];
    }
    remembered *r = &c->table[place_of(host)];
    if (r->host == host && r->bytes == bytes && memcmp(c->host + r->at, host, bytes) == 0)
        return c->device + r->at;
    size_t at = c->used;
    c->used = at + padded(bytes);
    memcpy(c->host + at, host, bytes);
    if (b2_cuda_check(cudaMemcpyAsync(c->device + at, c->host + at, bytes, cudaMemcpyHostToDevice, q->stream),
                      "arrays of indices", err) < 0)
        return NULL;
    r->host = host;
    r->bytes = bytes;
    r->at = at;
    return c->device + at;
}

static const void *record(b2_cuda_recording *r, const void *host, size_t bytes, b2_err *err)
{
    for (int i = 0; i < r->count; i++) {
        int same = r->arrays[i].bytes == bytes && memcmp(r->host + r->arrays[i].at, host, bytes) == 0;
        if (same && (r->constant || r->arrays[i].host == host))
            return r->device + r->arrays[i].at;
        if (!r->constant && r->arrays[i].host == host && r->arrays[i].bytes == bytes) {
            b2_fail(err, B2_E_INTERNAL, "step: an array of indices changes within it");
            return NULL;
        }
    }
    if (r->count == B2_CUDA_RECORDED) {
        b2_fail(err, B2_E_INTERNAL, "step: more than %d arrays of indices", (int)B2_CUDA_RECORDED);
        return NULL;
    }
    if (r->used + bytes > r->size) {
        r->overflowed = 1;
        b2_fail(err, B2_E_INTERNAL, "step: %zu bytes of indices, room for %zu", r->used + bytes, r->size);
        return NULL;
    }
    size_t at = r->used;
    r->arrays[r->count].host = host;
    r->arrays[r->count].bytes = bytes;
    r->arrays[r->count++].at = at;
    r->used = at + padded(bytes);
    memcpy(r->host + at, host, bytes);
    return r->device + at;
}

const void *b2_cuda_index(b2_ctx *ctx, const void *host, size_t bytes, b2_err *err)
{
    b2_cuda *q = b2_cuda_of(ctx);
    if (!host)
        return NULL;
    if (q->indices->recording)
        return record(q->indices->recording, host, bytes, err);
    if (b2_cuda_check(cudaSetDevice(q->device->index), "cuda", err) < 0)
        return NULL;
    return copy_now(q, host, bytes == 0 ? 1 : bytes, err);
}

void b2_cuda_record_into(b2_cuda *q, b2_cuda_recording *recording)
{
    q->indices->recording = recording;
}

/* ---- NaN and Inf ---- */

__global__ static void note_finite_kernel(unsigned long long *noted, unsigned note, const float *x, int64_t rows,
                                          int64_t cols, int64_t ld)
{
    int64_t all = rows * cols, step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < all; i += step) {
        int64_t row = i / cols;
        float value = x[row * ld + (i - row * cols)];
        if (!(fabsf(value) <= 3.402823466e38f))
            atomicMin(noted, (unsigned long long)note << 32 | (unsigned long long)(uint32_t)row);
    }
}

int b2_cuda_note_finite(b2_ctx *ctx, const char *stage, int layer, b2_tensor x, b2_err *err)
{
    enum { THREADS = 256, EACH = 8 };
    b2_cuda *q = b2_cuda_of(ctx);
    b2_cuda_notes *n = q->notes;
    int note = 0;
    while (note < n->count && (n->list[note].layer != layer || strcmp(n->list[note].stage, stage) != 0))
        note++;
    if (note == MOST_NOTES)
        return b2_fail(err, B2_E_INTERNAL, "%s layer %d: too many stages at once", stage, layer);
    if (note == n->count) {
        n->list[note].stage = stage;
        n->list[note].layer = layer;
        n->count++;
    }
    int64_t blocks = (x.rows * x.cols + THREADS * EACH - 1) / (THREADS * EACH);
    int64_t most = 8 * (int64_t)q->multiprocessors;
    unsigned grid = (unsigned)(blocks < most ? blocks : most);
    B2_LAUNCH(note_finite_kernel, dim3(grid), dim3(THREADS), 0, q->stream, n->device, (unsigned)note,
              (const float *)x.data, x.rows, x.cols, x.ld);
    return b2_cuda_launched("note_finite", err);
}

static int forget_notes(b2_cuda *q, b2_err *err)
{
    *q->notes->host = NOTHING;
    return b2_cuda_check(cudaMemcpyAsync(q->notes->device, q->notes->host, sizeof NOTHING, cudaMemcpyHostToDevice,
                                         q->stream), "notes", err) < 0 ||
                   b2_cuda_check(cudaStreamSynchronize(q->stream), "notes", err) < 0
               ? -1
               : 0;
}

/* After the notes have come to the host. */
static int read_notes(b2_cuda *q, b2_err *err)
{
    unsigned long long found = *q->notes->host;
    if (found == NOTHING)
        return 0;
    unsigned note = (unsigned)(found >> 32);
    if (forget_notes(q, err) < 0)
        return -1;
    return b2_fail_finite(err, q->notes->list[note].stage, q->notes->list[note].layer, (int64_t)(uint32_t)found);
}

/* ---- copies ---- */

int b2_cuda_upload(b2_ctx *ctx, void *to, const void *from, size_t bytes, b2_err *err)
{
    b2_cuda *q = b2_cuda_of(ctx);
    cudaPointerAttributes where;
    if (b2_cuda_check(cudaSetDevice(q->device->index), "cuda", err) < 0 ||
        b2_cuda_check(cudaPointerGetAttributes(&where, from), "upload", err) < 0 ||
        b2_cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, q->stream), "upload", err) < 0)
        return -1;
    /* What lies on the device stays as it is until the queue is given back. */
    return where.type == cudaMemoryTypeDevice ? 0 : b2_cuda_check(cudaStreamSynchronize(q->stream), "upload", err);
}

int b2_cuda_download(b2_ctx *ctx, void *to, const void *from, size_t bytes, b2_err *err)
{
    b2_cuda *q = b2_cuda_of(ctx);
    cudaPointerAttributes where;
    /* Small ones to the host go through pinned memory; `to` may be on the device too. */
    int bounces = bytes <= BOUNCE && cudaPointerGetAttributes(&where, to) == cudaSuccess &&
                  where.type != cudaMemoryTypeDevice && where.type != cudaMemoryTypeManaged;
    void *first = bounces ? q->notes->bounce : to;
    if (b2_cuda_check(cudaSetDevice(q->device->index), "cuda", err) < 0 ||
        b2_cuda_check(cudaMemcpyAsync(first, from, bytes, cudaMemcpyDefault, q->stream), "download", err) < 0 ||
        b2_cuda_check(cudaMemcpyAsync(q->notes->host, q->notes->device, sizeof NOTHING, cudaMemcpyDeviceToHost, q->stream),
                      "notes", err) < 0 ||
        b2_cuda_check(cudaStreamSynchronize(q->stream), "download", err) < 0)
        return -1;
    if (bounces)
        memcpy(to, first, bytes);
    return read_notes(q, err);
}

int b2_cuda_finish(b2_ctx *ctx, b2_err *err)
{
    b2_cuda *q = b2_cuda_of(ctx);
    return b2_cuda_check(cudaSetDevice(q->device->index), "cuda", err) < 0 ||
                   b2_cuda_check(cudaMemcpyAsync(q->notes->host, q->notes->device, sizeof NOTHING, cudaMemcpyDeviceToHost,
                                                 q->stream), "notes", err) < 0 ||
                   b2_cuda_check(cudaStreamSynchronize(q->stream), "work on the device", err) < 0
               ? -1
               : read_notes(q, err);
}

void b2_cuda_wait(b2_ctx *ctx)
{
    cudaStreamSynchronize(b2_cuda_of(ctx)->stream); /* what has failed is said by the next call that can */
}

/* ---- life ---- */

static void destroy(b2_cuda *q)
{
    b2_cuda_device *d = b2_cuda_device_of(q);
    if (q->stream)
        cudaStreamSynchronize(q->stream);
    b2_cuda_steps_release(q);
    b2_cuda_pace_release(q);
    b2_cuda_products_release(q->products);
    for (int i = 0; q->indices && i < CHUNKS; i++)
        chunk_release(d, &q->indices->chunks[i]);
    for (int i = 0; q->indices && i < q->indices->retired_count; i++)
        chunk_release(d, &q->indices->retired[i]);
    if (q->notes) {
        if (q->notes->device)
            d->memory.free(&d->memory, q->notes->device);
        if (q->notes->host)
            cudaFreeHost(q->notes->host);
        if (q->notes->bounce)
            cudaFreeHost(q->notes->bounce);
    }
    if (q->stream)
        cudaStreamDestroy(q->stream);
    b2_free(q->indices);
    b2_free(q->notes);
    b2_free(q);
}

static int make_notes(b2_cuda *q, b2_err *err)
{
    b2_cuda_device *d = b2_cuda_device_of(q);
    b2_cuda_notes *n = q->notes = (b2_cuda_notes *)b2_alloc_zeroed(1, sizeof *q->notes, "queue", err);
    if (!n || !(n->device = (unsigned long long *)d->memory.alloc(&d->memory, sizeof NOTHING, "notes", err)) ||
        b2_cuda_pinned((void **)&n->host, sizeof NOTHING, err) < 0 || b2_cuda_pinned((void **)&n->bounce, BOUNCE, err) < 0)
        return -1;
    return forget_notes(q, err);
}

static int describe(b2_cuda *q, b2_err *err)
{
    int index = q->device->index, shared = 0;
    if (b2_cuda_check(cudaDeviceGetAttribute(&q->major, cudaDevAttrComputeCapabilityMajor, index), "device", err) < 0 ||
        b2_cuda_check(cudaDeviceGetAttribute(&q->minor, cudaDevAttrComputeCapabilityMinor, index), "device", err) < 0 ||
        b2_cuda_check(cudaDeviceGetAttribute(&q->multiprocessors, cudaDevAttrMultiProcessorCount, index), "device",
                      err) < 0 ||
        b2_cuda_check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index), "device", err) < 0)
        return -1;
    q->shared_per_block = (size_t)shared;
    return 0;
}

static b2_cuda *create(b2_device *device, b2_err *err)
{
    b2_cuda *q = (b2_cuda *)b2_alloc_zeroed(1, sizeof *q, "queue", err);
    if (!q)
        return NULL;
    q->device = device;
    q->indices = (b2_cuda_indices *)b2_alloc_zeroed(1, sizeof *q->indices, "queue", err);
    if (q->indices && b2_cuda_check(cudaStreamCreateWithFlags(&q->stream, cudaStreamNonBlocking), "stream", err) == 0 &&
        describe(q, err) == 0 && make_notes(q, err) == 0)
        return q;
    destroy(q);
    return NULL;
}

void *b2_cuda_queue_take(b2_device *device, b2_err *err)
{
    b2_cuda_device *d = (b2_cuda_device *)device;
    int before = 0;
    if (b2_cuda_check(cudaGetDevice(&before), "cuda", err) < 0 ||
        b2_cuda_check(cudaSetDevice(device->index), "cuda", err) < 0)
        return NULL;
    pthread_mutex_lock(&d->lock);
    b2_cuda *q = d->queues;
    if (q)
        d->queues = q->next;
    pthread_mutex_unlock(&d->lock);
    int status = q || (q = create(device, err)) ? 0 : -1;
    if (status == 0) {
        pthread_mutex_lock(&d->lock);
        status = b2_cuda_after_arrivals(d, q->stream, err);
        pthread_mutex_unlock(&d->lock);
    }
    if (status < 0) {
        if (q)
            destroy(q);
        cudaSetDevice(before);
        return NULL;
    }
    q->next = NULL;
    q->before = before;
    b2_cuda_pace_restart(q);
    return q;
}

/* A queue whose work has failed is not used again. */
void b2_cuda_queue_give(void *queue)
{
    b2_cuda *q = (b2_cuda *)queue;
    if (!q)
        return;
    b2_cuda_device *d = b2_cuda_device_of(q);
    b2_err err = {};
    int before = q->before;
    cudaSetDevice(q->device->index);
    int status = cudaStreamSynchronize(q->stream) == cudaSuccess ? forget_notes(q, &err) : -1;
    for (int i = 0; i < q->indices->retired_count; i++)
        chunk_release(d, &q->indices->retired[i]);
    q->indices->retired_count = 0;
    q->notes->count = q->steps ? q->notes->count : 0; /* recorded steps know notes by their place */
    if (status < 0) {
        cudaGetLastError();
        destroy(q);
    } else {
        pthread_mutex_lock(&d->lock);
        q->next = d->queues;
        d->queues = q;
        pthread_mutex_unlock(&d->lock);
    }
    cudaSetDevice(before);
}

void b2_cuda_queues_destroy(b2_cuda_device *d)
{
    while (d->queues) {
        b2_cuda *q = d->queues;
        d->queues = q->next;
        destroy(q);
    }
}
