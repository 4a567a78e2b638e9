/* block.c: one transformer block over borrowed tensors. A checkpoint streams through it a layer at a time. */
#include <stdlib.h>
#include <string.h>

#include "dsv2.h"
#include "model/core.h"

enum {
    TARGET_TOKENS =
        2048 /* windows run together up to this many tokens: an expert's matrices are read once for them all */
};

struct ds_block {
    ds_core core;
    const ds_tensor *tensors;
    int n_tensors;
};

static const ds_tensor *find_in_table(const void *ctx, const char *name) {
    const ds_block *block = ctx;
    for (int i = 0; i < block->n_tensors; i++) {
        if (strcmp(block->tensors[i].name, name) == 0) return &block->tensors[i];
    }
    return NULL;
}

ds_status ds_block_open(const ds_gguf *header, int il, const ds_tensor *tensors, int n_tensors, int n_threads,
                        ds_sublayer sublayer, ds_block **out, ds_error *err) {
    ds_block *block = calloc(1, sizeof *block);
    ds_source source = {find_in_table, block, ds_gguf_label(header)};
    const ds_device processor = {.kind = "cpu", .n_threads = n_threads};
    ds_status st;
    if (!block) return ds_fail(err, DS_ENOMEM, "no memory for a block");
    block->tensors = tensors;
    block->n_tensors = n_tensors;
    if (il < 0 || il > 1 << 20) st = ds_fail(err, DS_EINVAL, "layer %d: expected a number from 0", il);
    else {
        const ds_core_spec spec = {
            .layer_begin = il, .layer_end = il + 1, .sublayer = sublayer, .processor = &processor};
        st = ds_core_create(header, source, &spec, &block->core, err);
    }
    if (st == DS_OK) *out = block;
    else free(block);
    return st;
}

void ds_block_close(ds_block *block) {
    if (!block) return;
    ds_core_release(&block->core);
    free(block);
}

const ds_config *ds_block_config(const ds_block *block) { return &block->core.config; }

/* Run windows [first, first + n) together, each with a fresh exact cache. */
static ds_status run_windows(ds_block *block, ds_request step, int first, int n, int n_tok, ds_kv *kv, ds_span *spans,
                             ds_error *err) {
    size_t at = (size_t)first * (size_t)n_tok * (size_t)block->core.config.n_embd;
    ds_status st;
    step.n_tok = n * n_tok, step.x += at, step.x_out += at, step.spans = spans, step.n_spans = n;
    for (int i = 0; i < n; i++) spans[i] = (ds_span){&kv[i], i * n_tok, n_tok, 0};
    if ((st = ds_core_run(&block->core, &step, err)) != DS_OK) return st;
    for (int i = 0; step.tap && i < step.tap->n; i++) step.tap->entries[i].row += step.n_tok;
    return DS_OK;
}

/* All windows, as many together as there are caches. */
static ds_status run_all(ds_block *block, const ds_request *step, int n_seq, int n_tok, ds_kv *kv, ds_span *spans,
                         int together, ds_error *err) {
    ds_status st = DS_OK;
    for (int i = 0; i < n_seq && st == DS_OK; i += together)
        st = run_windows(block, *step, i, n_seq - i < together ? n_seq - i : together, n_tok, kv, spans, err);
    return st;
}

ds_status ds_block_forward(ds_block *block, const float *x, int n_seq, int n_tok, float *y, ds_tap *tap,
                           ds_error *err) {
    const ds_request step = {.x = x, .x_out = y, .tap = tap};
    ds_cache_rows rows[DS_CACHE_ROWS];
    const int n_rows = ds_attention(&block->core.config)->cached(&block->core.config, rows);
    int together = n_tok < TARGET_TOKENS ? TARGET_TOKENS / n_tok : 1;
    ds_kv_store store;
    ds_kv *kv;
    ds_span *spans;
    ds_status st = ds_core_check(&block->core, err);
    if (st != DS_OK) return st;
    for (int i = 0; tap && i < tap->n; i++) {
        if (!ds_tap_within(block->core.weights.sublayer, tap->entries[i].point))
            return ds_fail(err, DS_EINVAL, "a tap of the sublayer that is not run");
    }
    if (together > n_seq) together = n_seq;
    ds_kv_store_create(DS_KV_F32, 1, rows, n_rows, &store);
    kv = calloc((size_t)together, sizeof *kv);
    spans = calloc((size_t)together, sizeof *spans);
    if (!kv || !spans) st = ds_fail(err, DS_ENOMEM, "no memory for %d windows", together);
    for (int i = 0; i < together && st == DS_OK; i++) {
        if ((st = ds_kv_create(&store, n_tok, &kv[i], err)) == DS_OK) st = ds_kv_reserve(&kv[i], 0, n_tok, err);
    }
    if (st == DS_OK) st = run_all(block, &step, n_seq, n_tok, kv, spans, together, err);
    for (int i = 0; kv && i < together; i++) ds_kv_release(&kv[i]);
    ds_kv_store_release(&store);
    free(kv);
    free(spans);
    return st;
}
