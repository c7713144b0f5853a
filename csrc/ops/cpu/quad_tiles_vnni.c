/* AVX-512 with VNNI: vpdpbusd multiplies stored weights (unsigned, q + zero) with rounded rows (signed); sums begin with the
 * offset that takes zero's part away again.
 *
 * The tile is written in assembly: GCC spills a third of such a tile when it is written in intrinsics, and the products then
 * run at a third of the speed. Up to 7 rows and 2 panels: sums of the present group in zmm0 to zmm13, fp32 sums in zmm14 to
 * zmm27 (kept in memory instead they cost a fifth of the speed), weights in zmm28 and zmm29, x in zmm30 and zmm31. */
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

enum { TILE_ROWS = 7 };

/* DO(rows, row, its two sums, its two fp32 sums, register for x) for each row. */
#define ROWS_1(DO, R) DO(R, 0, 0, 1, 14, 15, 30)
#define ROWS_2(DO, R) ROWS_1(DO, R) DO(R, 1, 2, 3, 16, 17, 31)
#define ROWS_3(DO, R) ROWS_2(DO, R) DO(R, 2, 4, 5, 18, 19, 30)
#define ROWS_4(DO, R) ROWS_3(DO, R) DO(R, 3, 6, 7, 20, 21, 31)
#define ROWS_5(DO, R) ROWS_4(DO, R) DO(R, 4, 8, 9, 22, 23, 30)
#define ROWS_6(DO, R) ROWS_5(DO, R) DO(R, 5, 10, 11, 24, 25, 31)
#define ROWS_7(DO, R) ROWS_6(DO, R) DO(R, 6, 12, 13, 26, 27, 30)

#define ZERO(R, r, i0, i1, f0, f1, x)                                                                               \
    "vpxord %%zmm" #f0 ", %%zmm" #f0 ", %%zmm" #f0 "\n\t"                                                           \
    "vpxord %%zmm" #f1 ", %%zmm" #f1 ", %%zmm" #f1 "\n\t"
#define LOAD(R, r, i0, i1, f0, f1, x)                                                                               \
    "vmovups 128*" #r "(%[c]), %%zmm" #f0 "\n\t"                                                                    \
    "vmovups 128*" #r "+64(%[c]), %%zmm" #f1 "\n\t"
#define STORE(R, r, i0, i1, f0, f1, x)                                                                              \
    "vmovups %%zmm" #f0 ", 128*" #r "(%[c])\n\t"                                                                    \
    "vmovups %%zmm" #f1 ", 128*" #r "+64(%[c])\n\t"
#define START(R)                                                                                                    \
    ROWS_##R(ZERO, R) "test %[first], %[first]\n\t"                                                                 \
                      "jnz 4f\n\t" ROWS_##R(LOAD, R) "4:\n\t"
#define BEGIN(R, r, i0, i1, f0, f1, x)                                                                              \
    "vpbroadcastd 4*" #r "(%[offsets]), %%zmm" #i0 "\n\t"                                                           \
    "vmovdqa64 %%zmm" #i0 ", %%zmm" #i1 "\n\t"
#define MULTIPLY(R, r, i0, i1, f0, f1, x)                                                                           \
    "vpbroadcastd 4*(\\s*" #R "+" #r ")(%[x]), %%zmm" #x "\n\t"                                                     \
    "vpdpbusd %%zmm" #x ", %%zmm28, %%zmm" #i0 "\n\t"                                                               \
    "vpdpbusd %%zmm" #x ", %%zmm29, %%zmm" #i1 "\n\t"
#define CONVERT(R, r, i0, i1, f0, f1, x)                                                                            \
    "vcvtdq2ps %%zmm" #i0 ", %%zmm" #i0 "\n\t"                                                                      \
    "vcvtdq2ps %%zmm" #i1 ", %%zmm" #i1 "\n\t"
#define SCALE(R, r, i0, i1, f0, f1, x)                                                                              \
    "vmulps %%zmm28, %%zmm" #i0 ", %%zmm" #i0 "\n\t"                                                                \
    "vmulps %%zmm29, %%zmm" #i1 ", %%zmm" #i1 "\n\t"
#define ADD(R, r, i0, i1, f0, f1, x)                                                                                \
    "vbroadcastss 4*" #r "(%[scales]), %%zmm" #x "\n\t"                                                             \
    "vfmadd231ps %%zmm" #i0 ", %%zmm" #x ", %%zmm" #f0 "\n\t"                                                       \
    "vfmadd231ps %%zmm" #i1 ", %%zmm" #x ", %%zmm" #f1 "\n\t"

/* Integer sums of a group as fp32; STEPS lists its steps of four channels, every EACH-th asks for a line of what is read
 * next. */
#define SUMS(R, STEPS, EACH)                                                                                        \
    ROWS_##R(BEGIN, R)                                                                                              \
    ".irp s," STEPS "\n\t"                                                                                          \
    ".if \\s %% " #EACH " == 0\n\t"                                                                                 \
    "prefetcht1 \\s * 64 / " #EACH "(%[next])\n\t"                                                                  \
    ".endif\n\t"                                                                                                    \
    "vmovdqu64 64*\\s(%[w0]), %%zmm28\n\t"                                                                          \
    "vmovdqu64 64*\\s(%[w1]), %%zmm29\n\t"                                                                          \
    ROWS_##R(MULTIPLY, R)                                                                                           \
    ".endr\n\t"                                                                                                     \
    ROWS_##R(CONVERT, R)
#define EIGHT "0,1,2,3,4,5,6,7"
#define SIXTEEN "0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15"
#define ADVANCE(R, units)                                                                                           \
    "add $32*" #units "*" #R ", %[x]\n\t"                                                                           \
    "add $512*" #units ", %[w0]\n\t"                                                                                \
    "add $512*" #units ", %[w1]\n\t"                                                                                \
    "add $4*" #R ", %[scales]\n\t"                                                                                  \
    "add $4*" #R ", %[offsets]\n\t"                                                                                 \
    "add %[ahead], %[next]\n\t"

#define DEFINE_TILE(R)                                                                                              \
    static void tile_i8_##R(float *c, const b2_quad_block *b, const b2_quad_operand *w, int64_t units,              \
                            int64_t first, const char *next)                                                        \
    {                                                                                                               \
        const char *x = b->values, *w0 = w->values[0], *w1 = w->values[1];                                          \
        const float *scales = b->scales;                                                                            \
        const int32_t *offsets = b->offsets;                                                                        \
        int64_t whole = units / 2, half = units % 2, ahead = next ? 512 : 0;                                        \
        next = next ? next : x;                                                                                     \
        __asm__ volatile(START(R)                                                                                   \
                         "test %[whole], %[whole]\n\t"                                                              \
                         "jz 2f\n"                                                                                  \
                         "1:\n\t" SUMS(R, SIXTEEN, 2) ROWS_##R(ADD, R) ADVANCE(R, 2)                                \
                         "dec %[whole]\n\t"                                                                         \
                         "jnz 1b\n"                                                                                 \
                         "2:\n\t"                                                                                   \
                         "test %[half], %[half]\n\t"                                                                \
                         "jz 3f\n\t" SUMS(R, EIGHT, 2) ROWS_##R(ADD, R) "3:\n\t" ROWS_##R(STORE, R)                 \
                         : [x] "+r"(x), [scales] "+r"(scales), [offsets] "+r"(offsets), [w0] "+r"(w0),              \
                           [w1] "+r"(w1), [whole] "+r"(whole), [next] "+r"(next)                                    \
                         : [c] "r"(c), [half] "r"(half), [first] "r"(first), [ahead] "r"(ahead)                     \
                         : CLOBBERED);                                                                              \
    }                                                                                                               \
    static void tile_i4_##R(float *c, const b2_quad_block *b, const b2_quad_operand *w, int64_t units,              \
                            int64_t first, const char *next)                                                        \
    {                                                                                                               \
        const char *x = b->values, *w0 = w->values[0], *w1 = w->values[1];                                          \
        const char *s0 = w->scales[0], *s1 = w->scales[1];                                                          \
        const float *scales = b->scales;                                                                            \
        const int32_t *offsets = b->offsets;                                                                        \
        int64_t ahead = next ? 128 : 0;                                                                             \
        next = next ? next : x;                                                                                     \
        __asm__ volatile(START(R) "1:\n\t" SUMS(R, EIGHT, 4)                                                        \
                         "vcvtph2ps (%[s0]), %%zmm28\n\t"                                                           \
                         "vcvtph2ps (%[s1]), %%zmm29\n\t" ROWS_##R(SCALE, R) ROWS_##R(ADD, R) ADVANCE(R, 1)         \
                         "add $32, %[s0]\n\t"                                                                       \
                         "add $32, %[s1]\n\t"                                                                       \
                         "dec %[units]\n\t"                                                                         \
                         "jnz 1b\n\t" ROWS_##R(STORE, R)                                                            \
                         : [x] "+r"(x), [scales] "+r"(scales), [offsets] "+r"(offsets), [w0] "+r"(w0),              \
                           [w1] "+r"(w1), [s0] "+r"(s0), [s1] "+r"(s1), [units] "+r"(units), [next] "+r"(next)      \
                         : [c] "r"(c), [first] "r"(first), [ahead] "r"(ahead)                                       \
                         : CLOBBERED);                                                                              \
    }

#define CLOBBERED                                                                                                   \
    "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",        \
        "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", \
        "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31"

DEFINE_TILE(1)
DEFINE_TILE(2)
DEFINE_TILE(3)
DEFINE_TILE(4)
DEFINE_TILE(5)
DEFINE_TILE(6)
DEFINE_TILE(7)

typedef void (*tile_fn)(float *, const b2_quad_block *, const b2_quad_operand *, int64_t, int64_t, const char *);

static void tile(float *c, const b2_quad_block *x, const b2_quad_operand *w, b2_dtype dtype, int rows, int64_t units,
                 int first, const char *next)
{
    static const tile_fn i8[TILE_ROWS] = {tile_i8_1, tile_i8_2, tile_i8_3, tile_i8_4, tile_i8_5, tile_i8_6, tile_i8_7};
    static const tile_fn i4[TILE_ROWS] = {tile_i4_1, tile_i4_2, tile_i4_3, tile_i4_4, tile_i4_5, tile_i4_6, tile_i4_7};
    (dtype == B2_I8 ? i8 : i4)[rows - 1](c, x, w, units, first, next);
}

static void unpack_i4(char *dst, const uint8_t *panel, int64_t units)
{
    const __m512i mask = _mm512_set1_epi8(15);
    for (int64_t i = 0; i < units * 4; i++) {
        __m512i both = _mm512_loadu_si512(panel + i * 64);
        _mm512_storeu_si512(dst + i * 128, _mm512_and_si512(both, mask));
        _mm512_storeu_si512(dst + i * 128 + 64, _mm512_and_si512(_mm512_srli_epi16(both, 4), mask));
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
    .peak = peak,
};
