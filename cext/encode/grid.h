/* grid.h: what each format can say about a block of columns, and how it is written down: the inverse of quant/codes.h. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "encode/encode.h"

enum { DS_MAX_SUBS = DS_ENCODE_WIDTH / 16 };

/* Codes that stand for several values at once. */
typedef struct ds_points {
    int width; /* values of a point: 8 or 4 */
    int n; /* points: a multiple of 16 */
    bool even_signs; /* of each 8 values an even number is negative */
    float most; /* the largest value */
    const float *values; /* (width, n) > 0 */
} ds_points;

/* w = scale * v - min, v a value of the grid, scale and min shared by `sub` columns. */
typedef struct ds_grid {
    int sub; /* 16 or 32 */
    int q_min, q_max; /* codes */
    const int8_t *values; /* code -> v, ascending; NULL where v is the code */
    bool has_min;
    bool nested; /* scales and mins are integers times two halves of the block; else each is a half */
    int sc_min, sc_max; /* nested: the integer scales */
    int m_max; /* nested: the integer mins go from 0 */
    const ds_points *points; /* instead of codes one by one; nested, with odd integer scales */
    int unit; /* points: the block's half is d times this */
} ds_grid;

/* A choice for one block of columns. */
typedef struct ds_choice {
    float d, dmin; /* nested: as halves round them */
    int sc[DS_MAX_SUBS]; /* nested: integers */
    int m[DS_MAX_SUBS];
    float scale[DS_MAX_SUBS]; /* d * sc, or a half */
    float min[DS_MAX_SUBS];
    int8_t q[DS_ENCODE_WIDTH]; /* codes; of points the values */
    uint16_t point[DS_ENCODE_WIDTH / 4];
} ds_choice;

/* NULL where the format has no codes. */
const ds_grid *ds_grid_of(ds_format format);

/* Write n columns (a multiple of the format's block) of a choice as blocks. */
void ds_pack(ds_format format, int n, const ds_choice *choice, void *blocks);
