#include "backend/vulkan/hot.h"

#include <stdlib.h>
#include <string.h>

/* ---- Where slots lie ---- */

static int layer_begin(const ds_gpu_hot *h) { return h->slots.weights->layer_begin; }

static ds_gpu_expert address_of(const ds_gpu_hot *h, const ds_slot *slot) {
    const int i = (int)(slot - h->slots.slots);
    const uint64_t base = h->chunks[h->chunk_of[i]].address + h->at[i];
    return (ds_gpu_expert){base + ds_slots_offset(&h->slots, slot->il, 0),
                           base + ds_slots_offset(&h->slots, slot->il, 1),
                           base + ds_slots_offset(&h->slots, slot->il, 2)};
}

/* The device computes the slot's expert from here on, or the processor does. */
static void place_at(ds_gpu_hot *h, const ds_slot *slot, bool here) {
    ds_gpu_layer *layer = &h->weights->layers[slot->il - layer_begin(h)];
    layer->expert[slot->e] = here ? address_of(h, slot) : (ds_gpu_expert){0};
    ds_residency_place(h->residency, slot->il)[slot->e] = here ? (uint8_t)h->number : 0;
}

/* Memory for the slots: each whole in an allocation. */
static ds_status make_chunks(ds_gpu *gpu, ds_gpu_hot *h, ds_error *err) {
    ds_status st = DS_OK;
    for (int p = 0; p < h->slots.n_pools && st == DS_OK; p++) {
        const ds_slot_pool *pool = &h->slots.pools[p];
        const int together = (int)(DS_GPU_CHUNK / pool->slot_bytes);
        if (pool->slot_bytes > h->slot_bytes) h->slot_bytes = pool->slot_bytes;
        if (!together) return ds_fail(err, DS_EUNSUPPORTED, "an expert of %zu bytes for a GPU", pool->slot_bytes);
        for (int i = 0; i < pool->n && st == DS_OK; i += together) {
            const int n = pool->n - i < together ? pool->n - i : together;
            ds_gpu_buffer *more = realloc(h->chunks, (size_t)(h->n_chunks + 1) * sizeof *more);
            if (!more) return ds_fail(err, DS_ENOMEM, "no memory for a list of video memory");
            h->chunks = more;
            st = ds_gpu_buffer_new(gpu, (uint64_t)n * pool->slot_bytes, DS_GPU_OWN, &h->chunks[h->n_chunks], err);
            for (int j = 0; j < n && st == DS_OK; j++) {
                h->chunk_of[pool->first + i + j] = h->n_chunks;
                h->at[pool->first + i + j] = (uint64_t)j * pool->slot_bytes;
            }
            h->n_chunks += st == DS_OK;
        }
    }
    return st;
}

/* ---- What it begins with ---- */

typedef struct candidate {
    double heat;
    int il, e;
} candidate;

/* The most used first; of those used alike the first of each layer. */
static int by_heat(const void *a, const void *b) {
    const candidate *x = a, *y = b;
    if (x->heat != y->heat) return x->heat > y->heat ? -1 : 1;
    return x->e != y->e ? x->e - y->e : x->il - y->il;
}

static ds_status load(ds_gpu *gpu, ds_gpu_hot *h, ds_slot *slot, int il, int e, ds_error *err) {
    const ds_expert x = ds_residency_bound(h->slots.weights, il, e);
    const int at = (int)(slot - h->slots.slots);
    ds_status st = DS_OK;
    ds_slots_give(&h->slots, slot, il, e);
    for (int i = 0; i < DS_PIECES && st == DS_OK; i++) {
        const ds_mat *m = ds_expert_piece(&x, i);
        st = ds_gpu_write(gpu, &h->chunks[h->chunk_of[at]], h->at[at] + ds_slots_offset(&h->slots, il, i), m->data,
                          ds_piece_bytes(m), err);
    }
    slot->state = DS_SLOT_READY;
    place_at(h, slot, true);
    return st;
}

static ds_status seed(ds_gpu *gpu, ds_gpu_hot *h, const ds_config *c, ds_error *err) {
    const ds_weights *w = h->slots.weights;
    const int first = c->n_layer_dense > w->layer_begin ? c->n_layer_dense : w->layer_begin;
    const size_t most = (size_t)(w->layer_end - first) * (size_t)c->n_expert;
    candidate *all = calloc(most + 1, sizeof *all);
    ds_status st = all ? DS_OK : ds_fail(err, DS_ENOMEM, "no memory for a list of %zu experts", most);
    for (int p = 0; p < h->slots.n_pools && st == DS_OK; p++) {
        const ds_slot_pool *pool = &h->slots.pools[p];
        int n = 0;
        for (int il = first; il < w->layer_end; il++)
            for (int e = 0; e < c->n_expert && h->slots.pool_of[il - w->layer_begin] == p; e++)
                all[n++] = (candidate){h->slots.heat[ds_slots_at(&h->slots, il, e)], il, e};
        qsort(all, (size_t)n, sizeof *all, by_heat);
        for (int i = 0; i < pool->n && st == DS_OK; i++)
            st = load(gpu, h, &h->slots.slots[pool->first + i], all[i].il, all[i].e, err);
    }
    free(all);
    return st;
}

/* ---- The copier ---- */

static void copy_expert(const ds_gpu_hot *h, const ds_hot_upload *u) {
    const ds_slot *slot = &h->slots.slots[u->slot];
    const ds_expert x = ds_residency_bound(h->slots.weights, slot->il, slot->e);
    for (int i = 0; i < DS_PIECES; i++) {
        const ds_mat *m = ds_expert_piece(&x, i);
        memcpy(u->to + ds_slots_offset(&h->slots, slot->il, i), m->data, ds_piece_bytes(m));
    }
}

static void *copy_all(void *arg) {
    ds_gpu_hot *h = arg;
    ds_hot_copier *c = &h->copier;
    ds_lock_take(&c->lock);
    while (!c->ending) {
        if (c->n_done == c->n) {
            ds_signal_wait(&c->work, &c->lock);
            continue;
        }
        const ds_hot_upload u = c->uploads[c->n_done];
        ds_lock_give(&c->lock);
        copy_expert(h, &u); /* neither the slot nor the staging memory is another's until it is done */
        ds_lock_take(&c->lock);
        c->n_done++;
        ds_signal_send(&c->news);
    }
    ds_lock_give(&c->lock);
    return NULL;
}

static ds_status start_copier(ds_gpu_hot *h, ds_error *err) {
    ds_hot_copier *c = &h->copier;
    ds_fail(err, DS_ENOMEM, "no thread to copy experts with");
    if (!ds_lock_init(&c->lock)) return err->status;
    if (!ds_signal_init(&c->work)) goto no_work;
    if (!ds_signal_init(&c->news)) goto no_news;
    if (ds_thread_start(copy_all, h, &c->thread) == 0) return c->runs = true, DS_OK;
    ds_signal_free(&c->news);
no_news:
    ds_signal_free(&c->work);
no_work:
    ds_lock_free(&c->lock);
    return err->status;
}

static void stop_copier(ds_hot_copier *c) {
    if (!c->runs) return;
    ds_lock_take(&c->lock);
    c->ending = true;
    ds_signal_send(&c->work);
    ds_lock_give(&c->lock);
    ds_thread_join(c->thread);
    ds_signal_free(&c->news);
    ds_signal_free(&c->work);
    ds_lock_free(&c->lock);
}

/* Until what was given to it is copied: a step is much longer than that takes. */
static int wait_for_copies(ds_hot_copier *c) {
    ds_lock_take(&c->lock);
    while (c->n_done < c->n) ds_signal_wait(&c->news, &c->lock);
    const int n = c->n;
    ds_lock_give(&c->lock);
    return n;
}

/* ---- Steps ---- */

/* One more, where it is among the hottest; what is found is in order. */
static void keep_hottest(candidate found[DS_HOT_INSERTS], int *n, candidate c) {
    for (int i = 0; i < *n; i++) {
        const candidate other = found[i];
        if (other.heat >= c.heat) continue;
        found[i] = c, c = other;
    }
    if (*n < DS_HOT_INSERTS) found[(*n)++] = c;
}

/* What decoded tokens chose since the last look; a prompt's choices change nothing. Returns the hottest that are not here. */
static int learn(ds_gpu_hot *h, candidate misses[DS_HOT_INSERTS]) {
    const ds_weights *w = h->slots.weights;
    const bool decoded = h->n_tok > 0 && h->n_tok <= DS_DECODED_TOKENS;
    const size_t n_expert = (size_t)h->slots.n_expert, n = (size_t)(w->layer_end - w->layer_begin) * n_expert;
    int n_misses = 0;
    if (decoded) ds_slots_step(&h->slots, h->n_tok);
    if (decoded) h->work.tokens += (uint64_t)h->n_tok;
    for (size_t i = 0; i < n; i++) {
        const uint64_t uses = h->residency->uses[i] - h->seen[i];
        h->seen[i] += uses;
        if (!uses || !decoded) continue;
        const int il = w->layer_begin + (int)(i / n_expert), e = (int)(i % n_expert);
        ds_slots_use(&h->slots, il, e, (int)uses, h->n_tok);
        h->work.chosen += uses;
        if (h->residency->place[i] == h->number) h->work.held += uses;
        if (h->slots.slot_of[i] < 0) keep_hottest(misses, &n_misses, (candidate){h->slots.heat[i], il, e});
    }
    return n_misses;
}

/* Copies of what the copier has made, in one list that runs ahead of the step's. */
static ds_status submit_copies(ds_gpu *gpu, ds_gpu_hot *h, int n) {
    ds_error ignored;
    ds_status st = ds_gpu_record(gpu, &h->commands, &ignored);
    for (int i = 0; i < n && st == DS_OK; i++) {
        const ds_hot_upload *u = &h->copier.uploads[i];
        ds_gpu_copy(gpu, &h->commands, &h->staging, (uint64_t)(u->to - h->staging.host),
                    &h->chunks[h->chunk_of[u->slot]], h->at[u->slot],
                    ds_slots_pool(&h->slots, h->slots.slots[u->slot].il)->slot_bytes);
    }
    if (st == DS_OK) st = ds_gpu_recorded(gpu, &h->commands, &ignored);
    return st == DS_OK ? ds_gpu_submit_ahead(gpu, &h->commands, &ignored) : st;
}

/* What was copied beside the last step goes to its slots. */
static void commit(ds_gpu *gpu, ds_gpu_hot *h) {
    const int n = wait_for_copies(&h->copier);
    if (h->under_way && ds_gpu_waits(gpu) == h->waits) ds_gpu_drain(gpu); /* a step that failed before it waited */
    h->under_way = false;
    if (!n) return;
    const ds_status st = submit_copies(gpu, h, n);
    h->under_way = st == DS_OK;
    h->waits = ds_gpu_waits(gpu);
    for (int i = 0; i < n; i++) {
        ds_slot *slot = &h->slots.slots[h->copier.uploads[i].slot];
        if (st != DS_OK) {
            ds_slots_drop(&h->slots, slot);
            continue;
        }
        slot->state = DS_SLOT_READY;
        place_at(h, slot, true);
        h->work.uploads++;
        h->work.upload_bytes += ds_slots_pool(&h->slots, slot->il)->slot_bytes;
    }
    h->half = !h->half; /* the device reads this one */
}

/* A slot for a miss, of what is worth less; NULL where nothing is, by enough. */
static ds_slot *make_room(ds_gpu_hot *h, const candidate *miss) {
    ds_slot *slot = ds_slots_victim(&h->slots, miss->il, -1, false);
    if (!slot || slot->state == DS_SLOT_FREE) return slot;
    const double replaced = h->slots.heat[ds_slots_at(&h->slots, slot->il, slot->e)];
    if (miss->heat < replaced + DS_HOT_MARGIN * h->slots.worth) return NULL;
    place_at(h, slot, false);
    ds_slots_drop(&h->slots, slot);
    return slot;
}

static void give_to_copier(ds_gpu_hot *h, const candidate *misses, int n_misses) {
    ds_hot_copier *c = &h->copier;
    unsigned char *to = h->staging.host + (size_t)h->half * DS_HOT_INSERTS * h->slot_bytes;
    ds_lock_take(&c->lock);
    c->n = c->n_done = 0;
    for (int i = 0; i < n_misses; i++) {
        ds_slot *slot = make_room(h, &misses[i]);
        if (!slot) continue;
        ds_slots_give(&h->slots, slot, misses[i].il, misses[i].e);
        slot->state = DS_SLOT_READING;
        c->uploads[c->n] = (ds_hot_upload){(int)(slot - h->slots.slots), to + (size_t)c->n * h->slot_bytes};
        c->n++;
    }
    if (c->n) ds_signal_send(&c->work);
    ds_lock_give(&c->lock);
}

void ds_gpu_hot_step(ds_gpu *gpu, ds_gpu_hot *h, int n_tok) {
    candidate misses[DS_HOT_INSERTS];
    if (!h->slots.n) return;
    const int n = learn(h, misses);
    commit(gpu, h);
    give_to_copier(h, misses, n);
    h->n_tok = n_tok;
}

/* ---- The whole ---- */

static ds_status check(const ds_facts *f, int number, ds_error *err) {
    const ds_weights *w = f->weights;
    const int dense = f->config->n_layer_dense;
    bool right = ds_residency_is_settled(f->residency) && f->config->n_expert;
    for (int il = dense > w->layer_begin ? dense : w->layer_begin; il < w->layer_end && right; il++) {
        right = f->places->feed_forward[il - w->layer_begin] == number;
        for (int e = 0; e < f->config->n_expert && right; e++) right = ds_residency_place(f->residency, il)[e] == 0;
    }
    if (right) return DS_OK;
    ds_fail(err, DS_EINVAL,
            "experts come and go on a GPU where it has the feed-forward of all layers and the processor "
            "all routed experts, in memory");
    return ds_hint(err, "place feed_forward of every layer at the device, and experts of every layer at 0");
}

ds_status ds_gpu_hot_create(ds_gpu *gpu, const ds_facts *facts, int number, uint64_t bytes, ds_gpu_weights *weights,
                            ds_gpu_hot *out, ds_error *err) {
    ds_gpu_hot *h = out;
    *h = (ds_gpu_hot){.residency = facts->residency, .weights = weights, .number = number};
    ds_status st = check(facts, number, err);
    if (st == DS_OK) st = ds_slots_create(facts->config, facts->weights, (size_t)bytes, facts->uses, &h->slots, err);
    if (st != DS_OK) return st;
    const size_t n_layer = (size_t)(facts->weights->layer_end - facts->weights->layer_begin);
    h->chunk_of = calloc((size_t)h->slots.n + 1, sizeof *h->chunk_of);
    h->at = calloc((size_t)h->slots.n + 1, sizeof *h->at);
    h->seen = calloc(n_layer * (size_t)h->slots.n_expert + 1, sizeof *h->seen);
    if (!h->chunk_of || !h->at || !h->seen) st = ds_fail(err, DS_ENOMEM, "no memory for %d experts", h->slots.n);
    if (st == DS_OK) st = make_chunks(gpu, h, err);
    if (st == DS_OK) st = ds_gpu_buffer_new(gpu, 2 * DS_HOT_INSERTS * h->slot_bytes, DS_GPU_OUT, &h->staging, err);
    if (st == DS_OK) st = seed(gpu, h, facts->config, err);
    if (st == DS_OK) st = start_copier(h, err);
    if (st != DS_OK) ds_gpu_hot_release(gpu, h);
    return st;
}

void ds_gpu_hot_release(ds_gpu *gpu, ds_gpu_hot *h) {
    stop_copier(&h->copier);
    if (h->under_way) ds_gpu_drain(gpu);
    for (int i = 0; i < h->n_chunks; i++) ds_gpu_buffer_release(gpu, &h->chunks[i]);
    ds_gpu_buffer_release(gpu, &h->staging);
    ds_gpu_commands_release(gpu, &h->commands);
    ds_slots_release(&h->slots);
    free(h->chunks);
    free(h->chunk_of);
    free(h->at);
    free(h->seen);
    *h = (ds_gpu_hot){0};
}
