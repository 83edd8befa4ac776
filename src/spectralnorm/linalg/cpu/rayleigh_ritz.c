/* The Rayleigh-Ritz step of a frame: which turn of the images of its rows is the next frame.
 *
 * In double, from Gram matrices whose sums are in single precision block by block.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "products.h"
#include "rayleigh_ritz.h"
#include "vectors.h"

#define EPSILON 1.1920929e-7
#define TINY 1.17549435e-38
#define NOTHING 1e-140 /* beside any number of a matrix, and has a square */

typedef float vec8 __attribute__((vector_size(32)));
typedef float vec8_in_memory __attribute__((vector_size(32), aligned(4), may_alias));

void gram_of_columns(const float *values, int64_t size, small gram) {
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

void gram_of_rows(const float *values, int64_t size, small gram) {
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
    for (int i = 0; i < TRACKED; i++) {
        double sums[TRACKED] = {0};
        UNROLL(8)
        for (int k = 0; k < TRACKED; k++)
            for (int j = 0; j < TRACKED; j++) sums[j] += left[i][k] * right[k][j];
        memcpy(out[i], sums, sizeof sums);
    }
}

/* T with T G T' = I, lower triangular; a row of the frame without a direction of its own comes out short. */
static int whitening(const small gram, small white) {
    small rest;
    double scales[TRACKED];
    for (int i = 0; i < TRACKED; i++) scales[i] = gram[i][i] > TINY ? 1 / sqrt(gram[i][i]) : 0;
    for (int i = 0; i < TRACKED; i++) {
        for (int j = 0; j < TRACKED; j++) rest[i][j] = gram[i][j] * scales[i] * scales[j];
        rest[i][i] += 64 * EPSILON;
        for (int j = 0; j < TRACKED; j++) white[i][j] = i == j ? scales[i] : 0;
    }
    for (int j = 0; j < TRACKED; j++) {
        double pivot = rest[j][j];
        if (!(pivot > 0 && pivot < INFINITY)) return 0;
        double factor = 1 / sqrt(pivot);
        for (int k = 0; k < TRACKED; k++) rest[j][k] *= factor;
        for (int k = 0; k < TRACKED; k++) white[j][k] *= factor;
        for (int i = j + 1; i < TRACKED; i++) {
            double share = rest[j][i];
            for (int k = 0; k < TRACKED; k++) rest[i][k] -= share * rest[j][k];
            for (int k = 0; k < TRACKED; k++) white[i][k] -= share * white[j][k];
        }
    }
    return 1;
}

/* Jacobi's rotations of the four pairs (k, k ^ which) at once, whose roots and quotients do not wait for each other:
 * row and column k become c of themselves and s of their partner, with one c for both and s of opposite signs. */
ALWAYS void rotate(small gram, small turn, const int which) {
    double cosines[TRACKED], sines[TRACKED];
    UNROLL(1)
    for (int k = 0; k < TRACKED; k++) {
        int other = k ^ which;
        double apart = k < other ? gram[other][k] : gram[k][other];
        double more = gram[k][k] - gram[other][other];
        double most = fabs(more) + NOTHING, length = sqrt(most * most + 4 * apart * apart);
        cosines[k] = sqrt((length + most) / (2 * length));
        double sine = apart / (length * cosines[k]);
        /* Equal ones are turned by half a right angle, in the same sense for both. */
        sines[k] = (more > 0) | ((more == 0) & (k > other)) ? sine : -sine;
    }
    for (int k = 0; k < TRACKED; k++) {
        int other = k ^ which;
        if (other < k) continue;
        double c = cosines[k], s = sines[k];
        for (int l = 0; l < TRACKED; l++) {
            double first = gram[k][l], second = gram[other][l];
            gram[k][l] = c * first + s * second;
            gram[other][l] = c * second - s * first;
        }
        for (int l = 0; l < TRACKED; l++) {
            double first = turn[k][l], second = turn[other][l];
            turn[k][l] = c * first + s * second;
            turn[other][l] = c * second - s * first;
        }
    }
    for (int k = 0; k < TRACKED; k++) {
        double row[TRACKED];
        memcpy(row, gram[k], sizeof row);
        for (int l = 0; l < TRACKED; l++) gram[k][l] = cosines[l] * row[l] + sines[l] * row[l ^ which];
    }
}

/* The eigenvectors of a symmetric matrix in rows, that of the largest eigenvalue first. */
static void rotation(small gram, small turn) {
    double size = 0;
    for (int i = 0; i < TRACKED; i++) {
        for (int k = 0; k < TRACKED; k++) turn[i][k] = i == k;
        size += fabs(gram[i][i]);
    }
    /* Until what is beside the diagonal is a hundredth of the rounding of sums in single precision. */
    for (int sweep = 0; sweep < 16; sweep++) {
        double squares[TRACKED] = {0}, rest = 0;
        for (int i = 0; i < TRACKED; i++)
            for (int k = 0; k < TRACKED; k++) squares[k] += i == k ? 0 : gram[i][k] * gram[i][k];
        for (int i = 0; i < TRACKED; i++) rest += squares[i];
        if (!(rest > 2e-18 * size * size)) break;
        rotate(gram, turn, 1);
        rotate(gram, turn, 2);
        rotate(gram, turn, 3);
        rotate(gram, turn, 4);
        rotate(gram, turn, 5);
        rotate(gram, turn, 6);
        rotate(gram, turn, 7);
    }
    for (int i = 0; i < TRACKED; i++) {
        int largest = i;
        for (int j = i + 1; j < TRACKED; j++)
            if (gram[j][j] > gram[largest][largest]) largest = j;
        gram[largest][largest] = gram[i][i];
        for (int k = 0; k < TRACKED; k++) {
            double value = turn[i][k];
            turn[i][k] = turn[largest][k];
            turn[largest][k] = value;
        }
    }
}

void ritz_turn(const small starts, const small images, float out[TRACKED][TRACKED]) {
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

void turned_rows(float turn[TRACKED][TRACKED], int rows, const float *images, int64_t size, float *out) {
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
