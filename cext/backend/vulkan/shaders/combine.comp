// combine.comp: x += shared + the experts' weighted rows, in the order of choice.
#version 460
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_control_flow_attributes : require
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

const uint OTHER = 0x80000000u, TOGETHER = 8;

void main() {
    const uint t = gl_WorkGroupID.y, i = gl_GlobalInvocationID.x;
    if (i >= p.n) return;
    float x = p.x.at[t * p.n + i];
    if (p.y != 0) x += Floats(p.y).at[t * p.n + i];
    for (uint from = 0; from < p.n_used; from += TOGETHER) { // two rounds to memory, whatever their number
        float row[TOGETHER], w[TOGETHER];
        [[unroll]] for (uint k = 0; k < TOGETHER; k++) {
            const uint at = t * p.n_used + min(from + k, p.n_used - 1), slot = p.slot_of.at[at];
            w[k] = p.weights.at[at];
            row[k] = Floats((slot & OTHER) != 0 ? uint64_t(p.others) : uint64_t(p.rows)).at[(slot & ~OTHER) * p.n + i];
        }
        [[unroll]] for (uint k = 0; k < TOGETHER; k++)
            if (from + k < p.n_used) x += w[k] * row[k];
    }
    p.x.at[t * p.n + i] = x;
}
