#include "backend/vulkan/share.h"

/* What was measured last counts for a quarter; a processor's runs for 0.9 of the next one. */
static const double NEW = 0.25, OLD = 0.9, TRIED_AGAIN = 0.98;
static const double NEAR = 1.25; /* what takes so much longer is not tried again */
enum { TRIED_EVERY = 32 /* steps */ };

static double mix(double known, double measured) { return known > 0 ? known + NEW * (measured - known) : measured; }

void ds_share_copied(ds_share *s, uint64_t bytes, uint64_t ns) {
    if (bytes && ns) s->byte_ns = mix(s->byte_ns, (double)ns / (double)bytes);
}

void ds_share_device(ds_share *s, uint64_t n_slots, uint64_t ns, bool waited) {
    const double measured = (double)ns / (double)(n_slots ? n_slots : 1);
    if (!n_slots || !ns) return;
    if (waited) s->slot_ns = mix(s->slot_ns, measured);
    else if (measured < s->slot_ns) s->slot_ns = measured;
}

void ds_share_processor(ds_share *s, uint64_t n_experts, uint64_t n_slots, uint64_t ns) {
    const double e = (double)n_experts, n = (double)n_slots, t = (double)ns;
    if (!n_experts || !ns) return;
    s->ee = OLD * s->ee + e * e, s->es = OLD * s->es + e * n, s->ss = OLD * s->ss + n * n;
    s->et = OLD * s->et + e * t, s->st = OLD * s->st + n * t;
}

/* Least squares; where that makes one of them less than nothing, or the runs were too much alike to tell them apart, the
 * other one alone. */
static bool fit(const ds_share *s, double *expert_ns, double *slot_ns) {
    const double whole = s->ee * s->ss, det = whole - s->es * s->es;
    if (s->ss <= 0 || s->st <= 0) return false;
    *expert_ns = 0, *slot_ns = s->st / s->ss;
    if (det < 1e-4 * whole) return true;
    const double a = (s->et * s->ss - s->st * s->es) / det, b = (s->st * s->ee - s->et * s->es) / det;
    if (a > 0 && b > 0) *expert_ns = a, *slot_ns = b;
    else if (b <= 0) *expert_ns = s->et / s->ee, *slot_ns = 0;
    return true;
}

int ds_share_choose(const ds_share *s, const int *counts, int n, uint64_t expert_bytes, uint64_t under_way,
                    uint64_t n_slots) {
    double expert_ns, slot_ns, left = 0, taken = (double)n_slots, least = 0;
    int best = 0;
    if (!(s->byte_ns > 0) || !fit(s, &expert_ns, &slot_ns)) return (n + 1) / 2;
    for (int i = 0; i < n; i++) left += counts[i];
    for (int k = 0; k <= n; k++) {
        const double bytes = (double)under_way + (double)k * (double)expert_bytes,
                     device = s->byte_ns * bytes + s->slot_ns * taken, processor = expert_ns * (n - k) + slot_ns * left,
                     time = device > processor ? device : processor;
        if (k == 0 || time < least) least = time, best = k;
        if (k < n) taken += counts[k], left -= counts[k];
    }
    return best;
}

void ds_share_chosen(ds_share *s, bool device, bool processor) {
    if (!device) s->byte_ns *= TRIED_AGAIN, s->slot_ns *= TRIED_AGAIN;
    if (!processor) s->et *= TRIED_AGAIN, s->st *= TRIED_AGAIN;
}

static ds_share_ways *ways_of(ds_share *s, int n_tok) {
    int i = 0;
    while (i + 1 < DS_SHARE_SIZES && n_tok >> (i + 1)) i++;
    return &s->ways[i];
}

bool ds_share_whole(ds_share *s, int n_tok, int n, uint64_t n_slots, uint64_t expert_bytes) {
    ds_share_ways *w = ways_of(s, n_tok);
    double expert_ns, slot_ns;
    if (!(s->byte_ns > 0) || !(w->shared_ns > 0) || !fit(s, &expert_ns, &slot_ns)) return false;
    if (!(w->whole_ns > 0)) return s->byte_ns * n * (double)expert_bytes < expert_ns * n + slot_ns * (double)n_slots;
    const bool whole = w->whole_ns <= w->shared_ns;
    const double ratio = whole ? w->shared_ns / w->whole_ns : w->whole_ns / w->shared_ns;
    if (ratio > NEAR || ++w->n_steps < TRIED_EVERY) return whole;
    w->n_steps = 0;
    return !whole;
}

void ds_share_step(ds_share *s, int n_tok, bool whole, uint64_t ns) {
    ds_share_ways *w = ways_of(s, n_tok);
    double *known = whole ? &w->whole_ns : &w->shared_ns;
    if (n_tok > 0 && ns) *known = mix(*known, (double)ns / n_tok);
}

double ds_share_crossing(const ds_share *s, uint64_t expert_bytes) {
    double expert_ns, slot_ns;
    if (!(s->byte_ns > 0) || !fit(s, &expert_ns, &slot_ns)) return 0;
    const double over = s->byte_ns * (double)expert_bytes - expert_ns, per_slot = slot_ns - s->slot_ns;
    if (over <= 0) return 1;
    return per_slot > 0 ? over / per_slot : 1e9;
}
