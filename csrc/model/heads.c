#include "model/heads.h"

#include <stddef.h>

#include "model/stage.h"

#define AT(field) offsetof(b2_heads, field)

/* B2_DIM_H: the two classes of the matching head. */
static const b2_weight_row vision_table[] = {
    {"vision_projection.weight", AT(vision_weight), B2_MATRIX, {B2_DIM_P, B2_DIM_D}},
    {"vision_projection.bias", AT(vision_bias), B2_VECTOR, {B2_DIM_P}},
};
static const b2_weight_row text_table[] = {
    {"text_projection.weight", AT(text_weight), B2_MATRIX, {B2_DIM_P, B2_DIM_D}},
    {"text_projection.bias", AT(text_bias), B2_VECTOR, {B2_DIM_P}},
};
static const b2_weight_row match_table[] = {
    {"itm_head.weight", AT(match_weight), B2_MATRIX, {B2_DIM_H, B2_DIM_D}},
    {"itm_head.bias", AT(match_bias), B2_VECTOR, {B2_DIM_H}},
};
enum { ROWS_OF_EACH = 2, CLASSES = 2 };

static void fill_dims(int64_t dims[B2_DIM_COUNT], const b2_heads_config *config)
{
    dims[B2_DIM_D] = config->hidden_size;
    dims[B2_DIM_P] = config->projection_size;
    dims[B2_DIM_H] = CLASSES;
}

int b2_heads_bind(b2_heads *heads, const b2_heads_config *config, b2_binder *binder, b2_err *err)
{
    int64_t dims[B2_DIM_COUNT] = {0};
    fill_dims(dims, config);
    binder->dims = dims;
    heads->config = *config;
    int failed = (config->vision && b2_bind(binder, heads, vision_table, ROWS_OF_EACH, err) < 0) ||
                 (config->text && b2_bind(binder, heads, text_table, ROWS_OF_EACH, err) < 0) ||
                 (config->match && b2_bind(binder, heads, match_table, ROWS_OF_EACH, err) < 0);
    binder->dims = NULL;
    return failed ? -1 : 0;
}

int b2_heads_visit(const b2_heads *heads, b2_weight_visitor *visitor, b2_err *err)
{
    int64_t dims[B2_DIM_COUNT] = {0};
    fill_dims(dims, &heads->config);
    return b2_visit_weights(visitor, heads, vision_table, ROWS_OF_EACH, dims, err) < 0 ||
                   b2_visit_weights(visitor, heads, text_table, ROWS_OF_EACH, dims, err) < 0 ||
                   b2_visit_weights(visitor, heads, match_table, ROWS_OF_EACH, dims, err) < 0
               ? -1
               : 0;
}

void b2_heads_release(b2_heads *heads)
{
    b2_release_weights(heads, vision_table, ROWS_OF_EACH);
    b2_release_weights(heads, text_table, ROWS_OF_EACH);
    b2_release_weights(heads, match_table, ROWS_OF_EACH);
}

size_t b2_heads_scratch(const b2_ctx *ctx, const b2_heads *heads, int64_t rows)
{
    const b2_heads_config *c = &heads->config;
    return b2_arena_cost((size_t)(rows * CLASSES), sizeof(float)) +
           b2_scratch_bytes(ctx, rows, b2_max64(c->hidden_size, c->projection_size), 1, 1);
}

static int check_head(const b2_weight *weight, const char *name, b2_err *err)
{
    return weight->data ? 0 : b2_fail(err, B2_E_UNSUPPORTED, "this model has no %s", name);
}

static int project(b2_ctx *ctx, b2_tensor out, b2_tensor x, const b2_weight *weight, const b2_weight *bias,
                   const char *name, b2_err *err)
{
    b2_linear_opts opts = {.bias = bias};
    if (check_head(weight, name, err) < 0 || b2_linear(ctx, out, x, weight, &opts, err) < 0)
        return -1;
    return b2_unit_rows(ctx, out, out, err);
}

int b2_heads_project_vision(b2_ctx *ctx, const b2_heads *h, b2_tensor out, b2_tensor x, b2_err *err)
{
    return project(ctx, out, x, &h->vision_weight, &h->vision_bias, "vision_projection", err);
}

int b2_heads_project_text(b2_ctx *ctx, const b2_heads *h, b2_tensor out, b2_tensor x, b2_err *err)
{
    return project(ctx, out, x, &h->text_weight, &h->text_bias, "text_projection", err);
}

int b2_heads_match(b2_ctx *ctx, const b2_heads *h, b2_tensor out, b2_tensor x, b2_err *err)
{
    b2_ctx_mark mark = b2_ctx_marked(ctx);
    b2_linear_opts opts = {.bias = &h->match_bias};
    b2_tensor each;
    if (check_head(&h->match_weight, "itm_head", err) < 0 || b2_stage_take(ctx, &each, x.rows, CLASSES, err) < 0 ||
        b2_linear(ctx, each, x, &h->match_weight, &opts, err) < 0 ||
        b2_reduce_rows(ctx, out, each, B2_MEAN, err) < 0)
        return -1;
    b2_ctx_reset(ctx, mark);
    return 0;
}
