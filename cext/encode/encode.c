/* encode.c: memory for the encoder, and the choice of its compiled loops. */
#include "encode/encode.h"

#include <stdlib.h>
#include <string.h>

#include "encode/kern.h"
#include "kernels/isas.h"
#include "kernels/kernels.h"

#define DECLARE(isa) extern const ds_encode_loops ds_encode_##isa;
DS_ISAS(DECLARE)

/* The loops compiled for the ISA that the kernels run on here. */
static const ds_encode_loops *find_loops(void) {
    const ds_kernels *kern = ds_kernels_find(NULL);
#define FIND(name) \
    if (kern && strcmp(kern->isa, #name) == 0) return &ds_encode_##name;
    DS_ISAS(FIND)
    return &ds_encode_scalar; /* an override that names none; opening a model has told so */
}

bool ds_encode(ds_format format, const ds_sweep *sweeps, int n_sweeps, const ds_effort *effort,
               const ds_encode_rows *rows) {
    const ds_encode_loops *loops = find_loops();
    void *memory = aligned_alloc(64, (loops->work_bytes(sweeps[0].n, rows->n_rows) + 63) / 64 * 64);
    if (!memory) return false;
    loops->encode(format, sweeps, n_sweeps, effort, rows, memory);
    free(memory);
    return true;
}
