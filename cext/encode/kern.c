/* kern.c: the encoder's loops, compiled once per ISA (DS_ISA names it). Plain C that compilers make vectors of. */
#include "encode/kern.h"

#include <float.h>

#include "encode/vec.h"
#include "encode/start.h"
#include "encode/solve.h"

/* Blocks of a matrix's columns that are multiplied at a time, so that a piece of carry stays in the second-level cache. */
enum { CARRY_ROWS = 256 };

/* t (n_rows, WIDTH) += e (n_rows, ld) at columns from..to times carry (rows from..to, columns first..first + n). */
static void carry_errors(const ds_sweep *sweep, int n_rows, const float *e, int from, int to, int first, int n, float *t) {
    const size_t ld = (size_t)sweep->n;
    for (int k0 = from; k0 < to; k0 += CARRY_ROWS) {
        const int k1 = k0 + CARRY_ROWS < to ? k0 + CARRY_ROWS : to;
        int r = 0;
        for (; r + 4 <= n_rows; r += 4)
            for (int k = k0; k < k1; k += 4)
                axpy4_rows4(n, e + (size_t)r * ld + k, ld, sweep->carry + (size_t)k * ld + first, ld, t + (size_t)r * WIDTH);
        for (; r < n_rows; r++)
            for (int k = k0; k < k1; k += 4) axpy4(n, e + (size_t)r * ld + k, sweep->carry + (size_t)k * ld + first, ld, t + (size_t)r * WIDTH);
    }
}

static void decode(const ds_grid *g, int n, const ds_choice *c, float *y) {
    for (int i = 0; i < n; i++) y[i] = c->scale[i / g->sub] * value_of(g, c->q[i]) - c->min[i / g->sub];
}

/* One row's block in the first sweep, from scales that suit what each column will lose once those after it have carried
 * its error: it wins over starting from the diagonal of cov, and half a percent from the better of both. */
static void solve_first(const block *b, const float *t, const ds_effort *effort, trial *x, best *out) {
    start(b->grid, b->n, t, b->var, &x->c);
    out->c = x->c; /* where scales overflow no loss is a number: the caller finds them in the bytes */
    out->loss = FLT_MAX;
    improve(b, t, effort, x, out);
}

/* And in a later one: from what it has. */
static void solve_again(const block *b, const float *t, const ds_effort *effort, trial *x, best *out) {
    x->c = out->c;
    for (int i = 0; i < b->n; i++) x->v[i] = value_of(b->grid, x->c.q[i]);
    out->loss = measure(b, t, x);
    polish(b, effort->polish, x);
    keep(x, dot(b->n, x->e, x->g), out);
    if (refit(b, x)) keep(x, measure(b, t, x), out);
    improve(b, t, effort, x, out);
}

static void sweep_block(const block *b, const ds_sweep *sweep, const ds_effort *effort, bool again, int first, const ds_encode_rows *rows,
                        const ds_encode_work *work) {
    const int n = b->n, i = first / WIDTH;
    const size_t ld = (size_t)sweep->n, n_blocks = (ld + WIDTH - 1) / WIDTH;
    trial x;
    for (int r = 0; r < rows->n_rows; r++) memcpy(work->t + (size_t)r * WIDTH, rows->w + r * ld + first, (size_t)n * sizeof(float));
    carry_errors(sweep, rows->n_rows, work->e, 0, first, first, n, work->t);
    if (sweep->all) carry_errors(sweep, rows->n_rows, work->e, first + n, sweep->n, first, n, work->t);
    for (int r = 0; r < rows->n_rows; r++) {
        const float *t = work->t + (size_t)r * WIDTH, *w = rows->w + r * ld + first;
        float *e = work->e + r * ld + first, y[WIDTH];
        best found = {.c = work->choices[r * n_blocks + i]};
        (again ? solve_again : solve_first)(b, t, effort, &x, &found);
        work->choices[r * n_blocks + i] = found.c;
        decode(b->grid, n, &found.c, y);
        for (int k = 0; k < n; k++) e[k] = w[k] - y[k];
    }
}

static void encode(const ds_grid *g, const ds_sweep *sweeps, int n_sweeps, const ds_effort *effort, const ds_encode_rows *rows,
                   const ds_encode_work *work) {
    block b;
    for (int i = 0; i < n_sweeps; i++) {
        const ds_sweep *sweep = &sweeps[i];
        for (int first = 0; first < sweep->n; first += WIDTH) {
            block_open(&b, g, sweep, first, sweep->n - first < WIDTH ? sweep->n - first : WIDTH);
            sweep_block(&b, sweep, effort, i > 0, first, rows, work);
        }
    }
}

#define DS_NAME2(isa) ds_encode_##isa
#define DS_NAME(isa) DS_NAME2(isa)
const ds_encode_fn DS_NAME(DS_ISA) = encode;
