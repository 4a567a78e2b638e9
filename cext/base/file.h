/* file.h: whether an open file is still what it was. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

typedef struct ds_file_stamp {
    int64_t size, seconds, nanoseconds; /* bytes, and when its content was last written */
} ds_file_stamp;

/* What an open file is now; false with errno set where the system does not tell. */
bool ds_file_stamp_get(int fd, ds_file_stamp *out);
bool ds_file_stamp_equal(const ds_file_stamp *a, const ds_file_stamp *b);
