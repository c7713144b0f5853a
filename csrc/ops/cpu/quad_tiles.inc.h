/* Rounded weights as int16: products of pairs are summed exactly in int32 (pmaddwd). The including file names the
 * instruction set; plain C computes the same integers. */
#include <math.h>
#include <string.h>

#include "ops/cpu/quad_tiles.h"
#include "ops/cpu/simd.h"

#define VALUE_BYTES 2
#include "ops/cpu/quad_rows.inc.h"

#if defined(B2_SIMD_AVX512)
enum { TILE_ROWS = 12, TILE_PANELS = 2 };
typedef __m512i vi;
B2_INLINE vi i_load(const void *p) { return _mm512_loadu_si512(p); }
B2_INLINE vi i_zero(void) { return _mm512_setzero_si512(); }
B2_INLINE vi i_pair(const char *p)
{
    int32_t pair;
    memcpy(&pair, p, sizeof pair);
    return _mm512_set1_epi32(pair);
}
B2_INLINE vi i_madd(vi acc, vi a, vi b) { return _mm512_add_epi32(acc, _mm512_madd_epi16(a, b)); }
B2_INLINE vf i_float(vi a) { return _mm512_cvtepi32_ps(a); }
#elif defined(B2_SIMD_AVX2)
enum { TILE_ROWS = 6, TILE_PANELS = 1 };
typedef __m256i vi;
B2_INLINE vi i_load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
B2_INLINE vi i_zero(void) { return _mm256_setzero_si256(); }
B2_INLINE vi i_pair(const char *p)
{
    int32_t pair;
    memcpy(&pair, p, sizeof pair);
    return _mm256_set1_epi32(pair);
}
B2_INLINE vi i_madd(vi acc, vi a, vi b) { return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b)); }
B2_INLINE vf i_float(vi a) { return _mm256_cvtepi32_ps(a); }
#endif

#if defined(B2_SIMD_AVX512) || defined(B2_SIMD_AVX2)
enum { TILE_VECTORS = TILE_PANELS * NV, VECTOR_BYTES = VW * 4, GROUP_BYTES = B2_QUAD_GROUP * B2_PANEL * 2 };

/* One group: c [rows][32] += t * (scale *) sums. */
B2_INLINE void tile_group(float *c, const char *x, const float *scales, const char *const w[2],
                          const uint16_t *const half[2], const int rows)
{
    vi acc[TILE_ROWS][TILE_VECTORS];
    B2_UNROLL
    for (int r = 0; r < rows; r++) {
        B2_UNROLL
        for (int v = 0; v < TILE_VECTORS; v++)
            acc[r][v] = i_zero();
    }
    for (int i = 0; i < B2_QUAD_GROUP / 2; i++) {
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

B2_INLINE void tile_rows(float *c, const b2_quad_block *x, const b2_quad_operand *o, b2_dtype dtype, int64_t groups,
                         const int rows)
{
    for (int64_t g = 0; g < groups; g++) {
        const char *w[2] = {o->values[0] + g * GROUP_BYTES, o->values[1] + g * GROUP_BYTES};
        const uint16_t *half[2] = {NULL, NULL};
        for (int i = 0; i < 2 && dtype == B2_I4; i++)
            half[i] = (const uint16_t *)o->scales[i] + g * B2_PANEL;
        tile_group(c, x->values + g * B2_QUAD_GROUP * 2 * rows, x->scales + g * rows, w, half, rows);
    }
}

static void tile(float *c, const b2_quad_block *x, const b2_quad_operand *w, b2_dtype dtype, int rows, int64_t groups)
{
    switch (rows) { /* the bounds become constants */
#if defined(B2_SIMD_AVX512)
    case 8: tile_rows(c, x, w, dtype, groups, 8); break;
    case 9: tile_rows(c, x, w, dtype, groups, 9); break;
    case 10: tile_rows(c, x, w, dtype, groups, 10); break;
    case 11: tile_rows(c, x, w, dtype, groups, 11); break;
    default: tile_rows(c, x, w, dtype, groups, 12); break;
#else
    case 4: tile_rows(c, x, w, dtype, groups, 4); break;
    case 5: tile_rows(c, x, w, dtype, groups, 5); break;
    default: tile_rows(c, x, w, dtype, groups, 6); break;
#endif
    }
}
#else
enum { TILE_ROWS = 4, TILE_PANELS = 1 };

static void tile(float *c, const b2_quad_block *x, const b2_quad_operand *w, b2_dtype dtype, int rows, int64_t groups)
{
    for (int64_t g = 0; g < groups; g++)
        for (int r = 0; r < rows; r++) {
            int32_t sum[B2_PANEL] = {0};
            const int16_t *weights = (const int16_t *)(const void *)w->values[0] + g * B2_QUAD_GROUP * B2_PANEL;
            for (int i = 0; i < B2_QUAD_GROUP / 2; i++) {
                int16_t a[2];
                memcpy(a, x->values + (((size_t)g * (B2_QUAD_GROUP / 2) + (size_t)i) * (size_t)rows + (size_t)r) * 4, 4);
                for (int j = 0; j < B2_PANEL; j++)
                    sum[j] += a[0] * weights[(i * B2_PANEL + j) * 2] + a[1] * weights[(i * B2_PANEL + j) * 2 + 1];
            }
            for (int j = 0; j < B2_PANEL; j++) {
                float value = (float)sum[j], *to = c + r * B2_QUAD_TILE_COLUMNS + j;
                if (dtype == B2_I4)
                    value *= b2_f16_to_f32(((const uint16_t *)w->scales[0])[g * B2_PANEL + j]);
                *to = fmaf(value, x->scales[g * rows + r], *to);
            }
        }
}
#endif

/* dst [k/2][16][2] from [k/4][16][4] */
static void unpack_i8(char *dst, const uint8_t *panel, int64_t groups)
{
    int16_t *to = (int16_t *)(void *)dst;
    for (int64_t quad = 0; quad < groups * 8; quad++, panel += 64, to += 64)
        for (int h = 0; h < 2; h++)
            for (int j = 0; j < B2_PANEL; j++)
                for (int b = 0; b < 2; b++)
                    to[h * 32 + j * 2 + b] = (int16_t)(panel[j * 4 + h * 2 + b] - 128);
}

static void unpack_i4(char *dst, const uint8_t *panel, int64_t groups)
{
    int16_t *to = (int16_t *)(void *)dst;
    for (int64_t both = 0; both < groups * 4; both++, panel += 64, to += 128)
        for (int h = 0; h < 2; h++)
            for (int j = 0; j < B2_PANEL; j++)
                for (int b = 0; b < 2; b++) {
                    int byte = panel[j * 4 + h * 2 + b];
                    to[h * 32 + j * 2 + b] = (int16_t)((byte & 15) - 8);
                    to[64 + h * 32 + j * 2 + b] = (int16_t)((byte >> 4) - 8);
                }
}

static void scale(float *c, const float *scales0, const float *scales1, int rows)
{
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < B2_PANEL; j++) {
            c[r * B2_QUAD_TILE_COLUMNS + j] *= scales0[j];
            if (TILE_PANELS == 2)
                c[r * B2_QUAD_TILE_COLUMNS + B2_PANEL + j] *= scales1[j];
        }
}

static double peak(int64_t rounds, float *sink)
{
#if defined(B2_SIMD_AVX512) || defined(B2_SIMD_AVX2)
    enum { CHAINS = 12 };
    vi acc[CHAINS], x = i_load((const char[64]){1, 2, 3}), y = i_load((const char[64]){4, 5, 6});
    B2_UNROLL
    for (int i = 0; i < CHAINS; i++)
        acc[i] = i_zero();
    for (int64_t n = 0; n < rounds; n++) {
        B2_UNROLL
        for (int i = 0; i < CHAINS; i++)
            acc[i] = i_madd(acc[i], x, y);
        __asm__ volatile("" : "+x"(x)); /* or the products would be computed once */
    }
    float t[VW];
    *sink = 0;
    for (int i = 0; i < CHAINS; i++) {
        v_store(t, i_float(acc[i]));
        *sink += t[0];
    }
    return 2.0 * 2 * CHAINS * VW * (double)rounds;
#else
    int16_t w[B2_PANEL * 2];
    int32_t sum[B2_PANEL] = {0};
    for (int i = 0; i < B2_PANEL * 2; i++)
        w[i] = (int16_t)(i + (int)*sink % 3);
    for (int64_t n = 0; n < rounds; n++)
        for (int j = 0; j < B2_PANEL; j++)
            sum[j] ^= (int)(n & 127) * w[2 * j] + (int)(n & 63) * w[2 * j + 1];
    *sink = (float)sum[3];
    return 2.0 * 2 * B2_PANEL * (double)rounds;
#endif
}

const b2_quad_tiles B2_QUAD_TILES = {
    .tile_rows = TILE_ROWS,
    .tile_panels = TILE_PANELS,
    .value_bytes = VALUE_BYTES,
    .round_rows = round_rows,
    .unpack_i8 = unpack_i8,
    .unpack_i4 = unpack_i4,
    .tile = tile,
    .scale = scale,
    .peak = peak,
};
