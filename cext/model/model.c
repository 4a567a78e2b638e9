/* model.c: models over a GGUF, and the evaluation of tokens in their sessions. Owns the file and the caches' memory. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "arch/file.h"
#include "dsv2.h"
#include "model/session.h"

enum { DS_MAX_INPUTS = DS_MAX_STEP, SAMPLE_BYTES = 4096 };

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
    needs.long_step = ds_core_pieces_bytes(&model->core, DS_MAX_LONG_STEP, DS_MAX_STEP);
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
    return ds_residency_is_settled(model->core.residency) ? DS_MAX_STEP : DS_MAX_LONG_STEP;
}
int ds_model_threads(const ds_model *model) { return model->core.backends[0]->n_threads; }
size_t ds_model_step_bytes(const ds_model *model, int n_tok, int piece) {
    return ds_core_step_bytes(&model->core, n_tok, piece ? piece : DS_MAX_STEP);
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

static ds_status check_input(const ds_model *model, const ds_input *in, ds_error *err) {
    const ds_session *s = in->session;
    if (s->model != model) return ds_fail(err, DS_EINVAL, "the sessions of a step belong to different models");
    if (in->n < 1) return ds_fail(err, DS_EINVAL, "no tokens to evaluate");
    if (in->n_logits < 0 || in->n_logits > in->n)
        return ds_fail(err, DS_EINVAL, "logits of %d tokens, expected 0 to %d", in->n_logits, in->n);
    if (in->n > s->kv.n_ctx - s->n_past) {
        ds_fail(err, DS_ECONTEXT, "%d tokens do not fit: the context holds %d and %d are used", in->n, s->kv.n_ctx,
                s->n_past);
        return ds_hint(err, "open the session with a larger n_ctx, or rewind it");
    }
    return DS_OK;
}

/* The ids are the step's own by now: the caller's array may change under a check. */
static ds_status check_ids(const ds_config *c, const int32_t *ids, int n, ds_error *err) {
    for (int i = 0; i < n; i++) {
        if (ids[i] < 0 || ids[i] >= c->n_vocab)
            return ds_fail(err, DS_EINVAL, "token %d has id %d, expected 0 to %d", i, ids[i], c->n_vocab - 1);
    }
    return DS_OK;
}

/* Drop what a step that was not run had reserved. */
static void give_up(const ds_input *inputs, int n_inputs) {
    for (int i = 0; i < n_inputs; i++) ds_kv_truncate(&inputs[i].session->kv, inputs[i].session->n_past);
}

/* Room in the caches for what the step appends, and the ids there; on failure all hold what they held. */
static ds_status reserve(const ds_request *step, const ds_input *inputs, ds_error *err) {
    ds_status st = DS_OK;
    for (int i = 0; i < step->n_spans && st == DS_OK; i++) {
        const ds_span *span = &step->spans[i];
        if ((st = ds_kv_reserve(span->kv, span->pos, span->pos + span->n, err)) != DS_OK) break;
        for (int t = 0; t < span->n; t++) *ds_kv_ids(span->kv, span->pos + t) = step->ids[span->first + t];
    }
    if (st != DS_OK) give_up(inputs, step->n_spans);
    return st;
}

/* A value that is no number spreads to all logits: such an answer is refused, with the file's name. */
static ds_status check_logits(const ds_model *model, const ds_request *step, ds_error *err) {
    const size_t n = (size_t)model->core.config.n_vocab;
    for (int i = 0; i < step->n_logits; i++) {
        const float *row = step->logits + (size_t)i * n;
        size_t j = 0;
        while (j < n && !isfinite(row[j])) j++;
        if (j < n) continue;
        ds_fail(err, DS_EFORMAT, "%s: none of the %zu logits after token %d of the step is a finite number",
                ds_gguf_label(model->gguf), n, step->logit_rows[i]);
        return ds_hint(err, "its weights are damaged, or were when it was made: compare its sha256 with its source's, "
                            "download or quantize it again");
    }
    return DS_OK;
}

/* Lay the inputs out as a step in the arrays that step, rows and spans point to, and check them. */
static ds_status lay_out(const ds_model *model, const ds_input *inputs, int n_inputs, int32_t *ids, int32_t *rows,
                         ds_span *spans, ds_request *step, ds_error *err) {
    ds_status st = DS_OK;
    for (int i = 0; i < n_inputs && st == DS_OK; i++) {
        const ds_input *in = &inputs[i];
        spans[i] = (ds_span){&in->session->kv, step->n_tok, in->n, in->session->n_past};
        memcpy(ids + step->n_tok, in->ids, (size_t)in->n * sizeof *ids);
        st = check_ids(&model->core.config, ids + step->n_tok, in->n, err);
        step->n_tok += in->n;
        for (int t = in->n_logits; t > 0; t--) rows[step->n_logits++] = step->n_tok - t;
    }
    step->ids = ids, step->logit_rows = rows, step->spans = spans, step->n_spans = n_inputs;
    return st;
}

/* Run a step whose inputs are laid out. */
static ds_status run_step(ds_model *model, const ds_input *inputs, ds_request *step, ds_error *err) {
    ds_status st = reserve(step, inputs, err);
    if (st != DS_OK) return st;
    /* Before the step, lest it read past the end of a file cut short; after it, lest it has read half of another. */
    if ((st = ds_gguf_check(model->gguf, err)) == DS_OK && (st = ds_core_run(&model->core, step, err)) == DS_OK &&
        (st = ds_gguf_check(model->gguf, err)) == DS_OK)
        st = check_logits(model, step, err);
    if (st != DS_OK) give_up(inputs, step->n_spans);
    return st;
}

ds_status ds_eval(ds_model *model, const ds_input *inputs, int n_inputs, int piece, float *logits, ds_tap *tap,
                  ds_error *err) {
    ds_request step = {.logits = logits, .tap = tap, .piece = piece ? piece : DS_MAX_STEP};
    const int most = tap ? step.piece : ds_model_max_step(model);
    int n_tok = 0;
    ds_status st = ds_core_check(&model->core, err);
    if (st != DS_OK) return st;
    if (piece < 0 || piece > DS_MAX_STEP)
        return ds_fail(err, DS_EINVAL, "pieces of %d tokens: expected 1 to %d", piece, DS_MAX_STEP);
    if (n_inputs < 1 || n_inputs > DS_MAX_INPUTS)
        return ds_fail(err, DS_EINVAL, "%d sequences in a step: expected 1 to %d", n_inputs, DS_MAX_INPUTS);
    for (int i = 0; i < n_inputs; i++) {
        if ((st = check_input(model, &inputs[i], err)) != DS_OK) return st;
        if (inputs[i].n > most - n_tok) return ds_fail(err, DS_EINVAL, "more than %d tokens in a step", most);
        for (int j = 0; j < i; j++) {
            if (inputs[j].session == inputs[i].session)
                return ds_fail(err, DS_EINVAL, "session %d of the step stands in it twice", i);
        }
        n_tok += inputs[i].n;
    }
    /* Not on the stack: a caller's thread may have 128 KiB of it. */
    ds_span *spans = malloc((size_t)n_inputs * sizeof *spans + 2 * (size_t)n_tok * sizeof(int32_t));
    if (!spans) return ds_fail(err, DS_ENOMEM, "no memory for a step of %d tokens", n_tok);
    int32_t *ids = (int32_t *)(spans + n_inputs);
    if ((st = lay_out(model, inputs, n_inputs, ids, ids + n_tok, spans, &step, err)) == DS_OK)
        st = run_step(model, inputs, &step, err);
    free(spans);
    if (st != DS_OK) return st;
    for (int i = 0; i < n_inputs; i++) inputs[i].session->n_past += inputs[i].n;
    for (int i = 0; tap && i < tap->n; i++) tap->entries[i].row += step.n_tok;
    return DS_OK;
}
