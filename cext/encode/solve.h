/* solve.h: one block of columns of one row: codes and scales that lower e cov e^T, e = target - decoded. Codes are chosen one
 * column after the other with what was lost carried on, then polished one at a time; scales are refitted to the codes; and
 * again. GPTQ (Frantar et al., 2022) is the first step of the first round. */
#pragma once

enum { HALVES = 512 };

typedef struct block {
    const ds_grid *grid;
    int n, n_subs;
    const float *cov, *tri, *var;            /* (n, WIDTH), (n, WIDTH), (n) */
    float ones[DS_MAX_SUBS][WIDTH];          /* cov times the ones of each run */
    float mass[DS_MAX_SUBS][DS_MAX_SUBS];    /* and over pairs of runs */
    float inverse[WIDTH];                    /* of the diagonal of cov */
    int8_t codes[HALVES];                    /* grids with values: the code nearest to (i - HALVES / 2) / 2 and up to the next */
} block;

typedef struct trial {
    ds_choice c;
    float e[WIDTH];              /* target - decoded */
    float g[WIDTH];              /* cov e */
    float v[WIDTH];              /* values of the codes */
} trial;

DS_INLINE void block_open(block *b, const ds_grid *g, const ds_sweep *sweep, int first, int n) {
    *b = (block){.grid = g, .n = n, .n_subs = n / g->sub};
    b->cov = sweep->cov + (size_t)first * WIDTH;
    b->tri = sweep->tri + (size_t)first * WIDTH;
    b->var = sweep->var + first;
    for (int i = 0; i < n; i++) {
        b->inverse[i] = inverse(b->cov[i * WIDTH + i]);
        axpy(n, 1.0f, b->cov + i * WIDTH, b->ones[i / g->sub]);
    }
    for (int s = 0; s < b->n_subs; s++)
        for (int k = 0; k < b->n_subs; k++) b->mass[s][k] = total(g->sub, b->ones[s] + k * g->sub);
    for (int i = 0; g->values && i < HALVES; i++) {
        float x = 0.5f * (float)(i - HALVES / 2) + 0.25f;
        for (int k = 0; k < g->q_max; k++) b->codes[i] += (int8_t)(2.0f * x > (float)(g->values[k] + g->values[k + 1]));
    }
}

/* The code whose value is nearest to x. */
DS_INLINE int code_of(const block *b, float x) {
    if (!b->grid->values) return nearest_in(x, b->grid->q_min, b->grid->q_max);
    const float halves = 2.0f * x + (HALVES / 2);
    return b->codes[!(halves > 0.0f) ? 0 : halves >= HALVES ? HALVES - 1 : (int)halves];
}

/* Codes under the scales of x, column by column; fills q, v and e. */
DS_INLINE void choose(const block *b, const float *t, trial *x) {
    const ds_grid *g = b->grid;
    float r[WIDTH], inv[DS_MAX_SUBS];
    memcpy(r, t, (size_t)b->n * sizeof *r);
    for (int s = 0; s < b->n_subs; s++) inv[s] = inverse(x->c.scale[s]);
    for (int first = 0; first < b->n; first += 4) {
        const int s = first / g->sub, base = first & ~15;
        for (int j = first; j < first + 4; j++) {
            float target = r[j];
            for (int i = first; i < j; i++) target += x->e[i] * b->tri[i * WIDTH + j];
            const int code = code_of(b, (target + x->c.min[s]) * inv[s]);
            x->c.q[j] = (int8_t)code;
            x->v[j] = value_of(g, code);
            x->e[j] = t[j] - (x->c.scale[s] * x->v[j] - x->c.min[s]);
        }
        axpy4(b->n - base, x->e + first, b->tri + first * WIDTH + base, WIDTH, r + base);
    }
}

/* Fill e and g from the codes and scales of x; returns the loss. */
DS_INLINE float measure(const block *b, const float *t, trial *x) {
    const int sub = b->grid->sub;
    memset(x->g, 0, sizeof x->g);
    for (int i = 0; i < b->n; i++) x->e[i] = t[i] - (x->c.scale[i / sub] * x->v[i] - x->c.min[i / sub]);
    for (int i = 0; i < b->n; i += 4) axpy4(b->n, x->e + i, b->cov + i * WIDTH, WIDTH, x->g);
    return dot(b->n, x->e, x->g);
}

/* Which of 16 columns from i on would rather have another code; x->v and x->g as they are. */
DS_INLINE bool restless(const block *b, const trial *x, int i, float inv, float *wanted) {
    float y[16], different = 0.0f;
    for (int l = 0; l < 16; l++) y[l] = x->v[i + l] + x->g[i + l] * inv * b->inverse[i + l];
    snap(b->grid, 16, y, wanted);
    for (int l = 0; l < 16; l++) y[l] = wanted[l] != x->v[i + l] ? 1.0f : 0.0f;
    for (int l = 0; l < 16; l++) different += y[l];
    return different > 0.0f;
}

/* Change single codes while that lowers the loss. */
DS_INLINE void polish(const block *b, int passes, trial *x) {
    bool changed = true;
    for (int pass = 0; pass < passes && changed; pass++) {
        changed = false;
        for (int i = 0; i < b->n; i++) {
            const int s = i / b->grid->sub;
            const float scale = x->c.scale[s], inv = inverse(scale);
            float wanted[16];
            if (i % 16 == 0 && !restless(b, x, i, inv, wanted)) {
                i += 15;
                continue;
            }
            const int code = code_of(b, x->v[i] + x->g[i] * inv * b->inverse[i]);
            if (code == x->c.q[i]) continue;
            const float dv = value_of(b->grid, code) - x->v[i], step = scale * dv;
            if (2.0f * x->g[i] * step <= step * step * b->cov[i * WIDTH + i]) continue;
            x->c.q[i] = (int8_t)code;
            x->v[i] += dv;
            x->e[i] -= step;
            axpy(b->n, -step, b->cov + i * WIDTH, x->g);
            changed = true;
        }
    }
}

/* The loss as a function of the scales a and mins b of the runs, codes fixed, around where they are:
 * loss(da, db) = loss - 2 da.ga - 2 db.gb + da A da + db mass db - 2 da C db. */
typedef struct slopes {
    float aa[DS_MAX_SUBS][DS_MAX_SUBS], ab[DS_MAX_SUBS][DS_MAX_SUBS]; /* A; C: run of the values, run of the ones */
    float ga[DS_MAX_SUBS], gb[DS_MAX_SUBS];
} slopes;

DS_INLINE void slopes_of(const block *b, const trial *x, slopes *f) {
    const int sub = b->grid->sub;
    for (int s = 0; s < b->n_subs; s++) {
        const float *v = x->v + s * sub;
        float p[WIDTH] = {0}; /* cov v, at the columns of this run and later ones */
        for (int i = s * sub; i < (s + 1) * sub; i += 4) axpy4(b->n - s * sub, x->v + i, b->cov + i * WIDTH + s * sub, WIDTH, p + s * sub);
        f->ga[s] = dot(sub, v, x->g + s * sub);
        f->gb[s] = -total(sub, x->g + s * sub);
        for (int k = s; k < b->n_subs; k++) f->aa[s][k] = f->aa[k][s] = dot(sub, x->v + k * sub, p + k * sub);
        for (int k = 0; k < b->n_subs && b->grid->has_min; k++) f->ab[s][k] = dot(sub, v, b->ones[k] + s * sub);
    }
}

/* Move the scale and min of run s by da and db. */
DS_INLINE void move(const block *b, int s, float da, float db, slopes *f) {
    for (int k = 0; k < b->n_subs; k++) {
        f->ga[k] += db * f->ab[k][s] - da * f->aa[s][k];
        f->gb[k] += da * f->ab[s][k] - db * b->mass[s][k];
    }
}

/* How much the loss falls when only run s moves. */
DS_INLINE float fall(const block *b, const slopes *f, int s, float da, float db) {
    return 2.0f * (da * f->ga[s] + db * f->gb[s] + da * db * f->ab[s][s]) - da * da * f->aa[s][s] - db * db * b->mass[s][s];
}

/* The best scale and min of run s near the best reals, of those that the format has. True where they moved. */
DS_INLINE bool refit_run(const block *b, int s, ds_choice *c, slopes *f) {
    const ds_grid *g = b->grid;
    const float aa = f->aa[s][s], ab = f->ab[s][s], bb = b->mass[s][s], inv = inverse(c->d), inv_min = inverse(c->dmin);
    const float det = aa * bb - ab * ab;
    float best = 0.0f, best_a = c->scale[s], best_b = c->min[s];
    int best_sc = c->sc[s], best_m = c->m[s];
    float want_b = 0.0f;
    if (aa <= TINY) return false;
    if (g->has_min && det > 1e-6f * aa * bb) want_b = c->min[s] + (f->gb[s] * aa + f->ga[s] * ab) / det;
    else if (g->has_min) want_b = c->min[s];
    const int m_low = g->nested && g->has_min ? nearest_in(want_b * inv_min - 0.5f, 0, g->m_max) : 0;
    const int m_high = g->nested && g->has_min && m_low < g->m_max ? m_low + 1 : m_low;
    for (int m = m_low; m <= m_high; m++) {
        const float bm = g->nested ? c->dmin * (float)m : half(want_b > 0.0f || !g->has_min ? want_b : 0.0f);
        const float db = bm - c->min[s], want_a = c->scale[s] + (f->ga[s] + db * ab) / aa;
        const int sc = g->nested ? nearest_in(want_a * inv, g->sc_min, g->sc_max) : 0;
        const float am = g->nested ? c->d * (float)sc : half(want_a), gain = fall(b, f, s, am - c->scale[s], db);
        if (gain > best) {
            best = gain;
            best_a = am, best_b = bm;
            best_sc = sc, best_m = m;
        }
    }
    if (best <= 0.0f) return false;
    move(b, s, best_a - c->scale[s], best_b - c->min[s], f);
    c->scale[s] = best_a, c->min[s] = best_b;
    c->sc[s] = best_sc, c->m[s] = best_m;
    return true;
}

/* The best d and dmin for the integers of a nested format. */
DS_INLINE bool refit_super(const block *b, ds_choice *c, slopes *f) {
    float ga = 0.0f, gb = 0.0f, aa = 0.0f, ab = 0.0f, bb = 0.0f;
    for (int s = 0; s < b->n_subs; s++) {
        ga += (float)c->sc[s] * f->ga[s];
        gb += (float)c->m[s] * f->gb[s];
        for (int k = 0; k < b->n_subs; k++) {
            aa += (float)(c->sc[s] * c->sc[k]) * f->aa[s][k];
            ab += (float)(c->sc[s] * c->m[k]) * f->ab[s][k];
            bb += (float)(c->m[s] * c->m[k]) * b->mass[s][k];
        }
    }
    if (aa <= TINY) return false;
    const float det = aa * bb - ab * ab;
    const bool both = b->grid->has_min && det > 1e-6f * aa * bb;
    float db = both ? (gb * aa + ga * ab) / det : 0.0f;
    if (c->dmin + db < 0.0f) db = -c->dmin;
    const float dmin = half(c->dmin + db);
    db = dmin - c->dmin;
    const float d = half(c->d + (ga + db * ab) / aa), da = d - c->d;
    if (2.0f * (da * ga + db * gb + da * db * ab) - da * da * aa - db * db * bb <= 0.0f) return false;
    for (int s = 0; s < b->n_subs; s++) {
        const float scale = d * (float)c->sc[s], min = dmin * (float)c->m[s];
        move(b, s, scale - c->scale[s], min - c->min[s], f);
        c->scale[s] = scale, c->min[s] = min;
    }
    c->d = d, c->dmin = dmin;
    return true;
}

enum { REFIT_PASSES = 4 };

/* Scales and mins for the codes of x, whose g is measured. True where they moved. */
DS_INLINE bool refit(const block *b, trial *x) {
    slopes f = {0};
    bool moved = false;
    slopes_of(b, x, &f);
    for (int pass = 0; pass < REFIT_PASSES; pass++) {
        bool now = false;
        for (int s = 0; s < b->n_subs; s++) now |= refit_run(b, s, &x->c, &f);
        if (b->grid->nested) now |= refit_super(b, &x->c, &f);
        if (!now) break;
        moved = true;
    }
    return moved;
}

/* The best found so far. */
typedef struct best {
    ds_choice c;
    float loss;
} best;

DS_INLINE bool keep(const trial *x, float loss, best *out) {
    if (!(loss < out->loss)) return false;
    out->c = x->c;
    out->loss = loss;
    return true;
}

/* Rounds of codes and scales from the scales of x. */
DS_INLINE void improve(const block *b, const float *t, const ds_effort *effort, trial *x, best *out) {
    for (int round = 0; round < effort->rounds; round++) {
        choose(b, t, x);
        measure(b, t, x);
        polish(b, effort->polish, x);
        const bool better = keep(x, dot(b->n, x->e, x->g), out);
        if (round && !better) break;
        if (!refit(b, x)) break;
        /* The same codes under the new scales: never worse, and where the search ends. */
        if (round + 1 == effort->rounds) keep(x, measure(b, t, x), out);
    }
}
