#include "memory/loaded.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Whether a tensor is of the model proper and of no routed expert. A block from n_layer on is a draft head's. */
static bool is_shared(const ds_tensor *t, const ds_config *c) {
    int il = 0;
    if (strstr(t->name, "_exps.") || !t->n_bytes || t->format == DS_FORMAT_COUNT) return false;
    return sscanf(t->name, "blk.%d.", &il) != 1 || il < c->n_layer;
}

size_t ds_loaded_bytes_of(const ds_gguf *gguf, const ds_config *config, ds_loaded_which *which, const void *ctx) {
    size_t bytes = 0;
    for (size_t i = 0; i < ds_gguf_n_tensors(gguf); i++) {
        const ds_tensor *t = ds_gguf_tensor_at(gguf, i);
        if (is_shared(t, config) && which(ctx, t->name)) bytes += ds_read_room(t->n_bytes);
    }
    return bytes;
}

static bool any(const void *ctx, const char *name) {
    (void)ctx, (void)name;
    return true;
}

size_t ds_loaded_bytes(const ds_gguf *gguf, const ds_config *config) {
    return ds_loaded_bytes_of(gguf, config, any, NULL);
}

/* ---- Reading ---- */

typedef struct loading {
    ds_loaded *to;
    const ds_config *config;
    size_t next, used; /* the tensor, and the memory given out */
    int n_under_way;
    ds_error failure; /* the first */
} loading;

static bool next_read(void *ctx, ds_read *out) {
    loading *l = ctx;
    const ds_gguf *g = l->to->gguf;
    for (; l->next < ds_gguf_n_tensors(g) && l->failure.status == DS_OK; l->next++) {
        const ds_tensor *t = ds_gguf_tensor_at(g, l->next);
        if (!is_shared(t, l->config)) continue;
        *out = (ds_read){.n = t->n_bytes, .room = l->to->memory + l->used, .tag = (int)l->next};
        if (!ds_gguf_locate(g, t->data, t->n_bytes, &out->from))
            continue; /* checked by the parser: it lies in a part */
        l->used += ds_read_room(t->n_bytes);
        l->n_under_way++;
        l->next++;
        return true;
    }
    return false;
}

static void done_read(void *ctx, const ds_read *read, const ds_error *err) {
    loading *l = ctx;
    l->n_under_way--;
    if (err && l->failure.status == DS_OK) l->failure = *err;
    ds_tensor *t = &l->to->tensors[read->tag];
    *t = *ds_gguf_tensor_at(l->to->gguf, (size_t)read->tag);
    t->data = ds_read_data(read->room, &read->from);
}

static ds_status read_all(ds_loaded *l, const ds_config *config, const ds_budget *budget, ds_error *err) {
    loading state = {.to = l, .config = config};
    ds_readers readers;
    const ds_readers_client client = {next_read, done_read, &state};
    ds_status st = ds_readers_start(&readers, client, ds_gguf_label(l->gguf), l->cached, err);
    if (st != DS_OK) return st;
    ds_lock_take(&readers.lock);
    while (state.failure.status == DS_OK && (state.n_under_way || state.next < ds_gguf_n_tensors(l->gguf))) {
        ds_signal_wait_for(&readers.news, &readers.lock, DS_STOP_LOOK_NS);
        ds_lock_give(&readers.lock); /* whoever is asked may take its time */
        const bool stops = ds_budget_stops(budget);
        ds_lock_take(&readers.lock);
        if (stops && state.failure.status == DS_OK) ds_fail(&state.failure, DS_ESTOPPED, "stopped while it was read");
    }
    ds_lock_give(&readers.lock);
    ds_readers_stop(&readers);
    l->cached = atomic_load(&readers.cached);
    if (state.failure.status != DS_OK) *err = state.failure;
    return state.failure.status;
}

ds_status ds_loaded_open(const ds_gguf *gguf, const ds_config *config, ds_source under, const ds_budget *budget,
                         ds_loaded *out, ds_error *err) {
    ds_loaded l = {.under = under, .gguf = gguf, .bytes = ds_loaded_bytes(gguf, config)};
    ds_gguf_place place;
    ds_status st;
    if (ds_gguf_n_tensors(gguf) &&
        !ds_gguf_locate(gguf, ds_gguf_tensor_at(gguf, 0)->data, ds_gguf_tensor_at(gguf, 0)->n_bytes, &place))
        return ds_fail(err, DS_EINVAL, "%s: in memory: there is no file to read from", ds_gguf_label(gguf));
    l.cached = !ds_gguf_leave_mapping(gguf, true);
    l.tensors = calloc(ds_gguf_n_tensors(gguf) + 1, sizeof *l.tensors);
    l.memory = ds_pages_new(l.bytes + 1);
    if (!l.tensors || !l.memory)
        st = ds_fail(err, DS_ENOMEM, "%s: no memory for %zu bytes of weights", ds_gguf_label(gguf), l.bytes);
    else st = read_all(&l, config, budget, err);
    if (st == DS_OK) st = ds_gguf_check(gguf, err);
    if (st == DS_OK) *out = l;
    else ds_loaded_release(&l);
    return st;
}

static const ds_tensor *find(const void *ctx, const char *name) {
    const ds_loaded *l = ctx;
    const ds_tensor *t = l->under.find(l->under.ctx, name);
    if (!t) return NULL;
    const ds_tensor *mine = &l->tensors[t - ds_gguf_tensor_at(l->gguf, 0)];
    return mine->data ? mine : t;
}

ds_source ds_loaded_view(ds_loaded *loaded) { return (ds_source){find, loaded, loaded->under.label}; }

void ds_loaded_forget(ds_loaded *l, ds_loaded_which *which, const void *ctx) {
    const size_t page = ds_pages_size();
    for (size_t i = 0; l->memory && i < ds_gguf_n_tensors(l->gguf); i++) {
        const ds_tensor *t = &l->tensors[i];
        if (!t->data || !which(ctx, t->name)) continue;
        /* The room that it was read into, and of that whole pages: what is around them is another's. */
        const size_t at = (size_t)((const unsigned char *)t->data - l->memory) / DS_DIRECT_ALIGN * DS_DIRECT_ALIGN,
                     end = at + ds_read_room(t->n_bytes), first = (at + page - 1) / page * page,
                     last = end / page * page;
        if (first < last) ds_pages_forget(l->memory + first, last - first);
    }
}

void ds_loaded_release(ds_loaded *loaded) {
    free(loaded->tensors);
    if (loaded->memory) ds_pages_release(loaded->memory, loaded->bytes + 1);
    *loaded = (ds_loaded){0};
}
