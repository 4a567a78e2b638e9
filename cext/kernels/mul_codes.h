/* mul_codes.h: products with any coded format, through its plain decoder: the reference for the fast paths. */
#pragma once

/* sum over 16 values of q * x */
DS_INLINE int32_t dot16(const int8_t *q, const int8_t *x) {
    int32_t sum = 0;
    for (int i = 0; i < 16; i++) sum += q[i] * x[i];
    return sum;
}

/* One block against n values of one token from value i on: per 16, scales times the integer product, less min's part. */
DS_INLINE float dot_codes(const ds_codes *c, int n, const act_rows *a, int t, int i) {
    const int8_t *q = a->q + (size_t)t * a->n_groups * ACT_GROUP + i;
    const act_meta *meta = a->meta + (size_t)t * a->n_groups + i / ACT_GROUP;
    float y = 0.0f;
    for (int g = 0; g < n / 16; g++) {
        const int sub = i % ACT_GROUP / 16 + g;
        y += meta->scale[sub / 2] * c->scale[g] * (float)dot16(c->q + 16 * g, q + 16 * g) -
             c->min[g] * meta->sum_16[sub];
    }
    return y;
}

typedef void (*decode_fn)(const void *block, ds_codes *codes);

DS_INLINE void mul_codes(const ds_mul *job, int block_elements, size_t block_bytes, decode_fn decode) {
    const act_rows a = act_rows_at(job->act, job->n_tok, job->k);
    for (int r = job->row_begin; r < job->row_end; r++) {
        const char *block = (const char *)job->w + (size_t)r * job->row_bytes;
        for (int t = 0; t < job->n_tok; t++) job->y[(size_t)t * job->ldy + (size_t)r] = 0.0f;
        for (int i = 0; i < job->k; i += block_elements, block += block_bytes) {
            ds_codes codes;
            decode(block, &codes);
            for (int t = 0; t < job->n_tok; t++)
                job->y[(size_t)t * job->ldy + (size_t)r] += dot_codes(&codes, block_elements, &a, t, i);
        }
    }
}

#define MUL_CODES(id)                                                                               \
    DS_INLINE void decode_##id(const void *block, ds_codes *codes) { ds_codes_##id(block, codes); } \
    void DS_OF(mul_##id)(const ds_mul *job) {                                                       \
        mul_codes(job, (int)(DS_ELEMENTS_##id), sizeof(ds_block_##id), decode_##id);                \
    }
DS_CODED_FORMATS(MUL_CODES)
