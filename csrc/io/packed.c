#include "io/packed.h"

#include <stdio.h>
#include <string.h>

#include "io/json.h"

static const char *const layout_names[] = {[B2_ROWS] = "rows", [B2_PANELS] = "panels", [B2_PAIRS] = "pairs",
                                           [B2_QUADS] = "quads"};
enum { LAYOUTS = sizeof layout_names / sizeof *layout_names };

static int fail(const b2_st_file *file, const char *rule, const char *name, const char *message, b2_err *err)
{
    char path[256], shown[B2_JSON_LABEL];
    b2_printable(path, sizeof path, file->path, strlen(file->path), 1);
    b2_printable(shown, sizeof shown, name, strlen(name), 0);
    return b2_fail(err, B2_E_FORMAT, "%s: %s: \"%s\": %s", path, rule, shown, message);
}

int b2_packed_is(const b2_st_file *file, b2_err *err)
{
    char message[128], shown[32];
    const char *version = b2_st_metadata(file, B2_PACKED_VERSION_KEY);
    if (!version)
        return 0;
    if (strcmp(version, B2_PACKED_VERSION) == 0)
        return 1;
    b2_printable(shown, sizeof shown, version, strlen(version), 0);
    snprintf(message, sizeof message, "expected version %s, found %s: pack the checkpoint again", B2_PACKED_VERSION, shown);
    return fail(file, "packed-version", B2_PACKED_VERSION_KEY, message, err);
}

void b2_packed_describe(char text[B2_PACKED_TEXT], const b2_weight *w)
{
    snprintf(text, B2_PACKED_TEXT, "%s %s n=%lld k=%lld group=%lld columns=%d", b2_dtype_name(w->dtype),
             layout_names[w->layout], (long long)w->n, (long long)w->k, (long long)w->group, w->column_scales != NULL);
}

/* The word at *at, which is moved behind it and one space. */
static int take_word(const char **at, const char *const *words, int count)
{
    for (int i = 0; i < count; i++) {
        size_t length = strlen(words[i]);
        if (strncmp(*at, words[i], length) == 0 && (*at)[length] == ' ') {
            *at += length + 1;
            return i;
        }
    }
    return -1;
}

/* `name`=digits, followed by a space or the end. Up to 2^40: their products with each other need not be feared. */
static int take_number(const char **at, const char *name, int64_t *value)
{
    size_t length = strlen(name);
    const char *p = *at + length + 1;
    if (strncmp(*at, name, length) != 0 || (*at)[length] != '=' || *p < '0' || *p > '9' || (*p == '0' && p[1] >= '0'))
        return -1;
    for (*value = 0; *p >= '0' && *p <= '9'; p++)
        if ((*value = 10 * *value + (*p - '0')) > (int64_t)1 << 40)
            return -1;
    if (*p != 0 && (*p != ' ' || p[1] == 0))
        return -1;
    *at = *p ? p + 1 : p;
    return 0;
}

static int parse(b2_weight *w, int64_t *columns, const char *text)
{
    const char *dtypes[B2_DTYPE_COUNT];
    const char *at = text;
    for (int i = 0; i < B2_DTYPE_COUNT; i++)
        dtypes[i] = b2_dtype_name((b2_dtype)i);
    int dtype = take_word(&at, dtypes, B2_DTYPE_COUNT), layout = dtype < 0 ? -1 : take_word(&at, layout_names, LAYOUTS);
    *w = (b2_weight){0};
    if (layout < 0 || take_number(&at, "n", &w->n) < 0 || take_number(&at, "k", &w->k) < 0 ||
        take_number(&at, "group", &w->group) < 0 || take_number(&at, "columns", columns) < 0 || *at)
        return -1;
    w->dtype = (b2_dtype)dtype;
    w->layout = (b2_layout)layout;
    return w->n > 0 && w->k > 0 && *columns <= 1 ? 0 : -1;
}

/* As ops/weights.h lays them out. */
static int belongs_together(const b2_weight *w, int64_t columns)
{
    int64_t whole = (w->k + 31) / 32 * 32;
    switch (w->layout) {
    case B2_ROWS: return w->dtype == B2_F32 && w->group == 0 && !columns;
    case B2_PANELS: return !b2_dtype_is_quantised(w->dtype) && w->group == 0 && !columns;
    case B2_PAIRS: return w->dtype == B2_BF16 && w->group == 0 && !columns;
    case B2_QUADS: break;
    case B2_STRIDED: return 0;
    }
    if (w->dtype == B2_I4)
        return w->group == 32;
    return w->dtype == B2_I8 && w->group == whole;
}

int b2_packed_read(b2_weight *w, int *has_column_scales, const b2_st_file *file, const b2_st_tensor *tensor, b2_err *err)
{
    int64_t columns = 0;
    const char *text = b2_st_metadata(file, tensor->name);
    if (!text)
        return fail(file, "packed-form", tensor->name, "__metadata__ does not say what lies in it", err);
    if (tensor->dtype != B2_ST_U8 || tensor->rank != 1)
        return fail(file, "packed-form", tensor->name, "expected U8 with one axis", err);
    if (parse(w, &columns, text) < 0 || !belongs_together(w, columns)) {
        char message[96], shown[64];
        b2_printable(shown, sizeof shown, text, strlen(text), 0);
        snprintf(message, sizeof message, "found \"%s\"", shown);
        return fail(file, "packed-form", tensor->name, message, err);
    }
    *has_column_scales = (int)columns;
    w->name = tensor->name;
    return 0;
}
