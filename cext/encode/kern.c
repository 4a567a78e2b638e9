/* kern.c: the encoder's loops, compiled once per ISA (DS_ISA names it). Plain C that compilers make vectors of. */
#include "encode/kern.h"

#include <stdbool.h>

#include "encode/lanes.h"
#include "encode/points.h"
#include "encode/block.h"
#include "encode/start.h"
#include "encode/solve.h"

/* What is kept of a group of rows' block between sweeps. */
typedef struct kept {
    scales c;
    int8_t v[WIDTH][LANES];
} kept;

enum { CARRY_ROWS = 256 }; /* of carry, packed at a time: with their errors they stay in the second-level cache */

/* One call's memory: n_groups = ceil(n_rows / LANES), n_blocks = ceil(n / WIDTH). */
typedef struct work {
    block b;
    solver s;
    float carry[N_TILES][CARRY_ROWS][TILE];
    lanes *w; /* (n_groups, WIDTH) the rows' block */
    lanes *t; /* (n_groups, WIDTH) its targets */
    lanes *e; /* (n_groups, n) errors so far; zeros at first */
    kept *k;  /* (n_groups, n_blocks) */
} work;

static size_t groups_of(int n_rows) { return ((size_t)n_rows + LANES - 1) / LANES; }
static size_t blocks_of(int n) { return ((size_t)n + WIDTH - 1) / WIDTH; }

static size_t work_bytes(int n, int n_rows) {
    const size_t groups = groups_of(n_rows);
    return sizeof(work) +
           groups * (2 * WIDTH * sizeof(lanes) + (size_t)n * sizeof(lanes) + blocks_of(n) * sizeof(kept));
}

static work *work_open(void *memory, int n, int n_rows) {
    const size_t groups = groups_of(n_rows);
    work *a = memory;
    a->w = (lanes *)(a + 1);
    a->t = a->w + groups * WIDTH;
    a->e = a->t + groups * WIDTH;
    a->k = (kept *)(a->e + groups * (size_t)n);
    memset(a->e, 0, groups * (size_t)n * sizeof *a->e);
    return a;
}

/* t += e at columns from..to times carry (rows from..to, columns first..first + n). */
static void carry_errors(const ds_sweep *sweep, int n_rows, int from, int to, int first, int n, work *a) {
    const size_t ld = (size_t)sweep->n, groups = groups_of(n_rows);
    for (int k0 = from; k0 < to; k0 += CARRY_ROWS) {
        const int n_k = to - k0 < CARRY_ROWS ? to - k0 : CARRY_ROWS;
        for (int k = 0; k < n_k; k++)
            for (int c = 0; c < n; c += TILE)
                memcpy(a->carry[c / TILE][k], sweep->carry + (size_t)(k0 + k) * ld + (size_t)(first + c),
                       sizeof a->carry[0][0]);
        for (size_t i = 0; i < groups; i++)
            for (int c = 0; c < n; c += TILE)
                add_products(n_k, a->e + i * ld + k0, a->carry[c / TILE], a->t + i * WIDTH + c);
    }
}

static void take(const block *b, const kept *k, best *found) {
    found->c = k->c;
    for (int i = 0; i < b->n; i++)
        for (int l = 0; l < LANES; l++) ((float *)&found->v[i])[l] = (float)k->v[i][l];
}

static void leave(const block *b, const best *found, kept *k) {
    k->c = found->c;
    for (int i = 0; i < b->n; i++)
        for (int l = 0; l < LANES; l++) k->v[i][l] = (int8_t)((const float *)&found->v[i])[l];
}

static void sweep_block(const ds_sweep *sweep, const ds_effort *effort, bool again, int first,
                        const ds_encode_rows *rows, work *a) {
    const block *b = &a->b;
    const int n = b->n;
    const size_t ld = (size_t)sweep->n, groups = groups_of(rows->n_rows);
    for (size_t i = 0; i < groups; i++) {
        const int left = rows->n_rows - (int)i * LANES;
        rows_to_lanes(n, left < LANES ? left : LANES, rows->w + i * LANES * ld + first, ld, a->w + i * WIDTH);
        memcpy(a->t + i * WIDTH, a->w + i * WIDTH, (size_t)n * sizeof *a->t);
    }
    carry_errors(sweep, rows->n_rows, 0, first, first, n, a);
    if (sweep->all) carry_errors(sweep, rows->n_rows, first + n, sweep->n, first, n, a);
    for (size_t i = 0; i < groups; i++) {
        const int left = rows->n_rows - (int)i * LANES;
        kept *k = a->k + i * blocks_of(sweep->n) + first / WIDTH;
        lanes *e = a->e + i * ld + first;
        solver *s = &a->s;
        memcpy(s->t, a->t + i * WIDTH, (size_t)n * sizeof *s->t);
        if (again) take(b, k, &s->found);
        (again ? solve_again : solve_first)(b, effort, left < LANES ? left : LANES, s);
        leave(b, &s->found, k);
        for (int c = 0; c < n; c++) {
            const int run = c / b->grid->sub;
            e[c] = a->w[i * WIDTH + (size_t)c] - (s->found.v[c] * s->found.c.scale[run] - s->found.c.min[run]);
        }
    }
}

/* The code of every value of a grid, from -128 on. */
static void list_codes(const ds_grid *g, int8_t codes[256]) {
    for (int code = g->q_min; code <= g->q_max; code++) codes[128 + (int)value_of(g, code)] = (int8_t)code;
}

static void write_rows(ds_format format, int n, const ds_encode_rows *rows, const work *a) {
    const ds_grid *g = ds_grid_of(format);
    const size_t row_bytes = ds_row_bytes(format, n), step = ds_row_bytes(format, WIDTH), n_blocks = blocks_of(n);
    const int point_width = g->points ? g->points->width : 0;
    int8_t codes[256] = {0};
    point_table points;
    list_codes(g, codes);
    if (g->points) list_points(g->points, &points);
    for (int r = 0; r < rows->n_rows; r++)
        for (size_t i = 0; i < n_blocks; i++) {
            const int l = r % LANES, left = n - (int)i * WIDTH, width = left < WIDTH ? left : WIDTH;
            const kept *k = a->k + (size_t)(r / LANES) * n_blocks + i;
            ds_choice c = {.d = k->c.d[l], .dmin = k->c.dmin[l]};
            for (int s = 0; s < width / g->sub; s++) {
                c.sc[s] = (int)k->c.sc[s][l], c.m[s] = (int)k->c.m[s][l];
                c.scale[s] = k->c.scale[s][l], c.min[s] = k->c.min[s][l];
            }
            for (int j = 0; j < width; j++) c.q[j] = g->points ? k->v[j][l] : codes[128 + k->v[j][l]];
            for (int j = 0; g->points && j < width; j += point_width)
                c.point[j / point_width] = points.number[key_of(&points, point_width, &k->v[j][l], LANES)];
            ds_pack(format, width, &c, (char *)rows->out + (size_t)r * row_bytes + i * step);
        }
}

static void encode(ds_format format, const ds_sweep *sweeps, int n_sweeps, const ds_effort *effort,
                   const ds_encode_rows *rows, void *memory) {
    work *a = work_open(memory, sweeps[0].n, rows->n_rows);
    for (int i = 0; i < n_sweeps; i++) {
        const ds_sweep *sweep = &sweeps[i];
        for (int first = 0; first < sweep->n; first += WIDTH) {
            block_open(&a->b, ds_grid_of(format), sweep, first, sweep->n - first < WIDTH ? sweep->n - first : WIDTH);
            sweep_block(sweep, effort, i > 0, first, rows, a);
        }
    }
    write_rows(format, sweeps[0].n, rows, a);
}

#define DS_NAME2(isa) ds_encode_##isa
#define DS_NAME(isa) DS_NAME2(isa)
const ds_encode_loops DS_NAME(DS_ISA) = {work_bytes, encode};
