/* pool.c: the thread team. Every wait is on an event: a counter that only goes up, spun on briefly and then slept on. */
#include "base/pool.h"

#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#if defined(__linux__) && !defined(DS_POOL_CONDVAR)
#define POOL_FUTEX 1
#include <linux/futex.h>
#include <sys/syscall.h>
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
#ifndef POOL_FUTEX
    pthread_mutex_t lock;
    pthread_cond_t changed;
#endif
} event;

struct ds_pool {
    int n_threads, n_started;
    pid_t owner; /* the process whose threads these are */
    int64_t spin_ns; /* 0 where there are more threads than processors: the peer waited for needs this one */
    pthread_t *threads; /* (n_started): workers 1 ... */
    ds_worker *workers; /* (n_threads) */
    pthread_mutex_t turn; /* callers from several threads take turns */
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

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

#ifdef POOL_FUTEX

static int event_init(event *e) { return 0; }

static void event_free(event *e) {}

static void event_sleep(event *e, uint32_t old) {
    /* The kernel compares the value once more, so that a signal between our look and this call is not lost. */
    syscall(SYS_futex, &e->value, FUTEX_WAIT_PRIVATE, old, NULL, NULL, 0);
}

static void event_signal(event *e) {
    /* Both sides are sequentially consistent: either this sees the sleeper, or the sleeper sees the new value. */
    atomic_fetch_add(&e->value, 1);
    if (atomic_load(&e->n_sleepers) > 0) {
        syscall(SYS_futex, &e->value, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
    }
}

#else

static int event_init(event *e) {
    int code = pthread_mutex_init(&e->lock, NULL);
    if (code == 0 && (code = pthread_cond_init(&e->changed, NULL)) != 0) {
        pthread_mutex_destroy(&e->lock);
    }
    return code;
}

static void event_free(event *e) {
    pthread_cond_destroy(&e->changed);
    pthread_mutex_destroy(&e->lock);
}

static void event_sleep(event *e, uint32_t old) {
    pthread_mutex_lock(&e->lock);
    while (atomic_load(&e->value) == old) {
        pthread_cond_wait(&e->changed, &e->lock);
    }
    pthread_mutex_unlock(&e->lock);
}

static void event_signal(event *e) {
    atomic_fetch_add(&e->value, 1);
    if (atomic_load(&e->n_sleepers) > 0) {
        /* Taken and given back: a sleeper between its look and its wait holds the lock, and must not miss the call. */
        pthread_mutex_lock(&e->lock);
        pthread_mutex_unlock(&e->lock);
        pthread_cond_broadcast(&e->changed);
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
        deadline = deadline ? deadline : now_ns() + spin_ns;
    } while (spin_ns > 0 && now_ns() < deadline);
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
    pthread_mutex_lock(&pool->turn);
    pool->fn = fn;
    pool->arg = arg;
    event_signal(&pool->work);
    fn(&pool->workers[0], arg);
    /* After this barrier every worker has left fn, and none reads fn or arg again before `work` moves. */
    ds_barrier(&pool->workers[0]);
    pthread_mutex_unlock(&pool->turn);
}

int ds_pool_size(const ds_pool *pool) { return pool->n_threads; }

/* Start the workers with every signal blocked, so that Ctrl-C lands on a thread that expects it. */
static int start_workers(ds_pool *pool) {
    sigset_t all, before;
    int code = 0;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int i = 1; i < pool->n_threads && code == 0; i++) {
        code = pthread_create(&pool->threads[i - 1], NULL, worker_main, &pool->workers[i]);
        pool->n_started += code == 0;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return code;
}

static void stop_workers(ds_pool *pool) {
    pool->fn = NULL;
    event_signal(&pool->work);
    for (int i = 0; i < pool->n_started; i++) {
        pthread_join(pool->threads[i], NULL);
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
    pool->owner = getpid();
    pool->spin_ns = n_threads <= sysconf(_SC_NPROCESSORS_ONLN) ? SPIN_NS : 0;
    pool->workers = calloc((size_t)n_threads, sizeof *pool->workers);
    pool->threads = calloc((size_t)n_threads, sizeof *pool->threads);
    if (!pool->workers || !pool->threads || pthread_mutex_init(&pool->turn, NULL) != 0) {
        goto no_turn;
    }
    if (event_init(&pool->work) != 0) {
        goto no_work;
    }
    if (event_init(&pool->phase) != 0) {
        goto no_phase;
    }
    for (int i = 0; i < n_threads; i++) {
        pool->workers[i] = (ds_worker){pool, i, n_threads};
    }
    return pool;
no_phase:
    event_free(&pool->work);
no_work:
    pthread_mutex_destroy(&pool->turn);
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
    if (pool->owner == getpid()) {
        stop_workers(pool);
    } /* a forked child has no threads to wait for */
    event_free(&pool->phase);
    event_free(&pool->work);
    pthread_mutex_destroy(&pool->turn);
    free(pool->threads);
    free(pool->workers);
    free(pool);
}
