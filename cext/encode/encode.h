/* encode.h: float rows -> quantised blocks under an input covariance H, so that the outputs x . w change least: each row's
 * e H e^T is lowered, e = w - (decoded row). Owns the search of scales and codes; knows no thread, file or model. */
#pragma once

#include <stdbool.h>
#include <stddef.h>

#include "quant/quant.h"

enum { DS_ENCODE_WIDTH = 256 /* columns that are solved together: a super-block, or as many small blocks as fit */ };

/* One sweep over the column blocks of rows, prepared from H for all rows of a matrix. A block's target is the row itself plus
 * what the errors in other blocks ask of it (carry); what is lost in a block is (target - decoded) cov (target - decoded)^T,
 * and cov = tri diag(var) tri^T with a unit upper triangle, so that codes can be chosen one column after the other. */
typedef struct ds_sweep {
    int n; /* columns: a multiple of 32 */
    bool all; /* carry errors of every other block, not of those before alone */
    const float *carry; /* (n, n): error at a row's index moves the targets at the columns' */
    const float *cov; /* (n, DS_ENCODE_WIDTH): rows of the blocks of cov, tri; columns count from the block's start */
    const float *tri; /* (n, DS_ENCODE_WIDTH) */
    const float *var; /* (n) > 0 */
} ds_sweep;

/* How hard to search. */
typedef struct ds_effort {
    int rounds; /* of codes, then scales, from each start */
    int polish; /* passes of single codes after each choice of them */
} ds_effort;

typedef struct ds_encode_rows {
    int n_rows;
    const float *w; /* (n_rows, n) finite */
    void *out; /* (n_rows, row bytes) */
} ds_encode_rows;

/* Whether a format can be encoded: those with integer codes. */
bool ds_encode_can(ds_format format);

/* Encode rows by sweeps in order: the first chooses, each later one improves on it. n must be a multiple of the format's
 * block. The result of a row does not depend on the others. false where memory is short. */
bool ds_encode(ds_format format, const ds_sweep *sweeps, int n_sweeps, const ds_effort *effort,
               const ds_encode_rows *rows);
