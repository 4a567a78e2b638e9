// combine.comp: x += shared + the experts' weighted rows, in the order of choice.
#version 460
#extension GL_GOOGLE_include_directive : require
#include "common.glsl"

layout(local_size_x = 128) in;
layout(push_constant, scalar) uniform Push {
    Floats x;       // (n_tok, n)
    uint64_t y;     // 0, or float (n_tok, n)
    Floats rows;    // (n_slots, n)
    Floats others;  // (n_slots, n) of experts that another device computed
    Uints slot_of;  // (n_tok, n_used): the slot, with OTHER where its row is another's
    Floats weights; // (n_tok, n_used)
    uint n, n_used;
} p;

const uint OTHER = 0x80000000u;

void main() {
    const uint t = gl_WorkGroupID.y, i = gl_GlobalInvocationID.x;
    if (i >= p.n) return;
    float x = p.x.at[t * p.n + i];
    if (p.y != 0) x += Floats(p.y).at[t * p.n + i];
    for (uint k = 0; k < p.n_used; k++) {
        const uint slot = p.slot_of.at[t * p.n_used + k];
        const float w = p.weights.at[t * p.n_used + k];
        if ((slot & OTHER) != 0) x += w * p.others.at[(slot & ~OTHER) * p.n + i];
        else x += w * p.rows.at[slot * p.n + i];
    }
    p.x.at[t * p.n + i] = x;
}
