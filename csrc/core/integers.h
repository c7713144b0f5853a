/* Whole numbers: what C has no word for. */
#ifndef B2_CORE_INTEGERS_H
#define B2_CORE_INTEGERS_H

#include <stdint.h>

static inline int64_t b2_min64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static inline int64_t b2_max64(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/* a >= 0 over b > 0, to the next whole number. */
static inline int64_t b2_ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

/* The next multiple of `unit`. */
static inline int64_t b2_round_up(int64_t value, int64_t unit)
{
    return b2_ceil_div(value, unit) * unit;
}

#endif
