/* Singular values of many matrices followed for a step, and the division by them, on the cores of a CPU.
 *
 * What it computes is told in spectralnorm/linalg/tracking.py; what every argument means, in tracking.py beside this
 * file, which makes the tables that are read here. Only float32 goes in and out; sums over a whole matrix are carried
 * on in double. All sums have an order that depends on the sizes alone: not on the number of threads, nor on what else
 * is in the call.
 *
 * Large matrices are shared by all threads, one after the other, so that the second product and whatever follows find
 * them in the cache; small ones are given to a thread each.
 */

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "products.h"
#include "quotients.h"
#include "rayleigh_ritz.h"
#include "threads.h"
#include "vectors.h"

enum map_field {
    ADDRESS, ROWS, OUTERS, INNER, OUTER_STRIDE, ROW_STRIDE,
    FROM_ROWS,                                  /* on which side the frame is */
    FRAME, NEXT, IS_COMPLETE, DIRECTION,        /* where it is, where the next one goes */
    ROW_VECTOR, ROW_PLACE_INNER, ROW_PLACE_OUTER_STRIDE, ROW_PLACE_STRIDE,
    COLUMN_VECTOR, COLUMN_PLACE_INNER, COLUMN_PLACE_OUTER_STRIDE, COLUMN_PLACE_STRIDE,
    MAP_WIDTH
};

typedef struct {
    const int64_t *maps, *first_maps, *ages;
    int64_t num_weights;
    const float *frames, *directions;
    float *next, *vectors, *sigmas, *weight_sigmas, *scratch;
    int64_t scratch_size; /* of a thread */
    double eps;
    const division *how; /* NULL: nothing is divided */
} following;

/* A power of two that brings entries near to one, so that squares stay in range; one where they are near enough. */
static float scale_for(const float *values, int64_t size) {
    float most[WIDTH] = {0}, largest = 0;
    int exponent;
    int64_t i = 0;
    for (; i + WIDTH <= size; i += WIDTH)
        for (int lane = 0; lane < WIDTH; lane++) {
            float value = fabsf(values[i + lane]);
            most[lane] = value > most[lane] ? value : most[lane];
        }
    for (; i < size; i++) most[0] = fabsf(values[i]) > most[0] ? fabsf(values[i]) : most[0];
    for (int lane = 0; lane < WIDTH; lane++) largest = most[lane] > largest ? most[lane] : largest;
    if (!(largest > 0 && largest < INFINITY)) return 1;
    frexpf(largest, &exponent);
    if (-20 <= exponent && exponent <= 40) return 1;
    return ldexpf(1, exponent > -120 ? -exponent : 120);
}

/* A vector written in another order of its entries. */
static void placed(const float *values, int64_t size, const int64_t *places, double factor, float *out) {
    int64_t inner = places[0], outer_stride = places[1], stride = places[2];
    for (int64_t first = 0; first < size; first += inner)
        for (int64_t i = 0; i < least(inner, size - first); i++)
            out[first / inner * outer_stride + i * stride] = (float)(values[first + i] * factor);
}

static void follow(const following *all_maps, int64_t number, int64_t age, const team *all, team *barrier, int thread,
                   float *scratch) {
    const int64_t *map = all_maps->maps + number * MAP_WIDTH;
    const float *base = (const float *)(intptr_t)map[ADDRESS];
    matrix a = {base, map[ROWS], map[OUTERS], map[INNER], map[OUTER_STRIDE], map[ROW_STRIDE]};
    int from_rows = (int)map[FROM_ROWS], is_complete = (int)map[IS_COMPLETE];
    int64_t columns = a.outers * a.inner, m = from_rows ? a.rows : columns, n = from_rows ? columns : a.rows;
    const float *frame = all_maps->frames + map[FRAME];
    float *start = scratch, *images = start + TRACKED * m, *lead = images + TRACKED * n, *end = lead + n;
    float *next = all_maps->next + map[NEXT];
    small starts;
    if (thread == 0) {
        int64_t step = from_rows ? TRACKED : 1, row_step = from_rows ? 1 : m;
        if (from_rows)
            for (int64_t i = 0; i < m; i++)
                for (int k = 0; k < TRACKED; k++) start[i * TRACKED + k] = frame[k * m + i];
        else
            memcpy(start, frame, sizeof(float) * TRACKED * m);
        if (all_maps->ages && !is_complete) {
            const float *direction = all_maps->directions + map[DIRECTION];
            age %= m;
            float *last = start + (TRACKED - 1) * row_step;
            for (int64_t i = 0; i < m; i++) last[(i + age < m ? i + age : i + age - m) * step] += direction[i];
        }
        if (from_rows)
            gram_of_columns(start, m, starts);
        else
            gram_of_rows(start, m, starts);
    }
    meet(barrier);
    product_of_frame(&a, from_rows, start, images, all, thread);
    meet(barrier);
    if (thread == 0) {
        small of_images;
        float turn[TRACKED][TRACKED], scale = scale_for(images, TRACKED * n);
        if (scale != 1)
            for (int64_t i = 0; i < TRACKED * n; i++) images[i] *= scale;
        gram_of_rows(images, n, of_images);
        ritz_turn(starts, of_images, turn);
        float *rows = is_complete ? lead : next;
        turned_rows(turn, is_complete ? 1 : TRACKED, images, n, rows);
        if (is_complete) memcpy(next, frame, sizeof(float) * TRACKED * m);
        double length = length_of(rows, n);
        float divisor = (float)(length > all_maps->eps || length != length ? length : all_maps->eps);
        for (int64_t i = 0; i < n; i++) lead[i] = rows[i] / divisor;
    }
    meet(barrier);
    product_of_vector(&a, !from_rows, lead, end, all, thread);
    meet(barrier);
    if (thread == 0) {
        double sigma = length_of(end, m);
        all_maps->sigmas[number] = (float)sigma;
        double divisor = sigma > all_maps->eps || sigma != sigma ? sigma : all_maps->eps;
        const int64_t *row_places = map + ROW_PLACE_INNER, *column_places = map + COLUMN_PLACE_INNER;
        placed(lead, n, from_rows ? column_places : row_places, 1,
               all_maps->vectors + map[from_rows ? COLUMN_VECTOR : ROW_VECTOR]);
        placed(end, m, from_rows ? row_places : column_places, 1 / divisor,
               all_maps->vectors + map[from_rows ? ROW_VECTOR : COLUMN_VECTOR]);
    }
}

static int64_t entries_of(const int64_t *map) { return map[ROWS] * map[OUTERS] * map[INNER]; }

/* The norm of a block diagonal matrix; NaN if that of any block is. */
static float largest_of(const float *sigmas, int64_t count) {
    float largest = sigmas[0];
    for (int64_t i = 1; i < count; i++)
        if (largest == largest && !(sigmas[i] <= largest)) largest = sigmas[i];
    return largest;
}

/* All blocks of a weight, and the division by its norm while it is in the cache. */
static void renew(const following *all_maps, int64_t which, const team *all, team *barrier, int thread,
                  float *scratch) {
    int64_t first = all_maps->first_maps[which], last = all_maps->first_maps[which + 1];
    for (int64_t number = first; number < last; number++)
        follow(all_maps, number, all_maps->ages ? all_maps->ages[which] : 0, all, barrier, thread, scratch);
    if (thread == 0) all_maps->weight_sigmas[which] = largest_of(all_maps->sigmas + first, last - first);
    if (!all_maps->how) return;
    if (thread == 0) decide(all_maps->how, which, all_maps->weight_sigmas[which]);
    meet(barrier);
    divide(all_maps->how, which, all, thread);
}

static int is_shared(const following *maps, int64_t which, const team *all) {
    return atomic_load(&all->size) > 1 && entries_of(maps->maps + maps->first_maps[which] * MAP_WIDTH) >= LARGE;
}

static void renew_all(void *arguments, team *all, int thread) {
    const following *maps = arguments;
    team alone = {.size = 1};
    float *own = maps->scratch + (1 + thread) * maps->scratch_size;
    for (int64_t which = 0; which < maps->num_weights; which++)
        if (is_shared(maps, which, all)) renew(maps, which, all, all, thread, maps->scratch);
    for (;;) {
        int64_t which = atomic_fetch_add(&all->next, 1);
        if (which >= maps->num_weights) break;
        if (!is_shared(maps, which, all)) renew(maps, which, &alone, &alone, 0, own);
    }
}

/* One step for all weights, each of which is one or several matrices of one size; then, where there are targets, the
 * division. Returns how many weights have no norm, or -1 where there is no memory. */
int spectralnorm_renew(const int64_t *maps, const int64_t *first_maps, int64_t num_weights, const float *frames,
                       const float *directions, const int64_t *ages, float *next, float *vectors, float *sigmas,
                       float *weight_sigmas, double eps, const int64_t *weights, const int64_t *targets,
                       const int64_t *sizes, const double *rules, int threads) {
    int64_t entries = 0, size = 0;
    for (int64_t number = 0; number < first_maps[num_weights]; number++) {
        const int64_t *map = maps + number * MAP_WIDTH;
        int64_t both = (TRACKED + 1) * (map[ROWS] + map[OUTERS] * map[INNER]);
        entries += entries_of(map);
        size = both > size ? both : size;
    }
    size = (size + 31) / 16 * 16;
    threads = threads < 1 ? 1 : threads > MOST_THREADS ? MOST_THREADS : threads;
    float *scratch = malloc(sizeof(float) * (size * (threads + 1) + num_weights));
    if (!scratch) return -1;
    division how = {weights, targets, sizes, rules, scratch + size * (threads + 1), entries >= STREAMED};
    following all = {maps, first_maps, ages, num_weights, frames, directions, next, vectors, sigmas, weight_sigmas,
                     scratch, size, eps, targets ? &how : NULL};
    /* By entries and not by products: where another process has the core, a thread is waited for as long as a whole
     * model of small weights takes. */
    together(renew_all, &all, entries, threads);
    free(scratch);
    int num_bad = 0;
    for (int64_t which = 0; which < num_weights; which++)
        num_bad += !(weight_sigmas[which] > eps && weight_sigmas[which] < INFINITY);
    return num_bad;
}
