/* router.c: a token's experts and their weights, by the rules of V2 and of V3. */
#include <float.h>
#include <math.h>

#include "backend/cpu/step.h"

/* A group's score: V2 takes its best expert (modeling_deepseek.py, group_limited_greedy), V3 its best two (noaux_tc). */
static float group_score(ds_gating gating, const float *score, int n) {
    float first = -INFINITY, second = -INFINITY;
    for (int i = 0; i < n; i++) {
        if (score[i] > first) second = first, first = score[i];
        else if (score[i] > second) second = score[i];
    }
    return gating == DS_GATING_SIGMOID && n > 1 ? first + second : first;
}

/* The index of the largest of n values, the first of equals; it is struck out. */
static int take_best(float *score, int n) {
    int best = 0;
    for (int i = 1; i < n; i++) best = score[i] > score[best] ? i : best;
    score[best] = -INFINITY;
    return best;
}

/* Leave only the experts of the n_group_used best groups selectable. */
static void limit_to_groups(const ds_config *c, float *score /* (n_expert) */, float *groups /* (n_group) */) {
    int size = c->n_expert / c->n_group;
    for (int g = 0; g < c->n_group; g++) groups[g] = group_score(c->gating, score + g * size, size);
    for (int i = 0; i < c->n_group_used; i++) take_best(groups, c->n_group);
    for (int g = 0; g < c->n_group; g++) { /* taken groups are struck out: the others are not chosen from */
        for (int e = g * size; groups[g] != -INFINITY && e < (g + 1) * size; e++) score[e] = -INFINITY;
    }
}

void ds_route(const ds_config *c, const ds_kernels *kern, const float *bias, float *logits, float *select,
              float *groups, int32_t *ids, float *weights) {
    float sum = 0;
    if (c->gating == DS_GATING_SOFTMAX) kern->softmax(c->n_expert, logits);
    else
        for (int e = 0; e < c->n_expert; e++) logits[e] = 1.0f / (1.0f + expf(-logits[e]));
    for (int e = 0; e < c->n_expert; e++) {
        float s = logits[e] + (bias ? bias[e] : 0.0f);
        select[e] = s == s ? s : -FLT_MAX; /* a NaN must not decide an index */
    }
    if (c->n_group_used < c->n_group) limit_to_groups(c, select, groups);
    for (int k = 0; k < c->n_expert_used; k++) {
        ids[k] = take_best(select, c->n_expert);
        weights[k] = logits[ids[k]];
        sum += weights[k];
    }
    for (int k = 0; k < c->n_expert_used; k++)
        weights[k] = (c->expert_norm ? weights[k] / (sum + 1e-20f) : weights[k]) * c->expert_scale;
}
