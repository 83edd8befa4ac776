/* Gram matrices of a convolution's symbol, power iteration with them, and their Cholesky factorization.
 *
 * What it is for is told in spectralnorm/linalg/symbol.py; what every argument means, in panels.py beside this file.
 *
 * Rows come in panels of TALL. A panel is columns of TALL real parts and as many imaginary parts, side by side. Of a
 * Hermitian matrix, or a triangular factor, the panel number p has the columns up to its diagonal, (p + 1) TALL of them
 * or, in the last panel, the rows' number in NARROWs; panels follow one another. What is above the diagonal in the last
 * TALL columns of a panel of a factor means nothing. Rows that only fill up the last panel are zero.
 *
 * With that, products and factorizations are one operation, `tile`, on columns that follow one another in memory.
 * Sums are of DEPTH columns in registers, and of those sums. All have an order that depends on the sizes alone.
 */

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "threads.h"
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

/* A compiler would load it again for each use. */
#if defined(__x86_64__)
#define IN_REGISTER(value) __asm__("" : "+v"(value))
#elif defined(__aarch64__)
#define IN_REGISTER(value) __asm__("" : "+w"(value))
#else
#define IN_REGISTER(value)
#endif

typedef struct {
    vec re[NARROW][UNITS], im[NARROW][UNITS];
} sums;

/* Rows of a panel in memory. */
int spectralnorm_panel_rows(void) { return TALL; }

/* Memory for floats from the start of a line of the cache on. */
static float *aligned(size_t bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }

ALWAYS int64_t panel_start(int64_t panel) { return panel * (panel + 1) / 2 * TALL * COLUMN; }

ALWAYS int64_t panels_of(int64_t rows) { return (rows + TALL - 1) / TALL; }

/* Columns of a matrix with so many rows; of the panels up to one of them. */
ALWAYS int64_t width_of(int64_t rows) { return (rows + NARROW - 1) / NARROW * NARROW; }
ALWAYS int64_t columns_of(int64_t rows, int64_t panel) { return least((panel + 1) * TALL, width_of(rows)); }

/* Numbers of a matrix with so many rows. */
int64_t spectralnorm_panel_matrix_size(int64_t rows) {
    return panel_start(panels_of(rows) - 1) + width_of(rows) * COLUMN;
}

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

/* Packing ---------------------------------------------------------------------------------------------------------- */

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

/* A kernel as (groups, taps, columns, rows) with rows filled up with zeros. Found on the way: the largest modulus, none if
 * one of the entries is none; and the sum over taps of Frobenius norms, of the group that has the largest, of sums of
 * DEPTH squares in single precision. Returns 0, or 1 where there is no memory. */
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

ALWAYS float diagonal(const float *matrix, int64_t row) {
    return matrix[panel_start(row / TALL) + row * COLUMN + row % TALL];
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

/* Power iteration -------------------------------------------------------------------------------------------------- */

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

/* Factorization ---------------------------------------------------------------------------------------------------- */

typedef struct {
    const float *grams;
    const int64_t *which;
    int64_t count, rows;
    double square;
    int8_t *passed;
    float *scratch;
} factorization;

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

/* Find those of which ``square`` I - G has no Cholesky factor: their number, and in ``failed`` their places. Returns that
 * number, or -1 where there is no memory. */
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
