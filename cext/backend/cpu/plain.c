/* plain.c: plain multi-head attention: its projections, what goes into the cache, and the heads. Knows no ISA, owns no
 * cache.
 *
 *   k = rope(W_k x), v = W_v x: cached for each head, or for each group of heads that shares them
 *   o_h = softmax(rope(W_q x)_h . K / sqrt(d)) V
 *
 * A group of query rows (tokens, and the heads that share keys and values) walks the cache together. Where a step has
 * few groups, each one's positions are split into parts, and these are joined. */
#include <math.h>
#include <string.h>

#include "backend/cpu/attention.h"
#include "backend/cpu/lane.h"

/* Parts begin where a block of the cache does. */
_Static_assert(DS_ROW_PAD % DS_KV_BLOCK == 0, "whole blocks");

/* How a sequence's groups are split. */
typedef struct plain_route {
    int n_parts;
    int slot; /* of the first group's part 0 among the results, where there are several */
} plain_route;

/* What the workers share. */
typedef struct plain_room {
    float *k, *v; /* (n_tok, n_head_kv * qk_dim), (n_tok, n_head_kv * v_dim) */
    plain_route *routes; /* (n_spans) */
    int n_joined; /* spans in more than one part */
    float *m, *l, *acc; /* (slots[, padded v_dim]) results of parts; a part takes DS_GROUP_ROWS */
} plain_room;

/* One worker's room, of DS_GROUP_ROWS query rows. */
typedef struct plain_lane {
    float *row; /* one row of a cache, or of a query */
    void *scratch, *queries;
    int32_t *visible; /* positions that a row sees */
    float *m, *l, *acc;
} plain_lane;

static plain_room *room_of(const ds_step *s) { return s->scratch->attention; }
static plain_lane *lane_of(const ds_lane *lane) { return lane->own->attention; }

/* ---- Groups ---- */

/* How a group is cut: as many whole tokens as DS_GROUP_ROWS hold, or one token's heads in blocks. */
typedef struct group_shape {
    int heads, blocks, tokens;
} group_shape;

static group_shape shape_of(const ds_config *c) {
    const int share = ds_head_share(c), heads = share < DS_GROUP_ROWS ? share : DS_GROUP_ROWS;
    return (group_shape){heads, (share + heads - 1) / heads, DS_GROUP_ROWS / heads};
}

/* Rows of a group: a token's heads side by side. */
typedef struct group {
    int token, n_tok; /* of the step */
    int head_kv, head, n_heads;
    int n_pos; /* that its last token sees */
} group;

/* A head's groups follow one another: their keys and values are in cache. */
static int groups_of(const ds_config *c, const ds_span *span) {
    const group_shape shape = shape_of(c);
    return c->n_head_kv * shape.blocks * ((span->n + shape.tokens - 1) / shape.tokens);
}

static group group_at(const ds_config *c, const ds_span *span, int i) {
    const group_shape shape = shape_of(c);
    const int along = (span->n + shape.tokens - 1) / shape.tokens, t = i % along * shape.tokens;
    const int head_kv = i / along / shape.blocks, first = i / along % shape.blocks * shape.heads,
              left = ds_head_share(c) - first;
    group g = {.token = span->first + t,
               .n_tok = span->n - t < shape.tokens ? span->n - t : shape.tokens,
               .head_kv = head_kv,
               .head = head_kv * ds_head_share(c) + first,
               .n_heads = left < shape.heads ? left : shape.heads};
    g.n_pos = span->pos + t + g.n_tok;
    return g;
}

static void plan(const ds_step *s) {
    plain_room *room = room_of(s);
    int n_groups = 0, slot = 0;
    for (int i = 0; i < s->n_spans; i++) n_groups += groups_of(s->config, &s->spans[i]);
    room->n_joined = 0;
    for (int i = 0; i < s->n_spans; i++) {
        /* Whatever the number of threads: results do not depend on it. */
        const int most = (s->spans[i].pos + s->spans[i].n + DS_MIN_PART - 1) / DS_MIN_PART;
        const int wanted = (DS_MAX_PARTS + n_groups - 1) / n_groups;
        room->routes[i] = (plain_route){wanted < most ? wanted : most, slot};
        if (room->routes[i].n_parts == 1) continue;
        room->n_joined++;
        slot += groups_of(s->config, &s->spans[i]) * room->routes[i].n_parts;
    }
}

/* ---- Projections ---- */

/* Keys and values and, if they are wanted, queries. */
static void project(const ds_lane *lane, const ds_layer *l, int il, bool queries) {
    const ds_step *s = lane->step;
    const ds_mat *mats[3] = {&l->plain.k, &l->plain.v, &l->q};
    float *out[3] = {room_of(s)->k, room_of(s)->v, s->scratch->q};
    const int n = queries ? 3 : 2;
    unsigned kinds = 0;
    ds_job jobs[3];
    for (int i = 0; i < n; i++) kinds |= ds_kind_of(mats[i]);
    const ds_act *act = ds_attend_input(lane, l, il, kinds);
    for (int i = 0; i < n; i++)
        jobs[i] = ds_cpu_job(mats[i], mats[i]->data, ds_act_for(act, mats[i]), s->n_tok, out[i], (size_t)mats[i]->rows);
    ds_cpu_mul(lane->worker, s->kern, jobs, n);
    ds_barrier(lane->worker);
}

/* Token t's rows of one head, the key's rotated, into the cache of its sequence. */
static void store_head(const ds_lane *lane, int il, const ds_span *span, int t, int head) {
    const ds_step *s = lane->step;
    const ds_config *c = s->config;
    const size_t qk = (size_t)ds_qk_dim(c), v = (size_t)c->v_dim, at = (size_t)t * (size_t)c->n_head_kv + (size_t)head;
    float *row = lane_of(lane)->row;
    const int pos = span->pos + t - span->first;
    const ds_rows key = ds_kv_row(span->kv, il - s->weights->layer_begin, 0, head, pos),
                  value = ds_kv_row(span->kv, il - s->weights->layer_begin, 1, head, pos);
    memcpy(row, room_of(s)->k + at * qk, qk * sizeof *row); /* packing may overwrite it */
    ds_rope_apply(c->rope_dim / 2, s->scratch->rope + (size_t)t * (size_t)c->rope_dim, row + c->nope_dim);
    s->kern->rows_put(&key, 0, (int)qk, 0, row);
    memcpy(row, room_of(s)->v + at * v, v * sizeof *row);
    s->kern->rows_put(&value, 0, (int)v, 0, row);
}

/* The lane's rows into the cache; of a single token each worker takes some heads. */
static void store(const ds_lane *lane, int il) {
    const ds_step *s = lane->step;
    const int first = lane->solo ? lane->worker->ith : 0, step = lane->solo ? lane->worker->nth : 1;
    for (int i = 0; i < s->n_spans; i++) {
        const ds_span *span = &s->spans[i];
        const int begin = span->first > lane->t0 ? span->first : lane->t0;
        const int end = span->first + span->n < lane->t1 ? span->first + span->n : lane->t1;
        for (int t = begin; t < end; t++)
            for (int head = first; head < s->config->n_head_kv; head += step) store_head(lane, il, span, t, head);
    }
}

/* ---- Heads ---- */

static ds_row_kind kind_of(const ds_span *span) { return span->kv->store->layouts[0].kind; }

/* Results of a group's rows, or of one part of its positions. */
typedef struct group_sums {
    float *m, *l, *acc; /* (DS_GROUP_ROWS[, padded v_dim]) */
} group_sums;

static group_sums sums_of(const ds_lane *lane, int span, int index, int part) {
    const plain_room *room = room_of(lane->step);
    const plain_lane *own = lane_of(lane);
    const plain_route *route = &room->routes[span];
    if (route->n_parts == 1) return (group_sums){own->m, own->l, own->acc};
    const size_t at = ((size_t)route->slot + (size_t)index * (size_t)route->n_parts + (size_t)part) * DS_GROUP_ROWS;
    return (group_sums){room->m + at, room->l + at, room->acc + at * ds_row_pad(lane->step->config->v_dim)};
}

/* The group's queries, rotated, as the kernels take them, and what they see. */
static void prepare(const ds_lane *lane, const ds_span *span, const group *g) {
    const ds_step *s = lane->step;
    const ds_config *c = s->config;
    const plain_lane *own = lane_of(lane);
    const int qk = ds_qk_dim(c), n_rows = ds_attend_pad(g->n_tok * g->n_heads);
    for (int r = 0; r < g->n_tok * g->n_heads; r++) {
        const int t = g->token + r / g->n_heads, head = g->head + r % g->n_heads;
        memcpy(own->row, s->scratch->q + ((size_t)t * (size_t)c->n_head + (size_t)head) * (size_t)qk,
               (size_t)qk * sizeof *own->row);
        ds_rope_apply(c->rope_dim / 2, s->scratch->rope + (size_t)t * (size_t)c->rope_dim, own->row + c->nope_dim);
        s->kern->query_put(kind_of(span), r, n_rows, qk, 0, own->row, ds_query_scale(c, span->pos + t - span->first),
                           own->queries);
        own->visible[r] = span->pos + t - span->first + 1;
    }
}

/* The outputs of a group's rows, their parts joined, rotated back where the cache is. */
static void output(const ds_lane *lane, int i, int index) {
    const ds_step *s = lane->step;
    const ds_config *c = s->config;
    const ds_span *span = &s->spans[i];
    const group g = group_at(c, span, index);
    const group_sums sums = sums_of(lane, i, index, 0);
    const size_t ld = ds_row_pad(c->v_dim);
    for (int r = 0; r < g.n_tok * g.n_heads; r++) {
        const size_t t = (size_t)(g.token + r / g.n_heads), head = (size_t)(g.head + r % g.n_heads);
        float *out = s->scratch->heads + (t * (size_t)c->n_head + head) * (size_t)c->v_dim;
        ds_attend_join(s->kern, room_of(s)->routes[i].n_parts, DS_GROUP_ROWS, sums.m + r, sums.l + r,
                       sums.acc + (size_t)r * ld, ld, c->v_dim, out);
        if (kind_of(span) == DS_ROWS_Q8) s->kern->rotate(c->v_dim, out);
    }
}

/* One part of the positions of a group: a running softmax. */
static void attend_part(const ds_lane *lane, int il, int i, int index, int part) {
    const ds_step *s = lane->step;
    const ds_config *c = s->config;
    const plain_lane *own = lane_of(lane);
    const ds_span *span = &s->spans[i];
    const group g = group_at(c, span, index);
    const int n_parts = room_of(s)->routes[i].n_parts, layer = il - s->weights->layer_begin;
    const int begin = ds_attend_part_begin(g.n_pos, n_parts, part),
              end = ds_attend_part_begin(g.n_pos, n_parts, part + 1);
    const group_sums sums = sums_of(lane, i, index, part);
    const ds_attend job = {
        .n_rows = g.n_tok * g.n_heads,
        .n_pos = end - begin,
        .n = ds_qk_dim(c),
        .v_dim = c->v_dim,
        .q = own->queries,
        .keys = ds_kv_table(span->kv, layer, 0, g.head_kv, begin),
        .values = ds_kv_table(span->kv, layer, 1, g.head_kv, begin),
        .visible = own->visible,
        .first_pos = begin,
        .m = sums.m,
        .l = sums.l,
        .acc = sums.acc,
        .ld_acc = ds_row_pad(c->v_dim),
        .scratch = own->scratch,
    };
    const int n_rows = ds_attend_pad(job.n_rows);
    prepare(lane, span, &g);
    for (int r = 0; r < n_rows; r++) job.m[r] = -INFINITY, job.l[r] = 0;
    memset(job.acc, 0, (size_t)n_rows * job.ld_acc * sizeof *job.acc);
    s->kern->attend(&job);
    if (n_parts == 1) output(lane, i, index);
}

/* Every part of every group, claimed one by one. */
static void attend_all(const ds_lane *lane, int il) {
    const ds_step *s = lane->step;
    size_t claimed = ds_claim(lane->worker), base = 0;
    for (int i = 0; i < s->n_spans; i++) { /* claims only grow, so one walk serves them all */
        const size_t n_parts = (size_t)room_of(s)->routes[i].n_parts,
                     n = (size_t)groups_of(s->config, &s->spans[i]) * n_parts;
        for (; claimed < base + n; claimed = ds_claim(lane->worker))
            attend_part(lane, il, i, (int)((claimed - base) / n_parts), (int)((claimed - base) % n_parts));
        base += n;
    }
}

/* Outputs of the groups whose positions were split. */
static void join_all(const ds_lane *lane) {
    const ds_step *s = lane->step;
    size_t claimed = ds_claim(lane->worker), base = 0;
    for (int i = 0; i < s->n_spans; i++) {
        if (room_of(s)->routes[i].n_parts == 1) continue;
        const size_t n = (size_t)groups_of(s->config, &s->spans[i]);
        for (; claimed < base + n; claimed = ds_claim(lane->worker)) output(lane, i, (int)(claimed - base));
        base += n;
    }
}

static void remember(const ds_lane *lane, const ds_layer *layer, int il) {
    project(lane, layer, il, false);
    store(lane, il);
}

static void attend(const ds_lane *lane, const ds_layer *layer, int il) {
    project(lane, layer, il, true);
    store(lane, il);
    ds_barrier(lane->worker); /* the cache holds this step's rows */
    attend_all(lane, il);
    if (!room_of(lane->step)->n_joined) return;
    ds_barrier(lane->worker);
    join_all(lane);
}

/* ---- Memory ---- */

static void *lane_room(ds_carver *c, const ds_config *g, int n_tok) {
    const int width = ds_qk_dim(g) > g->v_dim ? ds_qk_dim(g) : g->v_dim;
    plain_lane *lane = ds_carve(c, 1, sizeof *lane);
    const plain_lane l = {
        .row = ds_carve_floats(c, (size_t)width),
        .scratch = ds_carve(c, ds_attend_scratch(DS_GROUP_ROWS), 1),
        /* Every kind's pack is linear in its rows, and one of floats the largest. */
        .queries = ds_carve(c, ds_query_bytes(DS_ROWS_F32, DS_GROUP_ROWS, (int)ds_row_pad(ds_qk_dim(g)), 0), 1),
        .visible = ds_carve(c, DS_GROUP_ROWS, sizeof(int32_t)),
        .m = ds_carve_floats(c, DS_GROUP_ROWS),
        .l = ds_carve_floats(c, DS_GROUP_ROWS),
        .acc = ds_carve_floats(c, DS_GROUP_ROWS * ds_row_pad(g->v_dim)),
    };
    if (lane) *lane = l;
    return lane;
}

static void *room(ds_carver *c, const ds_config *g, int n_tok) {
    /* Fewer than DS_MAX_PARTS groups are split, into less than DS_MAX_PARTS / groups + 1 parts each. */
    const size_t n = (size_t)n_tok, slots = 2 * DS_MAX_PARTS * DS_GROUP_ROWS;
    plain_room *room = ds_carve(c, 1, sizeof *room);
    const plain_room r = {
        .k = ds_carve_floats(c, n * (size_t)g->n_head_kv * (size_t)ds_qk_dim(g)),
        .v = ds_carve_floats(c, n * (size_t)g->n_head_kv * (size_t)g->v_dim),
        .routes = ds_carve(c, n, sizeof(plain_route)),
        .m = ds_carve_floats(c, slots),
        .l = ds_carve_floats(c, slots),
        .acc = ds_carve_floats(c, slots * ds_row_pad(g->v_dim)),
    };
    if (room) *room = r;
    return room;
}

const ds_cpu_attention_kind DS_CPU_PLAIN_ATTENTION = {
    .room = room, .lane_room = lane_room, .plan = plan, .remember = remember, .attend = attend};
