/* The thread pool under ThreadSanitizer: every tile exactly once for 1 to 8 threads, nested and concurrent runs inline,
 * cancelling, resizing between runs, and a fork (without sanitizer: check_pool fork). Exit status 0 when all held. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/memory.h"
#include "core/pool.h"

enum { TILES = 500, WORKERS = 8 };

#define HOLDS(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "line %d: %s\n", __LINE__, #condition); \
            return 1; \
        } \
    } while (0)

typedef struct task {
    b2_pool *pool;
    int runs[TILES];           /* plain: a tile that two threads ran is a race that the sanitizer sees */
    int of_worker[WORKERS];    /* plain: two threads with one worker number are a race too */
    atomic_int bad_worker;
    int nested;
    b2_cancel *cancel;
    int64_t cancel_at;
} task;

static void count(void *argument, int64_t index, int worker)
{
    task *t = argument;
    if (worker < 0 || worker >= WORKERS)
        atomic_store(&t->bad_worker, 1);
    else
        t->of_worker[worker]++;
    t->runs[index]++;
}

static int each_once(const task *t)
{
    for (int i = 0; i < TILES; i++)
        if (t->runs[i] != 1)
            return 0;
    return !atomic_load(&t->bad_worker);
}

static int check_threads(void)
{
    b2_err err = {0};
    b2_pool *pool = b2_pool_create(1, &err);
    HOLDS(pool);
    for (int round = 0; round < 20; round++)
        for (int threads = 1; threads <= WORKERS; threads++) {
            task t = {.pool = pool};
            HOLDS(b2_pool_resize(pool, threads, &err) == 0 && b2_pool_threads(pool) == threads);
            HOLDS(b2_pool_run(pool, TILES, count, &t, NULL, &err) == 0);
            HOLDS(each_once(&t));
            for (int w = threads; w < WORKERS; w++)
                HOLDS(t.of_worker[w] == 0);
        }
    for (int i = 0; i < 2000; i++) { /* short runs one after another: late wakers meet the next job */
        task t = {.pool = pool};
        HOLDS(b2_pool_run(pool, 3, count, &t, NULL, &err) == 0);
        HOLDS(t.runs[0] == 1 && t.runs[1] == 1 && t.runs[2] == 1);
    }
    HOLDS(b2_pool_run(pool, 0, count, NULL, NULL, &err) == 0);
    b2_pool_destroy(pool);
    HOLDS(b2_pool_create(0, &err) == NULL && err.code == B2_E_VALUE);
    return 0;
}

static void run_nested(void *argument, int64_t index, int worker)
{
    task *t = argument;
    task inner = {.pool = t->pool};
    b2_err err = {0};
    if (b2_pool_run(t->pool, TILES, count, &inner, NULL, &err) != 0 || !each_once(&inner) ||
        inner.of_worker[0] != TILES)
        atomic_store(&t->bad_worker, 1);
    count(argument, index, worker);
}

static int check_nested(void)
{
    b2_err err = {0};
    b2_pool *pool = b2_pool_create(4, &err);
    task t = {.pool = pool};
    HOLDS(pool && b2_pool_run(pool, TILES, run_nested, &t, NULL, &err) == 0 && each_once(&t));
    b2_pool_destroy(pool);
    return 0;
}

static void *caller(void *argument)
{
    b2_pool *pool = argument;
    for (int i = 0; i < 100; i++) {
        b2_err err = {0};
        task t = {.pool = pool};
        if (b2_pool_threads(pool) < 1 || b2_pool_run(pool, TILES, count, &t, NULL, &err) != 0 || !each_once(&t))
            return pool;
    }
    return NULL;
}

static void *resizer(void *argument)
{
    b2_err err = {0};
    for (int i = 0; i < 200; i++)
        if (b2_pool_resize(argument, 1 + i % WORKERS, &err) != 0 || b2_pool_threads(argument) < 1)
            return argument;
    return NULL;
}

static int check_callers(void)
{
    b2_err err = {0};
    b2_pool *pool = b2_pool_create(4, &err);
    pthread_t thread[5];
    HOLDS(pool);
    for (int i = 0; i < 5; i++)
        HOLDS(pthread_create(&thread[i], NULL, i < 4 ? caller : resizer, pool) == 0);
    for (int i = 0; i < 5; i++) {
        void *result = pool;
        pthread_join(thread[i], &result);
        HOLDS(result == NULL);
    }
    b2_pool_destroy(pool);
    return 0;
}

static void cancel_at(void *argument, int64_t index, int worker)
{
    task *t = argument;
    count(argument, index, worker);
    if (index == t->cancel_at)
        atomic_store(&t->cancel->flag, 1);
}

static int always(void *owner)
{
    ++*(int *)owner;
    return 1;
}

static int check_cancel(void)
{
    b2_err err = {0};
    b2_pool *pool = b2_pool_create(4, &err);
    HOLDS(pool);
    for (int threads = 1; threads <= 4; threads += 3) {
        int polls = 0, ran = 0;
        b2_cancel by_flag = {0}, by_poll = {.poll = always, .owner = &polls};
        task t = {.pool = pool, .cancel = &by_flag, .cancel_at = 10};
        HOLDS(b2_pool_resize(pool, threads, &err) == 0);
        HOLDS(b2_pool_run(pool, TILES, cancel_at, &t, &by_flag, &err) < 0 && err.code == B2_E_CANCEL);
        for (int i = 0; i < TILES; i++)
            ran += t.runs[i];
        HOLDS(ran >= 11 && (threads > 1 || ran == 11) && ran < TILES);
        err = (b2_err){0};
        t = (task){.pool = pool};
        HOLDS(b2_pool_run(pool, TILES, count, &t, &by_poll, &err) < 0 && err.code == B2_E_CANCEL && polls == 1);
        err = (b2_err){0};
        t = (task){.pool = pool};
        HOLDS(b2_pool_run(pool, TILES, count, &t, NULL, &err) == 0 && each_once(&t)); /* and it works again */
    }
    b2_pool_destroy(pool);
    return 0;
}

static int check_no_memory(void)
{
    b2_err err = {0};
    b2_pool *pool = b2_pool_create(4, &err);
    task t = {.pool = pool};
    HOLDS(pool);
    b2_alloc_fail_after(2); /* a thread that cannot start: the others do its work */
    HOLDS(b2_pool_run(pool, TILES, count, &t, NULL, &err) == 0 && each_once(&t) && err.code == B2_OK);
    t = (task){.pool = pool};
    HOLDS(b2_pool_run(pool, TILES, count, &t, NULL, &err) == 0 && each_once(&t));
    b2_pool_destroy(pool);
    return 0;
}

static int in_child(b2_pool *pool)
{
    b2_err err = {0};
    pthread_t thread[3];
    task t = {.pool = pool};
    alarm(20);
    HOLDS(b2_pool_resize(pool, 3, &err) == 0); /* first, as set_num_threads in a data loader's worker does */
    for (int i = 0; i < 3; i++)
        HOLDS(pthread_create(&thread[i], NULL, caller, pool) == 0);
    for (int i = 0; i < 3; i++) {
        void *result = pool;
        pthread_join(thread[i], &result);
        HOLDS(result == NULL);
    }
    HOLDS(b2_pool_run(pool, TILES, count, &t, NULL, &err) == 0 && each_once(&t));
    b2_pool_destroy(pool);
    return 0;
}

typedef struct keep_busy {
    b2_pool *pool;
    atomic_int stop;
} keep_busy;

static void *busy(void *argument)
{
    keep_busy *b = argument;
    while (!atomic_load(&b->stop))
        caller(b->pool);
    return NULL;
}

/* Forks while another thread is in the middle of runs: the child inherits locks that are held. */
static int check_fork(void)
{
    b2_err err = {0};
    keep_busy b = {.pool = b2_pool_create(4, &err)};
    pthread_t thread;
    HOLDS(b.pool && pthread_create(&thread, NULL, busy, &b) == 0);
    for (int i = 0; i < 20; i++) {
        int status = -1;
        usleep(1000);
        pid_t child = fork();
        if (child == 0)
            _exit(in_child(b.pool));
        HOLDS(child > 0 && waitpid(child, &status, 0) == child);
        HOLDS(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
    atomic_store(&b.stop, 1);
    pthread_join(thread, NULL);
    b2_pool_destroy(b.pool);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "fork") == 0)
        return check_fork();
    return check_threads() || check_nested() || check_callers() || check_cancel() || check_no_memory();
}
