/* points.h: grids whose codes are points, eight values of IQ2 or four of IQ3 at once: the nearest ones under weights. Eight
 * columns, a tile, share a byte of signs; some formats keep seven bits of it, and an even number of the eight is negative. */
#pragma once

enum { MOST_POINTS = 1024, MOST_LEVELS = 8, MOST_HALVES = 81 /* 3^4; more than 8^2 */ };

/* The points as pairs of halves. A half takes few values, and a point costs what its halves do. */
typedef struct halves {
    int width, n_levels, n; /* columns of a half; values of a column; n_levels to the width */
    float level[MOST_LEVELS];
    float value[MOST_HALVES][4];
    uint16_t from[MOST_HALVES +
                  1]; /* the second halves that may follow a first one: second[from[a]] to second[from[a + 1]] */
    uint8_t second[MOST_POINTS];
} halves;

DS_INLINE int half_of_point(const ds_points *p, const halves *h, const uint8_t *place, int first, int i) {
    int half_number = 0;
    for (int j = first; j < first + h->width; j++)
        half_number = half_number * h->n_levels + place[(int)p->values[j * p->n + i]];
    return half_number;
}

static void list_halves(const ds_points *p, halves *h) {
    uint8_t place[64] = {0};
    bool seen[64] = {false};
    uint16_t at[MOST_HALVES];
    memset(h, 0, sizeof *h);
    h->width = p->width / 2;
    for (int i = 0; i < p->width * p->n; i++) seen[(int)p->values[i]] = true;
    for (int v = 0; v < 64; v++)
        if (seen[v]) place[v] = (uint8_t)h->n_levels, h->level[h->n_levels++] = (float)v;
    h->n = 1;
    for (int j = 0; j < h->width; j++) h->n *= h->n_levels;
    for (int a = 0; a < h->n; a++)
        for (int j = h->width - 1, left = a; j >= 0; j--, left /= h->n_levels)
            h->value[a][j] = h->level[left % h->n_levels];
    for (int i = 0; i < p->n; i++) h->from[half_of_point(p, h, place, 0, i) + 1]++;
    for (int a = 0; a < h->n; a++) at[a] = h->from[a], h->from[a + 1] = (uint16_t)(h->from[a + 1] + h->from[a]);
    for (int i = 0; i < p->n; i++)
        h->second[at[half_of_point(p, h, place, 0, i)]++] = (uint8_t)half_of_point(p, h, place, h->width, i);
}

/* What the values of a half cost: sum of w v^2 - pull v, with pull = 2 w |y|; and with one column's sign turned, the one
 * that minds least: 2 pull v more. */
typedef struct half_costs {
    lanes plain[MOST_HALVES], turned[MOST_HALVES];
} half_costs;

DS_INLINE void price(const halves *h, int width, int n_levels, bool turns, const float *w, const lanes *pull,
                     half_costs *out) {
    lanes *cost = out->plain, *least = out->turned; /* least: until the end the smallest pull v */
    int n = 1;
    cost[0] = splat(0.0f);
    least[0] = splat(3e38f);
    for (int j = 0; j < width; j++, n *= n_levels)
        for (int k = n - 1; k >= 0; k--) {
            const lanes c = cost[k], m = least[k];
            for (int l = n_levels - 1; l >= 0; l--) {
                const lanes gain = pull[j] * h->level[l];
                cost[k * n_levels + l] = c - gain + w[j] * h->level[l] * h->level[l];
                if (turns) least[k * n_levels + l] = smaller(gain, m);
            }
        }
    for (int k = 0; turns && k < n; k++) least[k] = cost[k] + 2.0f * least[k];
}

/* The cheapest pair of halves of each row. */
typedef struct nearest {
    lanes cost;
    mask a, b;
} nearest;

/* The minimum first: which second half had it is looked up in the one first half that won. */
DS_INLINE nearest search(const halves *h, const lanes *a_cost, const lanes *b_cost) {
    nearest best = {.cost = splat(3e38f)};
    for (int a = 0; a < h->n; a++) {
        if (h->from[a] == h->from[a + 1]) continue;
        lanes least = b_cost[h->second[h->from[a]]];
        for (int i = h->from[a] + 1; i < h->from[a + 1]; i++) least = smaller(b_cost[h->second[i]], least);
        const lanes cost = a_cost[a] + least;
        const mask less = cost < best.cost;
        best.cost = pick(less, cost, best.cost);
        best.a = (less & a) | (~less & best.a);
    }
    int as[LANES], bs[LANES];
    memcpy(as, &best.a, sizeof as);
    for (int l = 0; l < LANES; l++) {
        const int from = h->from[as[l]], to = h->from[as[l] + 1];
        const float *costs = (const float *)b_cost + l;
        int found = from;
        for (int i = from + 1; i < to; i++)
            if (costs[h->second[i] * LANES] < costs[h->second[found] * LANES]) found = i;
        bs[l] = to > from ? h->second[found] : 0;
    }
    memcpy(&best.b, bs, sizeof bs);
    return best;
}

DS_INLINE nearest cheaper(const nearest *x, const nearest *y) {
    const mask first = x->cost <= y->cost;
    return (nearest){pick(first, x->cost, y->cost), (first & x->a) | (~first & y->a), (first & x->b) | (~first & y->b)};
}

/* A point's values with the signs of y; where `turn` the column that minds least gets the other. */
DS_INLINE void values_of(const halves *h, int width, const nearest *found, mask turn, const lanes *y, const lanes *pull,
                         lanes *v) {
    mask which = {0};
    lanes least = splat(0.0f);
    for (int j = 0; j < 2 * width; j++) {
        for (int l = 0; l < LANES; l++)
            ((float *)&v[j])[l] = h->value[j < width ? found->a[l] : found->b[l]][j % width];
        const lanes cost = pull[j] * v[j];
        const mask less = ((mask){0} - (j == 0)) | (cost < least);
        least = pick(less, cost, least);
        which = (less & j) | (~less & which);
        v[j] = pick(y[j] < 0.0f, -v[j], v[j]);
    }
    for (int j = 0; j < 2 * width; j++) v[j] = pick(turn & (which == j), -v[j], v[j]);
}

/* One point for a tile. */
DS_INLINE void snap_to_one(const halves *h, bool turns, mask odd, const lanes *y, const float *w, const lanes *pull,
                           lanes *v) {
    half_costs a, b;
    price(h, 4, 3, turns, w, pull, &a);
    price(h, 4, 3, turns, w + 4, pull + 4, &b);
    nearest found;
    if (turns) { /* rows whose signs may stay have the same costs in both */
        for (int i = 0; i < h->n; i++)
            a.turned[i] = pick(odd, a.turned[i], a.plain[i]), b.turned[i] = pick(odd, b.turned[i], b.plain[i]);
        const nearest in_a = search(h, a.turned, b.plain), in_b = search(h, a.plain, b.turned);
        found = cheaper(&in_a, &in_b);
    } else {
        found = search(h, a.plain, b.plain);
    }
    values_of(h, 4, &found, odd, y, pull, v);
}

/* Two points for a tile, which share its signs. */
DS_INLINE void snap_to_two(const halves *h, bool turns, mask odd, const lanes *y, const float *w, const lanes *pull,
                           lanes *v) {
    nearest plain[2], turned[2];
    for (int i = 0; i < 2; i++) {
        half_costs a, b;
        price(h, 2, 8, turns, w + 4 * i, pull + 4 * i, &a);
        price(h, 2, 8, turns, w + 4 * i + 2, pull + 4 * i + 2, &b);
        turned[i] = plain[i] = search(h, a.plain, b.plain);
        if (!turns) continue;
        const nearest in_a = search(h, a.turned, b.plain), in_b = search(h, a.plain, b.turned);
        turned[i] = cheaper(&in_a, &in_b);
    }
    const mask first = odd & (turned[0].cost + plain[1].cost < plain[0].cost + turned[1].cost);
    for (int i = 0; i < 2; i++) {
        const mask turn = i ? odd & ~first : first;
        const nearest found = {plain[i].cost, (turn & turned[i].a) | (~turn & plain[i].a),
                               (turn & turned[i].b) | (~turn & plain[i].b)};
        values_of(h, 2, &found, turn, y + 4 * i, pull + 4 * i, v + 4 * i);
    }
}

/* The points of a tile nearest to y under the weights w: their values. */
DS_INLINE void snap_points(const ds_points *p, const halves *h, const lanes *y, const float *w, lanes *v) {
    lanes pull[TILE];
    mask odd = {0};
    for (int j = 0; j < TILE; j++) {
        pull[j] = 2.0f * w[j] * size_of(y[j]);
        odd ^= y[j] < 0.0f;
    }
    if (!p->even_signs) odd = (mask){0};
    if (p->width == TILE) snap_to_one(h, p->even_signs, odd, y, w, pull, v);
    else snap_to_two(h, p->even_signs, odd, y, w, pull, v);
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
