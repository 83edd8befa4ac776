/* Products of matrices with the vectors of a frame, and of vectors with each other.
 *
 * A matrix is read once for all rows of a frame, whose sums stay in registers and in the first cache.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "products.h"
#include "threads.h"
#include "vectors.h"

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

#define SLAB 16         /* rows that one pass over columns takes, as many streams as a prefetcher follows */
#define PANEL 512       /* columns, so that eight rows of their sums stay in the first cache */
#define LONG_PANEL 1024 /* the same of sums along rows, for eight rows of a frame */

/* Fetched into the second cache; an address that is nobody's does no harm. */
ALWAYS void ahead(const float *from) { __builtin_prefetch(from, 0, 2); }

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

/* Of ``count`` vectors, as `product_of_frame`. */
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

void product_of_frame(const matrix *a, int from_rows, const float *start, float *sums, const team *all,
                      int number) {
    product(a, from_rows, start, sums, all, number, TRACKED, ROWS_AT_ONCE);
}

void product_of_vector(const matrix *a, int from_rows, const float *start, float *sums, const team *all,
                       int number) {
    product(a, from_rows, start, sums, all, number, 1, 4);
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

double inner_product(const float *left, const float *more, const float *right, int64_t size) {
    return more ? inner_product_of(left, more, right, size) : inner_product_of(left, NULL, right, size);
}

double length_of(const float *values, int64_t size) {
    double sums[8] = {0};
    int64_t i = 0;
    for (; i + 8 <= size; i += 8)
        for (int lane = 0; lane < 8; lane++) sums[lane] += (double)values[i + lane] * values[i + lane];
    for (; i < size; i++) sums[0] += (double)values[i] * values[i];
    return sqrt(((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7])));
}
