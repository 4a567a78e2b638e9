/* products.c: activation packs and products with coded weights, for the table of one ISA. */
#include "kernels/kern.h"

#include "kernels/act.h"

#if DS_HAS_DOTS
/* The values of IQ4 codes, plus DS_CODE_BIAS (as bytes). */
#define IQ4(value) (int8_t)(((value) + DS_CODE_BIAS + 128) % 256 - 128)
static const int8_t iq4_codes[16] = {IQ4(-127), IQ4(-104), IQ4(-83), IQ4(-65), IQ4(-49), IQ4(-35), IQ4(-22), IQ4(-10),
                                     IQ4(1),    IQ4(13),   IQ4(25),  IQ4(38),  IQ4(53),  IQ4(69),  IQ4(89),  IQ4(113)};
#include "kernels/mul_rows.h"
#include "kernels/unpack.h"
#include "kernels/mul_panels.h"
#define MUL_CODED(id)                                        \
    void DS_OF(mul_##id)(const ds_mul *job) {                \
        if (job->n_tok <= DS_ROW_TOKENS) mul_rows_##id(job); \
        else mul_panels_##id(job);                           \
    }
DS_CODED_FORMATS(MUL_CODED)
#else
#include "kernels/mul_codes.h"
#endif

#include "kernels/limits.h"
