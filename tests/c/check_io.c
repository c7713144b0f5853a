/* Feeds files to the JSON and safetensors readers under a sanitizer: check_io FILE...
 * A FILE is cases one after another: 4 bytes of length (little-endian), then that many bytes. Each case is copied to a
 * block of exactly its size, so that reading one byte too far is seen, and what was accepted is touched everywhere.
 * Prints how many were accepted: as safetensors, as JSON. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/memory.h"
#include "io/json.h"
#include "io/safetensors.h"

static volatile unsigned char sink;

static void touch(const b2_st_file *file, const unsigned char *bytes, size_t size)
{
    for (int64_t i = 0; i < file->count; i++) {
        const b2_st_tensor *tensor = &file->tensors[i];
        const unsigned char *data = tensor->data;
        if (tensor->bytes > 0 && (data < bytes || data + tensor->bytes > bytes + size))
            exit(3);
        for (size_t k = 0; k < tensor->bytes; k++)
            sink = data[k];
        if (b2_st_find(file, tensor->name) != tensor)
            exit(4);
        b2_st_drop_pages(file, tensor);
    }
    for (int64_t i = 0; i < 2 * file->metadata_count; i++)
        sink = (unsigned char)strlen(file->metadata[i]);
}

static int check_case(const unsigned char *bytes, size_t size, int *is_json)
{
    b2_st_file file;
    b2_json json;
    b2_err err = {0}, json_err = {0};
    b2_json_begin(&json, bytes, size, "case");
    *is_json = b2_json_skip(&json, &json_err) == 0 && b2_json_finish(&json, &json_err) == 0;
    if (b2_st_parse(&file, bytes, size, "case", &err) < 0) {
        if (err.code != B2_E_FORMAT && err.code != B2_E_MEMORY)
            exit(5);
        b2_st_close(&file); /* what failed may be closed */
        return 0;
    }
    touch(&file, bytes, size);
    b2_st_close(&file);
    return 1;
}

static void check_file(FILE *stream, long counts[3])
{
    unsigned char length[4];
    while (fread(length, 1, 4, stream) == 4) {
        size_t size = length[0] | (size_t)length[1] << 8 | (size_t)length[2] << 16 | (size_t)length[3] << 24;
        unsigned char *bytes = malloc(size ? size : 1), *exact = malloc(size);
        int is_json;
        if (!bytes || fread(bytes, 1, size, stream) != size)
            exit(2);
        if (size > 0)
            memcpy(exact, bytes, size);
        counts[0]++;
        counts[1] += check_case(size ? exact : bytes, size, &is_json);
        counts[2] += is_json;
        free(bytes);
        free(exact);
    }
}

int main(int argc, char **argv)
{
    long counts[3] = {0, 0, 0};
    for (int i = 1; i < argc; i++) {
        FILE *stream = fopen(argv[i], "rb");
        if (!stream)
            return 2;
        check_file(stream, counts);
        fclose(stream);
    }
    printf("%ld %ld %ld\n", counts[0], counts[1], counts[2]);
    return 0;
}
