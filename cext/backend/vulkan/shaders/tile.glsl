/* tile.glsl: a unit (32 values) of TILE_ROWS rows and of TILE_SLOTS slots in shared memory, and the products of them
 * that one of 128 threads sums: SUM_ROWS rows by SUM_SLOTS slots. Behind factors.glsl. */

const uint TILE_ROWS = 64, TILE_SLOTS = 64; /* TILE in product.c */
const uint SUM_ROWS = 8, SUM_SLOTS = 4;
const uint LANE_SLOTS = TILE_SLOTS / SUM_SLOTS; /* threads beside each other */

#if defined(DOT)

/* By half, then row or slot. Slots of a thread are LANE_SLOTS apart, so that neighbours read neighbouring banks. */
shared uvec4 w_codes[2][TILE_ROWS], x_codes[2][TILE_SLOTS];
shared vec2 w_scale[2][TILE_ROWS], x_scale[2][TILE_SLOTS]; /* and low; and sum */

void tile_put_weights(uint h, uint i, Weights w) {
    w_codes[h][i] = w.q;
    w_scale[h][i] = vec2(w.scale, w.low);
}

void tile_put_inputs(uint h, uint i, Inputs x) {
    x_codes[h][i] = x.q;
#if HAS_LOW
    x_scale[h][i] = vec2(x.scale, x.sum);
#else
    x_scale[h][i] = vec2(x.scale, 0.0);
#endif
}

uint tile_slot(uint lane, uint s) { return lane + LANE_SLOTS * s; }

void tile_sum(uint lane_rows, uint lane_slots, inout vec4 sum[SUM_ROWS]) {
    [[unroll]] for (uint h = 0; h < 2; h++) {
        uvec4 x[SUM_SLOTS];
        vec2 scale[SUM_SLOTS];
        [[unroll]] for (uint s = 0; s < SUM_SLOTS; s++) {
            x[s] = x_codes[h][tile_slot(lane_slots, s)];
            scale[s] = x_scale[h][tile_slot(lane_slots, s)];
        }
        [[unroll]] for (uint r = 0; r < SUM_ROWS; r++) {
            const uvec4 w = w_codes[h][SUM_ROWS * lane_rows + r];
            const vec2 by = w_scale[h][SUM_ROWS * lane_rows + r];
            [[unroll]] for (uint s = 0; s < SUM_SLOTS; s++) {
                sum[r][s] += scale[s].x * by.x * float(dot_bytes(w, x[s]));
#if HAS_LOW
                sum[r][s] -= by.y * scale[s].y;
#endif
            }
        }
    }
}

#else

/* By value, then row or slot, and a vector more each: neighbours write, and read, neighbouring banks. */
shared vec4 w_tile[32][TILE_ROWS / 4 + 1], x_tile[32][TILE_SLOTS / 4 + 1];

void tile_put_weights(uint h, uint i, Weights w) {
    [[unroll]] for (uint j = 0; j < 16; j++) w_tile[16 * h + j][i / 4][i % 4] = w.v[j / 4][j % 4];
}

void tile_put_inputs(uint h, uint i, Inputs x) {
    [[unroll]] for (uint j = 0; j < 16; j++) x_tile[16 * h + j][i / 4][i % 4] = x.v[j / 4][j % 4];
}

uint tile_slot(uint lane, uint s) { return SUM_SLOTS * lane + s; }

void tile_sum(uint lane_rows, uint lane_slots, inout vec4 sum[SUM_ROWS]) {
    for (uint k = 0; k < 32; k++) {
        const vec4 a = w_tile[k][2 * lane_rows], b = w_tile[k][2 * lane_rows + 1], x = x_tile[k][lane_slots];
        [[unroll]] for (uint r = 0; r < 4; r++) {
            sum[r] += a[r] * x;
            sum[4 + r] += b[r] * x;
        }
    }
}

#endif
