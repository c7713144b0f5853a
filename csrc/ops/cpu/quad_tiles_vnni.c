/* AVX-512 with VNNI: vpdpbusd multiplies stored weights (unsigned, q + zero) with rounded rows (signed); sums begin with the
 * offset that takes zero's part away again.
 *
 * The tile is written in assembly: GCC spills a third of a tile of 24 accumulators when it is written in intrinsics, and
 * the products then run at a third of the speed. One block of assembly does one group: accumulators are zmm0 to zmm23, two
 * for each row; zmm24 and zmm25 hold weights, zmm26 to zmm29 values of x, each broadcast once for its two products. */
#include <immintrin.h>
#include <string.h>

#include "ops/cpu/quad_tiles.h"
#include "ops/half.h"

#define B2_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define B2_UNROLL _Pragma("clang loop unroll(full)")
#else
#define B2_UNROLL _Pragma("GCC unroll 32")
#endif

#define VALUE_BYTES 1
#include "ops/cpu/quad_rows.inc.h"

enum { TILE_ROWS = 12, FEWEST_ROWS = 8 };

/* DO(row, first accumulator, second, register for x) for each row. */
#define ROWS_8(DO, R)                                                                                               \
    DO(R, 0, 0, 1, 26) DO(R, 1, 2, 3, 27) DO(R, 2, 4, 5, 28) DO(R, 3, 6, 7, 29) DO(R, 4, 8, 9, 26)                  \
    DO(R, 5, 10, 11, 27) DO(R, 6, 12, 13, 28) DO(R, 7, 14, 15, 29)
#define ROWS_9(DO, R) ROWS_8(DO, R) DO(R, 8, 16, 17, 26)
#define ROWS_10(DO, R) ROWS_9(DO, R) DO(R, 9, 18, 19, 27)
#define ROWS_11(DO, R) ROWS_10(DO, R) DO(R, 10, 20, 21, 28)
#define ROWS_12(DO, R) ROWS_11(DO, R) DO(R, 11, 22, 23, 29)

#define BEGIN(R, r, even, odd, x)                                                                                   \
    "vpbroadcastd 4*" #r "(%[offsets]), %%zmm" #even "\n\t"                                                         \
    "vmovdqa64 %%zmm" #even ", %%zmm" #odd "\n\t"
#define MULTIPLY(R, r, even, odd, x)                                                                                \
    "vpbroadcastd 4*(\\s*" #R "+" #r ")(%[x]), %%zmm" #x "\n\t"                                                     \
    "vpdpbusd %%zmm" #x ", %%zmm24, %%zmm" #even "\n\t"                                                             \
    "vpdpbusd %%zmm" #x ", %%zmm25, %%zmm" #odd "\n\t"
#define CONVERT(R, r, even, odd, x)                                                                                 \
    "vcvtdq2ps %%zmm" #even ", %%zmm" #even "\n\t"                                                                  \
    "vcvtdq2ps %%zmm" #odd ", %%zmm" #odd "\n\t"
#define SCALE(R, r, even, odd, x)                                                                                   \
    "vmulps %%zmm24, %%zmm" #even ", %%zmm" #even "\n\t"                                                            \
    "vmulps %%zmm25, %%zmm" #odd ", %%zmm" #odd "\n\t"
#define ADD(R, r, even, odd, x)                                                                                     \
    "vbroadcastss 4*" #r "(%[scales]), %%zmm" #x "\n\t"                                                             \
    "vfmadd213ps 128*" #r "(%[c]), %%zmm" #x ", %%zmm" #even "\n\t"                                                 \
    "vfmadd213ps 128*" #r "+64(%[c]), %%zmm" #x ", %%zmm" #odd "\n\t"                                               \
    "vmovups %%zmm" #even ", 128*" #r "(%[c])\n\t"                                                                  \
    "vmovups %%zmm" #odd ", 128*" #r "+64(%[c])\n\t"
#define STEPS(R)                                                                                                    \
    ROWS_##R(BEGIN, R)                                                                                              \
    ".irp s,0,1,2,3,4,5,6,7\n\t"                                                                                    \
    "vmovdqu64 64*\\s(%[w0]), %%zmm24\n\t"                                                                          \
    "vmovdqu64 64*\\s(%[w1]), %%zmm25\n\t"                                                                          \
    ROWS_##R(MULTIPLY, R)                                                                                           \
    ".endr\n\t"                                                                                                     \
    ROWS_##R(CONVERT, R)
#define CLOBBERED                                                                                                   \
    "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",     \
        "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", \
        "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29"

#define DEFINE_TILE(R)                                                                                              \
    static void tile_i8_##R(float *c, const b2_quad_block *b, const b2_quad_operand *w, int64_t groups)             \
    {                                                                                                               \
        for (int64_t g = 0; g < groups; g++)                                                                        \
            __asm__ volatile(STEPS(R) ROWS_##R(ADD, R)                                                              \
                             :                                                                                      \
                             : [c] "r"(c), [x] "r"(b->values + g * 32 * R), [scales] "r"(b->scales + g * R),        \
                               [offsets] "r"(b->offsets + g * R), [w0] "r"(w->values[0] + g * 512),                 \
                               [w1] "r"(w->values[1] + g * 512)                                                     \
                             : CLOBBERED);                                                                          \
    }                                                                                                               \
    static void tile_i4_##R(float *c, const b2_quad_block *b, const b2_quad_operand *w, int64_t groups)             \
    {                                                                                                               \
        for (int64_t g = 0; g < groups; g++)                                                                        \
            __asm__ volatile(STEPS(R) "vcvtph2ps (%[s0]), %%zmm24\n\t"                                              \
                                      "vcvtph2ps (%[s1]), %%zmm25\n\t" ROWS_##R(SCALE, R) ROWS_##R(ADD, R)          \
                             :                                                                                      \
                             : [c] "r"(c), [x] "r"(b->values + g * 32 * R), [scales] "r"(b->scales + g * R),        \
                               [offsets] "r"(b->offsets + g * R), [w0] "r"(w->values[0] + g * 512),                 \
                               [w1] "r"(w->values[1] + g * 512),                                                    \
                               [s0] "r"((const uint16_t *)w->scales[0] + g * B2_PANEL),                             \
                               [s1] "r"((const uint16_t *)w->scales[1] + g * B2_PANEL)                              \
                             : CLOBBERED);                                                                          \
    }

DEFINE_TILE(8)
DEFINE_TILE(9)
DEFINE_TILE(10)
DEFINE_TILE(11)
DEFINE_TILE(12)

typedef void (*tile_fn)(float *, const b2_quad_block *, const b2_quad_operand *, int64_t);

static void tile(float *c, const b2_quad_block *x, const b2_quad_operand *w, b2_dtype dtype, int rows, int64_t groups)
{
    static const tile_fn i8[] = {tile_i8_8, tile_i8_9, tile_i8_10, tile_i8_11, tile_i8_12};
    static const tile_fn i4[] = {tile_i4_8, tile_i4_9, tile_i4_10, tile_i4_11, tile_i4_12};
    (dtype == B2_I8 ? i8 : i4)[rows - FEWEST_ROWS](c, x, w, groups);
}

static void unpack_i4(char *dst, const uint8_t *panel, int64_t groups)
{
    const __m512i mask = _mm512_set1_epi8(15);
    for (int64_t i = 0; i < groups * 4; i++) {
        __m512i both = _mm512_loadu_si512(panel + i * 64);
        _mm512_storeu_si512(dst + i * 128, _mm512_and_si512(both, mask));
        _mm512_storeu_si512(dst + i * 128 + 64, _mm512_and_si512(_mm512_srli_epi16(both, 4), mask));
    }
}

static void scale(float *c, const float *scales0, const float *scales1, int rows)
{
    __m512 s0 = _mm512_loadu_ps(scales0), s1 = _mm512_loadu_ps(scales1);
    for (int r = 0; r < rows; r++) {
        float *row = c + r * B2_QUAD_TILE_COLUMNS;
        _mm512_storeu_ps(row, _mm512_mul_ps(_mm512_loadu_ps(row), s0));
        _mm512_storeu_ps(row + 16, _mm512_mul_ps(_mm512_loadu_ps(row + 16), s1));
    }
}

static double peak(int64_t rounds, float *sink)
{
    for (int64_t n = 0; n < rounds; n++)
        __asm__ volatile(".irp s,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19\n\t"
                         "vpdpbusd %%zmm26, %%zmm24, %%zmm\\s\n\t"
                         ".endr\n\t"
                         :
                         :
                         : CLOBBERED);
    *sink = 0;
    return 2.0 * 64 * 20 * (double)rounds;
}

const b2_quad_tiles b2_quad_tiles_vnni = {
    .tile_rows = TILE_ROWS,
    .tile_panels = 2,
    .value_bytes = VALUE_BYTES,
    .round_rows = round_rows,
    .unpack_i8 = NULL,
    .unpack_i4 = unpack_i4,
    .tile = tile,
    .scale = scale,
    .peak = peak,
};
