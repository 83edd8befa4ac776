/* What was found, copied into the buffers of a model.
 *
 * What every argument means is told in storing.py beside this file.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

/* Each vector copied to where it is kept, if the norm of its owner is one. */
void spectralnorm_store(const int64_t *sources, int64_t beginning, const int64_t *targets, const int64_t *sizes,
                        const int64_t *owners, int64_t num_vectors, const float *sigmas, double eps) {
    for (int64_t i = 0; i < num_vectors; i++) {
        float sigma = sigmas[owners[i]];
        if (sigma > eps && sigma < INFINITY)
            memcpy((void *)(intptr_t)targets[i], (const void *)(intptr_t)(beginning + sources[i]),
                   sizeof(float) * sizes[i]);
    }
}
