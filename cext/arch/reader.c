#include "arch/reader.h"

#include <stdarg.h>
#include <stdio.h>

void ds_read_key(const ds_reader *r, const char *key, char *out, size_t size) {
    snprintf(out, size, "%s.%s", r->arch, key);
}

bool ds_read_present(const ds_reader *r, const char *key) {
    char full[160];
    ds_read_key(r, key, full, sizeof full);
    return ds_gguf_kv_find(r->gguf, full) != NULL;
}

bool ds_read_has_tensor(const ds_reader *r, const char *format, ...) {
    char name[DS_MAX_NAME];
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof name, format, args);
    va_end(args);
    return r->source.find(r->source.ctx, name) != NULL;
}

void ds_read_missing(ds_reader *r, const char *key, const char *hint) {
    if (r->status != DS_OK) return;
    r->status =
        ds_fail(r->err, DS_EFORMAT, "%s: metadata key `%s.%s` is missing", ds_gguf_label(r->gguf), r->arch, key);
    ds_hint(r->err, hint);
}

/* A number in [min, max], a whole one where that is asked for; `fallback` as at ds_read_int. 0 on failure. */
static double read_number(ds_reader *r, const char *key, bool whole, double min, double max, double fallback) {
    char full[160];
    int64_t integer = 0;
    double value = fallback;
    bool bad = false;
    if (r->status != DS_OK) return 0.0;
    ds_read_key(r, key, full, sizeof full);
    const bool found = whole ? ds_gguf_get_i64(r->gguf, full, &integer, &bad, r->err)
                             : ds_gguf_get_f64(r->gguf, full, &value, &bad, r->err);
    if (found && whole) value = (double)integer;
    if (bad) return r->status = r->err->status, 0.0;
    if (!found && fallback < 0) {
        r->status = ds_fail(r->err, DS_EFORMAT, "%s: metadata key `%s` is missing", ds_gguf_label(r->gguf), full);
        return 0.0;
    }
    if (!(value >= min && value <= max)) { /* a NaN fails too */
        r->status = ds_fail(r->err, DS_EFORMAT, "%s: `%s` is %.15g, expected %.15g to %.15g", ds_gguf_label(r->gguf),
                            full, value, min, max);
        return 0.0;
    }
    return value;
}

int ds_read_int(ds_reader *r, const char *key, int min, int max, int fallback) {
    return (int)read_number(r, key, true, min, max, fallback);
}

float ds_read_float(ds_reader *r, const char *key, double min, double max, double fallback) {
    return (float)read_number(r, key, false, min, max, fallback);
}

bool ds_read_bool(ds_reader *r, const char *key, bool fallback) {
    char full[160];
    bool value = fallback, bad = false;
    if (r->status != DS_OK) return false;
    ds_read_key(r, key, full, sizeof full);
    ds_gguf_get_bool(r->gguf, full, &value, &bad, r->err);
    if (bad) r->status = r->err->status;
    return value;
}

void ds_read_string(const ds_gguf *gguf, const char *key, char *out, size_t size) {
    ds_str value = {0};
    bool bad = false;
    ds_error ignored; /* a name of another type is no reason to refuse a model */
    out[0] = '\0';
    if (ds_gguf_get_str(gguf, key, &value, &bad, &ignored))
        snprintf(out, size, "%.*s", (int)(value.size < size ? value.size : size), value.data);
}

void ds_read_product(ds_reader *r, const char *what, int64_t a, int64_t b) {
    if (r->status != DS_OK || a * b <= DS_MAX_WIDTH) return;
    r->status = ds_fail(r->err, DS_EFORMAT, "%s: %s are %lld x %lld, expected at most %d together",
                        ds_gguf_label(r->gguf), what, (long long)a, (long long)b, DS_MAX_WIDTH);
}
