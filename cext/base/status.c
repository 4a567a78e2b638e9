#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>

ds_status ds_fail(ds_error *err, ds_status status, const char *format, ...) {
    va_list args;
    err->status = status;
    err->hint[0] = '\0';
    va_start(args, format);
    vsnprintf(err->message, sizeof err->message, format, args);
    va_end(args);
    /* A message may quote a file's bytes: none of them shall steer the terminal or begin a second line. */
    for (char *p = err->message; *p; p++) {
        if ((unsigned char)*p < 0x20 || *p == 0x7f) {
            *p = '?';
        }
    }
    return status;
}

ds_status ds_hint(ds_error *err, const char *hint) {
    snprintf(err->hint, sizeof err->hint, "%s", hint);
    return err->status;
}
