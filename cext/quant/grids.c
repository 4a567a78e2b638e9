/* grids.c: the code books as tables. */
#include "quant/grids.h"

#define ITEM(x) x,
const uint16_t ds_grid_iq2_xxs[256] = {DS_GRID_IQ2_XXS(ITEM)};
const uint16_t ds_grid_iq2_xs[512] = {DS_GRID_IQ2_XS(ITEM)};
const uint16_t ds_grid_iq2_s[1024] = {DS_GRID_IQ2_S(ITEM)};
const uint16_t ds_grid_iq3_xxs[256] = {DS_GRID_IQ3_XXS(ITEM)};
const uint16_t ds_grid_iq3_s[512] = {DS_GRID_IQ3_S(ITEM)};
const int8_t ds_grid_values_iq2[3] = {DS_GRID_VALUES_IQ2(ITEM)};
const int8_t ds_grid_values_iq3_xxs[8] = {DS_GRID_VALUES_IQ3_XXS(ITEM)};
const int8_t ds_grid_values_iq3_s[8] = {DS_GRID_VALUES_IQ3_S(ITEM)};
