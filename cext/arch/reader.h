/* reader.h: reads of "<arch>.<key>" from a file's metadata, each checked; for what reads a configuration. */
#pragma once

#include "arch/config.h"

/* The first failure sticks in `status`, so that a run of reads needs one check at its end. */
typedef struct ds_reader {
    const ds_gguf *gguf;
    ds_source source;
    const char *arch;
    ds_notes *notes;
    ds_status status;
    ds_error *err;
} ds_reader;

/* A step has up to 2^10 tokens and counts its values in ints. A row of logits is counted on its own. */
enum { DS_MAX_WIDTH = 1 << 20, DS_MAX_VOCAB = 1 << 24 };

void ds_read_key(const ds_reader *r, const char *key, char *out, size_t size); /* the key's whole name */
bool ds_read_present(const ds_reader *r, const char *key);
bool ds_read_has_tensor(const ds_reader *r, const char *format, ...);
/* A key that is missing and cannot be guessed: what it should say is in the hint. */
void ds_read_missing(ds_reader *r, const char *key, const char *hint);
/* An integer in [min, max]; `fallback` where the key is absent and fallback >= 0, else the key is required. */
int ds_read_int(ds_reader *r, const char *key, int min, int max, int fallback);
float ds_read_float(ds_reader *r, const char *key, double min, double max, double fallback);
bool ds_read_bool(ds_reader *r, const char *key, bool fallback);
/* Of a whole key; "" where it is absent or no string. */
void ds_read_string(const ds_gguf *gguf, const char *key, char *out, size_t size);
/* Fails where a product of two widths is over DS_MAX_WIDTH: the code that multiplies them trusts that. */
void ds_read_product(ds_reader *r, const char *what, int64_t a, int64_t b);
