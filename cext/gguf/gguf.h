/* gguf.h: a read-only view of a GGUF file (v2 and v3, little-endian), mapped or borrowed from memory.
 * Owns the mapping and the parsed directory. Refuses everything that it has not proved: each count, length, offset,
 * shape and type is checked against the file's size before use. Values and weights are lent from the mapping, not
 * copied: a file must not be rewritten in place or cut short while a view of it is open. ds_gguf_check tells if it was. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "quant/quant.h"

typedef struct ds_gguf ds_gguf;

/* Value types as numbered in the file. */
typedef enum ds_gguf_type {
    DS_GGUF_U8,
    DS_GGUF_I8,
    DS_GGUF_U16,
    DS_GGUF_I16,
    DS_GGUF_U32,
    DS_GGUF_I32,
    DS_GGUF_F32,
    DS_GGUF_BOOL,
    DS_GGUF_STRING,
    DS_GGUF_ARRAY,
    DS_GGUF_U64,
    DS_GGUF_I64,
    DS_GGUF_F64,
} ds_gguf_type;

typedef struct ds_str {
    const char *data; /* not NUL-terminated; may hold any bytes */
    size_t size;
} ds_str;

/* One metadata entry. For an array, `type` is DS_GGUF_ARRAY, `item_type` its items' and n_items their number. */
typedef struct ds_gguf_kv {
    ds_str key;
    ds_gguf_type type, item_type;
    uint64_t n_items;    /* 1 for a scalar */
    const void *data; /* packed little-endian values in the file, unaligned; strings are u64 size + bytes, checked */
    size_t n_bytes; /* of all the values at data */
} ds_gguf_kv;

typedef struct ds_tensor {
    const char *name; /* NUL-terminated copy, owned by the view */
    uint32_t gguf_type;
    ds_format format; /* DS_FORMAT_COUNT where the engine does not run gguf_type; n_bytes is then 0 if unknown too */
    int n_dims;
    int64_t ne[4]; /* ggml's order: ne[0] is the row; unused ones are 1 */
    const void *data; /* inside the mapping, n_bytes long */
    size_t n_bytes;
    uint64_t offset; /* from the start of its file, */
    int part;        /* which is this one of a split model, from 0 */
} ds_tensor;

/* Map the file at path; of a model split into several, its first part, which brings in the others. *out is set on success only; close unmaps. */
ds_status ds_gguf_open(const char *path, ds_gguf **out, ds_error *err);
/* Parse a buffer, aligned to 8 bytes, that the caller keeps alive and unchanged until close; label names it in errors. */
ds_status ds_gguf_view(const void *data, size_t size, const char *label, ds_gguf **out, ds_error *err);
void ds_gguf_close(ds_gguf *gguf);

/* Whether the mapped files are as they were when they were opened: DS_EIO where one was cut short or written to. Costs a
 * system call a file. What is read between two checks that succeed is what was opened. */
ds_status ds_gguf_check(const ds_gguf *gguf, ds_error *err);

/* Where in which file bytes of the mapping lie. */
typedef struct ds_gguf_place {
    intptr_t file; /* open, base/os.h's ds_file */
    int64_t offset;
    int64_t file_bytes;
} ds_gguf_place;
/* Of n bytes at data, which a tensor of the view points to. False where they are not a mapped file's. */
bool ds_gguf_locate(const ds_gguf *gguf, const void *data, size_t n, ds_gguf_place *out);
/* From now on tensors are read from the files and not from the mapping, which only little of is looked at; past the
 * system's cache if `direct`. False where a file system does not read past it: all then go through it. */
bool ds_gguf_leave_mapping(const ds_gguf *gguf, bool direct);

/* Have the mapping lie in huge pages of memory, which are found faster than a file's small ones: n bytes (in whole
 * huge pages) from byte *from on of all files one after another, and *from behind them: at the end it is ds_gguf_size. Tensors stay where
 * they are, whoever reads them. DS_EIO where a file has changed, DS_ENOMEM, DS_EUNSUPPORTED where the system has no way to:
 * what is moved stays so. */
ds_status ds_gguf_settle(const ds_gguf *gguf, size_t *from, size_t n, ds_error *err);

const char *ds_gguf_label(const ds_gguf *gguf); /* the path or label, for errors */
size_t ds_gguf_size(const ds_gguf *gguf); /* bytes of the file, or of all parts */

size_t ds_gguf_n_kv(const ds_gguf *gguf);
const ds_gguf_kv *ds_gguf_kv_at(const ds_gguf *gguf, size_t i);
const ds_gguf_kv *ds_gguf_kv_find(const ds_gguf *gguf, const char *key); /* NULL where absent */

size_t ds_gguf_n_tensors(const ds_gguf *gguf);
const ds_tensor *ds_gguf_tensor_at(const ds_gguf *gguf, size_t i);
const ds_tensor *ds_gguf_tensor_find(const ds_gguf *gguf, const char *name); /* NULL where absent; a binary search */

/* Typed scalar reads: true and *out set where the key is there and its value fits the type asked for without loss
 * (any integer type that fits, a finite f32 or f64 for a float). False and *out untouched where the key is absent. A key
 * of another type or out of range fails: err is filled and *bad set. Where *bad is set already nothing is read, so that
 * a run of reads ends in one check and tells the first fault. */
bool ds_gguf_get_i64(const ds_gguf *gguf, const char *key, int64_t *out, bool *bad, ds_error *err);
bool ds_gguf_get_f64(const ds_gguf *gguf, const char *key, double *out, bool *bad, ds_error *err);
bool ds_gguf_get_bool(const ds_gguf *gguf, const char *key, bool *out, bool *bad, ds_error *err);
bool ds_gguf_get_str(const ds_gguf *gguf, const char *key, ds_str *out, bool *bad, ds_error *err);

/* Step over string items of an array: *cursor starts at kv->data; call n_items times. */
ds_str ds_gguf_next_str(const void **cursor);
