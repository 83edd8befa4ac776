/* Cholesky factorizations of matrices in panels, which look left.
 *
 * What they prove is told in spectralnorm/linalg/symbol.py; what every argument means, in panels.py beside this file.
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
    const int64_t *which;
    int64_t count, rows;
    double square;
    int8_t *passed;
    float *scratch;
} factorization;

/* sum over k of a[k] conj(b[k]) for TALL rows of a and NARROW of b, which are given at their first column. */
ALWAYS void tile(const float *a, const float *b, int64_t depth, sums *out) {
    vec re[NARROW][UNITS] = {{{0}}}, im[NARROW][UNITS] = {{{0}}};
    for (int64_t k = 0; k < depth; k++) {
        vec ar[UNITS], ai[UNITS];
        UNROLL(2)
        for (int u = 0; u < UNITS; u++) {
            ar[u] = load(a + u * WIDTH);
            ai[u] = load(a + TALL + u * WIDTH);
        }
        UNROLL(4)
        for (int j = 0; j < NARROW; j++) {
            float br = b[j], bi = b[TALL + j];
            UNROLL(2)
            for (int u = 0; u < UNITS; u++) {
                re[j][u] += ar[u] * br;
                re[j][u] += ai[u] * bi;
                im[j][u] += ai[u] * br;
                im[j][u] -= ar[u] * bi;
            }
        }
        a += COLUMN;
        b += COLUMN;
    }
    UNROLL(4)
    for (int j = 0; j < NARROW; j++)
        UNROLL(2)
        for (int u = 0; u < UNITS; u++) {
            out->re[j][u] = re[j][u];
            out->im[j][u] = im[j][u];
        }
}

/* ``square`` I - G less the products of the columns so far, for NARROW columns of a panel. */
ALWAYS void subtract(const float *gram, double square, const float *factor, const float *rows, int64_t column,
                     int is_on_diagonal, float *out) {
    vec re[NARROW][UNITS], im[NARROW][UNITS];
    UNROLL(4)
    for (int c = 0; c < NARROW; c++) {
        if (is_on_diagonal) {
            /* Only here is a number added, and rounded once. */
            float entries[TALL];
            memcpy(entries, gram + c * COLUMN, sizeof entries);
            UNROLL(32)
            for (int i = 0; i < TALL; i++) entries[i] = -entries[i];
            int64_t row = column % TALL + c;
            entries[row] = (float)(square + (double)entries[row]);
            UNROLL(2)
            for (int u = 0; u < UNITS; u++) re[c][u] = load(entries + u * WIDTH);
        } else
            UNROLL(2)
            for (int u = 0; u < UNITS; u++) re[c][u] = -load(gram + c * COLUMN + u * WIDTH);
        UNROLL(2)
        for (int u = 0; u < UNITS; u++) im[c][u] = -load(gram + c * COLUMN + TALL + u * WIDTH);
    }
    for (int64_t first = 0; first < column; first += DEPTH) {
        sums found;
        tile(factor + first * COLUMN, rows + first * COLUMN, least(DEPTH, column - first), &found);
        UNROLL(4)
        for (int c = 0; c < NARROW; c++)
            UNROLL(2)
            for (int u = 0; u < UNITS; u++) {
                re[c][u] -= found.re[c][u];
                im[c][u] -= found.im[c][u];
            }
    }
    UNROLL(4)
    for (int c = 0; c < NARROW; c++)
        UNROLL(2)
        for (int u = 0; u < UNITS; u++) {
            store(out + c * COLUMN + u * WIDTH, re[c][u]);
            store(out + c * COLUMN + TALL + u * WIDTH, im[c][u]);
        }
}

/* The corner of NARROW columns that is on the diagonal: what divides a column, and what the rows below it are. */
typedef struct {
    float roots[NARROW], re[NARROW][NARROW], im[NARROW][NARROW];
} corner;

/* NARROW columns of a panel times the inverse adjoint of a corner; 0 where there is no such corner. That is found in
 * the panel on the diagonal, at ``row``, from the very numbers that are stored there. */
ALWAYS int solve(float *panel, corner *of, int64_t row, const int is_on_diagonal) {
    vec re[NARROW][UNITS], im[NARROW][UNITS];
    UNROLL(4)
    for (int c = 0; c < NARROW; c++) {
        float *of_re = panel + c * COLUMN, *of_im = of_re + TALL;
        UNROLL(2)
        for (int u = 0; u < UNITS; u++) {
            re[c][u] = load(of_re + u * WIDTH);
            im[c][u] = load(of_im + u * WIDTH);
            UNROLL(4)
            for (int k = 0; k < c; k++) {
                re[c][u] -= re[k][u] * of->re[c][k] + im[k][u] * of->im[c][k];
                im[c][u] -= im[k][u] * of->re[c][k] - re[k][u] * of->im[c][k];
            }
        }
        if (is_on_diagonal) {
            UNROLL(2)
            for (int u = 0; u < UNITS; u++) store(of_re + u * WIDTH, re[c][u]);
            float square = of_re[row + c];
            if (!(square > 0 && square < INFINITY)) return 0;
            of->roots[c] = sqrtf(square);
        }
        UNROLL(2)
        for (int u = 0; u < UNITS; u++) {
            re[c][u] /= of->roots[c];
            im[c][u] /= of->roots[c];
            store(of_re + u * WIDTH, re[c][u]);
            store(of_im + u * WIDTH, im[c][u]);
        }
        if (is_on_diagonal)
            for (int i = c + 1; i < NARROW; i++) {
                of->re[i][c] = of_re[row + i];
                of->im[i][c] = of_im[row + i];
            }
    }
    return 1;
}

static int has_factor(const float *gram, int64_t of_rows, double square, float *factor) {
    int64_t panels = panels_of(of_rows), width = width_of(of_rows);
    for (int64_t column = 0; column < width; column += NARROW) {
        int64_t first = column / TALL;
        const float *rows = factor + panel_start(first) + column % TALL;
        corner of = {{0}, {{0}}, {{0}}};
        for (int64_t panel = first; panel < panels; panel++) {
            float *of_panel = factor + panel_start(panel), *out = of_panel + column * COLUMN;
            subtract(gram + panel_start(panel) + column * COLUMN, square, of_panel, rows, column, panel == first, out);
            if (panel > first)
                solve(out, &of, 0, 0);
            else if (!solve(out, &of, column % TALL, 1))
                return 0;
        }
    }
    return 1;
}

static void factorize_share(void *arguments, team *all, int thread) {
    const factorization *this = arguments;
    int64_t size = spectralnorm_panel_matrix_size(this->rows);
    for (;;) {
        int64_t next = atomic_fetch_add(&all->next, 1);
        if (next >= this->count) break;
        int64_t which = this->which ? this->which[next] : next;
        this->passed[next] = (int8_t)has_factor(this->grams + which * size, this->rows, this->square,
                                                this->scratch + thread * size);
    }
}

/* Find those of which ``square`` I - G has no Cholesky factor: their number, and in ``failed`` their places. Returns
 * that number, or -1 where there is no memory. */
int64_t spectralnorm_factorize(const float *grams, const int64_t *which, int64_t count, int64_t rows, double square,
                               int64_t *failed, int threads) {
    threads = threads < 1 ? 1 : threads > MOST_THREADS ? MOST_THREADS : threads;
    int64_t size = (spectralnorm_panel_matrix_size(rows) + 15) / 16 * 16;
    float *scratch = aligned(sizeof(float) * size * threads + count);
    if (!scratch) return -1;
    int8_t *passed = (int8_t *)(scratch + size * threads);
    factorization this = {grams, which, count, rows, square, passed, scratch};
    together(factorize_share, &this, count * rows * rows / FLOPS_OF_ENTRY * rows, threads);
    int64_t found = 0;
    for (int64_t place = 0; place < count; place++)
        if (!passed[place]) failed[found++] = place;
    free(scratch);
    return found;
}
