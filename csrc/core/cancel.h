/* Cancellation. Long loops ask b2_cancelled() once per tile of work (a few milliseconds); only the thread that
 * started the computation polls its owner (Python: are there signals?), the others read the flag. */
#ifndef B2_CORE_CANCEL_H
#define B2_CORE_CANCEL_H

#include <stdint.h>

typedef struct b2_cancel b2_cancel;

#ifndef __cplusplus /* which only polls */
#include <stdatomic.h>

struct b2_cancel {
    atomic_int flag;          /* 1: stop as soon as possible */
    int (*poll)(void *owner); /* returns 1 to cancel; called on the starting thread only; may be NULL */
    void *owner;
    int64_t next_poll_ns;     /* monotonic time of the next poll */
};

enum { B2_POLL_INTERVAL_NS = 25 * 1000 * 1000 };

/* The flag alone: for worker threads. */
static inline int b2_cancelled(const b2_cancel *cancel)
{
    return cancel && atomic_load_explicit(&cancel->flag, memory_order_relaxed);
}
#endif

/* The flag, after polling the owner if the interval has passed: for the starting thread. */
int b2_cancel_poll(b2_cancel *cancel);

/* Monotonic time. */
int64_t b2_now_ns(void);

#endif
