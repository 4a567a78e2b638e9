/* model.c: models over a GGUF. Owns the file and the caches' memory. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "arch/file.h"
#include "dsv2.h"
#include "model/session.h"

enum { SAMPLE_BYTES = 4096 };

_Static_assert((int)DS_MAX_STEP == (int)DS_CHUNK, "a step of the public interface is one chunk");

/* Bind all of a file. On failure nothing is kept. */
static ds_status bind_file(const ds_gguf *gguf, const ds_opening *opening, const ds_budget *budget, ds_core *out,
                           ds_error *err) {
    const ds_device processor = {.kind = "cpu", .n_threads = opening->n_threads, .isa = opening->isa};
    const ds_core_spec spec = {.layer_end = -1,
                               .ends = true,
                               .sublayer = DS_SUBLAYER_BOTH,
                               .processor = &processor,
                               .placement = opening->placement,
                               .budget = budget};
    ds_file_source file;
    ds_status st = ds_file_source_open(gguf, &file, err);
    if (st != DS_OK) return st;
    st = ds_core_create(gguf, ds_file_source_view(&file), &spec, out, err);
    if (st == DS_OK && (st = ds_file_source_check(&file, &out->config, err)) != DS_OK) ds_core_release(out);
    ds_file_source_close(&file);
    return st;
}

/* What the caller says to one thread holds for all that wait. */
static bool stops(void *ctx) {
    ds_model *model = ctx;
    atomic_bool *stopping = &model->core.stopping;
    if (!atomic_load(stopping) && ds_budget_stops(&model->budget)) atomic_store(stopping, true);
    return atomic_load(stopping);
}

/* Takes the gguf: it is closed on failure. */
static ds_status open_gguf(ds_gguf *gguf, const ds_opening *opening, ds_model **out, ds_error *err) {
    ds_model *model = calloc(1, sizeof *model);
    ds_status st = ds_fail(err, DS_ENOMEM, "no memory for a model");
    if (model) {
        ds_budget budget = opening->budget;
        budget.stop = stops, budget.stop_ctx = model;
        model->budget = opening->budget;
        model->budget.uses = NULL; /* the caller's own until this returns */
        st = bind_file(gguf, opening, &budget, &model->core, err);
    }
    if (st != DS_OK) {
        ds_gguf_close(gguf);
        free(model);
        return st;
    }
    model->gguf = gguf;
    atomic_init(&model->holders, 1);
    const ds_config *c = &model->core.config;
    ds_cache_rows rows[DS_CACHE_ROWS];
    const int n_rows = ds_attention(c)->cached(c, rows);
    for (int type = 0; type < DS_KV_TYPES; type++)
        ds_kv_store_create((ds_kv_type)type, c->n_layer, rows, n_rows, &model->stores[type]);
    *out = model;
    return DS_OK;
}

ds_status ds_config_of(const ds_gguf *gguf, ds_config *out, ds_error *err) {
    ds_file_source file;
    ds_status st = ds_file_source_open(gguf, &file, err);
    if (st != DS_OK) return st;
    st = ds_config_read(gguf, ds_file_source_view(&file), out, err);
    ds_file_source_close(&file);
    return st;
}

ds_status ds_model_open(const char *path, const ds_opening *opening, ds_model **out, ds_error *err) {
    ds_gguf *gguf;
    ds_status st = ds_gguf_open(path, &gguf, err);
    return st == DS_OK ? open_gguf(gguf, opening, out, err) : st;
}

ds_status ds_model_view(const void *data, size_t size, const char *label, int n_threads, const char *isa,
                        ds_model **out, ds_error *err) {
    const ds_opening opening = {.n_threads = n_threads, .isa = isa};
    ds_gguf *gguf;
    ds_status st = ds_gguf_view(data, size, label, &gguf, err);
    return st == DS_OK ? open_gguf(gguf, &opening, out, err) : st;
}

void ds_model_close(ds_model *model) {
    if (!model || atomic_fetch_sub(&model->holders, 1) > 1) return;
    for (int type = 0; type < DS_KV_TYPES; type++) ds_kv_store_release(&model->stores[type]);
    ds_core_release(&model->core);
    ds_gguf_close(model->gguf);
    free(model);
}

const ds_config *ds_model_config(const ds_model *model) { return &model->core.config; }
const ds_gguf *ds_model_gguf(const ds_model *model) { return model->gguf; }

ds_status ds_model_settle(const ds_model *model, size_t *from, size_t n, ds_error *err) {
    if (model->core.loaded.tensors)
        return ds_fail(err, DS_EUNSUPPORTED, "%s: within a budget it is not mapped", ds_gguf_label(model->gguf));
    return ds_gguf_settle(model->gguf, from, n, err);
}

ds_status ds_model_expert_uses(ds_model *model, uint64_t *out, ds_error *err) {
    const ds_config *c = &model->core.config;
    ds_status st = ds_core_check(&model->core, err); /* in a forked child the lock may be held for ever */
    if (st != DS_OK) return st;
    ds_lock_take(&model->core.lock);
    memcpy(out, model->core.residency->uses, (size_t)c->n_layer * (size_t)c->n_expert * sizeof *out);
    ds_lock_give(&model->core.lock);
    return DS_OK;
}

/* The backend of a device that counts, with the lock held; NULL with an error. */
static ds_backend *hold_counting(ds_model *model, int device, ds_error *err) {
    ds_core *core = &model->core;
    if (ds_core_check(core, err) != DS_OK) return NULL; /* in a forked child the lock may be held for ever */
    if (device < 0 || device >= core->n_backends) {
        ds_fail(err, DS_EINVAL, "there is no device %d: the model has %d", device, core->n_backends);
        return NULL;
    }
    if (!core->backends[device]->ops->watch) {
        ds_fail(err, DS_EINVAL, "device %d counts nothing: GPUs do", device);
        return NULL;
    }
    ds_lock_take(&core->lock);
    return core->backends[device];
}

ds_status ds_model_watch(ds_model *model, int device, bool times, ds_error *err) {
    ds_backend *b = hold_counting(model, device, err);
    if (!b) return err->status;
    const ds_status st = b->ops->watch(b, times, err);
    ds_lock_give(&model->core.lock);
    return st;
}

ds_status ds_model_watched(ds_model *model, int device, ds_work_time out[DS_WORK_TIMES], int *n, ds_work *work,
                           ds_error *err) {
    const ds_backend *b = hold_counting(model, device, err);
    if (!b) return err->status;
    *n = b->ops->watched(b, out, work);
    ds_lock_give(&model->core.lock);
    return DS_OK;
}

ds_needs ds_model_needs(const ds_model *model) {
    ds_needs needs = ds_core_needs(&model->core, model->gguf);
    needs.long_step = ds_core_pieces_bytes(&model->core, DS_MAX_LONG_STEP, model->core.n_together);
    return needs;
}

void ds_model_stop(ds_model *model) { atomic_store(&model->core.stopping, true); }

double ds_model_step_share(const ds_model *model) {
    const int n = atomic_load(&model->core.n_runs), done = atomic_load(&model->core.n_run);
    return n ? fmin(1, (double)done / n) : 0; /* another step may begin between */
}

bool ds_model_counts(ds_model *model, ds_residency_counts *decoding, ds_residency_counts *reading) {
    ds_residency *r = model->core.residency;
    if (!r->ops->count || ds_process_id() != model->core.process) return false;
    r->ops->count(r, decoding, reading);
    return true;
}

int ds_model_max_step(const ds_model *model) {
    return ds_residency_is_settled(model->core.residency) ? model->core.n_together : DS_MAX_LONG_STEP;
}
int ds_model_together(const ds_model *model) { return model->core.n_together; }
int ds_model_threads(const ds_model *model) { return model->core.backends[0]->n_threads; }
size_t ds_model_step_bytes(const ds_model *model, int n_tok, int piece) {
    return ds_core_step_bytes(&model->core, n_tok, piece ? piece : model->core.n_together);
}
const char *ds_model_isa(const ds_model *model) { return model->core.backends[0]->isa; }

ds_cache_usage ds_model_cache(ds_model *model) {
    ds_cache_usage all = {0};
    for (int type = 0; type < DS_KV_TYPES; type++) {
        const ds_blocks_usage usage = ds_blocks_count(&model->stores[type].blocks);
        all.n_blocks += usage.n_used, all.n_shared += usage.n_shared, all.bytes += usage.bytes;
    }
    return all;
}

/* What lies in the middle of a tensor: small ones are told whole. */
static void tell_sample(const ds_tensor *t, ds_tell *tell, void *ctx) {
    const size_t n = t->n_bytes < SAMPLE_BYTES ? t->n_bytes : SAMPLE_BYTES;
    if (n) tell(ctx, (const unsigned char *)t->data + (t->n_bytes - n) / 2, n);
}

void ds_model_identity(const ds_model *model, ds_tell *tell, void *ctx) {
    const size_t n_arch = strlen(model->core.config.arch);
    for (size_t i = 0; i < ds_gguf_n_kv(model->gguf); i++) {
        const ds_gguf_kv *kv = ds_gguf_kv_at(model->gguf, i);
        if (kv->key.size <= n_arch || memcmp(kv->key.data, model->core.config.arch, n_arch) ||
            kv->key.data[n_arch] != '.')
            continue;
        tell(ctx, kv->key.data, kv->key.size);
        tell(ctx, &(uint32_t){kv->type}, sizeof(uint32_t));
        tell(ctx, kv->data, kv->n_bytes);
    }
    for (size_t i = 0; i < ds_gguf_n_tensors(model->gguf); i++) {
        const ds_tensor *t = ds_gguf_tensor_at(model->gguf, i);
        tell(ctx, t->name, strlen(t->name) + 1);
        tell(ctx, &t->gguf_type, sizeof t->gguf_type);
        tell(ctx, t->ne, sizeof t->ne);
        tell_sample(t, tell, ctx);
    }
}
