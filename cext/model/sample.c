/* sample.c: repeat penalty, top-k, top-p, min-p, temperature, draw. Knows no model.
 *
 * Top-k, top-p and min-p each keep a prefix of the candidates in falling order of logit, so the survivors are the
 * shortest of these prefixes. A heap gives that order lazily: building it is linear in the candidates, and only the
 * survivors are ever popped from it. */
#include "model/sample.h"

#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>

enum { MAX_REPEAT_LAST_N = 1 << 20 };

typedef struct candidate {
    float logit;
    int32_t token;
} candidate;

struct ds_sampler {
    ds_sampler_options options;
    uint64_t random[4]; /* xoshiro256** */
    int32_t *recent;    /* (repeat_last_n): a ring of the latest tokens */
    int n_recent, next_recent;
    int capacity;       /* of the two below, in tokens: the largest vocabulary seen */
    float *logits;      /* (capacity): after the penalty */
    candidate *heap;    /* (capacity) */
    candidate *kept;    /* (n_kept), within heap: what the last token was drawn from, in no order */
    int n_kept;
    float best; /* the highest of their logits */
};

/* Blackman and Vigna's xoshiro256**, seeded by splitmix64 as they advise. */
static void random_seed(uint64_t state[4], uint64_t seed) {
    for (int i = 0; i < 4; i++) {
        seed += 0x9e3779b97f4a7c15u;
        uint64_t z = seed;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        state[i] = z ^ (z >> 31);
    }
}

static uint64_t rotate_left(uint64_t x, int k) { return (x << k) | (x >> (64 - k)); }

/* Uniform on [0, 1), 53 bits. */
static double random_unit(uint64_t s[4]) {
    uint64_t result = rotate_left(s[1] * 5, 7) * 9, t = s[1] << 17;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = rotate_left(s[3], 45);
    return (double)(result >> 11) * 0x1p-53;
}

/* Each comparison is written so that NaN fails it. */
static ds_status check_options(const ds_sampler_options *o, ds_error *err) {
    if (!(o->temperature >= 0 && o->temperature <= FLT_MAX)) {
        return ds_fail(err, DS_EINVAL, "temperature is %g, expected 0 (greedy) or a positive number", o->temperature);
    }
    if (o->top_k < 0) {
        return ds_fail(err, DS_EINVAL, "top_k is %d, expected 0 (off) or a positive number", o->top_k);
    }
    if (!(o->top_p > 0 && o->top_p <= 1)) {
        return ds_fail(err, DS_EINVAL, "top_p is %g, expected more than 0 and at most 1 (off)", o->top_p);
    }
    if (!(o->min_p >= 0 && o->min_p <= 1)) {
        return ds_fail(err, DS_EINVAL, "min_p is %g, expected 0 (off) to 1", o->min_p);
    }
    if (!(o->repeat_penalty > 0 && o->repeat_penalty <= FLT_MAX)) {
        return ds_fail(err, DS_EINVAL, "repeat_penalty is %g, expected a positive number (1 is off)",
                       o->repeat_penalty);
    }
    if (o->repeat_last_n < 0 || o->repeat_last_n > MAX_REPEAT_LAST_N) {
        return ds_fail(err, DS_EINVAL, "repeat_last_n is %d, expected 0 to %d", o->repeat_last_n, MAX_REPEAT_LAST_N);
    }
    return DS_OK;
}

ds_status ds_sampler_create(const ds_sampler_options *options, ds_sampler **out, ds_error *err) {
    ds_status st = check_options(options, err);
    if (st != DS_OK) {
        return st;
    }
    ds_sampler *s = calloc(1, sizeof *s);
    int32_t *recent = calloc((size_t)options->repeat_last_n + 1, sizeof *recent);
    if (!s || !recent) {
        free(s);
        free(recent);
        return ds_fail(err, DS_ENOMEM, "no memory for a sampler of %d recent tokens", options->repeat_last_n);
    }
    s->options = *options;
    s->recent = recent;
    random_seed(s->random, options->seed);
    *out = s;
    return DS_OK;
}

void ds_sampler_destroy(ds_sampler *sampler) {
    if (!sampler) {
        return;
    }
    free(sampler->recent);
    free(sampler->logits);
    free(sampler->heap);
    free(sampler);
}

void ds_sampler_accept(ds_sampler *s, int32_t token) {
    int window = s->options.repeat_last_n;
    if (window == 0) {
        return;
    }
    s->recent[s->next_recent] = token;
    s->next_recent = (s->next_recent + 1) % window;
    s->n_recent += s->n_recent < window;
}

/* Scratch is sized by the first vocabulary that comes, then stays. */
static ds_status reserve(ds_sampler *s, int n_vocab, ds_error *err) {
    if (n_vocab <= s->capacity) {
        return DS_OK;
    }
    float *logits = malloc((size_t)n_vocab * sizeof *logits);
    candidate *heap = malloc((size_t)n_vocab * sizeof *heap);
    if (!logits || !heap) {
        free(logits);
        free(heap);
        return ds_fail(err, DS_ENOMEM, "no memory to sample from %d tokens", n_vocab);
    }
    free(s->logits);
    free(s->heap);
    s->logits = logits;
    s->heap = heap;
    s->n_kept = 0;
    s->capacity = n_vocab;
    return DS_OK;
}

/* An infinite logit would make the differences below NaN; the largest float keeps its rank. */
static float clamp_infinity(float x) { return x > FLT_MAX ? FLT_MAX : x; }

/* Fill s->logits, and s->heap with the tokens that can be drawn at all; returns their number. */
static int collect(ds_sampler *s, const float *logits, int n_vocab) {
    const float penalty = s->options.repeat_penalty;
    for (int i = 0; i < n_vocab; i++) {
        s->logits[i] = clamp_infinity(logits[i]);
    }
    /* Computed from the original logit, so that a token that is twice in the window is penalised once. */
    for (int i = 0; penalty != 1 && i < s->n_recent; i++) {
        int32_t token = s->recent[i];
        if (token < 0 || token >= n_vocab || !(logits[token] >= -FLT_MAX)) {
            continue;
        }
        float x = clamp_infinity(logits[token]);
        x = x > 0 ? x / penalty : x * penalty;
        s->logits[token] = fmaxf(clamp_infinity(x), -FLT_MAX); /* a penalty alone never forbids a token */
    }
    int n = 0;
    for (int i = 0; i < n_vocab; i++) {
        if (s->logits[i] >= -FLT_MAX) { /* neither NaN nor -inf */
            s->heap[n++] = (candidate){s->logits[i], i};
        }
    }
    return n;
}

/* The order of candidates: the higher logit first, then the lower token, so that ties never depend on the heap. */
static bool before(candidate a, candidate b) { return a.logit > b.logit || (a.logit == b.logit && a.token < b.token); }

/* Restore a heap below i: the best at the root, or the worst where worst_first. */
static void sift_down(candidate *heap, int n, int i, bool worst_first) {
    candidate moved = heap[i];
    for (int child; (child = 2 * i + 1) < n; i = child) {
        child += child + 1 < n && before(heap[child + 1], heap[child]) != worst_first;
        if (before(heap[child], moved) == worst_first) {
            break;
        }
        heap[i] = heap[child];
    }
    heap[i] = moved;
}

static void make_heap(candidate *heap, int n, bool worst_first) {
    for (int i = n / 2 - 1; i >= 0; i--) {
        sift_down(heap, n, i, worst_first);
    }
}

/* The part of an array of candidates that the stages keep. */
typedef struct survivors {
    candidate *first; /* (n) */
    int n;
} survivors;

/* Gather the k best at the front. Nearly every candidate is turned away by one look at the worst of those kept. */
static survivors keep_top_k(survivors all, int k) {
    make_heap(all.first, k, true);
    for (int i = k; i < all.n; i++) {
        if (before(all.first[i], all.first[0])) {
            all.first[0] = all.first[i];
            sift_down(all.first, k, 0, true);
        }
    }
    return (survivors){all.first, k};
}

/* The best that together have top_p of the probability, the last that crosses it included, and none below `lowest`. */
static survivors keep_top_p(survivors all, float top_p, float best, double lowest) {
    candidate *heap = all.first;
    double mass = 0, gathered = 0;
    for (int i = 0; i < all.n; i++) {
        mass += exp((double)heap[i].logit - best);
    }
    make_heap(heap, all.n, false);
    int n_kept = 0;
    while (n_kept < all.n && gathered < top_p * mass && heap[0].logit >= lowest) {
        /* The root goes behind the heap, which shrinks by one: survivors pile up at the end. */
        int last = all.n - ++n_kept;
        candidate next = heap[0];
        heap[0] = heap[last];
        heap[last] = next;
        sift_down(heap, last, 0, false);
        gathered += exp((double)next.logit - best);
    }
    return (survivors){heap + (all.n - n_kept), n_kept};
}

/* Min-p alone needs no order. */
static survivors keep_min_p(survivors all, double lowest) {
    int n_kept = 0;
    for (int i = 0; i < all.n; i++) {
        if (all.first[i].logit >= lowest) {
            all.first[n_kept++] = all.first[i];
        }
    }
    return (survivors){all.first, n_kept};
}

/* Top-k, top-p, min-p. A token passes min-p where exp(logit - best) >= min_p, so where its logit is at least `lowest`. */
static survivors keep_likely(const ds_sampler_options *o, survivors all, float best) {
    const double lowest = o->min_p > 0 ? best + log(o->min_p) : -INFINITY;
    if (o->top_k > 0 && o->top_k < all.n) {
        all = keep_top_k(all, o->top_k);
    }
    return o->top_p < 1 ? keep_top_p(all, o->top_p, best, lowest) : keep_min_p(all, lowest);
}

/* p(token) ~ exp((logit - best) / temperature). */
static int32_t draw(ds_sampler *s, survivors kept, float best) {
    const double temperature = s->options.temperature;
    double total = 0;
    for (int i = 0; i < kept.n; i++) {
        total += exp(((double)kept.first[i].logit - best) / temperature);
    }
    double left = random_unit(s->random) * total;
    int32_t token = -1;
    for (int i = 0; i < kept.n; i++) {
        double weight = exp(((double)kept.first[i].logit - best) / temperature);
        if (weight > 0) {
            token = kept.first[i].token; /* where rounding leaves a remainder, the last that could be drawn takes it */
            if ((left -= weight) < 0) {
                break;
            }
        }
    }
    return token;
}

ds_status ds_sampler_sample(ds_sampler *sampler, const float *logits, int n_vocab, int32_t *token, ds_error *err) {
    const ds_sampler_options *o = &sampler->options;
    if (n_vocab < 1) {
        return ds_fail(err, DS_EINVAL, "%d logits, expected at least 1", n_vocab);
    }
    ds_status st = reserve(sampler, n_vocab, err);
    if (st != DS_OK) {
        return st;
    }
    const int n = collect(sampler, logits, n_vocab);
    if (n == 0) {
        ds_fail(err, DS_EINVAL, "none of the %d logits is a number above -inf", n_vocab);
        return ds_hint(err, "the model's weights are damaged: compare the file's sha256 with its source's, download or "
                            "quantize it again");
    }
    candidate best = sampler->heap[0];
    for (int i = 1; i < n; i++) {
        best = before(sampler->heap[i], best) ? sampler->heap[i] : best;
    }
    survivors kept = {&sampler->heap[0], 1};
    if (o->temperature > 0) {
        kept = keep_likely(o, (survivors){sampler->heap, n}, best.logit);
        best.token = draw(sampler, kept, best.logit);
    } else {
        sampler->heap[0] = best;
    }
    sampler->kept = kept.first;
    sampler->n_kept = kept.n;
    sampler->best = best.logit;
    ds_sampler_accept(sampler, best.token);
    *token = best.token;
    return DS_OK;
}

int ds_sampler_kept(const ds_sampler *s, int32_t *tokens, double *weights, int capacity) {
    const double temperature = s->options.temperature;
    for (int i = 0; i < s->n_kept && i < capacity; i++) {
        tokens[i] = s->kept[i].token;
        weights[i] = temperature > 0 ? exp(((double)s->kept[i].logit - s->best) / temperature) : 1;
    }
    return s->n_kept;
}
