/* points.h: grids whose codes are points, eight values of IQ2 or four of IQ3 at once: the nearest ones under weights. Eight
 * columns, a tile, share a byte of signs; some formats keep seven bits of it, and an even number of the eight is negative. */
#pragma once

enum { MOST_POINTS = 1024 };

/* The cheapest point of each row, as it is, and with one column's sign turned, the cheapest. */
typedef struct nearest {
    mask point, turned_point;
    lanes cost, turned;
} nearest;

/* own[p] = sum of w_j v_pj^2 over the columns of a point. */
DS_INLINE void own_costs(const ds_points *p, int width, const float *w, float *restrict own) {
    for (int i = 0; i < p->n; i++) own[i] = 0.0f;
    for (int j = 0; j < width; j++)
        for (int i = 0; i < p->n; i++) own[i] += w[j] * p->values[j * p->n + i] * p->values[j * p->n + i];
}

/* Of targets with pull_j = 2 w_j |y_j|: a point costs own - sum of pull_j v_pj, and a turned sign 2 pull_j v_pj more. With
 * `turn` in a row its turned cost counts for width 8; for width 4 both are found, for the caller to combine. */
DS_INLINE nearest search(const ds_points *p, int width, bool turns, mask turn, const float *own, const lanes *pull) {
    nearest best = {{0}, {0}, splat(0.0f), splat(0.0f)};
    for (int i = 0; i < p->n; i++) {
        const mask here = (mask){0} + i, first = (mask){0} - (i == 0);
        lanes cost = splat(own[i]), least = splat(0.0f);
        for (int j = 0; j < width; j++) {
            const lanes gain = pull[j] * p->values[j * p->n + i];
            cost -= gain;
            if (turns) least = j ? smaller(gain, least) : gain;
        }
        const lanes turned = cost + 2.0f * least;
        if (turns && width == TILE) cost = pick(turn, turned, cost);
        const mask less = first | (cost < best.cost);
        best.cost = pick(less, cost, best.cost);
        best.point = (less & here) | (~less & best.point);
        if (!turns || width == TILE) continue;
        const mask less_turned = first | (turned < best.turned);
        best.turned = pick(less_turned, turned, best.turned);
        best.turned_point = (less_turned & here) | (~less_turned & best.turned_point);
    }
    return best;
}

/* Its values with the signs of y; where `turn` the column that minds least gets the other. */
DS_INLINE void values_of(const ds_points *p, int width, mask point, mask turn, const lanes *y, const lanes *pull, lanes *v) {
    mask which = {0};
    lanes least = splat(0.0f);
    for (int j = 0; j < width; j++) {
        for (int l = 0; l < LANES; l++) v[j][l] = p->values[j * p->n + point[l]];
        const lanes cost = pull[j] * v[j];
        const mask less = ((mask){0} - (j == 0)) | (cost < least);
        least = pick(less, cost, least);
        which = (less & j) | (~less & which);
        v[j] = pick(y[j] < 0.0f, -v[j], v[j]);
    }
    for (int j = 0; j < width; j++) v[j] = pick(turn & (which == j), -v[j], v[j]);
}

/* The points of a tile nearest to y under the weights w: their values. own: (TILE / width, MOST_POINTS), see own_costs. */
DS_INLINE void snap_width(const ds_points *p, int width, bool turns, const lanes *y, const float *w, const float *own, lanes *v) {
    lanes pull[TILE];
    mask odd = {0};
    for (int j = 0; j < TILE; j++) {
        pull[j] = 2.0f * w[j] * size_of(y[j]);
        odd ^= y[j] < 0.0f;
    }
    if (!turns) odd = (mask){0};
    if (width == TILE) {
        const nearest found = search(p, TILE, turns, odd, own, pull);
        values_of(p, TILE, found.point, odd, y, pull, v);
        return;
    }
    const nearest a = search(p, width, turns, odd, own, pull), b = search(p, width, turns, odd, own + MOST_POINTS, pull + width);
    const mask in_a = odd & (a.turned + b.cost < a.cost + b.turned), in_b = odd & ~in_a;
    values_of(p, width, (in_a & a.turned_point) | (~in_a & a.point), in_a, y, pull, v);
    values_of(p, width, (in_b & b.turned_point) | (~in_b & b.point), in_b, y + width, pull + width, v + width);
}

DS_INLINE void own_costs_of(const ds_points *p, const float *w, float *own) {
    for (int at = 0; at < TILE; at += p->width) own_costs(p, p->width, w + at, own + at / p->width * MOST_POINTS);
}

/* The same with the loops cut for each shape of points. */
DS_INLINE void snap_points(const ds_points *p, const lanes *y, const float *w, const float *own, lanes *v) {
    if (p->width == TILE && p->even_signs) snap_width(p, TILE, true, y, w, own, v);
    else if (p->width == TILE) snap_width(p, TILE, false, y, w, own, v);
    else if (p->even_signs) snap_width(p, TILE / 2, true, y, w, own, v);
    else snap_width(p, TILE / 2, false, y, w, own, v);
}

/* Which number a point's values have, and which place a value has among those of the format: to write points down. */
enum { MOST_KEYS = 6561 /* 3^8; more than 8^4 */, MOST_VALUE = 64 };

typedef struct point_table {
    int n_levels;
    uint8_t place[MOST_VALUE];
    uint16_t number[MOST_KEYS];
} point_table;

static inline int key_of(const point_table *t, int width, const int8_t *v, int stride) {
    int key = 0;
    for (int j = 0; j < width; j++) {
        const int value = v[j * stride];
        key = key * t->n_levels + t->place[value < 0 ? -value : value];
    }
    return key;
}

static inline void list_points(const ds_points *p, point_table *t) {
    bool seen[MOST_VALUE] = {false};
    memset(t, 0, sizeof *t);
    for (int i = 0; i < p->width * p->n; i++) seen[(int)p->values[i]] = true;
    for (int v = 0; v < MOST_VALUE; v++)
        if (seen[v]) t->place[v] = (uint8_t)t->n_levels++;
    for (int i = 0; i < p->n; i++) {
        int8_t v[TILE];
        for (int j = 0; j < p->width; j++) v[j] = (int8_t)p->values[j * p->n + i];
        t->number[key_of(t, p->width, v, 1)] = (uint16_t)i;
    }
}
