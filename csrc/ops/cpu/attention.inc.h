/* Keys and values of one head, brought into the layout of weight panels, so that scores and P.V are register tiles. */

static void pack_keys(float *restrict dst, const float *const *rows, int64_t count, int64_t offset, int width)
{
    for (int64_t r = 0; r < count; r++) {
        const float *row = rows[r] + offset;
        for (int d = 0; d < width; d++)
            dst[d * B2_PANEL + r] = row[d];
    }
    for (int64_t r = count; r < B2_PANEL; r++)
        for (int d = 0; d < width; d++)
            dst[d * B2_PANEL + r] = 0.0f;
}

static void pack_values(float *restrict dst, const float *const *rows, int64_t count, int64_t panel_rows,
                        int64_t offset, int width)
{
    for (int first = 0; first < width; first += B2_PANEL) {
        int columns = width - first < B2_PANEL ? width - first : B2_PANEL;
        float *panel = dst + (int64_t)(first / B2_PANEL) * panel_rows * B2_PANEL;
        for (int64_t r = 0; r < count; r++) {
            const float *row = rows[r] + offset + first;
            lanes l = columns == B2_PANEL ? lanes_load(row) : lanes_load_part(row, columns, 0.0f);
            lanes_store(panel + r * B2_PANEL, l);
        }
    }
}
