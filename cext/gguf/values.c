/* values.c: typed reads of metadata. A value is widened only where nothing is lost; anything else is an error that names
 * the key, what stands there and what was expected. */
#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "gguf/internal.h"

static const struct {
    const char *name;
    size_t bytes; /* 0: not of one size */
} TYPES[] = {
    [DS_GGUF_U8] = {"u8", 1},       [DS_GGUF_I8] = {"i8", 1},     [DS_GGUF_U16] = {"u16", 2},
    [DS_GGUF_I16] = {"i16", 2},     [DS_GGUF_U32] = {"u32", 4},   [DS_GGUF_I32] = {"i32", 4},
    [DS_GGUF_F32] = {"f32", 4},     [DS_GGUF_BOOL] = {"bool", 1}, [DS_GGUF_STRING] = {"string", 0},
    [DS_GGUF_ARRAY] = {"array", 0}, [DS_GGUF_U64] = {"u64", 8},   [DS_GGUF_I64] = {"i64", 8},
    [DS_GGUF_F64] = {"f64", 8},
};

size_t ds_gguf_type_bytes(uint32_t type) { return type <= DS_GGUF_F64 ? TYPES[type].bytes : 0; }

const char *ds_gguf_type_name(uint32_t type) { return type <= DS_GGUF_F64 ? TYPES[type].name : "unknown"; }

/* Close a refusal: the remedy is the same for all of them. */
static bool refuse(bool *bad, ds_error *err) {
    ds_hint(err, "the file was written by a faulty converter: make or download it again");
    *bad = true;
    return false;
}

static bool fail_type(const ds_gguf *g, const ds_gguf_kv *kv, const char *expected, bool *bad, ds_error *err) {
    DS_GGUF_FAIL(g, err, DS_EFORMAT, "key `%.*s` is of type %s%s, expected %s", (int)kv->key.size, kv->key.data,
                 kv->type == DS_GGUF_ARRAY ? "array of " : "", ds_gguf_type_name(kv->item_type), expected);
    return refuse(bad, err);
}

/* The key, unless an earlier read of this caller failed: its error is the one to tell. */
static const ds_gguf_kv *find_unless_bad(const ds_gguf *g, const char *key, const bool *bad) {
    return *bad ? NULL : ds_gguf_kv_find(g, key);
}

#define LOAD(ctype, p) (*(ctype *)memcpy(&(ctype){0}, p, sizeof(ctype)))

bool ds_gguf_get_i64(const ds_gguf *gguf, const char *key, int64_t *out, bool *bad, ds_error *err) {
    const ds_gguf_kv *kv = find_unless_bad(gguf, key, bad);
    if (!kv) {
        return false;
    }
    int64_t value;
    switch (kv->type) {
    case DS_GGUF_U8:
        value = LOAD(uint8_t, kv->data);
        break;
    case DS_GGUF_I8:
        value = LOAD(int8_t, kv->data);
        break;
    case DS_GGUF_U16:
        value = LOAD(uint16_t, kv->data);
        break;
    case DS_GGUF_I16:
        value = LOAD(int16_t, kv->data);
        break;
    case DS_GGUF_U32:
        value = LOAD(uint32_t, kv->data);
        break;
    case DS_GGUF_I32:
        value = LOAD(int32_t, kv->data);
        break;
    case DS_GGUF_I64:
        value = LOAD(int64_t, kv->data);
        break;
    case DS_GGUF_U64: {
        uint64_t wide = LOAD(uint64_t, kv->data);
        if (wide > INT64_MAX) {
            DS_GGUF_FAIL(gguf, err, DS_EFORMAT, "key `%s` is %" PRIu64 ", expected less than 2^63", key, wide);
            return refuse(bad, err);
        }
        value = (int64_t)wide;
        break;
    }
    default:
        return fail_type(gguf, kv, "an integer", bad, err);
    }
    *out = value;
    return true;
}

bool ds_gguf_get_f64(const ds_gguf *gguf, const char *key, double *out, bool *bad, ds_error *err) {
    const ds_gguf_kv *kv = find_unless_bad(gguf, key, bad);
    if (!kv) {
        return false;
    }
    if (kv->type != DS_GGUF_F32 && kv->type != DS_GGUF_F64) {
        return fail_type(gguf, kv, "f32 or f64", bad, err);
    }
    double value = kv->type == DS_GGUF_F32 ? LOAD(float, kv->data) : LOAD(double, kv->data);
    if (!isfinite(value)) {
        DS_GGUF_FAIL(gguf, err, DS_EFORMAT, "key `%s` is %f, expected a finite number", key, value);
        return refuse(bad, err);
    }
    *out = value;
    return true;
}

bool ds_gguf_get_bool(const ds_gguf *gguf, const char *key, bool *out, bool *bad, ds_error *err) {
    const ds_gguf_kv *kv = find_unless_bad(gguf, key, bad);
    if (!kv) {
        return false;
    }
    if (kv->type != DS_GGUF_BOOL) {
        return fail_type(gguf, kv, "bool", bad, err);
    }
    *out = LOAD(uint8_t, kv->data) != 0;
    return true;
}

bool ds_gguf_get_str(const ds_gguf *gguf, const char *key, ds_str *out, bool *bad, ds_error *err) {
    const ds_gguf_kv *kv = find_unless_bad(gguf, key, bad);
    if (!kv) {
        return false;
    }
    if (kv->type != DS_GGUF_STRING) {
        return fail_type(gguf, kv, "string", bad, err);
    }
    /* The length as it was when it was checked, not as it may stand in the file now. */
    *out = (ds_str){(const char *)kv->data + sizeof(uint64_t), kv->n_bytes - sizeof(uint64_t)};
    return true;
}

ds_str ds_gguf_next_str(const void **cursor) {
    const char *p = *cursor;
    ds_str item = {p + sizeof(uint64_t), (size_t)LOAD(uint64_t, p)};
    *cursor = item.data + item.size;
    return item;
}
