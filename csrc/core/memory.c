#define _DEFAULT_SOURCE /* posix_memalign, madvise */
#include "core/memory.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* Instruments only: neither value ever changes what is computed. */
static atomic_uint_least64_t allocations;
static atomic_int_least64_t fail_countdown;

enum { ALIGNMENT = 64, HUGE_PAGE = 2 << 20 };

static int told_to_fail(void)
{
    int64_t left = atomic_load_explicit(&fail_countdown, memory_order_relaxed);
    if (left <= 0)
        return 0;
    return atomic_fetch_sub(&fail_countdown, 1) == 1;
}

static void *allocate(size_t alignment, size_t count, size_t size, const char *what, b2_err *err)
{
    size_t bytes = count * size;
    if (size != 0 && count > (SIZE_MAX - alignment) / size) {
        b2_fail(err, B2_E_MEMORY, "%s: %zu elements of %zu bytes overflow the address space", what, count, size);
        return NULL;
    }
    bytes = bytes == 0 ? ALIGNMENT : (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    atomic_fetch_add_explicit(&allocations, 1, memory_order_relaxed);
    void *block = NULL;
    if (told_to_fail() || posix_memalign(&block, alignment, bytes) != 0) {
        b2_fail(err, B2_E_MEMORY, "%s: could not allocate %zu bytes", what, bytes);
        return NULL;
    }
    return block;
}

void *b2_alloc(size_t count, size_t size, const char *what, b2_err *err)
{
    return allocate(ALIGNMENT, count, size, what, err);
}

void *b2_alloc_huge(size_t count, size_t size, const char *what, b2_err *err)
{
    if (size == 0 || count < HUGE_PAGE / size)
        return b2_alloc(count, size, what, err);
    void *block = allocate(HUGE_PAGE, count, size, what, err);
#ifdef MADV_HUGEPAGE
    /* Whole huge pages only: the one that holds the block's end would take memory for nothing. */
    if (block)
        madvise(block, count * size / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
#endif
    return block;
}

void *b2_alloc_zeroed(size_t count, size_t size, const char *what, b2_err *err)
{
    void *block = b2_alloc(count, size, what, err);
    if (block)
        memset(block, 0, count * size);
    return block;
}

void b2_free(void *block)
{
    free(block);
}

void *b2_memory_alloc(b2_memory *memory, size_t count, size_t size, const char *what, b2_err *err)
{
    if (!memory)
        return b2_alloc(count, size, what, err);
    if (size != 0 && count > SIZE_MAX / 2 / size) {
        b2_fail(err, B2_E_MEMORY, "%s: %zu elements of %zu bytes overflow the address space", what, count, size);
        return NULL;
    }
    return memory->alloc(memory, count * size, what, err);
}

void b2_memory_free(b2_memory *memory, void *block)
{
    if (!memory)
        b2_free(block);
    else if (block)
        memory->free(memory, block);
}

uint64_t b2_alloc_count(void)
{
    return atomic_load_explicit(&allocations, memory_order_relaxed);
}

void b2_alloc_fail_after(int64_t countdown)
{
    atomic_store(&fail_countdown, countdown);
}
