#include "memory/kv.h"

#include <string.h>
#include <sys/mman.h>

static const struct { const char *name; size_t bytes; } TYPES[] = {
    [DS_KV_F16] = {"f16", 2},
    [DS_KV_F32] = {"f32", 4},
};

bool ds_kv_type_from_name(const char *name, ds_kv_type *out) {
    for (size_t i = 0; i < sizeof TYPES / sizeof *TYPES; i++) {
        if (strcmp(TYPES[i].name, name) == 0) return *out = (ds_kv_type)i, true;
    }
    return false;
}

const char *ds_kv_type_name(ds_kv_type type) { return TYPES[type].name; }

ds_status ds_kv_create(ds_kv_type type, int n_layer, int n_ctx, int width, ds_kv *out, ds_error *err) {
    ds_kv kv = {.type = type, .n_layer = n_layer, .n_ctx = n_ctx, .width = width, .row_bytes = (size_t)width * TYPES[type].bytes};
    kv.bytes = (size_t)n_layer * (size_t)n_ctx * kv.row_bytes; /* int factors below 2^24: cannot overflow 64 bits before mmap refuses */
    kv.data = mmap(NULL, kv.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (kv.data == MAP_FAILED) {
        ds_fail(err, DS_ENOMEM, "no memory for a context of %d tokens (%.1f MiB)", n_ctx, (double)kv.bytes / (1 << 20));
        return ds_hint(err, "ask for a smaller context");
    }
    *out = kv;
    return DS_OK;
}

void ds_kv_release(ds_kv *kv) {
    if (kv->data) munmap(kv->data, kv->bytes);
    *kv = (ds_kv){0};
}

void ds_kv_store(const ds_kv *kv, const ds_kernels *kern, int il, int pos, const float *row) {
    if (kv->type == DS_KV_F16) kern->f32_to_f16(kv->width, row, ds_kv_row(kv, il, pos));
    else memcpy(ds_kv_row(kv, il, pos), row, kv->row_bytes);
}

void ds_kv_load(const ds_kv *kv, const ds_kernels *kern, int il, int pos, int n, float *rows) {
    if (kv->type == DS_KV_F16) kern->f16_to_f32(n * kv->width, ds_kv_row(kv, il, pos), rows);
    else memcpy(rows, ds_kv_row(kv, il, pos), (size_t)n * kv->row_bytes);
}
