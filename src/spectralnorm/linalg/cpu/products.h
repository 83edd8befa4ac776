/* Products of matrices with the vectors of a frame, and of vectors with each other. */

#ifndef SPECTRALNORM_PRODUCTS_H
#define SPECTRALNORM_PRODUCTS_H

#include <stdint.h>

#include "threads.h"
#include "vectors.h"

#define TRACKED 8 /* rows of a frame */
#define BLOCK 512 /* terms of a sum in single precision */

/* Entry (row, outer * inner + place) of a matrix lies at row * row_stride + outer * outer_stride + place. */
typedef struct {
    const float *base;
    int64_t rows, outers, inner, outer_stride, row_stride;
} matrix;

/* A thread's share of the rows of a frame through a matrix: from its rows, ``start`` being (rows, TRACKED), or from its
 * columns, ``start`` being (TRACKED, columns). ``sums`` is (TRACKED, the other side). */
INTERNAL void product_of_frame(const matrix *a, int from_rows, const float *start, float *sums, const team *all,
                               int number);

/* The same of one vector. */
INTERNAL void product_of_vector(const matrix *a, int from_rows, const float *start, float *sums, const team *all,
                                int number);

/* A run of entries, or of the sums of two of them. */
ALWAYS vec load_sum(const float *from, const float *more, int64_t i) {
    return more ? load(from + i) + load(more + i) : load(from + i);
}

ALWAYS vec load_part_of_sum(const float *from, const float *more, int64_t i, int64_t count) {
    return more ? load_part(from + i, count) + load_part(more + i, count) : load_part(from + i, count);
}

/* <left + more, right>, in blocks; of left alone where there is no more. */
INTERNAL double inner_product(const float *left, const float *more, const float *right, int64_t size);

/* |values|, also where the square of an entry is out of the range of single precision. */
INTERNAL double length_of(const float *values, int64_t size);

#endif
