#include "generate/topk.h"

/* "Better" comes first: the comparison that the C++ algorithms are given is better(a, b). Ranges are [first, end) as
 * array and length. */

enum { SMALL_SORT = 16, SMALL_SELECT = 3, SCAN_BLOCK = 64, PARTIAL_SORT_RATIO = 64 };

static int better(b2_scored a, b2_scored b)
{
    return a.value > b.value;
}

static void swap(b2_scored *a, b2_scored *b)
{
    b2_scored held = *a;
    *a = *b;
    *b = held;
}

/* Heap with the worst element at the root. The hole at `hole` sinks to a leaf along the worse children, then `value`
 * rises from there: this order of moves, not the usual early stop, decides where equals end up. */
static void sink_and_rise(b2_scored *heap, int64_t hole, int64_t length, b2_scored value)
{
    int64_t top = hole;
    int64_t child = hole;
    while (child < (length - 1) / 2) {
        child = 2 * (child + 1);
        if (better(heap[child], heap[child - 1]))
            child--;
        heap[hole] = heap[child];
        hole = child;
    }
    if (length % 2 == 0 && child == (length - 2) / 2) {
        child = 2 * child + 1;
        heap[hole] = heap[child];
        hole = child;
    }
    while (hole > top && better(heap[(hole - 1) / 2], value)) {
        heap[hole] = heap[(hole - 1) / 2];
        hole = (hole - 1) / 2;
    }
    heap[hole] = value;
}

static void make_heap(b2_scored *heap, int64_t length)
{
    for (int64_t parent = (length - 2) / 2; length >= 2 && parent >= 0; parent--)
        sink_and_rise(heap, parent, length, heap[parent]);
}

static void sort_heap(b2_scored *heap, int64_t length)
{
    for (int64_t last = length - 1; last > 0; last--) {
        b2_scored value = heap[last];
        heap[last] = heap[0];
        sink_and_rise(heap, 0, last, value);
    }
}

/* The `k` best of items [n] move to the front as a heap. */
static void heap_select(b2_scored *items, int64_t k, int64_t n)
{
    make_heap(items, k);
    for (int64_t i = k; i < n; i++)
        if (better(items[i], items[0])) {
            b2_scored value = items[i];
            items[i] = items[0];
            sink_and_rise(items, 0, k, value);
        }
}

static void insert_sorted(b2_scored *items, int64_t i)
{
    b2_scored value = items[i];
    for (; i > 0 && better(value, items[i - 1]); i--)
        items[i] = items[i - 1];
    items[i] = value;
}

static void insertion_sort(b2_scored *items, int64_t n)
{
    for (int64_t i = 1; i < n; i++)
        insert_sorted(items, i);
}

static void median_to_front(b2_scored *front, b2_scored *a, b2_scored *b, b2_scored *c)
{
    b2_scored *low = better(*a, *b) ? a : b;
    b2_scored *high = low == a ? b : a;
    if (better(*high, *c))
        swap(front, high);
    else if (better(*low, *c))
        swap(front, c);
    else
        swap(front, low);
}

/* Hoare partition of items[1 .. n) around a median placed in items[0]; returns where the second part begins. */
static int64_t partition(b2_scored *items, int64_t n)
{
    median_to_front(items, items + 1, items + n / 2, items + n - 1);
    b2_scored pivot = items[0];
    int64_t low = 1, high = n;
    for (;;) {
        while (better(items[low], pivot))
            low++;
        high--;
        while (better(pivot, items[high]))
            high--;
        if (low >= high)
            return low;
        swap(items + low, items + high);
        low++;
    }
}

static int64_t depth_limit(int64_t n)
{
    int64_t bits = 0;
    while (n >>= 1)
        bits++;
    return 2 * bits;
}

static void select_nth(b2_scored *items, int64_t nth, int64_t n)
{
    int64_t depth = depth_limit(n);
    while (n > SMALL_SELECT) {
        if (depth-- == 0) {
            heap_select(items, nth + 1, n);
            swap(items, items + nth);
            return;
        }
        int64_t cut = partition(items, n);
        if (cut <= nth) {
            items += cut;
            nth -= cut;
            n -= cut;
        } else {
            n = cut;
        }
    }
    insertion_sort(items, n);
}

static void coarse_sort(b2_scored *items, int64_t n, int64_t depth)
{
    while (n > SMALL_SORT) {
        if (depth-- == 0) {
            make_heap(items, n);
            sort_heap(items, n);
            return;
        }
        int64_t cut = partition(items, n);
        coarse_sort(items + cut, n - cut, depth);
        n = cut;
    }
}

static void sort(b2_scored *items, int64_t n)
{
    if (n < 2)
        return;
    coarse_sort(items, n, depth_limit(n));
    insertion_sort(items, n);
}

static int any_above(const float *values, float bound)
{
    int hit = 0;
    for (int j = 0; j < SCAN_BLOCK; j++)
        hit |= values[j] > bound;
    return hit;
}

static void offer(b2_scored *heap, int64_t k, const float *values, int64_t from, int64_t to)
{
    for (int64_t i = from; i < to; i++)
        if (values[i] > heap[0].value)
            sink_and_rise(heap, 0, k, (b2_scored){values[i], (int32_t)i});
}

/* heap_select over the values themselves: a block without a value above the worst kept one changes nothing. */
static void select_by_scan(b2_scored *heap, const float *values, int64_t n, int64_t k)
{
    for (int64_t i = 0; i < k; i++)
        heap[i] = (b2_scored){values[i], (int32_t)i};
    make_heap(heap, k);
    int64_t i = k;
    for (; i + SCAN_BLOCK <= n; i += SCAN_BLOCK)
        if (any_above(values + i, heap[0].value))
            offer(heap, k, values, i, i + SCAN_BLOCK);
    offer(heap, k, values, i, n);
    sort_heap(heap, k);
}

static int by_scan(int64_t n, int64_t k)
{
    return k * PARTIAL_SORT_RATIO <= n;
}

int64_t b2_topk_scratch(int64_t n, int64_t k)
{
    return by_scan(n, k) ? k : n;
}

void b2_topk(b2_scored *scratch, const float *values, int64_t n, int64_t k)
{
    if (by_scan(n, k)) {
        select_by_scan(scratch, values, n, k);
        return;
    }
    for (int64_t i = 0; i < n; i++)
        scratch[i] = (b2_scored){values[i], (int32_t)i};
    select_nth(scratch, k - 1, n);
    sort(scratch, k - 1);
}
