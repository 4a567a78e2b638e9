/* grid_tables.h: the grids of grids.h, an entry in the form that this ISA looks up. */
#pragma once

DS_ALIGNED static const grid8_entry grid_IQ2_XXS[256] = {DS_GRID_IQ2_XXS(GRID_ENTRY_IQ2)};
DS_ALIGNED static const grid8_entry grid_IQ2_XS[512] = {DS_GRID_IQ2_XS(GRID_ENTRY_IQ2)};
DS_ALIGNED static const grid8_loaded grid_IQ2_S[1024] = {DS_GRID_IQ2_S(GRID_LOADED_IQ2)};
DS_ALIGNED static const grid4_entry grid_IQ3_XXS[256] = {DS_GRID_IQ3_XXS(GRID_ENTRY_IQ3_XXS)};
DS_ALIGNED static const grid4_entry grid_IQ3_S[512] = {DS_GRID_IQ3_S(GRID_ENTRY_IQ3_S)};
