/* pool.c: the thread team. Every wait is on an event: a counter that only goes up, spun on briefly and then slept on. */
#include "base/pool.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/os.h"

#if DS_OS_WORDS && !defined(DS_POOL_CONDVAR)
#define POOL_WORDS 1
#endif

enum {
    CACHE_LINE = 64,
    MAX_THREADS = 512,
    /* About as long as one phase of a decoded token's layer is uneven. A sleep and its wake cost some 50 us. */
    SPIN_NS = 40 * 1000,
    PAUSES_PER_LOOK = 32, /* between looks at the clock */
};

typedef struct event {
    _Atomic uint32_t value;
    _Atomic uint32_t n_sleepers; /* lets a signal skip the kernel where everybody spins */
#ifndef POOL_WORDS
    ds_lock lock;
    ds_signal changed;
#endif
} event;

struct ds_pool {
    int n_threads, n_started;
    int64_t owner; /* the process whose threads these are */
    int64_t spin_ns; /* 0 where there are more threads than processors: the peer waited for needs this one */
    ds_thread *threads; /* (n_started): workers 1 ... */
    ds_worker *workers; /* (n_threads) */
    ds_lock turn; /* callers from several threads take turns */
    void (*fn)(const ds_worker *worker, void *arg); /* NULL tells the workers to end; written before `work` moves */
    void *arg;
    /* On lines of their own: written by every thread, and fn and arg beside them are read by every thread. */
    _Alignas(CACHE_LINE) event work; /* moves once for each run */
    _Alignas(CACHE_LINE) event phase; /* moves once for each barrier */
    _Alignas(CACHE_LINE) _Atomic int n_arrived;
    _Alignas(CACHE_LINE) _Atomic size_t next_claim;
};

static inline void cpu_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory"); /* `yield` does nothing on most cores */
#endif
}

#ifdef POOL_WORDS

static bool event_init(event *e) { return true; }

static void event_free(event *e) {}

/* The word is compared once more before the sleep, so that a signal between our look and this call is not lost. */
static void event_sleep(event *e, uint32_t old) { ds_word_sleep(&e->value, old); }

static void event_signal(event *e) {
    /* Both sides are sequentially consistent: either this sees the sleeper, or the sleeper sees the new value. */
    atomic_fetch_add(&e->value, 1);
    if (atomic_load(&e->n_sleepers) > 0) {
        ds_word_wake(&e->value);
    }
}

#else

static bool event_init(event *e) {
    if (!ds_lock_init(&e->lock)) return false;
    if (ds_signal_init(&e->changed)) return true;
    ds_lock_free(&e->lock);
    return false;
}

static void event_free(event *e) {
    ds_signal_free(&e->changed);
    ds_lock_free(&e->lock);
}

static void event_sleep(event *e, uint32_t old) {
    ds_lock_take(&e->lock);
    while (atomic_load(&e->value) == old) {
        ds_signal_wait(&e->changed, &e->lock);
    }
    ds_lock_give(&e->lock);
}

static void event_signal(event *e) {
    atomic_fetch_add(&e->value, 1);
    if (atomic_load(&e->n_sleepers) > 0) {
        /* Taken and given back: a sleeper between its look and its wait holds the lock, and must not miss the call. */
        ds_lock_take(&e->lock);
        ds_lock_give(&e->lock);
        ds_signal_send(&e->changed);
    }
}

#endif

static bool spin_until_moved(event *e, uint32_t old, int64_t spin_ns) {
    int64_t deadline = 0;
    do {
        for (int i = 0; i < PAUSES_PER_LOOK; i++) {
            if (atomic_load_explicit(&e->value, memory_order_acquire) != old) {
                return true;
            }
            cpu_pause();
        }
        deadline = deadline ? deadline : ds_now_ns() + spin_ns;
    } while (spin_ns > 0 && ds_now_ns() < deadline);
    return false;
}

/* Return once the event has moved on from `old`. */
static void event_wait(event *e, uint32_t old, int64_t spin_ns) {
    if (spin_until_moved(e, old, spin_ns)) {
        return;
    }
    atomic_fetch_add(&e->n_sleepers, 1);
    while (atomic_load(&e->value) == old) {
        event_sleep(e, old);
    }
    atomic_fetch_sub(&e->n_sleepers, 1);
}

void ds_barrier(const ds_worker *worker) {
    ds_pool *pool = worker->pool;
    /* Read before arriving: the phase cannot move while this worker is missing. */
    uint32_t old = atomic_load_explicit(&pool->phase.value, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&pool->n_arrived, 1, memory_order_acq_rel) + 1 < pool->n_threads) {
        event_wait(&pool->phase, old, pool->spin_ns);
        return;
    }
    /* The last to arrive is alone: the others move again only after the phase has. */
    atomic_store_explicit(&pool->n_arrived, 0, memory_order_relaxed);
    atomic_store_explicit(&pool->next_claim, 0, memory_order_relaxed);
    event_signal(&pool->phase);
}

size_t ds_claim(const ds_worker *worker) {
    return atomic_fetch_add_explicit(&worker->pool->next_claim, 1, memory_order_relaxed);
}

static void *worker_main(void *arg) {
    const ds_worker *self = arg;
    ds_pool *pool = self->pool;
    for (uint32_t seen = 0;; seen++) {
        event_wait(&pool->work, seen, pool->spin_ns);
        if (!pool->fn) {
            return NULL;
        }
        pool->fn(self, pool->arg);
        ds_barrier(self);
    }
}

void ds_pool_run(ds_pool *pool, void (*fn)(const ds_worker *worker, void *arg), void *arg) {
    ds_lock_take(&pool->turn);
    pool->fn = fn;
    pool->arg = arg;
    event_signal(&pool->work);
    fn(&pool->workers[0], arg);
    /* After this barrier every worker has left fn, and none reads fn or arg again before `work` moves. */
    ds_barrier(&pool->workers[0]);
    ds_lock_give(&pool->turn);
}

int ds_pool_size(const ds_pool *pool) { return pool->n_threads; }

static int start_workers(ds_pool *pool) {
    int code = 0;
    for (int i = 1; i < pool->n_threads && code == 0; i++) {
        code = ds_thread_start(worker_main, &pool->workers[i], &pool->threads[i - 1]);
        pool->n_started += code == 0;
    }
    return code;
}

static void stop_workers(ds_pool *pool) {
    pool->fn = NULL;
    event_signal(&pool->work);
    for (int i = 0; i < pool->n_started; i++) {
        ds_thread_join(pool->threads[i]);
    }
}

/* Memory and locks of a pool without threads; NULL where the system refuses. */
static ds_pool *pool_new(int n_threads) {
    ds_pool *pool = aligned_alloc(CACHE_LINE, sizeof *pool); /* its size is a multiple of its alignment */
    if (!pool) {
        return NULL;
    }
    memset(pool, 0, sizeof *pool);
    pool->n_threads = n_threads;
    pool->owner = ds_process_id();
    pool->spin_ns = n_threads <= ds_os_processors() ? SPIN_NS : 0;
    pool->workers = calloc((size_t)n_threads, sizeof *pool->workers);
    pool->threads = calloc((size_t)n_threads, sizeof *pool->threads);
    if (!pool->workers || !pool->threads || !ds_lock_init(&pool->turn)) {
        goto no_turn;
    }
    if (!event_init(&pool->work)) {
        goto no_work;
    }
    if (!event_init(&pool->phase)) {
        goto no_phase;
    }
    for (int i = 0; i < n_threads; i++) {
        pool->workers[i] = (ds_worker){pool, i, n_threads};
    }
    return pool;
no_phase:
    event_free(&pool->work);
no_work:
    ds_lock_free(&pool->turn);
no_turn:
    free(pool->threads);
    free(pool->workers);
    free(pool);
    return NULL;
}

ds_status ds_pool_create(int n_threads, ds_pool **out, ds_error *err) {
    if (n_threads < 1 || n_threads > MAX_THREADS) {
        return ds_fail(err, DS_EINVAL, "%d threads, expected 1 to %d", n_threads, MAX_THREADS);
    }
    ds_pool *pool = pool_new(n_threads);
    if (!pool) {
        return ds_fail(err, DS_ENOMEM, "no memory for a pool of %d threads", n_threads);
    }
    int code = start_workers(pool);
    if (code != 0) {
        int n_started = pool->n_started;
        ds_pool_destroy(pool);
        ds_fail(err, DS_ENOMEM, "cannot start thread %d of %d: %s", n_started + 2, n_threads, strerror(code));
        return ds_hint(err, "ask for fewer threads, or raise the process limit (ulimit -u)");
    }
    *out = pool;
    return DS_OK;
}

void ds_pool_destroy(ds_pool *pool) {
    if (!pool) {
        return;
    }
    if (pool->owner == ds_process_id()) {
        stop_workers(pool);
    } /* a forked child has no threads to wait for */
    event_free(&pool->phase);
    event_free(&pool->work);
    ds_lock_free(&pool->turn);
    free(pool->threads);
    free(pool->workers);
    free(pool);
}
