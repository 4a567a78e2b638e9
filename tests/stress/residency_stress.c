/* residency_stress.c: a tier that has no expert in memory until a plan asks for it, behind the engine's residency. Another
 * thread copies the experts of a plan; what is let go of is overwritten, so that a read out of turn changes the logits,
 * which must be those of the mapping. Then a tier whose reads fail: the step fails with its error, and the next one runs.
 * Takes the path of a small GGUF; returns 1 where something is wrong. */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "arch/file.h"
#include "whole_run.h"

typedef struct slot {
    unsigned char *gate, *up, *down; /* copies, made once and overwritten when let go of */
    bool wanted, ready;
} slot;

typedef struct tier {
    ds_residency *under; /* the mapping */
    const ds_residency_ops *mapped;
    slot *slots; /* (layers, n_expert) */
    int n_layer, n_expert, open; /* the layer begun, or -1 */
    int fail_at; /* the wait that fails, counted down; 0: none */
    int n_begun, n_left, n_wrong; /* n_left: experts that were never released */
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
} tier;

static tier the; /* one at a time: a residency has no place for a test's own state */

static slot *slot_of(int il, int e) { return &the.slots[(size_t)il * (size_t)the.n_expert + (size_t)e]; }

static void take_copy(unsigned char **to, const ds_mat *m) {
    if (!*to) *to = malloc(m->stride);
    memcpy(*to, m->data, m->stride);
}

/* Copies what is wanted, the last expert first and not at once. */
static void *copy_all(void *arg) {
    const int il = (int)(intptr_t)arg;
    for (int e = the.n_expert - 1; e >= 0; e--) {
        if (!slot_of(il, e)->wanted) continue;
        const ds_expert from = the.mapped->get(the.under, il, e);
        slot *s = slot_of(il, e);
        nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
        take_copy(&s->gate, &from.gate), take_copy(&s->up, &from.up), take_copy(&s->down, &from.down);
        pthread_mutex_lock(&the.lock);
        s->ready = true;
        pthread_cond_broadcast(&the.changed);
        pthread_mutex_unlock(&the.lock);
    }
    return NULL;
}

static ds_status begin(ds_residency *r, int il, const ds_plan *plan, ds_error *err) {
    the.n_wrong += the.open != -1;
    the.open = il;
    the.n_begun++;
    for (int a = 0; a < plan->n_active; a++) slot_of(il, plan->expert[a])->wanted = true;
    pthread_create(&the.thread, NULL, copy_all, (void *)(intptr_t)il);
    return DS_OK;
}

static bool ready(ds_residency *r, int il, int e) {
    pthread_mutex_lock(&the.lock);
    const bool is = slot_of(il, e)->ready && the.fail_at == 0;
    pthread_mutex_unlock(&the.lock);
    return is;
}

static ds_status wait_for(ds_residency *r, int il, const int *experts, int n, ds_error *err) {
    bool found = false;
    pthread_mutex_lock(&the.lock);
    if (the.fail_at && --the.fail_at == 0) {
        pthread_mutex_unlock(&the.lock);
        return ds_fail(err, DS_EIO, "expert %d of layer %d is gone", experts[0], il);
    }
    the.n_wrong += the.open != il || n < 1;
    for (;;) {
        for (int i = 0; i < n; i++) {
            the.n_wrong += !slot_of(il, experts[i])->wanted;
            found = found || slot_of(il, experts[i])->ready;
        }
        if (found || the.n_wrong) break;
        pthread_cond_wait(&the.changed, &the.lock);
    }
    pthread_mutex_unlock(&the.lock);
    return DS_OK;
}

static ds_expert get(const ds_residency *r, int il, int e) {
    ds_expert x = the.mapped->get(the.under, il, e);
    const slot *s = slot_of(il, e);
    x.gate.data = s->gate, x.up.data = s->up, x.down.data = s->down;
    return x;
}

static void let_go(slot *s, const ds_expert *x) {
    if (s->gate) memset(s->gate, 0xff, x->gate.stride);
    if (s->up) memset(s->up, 0xff, x->up.stride);
    if (s->down) memset(s->down, 0xff, x->down.stride);
    s->wanted = s->ready = false;
}

static void release(ds_residency *r, int il, const int *experts, int n) {
    for (int i = 0; i < n; i++) {
        const ds_expert x = the.mapped->get(the.under, il, experts[i]);
        pthread_mutex_lock(&the.lock);
        the.n_wrong += !slot_of(il, experts[i])->ready;
        let_go(slot_of(il, experts[i]), &x);
        pthread_mutex_unlock(&the.lock);
    }
}

static void end(ds_residency *r, int il) {
    the.n_wrong += the.open != il;
    the.open = -1;
    pthread_join(the.thread, NULL);
    for (int e = 0; e < the.n_expert; e++) {
        const ds_expert x = the.mapped->get(the.under, il, e);
        the.n_left += slot_of(il, e)->wanted;
        let_go(slot_of(il, e), &x);
    }
}

static const ds_residency_ops OPS = {
    .begin = begin, .ready = ready, .wait = wait_for, .get = get, .release = release, .end = end};

static void put_on(ds_core *core) {
    the = (tier){.under = core->residency,
                 .mapped = core->residency->ops,
                 .n_layer = core->config.n_layer,
                 .n_expert = core->config.n_expert,
                 .open = -1};
    the.slots = calloc((size_t)the.n_layer * (size_t)the.n_expert, sizeof *the.slots);
    pthread_mutex_init(&the.lock, NULL);
    pthread_cond_init(&the.changed, NULL);
    core->residency->ops = &OPS;
}

static void take_off(ds_core *core) {
    core->residency->ops = the.mapped;
    for (int i = 0; i < the.n_layer * the.n_expert; i++) {
        free(the.slots[i].gate);
        free(the.slots[i].up);
        free(the.slots[i].down);
    }
    free(the.slots);
    pthread_mutex_destroy(&the.lock);
    pthread_cond_destroy(&the.changed);
}

static bool check(ds_core *core, const char *what) {
    const size_t n = (size_t)N_CTX * (size_t)core->config.n_vocab;
    float *expected = calloc(n, sizeof *expected), *got = calloc(n, sizeof *got);
    ds_error err = {0};
    const int n_moe = core->config.n_layer - core->config.n_layer_dense, n_steps = 1 + N_STEPS;
    bool good = run(core, expected, &err) == DS_OK;
    put_on(core);
    good = good && run(core, got, &err) == DS_OK && memcmp(got, expected, n * sizeof *got) == 0 && isfinite(got[0]);
    if (!good) printf("residency_stress: %s: other logits than the mapping's %s\n", what, err.message);
    if (the.n_wrong || the.open != -1 || the.n_begun != n_moe * n_steps || the.n_left) {
        printf("residency_stress: %s: %d layers begun, %d experts not released, %d calls out of turn\n", what,
               the.n_begun, the.n_left, the.n_wrong);
        good = false;
    }
    the.fail_at = 3;
    if (run(core, got, &err) != DS_EIO || !strstr(err.message, "is gone")) {
        printf("residency_stress: %s: a read that failed was not told\n", what);
        good = false;
    }
    the.fail_at = 0;
    memset(got, 0, n * sizeof *got);
    if (run(core, got, &err) != DS_OK || memcmp(got, expected, n * sizeof *got) != 0) {
        printf("residency_stress: %s: wrong after a step that failed\n", what);
        good = false;
    }
    take_off(core);
    free(expected);
    free(got);
    return good;
}

/* On one device, and with half of the experts on another. */
static bool check_file(const ds_gguf *gguf, int n_threads, bool split) {
    const ds_device processor = {"cpu", n_threads, NULL}, other = {"cpu", 2, NULL};
    ds_rule rule = {.part = DS_PART_EXPERTS, .device = 1};
    const ds_placement placement = {&other, 1, &rule, 1};
    ds_file_source file;
    ds_error err;
    ds_core core;
    char what[64];
    bool good = ds_file_source_open(gguf, &file, &err) == DS_OK;
    ds_config c;
    if (good && (good = ds_config_read(gguf, ds_file_source_view(&file), &c, &err) == DS_OK)) {
        rule.layer_begin = c.n_layer_dense, rule.layer_end = c.n_layer, rule.expert_end = (c.n_expert + 1) / 2;
        const ds_core_spec spec = {
            .layer_end = -1, .ends = true, .processor = &processor, .placement = split ? &placement : NULL};
        good = ds_core_create(gguf, ds_file_source_view(&file), &spec, &core, &err) == DS_OK;
        ds_file_source_close(&file);
    }
    if (!good) return printf("residency_stress: %s\n", err.message), false;
    snprintf(what, sizeof what, "%d threads, %s", n_threads, split ? "two devices" : "one device");
    good = check(&core, what);
    ds_core_release(&core);
    return good;
}

int main(int argc, char **argv) {
    ds_gguf *gguf;
    ds_error err;
    bool good = argc == 2 && ds_gguf_open(argv[1], &gguf, &err) == DS_OK;
    for (int n_threads = 1; n_threads <= 3 && good; n_threads++)
        good = check_file(gguf, n_threads, false) && check_file(gguf, n_threads, true);
    if (argc == 2) ds_gguf_close(gguf);
    puts(good ? "residency_stress: experts that come and go, the same logits" : "residency_stress: WRONG");
    return good ? 0 : 1;
}
