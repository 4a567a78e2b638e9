// latent_join.comp: the parts of a head's positions joined, in the order of values. A head of a token a workgroup.
#version 460
#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
#include "reduce.glsl"
#include "rows.glsl"

const uint MOST_PARTS = 512; // at most DS_GPU_ATTEND_GROUPS or DS_GPU_FEW_GROUPS come
layout(local_size_x = 128) in;
layout(constant_id = 0) const uint ROW = MAX_ROW; // values of a row: no more is shared, so that many groups fit a processor
layout(push_constant, scalar) uniform Push {
    Floats parts; // (n_tok, n_head, n_parts, v + 2): acc, m, l
    Floats to;    // (n_tok, n_head, rank)
    uint kind, rank, v, n_parts;
} p;

shared float row[ROW];
shared float weights[MOST_PARTS];
#include "rotate.glsl"

void main() {
    const uint at = gl_WorkGroupID.y * gl_NumWorkGroups.x + gl_WorkGroupID.x, first = gl_LocalInvocationIndex;
    const uint from = at * p.n_parts * (p.v + 2);
    float sum = p.parts.at[from + p.v + 1];
    if (p.n_parts == 1) {
        if (first == 0) weights[0] = 1.0;
    } else {
        float most = -1.0 / 0.0, own = 0.0;
        for (uint i = first; i < p.n_parts; i += THREADS) most = max(most, p.parts.at[from + i * (p.v + 2) + p.v]);
        const float top = group_max(most);
        for (uint i = first; i < p.n_parts; i += THREADS) {
            const uint part = from + i * (p.v + 2);
            weights[i] = exp(p.parts.at[part + p.v] - top);
            own += p.parts.at[part + p.v + 1] * weights[i];
        }
        sum = group_sum(own);
    }
    barrier();
    for (uint i = first; i < p.rank; i += THREADS) {
        const uint kept = p.kind == ROWS_F32 ? i : p.kind == ROWS_I16 ? place16(i) : place8(i);
        float value = 0.0;
        for (uint j = 0; j < p.n_parts; j++) {
            const float part = p.parts.at[from + j * (p.v + 2) + kept];
            if (weights[j] != 0.0) value += weights[j] * part;
        }
        row[i] = value / sum;
    }
    barrier();
    if (p.kind == ROWS_Q8) rotate_row(p.rank);
    for (uint i = first; i < p.rank; i += THREADS) p.to.at[at * p.rank + i] = row[i];
}
