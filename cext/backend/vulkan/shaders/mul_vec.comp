#version 460
/* mul_vec.comp: y = x W^T for few slots a block. LANES threads share a row, each an item of it in turn: a unit, of floats
 * four values, so that they read it in order; a workgroup takes as many rows as it has such threads, ROWS times, and goes on
 * to those that its grid leaves. x lies in shared memory, CHUNK values of it at a time, and is read there once for
 * SLOTS slots and all rows. What a thread has of weights is asked for before x is. No loop is unrolled that need not be, and
 * nothing is written twice: a step's shaders are to lie in the cache for instructions together (NOTES.md). Names as in
 * product.glsl; grid (rows, SLOTS, blocks). With GATED, y = silu(x W^T) * (x Up^T); with DOT, x is packed (pack_q8.comp), and
 * read where it is; with NORMED, x is normalised on the way (norm.comp): times the norm's weights where it is kept, the sums
 * over its root mean square where they are stored; with JOINED, x is the parts of a head's positions, joined on the way
 * (latent_join.comp). */
#extension GL_GOOGLE_include_directive : require
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_arithmetic : require
#include "product.glsl"
#define EXACT
#include "unpack.glsl"
#include "rows.glsl"

layout(local_size_x_id = 0) in;
layout(constant_id = 1) const uint ROWS = 1; /* of a thread; no more than LANES */
layout(constant_id = 2) const uint SLOTS = 1;
layout(constant_id = 3) const uint CHUNK = 2048; /* a multiple of 256, and of LANES items */
layout(constant_id = 4) const bool ALIGNED = false; /* x, norm and floats of W lie at multiples of 16 bytes, and k is one of 4 */
layout(constant_id = 5) const uint JOINED = 0; /* of one slot, 1 + the kind of the cache's rows: usual parts, no more than threads */

#if defined(GATED)
const uint N_MATRICES = 2;
#else
const uint N_MATRICES = 1;
#endif
const uint N_ROWS = N_MATRICES * ROWS;
const uint THREADS = gl_WorkGroupSize.x;
/* Not constants, so that one pipeline serves all shapes. */
#define LANES (1u << p.flags / FLAG_LANES) /* a power of two that the workgroup's threads are a multiple of */
#define PASS (THREADS / LANES * ROWS) /* rows of a workgroup at a time */
#define NORMED (p.norm != 0) /* of one slot */

/* gl_SubgroupSize is what a device may have, and of some more than it has. */
uint lanes, me, lane;

shared float partial[N_MATRICES * THREADS * ROWS];

#include "items.glsl"

/* ---- x ---- */

#if defined(DOT)
void keep_inputs(uint from, bool first) {}
#else

shared float squares_of[THREADS]; /* of a subgroup; of joined parts what else it has */
float squares = 0.0; /* of a thread's values */

void keep4(uint s, uint from, uint v, bool first, vec4 x, vec4 w) {
    if (NORMED && first) squares += dot(x, x);
    kept[input_at(s, v)] = NORMED ? x * w : x;
}

float kept_value(uint i) { return kept[input_at(0, i / 4)][i % 4]; }
void keep_value(uint i, float x) { kept[input_at(0, i / 4)][i % 4] = x; }

/* As rotate.glsl has it. */
void rotate_kept(uint n) {
    const uint block = n & (~n + 1);
    for (uint half_way = 1; half_way < block; half_way *= 2) {
        for (uint i = me; i < n / 2; i += THREADS) {
            const uint a = i / half_way * 2 * half_way + i % half_way, b = a + half_way;
            const float u = kept_value(a), v = kept_value(b);
            keep_value(a, u + v);
            keep_value(b, u - v);
        }
        barrier();
    }
}

/* Where value i is among a part's sums: as the cache keeps rows. */
uint joined_at(uint i) { return JOINED == 1 + ROWS_F32 ? i : JOINED == 1 + ROWS_I16 ? place16(i) : place8(i); }

/* What `of_subgroup` sums up to or is at most, over all subgroups. */
float over_all(float of_subgroup, bool sum) {
    barrier();
    if (subgroupElect()) squares_of[gl_SubgroupID] = of_subgroup;
    barrier();
    float all = squares_of[0];
    for (uint i = 1; i < gl_NumSubgroups; i++) all = sum ? all + squares_of[i] : max(all, squares_of[i]);
    return all;
}

void keep_joined() {
    const uint n_parts = p.usual, each = p.stride_x / n_parts, v = each - 2; /* a part: v sums, its maximum, its weight */
    Floats parts = Floats(x_at[0]);
    const bool mine = me < n_parts;
    const float most = mine ? parts.v[me * each + v] : -1.0 / 0.0, weight = mine ? parts.v[me * each + v + 1] : 0.0;
    const float top = over_all(subgroupMax(most), false), share = mine ? exp(most - top) : 0.0;
    if (mine) partial[me] = share;
    float total = over_all(subgroupAdd(weight * share), true);
    if (JOINED == 1 + ROWS_Q8) total *= sqrt(float(p.k & (~p.k + 1)));
    for (uint i = me; i < p.k; i += 2 * THREADS) {
        const uvec2 own = uvec2(i, min(i + THREADS, p.k - 1));
        vec2 value = vec2(0.0);
        for (uint from = 0; from < n_parts; from += 8) {
            vec2 part[8];
            [[unroll]] for (uint j = 0; j < 8; j++) {
                const uint begin = min(from + j, n_parts - 1) * each;
                part[j] = vec2(parts.v[begin + joined_at(own.x)], parts.v[begin + joined_at(own.y)]);
            }
            [[unroll]] for (uint j = 0; j < 8; j++)
                if (from + j < n_parts) value += partial[from + j] * part[j];
        }
        keep_value(own.x, value.x / total);
        if (i + THREADS < p.k) keep_value(own.y, value.y / total);
    }
    barrier();
    if (JOINED == 1 + ROWS_Q8) rotate_kept(p.k);
}

/* Values [from, from + CHUNK) of the slots. */
void keep_inputs(uint from, bool first) {
    const uint n = (min(p.k - from, CHUNK) + 3) / 4;
    barrier(); /* the ones before were read */
    if (JOINED != 0) {
        keep_joined();
        return;
    }
    [[unroll]] for (uint s = 0; s < SLOTS; s++)
        for (uint v = me; v < n; v += 2 * THREADS) {
            const uint next = min(v + THREADS, n - 1);
            const vec4 a = values4(x_at[s], from + 4 * v), b = values4(x_at[s], from + 4 * next);
            vec4 wa = vec4(1.0), wb = vec4(1.0);
            if (NORMED) wa = values4(p.norm, from + 4 * v), wb = values4(p.norm, from + 4 * next);
            keep4(s, from, v, first, a, wa);
            if (v + THREADS < n) keep4(s, from, next, first, b, wb);
        }
    barrier();
}

#endif

/* ---- Rows ---- */

/* A thread's rows, and its sums by slots. */
uint64_t w_at[N_ROWS];
float sums[SLOTS * N_ROWS];

/* Sums of slot s from the threads that share a row, and into y, where `old` is what was there. */
void store_rows(Block b, uint row, uint slot, uint s, float old) {
    const bool whole = LANES % lanes == 0; /* subgroups to a row */
    const uint pieces = whole ? LANES / lanes : LANES, piece = whole ? lane / lanes : lane;
    barrier();
    [[unroll]] for (uint r = 0; r < N_ROWS; r++) {
        const float sum = whole ? subgroupAdd(sums[s * N_ROWS + r]) : sums[s * N_ROWS + r];
        if (whole && !subgroupElect()) continue;
        partial[r / ROWS * THREADS * ROWS + piece * PASS + me / LANES * ROWS + r % ROWS] = sum;
    }
    barrier();
    if (me >= PASS || row + me >= p.rows || slot >= b.first + b.count) return;
    float sum[N_MATRICES];
    [[unroll]] for (uint m = 0; m < N_MATRICES; m++) {
        sum[m] = 0.0;
        for (uint i = 0; i < pieces; i++) sum[m] += partial[m * THREADS * ROWS + i * PASS + me];
    }
#if !defined(DOT)
    if (NORMED) {
        float all = 0.0;
        for (uint i = 0; i < gl_NumSubgroups; i++) all += squares_of[i];
        const float scale = 1.0 / sqrt(all / float(p.k) + p.eps);
        [[unroll]] for (uint m = 0; m < N_MATRICES; m++) sum[m] *= scale;
    }
#endif
#if defined(GATED)
    const float value = silu(sum[0]) * sum[1];
#else
    const float value = (p.flags & FLAG_GATE) != 0 ? sum[0] * silu(old) : sum[0];
#endif
    Results(b.y + 4 * (uint64_t(slot) * p.ldy + row + me)).v[0] = (p.flags & FLAG_ADD) != 0 ? value + old : value;
}

/* Rows [row, row + PASS) of the block by slots [slot, slot + SLOTS). Beyond the last, the last is taken again. */
void rows_by_slots(Block b, uint row, uint slot, bool first) {
    const uint n_items = (p.k + ITEM - 1) / ITEM, last_row = p.rows - 1, last_slot = b.first + b.count - 1;
    float old[SLOTS];
    [[unroll]] for (uint i = 0; i < SLOTS * N_ROWS; i++) sums[i] = 0.0;
    [[unroll]] for (uint s = 0; s < SLOTS; s++) {
        old[s] = 0.0;
        if ((p.flags & (FLAG_ADD | FLAG_GATE)) != 0 && me < PASS)
            old[s] = Results(b.y + 4 * (uint64_t(min(slot + s, last_slot)) * p.ldy + min(row + me, last_row))).v[0];
    }
    [[unroll]] for (uint r = 0; r < ROWS; r++) {
        const uint own = min(row + me / LANES * ROWS + r, last_row);
        w_at[r] = weight_row(b.w, own);
#if defined(GATED)
        w_at[ROWS + r] = weight_row(b.up, own);
#endif
    }
    for (uint from = 0; from < n_items; from += CHUNK / ITEM) {
        const uint end = min(from + CHUNK / ITEM, n_items);
        bool there = !first && p.k <= CHUNK; /* x, from the rows before */
        [[dont_unroll]] for (uint begin = from; begin < end; begin += LANES) { /* the same for all threads: barriers */
            const uint i = begin + lane, at = min(i, end - 1);
            Item items[N_ROWS];
            [[unroll]] for (uint r = 0; r < N_ROWS; r++) items[r] = item_of(w_at[r], at);
            if (!there) keep_inputs(from * ITEM, first);
            there = true;
            [[unroll]] for (uint r = 0; r < N_ROWS; r++)
                [[unroll]] for (uint s = 0; s < SLOTS; s++) {
                    const float product = times(items[r], s, at, from * ITEM);
                    sums[s * N_ROWS + r] += i < end ? product : 0.0;
                }
        }
    }
#if !defined(DOT)
    if (NORMED && first) {
        squares = subgroupAdd(squares);
        if (subgroupElect()) squares_of[gl_SubgroupID] = squares;
    }
#endif
    [[unroll]] for (uint s = 0; s < SLOTS; s++) store_rows(b, row, slot + s, s, old[s]);
}

void main() {
    const Block b = block_of(gl_WorkGroupID.z);
    const uint slot = b.first + gl_WorkGroupID.y * SLOTS;
    if (gl_WorkGroupID.y * SLOTS >= b.count) return;
    lanes = subgroupMax(gl_SubgroupInvocationID) + 1;
    me = gl_SubgroupID * lanes + gl_SubgroupInvocationID;
    lane = me % LANES;
    unpack_begin();
    [[unroll]] for (uint s = 0; s < SLOTS; s++) {
        const uint own = min(slot + s, b.first + b.count - 1);
#if defined(DOT)
        x_at[s] = input_row(b, own);
#else
        x_at[s] = slot_input(b, own);
#endif
    }
    for (uint row = gl_WorkGroupID.x * PASS; row < p.rows; row += gl_NumWorkGroups.x * PASS)
        rows_by_slots(b, row, slot, row == gl_WorkGroupID.x * PASS);
}
