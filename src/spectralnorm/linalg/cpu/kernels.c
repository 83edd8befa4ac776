/* Singular values of many matrices followed for a step, the division by them and its gradient, on the cores of a CPU.
 *
 * What it computes is told in spectralnorm/linalg/tracking.py; what every argument means, in the Python files beside
 * this one, which make the tables that are read here. Only float32 goes in and out; sums over a whole matrix are
 * carried on in double. All sums have an order that depends on the sizes alone: not on the number of threads, nor on
 * what else is in the call.
 *
 * Large matrices are shared by all threads, one after the other, so that the second product and whatever follows find
 * them in the cache; small ones are given to a thread each.
 */

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "threads.h"
#include "vectors.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define UNITS 2 /* vectors of columns at once: eight rows of two are half of the registers */
#define ROWS_AT_ONCE 2
#elif defined(__AVX__)
#define UNITS 1
#define ROWS_AT_ONCE 1
#else
#define UNITS 2
#define ROWS_AT_ONCE 2
#endif

#define TRACKED 8          /* rows of a frame */
#define SLAB 16            /* rows that one pass over columns takes, as many streams as a prefetcher follows */
#define PANEL 512          /* columns, so that eight rows of their sums stay in the first cache */
#define LONG_PANEL 1024    /* the same of sums along rows, for eight rows of a frame */
#define BLOCK 512          /* terms of a sum in single precision */
#define PIECE 8192         /* entries of one part of an inner product, and of a share of a division */
#define LARGE (1 << 15)    /* entries of a matrix that is shared by threads */
#define STREAMED (1 << 23) /* entries of all weights from which on their quotients are written past the caches */
#define EPSILON 1.1920929e-7
#define TINY 1.17549435e-38

typedef float vec8 __attribute__((vector_size(32)));
typedef float vec8_in_memory __attribute__((vector_size(32), aligned(4), may_alias));

/* Fetched into the second cache; an address that is nobody's does no harm. */
ALWAYS void ahead(const float *from) { __builtin_prefetch(from, 0, 2); }

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

ALWAYS vec load_part(const float *from, int64_t count) {
    vec value = {0};
    memcpy(&value, from, sizeof(float) * count);
    return value;
}

ALWAYS void store_part(float *to, vec value, int64_t count) { memcpy(to, &value, sizeof(float) * count); }

/* Products --------------------------------------------------------------------------------------------------------- */

/* Entry (row, outer * inner + place) of a matrix lies at row * row_stride + outer * outer_stride + place. */
typedef struct {
    const float *base;
    int64_t rows, outers, inner, outer_stride, row_stride;
} matrix;

/* One slab of rows, added to the sums of WIDTH * units columns:
 * sums[k][column] += sum of start[row][k] a[row][column]. */
ALWAYS void slab_over_columns(const float *a, int64_t row_stride, int64_t rows, const float *start, float *sums,
                              int64_t stride, int64_t part, const int count, const int units) {
    vec total[TRACKED][2];
    UNROLL(8)
    for (int k = 0; k < count; k++)
        UNROLL(2)
        for (int unit = 0; unit < units; unit++)
            total[k][unit] = part ? load_part(sums + k * stride, part) : load(sums + k * stride + unit * WIDTH);
    for (int64_t row = 0; row < rows; row++) {
        vec entries[2];
        if (!part && count > 1) /* the next slab: so many streams are more than a processor follows by itself */
            UNROLL(2)
            for (int unit = 0; unit < units; unit++) ahead(a + (row + SLAB) * row_stride + unit * WIDTH);
        UNROLL(2)
        for (int unit = 0; unit < units; unit++)
            entries[unit] = part ? load_part(a + row * row_stride, part) : load(a + row * row_stride + unit * WIDTH);
        UNROLL(8)
        for (int k = 0; k < count; k++)
            UNROLL(2)
            for (int unit = 0; unit < units; unit++) total[k][unit] += start[row * count + k] * entries[unit];
    }
    UNROLL(8)
    for (int k = 0; k < count; k++)
        UNROLL(2)
        for (int unit = 0; unit < units; unit++) {
            if (part)
                store_part(sums + k * stride, total[k][unit], part);
            else
                store(sums + k * stride + unit * WIDTH, total[k][unit]);
        }
}

/* Columns [begin, end) of each run of them: sums[k][column] = sum over rows of start[row][k] a[row][column]. */
ALWAYS void sums_over_rows(const matrix *a, int64_t first_outer, int64_t last_outer, int64_t begin, int64_t end,
                           const float *start, float *sums, int64_t stride, const int count) {
    for (int64_t outer = first_outer; outer < last_outer; outer++)
        for (int64_t panel = begin; panel < end; panel += PANEL) {
            int64_t width = least(PANEL, end - panel);
            float *out = sums + outer * a->inner + panel;
            for (int k = 0; k < count; k++) memset(out + k * stride, 0, sizeof(float) * width);
            for (int64_t row = 0; row < a->rows; row += SLAB) {
                int64_t rows = least(SLAB, a->rows - row), column = 0;
                const float *from = a->base + row * a->row_stride + outer * a->outer_stride + panel;
                const float *of = start + row * count;
                for (; column + UNITS * WIDTH <= width; column += UNITS * WIDTH)
                    slab_over_columns(from + column, a->row_stride, rows, of, out + column, stride, 0, count, UNITS);
                for (; column + WIDTH <= width; column += WIDTH)
                    slab_over_columns(from + column, a->row_stride, rows, of, out + column, stride, 0, count, 1);
                if (column < width)
                    slab_over_columns(from + column, a->row_stride, rows, of, out + column, stride, width - column,
                                      count, 1);
            }
        }
}

/* Of a few rows: sums[k][row] (+)= sum over columns of start[k][column] a[row][column]. */
ALWAYS void rows_over_columns(const matrix *a, int64_t row, int64_t first_outer, int64_t last_outer, int64_t begin,
                              int64_t end, const float *start, int64_t start_stride, float *sums, int64_t stride,
                              int is_first, const int count, const int rows) {
    vec total[4][TRACKED] = {{{0}}};
    for (int64_t outer = first_outer; outer < last_outer; outer++) {
        const float *from = a->base + row * a->row_stride + outer * a->outer_stride;
        const float *of = start + outer * a->inner;
        int64_t column = begin;
        for (; column + WIDTH <= end; column += WIDTH) {
            vec entries[4];
            UNROLL(4)
            for (int r = 0; r < rows; r++) {
                entries[r] = load(from + r * a->row_stride + column);
                if (count > 1) ahead(from + (r + rows) * a->row_stride + column);
            }
            UNROLL(8)
            for (int k = 0; k < count; k++) {
                vec of_frame = load(of + k * start_stride + column);
                UNROLL(4)
                for (int r = 0; r < rows; r++) total[r][k] += of_frame * entries[r];
            }
        }
        if (column < end) {
            vec entries[4];
            UNROLL(4)
            for (int r = 0; r < rows; r++) entries[r] = load_part(from + r * a->row_stride + column, end - column);
            UNROLL(8)
            for (int k = 0; k < count; k++) {
                vec of_frame = load_part(of + k * start_stride + column, end - column);
                UNROLL(4)
                for (int r = 0; r < rows; r++) total[r][k] += of_frame * entries[r];
            }
        }
    }
    UNROLL(8)
    for (int k = 0; k < count; k++)
        UNROLL(4)
        for (int r = 0; r < rows; r++) {
            float *sum = sums + k * stride + row + r;
            *sum = is_first ? sum_of(total[r][k]) : *sum + sum_of(total[r][k]);
        }
}

ALWAYS void sums_over_columns(const matrix *a, int64_t begin, int64_t end, const float *start, float *sums,
                              const int count, const int rows) {
    int64_t columns = a->outers * a->inner;
    int64_t outers = a->outers > 1 ? (LONG_PANEL + a->inner - 1) / a->inner : 1;
    for (int64_t outer = 0; outer < a->outers; outer += outers)
        for (int64_t panel = 0; panel < a->inner; panel += a->outers > 1 ? a->inner : LONG_PANEL) {
            int64_t last = least(outer + outers, a->outers);
            int64_t to = a->outers > 1 ? a->inner : least(panel + LONG_PANEL, a->inner);
            int is_first = outer == 0 && panel == 0;
            int64_t row = begin;
            for (; row + rows <= end; row += rows)
                rows_over_columns(a, row, outer, last, panel, to, start, columns, sums, a->rows, is_first, count, rows);
            for (; row < end; row++)
                rows_over_columns(a, row, outer, last, panel, to, start, columns, sums, a->rows, is_first, count, 1);
        }
}

/* A thread's share of the rows of a frame through a matrix: from its rows, ``start`` being (rows, count), or from its
 * columns, ``start`` being (count, columns). ``sums`` is (count, the other side). */
ALWAYS void product(const matrix *a, int from_rows, const float *start, float *sums, const team *all, int number,
                    const int count, const int rows) {
    int64_t begin, end;
    if (!from_rows) {
        share(a->rows, 4, all, number, &begin, &end);
        sums_over_columns(a, begin, end, start, sums, count, rows);
    } else if (a->outers > 1) {
        share(a->outers, 1, all, number, &begin, &end);
        sums_over_rows(a, begin, end, 0, a->inner, start, sums, a->outers * a->inner, count);
    } else {
        share(a->inner, 2 * UNITS * WIDTH, all, number, &begin, &end);
        sums_over_rows(a, 0, 1, begin, end, start, sums, a->inner, count);
    }
}

static void product_of_frame(const matrix *a, int from_rows, const float *start, float *sums, const team *all,
                             int number) {
    product(a, from_rows, start, sums, all, number, TRACKED, ROWS_AT_ONCE);
}

static void product_of_vector(const matrix *a, int from_rows, const float *start, float *sums, const team *all,
                              int number) {
    product(a, from_rows, start, sums, all, number, 1, 4);
}

/* A run of entries, or of the sums of two of them. */
ALWAYS vec load_sum(const float *from, const float *more, int64_t i) {
    return more ? load(from + i) + load(more + i) : load(from + i);
}

ALWAYS vec load_part_of_sum(const float *from, const float *more, int64_t i, int64_t count) {
    return more ? load_part(from + i, count) + load_part(more + i, count) : load_part(from + i, count);
}

/* <left + more, right>, in blocks; of left alone where there is no more. */
ALWAYS double inner_product_of(const float *left, const float *more, const float *right, int64_t size) {
    double total = 0;
    for (int64_t block = 0; block < size; block += BLOCK) {
        int64_t end = least(block + BLOCK, size), i = block;
        vec sums[4] = {{0}};
        for (; i + 4 * WIDTH <= end; i += 4 * WIDTH)
            UNROLL(4)
            for (int unit = 0; unit < 4; unit++)
                sums[unit] += load_sum(left, more, i + unit * WIDTH) * load(right + i + unit * WIDTH);
        for (; i + WIDTH <= end; i += WIDTH) sums[0] += load_sum(left, more, i) * load(right + i);
        if (i < end) sums[0] += load_part_of_sum(left, more, i, end - i) * load_part(right + i, end - i);
        total += sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
    return total;
}

static double inner_product(const float *left, const float *more, const float *right, int64_t size) {
    return more ? inner_product_of(left, more, right, size) : inner_product_of(left, NULL, right, size);
}

/* |values|, also where the square of an entry is out of the range of single precision. */
static double length_of(const float *values, int64_t size) {
    double sums[8] = {0};
    int64_t i = 0;
    for (; i + 8 <= size; i += 8)
        for (int lane = 0; lane < 8; lane++) sums[lane] += (double)values[i + lane] * values[i + lane];
    for (; i < size; i++) sums[0] += (double)values[i] * values[i];
    return sqrt(((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7])));
}

/* Algebra of eight by eight ---------------------------------------------------------------------------------------- */

typedef double small[TRACKED][TRACKED];

/* Of (size, 8): its columns with each other. */
static void gram_of_columns(const float *values, int64_t size, small gram) {
    memset(gram, 0, sizeof(small));
    for (int64_t block = 0; block < size; block += BLOCK) {
        vec8 sums[TRACKED] = {{0}};
        for (int64_t i = block; i < least(block + BLOCK, size); i++) {
            vec8 row = *(const vec8_in_memory *)(values + i * TRACKED);
            UNROLL(8)
            for (int k = 0; k < TRACKED; k++) sums[k] += row[k] * row;
        }
        for (int k = 0; k < TRACKED; k++)
            for (int l = 0; l < TRACKED; l++) gram[k][l] += sums[k][l];
    }
}

/* Of (8, size): its rows with each other. */
static void gram_of_rows(const float *values, int64_t size, small gram) {
    memset(gram, 0, sizeof(small));
    for (int64_t block = 0; block < size; block += BLOCK) {
        int64_t length = least(BLOCK, size - block);
        for (int k = 0; k < TRACKED; k++)
            for (int l = 0; l <= k; l++)
                gram[k][l] += inner_product(values + k * size + block, NULL, values + l * size + block, length);
    }
    for (int k = 0; k < TRACKED; k++)
        for (int l = 0; l < k; l++) gram[l][k] = gram[k][l];
}

static void multiplied(const small left, const small right, small out) {
    for (int i = 0; i < TRACKED; i++)
        for (int j = 0; j < TRACKED; j++) {
            double sum = 0;
            for (int k = 0; k < TRACKED; k++) sum += left[i][k] * right[k][j];
            out[i][j] = sum;
        }
}

/* T with T G T' = I, lower triangular; a row of the frame without a direction of its own comes out short. */
static int whitening(const small gram, small white) {
    double scale[TRACKED];
    small factor;
    memset(white, 0, sizeof(small));
    for (int i = 0; i < TRACKED; i++) scale[i] = gram[i][i] > TINY ? 1 / sqrt(gram[i][i]) : 0;
    for (int i = 0; i < TRACKED; i++)
        for (int j = 0; j <= i; j++) {
            double sum = gram[i][j] * scale[i] * scale[j] + (i == j ? 64 * EPSILON : 0);
            for (int k = 0; k < j; k++) sum -= factor[i][k] * factor[j][k];
            if (i == j && !(sum > 0 && sum < INFINITY)) return 0;
            factor[i][j] = i == j ? sqrt(sum) : sum / factor[j][j];
        }
    for (int j = 0; j < TRACKED; j++)
        for (int i = j; i < TRACKED; i++) {
            double sum = i == j ? scale[j] : 0;
            for (int k = j; k < i; k++) sum -= factor[i][k] * white[k][j];
            white[i][j] = sum / factor[i][i];
        }
    return 1;
}

/* The eigenvectors of a symmetric matrix in rows, that of the largest eigenvalue first: Jacobi's rotations. */
static void rotation(small gram, small turn) {
    double size = 0;
    memset(turn, 0, sizeof(small));
    for (int i = 0; i < TRACKED; i++) {
        turn[i][i] = 1;
        size += fabs(gram[i][i]);
    }
    for (int sweep = 0; sweep < 16; sweep++) {
        double rest = 0;
        for (int i = 0; i < TRACKED; i++)
            for (int j = 0; j < i; j++) rest += gram[i][j] * gram[i][j];
        if (!(rest > 1e-22 * size * size)) break;
        for (int i = 1; i < TRACKED; i++)
            for (int j = 0; j < i; j++) {
                if (gram[i][j] == 0) continue;
                double angle = (gram[i][i] - gram[j][j]) / (2 * gram[i][j]);
                double t = (angle < 0 ? -1 : 1) / (fabs(angle) + sqrt(angle * angle + 1));
                double c = 1 / sqrt(t * t + 1), s = t * c;
                for (int k = 0; k < TRACKED; k++) {
                    double first = gram[j][k], second = gram[i][k];
                    gram[j][k] = c * first - s * second;
                    gram[i][k] = s * first + c * second;
                    first = turn[j][k], second = turn[i][k];
                    turn[j][k] = c * first - s * second;
                    turn[i][k] = s * first + c * second;
                }
                for (int k = 0; k < TRACKED; k++) {
                    double first = gram[k][j], second = gram[k][i];
                    gram[k][j] = c * first - s * second;
                    gram[k][i] = s * first + c * second;
                }
            }
    }
    for (int i = 0; i < TRACKED; i++) {
        int largest = i;
        for (int j = i + 1; j < TRACKED; j++)
            if (gram[j][j] > gram[largest][largest]) largest = j;
        double value = gram[i][i];
        gram[i][i] = gram[largest][largest];
        gram[largest][largest] = value;
        for (int k = 0; k < TRACKED; k++) {
            value = turn[i][k];
            turn[i][k] = turn[largest][k];
            turn[largest][k] = value;
        }
    }
}

/* What turns images of a frame into the next frame, `_ritz_turns` of tracking.py. The identity where there is nothing
 * to be found: what is not finite stays so, and is seen by its norm. */
static void ritz_turn(const small starts, const small images, float out[TRACKED][TRACKED]) {
    small white, upper, half, gram, turned, turn;
    for (int i = 0; i < TRACKED; i++)
        for (int j = 0; j < TRACKED; j++) out[i][j] = i == j;
    int is_finite = whitening(starts, white);
    for (int i = 0; i < TRACKED; i++)
        for (int j = 0; j < TRACKED; j++) {
            is_finite &= isfinite(images[i][j]) != 0;
            upper[i][j] = white[j][i];
        }
    if (!is_finite) return;
    multiplied(white, images, half);
    multiplied(half, upper, gram);
    rotation(gram, turned);
    multiplied(turned, white, turn);
    multiplied(turn, images, half);
    double shortest = 0;
    for (int i = 0; i < TRACKED; i++) {
        double length = 0;
        for (int k = 0; k < TRACKED; k++) length += half[i][k] * turn[i][k];
        /* A row shorter than the rounding of the longest has no direction of its own: it comes out short. */
        if (i == 0) shortest = EPSILON * length + TINY;
        double scale = 1 / sqrt(length > shortest ? length : shortest);
        for (int k = 0; k < TRACKED; k++) out[i][k] = (float)(turn[i][k] * scale);
    }
}

/* Rows of ``turn`` times (8, size). */
static void turned_rows(float turn[TRACKED][TRACKED], int rows, const float *images, int64_t size, float *out) {
    for (int64_t i = 0; i < size; i += WIDTH) {
        int64_t part = least(WIDTH, size - i);
        vec image[TRACKED];
        for (int k = 0; k < TRACKED; k++)
            image[k] = part == WIDTH ? load(images + k * size + i) : load_part(images + k * size + i, part);
        for (int row = 0; row < rows; row++) {
            vec sum = turn[row][0] * image[0];
            UNROLL(8)
            for (int k = 1; k < TRACKED; k++) sum += turn[row][k] * image[k];
            if (part == WIDTH)
                store(out + row * size + i, sum);
            else
                store_part(out + row * size + i, sum, part);
        }
    }
}

/* Dividing --------------------------------------------------------------------------------------------------------- */

enum rule_field { COEFFICIENT, THRESHOLD, CONSTANT, RULE_WIDTH };

/* Where weights are divided, and what came of it. */
typedef struct {
    const int64_t *weights, *targets, *sizes; /* addresses, entries */
    const double *rules;
    float *divisors;
    int8_t *active;
    int is_streamed;
} division;

/* What a weight of this norm is divided by; whether that depends on the norm. */
static double divisor_of(const double *rule, float sigma, int8_t *active) {
    *active = sigma > rule[THRESHOLD]; /* false for NaN */
    return *active ? sigma / rule[COEFFICIENT] : rule[CONSTANT];
}

static void decide(const division *how, int64_t which, float sigma) {
    how->divisors[which] = (float)divisor_of(how->rules + which * RULE_WIDTH, sigma, how->active + which);
}

/* A thread's share of one weight. */
static void divide(const division *how, int64_t which, const team *all, int thread) {
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

/* Each weight divided by its norm. */
void spectralnorm_divide(const int64_t *weights, const int64_t *targets, const int64_t *sizes, int64_t num_weights,
                         const double *rules, const float *sigmas, float *divisors, int8_t *active, int threads) {
    dividing these = {{weights, targets, sizes, rules, divisors, active, 0}, num_weights};
    int64_t entries = 0;
    for (int64_t which = 0; which < num_weights; which++) {
        decide(&these.how, which, sigmas[which]);
        entries += sizes[which];
    }
    these.how.is_streamed = entries >= STREAMED;
    together(divide_all, &these, entries, threads);
}

/* A power of two that brings entries near to one, so that squares stay in range; one where they are near enough. */
static float scale_for(const float *values, int64_t size) {
    float largest = 0;
    int exponent;
    for (int64_t i = 0; i < size; i++) largest = fabsf(values[i]) > largest ? fabsf(values[i]) : largest;
    if (!(largest > 0 && largest < INFINITY)) return 1;
    frexpf(largest, &exponent);
    if (-20 <= exponent && exponent <= 40) return 1;
    return ldexpf(1, exponent > -120 ? -exponent : 120);
}

/* Following -------------------------------------------------------------------------------------------------------- */

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
        for (int k = 0; k < TRACKED; k++)
            for (int64_t i = 0; i < m; i++) start[k * row_step + i * step] = frame[k * m + i];
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
 * division. Returns 0, or 1 where there is no memory. */
int spectralnorm_renew(const int64_t *maps, const int64_t *first_maps, int64_t num_weights, const float *frames,
                       const float *directions, const int64_t *ages, float *next, float *vectors, float *sigmas,
                       float *weight_sigmas, double eps, const int64_t *weights, const int64_t *targets,
                       const int64_t *sizes, const double *rules, float *divisors, int8_t *active, int threads) {
    int64_t entries = 0, size = 0;
    for (int64_t number = 0; number < first_maps[num_weights]; number++) {
        const int64_t *map = maps + number * MAP_WIDTH;
        int64_t both = (TRACKED + 1) * (map[ROWS] + map[OUTERS] * map[INNER]);
        entries += entries_of(map);
        size = both > size ? both : size;
    }
    size = (size + 31) / 16 * 16;
    threads = threads < 1 ? 1 : threads > MOST_THREADS ? MOST_THREADS : threads;
    float *scratch = malloc(sizeof(float) * size * (threads + 1));
    if (!scratch) return 1;
    division how = {weights, targets, sizes, rules, divisors, active, entries >= STREAMED};
    following all = {maps, first_maps, ages, num_weights, frames, directions, next, vectors, sigmas, weight_sigmas,
                     scratch, size, eps, targets ? &how : NULL};
    /* By entries and not by products: where another process has the core, a thread is waited for as long as a whole
     * model of small weights takes. */
    together(renew_all, &all, entries, threads);
    free(scratch);
    return 0;
}

/* Its gradient ----------------------------------------------------------------------------------------------------- */

enum call_field {
    CALL_ROWS, CALL_OUTERS, CALL_INNER, CALL_OUTER_STRIDE, CALL_ROW_STRIDE, CALL_IS_TRANSPOSED,
    CALL_ROW_PLACE_INNER, CALL_ROW_PLACE_OUTER_STRIDE, CALL_ROW_PLACE_STRIDE,
    CALL_COLUMN_PLACE_INNER, CALL_COLUMN_PLACE_OUTER_STRIDE, CALL_COLUMN_PLACE_STRIDE,
    CALL_WIDTH
};

typedef struct {
    const int64_t *calls, *values, *targets, *ends; /* of all weights; the last three are addresses, the last of u and v */
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

/* The inverse of `placed`. */
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
    int8_t active;
    double divisor = divisor_of(these->rules + which * RULE_WIDTH, these->sigmas[which], &active);
    float factor = (float)(1 / (double)(float)divisor);
    int64_t begin, end;
    meet(barrier); /* nobody reads what the last one left */
    if (thread == 0) {
        if (active) {
            int64_t along_rows = ends[call[CALL_IS_TRANSPOSED]], along_columns = ends[!call[CALL_IS_TRANSPOSED]];
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
                           const int64_t *grads, const int64_t *places, int64_t num_calls, int64_t all_entries,
                           const double *rules, const float *sigmas, int threads) {
    differentiating these = {.calls = calls, .values = values, .targets = targets, .ends = ends, .grads = grads,
                             .more_grads = grads + num_calls, .places = places, .num_calls = num_calls, .rules = rules,
                             .sigmas = sigmas, .is_streamed = all_entries >= STREAMED};
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

/* Storing ---------------------------------------------------------------------------------------------------------- */

/* Each vector copied to where it is kept, if the norm of its owner is one. */
void spectralnorm_store(const int64_t *sources, const int64_t *targets, const int64_t *sizes, const int64_t *owners,
                        int64_t num_vectors, const float *sigmas, double eps) {
    for (int64_t i = 0; i < num_vectors; i++) {
        float sigma = sigmas[owners[i]];
        if (sigma > eps && sigma < INFINITY)
            memcpy((void *)(intptr_t)targets[i], (const void *)(intptr_t)sources[i], sizeof(float) * sizes[i]);
    }
}
