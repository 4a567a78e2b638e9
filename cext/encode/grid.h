/* grid.h: what each format can say about a block of columns, and how it is written down: the inverse of quant/codes.h. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "encode/encode.h"

enum { DS_MAX_SUBS = DS_ENCODE_WIDTH / 16 };

/* w = scale * v - min, v a value of the grid, scale and min shared by `sub` columns. */
typedef struct ds_grid {
    int sub;              /* 16 or 32 */
    int q_min, q_max;     /* codes */
    const int8_t *values; /* code -> v, ascending; NULL where v is the code */
    bool has_min;
    bool nested;          /* scales and mins are integers times two halves of the block; else each is a half */
    int sc_min, sc_max;   /* nested: the integer scales */
    int m_max;            /* nested: the integer mins go from 0 */
} ds_grid;

/* A choice for one block of columns. */
typedef struct ds_choice {
    float d, dmin;             /* nested: as halves round them */
    int sc[DS_MAX_SUBS];       /* nested: integers */
    int m[DS_MAX_SUBS];
    float scale[DS_MAX_SUBS];  /* d * sc, or a half */
    float min[DS_MAX_SUBS];
    int8_t q[DS_ENCODE_WIDTH]; /* codes */
} ds_choice;

/* NULL where the format has no codes. */
const ds_grid *ds_grid_of(ds_format format);

/* Write n columns (a multiple of the format's block) of a choice as blocks. */
void ds_pack(ds_format format, int n, const ds_choice *choice, void *blocks);
