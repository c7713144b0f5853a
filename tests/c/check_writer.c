/* The writer under a sanitizer, with a source that fails: check_writer FOLDER. Exit status 0 when everything held. */
#include <stdio.h>
#include <string.h>

#include "core/memory.h"
#include "io/safetensors.h"

#define HOLDS(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "line %d: %s (%s)\n", __LINE__, #condition, err.message); \
            return 1; \
        } \
    } while (0)

static int fill_count(void *owner, void *out, size_t bytes, b2_err *err)
{
    (void)err;
    memset(out, *(const int *)owner, bytes);
    return 0;
}

static int fill_fails(void *owner, void *out, size_t bytes, b2_err *err)
{
    (void)owner, (void)out, (void)bytes;
    return b2_fail(err, B2_E_NUMERIC, "no numbers today");
}

static int check_tensor(const b2_st_file *file, const char *name, int value)
{
    const b2_st_tensor *tensor = b2_st_find(file, name);
    for (size_t i = 0; tensor && i < tensor->bytes; i++)
        if (((const unsigned char *)tensor->data)[i] != value)
            return 0;
    return tensor != NULL;
}

int main(int argc, char **argv)
{
    char path[512];
    int one = 1, two = 2;
    b2_err err = {0};
    b2_st_file file;
    const char *metadata[] = {"key", "value \"\\\n"};
    b2_st_source sources[] = {
        {.name = "bytes", .dtype = B2_ST_U8, .rank = 1, .shape = {5001}, .fill = fill_count, .owner = &one},
        {.name = "large", .dtype = B2_ST_F32, .rank = 2, .shape = {200, 50}, .fill = fill_count, .owner = &two},
        {.name = "empty", .dtype = B2_ST_F64, .rank = 1, .shape = {0}, .fill = fill_fails},
    };
    if (argc != 2)
        return 2;
    snprintf(path, sizeof path, "%s/a.safetensors", argv[1]);
    HOLDS(b2_st_write(path, sources, 3, metadata, 1, NULL, &err) == 0);
    HOLDS(b2_st_open(&file, path, &err) == 0);
    HOLDS(file.count == 3 && strcmp(file.tensors[1].name, "large") == 0 && strcmp(file.metadata[1], metadata[1]) == 0);
    HOLDS(((size_t)file.tensors[1].data - (size_t)file.map) % 64 == 0);
    HOLDS(check_tensor(&file, "bytes", 1) && check_tensor(&file, "large", 2));
    b2_st_drop_pages(&file, &file.tensors[1]); /* and they come back */
    HOLDS(check_tensor(&file, "bytes", 1) && check_tensor(&file, "large", 2));
    sources[0].fill = fill_fails;
    HOLDS(b2_st_write(path, sources, 3, metadata, 1, NULL, &err) < 0 && err.code == B2_E_NUMERIC);
    err = (b2_err){0};
    sources[0].rank = 9;
    HOLDS(b2_st_write(path, sources, 3, NULL, 0, NULL, &err) < 0 && err.code == B2_E_VALUE);
    err = (b2_err){0};
    sources[0].rank = 1;
    sources[0].shape[0] = -1;
    HOLDS(b2_st_write(path, sources, 3, NULL, 0, NULL, &err) < 0 && err.code == B2_E_VALUE);
    err = (b2_err){0};
    sources[0].name = "large";
    sources[0].shape[0] = 1;
    HOLDS(b2_st_write(path, sources, 3, NULL, 0, NULL, &err) < 0 && err.code == B2_E_FORMAT);
    err = (b2_err){0};
    HOLDS(b2_st_write(path, NULL, 0, NULL, 0, NULL, &err) == 0); /* no tensors at all */
    HOLDS(check_tensor(&file, "bytes", 1) && check_tensor(&file, "large", 2)); /* the old mapping lives on */
    b2_st_close(&file);
    HOLDS(b2_st_open(&file, path, &err) == 0 && file.count == 0);
    b2_st_close(&file);
    return 0;
}
