#include "arch/binder.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "gguf/types.h"

/* A list of blocks that the weights own; released together. */
typedef struct ds_owned {
    struct ds_owned *next;
    _Alignas(64) unsigned char data[];
} ds_owned;

void *ds_bind_own(ds_binder *b, size_t size) {
    ds_owned *block;
    if (size > SIZE_MAX / 2 || !(block = aligned_alloc(64, (sizeof *block + size + 63) / 64 * 64))) {
        b->status = ds_fail(b->err, DS_ENOMEM, "%s: no memory for %zu bytes of weights", b->source.label, size);
        return NULL;
    }
    block->next = b->out->owned;
    b->out->owned = block;
    b->out->owned_bytes += size;
    return block->data;
}

/* What can be done about a type that ggml itself does not have. */
static const char *unknown_type_hint(uint32_t type) {
    if (type >= 31 && type <= 33)
        return "an old repacking of Q4_0 for one processor: take the model's file of another type, Q4_0";
    if (type >= 36 && type <= 38)
        return "an old repacking of IQ4_NL for one processor: take the model's file of another type, IQ4_NL";
    if (type >= 97 && type <= 399)
        return "such types are ik_llama.cpp's and run there alone: take the model's file of another type, Q4_K_M say";
    return "take the model's file of another type, Q4_K_M say";
}

static ds_status fail_type(ds_binder *b, const ds_tensor *t, const char *name) {
    ds_gguf_tensor_type type;
    if (!ds_gguf_tensor_type_get(t->gguf_type, &type)) {
        b->status = ds_fail(b->err, DS_EUNSUPPORTED, "%s: tensor `%s` is of unknown type %u", b->source.label, name,
                            t->gguf_type);
        return ds_hint(b->err, unknown_type_hint(t->gguf_type));
    }
    b->status = ds_fail(b->err, DS_EUNSUPPORTED, "%s: tensor `%s` is of type %s (%u), which this build cannot run",
                        b->source.label, name, type.name, t->gguf_type);
    return ds_hint(b->err, "take the model's file of another type (from IQ2_XXS and Q2_K up all run), or run this one "
                           "with llama.cpp");
}

static const ds_tensor *find(ds_binder *b, bool required, const char *name) {
    const ds_tensor *t = b->status == DS_OK ? b->source.find(b->source.ctx, name) : NULL;
    if (!t && required && b->status == DS_OK) {
        b->status = ds_fail(b->err, DS_EFORMAT, "%s: tensor `%s` is missing", b->source.label, name);
        ds_hint(b->err, "the file holds a part of a model, or its keys are another model's: take another file of it");
    }
    if (t && t->format == DS_FORMAT_COUNT) return fail_type(b, t, name), NULL;
    return t;
}

/* The tensor's bytes as n matrices (rows, k). */
static ds_mat matrix_of(ds_binder *b, const ds_tensor *t, int64_t k, int64_t rows, int64_t n) {
    const ds_format_info *format = ds_format_get(t->format);
    ds_mat m = {.format = t->format, .k = (int)k, .rows = (int)rows, .n = (int)n};
    if (format->block_elements == 1 && (uintptr_t)t->data % format->block_bytes) {
        b->status =
            ds_fail(b->err, DS_EFORMAT, "%s: tensor `%s` is not aligned to its values", b->source.label, t->name);
        return (ds_mat){0};
    }
    m.row_bytes = ds_row_bytes(t->format, k);
    m.data = t->data;
    m.stride = m.row_bytes * (size_t)rows;
    return m;
}

static bool has_shape(const ds_tensor *t, int64_t k, int64_t rows, int64_t n) {
    return t->ne[0] == k && t->ne[1] == rows && t->ne[2] == n && t->ne[3] == 1;
}

ds_mat ds_bind_matrix(ds_binder *b, bool required, int64_t k, int64_t rows, int64_t n, const char *format, ...) {
    char name[DS_MAX_NAME];
    const ds_tensor *t;
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof name, format, args);
    va_end(args);
    if (!(t = find(b, required, name))) return (ds_mat){0};
    if (has_shape(t, k, rows, n)) return matrix_of(b, t, k, rows, n);
    b->status = ds_fail(b->err, DS_EFORMAT, "%s: tensor `%s` is %lld x %lld x %lld, expected %lld x %lld x %lld",
                        b->source.label, name, (long long)t->ne[0], (long long)t->ne[1], (long long)t->ne[2],
                        (long long)k, (long long)rows, (long long)n);
    return (ds_mat){0};
}

ds_mat ds_bind_heads(ds_binder *b, int64_t k, int64_t rows, const char *part, int il) {
    const int64_t n = b->config->n_head;
    char name[DS_MAX_NAME];
    snprintf(name, sizeof name, "blk.%d.%s.weight", il, part);
    const ds_tensor *t = find(b, false, name);
    if (t && has_shape(t, k, rows * n, 1)) return matrix_of(b, t, k, rows, n);
    return ds_bind_matrix(b, true, k, rows, n, "%s", name);
}

/* Norms and biases reach every value after them: one that is no number leaves no logit that is one. */
static void check_finite(ds_binder *b, const char *name, const float *x, int64_t n) {
    int64_t n_bad = 0, first = 0;
    for (int64_t i = n - 1; i >= 0; i--) {
        if (!isfinite(x[i])) n_bad++, first = i;
    }
    if (!n_bad) return;
    b->status =
        ds_fail(b->err, DS_EFORMAT, "%s: %lld of tensor `%s`'s %lld values are no finite numbers, value %lld the first",
                b->source.label, (long long)n_bad, name, (long long)n, (long long)first);
    ds_hint(b->err,
            "the file is damaged, or was made of a damaged model: compare its sha256 with its source's, download "
            "or quantize it again");
}

const float *ds_bind_vector(ds_binder *b, bool required, int64_t n, const char *format, ...) {
    char name[DS_MAX_NAME];
    const ds_tensor *t;
    float *data;
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof name, format, args);
    va_end(args);
    if (!(t = find(b, required, name))) return NULL;
    if (t->ne[0] != n || t->ne[1] != 1 || t->ne[2] != 1 || t->ne[3] != 1) {
        b->status = ds_fail(b->err, DS_EFORMAT, "%s: tensor `%s` has %lld x %lld values, expected %lld",
                            b->source.label, name, (long long)t->ne[0], (long long)t->ne[1], (long long)n);
        return NULL;
    }
    if (!(data = ds_bind_own(b, (size_t)n * sizeof *data))) return NULL;
    ds_dequantize_row(t->format, n, t->data, data);
    check_finite(b, name, data, n);
    return data;
}

void ds_weights_release(ds_weights *weights) {
    for (ds_owned *block = weights->owned, *next; block; block = next) {
        next = block->next;
        free(block);
    }
    free(weights->layers);
    *weights = (ds_weights){0};
}
