/* Gram matrices of a convolution's symbol at samples, and from those at all frequencies.
 *
 * What they are for is told in spectralnorm/linalg/symbol.py; what every argument means, in panels.py beside this file.
 */

#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#include "panels.h"
#include "threads.h"
#include "vectors.h"

/* A compiler would load it again for each use. */
#if defined(__x86_64__)
#define IN_REGISTER(value) __asm__("" : "+v"(value))
#elif defined(__aarch64__)
#define IN_REGISTER(value) __asm__("" : "+w"(value))
#else
#define IN_REGISTER(value)
#endif

/* Gram matrices ---------------------------------------------------------------------------------------------------- */

typedef struct {
    const float *kernel; /* packed */
    int64_t groups, rows, columns, taps, samples, parts;
    const float *cosines, *sines; /* (samples, taps) */
    float *grams, *scratch;
} symbols;

/* A product of complex numbers in three real ones: with a + i b and the conjugate of c + i d,
 *
 *     c (a + b) - b (c - d) + i (c (a + b) - a (c + d)),
 *
 * so a column of the symbol has four parts: real, imaginary, their sum and their difference. */
#define QUADRUPLE (2 * COLUMN)

ALWAYS void add_products(const float *a, const float *b, vec (*total)[UNITS]) {
    vec entries[UNITS];
    UNROLL(2)
    for (int u = 0; u < UNITS; u++) {
        entries[u] = load(a + u * WIDTH);
        IN_REGISTER(entries[u]);
    }
    UNROLL(4)
    for (int j = 0; j < NARROW; j++)
        UNROLL(2)
        for (int u = 0; u < UNITS; u++) total[j][u] += entries[u] * b[j];
}

/* sum over k of a[k] conj(b[k]) for TALL rows of a symbol and NARROW of its rows. */
ALWAYS void symbol_tile(const float *a, const float *b, int64_t depth, sums *out) {
    vec both[NARROW][UNITS] = {{{0}}}, less[NARROW][UNITS] = {{{0}}}, more[NARROW][UNITS] = {{{0}}};
    for (int64_t k = 0; k < depth; k++) {
        add_products(a + 2 * TALL, b, both);
        add_products(a, b + 2 * TALL, more);
        add_products(a + TALL, b + 3 * TALL, less);
        a += QUADRUPLE;
        b += QUADRUPLE;
    }
    UNROLL(4)
    for (int j = 0; j < NARROW; j++)
        UNROLL(2)
        for (int u = 0; u < UNITS; u++) {
            out->re[j][u] = both[j][u] - less[j][u];
            out->im[j][u] = both[j][u] - more[j][u];
        }
}

/* The same where the symbol is real, as at the frequency zero. */
ALWAYS void real_tile(const float *a, const float *b, int64_t depth, sums *out) {
    sums total = {{{{0}}}, {{{0}}}};
    for (int64_t k = 0; k < depth; k++, a += QUADRUPLE, b += QUADRUPLE) add_products(a, b, total.re);
    *out = total;
}

/* Columns of the symbol of a sample, in panels up to ``last``: those of a panel follow one another. */
static void form(const symbols *this, const float *kernel, int64_t sample, int64_t first, int64_t count, int64_t last,
                 float *out) {
    const float *cosines = this->cosines + sample * this->taps, *sines = this->sines + sample * this->taps;
    int64_t order = panels_of(this->rows) * TALL, tap_size = this->columns * order;
    for (int64_t column = 0; column < count; column++)
        for (int64_t panel = 0; panel <= last; panel++) {
            const float *from = kernel + (first + column) * order + panel * TALL;
            float *to = out + (panel * DEPTH + column) * QUADRUPLE;
            vec re[UNITS] = {{0}}, im[UNITS] = {{0}};
            for (int64_t tap = 0; tap < this->taps; tap++, from += tap_size)
                UNROLL(2)
                for (int u = 0; u < UNITS; u++) {
                    vec entries = load(from + u * WIDTH);
                    re[u] += entries * cosines[tap];
                    im[u] += entries * sines[tap];
                }
            UNROLL(2)
            for (int u = 0; u < UNITS; u++) {
                store(to + u * WIDTH, re[u]);
                store(to + TALL + u * WIDTH, im[u]);
                store(to + 2 * TALL + u * WIDTH, re[u] + im[u]);
                store(to + 3 * TALL + u * WIDTH, re[u] - im[u]);
            }
        }
}

static void gram_share(void *arguments, team *all, int thread) {
    const symbols *this = arguments;
    int64_t panels = panels_of(this->rows), size = spectralnorm_panel_matrix_size(this->rows);
    float *columns = this->scratch + thread * panels * DEPTH * QUADRUPLE;
    for (;;) {
        int64_t next = atomic_fetch_add(&all->next, 1);
        if (next >= this->samples * this->groups * this->parts) break;
        int64_t part = next % this->parts, which = next / this->parts;
        int64_t sample = which / this->groups, group = which % this->groups;
        const float *kernel = this->kernel + group * this->taps * this->columns * panels * TALL;
        const float *sines = this->sines + sample * this->taps;
        int is_real = 1;
        for (int64_t tap = 0; tap < this->taps; tap++) is_real &= sines[tap] == 0;
        float *gram = this->grams + which * size;
        /* Every ``parts``th panel from the last one, which has the most columns. */
        int64_t last = panels - 1 - part;
        for (int64_t first = 0; first < this->columns; first += DEPTH) {
            int64_t depth = least(DEPTH, this->columns - first);
            form(this, kernel, sample, first, depth, last, columns);
            for (int64_t panel = last; panel >= 0; panel -= this->parts) {
                float *out = gram + panel_start(panel);
                int64_t width = columns_of(this->rows, panel);
                for (int64_t j = 0; j < width; j += NARROW, out += NARROW * COLUMN) {
                    sums found;
                    const float *a = columns + panel * DEPTH * QUADRUPLE;
                    const float *b = columns + j / TALL * DEPTH * QUADRUPLE + j % TALL;
                    if (is_real)
                        real_tile(a, b, depth, &found);
                    else
                        symbol_tile(a, b, depth, &found);
                    UNROLL(4)
                    for (int c = 0; c < NARROW; c++)
                        UNROLL(2)
                        for (int u = 0; u < UNITS; u++) {
                            float *re = out + c * COLUMN + u * WIDTH, *im = re + TALL;
                            store(re, first ? load(re) + found.re[c][u] : found.re[c][u]);
                            store(im, first ? load(im) + found.im[c][u] : found.im[c][u]);
                        }
                }
            }
        }
    }
}

/* The Gram matrices of the symbol at samples, (samples, groups, size of a matrix), and the largest trace of one.
 * Returns 0, or 1 where there is no memory. */
int spectralnorm_symbol_grams(const float *kernel, int64_t groups, int64_t rows, int64_t columns, int64_t taps,
                              const float *cosines, const float *sines, int64_t samples, float *grams,
                              double *largest_trace, int threads) {
    threads = threads < 1 ? 1 : threads > MOST_THREADS ? MOST_THREADS : threads;
    int64_t panels = panels_of(rows), size = spectralnorm_panel_matrix_size(rows);
    int64_t matrices = samples * groups, parts = least(panels, (2 * threads + matrices - 1) / matrices);
    float *scratch = aligned(sizeof(float) * panels * DEPTH * QUADRUPLE * threads);
    if (!scratch) return 1;
    symbols this = {kernel, groups, rows, columns, taps, samples, parts, cosines, sines, grams, scratch};
    together(gram_share, &this, matrices * rows * rows / FLOPS_OF_ENTRY * columns * 2, threads);
    free(scratch);
    *largest_trace = 0;
    for (int64_t which = 0; which < matrices; which++) {
        double trace = 0;
        for (int64_t row = 0; row < rows; row++) trace += diagonal(grams + which * size, row);
        if (!(trace <= *largest_trace)) *largest_trace = trace;
    }
    return 0;
}

/* From samples to frequencies -------------------------------------------------------------------------------------- */

typedef struct {
    const float *samples, *even, *odd; /* factors are (samples, frequencies) */
    int64_t num_samples, num_frequencies, size, factor_stride;
    float *out;
} interpolation;

ALWAYS void interpolate_column(const interpolation *this, const float *from, float *to, int64_t frequency,
                               const int count) {
    vec re[NARROW][UNITS] = {{{0}}}, im[NARROW][UNITS] = {{{0}}};
    const float *even = this->even + frequency, *odd = this->odd + frequency;
    for (int64_t sample = 0; sample < this->num_samples; sample++) {
        UNROLL(2)
        for (int u = 0; u < UNITS; u++) {
            vec of_re = load(from + u * WIDTH), of_im = load(from + TALL + u * WIDTH);
            UNROLL(4)
            for (int f = 0; f < count; f++) {
                re[f][u] += of_re * even[f];
                im[f][u] += of_im * odd[f];
            }
        }
        from += this->size;
        even += this->factor_stride;
        odd += this->factor_stride;
    }
    UNROLL(4)
    for (int f = 0; f < count; f++)
        UNROLL(2)
        for (int u = 0; u < UNITS; u++) {
            store(to + f * this->size + u * WIDTH, re[f][u]);
            store(to + f * this->size + TALL + u * WIDTH, im[f][u]);
        }
}

static void interpolate_share(void *arguments, team *all, int thread) {
    const interpolation *this = arguments;
    int64_t begin, end;
    share(this->size / COLUMN, 1, all, thread, &begin, &end);
    for (int64_t column = begin; column < end; column++) {
        const float *from = this->samples + column * COLUMN;
        float *to = this->out + column * COLUMN;
        int64_t frequency = 0;
        for (; frequency + NARROW <= this->num_frequencies; frequency += NARROW)
            interpolate_column(this, from, to + frequency * this->size, frequency, NARROW);
        for (; frequency < this->num_frequencies; frequency++)
            interpolate_column(this, from, to + frequency * this->size, frequency, 1);
    }
}

/* Sums of matrices, real and imaginary parts with factors of their own. ``size`` is of all groups of a sample. */
void spectralnorm_interpolate(const float *samples, int64_t num_samples, int64_t size, const float *even,
                              const float *odd, int64_t factor_stride, int64_t num_frequencies, float *out,
                              int threads) {
    interpolation this = {samples, even, odd, num_samples, num_frequencies, size, factor_stride, out};
    together(interpolate_share, &this, num_samples * num_frequencies * size / FLOPS_OF_ENTRY, threads);
}
