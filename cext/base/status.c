#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>

#include "base/notes.h"

/* A message may quote a file's bytes: none of them shall steer the terminal or begin a second line. */
static void make_printable(char *text) {
    for (char *p = text; *p; p++) {
        if ((unsigned char)*p < 0x20 || *p == 0x7f) {
            *p = '?';
        }
    }
}

ds_status ds_fail(ds_error *err, ds_status status, const char *format, ...) {
    va_list args;
    err->status = status;
    err->system = 0;
    err->hint[0] = '\0';
    va_start(args, format);
    vsnprintf(err->message, sizeof err->message, format, args);
    va_end(args);
    make_printable(err->message);
    return status;
}

ds_status ds_hint(ds_error *err, const char *hint) {
    snprintf(err->hint, sizeof err->hint, "%s", hint);
    return err->status;
}

void ds_note(ds_notes *notes, const char *format, ...) {
    va_list args;
    if (notes->n == DS_MAX_NOTES) {
        return;
    }
    char *text = notes->text[notes->n++];
    va_start(args, format);
    vsnprintf(text, DS_NOTE_BYTES, format, args);
    va_end(args);
    make_printable(text);
}
