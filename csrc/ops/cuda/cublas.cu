/* cuBLASLt through a table of the few functions that are used; see cublas.h. Row-major out = x . w^T is, read column by
 * column as the library does, out^T [n, rows] = (w^T)^T . x^T.
 *
 * Where it is looked for: the file that BLIP2C_CUBLASLT names (it must be there; "0": use none), else what the process has
 * loaded already (an imported torch), the nvidia-cublas package beside this one, the system.
 *
 * Memory: one b2_cuda_products per queue, released with it. */
#include "ops/cuda/cublas.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* As in NVIDIA's headers; the numbers are part of the library's binary interface. */
enum {
    LT_R_32F = 0, LT_R_16F = 2, LT_R_16BF = 14, /* cudaDataType */
    LT_COMPUTE_32F = 68,                        /* cublasComputeType_t */
    LT_OP_T = 1,                                /* cublasOperation_t */
    LT_DESC_TRANSA = 3,                         /* cublasLtMatmulDescAttributes_t */
    LT_PREFERENCE_SPACE = 1,                    /* cublasLtMatmulPreferenceAttributes_t: workspace bytes */
    LT_PREFERENCE_ALIGNMENT_A = 5, LT_PREFERENCE_ALIGNMENT_B = 6, LT_PREFERENCE_ALIGNMENT_C = 7,
    LT_PREFERENCE_ALIGNMENT_D = 8,
    LT_NOT_SUPPORTED = 15                       /* cublasStatus_t */
};

/* cublasLtMatmulHeuristicResult_t */
struct lt_choice {
    uint64_t algorithm[8];
    size_t space;
    int state;
    float waves;
    int reserved[4];
};

struct lt_functions {
    size_t (*version)(void);
    int (*create)(void **handle);
    int (*destroy)(void *handle);
    int (*desc_create)(void **desc, int compute, int scale);
    int (*desc_set)(void *desc, int attribute, const void *value, size_t bytes);
    int (*desc_destroy)(void *desc);
    int (*layout_create)(void **layout, int type, uint64_t rows, uint64_t cols, int64_t ld);
    int (*layout_destroy)(void *layout);
    int (*preference_create)(void **preference);
    int (*preference_set)(void *preference, int attribute, const void *value, size_t bytes);
    int (*preference_destroy)(void *preference);
    int (*choose)(void *handle, void *desc, void *a, void *b, void *c, void *d, void *preference, int wanted,
                  lt_choice *choices, int *found);
    int (*multiply)(void *handle, void *desc, const void *alpha, const void *a, void *a_layout, const void *b,
                    void *b_layout, const void *beta, const void *c, void *c_layout, void *d, void *d_layout,
                    const void *algorithm, void *space, size_t bytes, cudaStream_t stream);
};

/* What a way is chosen for. Compared byte by byte: cleared before it is filled in. */
struct lt_shape {
    int64_t out_ld, x_ld, w_ld;
    size_t space;
    int rows, n, k, dtype, out_alignment, x_alignment;
};

struct lt_way {
    lt_shape shape;
    lt_choice choice;
    void *desc, *w, *x, *out; /* owned by the library; NULL: this entry is free */
    int usable;               /* 0: the library knows no way for this shape */
};

enum { WAYS = 256, WEIGHT_ALIGNMENT = 256 };

struct b2_cuda_products {
    void *library; /* from dlopen, or NULL */
    void *handle;
    lt_functions lt;
    lt_way ways[WAYS];
    int next; /* the entry that is given up for a new shape when all are taken */
    char name[512];
};

/* ---- finding the library ---- */

static const struct {
    const char *name;
    size_t offset;
} SYMBOLS[] = {
    {"cublasLtGetVersion", offsetof(lt_functions, version)},
    {"cublasLtCreate", offsetof(lt_functions, create)},
    {"cublasLtDestroy", offsetof(lt_functions, destroy)},
    {"cublasLtMatmulDescCreate", offsetof(lt_functions, desc_create)},
    {"cublasLtMatmulDescSetAttribute", offsetof(lt_functions, desc_set)},
    {"cublasLtMatmulDescDestroy", offsetof(lt_functions, desc_destroy)},
    {"cublasLtMatrixLayoutCreate", offsetof(lt_functions, layout_create)},
    {"cublasLtMatrixLayoutDestroy", offsetof(lt_functions, layout_destroy)},
    {"cublasLtMatmulPreferenceCreate", offsetof(lt_functions, preference_create)},
    {"cublasLtMatmulPreferenceSetAttribute", offsetof(lt_functions, preference_set)},
    {"cublasLtMatmulPreferenceDestroy", offsetof(lt_functions, preference_destroy)},
    {"cublasLtMatmulAlgoGetHeuristic", offsetof(lt_functions, choose)},
    {"cublasLtMatmul", offsetof(lt_functions, multiply)},
};

/* NULL, or the name of the first function that the library lacks. */
static const char *bind(lt_functions *lt, void *library)
{
    for (size_t i = 0; i < sizeof SYMBOLS / sizeof *SYMBOLS; i++) {
        void *symbol = dlsym(library, SYMBOLS[i].name);
        if (!symbol)
            return SYMBOLS[i].name;
        memcpy((char *)lt + SYMBOLS[i].offset, &symbol, sizeof symbol);
    }
    return NULL;
}

/* The library's file where pip puts nvidia-cublas: in the folder that holds the folder of this library. */
static void *open_beside(const char *within)
{
    Dl_info here;
    char path[4096];
    if (!dladdr((const void *)SYMBOLS, &here) || !here.dli_fname || strlen(here.dli_fname) + strlen(within) >= sizeof path)
        return NULL;
    strcpy(path, here.dli_fname);
    for (int up = 0; up < 2; up++) {
        char *slash = strrchr(path, '/');
        if (!slash)
            return NULL;
        *slash = 0;
    }
    strcat(path, "/");
    strcat(path, within);
    return dlopen(path, RTLD_NOW | RTLD_LOCAL);
}

/* A library for cards knows nothing of the streams and memory that stand in for one. */
#ifdef CUDA_HOST
enum { SEARCHES = 0 };
#else
enum { SEARCHES = 1 };
#endif

static void *search(void)
{
    static const char *const loaded[] = {"libcublasLt.so.13", "libcublasLt.so.12"};
    static const char *const packages[] = {"nvidia/cu13/lib/libcublasLt.so.13", "nvidia/cublas/lib/libcublasLt.so.12"};
    void *library = NULL;
    if (!SEARCHES)
        return NULL;
    for (int i = 0; i < 2 && !library; i++)
        library = dlopen(loaded[i], RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
    for (int i = 0; i < 2 && !library; i++)
        library = open_beside(packages[i]);
    for (int i = 0; i < 2 && !library; i++)
        library = dlopen(loaded[i], RTLD_NOW | RTLD_LOCAL);
    return library;
}

static int open_named(b2_cuda_products *products, const char *path, b2_err *err)
{
    products->library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!products->library)
        return b2_fail(err, B2_E_VALUE, "BLIP2C_CUBLASLT=%s: %s", path, dlerror());
    const char *missing = bind(&products->lt, products->library);
    return missing ? b2_fail(err, B2_E_VALUE, "BLIP2C_CUBLASLT=%s: it has no function %s", path, missing) : 0;
}

static void own_kernels(b2_cuda_products *products, const char *why, const char *what)
{
    if (products->library)
        dlclose(products->library);
    products->library = NULL;
    snprintf(products->name, sizeof products->name, "own kernels (%s%s)", why, what);
}

/* Fills in library and lt, or says in name why own kernels are used. -1 where a named library is none. */
static int find_library(b2_cuda_products *products, b2_err *err)
{
    const char *named = getenv("BLIP2C_CUBLASLT");
    if (named && !strcmp(named, "0")) {
        own_kernels(products, "BLIP2C_CUBLASLT=0", "");
        return 0;
    }
    if (named && *named) {
        if (open_named(products, named, err) < 0)
            return -1;
    } else {
        products->library = search();
        const char *missing = products->library ? bind(&products->lt, products->library) : NULL;
        if (!products->library || missing) {
            own_kernels(products, missing ? "cuBLASLt has no function " : "no cuBLASLt was found", missing ? missing : "");
            return 0;
        }
    }
    snprintf(products->name, sizeof products->name, "cuBLASLt %zu", products->lt.version());
    return 0;
}

static int open_library(b2_cuda_products *products, b2_err *err)
{
    if (find_library(products, err) < 0)
        return -1;
    int status = products->library ? products->lt.create(&products->handle) : 0;
    if (status != 0) {
        char number[16];
        snprintf(number, sizeof number, "%d", status);
        own_kernels(products, "cublasLtCreate failed with status ", number);
    }
    return 0;
}

void b2_cublas_describe(char *text, size_t bytes)
{
    b2_err err = {};
    b2_cuda_products *products = (b2_cuda_products *)b2_alloc_zeroed(1, sizeof *products, "products", &err);
    int status = products ? find_library(products, &err) : -1;
    snprintf(text, bytes, "%s", status < 0 ? err.message : products->name);
    b2_cuda_products_release(products);
}

/* Makes cuda->products. */
static int prepare(b2_cuda *cuda, b2_err *err)
{
    if (cuda->products)
        return 0;
    b2_cuda_products *products = (b2_cuda_products *)b2_alloc_zeroed(1, sizeof *products, "products", err);
    if (!products)
        return -1;
    if (open_library(products, err) < 0) {
        b2_cuda_products_release(products);
        return -1;
    }
    cuda->products = products;
    return 0;
}

const char *b2_cublas_library(b2_cuda *cuda, b2_err *err)
{
    return prepare(cuda, err) < 0 ? NULL : cuda->products->name;
}

/* ---- ways ---- */

static void forget(const lt_functions *lt, lt_way *way)
{
    if (way->desc)
        lt->desc_destroy(way->desc);
    void *const layouts[] = {way->w, way->x, way->out};
    for (int i = 0; i < 3; i++)
        if (layouts[i])
            lt->layout_destroy(layouts[i]);
    memset(way, 0, sizeof *way);
}

void b2_cuda_products_release(b2_cuda_products *products)
{
    if (!products)
        return;
    for (int i = 0; i < WAYS; i++)
        forget(&products->lt, &products->ways[i]);
    if (products->handle)
        products->lt.destroy(products->handle);
    if (products->library)
        dlclose(products->library);
    b2_free(products);
}

static int alignment_of(const void *data, size_t row_bytes)
{
    uintptr_t bits = (uintptr_t)data | row_bytes;
    int alignment = 4;
    while (alignment < 256 && bits % (uintptr_t)(2 * alignment) == 0)
        alignment *= 2;
    return alignment;
}

static int prefer(const lt_functions *lt, void *preference, const lt_shape *s)
{
    uint32_t w = WEIGHT_ALIGNMENT, x = (uint32_t)s->x_alignment, out = (uint32_t)s->out_alignment;
    uint64_t space = s->space;
    return lt->preference_set(preference, LT_PREFERENCE_SPACE, &space, sizeof space) ||
           lt->preference_set(preference, LT_PREFERENCE_ALIGNMENT_A, &w, sizeof w) ||
           lt->preference_set(preference, LT_PREFERENCE_ALIGNMENT_B, &x, sizeof x) ||
           lt->preference_set(preference, LT_PREFERENCE_ALIGNMENT_C, &out, sizeof out) ||
           lt->preference_set(preference, LT_PREFERENCE_ALIGNMENT_D, &out, sizeof out);
}

/* Fills in `way` for its shape; a shape for which the library has nothing stays unusable. */
static void choose(const b2_cuda_products *products, lt_way *way)
{
    const lt_functions *lt = &products->lt;
    const lt_shape *s = &way->shape;
    int type = s->dtype == B2_F32 ? LT_R_32F : s->dtype == B2_F16 ? LT_R_16F : LT_R_16BF, found = 0;
    int32_t transposed = LT_OP_T;
    void *preference = NULL;
    if (lt->desc_create(&way->desc, LT_COMPUTE_32F, LT_R_32F) == 0 &&
        lt->desc_set(way->desc, LT_DESC_TRANSA, &transposed, sizeof transposed) == 0 &&
        lt->layout_create(&way->w, type, (uint64_t)s->k, (uint64_t)s->n, s->w_ld) == 0 &&
        lt->layout_create(&way->x, type, (uint64_t)s->k, (uint64_t)s->rows, s->x_ld) == 0 &&
        lt->layout_create(&way->out, LT_R_32F, (uint64_t)s->n, (uint64_t)s->rows, s->out_ld) == 0 &&
        lt->preference_create(&preference) == 0 && prefer(lt, preference, s) == 0 &&
        lt->choose(products->handle, way->desc, way->w, way->x, way->out, way->out, preference, 1, &way->choice,
                   &found) == 0)
        way->usable = found == 1 && way->choice.state == 0 && way->choice.space <= s->space;
    if (preference)
        lt->preference_destroy(preference);
}

static const lt_way *way_for(b2_cuda_products *products, const lt_shape *shape)
{
    for (int i = 0; i < WAYS && products->ways[i].shape.rows; i++)
        if (!memcmp(&products->ways[i].shape, shape, sizeof *shape))
            return &products->ways[i];
    lt_way *way = &products->ways[products->next];
    products->next = (products->next + 1) % WAYS;
    forget(&products->lt, way);
    way->shape = *shape;
    choose(products, way);
    return way;
}

/* What is left in the arena at multiples of 256 bytes, in steps that keep the number of different shapes small. */
static size_t space_left(const b2_arena *arena)
{
    const size_t step = 1 << 20, most = B2_CUBLAS_SPACE;
    size_t left = arena->size - arena->used;
    left = left < 256 ? 0 : (left - 256) / step * step;
    return left < most ? left : most;
}

static int run(b2_ctx *ctx, const lt_way *way, const b2_cublas_product *p, b2_err *err)
{
    b2_cuda *cuda = b2_cuda_of(ctx);
    const b2_cuda_products *products = cuda->products;
    size_t mark = b2_arena_mark(ctx->activations);
    char *space = NULL;
    if (way->choice.space) {
        space = (char *)b2_arena_take(ctx->activations, way->choice.space + 256, 1, err);
        if (!space)
            return -1;
        space += (256 - (uintptr_t)space % 256) % 256;
    }
    float one = 1.0f, zero = 0.0f;
    int status = products->lt.multiply(products->handle, way->desc, &one, p->w, way->w, p->x, way->x, &zero, p->out,
                                       way->out, p->out, way->out, way->choice.algorithm, space, way->choice.space,
                                       cuda->stream);
    b2_arena_reset(ctx->activations, mark);
    if (status == LT_NOT_SUPPORTED)
        return 1;
    if (status != 0)
        return b2_fail(err, B2_E_INTERNAL, "linear: cublasLtMatmul [%d, %d] x [%d, %d] failed with status %d", p->rows, p->k,
                       p->n, p->k, status);
    return 0;
}

int b2_cublas_multiply(b2_ctx *ctx, const b2_cublas_product *p, b2_err *err)
{
    b2_cuda *cuda = b2_cuda_of(ctx);
    if (!cuda->products && cuda->capturing)
        return 1; /* opening a library is no work for a stream that is being recorded */
    if (prepare(cuda, err) < 0)
        return -1;
    if (!cuda->products->library || (uintptr_t)p->w % WEIGHT_ALIGNMENT != 0)
        return 1;
    size_t size = b2_dtype_size(p->dtype);
    lt_shape shape;
    memset(&shape, 0, sizeof shape);
    shape.rows = p->rows;
    shape.n = p->n;
    shape.k = p->k;
    shape.dtype = p->dtype;
    shape.out_ld = p->out_ld;
    shape.x_ld = p->x_ld;
    shape.w_ld = p->w_ld;
    shape.space = space_left(ctx->activations);
    shape.out_alignment = alignment_of(p->out, (size_t)p->out_ld * sizeof(float));
    shape.x_alignment = alignment_of(p->x, (size_t)p->x_ld * size);
    const lt_way *way = way_for(cuda->products, &shape);
    return way->usable ? run(ctx, way, p, err) : 1;
}
