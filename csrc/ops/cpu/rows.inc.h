/* Kernels over one row: layer norm, softmax, log-softmax, top-k, checks. Reductions add element j to lane j mod 16. */
#include <math.h>

/* sum of (x - shift)^2, or of x when `squared` is 0 */
B2_INLINE float row_sum(const float *x, int64_t n, float shift, const int squared)
{
    lanes sum = lanes_set1(0.0f);
    int64_t j = 0;
    for (; j + B2_PANEL <= n; j += B2_PANEL) {
        B2_UNROLL
        for (int v = 0; v < NV; v++) {
            vf a = v_load(x + j + v * VW);
            vf d = v_sub(a, v_set1(shift));
            sum.v[v] = squared ? v_fma(d, d, sum.v[v]) : v_add(sum.v[v], a);
        }
    }
    if (j < n) {
        lanes rest = lanes_load_part(x + j, n - j, squared ? shift : 0.0f);
        B2_UNROLL
        for (int v = 0; v < NV; v++) {
            vf d = v_sub(rest.v[v], v_set1(shift));
            sum.v[v] = squared ? v_fma(d, d, sum.v[v]) : v_add(sum.v[v], rest.v[v]);
        }
    }
    return lanes_sum(sum);
}

static void norm_row(float *out, const float *x, const float *gamma, const float *beta, int64_t n, float eps)
{
    float mean = row_sum(x, n, 0.0f, 0) / (float)n;
    float variance = row_sum(x, n, mean, 1) / (float)n;
    float factor = 1.0f / sqrtf(variance + eps);
    int64_t j = 0;
    for (; j + VW <= n; j += VW) {
        vf y = v_mul(v_sub(v_load(x + j), v_set1(mean)), v_set1(factor));
        if (gamma)
            y = v_mul(y, v_load(gamma + j));
        if (beta)
            y = v_add(y, v_load(beta + j));
        v_store(out + j, y);
    }
    for (; j < n; j++) {
        float y = (x[j] - mean) * factor;
        y = gamma ? y * gamma[j] : y;
        out[j] = beta ? y + beta[j] : y;
    }
}

/* As T5LayerNorm: the factor first, the weight second. */
static void rms_norm_row(float *out, const float *x, const float *gamma, int64_t n, float eps)
{
    float factor = 1.0f / sqrtf(row_sum(x, n, 0.0f, 1) / (float)n + eps);
    int64_t j = 0;
    for (; j + VW <= n; j += VW) {
        vf y = v_mul(v_load(x + j), v_set1(factor));
        v_store(out + j, gamma ? v_mul(y, v_load(gamma + j)) : y);
    }
    for (; j < n; j++)
        out[j] = gamma ? x[j] * factor * gamma[j] : x[j] * factor;
}

B2_INLINE void gate_all(float *out, const float *gate, const float *up, int64_t n, const b2_act act)
{
    int64_t j = 0;
    for (; j + VW <= n; j += VW)
        v_store(out + j, v_mul(v_act(v_load(gate + j), act), v_load(up + j)));
    if (j == n)
        return;
    float g[VW] = {0};
    memcpy(g, gate + j, (size_t)(n - j) * sizeof *g);
    v_store(g, v_act(v_load(g), act));
    for (int64_t i = j; i < n; i++)
        out[i] = g[i - j] * up[i];
}

static void gate_row(float *out, const float *gate, const float *up, int64_t n, b2_act act)
{
    switch (act) {
    case B2_ACT_NONE: gate_all(out, gate, up, n, B2_ACT_NONE); break;
    case B2_ACT_GELU_ERF: gate_all(out, gate, up, n, B2_ACT_GELU_ERF); break;
    case B2_ACT_RELU: gate_all(out, gate, up, n, B2_ACT_RELU); break;
    case B2_ACT_GELU_TANH: gate_all(out, gate, up, n, B2_ACT_GELU_TANH); break;
    case B2_ACT_QUICK_GELU: gate_all(out, gate, up, n, B2_ACT_QUICK_GELU); break;
    case B2_ACT_SILU: gate_all(out, gate, up, n, B2_ACT_SILU); break;
    }
}

/* The maximum of scale * x. NaN if one is there: then the whole row must become NaN. */
B2_INLINE float row_max(const float *x, int64_t n, float scale)
{
    lanes best = lanes_set1(-INFINITY), nans = lanes_set1(0.0f);
    int64_t j = 0;
    for (; j + B2_PANEL <= n; j += B2_PANEL) {
        B2_UNROLL
        for (int v = 0; v < NV; v++) {
            vf a = v_mul(v_load(x + j + v * VW), v_set1(scale));
            best.v[v] = v_max(a, best.v[v]); /* a NaN is passed over here */
            nans.v[v] = v_fma(a, v_set1(0.0f), nans.v[v]);
        }
    }
    float most = lanes_max(best);
    float nan = lanes_sum(nans);
    for (; j < n; j++) {
        float a = x[j] * scale;
        most = a > most ? a : most;
        nan += a * 0.0f;
    }
    if (nan == nan)
        return most;
    /* Inf * 0 is NaN too: look again. */
    for (j = 0; j < n; j++)
        if (x[j] * scale != x[j] * scale)
            return x[j] * scale;
    return most;
}

static float softmax_row(float *s, int64_t n, float scale)
{
    float most = row_max(s, n, scale);
    lanes sum = lanes_set1(0.0f);
    for (int64_t j = 0; j < n; j += B2_PANEL) {
        int64_t count = n - j < B2_PANEL ? n - j : B2_PANEL;
        for (int64_t i = j; count < B2_PANEL && i < n; i++)
            s[i] *= scale;
        lanes x = count == B2_PANEL ? lanes_load(s + j) : lanes_load_part(s + j, count, -INFINITY);
        B2_UNROLL
        for (int v = 0; v < NV; v++) {
            if (count == B2_PANEL)
                x.v[v] = v_mul(x.v[v], v_set1(scale));
            x.v[v] = v_exp(v_sub(x.v[v], v_set1(most)));
            sum.v[v] = v_add(sum.v[v], x.v[v]);
        }
        lanes_store(s + j, x);
    }
    return lanes_sum(sum);
}

static void log_softmax_row(float *x, int64_t n)
{
    float most = row_max(x, n, 1.0f);
    lanes sum = lanes_set1(0.0f);
    for (int64_t j = 0; j < n; j += B2_PANEL) {
        int64_t count = n - j < B2_PANEL ? n - j : B2_PANEL;
        lanes y = count == B2_PANEL ? lanes_load(x + j) : lanes_load_part(x + j, count, -INFINITY);
        B2_UNROLL
        for (int v = 0; v < NV; v++)
            sum.v[v] = v_add(sum.v[v], v_exp(v_sub(y.v[v], v_set1(most))));
    }
    float log_sum = logf(lanes_sum(sum));
    for (int64_t j = 0; j < n; j++)
        x[j] = x[j] - most - log_sum;
}

/* Whether (a, i) comes before (b, j). */
B2_INLINE int comes_before(float a, int32_t i, float b, int32_t j)
{
    int a_nan = a != a, b_nan = b != b;
    if (a_nan != b_nan)
        return b_nan;
    if (!a_nan && a != b)
        return a > b;
    return i < j;
}

/* Heap with the last-coming entry at the root; put (value, id) at the root and let it sink. */
B2_INLINE void heap_sink(float *values, int32_t *ids, int k, int root, float value, int32_t id)
{
    for (;;) {
        int child = 2 * root + 1;
        if (child >= k)
            break;
        if (child + 1 < k && comes_before(values[child], ids[child], values[child + 1], ids[child + 1]))
            child++;
        if (!comes_before(value, id, values[child], ids[child]))
            break;
        values[root] = values[child];
        ids[root] = ids[child];
        root = child;
    }
    values[root] = value;
    ids[root] = id;
}

static void top_k_row(float *values, int32_t *ids, const float *x, int64_t n, int k)
{
    for (int i = 0; i < k; i++) {
        values[i] = x[i];
        ids[i] = i;
    }
    for (int i = k / 2 - 1; i >= 0; i--)
        heap_sink(values, ids, k, i, values[i], ids[i]);
    for (int64_t j = k; j < n;) {
        /* Whole vectors without anything above the root are passed over. A NaN at the root must not hide them. */
        if (j + VW <= n && values[0] == values[0] && !v_any_greater(v_load(x + j), v_set1(values[0]))) {
            j += VW;
            continue;
        }
        int64_t end = j + VW < n ? j + VW : n;
        for (; j < end; j++)
            if (comes_before(x[j], (int32_t)j, values[0], ids[0]))
                heap_sink(values, ids, k, 0, x[j], (int32_t)j);
    }
    for (int last = k - 1; last > 0; last--) {
        float value = values[last];
        int32_t id = ids[last];
        values[last] = values[0];
        ids[last] = ids[0];
        heap_sink(values, ids, last, 0, value, id);
    }
}

static int row_is_finite(const float *x, int64_t n)
{
    const uint32_t exponent = 0x7f800000u;
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bad |= (bits & exponent) == exponent;
    }
    return !bad;
}

static void add_row(float *out, const float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        out[i] += x[i];
}

/* Two products and their sum, each rounded, as torch does it. */
static void rotate_row(float *restrict a, float *restrict b, const float *restrict cos, const float *restrict sin,
                       int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        float x = a[i], y = b[i];
        a[i] = x * cos[i] - y * sin[i];
        b[i] = y * cos[i] + x * sin[i];
    }
}

static void divide_row(float *out, const float *c, int64_t n, float sum)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = c[i] / sum;
}
