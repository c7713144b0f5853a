#include "model/blip2.h"

#include <stddef.h>
#include <string.h>

#include "core/memory.h"
#include "io/packed.h"
#include "model/stage.h"
#include "ops/weights.h"

static const b2_weight_row projection_table[] = {
    {"language_projection.weight", offsetof(b2_blip2, projection_weight), B2_MATRIX_ITEM, {B2_DIM_D, B2_DIM_E}},
    {"language_projection.bias", offsetof(b2_blip2, projection_bias), B2_VECTOR, {B2_DIM_D}},
};
enum { PROJECTION_COUNT = sizeof projection_table / sizeof *projection_table };

/* What goes through the vision encoder together: enough to keep the cores busy, few enough to stay small. */
enum { PICTURES_AT_ONCE = 4, TOKENS_AT_ONCE = 2800, PICTURES_ON_DEVICE = 64, TOKENS_ON_DEVICE = 20000 };

static void fill_dims(int64_t dims[B2_DIM_COUNT], const b2_qformer_config *qformer, const b2_lm_config *text)
{
    dims[B2_DIM_D] = text->hidden_size;
    dims[B2_DIM_E] = qformer->hidden_size;
}

static int check_config(const b2_blip2_config *c, b2_err *err)
{
    if (c->has_vision && c->qformer.encoder_hidden_size != c->vision.hidden_size)
        return b2_fail(err, B2_E_VALUE, "config: qformer encoder_hidden_size %lld is not the vision hidden_size %lld",
                       (long long)c->qformer.encoder_hidden_size, (long long)c->vision.hidden_size);
    return 0;
}

/* The matrices that everything passes through, the projection to the language model (held as that is) and the heads (held
 * as the Q-Former is), are never quantised: a thousandth of the weights. */
static b2_dtype_policy unquantised(b2_dtype_policy policy)
{
    if (policy.hold == B2_HOLD_DTYPE && b2_dtype_is_quantised(policy.dtype))
        return (b2_dtype_policy){.hold = B2_HOLD_HALF};
    return policy;
}

static int bind_language(b2_blip2 *model, const b2_blip2_config *config, const b2_dtype_policy *policies,
                         b2_binder *binder, b2_err *err)
{
    int64_t dims[B2_DIM_COUNT] = {0};
    fill_dims(dims, &config->qformer, &config->text);
    binder->dims = dims;
    binder->policy = unquantised(policies[B2_PART_LANGUAGE]);
    if (b2_bind(binder, model, projection_table, PROJECTION_COUNT, err) < 0)
        return -1;
    binder->policy = policies[B2_PART_LANGUAGE];
    const b2_lm_class *class_ = b2_lm_class_of(config->text.model_type);
    if (!class_)
        return b2_fail(err, B2_E_UNSUPPORTED, "text_config: model_type %s is not supported", config->text.model_type);
    model->lm = b2_alloc_zeroed(1, class_->size, "language model", err);
    if (!model->lm)
        return -1;
    model->lm->class_ = class_;
    model->lm->config = config->text;
    return class_->bind(model->lm, binder, err);
}

static int bind_all(b2_blip2 *model, const b2_blip2_config *config, const b2_dtype_policy *policies, b2_binder *binder,
                    b2_err *err)
{
    binder->policy = policies[B2_PART_VISION];
    if (config->has_vision && b2_vit_bind(&model->vit, &config->vision, binder, err) < 0)
        return -1;
    binder->policy = policies[B2_PART_QFORMER];
    binder->widens = 1;
    if (b2_qformer_bind(&model->qformer, &config->qformer, binder, err) < 0)
        return -1;
    binder->widens = 0;
    if (config->has_text && bind_language(model, config, policies, binder, err) < 0)
        return -1;
    binder->policy = unquantised(policies[B2_PART_QFORMER]);
    binder->widens = 1;
    return config->has_heads ? b2_heads_bind(&model->heads, &config->heads, binder, err) : 0;
}

typedef struct byte_counter {
    b2_weight_visitor visitor;
    int64_t bytes, parameters;
    int64_t bytes_of[B2_DTYPE_COUNT];
} byte_counter;

static int count_bytes(b2_weight_visitor *visitor, const b2_weight *weight, const int64_t *shape, int rank, b2_err *err)
{
    (void)shape, (void)rank, (void)err;
    byte_counter *counter = (byte_counter *)visitor;
    int64_t bytes = (int64_t)b2_weight_parts_of(weight).bytes;
    counter->bytes += bytes;
    counter->parameters += weight->n * weight->k;
    counter->bytes_of[weight->dtype] += bytes;
    return 0;
}

static b2_dtype most(const byte_counter *counter)
{
    int best = B2_F32;
    for (int d = B2_F16; d < B2_DTYPE_COUNT; d++)
        if (counter->bytes_of[d] > counter->bytes_of[best])
            best = d;
    return (b2_dtype)best;
}

/* Of a part: quantised if any of its matrices are. A small model's tables may well be larger. */
static b2_dtype part_dtype(const byte_counter *counter)
{
    return counter->bytes_of[B2_I4] ? B2_I4 : counter->bytes_of[B2_I8] ? B2_I8 : most(counter);
}

static int visit_part(const b2_blip2 *model, b2_part part, b2_weight_visitor *visitor, b2_err *err)
{
    if (part == B2_PART_VISION)
        return model->vit.layers ? b2_vit_visit(&model->vit, visitor, err) : 0;
    if (part == B2_PART_QFORMER)
        return b2_qformer_visit(&model->qformer, visitor, err) < 0 || b2_heads_visit(&model->heads, visitor, err) < 0
                   ? -1
                   : 0;
    if (!model->lm)
        return 0;
    int64_t dims[B2_DIM_COUNT] = {0};
    fill_dims(dims, &model->qformer.config, &model->lm->config);
    if (b2_visit_weights(visitor, model, projection_table, PROJECTION_COUNT, dims, err) < 0)
        return -1;
    return model->lm->class_->visit(model->lm, visitor, err);
}

static int measure(b2_blip2 *model, b2_err *err)
{
    byte_counter all = {0};
    for (int part = 0; part < B2_PART_COUNT; part++) {
        byte_counter counter = {.visitor = {count_bytes}};
        if (visit_part(model, (b2_part)part, &counter.visitor, err) < 0)
            return -1;
        model->dtypes[part] = part_dtype(&counter);
        all.bytes += counter.bytes;
        all.parameters += counter.parameters;
        for (int d = 0; d < B2_DTYPE_COUNT; d++)
            all.bytes_of[d] += counter.bytes_of[d];
    }
    model->bytes = all.bytes;
    model->parameters = all.parameters;
    model->dtype = most(&all);
    return 0;
}

static int all_as_stored(const b2_dtype_policy policies[B2_PART_COUNT])
{
    for (int i = 0; i < B2_PART_COUNT; i++)
        if (policies[i].hold != B2_HOLD_STORED)
            return 0;
    return 1;
}

/* What the model will be held as; a packed file cannot become something else. */
static int settle_policies(b2_blip2 *model, const b2_dtype_policy policies[B2_PART_COUNT], b2_err *err)
{
    b2_policies_name(model->policies, policies);
    if (!model->checkpoint.packed)
        return 0;
    const b2_st_file *file = &model->checkpoint.files[0];
    const char *held = b2_st_metadata(file, B2_PACKED_DTYPES_KEY);
    if (!held || strlen(held) >= B2_POLICIES_TEXT)
        return b2_fail(err, B2_E_FORMAT, "%s: packed-form: \"%s\": missing, or too long", file->path, B2_PACKED_DTYPES_KEY);
    if (!all_as_stored(policies) && strcmp(held, model->policies) != 0)
        return b2_fail(err, B2_E_VALUE, "%s: holds weights packed as %s; dtype %s can be had from the plain checkpoint only",
                       file->path, held, model->policies);
    strcpy(model->policies, held);
    return 0;
}

typedef struct mover {
    b2_weight_visitor visitor;
    b2_memory *memory;
} mover;

static int move_one(b2_weight_visitor *visitor, const b2_weight *weight, const int64_t *shape, int rank, b2_err *err)
{
    (void)shape, (void)rank;
    if (weight->memory)
        return 0;
    /* Visitors look; the model is not anybody's yet. */
    return b2_weight_move((b2_weight *)(uintptr_t)weight, ((mover *)visitor)->memory, err);
}

/* Vectors and tables follow the matrices, now that nothing is computed from them here any more. */
static int move_rows(b2_blip2 *model, b2_memory *memory, b2_err *err)
{
    mover m = {{move_one}, memory};
    if (b2_blip2_visit(model, &m.visitor, err) < 0)
        return -1;
    return model->lm && model->lm->class_->visit_made ? model->lm->class_->visit_made(model->lm, &m.visitor, err) : 0;
}

static void keep_first(void *owner, const char *name)
{
    const char **first = owner;
    if (!*first)
        *first = name;
}

/* A plain checkpoint may hold more than its config asks for (a vision-only copy, say); what was packed for this config
 * cannot. */
static int check_all_used(const b2_checkpoint *checkpoint, b2_err *err)
{
    const char *unused = NULL;
    if (checkpoint->packed)
        b2_checkpoint_unused(checkpoint, keep_first, &unused);
    if (unused)
        return b2_fail(err, B2_E_FORMAT, "%s: packed from another model: the config has no %.200s",
                       checkpoint->files[0].path, unused);
    return 0;
}

int b2_blip2_load(b2_blip2 *model, const b2_blip2_config *config, const char *const *paths, int64_t path_count,
                  const b2_dtype_policy policies[B2_PART_COUNT], b2_memory *memory, b2_pool *pool, b2_cancel *cancel,
                  b2_err *err)
{
    *model = (b2_blip2){.memory = memory};
    if (check_config(config, err) < 0 || b2_checkpoint_open(&model->checkpoint, paths, path_count, err) < 0)
        return -1;
    b2_binder binder = {.checkpoint = &model->checkpoint, .memory = memory, .pool = pool, .cancel = cancel};
    int status = settle_policies(model, policies, err);
    if (status == 0)
        status = bind_all(model, config, policies, &binder, err);
    model->names = binder.names;
    model->name_count = binder.name_count;
    if (status == 0)
        status = check_all_used(&model->checkpoint, err);
    if (status == 0 && memory)
        status = move_rows(model, memory, err);
    if (status == 0)
        status = measure(model, err);
    if (status < 0)
        b2_blip2_release(model);
    return status;
}

int b2_blip2_visit(const b2_blip2 *model, b2_weight_visitor *visitor, b2_err *err)
{
    for (int part = 0; part < B2_PART_COUNT; part++)
        if (visit_part(model, (b2_part)part, visitor, err) < 0)
            return -1;
    return 0;
}

/* ---- saving as held ---- */

typedef struct packer {
    b2_weight_visitor visitor;
    b2_st_source *sources;                /* [count] */
    char (*texts)[B2_PACKED_TEXT];        /* [count] */
    const char **metadata;                /* [2 * (count + given + 2)] */
    int64_t count, metadata_count;
} packer;

static int count_weight(b2_weight_visitor *visitor, const b2_weight *weight, const int64_t *shape, int rank, b2_err *err)
{
    (void)weight, (void)shape, (void)rank, (void)err;
    ((packer *)visitor)->count++;
    return 0;
}

static void put_metadata(packer *p, const char *key, const char *value)
{
    p->metadata[2 * p->metadata_count] = key;
    p->metadata[2 * p->metadata_count + 1] = value;
    p->metadata_count++;
}

static int add_weight(b2_weight_visitor *visitor, const b2_weight *weight, const int64_t *shape, int rank, b2_err *err)
{
    (void)shape, (void)rank, (void)err;
    packer *p = (packer *)visitor;
    int64_t i = p->count++;
    size_t bytes = b2_weight_parts_of(weight).bytes;
    /* Plain rows, mapped from another file, end where they end. */
    size_t present = weight->layout == B2_ROWS ? (size_t)(weight->n * weight->k) * b2_dtype_size(weight->dtype) : bytes;
    b2_packed_describe(p->texts[i], weight);
    put_metadata(p, weight->name, p->texts[i]);
    p->sources[i] = (b2_st_source){.name = weight->name,
                                   .dtype = B2_ST_U8,
                                   .rank = 1,
                                   .shape = {(int64_t)bytes},
                                   .data = weight->data,
                                   .data_bytes = present};
    return 0;
}

int b2_blip2_save_packed(const b2_blip2 *model, const char *path, const char *const *metadata, int64_t metadata_count,
                         b2_cancel *cancel, b2_err *err)
{
    packer p = {.visitor = {count_weight}};
    if (model->memory)
        return b2_fail(err, B2_E_UNSUPPORTED, "packed weights are written by a model on the processor: load it with "
                       "device=\"cpu\"");
    if (b2_blip2_visit(model, &p.visitor, err) < 0)
        return -1;
    p.sources = b2_alloc((size_t)p.count, sizeof *p.sources, "packed weights", err);
    p.texts = b2_alloc((size_t)p.count, sizeof *p.texts, "packed weights", err);
    p.metadata = b2_alloc(2 * (size_t)(p.count + metadata_count + 2), sizeof *p.metadata, "packed weights", err);
    int status = p.sources && p.texts && p.metadata ? 0 : -1;
    p.count = 0;
    p.visitor.fn = add_weight;
    if (status == 0)
        status = b2_blip2_visit(model, &p.visitor, err);
    if (status == 0) {
        put_metadata(&p, B2_PACKED_VERSION_KEY, B2_PACKED_VERSION);
        put_metadata(&p, B2_PACKED_DTYPES_KEY, model->policies);
        for (int64_t i = 0; i < metadata_count; i++)
            put_metadata(&p, metadata[2 * i], metadata[2 * i + 1]);
        status = b2_st_write(path, p.sources, p.count, p.metadata, p.metadata_count, cancel, err);
    }
    b2_free(p.sources);
    b2_free(p.texts);
    b2_free(p.metadata);
    return status;
}

void b2_blip2_release(b2_blip2 *model)
{
    b2_vit_release(&model->vit);
    b2_qformer_release(&model->qformer);
    b2_heads_release(&model->heads);
    b2_release_weights(model, projection_table, PROJECTION_COUNT);
    if (model->lm) {
        model->lm->class_->release(model->lm);
        b2_free(model->lm);
    }
    for (int64_t i = 0; i < model->name_count; i++)
        b2_free(model->names[i]);
    b2_free(model->names);
    b2_checkpoint_close(&model->checkpoint);
    *model = (b2_blip2){0};
}

/* What is brought in and handed over group by group. */
static size_t outer_bytes(const b2_ctx *ctx, const b2_blip2 *model, const b2_encoded *out, b2_pictures group,
                          int64_t tokens, int64_t text)
{
    int64_t count = group.count, queries = count * model->qformer.config.num_query_tokens;
    int64_t pixels = group.channels * group.height * group.width;
    return b2_outer_bytes(ctx, count, pixels) + b2_outer_bytes(ctx, count * tokens, model->vit.config.hidden_size) +
           b2_outer_bytes(ctx, count, out->pooled.cols) + b2_outer_bytes(ctx, queries, out->qformer.cols) +
           b2_outer_bytes(ctx, count * text, out->text.cols) + b2_outer_bytes(ctx, queries, out->features.cols) +
           b2_outer_bytes(ctx, queries, out->embeds.cols) + b2_outer_bytes(ctx, count, out->match.cols);
}

/* `group`: the pictures that go through together; `tokens` of each, and at most `text` of each one's text. */
static size_t encode_scratch(const b2_ctx *ctx, const b2_blip2 *model, const b2_encoded *out, b2_pictures group,
                             int64_t tokens, int64_t text)
{
    int64_t queries = model->qformer.config.num_query_tokens;
    size_t vit = group.data ? b2_vit_scratch(ctx, &model->vit, group) : 0;
    size_t positions = group.data ? b2_vit_positions_scratch(&model->vit, group.height, group.width) : 0;
    size_t qformer = b2_qformer_scratch(ctx, &model->qformer, group.count, queries, group.count, tokens, text);
    size_t heads = b2_heads_scratch(ctx, &model->heads, group.count * queries);
    size_t most = vit > qformer ? vit : qformer;
    return positions + (most > heads ? most : heads) + outer_bytes(ctx, model, out, group, tokens, text) +
           b2_arena_cost((size_t)(group.count * tokens * model->vit.config.hidden_size), sizeof(float)) +
           b2_arena_cost((size_t)(group.count * queries * model->qformer.config.hidden_size), sizeof(float));
}

static int wants_qformer(const b2_encoded *out)
{
    return out->qformer.data || out->text.data || out->features.data || out->embeds.data || out->match.data;
}

/* Rows [first, first + count) of an output; none where it is not wanted. */
static b2_tensor part_of(b2_tensor whole, int64_t first, int64_t count)
{
    return whole.data ? b2_rows(whole, first, count) : (b2_tensor){0};
}

/* The outputs of pictures [first, first + count) alone, the first of which has the texts from `words` on. */
static b2_encoded group_of(const b2_blip2 *model, const b2_encoded *out, int64_t first, int64_t count, int64_t tokens,
                           int64_t words, int64_t text)
{
    int64_t queries = model->qformer.config.num_query_tokens;
    return (b2_encoded){.vision = part_of(out->vision, first * tokens, count * tokens),
                        .pooled = part_of(out->pooled, first, count),
                        .qformer = part_of(out->qformer, first * queries, count * queries),
                        .text = part_of(out->text, words, text),
                        .features = part_of(out->features, first * queries, count * queries),
                        .embeds = part_of(out->embeds, first * queries, count * queries),
                        .match = part_of(out->match, first, count)};
}

/* In the arena, also of what lies on the device already: a recorded group finds all it reads and writes where it was before. */
static int room_inside(b2_ctx *ctx, b2_tensor *inner, b2_tensor outer, b2_err *err)
{
    *inner = outer;
    return b2_on_host(ctx) || !outer.data ? 0 : b2_stage_take(ctx, inner, outer.rows, outer.cols, err);
}

static int bring_inside(b2_ctx *ctx, b2_tensor *inner, b2_tensor outer, b2_err *err)
{
    if (room_inside(ctx, inner, outer, err) < 0)
        return -1;
    return inner->data == outer.data ? 0 : b2_upload_rows(ctx, *inner, outer, err);
}

/* Room for those in backend memory. `given`: the vision states are an input. */
static int take_room(b2_ctx *ctx, b2_encoded *inner, const b2_encoded *outer, int given, b2_err *err)
{
    return (given ? bring_inside : room_inside)(ctx, &inner->vision, outer->vision, err) < 0 ||
                   room_inside(ctx, &inner->pooled, outer->pooled, err) < 0 ||
                   room_inside(ctx, &inner->qformer, outer->qformer, err) < 0 ||
                   room_inside(ctx, &inner->text, outer->text, err) < 0 ||
                   room_inside(ctx, &inner->features, outer->features, err) < 0 ||
                   room_inside(ctx, &inner->embeds, outer->embeds, err) < 0 ||
                   room_inside(ctx, &inner->match, outer->match, err) < 0
               ? -1
               : 0;
}

static int hand_over(b2_ctx *ctx, const b2_encoded *outer, const b2_encoded *inner, int given, b2_err *err)
{
    return (!given && b2_hand_over(ctx, outer->vision, inner->vision, err) < 0) ||
                   b2_hand_over(ctx, outer->pooled, inner->pooled, err) < 0 ||
                   b2_hand_over(ctx, outer->qformer, inner->qformer, err) < 0 ||
                   b2_hand_over(ctx, outer->text, inner->text, err) < 0 ||
                   b2_hand_over(ctx, outer->features, inner->features, err) < 0 ||
                   b2_hand_over(ctx, outer->embeds, inner->embeds, err) < 0 ||
                   b2_hand_over(ctx, outer->match, inner->match, err) < 0
               ? -1
               : 0;
}

/* What is wanted of the queries [count*Q, D_q]. */
static int read_off(b2_ctx *ctx, const b2_blip2 *model, const b2_encoded *out, b2_tensor qformer, b2_err *err)
{
    b2_linear_opts project = {.bias = &model->projection_bias,
                              .item_rows = b2_item_rows(ctx, model->qformer.config.num_query_tokens)};
    if (out->features.data && b2_linear(ctx, out->features, qformer, &model->projection_weight, &project, err) < 0)
        return -1;
    if (out->embeds.data && b2_heads_project_vision(ctx, &model->heads, out->embeds, qformer, err) < 0)
        return -1;
    return out->match.data ? b2_heads_match(ctx, &model->heads, out->match, qformer, err) : 0;
}

/* A group's way through the model: what its operations are given, and nothing besides. All of it is in backend memory. */
typedef struct group_call {
    const b2_blip2 *model;
    b2_encoded out;
    b2_pictures group;    /* the pixels; data NULL: `vision` holds the embeddings */
    b2_tensor positions;  /* [T, D_v] */
    b2_tensor vision;     /* [B*T, D_v] */
    int64_t reads;        /* 1: the Q-Former too, without texts */
    char *base;           /* of the arena of activations, its size and what is in use: where everything else lies */
    size_t size, used;
} group_call;

/* The vision states to what is wanted of the Q-Former. */
static int read_pictures(b2_ctx *ctx, const group_call *call, const b2_texts *texts, b2_err *err)
{
    const b2_qformer *m = &call->model->qformer;
    int64_t queries = m->config.num_query_tokens, count = call->group.count;
    b2_tensor states = call->out.qformer;
    if (!states.data && b2_stage_take(ctx, &states, count * queries, m->config.hidden_size, err) < 0)
        return -1;
    b2_qformer_in in = {.items = count, .queries = queries, .image = call->vision, .texts = texts};
    b2_qformer_out to = {.queries = states, .text = call->out.text};
    return b2_qformer_forward(ctx, m, &to, &in, err) < 0 ? -1 : read_off(ctx, call->model, &call->out, states, err);
}

static int run_group(b2_ctx *ctx, void *argument, b2_err *err)
{
    const group_call *call = argument;
    const b2_vit *vit = &call->model->vit;
    if (call->group.data && b2_vit_forward(ctx, vit, call->vision, call->group, call->positions, err) < 0)
        return -1;
    if (call->out.pooled.data && b2_vit_pool(ctx, vit, call->out.pooled, call->vision, err) < 0)
        return -1;
    return call->reads ? read_pictures(ctx, call, NULL, err) : 0;
}

/* Everything but texts is the same for all groups of a shape, and may be recorded. */
static int encode_pictures(b2_ctx *ctx, const b2_blip2 *model, const b2_encoded *out, b2_pictures group,
                           b2_tensor positions, const b2_texts *texts, b2_err *err)
{
    group_call call;
    memset(&call, 0, sizeof call); /* what lies between the fields is compared too */
    call.model = model;
    call.out = *out;
    call.group = group;
    call.positions = positions;
    call.vision = out->vision;
    call.reads = wants_qformer(out) && !texts;
    if (!call.vision.data && b2_stage_take(ctx, &call.vision, group.count * positions.rows, positions.cols, err) < 0)
        return -1;
    call.base = ctx->activations->base;
    call.size = ctx->activations->size;
    call.used = ctx->activations->used;
    b2_step_shape shape = {.key = &call, .bytes = sizeof call, .constant = 1};
    if (b2_step_run(ctx, shape, run_group, &call, err) < 0)
        return -1;
    return texts && wants_qformer(out) ? read_pictures(ctx, &call, texts, err) : 0;
}

/* Pictures [first, first + group.count), whose pixels are `group`; positions [T, D_v]; texts of all pictures or NULL. */
static int encode_group(b2_ctx *ctx, const b2_blip2 *model, const b2_encoded *out, b2_pictures group, int64_t first,
                        b2_tensor positions, const b2_texts *texts, b2_err *err)
{
    int64_t count = group.count, words = 0, text = 0, given = !group.data;
    b2_texts own = texts ? b2_texts_from(*texts, first) : (b2_texts){0};
    if (texts) {
        words = own.offsets[0] - texts->offsets[0];
        text = own.offsets[count] - own.offsets[0];
    }
    b2_encoded outer = group_of(model, out, first, count, positions.rows, words, text), inner;
    b2_tensor pixels = b2_tensor_of((float *)group.data, count, group.channels * group.height * group.width);
    if (bring_inside(ctx, &pixels, pixels, err) < 0 || take_room(ctx, &inner, &outer, given, err) < 0)
        return -1;
    group.data = pixels.data;
    return encode_pictures(ctx, model, &inner, group, positions, texts ? &own : NULL, err) < 0
               ? -1
               : hand_over(ctx, &outer, &inner, given, err);
}

int b2_blip2_project(b2_ctx *ctx, const b2_blip2 *model, b2_tensor out, b2_tensor x, b2_err *err)
{
    b2_linear_opts opts = {.bias = &model->projection_bias};
    b2_tensor inner_x, inner;
    int64_t widest = out.cols > x.cols ? out.cols : x.cols;
    size_t outer = b2_outer_bytes(ctx, x.rows, x.cols) + b2_outer_bytes(ctx, out.rows, out.cols);
    if (b2_ctx_reserve(ctx, outer + b2_scratch_bytes(ctx, x.rows, widest, 1, 1), err) < 0 ||
        b2_bring_in(ctx, &inner_x, x, err) < 0 || b2_room_for(ctx, &inner, out, err) < 0 ||
        b2_linear(ctx, inner, inner_x, &model->projection_weight, &opts, err) < 0)
        return -1;
    return b2_hand_over(ctx, out, inner, err);
}

int b2_blip2_embed(b2_ctx *ctx, const b2_blip2 *model, b2_tensor out, const int32_t *ids, b2_err *err)
{
    b2_tensor inner;
    if (b2_ctx_reserve(ctx, b2_outer_bytes(ctx, out.rows, out.cols), err) < 0 ||
        b2_room_for(ctx, &inner, out, err) < 0 || model->lm->class_->embed(ctx, model->lm, inner, ids, err) < 0)
        return -1;
    return b2_hand_over(ctx, out, inner, err);
}

static int64_t clamp64(int64_t value, int64_t low, int64_t high)
{
    return value < low ? low : value > high ? high : value;
}

int b2_blip2_prepare(b2_ctx *ctx, b2_blip2 *model, b2_err *err)
{
    return b2_qformer_prepare(ctx, &model->qformer, err);
}

static int64_t longest_text(const b2_texts *texts, int64_t count)
{
    int64_t longest = 0;
    for (int64_t b = 0; texts && b < count; b++)
        if (texts->offsets[b + 1] - texts->offsets[b] > longest)
            longest = texts->offsets[b + 1] - texts->offsets[b];
    return longest;
}

int b2_blip2_encode(b2_ctx *ctx, const b2_blip2 *model, const b2_encoded *out, b2_pictures pictures,
                    const b2_texts *texts, b2_err *err)
{
    if (wants_qformer(out) && b2_texts_check(&model->qformer.config, texts, pictures.count, err) < 0)
        return -1;
    if (pictures.count == 0)
        return 0;
    int64_t tokens = pictures.data ? b2_vit_tokens(&model->vit.config, pictures.height, pictures.width)
                                   : out->vision.rows / pictures.count;
    int64_t each = pictures.channels * pictures.height * pictures.width;
    b2_pictures group = pictures;
    group.count = b2_on_host(ctx) ? clamp64(TOKENS_AT_ONCE / tokens, 1, PICTURES_AT_ONCE)
                                  : clamp64(TOKENS_ON_DEVICE / tokens, 1, PICTURES_ON_DEVICE);
    group.count = clamp64(group.count, 1, pictures.count);
    if (b2_ctx_reserve(ctx, encode_scratch(ctx, model, out, group, tokens, longest_text(texts, pictures.count)), err) < 0)
        return -1;
    b2_tensor positions = {.rows = tokens, .cols = model->vit.config.hidden_size};
    if (pictures.data && b2_vit_positions(ctx, &model->vit, &positions, pictures.height, pictures.width, err) < 0)
        return -1;
    b2_ctx_mark mark = b2_ctx_marked(ctx);
    for (int64_t first = 0; first < pictures.count; first += group.count) {
        group.count = clamp64(pictures.count - first, 0, group.count);
        group.data = pictures.data ? pictures.data + first * each : NULL;
        if (encode_group(ctx, model, out, group, first, positions, texts, err) < 0)
            return -1;
        b2_ctx_reset(ctx, mark);
    }
    return 0;
}
