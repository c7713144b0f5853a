#include "core/arena.h"

enum { ALIGNMENT = 64 };

size_t b2_arena_cost(size_t count, size_t size)
{
    return (count * size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

int b2_arena_reserve(b2_arena *arena, size_t bytes, b2_err *err)
{
    if (arena->used != 0)
        return b2_fail(err, B2_E_INTERNAL, "arena: reserve of %zu bytes while %zu are in use", bytes, arena->used);
    if (arena->size >= bytes)
        return 0;
    char *block = (char *)b2_memory_alloc(arena->memory, bytes, 1, "scratch arena", err);
    if (!block)
        return -1;
    b2_memory_free(arena->memory, arena->base);
    arena->base = block;
    arena->size = bytes;
    return 0;
}

void b2_arena_release(b2_arena *arena)
{
    b2_memory_free(arena->memory, arena->base);
    *arena = (b2_arena){.memory = arena->memory};
}

void *b2_arena_take(b2_arena *arena, size_t count, size_t size, b2_err *err)
{
    size_t bytes = b2_arena_cost(count, size);
    if (bytes > arena->size - arena->used) {
        b2_fail(err, B2_E_INTERNAL, "arena: %zu bytes asked, %zu of %zu left", bytes, arena->size - arena->used,
                arena->size);
        return NULL;
    }
    void *block = arena->base + arena->used;
    arena->used += bytes;
    if (arena->used > arena->peak)
        arena->peak = arena->used;
    return block;
}
