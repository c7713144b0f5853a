#include "core/error.h"

#include <stdarg.h>
#include <stdio.h>

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
