/* disk_stress.c: a model whose experts are read from its file, with a drive that is slow, fails, falls short, or refuses
 * reads past the cache: the logits are the mapping's, or the step fails with one error and the next one runs. Linked with
 * -Wl,--wrap=ds_file_read,--wrap=ds_file_direct. Takes the path of a small GGUF; returns 1 where something is wrong. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "arch/file.h"
#include "memory/slots.h"
#include "whole_run.h"

enum {
    N_FILES = 256, /* numbers of them */
    WORST_STOP_MS = 30000 /* of a machine that is busy, checks every access, and stands still for moments */
};

/* ---- The drive ---- */

static struct drive {
    atomic_int slow_us; /* of a read, and up to as much again */
    atomic_int fail_in, cut_in; /* reads until one fails, or falls short; 0: none */
    atomic_int n_reads;
    atomic_bool cached; /* no reads past the cache */
    atomic_bool refuses; /* says that it has them, and has not: */
    atomic_bool past[N_FILES]; /* where they were asked for since */
} drive;

int64_t __real_ds_file_read(ds_file file, void *to, size_t n, int64_t offset);
int64_t __wrap_ds_file_read(ds_file file, void *to, size_t n, int64_t offset);
bool __real_ds_file_direct(ds_file file, bool on);
bool __wrap_ds_file_direct(ds_file file, bool on);

static void sleep_us(int us) { nanosleep(&(struct timespec){us / 1000000, us % 1000000 * 1000L}, NULL); }

static bool is_due(atomic_int *in) { return atomic_load(in) > 0 && atomic_fetch_sub(in, 1) == 1; }

int64_t __wrap_ds_file_read(ds_file file, void *to, size_t n, int64_t offset) {
    const int us = atomic_load(&drive.slow_us), i = atomic_fetch_add(&drive.n_reads, 1);
    if (us) sleep_us(us + us * (i * 7 % 5) / 4);
    if (is_due(&drive.fail_in)) return errno = EIO, -1;
    if (atomic_load(&drive.refuses) && atomic_load(&drive.past[file])) {
        sleep_us(20 * 1000); /* until every thread that reads has been refused */
        return errno = EINVAL, -1;
    }
    const int64_t got = __real_ds_file_read(file, to, n, offset);
    return is_due(&drive.cut_in) && got > 0 ? 1 : got;
}

bool __wrap_ds_file_direct(ds_file file, bool on) {
    if (atomic_load(&drive.refuses)) return atomic_store(&drive.past[file], on), true;
    return on && atomic_load(&drive.cached) ? false : __real_ds_file_direct(file, on);
}

/* ---- The model ---- */

static atomic_int stop_in; /* looks until who waits is stopped; 0: never */
static bool stops(void *ctx) { return is_due(&stop_in); }

typedef struct setting {
    int n_threads;
    bool split; /* half of the experts on another device */
} setting;

static ds_status open_core(const ds_gguf *gguf, setting how, const ds_budget *budget, ds_core *core, ds_error *err) {
    const ds_device processor = {"cpu", how.n_threads, NULL}, other = {"cpu", 2, NULL};
    ds_rule rule = {.part = DS_PART_EXPERTS, .device = 1};
    const ds_placement placement = {&other, 1, &rule, 1};
    const ds_core_spec spec = {.layer_end = -1,
                               .ends = true,
                               .processor = &processor,
                               .placement = how.split ? &placement : NULL,
                               .budget = budget};
    ds_file_source file;
    ds_config c;
    ds_status st = ds_file_source_open(gguf, &file, err);
    if (st != DS_OK) return st;
    if ((st = ds_config_read(gguf, ds_file_source_view(&file), &c, err)) == DS_OK) {
        rule.layer_begin = c.n_layer_dense, rule.layer_end = c.n_layer, rule.expert_end = (c.n_expert + 1) / 2;
        st = ds_core_create(gguf, ds_file_source_view(&file), &spec, core, err);
    }
    ds_file_source_close(&file);
    return st;
}

/* ---- The checks ---- */

typedef struct expectation {
    const float *logits; /* the mapping's */
    float *room;
    size_t n;
    char what[96];
} expectation;

static bool says(const expectation *x, const char *fault, const ds_error *err) {
    printf("disk_stress: %s: %s%s%s\n", x->what, fault, err ? ": " : "", err ? err->message : "");
    return false;
}

static bool runs_the_same(const expectation *x, ds_core *core) {
    ds_error err;
    memset(x->room, 0, x->n * sizeof *x->room);
    if (run(core, x->room, &err) != DS_OK) return says(x, "failed", &err);
    return memcmp(x->room, x->logits, x->n * sizeof *x->room) == 0 || says(x, "other logits than the mapping's", NULL);
}

static bool fails_with(const expectation *x, ds_core *core, ds_status status, const char *text) {
    ds_error err = {0};
    if (run(core, x->room, &err) == status && strstr(err.message, text)) return true;
    return says(x, "expected an error", &err);
}

static double ms_now(void) { return (double)ds_now_ns() / 1e6; }

static bool check_core(const expectation *x, ds_core *core) {
    ds_residency_counts decoding, reading;
    bool good = runs_the_same(x, core) && runs_the_same(x, core);
    core->residency->ops->count(core->residency, &decoding, &reading);
    if (decoding.n_tokens != 2 * N_STEPS || reading.n_tokens != 2 * N_TOK || !decoding.needed || !reading.bytes_read ||
        decoding.ready + decoding.late > decoding.needed)
        good = says(x, "counts that cannot be", NULL);
    atomic_store(&drive.fail_in, 5);
    good = good && fails_with(x, core, DS_EIO, "cannot read");
    atomic_store(&drive.fail_in, 0); /* a forecast's failure is nobody's */
    good = good && runs_the_same(x, core);
    atomic_store(&drive.cut_in, 4);
    good = good && fails_with(x, core, DS_EIO, "the file ends before");
    atomic_store(&drive.cut_in, 0);
    good = good && runs_the_same(x, core);
    const int slow = atomic_exchange(&drive.slow_us, 40 * 1000);
    atomic_store(&stop_in, 2);
    const double begun = ms_now();
    good = good && fails_with(x, core, DS_ESTOPPED, "stopped");
    if (ms_now() - begun > 2 * DS_STOP_LOOK_NS / 1e6 + WORST_STOP_MS) good = says(x, "slow to stop", NULL);
    atomic_store(&stop_in, 0);
    atomic_store(&drive.slow_us, slow);
    return good && runs_the_same(x, core);
}

/* File systems without reads past the cache: one that says so, and one that only refuses the reads, all at once. */
static bool check_caching(expectation *x, const ds_gguf *gguf, setting how, const ds_budget *budget) {
    ds_core core;
    ds_error err;
    bool good = true;
    atomic_store(&drive.slow_us, 0);
    for (int refuses = 0; refuses <= 1 && good; refuses++) {
        snprintf(x->what, sizeof x->what, "%d threads, %s, %s", how.n_threads, how.split ? "two devices" : "one device",
                 refuses ? "reads past the cache refused" : "no reads past the cache");
        atomic_store(&drive.cached, !refuses);
        atomic_store(&drive.refuses, refuses);
        good = open_core(gguf, how, budget, &core, &err) == DS_OK || says(x, "not opened", &err);
        if (good) {
            const ds_notes *notes = &core.config.notes;
            good = runs_the_same(x, &core);
            if (!notes->n || !strstr(notes->text[notes->n - 1], "cache"))
                good = says(x, "reads through the cache that nothing is said of", NULL);
            ds_core_release(&core);
        }
        atomic_store(&drive.cached, false);
        atomic_store(&drive.refuses, false);
    }
    return good;
}

/* Of the experts' memory: none but a slot of each size, some, nearly all. */
static bool check_budgets(const ds_gguf *gguf, setting how) {
    static const double SHARES[] = {0, 0.15, 0.5, 0.9};
    ds_core mapped, core;
    ds_error err;
    if (open_core(gguf, how, NULL, &mapped, &err) != DS_OK) return printf("disk_stress: %s\n", err.message), false;
    expectation x = {.n = (size_t)N_CTX * (size_t)mapped.config.n_vocab};
    float *expected = calloc(x.n, sizeof *expected);
    x.logits = expected, x.room = calloc(x.n, sizeof *x.room);
    const size_t shared = ds_loaded_bytes(gguf, &mapped.config) + mapped.weights.owned_bytes,
                 least = ds_slots_least(&mapped.config, &mapped.weights),
                 most = least * (size_t)mapped.config.n_expert; /* of a layer of each size */
    bool good = run(&mapped, expected, &err) == DS_OK && isfinite(expected[0]);
    for (size_t i = 0; i < sizeof SHARES / sizeof *SHARES && good; i++) {
        const ds_budget budget = {.ram = shared + least + (size_t)(SHARES[i] * (double)(most - least)), .stop = stops};
        atomic_store(&drive.slow_us, i % 2 ? 300 : 0);
        snprintf(x.what, sizeof x.what, "%d threads, %s, %.2f of a layer's experts", how.n_threads,
                 how.split ? "two devices" : "one device", SHARES[i]);
        if (open_core(gguf, how, &budget, &core, &err) != DS_OK) {
            good = says(&x, "not opened", &err);
            break;
        }
        if (!core.residency->ops->wait) good = says(&x, "mapped all the same: the file is too small for this", NULL);
        good = good && check_core(&x, &core);
        ds_core_release(&core);
    }
    const ds_budget small = {.ram = shared + least, .stop = stops};
    good = good && check_caching(&x, gguf, how, &small);
    free(expected);
    free(x.room);
    ds_core_release(&mapped);
    return good;
}

/* What cannot be opened. */
static bool check_opening(const ds_gguf *gguf) {
    const setting how = {2, false};
    ds_budget budget = {.ram = 1000, .stop = stops};
    ds_core core;
    ds_error err = {0};
    expectation x = {.what = "opening"};
    bool good = open_core(gguf, how, &budget, &core, &err) == DS_EINVAL || says(&x, "opened in 1000 bytes", NULL);
    size_t least = 0;
    sscanf(strstr(err.message, "at least "), "at least %zu", &least);
    budget.ram = least - 1;
    good = good && (open_core(gguf, how, &budget, &core, &err) == DS_EINVAL || says(&x, "less than the least", NULL));
    budget.ram = least;
    atomic_store(&drive.fail_in, 2);
    good = good && (open_core(gguf, how, &budget, &core, &err) == DS_EIO || says(&x, "a read that failed", NULL));
    atomic_store(&drive.fail_in, 0);
    atomic_store(&drive.slow_us, 100 * 1000);
    atomic_store(&stop_in, 1);
    good = good && (open_core(gguf, how, &budget, &core, &err) == DS_ESTOPPED || says(&x, "not stopped", NULL));
    atomic_store(&stop_in, 0);
    atomic_store(&drive.slow_us, 0);
    return good;
}

int main(int argc, char **argv) {
    ds_gguf *gguf;
    ds_error err;
    bool good = argc == 2 && ds_gguf_open(argv[1], &gguf, &err) == DS_OK;
    good = good && check_opening(gguf);
    for (int n_threads = 1; n_threads <= 3 && good; n_threads++)
        good = check_budgets(gguf, (setting){n_threads, false}) && check_budgets(gguf, (setting){n_threads, true});
    if (argc == 2) ds_gguf_close(gguf);
    puts(good ? "disk_stress: experts from a drive, the same logits" : "disk_stress: WRONG");
    return good ? 0 : 1;
}
