/* solve.h: one block of columns of LANES rows: codes and scales that lower e cov e^T, e = target - decoded. Codes are chosen
 * one column after the other with what was lost carried on, then polished one at a time; scales are refitted to the codes;
 * and again. GPTQ (Frantar et al., 2022) is the first step of the first round. */
#pragma once

typedef struct trial {
    scales c;
    lanes loss;
    lanes v[WIDTH]; /* values of the codes */
    lanes e[WIDTH]; /* target - decoded */
    lanes g[WIDTH]; /* cov e */
} trial;

/* The best found so far. */
typedef struct best {
    scales c;
    lanes loss;
    lanes v[WIDTH];
} best;

/* The loss as a function of the scales a and mins b of the runs, codes fixed, around where they are:
 * loss(da, db) = loss - 2 da.ga - 2 db.gb + da A da + db mass db - 2 da C db. */
typedef struct slopes {
    lanes aa[DS_MAX_SUBS][DS_MAX_SUBS], ab[DS_MAX_SUBS][DS_MAX_SUBS]; /* A; C: run of the values, run of the ones */
    lanes ga[DS_MAX_SUBS], gb[DS_MAX_SUBS];
} slopes;

/* Where a row's codes are polished. */
typedef struct polishing {
    _Alignas(64) float v[LANES][WIDTH], g[LANES][WIDTH];
} polishing;

/* What a group of rows is solved in. */
typedef struct solver {
    trial x;
    best found;
    slopes f;
    polishing p;
    lanes t[WIDTH];
} solver;

/* Points for the targets of a tile, whose columns are taken for independent: v. */
DS_INLINE void choose_points(const block *b, int first, lanes inv, const lanes *target, trial *x) {
    lanes y[TILE];
    for (int c = 0; c < TILE; c++) y[c] = target[c] * inv;
    snap_points(b->grid->points, &b->halves, y, b->var + first, x->v + first);
}

/* Codes under the scales of x, column by column; fills v, e, g and the loss. With u_j = e_j + sum_{i<j} e_i tri_ij, what is
 * left at a column of the target and of what was carried to it, loss = sum var_j u_j^2 and g_i = sum_j tri_ij var_j u_j. */
DS_INLINE void choose(const block *b, const lanes *t, trial *x) {
    x->loss = splat(0.0f);
    for (int first = 0; first < b->n; first += TILE) {
        const int s = first / b->grid->sub;
        const float (*tri)[TILE] = b->before[first / TILE];
        const lanes scale = x->c.scale[s], min = x->c.min[s], inv = inverse(scale);
        lanes target[TILE];
        memcpy(target, t + first, sizeof target);
        add_products(first, x->e, tri, target);
        if (b->grid->points) choose_points(b, first, inv, target, x);
        for (int c = 0; c < TILE; c++) {
            const int j = first + c;
            const lanes v = b->grid->points ? x->v[j] : snap(b, (target[c] + min) * inv), y = v * scale - min,
                        u = target[c] - y, e = t[j] - y;
            x->v[j] = v;
            x->e[j] = e;
            x->g[j] = u * b->var[j];
            x->loss += u * x->g[j];
            for (int k = c + 1; k < TILE; k++) target[k] += e * tri[j][k];
        }
    }
    for (int first = 0; first < b->n; first += TILE) {
        lanes sum[TILE] = {0};
        add_products(b->n - first, x->g + first, b->after[first / TILE] + first, sum);
        memcpy(x->g + first, sum, sizeof sum);
    }
}

/* Fill e, g and the loss from the codes and scales of x. */
DS_INLINE void measure(const block *b, const lanes *t, trial *x) {
    for (int i = 0; i < b->n; i++) {
        const int s = i / b->grid->sub;
        x->e[i] = t[i] - (x->v[i] * x->c.scale[s] - x->c.min[s]);
    }
    x->loss = splat(0.0f);
    for (int first = 0; first < b->n; first += TILE) {
        lanes *g = x->g + first;
        memset(g, 0, TILE * sizeof *g);
        add_products(b->n, x->e, b->all[first / TILE], g);
        for (int c = 0; c < TILE; c++) x->loss += x->e[first + c] * g[c];
    }
}

/* The value of the grid nearest to x. */
DS_INLINE float nearest_value(const block *b, float x) {
    const ds_grid *g = b->grid;
    if (!g->values) {
        x = x > (float)g->q_min ? x : (float)g->q_min;
        x = x < (float)g->q_max ? x : (float)g->q_max;
        return (x + ROUND) - ROUND;
    }
    float v = (float)g->values[0];
    for (int k = 0; k < g->q_max; k++) v += x > b->middle[k] ? b->step[k] : 0.0f;
    return v;
}

/* Change single codes of a row while that lowers the loss; returns by how much it did. Most columns want no other code:
 * which do is found LANES at a time, here columns of one row. */
DS_INLINE float polish_row(const block *b, int passes, const float *scale, float *restrict v, float *restrict g) {
    float gained = 0.0f;
    bool changed = true;
    for (int pass = 0; pass < passes && changed; pass++) {
        changed = false;
        for (int first = 0; first < b->n; first += LANES) {
            const float step = scale[first / b->grid->sub], inv = step > TINY || step < -TINY ? 1.0f / step : 0.0f;
            const lanes here = *(const lanes *)(v + first), slope = *(const lanes *)(g + first);
            const lanes wanted = snap(b, here + slope * *(const lanes *)(b->inverse + first) * inv);
            for (unsigned left = bits_of(wanted != here); left; left &= left - 1) {
                const int i = first + __builtin_ctz(left);
                const float value = nearest_value(b, v[i] + g[i] * inv * b->inverse[i]), de = step * (value - v[i]);
                const float gain = 2.0f * g[i] * de - de * de * b->cov[i * WIDTH + i];
                if (!(gain > 0.0f)) continue;
                const float *row = b->cov + i * WIDTH;
                v[i] = value;
                for (int k = 0; k < b->n; k++) g[k] -= de * row[k];
                gained += gain;
                changed = true;
            }
        }
    }
    return gained;
}

/* Change the points of a tile in those rows where that lowers the loss. Whether any did. */
DS_INLINE bool polish_points(const block *b, int first, trial *x) {
    const lanes scale = x->c.scale[first / b->grid->sub], inv = inverse(scale);
    float w[TILE];
    lanes y[TILE], v[TILE], step[TILE], gain = splat(0.0f);
    for (int c = 0; c < TILE; c++) {
        w[c] = b->cov[(first + c) * WIDTH + first + c];
        y[c] = x->v[first + c] + x->g[first + c] * inv * b->inverse[first + c];
    }
    snap_points(b->grid->points, &b->halves, y, w, v);
    for (int c = 0; c < TILE; c++) step[c] = (v[c] - x->v[first + c]) * scale;
    for (int c = 0; c < TILE; c++) {
        lanes pulled = 2.0f * x->g[first + c];
        for (int k = 0; k < TILE; k++) pulled -= step[k] * b->cov[(first + c) * WIDTH + first + k];
        gain += step[c] * pulled;
    }
    const mask better = gain > 0.0f;
    if (!any(better)) return false;
    for (int c = 0; c < TILE; c++) {
        x->v[first + c] = pick(better, v[c], x->v[first + c]);
        step[c] = pick(better, -step[c], splat(0.0f));
    }
    x->loss -= pick(better, gain, splat(0.0f));
    for (int at = 0; at < b->n; at += TILE) add_products(TILE, step, b->all[at / TILE] + first, x->g + at);
    return true;
}

DS_INLINE void polish(const block *b, int passes, int n_rows, trial *x, polishing *p) {
    if (passes == 0) return;
    if (b->grid->points) {
        bool changed = true;
        for (int pass = 0; pass < passes && changed; pass++) {
            changed = false;
            for (int first = 0; first < b->n; first += TILE) changed |= polish_points(b, first, x);
        }
        return;
    }
    lanes_to_rows(b->n, n_rows, x->v, p->v[0], WIDTH);
    lanes_to_rows(b->n, n_rows, x->g, p->g[0], WIDTH);
    for (int l = 0; l < n_rows; l++) {
        float scale[DS_MAX_SUBS];
        for (int s = 0; s < b->n_subs; s++) scale[s] = x->c.scale[s][l];
        x->loss[l] -= polish_row(b, passes, scale, p->v[l], p->g[l]);
    }
    rows_to_lanes(b->n, n_rows, p->v[0], WIDTH, x->v);
    rows_to_lanes(b->n, n_rows, p->g[0], WIDTH, x->g);
}

DS_INLINE void slopes_of(const block *b, const trial *x, slopes *f) {
    const int sub = b->grid->sub;
    memset(f, 0, sizeof *f);
    for (int s = 0; s < b->n_subs; s++) {
        const int from = s * sub;
        for (int i = from; i < from + sub; i++) {
            f->ga[s] += x->v[i] * x->g[i];
            f->gb[s] -= x->g[i];
            for (int k = 0; k < b->n_subs && b->grid->has_min; k++) f->ab[s][k] += x->v[i] * b->ones[i][k];
        }
        for (int first = from; first < b->n; first += TILE) {
            lanes p[TILE] = {0}; /* cov v, of this run's v */
            add_products(sub, x->v + from, b->all[first / TILE] + from, p);
            for (int c = 0; c < TILE; c++) f->aa[s][first / sub] += p[c] * x->v[first + c];
        }
        for (int k = s + 1; k < b->n_subs; k++) f->aa[k][s] = f->aa[s][k];
    }
}

/* Move the scale and min of run s by da and db. */
DS_INLINE void move(const block *b, int s, lanes da, lanes db, slopes *f) {
    for (int k = 0; k < b->n_subs; k++) {
        f->ga[k] += db * f->ab[k][s] - da * f->aa[s][k];
        f->gb[k] += da * f->ab[s][k] - db * b->mass[s][k];
    }
}

/* The best scale and min of run s near the best reals, of those that the format has. Where they moved. */
DS_INLINE mask refit_run(const block *b, int s, trial *x, slopes *f) {
    const ds_grid *g = b->grid;
    scales *c = &x->c;
    const bool integer_min = g->nested && g->has_min;
    const lanes aa = f->aa[s][s], ab = f->ab[s][s], inv = inverse(c->d), inv_min = inverse(c->dmin), over = inverse(aa);
    const float bb = b->mass[s][s];
    const mask usable = aa > TINY;
    lanes most = splat(0.0f), best_a = c->scale[s], best_b = c->min[s], best_sc = c->sc[s], best_m = c->m[s],
          want_b = splat(0.0f);
    if (g->has_min) {
        const lanes det = aa * bb - ab * ab;
        const mask both = usable & (det > 1e-6f * bb * aa);
        want_b = c->min[s] + pick(both, (f->gb[s] * aa + f->ga[s] * ab) / pick(both, det, splat(1.0f)), splat(0.0f));
    }
    lanes m = integer_min ? nearest_in(want_b * inv_min - 0.5f, 0.0f, (float)g->m_max) : splat(0.0f);
    for (int i = 0; i < (integer_min ? 2 : 1); i++) {
        const lanes bm = g->nested ? c->dmin * m : half(larger(want_b, splat(0.0f)));
        const lanes db = bm - c->min[s], want_a = c->scale[s] + (f->ga[s] + db * ab) * over;
        const lanes sc = g->nested ? nearest_scale(g, want_a * inv) : splat(0.0f);
        const lanes am = g->nested ? c->d * sc : half(want_a), da = am - c->scale[s];
        const lanes gain = 2.0f * (da * f->ga[s] + db * f->gb[s] + da * db * ab) - da * da * aa - db * db * bb;
        const mask better = usable & (gain > most);
        most = pick(better, gain, most);
        best_a = pick(better, am, best_a), best_b = pick(better, bm, best_b);
        best_sc = pick(better, sc, best_sc), best_m = pick(better, m, best_m);
        m = smaller(m + 1.0f, splat((float)g->m_max));
    }
    move(b, s, best_a - c->scale[s], best_b - c->min[s], f);
    x->loss -= most;
    c->scale[s] = best_a, c->min[s] = best_b;
    c->sc[s] = best_sc, c->m[s] = best_m;
    return most > 0.0f;
}

/* The best d and dmin for the integers of a nested format. Where they moved. */
DS_INLINE mask refit_super(const block *b, trial *x, slopes *f) {
    scales *c = &x->c;
    lanes ga = splat(0.0f), gb = ga, aa = ga, ab = ga, bb = ga, db = ga;
    for (int s = 0; s < b->n_subs; s++) {
        lanes a = splat(0.0f), m = a, n = a;
        for (int k = 0; k < b->n_subs; k++) {
            a += c->sc[k] * f->aa[s][k];
            m += c->m[k] * f->ab[s][k];
            n += c->m[k] * b->mass[s][k];
        }
        ga += c->sc[s] * f->ga[s], gb += c->m[s] * f->gb[s];
        aa += c->sc[s] * a, ab += c->sc[s] * m, bb += c->m[s] * n;
    }
    const mask usable = aa > TINY;
    if (b->grid->has_min) {
        const lanes det = aa * bb - ab * ab;
        const mask both = usable & (det > 1e-6f * aa * bb);
        db = pick(both, (gb * aa + ga * ab) / pick(both, det, splat(1.0f)), splat(0.0f));
        db = larger(db, -c->dmin);
    }
    const lanes dmin = half(c->dmin + db), d = held(b->grid, c->d + (ga + (dmin - c->dmin) * ab) * inverse(aa)),
                da = d - c->d;
    db = dmin - c->dmin;
    const lanes gain = 2.0f * (da * ga + db * gb + da * db * ab) - da * da * aa - db * db * bb;
    const mask better = usable & (gain > 0.0f);
    c->d = pick(better, d, c->d), c->dmin = pick(better, dmin, c->dmin);
    x->loss -= pick(better, gain, splat(0.0f));
    for (int s = 0; s < b->n_subs; s++) {
        const lanes scale = pick(better, c->d * c->sc[s], c->scale[s]),
                    min = pick(better, c->dmin * c->m[s], c->min[s]);
        move(b, s, scale - c->scale[s], min - c->min[s], f);
        c->scale[s] = scale, c->min[s] = min;
    }
    return better;
}

enum { REFIT_PASSES = 4 };

/* Scales and mins for the codes of x, whose g is measured: never worse. v stays, e and g do not follow. */
DS_INLINE void refit(const block *b, trial *x, slopes *f) {
    slopes_of(b, x, f);
    for (int pass = 0; pass < REFIT_PASSES; pass++) {
        mask moved = {0};
        for (int s = 0; s < b->n_subs; s++) moved |= refit_run(b, s, x, f);
        if (b->grid->nested) moved |= refit_super(b, x, f);
        if (!any(moved)) break;
    }
}

/* Keep x in those rows where it is better, or in all. */
DS_INLINE void keep(const block *b, const trial *x, bool always, best *found) {
    const mask better = always ? (mask){0} == 0 : x->loss < found->loss;
    const lanes *from = (const lanes *)&x->c;
    lanes *to = (lanes *)&found->c;
    if (!any(better)) return;
    for (size_t i = 0; i < sizeof x->c / sizeof *from; i++) to[i] = pick(better, from[i], to[i]);
    for (int i = 0; i < b->n; i++) found->v[i] = pick(better, x->v[i], found->v[i]);
    found->loss = pick(better, x->loss, found->loss);
}

/* Rounds of codes and scales from the scales of x. */
DS_INLINE void improve(const block *b, const ds_effort *effort, int n_rows, bool first, solver *s) {
    for (int round = 0; round < effort->rounds; round++) {
        choose(b, s->t, &s->x);
        polish(b, effort->polish, n_rows, &s->x, &s->p);
        keep(b, &s->x, first && round == 0, &s->found);
        refit(b, &s->x, &s->f);
        keep(b, &s->x, false, &s->found); /* the same codes under the new scales */
    }
}

/* The block in the first sweep, from scales that suit what each column will lose once those after it have carried its
 * error: it wins over starting from the diagonal of cov, and half a percent from the better of both. */
static void solve_first(const block *b, const ds_effort *effort, int n_rows, solver *s) {
    start(b, s->t, b->var, &s->x.c);
    improve(b, effort, n_rows, true, s);
}

/* And in a later one: from what was found before. */
static void solve_again(const block *b, const ds_effort *effort, int n_rows, solver *s) {
    s->x.c = s->found.c;
    memcpy(s->x.v, s->found.v, sizeof s->x.v);
    measure(b, s->t, &s->x);
    s->found.loss = s->x.loss;
    polish(b, effort->polish, n_rows, &s->x, &s->p);
    refit(b, &s->x, &s->f);
    keep(b, &s->x, false, &s->found);
    improve(b, effort, n_rows, false, s);
}
