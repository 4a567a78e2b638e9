/* block.h: what a block of columns is solved with: the tables of its covariance, in the order in which they are read. */
#pragma once

enum { N_TILES = WIDTH / TILE, HALVES = 512 };

typedef struct block {
    const ds_grid *grid;
    int n, n_subs;
    const float *cov, *var; /* (n, WIDTH), (n) */
    float before[N_TILES][WIDTH][TILE]; /* tri, by tile of columns: what rows up to the tile's own send there */
    float after[N_TILES][WIDTH]
               [TILE]; /* tri's transpose, by tile of its columns: what rows from the tile's own on send */
    float all[N_TILES][WIDTH][TILE]; /* cov, by tile of columns */
    float ones[WIDTH][DS_MAX_SUBS]; /* cov times the ones of each run */
    float mass[DS_MAX_SUBS][DS_MAX_SUBS]; /* and over pairs of runs */
    _Alignas(64) float inverse[WIDTH]; /* of the diagonal of cov */
    float middle[16], step[16]; /* grids with values: between a value and the next */
    halves halves; /* grids of points */
} block;

DS_INLINE float value_of(const ds_grid *g, int code) { return (float)(g->values ? g->values[code] : code); }

DS_INLINE void block_open(block *b, const ds_grid *g, const ds_sweep *sweep, int first, int n) {
    const float *tri = sweep->tri + (size_t)first * WIDTH;
    b->grid = g, b->n = n, b->n_subs = n / g->sub;
    b->cov = sweep->cov + (size_t)first * WIDTH;
    b->var = sweep->var + first;
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) {
            b->all[j / TILE][i][j % TILE] = b->cov[i * WIDTH + j];
            if (i / TILE <= j / TILE)
                b->before[j / TILE][i][j % TILE] = b->after[i / TILE][j][i % TILE] = tri[i * WIDTH + j];
        }
    memset(b->ones, 0, sizeof b->ones);
    memset(b->mass, 0, sizeof b->mass);
    for (int i = 0; i < n; i++) {
        const float *row = b->cov + i * WIDTH, own = row[i];
        b->inverse[i] = own > TINY ? 1.0f / own : 0.0f;
        for (int j = 0; j < n; j++) b->ones[i][j / g->sub] += row[j];
        for (int s = 0; s < b->n_subs; s++) b->mass[i / g->sub][s] += b->ones[i][s];
    }
    if (g->points) list_halves(g->points, &b->halves);
    for (int k = 0; g->values && k < g->q_max; k++) {
        b->middle[k] = 0.5f * (float)(g->values[k] + g->values[k + 1]);
        b->step[k] = (float)(g->values[k + 1] - g->values[k]);
    }
}

/* The scales of LANES rows' blocks. */
typedef struct scales {
    lanes d, dmin; /* nested: as halves round them */
    lanes sc[DS_MAX_SUBS]; /* nested: integers */
    lanes m[DS_MAX_SUBS];
    lanes scale[DS_MAX_SUBS]; /* d * sc, or a half */
    lanes min[DS_MAX_SUBS];
} scales;
