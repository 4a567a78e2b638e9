/* kern.h: the encoder's loops as each ISA has them. Private to encode/. */
#pragma once

#include "encode/encode.h"
#include "encode/grid.h"

/* What a call works in; the caller's. */
typedef struct ds_encode_work {
    float *t;           /* (n_rows, DS_ENCODE_WIDTH) targets of a block */
    float *e;           /* (n_rows, n) errors so far; zeros at first */
    ds_choice *choices; /* (n_rows, blocks of columns) */
} ds_encode_work;

typedef void (*ds_encode_fn)(const ds_grid *grid, const ds_sweep *sweeps, int n_sweeps, const ds_effort *effort, const ds_encode_rows *rows,
                             const ds_encode_work *work);
