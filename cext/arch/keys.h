/* keys.h: which metadata keys of the architecture are understood. A key that changes the arithmetic and is not read must
 * not be passed over: the answers would be wrong without a word. */
#pragma once

#include "base/notes.h"
#include "gguf/gguf.h"

/* Refuse (DS_EUNSUPPORTED) a key under "<arch>." that would change the arithmetic, unless its value is the one that changes
 * nothing; note those of which nothing is known. */
ds_status ds_keys_check(const ds_gguf *gguf, const char *arch, ds_notes *notes, ds_error *err);
