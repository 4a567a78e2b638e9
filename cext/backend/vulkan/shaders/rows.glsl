// rows.glsl: how the cache keeps rows (kernels/attention.h), and a step's tokens.
const uint ROWS_F32 = 0, ROWS_I16 = 1, ROWS_Q8 = 2;
const uint MAX_ROW = 4608; // values of a row, padded: what shared memory holds

// Where value i of a row is kept.
uint place16(uint i) { return i / 32 * 32 + i % 16 / 4 * 8 + i % 32 / 16 * 4 + i % 4; }
uint place8(uint i) { return i / 64 * 64 + i % 16 / 4 * 16 + i % 64 / 16 * 4 + i % 4; }
uint pad64(uint n) { return (n + 63) / 64 * 64; }

struct Token {
    uint64_t blocks; // uint64_t[]: the blocks of its sequence's cache
    uint pos;
    float scale; // of q . k
};
layout(buffer_reference, scalar, buffer_reference_align = 8) readonly buffer Tokens { Token at[]; };

// Of a layer's rows in a block, in bytes (ds_row_layout).
struct Layout {
    uint data, scale, tail, tail_scale, sum, row_bytes, tail_bytes;
};
