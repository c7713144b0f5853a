#include "ops/cpu/common.h"

/* Below this, waking a thread costs more than it brings. */
static const double ALONE_NS = 20e3;

int b2_cpu_run(b2_ctx *ctx, int64_t tiles, b2_tile_fn fn, void *argument, double cost_ns, b2_err *err)
{
    if (cost_ns >= ALONE_NS)
        return b2_pool_run(ctx->pool, tiles, fn, argument, ctx->cancel, err);
    if (b2_cancel_poll(ctx->cancel))
        return b2_fail(err, B2_E_CANCEL, "cancelled");
    for (int64_t i = 0; i < tiles; i++)
        fn(argument, i, 0);
    return 0;
}

int64_t b2_cpu_tile_count(const b2_ctx *ctx, int64_t units, double unit_ns, double min_ns)
{
    enum { TILES_PER_THREAD = 8 };
    double most_ns = 3e6; /* keeps cancelling prompt */
    double total = (double)units * unit_ns;
    double tiles = (double)b2_pool_threads(ctx->pool) * TILES_PER_THREAD;
    if (tiles > total / min_ns)
        tiles = total / min_ns;
    if (tiles < total / most_ns)
        tiles = total / most_ns;
    return tiles < 1 ? 1 : tiles > (double)units ? units : (int64_t)tiles;
}

int b2_cpu_planned_threads(const b2_ctx *ctx)
{
    int threads = b2_pool_threads(ctx->pool), processors = b2_available_processors();
    return threads > processors ? threads : processors;
}

int b2_slots_take(b2_slots *slots, b2_ctx *ctx, size_t bytes, b2_err *err)
{
    slots->bytes = b2_arena_cost(bytes, 1);
    size_t fit = (ctx->scratch->size - ctx->scratch->used) / slots->bytes;
    int threads = b2_pool_threads(ctx->pool);
    slots->count = fit < (size_t)threads ? (int)fit : threads;
    slots->count = slots->count < 1 ? 1 : slots->count;
    for (int i = 0; i < slots->count; i++)
        atomic_init(&slots->busy[i], 0);
    slots->base = b2_arena_take(ctx->scratch, (size_t)slots->count, slots->bytes, err);
    return slots->base ? 0 : -1;
}

void *b2_slot_claim(b2_slots *slots, int worker)
{
    for (int i = worker % slots->count;; i = (i + 1) % slots->count) {
        unsigned char expected = 0;
        if (atomic_compare_exchange_strong_explicit(&slots->busy[i], &expected, 1, memory_order_acquire,
                                                    memory_order_relaxed))
            return slots->base + (size_t)i * slots->bytes;
    }
}

void b2_slot_release(b2_slots *slots, void *block)
{
    size_t i = (size_t)((char *)block - slots->base) / slots->bytes;
    atomic_store_explicit(&slots->busy[i], 0, memory_order_release);
}
