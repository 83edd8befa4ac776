/* Power iteration with Hermitian matrices in panels, each entry of a half read once for a step.
 *
 * What every argument means is told in panels.py beside this file.
 */

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "panels.h"
#include "threads.h"
#include "vectors.h"

typedef struct {
    const float *grams;
    const int64_t *which, *slots; /* the matrix of each slot, and the slots that are meant; NULL: all in their order */
    int64_t count, rows, iterations;
    int is_cold;
    float *vectors; /* (slots, rows) pairs of real and imaginary part, overwritten */
    double *values; /* of slots */
    float *scratch;
} iteration;

/* y = x G for a row x, y apart from x: real parts, then imaginary parts, of ``order`` each. */
static void row_product(const float *gram, int64_t rows, const float *x, float *y, float *across) {
    int64_t panels = panels_of(rows), order = panels * TALL;
    memset(across, 0, sizeof(float) * 2 * WIDTH * order);
    for (int64_t panel = 0; panel < panels; panel++) {
        const float *column = gram + panel_start(panel);
        int64_t width = columns_of(rows, panel);
        vec re[UNITS] = {{0}}, im[UNITS] = {{0}}, xr[UNITS], xi[UNITS];
        UNROLL(2)
        for (int u = 0; u < UNITS; u++) {
            xr[u] = load(x + panel * TALL + u * WIDTH);
            xi[u] = load(x + order + panel * TALL + u * WIDTH);
        }
        for (int64_t k = 0; k < width; k++, column += COLUMN) {
            float of_re = x[k], of_im = x[order + k];
            vec down_re = {0}, down_im = {0};
            UNROLL(2)
            for (int u = 0; u < UNITS; u++) {
                vec gr = load(column + u * WIDTH), gi = load(column + TALL + u * WIDTH);
                re[u] += gr * of_re + gi * of_im;
                im[u] += gr * of_im - gi * of_re;
                down_re += gr * xr[u] - gi * xi[u];
                down_im += gr * xi[u] + gi * xr[u];
            }
            if (k < panel * TALL) { /* the columns of the diagonal block are complete in themselves */
                float *sum = across + 2 * WIDTH * k;
                store(sum, load(sum) + down_re);
                store(sum + WIDTH, load(sum + WIDTH) + down_im);
            }
        }
        UNROLL(2)
        for (int u = 0; u < UNITS; u++) {
            store(y + panel * TALL + u * WIDTH, re[u]);
            store(y + order + panel * TALL + u * WIDTH, im[u]);
        }
    }
    for (int64_t k = 0; k < order; k++) {
        y[k] += sum_of(load(across + 2 * WIDTH * k));
        y[order + k] += sum_of(load(across + 2 * WIDTH * k + WIDTH));
    }
}

static void make_unit(float *x, int64_t count) {
    double square = 0;
    for (int64_t i = 0; i < count; i++) square += (double)x[i] * x[i];
    float factor = (float)(1 / sqrt(square > 1e-60 ? square : 1e-60));
    for (int64_t i = 0; i < count; i++) x[i] *= factor;
}

/* The row of the largest diagonal entry. */
static void start_from(const float *gram, int64_t order, int64_t rows, float *x) {
    int64_t best = 0;
    for (int64_t row = 1; row < rows; row++)
        if (diagonal(gram, row) > diagonal(gram, best)) best = row;
    for (int64_t k = 0; k < rows; k++) {
        int64_t row = k / TALL >= best / TALL ? k : best, column = k / TALL >= best / TALL ? best : k;
        const float *entry = gram + panel_start(row / TALL) + column * COLUMN + row % TALL;
        x[k] = entry[0];
        x[order + k] = row == best && row != column ? entry[TALL] : -entry[TALL];
    }
}

static void iterate_share(void *arguments, team *all, int thread) {
    const iteration *this = arguments;
    int64_t rows = this->rows, order = panels_of(rows) * TALL, size = spectralnorm_panel_matrix_size(rows);
    float *x = this->scratch + thread * (4 + 2 * WIDTH) * order, *y = x + 2 * order, *across = y + 2 * order;
    for (;;) {
        int64_t next = atomic_fetch_add(&all->next, 1);
        if (next >= this->count) break;
        int64_t slot = this->slots ? this->slots[next] : next;
        const float *gram = this->grams + (this->which ? this->which[slot] : slot) * size;
        float *kept = this->vectors + slot * 2 * rows;
        memset(x, 0, sizeof(float) * 2 * order);
        if (this->is_cold)
            start_from(gram, order, rows, x);
        else
            for (int64_t i = 0; i < rows; i++) {
                x[i] = kept[2 * i];
                x[order + i] = kept[2 * i + 1];
            }
        for (int64_t turn = 0; turn <= this->iterations; turn++) {
            if (turn) memcpy(x, y, sizeof(float) * 2 * order);
            make_unit(x, 2 * order);
            row_product(gram, rows, x, y, across);
        }
        double value = 0;
        for (int64_t i = 0; i < 2 * order; i++) value += (double)x[i] * y[i];
        this->values[slot] = value;
        for (int64_t i = 0; i < rows; i++) {
            kept[2 * i] = x[i];
            kept[2 * i + 1] = x[order + i];
        }
    }
}

/* Rayleigh quotients after some power iterations, and the vectors; then those of the ``num_leading`` largest after some
 * more. Returns 0, or 1 where there is no memory. */
int spectralnorm_follow(const float *grams, const int64_t *which, int64_t count, int64_t rows, int64_t iterations,
                        int64_t num_leading, int64_t more_iterations, int is_cold, float *vectors, double *values,
                        int threads) {
    threads = threads < 1 ? 1 : threads > MOST_THREADS ? MOST_THREADS : threads;
    int64_t order = panels_of(rows) * TALL;
    num_leading = least(num_leading, count);
    float *scratch = aligned(sizeof(float) * (4 + 2 * WIDTH) * order * threads);
    int64_t *leading = malloc(sizeof(int64_t) * (num_leading + 1));
    if (scratch && leading) {
        iteration this = {grams, which, NULL, count, rows, iterations, is_cold, vectors, values, scratch};
        together(iterate_share, &this, count * rows * rows * (iterations + 1), threads);
        for (int64_t found = 0; found < num_leading; found++) {
            int64_t best = -1;
            for (int64_t slot = 0; slot < count; slot++) {
                int is_known = 0;
                for (int64_t other = 0; other < found; other++) is_known |= leading[other] == slot;
                if (!is_known && (best < 0 || values[slot] > values[best])) best = slot;
            }
            leading[found] = best;
        }
        this.slots = leading;
        this.count = num_leading;
        this.iterations = more_iterations;
        this.is_cold = 0;
        if (num_leading) together(iterate_share, &this, num_leading * rows * rows * (more_iterations + 1), threads);
    }
    int failed = !(scratch && leading);
    free(scratch);
    free(leading);
    return failed;
}
