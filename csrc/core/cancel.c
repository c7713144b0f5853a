#define _POSIX_C_SOURCE 200809L
#include "core/cancel.h"

#include <stddef.h>
#include <time.h>

int64_t b2_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

int b2_cancel_poll(b2_cancel *cancel)
{
    if (!cancel)
        return 0;
    if (!b2_cancelled(cancel) && cancel->poll) {
        int64_t now = b2_now_ns();
        if (now >= cancel->next_poll_ns) {
            cancel->next_poll_ns = now + B2_POLL_INTERVAL_NS;
            if (cancel->poll(cancel->owner))
                atomic_store_explicit(&cancel->flag, 1, memory_order_relaxed);
        }
    }
    return b2_cancelled(cancel);
}
