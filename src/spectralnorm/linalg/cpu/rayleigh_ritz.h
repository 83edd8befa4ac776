/* Which turn of the images of a frame is the next frame: algebra of eight by eight. */

#ifndef SPECTRALNORM_RAYLEIGH_RITZ_H
#define SPECTRALNORM_RAYLEIGH_RITZ_H

#include <stdint.h>

#include "products.h"
#include "vectors.h"

typedef double small[TRACKED][TRACKED];

/* Of (size, 8): its columns with each other. */
INTERNAL void gram_of_columns(const float *values, int64_t size, small gram);

/* Of (8, size): its rows with each other. */
INTERNAL void gram_of_rows(const float *values, int64_t size, small gram);

/* What turns images of a frame into the next frame, `_ritz_turns` of spectralnorm/linalg/tracking.py. The identity
 * where there is nothing to be found: what is not finite stays so, and is seen by its norm. */
INTERNAL void ritz_turn(const small starts, const small images, float out[TRACKED][TRACKED]);

/* Rows of ``turn`` times (8, size). */
INTERNAL void turned_rows(float turn[TRACKED][TRACKED], int rows, const float *images, int64_t size, float *out);

#endif
