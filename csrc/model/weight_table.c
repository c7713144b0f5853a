#include "model/weight_table.h"

#include <stdio.h>
#include <string.h>

#include "core/memory.h"
#include "io/packed.h"
#include "ops/weights.h"

static int find_packed(b2_checkpoint *checkpoint, b2_err *err)
{
    for (int64_t i = 0; i < checkpoint->count; i++) {
        int packed = b2_packed_is(&checkpoint->files[i], err);
        if (packed < 0)
            return -1;
        if (packed && checkpoint->count > 1)
            return b2_fail(err, B2_E_FORMAT, "%s: packed weights, beside other files of weights",
                           checkpoint->files[i].path);
        if (packed)
            b2_st_use_in_place(&checkpoint->files[i]);
        checkpoint->packed |= packed;
    }
    return 0;
}

int b2_checkpoint_open(b2_checkpoint *checkpoint, const char *const *paths, int64_t count, b2_err *err)
{
    *checkpoint = (b2_checkpoint){0};
    checkpoint->files = b2_alloc_zeroed((size_t)count, sizeof *checkpoint->files, "checkpoint", err);
    checkpoint->used = b2_alloc_zeroed((size_t)count, sizeof *checkpoint->used, "checkpoint", err);
    if (!checkpoint->files || !checkpoint->used)
        goto fail;
    for (int64_t i = 0; i < count; i++) {
        if (b2_st_open(&checkpoint->files[i], paths[i], err) < 0)
            goto fail;
        checkpoint->count = i + 1;
        checkpoint->used[i] = b2_alloc_zeroed((size_t)checkpoint->files[i].count, 1, "checkpoint", err);
        if (!checkpoint->used[i])
            goto fail;
    }
    if (find_packed(checkpoint, err) < 0)
        goto fail;
    return 0;
fail:
    b2_checkpoint_close(checkpoint);
    return -1;
}

void b2_checkpoint_close(b2_checkpoint *checkpoint)
{
    for (int64_t i = 0; i < checkpoint->count; i++) {
        b2_st_close(&checkpoint->files[i]);
        b2_free(checkpoint->used[i]);
    }
    b2_free(checkpoint->files);
    b2_free(checkpoint->used);
    *checkpoint = (b2_checkpoint){0};
}

static int64_t find_file(const b2_checkpoint *checkpoint, const char *name, const b2_st_tensor **tensor)
{
    for (int64_t i = 0; i < checkpoint->count; i++)
        if ((*tensor = b2_st_find(&checkpoint->files[i], name)))
            return i;
    return -1;
}

const b2_st_tensor *b2_checkpoint_find(const b2_checkpoint *checkpoint, const char *name)
{
    const b2_st_tensor *tensor = NULL;
    find_file(checkpoint, name, &tensor);
    return tensor;
}

void b2_checkpoint_unused(const b2_checkpoint *checkpoint, void (*fn)(void *owner, const char *name), void *owner)
{
    for (int64_t i = 0; i < checkpoint->count; i++)
        for (int64_t j = 0; j < checkpoint->files[i].count; j++)
            if (!checkpoint->used[i][j])
                fn(owner, checkpoint->files[i].tensors[j].name);
}

const char *b2_binder_name(b2_binder *binder, const char *pattern, b2_err *err)
{
    char text[256];
    const char *slot = strstr(pattern, "%d");
    if (slot)
        snprintf(text, sizeof text, "%.*s%d%s", (int)(slot - pattern), pattern, binder->layer, slot + 2);
    else
        snprintf(text, sizeof text, "%s", pattern);
    if (binder->name_count == binder->name_capacity) {
        int64_t capacity = binder->name_capacity ? 2 * binder->name_capacity : 256;
        char **names = b2_alloc((size_t)capacity, sizeof *names, "weight names", err);
        if (!names)
            return NULL;
        if (binder->name_count)
            memcpy(names, binder->names, (size_t)binder->name_count * sizeof *names);
        b2_free(binder->names);
        binder->names = names;
        binder->name_capacity = capacity;
    }
    char *name = b2_alloc(strlen(text) + 1, 1, "weight name", err);
    if (!name)
        return NULL;
    strcpy(name, text);
    return binder->names[binder->name_count++] = name;
}

static int shape_of(int64_t shape[4], const unsigned char *codes, const int64_t *dims)
{
    int rank = 0;
    while (codes[rank] != B2_DIM_END) {
        shape[rank] = dims[codes[rank]];
        rank++;
    }
    return rank;
}

static void print_shape(char *out, size_t size, const int64_t *shape, int rank)
{
    size_t used = (size_t)snprintf(out, size, "[");
    for (int i = 0; i < rank && used < size; i++)
        used += (size_t)snprintf(out + used, size - used, i ? ", %lld" : "%lld", (long long)shape[i]);
    if (used < size)
        snprintf(out + used, size - used, "]");
}

static int check_tensor(const b2_st_tensor *tensor, const int64_t *shape, int rank, b2_err *err)
{
    if (tensor->rank != rank || memcmp(tensor->shape, shape, (size_t)rank * sizeof *shape) != 0) {
        char expected[96], found[160];
        print_shape(expected, sizeof expected, shape, rank);
        print_shape(found, sizeof found, tensor->shape, tensor->rank);
        return b2_fail(err, B2_E_FORMAT, "%.200s: expected shape %s from the config, found %s", tensor->name, expected,
                       found);
    }
    return 0;
}

const b2_st_tensor *b2_binder_find(b2_binder *binder, const char *name, const unsigned char *shape_codes, b2_err *err)
{
    const b2_st_tensor *tensor = NULL;
    int64_t file = find_file(binder->checkpoint, name, &tensor);
    if (!tensor)
        return NULL;
    int64_t shape[4];
    int rank = shape_of(shape, shape_codes, binder->dims);
    /* A packed tensor is one row of bytes; `place` compares what they hold. */
    if (!binder->checkpoint->packed && check_tensor(tensor, shape, rank, err) < 0)
        return NULL;
    binder->checkpoint->used[file][tensor - binder->checkpoint->files[file].tensors] = 1;
    return tensor;
}

/* A few megabytes at a time: a table of the true size comes from the disk for longer than a Ctrl-C may wait. */
int b2_binder_same(const b2_binder *binder, const char *a_name, const char *b_name)
{
    enum { STEP = 4 << 20 };
    const b2_st_tensor *a = b2_checkpoint_find(binder->checkpoint, a_name);
    const b2_st_tensor *b = b2_checkpoint_find(binder->checkpoint, b_name);
    if (!a || !b || a->dtype != b->dtype || a->bytes != b->bytes)
        return 0;
    for (size_t at = 0; at < a->bytes && !b2_cancel_poll(binder->cancel); at += STEP) {
        size_t count = a->bytes - at < STEP ? a->bytes - at : STEP;
        if (memcmp((const char *)a->data + at, (const char *)b->data + at, count) != 0)
            return 0;
    }
    return 1;
}

static int head_is_own(b2_binder *binder, const b2_weight_row *tokens, const b2_weight_row *head, int *own, b2_err *err)
{
    const b2_st_tensor *stored = b2_checkpoint_find(binder->checkpoint, head->name);
    const b2_st_tensor *table = b2_checkpoint_find(binder->checkpoint, tokens->name);
    *own = stored && table && !b2_binder_same(binder, head->name, tokens->name);
    if (stored && !*own) /* a copy of the table: known, not unexpected */
        return b2_binder_find(binder, head->name, head->shape, err) ? 0 : -1;
    return 0;
}

int b2_bind_vocabulary(b2_binder *binder, void *base, const b2_weight_row *tokens, const b2_weight_row *head, int tied,
                       b2_err *err)
{
    int own = 1, found = 0;
    if ((tied && head_is_own(binder, tokens, head, &own, err) < 0) ||
        b2_bind_optional(binder, base, tokens, &found, err) < 0)
        return -1;
    if (!found && (!tied || !b2_checkpoint_find(binder->checkpoint, head->name)))
        return b2_fail(err, B2_E_FORMAT, "%s: missing from the checkpoint", tokens->name);
    if (!found) {
        b2_weight_row row = *head;
        row.offset = tokens->offset;
        return b2_bind(binder, base, &row, 1, err);
    }
    return own ? b2_bind(binder, base, head, 1, err) : 0;
}

void b2_binder_ignore(b2_binder *binder, const char *name)
{
    const b2_st_tensor *tensor = NULL;
    int64_t file = find_file(binder->checkpoint, name, &tensor);
    if (tensor)
        binder->checkpoint->used[file][tensor - binder->checkpoint->files[file].tensors] = 1;
}

int b2_stored_view(b2_weight *view, const b2_st_tensor *tensor, int split, b2_err *err)
{
    *view = (b2_weight){.name = tensor->name, .data = tensor->data, .n = 1, .k = 1, .layout = B2_ROWS};
    for (int i = 0; i < tensor->rank; i++)
        *(i < split ? &view->n : &view->k) *= tensor->shape[i];
    switch (tensor->dtype) {
    case B2_ST_F32: view->dtype = B2_F32; return 0;
    case B2_ST_F16: view->dtype = B2_F16; return 0;
    case B2_ST_BF16: view->dtype = B2_BF16; return 0;
    default:
        return b2_fail(err, B2_E_FORMAT, "%.200s: expected dtype F32, F16 or BF16, found %s", tensor->name,
                       b2_st_dtype_name(tensor->dtype));
    }
}

static int split_of(const b2_weight_row *row, int rank)
{
    if (row->kind == B2_VECTOR)
        return rank;
    return row->kind == B2_TABLE ? rank - 1 : 1;
}

static const b2_st_file *file_of(const b2_binder *binder, const b2_st_tensor *tensor)
{
    const b2_st_tensor *same = NULL;
    return &binder->checkpoint->files[find_file(binder->checkpoint, tensor->name, &same)];
}

const char *const b2_part_names[B2_PART_COUNT] = {"vision", "qformer", "language"};

void b2_policies_name(char text[B2_POLICIES_TEXT], const b2_dtype_policy policies[B2_PART_COUNT])
{
    size_t used = 0;
    for (int i = 0; i < B2_PART_COUNT; i++) {
        const b2_dtype_policy *p = &policies[i];
        const char *name = p->hold == B2_HOLD_STORED ? "auto" : p->hold == B2_HOLD_HALF ? "half" : b2_dtype_word(p->dtype);
        used += (size_t)snprintf(text + used, B2_POLICIES_TEXT - used, "%s%s=%s%s", i ? "," : "", b2_part_names[i], name,
                                 p->pairs ? "-pairs" : "");
    }
}

static b2_format format_of(const b2_dtype_policy *policy, b2_kind kind, b2_dtype stored)
{
    b2_dtype dtype = policy->hold == B2_HOLD_DTYPE ? policy->dtype : stored;
    /* Widening a stored half to fp32 would change no product and cost twice the memory. */
    if (policy->hold == B2_HOLD_DTYPE && dtype == B2_F32)
        dtype = stored;
    if (policy->hold == B2_HOLD_HALF && stored == B2_F32)
        dtype = B2_F16;
    if (dtype == B2_I4 && kind == B2_VOCABULARY)
        dtype = B2_I8;
    if (b2_dtype_is_quantised(dtype))
        return (b2_format){dtype, B2_QUADS};
    return (b2_format){dtype, dtype == B2_BF16 && policy->pairs ? B2_PAIRS : B2_PANELS};
}

/* A matrix to the device. */
static int send(b2_binder *binder, b2_weight *weight, const b2_weight *matrix, b2_dtype dtype, b2_err *err)
{
    if (dtype == B2_F16 && binder->widens)
        dtype = B2_F32;
    return b2_weight_stride(weight, matrix, dtype, binder->memory, binder->pool, binder->cancel, err);
}

static int hold(b2_binder *binder, b2_weight *weight, const b2_weight_row *row, const b2_st_tensor *tensor,
                const char *name, b2_err *err)
{
    b2_weight stored;
    if (b2_stored_view(&stored, tensor, split_of(row, tensor->rank), err) < 0)
        return -1;
    stored.name = name;
    if (row->kind == B2_VECTOR || row->kind == B2_TABLE) {
        if (b2_weight_copy(weight, &stored, B2_F32, err) < 0)
            return -1;
    } else {
        b2_format format = format_of(&binder->policy, row->kind, stored.dtype);
        if (binder->memory) {
            if (send(binder, weight, &stored, format.dtype, err) < 0)
                return -1;
            b2_st_drop_pages(file_of(binder, tensor), tensor);
            return 0;
        }
        if (row->kind == B2_MATRIX_ITEM && format.dtype == B2_F32 && (uintptr_t)stored.data % sizeof(float) == 0) {
            *weight = stored;
            return 0; /* read where it lies */
        }
        b2_st_want_pages(file_of(binder, tensor), tensor);
        if (b2_weight_pack(weight, &stored, format, binder->pool, binder->cancel, err) < 0)
            return -1;
    }
    b2_st_drop_pages(file_of(binder, tensor), tensor);
    return 0;
}

static int misplaced(const b2_weight *w, const b2_weight_row *row, const char *found, b2_err *err)
{
    return b2_fail(err, B2_E_FORMAT, "%.200s: expected %s, the packed file holds %s", w->name,
                   row->kind == B2_VECTOR || row->kind == B2_TABLE ? "F32 rows" : "a matrix for this layer", found);
}

/* The weight in a packed file: what lies there must be what this row of the table asks for, to the last byte. */
static int place(b2_binder *binder, b2_weight *weight, const b2_weight_row *row, const b2_st_tensor *tensor,
                 const char *name, b2_err *err)
{
    int columns = 0;
    int64_t shape[4], expected[2] = {1, 1};
    b2_weight w;
    if (b2_packed_read(&w, &columns, &binder->checkpoint->files[0], tensor, err) < 0)
        return -1;
    int rank = shape_of(shape, row->shape, binder->dims);
    for (int i = 0; i < rank; i++)
        expected[i < split_of(row, rank) ? 0 : 1] *= shape[i];
    if (w.n != expected[0] || w.k != expected[1])
        return b2_fail(err, B2_E_FORMAT, "%.200s: expected [%lld, %lld] from the config, the packed file holds [%lld, %lld]",
                       name, (long long)expected[0], (long long)expected[1], (long long)w.n, (long long)w.k);
    int plain = row->kind == B2_VECTOR || row->kind == B2_TABLE;
    if (plain ? w.layout != B2_ROWS : w.layout == B2_ROWS && row->kind != B2_MATRIX_ITEM)
        return misplaced(&w, row, w.layout == B2_ROWS ? "plain rows" : "another layout", err);
    size_t bytes = b2_weight_parts_of(&w).bytes;
    if (tensor->bytes != bytes || (uintptr_t)tensor->data % B2_PACKED_ALIGNMENT != 0)
        return b2_fail(err, B2_E_FORMAT, "%.200s: expected %zu bytes at a multiple of %d, the packed file holds %zu%s", name,
                       bytes, B2_PACKED_ALIGNMENT, tensor->bytes, tensor->bytes == bytes ? ", not aligned" : "");
    w.name = name;
    w.version = 1;
    b2_weight_place(&w, tensor->data, columns);
    if (binder->memory && !plain)
        return send(binder, weight, &w, w.dtype, err);
    *weight = w;
    return 0;
}

int b2_bind_optional(b2_binder *binder, void *base, const b2_weight_row *row, int *found, b2_err *err)
{
    const char *name = b2_binder_name(binder, row->name, err);
    if (!name)
        return -1;
    const b2_st_tensor *tensor = b2_binder_find(binder, name, row->shape, err);
    *found = tensor != NULL;
    if (!tensor)
        return err->code == B2_OK ? 0 : -1;
    b2_weight *weight = (b2_weight *)((char *)base + row->offset);
    return (binder->checkpoint->packed ? place : hold)(binder, weight, row, tensor, name, err);
}

int b2_bind(b2_binder *binder, void *base, const b2_weight_row *table, size_t count, b2_err *err)
{
    for (size_t i = 0; i < count; i++) {
        int found = 0;
        if (b2_bind_optional(binder, base, &table[i], &found, err) < 0)
            return -1;
        if (!found)
            return b2_fail(err, B2_E_FORMAT, "%s: missing from the checkpoint", binder->names[binder->name_count - 1]);
    }
    return 0;
}

int b2_visit_weights(b2_weight_visitor *visitor, const void *base, const b2_weight_row *table, size_t count,
                     const int64_t *dims, b2_err *err)
{
    for (size_t i = 0; i < count; i++) {
        const b2_weight *weight = (const b2_weight *)((const char *)base + table[i].offset);
        int64_t shape[4];
        int rank = shape_of(shape, table[i].shape, dims);
        if (weight->data && visitor->fn(visitor, weight, shape, rank, err) < 0)
            return -1;
    }
    return 0;
}

void b2_release_weights(void *base, const b2_weight_row *table, size_t count)
{
    for (size_t i = 0; i < count; i++)
        b2_weight_release((b2_weight *)((char *)base + table[i].offset));
}
