/* Strict safetensors reader over mmap, and writer. https://github.com/huggingface/safetensors (format description).
 *
 * A file either obeys every rule or is refused with B2_E_FORMAT and the rule's name; see docs/FORMATS.md. */
#ifndef B2_IO_SAFETENSORS_H
#define B2_IO_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#include "core/error.h"

enum { B2_ST_MAX_RANK = 8 };

typedef enum b2_st_dtype {
    B2_ST_BOOL, B2_ST_U8, B2_ST_I8, B2_ST_F8_E5M2, B2_ST_F8_E4M3, B2_ST_I16, B2_ST_U16, B2_ST_F16, B2_ST_BF16,
    B2_ST_I32, B2_ST_U32, B2_ST_F32, B2_ST_F64, B2_ST_I64, B2_ST_U64
} b2_st_dtype;

size_t b2_st_dtype_size(b2_st_dtype dtype);
const char *b2_st_dtype_name(b2_st_dtype dtype);

typedef struct b2_st_tensor {
    const char *name; /* NUL-terminated, owned by the file */
    b2_st_dtype dtype;
    int rank;
    int64_t shape[B2_ST_MAX_RANK];
    size_t offset;    /* from the start of the data section */
    size_t bytes;
    const void *data; /* inside the mapping; any alignment */
} b2_st_tensor;

typedef struct b2_st_file {
    char *path;
    void *map;                /* owned mapping of the whole file, read-only */
    size_t map_bytes;
    size_t header_bytes;      /* N, without the 8 length bytes */
    b2_st_tensor *tensors;    /* [count], ascending offset; owned */
    int64_t count;
    int64_t *by_name;         /* [count] indices into tensors, ascending name; owned */
    char *strings;            /* owned: names and metadata */
    const char **metadata;    /* [2 * metadata_count] key, value; owned array */
    int64_t metadata_count;
} b2_st_file;

/* Opens, maps and validates. On failure nothing is left open. */
int b2_st_open(b2_st_file *file, const char *path, b2_err *err);
/* Validates a header in memory (for fuzzing): `bytes` is the whole file. */
int b2_st_parse(b2_st_file *file, const void *bytes, size_t size, const char *path, b2_err *err);
void b2_st_close(b2_st_file *file);

/* NULL when absent. Binary search. */
const b2_st_tensor *b2_st_find(const b2_st_file *file, const char *name);

/* Gives the pages of one tensor back to the system (they can be read again): after packing, memory holds one copy. */
void b2_st_drop_pages(const b2_st_file *file, const b2_st_tensor *tensor);

/* Writer: tensors in the order given; written to `path`.tmp-<pid>, synced, renamed. On failure the old file is untouched.
 * `metadata` [2 * metadata_count] key, value. */
typedef struct b2_st_source {
    const char *name;
    b2_st_dtype dtype;
    int rank;
    int64_t shape[B2_ST_MAX_RANK];
    /* Fills `out` with the tensor's bytes (row-major). */
    int (*fill)(void *owner, void *out, size_t bytes, b2_err *err);
    void *owner;
} b2_st_source;

int b2_st_write(const char *path, const b2_st_source *sources, int64_t count, const char *const *metadata,
                int64_t metadata_count, b2_err *err);

#endif
