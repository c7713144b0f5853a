/* See json.h. The parser owns nothing; it reads `start` to `end` once, left to right. */
#include "io/json.h"

#include <stdio.h>
#include <string.h>

void b2_printable(char *out, size_t room, const char *text, size_t bytes, int keep_end)
{
    size_t used = 0;
    if (bytes >= room) {
        size_t kept = room - 4;
        if (keep_end) {
            memcpy(out, "...", 3);
            used = 3;
            text += bytes - kept;
        }
        bytes = kept;
    } else {
        keep_end = 1; /* nothing is cut: no dots at the end */
    }
    for (size_t i = 0; i < bytes; i++)
        out[used++] = (unsigned char)text[i] < 0x20 || text[i] == 0x7f ? '?' : text[i];
    if (!keep_end) {
        memcpy(out + used, "...", 3);
        used += 3;
    }
    out[used] = 0;
}

void b2_json_begin(b2_json *json, const void *bytes, size_t size, const char *where)
{
    *json = (b2_json){.start = bytes, .at = bytes, .end = (const unsigned char *)bytes + size};
    b2_printable(json->where, sizeof json->where, where, strlen(where), 1);
}

void b2_json_label(b2_json *json, const char *name, size_t bytes)
{
    json->object[0] = 0;
    if (name)
        b2_printable(json->object, sizeof json->object, name, bytes, 0);
}

static int fail(const b2_json *json, const char *rule, const char *message, b2_err *err)
{
    int named = json->object[0] != 0;
    return b2_fail(err, B2_E_FORMAT, "%s: %s: %s%s%sbyte %zu: %s", json->where, rule, named ? "\"" : "", json->object,
                   named ? "\": " : "", (size_t)(json->at - json->start), message);
}

static int fail_found(const b2_json *json, const char *expected, b2_err *err)
{
    char message[128];
    if (json->at == json->end)
        snprintf(message, sizeof message, "expected %s, found the end", expected);
    else if (*json->at > 0x20 && *json->at < 0x7f)
        snprintf(message, sizeof message, "expected %s, found '%c'", expected, *json->at);
    else
        snprintf(message, sizeof message, "expected %s, found byte 0x%02x", expected, *json->at);
    return fail(json, "json-syntax", message, err);
}

int b2_json_peek(b2_json *json)
{
    while (json->at < json->end && (*json->at == ' ' || *json->at == '\n' || *json->at == '\r' || *json->at == '\t'))
        json->at++;
    return json->at < json->end ? *json->at : 0;
}

int b2_json_open(b2_json *json, char bracket, b2_err *err)
{
    if (b2_json_peek(json) != bracket)
        return fail_found(json, bracket == '{' ? "an object" : "an array", err);
    if (json->depth == B2_JSON_MAX_DEPTH)
        return fail(json, "json-depth", "nested deeper than 100", err);
    json->bracket[json->depth] = bracket;
    json->filled[json->depth] = 0;
    json->depth++;
    json->at++;
    return 0;
}

int b2_json_next(b2_json *json, int *more, b2_err *err)
{
    int top = json->depth - 1, object = json->bracket[top] == '{';
    int c = b2_json_peek(json);
    *more = c != (object ? '}' : ']');
    if (!*more) {
        json->at++;
        json->depth--;
        return 0;
    }
    if (json->filled[top]) {
        if (c != ',')
            return fail_found(json, object ? "',' or '}'" : "',' or ']'", err);
        json->at++;
        c = b2_json_peek(json);
    }
    json->filled[top] = 1;
    return object && c != '"' ? fail_found(json, "a key", err) : 0;
}

/* Length of the well-formed UTF-8 sequence at `s` (RFC 3629, table 3-7 of the Unicode standard), 0 if there is none. */
static int utf8_length(const unsigned char *s, size_t left)
{
    unsigned char lead = s[0];
    if (lead < 0x80)
        return 1;
    int length = lead >= 0xc2 && lead <= 0xdf ? 2 : (lead & 0xf0) == 0xe0 ? 3 : lead >= 0xf0 && lead <= 0xf4 ? 4 : 0;
    if (length == 0 || (size_t)length > left)
        return 0;
    unsigned char low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
    unsigned char high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    if (s[1] < low || s[1] > high)
        return 0;
    for (int i = 2; i < length; i++)
        if ((s[i] & 0xc0) != 0x80)
            return 0;
    return length;
}

static int utf8_encode(char out[4], unsigned int code)
{
    if (code < 0x80) {
        out[0] = (char)code;
        return 1;
    }
    int length = code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    static const unsigned char lead[] = {0, 0, 0xc0, 0xe0, 0xf0};
    for (int i = length - 1; i > 0; i--, code >>= 6)
        out[i] = (char)(0x80 | (code & 0x3f));
    out[0] = (char)(lead[length] | code);
    return length;
}

static int read_hex4(b2_json *json, unsigned int *code, b2_err *err)
{
    *code = 0;
    for (int i = 0; i < 4; i++, json->at++) {
        int c = json->at < json->end ? *json->at : 0;
        int digit = c >= '0' && c <= '9' ? c - '0' : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : -1;
        if (digit < 0)
            return fail_found(json, "a hexadecimal digit", err);
        *code = *code * 16 + (unsigned int)digit;
    }
    return 0;
}

/* After the 'u'. */
static int read_unicode_escape(b2_json *json, unsigned int *code, b2_err *err)
{
    unsigned int low;
    if (read_hex4(json, code, err) < 0)
        return -1;
    if (*code < 0xd800 || *code > 0xdfff)
        return 0;
    if (*code > 0xdbff || json->end - json->at < 2 || json->at[0] != '\\' || json->at[1] != 'u')
        return fail(json, "json-escape", "half of a surrogate pair", err);
    json->at += 2;
    if (read_hex4(json, &low, err) < 0)
        return -1;
    if (low < 0xdc00 || low > 0xdfff)
        return fail(json, "json-escape", "half of a surrogate pair", err);
    *code = 0x10000 + ((*code - 0xd800) << 10) + (low - 0xdc00);
    return 0;
}

/* After the backslash: decodes one character into `out`, returns its length or -1. */
static int read_escape(b2_json *json, char out[4], b2_err *err)
{
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    int c = json->at < json->end ? *json->at : 0;
    const char *known = c ? strchr(from, c) : NULL;
    if (known) {
        json->at++;
        out[0] = to[known - from];
        return 1;
    }
    if (c != 'u')
        return fail(json, "json-escape", "not a JSON escape", err);
    json->at++;
    unsigned int code;
    return read_unicode_escape(json, &code, err) < 0 ? -1 : utf8_encode(out, code);
}

int b2_json_string(b2_json *json, char *out, size_t room, size_t *bytes, b2_err *err)
{
    *bytes = 0;
    if (b2_json_peek(json) != '"')
        return fail_found(json, "a string", err);
    json->at++;
    while (json->at < json->end && *json->at != '"') {
        char decoded[4];
        const char *piece = (const char *)json->at;
        int length;
        if (*json->at == '\\') {
            json->at++;
            if ((length = read_escape(json, decoded, err)) < 0)
                return -1;
            piece = decoded;
        } else {
            if (*json->at < 0x20)
                return fail_found(json, "no bare control character", err);
            if ((length = utf8_length(json->at, (size_t)(json->end - json->at))) == 0)
                return fail(json, "json-utf8", "not UTF-8", err);
            json->at += length;
        }
        for (int i = 0; i < length; i++, ++*bytes)
            if (*bytes < room)
                out[*bytes] = piece[i];
    }
    if (json->at == json->end)
        return fail_found(json, "the end of a string", err);
    json->at++;
    return 0;
}

int b2_json_key(b2_json *json, char *out, size_t room, size_t *bytes, b2_err *err)
{
    if (b2_json_string(json, out, room, bytes, err) < 0)
        return -1;
    if (b2_json_peek(json) != ':')
        return fail_found(json, "':'", err);
    json->at++;
    return 0;
}

static int digit_at(const b2_json *json)
{
    return json->at < json->end && *json->at >= '0' && *json->at <= '9';
}

int b2_json_natural(b2_json *json, int64_t *value, b2_err *err)
{
    *value = 0;
    b2_json_peek(json);
    if (!digit_at(json))
        return fail_found(json, "an integer >= 0", err);
    int leading_zero = *json->at == '0';
    for (const unsigned char *first = json->at; digit_at(json); json->at++) {
        int digit = *json->at - '0';
        if (leading_zero && json->at > first)
            return fail(json, "json-syntax", "a number must not begin with 0", err);
        if (*value > (INT64_MAX - digit) / 10)
            return fail(json, "integer-range", "expected at most 2^63 - 1", err);
        *value = *value * 10 + digit;
    }
    if (json->at < json->end && (*json->at == '.' || (*json->at | 32) == 'e'))
        return fail_found(json, "an integer", err);
    return 0;
}

static int skip_digits(b2_json *json, b2_err *err)
{
    if (!digit_at(json))
        return fail_found(json, "a digit", err);
    while (digit_at(json))
        json->at++;
    return 0;
}

static int skip_number(b2_json *json, b2_err *err)
{
    if (*json->at == '-')
        json->at++;
    int leading_zero = digit_at(json) && *json->at == '0';
    if (leading_zero)
        json->at++;
    else if (skip_digits(json, err) < 0)
        return -1;
    if (digit_at(json))
        return fail(json, "json-syntax", "a number must not begin with 0", err);
    if (json->at < json->end && *json->at == '.') {
        json->at++;
        if (skip_digits(json, err) < 0)
            return -1;
    }
    if (json->at < json->end && (*json->at | 32) == 'e') {
        json->at++;
        if (json->at < json->end && (*json->at == '+' || *json->at == '-'))
            json->at++;
        return skip_digits(json, err);
    }
    return 0;
}

static int skip_word(b2_json *json, const char *word, b2_err *err)
{
    size_t length = strlen(word);
    if ((size_t)(json->end - json->at) < length || memcmp(json->at, word, length) != 0)
        return fail_found(json, "a JSON value", err);
    json->at += length;
    return 0;
}

static int skip_scalar(b2_json *json, int first, b2_err *err)
{
    size_t bytes;
    switch (first) {
    case '"': return b2_json_string(json, NULL, 0, &bytes, err);
    case 't': return skip_word(json, "true", err);
    case 'f': return skip_word(json, "false", err);
    case 'n': return skip_word(json, "null", err);
    default: break;
    }
    if (first == '-' || (first >= '0' && first <= '9'))
        return skip_number(json, err);
    return fail_found(json, "a JSON value", err);
}

/* Goes on inside the open containers until a value must come, or none is open. */
static int skip_to_value(b2_json *json, int depth, b2_err *err)
{
    size_t bytes;
    while (json->depth > depth) {
        int more;
        if (b2_json_next(json, &more, err) < 0)
            return -1;
        if (more)
            return json->bracket[json->depth - 1] == '{' ? b2_json_key(json, NULL, 0, &bytes, err) : 0;
    }
    return 0;
}

int b2_json_skip(b2_json *json, b2_err *err)
{
    int depth = json->depth;
    do {
        int first = b2_json_peek(json);
        int status = first == '{' || first == '[' ? b2_json_open(json, (char)first, err) : skip_scalar(json, first, err);
        if (status < 0 || skip_to_value(json, depth, err) < 0)
            return -1;
    } while (json->depth > depth);
    return 0;
}

int b2_json_finish(b2_json *json, b2_err *err)
{
    b2_json_peek(json);
    return json->at < json->end ? fail_found(json, "the end", err) : 0;
}
