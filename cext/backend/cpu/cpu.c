/* cpu.c: the processor as a backend: a team of threads, the memory of a step, and runs of operations, each run by all
 * threads together in one go. */
#include "backend/cpu/cpu.h"

#include <stdio.h>
#include <stdlib.h>

#include "backend/cpu/step.h"
#include "base/cpu.h"
#include "base/os.h"
#include "memory/budget.h"

typedef struct cpu {
    ds_backend head;
    ds_facts facts;
    const ds_kernels *kern;
    ds_pool *pool;
    ds_scratch scratch;
    int number;
    ds_step steps[2]; /* the whole, its tail */
    ds_error failure; /* of the run under way */
    const ds_op *ops; /* submitted; NULL when done */
    int n_ops;
    /* Of one that works apart: */
    bool apart, ending;
    int64_t process; /* that the thread is of */
    ds_thread thread;
    ds_lock lock;
    ds_signal changed; /* ops or ending */
} cpu;

static bool (*const RUN[DS_OP_COUNT])(const ds_lane *lane, const ds_op *op) = {
    [DS_OP_EMBED] = ds_cpu_embed,       [DS_OP_PLACE] = ds_cpu_place,     [DS_OP_ATTENTION] = ds_cpu_attention,
    [DS_OP_REMEMBER] = ds_cpu_remember, [DS_OP_TAIL] = ds_cpu_tail,       [DS_OP_DENSE] = ds_cpu_dense,
    [DS_OP_ROUTE] = ds_cpu_route,       [DS_OP_EXPERTS] = ds_cpu_experts, [DS_OP_COMBINE] = ds_cpu_combine,
    [DS_OP_FFN_NORM] = ds_cpu_ffn_norm, [DS_OP_HEAD] = ds_cpu_head,       [DS_OP_COPY_IN] = ds_cpu_copy_in,
    [DS_OP_COPY_OUT] = ds_cpu_copy_out,
};

static void run(const ds_worker *worker, void *arg) {
    const cpu *c = arg;
    const ds_lane lanes[2] = {ds_lane_of(worker, &c->steps[0]), ds_lane_of(worker, &c->steps[1])};
    for (int i = 0; i < c->n_ops; i++) {
        if (!RUN[c->ops[i].kind](&lanes[c->ops[i].tail], &c->ops[i])) return;
    }
}

/* The thread of a backend that works apart: worker 0 of its team. */
static void *work_apart(void *arg) {
    cpu *c = arg;
    ds_lock_take(&c->lock);
    for (;;) {
        while (!c->ops && !c->ending) ds_signal_wait(&c->changed, &c->lock);
        if (c->ending) break;
        ds_lock_give(&c->lock);
        ds_pool_run(c->pool, run, c);
        ds_lock_take(&c->lock);
        c->ops = NULL;
        ds_signal_send(&c->changed);
    }
    ds_lock_give(&c->lock);
    return NULL;
}

static ds_status submit(ds_backend *backend, const ds_op *ops, int n, ds_error *err) {
    cpu *c = (cpu *)backend;
    c->failure.status = DS_OK;
    c->n_ops = n;
    if (!c->apart) return c->ops = ops, DS_OK; /* wait works */
    ds_lock_take(&c->lock);
    c->ops = ops;
    ds_signal_send(&c->changed);
    ds_lock_give(&c->lock);
    return DS_OK;
}

/* The caller's thread looks whether it is to stop: the one that waits for the drive may not be asked in its place, as
 * handlers of signals run on the main thread alone. */
static void wait_apart(cpu *c) {
    ds_residency *r = c->facts.residency;
    bool stopped = false;
    ds_lock_take(&c->lock);
    while (c->ops) {
        if (stopped || ds_residency_is_settled(r)) {
            ds_signal_wait(&c->changed, &c->lock);
            continue;
        }
        ds_signal_wait_for(&c->changed, &c->lock, DS_STOP_LOOK_NS);
        if (!c->ops) break;
        ds_lock_give(&c->lock); /* whoever is asked may take its time */
        stopped = ds_residency_stops(r);
        ds_lock_take(&c->lock);
    }
    ds_lock_give(&c->lock);
    if (stopped && c->failure.status == DS_OK)
        ds_fail(&c->failure, DS_ESTOPPED, "stopped while another device computed");
}

static ds_status wait_for(ds_backend *backend, ds_error *err) {
    cpu *c = (cpu *)backend;
    if (c->apart) wait_apart(c);
    else if (c->ops) {
        ds_pool_run(c->pool, run, c);
        c->ops = NULL;
    }
    if (c->failure.status != DS_OK) *err = c->failure;
    return c->failure.status;
}

static ds_status reserve(ds_backend *backend, int n_tok, ds_error *err) {
    cpu *c = (cpu *)backend;
    return ds_scratch_reserve(&c->scratch, c->facts.config, c->kern, ds_pool_size(c->pool), n_tok, err);
}

static size_t bytes(const ds_backend *backend, int n_tok) {
    const cpu *c = (const cpu *)backend;
    return ds_scratch_bytes(c->facts.config, c->kern, ds_pool_size(c->pool), n_tok);
}

static ds_step step_of(cpu *c, const ds_request *r) {
    ds_step s = {.config = c->facts.config,
                 .weights = c->facts.weights,
                 .kern = c->kern,
                 .rope = c->facts.rope,
                 .scratch = &c->scratch,
                 .residency = c->facts.residency,
                 .backend = c->number,
                 .failure = &c->failure};
    if (!r) return s;
    s.n_tok = r->n_tok, s.ids = r->ids, s.x = r->x, s.taken = r->taken, s.tap = r->tap;
    s.spans = r->spans, s.n_spans = r->n_spans;
    s.logit_rows = r->logit_rows, s.n_logits = r->n_logits, s.logits = r->logits;
    return s;
}

static void begin(ds_backend *backend, const ds_request *whole, const ds_request *tail) {
    cpu *c = (cpu *)backend;
    c->steps[0] = step_of(c, whole);
    c->steps[1] = step_of(c, tail);
}

static void destroy(ds_backend *backend) {
    cpu *c = (cpu *)backend;
    if (c->apart && c->process == ds_process_id()) { /* a forked child has no thread to wait for */
        ds_lock_take(&c->lock);
        c->ending = true;
        ds_signal_send(&c->changed);
        ds_lock_give(&c->lock);
        ds_thread_join(c->thread);
        ds_signal_free(&c->changed);
        ds_lock_free(&c->lock);
    }
    ds_pool_destroy(c->pool);
    ds_scratch_release(&c->scratch);
    free(c);
}

static const ds_backend_ops OPS = {
    .reserve = reserve, .bytes = bytes, .begin = begin, .submit = submit, .wait = wait_for, .destroy = destroy};

static ds_status choose_kernels(const char *isa, const ds_kernels **out, ds_error *err) {
    int n;
    const ds_kernels *const *all = ds_kernels_available(&n);
    char names[160];
    size_t used = 0;
    if ((*out = ds_kernels_find(isa))) return DS_OK;
    names[0] = '\0';
    for (int i = 0; i < n && used < sizeof names; i++)
        used += (size_t)snprintf(names + used, sizeof names - used, "%s%s", i ? ", " : "", all[i]->isa);
    ds_fail(err, DS_EINVAL, "instruction set `%s` is not available on this machine", isa ? isa : ds_cpu_isa_override());
    snprintf(err->hint, sizeof err->hint, "use one of: %s", names);
    return err->status;
}

/* On failure the lock and the signal are gone again. */
static ds_status start_apart(cpu *c, ds_error *err) {
    if (!ds_lock_init(&c->lock)) return ds_fail(err, DS_ENOMEM, "no memory for a lock");
    if (!ds_signal_init(&c->changed)) {
        ds_lock_free(&c->lock);
        return ds_fail(err, DS_ENOMEM, "no memory for a signal");
    }
    if (ds_thread_start(work_apart, c, &c->thread) == 0) return DS_OK;
    ds_signal_free(&c->changed);
    ds_lock_free(&c->lock);
    return ds_fail(err, DS_ENOMEM, "cannot start the thread of backend %d", c->number);
}

ds_status ds_cpu_backend_create(const ds_facts *facts, int number, int n_threads, const char *isa, bool apart,
                                ds_backend **out, ds_error *err) {
    ds_status st;
    if (n_threads < 0 || n_threads > DS_MAX_THREADS)
        return ds_fail(err, DS_EINVAL, "threads is %d, expected 1 to %d", n_threads, DS_MAX_THREADS);
    cpu *c = calloc(1, sizeof *c);
    if (!c) return ds_fail(err, DS_ENOMEM, "no memory for a backend");
    c->facts = *facts;
    c->number = number;
    if ((st = choose_kernels(isa, &c->kern, err)) != DS_OK) goto failed;
    if ((st = ds_pool_create(n_threads ? n_threads : ds_os_cores(), &c->pool, err)) != DS_OK) goto failed;
    if (apart && (st = start_apart(c, err)) != DS_OK) goto failed;
    c->apart = apart;
    c->process = ds_process_id();
    c->head =
        (ds_backend){.ops = &OPS, .isa = c->kern->isa, .n_threads = ds_pool_size(c->pool), .n_together = DS_CHUNK};
    *out = &c->head;
    return DS_OK;
failed:
    ds_pool_destroy(c->pool);
    free(c);
    return st;
}
