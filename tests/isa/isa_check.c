/* isa_check.c: every kernel of every table that this machine runs, against the scalar table: bit for bit where sums are
 * integers, within what floats round elsewhere. Runs without Python, so that it can run under an emulator.
 *
 * isa_check [ISA...]: those tables must be here; the first figure of each line is the number of values compared. */
#include "check.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { MAX_BUFFERS = 4096, MESSAGES = 20 };

static struct {
    void *at;
    size_t bytes;
} buffers[MAX_BUFFERS];
static int n_buffers;

void *buffer(size_t bytes) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), whole = (bytes + 63) / 64 * 64,
                 mapped = (whole + page - 1) / page * page + page;
    char *at = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED || n_buffers == MAX_BUFFERS || mprotect(at + mapped - page, page, PROT_NONE) != 0) {
        fprintf(stderr, "isa_check: no memory\n");
        _exit(2);
    }
    buffers[n_buffers].at = at;
    buffers[n_buffers++].bytes = mapped;
    return at + mapped - page - whole;
}

void release(void) {
    while (n_buffers > 0) n_buffers--, munmap(buffers[n_buffers].at, buffers[n_buffers].bytes);
}

static uint64_t random_state = 1;

uint32_t random_bits(void) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 32);
}

int random_int(int low, int high) { return low + (int)(random_bits() % (uint32_t)(high - low + 1)); }

/* Twelve uniform numbers less their mean. */
float random_normal(void) {
    double sum = -6.0;
    for (int i = 0; i < 12; i++) sum += random_bits() * 0x1p-32;
    return (float)sum;
}

static void wrong(check *c, const char *name, size_t i, double got, double want, double bound) {
    if (c->n_wrong++ < MESSAGES)
        printf("%s: %s, %s: [%zu] is %.9g, expected %.9g within %.3g\n", c->isa->isa, c->what, name, i, got, want,
               bound);
}

void same_floats(check *c, const char *name, size_t n, const float *got, const float *want) {
    c->n_compared += (int)n;
    for (size_t i = 0; i < n; i++)
        if (memcmp(got + i, want + i, sizeof *got) != 0 && !(isnan(got[i]) && isnan(want[i])))
            wrong(c, name, i, got[i], want[i], 0);
}

void same_bytes(check *c, const char *name, size_t n, const void *got, const void *want) {
    const uint8_t *a = got, *b = want;
    c->n_compared += (int)n;
    for (size_t i = 0; i < n; i++)
        if (a[i] != b[i]) wrong(c, name, i, a[i], b[i], 0);
}

void close_floats(check *c, const char *name, size_t n, const float *got, const float *want, const double *bound) {
    c->n_compared += (int)n;
    for (size_t i = 0; i < n; i++)
        if (!(fabs((double)got[i] - (double)want[i]) <= bound[i])) wrong(c, name, i, got[i], want[i], bound[i]);
}

static bool is_asked_for(const char *isa, int n, char **names) {
    for (int i = 0; i < n; i++)
        if (strcmp(names[i], isa) == 0) return true;
    return n == 0;
}

int main(int argc, char **argv) {
    int n, n_wrong = 0, n_checked = 0;
    const ds_kernels *const *tables = ds_kernels_available(&n);
    for (int i = 1; i < argc; i++)
        if (!ds_kernels_find(argv[i])) printf("%s: not here\n", argv[i]), n_wrong++;
    for (int i = 0; i < n - 1; i++) { /* scalar is the last */
        if (!is_asked_for(tables[i]->isa, argc - 1, argv + 1)) continue;
        check c = {.isa = tables[i], .scalar = tables[n - 1]};
        check_products(&c);
        check_rows(&c);
        check_attention(&c);
        printf("%s: %d values compared, %d wrong\n", c.isa->isa, c.n_compared, c.n_wrong);
        n_wrong += c.n_wrong;
        n_checked++;
    }
    if (n_checked == 0) printf("no table but scalar here\n");
    return n_wrong > 0 || n_checked == 0;
}
