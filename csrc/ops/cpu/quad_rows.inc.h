/* Rounding rows of x to groups of int8. Plain C: the compiler makes good vectors of it for each instruction set.
 *
 * VALUE_BYTES is 1 or 2. */
enum { UNIT = VALUE_BYTES == 1 ? 4 : 2 };

/* Groups whose largest element is smaller count as zeros: their scale would not be a normal number. */
static const float NOTHING = 1e-30f;

/* t [32] becomes integers; returns the scale. A NaN or Inf gives a scale that is not finite, and so a result that is not. */
B2_INLINE float round_group(int32_t q[B2_QUAD_GROUP], const float t[B2_QUAD_GROUP])
{
    int32_t most = 0;
    for (int i = 0; i < B2_QUAD_GROUP; i++) {
        int32_t size = (int32_t)(b2_f32_to_bits(t[i]) & 0x7fffffffu);
        most = size > most ? size : most;
    }
    float largest = b2_bits_to_f32((uint32_t)most);
    float inverse = largest < NOTHING ? 0.0f : 127.0f / largest;
    for (int i = 0; i < B2_QUAD_GROUP; i++) /* nearest, ties to even */
        q[i] = (int32_t)(b2_f32_to_bits(t[i] * inverse + 12582912.0f) - 0x4b400000u);
    return largest < NOTHING ? 0.0f : largest * (1.0f / 127.0f);
}

B2_INLINE void store_group(char *to, const int32_t q[B2_QUAD_GROUP], int rows)
{
#if VALUE_BYTES == 1
    int8_t v[B2_QUAD_GROUP];
#else
    int16_t v[B2_QUAD_GROUP];
#endif
    for (int i = 0; i < B2_QUAD_GROUP; i++)
        v[i] = (int8_t)q[i];
    B2_UNROLL
    for (int i = 0; i < B2_QUAD_GROUP / UNIT; i++)
        memcpy(to + (size_t)(i * rows) * 4, (const char *)v + 4 * i, 4);
}

static void round_rows(const b2_quad_block *dst, const float *x, int64_t ld, int rows, int64_t k,
                       const float *column_scales, int zero)
{
    float t[B2_QUAD_GROUP] = {0};
    int32_t q[B2_QUAD_GROUP];
    for (int r = 0; r < rows; r++)
        for (int64_t g = 0; g * B2_QUAD_GROUP < k; g++) {
            const float *from = x + r * ld + g * B2_QUAD_GROUP;
            const float *by = column_scales ? column_scales + g * B2_QUAD_GROUP : NULL;
            int64_t count = k - g * B2_QUAD_GROUP;
            if (count >= B2_QUAD_GROUP && by)
                for (int i = 0; i < B2_QUAD_GROUP; i++)
                    t[i] = from[i] * by[i];
            else
                for (int i = 0; i < B2_QUAD_GROUP; i++)
                    t[i] = i >= count ? 0.0f : by ? from[i] * by[i] : from[i];
            dst->scales[g * rows + r] = round_group(q, t);
            store_group(dst->values + ((size_t)g * (B2_QUAD_GROUP / UNIT) * (size_t)rows + (size_t)r) * 4, q, rows);
            int32_t sum = 0;
            for (int i = 0; i < B2_QUAD_GROUP; i++)
                sum += (int8_t)q[i];
            dst->offsets[g * rows + r] = -zero * sum;
        }
}
