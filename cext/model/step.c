/* step.c: what is appended to sessions: a step at once, or some of its layers at a time. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "dsv2.h"
#include "model/session.h"

enum { DS_MAX_INPUTS = DS_MAX_STEP };

static ds_status check_input(const ds_model *model, const ds_input *in, ds_error *err) {
    const ds_session *s = in->session;
    ds_status st = ds_session_check(s, err);
    if (st != DS_OK) return st;
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

/* What a step is asked, but for the ids; *n_tok: of all inputs. */
static ds_status check_inputs(const ds_model *model, const ds_input *inputs, int n_inputs, int most, int *n_tok,
                              ds_error *err) {
    ds_status st;
    *n_tok = 0;
    if (n_inputs < 1 || n_inputs > DS_MAX_INPUTS)
        return ds_fail(err, DS_EINVAL, "%d sequences in a step: expected 1 to %d", n_inputs, DS_MAX_INPUTS);
    for (int i = 0; i < n_inputs; i++) {
        if ((st = check_input(model, &inputs[i], err)) != DS_OK) return st;
        if (inputs[i].n > most - *n_tok) return ds_fail(err, DS_EINVAL, "more than %d tokens in a step", most);
        for (int j = 0; j < i; j++) {
            if (inputs[j].session == inputs[i].session)
                return ds_fail(err, DS_EINVAL, "session %d of the step stands in it twice", i);
        }
        *n_tok += inputs[i].n;
    }
    return DS_OK;
}

ds_status ds_eval(ds_model *model, const ds_input *inputs, int n_inputs, int piece, float *logits, ds_tap *tap,
                  ds_error *err) {
    ds_request step = {.logits = logits, .tap = tap, .piece = piece ? piece : ds_model_together(model)};
    const int most = tap ? step.piece : ds_model_max_step(model);
    int n_tok;
    ds_status st = ds_core_check(&model->core, err);
    if (st != DS_OK) return st;
    if (piece < 0 || piece > DS_MAX_STEP)
        return ds_fail(err, DS_EINVAL, "pieces of %d tokens: expected 1 to %d", piece, DS_MAX_STEP);
    if ((st = check_inputs(model, inputs, n_inputs, most, &n_tok, err)) != DS_OK) return st;
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

/* ---- Some layers at a time ---- */

struct ds_reading {
    ds_model *model;
    ds_request step;
    ds_input *inputs; /* (n_inputs) */
    int n_inputs;
    int il; /* the layer that is next; layer_end: all are computed, and the sessions hold the tokens */
    float *x; /* (n_tok, n_embd) the residual stream between layers */
    bool failed; /* x may be that of another layer */
    void *memory; /* of all arrays */
    size_t bytes;
};

static void carve(ds_reading *r, int n_tok, int n_embd, unsigned char *base, ds_span **spans, int32_t **ids) {
    r->bytes = 0;
    r->inputs = ds_core_take(base, &r->bytes, (size_t)r->n_inputs, sizeof *r->inputs);
    *spans = ds_core_take(base, &r->bytes, (size_t)r->n_inputs, sizeof **spans);
    *ids = ds_core_take(base, &r->bytes, 2 * (size_t)n_tok, sizeof **ids); /* and the rows of logits */
    r->x = ds_core_take(base, &r->bytes, (size_t)n_tok * (size_t)n_embd, sizeof *r->x);
}

ds_status ds_reading_begin(ds_model *model, const ds_input *inputs, int n_inputs, ds_reading **out, ds_error *err) {
    ds_span *spans;
    int32_t *ids;
    int n_tok;
    ds_status st = ds_core_check(&model->core, err);
    if (st != DS_OK) return st;
    if (!ds_residency_is_settled(model->core.residency))
        return ds_fail(err, DS_EUNSUPPORTED,
                       "experts that come from a drive are read for all layers of a step at once");
    if ((st = check_inputs(model, inputs, n_inputs, DS_MAX_STEP, &n_tok, err)) != DS_OK) return st;
    ds_reading *r = malloc(sizeof *r);
    if (!r) return ds_fail(err, DS_ENOMEM, "no memory for a step");
    *r = (ds_reading){.model = model, .n_inputs = n_inputs, .il = model->core.weights.layer_begin};
    carve(r, n_tok, model->core.config.n_embd, NULL, &spans, &ids);
    if (!(r->memory = ds_pages_new(r->bytes))) {
        st = ds_fail(err, DS_ENOMEM, "no memory for a step of %d tokens (%.1f MiB)", n_tok,
                     (double)r->bytes / (1 << 20));
    } else {
        carve(r, n_tok, model->core.config.n_embd, r->memory, &spans, &ids);
        memcpy(r->inputs, inputs, (size_t)n_inputs * sizeof *inputs);
        if ((st = lay_out(model, inputs, n_inputs, ids, ids + n_tok, spans, &r->step, err)) == DS_OK)
            st = reserve(&r->step, inputs, err);
    }
    if (st != DS_OK) {
        ds_pages_release(r->memory, r->bytes);
        free(r);
        return st;
    }
    for (int i = 0; i < n_inputs; i++) inputs[i].session->is_read = true;
    *out = r;
    return DS_OK;
}

int ds_reading_left(const ds_reading *r) { return r->model->core.weights.layer_end - r->il; }
size_t ds_reading_n_logits(const ds_reading *r) { return (size_t)r->step.n_logits; }

static void let_go(const ds_reading *r) {
    for (int i = 0; i < r->n_inputs; i++) r->inputs[i].session->is_read = false;
}

ds_status ds_reading_run(ds_reading *r, int n_layers, float *logits, ds_error *err) {
    ds_core *core = &r->model->core;
    const int left = ds_reading_left(r), end = r->il + (n_layers < left ? n_layers : left);
    ds_request part = r->step;
    ds_status st = ds_core_check(core, err);
    if (st != DS_OK) return st;
    if (r->failed) return ds_fail(err, DS_EINVAL, "a step that has failed does not go on");
    if (n_layers < 1 || !left)
        return ds_fail(err, DS_EINVAL, "%d layers of a step, of %d that are left", n_layers, left);
    part.logits = logits;
    if (r->il > core->weights.layer_begin) part.ids = NULL, part.x = r->x;
    if (end < core->weights.layer_end) part.x_out = r->x;
    if ((st = ds_gguf_check(r->model->gguf, err)) == DS_OK &&
        (st = ds_core_run_part(core, &part, r->il, end, err)) == DS_OK &&
        (st = ds_gguf_check(r->model->gguf, err)) == DS_OK && end == core->weights.layer_end)
        st = check_logits(r->model, &part, err);
    if (st != DS_OK) return r->failed = true, st;
    r->il = end;
    if (end < core->weights.layer_end) return DS_OK;
    for (int i = 0; i < r->n_inputs; i++) r->inputs[i].session->n_past += r->inputs[i].n;
    let_go(r);
    return DS_OK;
}

void ds_reading_end(ds_reading *r) {
    if (!r) return;
    if (ds_reading_left(r)) {
        give_up(r->inputs, r->n_inputs);
        let_go(r);
    }
    ds_pages_release(r->memory, r->bytes);
    free(r);
}
