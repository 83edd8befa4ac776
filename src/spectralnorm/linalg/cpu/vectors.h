/* Vectors of GCC and Clang, which every processor has in some width, and what is done with them everywhere. */

#ifndef SPECTRALNORM_VECTORS_H
#define SPECTRALNORM_VECTORS_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX__)
#define WIDTH 8
#else
#define WIDTH 4
#endif

#define ALWAYS static inline __attribute__((always_inline))
#define INTERNAL __attribute__((visibility("hidden"))) /* shared by these files, and by nothing else in a process */
#define PRAGMA(words) _Pragma(#words)
#if defined(__clang__)
#define UNROLL(times) PRAGMA(clang loop unroll(full))
#else
#define UNROLL(times) PRAGMA(GCC unroll times)
#endif

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef float vec_in_memory __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

ALWAYS vec load(const float *from) { return *(const vec_in_memory *)from; }
ALWAYS void store(float *to, vec value) { *(vec_in_memory *)to = value; }

ALWAYS vec load_part(const float *from, int64_t count) {
    vec value = {0};
    memcpy(&value, from, sizeof(float) * count);
    return value;
}

ALWAYS void store_part(float *to, vec value, int64_t count) { memcpy(to, &value, sizeof(float) * count); }

ALWAYS float sum_of(vec value) {
    float sums[WIDTH];
    memcpy(sums, &value, sizeof sums);
    UNROLL(4)
    for (int half = WIDTH / 2; half; half /= 2)
        for (int i = 0; i < half; i++) sums[i] += sums[i + half];
    return sums[0];
}

ALWAYS int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

#endif
