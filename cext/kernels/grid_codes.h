/* grid_codes.h: the grids with an entry's codes in the bytes of a qword or a dword: for ISAs that load an entry for each
 * index. */
#pragma once

#define GRID_VALUE_IQ2(place) ((place) == 0 ? 8 : (place) == 1 ? 25 : 43)
#define GRID_VALUE_IQ3_XXS(place) ((place) == 7 ? 62 : 8 * (place) + 4)
#define GRID_VALUE_IQ3_S(place) (2 * (place) + 1)
#define GRID_BYTE(value, i) (uint64_t)(value) << 8 * (i)
#define GRID_BYTE_2(e, i) GRID_BYTE(GRID_VALUE_IQ2(DS_GRID_PLACE_IQ2(e, i)), i)
#define GRID_BYTE_3(value, e, i) GRID_BYTE(value(DS_GRID_PLACE_IQ3(e, i)), i)
#define GRID_FOUR_3(value, e)                                                                   \
    (uint32_t)(GRID_BYTE_3(value, e, 0) | GRID_BYTE_3(value, e, 1) | GRID_BYTE_3(value, e, 2) | \
               GRID_BYTE_3(value, e, 3))
#define GRID_CODES_IQ2(e)                                                                               \
    GRID_BYTE_2(e, 0) | GRID_BYTE_2(e, 1) | GRID_BYTE_2(e, 2) | GRID_BYTE_2(e, 3) | GRID_BYTE_2(e, 4) | \
        GRID_BYTE_2(e, 5) | GRID_BYTE_2(e, 6) | GRID_BYTE_2(e, 7)
