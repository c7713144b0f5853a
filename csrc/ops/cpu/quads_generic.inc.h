/* Plain C: four X as they are, 16 bits each. */

enum { WIDE_STEP = 8 }; /* blocks whose sum of (q + 128) * X fits into 32 bits: 255 * 32639 * 256 < 2^31 */

static void store_block(char *to, const int32_t whole[B2_QUAD_BLOCK], size_t distance)
{
    for (int q = 0; q < QUADS_PER_BLOCK; q++) {
        int16_t x[4];
        for (int j = 0; j < 4; j++)
            x[j] = (int16_t)whole[4 * q + j];
        memcpy(to + (size_t)q * distance, x, sizeof x);
    }
}

static int stream_panels(b2_dtype dtype, int rows)
{
    (void)dtype;
    (void)rows;
    return 1;
}

/* acc [16] += one quad: weights [16][4] of which `shift` and `mask` take the part that is meant. */
static void add_quad(int32_t acc[B2_PANEL], const uint8_t *w, const char *x, int shift, int mask)
{
    int16_t v[4];
    memcpy(v, x, sizeof v);
    for (int i = 0; i < B2_PANEL; i++)
        for (int j = 0; j < 4; j++)
            acc[i] += (w[4 * i + j] >> shift & mask) * v[j];
}

static void add_block(int32_t acc[B2_PANEL], const uint8_t *w, const char *x, size_t distance, b2_dtype dtype)
{
    for (int q = 0; q < QUADS_PER_BLOCK; q++, x += distance)
        if (dtype == B2_I8)
            add_quad(acc, w + q * 64, x, 0, 255);
        else
            add_quad(acc, w + q / 2 * 64, x, q % 2 * 4, 15);
}

static float scale_at(const b2_quad_panels *w, int64_t group, int lane)
{
    if (w->dtype == B2_I8)
        return ((const float *)w->scales)[group * B2_PANEL + lane];
    return b2_f16_to_f32(((const uint16_t *)w->scales)[group * B2_PANEL + lane]);
}

static void stream_row(float c[B2_PANEL], const b2_quad_rows *x, const b2_quad_panels *w, int row)
{
    size_t distance = (size_t)x->rows * X_BYTES;
    const char *values = (const char *)x->values + (size_t)row * X_BYTES;
    float sum[B2_PANEL] = {0};
    for (int64_t g = 0; g < w->groups; g++) {
        int64_t end = (g + 1) * w->group_blocks < w->blocks ? (g + 1) * w->group_blocks : w->blocks;
        double total[B2_PANEL];
        for (int i = 0; i < B2_PANEL; i++)
            total[i] = x->wide ? x->wide[g * x->rows + row] : x->narrow[g * x->rows + row];
        for (int64_t b = g * w->group_blocks; b < end;) {
            int32_t acc[B2_PANEL] = {0};
            int64_t stop = b + WIDE_STEP < end ? b + WIDE_STEP : end;
            for (; b < stop; b++)
                add_block(acc, w->data + b * block_bytes(w->dtype), values + (size_t)b * QUADS_PER_BLOCK * distance,
                          distance, w->dtype);
            for (int i = 0; i < B2_PANEL; i++)
                total[i] += acc[i];
        }
        for (int i = 0; i < B2_PANEL; i++)
            sum[i] = fmaf(scale_at(w, g, i), (float)total[i], sum[i]);
    }
    for (int i = 0; i < B2_PANEL; i++)
        c[i] = sum[i] * x->scales[row];
}

static void stream(float *c, const b2_quad_rows *x, const b2_quad_panels *w, int panels)
{
    (void)panels; /* always 1 */
    for (int r = 0; r < x->rows; r++)
        stream_row(c + r * B2_PANEL, x, w, r);
}
