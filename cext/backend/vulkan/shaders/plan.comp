// plan.comp: a step's slots grouped by expert (arch/plan.c), one workgroup.
#version 460
#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
#include "experts.glsl"

layout(local_size_x = 128) in;
layout(push_constant, scalar) uniform Push {
    Uints ids;       // (n_slots)
    Experts experts; // (n_expert)
    Groups groups;   // (3, n_expert)
    Uints slot_row, slot_of; // (n_slots)
    uint n_expert, n_slots, n_used;
} p;

const uint THREADS = 128, MOST = 1024;
shared uint count[MOST], first[MOST];

void main() {
    const uint me = gl_LocalInvocationIndex;
    for (uint e = me; e < p.n_expert; e += THREADS) count[e] = 0;
    barrier();
    for (uint i = me; i < p.n_slots; i += THREADS) atomicAdd(count[p.ids.at[i]], 1);
    barrier();
    for (uint e = 0, at = 0; me == 0 && e < p.n_expert; e++) {
        first[e] = at;
        at += count[e];
    }
    barrier();
    for (uint e = me; e < p.n_expert; e += THREADS) {
        const Expert x = p.experts.at[e];
        p.groups.at[e] = Group(x.gate, first[e], count[e]);
        p.groups.at[p.n_expert + e] = Group(x.up, first[e], count[e]);
        p.groups.at[2 * p.n_expert + e] = Group(x.down, first[e], count[e]);
    }
    barrier();
    for (uint i = me; i < p.n_slots; i += THREADS) { // an expert's tokens in any order: each of its rows is for itself
        const uint slot = atomicAdd(first[p.ids.at[i]], 1);
        p.slot_row.at[slot] = i / p.n_used;
        p.slot_of.at[i] = slot;
    }
}
