/* Complex matrices in panels.
 *
 * Rows come in panels of TALL. A panel is columns of TALL real parts and as many imaginary parts, side by side. Of a
 * Hermitian matrix, or a triangular factor, the panel number p has the columns up to its diagonal, (p + 1) TALL of them
 * or, in the last panel, the rows' number in NARROWs; panels follow one another. What is above the diagonal in the last
 * TALL columns of a panel of a factor means nothing. Rows that only fill up the last panel are zero.
 *
 * With that, products and factorizations are one operation, a tile: sums over columns that follow one another in
 * memory, for TALL rows and NARROW of them. Sums are of DEPTH columns in registers, and of those sums. All have an
 * order that depends on the sizes alone.
 */

#ifndef SPECTRALNORM_PANELS_H
#define SPECTRALNORM_PANELS_H

#include <stdint.h>
#include <stdlib.h>

#include "vectors.h"

#if defined(__AVX512F__) || defined(__aarch64__)
#define UNITS 2 /* vectors of rows at once; with NARROW columns, twice eight sums of the 32 registers */
#else
#define UNITS 1
#endif

#define TALL (UNITS * WIDTH)
#define COLUMN (2 * TALL) /* numbers of a column of a panel */
#define NARROW 4          /* columns at once */
#define DEPTH 64          /* columns whose sum stays in registers; TALL rows of them stay in the first cache */
#define FLOPS_OF_ENTRY 16 /* of arithmetic that is worth as much as an entry that is read from memory */

typedef struct {
    vec re[NARROW][UNITS], im[NARROW][UNITS];
} sums;

/* Memory for floats from the start of a line of the cache on. */
ALWAYS float *aligned(size_t bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }

ALWAYS int64_t panel_start(int64_t panel) { return panel * (panel + 1) / 2 * TALL * COLUMN; }

ALWAYS int64_t panels_of(int64_t rows) { return (rows + TALL - 1) / TALL; }

/* Columns of a matrix with so many rows; of the panels up to one of them. */
ALWAYS int64_t width_of(int64_t rows) { return (rows + NARROW - 1) / NARROW * NARROW; }
ALWAYS int64_t columns_of(int64_t rows, int64_t panel) { return least((panel + 1) * TALL, width_of(rows)); }

/* Numbers of a matrix with so many rows. */
int64_t spectralnorm_panel_matrix_size(int64_t rows);

ALWAYS float diagonal(const float *matrix, int64_t row) {
    return matrix[panel_start(row / TALL) + row * COLUMN + row % TALL];
}

#endif
