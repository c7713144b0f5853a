#include "python/py_config.h"

#include <string.h>

#include "model/activation.h"

static PyObject *config_item(PyObject *config, const char *section, const char *key)
{
    PyObject *part = section ? PyMapping_GetItemString(config, section) : Py_NewRef(config);
    PyObject *item = part ? PyMapping_GetItemString(part, key) : NULL;
    Py_XDECREF(part);
    return item;
}

static int read_int(PyObject *config, const char *section, const char *key, int64_t low, int64_t high, int64_t *out)
{
    PyObject *item = config_item(config, section, key);
    if (!item)
        return -1;
    *out = PyLong_AsLongLong(item);
    Py_DECREF(item);
    if (*out == -1 && PyErr_Occurred())
        return -1;
    if (*out >= low && *out <= high)
        return 0;
    PyErr_Format(PyExc_ValueError, "config: %s.%s: expected %lld to %lld, found %lld", section ? section : "", key,
                 (long long)low, (long long)high, (long long)*out);
    return -1;
}

static int read_small(PyObject *config, const char *section, const char *key, int low, int high, int *out)
{
    int64_t value;
    if (read_int(config, section, key, low, high, &value) < 0)
        return -1;
    *out = (int)value;
    return 0;
}

static int read_float(PyObject *config, const char *section, const char *key, float *out)
{
    PyObject *item = config_item(config, section, key);
    if (!item)
        return -1;
    *out = (float)PyFloat_AsDouble(item);
    Py_DECREF(item);
    return PyErr_Occurred() ? -1 : 0;
}

static int read_text(PyObject *config, const char *section, const char *key, char *out, size_t size)
{
    PyObject *item = config_item(config, section, key);
    const char *text = item ? PyUnicode_AsUTF8(item) : NULL;
    if (text)
        PyOS_snprintf(out, size, "%s", text);
    Py_XDECREF(item);
    return text ? 0 : -1;
}

static int read_act(b2py_state *state, PyObject *config, const char *section, const char *key, b2_act *out)
{
    char name[64], where[96];
    b2_err err = {0};
    if (read_text(config, section, key, name, sizeof name) < 0)
        return -1;
    PyOS_snprintf(where, sizeof where, "config: %s.%s", section, key);
    if (b2_activation(out, name, where, &err) == 0)
        return 0;
    b2py_raise(state, &err);
    return -1;
}

/* Bounds that keep every later product of dimensions inside 64 bits; shapes are checked against the file. */
enum { MAX_WIDTH = 1 << 20, MAX_LAYERS = 1 << 12, MAX_VOCABULARY = 1 << 26, MAX_SIDE = 1 << 14 };

static int check_heads(const char *section, int64_t hidden_size, int heads)
{
    if (hidden_size % heads == 0)
        return 0;
    PyErr_Format(PyExc_ValueError, "config: %s.hidden_size %lld is no multiple of num_attention_heads %d", section,
                 (long long)hidden_size, heads);
    return -1;
}

static int read_vision(b2py_state *state, PyObject *config, b2_vit_config *c)
{
    const char *s = "vision";
    if (read_int(config, s, "image_size", 1, MAX_SIDE, &c->image_size) < 0 ||
        read_int(config, s, "patch_size", 1, c->image_size, &c->patch_size) < 0 ||
        read_int(config, s, "num_channels", 1, 64, &c->num_channels) < 0 ||
        read_int(config, s, "hidden_size", 1, MAX_WIDTH, &c->hidden_size) < 0 ||
        read_int(config, s, "intermediate_size", 1, MAX_WIDTH, &c->intermediate_size) < 0 ||
        read_small(config, s, "num_hidden_layers", 0, MAX_LAYERS, &c->num_hidden_layers) < 0 ||
        read_small(config, s, "num_attention_heads", 1, MAX_WIDTH, &c->num_attention_heads) < 0 ||
        read_float(config, s, "layer_norm_eps", &c->layer_norm_eps) < 0 ||
        read_act(state, config, s, "hidden_act", &c->act) < 0 ||
        read_small(config, s, "qkv_bias", 0, 1, &c->qkv_bias) < 0)
        return -1;
    return check_heads(s, c->hidden_size, c->num_attention_heads);
}

static int read_text_side(PyObject *config, b2_text_side *out)
{
    static const char *const names[] = {[B2_TEXT_NONE] = "none", [B2_TEXT_BESIDE] = "beside", [B2_TEXT_APART] = "apart"};
    char name[16];
    if (read_text(config, "qformer", "text_side", name, sizeof name) < 0)
        return -1;
    for (int i = 0; i <= B2_TEXT_APART; i++)
        if (strcmp(name, names[i]) == 0) {
            *out = (b2_text_side)i;
            return 0;
        }
    PyErr_Format(PyExc_ValueError, "config: qformer.text_side: expected none, beside or apart, found %s", name);
    return -1;
}

static int read_heads(PyObject *config, b2_heads_config *c)
{
    const char *s = "heads";
    return read_int(config, s, "projection_size", 1, MAX_WIDTH, &c->projection_size) < 0 ||
                   read_small(config, s, "vision", 0, 1, &c->vision) < 0 ||
                   read_small(config, s, "text", 0, 1, &c->text) < 0 ||
                   read_small(config, s, "match", 0, 1, &c->match) < 0
               ? -1
               : 0;
}

static int read_qformer(b2py_state *state, PyObject *config, b2_qformer_config *c)
{
    const char *s = "qformer";
    if (read_int(config, NULL, "num_query_tokens", 1, MAX_WIDTH, &c->num_query_tokens) < 0 ||
        read_int(config, s, "hidden_size", 1, MAX_WIDTH, &c->hidden_size) < 0 ||
        read_int(config, s, "intermediate_size", 1, MAX_WIDTH, &c->intermediate_size) < 0 ||
        read_int(config, s, "encoder_hidden_size", 1, MAX_WIDTH, &c->encoder_hidden_size) < 0 ||
        read_small(config, s, "num_hidden_layers", 0, MAX_LAYERS, &c->num_hidden_layers) < 0 ||
        read_small(config, s, "num_attention_heads", 1, MAX_WIDTH, &c->num_attention_heads) < 0 ||
        read_small(config, s, "cross_attention_frequency", 1, MAX_LAYERS, &c->cross_attention_frequency) < 0 ||
        read_float(config, s, "layer_norm_eps", &c->layer_norm_eps) < 0 ||
        read_act(state, config, s, "hidden_act", &c->act) < 0 ||
        read_text_side(config, &c->text_side) < 0 ||
        read_int(config, s, "vocab_size", 1, MAX_VOCABULARY, &c->vocab_size) < 0 ||
        read_int(config, s, "max_position_embeddings", 1, MAX_VOCABULARY, &c->max_position_embeddings) < 0)
        return -1;
    return check_heads(s, c->hidden_size, c->num_attention_heads);
}

static int read_opt(b2py_state *state, PyObject *config, b2_lm_config *c)
{
    const char *s = "text";
    if (read_int(config, s, "ffn_dim", 1, MAX_WIDTH, &c->ffn_dim) < 0 ||
        read_int(config, s, "max_position_embeddings", 1, MAX_VOCABULARY, &c->max_position_embeddings) < 0 ||
        read_act(state, config, s, "activation_function", &c->act) < 0 ||
        read_small(config, s, "do_layer_norm_before", 0, 1, &c->do_layer_norm_before) < 0 ||
        read_small(config, s, "remove_final_layer_norm", 0, 1, &c->remove_final_layer_norm) < 0 ||
        read_small(config, s, "enable_bias", 0, 1, &c->enable_bias) < 0 ||
        read_small(config, s, "layer_norm_elementwise_affine", 0, 1, &c->layer_norm_elementwise_affine) < 0 ||
        check_heads(s, c->hidden_size, c->num_attention_heads) < 0)
        return -1;
    c->head_dim = (int)(c->hidden_size / c->num_attention_heads);
    return 0;
}

static int read_t5(b2py_state *state, PyObject *config, b2_lm_config *c)
{
    const char *s = "text";
    c->max_position_embeddings = B2_NO_POSITIONS;
    return read_int(config, s, "d_ff", 1, MAX_WIDTH, &c->ffn_dim) < 0 ||
                   read_small(config, s, "d_kv", 1, MAX_WIDTH, &c->head_dim) < 0 ||
                   read_small(config, s, "num_decoder_layers", 0, MAX_LAYERS, &c->num_decoder_layers) < 0 ||
                   read_small(config, s, "relative_attention_num_buckets", 4, MAX_WIDTH,
                              &c->relative_attention_num_buckets) < 0 ||
                   read_int(config, s, "relative_attention_max_distance", c->relative_attention_num_buckets / 2 + 1,
                            MAX_WIDTH, &c->relative_attention_max_distance) < 0 ||
                   read_float(config, s, "layer_norm_epsilon", &c->norm_eps) < 0 ||
                   read_act(state, config, s, "dense_act_fn", &c->act) < 0 ||
                   read_small(config, s, "is_gated_act", 0, 1, &c->is_gated_act) < 0 ||
                   read_small(config, s, "scale_decoder_outputs", 0, 1, &c->scale_decoder_outputs) < 0
               ? -1
               : 0;
}

/* text.`key`: a sequence of exactly `count` numbers. */
static int read_numbers(PyObject *config, const char *key, float *out, Py_ssize_t count)
{
    PyObject *item = config_item(config, "text", key);
    PyObject *list = item ? PySequence_Tuple(item) : NULL;
    Py_XDECREF(item);
    if (list && PyTuple_GET_SIZE(list) != count)
        PyErr_Format(PyExc_ValueError, "config: text.%s: expected %zd numbers, found %zd", key, count,
                     PyTuple_GET_SIZE(list));
    for (Py_ssize_t i = 0; list && i < count && !PyErr_Occurred(); i++)
        out[i] = (float)PyFloat_AsDouble(PyTuple_GET_ITEM(list, i));
    Py_XDECREF(list);
    return PyErr_Occurred() ? -1 : 0;
}

static int read_slides(PyObject *config, b2_lm_config *c)
{
    float slides[B2_MAX_LM_LAYERS] = {0};
    if (read_numbers(config, "slides", slides, c->num_hidden_layers) < 0)
        return -1;
    for (int i = 0; i < c->num_hidden_layers; i++)
        c->slides[i] = slides[i] != 0.0f;
    return 0;
}

static int read_llama(b2py_state *state, PyObject *config, b2_lm_config *c)
{
    const char *s = "text";
    c->max_position_embeddings = B2_NO_POSITIONS;
    if (read_int(config, s, "intermediate_size", 1, MAX_WIDTH, &c->ffn_dim) < 0 ||
        read_small(config, s, "num_hidden_layers", 0, B2_MAX_LM_LAYERS, &c->num_hidden_layers) < 0 ||
        read_small(config, s, "num_key_value_heads", 1, c->num_attention_heads, &c->num_key_value_heads) < 0 ||
        read_small(config, s, "head_dim", 2, B2_MAX_HEAD_DIM, &c->head_dim) < 0 ||
        read_float(config, s, "rms_norm_eps", &c->norm_eps) < 0 ||
        read_act(state, config, s, "hidden_act", &c->act) < 0 ||
        read_small(config, s, "qkv_bias", 0, 1, &c->qkv_bias) < 0 ||
        read_small(config, s, "o_bias", 0, 1, &c->o_bias) < 0 ||
        read_small(config, s, "mlp_bias", 0, 1, &c->mlp_bias) < 0 ||
        read_small(config, s, "qk_norm", 0, 1, &c->qk_norm) < 0 ||
        read_int(config, s, "sliding_window", 0, INT32_MAX, &c->sliding_window) < 0 || read_slides(config, c) < 0 ||
        read_numbers(config, "inv_freq", c->inv_freq, c->head_dim / 2) < 0 ||
        read_float(config, s, "rope_scaling", &c->rope_scaling) < 0)
        return -1;
    if (c->num_attention_heads % c->num_key_value_heads == 0 && c->head_dim % 2 == 0)
        return 0;
    PyErr_Format(PyExc_ValueError, "config: text: %d heads of width %d over %d key heads", c->num_attention_heads,
                 c->head_dim, c->num_key_value_heads);
    return -1;
}

static const struct {
    const char *model_type;
    int (*read)(b2py_state *state, PyObject *config, b2_lm_config *c);
} text_configs[] = {
    {"opt", read_opt},
    {"t5", read_t5},
    {"llama", read_llama},
    {"mistral", read_llama},
    {"qwen2", read_llama},
    {"qwen3", read_llama},
};

static int read_text_config(b2py_state *state, PyObject *config, b2_lm_config *c)
{
    const char *s = "text";
    if (read_text(config, s, "model_type", c->model_type, sizeof c->model_type) < 0 ||
        read_int(config, s, "hidden_size", 1, MAX_WIDTH, &c->hidden_size) < 0 ||
        read_int(config, s, "vocab_size", 1, MAX_VOCABULARY, &c->vocab_size) < 0 ||
        read_small(config, s, "num_hidden_layers", 0, MAX_LAYERS, &c->num_hidden_layers) < 0 ||
        read_small(config, s, "num_attention_heads", 1, MAX_WIDTH, &c->num_attention_heads) < 0 ||
        read_small(config, s, "tie_word_embeddings", 0, 1, &c->tie_word_embeddings) < 0)
        return -1;
    for (size_t i = 0; i < sizeof text_configs / sizeof *text_configs; i++)
        if (strcmp(text_configs[i].model_type, c->model_type) == 0)
            return text_configs[i].read(state, config, c);
    PyErr_Format(state->unsupported_error, "config: text.model_type %s is not supported", c->model_type);
    return -1;
}

int b2py_read_config(b2py_state *state, PyObject *config, b2_blip2_config *out)
{
    out->has_vision = PyMapping_HasKeyString(config, "vision");
    out->has_text = PyMapping_HasKeyString(config, "text");
    out->has_heads = PyMapping_HasKeyString(config, "heads");
    if (read_qformer(state, config, &out->qformer) < 0 ||
        (out->has_vision && read_vision(state, config, &out->vision) < 0) ||
        (out->has_text && read_text_config(state, config, &out->text) < 0) ||
        (out->has_heads && read_heads(config, &out->heads) < 0))
        return -1;
    out->heads.hidden_size = out->qformer.hidden_size;
    return 0;
}
