/* Stands in for cuBLASLt where the tests name this library itself in BLIP2C_CUBLASLT: the functions that cublas.cu calls, with
 * the library's binary interface, computing with a plain kernel in ascending order of k. It refuses what the library would:
 * alignments and work spaces that were promised and are not kept. */
#include <stdint.h>
#include <string.h>

#include "ops/cuda/mma.h"

namespace {

struct desc_standin {
    int compute, scale;
    int32_t transposed_a;
};
struct layout_standin {
    int type;
    uint64_t rows, cols;
    int64_t ld;
};
struct preference_standin {
    uint64_t space;
    uint32_t alignment[4]; /* A, B, C, D */
};
struct choice_standin {
    uint32_t alignment[4]; /* the first of the algorithm's 64 bytes */
    uint64_t rest[6];
    size_t space;
    int state;
    float waves;
    int reserved[4];
};

const int INVALID = 7, NOT_SUPPORTED = 15;
const size_t SPACE = 1 << 20;
const uint64_t REFUSED = 13; /* output channels for which the way that was chosen fails after all */
int alive;                   /* objects that were made and not destroyed */
int products;                /* that were computed */

__device__ float element(const void *data, int type, int64_t at)
{
    if (type == 0)
        return ((const float *)data)[at];
    uint16_t bits = ((const uint16_t *)data)[at];
    return type == 2 ? b2_from_half(bits) : __uint_as_float((unsigned)bits << 16);
}

__global__ void product_kernel(float *d, layout_standin dl, const void *a, layout_standin al, const void *b,
                               layout_standin bl, char *space)
{
    int64_t at = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, column = at / (int64_t)dl.rows, row = at % (int64_t)dl.rows;
    if (space && at == 0)
        memset(space, 0x7f, SPACE);
    if (column >= (int64_t)dl.cols)
        return;
    float sum = 0.0f;
    for (int64_t k = 0; k < (int64_t)al.rows; k++)
        sum = fmaf(element(a, al.type, row * al.ld + k), element(b, bl.type, column * bl.ld + k), sum);
    d[column * dl.ld + row] = sum;
}

int unaligned(const void *data, uint32_t promised)
{
    return (uintptr_t)data % promised != 0;
}

} /* namespace */

#define LT_API extern "C" __attribute__((visibility("default")))

LT_API int cublas_standin_alive(void) { return alive; }
LT_API int cublas_standin_products(void) { return products; }
LT_API size_t cublasLtGetVersion(void) { return 130000; }
LT_API int cublasLtCreate(void **handle)
{
    alive++;
    *handle = &alive;
    return 0;
}
LT_API int cublasLtDestroy(void *)
{
    alive--;
    return 0;
}
LT_API int cublasLtMatmulDescCreate(desc_standin **desc, int compute, int scale)
{
    alive++;
    *desc = new desc_standin{compute, scale, 0};
    return compute == 68 && scale == 0 ? 0 : INVALID;
}
LT_API int cublasLtMatmulDescSetAttribute(desc_standin *desc, int attribute, const void *value, size_t bytes)
{
    if (attribute != 3 || bytes != sizeof desc->transposed_a)
        return INVALID;
    memcpy(&desc->transposed_a, value, bytes);
    return 0;
}
LT_API int cublasLtMatmulDescDestroy(desc_standin *desc)
{
    alive--;
    delete desc;
    return 0;
}
LT_API int cublasLtMatrixLayoutCreate(layout_standin **layout, int type, uint64_t rows, uint64_t cols, int64_t ld)
{
    alive++;
    *layout = new layout_standin{type, rows, cols, ld};
    return ld >= (int64_t)rows ? 0 : INVALID;
}
LT_API int cublasLtMatrixLayoutDestroy(layout_standin *layout)
{
    alive--;
    delete layout;
    return 0;
}
LT_API int cublasLtMatmulPreferenceCreate(preference_standin **preference)
{
    alive++;
    *preference = new preference_standin{0, {256, 256, 256, 256}};
    return 0;
}
LT_API int cublasLtMatmulPreferenceSetAttribute(preference_standin *p, int attribute, const void *value, size_t bytes)
{
    if (attribute == 1 && bytes == sizeof p->space)
        memcpy(&p->space, value, bytes);
    else if (attribute >= 5 && attribute <= 8 && bytes == sizeof(uint32_t))
        memcpy(&p->alignment[attribute - 5], value, bytes);
    else
        return INVALID;
    return 0;
}
LT_API int cublasLtMatmulPreferenceDestroy(preference_standin *preference)
{
    alive--;
    delete preference;
    return 0;
}
LT_API int cublasLtMatmulAlgoGetHeuristic(void *, desc_standin *desc, layout_standin *a, layout_standin *b,
                                          layout_standin *c, layout_standin *d, preference_standin *preference, int wanted,
                                          choice_standin *choice, int *found)
{
    if (wanted != 1 || desc->transposed_a != 1 || a->rows != b->rows || a->cols != d->rows || b->cols != d->cols || c != d ||
        a->type != b->type || d->type != 0)
        return INVALID;
    *found = a->rows % 8 == 0; /* as if it knew no way for others */
    memset(choice, 0, sizeof *choice);
    memcpy(choice->alignment, preference->alignment, sizeof choice->alignment);
    choice->space = preference->space < SPACE ? 0 : SPACE;
    return 0;
}
LT_API int cublasLtMatmul(void *, desc_standin *, const float *alpha, const void *a, layout_standin *al, const void *b,
                          layout_standin *bl, const float *beta, const void *c, layout_standin *, void *d,
                          layout_standin *dl, const choice_standin *choice, void *space, size_t bytes, cudaStream_t stream)
{
    const uint32_t *promised = choice->alignment;
    if (*alpha != 1.0f || *beta != 0.0f || c != d || (bytes && (bytes != SPACE || (uintptr_t)space % 256)))
        return INVALID;
    if (unaligned(a, promised[0]) || unaligned(b, promised[1]) || unaligned(c, promised[2]) || unaligned(d, promised[3]))
        return INVALID;
    if (dl->rows == REFUSED)
        return NOT_SUPPORTED;
    products++;
    dim3 grid((unsigned)((dl->rows * dl->cols + 63) / 64));
    B2_LAUNCH(product_kernel, grid, dim3(64), 0, stream, (float *)d, *dl, a, *al, b, *bl, bytes ? (char *)space : NULL);
    return cudaPeekAtLastError() == cudaSuccess ? 0 : INVALID;
}
