/* start.h: scales to begin with: of each run of `sub` columns alone, under one weight a column. */
#pragma once

/* Smallest sums that may be divided by. */
#define TINY 1e-30f

DS_INLINE float value_of(const ds_grid *g, int code) { return (float)(g->values ? g->values[code] : code); }

DS_INLINE float inverse(float x) { return x > TINY || x < -TINY ? 1.0f / x : 0.0f; }

/* The values of the grid nearest to n numbers (a multiple of 16). */
DS_INLINE void snap(const ds_grid *g, int n, const float *restrict x, float *restrict v) {
    if (g->values) {
        for (int i = 0; i < n; i++) v[i] = (float)g->values[0];
        for (int k = 0; k < g->q_max; k++) {
            const float middle = 0.5f * (float)(g->values[k] + g->values[k + 1]), step = (float)(g->values[k + 1] - g->values[k]);
            for (int i = 0; i < n; i++) v[i] += x[i] > middle ? step : 0.0f;
        }
        return;
    }
    const float low = (float)g->q_min, high = (float)g->q_max;
    for (int i = 0; i < n; i++) {
        float y = x[i] > low ? x[i] : low;
        y = y < high ? y : high;
        v[i] = (y + ROUND) - ROUND;
    }
}

/* Weighted sums of a run: of the targets, and of the values v that a trial scale gives them. */
typedef struct sums {
    float w, wt, wv, wvv, wvt;
} sums;

/* wt: w times t. */
DS_INLINE void try_scale(const ds_grid *g, float inv, float low, const float *t, const float *w, const float *wt, sums *s) {
    float x[32], v[32], wv[32];
    for (int i = 0; i < g->sub; i++) x[i] = (t[i] - low) * inv;
    snap(g, g->sub, x, v);
    for (int i = 0; i < g->sub; i++) wv[i] = w[i] * v[i];
    s->wvv = dot(g->sub, wv, v);
    s->wvt = dot(g->sub, wt, v);
    if (g->has_min) s->wv = total(g->sub, wv);
}

enum { START_STEPS = 16 }; /* trial scales; at half as many the error grows by a percent */

/* scale v - min: trial scales around the one that spans the run, each refitted by least squares; the best is kept. */
DS_INLINE void start_with_min(const ds_grid *g, const float *t, const float *w, float *scale, float *min) {
    float low = 0.0f, high = t[0], best = 0.0f;
    for (int i = 0; i < g->sub; i++) {
        low = t[i] < low ? t[i] : low;
        high = t[i] > high ? t[i] : high;
    }
    *scale = 0.0f;
    *min = -low;
    if (high - low < TINY) return;
    float wt[32];
    for (int i = 0; i < g->sub; i++) wt[i] = w[i] * t[i];
    sums s = {.w = total(g->sub, w), .wt = total(g->sub, wt)};
    for (int k = 0; k <= START_STEPS; k++) {
        const float span = (float)g->q_max * (0.9f + 0.6f * (float)k / START_STEPS);
        try_scale(g, span / (high - low), low, t, w, wt, &s);
        const float det = s.w * s.wvv - s.wv * s.wv;
        if (det <= TINY) continue;
        float a = (s.w * s.wvt - s.wv * s.wt) / det, b = (s.wv * s.wvt - s.wvv * s.wt) / det;
        if (b < 0.0f) {
            b = 0.0f;
            a = s.wvt * inverse(s.wvv);
        }
        const float gain = 2.0f * (a * s.wvt - b * s.wt) - (a * a * s.wvv - 2.0f * a * b * s.wv + b * b * s.w);
        if (a > 0.0f && (gain > best || *scale == 0.0f)) {
            best = gain;
            *scale = a;
            *min = b;
        }
    }
}

/* scale v, of either sign: the end that reaches further may take either sign of the largest value. */
DS_INLINE void start_signed(const ds_grid *g, const float *t, const float *w, float *scale) {
    const float reach = -value_of(g, g->q_min);
    float widest = 0.0f, best = 0.0f;
    for (int i = 0; i < g->sub; i++) {
        const float size = t[i] < 0 ? -t[i] : t[i];
        widest = size > widest ? size : widest;
    }
    *scale = 0.0f;
    if (widest < TINY) return;
    float wt[32];
    for (int i = 0; i < g->sub; i++) wt[i] = w[i] * t[i];
    sums s = {0};
    for (int k = 0; k <= 2 * START_STEPS + 1; k++) {
        const float span = reach * (0.8f + 0.5f * (float)(k / 2) / START_STEPS);
        try_scale(g, (k % 2 ? -span : span) / widest, 0.0f, t, w, wt, &s);
        if (s.wvv <= TINY || s.wvt * s.wvt <= best * s.wvv) continue;
        best = s.wvt * s.wvt / s.wvv;
        *scale = s.wvt / s.wvv;
    }
}

/* Halves and integers nearest to wanted scales and mins. */
DS_INLINE void settle(const ds_grid *g, int n_subs, const float *scale, const float *min, ds_choice *c) {
    c->d = c->dmin = 0.0f;
    if (g->nested) {
        float top = 0.0f, top_min = 0.0f;
        for (int s = 0; s < n_subs; s++) {
            if ((scale[s] < 0 ? -scale[s] : scale[s]) > (top < 0 ? -top : top)) top = scale[s];
            top_min = min[s] > top_min ? min[s] : top_min;
        }
        c->d = half(top / (float)(g->sc_min < 0 ? g->sc_min : g->sc_max));
        c->dmin = g->has_min ? half(top_min / (float)g->m_max) : 0.0f;
    }
    const float inv = inverse(c->d), inv_min = inverse(c->dmin);
    for (int s = 0; s < n_subs; s++) {
        c->sc[s] = g->nested ? nearest_in(scale[s] * inv, g->sc_min, g->sc_max) : 0;
        c->m[s] = g->nested && g->has_min ? nearest_in(min[s] * inv_min, 0, g->m_max) : 0;
        c->scale[s] = g->nested ? c->d * (float)c->sc[s] : half(scale[s]);
        c->min[s] = g->nested ? c->dmin * (float)c->m[s] : half(min[s]);
    }
}

/* Scales and mins for targets t (n) under weights w (n). */
DS_INLINE void start(const ds_grid *g, int n, const float *t, const float *w, ds_choice *c) {
    float scale[DS_MAX_SUBS], min[DS_MAX_SUBS] = {0};
    for (int s = 0; s < n / g->sub; s++) {
        if (g->has_min) start_with_min(g, t + s * g->sub, w + s * g->sub, &scale[s], &min[s]);
        else start_signed(g, t + s * g->sub, w + s * g->sub, &scale[s]);
    }
    settle(g, n / g->sub, scale, min, c);
}
