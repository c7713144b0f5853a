/* A strict pull parser for JSON (RFC 8259) in memory: no recursion, no allocation, nothing assumed of the bytes.
 *
 * Strict: UTF-8 is validated (no overlong forms, no surrogates), escapes must be the standard ones with surrogates in
 * pairs, control characters in strings, leading zeros, trailing commas and NaN are refused, nesting is bounded. Keys
 * are not compared here: whoever reads an object knows how to find two equal ones.
 *
 * Every failure is B2_E_FORMAT: "<where>: <rule>: [<object>: ]byte <n>: expected ..., found ...". */
#ifndef B2_IO_JSON_H
#define B2_IO_JSON_H

#include <stddef.h>
#include <stdint.h>

#include "core/error.h"

enum { B2_JSON_MAX_DEPTH = 100, B2_JSON_LABEL = 80 };

typedef struct b2_json {
    const unsigned char *start; /* borrowed: the text */
    const unsigned char *at;    /* next byte */
    const unsigned char *end;
    char where[256];            /* begins every message: the file, made printable */
    char object[B2_JSON_LABEL]; /* what is being read, made printable; "" for none */
    int depth;                  /* open containers */
    char bracket[B2_JSON_MAX_DEPTH]; /* '{' or '[' of each */
    char filled[B2_JSON_MAX_DEPTH];  /* 1: a member has been read, so that a comma comes before the next */
} b2_json;

/* `where` is copied (its end, if it is long). `size` bytes need no terminator. */
void b2_json_begin(b2_json *json, const void *bytes, size_t size, const char *where);
/* Names what is being read, for messages: `bytes` bytes of UTF-8, shortened and made printable; NULL for nothing. */
void b2_json_label(b2_json *json, const char *name, size_t bytes);

/* The first byte of the next value or bracket, after white space; 0 at the end of the text. */
int b2_json_peek(b2_json *json);

/* Enters an object ('{') or an array ('['). */
int b2_json_open(b2_json *json, char bracket, b2_err *err);
/* Before each member: reads the comma; or the closing bracket, then *more is 0 and the container is left. */
int b2_json_next(b2_json *json, int *more, b2_err *err);
/* A string, decoded to UTF-8: the first `room` bytes go to `out` (NULL if room is 0), *bytes is the full length. It is
 * not terminated, and may hold NUL ("\u0000"). */
int b2_json_string(b2_json *json, char *out, size_t room, size_t *bytes, b2_err *err);
/* The same, followed by the colon. */
int b2_json_key(b2_json *json, char *out, size_t room, size_t *bytes, b2_err *err);
/* An integer in [0, 2^63 - 1], written with digits only. */
int b2_json_natural(b2_json *json, int64_t *value, b2_err *err);
/* Any value, checked and left. */
int b2_json_skip(b2_json *json, b2_err *err);
/* Nothing but white space is left. */
int b2_json_finish(b2_json *json, b2_err *err);

/* `text` (`bytes` of it) as printable ASCII and UTF-8 in `out` [room], NUL-terminated: control characters become '?'.
 * When it does not fit, the beginning (keep_end 0) or the end (keep_end 1) stays. */
void b2_printable(char *out, size_t room, const char *text, size_t bytes, int keep_end);

#endif
