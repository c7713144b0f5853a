/* How far the host runs ahead of the device. Operations only put work into the stream; what is there can not be taken back, so
 * that somebody who cancels waits for all of it. Therefore the work is counted as it is put there, and about every 10 ms of the
 * device's time the host waits until the chunk before the present one is done, and asks whether to go on. The device always has
 * a chunk to do meanwhile.
 *
 * Work is counted in multiplications of 16-bit products, the slower ones as many of those. What a chunk may hold is measured:
 * it begins small and is fitted to the time that chunks take. A recorded step is one piece of work; one
 * that repeats itself is as many as it may become. */
#include "ops/cuda/cuda_ops.h"
#include "ops/cuda/device.h"

static const double least_chunk = 1e6, wanted_ns = 10e6;

struct b2_cuda_pace {
    cudaEvent_t ends[2]; /* of the last chunk and of the one before, in turn; owned */
    int ended;           /* chunks since the queue was taken */
    double work;         /* since the last end */
    double chunk;
    double then_ns;      /* when the wait for the chunk before was over; 0: not known */
};

static int make(b2_cuda *q, b2_err *err)
{
    b2_cuda_pace *p = q->pace = (b2_cuda_pace *)b2_alloc_zeroed(1, sizeof *p, "pace", err);
    if (!p)
        return -1;
    p->chunk = least_chunk;
    for (int i = 0; i < 2; i++)
        if (b2_cuda_check(cudaEventCreateWithFlags(&p->ends[i], cudaEventDisableTiming | cudaEventBlockingSync), "event",
                          err) < 0)
            return -1;
    return 0;
}

void b2_cuda_pace_release(b2_cuda *q)
{
    for (int i = 0; q->pace && i < 2; i++)
        if (q->pace->ends[i])
            cudaEventDestroy(q->pace->ends[i]);
    b2_free(q->pace);
    q->pace = NULL;
}

void b2_cuda_pace_restart(b2_cuda *q)
{
    if (!q->pace)
        return;
    q->pace->ended = 0;
    q->pace->work = q->pace->then_ns = 0.0;
}

/* After a wait for a chunk. Where the device was done before it was asked, only the host is known to be slow. */
static void fit(b2_cuda_pace *p, int was_done)
{
    double now = (double)b2_now_ns(), took = now - p->then_ns;
    if (p->then_ns > 0.0 && took < wanted_ns)
        p->chunk *= took > wanted_ns / 2 ? wanted_ns / took : 2.0;
    else if (p->then_ns > 0.0 && !was_done)
        p->chunk *= took < 8 * wanted_ns ? wanted_ns / took : 0.125;
    if (p->chunk < least_chunk)
        p->chunk = least_chunk;
    p->then_ns = now;
}

static int end_chunk(b2_cuda *q, b2_err *err)
{
    b2_cuda_pace *p = q->pace;
    cudaEvent_t before = p->ends[(p->ended + 1) % 2];
    p->work = 0.0;
    if (b2_cuda_check(cudaEventRecord(p->ends[p->ended % 2], q->stream), "event", err) < 0)
        return -1;
    if (p->ended++ == 0)
        return 0;
    int was_done = cudaEventQuery(before) == cudaSuccess;
    if (!was_done)
        cudaGetLastError(); /* that it is not ready is no error */
    if (b2_cuda_check(cudaEventSynchronize(before), "work", err) < 0)
        return -1;
    fit(p, was_done);
    return 0;
}

int b2_cuda_pace_on(b2_ctx *ctx, double work, b2_err *err)
{
    b2_cuda *q = b2_cuda_of(ctx);
    if (q->capturing)
        return 0; /* it is counted when it is done */
    if (!q->pace && make(q, err) < 0)
        return -1;
    q->work += work;
    q->pace->work += work;
    if (q->pace->work < q->pace->chunk)
        return 0;
    if (end_chunk(q, err) < 0)
        return -1;
    return b2_cancel_poll(ctx->cancel) ? b2_fail(err, B2_E_CANCEL, "cancelled") : 0;
}
