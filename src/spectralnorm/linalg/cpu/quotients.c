/* Weights divided by their norms, and the gradient of that, on the cores of a CPU.
 *
 * What is computed, and what every argument means, is told in quotients.py beside this file, which makes the tables
 * that are read here. All sums have an order that depends on the sizes alone: not on the number of threads, nor on what
 * else is in the call.
 */

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "products.h"
#include "quotients.h"
#include "threads.h"
#include "vectors.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define PIECE 8192 /* entries of one part of an inner product, and of a share of a division */

/* Written past the caches, for what does not fit into them; complete after `written`. */
ALWAYS void stream(float *to, vec value) {
#if defined(__AVX512F__)
    _mm512_stream_ps(to, (__m512)value);
#elif defined(__AVX__)
    _mm256_stream_ps(to, (__m256)value);
#elif defined(__SSE2__)
    _mm_stream_ps(to, (__m128)value);
#else
    store(to, value);
#endif
}

ALWAYS void written(void) {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

/* Dividing --------------------------------------------------------------------------------------------------------- */

enum rule_field { COEFFICIENT, THRESHOLD, CONSTANT, RULE_WIDTH };

/* What a weight of this norm is divided by; whether that depends on the norm. */
static double divisor_of(const double *rule, float sigma, int *active) {
    *active = sigma > rule[THRESHOLD] && sigma < INFINITY; /* false for NaN */
    return *active ? sigma / rule[COEFFICIENT] : rule[CONSTANT];
}

void decide(const division *how, int64_t which, float sigma) {
    int active;
    how->divisors[which] = (float)divisor_of(how->rules + which * RULE_WIDTH, sigma, &active);
}

void divide(const division *how, int64_t which, const team *all, int thread) {
    const float *from = (const float *)(intptr_t)how->weights[which];
    float *to = (float *)(intptr_t)how->targets[which], divisor = how->divisors[which];
    int64_t i, end;
    share(how->sizes[which], PIECE, all, thread, &i, &end);
    if (how->is_streamed && (intptr_t)to % sizeof(vec) == 0) {
        for (; i + WIDTH <= end; i += WIDTH) stream(to + i, load(from + i) / divisor);
        written();
    }
    for (; i + WIDTH <= end; i += WIDTH) store(to + i, load(from + i) / divisor);
    for (; i < end; i++) to[i] = from[i] / divisor;
}

typedef struct {
    division how;
    int64_t num_weights;
} dividing;

static void divide_all(void *arguments, team *all, int thread) {
    const dividing *these = arguments;
    for (int64_t which = 0; which < these->num_weights; which++) divide(&these->how, which, all, thread);
}

/* Each weight divided by its norm. Returns 0, or 1 where there is no memory. */
int spectralnorm_divide(const int64_t *weights, const int64_t *targets, const int64_t *sizes, const double *rules,
                        int64_t num_weights, const float *sigmas, int threads) {
    float *divisors = malloc(sizeof(float) * num_weights);
    if (!divisors) return 1;
    dividing these = {{weights, targets, sizes, rules, divisors, 0}, num_weights};
    int64_t entries = 0;
    for (int64_t which = 0; which < num_weights; which++) {
        decide(&these.how, which, sigmas[which]);
        entries += sizes[which];
    }
    these.how.is_streamed = entries >= STREAMED;
    together(divide_all, &these, entries, threads);
    free(divisors);
    return 0;
}

/* Whether each `step`th entry of a value is that of its weight by `divisor`, up to `relative` of it and `absolute`. */
int spectralnorm_is_quotient(const float *value, const float *weight, int64_t size, int64_t step, double divisor,
                             double relative, double absolute) {
    for (int64_t i = 0; i < size; i += step) {
        float expected = weight[i] / (float)divisor;
        int is_equal = value[i] == expected || (isnan(value[i]) && isnan(expected)); /* infinite ones too */
        if (!is_equal && !(fabsf(value[i] - expected) <= absolute + relative * fabsf(expected))) return 0;
    }
    return 1;
}

/* Its gradient ----------------------------------------------------------------------------------------------------- */

enum call_field {
    CALL_ROWS, CALL_OUTERS, CALL_INNER, CALL_OUTER_STRIDE, CALL_ROW_STRIDE, CALL_IS_TRANSPOSED,
    CALL_ROW_PLACE_INNER, CALL_ROW_PLACE_OUTER_STRIDE, CALL_ROW_PLACE_STRIDE,
    CALL_COLUMN_PLACE_INNER, CALL_COLUMN_PLACE_OUTER_STRIDE, CALL_COLUMN_PLACE_STRIDE,
    CALL_WIDTH
};

typedef struct {
    const int64_t *calls, *values, *targets; /* of all weights; values and targets are addresses */
    const int64_t *ends;                     /* of u and v, from a common beginning */
    int64_t beginning;
    const int64_t *grads, *more_grads;              /* addresses, of those that are asked for; there may be no more */
    const int64_t *places;                          /* which those are; where there are none, all */
    int64_t num_calls;
    const double *rules;
    const float *sigmas;
    float *scratch;
    double *parts;
    int64_t scratch_size, parts_size; /* of a thread */
    int is_streamed;
} differentiating;

/* The inverse of `placed` in tracking.c. */
static void gathered(const float *values, int64_t size, const int64_t *places, float *out) {
    int64_t inner = places[0], outer_stride = places[1], stride = places[2];
    for (int64_t first = 0; first < size; first += inner)
        for (int64_t i = 0; i < least(inner, size - first); i++)
            out[first + i] = values[first / inner * outer_stride + i * stride];
}

ALWAYS void row_of_gradient(const float *grad, const float *more, float factor, float of_row, const float *of_columns,
                            int64_t size, float *out, int is_streamed) {
    int64_t i = 0;
    if (is_streamed && (intptr_t)out % sizeof(vec) == 0)
        for (; i + WIDTH <= size; i += WIDTH)
            stream(out + i, load_sum(grad, more, i) * factor + of_row * load(of_columns + i));
    for (; i + WIDTH <= size; i += WIDTH)
        store(out + i, load_sum(grad, more, i) * factor + of_row * load(of_columns + i));
    if (i < size) {
        vec sum = load_part_of_sum(grad, more, i, size - i);
        store_part(out + i, sum * factor + of_row * load_part(of_columns + i, size - i), size - i);
    }
}

static int64_t place_of(const differentiating *these, int64_t number) {
    return these->places ? these->places[number] : number;
}

static void differentiate(const differentiating *these, int64_t number, const team *all, team *barrier, int thread,
                          float *scratch, double *parts) {
    int64_t which = place_of(these, number);
    const int64_t *call = these->calls + which * CALL_WIDTH, *ends = these->ends + 2 * which;
    const float *grad = (const float *)(intptr_t)these->grads[number];
    const float *more = (const float *)(intptr_t)these->more_grads[number];
    const float *value = (const float *)(intptr_t)these->values[which];
    float *target = (float *)(intptr_t)these->targets[which];
    int64_t rows = call[CALL_ROWS], outers = call[CALL_OUTERS], inner = call[CALL_INNER], size = rows * outers * inner;
    float *of_rows = scratch, *of_columns = scratch + rows;
    int active;
    double divisor = divisor_of(these->rules + which * RULE_WIDTH, these->sigmas[which], &active);
    float factor = (float)(1 / (double)(float)divisor);
    int64_t begin, end;
    meet(barrier); /* nobody reads what the last one left */
    if (thread == 0) {
        if (active) {
            int64_t along_rows = these->beginning + ends[call[CALL_IS_TRANSPOSED]];
            int64_t along_columns = these->beginning + ends[!call[CALL_IS_TRANSPOSED]];
            gathered((const float *)(intptr_t)along_rows, rows, call + CALL_ROW_PLACE_INNER, of_rows);
            gathered((const float *)(intptr_t)along_columns, outers * inner, call + CALL_COLUMN_PLACE_INNER,
                     of_columns);
        } else /* a weight that has no norm has no vectors either, and zero times what is not finite is no zero */
            memset(scratch, 0, sizeof(float) * (rows + outers * inner));
    }
    int64_t pieces = (size + PIECE - 1) / PIECE;
    if (active) {
        share(pieces, 1, all, thread, &begin, &end);
        for (int64_t piece = begin; piece < end; piece++) {
            int64_t start = piece * PIECE;
            const float *more_here = more ? more + start : NULL;
            parts[piece] = inner_product(grad + start, more_here, value + start, least(PIECE, size - start));
        }
    }
    meet(barrier);
    double along = 0;
    if (active) {
        for (int64_t piece = 0; piece < pieces; piece++) along += parts[piece];
        along = -along / these->sigmas[which];
    }
    /* Rows, or runs of all rows: whatever follows in memory. */
    int64_t outer_stride = call[CALL_OUTER_STRIDE], row_stride = call[CALL_ROW_STRIDE];
    share(outers * rows, 1, all, thread, &begin, &end);
    for (int64_t run = begin; run < end; run++) {
        int64_t outer = run / rows, row = run % rows, place = outer * outer_stride + row * row_stride;
        const float *columns = of_columns + outer * inner;
        float of_row = (float)along * of_rows[row], *out = target + place;
        if (more)
            row_of_gradient(grad + place, more + place, factor, of_row, columns, inner, out, these->is_streamed);
        else
            row_of_gradient(grad + place, NULL, factor, of_row, columns, inner, out, these->is_streamed);
    }
    if (these->is_streamed) written();
}

static int64_t entries_of_call(const differentiating *these, int64_t number) {
    const int64_t *call = these->calls + place_of(these, number) * CALL_WIDTH;
    return call[CALL_ROWS] * call[CALL_OUTERS] * call[CALL_INNER];
}

static void differentiate_all(void *arguments, team *all, int thread) {
    const differentiating *these = arguments;
    team alone = {.size = 1};
    float *own = these->scratch + (1 + thread) * these->scratch_size;
    double *own_parts = these->parts + (1 + thread) * these->parts_size;
    for (int64_t number = 0; all->size > 1 && number < these->num_calls; number++)
        if (entries_of_call(these, number) >= LARGE)
            differentiate(these, number, all, all, thread, these->scratch, these->parts);
    for (;;) {
        int64_t number = atomic_fetch_add(&all->next, 1);
        if (number >= these->num_calls) break;
        if (all->size == 1 || entries_of_call(these, number) < LARGE)
            differentiate(these, number, &alone, &alone, 0, own, own_parts);
    }
}

/* dL/dW of some of the weights that were divided, which have ``all_entries`` together. Returns 0, or 1 where there is
 * no memory. */
int spectralnorm_gradients(const int64_t *calls, const int64_t *values, const int64_t *targets, const int64_t *ends,
                           int64_t beginning, const int64_t *grads, const int64_t *places, int64_t num_calls,
                           int64_t all_entries, const double *rules, const float *sigmas, int threads) {
    differentiating these = {.calls = calls, .values = values, .targets = targets, .ends = ends,
                             .beginning = beginning, .grads = grads, .more_grads = grads + num_calls, .places = places,
                             .num_calls = num_calls, .rules = rules, .sigmas = sigmas,
                             .is_streamed = all_entries >= STREAMED};
    int64_t entries = 0, size = 0, parts = 0;
    for (int64_t number = 0; number < num_calls; number++) {
        const int64_t *call = calls + place_of(&these, number) * CALL_WIDTH;
        int64_t numel = entries_of_call(&these, number), both = call[CALL_ROWS] + call[CALL_OUTERS] * call[CALL_INNER];
        entries += numel;
        size = both > size ? both : size;
        parts = numel / PIECE + 1 > parts ? numel / PIECE + 1 : parts;
    }
    size = (size + 31) / 16 * 16;
    parts = (parts + 15) / 8 * 8;
    threads = threads < 1 ? 1 : threads > MOST_THREADS ? MOST_THREADS : threads;
    float *scratch = malloc((sizeof(float) * size + sizeof(double) * parts) * (threads + 1));
    if (!scratch) return 1;
    these.scratch = scratch, these.scratch_size = size, these.parts_size = parts;
    these.parts = (double *)(scratch + size * (threads + 1));
    together(differentiate_all, &these, entries, threads);
    free(scratch);
    return 0;
}
