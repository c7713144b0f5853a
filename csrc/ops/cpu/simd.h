/* The few vector operations that the kernels are written in, for the instruction set that the including file names:
 * B2_SIMD_AVX512 (16 floats), B2_SIMD_AVX2 (8) or neither (4, GCC/clang vector extensions, any processor).
 *
 * Trap: v_max(a, b) and v_min(a, b) give b if either is NaN, so the bound goes first and the value second. */
#ifndef B2_OPS_CPU_SIMD_H
#define B2_OPS_CPU_SIMD_H

#include <stdint.h>
#include <string.h>

#include "core/tensor.h"
#include "ops/half.h"

#if defined(__clang__)
#define B2_UNROLL _Pragma("clang loop unroll(full)")
#else
#define B2_UNROLL _Pragma("GCC unroll 32")
#endif
#define B2_INLINE static inline __attribute__((always_inline))

#if defined(B2_SIMD_AVX512)

#include <immintrin.h>

enum { VW = 16 };
typedef __m512 vf;

B2_INLINE vf v_load(const float *p) { return _mm512_loadu_ps(p); }
B2_INLINE void v_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
B2_INLINE vf v_set1(float a) { return _mm512_set1_ps(a); }
B2_INLINE vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
B2_INLINE vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
B2_INLINE vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
B2_INLINE vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
B2_INLINE vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
B2_INLINE vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
B2_INLINE vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); }
B2_INLINE vf v_round(vf a) { return _mm512_roundscale_ps(a, 8); }
B2_INLINE vf v_abs(vf a) { return _mm512_abs_ps(a); }
/* a * 2^n for integral n */
B2_INLINE vf v_ldexp(vf a, vf n) { return _mm512_scalef_ps(a, n); }
/* a < b ? x : y, lane by lane */
B2_INLINE vf v_if_less(vf a, vf b, vf x, vf y)
{
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
B2_INLINE vf v_copysign(vf magnitude, vf sign)
{
    __m512 mask = _mm512_set1_ps(-0.0f);
    return _mm512_or_ps(_mm512_andnot_ps(mask, magnitude), _mm512_and_ps(mask, sign));
}
B2_INLINE int v_any_greater(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
B2_INLINE vf v_load_f16(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
B2_INLINE vf v_load_bf16(const void *p)
{
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
/* The first and the second of each pair of bfloat16. */
B2_INLINE vf v_load_first(const void *p)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
}
B2_INLINE vf v_load_second(const void *p)
{
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32((int)0xffff0000u)));
}
/* Rows become columns: r[i][j] <-> r[j][i]. */
B2_INLINE void v_transpose(vf r[VW])
{
    __m512d pairs[VW];
    vf quads[VW];
    B2_UNROLL
    for (int i = 0; i < VW; i += 4) { /* 4 x 4 blocks inside each 128-bit lane */
        vf a = _mm512_unpacklo_ps(r[i], r[i + 1]), b = _mm512_unpackhi_ps(r[i], r[i + 1]);
        vf c = _mm512_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);
        pairs[i] = _mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(c));
        pairs[i + 1] = _mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(c));
        pairs[i + 2] = _mm512_unpacklo_pd(_mm512_castps_pd(b), _mm512_castps_pd(d));
        pairs[i + 3] = _mm512_unpackhi_pd(_mm512_castps_pd(b), _mm512_castps_pd(d));
    }
    B2_UNROLL
    for (int i = 0; i < 4; i++) { /* lanes 0, 2 and 1, 3 of two groups of four rows */
        vf a = _mm512_castpd_ps(pairs[i]), b = _mm512_castpd_ps(pairs[i + 4]);
        vf c = _mm512_castpd_ps(pairs[i + 8]), d = _mm512_castpd_ps(pairs[i + 12]);
        quads[i] = _mm512_shuffle_f32x4(a, b, 0x88);
        quads[i + 4] = _mm512_shuffle_f32x4(a, b, 0xdd);
        quads[i + 8] = _mm512_shuffle_f32x4(c, d, 0x88);
        quads[i + 12] = _mm512_shuffle_f32x4(c, d, 0xdd);
    }
    B2_UNROLL
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_f32x4(quads[i], quads[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_f32x4(quads[i], quads[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_f32x4(quads[i + 4], quads[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_f32x4(quads[i + 4], quads[i + 12], 0xdd);
    }
}

#elif defined(B2_SIMD_AVX2)

#include <immintrin.h>

enum { VW = 8 };
typedef __m256 vf;

B2_INLINE vf v_load(const float *p) { return _mm256_loadu_ps(p); }
B2_INLINE void v_store(float *p, vf a) { _mm256_storeu_ps(p, a); }
B2_INLINE vf v_set1(float a) { return _mm256_set1_ps(a); }
B2_INLINE vf v_add(vf a, vf b) { return _mm256_add_ps(a, b); }
B2_INLINE vf v_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
B2_INLINE vf v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
B2_INLINE vf v_div(vf a, vf b) { return _mm256_div_ps(a, b); }
B2_INLINE vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
B2_INLINE vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); }
B2_INLINE vf v_min(vf a, vf b) { return _mm256_min_ps(a, b); }
B2_INLINE vf v_round(vf a) { return _mm256_round_ps(a, 8); }
B2_INLINE vf v_abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
B2_INLINE vf v_pow2(__m256i n)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
/* Two steps, so that subnormal results come out right. */
B2_INLINE vf v_ldexp(vf a, vf n)
{
    __m256i whole = _mm256_cvtps_epi32(n);
    __m256i half = _mm256_srai_epi32(whole, 1);
    return _mm256_mul_ps(_mm256_mul_ps(a, v_pow2(half)), v_pow2(_mm256_sub_epi32(whole, half)));
}
B2_INLINE vf v_if_less(vf a, vf b, vf x, vf y)
{
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
B2_INLINE vf v_copysign(vf magnitude, vf sign)
{
    __m256 mask = _mm256_set1_ps(-0.0f);
    return _mm256_or_ps(_mm256_andnot_ps(mask, magnitude), _mm256_and_ps(mask, sign));
}
B2_INLINE int v_any_greater(vf a, vf b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0; }
B2_INLINE vf v_load_f16(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
B2_INLINE vf v_load_bf16(const void *p)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
B2_INLINE vf v_load_first(const void *p)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i *)p), 16));
}
B2_INLINE vf v_load_second(const void *p)
{
    return _mm256_castsi256_ps(
        _mm256_and_si256(_mm256_loadu_si256((const __m256i *)p), _mm256_set1_epi32((int)0xffff0000u)));
}
B2_INLINE void v_transpose(vf r[VW])
{
    vf t[VW];
    B2_UNROLL
    for (int i = 0; i < VW; i += 4) {
        vf a = _mm256_unpacklo_ps(r[i], r[i + 1]), b = _mm256_unpackhi_ps(r[i], r[i + 1]);
        vf c = _mm256_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
        t[i] = _mm256_shuffle_ps(a, c, 0x44);
        t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
        t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
        t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
    B2_UNROLL
    for (int i = 0; i < 4; i++) {
        r[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
    }
}

#else

enum { VW = 4 };
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));

B2_INLINE vf v_load(const float *p)
{
    vf a;
    memcpy(&a, p, sizeof a);
    return a;
}
B2_INLINE void v_store(float *p, vf a) { memcpy(p, &a, sizeof a); }
B2_INLINE vf v_set1(float a) { return (vf){a, a, a, a}; }
B2_INLINE vf v_add(vf a, vf b) { return a + b; }
B2_INLINE vf v_sub(vf a, vf b) { return a - b; }
B2_INLINE vf v_mul(vf a, vf b) { return a * b; }
B2_INLINE vf v_div(vf a, vf b) { return a / b; }
B2_INLINE vf v_fma(vf a, vf b, vf c) { return a * b + c; }
B2_INLINE vf v_choose(vi mask, vf x, vf y) { return (vf)((mask & (vi)x) | (~mask & (vi)y)); }
B2_INLINE vf v_max(vf a, vf b) { return v_choose((vi)(a > b), a, b); }
B2_INLINE vf v_min(vf a, vf b) { return v_choose((vi)(a < b), a, b); }
B2_INLINE vf v_if_less(vf a, vf b, vf x, vf y) { return v_choose((vi)(a < b), x, y); }
/* For |a| < 2^22: adding 1.5 * 2^23 leaves no bits behind the point. */
B2_INLINE vf v_round(vf a) { return (a + v_set1(12582912.0f)) - v_set1(12582912.0f); }
B2_INLINE vf v_abs(vf a) { return (vf)((vi)a & 0x7fffffff); }
B2_INLINE vf v_pow2(vi n) { return (vf)((n + 127) << 23); }
B2_INLINE vf v_ldexp(vf a, vf n)
{
    vi whole = (vi)(n + v_set1(12582912.0f)) - (vi)v_set1(12582912.0f);
    vi half = whole >> 1;
    return a * v_pow2(half) * v_pow2(whole - half);
}
B2_INLINE vf v_copysign(vf magnitude, vf sign)
{
    return (vf)(((vi)magnitude & 0x7fffffff) | ((vi)sign & (int32_t)0x80000000));
}
B2_INLINE int v_any_greater(vf a, vf b)
{
    vi mask = (vi)(a > b);
    return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
}
B2_INLINE vf v_load_f16(const void *p)
{
    uint16_t h[4];
    memcpy(h, p, sizeof h);
    return (vf){b2_f16_to_f32(h[0]), b2_f16_to_f32(h[1]), b2_f16_to_f32(h[2]), b2_f16_to_f32(h[3])};
}
B2_INLINE vf v_load_bf16(const void *p)
{
    uint16_t h[4];
    memcpy(h, p, sizeof h);
    return (vf){b2_bf16_to_f32(h[0]), b2_bf16_to_f32(h[1]), b2_bf16_to_f32(h[2]), b2_bf16_to_f32(h[3])};
}
B2_INLINE vf v_load_first(const void *p)
{
    uint16_t h[8];
    memcpy(h, p, sizeof h);
    return (vf){b2_bf16_to_f32(h[0]), b2_bf16_to_f32(h[2]), b2_bf16_to_f32(h[4]), b2_bf16_to_f32(h[6])};
}
B2_INLINE vf v_load_second(const void *p)
{
    uint16_t h[8];
    memcpy(h, p, sizeof h);
    return (vf){b2_bf16_to_f32(h[1]), b2_bf16_to_f32(h[3]), b2_bf16_to_f32(h[5]), b2_bf16_to_f32(h[7])};
}
B2_INLINE void v_transpose(vf r[VW])
{
    vf a = r[0], b = r[1], c = r[2], d = r[3];
    for (int i = 0; i < VW; i++)
        r[i] = (vf){a[i], b[i], c[i], d[i]};
}

#endif

enum { NV = B2_PANEL / VW }; /* vectors per panel row */

B2_INLINE vf v_load_as(const void *p, b2_dtype dtype)
{
    if (dtype == B2_F16)
        return v_load_f16(p);
    return dtype == B2_BF16 ? v_load_bf16(p) : v_load(p);
}

/* Sixteen lanes, whatever the width of a register: reductions add element j to lane j mod 16, then fold the lanes in
 * this one order. */
typedef struct lanes {
    vf v[NV];
} lanes;

B2_INLINE lanes lanes_set1(float a)
{
    lanes l;
    B2_UNROLL
    for (int i = 0; i < NV; i++)
        l.v[i] = v_set1(a);
    return l;
}

B2_INLINE lanes lanes_load(const float *p)
{
    lanes l;
    B2_UNROLL
    for (int i = 0; i < NV; i++)
        l.v[i] = v_load(p + i * VW);
    return l;
}

B2_INLINE void lanes_store(float *p, lanes l)
{
    B2_UNROLL
    for (int i = 0; i < NV; i++)
        v_store(p + i * VW, l.v[i]);
}

/* The first `count` of sixteen, the rest `filling`. */
B2_INLINE lanes lanes_load_part(const float *p, int64_t count, float filling)
{
    float t[B2_PANEL];
    for (int i = 0; i < B2_PANEL; i++)
        t[i] = i < count ? p[i] : filling;
    return lanes_load(t);
}

B2_INLINE float lanes_sum(lanes l)
{
    float t[B2_PANEL];
    lanes_store(t, l);
    for (int step = B2_PANEL / 2; step > 0; step /= 2)
        for (int i = 0; i < step; i++)
            t[i] += t[i + step];
    return t[0];
}

/* NaN if a lane is NaN. */
B2_INLINE float lanes_max(lanes l)
{
    float t[B2_PANEL];
    lanes_store(t, l);
    float best = t[0];
    for (int i = 1; i < B2_PANEL; i++)
        best = t[i] > best || t[i] != t[i] ? t[i] : best;
    return best;
}

#endif
