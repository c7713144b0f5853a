/* Weight tables: one list per submodel says which tensor of a checkpoint goes where. The same list binds, validates,
 * saves and releases; there is no second one.
 *
 * A packed file goes through the same lists: its tensors are placed instead of packed.
 *
 * Memory: a bound model owns its packed weights (b2_release_weights); weights that stay mapped point into the
 * checkpoint, which must outlive them. Names point into the store. */
#ifndef B2_MODEL_WEIGHT_TABLE_H
#define B2_MODEL_WEIGHT_TABLE_H

#include "core/error.h"
#include "core/memory.h"
#include "core/pool.h"
#include "core/tensor.h"
#include "io/safetensors.h"

/* The shards of one checkpoint. Owns the mappings. */
typedef struct b2_checkpoint {
    b2_st_file *files;      /* [count], owned */
    int64_t count;
    unsigned char **used;   /* [count][files[i].count]: 1 once bound; owned */
    int packed;             /* 1: the only file holds packed weights (io/packed.h), which are used where they lie */
} b2_checkpoint;

int b2_checkpoint_open(b2_checkpoint *checkpoint, const char *const *paths, int64_t count, b2_err *err);
void b2_checkpoint_close(b2_checkpoint *checkpoint);
/* NULL when absent. */
const b2_st_tensor *b2_checkpoint_find(const b2_checkpoint *checkpoint, const char *name);
/* Names nobody bound: calls fn for each. */
void b2_checkpoint_unused(const b2_checkpoint *checkpoint, void (*fn)(void *owner, const char *name), void *owner);

/* How a weight is held. */
typedef enum b2_kind {
    B2_VECTOR,      /* norms, biases: F32, in order */
    B2_TABLE,       /* rows that are added or copied (positions, query tokens): F32 [n, k] */
    B2_MATRIX_ITEM, /* a linear layer on whole pictures: F32 stays mapped for OpenBLAS, the others are packed */
    B2_MATRIX,      /* a linear layer on single tokens: packed */
    B2_VOCABULARY   /* the token table, the head: as B2_MATRIX, but int8 where the other matrices are int4: each of its rows
                     * is one word, whose error nothing averages out */
} b2_kind;

/* Lengths that shapes are made of; each submodel fills an array indexed by these. */
typedef enum b2_dim {
    B2_DIM_END = 0, /* no further axis */
    B2_DIM_1,
    B2_DIM_D,       /* width of the submodel */
    B2_DIM_3D,
    B2_DIM_F,       /* width of its feed-forward */
    B2_DIM_E,       /* width of what it reads (Q-Former: the vision width) */
    B2_DIM_T,       /* positions */
    B2_DIM_Q,       /* queries */
    B2_DIM_V,       /* vocabulary */
    B2_DIM_C,       /* picture channels */
    B2_DIM_P,       /* patch side */
    B2_DIM_H,       /* attention heads */
    B2_DIM_HDH,     /* heads * width of one, where that is not D */
    B2_DIM_KDH,     /* key heads * width of one */
    B2_DIM_DH,      /* width of one head */
    B2_DIM_R,       /* buckets of relative positions */
    B2_DIM_COUNT
} b2_dim;

typedef struct b2_weight_row {
    const char *name;      /* checkpoint name; a %d is the layer */
    size_t offset;         /* of the b2_weight inside the struct */
    b2_kind kind;
    unsigned char shape[5];/* b2_dim codes, B2_DIM_END-terminated */
} b2_weight_row;

/* The parts of a model whose dtypes are chosen apart. */
typedef enum b2_part { B2_PART_VISION = 0, B2_PART_QFORMER, B2_PART_LANGUAGE, B2_PART_COUNT } b2_part;

extern const char *const b2_part_names[B2_PART_COUNT];

typedef enum b2_hold {
    B2_HOLD_STORED = 0, /* in the dtype of the file */
    B2_HOLD_HALF,       /* in 16 bits: as stored, F32 narrowed to F16. What stays precise beside quantised parts */
    B2_HOLD_DTYPE       /* in `dtype`; but F32 leaves stored halves as they are: the products are the same */
} b2_hold;

/* How the matrices of one part are held. Vectors and tables are F32 whatever it says. */
typedef struct b2_dtype_policy {
    b2_hold hold;
    b2_dtype dtype; /* with B2_HOLD_DTYPE */
    int pairs;      /* 1: BF16 was asked for by name on a processor with its dot products: B2_PAIRS, bfloat16 arithmetic */
} b2_dtype_policy;

/* "vision=int8,qformer=half,language=int4": which values a packed file has been made for. */
enum { B2_POLICIES_TEXT = 96 };
void b2_policies_name(char text[B2_POLICIES_TEXT], const b2_dtype_policy policies[B2_PART_COUNT]);

typedef struct b2_binder {
    b2_checkpoint *checkpoint;
    b2_dtype_policy policy;
    b2_pool *pool;
    b2_cancel *cancel;   /* may be NULL */
    const int64_t *dims; /* [B2_DIM_COUNT] */
    b2_memory *memory;   /* of the device that matrices go to, as B2_STRIDED; NULL: they are packed for the processor */
    int widens;          /* 1: there float16 becomes F32 (the Q-Former, as in transformers under float16) */
    int layer;           /* fills %d */
    char **names;        /* owned list of weight names, grows; handed to the model */
    int64_t name_count;
    int64_t name_capacity;
} b2_binder;

/* Binds each row of `table` into the struct at `base`: finds the tensor, checks its shape, holds it as its kind says. */
int b2_bind(b2_binder *binder, void *base, const b2_weight_row *table, size_t count, b2_err *err);
/* As b2_bind for one row whose tensor may be absent: *found says so. */
int b2_bind_optional(b2_binder *binder, void *base, const b2_weight_row *row, int *found, b2_err *err);
/* The name with the layer filled in, owned by the binder; NULL on failure. */
const char *b2_binder_name(b2_binder *binder, const char *pattern, b2_err *err);
/* Finds a tensor, checks its shape against `shape` codes, marks it used; NULL + no error when absent. */
const b2_st_tensor *b2_binder_find(b2_binder *binder, const char *name, const unsigned char *shape, b2_err *err);
/* Whether the checkpoint holds both tensors, with the same bytes. After a cancel the answer does not matter. */
int b2_binder_same(const b2_binder *binder, const char *a, const char *b);
/* Binds a token table, and a head where it is one of its own. transformers ties the two when the config says so, unless
 * the file holds two different ones; some files keep the tied table only under the head's name. A tied head stays
 * absent: the table is one weight with two uses. */
int b2_bind_vocabulary(b2_binder *binder, void *base, const b2_weight_row *tokens, const b2_weight_row *head, int tied,
                       b2_err *err);
/* A tensor that older files hold and nobody reads: known, so not reported as unexpected. */
void b2_binder_ignore(b2_binder *binder, const char *name);
/* A view of a tensor as stored, [n, k] with n the product of the first `split` axes. */
int b2_stored_view(b2_weight *view, const b2_st_tensor *tensor, int split, b2_err *err);

/* Visits every present weight of a bound model: for saving and for counting. `shape` [rank] is the checkpoint's. */
typedef struct b2_weight_visitor {
    int (*fn)(struct b2_weight_visitor *visitor, const b2_weight *weight, const int64_t *shape, int rank, b2_err *err);
} b2_weight_visitor;

int b2_visit_weights(b2_weight_visitor *visitor, const void *base, const b2_weight_row *table, size_t count,
                     const int64_t *dims, b2_err *err);
void b2_release_weights(void *base, const b2_weight_row *table, size_t count);

#endif
