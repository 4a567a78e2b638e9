/* forecast.c: which experts the next layer will choose, guessed by its router from what this layer's router has seen: the
 * residual stream changes little from layer to layer. It is told to the residency, which may read ahead. */
#include <string.h>

#include "backend/cpu/lane.h"

/* Add a token's chances of each expert to `chance` (n_expert). */
static void guess(const ds_lane *lane, const ds_layer *next, const float *x, float *chance) {
    const ds_step *s = lane->step;
    const ds_config *c = s->config;
    const ds_forecast_room *room = &lane->own->forecast;
    const ds_lane_scratch *own = lane->own;
    const ds_act_kind kind = ds_format_get(next->router.format)->act;
    s->kern->rms_norm(c->n_embd, x, next->ffn_norm, c->rms_eps, room->xn);
    s->kern->act_pack(kind, 0, 1, 1, c->n_embd, room->xn, (size_t)c->n_embd, NULL, room->act.pack[kind]);
    const ds_job job =
        ds_cpu_job(&next->router, next->router.data, room->act.pack[kind], 1, own->logits, (size_t)c->n_expert);
    s->kern->mul[job.format](&job.mul);
    ds_route(c, s->kern, next->router_bias, own->logits, own->select, own->groups, room->ids, room->weights);
    for (int k = 0; k < c->n_expert_used; k++) chance[room->ids[k]] += room->weights[k];
}

/* The likeliest first. */
static int in_order(int n_expert, float *chance, int *experts) {
    int n = 0;
    for (;; n++) {
        int best = 0;
        for (int e = 1; e < n_expert; e++) best = chance[e] > chance[best] ? e : best;
        if (chance[best] <= 0) return n;
        chance[best] = 0;
        experts[n] = best;
    }
}

void ds_cpu_forecast(const ds_lane *lane, int il) {
    const ds_step *s = lane->step;
    const ds_forecast_room *room = &lane->own->forecast;
    const int next = il + 1, n_expert = s->config->n_expert;
    if (next >= s->weights->layer_end) return;
    if (s->n_tok > DS_DECODED_TOKENS) { /* among them they need nearly all, which are read in the file's order */
        for (int e = 0; e < n_expert; e++) room->experts[e] = e;
        ds_residency_forecast(s->residency, next, room->experts, n_expert);
        return;
    }
    memset(room->chance, 0, (size_t)n_expert * sizeof *room->chance);
    for (int t = 0; t < s->n_tok; t++)
        guess(lane, ds_weights_layer(s->weights, next), lane->x + (size_t)t * (size_t)s->config->n_embd, room->chance);
    ds_residency_forecast(s->residency, next, room->experts, in_order(n_expert, room->chance, room->experts));
}
