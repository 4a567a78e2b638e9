/* forward.c: a step through the model, read first. Embedding, blocks, final norm, head, as the program of operations
 * that core.c hands to the backends. Where one backend does it all, that is one run without a stop. */
#include "model/core.h"

/* A program being written. */
typedef struct writer {
    ds_core *core;
    const ds_request *whole, *tail;
    bool in_tail;    /* only the tail goes on */
    int at;          /* the backend that holds the residual stream */
    uint32_t placed; /* bit i: backend i knows where the tokens stand */
} writer;

static void add(writer *w, ds_op op) {
    op.tail = w->in_tail;
    w->core->program[w->core->n_ops++] = op;
}

static void add_at(writer *w, ds_op_kind kind, int il) { add(w, (ds_op){.kind = kind, .backend = w->at, .il = il}); }

static void add_host(writer *w, int kind, int il) {
    add(w, (ds_op){.kind = (ds_op_kind)kind, .backend = DS_HOST, .il = il});
}

static void copy(writer *w, ds_op_kind kind, int backend, ds_state state, void *host) {
    add(w, (ds_op){.kind = kind, .backend = backend, .il = -1, .state = state, .host = host});
}

/* The residual stream goes on at another backend. */
static void move_to(writer *w, int backend) {
    float *x = w->core->exchange.x;
    if (w->at == backend) return;
    copy(w, DS_OP_COPY_OUT, w->at, DS_STATE_X, x);
    add_host(w, DS_OP_JOIN, -1);
    copy(w, DS_OP_COPY_IN, backend, DS_STATE_X, x);
    w->at = backend;
}

static void place(writer *w) {
    if (!(w->placed & 1u << w->at)) add_at(w, DS_OP_PLACE, -1);
    w->placed |= 1u << w->at;
}

/* From here on only the tail goes on: of the other tokens, later ones need the rows in the cache. False where nothing
 * goes on. */
static bool enter_tail(writer *w, int il) {
    add_at(w, DS_OP_REMEMBER, il);
    if (!w->tail->n_tok) return false;
    w->in_tail = true;
    w->placed = 0;
    add_at(w, DS_OP_TAIL, il);
    return true;
}

/* One backend routes and has the shared experts; some of the routed ones are computed by others at the same time. */
static void split_experts(writer *w, int il, uint32_t helpers) {
    ds_exchange *x = &w->core->exchange;
    add_at(w, DS_OP_ROUTE, il);
    copy(w, DS_OP_COPY_OUT, w->at, DS_STATE_INPUT, x->input);
    copy(w, DS_OP_COPY_OUT, w->at, DS_STATE_CHOICE, x->ids);
    add_host(w, DS_OP_PLAN, il);
    for (int b = 0; b < w->core->n_backends; b++) {
        if (!(helpers & 1u << b)) continue;
        copy(w, DS_OP_COPY_IN, b, DS_STATE_INPUT, x->input);
        add(w, (ds_op){.kind = DS_OP_EXPERTS, .backend = b, .il = il, .split = &x->split});
    }
    add(w, (ds_op){.kind = DS_OP_EXPERTS, .backend = w->at, .il = il, .shared = true, .split = &x->split});
    add_host(w, DS_OP_JOIN, il);
    add(w, (ds_op){.kind = DS_OP_COMBINE, .backend = w->at, .il = il, .shared = true, .split = &x->split});
}

/* Whether who routes a split layer computes all of it in this step. */
static bool takes_whole(const writer *w, int il) {
    const ds_backend *b = w->core->backends[w->at];
    return b->ops->takes && b->ops->takes(b, il, (w->in_tail ? w->tail : w->whole)->n_tok);
}

static void feed_forward(writer *w, int il) {
    const uint32_t helpers = w->core->places.helpers[il - w->core->weights.layer_begin];
    if (il < w->core->config.n_layer_dense) {
        add_at(w, DS_OP_DENSE, il);
    } else if (helpers && !takes_whole(w, il)) {
        split_experts(w, il, helpers);
    } else {
        add_at(w, DS_OP_ROUTE, il);
        add(w, (ds_op){.kind = DS_OP_EXPERTS, .backend = w->at, .il = il, .shared = true});
        add(w, (ds_op){.kind = DS_OP_COMBINE, .backend = w->at, .il = il, .shared = true});
    }
}

void ds_forward(ds_core *core, const ds_request *whole, const ds_request *tail, int begin, int end) {
    const ds_weights *weights = &core->weights;
    const ds_places *places = &core->places;
    writer w = {.core = core, .whole = whole, .tail = tail, .at = places->ends};
    core->n_ops = 0;
    add_at(&w, DS_OP_EMBED, -1);
    for (int il = begin; il < end; il++) {
        const int i = il - weights->layer_begin;
        if (weights->sublayer != DS_SUBLAYER_FEED_FORWARD) {
            move_to(&w, places->attention[i]);
            place(&w);
            if (tail && il + 1 == weights->layer_end) {
                if (!enter_tail(&w, il)) return;
                place(&w);
            }
            add_at(&w, DS_OP_ATTENTION, il);
        }
        move_to(&w, places->feed_forward[i]);
        if (weights->sublayer == DS_SUBLAYER_ATTENTION) add_at(&w, DS_OP_FFN_NORM, il);
        else feed_forward(&w, il);
    }
    if (whole->x_out) copy(&w, DS_OP_COPY_OUT, w.at, DS_STATE_X, whole->x_out);
    if (end < weights->layer_end || !weights->output.data) return;
    move_to(&w, places->ends);
    add_at(&w, DS_OP_HEAD, -1);
}

bool ds_forward_tail(const ds_request *request, ds_span *spans, ds_request *tail) {
    int taken = 0;
    /* A tap wants every row. */
    if (request->tap || request->x_out || request->n_logits == request->n_tok) return false;
    *tail = *request;
    tail->ids = NULL, tail->logit_rows = NULL, tail->taken = request->logit_rows;
    tail->spans = spans, tail->n_spans = 0, tail->n_tok = request->n_logits;
    for (int i = 0; i < request->n_spans; i++) {
        const ds_span *all = &request->spans[i];
        ds_span *s = &spans[tail->n_spans];
        *s = (ds_span){.kv = all->kv, .first = taken};
        while (taken < request->n_logits && request->logit_rows[taken] < all->first + all->n) {
            if (request->logit_rows[taken] < all->first) return false;
            taken++, s->n++;
        }
        s->pos = all->pos + all->n - s->n;
        if (!s->n) continue;
        if (request->logit_rows[s->first] != all->first + all->n - s->n) return false;
        tail->n_spans++;
    }
    return taken == request->n_logits;
}
