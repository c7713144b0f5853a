/* The reader. The header is read twice by the same code: once to check and count, once to fill what was counted (with
 * every bound checked again: a mapped file may change under us); then the tensors are put in the order of their bytes
 * and must cover the data without hole or overlap.
 *
 * A b2_st_file owns its arrays, its strings and (after b2_st_open) the mapping. docs/FORMATS.md lists every rule. */
#define _DEFAULT_SOURCE /* madvise */
#include "io/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/memory.h"
#include "io/json.h"

enum { LENGTH_BYTES = 8, MAX_HEADER = 100 * 1000 * 1000, NAME_SHOWN = 80 };

static const struct {
    const char *name;
    size_t size;
} dtypes[B2_ST_DTYPES] = {
    [B2_ST_BOOL] = {"BOOL", 1}, [B2_ST_U8] = {"U8", 1},           [B2_ST_I8] = {"I8", 1},
    [B2_ST_U16] = {"U16", 2},   [B2_ST_F8_E5M2] = {"F8_E5M2", 1}, [B2_ST_F8_E4M3] = {"F8_E4M3", 1},
    [B2_ST_I16] = {"I16", 2},   [B2_ST_F16] = {"F16", 2},         [B2_ST_BF16] = {"BF16", 2},
    [B2_ST_I32] = {"I32", 4},   [B2_ST_U32] = {"U32", 4},         [B2_ST_F32] = {"F32", 4},
    [B2_ST_F64] = {"F64", 8},   [B2_ST_I64] = {"I64", 8},         [B2_ST_U64] = {"U64", 8},
};

size_t b2_st_dtype_size(b2_st_dtype dtype)
{
    return dtypes[dtype].size;
}

const char *b2_st_dtype_name(b2_st_dtype dtype)
{
    return dtypes[dtype].name;
}

int b2_st_dtype_of(const char *name)
{
    for (int i = 0; i < B2_ST_DTYPES; i++)
        if (strcmp(name, dtypes[i].name) == 0)
            return i;
    return -1;
}

typedef struct parser {
    b2_json json;
    b2_st_file *file;
    int filling;          /* 0: count, 1: fill what was counted */
    size_t string_room;   /* bytes of file->strings, when filling */
    size_t string_bytes;  /* of them used so far */
    int64_t count;
    int64_t metadata_count;
} parser;

static int fail(const parser *p, const char *rule, const char *message, b2_err *err)
{
    const char *object = p->json.object;
    return b2_fail(err, B2_E_FORMAT, "%s: %s: %s%s%s%s", p->json.where, rule, object[0] ? "\"" : "", object,
                   object[0] ? "\": " : "", message);
}

/* The second reading found more than the first one counted: somebody writes to the mapped file. */
static int fail_changed(const parser *p, b2_err *err)
{
    return fail(p, "file-changed", "the file changed while it was read", err);
}

/* A string of the header (a key if `key`), NUL-terminated in file->strings when filling. `head` gets its beginning;
 * names longer than that are never compared with anything but each other. */
static int read_string(parser *p, int key, const char **string, char head[NAME_SHOWN], size_t *bytes, b2_err *err)
{
    char *out = p->filling ? p->file->strings + p->string_bytes : head;
    size_t room = p->filling ? p->string_room - p->string_bytes : NAME_SHOWN - 1;
    if ((key ? b2_json_key : b2_json_string)(&p->json, out, room, bytes, err) < 0)
        return -1;
    if (p->filling && *bytes >= room)
        return fail_changed(p, err);
    size_t shown = *bytes < NAME_SHOWN - 1 ? *bytes : NAME_SHOWN - 1;
    if (p->filling) {
        if (memchr(out, 0, *bytes))
            return fail(p, "name-nul", "a name or metadata text holds the character NUL", err);
        out[*bytes] = 0;
        memcpy(head, out, shown);
    }
    head[shown] = 0;
    *string = p->filling ? out : NULL;
    p->string_bytes += *bytes + 1;
    return 0;
}

static int read_metadata(parser *p, b2_err *err)
{
    int more;
    char head[NAME_SHOWN];
    size_t bytes;
    const char *key = NULL, *value = NULL;
    b2_json_label(&p->json, "__metadata__", 12);
    if (b2_json_open(&p->json, '{', err) < 0)
        return -1;
    for (;;) {
        if (b2_json_next(&p->json, &more, err) < 0)
            return -1;
        if (!more)
            return 0;
        if (read_string(p, 1, &key, head, &bytes, err) < 0)
            return -1;
        if (b2_json_peek(&p->json) != '"')
            return fail(p, "metadata-string", "every value must be a string", err);
        if (read_string(p, 0, &value, head, &bytes, err) < 0)
            return -1;
        if (p->filling) {
            if (p->metadata_count == p->file->metadata_count)
                return fail_changed(p, err);
            p->file->metadata[2 * p->metadata_count] = key;
            p->file->metadata[2 * p->metadata_count + 1] = value;
        }
        p->metadata_count++;
    }
}

static int read_dtype(parser *p, b2_st_tensor *tensor, b2_err *err)
{
    char name[24], shown[24], message[96];
    size_t bytes;
    if (b2_json_string(&p->json, name, sizeof name - 1, &bytes, err) < 0)
        return -1;
    size_t kept = bytes < sizeof name - 1 ? bytes : sizeof name - 1;
    name[kept] = 0;
    int dtype = strlen(name) == bytes ? b2_st_dtype_of(name) : -1;
    if (dtype < 0) {
        b2_printable(shown, sizeof shown, name, kept, 0);
        snprintf(message, sizeof message, "expected a dtype from BOOL to U64, found \"%s\"", shown);
        return fail(p, "unknown-dtype", message, err);
    }
    tensor->dtype = (b2_st_dtype)dtype;
    return 0;
}

static int read_shape(parser *p, b2_st_tensor *tensor, b2_err *err)
{
    int more;
    if (b2_json_open(&p->json, '[', err) < 0)
        return -1;
    for (;;) {
        if (b2_json_next(&p->json, &more, err) < 0)
            return -1;
        if (!more)
            return 0;
        if (tensor->rank == B2_ST_MAX_RANK)
            return fail(p, "rank", "expected at most 8 axes, found more", err);
        if (b2_json_natural(&p->json, &tensor->shape[tensor->rank++], err) < 0)
            return -1;
    }
}

static int read_offsets(parser *p, int64_t range[2], b2_err *err)
{
    int more, n = 0;
    if (b2_json_open(&p->json, '[', err) < 0)
        return -1;
    for (;;) {
        if (b2_json_next(&p->json, &more, err) < 0)
            return -1;
        if (more ? n == 2 : n != 2)
            return fail(p, "tensor-form", "data_offsets: expected [begin, end]", err);
        if (!more)
            return 0;
        if (b2_json_natural(&p->json, &range[n++], err) < 0)
            return -1;
    }
}

/* Product in the order of the axes, so that [0, 2^62, 2^62] is empty and [2^62, 2^62, 0] overflows: as the reference. */
static int check_size(const parser *p, b2_st_tensor *tensor, const int64_t range[2], b2_err *err)
{
    char message[128];
    uint64_t bytes = 1, size = dtypes[tensor->dtype].size;
#if SIZE_MAX < INT64_MAX
    if ((uint64_t)range[1] > SIZE_MAX)
        return fail(p, "missing-data", "ends past the address space", err);
#endif
    if (range[1] < range[0]) {
        snprintf(message, sizeof message, "data_offsets: begins at %lld, ends at %lld", (long long)range[0],
                 (long long)range[1]);
        return fail(p, "offset-order", message, err);
    }
    for (int i = 0; i <= tensor->rank; i++) {
        uint64_t factor = i < tensor->rank ? (uint64_t)tensor->shape[i] : size;
        if (factor != 0 && bytes > (uint64_t)INT64_MAX / factor)
            return fail(p, "shape-overflow", "the product of the shape and the element size passes 2^63 - 1", err);
        bytes *= factor;
    }
    if (bytes != (uint64_t)(range[1] - range[0])) {
        snprintf(message, sizeof message, "%s of this shape: expected %llu bytes, found %lld",
                 dtypes[tensor->dtype].name, (unsigned long long)bytes, (long long)(range[1] - range[0]));
        return fail(p, "byte-size", message, err);
    }
    tensor->offset = (size_t)range[0];
    tensor->bytes = (size_t)bytes;
    return 0;
}

static int read_field(parser *p, b2_st_tensor *tensor, int64_t range[2], int *seen, b2_err *err)
{
    static const char *const fields[] = {"dtype", "shape", "data_offsets"};
    char key[24], shown[24], message[96];
    size_t bytes;
    int field = 0;
    if (b2_json_key(&p->json, key, sizeof key - 1, &bytes, err) < 0)
        return -1;
    size_t kept = bytes < sizeof key - 1 ? bytes : sizeof key - 1;
    key[kept] = 0;
    while (field < 3 && (strcmp(key, fields[field]) != 0 || strlen(key) != bytes))
        field++;
    if (field == 3 || (*seen & 1 << field)) {
        b2_printable(shown, sizeof shown, key, kept, 0);
        snprintf(message, sizeof message, field == 3 ? "unknown key \"%s\"" : "the key \"%s\" comes twice", shown);
        return fail(p, field == 3 ? "tensor-form" : "duplicate-key", message, err);
    }
    *seen |= 1 << field;
    if (field == 0)
        return read_dtype(p, tensor, err);
    return field == 1 ? read_shape(p, tensor, err) : read_offsets(p, range, err);
}

static int read_tensor(parser *p, const char *name, b2_err *err)
{
    int more = 1, seen = 0;
    int64_t range[2] = {0, 0};
    b2_st_tensor tensor = {.name = name};
    if (b2_json_open(&p->json, '{', err) < 0)
        return -1;
    while (more) {
        if (b2_json_next(&p->json, &more, err) < 0)
            return -1;
        if (more && read_field(p, &tensor, range, &seen, err) < 0)
            return -1;
    }
    if (seen != 7)
        return fail(p, "tensor-form", "expected the keys dtype, shape and data_offsets", err);
    if (check_size(p, &tensor, range, err) < 0)
        return -1;
    if (p->filling) {
        if (p->count == p->file->count)
            return fail_changed(p, err);
        p->file->tensors[p->count] = tensor;
    }
    p->count++;
    return 0;
}

static int read_header(parser *p, b2_err *err)
{
    int more, metadata_seen = 0;
    char head[NAME_SHOWN];
    const char *name = NULL;
    size_t bytes;
    if (p->json.at == p->json.end || *p->json.at != '{')
        return fail(p, "header-start", "the header must begin with '{'", err);
    if (b2_json_open(&p->json, '{', err) < 0)
        return -1;
    for (;;) {
        b2_json_label(&p->json, NULL, 0);
        if (b2_json_next(&p->json, &more, err) < 0)
            return -1;
        if (!more)
            return b2_json_finish(&p->json, err);
        if (read_string(p, 1, &name, head, &bytes, err) < 0)
            return -1;
        if (bytes == 12 && memcmp(head, "__metadata__", 12) == 0) {
            if (metadata_seen++)
                return fail(p, "duplicate-key", "the key \"__metadata__\" comes twice", err);
            if (read_metadata(p, err) < 0)
                return -1;
            continue;
        }
        b2_json_label(&p->json, head, bytes < NAME_SHOWN - 1 ? bytes : NAME_SHOWN - 1);
        if (read_tensor(p, name, err) < 0)
            return -1;
    }
}

/* Heap sort: no allocation, and n log n for every input (a hostile one included). */
static void sift_down(void *owner, int64_t root, int64_t n, int (*less)(const void *, int64_t, int64_t),
                      void (*swap)(void *, int64_t, int64_t))
{
    for (;;) {
        int64_t child = 2 * root + 1;
        if (child >= n)
            return;
        if (child + 1 < n && less(owner, child, child + 1))
            child++;
        if (!less(owner, root, child))
            return;
        swap(owner, root, child);
        root = child;
    }
}

static void heap_sort(void *owner, int64_t n, int (*less)(const void *, int64_t, int64_t),
                      void (*swap)(void *, int64_t, int64_t))
{
    for (int64_t i = n / 2; i-- > 0;)
        sift_down(owner, i, n, less, swap);
    for (int64_t last = n - 1; last > 0; last--) {
        swap(owner, 0, last);
        sift_down(owner, 0, last, less, swap);
    }
}

static int tensor_less(const void *owner, int64_t i, int64_t j)
{
    const b2_st_tensor *a = &((const b2_st_file *)owner)->tensors[i], *b = &((const b2_st_file *)owner)->tensors[j];
    if (a->offset != b->offset)
        return a->offset < b->offset;
    return a->bytes != b->bytes ? a->bytes < b->bytes : strcmp(a->name, b->name) < 0;
}

static void tensor_swap(void *owner, int64_t i, int64_t j)
{
    b2_st_tensor *tensors = ((b2_st_file *)owner)->tensors, saved = tensors[i];
    tensors[i] = tensors[j];
    tensors[j] = saved;
}

static int name_less(const void *owner, int64_t i, int64_t j)
{
    const b2_st_file *file = owner;
    return strcmp(file->tensors[file->by_name[i]].name, file->tensors[file->by_name[j]].name) < 0;
}

static void name_swap(void *owner, int64_t i, int64_t j)
{
    int64_t *by_name = ((b2_st_file *)owner)->by_name, saved = by_name[i];
    by_name[i] = by_name[j];
    by_name[j] = saved;
}

static int key_less(const void *owner, int64_t i, int64_t j)
{
    const char *const *metadata = ((const b2_st_file *)owner)->metadata;
    return strcmp(metadata[2 * i], metadata[2 * j]) < 0;
}

static void key_swap(void *owner, int64_t i, int64_t j)
{
    const char **metadata = ((b2_st_file *)owner)->metadata;
    for (int k = 0; k < 2; k++) {
        const char *saved = metadata[2 * i + k];
        metadata[2 * i + k] = metadata[2 * j + k];
        metadata[2 * j + k] = saved;
    }
}

static int fail_twice(parser *p, const char *name, const char *what, b2_err *err)
{
    char message[64];
    b2_json_label(&p->json, name, strlen(name));
    snprintf(message, sizeof message, "this %s comes twice", what);
    return fail(p, "duplicate-key", message, err);
}

static int check_names(parser *p, b2_err *err)
{
    b2_st_file *file = p->file;
    for (int64_t i = 0; i < file->count; i++)
        file->by_name[i] = i;
    heap_sort(file, file->count, name_less, name_swap);
    for (int64_t i = 1; i < file->count; i++)
        if (!name_less(file, i - 1, i))
            return fail_twice(p, file->tensors[file->by_name[i]].name, "tensor", err);
    heap_sort(file, file->metadata_count, key_less, key_swap);
    for (int64_t i = 1; i < file->metadata_count; i++)
        if (!key_less(file, i - 1, i))
            return fail_twice(p, file->metadata[2 * i], "key of __metadata__", err);
    return 0;
}

/* The tensors, in order, cover the data section [0, data_bytes) exactly. */
static int check_layout(parser *p, const unsigned char *data, size_t data_bytes, b2_err *err)
{
    char message[160];
    size_t end = 0;
    for (int64_t i = 0; i < p->file->count; i++) {
        b2_st_tensor *tensor = &p->file->tensors[i];
        b2_json_label(&p->json, tensor->name, strlen(tensor->name));
        if (tensor->offset != end) {
            snprintf(message, sizeof message, "begins at %zu, expected %zu, where the tensor before it ends",
                     tensor->offset, end);
            return fail(p, tensor->offset > end ? "hole" : "overlap", message, err);
        }
        end += tensor->bytes; /* at most 2^63 - 1: an end that was read */
        if (end > data_bytes) {
            snprintf(message, sizeof message, "ends at %zu, but the file holds %zu bytes of data", end, data_bytes);
            return fail(p, "missing-data", message, err);
        }
        tensor->data = data + tensor->offset;
    }
    b2_json_label(&p->json, NULL, 0);
    if (end != data_bytes) {
        snprintf(message, sizeof message, "the last tensor ends at %zu, but the file holds %zu bytes of data", end,
                 data_bytes);
        return fail(p, "trailing-bytes", message, err);
    }
    return 0;
}

static int allocate(parser *p, b2_err *err)
{
    b2_st_file *file = p->file;
    file->count = p->count;
    file->metadata_count = p->metadata_count;
    file->tensors = b2_alloc((size_t)p->count, sizeof *file->tensors, "safetensors: tensors", err);
    file->by_name = b2_alloc((size_t)p->count, sizeof *file->by_name, "safetensors: names", err);
    file->metadata = b2_alloc(2 * (size_t)p->metadata_count, sizeof *file->metadata, "safetensors: metadata", err);
    file->strings = b2_alloc(p->string_bytes, 1, "safetensors: strings", err);
    return file->tensors && file->by_name && file->metadata && file->strings ? 0 : -1;
}

static int header_length(parser *p, const unsigned char *bytes, size_t size, b2_err *err)
{
    char message[128];
    uint64_t length = 0;
    if (size < LENGTH_BYTES) {
        snprintf(message, sizeof message, "expected at least 8 bytes, found %zu", size);
        return fail(p, "file-too-small", message, err);
    }
    for (int i = LENGTH_BYTES; i-- > 0;)
        length = length << 8 | bytes[i];
    if (length > MAX_HEADER) {
        snprintf(message, sizeof message, "expected at most 100000000 bytes of header, found %llu",
                 (unsigned long long)length);
        return fail(p, "header-too-long", message, err);
    }
    if (length > size - LENGTH_BYTES) {
        snprintf(message, sizeof message, "a header of %llu bytes in a file of %zu", (unsigned long long)length, size);
        return fail(p, "header-beyond-file", message, err);
    }
    p->file->header_bytes = (size_t)length;
    return 0;
}

static int parse(parser *p, const unsigned char *bytes, size_t size, const char *path, b2_err *err)
{
    b2_json_begin(&p->json, bytes, 0, path);
    if (header_length(p, bytes, size, err) < 0)
        return -1;
    size_t header = p->file->header_bytes;
    b2_json_begin(&p->json, bytes + LENGTH_BYTES, header, path);
    if (read_header(p, err) < 0 || allocate(p, err) < 0)
        return -1;
    *p = (parser){.file = p->file, .filling = 1, .string_room = p->string_bytes};
    b2_json_begin(&p->json, bytes + LENGTH_BYTES, header, path);
    if (read_header(p, err) < 0)
        return -1;
    if (p->count != p->file->count || p->metadata_count != p->file->metadata_count)
        return fail_changed(p, err);
    b2_json_label(&p->json, NULL, 0);
    heap_sort(p->file, p->file->count, tensor_less, tensor_swap);
    size_t data = LENGTH_BYTES + header;
    return check_names(p, err) < 0 ? -1 : check_layout(p, bytes + data, size - data, err);
}

int b2_st_parse(b2_st_file *file, const void *bytes, size_t size, const char *path, b2_err *err)
{
    *file = (b2_st_file){0};
    parser p = {.file = file};
    file->path = b2_alloc(strlen(path) + 1, 1, "safetensors: path", err);
    if (!file->path)
        return -1;
    memcpy(file->path, path, strlen(path) + 1);
    if (parse(&p, bytes, size, path, err) < 0) {
        b2_st_close(file);
        return -1;
    }
    return 0;
}

/* *bytes is 0 and *map NULL for an empty file. */
static int map_file(int fd, const char *shown, void **map, size_t *bytes, b2_err *err)
{
    struct stat info;
    if (fstat(fd, &info) < 0)
        return b2_fail_os(err, errno, "%s: stat", shown);
    if (S_ISDIR(info.st_mode))
        return b2_fail_os(err, EISDIR, "%s", shown);
    if (!S_ISREG(info.st_mode))
        return b2_fail(err, B2_E_FORMAT, "%s: regular-file: expected a regular file, found a pipe or device", shown);
#if SIZE_MAX < INT64_MAX
    if ((uint64_t)info.st_size > SIZE_MAX)
        return b2_fail_os(err, EFBIG, "%s", shown);
#endif
    *bytes = (size_t)info.st_size;
    if (*bytes == 0)
        return 0;
    *map = mmap(NULL, *bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    if (*map != MAP_FAILED)
        return 0;
    *map = NULL;
    return b2_fail_os(err, errno, "%s: mmap of %zu bytes", shown, *bytes);
}

int b2_st_open(b2_st_file *file, const char *path, b2_err *err)
{
    char shown[256];
    void *map = NULL;
    size_t bytes = 0;
    *file = (b2_st_file){0};
    b2_printable(shown, sizeof shown, path, strlen(path), 1);
    /* O_NONBLOCK: opening a pipe that nobody writes to must not wait. */
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
    if (fd < 0)
        return b2_fail_os(err, errno, "%s", shown);
    int status = map_file(fd, shown, &map, &bytes, err);
    close(fd);
    if (status == 0)
        status = b2_st_parse(file, map ? map : "", bytes, path, err);
    if (status < 0) {
        if (map)
            munmap(map, bytes);
        return -1;
    }
    file->map = map;
    file->map_bytes = bytes;
    return 0;
}

void b2_st_close(b2_st_file *file)
{
    if (file->map)
        munmap(file->map, file->map_bytes);
    b2_free(file->path);
    b2_free(file->tensors);
    b2_free(file->by_name);
    b2_free(file->strings);
    b2_free(file->metadata);
    *file = (b2_st_file){0};
}

const b2_st_tensor *b2_st_find(const b2_st_file *file, const char *name)
{
    int64_t low = 0, high = file->count;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        const b2_st_tensor *tensor = &file->tensors[file->by_name[middle]];
        int order = strcmp(name, tensor->name);
        if (order == 0)
            return tensor;
        if (order < 0)
            high = middle;
        else
            low = middle + 1;
    }
    return NULL;
}

const char *b2_st_metadata(const b2_st_file *file, const char *key)
{
    int64_t low = 0, high = file->metadata_count;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        int order = strcmp(key, file->metadata[2 * middle]);
        if (order == 0)
            return file->metadata[2 * middle + 1];
        if (order < 0)
            high = middle;
        else
            low = middle + 1;
    }
    return NULL;
}

void b2_st_want_pages(const b2_st_file *file, const b2_st_tensor *tensor)
{
    enum { AHEAD = 64 << 20 };
    long page_bytes = sysconf(_SC_PAGESIZE);
    if (!file->map || page_bytes < 1)
        return;
    uintptr_t page = (uintptr_t)page_bytes, begin = (uintptr_t)tensor->data / page * page;
    uintptr_t end = (uintptr_t)tensor->data + tensor->bytes, map_end = (uintptr_t)file->map + file->map_bytes;
    end = map_end - end > AHEAD ? end + AHEAD : map_end;
    if (begin < end)
        madvise((void *)begin, end - begin, MADV_WILLNEED); /* a hint, as below */
}

void b2_st_use_in_place(const b2_st_file *file)
{
#ifdef MADV_HUGEPAGE
    if (file->map)
        madvise(file->map, file->map_bytes, MADV_HUGEPAGE); /* a hint, as above */
#else
    (void)file;
#endif
}

void b2_st_drop_pages(const b2_st_file *file, const b2_st_tensor *tensor)
{
    /* The system maps what lies around a page as well, up to a huge page: hundreds of megabytes over all tensors. */
    enum { AROUND = 2 << 20 };
    long page_bytes = sysconf(_SC_PAGESIZE);
    if (!file->map || page_bytes < 1)
        return;
    uintptr_t page = (uintptr_t)page_bytes, map = (uintptr_t)file->map, begin = (uintptr_t)tensor->data;
    uintptr_t end = begin + tensor->bytes, map_end = map + file->map_bytes;
    begin = begin - map > AROUND ? (begin - AROUND) / page * page : map;
    end = map_end - end > AROUND ? end + AROUND : map_end;
    madvise((void *)begin, end - begin, MADV_DONTNEED); /* a hint: nothing to do if it is refused */
}
