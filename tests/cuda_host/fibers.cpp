/* Runs the threads of a block as fibers of one host thread: each until it waits or ends.
 *
 * Barriers: a thread that waits for its block or for lanes of its warp is not run until all of them have come; whoever
 * comes last to a warp operation computes it for all. When nobody can run and somebody still waits, the launch fails,
 * naming the lines where they wait. Threads that have ended are not waited for, as on a card.
 *
 * Memory: one set of stacks for each host thread, kept until the process ends; every stack ends in a page that cannot be
 * touched. */
#include "host.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <vector>

#if defined(__GLIBC__)
#include <link.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

__thread cuda_host_thread *cuda_host_now;
alignas(128) __thread unsigned char cuda_host_dynamic_shared[CUDA_HOST_SHARED_MOST + 1024];

namespace {

enum { THREADS_MOST = 1024, WARP = 32, STACK_BYTES = 256 << 10, FENCE_BYTES = 1024 };
enum fiber_state { READY, AT_BARRIER, AT_WARP, DONE };

struct fiber : cuda_host_thread {
#if defined(__x86_64__)
    void *stack_pointer;
#else
    ucontext_t context;
#endif
    int index;
    fiber_state state;
    int kind, source;
    unsigned mask;
    uint64_t value; /* given, then received */
    const char *file;
    int line;
};

struct block_runner {
    fiber fibers[THREADS_MOST];
    char *stacks;
    int count;
    const std::function<void()> *body;
    bool failed;
    char message[1024];
#if defined(__x86_64__)
    void *stack_pointer;
#else
    ucontext_t context;
#endif
};

/* Whose fibers run on this host thread. Not a thread-local variable: those are shared memory. */
block_runner *runner_of(const cuda_host_thread *thread)
{
    const fiber *f = static_cast<const fiber *>(thread);
    return reinterpret_cast<block_runner *>(const_cast<fiber *>(f - f->index));
}

fiber *current()
{
    return static_cast<fiber *>(cuda_host_now);
}

#if defined(__x86_64__)
extern "C" void cuda_host_switch(void **save, void *load);
asm(".text\n"
    ".type cuda_host_switch,@function\n"
    "cuda_host_switch:\n"
    "    pushq %rbp\n    pushq %rbx\n    pushq %r12\n    pushq %r13\n    pushq %r14\n    pushq %r15\n"
    "    movq %rsp, (%rdi)\n"
    "    movq %rsi, %rsp\n"
    "    popq %r15\n    popq %r14\n    popq %r13\n    popq %r12\n    popq %rbx\n    popq %rbp\n"
    "    ret\n"
    ".size cuda_host_switch,.-cuda_host_switch\n");

void enter(block_runner *r, fiber *f)
{
    cuda_host_now = f;
    cuda_host_switch(&r->stack_pointer, f->stack_pointer);
    cuda_host_now = nullptr;
}

void leave(block_runner *r, fiber *f)
{
    cuda_host_switch(&f->stack_pointer, r->stack_pointer);
}
#else
void enter(block_runner *r, fiber *f)
{
    cuda_host_now = f;
    swapcontext(&r->context, &f->context);
    cuda_host_now = nullptr;
}

void leave(block_runner *r, fiber *f)
{
    swapcontext(&f->context, &r->context);
}
#endif

void fail(block_runner *r, const char *format, ...)
{
    if (r->failed)
        return;
    r->failed = true;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(r->message, sizeof r->message, format, arguments);
    va_end(arguments);
}

const char *base_name(const char *file)
{
    const char *slash = strrchr(file, '/');
    return slash ? slash + 1 : file;
}

/* Of thread `f` of its block: "thread 33". */
std::string where(const fiber *f)
{
    return std::string(base_name(f->file)) + ":" + std::to_string(f->line);
}

/* ---- warps ---- */

unsigned living_lanes(const block_runner *r, int warp)
{
    unsigned lanes = 0;
    for (int i = 0; i < WARP && warp * WARP + i < r->count; i++)
        lanes |= r->fibers[warp * WARP + i].state != DONE ? 1u << i : 0u;
    return lanes;
}

uint64_t combined(const fiber *warp, unsigned lanes, int kind)
{
    uint64_t all = 0;
    bool first = true;
    for (int i = 0; i < WARP; i++) {
        if (!(lanes >> i & 1))
            continue;
        uint64_t value = warp[i].value;
        int64_t a = (int64_t)all, b = (int64_t)value;
        switch (kind) {
        case CUDA_HOST_BALLOT: all |= value ? 1ull << i : 0; break;
        case CUDA_HOST_SUM: all += value; break;
        case CUDA_HOST_MIN: all = first || b < a ? value : all; break;
        case CUDA_HOST_MAX: all = first || b > a ? value : all; break;
        }
        first = false;
    }
    return all;
}

/* Does what the lanes of `mask` wait for, if all that live have come to the same operation. */
void try_warp(block_runner *r, int warp, unsigned mask)
{
    fiber *lanes = r->fibers + warp * WARP, *first = nullptr;
    unsigned wanted = mask & living_lanes(r, warp);
    for (int i = 0; i < WARP; i++) {
        if (!(wanted >> i & 1))
            continue;
        if (lanes[i].state != AT_WARP || lanes[i].mask != mask)
            return;
        first = first ? first : lanes + i;
        if (lanes[i].kind != first->kind || lanes[i].line != first->line || strcmp(lanes[i].file, first->file) != 0) {
            fail(r, "lanes of one warp are at different operations: thread %d at %s, thread %d at %s", first->index,
                 where(first).c_str(), lanes[i].index, where(lanes + i).c_str());
            return;
        }
    }
    if (!first)
        return;
    uint64_t given[WARP], all = combined(lanes, wanted, first->kind);
    for (int i = 0; i < WARP; i++)
        given[i] = wanted >> i & 1 ? lanes[i].value : ~0ull;
    for (int i = 0; i < WARP; i++) {
        if (!(wanted >> i & 1))
            continue;
        int source = lanes[i].source;
        lanes[i].value = lanes[i].kind != CUDA_HOST_SHUFFLE ? all
                         : source >= 0 && source < WARP     ? given[source]
                                                            : ~0ull;
        lanes[i].state = READY;
    }
}

/* ---- blocks ---- */

void thread_main(block_runner *r, fiber *f)
{
    (*r->body)();
    f->state = DONE;
    /* The lanes that were waiting for this one need not any more. */
    int warp = f->index / WARP;
    for (int i = warp * WARP; i < (warp + 1) * WARP && i < r->count && !r->failed; i++)
        if (r->fibers[i].state == AT_WARP)
            try_warp(r, warp, r->fibers[i].mask);
    leave(r, f);
}

extern "C" void cuda_host_thread_main(void)
{
    fiber *f = current();
    thread_main(runner_of(f), f);
}

void prepare(block_runner *r, fiber *f)
{
    char *top = r->stacks + (size_t)(f->index + 1) * STACK_BYTES;
#if defined(__x86_64__)
    void **at = reinterpret_cast<void **>(top) - 1; /* as after a call: the return address lies below a multiple of 16 */
    *at = nullptr;
    *--at = reinterpret_cast<void *>(cuda_host_thread_main);
    for (int i = 0; i < 6; i++)
        *--at = nullptr;
    f->stack_pointer = at;
#else
    long page = sysconf(_SC_PAGESIZE);
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = top - STACK_BYTES + page;
    f->context.uc_stack.ss_size = (size_t)(STACK_BYTES - page);
    f->context.uc_link = &r->context;
    makecontext(&f->context, cuda_host_thread_main, 0);
#endif
}

block_runner *new_runner()
{
    block_runner *r = new block_runner();
    long page = sysconf(_SC_PAGESIZE);
    size_t bytes = (size_t)THREADS_MOST * STACK_BYTES;
    void *stacks = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED)
        abort();
    r->stacks = static_cast<char *>(stacks);
    for (int i = 0; i < THREADS_MOST; i++)
        mprotect(r->stacks + (size_t)i * STACK_BYTES, (size_t)page, PROT_NONE);
    return r;
}

/* All fibers wait at the block's barrier, or have ended: lets them go on. Returns whether there were any. */
bool try_barrier(block_runner *r)
{
    const fiber *first = nullptr;
    int values = 0;
    for (int i = 0; i < r->count; i++) {
        const fiber *f = r->fibers + i;
        if (f->state == DONE)
            continue;
        if (f->state != AT_BARRIER)
            return false;
        first = first ? first : f;
        values += f->value != 0;
        if (f->line != first->line || strcmp(f->file, first->file) != 0)
            return false;
    }
    for (int i = 0; i < r->count; i++)
        if (r->fibers[i].state == AT_BARRIER) {
            r->fibers[i].value = (uint64_t)values;
            r->fibers[i].state = READY;
        }
    return first != nullptr;
}

/* Nobody can go on: says where they wait, at most three places. */
void say_deadlock(block_runner *r)
{
    std::string text;
    std::vector<std::string> seen;
    for (int i = 0; i < r->count && seen.size() < 3; i++) {
        const fiber *f = r->fibers + i;
        std::string at = f->state == DONE ? "" : where(f) + (f->state == AT_WARP ? " (lanes of its warp)" : " (the block)");
        bool known = f->state == DONE;
        for (const std::string &other : seen)
            known |= other == at;
        if (known)
            continue;
        seen.push_back(at);
        text += (text.empty() ? "thread " : ", thread ") + std::to_string(i) + " at " + at;
    }
    fail(r, "threads wait at different barriers: %s", text.c_str());
}

void run_block(block_runner *r, bool descending)
{
    for (;;) {
        bool ran = false, left = false;
        for (int i = 0; i < r->count && !r->failed; i++) {
            fiber *f = r->fibers + (descending ? r->count - 1 - i : i);
            left |= f->state != DONE;
            if (f->state != READY)
                continue;
            ran = true;
            enter(r, f);
        }
        if (r->failed || !left)
            return;
        if (!ran && !try_barrier(r)) {
            say_deadlock(r);
            return;
        }
    }
}

/* ---- shared memory ---- */

struct segment {
    char *data;
    size_t bytes;
};

#if defined(__GLIBC__)
int find_segment(dl_phdr_info *info, size_t, void *out)
{
    const char *inside = reinterpret_cast<const char *>(&cuda_host_dynamic_shared);
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) &header = info->dlpi_phdr[i];
        char *data = static_cast<char *>(info->dlpi_tls_data);
        if (header.p_type == PT_TLS && data && inside >= data && inside < data + header.p_memsz) {
            *static_cast<segment *>(out) = {data, header.p_memsz};
            return 1;
        }
    }
    return 0;
}
#endif

/* The thread-local segment of this library on this thread, or dynamic shared memory alone where that cannot be found. */
segment shared_segment()
{
    segment found = {reinterpret_cast<char *>(cuda_host_dynamic_shared), sizeof cuda_host_dynamic_shared};
#if defined(__GLIBC__)
    dl_iterate_phdr(find_segment, &found);
#endif
    return found;
}

/* NaN everywhere but in dynamic shared memory beyond what was asked for: of that only the beginning, as a fence. */
void poison_shared(segment all, size_t dynamic)
{
    cuda_host_thread *now = cuda_host_now;
    char *from = reinterpret_cast<char *>(cuda_host_dynamic_shared), *after = from + sizeof cuda_host_dynamic_shared;
    memset(all.data, 0xff, (size_t)(from - all.data));
    memset(from, 0xff, dynamic + FENCE_BYTES);
    memset(after, 0xff, (size_t)(all.data + all.bytes - after));
    cuda_host_now = now;
}

bool fence_is_whole(size_t dynamic)
{
    for (int i = 0; i < FENCE_BYTES; i++)
        if (cuda_host_dynamic_shared[dynamic + (size_t)i] != 0xff)
            return false;
    return true;
}

/* ---- launches ---- */

std::vector<block_runner *> free_runners; /* under the lock of runtime.cpp, as all of this */
unsigned launches;

std::string run_grid(block_runner *r, dim3 grid, dim3 block, size_t shared)
{
    segment all = shared_segment();
    r->failed = false;
    r->count = (int)(block.x * block.y * block.z);
    uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z;
    unsigned launch = launches++;
    for (uint64_t i = 0; i < blocks; i++) {
        uint64_t b = launch % 2 ? blocks - 1 - i : i; /* blocks have no order */
        uint3 at = {(unsigned)(b % grid.x), (unsigned)(b / grid.x % grid.y), (unsigned)(b / grid.x / grid.y)};
        poison_shared(all, shared);
        for (int j = 0; j < r->count; j++) {
            fiber *f = r->fibers + j;
            unsigned t = (unsigned)j;
            f->thread = {t % block.x, t / block.x % block.y, t / block.x / block.y};
            f->block = at;
            f->block_dim = block;
            f->grid_dim = grid;
            f->index = j;
            f->state = READY;
            prepare(r, f);
        }
        run_block(r, (b + launch) % 2 == 1);
        if (!r->failed && !fence_is_whole(shared))
            fail(r, "wrote behind its %zu bytes of dynamic shared memory", shared);
        if (r->failed)
            return "block (" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + "): " +
                   r->message;
    }
    return "";
}

} /* namespace */

std::string cuda_host_run(const char *name, dim3 grid, dim3 block, size_t shared, const std::function<void()> &body)
{
    if (free_runners.empty())
        free_runners.push_back(new_runner());
    block_runner *r = free_runners.back();
    free_runners.pop_back();
    r->body = &body;
    std::string wrong = run_grid(r, grid, block, shared);
    free_runners.push_back(r);
    return wrong.empty() ? wrong : std::string(name) + ": " + wrong;
}

int cuda_host_lane(void)
{
    return current()->index % WARP;
}

int cuda_host_barrier(int value, const char *file, int line)
{
    fiber *f = current();
    f->value = (uint64_t)(value != 0);
    f->file = file;
    f->line = line;
    f->state = AT_BARRIER;
    leave(runner_of(f), f);
    return (int)f->value;
}

uint64_t cuda_host_warp(int kind, unsigned mask, uint64_t value, int source, const char *file, int line)
{
    fiber *f = current();
    block_runner *r = runner_of(f);
    f->kind = kind;
    f->mask = mask;
    f->value = value;
    f->source = source;
    f->file = file;
    f->line = line;
    f->state = AT_WARP;
    if (!(mask >> (f->index % WARP) & 1))
        fail(r, "thread %d at %s is not in its own mask %#x", f->index, where(f).c_str(), mask);
    else
        try_warp(r, f->index / WARP, mask);
    if (f->state != READY || r->failed)
        leave(r, f);
    return f->value;
}

void cuda_host_trap(const char *file, int line)
{
    fiber *f = current();
    fail(runner_of(f), "thread %d stopped at %s:%d", f->index, base_name(file), line);
    for (;;)
        leave(runner_of(f), f);
}

/* ---- what the compiler's checks call: -fsanitize=alignment,bounds without their library ---- */

struct source_location {
    const char *file;
    uint32_t line, column;
};

static void report(const source_location *at, const char *what)
{
    if (!cuda_host_now) {
        fprintf(stderr, "%s:%u: %s, in host code\n", at->file, at->line, what);
        abort();
    }
    fiber *f = current();
    fail(runner_of(f), "thread %d at %s:%u: %s", f->index, base_name(at->file), at->line, what);
    for (;;)
        leave(runner_of(f), f);
}

extern "C" void __ubsan_handle_type_mismatch_v1(source_location *at, uintptr_t)
{
    report(at, "a misaligned address");
}
extern "C" void __ubsan_handle_out_of_bounds(source_location *at, uintptr_t)
{
    report(at, "an index outside its array");
}
