/* The sizes of what lies in panels, and the kernel of a convolution packed for the products of its symbol.
 *
 * What every argument means is told in panels.py beside this file.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "panels.h"
#include "threads.h"
#include "vectors.h"

/* Rows of a panel in memory. */
int spectralnorm_panel_rows(void) { return TALL; }

int64_t spectralnorm_panel_matrix_size(int64_t rows) {
    return panel_start(panels_of(rows) - 1) + width_of(rows) * COLUMN;
}

typedef struct {
    const float *kernel;
    int64_t groups, rows, columns, taps, group_stride, row_stride;
    const int64_t *column_offsets, *tap_offsets;
    float *out;
    uint32_t *largest; /* of each panel */
    double *squares;   /* of each panel and tap */
} packing;

/* The bits of a modulus, which are in the order of the numbers, and those of what is none after all others. */
ALWAYS uint32_t modulus(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits & 0x7fffffffu;
}

/* Panel by panel: its rows are read as so many streams, and a line of the cache is written at once. */
static void pack_share(void *arguments, team *all, int thread) {
    const packing *this = arguments;
    int64_t panels = panels_of(this->rows), begin, end;
    share(this->groups * panels, 1, all, thread, &begin, &end);
    for (int64_t at = begin; at < end; at++) {
        int64_t group = at / panels, first = at % panels * TALL, rows = least(TALL, this->rows - first);
        const float *from = this->kernel + group * this->group_stride + first * this->row_stride;
        float *to = this->out + group * this->taps * this->columns * panels * TALL + first;
        uint32_t largest[TALL] = {0};
        for (int64_t tap = 0; tap < this->taps; tap++) this->squares[at * this->taps + tap] = 0;
        for (int64_t next = 0; next < this->columns; next += DEPTH)
            for (int64_t tap = 0; tap < this->taps; tap++) {
                float squares[TALL] = {0};
                for (int64_t column = next; column < least(next + DEPTH, this->columns); column++) {
                    const float *entries = from + this->column_offsets[column] + this->tap_offsets[tap];
                    float *out = to + (tap * this->columns + column) * panels * TALL;
                    for (int64_t row = 0; row < rows; row++) out[row] = entries[row * this->row_stride];
                    for (int64_t row = rows; row < TALL; row++) out[row] = 0;
                    for (int64_t row = 0; row < TALL; row++) {
                        uint32_t bits = modulus(out[row]);
                        largest[row] = bits > largest[row] ? bits : largest[row];
                        squares[row] += out[row] * out[row];
                    }
                }
                for (int64_t row = 0; row < TALL; row++) this->squares[at * this->taps + tap] += squares[row];
            }
        for (int64_t row = 1; row < TALL; row++) largest[0] = largest[row] > largest[0] ? largest[row] : largest[0];
        this->largest[at] = largest[0];
    }
}

/* A kernel as (groups, taps, columns, rows) with rows filled up with zeros. Found on the way: the largest modulus, none
 * if one of the entries is none; and the sum over taps of Frobenius norms, of the group that has the largest, of sums
 * of DEPTH squares in single precision. Returns 0, or 1 where there is no memory. */
int spectralnorm_pack_kernel(const float *kernel, int64_t groups, int64_t rows, int64_t columns, int64_t taps,
                             int64_t group_stride, int64_t row_stride, const int64_t *column_offsets,
                             const int64_t *tap_offsets, float *out, double *largest, double *tap_sum, int threads) {
    int64_t panels = panels_of(rows), parts = groups * panels;
    double *squares = malloc((sizeof(double) * taps + sizeof(uint32_t)) * parts);
    if (!squares) return 1;
    uint32_t *bits = (uint32_t *)(squares + parts * taps), most = 0;
    packing this = {kernel,     groups,         rows,        columns, taps, group_stride,
                    row_stride, column_offsets, tap_offsets, out,     bits, squares};
    together(pack_share, &this, groups * rows * columns * taps, threads);
    *tap_sum = 0;
    for (int64_t group = 0; group < groups; group++) {
        double sum = 0;
        for (int64_t tap = 0; tap < taps; tap++) {
            double square = 0;
            for (int64_t panel = 0; panel < panels; panel++) square += squares[(group * panels + panel) * taps + tap];
            sum += sqrt(square);
        }
        if (!(sum <= *tap_sum)) *tap_sum = sum;
    }
    for (int64_t part = 0; part < parts; part++) most = bits[part] > most ? bits[part] : most;
    float modulus_of_all;
    memcpy(&modulus_of_all, &most, sizeof most);
    *largest = modulus_of_all;
    free(squares);
    return 0;
}
