/* grid_loaded.h: all grids as codes (grid_codes.h): for ISAs that look nothing up in registers. */
#pragma once

#include "kernels/grid_codes.h"

typedef uint64_t grid8_entry, grid8_loaded;
typedef uint32_t grid4_entry;
#define GRID_ENTRY_IQ2(e) GRID_CODES_IQ2(e),
#define GRID_LOADED_IQ2(e) GRID_CODES_IQ2(e),
#define GRID_ENTRY_IQ3_XXS(e) GRID_FOUR_3(GRID_VALUE_IQ3_XXS, e),
#define GRID_ENTRY_IQ3_S(e) GRID_FOUR_3(GRID_VALUE_IQ3_S, e),
