/* Steps as graphs. The first time that a step of some shape is asked for it runs as it is; the second time it is recorded; from
 * then on the recording is launched, after the host arrays that it reads have been copied to where it reads them.
 *
 * A step that chooses its own tokens (choose.cu) is recorded as the body of a loop on the device, which it ends itself.
 * A step that makes its host arrays itself (b2_step_shape.constant) reads what they held when it was recorded. Of those only the
 * short ones are recorded (MOST_WORK): what takes longer than launching its operations gains nothing, and a launched graph can
 * not be cancelled.
 *
 * A shape's key holds every pointer and number that the step's operations are given, so an equal key means an equal recording.
 * What cannot be recorded (a backend operation that waits, an array that changes within the step) runs as it is for ever. */
#include <string.h>

#include "ops/cuda/cuda_ops.h"
#include "ops/cuda/device.h"
#include "ops/cuda/indices.h"

/* The first two pictures of BLIP-2's ViT-g: 3 ms of an H100, 20 ms of a card a sixth as fast. */
static const double MOST_WORK = 1e12;

enum { STEPS = 32 }; /* shapes that are remembered: the one not used for longest makes way */

struct step {
    void *key; /* [bytes], owned; NULL: free */
    size_t bytes;
    uint64_t used;       /* when */
    size_t room;         /* for arrays, to begin with */
    double work;         /* as pace.cu counts it */
    int refused;         /* not to be recorded */
    int loops;           /* recorded as a loop */
    cudaGraphExec_t exec;/* NULL: not recorded yet */
    b2_cuda_recording recording;
};

struct b2_cuda_steps {
    step list[STEPS];
    uint64_t clock;
};

static void release_recording(b2_cuda_device *d, b2_cuda_recording *r)
{
    if (r->host)
        cudaFreeHost(r->host);
    if (r->device)
        d->memory.free(&d->memory, r->device);
    memset(r, 0, sizeof *r);
}

static void release_step(b2_cuda_device *d, step *s)
{
    if (s->exec)
        cudaGraphExecDestroy(s->exec);
    release_recording(d, &s->recording);
    b2_free(s->key);
    memset(s, 0, sizeof *s);
}

void b2_cuda_steps_release(b2_cuda *q)
{
    for (int i = 0; q->steps && i < STEPS; i++)
        release_step(b2_cuda_device_of(q), &q->steps->list[i]);
    b2_free(q->steps);
    q->steps = NULL;
}

/* The step of that key; where it is new, in the place of the oldest. */
static step *find(b2_cuda *q, b2_step_shape shape, int *fresh, b2_err *err)
{
    if (!q->steps && !(q->steps = (b2_cuda_steps *)b2_alloc_zeroed(1, sizeof *q->steps, "steps", err)))
        return NULL;
    step *oldest = q->steps->list;
    for (step *s = q->steps->list; s < q->steps->list + STEPS; s++) {
        if (s->key && s->bytes == shape.bytes && memcmp(s->key, shape.key, shape.bytes) == 0) {
            s->used = ++q->steps->clock;
            *fresh = 0;
            return s;
        }
        if (s->used < oldest->used)
            oldest = s;
    }
    release_step(b2_cuda_device_of(q), oldest);
    if (!(oldest->key = b2_alloc(shape.bytes, 1, "steps", err)))
        return NULL;
    memcpy(oldest->key, shape.key, shape.bytes);
    oldest->bytes = shape.bytes;
    oldest->used = ++q->steps->clock;
    oldest->room = (size_t)1 << 18;
    *fresh = 1;
    return oldest;
}

static int make_room(b2_cuda *q, step *s, b2_err *err)
{
    b2_cuda_recording *r = &s->recording;
    b2_cuda_device *d = b2_cuda_device_of(q);
    int constant = r->constant;
    release_recording(d, r);
    r->constant = constant;
    if (b2_cuda_check(cudaMallocHost((void **)&r->host, s->room), "pinned memory", err) < 0 ||
        !(r->device = (char *)d->memory.alloc(&d->memory, s->room, "arrays of a step", err)))
        return -1;
    r->size = s->room;
    return 0;
}

/* The graph whose only node repeats what is captured into *body. */
static int make_loop(b2_cuda *q, cudaGraph_t *graph, cudaGraph_t *body, b2_err *err)
{
    cudaGraphNode_t node;
    cudaGraphNodeParams loop = {};
    if (b2_cuda_check(cudaGraphCreate(graph, 0), "loop of steps", err) < 0 ||
        b2_cuda_check(cudaGraphConditionalHandleCreate(&q->loop, *graph, 1, cudaGraphCondAssignDefault), "loop of steps",
                      err) < 0)
        return -1;
    loop.type = cudaGraphNodeTypeConditional;
    loop.conditional.handle = q->loop;
    loop.conditional.type = cudaGraphCondTypeWhile;
    loop.conditional.size = 1;
#if CUDART_VERSION >= 13000
    cudaError_t added = cudaGraphAddNode(&node, *graph, NULL, NULL, 0, &loop);
#else
    cudaError_t added = cudaGraphAddNode(&node, *graph, NULL, 0, &loop);
#endif
    *body = added == cudaSuccess ? loop.conditional.phGraph_out[0] : NULL;
    return b2_cuda_check(added, "loop of steps", err);
}

/* *graph: of a loop, to be destroyed whatever is returned. */
static int begin_capture(b2_cuda *q, int loops, cudaGraph_t *graph, b2_err *err)
{
    cudaGraph_t body = NULL;
    if (!loops)
        return b2_cuda_check(cudaStreamBeginCapture(q->stream, cudaStreamCaptureModeThreadLocal), "step", err);
    if (make_loop(q, graph, &body, err) < 0)
        return -1;
    return b2_cuda_check(cudaStreamBeginCaptureToGraph(q->stream, body, NULL, NULL, 0, cudaStreamCaptureModeThreadLocal),
                         "loop of steps", err);
}

/* The body's work as a graph: 0, or -1 where it cannot be had (`err` says what the body said). */
static int record(b2_ctx *ctx, step *s, int loops, b2_step_fn body, void *argument, b2_err *err)
{
    b2_cuda *q = b2_cuda_of(ctx);
    cudaGraph_t graph = NULL, captured = NULL;
    int status = make_room(q, s, err) < 0 ? -1 : begin_capture(q, loops, &graph, err);
    if (status == 0) {
        q->capturing = 1;
        q->repeating = loops;
        q->arrays_change = !s->recording.constant;
        b2_cuda_record_into(q, &s->recording);
        status = body(ctx, argument, err);
        b2_cuda_record_into(q, NULL);
        q->capturing = q->repeating = q->arrays_change = 0;
        cudaError_t ended = cudaStreamEndCapture(q->stream, &captured); /* always, or the stream stays as it is */
        if (status == 0)
            status = b2_cuda_check(ended, "step", err);
    }
    if (!loops)
        graph = captured; /* of a loop it is a part */
    if (status == 0)
        status = b2_cuda_check(cudaGraphInstantiate(&s->exec, graph, 0), "step", err);
    if (status < 0)
        s->exec = NULL;
    if (graph)
        cudaGraphDestroy(graph);
    cudaGetLastError();
    s->loops = loops;
    return status;
}

/* With as much room as its arrays need. */
static int record_whole(b2_ctx *ctx, step *s, int loops, b2_step_fn body, void *argument)
{
    b2_err why = {};
    int status = record(ctx, s, loops, body, argument, &why);
    while (status < 0 && s->recording.overflowed) {
        s->room *= 4;
        why = {};
        status = record(ctx, s, loops, body, argument, &why);
    }
    return status;
}

/* turns: steps that it may become. */
static int replay(b2_ctx *ctx, step *s, int turns, b2_err *err)
{
    b2_cuda *q = b2_cuda_of(ctx);
    b2_cuda_recording *r = &s->recording;
    /* The copy of the arrays of the step before has been made: whoever asks for a step has read its predecessor's results. */
    for (int i = 0; !r->constant && i < r->count; i++)
        memcpy(r->host + r->arrays[i].at, r->arrays[i].host, r->arrays[i].bytes);
    if (r->used > 0 && !r->sent &&
        b2_cuda_check(cudaMemcpyAsync(r->device, r->host, r->used, cudaMemcpyHostToDevice, q->stream), "arrays of a step",
                      err) < 0)
        return -1;
    r->sent = r->constant;
    if (b2_cuda_check(cudaGraphLaunch(s->exec, q->stream), "step", err) < 0)
        return -1;
    return b2_cuda_pace_on(ctx, turns * s->work, err);
}

/* The first time: what it costs decides whether it is worth a recording. */
static int run_first(b2_ctx *ctx, step *s, b2_step_fn body, void *argument, b2_err *err)
{
    b2_cuda *q = b2_cuda_of(ctx);
    double before = q->work;
    if (body(ctx, argument, err) < 0) {
        release_step(b2_cuda_device_of(q), s); /* it may have been cancelled halfway */
        return -1;
    }
    s->work = q->work - before;
    s->refused = s->recording.constant && s->work > MOST_WORK;
    return 0;
}

int b2_cuda_step(b2_ctx *ctx, b2_step_shape shape, b2_step_fn body, void *argument, b2_err *err)
{
    b2_cuda *q = b2_cuda_of(ctx);
    int fresh = 0;
    if (b2_cuda_check(cudaSetDevice(q->device->index), "cuda", err) < 0)
        return -1;
    step *s = ctx->tap ? NULL : find(q, shape, &fresh, err);
    if (!s && !ctx->tap)
        return -1;
    if (!s || s->refused)
        return body(ctx, argument, err);
    if (fresh) {
        s->recording.constant = shape.constant;
        return run_first(ctx, s, body, argument, err);
    }
    if (!s->exec) {
        int recorded = shape.turns > 0 && record_whole(ctx, s, 1, body, argument) == 0;
        s->refused = !recorded && record_whole(ctx, s, 0, body, argument) < 0;
    }
    if (!s->refused) {
        if (shape.turns > 0)
            *shape.repeats = s->loops;
        return replay(ctx, s, s->loops ? shape.turns : 1, err);
    }
    release_recording(b2_cuda_device_of(q), &s->recording);
    return body(ctx, argument, err);
}
