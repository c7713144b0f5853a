/* Strict safetensors reader over mmap, and writer. https://github.com/huggingface/safetensors (format description).
 *
 * A file either obeys every rule or is refused with B2_E_FORMAT and the rule's name; see docs/FORMATS.md. */
#ifndef B2_IO_SAFETENSORS_H
#define B2_IO_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#include "core/cancel.h"
#include "core/error.h"

enum { B2_ST_MAX_RANK = 8 };

typedef enum b2_st_dtype {
    B2_ST_BOOL, B2_ST_U8, B2_ST_I8, B2_ST_F8_E5M2, B2_ST_F8_E4M3, B2_ST_I16, B2_ST_U16, B2_ST_F16, B2_ST_BF16,
    B2_ST_I32, B2_ST_U32, B2_ST_F32, B2_ST_F64, B2_ST_I64, B2_ST_U64
} b2_st_dtype;

enum { B2_ST_DTYPES = B2_ST_U64 + 1 };

size_t b2_st_dtype_size(b2_st_dtype dtype);
const char *b2_st_dtype_name(b2_st_dtype dtype);
/* -1 when there is no such dtype here. */
int b2_st_dtype_of(const char *name);

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
    b2_st_tensor *tensors;    /* [count], ascending offset (empty ones first, then by name); owned */
    int64_t count;
    int64_t *by_name;         /* [count] indices into tensors, ascending name; owned */
    char *strings;            /* owned: names and metadata */
    const char **metadata;    /* [2 * metadata_count] key, value, ascending key; owned array */
    int64_t metadata_count;
} b2_st_file;

/* Opens, maps and validates. On failure nothing is left open. Whoever makes a mapped file shorter kills its readers
 * (SIGBUS): replace files by renaming, as b2_st_write does. */
int b2_st_open(b2_st_file *file, const char *path, b2_err *err);
/* The same for a file in memory: `bytes` is borrowed and must outlive `file`. Only the header is read. */
int b2_st_parse(b2_st_file *file, const void *bytes, size_t size, const char *path, b2_err *err);
void b2_st_close(b2_st_file *file);

/* NULL when absent. Binary search. */
const b2_st_tensor *b2_st_find(const b2_st_file *file, const char *name);

/* The value of a key of __metadata__, or NULL. Binary search. */
const char *b2_st_metadata(const b2_st_file *file, const char *key);

/* Asks the system to read one tensor, and some of what follows it, ahead: packing touches sixteen rows at a time, in
 * which the system sees no order. */
void b2_st_want_pages(const b2_st_file *file, const b2_st_tensor *tensor);

/* For a file that is used where it lies: huge pages, where the system's cache of the file has them. Then touching it costs
 * next to nothing, instead of a page fault for every 16 pages. */
void b2_st_use_in_place(const b2_st_file *file);

/* Gives the pages of one tensor, and what was mapped around it, back to the system (they can be read again): after packing, memory holds one copy. */
void b2_st_drop_pages(const b2_st_file *file, const b2_st_tensor *tensor);

/* Writer. Tensors of larger elements come first, otherwise in the order given: with data that start at a multiple of 64,
 * each is then aligned to its elements, and blocks of whole 64 bytes to that. The file is written to `path`.tmp-<pid>-<n>, synced and renamed: on failure the old file is
 * untouched and nothing is left beside it. A symbolic link is replaced, not followed.
 * `metadata` [2 * metadata_count] key, value. `cancel` may be NULL. */
typedef struct b2_st_source {
    const char *name;
    b2_st_dtype dtype;
    int rank;
    int64_t shape[B2_ST_MAX_RANK];
    /* Where the tensor's bytes lie: the first data_bytes of them, zeros follow. NULL: `fill` makes them. */
    const void *data;
    size_t data_bytes;
    /* Fills `out` with the tensor's bytes (row-major, little-endian). Not called for an empty tensor. */
    int (*fill)(void *owner, void *out, size_t bytes, b2_err *err);
    void *owner;
} b2_st_source;

int b2_st_write(const char *path, const b2_st_source *sources, int64_t count, const char *const *metadata,
                int64_t metadata_count, b2_cancel *cancel, b2_err *err);

#endif
