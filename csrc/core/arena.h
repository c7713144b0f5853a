/* Scratch memory with mark and reset. One arena belongs to one session (one timeline); it is not shared by threads.
 * The size is planned before a computation starts (b2_arena_reserve), so that nothing allocates inside loops. */
#ifndef B2_CORE_ARENA_H
#define B2_CORE_ARENA_H

#include <stddef.h>

#include "core/memory.h"

typedef struct b2_arena {
    b2_memory *memory; /* where it lies; NULL: the heap */
    char *base; /* owned */
    size_t size;
    size_t used;
    size_t peak;
} b2_arena;

/* Makes room for `bytes` in all; keeps the block if it is large enough. Must be called with nothing in use. */
int b2_arena_reserve(b2_arena *arena, size_t bytes, b2_err *err);
void b2_arena_release(b2_arena *arena);

/* `count * size` bytes, 64-byte aligned, or NULL with B2_E_INTERNAL when more is asked than was reserved. */
void *b2_arena_take(b2_arena *arena, size_t count, size_t size, b2_err *err);

/* What b2_arena_take(count, size) uses: for planning. */
size_t b2_arena_cost(size_t count, size_t size);

static inline size_t b2_arena_mark(const b2_arena *arena)
{
    return arena->used;
}

static inline void b2_arena_reset(b2_arena *arena, size_t mark)
{
    arena->used = mark;
}

#endif
