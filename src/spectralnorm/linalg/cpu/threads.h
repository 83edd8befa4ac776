/* The threads that kernels run on: torch's own where they can be had. */

#ifndef SPECTRALNORM_THREADS_H
#define SPECTRALNORM_THREADS_H

#include <stdatomic.h>
#include <stdint.h>

#include "vectors.h"

#define MOST_THREADS 64
#define LARGE (1 << 15) /* entries of a matrix that is shared by threads */

typedef struct {
    atomic_int size;
    atomic_int arrived, round;
    atomic_llong next; /* of the jobs that are given to one thread each */
} team;

typedef void (*job)(void *arguments, team *all, int number);

/* Wait for all of a team. */
INTERNAL void meet(team *all);

/* Run a job on as many threads as may be had and as the entries are worth. */
INTERNAL void together(job work, void *arguments, int64_t entries, int threads);

/* A share of ``count`` things in units of ``unit``. */
INTERNAL void share(int64_t count, int64_t unit, const team *all, int number, int64_t *begin, int64_t *end);

#endif
