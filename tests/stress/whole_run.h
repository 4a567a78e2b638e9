/* whole_run.h: the run that the stress programs compare: all logits of a prompt, then of single tokens. */
#pragma once

#include "arch/attention.h"
#include "model/core.h"

enum { N_TOK = 70, N_STEPS = 5, N_CTX = N_TOK + N_STEPS };

/* logits (N_CTX, n_vocab). */
static ds_status run(ds_core *core, float *logits, ds_error *err) {
    const ds_config *c = &core->config;
    ds_cache_rows cached[DS_CACHE_ROWS];
    const int n_cached = ds_attention(c)->cached(c, cached);
    int32_t ids[N_CTX], rows[N_CTX];
    ds_kv_store store;
    ds_kv kv;
    ds_kv_store_create(DS_KV_F16, c->n_layer, cached, n_cached, &store);
    ds_status st = ds_kv_create(&store, N_CTX, &kv, err);
    if (st == DS_OK) st = ds_kv_reserve(&kv, 0, N_CTX, err);
    for (int i = 0; i < N_CTX; i++) ids[i] = (i * 7 + 1) % c->n_vocab, rows[i] = i;
    for (int at = 0, n = N_TOK; at < N_CTX && st == DS_OK; at += n, n = 1) {
        const ds_span span = {&kv, 0, n, at};
        const ds_request request = {.n_tok = n,
                                    .ids = ids + at,
                                    .spans = &span,
                                    .n_spans = 1,
                                    .logit_rows = rows,
                                    .n_logits = n,
                                    .logits = logits + (size_t)at * (size_t)c->n_vocab};
        st = ds_core_run(core, &request, err);
    }
    ds_kv_release(&kv);
    ds_kv_store_release(&store);
    return st;
}
