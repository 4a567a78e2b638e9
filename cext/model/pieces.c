/* pieces.c: a long step in pieces: each layer of all pieces before the next layer, so that experts that come from a drive
 * are read once for all, in the memory of one piece. A piece computes what it would as a step of its own behind the
 * pieces before it, bit for bit. */
#include "model/core.h"

typedef struct pieces {
    ds_request *requests; /* (n) */
    ds_span *spans; /* (n - 1 + those of the step) */
    int32_t *rows; /* (n_logits) */
    float *x; /* (n_tok, n_embd) the residual stream between layers */
    int n, n_spans;
    void *memory;
    size_t bytes;
} pieces;

static void carve(pieces *p, const ds_config *c, const ds_request *step, unsigned char *base) {
    p->n = ds_core_n_pieces(step->n_tok, step->piece);
    p->bytes = 0;
    p->requests = ds_core_take(base, &p->bytes, (size_t)p->n, sizeof *p->requests);
    p->spans = ds_core_take(base, &p->bytes, (size_t)p->n + (size_t)step->n_spans, sizeof *p->spans);
    p->rows = ds_core_take(base, &p->bytes, (size_t)step->n_logits, sizeof *p->rows);
    p->x = ds_core_take(base, &p->bytes, (size_t)step->n_tok * (size_t)c->n_embd, sizeof *p->x);
}

size_t ds_core_pieces_bytes(const ds_core *core, int n_tok, int piece) {
    pieces p;
    carve(&p, &core->config, &(ds_request){.n_tok = n_tok, .n_spans = n_tok, .n_logits = n_tok, .piece = piece}, NULL);
    return p.bytes;
}

/* Tokens [begin, end) of the step. *logit: the first of its logits that no piece before has. */
static void cut(pieces *p, const ds_core *core, const ds_request *step, int begin, int end, int *logit,
                ds_request *out) {
    const int first_logit = *logit;
    *out =
        (ds_request){.n_tok = end - begin,
                     .ids = step->ids + begin,
                     .spans = p->spans + p->n_spans,
                     .logit_rows = p->rows + first_logit,
                     .logits = step->logits ? step->logits + (size_t)first_logit * (size_t)core->config.n_vocab : NULL};
    for (int i = 0; i < step->n_spans; i++) {
        const ds_span *s = &step->spans[i];
        const int from = s->first > begin ? s->first : begin, to = s->first + s->n < end ? s->first + s->n : end;
        if (from >= to) continue;
        p->spans[p->n_spans++] = (ds_span){s->kv, from - begin, to - from, s->pos + from - s->first};
        out->n_spans++;
    }
    for (; *logit < step->n_logits && step->logit_rows[*logit] < end; ++*logit)
        p->rows[*logit] = step->logit_rows[*logit] - begin;
    out->n_logits = *logit - first_logit;
}

/* One layer of a piece whose stream is x (n_tok, n_embd). */
static ds_status run_layer(ds_core *core, const ds_request *piece, float *x, int il, ds_error *err) {
    ds_request r = *piece;
    if (il > core->weights.layer_begin) r.ids = NULL, r.x = x;
    if (il + 1 < core->weights.layer_end) r.x_out = x;
    const ds_status st = ds_core_run_layers(core, &r, il, il + 1, err);
    if (st == DS_OK && ds_residency_stops(core->residency)) return ds_fail(err, DS_ESTOPPED, "stopped in a long step");
    return st;
}

ds_status ds_core_run_pieces(ds_core *core, const ds_request *step, ds_error *err) {
    pieces p = {0};
    int logit = 0;
    ds_status st = DS_OK;
    carve(&p, &core->config, step, NULL);
    if (!(p.memory = ds_pages_new(p.bytes)))
        return ds_fail(err, DS_ENOMEM, "no memory for a step of %d tokens (%.1f MiB)", step->n_tok,
                       (double)p.bytes / (1 << 20));
    carve(&p, &core->config, step, p.memory);
    for (int i = 0; i < p.n; i++) {
        const int begin = i * step->piece, left = step->n_tok - begin,
                  end = begin + (left < step->piece ? left : step->piece);
        cut(&p, core, step, begin, end, &logit, &p.requests[i]);
    }
    atomic_store(&core->n_run, 0);
    atomic_store(&core->n_runs, p.n * (core->weights.layer_end - core->weights.layer_begin));
    for (int il = core->weights.layer_begin; il < core->weights.layer_end; il++)
        for (int i = 0; i < p.n && st == DS_OK; i++) {
            st = run_layer(core, &p.requests[i], p.x + (size_t)i * (size_t)step->piece * (size_t)core->config.n_embd,
                           il, err);
            atomic_fetch_add(&core->n_run, 1);
        }
    atomic_store(&core->n_runs, 0);
    ds_pages_release(p.memory, p.bytes);
    return st;
}
