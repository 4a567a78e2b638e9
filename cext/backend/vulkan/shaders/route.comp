// route.comp: a token's experts and their weights, by the rules of V2 and of V3 (backend/cpu/router.c). A token a workgroup.
// Where each slot is a block of its own (few tokens), what the experts' products are told as well.
#version 460
#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
#include "reduce.glsl"
#include "experts.glsl"

layout(local_size_x = 128) in;
layout(push_constant, scalar) uniform Push {
    Floats logits;    // (n_tok, n_expert)
    uint64_t bias;    // 0, or float (n_expert)
    Uints ids, copy;  // (n_tok, n_used), here and for the host
    Floats weights;   // (n_tok, n_used)
    uint64_t blocks;  // 0, or Expert[] of the layer: fill groups and slot_row, slots in order
    Groups groups;    // (3, n_slots)
    Uints slot_row, slot_of; // (n_slots)
    uint n_expert, n_used, n_group, n_group_used, flags;
    float scale;
} p;

const uint SIGMOID = 1, NORMALISE = 2, MOST = 1024;
shared float score[MOST], select[MOST], group_score[MOST];
shared uint best_at[THREADS];
shared float best[THREADS];

// The largest of select[0, n), the first of equals; NaN is never the largest. It is struck out.
uint take_best(uint n) {
    const uint me = gl_LocalInvocationIndex;
    float most = -1.0 / 0.0;
    uint at = n;
    barrier();
    for (uint i = me; i < n; i += THREADS)
        if (at == n || select[i] > most) most = select[i], at = i;
    const float of_subgroup = subgroupMax(most);
    const uint at_subgroup = subgroupMin(most == of_subgroup ? at : n);
    if (subgroupElect()) best[gl_SubgroupID] = of_subgroup, best_at[gl_SubgroupID] = at_subgroup;
    barrier();
    uint chosen = best_at[0];
    for (uint i = 1, taken = 0; i < gl_NumSubgroups; i++) {
        const uint j = best_at[i];
        if (j < n && (chosen == n || best[i] > best[taken] || (best[i] == best[taken] && j < chosen)))
            chosen = j, taken = i;
    }
    barrier();
    if (me == 0) select[chosen] = -1.0 / 0.0;
    barrier();
    return chosen;
}

// A group's score: V2 takes its best expert, V3 its best two.
float score_of(uint from, uint n) {
    float first = -1.0 / 0.0, second = -1.0 / 0.0;
    for (uint i = from; i < from + n; i++) {
        if (select[i] > first) second = first, first = select[i];
        else if (select[i] > second) second = select[i];
    }
    return (p.flags & SIGMOID) != 0 && n > 1 ? first + second : first;
}

void limit_to_groups() {
    const uint me = gl_LocalInvocationIndex, n = p.n_expert / p.n_group;
    for (uint g = me; g < p.n_group; g += THREADS) group_score[g] = score_of(g * n, n);
    barrier();
    for (uint i = 0; me == 0 && i < p.n_group_used; i++) {
        uint most = 0;
        for (uint g = 1; g < p.n_group; g++) most = group_score[g] > group_score[most] ? g : most;
        group_score[most] = -1.0 / 0.0;
    }
    barrier();
    for (uint e = me; e < p.n_expert; e += THREADS)
        if (group_score[e / n] != -1.0 / 0.0) select[e] = -1.0 / 0.0;
    barrier();
}

void main() {
    const uint t = gl_WorkGroupID.x, me = gl_LocalInvocationIndex;
    float most = -1.0 / 0.0, sum = 0.0;
    for (uint e = me; e < p.n_expert; e += THREADS) score[e] = p.logits.at[t * p.n_expert + e];
    if ((p.flags & SIGMOID) != 0) {
        for (uint e = me; e < p.n_expert; e += THREADS) score[e] = 1.0 / (1.0 + exp(-score[e]));
    } else {
        for (uint e = me; e < p.n_expert; e += THREADS) most = max(most, score[e]);
        most = group_max(most);
        for (uint e = me; e < p.n_expert; e += THREADS) sum += score[e] = exp(score[e] - most);
        sum = group_sum(sum);
        for (uint e = me; e < p.n_expert; e += THREADS) score[e] /= sum;
    }
    for (uint e = me; e < p.n_expert; e += THREADS) {
        const float s = score[e] + (p.bias == 0 ? 0.0 : Floats(p.bias).at[e]);
        select[e] = s == s ? s : -3.4e38;
    }
    barrier();
    if (p.n_group_used < p.n_group) limit_to_groups();
    float total = 0.0;
    for (uint k = 0; k < p.n_used; k++) {
        const uint e = take_best(p.n_expert), slot = t * p.n_used + k;
        total += score[e];
        if (me != 0) continue;
        p.ids.at[slot] = e;
        p.copy.at[slot] = e;
        if (p.blocks == 0) continue;
        const Expert x = Experts(p.blocks).at[e];
        const uint n_slots = gl_NumWorkGroups.x * p.n_used;
        p.groups.at[slot] = Group(x.gate, slot, 1);
        p.groups.at[n_slots + slot] = Group(x.up, slot, 1);
        p.groups.at[2 * n_slots + slot] = Group(x.down, slot, 1);
        p.slot_row.at[slot] = t;
        p.slot_of.at[slot] = slot;
    }
    if (me != 0) return;
    for (uint k = 0; k < p.n_used; k++) {
        const float w = score[p.ids.at[t * p.n_used + k]];
        p.weights.at[t * p.n_used + k] = ((p.flags & NORMALISE) != 0 ? w / (total + 1e-20) : w) * p.scale;
    }
}
