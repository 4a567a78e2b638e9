/* latent_attend.c: attention over the latent cache (DeepSeek-V2, section 2.1), by the cheaper of two routes. Knows no ISA.
 *
 * Absorbed: score_h = ((W_uk^T q_nope) . c_kv + q_pe . k_pe) * scale and o_h = W_uv sum_j p_j c_kv_j. All heads of a
 * token, and tokens of a sequence, are rows of one product with the cache; the positions are split among workers and
 * joined. Expanded: K = W_uk c_kv and V = W_uv c_kv are made block by block, once for all queries of a head. */
#include "backend/cpu/latent.h"

#include <math.h>
#include <string.h>

#include "backend/cpu/attention.h"
#include "backend/cpu/lane.h"

/* Parts and expanded blocks begin where a block of the cache does. */
_Static_assert(DS_ROW_PAD % DS_KV_BLOCK == 0 && DS_ATTEND_BLOCK % DS_KV_BLOCK == 0, "whole blocks");

/* ---- The plan ---- */

/* The cheaper route, in dwords of dots for a head; what is not a dot was measured and counts as so many of them. */
static bool absorbs(const ds_config *c, const ds_span *span) {
    static const double PER_DWORD[] = {[DS_KV_F32] = 1, [DS_KV_F16] = 2, [DS_KV_Q8_0] = 4};
    const double per_dword = PER_DWORD[span->kv->store->type], tail = c->rope_dim / (per_dword < 2 ? 1.0 : 2.0);
    const double up = (double)(c->nope_dim + c->v_dim) * c->kv_lora_rank; /* W_uk and W_uv */
    const double n = span->n, n_pos = span->pos + n, pairs = n * span->pos + n * (n + 1) / 2;
    /* 2 up: products with W_uk and W_uv, packing, joining. 80 positions: unpacking W_uk and W_uv. */
    const double absorbed = pairs * (2.0 * c->kv_lora_rank / per_dword + tail) + n * 2 * up;
    const double expanded = pairs * ((c->nope_dim + c->v_dim) / per_dword + tail) + (n_pos + 80) * up / per_dword;
    return span->n < DS_ATTEND_ROWS || absorbed <= expanded;
}

/* How a group is cut: as many whole tokens as DS_GROUP_ROWS hold, or one token's heads in blocks. */
typedef struct group_shape {
    int heads, blocks, tokens;
} group_shape;

static group_shape shape_of(const ds_config *c) {
    const int heads = c->n_head < DS_GROUP_ROWS ? c->n_head : DS_GROUP_ROWS;
    return (group_shape){heads, (c->n_head + heads - 1) / heads, DS_GROUP_ROWS / heads};
}

static void group_span(const ds_step *s, ds_latent_plan *plan, int i, int *row) {
    const int n_head = s->config->n_head;
    const group_shape shape = shape_of(s->config);
    const ds_span *span = &s->spans[i];
    plan->routes[i].first_group = plan->n_groups;
    for (int t = 0; t < span->n; t += shape.tokens) {
        for (int head = 0; head < n_head; head += shape.heads) {
            ds_latent_group g = {.span = i,
                                 .token = span->first + t,
                                 .n_tok = span->n - t < shape.tokens ? span->n - t : shape.tokens,
                                 .head = head,
                                 .n_heads = n_head - head < shape.heads ? n_head - head : shape.heads,
                                 .row = *row};
            g.n_rows = ds_attend_pad(g.n_tok * g.n_heads);
            for (int r = 0; r < g.n_tok * g.n_heads; r++) plan->visible[g.row + r] = span->pos + t + r / g.n_heads + 1;
            *row += g.n_rows;
            plan->groups[plan->n_groups++] = g;
        }
    }
}

void ds_latent_plan_step(const ds_step *s) {
    ds_latent_plan *plan = &ds_latent_room_of(s)->plan;
    int row = 0, slot = 0;
    plan->n_groups = plan->n_absorbed = plan->n_joined = plan->n_expanded_rows = 0;
    for (int i = 0; i < s->n_spans; i++) {
        const ds_span *span = &s->spans[i];
        ds_latent_route *route = &plan->routes[i];
        *route = (ds_latent_route){.absorb = absorbs(s->config, span)};
        plan->n_absorbed += route->absorb;
        if (route->absorb) {
            group_span(s, plan, i, &row);
            continue;
        }
        const int most = ds_expand_max_parts(s->config), wanted = (span->pos + span->n) / DS_EXPAND_PART;
        route->n_parts = wanted < 1 ? 1 : wanted < most ? wanted : most;
        route->row = plan->n_expanded_rows;
        plan->n_expanded_rows += ds_attend_pad(span->n);
        plan->n_joined += route->n_parts > 1;
    }
    for (int i = 0; i < plan->n_groups; i++) {
        ds_latent_group *g = &plan->groups[i];
        /* Whatever the number of threads: results do not depend on it. */
        int n_pos = s->spans[g->span].pos + s->spans[g->span].n, most = (n_pos + DS_MIN_PART - 1) / DS_MIN_PART;
        int wanted = (DS_MAX_PARTS + plan->n_groups - 1) / plan->n_groups;
        g->n_parts = wanted < most ? wanted : most;
        g->slot = slot;
        slot += g->n_parts * g->n_rows;
    }
}

/* ---- Absorbed ---- */

/* Query row of a token's head: its group, and its place there. */
static const ds_latent_group *group_of(const ds_step *s, int span, int t, int h, int *row) {
    const ds_latent_plan *plan = &ds_latent_room_of(s)->plan;
    const group_shape shape = shape_of(s->config);
    const int local = t - s->spans[span].first, block = local / shape.tokens * shape.blocks + h / shape.heads;
    const ds_latent_group *g = &plan->groups[plan->routes[span].first_group + block];
    *row = local % shape.tokens * g->n_heads + h - g->head;
    return g;
}

/* The parts of an expanded key: only Q8 rows keep the rotary tail apart. */
static int key_head(const ds_config *c, ds_row_kind kind) { return kind == DS_ROWS_Q8 ? c->nope_dim : ds_qk_dim(c); }
static int key_tail(const ds_config *c, ds_row_kind kind) { return kind == DS_ROWS_Q8 ? c->rope_dim : 0; }

static ds_row_kind kind_of(const ds_step *s, int span) { return s->spans[span].kv->store->layouts[0].kind; }

static void *pack_of(const ds_step *s, const ds_latent_group *g) {
    return (char *)ds_latent_room_of(s)->queries + (size_t)g->row * ds_latent_query_bytes(s->config);
}

/* The span behind the run of spans that begins with i and goes by the same route. */
static int run_end(const ds_step *s, int i) {
    const ds_latent_route *routes = ds_latent_room_of(s)->plan.routes;
    int end = i + 1;
    while (end < s->n_spans && routes[end].absorb == routes[i].absorb) end++;
    return end;
}

/* [W_uk,h^T q_nope | rope(q_pe)] of the tokens of spans [begin, end), packed into their groups. */
static void absorb_head(const ds_lane *lane, const ds_layer *l, int begin, int end, int h) {
    const ds_step *s = lane->step;
    const ds_config *c = s->config;
    const size_t q_row = (size_t)c->n_head * (size_t)ds_qk_dim(c),
                 lat_row = (size_t)c->n_head * (size_t)ds_latent_width(c);
    const int t0 = s->spans[begin].first, n = s->spans[end - 1].first + s->spans[end - 1].n - t0;
    const ds_act_kind kind = ds_format_get(l->latent.k_b.format)->act;
    const float *q = s->scratch->q + (size_t)t0 * q_row + (size_t)h * (size_t)ds_qk_dim(c);
    float *out = ds_latent_room_of(s)->latent + (size_t)t0 * lat_row + (size_t)h * (size_t)ds_latent_width(c);
    void *pack = ds_latent_lane_of(lane)->act_nope.pack[kind];
    s->kern->act_pack(kind, 0, n, n, c->nope_dim, q, q_row, NULL, pack);
    ds_job job = ds_cpu_job(&l->latent.k_b, ds_mat_block(&l->latent.k_b, h), pack, n, out, lat_row);
    s->kern->mul[job.format](&job.mul);
    for (int i = begin; i < end; i++) {
        for (int t = s->spans[i].first; t < s->spans[i].first + s->spans[i].n; t++, q += q_row, out += lat_row) {
            int row;
            const ds_latent_group *g = group_of(s, i, t, h, &row);
            memcpy(out + c->kv_lora_rank, q + c->nope_dim, (size_t)c->rope_dim * sizeof *out);
            ds_rope_apply(c->rope_dim / 2, s->scratch->rope + (size_t)t * (size_t)c->rope_dim, out + c->kv_lora_rank);
            s->kern->query_put(kind_of(s, i), row, g->n_rows, c->kv_lora_rank, c->rope_dim, out,
                               ds_query_scale(c, s->spans[i].pos + t - s->spans[i].first), pack_of(s, g));
        }
    }
}

/* One part of a group's positions: a running softmax into the part's m, l and acc. The part that this worker most likely
 * takes next is brought into cache meanwhile, as this one (`ready`) was. */
static void attend_part(const ds_lane *lane, int il, const ds_latent_group *g, int part, bool ready) {
    const ds_step *s = lane->step;
    const ds_config *c = s->config;
    const ds_latent_room *room = ds_latent_room_of(s);
    const ds_kv *kv = s->spans[g->span].kv;
    const int n_pos = room->plan.visible[g->row + g->n_tok * g->n_heads - 1];
    const size_t ld = ds_row_pad(c->kv_lora_rank), slot = (size_t)g->slot + (size_t)part * (size_t)g->n_rows;
    const int begin = ds_attend_part_begin(n_pos, g->n_parts, part),
              end = ds_attend_part_begin(n_pos, g->n_parts, part + 1);
    ds_attend job = {
        .n_rows = g->n_tok * g->n_heads,
        .n_pos = end - begin,
        .n = c->kv_lora_rank,
        .n_tail = c->rope_dim,
        .v_dim = c->kv_lora_rank,
        .q = pack_of(s, g),
        .keys = ds_kv_table(kv, il - s->weights->layer_begin, 0, 0, begin),
        .visible = room->plan.visible + g->row,
        .first_pos = begin,
        .m = room->m + slot,
        .l = room->l + slot,
        .acc = room->acc + slot * ld,
        .ld_acc = ld,
        .scratch = ds_latent_lane_of(lane)->scratch,
        .ready = ready,
    };
    const int next = part + lane->worker->nth;
    if (next < g->n_parts) {
        const int from = ds_attend_part_begin(n_pos, g->n_parts, next);
        job.next = ds_kv_table(kv, il - s->weights->layer_begin, 0, 0, from);
        job.n_next = ds_attend_part_begin(n_pos, g->n_parts, next + 1) - from;
    }
    for (int r = 0; r < g->n_rows; r++) job.m[r] = -INFINITY, job.l[r] = 0;
    memset(job.acc, 0, (size_t)g->n_rows * ld * sizeof *job.acc);
    s->kern->attend(&job);
}

/* A query row's latent output, rotated back where the cache is. */
static void latent_output(const ds_step *s, const ds_latent_group *g, int row, float *out) {
    const ds_latent_room *room = ds_latent_room_of(s);
    const size_t at = (size_t)g->slot + (size_t)row, ld = ds_row_pad(s->config->kv_lora_rank);
    ds_attend_join(s->kern, g->n_parts, (size_t)g->n_rows, room->m + at, room->l + at, room->acc + at * ld, ld,
                   s->config->kv_lora_rank, out);
    if (kind_of(s, g->span) == DS_ROWS_Q8) s->kern->rotate(s->config->kv_lora_rank, out);
}

/* o_h = W_uv,h (latent output) of the tokens of spans [begin, end), over the place of their absorbed queries. */
static void unabsorb_head(const ds_lane *lane, const ds_layer *l, int begin, int end, int h) {
    const ds_step *s = lane->step;
    const ds_config *c = s->config;
    const size_t lat_row = (size_t)c->n_head * (size_t)ds_latent_width(c),
                 out_row = (size_t)c->n_head * (size_t)c->v_dim;
    const int t0 = s->spans[begin].first, n = s->spans[end - 1].first + s->spans[end - 1].n - t0;
    const ds_act_kind kind = ds_format_get(l->latent.v_b.format)->act;
    float *latent = ds_latent_room_of(s)->latent + (size_t)t0 * lat_row + (size_t)h * (size_t)ds_latent_width(c);
    void *pack = ds_latent_lane_of(lane)->act_latent.pack[kind];
    for (int i = begin, t = t0; i < end; i++) {
        for (; t < s->spans[i].first + s->spans[i].n; t++) {
            int row;
            const ds_latent_group *g = group_of(s, i, t, h, &row);
            latent_output(s, g, row, latent + (size_t)(t - t0) * lat_row);
        }
    }
    s->kern->act_pack(kind, 0, n, n, c->kv_lora_rank, latent, lat_row, NULL, pack);
    ds_job job = ds_cpu_job(&l->latent.v_b, ds_mat_block(&l->latent.v_b, h), pack, n,
                            s->scratch->heads + (size_t)t0 * out_row + (size_t)h * (size_t)c->v_dim, out_row);
    s->kern->mul[job.format](&job.mul);
}

/* Every head of every run of absorbing spans, claimed one by one. */
static void absorb_all(const ds_lane *lane, const ds_layer *l) {
    const ds_step *s = lane->step;
    const size_t n_head = (size_t)s->config->n_head;
    size_t claimed = ds_claim(lane->worker), base = 0;
    for (int i = 0, end; i < s->n_spans; i = end) {
        end = run_end(s, i);
        if (!ds_latent_room_of(s)->plan.routes[i].absorb) continue;
        for (; claimed < base + n_head; claimed = ds_claim(lane->worker))
            absorb_head(lane, l, i, end, (int)(claimed - base));
        base += n_head;
    }
}

/* ---- Expanded ---- */

/* The packed queries from the t-th on, a multiple of DS_QUERY_BLOCK. */
static void *queries_at(const ds_lane *lane, ds_row_kind kind, int t) {
    const ds_config *c = lane->step->config;
    return (char *)ds_latent_lane_of(lane)->queries + ds_query_bytes(kind, t, key_head(c, kind), key_tail(c, kind));
}

/* The head's weights, and all its queries with their rotary part rotated, as the kernels take them. */
static void prepare_head(const ds_lane *lane, const ds_layer *l, int i, int h) {
    const ds_step *s = lane->step;
    const ds_config *c = s->config;
    const ds_latent_lane *own = ds_latent_lane_of(lane);
    const ds_span *span = &s->spans[i];
    const ds_row_kind kind = kind_of(s, i);
    const ds_expand_weights weights = {.from = kind_of(s, i),
                                       .rank = c->kv_lora_rank,
                                       .k_dim = c->nope_dim,
                                       .v_dim = c->v_dim,
                                       .k_b = own->k_b,
                                       .v_b = own->v_b,
                                       .scratch = own->columns,
                                       .out = own->weights};
    s->kern->dequantize[l->latent.k_b.format]((int64_t)l->latent.k_b.rows * l->latent.k_b.k,
                                              ds_mat_block(&l->latent.k_b, h), own->k_b);
    s->kern->dequantize[l->latent.v_b.format]((int64_t)l->latent.v_b.rows * l->latent.v_b.k,
                                              ds_mat_block(&l->latent.v_b, h), own->v_b);
    s->kern->expand_weights(&weights);
    for (int t = 0; t < span->n; t++) {
        const int block = t / DS_QUERY_BLOCK * DS_QUERY_BLOCK, left = span->n - block;
        const int n_rows = left < DS_QUERY_BLOCK ? ds_attend_pad(left) : DS_QUERY_BLOCK;
        memcpy(own->row,
               s->scratch->q + ((size_t)(span->first + t) * (size_t)c->n_head + (size_t)h) * (size_t)ds_qk_dim(c),
               (size_t)ds_qk_dim(c) * sizeof *own->row);
        ds_rope_apply(c->rope_dim / 2, s->scratch->rope + (size_t)(span->first + t) * (size_t)c->rope_dim,
                      own->row + c->nope_dim);
        s->kern->query_put(kind, t - block, n_rows, key_head(c, kind), key_tail(c, kind), own->row,
                           ds_query_scale(c, span->pos + t), queries_at(lane, kind, block));
        own->visible[t] = span->pos + t + 1;
    }
}

/* Results of a head's queries, or of one part of its positions. */
typedef struct head_sums {
    float *m, *l, *acc; /* (rows[, padded v_dim]) */
} head_sums;

static head_sums sums_of(const ds_lane *lane, int i, int h, int part) {
    const ds_latent_room *room = ds_latent_room_of(lane->step);
    const ds_latent_route *route = &room->plan.routes[i];
    const int most = ds_expand_max_parts(lane->step->config);
    if (route->n_parts == 1)
        return (head_sums){ds_latent_lane_of(lane)->m, ds_latent_lane_of(lane)->l, ds_latent_lane_of(lane)->acc};
    const size_t at =
        ((size_t)h * (size_t)most + (size_t)part) * (size_t)room->plan.n_expanded_rows + (size_t)route->row;
    return (head_sums){room->head_m + at, room->head_l + at,
                       room->head_acc + at * ds_row_pad(lane->step->config->v_dim)};
}

/* Fold the n expanded positions from pos into the results of every query that sees them. */
static void attend_block(const ds_lane *lane, const ds_span *span, ds_row_kind kind, int pos, int n,
                         const head_sums *sums) {
    const ds_config *c = lane->step->config;
    const ds_latent_lane *own = ds_latent_lane_of(lane);
    const size_t ld = ds_row_pad(c->v_dim);
    for (int t = 0; t < span->n; t += DS_QUERY_BLOCK) {
        const int n_q = span->n - t < DS_QUERY_BLOCK ? span->n - t : DS_QUERY_BLOCK;
        if (span->pos + t + n_q <= pos) continue; /* all of these come before the block */
        const ds_attend job = {
            .n_rows = n_q,
            .n_pos = n,
            .n = key_head(c, kind),
            .n_tail = key_tail(c, kind),
            .v_dim = c->v_dim,
            .q = queries_at(lane, kind, t),
            .keys = own->keys,
            .values = own->values,
            .visible = own->visible + t,
            .first_pos = pos,
            .m = sums->m + t,
            .l = sums->l + t,
            .acc = sums->acc + (size_t)t * ld,
            .ld_acc = ld,
            .scratch = own->scratch,
        };
        lane->step->kern->attend(&job);
    }
}

/* The outputs of one head of one sequence, its parts joined. */
static void head_output(const ds_lane *lane, int i, int h) {
    const ds_step *s = lane->step;
    const ds_config *c = s->config;
    const ds_latent_plan *plan = &ds_latent_room_of(s)->plan;
    const size_t ld = ds_row_pad(c->v_dim);
    const head_sums sums = sums_of(lane, i, h, 0);
    for (int t = 0; t < s->spans[i].n; t++) {
        float *out =
            s->scratch->heads + ((size_t)(s->spans[i].first + t) * (size_t)c->n_head + (size_t)h) * (size_t)c->v_dim;
        ds_attend_join(s->kern, plan->routes[i].n_parts, (size_t)plan->n_expanded_rows, sums.m + t, sums.l + t,
                       sums.acc + (size_t)t * ld, ld, c->v_dim, out);
        if (kind_of(s, i) == DS_ROWS_Q8) s->kern->rotate(c->v_dim, out);
    }
}

/* All queries of one head of one sequence over one part of the positions, keys and values expanded block by block. */
static void attend_expanded(const ds_lane *lane, const ds_layer *l, int il, int i, int h, int part) {
    const ds_step *s = lane->step;
    const ds_config *c = s->config;
    ds_latent_lane *own = ds_latent_lane_of(lane);
    const ds_span *span = &s->spans[i];
    const ds_row_kind kind = kind_of(s, i);
    const size_t ld = ds_row_pad(c->v_dim), floats = ds_expand_ld(c->nope_dim, c->rope_dim, c->v_dim) * sizeof(float);
    const int n_parts = ds_latent_room_of(s)->plan.routes[i].n_parts, n_pos = span->pos + span->n;
    const int begin = n_pos / n_parts * part / DS_ATTEND_BLOCK * DS_ATTEND_BLOCK;
    const int end = part + 1 == n_parts ? n_pos : n_pos / n_parts * (part + 1) / DS_ATTEND_BLOCK * DS_ATTEND_BLOCK;
    const head_sums sums = sums_of(lane, i, h, part);
    const size_t key_bytes = ds_row_bytes_of(kind, key_head(c, kind), key_tail(c, kind));
    own->keys.layout =
        ds_row_layout_of(kind, kind == DS_ROWS_F32 ? floats : key_bytes, key_tail(c, kind), DS_ATTEND_BLOCK);
    own->values.layout =
        ds_row_layout_of(kind, kind == DS_ROWS_F32 ? floats : ds_row_bytes_of(kind, c->v_dim, 0), 0, DS_ATTEND_BLOCK);
    prepare_head(lane, l, i, h);
    for (int t = 0; t < ds_attend_pad(span->n); t++) sums.m[t] = -INFINITY, sums.l[t] = 0;
    memset(sums.acc, 0, (size_t)ds_attend_pad(span->n) * ld * sizeof *sums.acc);
    for (int pos = begin; pos < end; pos += DS_ATTEND_BLOCK) {
        const ds_expand job = {
            .n_pos = end - pos < DS_ATTEND_BLOCK ? end - pos : DS_ATTEND_BLOCK,
            .rank = c->kv_lora_rank,
            .n_tail = c->rope_dim,
            .k_dim = c->nope_dim,
            .v_dim = c->v_dim,
            .weights = own->weights,
            .latents = ds_kv_table(span->kv, il - s->weights->layer_begin, 0, 0, pos),
            .keys = ds_table_rows(&own->keys, 0),
            .values = ds_table_rows(&own->values, 0),
            .scratch = own->expand,
        };
        s->kern->expand(&job);
        attend_block(lane, span, kind, pos, job.n_pos, &sums);
    }
    if (n_parts == 1) head_output(lane, i, h);
}

/* The cache's passes: whole heads of expanding spans, parts of the groups of the others. */
static void attend_all(const ds_lane *lane, const ds_layer *l, int il) {
    const ds_step *s = lane->step;
    const ds_latent_plan *plan = &ds_latent_room_of(s)->plan;
    const size_t n_head = (size_t)s->config->n_head;
    size_t claimed = ds_claim(lane->worker), base = 0;
    for (int i = 0; i < s->n_spans; i++) { /* claims only grow, so one walk serves them all */
        if (plan->routes[i].absorb) continue;
        const size_t n_parts = (size_t)plan->routes[i].n_parts;
        for (; claimed < base + n_head * n_parts; claimed = ds_claim(lane->worker))
            attend_expanded(lane, l, il, i, (int)((claimed - base) / n_parts), (int)((claimed - base) % n_parts));
        base += n_head * n_parts;
    }
    for (int i = 0; i < plan->n_groups; i++) {
        const ds_latent_group *g = &plan->groups[i];
        for (int part, ready = -1; claimed < base + (size_t)g->n_parts; claimed = ds_claim(lane->worker)) {
            part = (int)(claimed - base);
            attend_part(lane, il, g, part, part == ready);
            ready = part + lane->worker->nth;
        }
        base += (size_t)g->n_parts;
    }
}

/* Outputs of the heads whose positions were shared out, and W_uv behind latent outputs. */
static void finish_all(const ds_lane *lane, const ds_layer *l) {
    const ds_step *s = lane->step;
    const ds_latent_plan *plan = &ds_latent_room_of(s)->plan;
    const size_t n_head = (size_t)s->config->n_head;
    size_t claimed = ds_claim(lane->worker), base = 0;
    for (int i = 0, end; i < s->n_spans; i = end) {
        end = plan->routes[i].absorb ? run_end(s, i) : i + 1;
        if (!plan->routes[i].absorb && plan->routes[i].n_parts == 1) continue;
        for (; claimed < base + n_head; claimed = ds_claim(lane->worker)) {
            if (plan->routes[i].absorb) unabsorb_head(lane, l, i, end, (int)(claimed - base));
            else head_output(lane, i, (int)(claimed - base));
        }
        base += n_head;
    }
}

void ds_latent_heads(const ds_lane *lane, const ds_layer *layer, int il) {
    const ds_latent_plan *plan = &ds_latent_room_of(lane->step)->plan;
    if (plan->n_absorbed) {
        absorb_all(lane, layer);
        ds_barrier(lane->worker);
    }
    attend_all(lane, layer, il);
    if (!plan->n_absorbed && !plan->n_joined) return;
    ds_barrier(lane->worker);
    finish_all(lane, layer);
}
