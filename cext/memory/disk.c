/* disk.c: what is read next. A layer's plan begins the reads of what is missing, in the plan's order, which is the file's;
 * behind them come experts that a layer to come may need. Of both there are only so many slots at a time: a prompt that
 * goes through all experts of a layer leaves the others' slots alone, and takes those that it has computed again. Where it
 * goes through a layer in pieces, what came for the first is kept for the others, as far as its share of slots goes. */
#include "memory/disk.h"

#include <stdlib.h>
#include <string.h>

#include "memory/readers.h"
#include "memory/slots.h"

enum { MOST_STREAMED = 32, SHARE_STREAMED = 4 /* of a pool's slots, one in so many at most */ };

static const double LEAST_TRUST = 0.4, TRUST_RATE = 0.01; /* of forecasts in decoding: how many are right */

typedef struct ahead {
    int il, e;
} ahead;

typedef struct disk {
    ds_residency head;
    const ds_gguf *gguf;
    ds_budget budget;
    ds_readers readers; /* their lock is for all below */
    bool reads; /* the readers were started */
    ds_slots slots;
    int *queue, n_queue, n_urgent; /* slots of which a piece is not begun: the begun layer's, then others */
    int *missing, n_missing, at_missing; /* experts of the layer begun that have had no slot yet, from at_missing on */
    ahead *aheads;
    int n_ahead, at_ahead; /* the same of layers to come */
    int n_tok, n_pieces; /* of the step */
    int open, last, piece; /* the layer begun or -1; the same or, between layers, the one before; which piece of it */
    int n_streamed, n_taken_ahead, n_kept; /* slots */
    bool *told; /* (layers, n_expert) by the last forecast */
    bool *told_layer; /* (layers) */
    double trust;
    ds_error failure; /* of the last slot that failed, or of a wait */
    bool broken; /* a wait of the layer begun has failed: what its backend holds is let go at the end, and not before */
    ds_residency_counts counts[2]; /* decoding, reading */
    ds_residency_counts *now; /* of the step under way */
} disk;

/* When this thread last asked whether it is to stop. Each by itself: only one of them may be the one that hears it. */
static _Thread_local int64_t looked;

/* ---- The queue ---- */

static void unqueue(disk *d, const ds_slot *slot) {
    const int index = (int)(slot - d->slots.slots);
    for (int i = 0; i < d->n_queue; i++) {
        if (d->queue[i] != index) continue;
        memmove(d->queue + i, d->queue + i + 1, (size_t)(--d->n_queue - i) * sizeof *d->queue);
        if (i < d->n_urgent) d->n_urgent--;
        return;
    }
}

static void enqueue(disk *d, const ds_slot *slot, bool urgent) {
    const int at = urgent ? d->n_urgent++ : d->n_queue;
    memmove(d->queue + at + 1, d->queue + at, (size_t)(d->n_queue++ - at) * sizeof *d->queue);
    d->queue[at] = (int)(slot - d->slots.slots);
}

static void break_promise(disk *d, ds_slot *slot) {
    d->n_taken_ahead -= slot->ahead;
    slot->promised = slot->ahead = false;
}

static void drop(disk *d, ds_slot *slot) {
    unqueue(d, slot);
    break_promise(d, slot);
    d->n_kept -= slot->kept;
    ds_slots_drop(&d->slots, slot);
}

/* A slot that is to hold expert e, in the queue; NULL where none is to be had. */
static ds_slot *claim(disk *d, int il, int e, bool urgent) {
    ds_slot *slot = ds_slots_victim(&d->slots, il, d->last < 0 ? il : d->last, urgent);
    if (!slot) return NULL;
    drop(d, slot);
    ds_slots_give(&d->slots, slot, il, e);
    enqueue(d, slot, urgent);
    return slot;
}

static int most_kept(const disk *d, int il) { return ds_slots_pool(&d->slots, il)->n / SHARE_STREAMED; }

static int most_streamed(const disk *d, int il) {
    const int share = most_kept(d, il);
    return share < 1 ? 1 : share < MOST_STREAMED ? share : MOST_STREAMED;
}

/* A read ahead that nobody needs costs what it takes of the drive from one that somebody does. */
static bool is_trusted(const disk *d) { return d->now == &d->counts[1] || d->trust >= LEAST_TRUST; }

/* Give slots to what is missing, and then to what may be needed. */
static void pump(disk *d) {
    ds_slot *slot;
    while (d->at_missing < d->n_missing && d->n_streamed < most_streamed(d, d->open)) {
        if (!(slot = claim(d, d->open, d->missing[d->at_missing], true))) break;
        slot->held = slot->streamed = true;
        d->n_streamed++;
        d->at_missing++;
    }
    while (d->at_missing == d->n_missing && d->at_ahead < d->n_ahead) {
        const ahead *a = &d->aheads[d->at_ahead];
        if (!(slot = ds_slots_find(&d->slots, a->il, a->e))) {
            if (!is_trusted(d) || d->n_taken_ahead >= most_streamed(d, a->il) || !(slot = claim(d, a->il, a->e, false)))
                break;
            slot->ahead = true;
            d->n_taken_ahead++;
        }
        slot->promised = true;
        d->at_ahead++;
    }
    if (d->n_queue) ds_signal_send(&d->readers.work);
}

static bool next_read(void *ctx, ds_read *out) {
    disk *d = ctx;
    if (!d->n_queue) return false;
    ds_slot *slot = &d->slots.slots[d->queue[0]];
    const int piece = slot->n_begun++;
    const ds_expert x = ds_residency_bound(d->head.weights, slot->il, slot->e);
    const ds_mat *m = ds_expert_piece(&x, piece);
    *out = (ds_read){.n = ds_piece_bytes(m), .room = ds_slots_room(&d->slots, slot, piece), .tag = d->queue[0]};
    ds_gguf_locate(d->gguf, m->data, out->n, &out->from); /* all can be: asked when it was opened */
    if (slot->n_begun == DS_PIECES) {
        slot->state = DS_SLOT_READING;
        unqueue(d, slot);
    }
    return true;
}

static void done_read(void *ctx, const ds_read *read, const ds_error *err) {
    disk *d = ctx;
    ds_slot *slot = &d->slots.slots[read->tag];
    d->now->bytes_read += read->n;
    slot->n_left--;
    if (err && !slot->failed) {
        d->failure = *err;
        slot->failed = true;
        unqueue(d, slot);
        slot->n_left -= DS_PIECES - slot->n_begun; /* those will not be begun */
        slot->n_begun = DS_PIECES;
        slot->state = DS_SLOT_READING;
    }
    if (slot->n_left) return;
    slot->state = slot->failed ? DS_SLOT_FAILED : DS_SLOT_READY;
    if (slot->state == DS_SLOT_FAILED && !slot->held) drop(d, slot); /* a forecast: who needs it reads it again */
    pump(d);
}

/* ---- The residency ---- */

/* Nothing waits for another piece any more. */
static void keep_none(disk *d) {
    for (int i = 0; i < d->slots.n && d->n_kept; i++) {
        d->n_kept -= d->slots.slots[i].kept;
        d->slots.slots[i].kept = false;
    }
}

static void let_go(disk *d, ds_slot *slot) {
    slot->held = false;
    if (slot->state == DS_SLOT_READY && !slot->kept && d->piece + 1 < d->n_pieces &&
        d->n_kept < most_kept(d, slot->il)) {
        slot->kept = true;
        d->n_kept++;
    }
    d->n_streamed -= slot->streamed;
    slot->streamed = false;
    if (slot->state == DS_SLOT_FAILED || (slot->state == DS_SLOT_WAITING && !slot->n_begun)) drop(d, slot);
    else if (slot->state == DS_SLOT_WAITING) { /* half begun: it ends as a read that nobody is in a hurry for */
        unqueue(d, slot);
        enqueue(d, slot, false);
    }
}

static void step(ds_residency *r, int n_tok, int n_pieces) {
    disk *d = (disk *)r;
    ds_lock_take(&d->readers.lock);
    ds_slots_step(&d->slots, n_tok);
    keep_none(d); /* of a step that failed */
    d->n_tok = n_tok, d->n_pieces = n_pieces;
    d->last = -1;
    d->now = &d->counts[n_tok > DS_DECODED_TOKENS];
    d->now->n_tokens += (uint64_t)n_tok;
    ds_lock_give(&d->readers.lock);
}

/* What was told of the layer is over: count how much of it was right, and keep no promise that nobody needs. */
static void end_forecast(disk *d, int il, const ds_plan *plan) {
    const size_t row = ds_slots_at(&d->slots, il, 0);
    if (d->told_layer[il - d->head.weights->layer_begin]) {
        int told = 0, right = 0;
        for (int e = 0; e < d->head.n_expert; e++) told += d->told[row + (size_t)e];
        for (int a = 0; a < plan->n_active; a++) right += d->told[row + (size_t)plan->expert[a]];
        d->now->told += (uint64_t)told, d->now->right += (uint64_t)right;
        d->now->needed_told += (uint64_t)plan->n_active;
        if (told && d->now == &d->counts[0]) d->trust += TRUST_RATE * ((double)right / told - d->trust);
    }
    d->told_layer[il - d->head.weights->layer_begin] = false;
    d->n_ahead = d->at_ahead = 0;
    for (int e = 0; e < d->head.n_expert; e++) {
        ds_slot *slot = ds_slots_find(&d->slots, il, e);
        if (!slot) continue;
        break_promise(d, slot);
        if (!slot->held && slot->state == DS_SLOT_WAITING && !slot->n_begun) drop(d, slot);
    }
}

/* Hold what the plan needs; what has no slot is missing. */
static void hold(disk *d, int il, const ds_plan *plan) {
    d->n_missing = d->at_missing = 0;
    for (int a = 0; a < plan->n_active; a++) {
        ds_slot *slot = ds_slots_find(&d->slots, il, plan->expert[a]);
        if (slot && slot->state == DS_SLOT_FAILED) drop(d, slot), slot = NULL;
        if (!slot) {
            d->missing[d->n_missing++] = plan->expert[a];
            continue;
        }
        slot->held = true;
        if (slot->state == DS_SLOT_READY) d->now->ready++;
        else d->now->late++;
        if (slot->state == DS_SLOT_WAITING) { /* in a hurry now */
            unqueue(d, slot);
            enqueue(d, slot, true);
        }
    }
    d->now->needed += (uint64_t)plan->n_active;
}

static ds_status begin(ds_residency *r, int il, const ds_plan *plan, ds_error *err) {
    disk *d = (disk *)r;
    ds_lock_take(&d->readers.lock);
    d->piece = il == d->last ? d->piece + 1 : 0;
    if (!d->piece) keep_none(d);
    d->open = d->last = il;
    d->broken = false;
    for (int a = 0; a < plan->n_active; a++) ds_slots_use(&d->slots, il, plan->expert[a], plan->count[a], d->n_tok);
    hold(d, il, plan);
    if (!d->piece) end_forecast(d, il, plan);
    pump(d);
    ds_lock_give(&d->readers.lock);
    return DS_OK;
}

static bool is_ready(const disk *d, int il, int e) {
    const ds_slot *slot = ds_slots_find(&d->slots, il, e);
    return slot && slot->state == DS_SLOT_READY;
}

static bool ready(ds_residency *r, int il, int e) {
    disk *d = (disk *)r;
    ds_lock_take(&d->readers.lock);
    const bool is = is_ready(d, il, e);
    ds_lock_give(&d->readers.lock);
    return is;
}

static ds_status look(const disk *d, int il, const int *experts, int n, bool *found, ds_error *err) {
    if (d->broken) return *err = d->failure, err->status;
    for (int i = 0; i < n; i++) {
        const ds_slot *slot = ds_slots_find(&d->slots, il, experts[i]);
        if (!slot) continue;
        if (slot->state == DS_SLOT_FAILED) return *err = d->failure, err->status;
        if (slot->state == DS_SLOT_READY) *found = true;
    }
    return DS_OK;
}

static ds_status wait_for(ds_residency *r, int il, const int *experts, int n, ds_error *err) {
    disk *d = (disk *)r;
    const int64_t begun = ds_now_ns();
    bool found = false;
    ds_status st;
    ds_lock_take(&d->readers.lock);
    while ((st = look(d, il, experts, n, &found, err)) == DS_OK && !found) {
        ds_signal_wait_for(&d->readers.news, &d->readers.lock, DS_STOP_LOOK_NS);
        if (ds_now_ns() - looked < DS_STOP_LOOK_NS) continue;
        looked = ds_now_ns();
        ds_lock_give(&d->readers.lock); /* whoever is asked may take its time */
        const bool stops = ds_budget_stops(&d->budget);
        ds_lock_take(&d->readers.lock);
        if (stops) {
            st = ds_fail(err, DS_ESTOPPED, "stopped while it waited for the drive");
            break;
        }
    }
    d->now->wait_ns += (uint64_t)(ds_now_ns() - begun);
    if (st != DS_OK) {
        d->failure = *err, d->broken = true;
        ds_signal_send(&d->readers.news); /* another backend may wait too */
    }
    ds_lock_give(&d->readers.lock);
    return st;
}

static bool stops(ds_residency *r) { return ds_budget_stops(&((const disk *)r)->budget); }

static ds_expert get(const ds_residency *r, int il, int e) {
    const disk *d = (const disk *)r;
    ds_expert x = ds_residency_bound(r->weights, il, e);
    ds_mat *const pieces[DS_PIECES] = {&x.gate, &x.up, &x.down};
    const ds_slot *slot = ds_slots_find(&d->slots, il, e);
    for (int i = 0; i < DS_PIECES; i++) {
        ds_gguf_place place = {0};
        ds_gguf_locate(d->gguf, pieces[i]->data, ds_piece_bytes(pieces[i]), &place);
        pieces[i]->data = ds_read_data(ds_slots_room(&d->slots, slot, i), &place);
    }
    return x;
}

static void release(ds_residency *r, int il, const int *experts, int n) {
    disk *d = (disk *)r;
    ds_lock_take(&d->readers.lock);
    for (int i = 0; i < n; i++) {
        ds_slot *slot = ds_slots_find(&d->slots, il, experts[i]);
        if (slot) let_go(d, slot);
    }
    pump(d);
    ds_lock_give(&d->readers.lock);
}

static void end(ds_residency *r, int il) {
    disk *d = (disk *)r;
    ds_lock_take(&d->readers.lock);
    d->n_missing = d->at_missing = 0;
    for (int e = 0; e < r->n_expert; e++) {
        ds_slot *slot = ds_slots_find(&d->slots, il, e);
        if (slot && slot->held) let_go(d, slot);
    }
    d->open = -1;
    pump(d);
    ds_lock_give(&d->readers.lock);
}

static void forecast(ds_residency *r, int il, const int *experts, int n) {
    disk *d = (disk *)r;
    ds_lock_take(&d->readers.lock);
    if (d->piece) return ds_lock_give(&d->readers.lock); /* told with the first, for all */
    bool *told = d->told + ds_slots_at(&d->slots, il, 0);
    memset(told, 0, (size_t)r->n_expert * sizeof *told);
    for (int i = 0; i < n; i++) told[experts[i]] = true;
    d->told_layer[il - r->weights->layer_begin] = true;
    for (int e = 0; e < r->n_expert; e++) { /* an older forecast's */
        ds_slot *slot = told[e] ? NULL : ds_slots_find(&d->slots, il, e);
        if (!slot) continue;
        break_promise(d, slot);
        if (slot->state == DS_SLOT_WAITING && !slot->n_begun) drop(d, slot);
    }
    for (int i = 0; i < n; i++) d->aheads[d->n_ahead++] = (ahead){il, experts[i]};
    pump(d);
    ds_lock_give(&d->readers.lock);
}

static void count(ds_residency *r, ds_residency_counts *decoding, ds_residency_counts *reading) {
    disk *d = (disk *)r;
    ds_lock_take(&d->readers.lock);
    *decoding = d->counts[0];
    *reading = d->counts[1];
    ds_lock_give(&d->readers.lock);
}

static void destroy(ds_residency *r) {
    disk *d = (disk *)r;
    if (d->reads) ds_readers_stop(&d->readers);
    ds_slots_release(&d->slots);
    free(d->queue);
    free(d->missing);
    free(d->aheads);
    free(d->told);
    free(d->told_layer);
}

static const ds_residency_ops DISK = {.step = step,
                                      .begin = begin,
                                      .ready = ready,
                                      .wait = wait_for,
                                      .stops = stops,
                                      .get = get,
                                      .release = release,
                                      .end = end,
                                      .forecast = forecast,
                                      .count = count,
                                      .destroy = destroy};

/* Whether every expert lies in a file. */
static ds_status check_places(const disk *d, const ds_config *c, ds_error *err) {
    const ds_weights *w = d->head.weights;
    for (int il = c->n_layer_dense > w->layer_begin ? c->n_layer_dense : w->layer_begin; il < w->layer_end; il++) {
        const ds_expert x = ds_residency_bound(w, il, c->n_expert - 1);
        for (int i = 0; i < DS_PIECES; i++) {
            const ds_mat *m = ds_expert_piece(&x, i);
            ds_gguf_place place;
            if (!ds_gguf_locate(d->gguf, m->data, ds_piece_bytes(m), &place))
                return ds_fail(err, DS_EINVAL, "%s: the experts of layer %d are not in the file",
                               ds_gguf_label(d->gguf), il);
        }
    }
    return DS_OK;
}

ds_status ds_residency_disk(const ds_config *config, const ds_weights *weights, const ds_gguf *gguf, size_t bytes,
                            bool cached, const ds_budget *budget, ds_residency **out, ds_error *err) {
    const size_t n_layer = (size_t)(weights->layer_end - weights->layer_begin), n_expert = (size_t)config->n_expert;
    disk *d = calloc(1, sizeof *d);
    if (!d) return ds_fail(err, DS_ENOMEM, "no memory for a residency");
    ds_status st = ds_residency_init(config, weights, &DISK, &d->head, err);
    if (st != DS_OK) return free(d), st;
    d->gguf = gguf;
    d->budget = *budget;
    d->budget.uses = NULL; /* the caller's own until this returns */
    d->open = d->last = -1;
    d->now = &d->counts[0];
    d->n_tok = d->n_pieces = 1;
    d->trust = 1;
    if ((st = check_places(d, config, err)) == DS_OK)
        st = ds_slots_create(config, weights, bytes, budget->uses, &d->slots, err);
    if (st == DS_OK) st = ds_slots_fill(&d->slots, err);
    if (st == DS_OK) {
        d->queue = calloc((size_t)d->slots.n + 1, sizeof *d->queue);
        d->missing = calloc(n_expert + 1, sizeof *d->missing);
        d->aheads = calloc(n_layer * n_expert + 1, sizeof *d->aheads);
        d->told = calloc(n_layer * n_expert + 1, sizeof *d->told);
        d->told_layer = calloc(n_layer + 1, sizeof *d->told_layer);
        if (!d->queue || !d->missing || !d->aheads || !d->told || !d->told_layer)
            st = ds_fail(err, DS_ENOMEM, "no memory for %d slots", d->slots.n);
    }
    const ds_readers_client client = {next_read, done_read, d};
    if (st == DS_OK) st = ds_readers_start(&d->readers, client, ds_gguf_label(gguf), cached, err);
    d->reads = st == DS_OK;
    if (st == DS_OK) *out = &d->head;
    else ds_residency_destroy(&d->head);
    return st;
}
