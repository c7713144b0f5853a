#define _GNU_SOURCE
#include "core/pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <unistd.h>

#include "core/memory.h"

/* How a run works: the caller publishes the job, opens it and raises `generation`; a worker that wakes counts itself
 * in (`inside`), and if the job is still open takes tiles from `next` until none is left. The caller closes the job
 * when the tiles are gone and waits only for the workers that are inside: one that slept through a short job costs
 * nothing. Workers spin briefly before they sleep, because the kernels of a layer follow each other within
 * microseconds. */

enum { SPINS_BEFORE_SLEEP = 4000 };

typedef struct job {
    b2_tile_fn fn;
    void *argument;
    int64_t tiles;
    b2_cancel *cancel;
} job;

struct b2_pool {
    pthread_mutex_t owner;   /* held by the caller of the present run */
    pthread_mutex_t sleep;   /* guards `wake` */
    pthread_cond_t wake;
    pthread_t thread[B2_MAX_THREADS];
    atomic_llong pid;        /* process in which the threads live; another one: forked; negative: being taken over */
    atomic_int threads;      /* wanted, the caller included; changes only with `owner` held */
    int started;             /* worker threads that run, the caller not included */
    job job;
    atomic_llong next;       /* next tile */
    atomic_int open;         /* 1 while the job may be joined */
    atomic_int inside;       /* workers that may be reading the job */
    atomic_uint generation;
    atomic_int stopping;
};

typedef struct worker_start {
    b2_pool *pool;
    int index;
    unsigned int generation;
} worker_start;

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void take_tiles(b2_pool *pool, const job *job, int worker)
{
    for (;;) {
        if (worker == 0 ? b2_cancel_poll(job->cancel) : b2_cancelled(job->cancel))
            return;
        int64_t index = atomic_fetch_add_explicit(&pool->next, 1, memory_order_relaxed);
        if (index >= job->tiles)
            return;
        job->fn(job->argument, index, worker);
    }
}

static unsigned int await_generation(b2_pool *pool, unsigned int seen)
{
    for (int i = 0; i < SPINS_BEFORE_SLEEP; i++) {
        unsigned int now = atomic_load_explicit(&pool->generation, memory_order_acquire);
        if (now != seen)
            return now;
        relax();
    }
    pthread_mutex_lock(&pool->sleep);
    unsigned int now;
    while ((now = atomic_load_explicit(&pool->generation, memory_order_acquire)) == seen)
        pthread_cond_wait(&pool->wake, &pool->sleep);
    pthread_mutex_unlock(&pool->sleep);
    return now;
}

static void *worker_main(void *argument)
{
    worker_start start = *(worker_start *)argument;
    b2_free(argument);
    b2_pool *pool = start.pool;
    unsigned int seen = start.generation;
    for (;;) {
        seen = await_generation(pool, seen);
        if (atomic_load_explicit(&pool->stopping, memory_order_acquire))
            return NULL;
        /* Sequentially consistent against the caller's close: either it sees us inside or we see it closed. */
        atomic_fetch_add(&pool->inside, 1);
        if (atomic_load(&pool->open))
            take_tiles(pool, &pool->job, start.index);
        atomic_fetch_sub(&pool->inside, 1);
    }
}

static void announce(b2_pool *pool)
{
    pthread_mutex_lock(&pool->sleep);
    atomic_fetch_add_explicit(&pool->generation, 1, memory_order_release);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->sleep);
}

static void stop_workers(b2_pool *pool)
{
    if (pool->started == 0 || atomic_load(&pool->pid) != getpid())
        return;
    atomic_store_explicit(&pool->stopping, 1, memory_order_release);
    announce(pool);
    for (int i = 0; i < pool->started; i++)
        pthread_join(pool->thread[i], NULL);
    pool->started = 0;
    atomic_store(&pool->stopping, 0);
}

static int start_one(b2_pool *pool, b2_err *err)
{
    worker_start *start = b2_alloc(1, sizeof *start, "thread start", err);
    if (!start)
        return -1;
    *start = (worker_start){pool, pool->started + 1, atomic_load(&pool->generation)};
    /* Signals are for the interpreter's own threads. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int status = pthread_create(&pool->thread[pool->started], NULL, worker_main, start);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (status != 0) {
        b2_free(start);
        return b2_fail(err, B2_E_OS, "thread pool: could not start thread %d of %d", pool->started + 1, pool->threads);
    }
    pool->started++;
    return 0;
}

/* Called with `owner` held. */
static int ensure_workers(b2_pool *pool, b2_err *err)
{
    if (pool->started > pool->threads - 1)
        stop_workers(pool);
    while (pool->started < pool->threads - 1)
        if (start_one(pool, err) < 0)
            return -1;
    return 0;
}

/* After fork(): the threads stayed in the parent, and a lock may have been held there at that moment. Comes before any
 * use of a lock. The child may have several threads by now: one takes over, the others wait for it. */
static void forget_parent(b2_pool *pool)
{
    long long here = getpid(), there;
    while ((there = atomic_load(&pool->pid)) != here) {
        if (there == -here || !atomic_compare_exchange_strong(&pool->pid, &there, -here)) {
            sched_yield();
            continue;
        }
        pthread_mutex_init(&pool->owner, NULL);
        pthread_mutex_init(&pool->sleep, NULL);
        pthread_cond_init(&pool->wake, NULL);
        atomic_store(&pool->open, 0);
        atomic_store(&pool->inside, 0);
        atomic_store(&pool->stopping, 0);
        pool->started = 0;
        atomic_store(&pool->pid, here);
    }
}

static int finish(const job *job, b2_err *err)
{
    return b2_cancelled(job->cancel) ? b2_fail(err, B2_E_CANCEL, "cancelled") : 0;
}

static int run_alone(const job *job, b2_err *err)
{
    for (int64_t i = 0; i < job->tiles && !b2_cancel_poll(job->cancel); i++)
        job->fn(job->argument, i, 0);
    return finish(job, err);
}

int b2_pool_run(b2_pool *pool, int64_t tiles, b2_tile_fn fn, void *argument, b2_cancel *cancel, b2_err *err)
{
    job job = {fn, argument, tiles, cancel};
    forget_parent(pool);
    if (tiles <= 1 || pthread_mutex_trylock(&pool->owner) != 0)
        return run_alone(&job, err);
    /* Threads that cannot be started (a limit on processes) cost time, not the result: go on with those there are. */
    b2_err not_started = {0};
    if (pool->threads > 1)
        ensure_workers(pool, &not_started);
    if (pool->threads == 1 || pool->started == 0) {
        pthread_mutex_unlock(&pool->owner);
        return run_alone(&job, err);
    }
    pool->job = job;
    atomic_store_explicit(&pool->next, 0, memory_order_relaxed);
    atomic_store(&pool->open, 1);
    announce(pool);
    take_tiles(pool, &job, 0);
    atomic_store(&pool->open, 0);
    for (int spins = 0; atomic_load(&pool->inside) > 0; spins++) {
        relax();
        if (spins > SPINS_BEFORE_SLEEP)
            sched_yield();
    }
    pthread_mutex_unlock(&pool->owner);
    return finish(&job, err);
}

int b2_available_processors(void)
{
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0)
        return CPU_COUNT(&set) < B2_MAX_THREADS ? CPU_COUNT(&set) : B2_MAX_THREADS;
#endif
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : n > B2_MAX_THREADS ? B2_MAX_THREADS : (int)n;
}

b2_pool *b2_pool_create(int threads, b2_err *err)
{
    if (threads < 1 || threads > B2_MAX_THREADS) {
        b2_fail(err, B2_E_VALUE, "threads: expected 1 to %d, found %d", (int)B2_MAX_THREADS, threads);
        return NULL;
    }
    b2_pool *pool = b2_alloc_zeroed(1, sizeof *pool, "thread pool", err);
    if (!pool)
        return NULL;
    pthread_mutex_init(&pool->owner, NULL);
    pthread_mutex_init(&pool->sleep, NULL);
    pthread_cond_init(&pool->wake, NULL);
    atomic_store(&pool->threads, threads);
    atomic_store(&pool->pid, getpid());
    return pool;
}

int b2_pool_threads(const b2_pool *pool)
{
    return atomic_load(&pool->threads);
}

int b2_pool_resize(b2_pool *pool, int threads, b2_err *err)
{
    if (threads < 1 || threads > B2_MAX_THREADS)
        return b2_fail(err, B2_E_VALUE, "threads: expected 1 to %d, found %d", (int)B2_MAX_THREADS, threads);
    forget_parent(pool);
    pthread_mutex_lock(&pool->owner);
    atomic_store(&pool->threads, threads);
    pthread_mutex_unlock(&pool->owner);
    return 0;
}

void b2_pool_destroy(b2_pool *pool)
{
    if (!pool)
        return;
    stop_workers(pool);
    b2_free(pool);
}
