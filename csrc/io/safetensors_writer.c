/* The writer: 8 bytes of header length, the header padded with spaces so that the data begin at a multiple of 64, the tensors. Everything goes to a
 * new file beside the old one, which takes its place only when all of it is on the disk.
 *
 * Owns one buffer of the size of the largest tensor that is filled in while it writes; nothing afterwards. */
#define _POSIX_C_SOURCE 200809L
#include "io/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/memory.h"
#include "io/json.h"

enum { LENGTH_BYTES = 8, ALIGNMENT = 64, TEMPORARY_NAMES = 100 };
/* Written between two looks at the cancel flag, and between two waits for the disk: otherwise gigabytes would pile up in
 * memory, and the fsync at the end could not be interrupted. */
enum { CHUNK = 4 << 20, SYNC_EVERY = 256 << 20 };

/* Text that is counted first (out NULL) and then written. */
typedef struct text {
    char *out;
    size_t used;
} text;

typedef struct writer {
    char shown[256];      /* the path, printable, for messages */
    const b2_st_source *sources;
    int64_t count;
    const char *const *metadata; /* [2 * metadata_count] */
    int64_t metadata_count;
    int64_t *order;       /* [count] which source comes at which place; owned */
    size_t *bytes;        /* [count] of each source; owned */
    size_t data_bytes;
    size_t largest;       /* of those that are filled in */
    char *header;         /* [header_bytes] length, JSON and padding; owned */
    size_t header_bytes;
    size_t unsynced;      /* bytes written since the last wait for the disk */
    b2_cancel *cancel;
} writer;

static void put(text *t, const char *s, size_t bytes)
{
    if (t->out)
        memcpy(t->out + t->used, s, bytes);
    t->used += bytes;
}

static void put_text(text *t, const char *s)
{
    put(t, s, strlen(s));
}

static void put_number(text *t, uint64_t value)
{
    char digits[24];
    put(t, digits, (size_t)snprintf(digits, sizeof digits, "%llu", (unsigned long long)value));
}

static void put_string(text *t, const char *s)
{
    char escape[8];
    put(t, "\"", 1);
    for (; *s; s++) {
        if (*s == '"' || *s == '\\') {
            put(t, "\\", 1);
            put(t, s, 1);
        } else if ((unsigned char)*s < 0x20) {
            put(t, escape, (size_t)snprintf(escape, sizeof escape, "\\u%04x", (unsigned int)*s));
        } else {
            put(t, s, 1);
        }
    }
    put(t, "\"", 1);
}

static void put_metadata(text *t, const writer *w)
{
    put_text(t, "\"__metadata__\":{");
    for (int64_t i = 0; i < w->metadata_count; i++) {
        if (i > 0)
            put(t, ",", 1);
        put_string(t, w->metadata[2 * i]);
        put(t, ":", 1);
        put_string(t, w->metadata[2 * i + 1]);
    }
    put(t, "}", 1);
}

static void put_tensor(text *t, const b2_st_source *source, size_t begin, size_t end)
{
    put_string(t, source->name);
    put_text(t, ":{\"dtype\":\"");
    put_text(t, b2_st_dtype_name(source->dtype));
    put_text(t, "\",\"shape\":[");
    for (int i = 0; i < source->rank; i++) {
        if (i > 0)
            put(t, ",", 1);
        put_number(t, (uint64_t)source->shape[i]);
    }
    put_text(t, "],\"data_offsets\":[");
    put_number(t, begin);
    put(t, ",", 1);
    put_number(t, end);
    put_text(t, "]}");
}

static void put_header(text *t, const writer *w)
{
    size_t offset = 0;
    put(t, "{", 1);
    if (w->metadata_count > 0)
        put_metadata(t, w);
    for (int64_t i = 0; i < w->count; i++) {
        int64_t source = w->order[i];
        if (i > 0 || w->metadata_count > 0)
            put(t, ",", 1);
        put_tensor(t, &w->sources[source], offset, offset + w->bytes[source]);
        offset += w->bytes[source];
    }
    put(t, "}", 1);
    while ((LENGTH_BYTES + t->used) % ALIGNMENT != 0)
        put(t, " ", 1);
}

static int size_of_source(size_t *bytes, const writer *w, const b2_st_source *source, b2_err *err)
{
    if (source->rank < 0 || source->rank > B2_ST_MAX_RANK)
        return b2_fail(err, B2_E_VALUE, "%s: %.80s: expected at most 8 axes, found %d", w->shown, source->name,
                       source->rank);
    *bytes = b2_st_dtype_size(source->dtype);
    for (int i = 0; i < source->rank; i++) {
        if (source->shape[i] < 0 || (source->shape[i] > 0 && *bytes > (size_t)INT64_MAX / (size_t)source->shape[i]))
            return b2_fail(err, B2_E_VALUE, "%s: %.80s: axis %d of length %lld: not a size that can be stored", w->shown,
                           source->name, i, (long long)source->shape[i]);
        *bytes *= (size_t)source->shape[i];
    }
    return 0;
}

/* Sizes, and the order: 8-byte elements first, then 4, 2, 1. */
static int plan(writer *w, b2_err *err)
{
    int64_t placed = 0;
    for (int64_t i = 0; i < w->count; i++) {
        if (size_of_source(&w->bytes[i], w, &w->sources[i], err) < 0)
            return -1;
        if (w->bytes[i] > (size_t)INT64_MAX - w->data_bytes)
            return b2_fail(err, B2_E_VALUE, "%s: the tensors pass 2^63 - 1 bytes", w->shown);
        w->data_bytes += w->bytes[i];
        if (!w->sources[i].data && w->bytes[i] > w->largest)
            w->largest = w->bytes[i];
    }
    for (size_t size = 8; size > 0; size /= 2)
        for (int64_t i = 0; i < w->count; i++)
            if (b2_st_dtype_size(w->sources[i].dtype) == size)
                w->order[placed++] = i;
    return 0;
}

static int make_header(writer *w, b2_err *err)
{
    b2_st_file check;
    text t = {NULL, 0};
    put_header(&t, w);
    w->header_bytes = LENGTH_BYTES + t.used;
    w->header = b2_alloc(w->header_bytes, 1, "safetensors: header", err);
    if (!w->header)
        return -1;
    for (int i = 0; i < LENGTH_BYTES; i++)
        w->header[i] = (char)((uint64_t)t.used >> (8 * i));
    t = (text){w->header + LENGTH_BYTES, 0};
    put_header(&t, w);
    /* What is written must be readable: names that are not UTF-8 or come twice are found here. Only the header is read,
     * so the data need not be there. */
    if (b2_st_parse(&check, w->header, w->header_bytes + w->data_bytes, w->shown, err) < 0)
        return -1;
    int metadata_as_tensor = check.count != w->count;
    b2_st_close(&check);
    if (metadata_as_tensor)
        return b2_fail(err, B2_E_VALUE, "%s: \"__metadata__\" is no name for a tensor", w->shown);
    return 0;
}

static int write_chunk(const writer *w, int fd, const char *bytes, size_t left, b2_err *err)
{
    while (left > 0) {
        ssize_t written = write(fd, bytes, left);
        if (written < 0 && errno == EINTR)
            continue;
        if (written <= 0)
            return b2_fail_os(err, written < 0 ? errno : ENOSPC, "%s: write", w->shown);
        bytes += written;
        left -= (size_t)written;
    }
    return 0;
}

static int write_all(writer *w, int fd, const char *bytes, size_t left, b2_err *err)
{
    while (left > 0) {
        size_t count = left < CHUNK ? left : CHUNK;
        if (b2_cancel_poll(w->cancel))
            return b2_fail(err, B2_E_CANCEL, "%s: cancelled", w->shown);
        if (write_chunk(w, fd, bytes, count, err) < 0)
            return -1;
        bytes += count;
        left -= count;
        w->unsynced += count;
        if (w->unsynced >= SYNC_EVERY) {
            if (fdatasync(fd) < 0)
                return b2_fail_os(err, errno, "%s: fdatasync", w->shown);
            w->unsynced = 0;
        }
    }
    return 0;
}

static int write_zeros(writer *w, int fd, size_t count, b2_err *err)
{
    static const char zeros[ALIGNMENT];
    for (; count > ALIGNMENT; count -= ALIGNMENT)
        if (write_chunk(w, fd, zeros, ALIGNMENT, err) < 0)
            return -1;
    return write_chunk(w, fd, zeros, count, err);
}

static int write_tensor(writer *w, int fd, const b2_st_source *source, size_t bytes, char *buffer, b2_err *err)
{
    if (source->data) {
        size_t given = source->data_bytes < bytes ? source->data_bytes : bytes;
        return write_all(w, fd, source->data, given, err) < 0 ? -1 : write_zeros(w, fd, bytes - given, err);
    }
    return source->fill(source->owner, buffer, bytes, err) < 0 ? -1 : write_all(w, fd, buffer, bytes, err);
}

static int write_tensors(writer *w, int fd, b2_err *err)
{
    int status = 0;
    char *buffer = b2_alloc(w->largest, 1, "safetensors: the largest tensor", err);
    if (!buffer)
        return -1;
    for (int64_t i = 0; i < w->count && status == 0; i++)
        if (w->bytes[w->order[i]] > 0)
            status = write_tensor(w, fd, &w->sources[w->order[i]], w->bytes[w->order[i]], buffer, err);
    b2_free(buffer);
    return status;
}

static int write_file(writer *w, int fd, b2_err *err)
{
    if (write_all(w, fd, w->header, w->header_bytes, err) < 0 || write_tensors(w, fd, err) < 0)
        return -1;
    return fsync(fd) < 0 ? b2_fail_os(err, errno, "%s: fsync", w->shown) : 0;
}

/* A name nobody uses: another thread may be writing the same file, and a killed process may have left one behind. */
static int create_temporary(const writer *w, const char *path, char *temporary, size_t room, b2_err *err)
{
    for (int i = 0; i < TEMPORARY_NAMES; i++) {
        snprintf(temporary, room, "%s.tmp-%ld-%d", path, (long)getpid(), i);
        int fd = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (fd >= 0 || errno != EEXIST)
            return fd >= 0 ? fd : b2_fail_os(err, errno, "%s", w->shown);
    }
    return b2_fail_os(err, EEXIST, "%s: temporary files", w->shown);
}

/* So that the new name survives a power cut. Some file systems cannot; then the name follows with the next sync. */
static void sync_directory(char *temporary)
{
    char *slash = strrchr(temporary, '/');
    if (slash)
        slash[slash == temporary] = 0;
    int fd = open(slash ? temporary : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd >= 0) {
        fsync(fd);
        close(fd);
    }
}

static int replace(writer *w, const char *path, b2_err *err)
{
    size_t room = strlen(path) + 64;
    char *temporary = b2_alloc(room, 1, "safetensors: path", err);
    if (!temporary)
        return -1;
    int fd = create_temporary(w, path, temporary, room, err);
    if (fd < 0) {
        b2_free(temporary);
        return -1;
    }
    int status = write_file(w, fd, err);
    if (close(fd) < 0 && status == 0)
        status = b2_fail_os(err, errno, "%s: close", w->shown);
    if (status == 0 && rename(temporary, path) < 0)
        status = b2_fail_os(err, errno, "%s: rename", w->shown);
    if (status < 0)
        unlink(temporary);
    else
        sync_directory(temporary);
    b2_free(temporary);
    return status;
}

int b2_st_write(const char *path, const b2_st_source *sources, int64_t count, const char *const *metadata,
                int64_t metadata_count, b2_cancel *cancel, b2_err *err)
{
    writer w = {.sources = sources,
                .count = count,
                .metadata = metadata,
                .metadata_count = metadata_count,
                .cancel = cancel};
    b2_printable(w.shown, sizeof w.shown, path, strlen(path), 1);
    w.order = b2_alloc((size_t)count, sizeof *w.order, "safetensors: order", err);
    w.bytes = b2_alloc((size_t)count, sizeof *w.bytes, "safetensors: sizes", err);
    int status = w.order && w.bytes && plan(&w, err) == 0 && make_header(&w, err) == 0 ? replace(&w, path, err) : -1;
    b2_free(w.order);
    b2_free(w.bytes);
    b2_free(w.header);
    return status;
}
