/* Rounded weights as int16: products of pairs are summed exactly in int32 (pmaddwd). The including file names the
 * instruction set; plain C computes the same integers. */
#include <math.h>
#include <string.h>

#include "ops/cpu/quad_tiles.h"
#include "ops/cpu/simd.h"

#define VALUE_BYTES 2
#include "ops/cpu/quad_rows.inc.h"

/* Half of `units` stored units from `next`. */
B2_INLINE void ask_ahead(const char *next, b2_dtype dtype, int64_t units)
{
    for (int64_t at = 0; next && at < units * b2_quad_unit_bytes(dtype) / 2; at += 64)
        __builtin_prefetch(next + at, 0, 3);
}

#if defined(B2_SIMD_AVX512)
enum { TILE_ROWS = 8, TILE_PANELS = 2 };
typedef __m512i vi;
B2_INLINE vi i_load(const void *p) { return _mm512_loadu_si512(p); }
B2_INLINE void i_store(void *p, vi a) { _mm512_storeu_si512(p, a); }
B2_INLINE vi i_zero(void) { return _mm512_setzero_si512(); }
B2_INLINE vi i_shift(vi a, const int bits) { return _mm512_srli_epi16(a, bits); }
B2_INLINE vi i_centre(vi a, int mask, int zero)
{
    return _mm512_sub_epi16(_mm512_and_si512(a, _mm512_set1_epi16((short)mask)), _mm512_set1_epi16((short)zero));
}
B2_INLINE vi i_pair(const char *p)
{
    int32_t pair;
    memcpy(&pair, p, sizeof pair);
    return _mm512_set1_epi32(pair);
}
B2_INLINE vi i_madd(vi acc, vi a, vi b) { return _mm512_add_epi32(acc, _mm512_madd_epi16(a, b)); }
B2_INLINE vf i_float(vi a) { return _mm512_cvtepi32_ps(a); }
enum { TILE_VECTORS = TILE_PANELS * NV, VECTOR_BYTES = VW * 4, UNIT_BYTES = B2_QUAD_UNIT * B2_PANEL * 2 };

/* One group of `channels`: c [rows][32] += t * (scale *) sums. The number of channels is no constant on purpose: an
 * unrolled loop spills the sums. */
B2_INLINE void tile_group(float *c, const char *x, const float *scales, const char *const w[2],
                          const uint16_t *const half[2], int64_t channels, const int rows)
{
    vi acc[TILE_ROWS][TILE_VECTORS];
    B2_UNROLL
    for (int r = 0; r < rows; r++) {
        B2_UNROLL
        for (int v = 0; v < TILE_VECTORS; v++)
            acc[r][v] = i_zero();
    }
    for (int64_t i = 0; i < channels / 2; i++) {
        vi b[TILE_VECTORS];
        B2_UNROLL
        for (int v = 0; v < TILE_VECTORS; v++)
            b[v] = i_load(w[v / NV] + i * 64 + v % NV * VECTOR_BYTES);
        B2_UNROLL
        for (int r = 0; r < rows; r++) {
            vi pair = i_pair(x + (i * rows + r) * 4);
            B2_UNROLL
            for (int v = 0; v < TILE_VECTORS; v++)
                acc[r][v] = i_madd(acc[r][v], pair, b[v]);
        }
    }
    B2_UNROLL
    for (int v = 0; v < TILE_VECTORS; v++) {
        vf by = half[0] ? v_load_f16(half[v / NV] + v % NV * VW) : v_set1(1.0f);
        B2_UNROLL
        for (int r = 0; r < rows; r++) {
            float *to = c + r * B2_QUAD_TILE_COLUMNS + v * VW;
            vf sum = half[0] ? v_mul(i_float(acc[r][v]), by) : i_float(acc[r][v]);
            v_store(to, v_fma(sum, v_set1(scales[r]), v_load(to)));
        }
    }
}

B2_INLINE void tile_rows(float *c, const b2_quad_block *x, const b2_quad_operand *o, b2_dtype dtype, int64_t units,
                         const char *next, const int rows)
{
    int64_t step = b2_quad_group(dtype) / B2_QUAD_UNIT;
    for (int64_t u = 0; u < units; u += step) {
        const char *w[2] = {o->values[0] + u * UNIT_BYTES, o->values[1] + u * UNIT_BYTES};
        const uint16_t *half[2] = {NULL, NULL};
        for (int i = 0; i < 2 && dtype == B2_I4; i++)
            half[i] = (const uint16_t *)o->scales[i] + u * B2_PANEL;
        ask_ahead(next ? next + u * b2_quad_unit_bytes(dtype) / 2 : NULL, dtype, step);
        tile_group(c, x->values + u * B2_QUAD_UNIT * 2 * rows, x->scales + u / step * rows, w, half,
                   (u + step <= units ? step : units - u) * B2_QUAD_UNIT, rows);
    }
}

static void tile(float *c, const b2_quad_block *x, const b2_quad_operand *w, b2_dtype dtype, int rows, int64_t units,
                 int first, const char *next)
{
    if (first)
        memset(c, 0, (size_t)(rows * B2_QUAD_TILE_COLUMNS) * sizeof *c);
    switch (rows) { /* the bounds become constants */
    case 1: tile_rows(c, x, w, dtype, units, next, 1); break;
    case 2: tile_rows(c, x, w, dtype, units, next, 2); break;
    case 3: tile_rows(c, x, w, dtype, units, next, 3); break;
    case 4: tile_rows(c, x, w, dtype, units, next, 4); break;
    case 5: tile_rows(c, x, w, dtype, units, next, 5); break;
    case 6: tile_rows(c, x, w, dtype, units, next, 6); break;
    case 7: tile_rows(c, x, w, dtype, units, next, 7); break;
    default: tile_rows(c, x, w, dtype, units, next, 8); break;
    }
}

static double peak(int64_t rounds, float *sink)
{
    for (int64_t n = 0; n < rounds; n++)
        __asm__ volatile(".irp s,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n\t"
                         "vpmaddwd %%zmm24, %%zmm25, %%zmm26\n\t"
                         "vpaddd %%zmm26, %%zmm\\s, %%zmm\\s\n\t"
                         ".endr\n\t"
                         :
                         :
                         : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
                           "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm26");
    *sink = 0;
    return 2.0 * 32 * 16 * (double)rounds;
}
#elif defined(B2_SIMD_AVX2)
/* Sixteen registers are just enough for 6 x 16 sums, and GCC does not find the way: written out. Sums in ymm0 to ymm11,
 * weights in ymm12 and ymm13, x in ymm14, a product in ymm15. One block of assembly does one group. */
enum { TILE_ROWS = 6, TILE_PANELS = 1, STEP_UNROLL = 8, UNIT_BYTES = B2_QUAD_UNIT * B2_PANEL * 2 };
enum { VECTOR_BYTES = 32 };
typedef __m256i vi;
B2_INLINE vi i_load(const void *p) { return _mm256_loadu_si256(p); }
B2_INLINE void i_store(void *p, vi a) { _mm256_storeu_si256(p, a); }
B2_INLINE vi i_shift(vi a, const int bits) { return _mm256_srli_epi16(a, bits); }
B2_INLINE vi i_centre(vi a, int mask, int zero)
{
    return _mm256_sub_epi16(_mm256_and_si256(a, _mm256_set1_epi16((short)mask)), _mm256_set1_epi16((short)zero));
}

/* DO(rows, row, its two sums) for each row. */
#define ROWS_1(DO, R) DO(R, 0, 0, 1)
#define ROWS_2(DO, R) ROWS_1(DO, R) DO(R, 1, 2, 3)
#define ROWS_3(DO, R) ROWS_2(DO, R) DO(R, 2, 4, 5)
#define ROWS_4(DO, R) ROWS_3(DO, R) DO(R, 3, 6, 7)
#define ROWS_5(DO, R) ROWS_4(DO, R) DO(R, 4, 8, 9)
#define ROWS_6(DO, R) ROWS_5(DO, R) DO(R, 5, 10, 11)

#define BEGIN(R, r, i0, i1)                                                                                         \
    "vpxor %%xmm" #i0 ", %%xmm" #i0 ", %%xmm" #i0 "\n\t"                                                            \
    "vpxor %%xmm" #i1 ", %%xmm" #i1 ", %%xmm" #i1 "\n\t"
#define MULTIPLY(R, r, i0, i1)                                                                                      \
    "vpbroadcastd 4*(\\s*" #R "+" #r ")(%[x]), %%ymm14\n\t"                                                         \
    "vpmaddwd %%ymm12, %%ymm14, %%ymm15\n\t"                                                                        \
    "vpmaddwd %%ymm13, %%ymm14, %%ymm14\n\t"                                                                        \
    "vpaddd %%ymm15, %%ymm" #i0 ", %%ymm" #i0 "\n\t"                                                                \
    "vpaddd %%ymm14, %%ymm" #i1 ", %%ymm" #i1 "\n\t"
#define CONVERT(R, r, i0, i1)                                                                                       \
    "vcvtdq2ps %%ymm" #i0 ", %%ymm" #i0 "\n\t"                                                                      \
    "vcvtdq2ps %%ymm" #i1 ", %%ymm" #i1 "\n\t"
#define SCALE(R, r, i0, i1)                                                                                         \
    "vmulps %%ymm12, %%ymm" #i0 ", %%ymm" #i0 "\n\t"                                                                \
    "vmulps %%ymm13, %%ymm" #i1 ", %%ymm" #i1 "\n\t"
#define ADD(R, r, i0, i1)                                                                                           \
    "vbroadcastss 4*" #r "(%[scales]), %%ymm14\n\t"                                                                 \
    "vfmadd213ps 128*" #r "(%[c]), %%ymm14, %%ymm" #i0 "\n\t"                                                       \
    "vfmadd213ps 128*" #r "+32(%[c]), %%ymm14, %%ymm" #i1 "\n\t"                                                    \
    "vmovups %%ymm" #i0 ", 128*" #r "(%[c])\n\t"                                                                    \
    "vmovups %%ymm" #i1 ", 128*" #r "+32(%[c])\n\t"
#define SUMS(R)                                                                                                     \
    ROWS_##R(BEGIN, R) "1:\n\t"                                                                                     \
    ".irp s,0,1,2,3,4,5,6,7\n\t"                                                                                    \
    "vmovdqu 64*\\s(%[w]), %%ymm12\n\t"                                                                             \
    "vmovdqu 64*\\s+32(%[w]), %%ymm13\n\t"                                                                          \
    ROWS_##R(MULTIPLY, R)                                                                                           \
    ".endr\n\t"                                                                                                     \
    "add $32*" #R ", %[x]\n\t"                                                                                      \
    "add $512, %[w]\n\t"                                                                                            \
    "dec %[count]\n\t"                                                                                              \
    "jnz 1b\n\t" ROWS_##R(CONVERT, R)
#define CLOBBERED                                                                                                   \
    "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",        \
        "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"

#define DEFINE_TILE(R)                                                                                              \
    static void tile_i8_##R(float *c, const char *x, const float *scales, const char *w, int64_t count)             \
    {                                                                                                               \
        __asm__ volatile(SUMS(R) ROWS_##R(ADD, R)                                                                   \
                         : [x] "+r"(x), [w] "+r"(w), [count] "+r"(count)                                            \
                         : [c] "r"(c), [scales] "r"(scales)                                                         \
                         : CLOBBERED);                                                                              \
    }                                                                                                               \
    static void tile_i4_##R(float *c, const char *x, const float *scales, const char *w, int64_t count,             \
                            const uint16_t *half)                                                                   \
    {                                                                                                               \
        __asm__ volatile(SUMS(R) "vcvtph2ps (%[half]), %%ymm12\n\t"                                                 \
                                 "vcvtph2ps 16(%[half]), %%ymm13\n\t" ROWS_##R(SCALE, R) ROWS_##R(ADD, R)           \
                         : [x] "+r"(x), [w] "+r"(w), [count] "+r"(count)                                            \
                         : [c] "r"(c), [scales] "r"(scales), [half] "r"(half)                                       \
                         : CLOBBERED);                                                                              \
    }

DEFINE_TILE(1)
DEFINE_TILE(2)
DEFINE_TILE(3)
DEFINE_TILE(4)
DEFINE_TILE(5)
DEFINE_TILE(6)

static void tile(float *c, const b2_quad_block *x, const b2_quad_operand *w, b2_dtype dtype, int rows, int64_t units,
                 int first, const char *next)
{
    if (first)
        memset(c, 0, (size_t)(rows * B2_QUAD_TILE_COLUMNS) * sizeof *c);
    static void (*const i8[])(float *, const char *, const float *, const char *, int64_t) = {
        tile_i8_1, tile_i8_2, tile_i8_3, tile_i8_4, tile_i8_5, tile_i8_6};
    static void (*const i4[])(float *, const char *, const float *, const char *, int64_t, const uint16_t *) = {
        tile_i4_1, tile_i4_2, tile_i4_3, tile_i4_4, tile_i4_5, tile_i4_6};
    int64_t step = b2_quad_group(dtype) / B2_QUAD_UNIT;
    for (int64_t u = 0; u < units; u += step) {
        const char *values = x->values + u * B2_QUAD_UNIT * 2 * rows, *weights = w->values[0] + u * UNIT_BYTES;
        const float *scales = x->scales + u / step * rows;
        int64_t count = (u + step <= units ? step : units - u) * B2_QUAD_UNIT / (2 * STEP_UNROLL);
        ask_ahead(next ? next + u * b2_quad_unit_bytes(dtype) / 2 : NULL, dtype, step);
        if (dtype == B2_I8)
            i8[rows - 1](c, values, scales, weights, count);
        else
            i4[rows - 1](c, values, scales, weights, count, (const uint16_t *)w->scales[0] + u * B2_PANEL);
    }
}

static double peak(int64_t rounds, float *sink)
{
    for (int64_t n = 0; n < rounds; n++)
        __asm__ volatile(".irp s,0,1,2,3,4,5,6,7,8,9,10,11\n\t"
                         "vpmaddwd %%ymm12, %%ymm13, %%ymm15\n\t"
                         "vpaddd %%ymm15, %%ymm\\s, %%ymm\\s\n\t"
                         ".endr\n\t"
                         :
                         :
                         : CLOBBERED);
    *sink = 0;
    return 2.0 * 16 * 12 * (double)rounds;
}
#else
enum { TILE_ROWS = 4, TILE_PANELS = 1 };

static void tile(float *c, const b2_quad_block *x, const b2_quad_operand *w, b2_dtype dtype, int rows, int64_t units,
                 int first, const char *next)
{
    if (first)
        memset(c, 0, (size_t)(rows * B2_QUAD_TILE_COLUMNS) * sizeof *c);
    int64_t group = b2_quad_group(dtype);
    ask_ahead(next, dtype, units);
    for (int64_t k = 0; k < units * B2_QUAD_UNIT; k += group)
        for (int r = 0; r < rows; r++) {
            int32_t sum[B2_PANEL] = {0};
            const int16_t *weights = (const int16_t *)(const void *)w->values[0] + k * B2_PANEL;
            for (int64_t i = 0; i < group && k + i < units * B2_QUAD_UNIT; i += 2, weights += 2 * B2_PANEL) {
                int16_t a[2];
                memcpy(a, x->values + ((k + i) / 2 * rows + r) * 4, 4);
                for (int j = 0; j < B2_PANEL; j++)
                    sum[j] += a[0] * weights[2 * j] + a[1] * weights[2 * j + 1];
            }
            for (int j = 0; j < B2_PANEL; j++) {
                float value = (float)sum[j], *to = c + r * B2_QUAD_TILE_COLUMNS + j;
                if (dtype == B2_I4)
                    value *= b2_f16_to_f32(((const uint16_t *)w->scales[0])[k / group * B2_PANEL + j]);
                *to = fmaf(value, x->scales[k / group * rows + r], *to);
            }
        }
}

static double peak(int64_t rounds, float *sink)
{
    int16_t w[B2_PANEL * 2];
    int32_t sum[B2_PANEL] = {0};
    for (int i = 0; i < B2_PANEL * 2; i++)
        w[i] = (int16_t)(i + (int)*sink % 3);
    for (int64_t n = 0; n < rounds; n++)
        for (int j = 0; j < B2_PANEL; j++)
            sum[j] ^= (int)(n & 127) * w[2 * j] + (int)(n & 63) * w[2 * j + 1];
    *sink = (float)sum[3];
    return 2.0 * 2 * B2_PANEL * (double)rounds;
}
#endif

/* Sixteen bits of a panel are two channels of one row, and half of a quad: its even channels go into one pair, its odd ones
 * into the next (x is stored in the same order). */
#if defined(B2_SIMD_AVX512) || defined(B2_SIMD_AVX2)
static void unpack_i8(char *dst, const uint8_t *panel, int64_t units)
{
    for (int64_t quad = 0; quad < units * 8; quad++, panel += 64, dst += 128)
        B2_UNROLL
        for (int at = 0; at < 64; at += VECTOR_BYTES) {
            vi both = i_load(panel + at);
            i_store(dst + at, i_centre(both, 255, 128));
            i_store(dst + 64 + at, i_centre(i_shift(both, 8), 255, 128));
        }
}

static void unpack_i4(char *dst, const uint8_t *panel, int64_t units)
{
    for (int64_t quads = 0; quads < units * 4; quads++, panel += 64, dst += 256)
        B2_UNROLL
        for (int at = 0; at < 64; at += VECTOR_BYTES) {
            vi four = i_load(panel + at);
            i_store(dst + at, i_centre(four, 15, 8));
            i_store(dst + 64 + at, i_centre(i_shift(four, 8), 15, 8));
            i_store(dst + 128 + at, i_centre(i_shift(four, 4), 15, 8));
            i_store(dst + 192 + at, i_centre(i_shift(four, 12), 15, 8));
        }
}
#else
static void unpack_i8(char *dst, const uint8_t *panel, int64_t units)
{
    int16_t *to = (int16_t *)(void *)dst;
    for (int64_t quad = 0; quad < units * 8; quad++, panel += 64, to += 64)
        for (int i = 0; i < 32; i++) {
            to[i] = (int16_t)(panel[2 * i] - 128);
            to[32 + i] = (int16_t)(panel[2 * i + 1] - 128);
        }
}

static void unpack_i4(char *dst, const uint8_t *panel, int64_t units)
{
    int16_t *to = (int16_t *)(void *)dst;
    for (int64_t quads = 0; quads < units * 4; quads++, panel += 64, to += 128)
        for (int i = 0; i < 32; i++) {
            to[i] = (int16_t)((panel[2 * i] & 15) - 8);
            to[32 + i] = (int16_t)((panel[2 * i + 1] & 15) - 8);
            to[64 + i] = (int16_t)((panel[2 * i] >> 4) - 8);
            to[96 + i] = (int16_t)((panel[2 * i + 1] >> 4) - 8);
        }
}
#endif

const b2_quad_tiles B2_QUAD_TILES = {
    .tile_rows = TILE_ROWS,
    .tile_panels = TILE_PANELS,
    .value_bytes = VALUE_BYTES,
    .round_rows = round_rows,
    .unpack_i8 = unpack_i8,
    .unpack_i4 = unpack_i4,
    .tile = tile,
    .peak = peak,
};
