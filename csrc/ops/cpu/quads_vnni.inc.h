/* AVX-512 with VNNI: X as 256 * high + low, four high bytes and then four low ones; vpdpbusd multiplies them with the
 * same weights in a register. Its sums of (q + 128) * byte stay inside 32 bits up to k = 65536 and wrap harmlessly where T itself
 * fits. */

enum { AHEAD = 4096 }; /* bytes to prefetch */

static void store_block(char *to, const int32_t whole[B2_QUAD_BLOCK], size_t distance)
{
    for (int h = 0; h < 2; h++) {
        __m512i x = _mm512_loadu_si512(whole + 16 * h);
        __m512i high = _mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(128)), 8);
        __m512i low = _mm512_sub_epi32(x, _mm512_slli_epi32(high, 8));
        __m128i a = _mm512_cvtepi32_epi8(high), b = _mm512_cvtepi32_epi8(low);
        __m128i quads01 = _mm_unpacklo_epi32(a, b), quads23 = _mm_unpackhi_epi32(a, b);
        char *at = to + (size_t)(4 * h) * distance;
        _mm_storel_epi64((__m128i *)(void *)at, quads01);
        _mm_storel_epi64((__m128i *)(void *)(at + distance), _mm_unpackhi_epi64(quads01, quads01));
        _mm_storel_epi64((__m128i *)(void *)(at + 2 * distance), quads23);
        _mm_storel_epi64((__m128i *)(void *)(at + 3 * distance), _mm_unpackhi_epi64(quads23, quads23));
    }
}

/* acc += four unsigned bytes of w times the four signed ones at x, in each of sixteen lanes. Written out because the
 * compiler would spend a register and an instruction on the broadcast. */
B2_INLINE __m512i dot(__m512i acc, __m512i w, const char *x)
{
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*(const char(*)[4])x));
    return acc;
}

static int stream_panels(b2_dtype dtype, int rows)
{
    return dtype == B2_I8 ? (rows <= 7 ? 2 : 1) : rows <= 2 ? 2 : 1;
}

/* float(256 * high + low + offset), the sum exact in double */
B2_INLINE __m512 wide_total(__m512i high, __m512i low, double offset)
{
    __m512d base = _mm512_set1_pd(offset), factor = _mm512_set1_pd(256.0);
    __m512d t0 = _mm512_fmadd_pd(_mm512_cvtepi32_pd(_mm512_castsi512_si256(high)), factor,
                                 _mm512_cvtepi32_pd(_mm512_castsi512_si256(low)));
    __m512d t1 = _mm512_fmadd_pd(_mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(high, 1)), factor,
                                 _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(low, 1)));
    __m256 f0 = _mm512_cvtpd_ps(_mm512_add_pd(t0, base)), f1 = _mm512_cvtpd_ps(_mm512_add_pd(t1, base));
    return _mm512_insertf32x8(_mm512_castps256_ps512(f0), f1, 1);
}

/* float(256 * high + low), the sum in 32 bits: low began with the offset */
B2_INLINE __m512 narrow_total(__m512i high, __m512i low)
{
    return _mm512_cvtepi32_ps(_mm512_add_epi32(low, _mm512_slli_epi32(high, 8)));
}

B2_INLINE void stream_i8(float *restrict c, const b2_quad_rows *x, const b2_quad_panels *w, const int rows,
                         const int panels, const int wide)
{
    const int64_t panel_bytes = w->blocks * block_bytes(B2_I8);
    const char *values = x->values;
    for (int64_t g = 0; g < w->groups; g++) {
        int64_t first = g * w->group_blocks, end = first + w->group_blocks < w->blocks ? first + w->group_blocks : w->blocks;
        __m512i high[B2_QUAD_FEW_ROWS], low[B2_QUAD_FEW_ROWS];
        B2_UNROLL
        for (int i = 0; i < rows * panels; i++) {
            high[i] = _mm512_setzero_si512();
            low[i] = wide ? high[i] : _mm512_set1_epi32(x->narrow[g * rows + i / panels]);
        }
        const char *xq = values + first * QUADS_PER_BLOCK * rows * X_BYTES;
        const uint8_t *at = w->data + first * block_bytes(B2_I8), *stop = w->data + end * block_bytes(B2_I8);
        for (; at < stop; at += 64, xq += rows * X_BYTES) {
            B2_UNROLL
            for (int p = 0; p < panels; p++) {
                const uint8_t *from = at + p * panel_bytes;
                __builtin_prefetch(from + AHEAD);
                __m512i weights = _mm512_loadu_si512(from);
                B2_UNROLL
                for (int r = 0; r < rows; r++) {
                    high[r * panels + p] = dot(high[r * panels + p], weights, xq + r * X_BYTES);
                    low[r * panels + p] = dot(low[r * panels + p], weights, xq + r * X_BYTES + 4);
                }
            }
        }
        B2_UNROLL
        for (int i = 0; i < rows * panels; i++) {
            const float *scales = (const float *)w->scales + (i % panels * w->groups + g) * B2_PANEL;
            __m512 t = wide ? wide_total(high[i], low[i], x->wide[g * rows + i / panels]) : narrow_total(high[i], low[i]);
            __m512 sum = g == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(c + i * B2_PANEL);
            _mm512_storeu_ps(c + i * B2_PANEL, _mm512_fmadd_ps(_mm512_loadu_ps(scales), t, sum));
        }
    }
    B2_UNROLL
    for (int i = 0; i < rows * panels; i++)
        _mm512_storeu_ps(c + i * B2_PANEL,
                         _mm512_mul_ps(_mm512_loadu_ps(c + i * B2_PANEL), _mm512_set1_ps(x->scales[i / panels])));
}

B2_INLINE void stream_i4(float *restrict c, const b2_quad_rows *x, const b2_quad_panels *w, const int rows,
                         const int panels)
{
    const int64_t panel_bytes = w->blocks * block_bytes(B2_I4), panel_scales = w->groups * B2_PANEL;
    const __m512i mask = _mm512_set1_epi8(15);
    const uint8_t *at = w->data;
    const uint16_t *scales = w->scales;
    const char *xq = x->values;
    const int32_t *offsets = x->narrow;
    __m512 sum[B2_QUAD_FEW_ROWS];
    B2_UNROLL
    for (int i = 0; i < rows * panels; i++)
        sum[i] = _mm512_setzero_ps();
    for (int64_t g = 0; g < w->groups; g++) {
        B2_UNROLL
        for (int p = 0; p < panels; p++) {
            const uint8_t *from = at + p * panel_bytes;
            const uint16_t *scale_from = scales + p * panel_scales;
            __m512i n[QUADS_PER_BLOCK];
            __builtin_prefetch(scale_from + 512);
            B2_UNROLL
            for (int q = 0; q < QUADS_PER_BLOCK; q += 2) {
                __builtin_prefetch(from + q * 32 + AHEAD);
                __m512i both = _mm512_loadu_si512(from + q * 32);
                n[q] = _mm512_and_si512(both, mask);
                n[q + 1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
            }
            __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)scale_from));
            B2_UNROLL
            for (int r = 0; r < rows; r++) {
                __m512i high = _mm512_setzero_si512(), low = _mm512_set1_epi32(offsets[r]);
                B2_UNROLL
                for (int q = 0; q < QUADS_PER_BLOCK; q++) {
                    high = dot(high, n[q], xq + (q * rows + r) * X_BYTES);
                    low = dot(low, n[q], xq + (q * rows + r) * X_BYTES + 4);
                }
                sum[r * panels + p] = _mm512_fmadd_ps(scale, narrow_total(high, low), sum[r * panels + p]);
            }
        }
        at += block_bytes(B2_I4);
        scales += B2_PANEL;
        xq += QUADS_PER_BLOCK * rows * X_BYTES;
        offsets += rows;
    }
    B2_UNROLL
    for (int i = 0; i < rows * panels; i++)
        _mm512_storeu_ps(c + i * B2_PANEL, _mm512_mul_ps(sum[i], _mm512_set1_ps(x->scales[i / panels])));
}

/* One function per number of rows: the bounds become constants. */
#define DEFINE_STREAM(R)                                                                                            \
    static void stream_##R(float *c, const b2_quad_rows *x, const b2_quad_panels *w, int panels)                    \
    {                                                                                                               \
        if (w->dtype == B2_I4 && panels == 2 && R <= 2)                                                             \
            stream_i4(c, x, w, R, R <= 2 ? 2 : 1);                                                                  \
        else if (w->dtype == B2_I4)                                                                                 \
            stream_i4(c, x, w, R, 1);                                                                               \
        else if (panels == 2 && R <= 7 && x->wide)                                                                  \
            stream_i8(c, x, w, R, R <= 7 ? 2 : 1, 1);                                                               \
        else if (panels == 2 && R <= 7)                                                                             \
            stream_i8(c, x, w, R, R <= 7 ? 2 : 1, 0);                                                               \
        else if (x->wide)                                                                                           \
            stream_i8(c, x, w, R, 1, 1);                                                                            \
        else                                                                                                        \
            stream_i8(c, x, w, R, 1, 0);                                                                            \
    }

DEFINE_STREAM(1)
DEFINE_STREAM(2)
DEFINE_STREAM(3)
DEFINE_STREAM(4)
DEFINE_STREAM(5)
DEFINE_STREAM(6)
DEFINE_STREAM(7)
DEFINE_STREAM(8)
DEFINE_STREAM(9)
DEFINE_STREAM(10)
DEFINE_STREAM(11)
DEFINE_STREAM(12)
DEFINE_STREAM(13)
DEFINE_STREAM(14)
DEFINE_STREAM(15)

typedef void (*stream_fn)(float *, const b2_quad_rows *, const b2_quad_panels *, int);

static const stream_fn streams_of[B2_QUAD_FEW_ROWS] = {
    stream_1, stream_2,  stream_3,  stream_4,  stream_5,  stream_6,  stream_7, stream_8,
    stream_9, stream_10, stream_11, stream_12, stream_13, stream_14, stream_15};

static void stream(float *c, const b2_quad_rows *x, const b2_quad_panels *w, int panels)
{
    streams_of[x->rows - 1](c, x, w, panels);
}
