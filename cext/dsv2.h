/* dsv2.h: the engine's public C interface: open a model, keep sessions, evaluate tokens, sample.
 * Everything else in cext is private to the library. Functions that can fail return a ds_status and fill err. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
