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
    uint64_t blocks;  // 0, or Expert[] of the layer: fill groups, slots in order
    Groups groups;    // (3, n_slots)
    uint n_expert, n_used, n_group, n_group_used, flags;
    float scale;
} p;

const uint SIGMOID = 1, NORMALISE = 2, MOST = 1024;
shared float score[MOST], select[MOST], group_score[MOST];
shared uint chosen[MOST]; // (n_used)

// How many experts are chosen before e: of larger values, of equal ones the first.
uint rank_of(uint e) {
    const float own = select[e];
    uint before = 0;
    for (uint i = 0; i < p.n_expert; i++) before += select[i] > own || (select[i] == own && i < e) ? 1 : 0;
    return before;
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
    for (uint e = me; e < p.n_expert; e += THREADS) {
        const uint k = rank_of(e);
        if (k < p.n_used) chosen[k] = e;
    }
    barrier();
    float total = 0.0;
    for (uint k = 0; k < p.n_used; k++) total += score[chosen[k]];
    const uint n_slots = gl_NumWorkGroups.x * p.n_used;
    for (uint k = me; k < p.n_used; k += THREADS) {
        const uint e = chosen[k], slot = t * p.n_used + k;
        const float w = score[e];
        p.ids.at[slot] = e;
        p.copy.at[slot] = e;
        p.weights.at[slot] = ((p.flags & NORMALISE) != 0 ? w / (total + 1e-20) : w) * p.scale;
        if (p.blocks == 0) continue;
        const Expert x = Experts(p.blocks).at[e];
        p.groups.at[slot] = Group(x.gate, slot, 1);
        p.groups.at[n_slots + slot] = Group(x.up, slot, 1);
        p.groups.at[2 * n_slots + slot] = Group(x.down, slot, 1);
    }
}
