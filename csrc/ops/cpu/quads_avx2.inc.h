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

/* Ten sums, two operands of weights, x, a product and a mask are fifteen of sixteen registers, and GCC spills half of them:
 * written out. Sums in ymm0 to ymm9, weights in ymm12 and ymm13, x in ymm14, a product in ymm15, the mask in one of the
 * others. Weights are unpacked once for all rows.
 *
 * DO(row, its two sums) for each row. */
#define ROWS_1(DO, AT) DO(AT, 0, 0, 1)
#define ROWS_2(DO, AT) ROWS_1(DO, AT) DO(AT, 1, 2, 3)
#define ROWS_3(DO, AT) ROWS_2(DO, AT) DO(AT, 2, 4, 5)
#define ROWS_4(DO, AT) ROWS_3(DO, AT) DO(AT, 3, 6, 7)
#define ROWS_5(DO, AT) ROWS_4(DO, AT) DO(AT, 4, 8, 9)

#define ZERO(AT, r, i0, i1)                                                                                         \
    "vpxor %%xmm" #i0 ", %%xmm" #i0 ", %%xmm" #i0 "\n\t"                                                            \
    "vpxor %%xmm" #i1 ", %%xmm" #i1 ", %%xmm" #i1 "\n\t"
#define OFFSET(AT, r, i0, i1)                                                                                       \
    "vpbroadcastd 4*" #r "(%[offsets]), %%ymm" #i0 "\n\t"                                                          \
    "vmovdqa %%ymm" #i0 ", %%ymm" #i1 "\n\t"
/* The pair of x at 8 * row + AT */
#define MULTIPLY(AT, r, i0, i1)                                                                                     \
    "vpbroadcastd 8*" #r "+" AT ", %%ymm14\n\t"                                                                    \
    "vpmaddwd %%ymm12, %%ymm14, %%ymm15\n\t"                                                                       \
    "vpmaddwd %%ymm13, %%ymm14, %%ymm14\n\t"                                                                       \
    "vpaddd %%ymm15, %%ymm" #i0 ", %%ymm" #i0 "\n\t"                                                               \
    "vpaddd %%ymm14, %%ymm" #i1 ", %%ymm" #i1 "\n\t"
#define STORE(AT, r, i0, i1)                                                                                        \
    "vmovdqu %%ymm" #i0 ", 64*" #r "(%[out])\n\t"                                                                  \
    "vmovdqu %%ymm" #i1 ", 64*" #r "+32(%[out])\n\t"
#define ADD_SCALED(AT, r, i0, i1)                                                                                   \
    "vcvtdq2ps %%ymm" #i0 ", %%ymm" #i0 "\n\t"                                                                     \
    "vcvtdq2ps %%ymm" #i1 ", %%ymm" #i1 "\n\t"                                                                     \
    "vfmadd213ps 64*" #r "(%[c]), %%ymm12, %%ymm" #i0 "\n\t"                                                       \
    "vfmadd213ps 64*" #r "+32(%[c]), %%ymm13, %%ymm" #i1 "\n\t"                                                    \
    "vmovups %%ymm" #i0 ", 64*" #r "(%[c])\n\t"                                                                    \
    "vmovups %%ymm" #i1 ", 64*" #r "+32(%[c])\n\t"

/* Weights in ymm12 and ymm13 */
#define MASKED                                                                                                      \
    "vpand (%[w]), %[mask], %%ymm12\n\t"                                                                           \
    "vpand 32(%[w]), %[mask], %%ymm13\n\t"
#define SHIFTED(BITS)                                                                                               \
    "vmovdqu (%[w]), %%ymm12\n\t"                                                                                  \
    "vmovdqu 32(%[w]), %%ymm13\n\t"                                                                                \
    "vpsrlw $" #BITS ", %%ymm12, %%ymm12\n\t"                                                                      \
    "vpsrlw $" #BITS ", %%ymm13, %%ymm13\n\t"
#define SHIFTED_AND_MASKED(BITS)                                                                                    \
    SHIFTED(BITS)                                                                                                   \
    "vpand %[mask], %%ymm12, %%ymm12\n\t"                                                                          \
    "vpand %[mask], %%ymm13, %%ymm13\n\t"
#define CLOBBERED                                                                                                   \
    "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm12",        \
        "xmm13", "xmm14", "xmm15"

/* x: the first of R rows, quads lie `distance` bytes apart.
 * sum_i8: out [R][16] = sums of (q + 128) * X over `quads` quads.
 * add_i4: c [R][16] += scales * (sums of (q + 8) * X over a block + offset). */
#define DEFINE_SUMS(R)                                                                                              \
    static void sum_i8_##R(int32_t *out, const char *x, int64_t distance, const uint8_t *w, int64_t quads)          \
    {                                                                                                               \
        const __m256i mask = _mm256_set1_epi16(255);                                            \
        __asm__ volatile(ROWS_##R(ZERO, ) "1:\n\t"                                                                 \
                         "prefetcht0 %c[ahead](%[w])\n\t"                                                          \
                         MASKED ROWS_##R(MULTIPLY, "0(%[x])")                                                        \
                         SHIFTED(8) ROWS_##R(MULTIPLY, "4(%[x])")                                                   \
                         "add %[distance], %[x]\n\t"                                                               \
                         "add $64, %[w]\n\t"                                                                       \
                         "dec %[quads]\n\t"                                                                        \
                         "jnz 1b\n\t" ROWS_##R(STORE, )                                                            \
                         : [x] "+&r"(x), [w] "+&r"(w), [quads] "+&r"(quads)                                         \
                         : [out] "r"(out), [distance] "r"(distance), [ahead] "i"(AHEAD), [mask] "x"(mask)                  \
                         : CLOBBERED);                                                                              \
    }                                                                                                               \
    static void add_i4_##R(float *c, const char *x, int64_t distance, const uint8_t *w, const int32_t *offsets,     \
                           const uint16_t *scales)                                                                  \
    {                                                                                                               \
        const __m256i mask = _mm256_set1_epi16(15);                                             \
        int64_t pairs = QUADS_PER_BLOCK / 2;                                                                        \
        __asm__ volatile(ROWS_##R(OFFSET, ) "1:\n\t"                                                               \
                         "prefetcht0 %c[ahead](%[w])\n\t"                                                          \
                         MASKED ROWS_##R(MULTIPLY, "0(%[x])")                                                        \
                         SHIFTED_AND_MASKED(8) ROWS_##R(MULTIPLY, "4(%[x])")                                        \
                         "add %[distance], %[x]\n\t"                                                               \
                         SHIFTED_AND_MASKED(4) ROWS_##R(MULTIPLY, "0(%[x])")                                         \
                         SHIFTED(12) ROWS_##R(MULTIPLY, "4(%[x])")                                                  \
                         "add %[distance], %[x]\n\t"                                                               \
                         "add $64, %[w]\n\t"                                                                       \
                         "dec %[pairs]\n\t"                                                                        \
                         "jnz 1b\n\t"                                                                              \
                         "vcvtph2ps (%[scales]), %%ymm12\n\t"                                                      \
                         "vcvtph2ps 16(%[scales]), %%ymm13\n\t" ROWS_##R(ADD_SCALED, )                             \
                         : [x] "+&r"(x), [w] "+&r"(w), [pairs] "+&r"(pairs)                                         \
                         : [c] "r"(c), [distance] "r"(distance), [offsets] "r"(offsets), [scales] "r"(scales),      \
                           [ahead] "i"(AHEAD), [mask] "x"(mask)                                                            \
                         : CLOBBERED);                                                                              \
    }

DEFINE_SUMS(1)
DEFINE_SUMS(2)
DEFINE_SUMS(3)
DEFINE_SUMS(4)
DEFINE_SUMS(5)

/* acc [rows][16] over blocks [first, first + count) of I8 */
static void sum_rows(int32_t *acc, const b2_quad_rows *x, const b2_quad_panels *w, int64_t first, int64_t count)
{
    typedef void (*sum_fn)(int32_t *, const char *, int64_t, const uint8_t *, int64_t);
    static const sum_fn sums_of[ROWS_AT_ONCE] = {sum_i8_1, sum_i8_2, sum_i8_3, sum_i8_4, sum_i8_5};
    int64_t distance = (int64_t)x->rows * X_BYTES;
    const char *values = (const char *)x->values + first * QUADS_PER_BLOCK * distance;
    const uint8_t *from = w->data + first * block_bytes(B2_I8);
    for (int r = 0; r < x->rows; r += ROWS_AT_ONCE) {
        int rows = x->rows - r < ROWS_AT_ONCE ? x->rows - r : ROWS_AT_ONCE;
        sums_of[rows - 1](acc + r * B2_PANEL, values + r * X_BYTES, distance, from, count * QUADS_PER_BLOCK);
    }
}

static void stream_i4(float *c, const b2_quad_rows *x, const b2_quad_panels *w)
{
    typedef void (*add_fn)(float *, const char *, int64_t, const uint8_t *, const int32_t *, const uint16_t *);
    static const add_fn adds_of[ROWS_AT_ONCE] = {add_i4_1, add_i4_2, add_i4_3, add_i4_4, add_i4_5};
    int64_t distance = (int64_t)x->rows * X_BYTES;
    for (int64_t g = 0; g < w->groups; g++)
        for (int r = 0; r < x->rows; r += ROWS_AT_ONCE) {
            int rows = x->rows - r < ROWS_AT_ONCE ? x->rows - r : ROWS_AT_ONCE;
            const char *values = (const char *)x->values + g * QUADS_PER_BLOCK * distance + r * X_BYTES;
            adds_of[rows - 1](c + r * B2_PANEL, values, distance, w->data + g * block_bytes(B2_I4),
                              x->narrow + g * x->rows + r, (const uint16_t *)w->scales + g * B2_PANEL);
        }
}

/* c [16] += t * scales of the group of I8 */
B2_INLINE void add_scaled(float *c, __m256 t0, __m256 t1, const b2_quad_panels *w, int64_t group)
{
    const float *scales = (const float *)w->scales + group * B2_PANEL;
    v_store(c, v_fma(v_load(scales), t0, v_load(c)));
    v_store(c + VW, v_fma(v_load(scales + VW), t1, v_load(c + VW)));
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
    else if (w->dtype == B2_I4)
        stream_i4(c, x, w);
    else
        stream_narrow(c, x, w);
    for (int i = 0; i < x->rows * B2_PANEL; i++)
        c[i] *= x->scales[i / B2_PANEL];
}
