/* attention.c: latent attention, for the table of one ISA. */
#include "kernels/kern.h"

#include "kernels/attend_rows.h"
#include "kernels/attend.h"
#include "kernels/expand.h"
