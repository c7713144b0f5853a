#define _POSIX_C_SOURCE 200809L
#include "core/error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

int b2_fail(b2_err *err, b2_code code, const char *format, ...)
{
    if (err->code != B2_OK)
        return -1;
    err->code = code;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(err->message, sizeof err->message, format, arguments);
    va_end(arguments);
    return -1;
}

int b2_fail_os(b2_err *err, int os_error, const char *format, ...)
{
    if (err->code != B2_OK)
        return -1;
    err->code = B2_E_OS;
    err->os_error = os_error;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(err->message, sizeof err->message, format, arguments);
    va_end(arguments);
    size_t used = strlen(err->message);
    char reason[128];
    if (strerror_r(os_error, reason, sizeof reason) == 0)
        snprintf(err->message + used, sizeof err->message - used, ": %s", reason);
    return -1;
}
