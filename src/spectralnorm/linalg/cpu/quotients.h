/* The division of weights by their norms, for those who have just found these. */

#ifndef SPECTRALNORM_QUOTIENTS_H
#define SPECTRALNORM_QUOTIENTS_H

#include <stdint.h>

#include "threads.h"
#include "vectors.h"

#define STREAMED (1 << 23) /* entries of all weights from which on their quotients are written past the caches */

/* Where weights are divided, and by what. */
typedef struct {
    const int64_t *weights, *targets, *sizes; /* addresses, entries */
    const double *rules;
    float *divisors; /* found on the way */
    int is_streamed;
} division;

/* What a weight of this norm is divided by, into the table. */
INTERNAL void decide(const division *how, int64_t which, float sigma);

/* A thread's share of one weight. */
INTERNAL void divide(const division *how, int64_t which, const team *all, int thread);

#endif
