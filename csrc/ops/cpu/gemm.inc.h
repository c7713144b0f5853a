/* Products: c[i][j] = sum over ascending k of a[i][k] * b[j][k], one chain of fused multiply-adds from 0 for every
 * element. All kernels here keep that chain, so they give the same bits.
 *
 * Accumulators live in local arrays whose loops have constant bounds and unroll fully: that keeps them in registers.
 * A loop bound that is not a constant here spills the whole tile. */

#if defined(B2_SIMD_AVX512)
enum { TILE_ROWS = 14, TILE_PANELS = 2 }; /* 28 accumulators + 2 columns + 1 broadcast of 32 registers */
#elif defined(B2_SIMD_AVX2)
enum { TILE_ROWS = 6, TILE_PANELS = 1 }; /* 12 + 2 + 1 of 16 */
#else
enum { TILE_ROWS = 4, TILE_PANELS = 1 };
#endif
enum { TILE_VECTORS = TILE_PANELS * NV, TILE_COLUMNS = TILE_PANELS * B2_PANEL };

/* Stores of whole vectors run over into the next k and are overwritten there; only where they would leave the block
 * are single elements stored. */
B2_INLINE void pack_square(float *dst, const float *x, int64_t ld, int rows, int64_t k, int64_t i)
{
    vf t[VW];
    B2_UNROLL
    for (int r = 0; r < VW; r++)
        t[r] = v_load(x + (r < rows ? r : rows - 1) * ld + i);
    v_transpose(t);
    if ((i + VW - 1) * rows + VW <= k * rows) {
        B2_UNROLL
        for (int j = 0; j < VW; j++)
            v_store(dst + (i + j) * rows, t[j]);
        return;
    }
    for (int j = 0; j < VW; j++) {
        float lane[VW];
        v_store(lane, t[j]);
        for (int r = 0; r < rows; r++)
            dst[(i + j) * rows + r] = lane[r];
    }
}

static void pack_rows(float *dst, const float *x, int64_t ld, int rows, int64_t k)
{
    int64_t i = 0;
    if (rows == 1) {
        memcpy(dst, x, (size_t)k * sizeof *dst);
        return;
    }
    if (rows <= VW)
        for (; i + VW <= k; i += VW)
            pack_square(dst, x, ld, rows, k, i);
    for (; i < k; i++)
        for (int r = 0; r < rows; r++)
            dst[i * rows + r] = x[r * ld + i];
}

/* dst [count][16] = up to 16 rows of fp32 transposed, zeros for those that are missing (NULL). */
B2_INLINE void transpose_rows(float *restrict dst, const float *const rows[B2_PANEL], int64_t count)
{
    int64_t i = 0;
    for (; i + VW <= count; i += VW)
        B2_UNROLL
        for (int g = 0; g < NV; g++) {
            vf t[VW];
            B2_UNROLL
            for (int r = 0; r < VW; r++)
                t[r] = rows[g * VW + r] ? v_load(rows[g * VW + r] + i) : v_set1(0.0f);
            v_transpose(t);
            B2_UNROLL
            for (int j = 0; j < VW; j++)
                v_store(dst + (i + j) * B2_PANEL + g * VW, t[j]);
        }
    for (; i < count; i++)
        for (int r = 0; r < B2_PANEL; r++)
            dst[i * B2_PANEL + r] = rows[r] ? rows[r][i] : 0.0f;
}

B2_INLINE float load_one(const char *p, b2_dtype dtype)
{
    if (dtype == B2_F32) {
        float value;
        memcpy(&value, p, sizeof value);
        return value;
    }
    uint16_t half;
    memcpy(&half, p, sizeof half);
    return dtype == B2_F16 ? b2_f16_to_f32(half) : b2_bf16_to_f32(half);
}

static void widen_rows(float *restrict dst, const void *w, b2_dtype dtype, int64_t k, int64_t rows, int64_t k0,
                       int64_t kc)
{
    int64_t size = (int64_t)b2_dtype_size(dtype);
    if (dtype == B2_F32 && (uintptr_t)w % _Alignof(float) == 0) {
        const float *at[B2_PANEL];
        for (int r = 0; r < B2_PANEL; r++)
            at[r] = r < rows ? (const float *)w + r * k + k0 : NULL;
        transpose_rows(dst, at, kc);
        return;
    }
    for (int64_t r = 0; r < B2_PANEL; r++) {
        const char *row = (const char *)w + (r * k + k0) * size;
        for (int64_t i = 0; i < kc; i++)
            dst[i * B2_PANEL + r] = r < rows ? load_one(row + i * size, dtype) : 0.0f;
    }
}

static void widen_pairs(float *restrict dst, const char *w, int64_t kc)
{
    for (int64_t i = 0; i < kc; i++)
        B2_UNROLL
        for (int v = 0; v < NV; v++) {
            const char *pairs = w + (i / 2 * B2_PANEL + v * VW) * 4;
            v_store(dst + i * B2_PANEL + v * VW, i % 2 ? v_load_second(pairs) : v_load_first(pairs));
        }
}

/* b0, b1 as stored in `dtype`; widened into w0, w1 unless they are fp32. */
B2_INLINE void tile_body(float *restrict c, const float *restrict a, const char *restrict b0, const char *restrict b1,
                         float *restrict w0, float *restrict w1, const char *next, size_t next_distance, int64_t kc,
                         int first, const int rows, const b2_dtype dtype, const int ahead)
{
    const int64_t size = dtype == B2_F32 ? 4 : 2;
    vf acc[TILE_ROWS][TILE_VECTORS];
    B2_UNROLL
    for (int r = 0; r < rows; r++) {
        B2_UNROLL
        for (int v = 0; v < TILE_VECTORS; v++)
            acc[r][v] = first ? v_set1(0.0f) : v_load(c + r * TILE_COLUMNS + v * VW);
    }
    for (int64_t k = 0; k < kc; k++) {
        vf b[TILE_VECTORS];
        B2_UNROLL
        for (int v = 0; v < TILE_VECTORS; v++)
            b[v] = v_load_as((v < NV ? b0 : b1) + (k * B2_PANEL + v % NV * VW) * size, dtype);
        if (dtype != B2_F32) {
            B2_UNROLL
            for (int v = 0; v < TILE_VECTORS; v++)
                v_store((v < NV ? w0 : w1) + k * B2_PANEL + v % NV * VW, b[v]);
        }
        if (ahead) {
            __builtin_prefetch(next + k * B2_PANEL * size, 0, 2);
            if (TILE_PANELS == 2)
                __builtin_prefetch(next + next_distance + k * B2_PANEL * size, 0, 2);
        }
        B2_UNROLL
        for (int r = 0; r < rows; r++) {
            vf x = v_set1(a[k * rows + r]);
            B2_UNROLL
            for (int v = 0; v < TILE_VECTORS; v++)
                acc[r][v] = v_fma(x, b[v], acc[r][v]);
        }
    }
    B2_UNROLL
    for (int r = 0; r < rows; r++) {
        B2_UNROLL
        for (int v = 0; v < TILE_VECTORS; v++)
            v_store(c + r * TILE_COLUMNS + v * VW, acc[r][v]);
    }
}

/* The same of rows that lie as they are, at distances of c_ld and ld. One pointer for every three of them: as many pointers
 * as rows do not fit into registers and would be read again at every step. */
B2_INLINE void row_tile_body(float *restrict c, int64_t c_ld, const float *restrict a, int64_t ld,
                             const float *restrict b0, const float *restrict b1, int64_t kc, const int rows)
{
    enum { GROUPS = (TILE_ROWS + 2) / 3 };
    vf acc[TILE_ROWS][TILE_VECTORS];
    const float *group[GROUPS];
    B2_UNROLL
    for (int g = 0; g < GROUPS; g++)
        group[g] = a + (3 * g < rows ? 3 * g : 0) * ld;
    B2_UNROLL
    for (int r = 0; r < rows; r++) {
        B2_UNROLL
        for (int v = 0; v < TILE_VECTORS; v++)
            acc[r][v] = v_set1(0.0f);
    }
    for (int64_t k = 0; k < kc; k++) {
        vf b[TILE_VECTORS];
        B2_UNROLL
        for (int v = 0; v < TILE_VECTORS; v++)
            b[v] = v_load((v < NV ? b0 : b1) + k * B2_PANEL + v % NV * VW);
        B2_UNROLL
        for (int r = 0; r < rows; r++) {
            vf x = v_set1(group[r / 3][k + r % 3 * ld]);
            B2_UNROLL
            for (int v = 0; v < TILE_VECTORS; v++)
                acc[r][v] = v_fma(x, b[v], acc[r][v]);
        }
    }
    B2_UNROLL
    for (int r = 0; r < rows; r++) {
        B2_UNROLL
        for (int v = 0; v < TILE_VECTORS; v++)
            v_store(c + r * c_ld + v * VW, acc[r][v]);
    }
}

/* Most panels that a streaming kernel reads at once: enough chains to hide the latency of a multiply-add, few enough
 * for the registers. */
B2_INLINE int panels_for(int rows)
{
    int most = TILE_ROWS * TILE_VECTORS / (rows * NV);
    return most >= 4 ? 4 : most >= 2 ? 2 : 1;
}

static int stream_panels(int rows)
{
    return panels_for(rows);
}

enum { PREFETCH_BYTES = 4096 };

B2_INLINE void stream_body(float *restrict c, const float *restrict a, const char *restrict w, int64_t k,
                           const b2_dtype dtype, const int rows, const int panels)
{
    const int64_t size = dtype == B2_F32 ? 4 : 2;
    const int64_t row_bytes = B2_PANEL * size, stride = k * row_bytes;
    vf acc[TILE_ROWS * TILE_VECTORS];
    B2_UNROLL
    for (int i = 0; i < rows * panels * NV; i++)
        acc[i] = v_set1(0.0f);
    for (int64_t i = 0; i < k; i++) {
        B2_UNROLL
        for (int p = 0; p < panels; p++) {
            const char *row = w + p * stride + i * row_bytes;
            __builtin_prefetch(row + PREFETCH_BYTES);
            B2_UNROLL
            for (int v = 0; v < NV; v++) {
                vf weight = v_load_as(row + v * VW * size, dtype);
                B2_UNROLL
                for (int r = 0; r < rows; r++)
                    acc[(r * panels + p) * NV + v] =
                        v_fma(v_set1(a[i * rows + r]), weight, acc[(r * panels + p) * NV + v]);
            }
        }
    }
    B2_UNROLL
    for (int i = 0; i < rows * panels * NV; i++)
        v_store(c + i * VW, acc[i]);
}

/* The same from pairs of bfloat16. */
B2_INLINE void stream_pairs(float *restrict c, const float *restrict a, const char *restrict w, int64_t k,
                            const int rows, const int panels)
{
    const int64_t row_bytes = B2_PANEL * 4, stride = (k + 1) / 2 * row_bytes;
    vf acc[TILE_ROWS * TILE_VECTORS];
    B2_UNROLL
    for (int i = 0; i < rows * panels * NV; i++)
        acc[i] = v_set1(0.0f);
    for (int64_t i = 0; i < k; i += 2) {
        const int both = i + 1 < k;
        B2_UNROLL
        for (int p = 0; p < panels; p++) {
            const char *row = w + p * stride + i / 2 * row_bytes;
            __builtin_prefetch(row + PREFETCH_BYTES);
            B2_UNROLL
            for (int v = 0; v < NV; v++) {
                vf first = v_load_first(row + v * VW * 4);
                B2_UNROLL
                for (int r = 0; r < rows; r++) {
                    const int at = (r * panels + p) * NV + v;
                    acc[at] = v_fma(v_set1(a[i * rows + r]), first, acc[at]);
                }
                if (!both)
                    continue;
                vf second = v_load_second(row + v * VW * 4);
                B2_UNROLL
                for (int r = 0; r < rows; r++) {
                    const int at = (r * panels + p) * NV + v;
                    acc[at] = v_fma(v_set1(a[(i + 1) * rows + r]), second, acc[at]);
                }
            }
        }
    }
    B2_UNROLL
    for (int i = 0; i < rows * panels * NV; i++)
        v_store(c + i * VW, acc[i]);
}

B2_INLINE void stream_some_pairs(float *c, const float *a, const char *w, int64_t k, const int rows, int panels)
{
    if (panels == 4 && panels_for(rows) == 4)
        stream_pairs(c, a, w, k, rows, 4);
    else if (panels == 2 && panels_for(rows) >= 2)
        stream_pairs(c, a, w, k, rows, 2);
    else
        stream_pairs(c, a, w, k, rows, 1);
}

B2_INLINE void stream_some(float *c, const float *a, const char *w, int64_t k, const b2_dtype dtype, const int rows,
                           int panels)
{
    if (panels == 4 && panels_for(rows) == 4)
        stream_body(c, a, w, k, dtype, rows, 4);
    else if (panels == 2 && panels_for(rows) >= 2)
        stream_body(c, a, w, k, dtype, rows, 2);
    else
        stream_body(c, a, w, k, dtype, rows, 1);
}

/* One function per number of rows: the bounds become constants. */
#define DEFINE_ROWS(R)                                                                                              \
    static void tile_##R(float *c, const float *a, const float *b0, const float *b1, int64_t kc, int first)         \
    {                                                                                                               \
        tile_body(c, a, (const char *)b0, (const char *)b1, NULL, NULL, NULL, 0, kc, first, R, B2_F32, 0);          \
    }                                                                                                               \
    static void from_##R(float *c, const float *a, const b2_stored *s, b2_panels *b, int64_t kc, int first)         \
    {                                                                                                               \
        if (s->dtype == B2_F32)                                                                                     \
            tile_body(c, a, s->at[0], s->at[1], NULL, NULL, s->next, s->next_distance, kc, first, R, B2_F32, 1);    \
        else if (s->dtype == B2_F16)                                                                                \
            tile_body(c, a, s->at[0], s->at[1], b->at[0], b->at[1], s->next, s->next_distance, kc, first, R,        \
                      B2_F16, 1);                                                                                   \
        else                                                                                                        \
            tile_body(c, a, s->at[0], s->at[1], b->at[0], b->at[1], s->next, s->next_distance, kc, first, R,        \
                      B2_BF16, 1);                                                                                  \
    }                                                                                                               \
    static void stream_##R(float *c, const float *a, const b2_weight *w, const char *at, int panels, int64_t k)     \
    {                                                                                                               \
        if (w->layout == B2_PAIRS)                                                                                  \
            stream_some_pairs(c, a, at, k, R, panels);                                                              \
        else if (w->dtype == B2_F32)                                                                                \
            stream_some(c, a, at, k, B2_F32, R, panels);                                                            \
        else if (w->dtype == B2_F16)                                                                                \
            stream_some(c, a, at, k, B2_F16, R, panels);                                                            \
        else                                                                                                        \
            stream_some(c, a, at, k, B2_BF16, R, panels);                                                           \
    }                                                                                                               \
    static void rows_##R(float *c, int64_t c_ld, const float *a, int64_t ld, const float *b0, const float *b1, int64_t kc)\
    {                                                                                                               \
        row_tile_body(c, c_ld, a, ld, b0, b1, kc, R);                                                               \
    }

DEFINE_ROWS(1)
DEFINE_ROWS(2)
DEFINE_ROWS(3)
DEFINE_ROWS(4)
#if defined(B2_SIMD_AVX2) || defined(B2_SIMD_AVX512)
DEFINE_ROWS(5)
DEFINE_ROWS(6)
#endif
#if defined(B2_SIMD_AVX512)
DEFINE_ROWS(7)
DEFINE_ROWS(8)
DEFINE_ROWS(9)
DEFINE_ROWS(10)
DEFINE_ROWS(11)
DEFINE_ROWS(12)
DEFINE_ROWS(13)
DEFINE_ROWS(14)
#endif

typedef void (*tile_fn)(float *, const float *, const float *, const float *, int64_t, int);
typedef void (*row_tile_fn)(float *, int64_t, const float *, int64_t, const float *, const float *, int64_t);
typedef void (*from_fn)(float *, const float *, const b2_stored *, b2_panels *, int64_t, int);
typedef void (*stream_fn)(float *, const float *, const b2_weight *, const char *, int, int64_t);

#if defined(B2_SIMD_AVX512)
#define ALL_ROWS(NAME)                                                                                              \
    {NAME##_1, NAME##_2, NAME##_3, NAME##_4, NAME##_5, NAME##_6, NAME##_7, NAME##_8, NAME##_9, NAME##_10, NAME##_11,\
     NAME##_12, NAME##_13, NAME##_14}
#elif defined(B2_SIMD_AVX2)
#define ALL_ROWS(NAME) {NAME##_1, NAME##_2, NAME##_3, NAME##_4, NAME##_5, NAME##_6}
#else
#define ALL_ROWS(NAME) {NAME##_1, NAME##_2, NAME##_3, NAME##_4}
#endif

static const tile_fn tiles_of[TILE_ROWS] = ALL_ROWS(tile);
static const row_tile_fn row_tiles_of[TILE_ROWS] = ALL_ROWS(rows);
static const from_fn froms_of[TILE_ROWS] = ALL_ROWS(from);
static const stream_fn streams_of[TILE_ROWS] = ALL_ROWS(stream);

static void tile(float *c, const float *a, const float *b0, const float *b1, int rows, int64_t kc, int first)
{
    tiles_of[rows - 1](c, a, b0, b1, kc, first);
}

static void row_tile(float *c, int64_t c_ld, const float *a, int64_t ld, const float *b0, const float *b1, int rows,
                     int64_t kc)
{
    row_tiles_of[rows - 1](c, c_ld, a, ld, b0, b1, kc);
}

static void tile_from(float *c, const float *a, const b2_stored *stored, b2_panels *b, int rows, int64_t kc, int first)
{
    froms_of[rows - 1](c, a, stored, b, kc, first);
    if (stored->dtype == B2_F32)
        for (int i = 0; i < 2; i++)
            b->at[i] = (float *)(void *)stored->at[i]; /* only read from */
}

static void stream(float *c, const float *a, const b2_weight *w, const char *at, int rows, int panels)
{
    streams_of[rows - 1](c, a, w, at, panels, w->k);
}

B2_INLINE vf finish_one(vf x, const float *scales, const float *bias, const float *residual, b2_act act)
{
    if (scales)
        x = v_mul(x, v_load(scales));
    if (bias)
        x = v_add(x, v_load(bias));
    x = v_act(x, act);
    return residual ? v_add(x, v_load(residual)) : x;
}

/* What does not fill a vector goes through a full one. */
static void finish_tail(float *out, const float *c, int64_t count, const float *scales, const float *bias,
                        const float *residual, b2_act act)
{
    float x[VW] = {0}, s[VW] = {0}, b[VW] = {0}, r[VW] = {0};
    for (int64_t i = 0; i < count; i++) {
        x[i] = c[i];
        s[i] = scales ? scales[i] : 0.0f;
        b[i] = bias ? bias[i] : 0.0f;
        r[i] = residual ? residual[i] : 0.0f;
    }
    v_store(x, finish_one(v_load(x), scales ? s : NULL, bias ? b : NULL, residual ? r : NULL, act));
    for (int64_t i = 0; i < count; i++)
        out[i] = x[i];
}

B2_INLINE const float *from(const float *vector, int64_t i)
{
    return vector ? vector + i : NULL;
}

B2_INLINE void finish_rows(float *out, int64_t out_ld, const float *c, int64_t c_ld, int64_t rows, int64_t cols,
                           const b2_epilogue *e, const b2_act act)
{
    int64_t whole = cols / VW * VW;
    for (int64_t r = 0; r < rows; r++) {
        const float *residual = from(e->residual, r * e->residual_ld);
        for (int64_t j = 0; j < whole; j += VW)
            v_store(out + r * out_ld + j, finish_one(v_load(c + r * c_ld + j), from(e->scales, j), from(e->bias, j),
                                                     from(residual, j), act));
        if (whole < cols)
            finish_tail(out + r * out_ld + whole, c + r * c_ld + whole, cols - whole, from(e->scales, whole),
                        from(e->bias, whole), from(residual, whole), act);
    }
}

static void finish(float *out, int64_t out_ld, const float *c, int64_t c_ld, int64_t rows, int64_t cols,
                   const b2_epilogue *e)
{
    switch (e->act) {
    case B2_ACT_NONE: finish_rows(out, out_ld, c, c_ld, rows, cols, e, B2_ACT_NONE); break;
    case B2_ACT_GELU_ERF: finish_rows(out, out_ld, c, c_ld, rows, cols, e, B2_ACT_GELU_ERF); break;
    case B2_ACT_RELU: finish_rows(out, out_ld, c, c_ld, rows, cols, e, B2_ACT_RELU); break;
    case B2_ACT_GELU_TANH: finish_rows(out, out_ld, c, c_ld, rows, cols, e, B2_ACT_GELU_TANH); break;
    case B2_ACT_QUICK_GELU: finish_rows(out, out_ld, c, c_ld, rows, cols, e, B2_ACT_QUICK_GELU); break;
    case B2_ACT_SILU: finish_rows(out, out_ld, c, c_ld, rows, cols, e, B2_ACT_SILU); break;
    }
}

static double fma_peak(int64_t rounds, float *sink)
{
    enum { CHAINS = 10 };
    vf acc[CHAINS], x = v_set1(0.999f), y = v_set1(0.001f);
    B2_UNROLL
    for (int i = 0; i < CHAINS; i++)
        acc[i] = v_set1((float)i);
    for (int64_t n = 0; n < rounds; n++) {
        B2_UNROLL
        for (int i = 0; i < CHAINS; i++)
            acc[i] = v_fma(acc[i], x, y);
    }
    float t[VW];
    *sink = 0;
    for (int i = 0; i < CHAINS; i++) {
        v_store(t, acc[i]);
        *sink += t[0];
    }
    return 2.0 * (double)rounds * CHAINS * VW;
}
