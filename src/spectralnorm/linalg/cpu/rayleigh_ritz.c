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
