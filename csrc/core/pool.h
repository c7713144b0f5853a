/* One persistent thread pool.
 *
 * Work is cut into tiles; which thread runs a tile never changes a bit of the result, so tiles are handed out
 * dynamically. A caller that finds the pool busy with somebody else's work runs all its tiles itself: same bits,
 * no waiting, no deadlock. After fork() the child builds new threads at its first use. */
#ifndef B2_CORE_POOL_H
#define B2_CORE_POOL_H

#include <stdint.h>

#include "core/cancel.h"
#include "core/error.h"

enum { B2_MAX_THREADS = 256 };

typedef struct b2_pool b2_pool;

/* `threads` >= 1 counts the caller. Threads start at the first use. */
b2_pool *b2_pool_create(int threads, b2_err *err);
void b2_pool_destroy(b2_pool *pool);
int b2_pool_threads(const b2_pool *pool);
/* Takes effect at the next run; waits for the present one. */
int b2_pool_resize(b2_pool *pool, int threads, b2_err *err);

/* Processors that this process may run on (affinity mask), at least 1. */
int b2_available_processors(void);

/* A tile: `index` in [0, tiles), `worker` in [0, threads): names per-thread scratch. */
typedef void (*b2_tile_fn)(void *argument, int64_t index, int worker);

/* Runs fn(argument, i, worker) for every i in [0, tiles). Returns when all are done, or -1 with B2_E_CANCEL when
 * `cancel` (may be NULL) was set: then some tiles have not run. */
int b2_pool_run(b2_pool *pool, int64_t tiles, b2_tile_fn fn, void *argument, b2_cancel *cancel, b2_err *err);

#endif
