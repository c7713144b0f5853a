/* Rounding rows of x to groups of int8. Plain C: the compiler makes good vectors of it for each instruction set.
 *
 * VALUE_BYTES is 1 or 2. */
enum { UNIT = VALUE_BYTES == 1 ? 4 : 2 };

/* Groups whose largest element is smaller count as zeros: their scale would not be a normal number. */
static const float NOTHING = 1e-30f;

/* t [group] becomes integers; returns the scale: NaN where a NaN or Inf is among them, and so all of the row's results. */
B2_INLINE float round_group(int32_t *q, const float *t, const int group)
{
    int32_t most = 0;
    for (int i = 0; i < group; i++) {
        int32_t size = (int32_t)(b2_f32_to_bits(t[i]) & 0x7fffffffu);
        most = size > most ? size : most;
    }
    float largest = b2_bits_to_f32((uint32_t)most);
    float inverse = largest < NOTHING ? 0.0f : 127.0f / largest;
    for (int i = 0; i < group; i++) /* nearest, ties to even */
        q[i] = (int32_t)(b2_f32_to_bits(t[i] * inverse + 12582912.0f) - 0x4b400000u);
    if (most >= 0x7f800000)
        return b2_bits_to_f32(0x7fc00000u);
    return largest < NOTHING ? 0.0f : largest * (1.0f / 127.0f);
}

/* The first `count` of a group. */
B2_INLINE void store_group(char *to, const int32_t *q, int rows, int count, const int group)
{
#if VALUE_BYTES == 1
    int8_t v[B2_QUAD_GROUP_MAX];
#else
    int16_t v[B2_QUAD_GROUP_MAX];
#endif
    for (int i = 0; i < group; i += 4) { /* pairs of even channels and of odd ones where values have two bytes */
        v[i] = (int8_t)q[i];
        v[i + 1] = (int8_t)q[VALUE_BYTES == 1 ? i + 1 : i + 2];
        v[i + 2] = (int8_t)q[VALUE_BYTES == 1 ? i + 2 : i + 1];
        v[i + 3] = (int8_t)q[i + 3];
    }
    for (int i = 0; i < count / UNIT; i++)
        memcpy(to + (size_t)(i * rows) * 4, (const char *)v + 4 * i, 4);
}

B2_INLINE int32_t sum_group(const int32_t *q, const int group)
{
    int32_t sum = 0;
    for (int i = 0; i < group; i++)
        sum += (int8_t)q[i];
    return sum;
}

B2_INLINE void round_row(const b2_quad_block *dst, const float *x, int row, int rows, int64_t k,
                         const float *column_scales, const int group, const int zero)
{
    float t[B2_QUAD_GROUP_MAX];
    int32_t q[B2_QUAD_GROUP_MAX];
    for (int64_t g = 0; g * group < k; g++) {
        const float *from = x + g * group, *by = column_scales ? column_scales + g * group : NULL;
        int64_t left = k - g * group;
        if (left >= group && by)
            for (int i = 0; i < group; i++)
                t[i] = from[i] * by[i];
        else
            for (int i = 0; i < group; i++)
                t[i] = i >= left ? 0.0f : by ? from[i] * by[i] : from[i];
        dst->scales[g * rows + row] = round_group(q, t, group);
        dst->offsets[g * rows + row] = -zero * sum_group(q, group);
        char *to = dst->values + (g * group * rows / UNIT + row) * 4;
        if (left > group - B2_QUAD_UNIT)
            store_group(to, q, rows, group, group);
        else
            store_group(to, q, rows, B2_QUAD_UNIT, group);
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
