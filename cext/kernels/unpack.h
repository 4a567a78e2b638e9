/* unpack.h: how each format fills a panel: DS_LANES weight rows by 256 values, turned so that a lane is a row.
 *
 * The packed bytes are transposed as they are, four to a dword, and split into codes afterwards: half the shuffles of
 * splitting first. A format plugs in as one function here. */
#pragma once

/* A panel in L1: 32 rows by 256 values. Dword [k / 4][row] holds four consecutive codes of a row. Codes are unsigned with
 * the format's offset still in, or signed plus DS_CODE_BIAS; or, where DS_PANEL_WIDE, signed ones of 16 bits: the first two
 * of the four of all rows, then the other two. */
typedef struct panel {
    union {
        DS_ALIGNED uint8_t q[ACT_GROUP / 4][DS_PANEL_ROWS][4];
#if DS_PANEL_WIDE
        DS_ALIGNED int16_t wide[ACT_GROUP / 4][2][DS_PANEL_ROWS][2];
#endif
    };
    DS_ALIGNED float scale[16][DS_PANEL_ROWS]; /* per 32 values of a row, or per 16 */
    DS_ALIGNED float min[16][DS_PANEL_ROWS];
} panel;

/* DS_LANES rows of a panel being filled, from column `lane0`. */
typedef struct unpacker {
    panel *p;
    int lane0;
    const uint8_t *rows[DS_LANES]; /* at the values of this panel */
    int n_blocks; /* of 32 values, for formats with such blocks: fewer than 8 at the end of a row */
} unpacker;

DS_INLINE void put_codes(const unpacker *u, int k4, vi codes) { vi_store(u->p->q[k4][u->lane0], codes); }
DS_INLINE void put_scale(const unpacker *u, int sub, vf scale) { vf_store(&u->p->scale[sub][u->lane0], scale); }
DS_INLINE void put_min(const unpacker *u, int sub, vf min) { vf_store(&u->p->min[sub][u->lane0], min); }

DS_INLINE vi low_nibbles(vi a) { return vi_and(a, vi_set(DS_BYTES(15))); }
DS_INLINE vi high_nibbles(vi a) { return low_nibbles(vi_shr(a, 4)); }
/* Bits at..at + 1 of every byte, moved to bits to..to + 1. */
DS_INLINE vi two_bits(vi a, int at, int to) {
    return vi_and(at < to ? vi_shl(a, to - at) : vi_shr(a, at - to), vi_set(DS_BYTES(3 << to)));
}
DS_INLINE vi one_bit(vi a, int at, int to) {
    return vi_and(at < to ? vi_shl(a, to - at) : vi_shr(a, at - to), vi_set(DS_BYTES(1 << to)));
}
/* Byte i of every dword as a float. */
DS_INLINE vf byte_to_float(vi a, int i) { return vi_to_float(vi_and(vi_shr(a, 8 * i), vi_set(255))); }
DS_INLINE vf signed_byte_to_float(vi a, int i) { return vi_to_float(vi_sar(vi_shl(a, 24 - 8 * i), 24)); }

/* Codes with a sign, DS_CODE_BIAS in them already. */
DS_INLINE void put_signed_codes(const unpacker *u, int k4, vi codes) {
#if DS_PANEL_WIDE
    vi_store(u->p->wide[k4][0][u->lane0], vi_widen_bytes(codes, false));
    vi_store(u->p->wide[k4][1][u->lane0], vi_widen_bytes(codes, true));
#else
    put_codes(u, k4, codes);
#endif
}

/* ---- Formats of 32 values ---- */

/* Four dwords of qs hold values 0..15 in their low halves and 16..31 in their high halves. */
DS_INLINE void unpack_4(const unpacker *u, size_t block_bytes, size_t qs_at, bool has_min) {
    for (int b = 0; b < u->n_blocks; b++) {
        vi head[4], qs[4];
        vi_columns4(u->rows, (size_t)b * block_bytes, head);
        vi_columns4(u->rows, (size_t)b * block_bytes + qs_at, qs);
        put_scale(u, b, vi_low_f16(head[0]));
        if (has_min) put_min(u, b, vf_sub(vf_set(0.0f), vi_low_f16(vi_shr(head[0], 16))));
        DS_UNROLL
        for (int i = 0; i < 4; i++) {
            put_codes(u, 8 * b + i, low_nibbles(qs[i]));
            put_codes(u, 8 * b + 4 + i, high_nibbles(qs[i]));
        }
    }
}

DS_INLINE void unpack_Q4_0(const unpacker *u) {
    unpack_4(u, sizeof(ds_block_Q4_0), offsetof(ds_block_Q4_0, qs), false);
}
DS_INLINE void unpack_Q4_1(const unpacker *u) { unpack_4(u, sizeof(ds_block_Q4_1), offsetof(ds_block_Q4_1, qs), true); }

DS_INLINE void unpack_5(const unpacker *u, size_t block_bytes, size_t qs_at, bool has_min) {
    for (int b = 0; b < u->n_blocks; b++) {
        vi head[4], qs[4];
        vi_columns4(u->rows, (size_t)b * block_bytes, head);
        vi_columns4(u->rows, (size_t)b * block_bytes + qs_at, qs);
        put_scale(u, b, vi_low_f16(head[0]));
        if (has_min) put_min(u, b, vf_sub(vf_set(0.0f), vi_low_f16(vi_shr(head[0], 16))));
        /* Q5_1's bits are a dword; Q5_0's lie across two, after a scale of two bytes. */
        const vi qh = has_min ? head[1] : vi_or(vi_shr(head[0], 16), vi_shl(head[1], 16));
        DS_UNROLL
        for (int i = 0; i < 4; i++) {
            put_codes(u, 8 * b + i, vi_fifth_bits(low_nibbles(qs[i]), qh, i));
            put_codes(u, 8 * b + 4 + i, vi_fifth_bits(high_nibbles(qs[i]), qh, 4 + i));
        }
    }
}

DS_INLINE void unpack_Q5_0(const unpacker *u) {
    unpack_5(u, sizeof(ds_block_Q5_0), offsetof(ds_block_Q5_0, qs), false);
}
DS_INLINE void unpack_Q5_1(const unpacker *u) { unpack_5(u, sizeof(ds_block_Q5_1), offsetof(ds_block_Q5_1, qs), true); }

DS_INLINE void unpack_Q8_0(const unpacker *u) {
    for (int b = 0; b < u->n_blocks; b++) {
        const size_t at = (size_t)b * sizeof(ds_block_Q8_0);
        vi head[4], qs[8];
        vi_columns4(u->rows, at, head);
        vi_columns4(u->rows, at + 2, qs);
        vi_columns4(u->rows, at + 18, qs + 4);
        put_scale(u, b, vi_low_f16(head[0]));
        DS_UNROLL
        for (int i = 0; i < 8; i++) put_signed_codes(u, 8 * b + i, vi_xor(qs[i], vi_set(DS_BYTES(DS_CODE_BIAS))));
    }
}

DS_INLINE void unpack_IQ4_NL(const unpacker *u) {
    for (int b = 0; b < u->n_blocks; b++) {
        const size_t at = (size_t)b * sizeof(ds_block_IQ4_NL);
        vi head[4], qs[4];
        vi_columns4(u->rows, at, head);
        vi_columns4(u->rows, at + 2, qs);
        put_scale(u, b, vi_low_f16(head[0]));
        DS_UNROLL
        for (int i = 0; i < 4; i++) {
            put_signed_codes(u, 8 * b + i, vi_lookup(iq4_codes, low_nibbles(qs[i])));
            put_signed_codes(u, 8 * b + 4 + i, vi_lookup(iq4_codes, high_nibbles(qs[i])));
        }
    }
}

/* ---- Formats of 256 values ---- */

/* The first 16 bytes of Q4_K and Q5_K: d, dmin, and the 6-bit scales and minimums of 8 sub-blocks. */
DS_INLINE void unpack_scales_k4(const unpacker *u) {
    vi head[4];
    vi_columns4(u->rows, 0, head);
    const vf d = vi_low_f16(head[0]), dmin = vi_low_f16(vi_shr(head[0], 16));
    const vi six = vi_set(DS_BYTES(63)), top = vi_set(DS_BYTES(48));
    const vi sc[2] = {vi_and(head[1], six), vi_or(low_nibbles(head[3]), vi_and(vi_shr(head[1], 2), top))};
    const vi m[2] = {vi_and(head[2], six), vi_or(high_nibbles(head[3]), vi_and(vi_shr(head[2], 2), top))};
    DS_UNROLL
    for (int j = 0; j < 8; j++) {
        put_scale(u, j, vf_mul(d, byte_to_float(sc[j / 4], j % 4)));
        put_min(u, j, vf_mul(dmin, byte_to_float(m[j / 4], j % 4)));
    }
}

DS_INLINE void unpack_Q4_K(const unpacker *u) {
    unpack_scales_k4(u);
    DS_UNROLL
    for (int i0 = 0; i0 < 32; i0 += DS_LANES) {
        vi qs[DS_LANES];
        vi_columns(u->rows, offsetof(ds_block_Q4_K, qs) + 4 * (size_t)i0, qs);
        DS_UNROLL
        for (int i = 0; i < DS_LANES; i++) {
            /* dword i of 32: sub-blocks 2 (i / 8) and the one after it */
            const int k4 = (i0 + i) / 8 * 16 + (i0 + i) % 8;
            put_codes(u, k4, low_nibbles(qs[i]));
            put_codes(u, k4 + 8, high_nibbles(qs[i]));
        }
    }
}

DS_INLINE void unpack_Q5_K(const unpacker *u) {
    unpack_scales_k4(u);
    vi qh[8];
    vi_columns4(u->rows, offsetof(ds_block_Q5_K, qh), qh);
    vi_columns4(u->rows, offsetof(ds_block_Q5_K, qh) + 16, qh + 4);
    DS_UNROLL
    for (int i0 = 0; i0 < 32; i0 += DS_LANES) {
        vi qs[DS_LANES];
        vi_columns(u->rows, offsetof(ds_block_Q5_K, qs) + 4 * (size_t)i0, qs);
        DS_UNROLL
        for (int i = 0; i < DS_LANES; i++) {
            const int pair = (i0 + i) / 8, column = (i0 + i) % 8, k4 = 16 * pair + column;
            put_codes(u, k4, vi_or(low_nibbles(qs[i]), one_bit(qh[column], 2 * pair, 4)));
            put_codes(u, k4 + 8, vi_or(high_nibbles(qs[i]), one_bit(qh[column], 2 * pair + 1, 4)));
        }
    }
}

/* 16 sub-scales, signed bytes in four dwords. */
DS_INLINE void put_sub_scales(const unpacker *u, const vi sc[4], vf d) {
    DS_UNROLL
    for (int j = 0; j < 16; j++) put_scale(u, j, vf_mul(d, signed_byte_to_float(sc[j / 4], j % 4)));
}

DS_INLINE void unpack_Q6_K(const unpacker *u) {
    vi sc[4], last[4];
    vi_columns4(u->rows, offsetof(ds_block_Q6_K, scales), sc);
    /* d is the block's last two bytes: read the 16 that end with it. */
    vi_columns4(u->rows, sizeof(ds_block_Q6_K) - 16, last);
    put_sub_scales(u, sc, vi_low_f16(vi_shr(last[3], 16)));
    DS_UNROLL
    for (int h = 0; h < 2; h++) {
        /* Eight dwords at a time: of ql's first and second half, and of qh. */
        DS_UNROLL
        for (int i0 = 0; i0 < 8; i0 += 4) {
            vi first[4], second[4], qh[4];
            const size_t at = 64 * (size_t)h + 4 * (size_t)i0;
            vi_columns4(u->rows, offsetof(ds_block_Q6_K, ql) + at, first);
            vi_columns4(u->rows, offsetof(ds_block_Q6_K, ql) + at + 32, second);
            vi_columns4(u->rows, offsetof(ds_block_Q6_K, qh) + 32 * (size_t)h + 4 * (size_t)i0, qh);
            DS_UNROLL
            for (int i = 0; i < 4; i++) {
                const int k4 = 32 * h + i0 + i;
                put_codes(u, k4, vi_or(low_nibbles(first[i]), two_bits(qh[i], 0, 4)));
                put_codes(u, k4 + 8, vi_or(low_nibbles(second[i]), two_bits(qh[i], 2, 4)));
                put_codes(u, k4 + 16, vi_or(high_nibbles(first[i]), two_bits(qh[i], 4, 4)));
                put_codes(u, k4 + 24, vi_or(high_nibbles(second[i]), two_bits(qh[i], 6, 4)));
            }
        }
    }
}

DS_INLINE void unpack_Q2_K(const unpacker *u) {
    vi scales[4], last[4], sc[4], m[4];
    vi_columns4(u->rows, offsetof(ds_block_Q2_K, scales), scales);
    vi_columns4(u->rows, sizeof(ds_block_Q2_K) - 16, last);
    DS_UNROLL
    for (int i = 0; i < 4; i++) sc[i] = low_nibbles(scales[i]), m[i] = high_nibbles(scales[i]);
    put_sub_scales(u, sc, vi_low_f16(last[3]));
    const vf dmin = vi_low_f16(vi_shr(last[3], 16));
    DS_UNROLL
    for (int j = 0; j < 16; j++) put_min(u, j, vf_mul(dmin, byte_to_float(m[j / 4], j % 4)));
    DS_UNROLL
    for (int i0 = 0; i0 < 16; i0 += 4) {
        vi qs[4];
        vi_columns4(u->rows, offsetof(ds_block_Q2_K, qs) + 4 * (size_t)i0, qs);
        DS_UNROLL
        for (int i = 0; i < 4; i++) {
            const int k4 = 32 * (i0 / 8) + i0 % 8 + i;
            DS_UNROLL
            for (int j = 0; j < 4; j++) put_codes(u, k4 + 8 * j, two_bits(qs[i], 2 * j, 0));
        }
    }
}

DS_INLINE void unpack_Q3_K(const unpacker *u) {
    vi tail[4], sc[4], hmask[8];
    vi_columns4(u->rows, sizeof(ds_block_Q3_K) - 16, tail); /* the last bytes of qs, 12 of scales, d */
    /* scales start 14 bytes before the end: two bytes into tail. */
    DS_UNROLL
    for (int i = 0; i < 3; i++) tail[i] = vi_or(vi_shr(tail[i], 16), vi_shl(tail[i + 1], 16));
    const vf d = vi_low_f16(vi_shr(tail[3], 16));
    sc[0] = vi_or(low_nibbles(tail[0]), two_bits(tail[2], 0, 4));
    sc[1] = vi_or(low_nibbles(tail[1]), two_bits(tail[2], 2, 4));
    sc[2] = vi_or(high_nibbles(tail[0]), two_bits(tail[2], 4, 4));
    sc[3] = vi_or(high_nibbles(tail[1]), two_bits(tail[2], 6, 4));
    DS_UNROLL
    for (int j = 0; j < 16; j++) put_scale(u, j, vf_mul(d, vf_sub(byte_to_float(sc[j / 4], j % 4), vf_set(32.0f))));
    vi_columns4(u->rows, offsetof(ds_block_Q3_K, hmask), hmask);
    vi_columns4(u->rows, offsetof(ds_block_Q3_K, hmask) + 16, hmask + 4);
    DS_UNROLL
    for (int i0 = 0; i0 < 16; i0 += 4) {
        vi qs[4];
        vi_columns4(u->rows, offsetof(ds_block_Q3_K, qs) + 4 * (size_t)i0, qs);
        DS_UNROLL
        for (int i = 0; i < 4; i++) {
            const int half = i0 / 8, column = i0 % 8 + i, k4 = 32 * half + column;
            DS_UNROLL
            for (int j = 0; j < 4; j++)
                put_codes(u, k4 + 8 * j, vi_or(two_bits(qs[i], 2 * j, 0), one_bit(hmask[column], 4 * half + j, 2)));
        }
    }
}

DS_INLINE void unpack_IQ4_XS(const unpacker *u) {
    vi head[4];
    vi_columns4(u->rows, 0, head); /* d and scales_h; scales_l */
    const vf d = vi_low_f16(head[0]);
    const vi low = head[1], high = vi_shr(head[0], 16);
    DS_UNROLL
    for (int j = 0; j < 8; j++) {
        const vi sc = vi_or(vi_and(vi_shr(low, 4 * j), vi_set(15)), vi_shl(vi_and(vi_shr(high, 2 * j), vi_set(3)), 4));
        put_scale(u, j, vf_mul(d, vf_sub(vi_to_float(sc), vf_set(32.0f))));
        vi qs[4];
        vi_columns4(u->rows, offsetof(ds_block_IQ4_XS, qs) + 16 * (size_t)j, qs);
        DS_UNROLL
        for (int i = 0; i < 4; i++) {
            put_signed_codes(u, 8 * j + i, vi_lookup(iq4_codes, low_nibbles(qs[i])));
            put_signed_codes(u, 8 * j + 4 + i, vi_lookup(iq4_codes, high_nibbles(qs[i])));
        }
    }
}

/* ---- Grid formats: decoded along rows, then turned ---- */

/* Codes plus 2^offset_log2 without a sign, for ISAs that use signed codes as they are (DS_CODE_BIAS of 0). */
DS_INLINE void unpack_rows(const unpacker *u, row_store_fn store, int n_scales, int offset_log2) {
    DS_ALIGNED uint8_t q[DS_LANES][ACT_GROUP];
    DS_ALIGNED float scale[DS_LANES][16];
    const uint8_t *rows[DS_LANES], *scales[DS_LANES];
    for (int r = 0; r < DS_LANES; r++) {
        store(u->rows[r], q[r], scale[r]);
        rows[r] = q[r];
        scales[r] = (const uint8_t *)scale[r];
    }
    const int step = n_scales == 8 ? DS_GRID_SCALE_STEP : 1;
    for (int i0 = 0; i0 < n_scales * step; i0 += DS_LANES) {
        vi turned[DS_LANES];
        vi_columns(scales, sizeof(float) * (size_t)i0, turned);
        DS_UNROLL
        for (int i = 0; i < DS_LANES; i += step) put_scale(u, (i0 + i) / step, vi_as_float(turned[i]));
    }
    const vi offset = vi_set(DS_CODE_BIAS ? 0 : DS_BYTES(1 << offset_log2));
    for (int i0 = 0; i0 < ACT_GROUP / 4; i0 += DS_LANES) {
        vi turned[DS_LANES];
        vi_columns(rows, 4 * (size_t)i0, turned);
        DS_UNROLL
        for (int i = 0; i < DS_LANES; i++) put_codes(u, grid_place(i0 + i), vi_add8(turned[i], offset));
    }
}

DS_INLINE void unpack_IQ2_XXS(const unpacker *u) { unpack_rows(u, row_store_IQ2_XXS, 8, 6); }
DS_INLINE void unpack_IQ2_XS(const unpacker *u) { unpack_rows(u, row_store_IQ2_XS, 16, 6); }
DS_INLINE void unpack_IQ2_S(const unpacker *u) { unpack_rows(u, row_store_IQ2_S, 16, 6); }
DS_INLINE void unpack_IQ3_XXS(const unpacker *u) { unpack_rows(u, row_store_IQ3_XXS, 8, 6); }
DS_INLINE void unpack_IQ3_S(const unpacker *u) { unpack_rows(u, row_store_IQ3_S, 8, 4); }
