/* The contract: every operation that the model and the generation code are written against.
 *
 * Callers call b2_linear(), b2_attention(), ...; these check shapes once (ops.c) and then call the backend's function
 * in `b2_ops`. A backend is that table filled in (ops/cpu, ops/cuda). Read by C and C++.
 *
 * What is where: the data of tensors, weights, pictures and records, and the outputs of attention_weights and top_k, are in
 * backend memory (ctx->memory). All else that arguments point to is on the host and may be changed as soon as the call
 * returns: ids, positions, offsets, starts, lengths, slots, row lists, masks, inv_freq, distance_bias. Backends with a queue
 * of work return before it is done; b2_download and check_finite wait for it.
 *
 * Letters: B rows of the batch (sequences or pictures), N packed tokens of all rows, T tokens of one row, D width,
 * H heads, Dh head width, V vocabulary, P patch side.
 *
 * Same bits (CPU, fp32): an output element does not depend on how many other rows there are, where its row stands,
 * how many threads run or how work is tiled. Each product is one chain of fused multiply-adds over ascending K
 * starting from 0; bias, activation, residual follow in this order. The one exception is a fp32 weight in B2_ROWS
 * layout with `item_rows`: it goes through OpenBLAS in tiles whose shape depends on the model and on one item alone. */
#ifndef B2_OPS_H
#define B2_OPS_H

#include "core/arena.h"
#include "core/error.h"
#include "core/tensor.h"
#include "ops/choice.h"

#ifdef __CUDACC__
#define B2_ANYWHERE __host__ __device__ /* kernels call it too */
#else
#define B2_ANYWHERE
#endif

typedef struct b2_pool b2_pool;
typedef struct b2_cancel b2_cancel;
typedef struct b2_ops b2_ops;
typedef struct b2_tap b2_tap;
struct b2_attention_args;

/* What the rows of a product are. Weights that are quantised, or in B2_PAIRS, meet few rows with finer activations (16
 * bits, or fp32) than many (8 bits, or bfloat16), because then memory is what is waited for. A model must not let that
 * depend on how many rows happen to stand side by side: it says what they are. */
typedef enum b2_rows_are {
    B2_ROWS_COUNTED = 0, /* fine up to 15 rows: products on their own */
    B2_ROWS_TOGETHER,    /* many tokens of prompts or pictures: coarse, however few they are */
    B2_ROWS_APART        /* one token of each sequence: fine, however many they are */
} b2_rows_are;

/* Where a computation runs. One per session; not shared by threads. Owns nothing. */
typedef struct b2_ctx {
    const b2_ops *ops;
    b2_pool *pool;
    b2_arena *scratch;     /* on the host */
    b2_arena *activations; /* in backend memory; on the CPU the same arena as scratch */
    b2_memory *memory;     /* backend memory; NULL: the heap */
    void *queue;           /* the backend's own (ops/cuda: a b2_cuda); NULL on the CPU */
    b2_cancel *cancel; /* may be NULL */
    b2_tap *tap;       /* who watches hidden states; may be NULL */
    b2_rows_are rows_are;
} b2_ctx;

/* Called with the hidden states after each stage: ("vision", layer, [N, D]). `layer` counts as transformers does in
 * hidden_states: 0 is the embedding output, i + 1 the output of layer i. Language models report once more, as layer
 * L + 1, what follows their final norm. */
struct b2_tap {
    int (*fn)(b2_tap *tap, b2_ctx *ctx, const char *stage, int layer, b2_tensor hidden, b2_err *err);
    /* NULL: nobody wants attention weights. Else called after each attention with its arguments (the stage has run it
     * already); who wants the weights computes them with b2_attention_weights. `stage` is "vision", "qformer",
     * "qformer_cross", "language_model", "encoder", "decoder" or "decoder_cross"; `layer` counts from 0. */
    int (*attention)(b2_tap *tap, b2_ctx *ctx, const char *stage, int layer, const struct b2_attention_args *args,
                     b2_err *err);
};

typedef enum b2_act {
    B2_ACT_NONE = 0,
    B2_ACT_GELU_ERF,
    B2_ACT_RELU,
    B2_ACT_GELU_TANH,
    B2_ACT_QUICK_GELU,
    B2_ACT_SILU
} b2_act;

typedef enum b2_reduction { B2_MEAN = 0, B2_MAX } b2_reduction;

typedef struct b2_linear_opts {
    const b2_weight *bias; /* [Dout] or NULL */
    b2_act act;
    b2_tensor residual;    /* [N, Dout], added after the activation; data NULL: none; may be `out` itself */
    int64_t item_rows;     /* b2_item_rows() when N is whole pictures (a multiple of it); 0: rows are single tokens */
} b2_linear_opts;

/* Multi-head attention over up to two stretches of keys per row: a prefix (contiguous) and a suffix (through slots).
 * Query i of row b (0 <= i < T_b) sees key j of the row's concatenated keys iff
 *     (!causal || j <= keys_b - T_b + i)  and  (!key_mask || key_mask[b * key_mask_ld + j]),
 * where keys_b = prefix_lens[b] + suffix_lens[b]. A query that sees no key gets zeros.
 * Scores are scale * (q . k) + distance_bias, softmax in fp32. Heads lie side by side: head h is columns [h*Dh, (h+1)*Dh). */
typedef struct b2_attention_args {
    b2_tensor out;               /* [N, H*Dh] */
    b2_tensor q;                 /* [N, H*Dh] */
    int64_t rows;                /* B */
    const int32_t *q_offsets;    /* [B+1]: row b's queries are q[q_offsets[b] .. q_offsets[b+1]) */
    b2_tensor k, v;              /* [*, Hkv*Dh]: where prefix keys and values lie */
    const int32_t *prefix_starts;/* [B]: first row of k and v */
    const int32_t *prefix_lens;  /* [B] */
    b2_tensor k_suffix, v_suffix;/* [*, Hkv*Dh]; data NULL: no suffix */
    const int32_t *suffix_slots; /* [B, suffix_ld]: suffix key s of row b is row suffix_slots[b*suffix_ld + s] */
    int64_t suffix_ld;
    const int32_t *suffix_lens;  /* [B] or NULL */
    const uint8_t *key_mask;     /* [B, key_mask_ld], 1 = may be seen; NULL: all */
    int64_t key_mask_ld;
    int causal;
    int heads;                   /* H */
    int kv_heads;                /* Hkv, divides H */
    int head_dim;                /* Dh */
    float scale;
    const float *distance_bias;  /* [H, 2L - 1] or NULL: entry clamp(j - (keys_b - T_b + i), -(L-1), L-1) + L - 1 is added
                                  * to the score of query i and key j: T5's relative position bias */
    int64_t distance_limit;      /* L */
    b2_dtype keys;               /* what k, v, k_suffix and v_suffix hold: B2_F32; on devices B2_F16 or B2_BF16 too */
    int64_t window;              /* 0: all; else query i sees only keys j > keys_b - T_b + i - window (sliding window) */
    b2_dtype operands;           /* B2_F16 or B2_BF16: q, k, v and the softmax may be rounded to this before they are
                                  * multiplied, as models stored so do upstream (sums are fp32); B2_F32: they may not */
} b2_attention_args;

/* What b2_attention_args.operands may be where queries, keys and values are made by this weight. */
static inline b2_dtype b2_operands_of(const b2_weight *weight)
{
    return weight->dtype == B2_F32 || weight->dtype == B2_BF16 ? weight->dtype : B2_F16;
}

/* Pixels of pictures of one size, C-contiguous. A view: it owns nothing. */
typedef struct b2_pictures {
    const float *data; /* [B, C, height, width] */
    int64_t count;     /* B */
    int64_t channels;  /* C */
    int64_t height, width;
} b2_pictures;

/* Pictures of an index, each a record of the same size: its Q vectors [Q, P] in ceil(Q/16) panels as b2_weight holds them,
 * F16 in B2_PANELS or I8 in B2_QUADS (behind the panels' bytes their scales F32 [panels][16], one a vector). Where Q is no
 * multiple of 16, the last panel repeats the first vector, which changes no maximum. */
typedef struct b2_records {
    const void *data;  /* [pictures] records */
    int64_t pictures;  /* N */
    int64_t queries;   /* Q */
    int64_t width;     /* P */
    b2_dtype dtype;    /* B2_F16 or B2_I8 */
} b2_records;

static inline int64_t b2_record_panels(const b2_records *r)
{
    return (r->queries + B2_PANEL - 1) / B2_PANEL;
}

/* Bytes of one panel's vectors, without scales. */
static inline int64_t b2_record_panel_bytes(const b2_records *r)
{
    return B2_PANEL * (r->dtype == B2_I8 ? (r->width + 31) / 32 * 32 : 2 * r->width);
}

static inline int64_t b2_record_bytes(const b2_records *r)
{
    int64_t scales = r->dtype == B2_I8 ? B2_PANEL * (int64_t)sizeof(float) : 0;
    return b2_record_panels(r) * (b2_record_panel_bytes(r) + scales);
}

/* All that a search looks at of logits [N, V], on the host, so that they need not come there. */
typedef struct b2_shortlist {
    int k;                      /* candidates wanted of each row, 1 .. B2_SHORTLIST_MOST */
    int adds_up;                /* 1: `sums` are wanted */
    const int32_t *listed;      /* [N, listed_ld]: ids that are no candidates, whose logits are wanted instead; below 0: none */
    int64_t listed_ld;
    /* Out: in the memory that the caller gives. */
    const double *sums;         /* [N] sum of exp(x - top), as b2_scores_log_softmax adds it up */
    const float *tops;          /* [N] the largest of the whole row */
    const int32_t *crowded;     /* [N] 1: too many are as large as the k-th, and there are no candidates */
    const float *values;        /* [N, k] the largest, equal ones by ascending id */
    const int32_t *ids;         /* [N, k]; -1 where there are no more */
    const float *listed_values; /* [N, listed_ld]; of an id below 0: anything */
} b2_shortlist;

enum { B2_SHORTLIST_MOST = 64 };

static inline size_t b2_shortlist_bytes(int64_t rows, int k, int64_t listed_ld)
{
    size_t row = sizeof(double) + sizeof(float) + sizeof(int32_t) + (size_t)k * (sizeof(float) + sizeof(int32_t)) +
                 (size_t)listed_ld * (sizeof(float) + sizeof(int32_t));
    return (size_t)rows * row;
}

/* How the shortlists of N rows lie in a block of b2_shortlist_bytes: results, then the listed ids. */
typedef struct b2_shortlist_parts {
    double *sums;
    float *tops;
    int32_t *crowded;
    float *values;
    int32_t *ids;
    float *listed_values;
    int32_t *listed;
    int64_t listed_ld;
    int k;
} b2_shortlist_parts;

B2_ANYWHERE static inline b2_shortlist_parts b2_shortlist_parts_of(void *block, int64_t rows, int k, int64_t listed_ld)
{
    b2_shortlist_parts p;
    p.sums = (double *)block;
    p.tops = (float *)(p.sums + rows);
    p.crowded = (int32_t *)(p.tops + rows);
    p.values = (float *)(p.crowded + rows);
    p.ids = (int32_t *)(p.values + rows * k);
    p.listed_values = (float *)(p.ids + rows * k);
    p.listed = (int32_t *)(p.listed_values + rows * listed_ld);
    p.listed_ld = listed_ld;
    p.k = k;
    return p;
}

/* What steps have in common that differ in nothing but the contents of the host arrays that their operations are given:
 * the arrays' addresses are the same, and all other arguments. */
typedef struct b2_step_shape {
    const void *key; /* [bytes]: differs whenever anything else does */
    size_t bytes;
    int constant;    /* 1: the body makes the host arrays itself, and makes the same ones whenever the key is the same; then their
                      * addresses do not matter */
    int turns;       /* 0, or: the body ends with b2_choose, which asks for so many steps */
    int *repeats;    /* out where turns > 0: 1 where up to so many are done, by one call of b2_step_run; 0: this one alone */
} b2_step_shape;

typedef int (*b2_step_fn)(b2_ctx *ctx, void *argument, b2_err *err);

struct b2_ops {
    const char *name;
    int items_by_blas; /* 1: whole pictures times a fp32 weight are fastest through the vendor's product */
    int (*linear)(b2_ctx *, b2_tensor out, b2_tensor x, const b2_weight *w, const b2_linear_opts *, b2_err *);
    int (*layer_norm)(b2_ctx *, b2_tensor out, b2_tensor x, const b2_weight *gamma, const b2_weight *beta, float eps,
                      b2_err *);
    int (*rms_norm)(b2_ctx *, b2_tensor out, b2_tensor x, const b2_weight *gamma, float eps, b2_err *);
    int (*gate)(b2_ctx *, b2_tensor out, b2_tensor gate, b2_tensor up, b2_act act, b2_err *);
    int (*rope)(b2_ctx *, b2_tensor x, const int32_t *positions, const float *inv_freq, int rotary_dim, int head_dim,
                float scaling, b2_err *);
    int (*attention)(b2_ctx *, const b2_attention_args *, b2_err *);
    int (*attention_weights)(b2_ctx *, float *weights, const b2_attention_args *, b2_err *);
    int (*embedding)(b2_ctx *, b2_tensor out, const b2_weight *table, const int32_t *ids, int32_t offset, int accumulate,
                     b2_err *);
    int (*patches)(b2_ctx *, b2_tensor out, b2_pictures pictures, int64_t patch, b2_err *);
    int (*copy_rows)(b2_ctx *, b2_tensor out, const int32_t *out_rows, b2_tensor x, const int32_t *x_rows, int64_t n,
                     b2_err *);
    /* NULL where nothing is kept in 16 bits. */
    int (*store_rows)(b2_ctx *, b2_tensor out, b2_dtype dtype, const int32_t *out_rows, b2_tensor x, b2_err *);
    int (*add_rows)(b2_ctx *, b2_tensor out, b2_tensor x, b2_err *);
    int (*reduce_rows)(b2_ctx *, b2_tensor out, b2_tensor x, b2_reduction reduction, b2_err *);
    int (*unit_rows)(b2_ctx *, b2_tensor out, b2_tensor x, b2_err *);
    int (*top_k)(b2_ctx *, float *values, int32_t *ids, b2_tensor x, int k, b2_err *);
    int (*log_softmax)(b2_ctx *, b2_tensor x, b2_err *);
    /* NULL where backend memory is the host's. */
    int (*shortlist)(b2_ctx *, b2_shortlist *list, b2_tensor x, void *there, void *here, b2_err *);
    int (*choose)(b2_ctx *, const b2_choice *choice, const b2_choice_tables *tables, b2_tensor logits, b2_err *err);
    int (*check_finite)(b2_ctx *, int64_t *first_bad_row, b2_tensor x, b2_err *);
    int (*note_finite)(b2_ctx *, const char *stage, int layer, b2_tensor x, b2_err *err);
    int (*picture_scores)(b2_ctx *, b2_tensor out, b2_tensor texts, const b2_records *records, b2_err *);
    int (*upload)(b2_ctx *, void *to, const void *from, size_t bytes, b2_err *);
    int (*download)(b2_ctx *, void *to, const void *from, size_t bytes, b2_err *);
    void (*wait)(b2_ctx *);
    /* NULL where backend memory is the host's. */
    int (*finish)(b2_ctx *, b2_err *);
    int (*step)(b2_ctx *, b2_step_shape shape, b2_step_fn body, void *argument, b2_err *);
    size_t (*scratch_bytes)(const b2_ctx *, int64_t max_rows, int64_t max_width, int64_t max_keys, int max_head_dim);
};

/* The most that any single operation takes from ctx->activations, for activations of up to max_rows x max_width and
 * attention over up to max_keys keys of a row in heads of up to max_head_dim. The owner of the arena reserves this
 * besides its own activations; operations allocate nothing. ctx needs `ops` and `pool` only. */
size_t b2_scratch_bytes(const b2_ctx *ctx, int64_t max_rows, int64_t max_width, int64_t max_keys, int max_head_dim);

/* out [N, Dout] = act(x [N, Din] . w^T + bias) + residual.  w is [Dout, Din]. out must not overlap x. */
int b2_linear(b2_ctx *ctx, b2_tensor out, b2_tensor x, const b2_weight *w, const b2_linear_opts *opts, b2_err *err);

/* `rows` of one picture, to be passed as item_rows, where this backend wants whole pictures to go through the vendor's
 * product; else 0. */
static inline int64_t b2_item_rows(const b2_ctx *ctx, int64_t rows)
{
    return ctx->ops->items_by_blas ? rows : 0;
}

/* out = (x - mean) / sqrt(var + eps) * gamma + beta over the last axis; gamma, beta [D], either may be absent (data
 * NULL); out may be x. */
int b2_layer_norm(b2_ctx *ctx, b2_tensor out, b2_tensor x, const b2_weight *gamma, const b2_weight *beta, float eps,
                  b2_err *err);

/* out = x / sqrt(mean(x^2) + eps) * gamma over the last axis (T5LayerNorm, LlamaRMSNorm); gamma [D]; out may be x. */
int b2_rms_norm(b2_ctx *ctx, b2_tensor out, b2_tensor x, const b2_weight *gamma, float eps, b2_err *err);

/* out = act(gate) * up, elementwise (T5's gated feed-forward, SwiGLU); out may be either. */
int b2_gate(b2_ctx *ctx, b2_tensor out, b2_tensor gate, b2_tensor up, b2_act act, b2_err *err);

/* In place on x [N, heads * head_dim]: in every head, element j < rotary_dim/2 and its partner j + rotary_dim/2 turn by
 * positions[i] * inv_freq[j] (transformers' rotate_half), times `scaling`; what lies behind rotary_dim stays. positions
 * [N] (a negative one counts as 0), inv_freq [rotary_dim/2]. */
int b2_rope(b2_ctx *ctx, b2_tensor x, const int32_t *positions, const float *inv_freq, int rotary_dim, int head_dim,
            float scaling, b2_err *err);

int b2_attention(b2_ctx *ctx, const b2_attention_args *args, b2_err *err);

/* The softmax weights of the same attention, for those who want to look at them: row after row [H, T_b, keys_b], zeros
 * where a key is not seen. args->out is not touched, v may be empty. */
int b2_attention_weights(b2_ctx *ctx, float *weights, const b2_attention_args *args, b2_err *err);

/* out[i] = table[ids[i] + offset] (or += when accumulate); ids [N]; where ids[i] + offset < 0 the row stays as it is. */
int b2_embedding(b2_ctx *ctx, b2_tensor out, const b2_weight *table, const int32_t *ids, int32_t offset, int accumulate,
                 b2_err *err);

/* Pictures into rows of flattened patches, in the order of a convolution weight [D, C, P, P]: out [B * (height/P) *
 * (width/P), C*P*P], patches line by line. What is left over where P does not divide a side is dropped, as a strided
 * convolution does. */
int b2_patches(b2_ctx *ctx, b2_tensor out, b2_pictures pictures, int64_t patch, b2_err *err);

/* out[out_rows[i]] = x[x_rows[i]] for i in [0, n); a NULL index list means i itself. */
int b2_copy_rows(b2_ctx *ctx, b2_tensor out, const int32_t *out_rows, b2_tensor x, const int32_t *x_rows, int64_t n,
                 b2_err *err);

/* The same with out[out_rows[i]] = x[i] for all rows of x, `out` being of elements of `dtype` (B2_F32; on devices B2_F16 or B2_BF16
 * too). What lies beyond the range of B2_F16 becomes NaN, which nobody overlooks (b2_note_finite): an Inf among keys may look like a key
 * that is not seen. */
int b2_store_rows(b2_ctx *ctx, b2_tensor out, b2_dtype dtype, const int32_t *out_rows, b2_tensor x, b2_err *err);

/* out[i] += x[i mod x.rows]: the same rows (position embeddings) onto every picture. */
int b2_add_rows(b2_ctx *ctx, b2_tensor out, b2_tensor x, b2_err *err);

/* out [B, D]: column by column the mean or the largest of each n rows of x [B*n, D], all of them numbers. */
int b2_reduce_rows(b2_ctx *ctx, b2_tensor out, b2_tensor x, b2_reduction reduction, b2_err *err);

/* out = x / max(|x|, 1e-12), row by row: every row gets length 1 (torch's normalize); out may be x. */
int b2_unit_rows(b2_ctx *ctx, b2_tensor out, b2_tensor x, b2_err *err);

/* The k largest of each row of x [N, V], largest first, equal values by ascending id, NaN last: values, ids [N, k]. */
int b2_top_k(b2_ctx *ctx, float *values, int32_t *ids, b2_tensor x, int k, b2_err *err);

/* In place over the last axis, as torch.log_softmax in fp32. */
int b2_log_softmax(b2_ctx *ctx, b2_tensor x, b2_err *err);

/* The shortlist of x [N, V], which is all numbers (b2_note_finite). Waits for it. there, here: b2_shortlist_bytes(N, k,
 * listed_ld) of backend and host memory, at multiples of 16. B2_E_UNSUPPORTED where backend memory is the host's. */
int b2_make_shortlist(b2_ctx *ctx, b2_shortlist *list, b2_tensor x, void *there, void *here, b2_err *err);

/* The end of a step that chooses for itself (choice.h), from its logits [N, V]: only in a body that b2_step_run may repeat,
 * where it counts turns and says whether there is another. Elsewhere it does nothing. */
int b2_choose(b2_ctx *ctx, const b2_choice *choice, const b2_choice_tables *tables, b2_tensor logits, b2_err *err);

/* first_bad_row = index of the first row of x that holds a NaN or an Inf, or -1. */
int b2_check_finite(b2_ctx *ctx, int64_t *first_bad_row, b2_tensor x, b2_err *err);

/* A NaN or Inf in x [N, D], which `stage` has after `layer` layers (B2_LOGITS: what its head gives), is B2_E_NUMERIC: at once, or of the next b2_download where
 * the backend has a queue. `stage` is a constant. */
int b2_note_finite(b2_ctx *ctx, const char *stage, int layer, b2_tensor x, b2_err *err);

enum { B2_LOGITS = -1, B2_GIVEN = -2 /* an argument of a caller, `stage` its name */ };

/* -1 with the error of b2_note_finite, for backends. */
int b2_fail_finite(b2_err *err, const char *stage, int layer, int64_t row);

/* out [T, N] = the largest product of text t [T, P] with any of the vectors of picture n: of unit vectors, the largest
 * cosine. One pass over the records for many texts. An element is the same whatever T, N and the threads are. Allocates
 * a little by itself, takes nothing from ctx->activations. */
int b2_picture_scores(b2_ctx *ctx, b2_tensor out, b2_tensor texts, const b2_records *records, b2_err *err);

/* ---- memory ---- */

/* 1: backend memory is the heap, and what the callers below copy is where it should be already. */
static inline int b2_on_host(const b2_ctx *ctx)
{
    return !ctx->memory;
}

/* Between the host and backend memory, in the order of the calls. `from` may be changed when upload returns; download has
 * waited for all that was asked for before it. */
int b2_upload(b2_ctx *ctx, void *to, const void *from, size_t bytes, b2_err *err);
int b2_download(b2_ctx *ctx, void *to, const void *from, size_t bytes, b2_err *err);
/* The same of whole tensors, of one shape. */
int b2_upload_rows(b2_ctx *ctx, b2_tensor to, b2_tensor from, b2_err *err);
int b2_download_rows(b2_ctx *ctx, b2_tensor to, b2_tensor from, b2_err *err);

/* What comes from outside and goes there (arrays of NumPy, logits of a search) is on the host, or on the very device. On the
 * CPU it is used where it lies.
 * What lies on the device, row behind row from a multiple of B2_OUTER_ALIGNMENT, is used where it lies there too.
 * *in: what `outer` holds, in backend memory: from ctx->activations where that is not where it is. */
enum { B2_OUTER_ALIGNMENT = 256 };
int b2_bring_in(b2_ctx *ctx, b2_tensor *in, b2_tensor outer, b2_err *err);
/* *inner: room for what `outer` is to hold, which b2_hand_over puts there. */
int b2_room_for(b2_ctx *ctx, b2_tensor *inner, b2_tensor outer, b2_err *err);
int b2_hand_over(b2_ctx *ctx, b2_tensor outer, b2_tensor inner, b2_err *err);
/* What b2_bring_in and b2_room_for take from ctx->activations. */
size_t b2_outer_bytes(const b2_ctx *ctx, int64_t rows, int64_t cols);

/* Returns when nothing that was asked for is under way: before memory is freed that it may use. */
void b2_wait(b2_ctx *ctx);

/* The same at the end of a call whose results stay in backend memory; -1 where the work has failed, or with the error of
 * b2_note_finite. */
int b2_finish(b2_ctx *ctx, b2_err *err);

/* Room for `bytes` in both arenas; nothing may be in use. */
int b2_ctx_reserve(b2_ctx *ctx, size_t bytes, b2_err *err);

typedef struct b2_ctx_mark {
    size_t scratch, activations;
} b2_ctx_mark;

static inline b2_ctx_mark b2_ctx_marked(const b2_ctx *ctx)
{
    b2_ctx_mark mark = {b2_arena_mark(ctx->scratch), b2_arena_mark(ctx->activations)};
    return mark;
}

static inline void b2_ctx_reset(b2_ctx *ctx, b2_ctx_mark mark)
{
    b2_arena_reset(ctx->scratch, mark.scratch);
    b2_arena_reset(ctx->activations, mark.activations);
}

/* Runs body(ctx, argument), which only calls operations. A backend may record what it asks for and from then on, for the
 * same shape, repeat that on the present contents of the host arrays without calling it. Only what is recorded repeats itself
 * (shape.repeats). */
int b2_step_run(b2_ctx *ctx, b2_step_shape shape, b2_step_fn body, void *argument, b2_err *err);

#endif
