/* Rounding rows of x to groups of int8. VALUE_BYTES is 1 or 2. Written out for the instruction sets: the compiler's
 * vectors of the plain loops cost 8 % of a vision encoder. */
enum { UNIT = VALUE_BYTES == 1 ? 4 : 2 };

/* Groups whose largest element is smaller count as zeros: their scale would not be a normal number. */
static const float NOTHING = 1e-30f;

/* What a group's largest size, as bits, makes of it. */
B2_INLINE float inverse_of(uint32_t most)
{
    float largest = b2_bits_to_f32(most);
    return largest < NOTHING ? 0.0f : 127.0f / largest;
}

B2_INLINE int is_finite(uint32_t most)
{
    return most < 0x7f800000u;
}

/* NaN where a NaN or Inf is in the group, and so all of the row's results. */
B2_INLINE float scale_of(uint32_t most)
{
    float largest = b2_bits_to_f32(most);
    if (!is_finite(most))
        return b2_bits_to_f32(0x7fc00000u);
    return largest < NOTHING ? 0.0f : largest * (1.0f / 127.0f);
}

/* round_group: x [group] (times `by`, unless NULL) becomes integers, to the nearest, ties to even; v [group] of them as they
 * are stored; returns the largest size as bits, and their sum. Adding 1.5 * 2^23 rounds; what is above it is the integer.
 * Where a NaN or Inf is in the group they are no integers of int8: their sum, which would overflow, is 0. */
#if defined(__AVX512BW__) && VALUE_BYTES == 1
typedef int8_t value;

B2_INLINE uint32_t round_group(value *v, int32_t *sum, const float *x, const float *by, const int group)
{
    __m512 t[B2_QUAD_GROUP_MAX / 16];
    __m512i most = _mm512_setzero_si512(), total = _mm512_setzero_si512();
    for (int i = 0; i < group / 16; i++) {
        t[i] = _mm512_loadu_ps(x + 16 * i);
        t[i] = by ? _mm512_mul_ps(t[i], _mm512_loadu_ps(by + 16 * i)) : t[i];
        most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(t[i]), _mm512_set1_epi32(0x7fffffff)));
    }
    uint32_t bits = _mm512_reduce_max_epu32(most);
    __m512 inverse = _mm512_set1_ps(inverse_of(bits));
    for (int i = 0; i < group / 16; i++) {
        __m512 rounded = _mm512_add_ps(_mm512_mul_ps(t[i], inverse), _mm512_set1_ps(12582912.0f));
        __m512i q = _mm512_sub_epi32(_mm512_castps_si512(rounded), _mm512_set1_epi32(0x4b400000));
        total = _mm512_add_epi32(total, q);
        _mm_storeu_si128((__m128i *)(void *)(v + 16 * i), _mm512_cvtepi32_epi8(q));
    }
    *sum = is_finite(bits) ? _mm512_reduce_add_epi32(total) : 0;
    return bits;
}
#elif defined(__AVX2__)
typedef int16_t value;

B2_INLINE int32_t reduce(__m256i a, const int add)
{
    __m128i b = _mm256_castsi256_si128(a), c = _mm256_extracti128_si256(a, 1);
    b = add ? _mm_add_epi32(b, c) : _mm_max_epu32(b, c);
    c = _mm_shuffle_epi32(b, 0x4e);
    b = add ? _mm_add_epi32(b, c) : _mm_max_epu32(b, c);
    c = _mm_shuffle_epi32(b, 0xb1);
    return _mm_cvtsi128_si32(add ? _mm_add_epi32(b, c) : _mm_max_epu32(b, c));
}

B2_INLINE uint32_t round_group(value *v, int32_t *sum, const float *x, const float *by, const int group)
{
    __m256 t[B2_QUAD_GROUP_MAX / 8];
    __m256i most = _mm256_setzero_si256(), total = _mm256_setzero_si256();
    for (int i = 0; i < group / 8; i++) {
        t[i] = _mm256_loadu_ps(x + 8 * i);
        t[i] = by ? _mm256_mul_ps(t[i], _mm256_loadu_ps(by + 8 * i)) : t[i];
        most = _mm256_max_epu32(most, _mm256_and_si256(_mm256_castps_si256(t[i]), _mm256_set1_epi32(0x7fffffff)));
    }
    uint32_t bits = (uint32_t)reduce(most, 0);
    __m256 inverse = _mm256_set1_ps(inverse_of(bits));
    for (int i = 0; i < group / 8; i++) {
        __m256 rounded = _mm256_add_ps(_mm256_mul_ps(t[i], inverse), _mm256_set1_ps(12582912.0f));
        __m256i q = _mm256_sub_epi32(_mm256_castps_si256(rounded), _mm256_set1_epi32(0x4b400000));
        total = _mm256_add_epi32(total, q);
        /* Of each quad the pairs (0, 2) and (1, 3), side by side. */
        __m256i odd = _mm256_slli_epi32(_mm256_shuffle_epi32(q, 0x4e), 16);
        __m256i pairs = _mm256_permute4x64_epi64(_mm256_blend_epi16(q, odd, 0xaa), 0x08);
        _mm_storeu_si128((__m128i *)(void *)(v + 8 * i), _mm256_castsi256_si128(pairs));
    }
    *sum = is_finite(bits) ? reduce(total, 1) : 0;
    return bits;
}
#else
typedef int16_t value;

B2_INLINE uint32_t round_group(value *v, int32_t *sum, const float *x, const float *by, const int group)
{
    float t[B2_QUAD_GROUP_MAX];
    int32_t q[B2_QUAD_GROUP_MAX];
    uint32_t most = 0;
    *sum = 0;
    for (int i = 0; i < group; i++) {
        t[i] = by ? x[i] * by[i] : x[i];
        uint32_t size = b2_f32_to_bits(t[i]) & 0x7fffffffu;
        most = size > most ? size : most;
    }
    float inverse = inverse_of(most);
    for (int i = 0; i < group; i++) {
        q[i] = (int32_t)(b2_f32_to_bits(t[i] * inverse + 12582912.0f) - 0x4b400000u);
        *sum += (int8_t)q[i];
    }
    for (int i = 0; i < group; i += 4) { /* pairs of even channels and of odd ones */
        v[i] = (int8_t)q[i];
        v[i + 1] = (int8_t)q[i + 2];
        v[i + 2] = (int8_t)q[i + 1];
        v[i + 3] = (int8_t)q[i + 3];
    }
    return most;
}
#endif

/* The group `g` of row `row`, of whose channels `left` are there. */
B2_INLINE void place_group(const b2_quad_block *dst, const float *x, const float *by, int64_t g, int row, int rows,
                           int64_t left, const int group, const int zero)
{
    value v[B2_QUAD_GROUP_MAX];
    int32_t sum;
    uint32_t most = round_group(v, &sum, x, by, group);
    dst->scales[g * rows + row] = scale_of(most);
    dst->offsets[g * rows + row] = -zero * sum;
    char *to = dst->values + (g * group * rows / UNIT + row) * 4;
    int count = (left > group - B2_QUAD_UNIT ? group : B2_QUAD_UNIT) / UNIT;
    for (int i = 0; i < count; i++)
        memcpy(to + (size_t)(i * rows) * 4, (const char *)v + 4 * i, 4);
}

B2_INLINE void round_row(const b2_quad_block *dst, const float *x, int row, int rows, int64_t k,
                         const float *column_scales, const int group, const int zero)
{
    int64_t g = 0;
    for (; (g + 1) * group <= k; g++)
        place_group(dst, x + g * group, column_scales ? column_scales + g * group : NULL, g, row, rows, group, group,
                    zero);
    int64_t left = k - g * group;
    if (left > 0) {
        float t[B2_QUAD_GROUP_MAX] = {0};
        for (int i = 0; i < left; i++)
            t[i] = column_scales ? x[g * group + i] * column_scales[g * group + i] : x[g * group + i];
        place_group(dst, t, NULL, g, row, rows, left, group, zero);
    }
}

static void round_rows(const b2_quad_block *dst, const float *x, int64_t ld, int rows, int64_t k,
                       const float *column_scales, b2_dtype dtype)
{
    for (int r = 0; r < rows; r++) {
        if (dtype == B2_I8)
            round_row(dst, x + r * ld, r, rows, k, column_scales, 64, 128);
        else
            round_row(dst, x + r * ld, r, rows, k, column_scales, 32, 8);
    }
}
