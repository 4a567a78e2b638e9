#include "backend/vulkan/ahead.h"

#include <stdlib.h>
#include <string.h>

#include "backend/vulkan/copies.h"
#include "backend/vulkan/share.h"
#include "base/os.h"

enum {
    SLOTS = 2,
    LEAST_MEAN = 4, /* tokens of an expert, from which on nearly all experts of a layer are chosen: then they are copied
                       before they are */
    WAITED_NS = 20000, /* a wait that was one: waits for what is done take less */
};

/* A layer's experts on the device, as far as they are copied. */
typedef struct slot {
    int il; /* -1: none */
    ds_gpu_buffer *chunks;
    ds_copy *copies, **all; /* (capacity), n of them in use */
    int *copy_of; /* (n_expert) or -1 */
    int n;
    uint64_t reader; /* 0, or the number of a list that was given to the copies and reads it */
} slot;

struct ds_ahead {
    ds_gpu *gpu;
    ds_facts facts;
    int number;
    ds_copying mode;
    ds_copies *copies;
    ds_share share;
    slot slots[SLOTS];
    int capacity; /* experts of a slot */
    int per_chunk, n_chunks; /* experts of a chunk, chunks of a slot */
    uint64_t expert_bytes; /* of the largest */
    int n_tok, n_tail; /* of the step */
    bool whole; /* layers of which all that may be chosen is copied are computed without the host */
    slot *read; /* of those, the last one's in this run of operations, or NULL */
    int64_t since, until; /* of the step, whose time tells of the next; since 0: not known */
    int last; /* slot that was shared last */
    bool unsettled; /* a layer was shared, and its list has not run */
    int *expert, *counts; /* (n_expert) that may be taken over */
    bool *begun;
    ds_copy **order, **awaited; /* (2 n_expert), (n_expert) */
    int n_awaited;
    uint64_t awaited_slots;
    bool measures; /* the layer under way is a prompt's: what the processor takes tells of the next */
    uint64_t seen_bytes, seen_ns; /* of the copies, when the share was told of them */
    uint64_t from_bytes, from_ns, n_copied, n_kept; /* since it was watched */
};

static uint64_t bytes_of(const ds_mat *m) { return (uint64_t)m->rows * m->row_bytes; }

static uint64_t image_bytes(const ds_expert *x) {
    return ds_gpu_padded(bytes_of(&x->gate)) + ds_gpu_padded(bytes_of(&x->up)) + ds_gpu_padded(bytes_of(&x->down));
}

/* Experts of a layer that this may take over. */
static int n_lent(const ds_ahead *a, int il) {
    const ds_facts *f = &a->facts;
    int n = 0;
    if (il < f->config->n_layer_dense || f->places->feed_forward[il - f->weights->layer_begin] != a->number) return 0;
    for (int e = 0; e < f->config->n_expert; e++) n += ds_residency_place(f->residency, il)[e] == 0;
    return n;
}

/* The first layer from il on that has some; -1: none. */
static int next_layer(const ds_ahead *a, int il) {
    for (; il < a->facts.weights->layer_end; il++)
        if (n_lent(a, il)) return il;
    return -1;
}

/* ---- Made ---- */

static void measure(ds_ahead *a) {
    for (int il = next_layer(a, a->facts.weights->layer_begin); il >= 0; il = next_layer(a, il + 1)) {
        const ds_expert x = ds_residency_bound(a->facts.weights, il, 0);
        const int n = n_lent(a, il);
        if (image_bytes(&x) > a->expert_bytes) a->expert_bytes = image_bytes(&x);
        if (n > a->capacity) a->capacity = n;
    }
    if (!a->expert_bytes || a->expert_bytes > DS_GPU_CHUNK) return;
    a->per_chunk = (int)(DS_GPU_CHUNK / a->expert_bytes);
    if (a->per_chunk > a->capacity) a->per_chunk = a->capacity;
    a->n_chunks = (a->capacity + a->per_chunk - 1) / a->per_chunk;
}

uint64_t ds_ahead_bytes(const ds_ahead *a) {
    return SLOTS * (uint64_t)a->n_chunks * (uint64_t)a->per_chunk * a->expert_bytes;
}

static ds_status make_slot(ds_ahead *a, slot *s, ds_error *err) {
    const size_t n_expert = (size_t)a->facts.config->n_expert, capacity = (size_t)a->capacity;
    ds_status st = DS_OK;
    s->il = -1;
    s->chunks = calloc((size_t)a->n_chunks, sizeof *s->chunks);
    s->copies = calloc(capacity, sizeof *s->copies);
    s->all = calloc(capacity, sizeof *s->all);
    s->copy_of = calloc(n_expert, sizeof *s->copy_of);
    if (!s->chunks || !s->copies || !s->all || !s->copy_of)
        return ds_fail(err, DS_ENOMEM, "no memory for a list of experts");
    for (size_t i = 0; i < capacity; i++) s->all[i] = &s->copies[i];
    for (int i = 0; i < a->n_chunks && st == DS_OK; i++)
        st = ds_gpu_buffer_new(a->gpu, (uint64_t)a->per_chunk * a->expert_bytes, DS_GPU_OWN, &s->chunks[i], err);
    return st;
}

static ds_status make(ds_ahead *a, ds_error *err) {
    const size_t n = (size_t)a->facts.config->n_expert;
    const int cores = ds_os_cores() / 2; /* the others keep what else there is going */
    a->expert = calloc(n, sizeof *a->expert);
    a->counts = calloc(n, sizeof *a->counts);
    a->begun = calloc(n, sizeof *a->begun);
    a->order = calloc(2 * n, sizeof *a->order);
    a->awaited = calloc(n, sizeof *a->awaited);
    if (!a->expert || !a->counts || !a->begun || !a->order || !a->awaited)
        return ds_fail(err, DS_ENOMEM, "no memory for a list of experts");
    ds_status st = DS_OK;
    for (int i = 0; i < SLOTS && st == DS_OK; i++) st = make_slot(a, &a->slots[i], err);
    if (st != DS_OK) return st;
    return ds_copies_create(a->gpu,
                            cores < 1                 ? 1
                            : cores > DS_COPY_THREADS ? DS_COPY_THREADS
                                                      : cores,
                            DS_COPY_PIECE, &a->copies, err);
}

ds_status ds_ahead_create(ds_gpu *gpu, const ds_facts *facts, int number, uint64_t room, ds_copying mode,
                          ds_ahead **out, ds_error *err) {
    ds_status st = DS_OK;
    *out = NULL;
    if (mode == DS_COPY_NEVER || !ds_residency_is_settled(facts->residency)) return DS_OK;
    ds_ahead *a = calloc(1, sizeof *a);
    if (!a) return ds_fail(err, DS_ENOMEM, "no memory for copies to a GPU");
    a->gpu = gpu, a->facts = *facts, a->number = number, a->mode = mode;
    measure(a);
    if (a->n_chunks && ds_ahead_bytes(a) <= room) st = make(a, err);
    if (a->copies) return *out = a, DS_OK;
    ds_ahead_destroy(a);
    return st == DS_ENOMEM ? DS_OK : st; /* no room: the processor computes them, as without */
}

void ds_ahead_destroy(ds_ahead *a) {
    if (!a) return;
    if (a->copies) ds_copies_destroy(a->copies);
    for (int i = 0; i < SLOTS; i++) {
        slot *s = &a->slots[i];
        for (int k = 0; s->chunks && k < a->n_chunks; k++) ds_gpu_buffer_release(a->gpu, &s->chunks[k]);
        free(s->chunks);
        free(s->copies);
        free(s->all);
        free(s->copy_of);
    }
    free(a->expert);
    free(a->counts);
    free(a->begun);
    free(a->order);
    free(a->awaited);
    free(a);
}

/* ---- Slots ---- */

/* What is copied into it goes behind the list that reads what it holds. */
static void assign(ds_ahead *a, slot *s, int il) {
    if (s->il == il) return;
    if (s->n) ds_copies_settle(a->copies, s->all, s->n); /* what was copied for nothing is under way as yet, maybe */
    memset(s->copies, 0, (size_t)a->capacity * sizeof *s->copies);
    for (int e = 0; e < a->facts.config->n_expert; e++) s->copy_of[e] = -1;
    s->n = 0;
    s->il = il;
}

/* The slot that a layer has, or is to have: not the one that was shared last, which may be the layer's before. */
static slot *slot_for(ds_ahead *a, int il) {
    for (int i = 0; i < SLOTS; i++)
        if (a->slots[i].il == il) return &a->slots[i];
    return &a->slots[a->last ^ 1];
}

/* The copy of an expert, made where there is none. */
static ds_copy *copy_for(ds_ahead *a, slot *s, int e) {
    if (s->copy_of[e] >= 0) return &s->copies[s->copy_of[e]];
    const ds_expert x = ds_residency_bound(a->facts.weights, s->il, e);
    const ds_mat *m[DS_COPY_PARTS] = {&x.gate, &x.up, &x.down};
    ds_copy *c = &s->copies[s->n];
    c->to = &s->chunks[s->n / a->per_chunk];
    c->to_at = (uint64_t)(s->n % a->per_chunk) * a->expert_bytes;
    for (int i = 0; i < DS_COPY_PARTS; i++) {
        c->from[i] = m[i]->data, c->at[i] = c->bytes, c->part_bytes[i] = bytes_of(m[i]);
        c->bytes += ds_gpu_padded(c->part_bytes[i]);
    }
    c->bytes = c->at[DS_COPY_PARTS - 1] + c->part_bytes[DS_COPY_PARTS - 1];
    c->gate = s->reader;
    s->copy_of[e] = s->n++;
    return c;
}

ds_gpu_expert ds_ahead_expert(const ds_ahead *a, int il, int e) {
    const slot *s = a->slots[0].il == il ? &a->slots[0] : &a->slots[1];
    const ds_copy *c = &s->copies[s->copy_of[e]];
    const uint64_t at = c->to->address + c->to_at;
    return (ds_gpu_expert){at + c->at[0], at + c->at[1], at + c->at[2]};
}

/* ---- Which ---- */

/* Tokens of an expert, where all are chosen alike. */
static int mean_of(const ds_ahead *a, int n_tok) {
    const ds_config *c = a->facts.config;
    return (int)((int64_t)n_tok * c->n_expert_used / c->n_expert);
}

/* Whether nearly all experts of a layer are chosen. */
static bool chooses_all(const ds_ahead *a, int n_tok) {
    return n_tok > DS_DECODED_TOKENS && mean_of(a, n_tok) >= LEAST_MEAN;
}

/* How many of n experts of a layer are worth copying before its router chooses, for a step of n_tok tokens. */
static int worth_copying(ds_ahead *a, int n, int n_tok) {
    const int mean = mean_of(a, n_tok);
    if (!chooses_all(a, n_tok)) return 0;
    if (a->whole || a->mode == DS_COPY_ALWAYS) return n;
    for (int i = 0; i < n; i++) a->counts[i] = mean;
    if (!ds_share_choose(&a->share, a->counts, n, a->expert_bytes, 0, 0)) return 0;
    return ds_share_choose(&a->share, a->counts, n, 0, 0, 0); /* the link has time until then */
}

/* Put a layer's most used experts to the order, in a slot that has nothing else to do. */
static int order_layer(ds_ahead *a, int il, int n_ordered) {
    const int n_expert = a->facts.config->n_expert;
    const uint8_t *place = ds_residency_place(a->facts.residency, il);
    const uint64_t *uses = ds_residency_uses(a->facts.residency, il);
    const bool is_cut = a->n_tail && il + 1 == a->facts.weights->layer_end;
    const int most = worth_copying(a, n_lent(a, il), is_cut ? a->n_tail : a->n_tok);
    int n = 0;
    if (!most) return n_ordered;
    slot *s = slot_for(a, il);
    assign(a, s, il);
    for (int e = 0, at; e < n_expert; e++) {
        if (place[e] != 0) continue;
        for (at = n++; at && uses[a->expert[at - 1]] < uses[e]; at--) a->expert[at] = a->expert[at - 1];
        a->expert[at] = e;
    }
    for (int i = 0; i < most; i++) a->order[n_ordered++] = copy_for(a, s, a->expert[i]);
    return n_ordered;
}

/* After a step that ended where it should not nothing in the slots counts. */
static void forget(ds_ahead *a) {
    ds_copies_reset(a->copies);
    for (int i = 0; i < SLOTS; i++) a->slots[i].il = -1, a->slots[i].n = 0;
    a->unsettled = a->measures = false;
    a->n_awaited = 0;
    a->since = 0;
}

/* Whether all experts of the step's layers are copied, however they are chosen: then no layer waits for the host. */
static bool takes_whole(ds_ahead *a, int n_tok) {
    const ds_facts *f = &a->facts;
    const int il = next_layer(a, f->weights->layer_begin), n = il < 0 ? 0 : n_lent(a, il);
    if (!n || !chooses_all(a, n_tok)) return false;
    return a->mode == DS_COPY_ALWAYS ||
           ds_share_whole(&a->share, n_tok, n, (uint64_t)n_tok * (uint64_t)f->config->n_expert_used, a->expert_bytes);
}

/* What the step before took. */
static void tell_step(ds_ahead *a) {
    if (a->since && a->until > a->since && chooses_all(a, a->n_tok))
        ds_share_step(&a->share, a->n_tok, a->whole, (uint64_t)(a->until - a->since));
    if (a->whole) ds_copies_told(a->copies, &a->seen_bytes, &a->seen_ns); /* copies that waited for lists */
    a->since = 0;
}

void ds_ahead_begin(ds_ahead *a, const ds_request *whole, const ds_request *tail) {
    if (a->unsettled) forget(a);
    tell_step(a);
    a->n_tok = whole->n_tok;
    a->n_tail = tail ? tail->n_tok : 0;
    a->read = NULL;
    a->whole = takes_whole(a, whole->n_tok);
    if (whole->n_tok <= DS_DECODED_TOKENS) return;
    if (whole->ids && !whole->x_out) a->since = ds_now_ns(); /* parts of a step have others between */
    if (a->whole)
        ds_copies_drop(a->copies, NULL, 0, NULL); /* another step's, which may be of a slot that a layer gets */
    const int il = next_layer(a, a->facts.weights->layer_begin);
    if (il < 0 || !whole->ids) return; /* a piece's later layer: what comes next was ordered */
    ds_copies_drop(a->copies, NULL, 0, NULL);
    ds_copies_order(a->copies, a->order, order_layer(a, il, 0));
}

/* Experts of the plan that are the processor's: those whose copies are begun first, the others by falling counts. Returns
 * how many are begun; *n: of all. */
static int sort_out(ds_ahead *a, slot *s, const ds_plan *plan, const uint8_t *owner, int *n, uint64_t *under_way) {
    int n_begun = 0, n_all = 0, n_known = 0;
    for (int i = 0; i < s->n; i++) a->begun[i] = false;
    *under_way = ds_copies_drop(a->copies, s->all, s->n, a->begun);
    for (int pass = 0; pass < 2; pass++)
        for (int i = 0, at; i < plan->n_active; i++) {
            const int e = plan->expert[i], k = s->copy_of[e];
            if (owner[e] != 0 || (k >= 0 && a->begun[k]) != (pass == 0)) continue;
            for (at = n_all++; at > n_known && a->counts[at - 1] < plan->count[i]; at--)
                a->expert[at] = a->expert[at - 1], a->counts[at] = a->counts[at - 1];
            a->expert[at] = e, a->counts[at] = plan->count[i];
            if (pass == 0) n_begun = n_known = n_all;
        }
    *n = n_all;
    return n_begun;
}

static void tell_share(ds_ahead *a) {
    uint64_t bytes, ns;
    ds_copies_told(a->copies, &bytes, &ns);
    if (bytes - a->seen_bytes < a->expert_bytes) return;
    ds_share_copied(&a->share, bytes - a->seen_bytes, ns - a->seen_ns);
    a->seen_bytes = bytes, a->seen_ns = ns;
}

void ds_ahead_share(ds_ahead *a, int il, const ds_plan *plan, uint8_t *owner) {
    const int last = plan->n_active - 1, n_used = a->facts.config->n_expert_used;
    const int n_tok = last < 0 ? 0 : (plan->first[last] + plan->count[last]) / n_used;
    uint64_t under_way = 0;
    int n = 0, n_ordered = 0;
    a->n_awaited = 0, a->awaited_slots = 0;
    a->measures = n_tok > DS_DECODED_TOKENS && n_lent(a, il);
    if (!a->measures) return;
    ds_copies_drop(a->copies, NULL, 0, NULL); /* what another step ordered may be of the slot that this layer gets */
    slot *s = slot_for(a, il);
    assign(a, s, il);
    a->last = (int)(s - a->slots);
    tell_share(a);
    const int n_begun = sort_out(a, s, plan, owner, &n, &under_way);
    for (int i = 0; i < n_begun; i++) a->awaited_slots += (uint64_t)a->counts[i];
    const int more = a->mode == DS_COPY_ALWAYS ? n - n_begun
                                               : ds_share_choose(&a->share, a->counts + n_begun, n - n_begun,
                                                                 a->expert_bytes, under_way, a->awaited_slots);
    ds_share_chosen(&a->share, n_begun + more > 0, n_begun + more < n);
    for (int i = 0; i < n_begun + more; i++) {
        owner[a->expert[i]] = (uint8_t)a->number;
        a->awaited[a->n_awaited++] = copy_for(a, s, a->expert[i]);
        if (i < n_begun) continue;
        a->awaited_slots += (uint64_t)a->counts[i];
        a->order[n_ordered++] = a->awaited[i];
    }
    a->n_copied += (uint64_t)a->n_awaited, a->n_kept += (uint64_t)(n - a->n_awaited);
    const int next = next_layer(a, il + 1);
    if (next >= 0) n_ordered = order_layer(a, next, n_ordered);
    ds_copies_order(a->copies, a->order, n_ordered);
    a->unsettled = a->n_awaited > 0;
}

bool ds_ahead_takes(const ds_ahead *a, int il, int n_tok) {
    const uint8_t *place = ds_residency_place(a->facts.residency, il);
    if (!a->whole || !chooses_all(a, n_tok) || !n_lent(a, il)) return false;
    for (int e = 0; e < a->facts.config->n_expert; e++)
        if (place[e] != 0 && place[e] != a->number) return false;
    return true;
}

/* Copy all of a layer's that are not there or on their way. */
static void order_all(ds_ahead *a, int il) { ds_copies_order(a->copies, a->order, order_layer(a, il, 0)); }

void ds_ahead_take(ds_ahead *a, int il) {
    slot *s = slot_for(a, il);
    order_all(a, il);
    a->last = (int)(s - a->slots);
    a->read = s;
    a->n_copied += (uint64_t)s->n;
    a->awaited_slots = 0;
}

uint64_t ds_ahead_then(ds_ahead *a, ds_gpu_script *list, bool more) {
    slot *s = a->read;
    const uint64_t number = ds_copies_then(a->copies, s ? s->all : NULL, s ? s->n : 0, list, more);
    a->unsettled = true;
    if (!s) return number;
    s->reader = number;
    a->read = NULL;
    const int next = next_layer(a, s->il + 1);
    if (next >= 0) order_all(a, next);
    return number;
}

bool ds_ahead_submit(ds_ahead *a, ds_gpu_script *list) {
    if (a->read) return ds_ahead_then(a, list, false), true;
    if (!a->n_awaited) return false;
    ds_copies_then(a->copies, a->awaited, a->n_awaited, list, false);
    a->n_awaited = 0;
    return true;
}

ds_status ds_ahead_wait(ds_ahead *a, ds_error *err) {
    int64_t submitted = 0;
    ds_error other;
    ds_status st = ds_copies_submitted(a->copies, &submitted, err);
    const int64_t begin = ds_now_ns();
    const ds_status run = ds_gpu_wait(a->gpu, st == DS_OK ? err : &other);
    if (st == DS_OK) st = run;
    if (st != DS_OK) return forget(a), st;
    const int64_t end = ds_now_ns();
    ds_share_device(&a->share, a->awaited_slots, (uint64_t)(end - submitted), end - begin > WAITED_NS);
    a->unsettled = false;
    return DS_OK;
}

ds_status ds_ahead_reached(ds_ahead *a, uint64_t number, ds_error *err) {
    return ds_copies_reached(a->copies, number, err);
}

void ds_ahead_abandon(ds_ahead *a) {
    if (a->unsettled) forget(a);
}

void ds_ahead_ended(ds_ahead *a) { a->until = ds_now_ns(); }

void ds_ahead_measure(ds_ahead *a, const ds_split *split) {
    uint64_t n_experts = 0, n_slots = 0;
    if (!a->measures) return;
    for (int i = 0; i < split->plan.n_active; i++)
        if (split->owner[split->plan.expert[i]] == 0) n_experts++, n_slots += (uint64_t)split->plan.count[i];
    ds_share_processor(&a->share, n_experts, n_slots, (uint64_t)split->processor_ns);
}

/* ---- Told ---- */

void ds_ahead_watch(ds_ahead *a) {
    ds_copies_told(a->copies, &a->from_bytes, &a->from_ns);
    a->n_copied = a->n_kept = 0;
}

void ds_ahead_watched(const ds_ahead *a, ds_work *work) {
    ds_copies_told(a->copies, &work->copied_bytes, &work->copy_ns);
    work->copied_bytes -= a->from_bytes, work->copy_ns -= a->from_ns;
    work->copied_experts = a->n_copied, work->kept_experts = a->n_kept;
    work->slot_bytes = ds_ahead_bytes(a);
    work->crossing = ds_share_crossing(&a->share, a->expert_bytes);
}
