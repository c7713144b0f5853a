/* Errors are values: every function that can fail returns 0 or -1 and takes a `b2_err *` last.
 *
 * The message names the object, what was found and what was expected, e.g.
 *   "qformer.encoder.layer.3.crossattention.attention.query.weight: expected shape [768, 768], found [768, 1024]"
 * csrc/python maps each code to one Python exception type. A `b2_err` owns nothing. */
#ifndef B2_CORE_ERROR_H
#define B2_CORE_ERROR_H

typedef enum b2_code {
    B2_OK = 0,
    B2_E_VALUE,       /* ValueError: an argument has a wrong value or shape */
    B2_E_TYPE,        /* TypeError: an argument has a wrong type or dtype */
    B2_E_INDEX,       /* IndexError: an id is outside its table */
    B2_E_MEMORY,      /* MemoryError */
    B2_E_OS,          /* OSError: open, map, read, write failed */
    B2_E_FORMAT,      /* blip2c.CheckpointError (a ValueError): a file breaks the rules of its format */
    B2_E_NUMERIC,     /* blip2c.NumericError (an ArithmeticError): NaN or Inf where a number must be */
    B2_E_UNSUPPORTED, /* blip2c.UnsupportedError (a NotImplementedError): known, named, not done here */
    B2_E_CANCEL,      /* cancelled; the Python layer re-raises what asked for it (KeyboardInterrupt) */
    B2_E_CALLBACK,    /* a Python callable raised; the exception is already set on the thread */
    B2_E_INTERNAL     /* RuntimeError: a broken invariant of blip2c itself */
} b2_code;

typedef struct b2_err {
    b2_code code;
    int os_error; /* errno beside B2_E_OS, or 0: chooses FileNotFoundError, PermissionError ... */
    char message[512];
} b2_err;

/* Fills `err` (unless it already holds an error: the first one is the cause) and returns -1. */
int b2_fail(b2_err *err, b2_code code, const char *format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 3, 4)))
#endif
    ;

/* The same with B2_E_OS: ": " and what the system says of `os_error` are added. */
int b2_fail_os(b2_err *err, int os_error, const char *format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 3, 4)))
#endif
    ;

#endif
