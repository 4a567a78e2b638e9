/* kern.h: the encoder's loops as each ISA has them. Private to encode/. */
#pragma once

#include "encode/encode.h"
#include "encode/grid.h"

typedef struct ds_encode_loops {
    size_t (*work_bytes)(int n, int n_rows);
    /* memory: work_bytes, aligned to 64. */
    void (*encode)(ds_format format, const ds_sweep *sweeps, int n_sweeps, const ds_effort *effort,
                   const ds_encode_rows *rows, void *memory);
} ds_encode_loops;
