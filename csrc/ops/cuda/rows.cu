/* Operations on rows of activations: norms, gate, rotary positions, patches, copies, sums. Each row is computed by one block,
 * alike wherever it stands. Nothing is allocated; nothing waits.
 *
 *     layer_norm   (x - mean) / sqrt(var + eps) * gamma + beta        rms_norm   x / sqrt(mean(x^2) + eps) * gamma
 *     log_softmax  x - max - log(sum(exp(x - max)))                   unit_rows  x / max(|x|, 1e-12) */
#include "ops/cuda/act.h"
#include "ops/cuda/cuda_ops.h"
#include "ops/cuda/rows.h"

namespace {

enum { THREADS = 256, HELD = 4 };

const float *vector_of(const b2_weight *w)
{
    return w && w->data ? (const float *)w->data : NULL;
}

/* ---- norms ---- */

/* A row in registers, up to HELD groups of 4 columns in each thread: read once. */
template <bool MEAN>
__global__ void __launch_bounds__(THREADS) norm_held(float *out, int64_t out_ld, const float *x, int64_t x_ld, int cols,
                                                     const float *gamma, const float *beta, float eps)
{
    __shared__ float sums[B2_WARPS_MOST], squares[B2_WARPS_MOST];
    const float *from = x + (int64_t)blockIdx.x * x_ld;
    float *to = out + (int64_t)blockIdx.x * out_ld;
    float4 held[HELD];
    float sum = 0.0f;
#pragma unroll
    for (int v = 0; v < HELD; v++) {
        int j = 4 * (int)(threadIdx.x + v * blockDim.x);
        held[v] = j < cols ? b2_load4(from + j) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        sum += (held[v].x + held[v].y) + (held[v].z + held[v].w);
    }
    float mean = MEAN ? b2_block_reduce<b2_sum>(sum, sums) / (float)cols : 0.0f;
    sum = 0.0f;
#pragma unroll
    for (int v = 0; v < HELD; v++) {
        if (4 * (int)(threadIdx.x + v * blockDim.x) >= cols)
            continue;
        float a = held[v].x - mean, b = held[v].y - mean, c = held[v].z - mean, d = held[v].w - mean;
        sum += (a * a + b * b) + (c * c + d * d);
    }
    float factor = 1.0f / sqrtf(b2_block_reduce<b2_sum>(sum, squares) / (float)cols + eps);
#pragma unroll
    for (int v = 0; v < HELD; v++) {
        int j = 4 * (int)(threadIdx.x + v * blockDim.x);
        if (j >= cols)
            continue;
        float4 g = gamma ? b2_load4(gamma + j) : make_float4(1.0f, 1.0f, 1.0f, 1.0f);
        float4 b = beta ? b2_load4(beta + j) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        float4 y = make_float4((held[v].x - mean) * factor * g.x + b.x, (held[v].y - mean) * factor * g.y + b.y,
                               (held[v].z - mean) * factor * g.z + b.z, (held[v].w - mean) * factor * g.w + b.w);
        b2_store4(to + j, y);
    }
}

/* Any width, any address: a row is read three times, from the caches but for the first. */
template <bool MEAN>
__global__ void __launch_bounds__(THREADS) norm_any(float *out, int64_t out_ld, const float *x, int64_t x_ld, int64_t cols,
                                                    const float *gamma, const float *beta, float eps)
{
    __shared__ float sums[B2_WARPS_MOST], squares[B2_WARPS_MOST];
    const float *from = x + (int64_t)blockIdx.x * x_ld;
    float *to = out + (int64_t)blockIdx.x * out_ld;
    float sum = 0.0f;
    for (int64_t j = threadIdx.x; MEAN && j < cols; j += blockDim.x)
        sum += from[j];
    float mean = MEAN ? b2_block_reduce<b2_sum>(sum, sums) / (float)cols : 0.0f;
    sum = 0.0f;
    for (int64_t j = threadIdx.x; j < cols; j += blockDim.x)
        sum += (from[j] - mean) * (from[j] - mean);
    float factor = 1.0f / sqrtf(b2_block_reduce<b2_sum>(sum, squares) / (float)cols + eps);
    for (int64_t j = threadIdx.x; j < cols; j += blockDim.x) {
        float y = (from[j] - mean) * factor;
        y = gamma ? y * gamma[j] : y;
        to[j] = beta ? y + beta[j] : y;
    }
}

template <bool MEAN>
int norm(b2_ctx *ctx, b2_tensor out, b2_tensor x, const float *gamma, const float *beta, float eps, b2_err *err)
{
    dim3 grid((unsigned)x.rows);
    bool fours = b2_by_fours_of(x) && b2_by_fours_of(out) && (uintptr_t)gamma % 16 == 0 && (uintptr_t)beta % 16 == 0;
    if (fours && x.cols <= 4 * THREADS * HELD) {
        /* Half of the registers in use: more threads hide more of the wait. */
        dim3 block(b2_threads_for((x.cols / 4 + 1) / 2, THREADS));
        B2_LAUNCH(norm_held<MEAN>, grid, block, 0, b2_cuda_stream(ctx), out.data, out.ld, x.data, x.ld, (int)x.cols, gamma,
                  beta, eps);
    } else {
        dim3 block(b2_threads_for(x.cols, THREADS));
        B2_LAUNCH(norm_any<MEAN>, grid, block, 0, b2_cuda_stream(ctx), out.data, out.ld, x.data, x.ld, x.cols, gamma, beta,
                  eps);
    }
    return b2_cuda_launched("norm", err);
}

/* ---- element by element ---- */

template <int ACT, bool FOURS>
__global__ void __launch_bounds__(THREADS) gate_kernel(b2_tensor out, b2_tensor gate, b2_tensor up)
{
    int64_t row = blockIdx.x, j = (FOURS ? 4 : 1) * ((int64_t)blockIdx.y * blockDim.x + threadIdx.x);
    if (j >= gate.cols)
        return;
    const float *a = gate.data + row * gate.ld + j, *b = up.data + row * up.ld + j;
    float *to = out.data + row * out.ld + j;
    if (FOURS) {
        float4 g = b2_load4(a), u = b2_load4(b);
        b2_store4(to, make_float4(b2_cuda_act(g.x, ACT) * u.x, b2_cuda_act(g.y, ACT) * u.y, b2_cuda_act(g.z, ACT) * u.z,
                                  b2_cuda_act(g.w, ACT) * u.w));
    } else {
        *to = b2_cuda_act(*a, ACT) * *b;
    }
}

/* A block for THREADS pieces of each row. */
dim3 pieces(b2_tensor t, bool fours)
{
    int64_t each = fours ? 4 * THREADS : THREADS;
    return dim3((unsigned)t.rows, (unsigned)((t.cols + each - 1) / each));
}

template <int ACT> void launch_gate(cudaStream_t stream, b2_tensor out, b2_tensor gate, b2_tensor up)
{
    if (b2_by_fours_of(out) && b2_by_fours_of(gate) && b2_by_fours_of(up))
        B2_LAUNCH((gate_kernel<ACT, true>), pieces(gate, true), dim3(THREADS), 0, stream, out, gate, up);
    else
        B2_LAUNCH((gate_kernel<ACT, false>), pieces(gate, false), dim3(THREADS), 0, stream, out, gate, up);
}

/* out[i] += x[i mod x.rows] */
template <bool FOURS> __global__ void __launch_bounds__(THREADS) add_rows_kernel(b2_tensor out, b2_tensor x)
{
    int64_t row = blockIdx.x, j = (FOURS ? 4 : 1) * ((int64_t)blockIdx.y * blockDim.x + threadIdx.x);
    if (j >= x.cols)
        return;
    float *to = out.data + row * out.ld + j;
    const float *from = x.data + row % x.rows * x.ld + j;
    if (FOURS) {
        float4 a = b2_load4(to), b = b2_load4(from);
        b2_store4(to, make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w));
    } else {
        *to += *from;
    }
}

/* The angles of a token are the same in all of its heads: they are computed once. Products are rounded, then their sum, as
 * torch does it: no fused multiply-add. */
__global__ void __launch_bounds__(THREADS) rope_kernel(b2_tensor x, const int32_t *positions, const float *inv_freq,
                                                       int rotary_dim, int head_dim, float scaling)
{
    B2_DYNAMIC_SHARED(float, cosines);
    int half = rotary_dim / 2, heads = (int)(x.cols / head_dim);
    float *sines = cosines + half, *row = x.data + (int64_t)blockIdx.x * x.ld;
    int32_t given = positions[blockIdx.x];
    float position = (float)(given > 0 ? given : 0);
    for (int j = (int)threadIdx.x; j < half; j += (int)blockDim.x) {
        float angle = __fmul_rn(position, inv_freq[j]);
        cosines[j] = __fmul_rn(cosf(angle), scaling);
        sines[j] = __fmul_rn(sinf(angle), scaling);
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < heads * half; i += (int)blockDim.x) {
        int head = i / half, j = i - head * half;
        float *at = row + (int64_t)head * head_dim + j, a = at[0], b = at[half];
        at[0] = __fsub_rn(__fmul_rn(a, cosines[j]), __fmul_rn(b, sines[j]));
        at[half] = __fadd_rn(__fmul_rn(b, cosines[j]), __fmul_rn(a, sines[j]));
    }
}

/* ---- copies ---- */

__global__ void __launch_bounds__(THREADS) patches_kernel(b2_tensor out, b2_pictures p, int patch)
{
    int64_t across = p.width / patch, cells = p.height / patch * across;
    int64_t picture = (int64_t)blockIdx.x / cells, cell = (int64_t)blockIdx.x % cells;
    const float *corner = p.data + picture * p.channels * p.height * p.width + cell / across * patch * p.width +
                          cell % across * patch;
    float *to = out.data + (int64_t)blockIdx.x * out.ld;
    int area = patch * patch, count = (int)out.cols;
    for (int i = (int)threadIdx.x; i < count; i += (int)blockDim.x) {
        int c = i / area, rest = i - c * area, y = rest / patch;
        to[i] = corner[((int64_t)c * p.height + y) * p.width + (rest - y * patch)];
    }
}

template <bool FOURS> __device__ __forceinline__ void copy_row(float *to, const float *from, int64_t cols)
{
    if (FOURS)
        for (int64_t j = 4 * (int64_t)threadIdx.x; j < cols; j += 4 * (int64_t)blockDim.x)
            b2_store4(to + j, b2_load4(from + j));
    else
        for (int64_t j = threadIdx.x; j < cols; j += blockDim.x)
            to[j] = from[j];
}

/* LAST: of a row of `out` that is named more than once only the last is written, as one after the other. */
template <bool FOURS, bool LAST>
__global__ void __launch_bounds__(THREADS) copy_rows_kernel(b2_tensor out, const int32_t *out_rows, b2_tensor x,
                                                            const int32_t *x_rows, int64_t n)
{
    int64_t i = blockIdx.x, to = out_rows ? out_rows[i] : i;
    if (LAST) {
        int again = 0;
        for (int64_t later = i + 1 + threadIdx.x; later < n; later += blockDim.x)
            again |= out_rows[later] == to;
        if (__syncthreads_or(again))
            return;
    }
    copy_row<FOURS>(out.data + to * out.ld, x.data + (x_rows ? x_rows[i] : i) * x.ld, x.cols);
}

/* One block, one row after the other: `x` and `out` lie over each other. */
__global__ void __launch_bounds__(THREADS) copy_rows_in_turn(b2_tensor out, const int32_t *out_rows, b2_tensor x,
                                                             const int32_t *x_rows, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        copy_row<false>(out.data + (out_rows ? out_rows[i] : i) * out.ld, x.data + (x_rows ? x_rows[i] : i) * x.ld, x.cols);
        __syncthreads();
    }
}

bool overlap(b2_tensor a, b2_tensor b)
{
    return a.rows && b.rows && a.data < b.data + (b.rows - 1) * b.ld + b.cols &&
           b.data < a.data + (a.rows - 1) * a.ld + a.cols;
}

bool ascending(const int32_t *list, int64_t n)
{
    for (int64_t i = 1; i < n; i++)
        if (list[i] <= list[i - 1])
            return false;
    return true;
}

template <bool FOURS, bool LAST>
void launch_copy(cudaStream_t stream, b2_tensor out, const int32_t *out_rows, b2_tensor x, const int32_t *x_rows, int64_t n)
{
    dim3 block(b2_threads_for(FOURS ? x.cols / 4 : x.cols, THREADS));
    B2_LAUNCH((copy_rows_kernel<FOURS, LAST>), dim3((unsigned)n), block, 0, stream, out, out_rows, x, x_rows, n);
}

/* ---- reductions ---- */

template <bool MEAN> __global__ void __launch_bounds__(THREADS) reduce_rows_kernel(b2_tensor out, b2_tensor x, int64_t count)
{
    int64_t column = (int64_t)blockIdx.y * blockDim.x + threadIdx.x;
    if (column >= out.cols)
        return;
    const float *from = x.data + (int64_t)blockIdx.x * count * x.ld + column;
    float all = from[0];
    for (int64_t row = 1; row < count; row++) {
        float next = from[row * x.ld];
        all = MEAN ? all + next : next > all ? next : all;
    }
    out.data[(int64_t)blockIdx.x * out.ld + column] = MEAN ? all / (float)count : all;
}

__global__ void __launch_bounds__(THREADS) unit_rows_kernel(b2_tensor out, b2_tensor x)
{
    __shared__ double parts[B2_WARPS_MOST];
    const float *from = x.data + (int64_t)blockIdx.x * x.ld;
    float *to = out.data + (int64_t)blockIdx.x * out.ld;
    double squares = 0.0;
    for (int64_t j = threadIdx.x; j < x.cols; j += blockDim.x)
        squares += (double)from[j] * from[j];
    float length = fmaxf((float)sqrt(b2_block_reduce<b2_sum>(squares, parts)), 1e-12f);
    for (int64_t j = threadIdx.x; j < x.cols; j += blockDim.x)
        to[j] = from[j] / length;
}

enum { SOFTMAX_THREADS = 1024 };

template <bool FOURS> __global__ void __launch_bounds__(SOFTMAX_THREADS) log_softmax_kernel(b2_tensor x)
{
    __shared__ float maxima[B2_WARPS_MOST], sums[B2_WARPS_MOST];
    float *row = x.data + (int64_t)blockIdx.x * x.ld, most = -INFINITY, sum = 0.0f;
    int64_t step = (FOURS ? 4 : 1) * (int64_t)blockDim.x, first = (FOURS ? 4 : 1) * (int64_t)threadIdx.x;
    for (int64_t j = first; j < x.cols; j += step) {
        if (FOURS) {
            float4 a = b2_load4(row + j);
            most = b2_nan_max::of(b2_nan_max::of(most, a.x), b2_nan_max::of(a.y, b2_nan_max::of(a.z, a.w)));
        } else {
            most = b2_nan_max::of(most, row[j]);
        }
    }
    most = b2_block_reduce<b2_nan_max>(most, maxima);
    for (int64_t j = first; j < x.cols; j += step) {
        if (FOURS) {
            float4 a = b2_load4(row + j);
            sum += (expf(a.x - most) + expf(a.y - most)) + (expf(a.z - most) + expf(a.w - most));
        } else {
            sum += expf(row[j] - most);
        }
    }
    float log_sum = logf(b2_block_reduce<b2_sum>(sum, sums));
    for (int64_t j = first; j < x.cols; j += step) {
        if (FOURS) {
            float4 a = b2_load4(row + j);
            b2_store4(row + j, make_float4(a.x - most - log_sum, a.y - most - log_sum, a.z - most - log_sum,
                                           a.w - most - log_sum));
        } else {
            row[j] = row[j] - most - log_sum;
        }
    }
}

} // namespace

int b2_cuda_layer_norm(b2_ctx *ctx, b2_tensor out, b2_tensor x, const b2_weight *gamma, const b2_weight *beta, float eps,
                       b2_err *err)
{
    return norm<true>(ctx, out, x, vector_of(gamma), vector_of(beta), eps, err);
}

int b2_cuda_rms_norm(b2_ctx *ctx, b2_tensor out, b2_tensor x, const b2_weight *gamma, float eps, b2_err *err)
{
    return norm<false>(ctx, out, x, vector_of(gamma), NULL, eps, err);
}

int b2_cuda_gate(b2_ctx *ctx, b2_tensor out, b2_tensor gate, b2_tensor up, b2_act act, b2_err *err)
{
    cudaStream_t stream = b2_cuda_stream(ctx);
    if (gate.cols == 0)
        return 0;
    switch (act) {
    case B2_ACT_NONE: launch_gate<B2_ACT_NONE>(stream, out, gate, up); break;
    case B2_ACT_GELU_ERF: launch_gate<B2_ACT_GELU_ERF>(stream, out, gate, up); break;
    case B2_ACT_RELU: launch_gate<B2_ACT_RELU>(stream, out, gate, up); break;
    case B2_ACT_GELU_TANH: launch_gate<B2_ACT_GELU_TANH>(stream, out, gate, up); break;
    case B2_ACT_QUICK_GELU: launch_gate<B2_ACT_QUICK_GELU>(stream, out, gate, up); break;
    case B2_ACT_SILU: launch_gate<B2_ACT_SILU>(stream, out, gate, up); break;
    }
    return b2_cuda_launched("gate", err);
}

int b2_cuda_rope(b2_ctx *ctx, b2_tensor x, const int32_t *positions, const float *inv_freq, int rotary_dim, int head_dim,
                 float scaling, b2_err *err)
{
    int half = rotary_dim / 2;
    const int32_t *at = (const int32_t *)b2_cuda_index(ctx, positions, (size_t)x.rows * sizeof *positions, err);
    const float *turns = (const float *)b2_cuda_index(ctx, inv_freq, (size_t)half * sizeof *inv_freq, err);
    if (!at || !turns)
        return -1;
    dim3 block(b2_threads_for(x.cols / head_dim * half, THREADS));
    B2_LAUNCH(rope_kernel, dim3((unsigned)x.rows), block, 2 * (size_t)half * sizeof(float), b2_cuda_stream(ctx), x, at, turns,
              rotary_dim, head_dim, scaling);
    return b2_cuda_launched("rope", err);
}

int b2_cuda_patches(b2_ctx *ctx, b2_tensor out, b2_pictures pictures, int64_t patch, b2_err *err)
{
    B2_LAUNCH(patches_kernel, dim3((unsigned)out.rows), dim3(b2_threads_for(out.cols, THREADS)), 0, b2_cuda_stream(ctx), out,
              pictures, (int)patch);
    return b2_cuda_launched("patches", err);
}

int b2_cuda_copy_rows(b2_ctx *ctx, b2_tensor out, const int32_t *out_rows, b2_tensor x, const int32_t *x_rows, int64_t n,
                      b2_err *err)
{
    cudaStream_t stream = b2_cuda_stream(ctx);
    const int32_t *to = (const int32_t *)b2_cuda_index(ctx, out_rows, (size_t)n * sizeof *to, err);
    const int32_t *from = (const int32_t *)b2_cuda_index(ctx, x_rows, (size_t)n * sizeof *from, err);
    if ((out_rows && !to) || (x_rows && !from))
        return -1;
    /* A step that is recorded now may have other lists when it is repeated. */
    bool once = !out_rows || (!b2_cuda_of(ctx)->arrays_change && ascending(out_rows, n));
    bool fours = b2_by_fours_of(out) && b2_by_fours_of(x);
    if (overlap(out, x))
        B2_LAUNCH(copy_rows_in_turn, dim3(1), dim3(b2_threads_for(x.cols, THREADS)), 0, stream, out, to, x, from, n);
    else if (fours)
        once ? launch_copy<true, false>(stream, out, to, x, from, n) : launch_copy<true, true>(stream, out, to, x, from, n);
    else
        once ? launch_copy<false, false>(stream, out, to, x, from, n) : launch_copy<false, true>(stream, out, to, x, from, n);
    return b2_cuda_launched("copy_rows", err);
}

int b2_cuda_add_rows(b2_ctx *ctx, b2_tensor out, b2_tensor x, b2_err *err)
{
    if (x.cols == 0)
        return 0;
    if (b2_by_fours_of(out) && b2_by_fours_of(x))
        B2_LAUNCH(add_rows_kernel<true>, pieces(out, true), dim3(THREADS), 0, b2_cuda_stream(ctx), out, x);
    else
        B2_LAUNCH(add_rows_kernel<false>, pieces(out, false), dim3(THREADS), 0, b2_cuda_stream(ctx), out, x);
    return b2_cuda_launched("add_rows", err);
}

int b2_cuda_reduce_rows(b2_ctx *ctx, b2_tensor out, b2_tensor x, b2_reduction reduction, b2_err *err)
{
    if (out.cols == 0)
        return 0;
    dim3 grid = pieces(out, false), block(THREADS);
    if (reduction == B2_MEAN)
        B2_LAUNCH(reduce_rows_kernel<true>, grid, block, 0, b2_cuda_stream(ctx), out, x, x.rows / out.rows);
    else
        B2_LAUNCH(reduce_rows_kernel<false>, grid, block, 0, b2_cuda_stream(ctx), out, x, x.rows / out.rows);
    return b2_cuda_launched("reduce_rows", err);
}

int b2_cuda_unit_rows(b2_ctx *ctx, b2_tensor out, b2_tensor x, b2_err *err)
{
    B2_LAUNCH(unit_rows_kernel, dim3((unsigned)x.rows), dim3(b2_threads_for(x.cols, THREADS)), 0, b2_cuda_stream(ctx), out, x);
    return b2_cuda_launched("unit_rows", err);
}

int b2_cuda_log_softmax(b2_ctx *ctx, b2_tensor x, b2_err *err)
{
    bool fours = b2_by_fours_of(x);
    dim3 grid((unsigned)x.rows), block(b2_threads_for(fours ? x.cols / 4 : x.cols, SOFTMAX_THREADS));
    if (fours)
        B2_LAUNCH(log_softmax_kernel<true>, grid, block, 0, b2_cuda_stream(ctx), x);
    else
        B2_LAUNCH(log_softmax_kernel<false>, grid, block, 0, b2_cuda_stream(ctx), x);
    return b2_cuda_launched("log_softmax", err);
}
