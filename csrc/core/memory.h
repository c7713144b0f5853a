/* The only door to the heap, and to the memory of devices. Counting every allocation here is what lets a test assert "no allocation per
 * decoded token" and fail the k-th allocation for every k. Blocks are 64-byte aligned (a cache line, a zmm register).
 *
 * A block belongs to whoever called b2_alloc; it is returned with b2_free. */
#ifndef B2_CORE_MEMORY_H
#define B2_CORE_MEMORY_H

#include <stddef.h>
#include <stdint.h>

#include "core/error.h"

/* Returns `count * size` bytes aligned to 64, or NULL with B2_E_MEMORY (product overflow included).
 * `what` names the object for the message. A request of 0 bytes returns a valid block. */
void *b2_alloc(size_t count, size_t size, const char *what, b2_err *err);
void *b2_alloc_zeroed(size_t count, size_t size, const char *what, b2_err *err);
/* The same for what is read from end to end again and again: on huge pages where the system has them. Decoding with int8
 * weights is 12 % faster for it. Not for what is touched bit by bit: a page is 2 MiB of memory. */
void *b2_alloc_huge(size_t count, size_t size, const char *what, b2_err *err);
void b2_free(void *block);

/* Where data lives when it is not the heap: the memory of a device. Pointers into it are for its backend's kernels; the
 * processor reads and writes it through upload and download, both of which are done when they return. Shared by threads. */
typedef struct b2_memory b2_memory;
struct b2_memory {
    /* B2_E_MEMORY naming `what`, the bytes asked for and those that are free. Blocks lie at multiples of 256. */
    void *(*alloc)(b2_memory *memory, size_t bytes, const char *what, b2_err *err);
    /* Whoever frees a block has waited for the work that uses it. */
    void (*free)(b2_memory *memory, void *block);
    int (*upload)(b2_memory *memory, void *to, const void *from, size_t bytes, b2_err *err);
    int (*download)(b2_memory *memory, void *to, const void *from, size_t bytes, b2_err *err);
    /* 1 where `data` is in memory of this very device, whoever allocated it: kernels may use it where it lies. */
    int (*holds)(b2_memory *memory, const void *data);
};

/* b2_alloc and b2_free in `memory`; NULL: on the heap. */
void *b2_memory_alloc(b2_memory *memory, size_t count, size_t size, const char *what, b2_err *err);
void b2_memory_free(b2_memory *memory, void *block);

/* Allocations made by this process so far. */
uint64_t b2_alloc_count(void);

/* Test hook: the `countdown`-th allocation from now (1 = the next) fails, once. 0 switches it off. */
void b2_alloc_fail_after(int64_t countdown);

#endif
