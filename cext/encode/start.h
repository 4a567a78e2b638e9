/* start.h: scales to begin with: of each run of `sub` columns alone, under one weight a column. */
#pragma once

/* Weighted sums of a run: of the targets, and of the values v that a trial scale gives them. */
typedef struct sums {
    lanes wv, wvv, wvt;
} sums;

/* The values of the grid nearest to x. */
DS_INLINE lanes snap(const block *b, lanes x) {
    const ds_grid *g = b->grid;
    if (!g->values) return nearest_in(x, (float)g->q_min, (float)g->q_max);
    lanes v = splat((float)g->values[0]);
    for (int k = 0; k < g->q_max; k++) v += pick(x > b->middle[k], splat(b->step[k]), splat(0.0f));
    return v;
}

DS_INLINE sums try_scale(const block *b, lanes inv, lanes low, const lanes *t, const float *w) {
    sums s = {0};
    for (int i = 0; i < b->grid->sub; i++) {
        const lanes v = snap(b, (t[i] - low) * inv), wv = v * w[i];
        s.wv += wv;
        s.wvv += wv * v;
        s.wvt += wv * t[i];
    }
    return s;
}

enum { START_STEPS = 16 }; /* trial scales; at half as many the error grows by a percent */

/* scale v - min: trial scales around the one that spans the run, each refitted by least squares; the best is kept. */
DS_INLINE void start_with_min(const block *b, const lanes *t, const float *w, lanes *scale, lanes *min) {
    lanes low = splat(0.0f), high = t[0], best = splat(0.0f), wt = splat(0.0f);
    float w_all = 0.0f;
    for (int i = 0; i < b->grid->sub; i++) {
        low = smaller(t[i], low);
        high = larger(t[i], high);
        wt += t[i] * w[i];
        w_all += w[i];
    }
    *scale = splat(0.0f);
    *min = -low;
    const mask wide = high - low >= TINY;
    const lanes inv_span = inverse(high - low);
    for (int k = 0; k <= START_STEPS; k++) {
        const float span = (float)b->grid->q_max * (0.9f + 0.6f * (float)k / START_STEPS);
        const sums s = try_scale(b, inv_span * span, low, t, w);
        const lanes det = s.wvv * w_all - s.wv * s.wv, over = inverse(det);
        lanes a = (s.wvt * w_all - s.wv * wt) * over, m = (s.wv * s.wvt - s.wvv * wt) * over;
        a = pick(m < 0.0f, s.wvt * inverse(s.wvv), a);
        m = larger(m, splat(0.0f));
        const lanes gain = 2.0f * (a * s.wvt - m * wt) - (a * a * s.wvv - 2.0f * a * m * s.wv + m * m * w_all);
        const mask better = wide & (det > TINY) & (a > 0.0f) & ((gain > best) | (*scale == 0.0f));
        best = pick(better, gain, best);
        *scale = pick(better, a, *scale);
        *min = pick(better, m, *min);
    }
}

/* scale v, of either sign: the end that reaches further may take either sign of the largest value. */
DS_INLINE void start_signed(const block *b, const lanes *t, const float *w, lanes *scale) {
    const float reach = -value_of(b->grid, b->grid->q_min);
    lanes widest = splat(0.0f), best = splat(0.0f);
    for (int i = 0; i < b->grid->sub; i++) widest = larger(size_of(t[i]), widest);
    const mask wide = widest >= TINY;
    const lanes inv_widest = inverse(widest);
    *scale = splat(0.0f);
    for (int k = 0; k <= 2 * START_STEPS + 1; k++) {
        const float span = reach * (0.8f + 0.5f * (float)(k / 2) / START_STEPS);
        const sums s = try_scale(b, inv_widest * (k % 2 ? -span : span), splat(0.0f), t, w);
        const mask better = wide & (s.wvv > TINY) & (s.wvt * s.wvt > best * s.wvv);
        const lanes a = s.wvt * inverse(s.wvv);
        best = pick(better, s.wvt * a, best);
        *scale = pick(better, a, *scale);
    }
}

enum { POINT_STEPS = 4 }; /* with three times as many the error falls by less than half a percent */

/* scale v, of points: trial scales around the one that spans the run, each refitted by least squares; the best is kept. */
DS_INLINE void start_points(const block *b, const lanes *t, const float *w, lanes *scale) {
    const ds_points *p = b->grid->points;
    lanes widest = splat(0.0f), best = splat(0.0f);
    for (int i = 0; i < b->grid->sub; i++) widest = larger(size_of(t[i]), widest);
    const mask wide = widest >= TINY;
    const lanes inv_widest = inverse(widest);
    *scale = splat(0.0f);
    for (int k = 0; k <= POINT_STEPS; k++) {
        const lanes inv = inv_widest * (p->most * (0.75f + 0.5f * (float)k / POINT_STEPS));
        lanes wvv = splat(0.0f), wvt = wvv;
        for (int first = 0; first < b->grid->sub; first += TILE) {
            lanes y[TILE], v[TILE];
            for (int c = 0; c < TILE; c++) y[c] = t[first + c] * inv;
            snap_points(p, &b->halves, y, w + first, v);
            for (int c = 0; c < TILE; c++) {
                wvv += v[c] * v[c] * w[first + c];
                wvt += v[c] * t[first + c] * w[first + c];
            }
        }
        const mask better = wide & (wvv > TINY) & (wvt > 0.0f) & (wvt * wvt > best * wvv);
        const lanes a = wvt * inverse(wvv);
        best = pick(better, wvt * a, best);
        *scale = pick(better, a, *scale);
    }
}

/* The integer scales nearest to x: those of points are odd. */
DS_INLINE lanes nearest_scale(const ds_grid *g, lanes x) {
    if (!g->points) return nearest_in(x, (float)g->sc_min, (float)g->sc_max);
    return 2.0f * nearest_in(0.5f * x - 0.5f, 0.0f, (float)(g->sc_max / 2)) + 1.0f;
}

/* d as the block holds it. */
DS_INLINE lanes held(const ds_grid *g, lanes d) {
    const float unit = (float)(g->points ? g->unit : 1);
    return half(d * unit) * (1.0f / unit);
}

/* Halves and integers nearest to the scales and mins of c. */
DS_INLINE void settle(const block *b, scales *c) {
    const ds_grid *g = b->grid;
    lanes top = splat(0.0f), top_min = splat(0.0f);
    for (int s = 0; s < b->n_subs; s++) {
        top = pick(size_of(c->scale[s]) > size_of(top), c->scale[s], top);
        top_min = larger(c->min[s], top_min);
    }
    c->d = c->dmin = splat(0.0f);
    if (g->nested) c->d = held(g, top / (float)(g->sc_min < 0 ? g->sc_min : g->sc_max));
    if (g->nested && g->has_min) c->dmin = half(top_min / (float)g->m_max);
    const lanes inv = inverse(c->d), inv_min = inverse(c->dmin);
    for (int s = 0; s < b->n_subs; s++) {
        c->sc[s] = c->m[s] = splat(0.0f);
        if (g->nested) {
            c->sc[s] = nearest_scale(g, c->scale[s] * inv);
            if (g->has_min) c->m[s] = nearest_in(c->min[s] * inv_min, 0.0f, (float)g->m_max);
        }
        c->scale[s] = g->nested ? c->d * c->sc[s] : half(c->scale[s]);
        c->min[s] = g->nested ? c->dmin * c->m[s] : half(c->min[s]);
    }
}

/* Scales and mins for targets t under the weights w, one a column. */
DS_INLINE void start(const block *b, const lanes *t, const float *w, scales *c) {
    const int sub = b->grid->sub;
    for (int s = 0; s < b->n_subs; s++) {
        c->min[s] = splat(0.0f);
        if (b->grid->points) start_points(b, t + s * sub, w + s * sub, &c->scale[s]);
        else if (b->grid->has_min) start_with_min(b, t + s * sub, w + s * sub, &c->scale[s], &c->min[s]);
        else start_signed(b, t + s * sub, w + s * sub, &c->scale[s]);
    }
    settle(b, c);
}
