/* encode.c: memory for the encoder, and the choice of its compiled loops. */
#include "encode/encode.h"

#include <stdlib.h>
#include <string.h>

#include "encode/kern.h"
#include "kernels/kernels.h"

#define DS_HAVE_scalar 1
extern const ds_encode_loops ds_encode_scalar;
#if DS_HAVE_avx2
extern const ds_encode_loops ds_encode_avx2;
#endif
#if DS_HAVE_avxvnni
extern const ds_encode_loops ds_encode_avxvnni;
#endif
#if DS_HAVE_avx512vnni
extern const ds_encode_loops ds_encode_avx512vnni;
#endif
#if DS_HAVE_i8mm
extern const ds_encode_loops ds_encode_i8mm;
#endif
#if DS_HAVE_neon
extern const ds_encode_loops ds_encode_neon;
#endif

/* The loops compiled for the ISA that the kernels run on here. */
static const ds_encode_loops *find_loops(void) {
    const ds_kernels *kern = ds_kernels_find(NULL);
    const char *isa = kern ? kern->isa : "scalar";
#if DS_HAVE_avx2
    if (strcmp(isa, "avx2") == 0) return &ds_encode_avx2;
#endif
#if DS_HAVE_avxvnni
    if (strcmp(isa, "avxvnni") == 0) return &ds_encode_avxvnni;
#endif
#if DS_HAVE_avx512vnni
    if (strcmp(isa, "avx512vnni") == 0) return &ds_encode_avx512vnni;
#endif
#if DS_HAVE_i8mm
    if (strcmp(isa, "i8mm") == 0) return &ds_encode_i8mm;
#endif
#if DS_HAVE_neon
    if (strcmp(isa, "neon") == 0) return &ds_encode_neon;
#endif
    (void)isa;
    return &ds_encode_scalar;
}

bool ds_encode(ds_format format, const ds_sweep *sweeps, int n_sweeps, const ds_effort *effort, const ds_encode_rows *rows) {
    const ds_encode_loops *loops = find_loops();
    void *memory = aligned_alloc(64, (loops->work_bytes(sweeps[0].n, rows->n_rows) + 63) / 64 * 64);
    if (!memory) return false;
    loops->encode(format, sweeps, n_sweeps, effort, rows, memory);
    free(memory);
    return true;
}
