/* AVX2: four X as 16 bits in the order 0, 2, 1, 3, because the even bytes of a weight word stand under one mask and the odd
 * ones behind one shift: pmaddwd then leaves whole sums of a channel in its own lane. Unsigned weights: their part
 * of 128 or 8 is taken off with the offsets.
 *
 * The weights of a step come from memory once and from L1 for further rows. */

enum {
    WIDE_STEP = 8,  /* blocks whose sum of (q + 128) * X fits into 32 bits: 255 * 32639 * 256 < 2^31 */
    ROWS_AT_ONCE = 5,
    AHEAD = 2048    /* bytes to prefetch */
};

static void store_block(char *to, const int32_t whole[B2_QUAD_BLOCK], size_t distance)
{
    for (int q = 0; q < QUADS_PER_BLOCK; q += 2) {
        __m256i two = _mm256_loadu_si256((const __m256i *)(const void *)(whole + 4 * q));
        __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1));
        words = _mm_shufflehi_epi16(_mm_shufflelo_epi16(words, 0xd8), 0xd8); /* 0, 2, 1, 3 */
        _mm_storel_epi64((__m128i *)(void *)(to + (size_t)q * distance), words);
        _mm_storel_epi64((__m128i *)(void *)(to + (size_t)(q + 1) * distance), _mm_unpackhi_epi64(words, words));
    }
}

static int stream_panels(b2_dtype dtype, int rows)
{
    (void)dtype;
    (void)rows;
    return 1;
}

B2_INLINE __m256i pair_at(const char *x)
{
    int32_t pair;
    memcpy(&pair, x, sizeof pair);
    return _mm256_set1_epi32(pair);
}

B2_INLINE __m256i add_pairs(__m256i acc, __m256i w, const char *x)
{
    return _mm256_add_epi32(acc, _mm256_madd_epi16(w, pair_at(x)));
}

/* out [rows][16] = sums over `blocks` blocks of I8; x: the first of `rows` rows, quads lie `distance` bytes apart */
B2_INLINE void sum_i8(int32_t *out, const char *x, int64_t distance, const uint8_t *w, int64_t blocks, const int rows)
{
    const __m256i even_bytes = _mm256_set1_epi16(255);
    __m256i acc[2 * ROWS_AT_ONCE];
    B2_UNROLL
    for (int i = 0; i < 2 * rows; i++)
        acc[i] = _mm256_setzero_si256();
    for (int64_t q = 0; q < blocks * QUADS_PER_BLOCK; q++, w += 64, x += distance) {
        __builtin_prefetch(w + AHEAD);
        B2_UNROLL
        for (int h = 0; h < 2; h++) {
            __m256i both = _mm256_loadu_si256((const __m256i *)(const void *)(w + 32 * h));
            __m256i even = _mm256_and_si256(both, even_bytes), odd = _mm256_srli_epi16(both, 8);
            B2_UNROLL
            for (int r = 0; r < rows; r++) {
                acc[2 * r + h] = add_pairs(acc[2 * r + h], even, x + r * X_BYTES);
                acc[2 * r + h] = add_pairs(acc[2 * r + h], odd, x + r * X_BYTES + 4);
            }
        }
    }
    B2_UNROLL
    for (int i = 0; i < 2 * rows; i++)
        _mm256_storeu_si256((__m256i *)(void *)(out + 8 * i), acc[i]);
}

/* The same of one block of I4. */
B2_INLINE void sum_i4(int32_t *out, const char *x, int64_t distance, const uint8_t *w, int64_t blocks, const int rows)
{
    const __m256i nibbles = _mm256_set1_epi16(15);
    __m256i acc[2 * ROWS_AT_ONCE];
    B2_UNROLL
    for (int i = 0; i < 2 * rows; i++)
        acc[i] = _mm256_setzero_si256();
    for (int64_t q = 0; q < blocks * QUADS_PER_BLOCK / 2; q++, w += 64, x += 2 * distance) {
        __builtin_prefetch(w + AHEAD);
        B2_UNROLL
        for (int h = 0; h < 2; h++) {
            __m256i all = _mm256_loadu_si256((const __m256i *)(const void *)(w + 32 * h));
            __m256i n0 = _mm256_and_si256(all, nibbles), n1 = _mm256_and_si256(_mm256_srli_epi16(all, 8), nibbles);
            __m256i n2 = _mm256_and_si256(_mm256_srli_epi16(all, 4), nibbles), n3 = _mm256_srli_epi16(all, 12);
            B2_UNROLL
            for (int r = 0; r < rows; r++) {
                const char *low = x + r * X_BYTES, *high = low + distance;
                __m256i sum = add_pairs(add_pairs(acc[2 * r + h], n0, low), n1, low + 4);
                acc[2 * r + h] = add_pairs(add_pairs(sum, n2, high), n3, high + 4);
            }
        }
    }
    B2_UNROLL
    for (int i = 0; i < 2 * rows; i++)
        _mm256_storeu_si256((__m256i *)(void *)(out + 8 * i), acc[i]);
}

#define DEFINE_SUM(R)                                                                                               \
    static void sum_##R(int32_t *out, const char *x, int64_t distance, const uint8_t *w, int64_t blocks,            \
                        b2_dtype dtype)                                                                             \
    {                                                                                                               \
        if (dtype == B2_I8)                                                                                         \
            sum_i8(out, x, distance, w, blocks, R);                                                                 \
        else                                                                                                        \
            sum_i4(out, x, distance, w, blocks, R);                                                                 \
    }

DEFINE_SUM(1)
DEFINE_SUM(2)
DEFINE_SUM(3)
DEFINE_SUM(4)
DEFINE_SUM(5)

typedef void (*sum_fn)(int32_t *, const char *, int64_t, const uint8_t *, int64_t, b2_dtype);

static const sum_fn sums_of[ROWS_AT_ONCE] = {sum_1, sum_2, sum_3, sum_4, sum_5};

/* acc [rows][16] over blocks [first, first + count) */
static void sum_rows(int32_t *acc, const b2_quad_rows *x, const b2_quad_panels *w, int64_t first, int64_t count)
{
    int64_t distance = (int64_t)x->rows * X_BYTES;
    const char *values = (const char *)x->values + first * QUADS_PER_BLOCK * distance;
    const uint8_t *from = w->data + first * block_bytes(w->dtype);
    for (int r = 0; r < x->rows; r += ROWS_AT_ONCE) {
        int rows = x->rows - r < ROWS_AT_ONCE ? x->rows - r : ROWS_AT_ONCE;
        sums_of[rows - 1](acc + r * B2_PANEL, values + r * X_BYTES, distance, from, count, w->dtype);
    }
}

/* c [16] += t * scales of the group */
B2_INLINE void add_scaled(float *c, __m256 t0, __m256 t1, const b2_quad_panels *w, int64_t group)
{
    int64_t at = group * B2_PANEL;
    const float *wide = (const float *)w->scales + at;
    const uint16_t *half = (const uint16_t *)w->scales + at;
    __m256 s0 = w->dtype == B2_I8 ? v_load(wide) : v_load_f16(half);
    __m256 s1 = w->dtype == B2_I8 ? v_load(wide + VW) : v_load_f16(half + VW);
    v_store(c, v_fma(s0, t0, v_load(c)));
    v_store(c + VW, v_fma(s1, t1, v_load(c + VW)));
}

B2_INLINE __m256i load_whole(const int32_t *p)
{
    return _mm256_loadu_si256((const __m256i *)(const void *)p);
}

static void stream_narrow(float *c, const b2_quad_rows *x, const b2_quad_panels *w)
{
    int32_t acc[B2_QUAD_FEW_ROWS * B2_PANEL];
    for (int64_t g = 0; g < w->groups; g++) {
        int64_t first = g * w->group_blocks, left = w->blocks - first;
        sum_rows(acc, x, w, first, left < w->group_blocks ? left : w->group_blocks);
        for (int r = 0; r < x->rows; r++) {
            __m256i offset = _mm256_set1_epi32(x->narrow[g * x->rows + r]);
            const int32_t *a = acc + r * B2_PANEL;
            add_scaled(c + r * B2_PANEL, _mm256_cvtepi32_ps(_mm256_add_epi32(load_whole(a), offset)),
                       _mm256_cvtepi32_ps(_mm256_add_epi32(load_whole(a + VW), offset)), w, g);
        }
    }
}

static void stream_wide(float *c, const b2_quad_rows *x, const b2_quad_panels *w)
{
    int32_t acc[B2_QUAD_FEW_ROWS * B2_PANEL];
    double total[B2_QUAD_FEW_ROWS * B2_PANEL];
    for (int64_t g = 0; g < w->groups; g++) {
        int64_t end = (g + 1) * w->group_blocks < w->blocks ? (g + 1) * w->group_blocks : w->blocks;
        for (int i = 0; i < x->rows * B2_PANEL; i++)
            total[i] = x->wide[g * x->rows + i / B2_PANEL];
        for (int64_t b = g * w->group_blocks; b < end; b += WIDE_STEP) {
            sum_rows(acc, x, w, b, end - b < WIDE_STEP ? end - b : WIDE_STEP);
            for (int i = 0; i < x->rows * B2_PANEL; i++)
                total[i] += acc[i];
        }
        for (int r = 0; r < x->rows; r++) {
            const double *t = total + r * B2_PANEL;
            __m128 q[4];
            for (int i = 0; i < 4; i++)
                q[i] = _mm256_cvtpd_ps(_mm256_loadu_pd(t + 4 * i));
            add_scaled(c + r * B2_PANEL, _mm256_set_m128(q[1], q[0]), _mm256_set_m128(q[3], q[2]), w, g);
        }
    }
}

static void stream(float *c, const b2_quad_rows *x, const b2_quad_panels *w, int panels)
{
    (void)panels; /* always 1 */
    memset(c, 0, (size_t)x->rows * B2_PANEL * sizeof *c);
    if (x->wide)
        stream_wide(c, x, w);
    else
        stream_narrow(c, x, w);
    for (int i = 0; i < x->rows * B2_PANEL; i++)
        c[i] *= x->scales[i / B2_PANEL];
}
