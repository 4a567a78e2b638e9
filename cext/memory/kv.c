#include "memory/kv.h"

#include <string.h>

#include "base/pages.h"

static const struct {
    const char *name;
    ds_row_kind kind;
} TYPES[DS_KV_TYPES] = {
    [DS_KV_F16] = {"f16", DS_ROWS_I16},
    [DS_KV_Q8_0] = {"q8_0", DS_ROWS_Q8},
    [DS_KV_F32] = {"f32", DS_ROWS_F32},
};

bool ds_kv_type_from_name(const char *name, ds_kv_type *out) {
    for (int i = 0; i < DS_KV_TYPES; i++) {
        if (strcmp(TYPES[i].name, name) == 0) return *out = (ds_kv_type)i, true;
    }
    return false;
}

const char *ds_kv_type_name(ds_kv_type type) { return TYPES[type].name; }

/* Bytes of each part of a layer's rows, on cache lines of their own. */
enum { DATA, SCALE, TAIL, TAIL_SCALE, SUM, PARTS };

/* Of one row. */
static void part_bytes(const ds_rows *rows, int n_tail, size_t bytes[PARTS]) {
    const bool scaled = rows->kind != DS_ROWS_F32, split = rows->kind == DS_ROWS_Q8;
    bytes[DATA] = rows->row_bytes;
    bytes[SCALE] = scaled ? sizeof *rows->scale : 0;
    bytes[TAIL] = split ? ds_row_pad(n_tail) * sizeof *rows->tail : 0;
    bytes[TAIL_SCALE] = split ? sizeof *rows->tail_scale : 0;
    bytes[SUM] = split ? sizeof *rows->sum : 0;
}

static void part_sizes(const ds_rows *rows, size_t n_ctx, int n_tail, size_t sizes[PARTS]) {
    part_bytes(rows, n_tail, sizes);
    for (int i = 0; i < PARTS; i++) sizes[i] = (n_ctx * sizes[i] + DS_ACT_ALIGN - 1) / DS_ACT_ALIGN * DS_ACT_ALIGN;
}

ds_status ds_kv_create(ds_kv_type type, int n_layer, int n_ctx, int rank, int n_tail, ds_kv *out, ds_error *err) {
    const ds_row_kind kind = TYPES[type].kind;
    ds_kv kv = {.type = type,
                .n_layer = n_layer,
                .n_ctx = n_ctx,
                .rank = rank,
                .n_tail = n_tail,
                .shape = {.kind = kind, .row_bytes = ds_row_bytes_of(kind, rank, n_tail)}};
    size_t sizes[PARTS];
    part_sizes(&kv.shape, (size_t)n_ctx, n_tail, sizes);
    for (int i = 0; i < PARTS; i++) kv.layer_bytes += sizes[i];
    kv.bytes =
        (size_t)n_layer * kv.layer_bytes; /* int factors below 2^24: cannot overflow 64 bits before mmap refuses */
    kv.data = ds_pages_new(kv.bytes);
    if (!kv.data) {
        ds_fail(err, DS_ENOMEM, "no memory for a context of %d tokens (%.1f MiB)", n_ctx, (double)kv.bytes / (1 << 20));
        return ds_hint(err, "ask for a smaller context");
    }
    *out = kv;
    return DS_OK;
}

void ds_kv_release(ds_kv *kv) {
    ds_pages_release(kv->data, kv->bytes);
    *kv = (ds_kv){0};
}

void ds_kv_repeat(ds_kv *kv, int n, int n_pos) {
    size_t bytes[PARTS], sizes[PARTS];
    part_bytes(&kv->shape, kv->n_tail, bytes);
    part_sizes(&kv->shape, (size_t)kv->n_ctx, kv->n_tail, sizes);
    for (int il = 0; il < kv->n_layer; il++) {
        unsigned char *part = kv->data + (size_t)il * kv->layer_bytes;
        for (int i = 0; i < PARTS; part += sizes[i++]) {
            for (int pos = n; pos < n_pos; pos += n) {
                memcpy(part + (size_t)pos * bytes[i], part, (size_t)(n_pos - pos < n ? n_pos - pos : n) * bytes[i]);
            }
        }
    }
}

ds_rows ds_kv_rows(const ds_kv *kv, int il, int pos) {
    unsigned char *at = kv->data + (size_t)il * kv->layer_bytes;
    ds_rows rows = kv->shape;
    size_t sizes[PARTS];
    part_sizes(&rows, (size_t)kv->n_ctx, kv->n_tail, sizes);
    rows.data = at;
    if (sizes[SCALE]) rows.scale = (float *)(void *)(at += sizes[DATA]);
    if (sizes[TAIL]) rows.tail = (int16_t *)(void *)(at += sizes[SCALE]);
    if (sizes[TAIL_SCALE]) rows.tail_scale = (float *)(void *)(at += sizes[TAIL]);
    if (sizes[SUM]) rows.sum = (int32_t *)(void *)(at += sizes[TAIL_SCALE]);
    return ds_rows_from(&rows, pos, kv->n_tail);
}
