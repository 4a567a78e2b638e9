// latent_attend.comp: some heads of a token over a part of the positions that it sees: their maximum, sum and weighted
// latents, as the cache keeps those. KIND is the cache's.
//
//   score_h(j) = q_h . row_j,   acc_h = sum_j e^(score_h(j) - m_h) row_j[0, v)
#version 460
#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
#include "rows.glsl"
#include "attend.glsl"

layout(local_size_x = 128) in;
layout(constant_id = 0) const uint SHARE = 4; // values of a thread: v / 128, rounded up

const uint THREADS = 128, HEADS = 8, TILE = 64, CHUNK = 32;
shared float keys[TILE][CHUNK + 1];
shared float queries[HEADS][CHUNK];
shared float weights[HEADS][TILE]; // scores, then what values are weighted by
shared float scales[TILE], tail_scales[TILE];
shared float top[HEADS], sum[HEADS], shrink[HEADS];

// Value i of row j of a block, without its scale.
float value(uint64_t block, uint j, uint i) {
#if KIND == 0
    return Floats(block + p.l.data + j * p.l.row_bytes).at[i];
#elif KIND == 1
    return float(Shorts(block + p.l.data + j * p.l.row_bytes).at[i]);
#else
    if (i < p.head) return float(Bytes(block + p.l.data + j * p.l.row_bytes).at[i]);
    return float(Shorts(block + p.l.tail + j * p.l.tail_bytes).at[i - p.head]);
#endif
}

void main() {
    const uint part = gl_WorkGroupID.x, h0 = gl_WorkGroupID.y * HEADS, t = gl_WorkGroupID.z;
    const uint me = gl_LocalInvocationIndex, n_heads = min(HEADS, p.n_head - h0), n_pos = p.tokens.at[t].pos + 1;
    const uint tiles = (n_pos + TILE - 1) / TILE, each = (tiles + p.n_parts - 1) / p.n_parts;
    const uint end = min(tiles, (part + 1) * each), j = me % TILE, mine = me / TILE * (HEADS / 2);
    float acc[HEADS][SHARE];
    for (uint h = 0; h < HEADS; h++)
        for (uint s = 0; s < SHARE; s++) acc[h][s] = 0.0;
    if (me < HEADS) top[me] = -1.0 / 0.0, sum[me] = 0.0;
    for (uint tile = part * each; tile < end; tile++) {
        const uint64_t block = Longs(p.tokens.at[t].blocks).at[tile] + p.at;
        const uint seen = min(TILE, n_pos - tile * TILE);
        float score[HEADS / 2], tail[HEADS / 2];
        for (uint h = 0; h < HEADS / 2; h++) score[h] = tail[h] = 0.0;
        barrier();
        if (me < TILE) {
#if KIND == 0
            scales[me] = tail_scales[me] = 1.0;
#else
            scales[me] = me < seen ? Floats(block + p.l.scale).at[me] : 0.0;
            tail_scales[me] = scales[me];
#endif
#if KIND == 2
            tail_scales[me] = me < seen ? Floats(block + p.l.tail_scale).at[me] : 0.0;
#endif
        }
        for (uint from = 0; from < p.width; from += CHUNK) {
            barrier();
            for (uint i = me; i < TILE * CHUNK; i += THREADS) {
                const uint r = i / CHUNK, c = i % CHUNK;
                keys[r][c] = r < seen && from + c < p.width ? value(block, r, from + c) : 0.0;
            }
            for (uint i = me; i < HEADS * CHUNK; i += THREADS) {
                const uint h = i / CHUNK, c = i % CHUNK;
                queries[h][c] =
                    h < n_heads && from + c < p.width ? Floats(p.queries).at[(t * p.n_head + h0 + h) * p.width + from + c] : 0.0;
            }
            barrier();
            for (uint h = 0; h < HEADS / 2; h++) {
                float dot = 0.0;
                for (uint c = 0; c < CHUNK; c++) dot += queries[mine + h][c] * keys[j][c];
                if (from < p.head) score[h] += dot; // a head is whole chunks where it has a scale of its own
                else tail[h] += dot;
            }
        }
        for (uint h = 0; h < HEADS / 2; h++)
            weights[mine + h][j] = j < seen ? score[h] * scales[j] + tail[h] * tail_scales[j] : -1.0 / 0.0;
        barrier();
        if (me < HEADS) {
            float most = top[me];
            for (uint i = 0; i < seen; i++) most = max(most, weights[me][i]);
            shrink[me] = exp(top[me] - most);
            top[me] = most;
        }
        barrier();
        for (uint i = me; i < HEADS * TILE; i += THREADS) {
            const uint h = i / TILE, c = i % TILE;
            weights[h][c] = c < seen ? exp(weights[h][c] - top[h]) : 0.0;
        }
        barrier();
        if (me < HEADS) {
            float total = sum[me] * shrink[me];
            for (uint i = 0; i < seen; i++) total += weights[me][i];
            sum[me] = total;
        }
        barrier();
        for (uint i = me; i < HEADS * TILE; i += THREADS) weights[i / TILE][i % TILE] *= scales[i % TILE];
        barrier();
        for (uint s = 0; s < SHARE; s++) {
            const uint d = me + s * THREADS;
            if (d >= p.v) continue;
            for (uint h = 0; h < HEADS; h++) acc[h][s] *= shrink[h];
            for (uint i = 0; i < seen; i++) {
                const float v = value(block, i, d);
                for (uint h = 0; h < HEADS; h++) acc[h][s] += weights[h][i] * v;
            }
        }
    }
    barrier();
    for (uint h = 0; h < n_heads; h++) {
        const uint to = ((t * p.n_head + h0 + h) * p.n_parts + part) * (p.v + 2);
        for (uint s = 0; s < SHARE; s++)
            if (me + s * THREADS < p.v) p.to.at[to + me + s * THREADS] = acc[h][s];
        if (me == 0) p.to.at[to + p.v] = top[h], p.to.at[to + p.v + 1] = sum[h];
    }
}
