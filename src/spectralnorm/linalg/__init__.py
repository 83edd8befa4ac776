"""Pure tensor functions: no modules, no state."""

from spectralnorm.linalg.convolution import ConvolutionGeometry, max_patches_per_pixel
from spectralnorm.linalg.directions import chirp, seeded_direction
from spectralnorm.linalg.gram import gram_upper_bound
from spectralnorm.linalg.lower import convolution_lower_bound, matrix_lower_bound
from spectralnorm.linalg.matrix_view import MatrixView, view_of
from spectralnorm.linalg.orthogonal import bjorck, cayley, rescaled_below, soft_cap
from spectralnorm.linalg.power_iteration import (
    SingularTriplet,
    compute_dtype,
    power_iteration,
    power_iteration_of_operator,
    power_vectors,
)
from spectralnorm.linalg.refine import refine
from spectralnorm.linalg.rescaling import almost_orthogonal, gram_row_sums
from spectralnorm.linalg.reshapings import patches_bound, reshapings_bound
from spectralnorm.linalg.rigorous import rigorous_largest_norm, rigorous_matrix_bound, rigorous_norm_bounds
from spectralnorm.linalg.rigorous_convolution import rigorous_convolution_bound
from spectralnorm.linalg.rounding import round_up
from spectralnorm.linalg.symbol import convolution_upper_bound
from spectralnorm.linalg.tracking import NUM_TRACKED, Frame, TrackedTriplet, probe_rows, track, track_together

__all__ = [
    "NUM_TRACKED",
    "ConvolutionGeometry",
    "Frame",
    "MatrixView",
    "SingularTriplet",
    "TrackedTriplet",
    "almost_orthogonal",
    "bjorck",
    "cayley",
    "chirp",
    "compute_dtype",
    "convolution_lower_bound",
    "convolution_upper_bound",
    "gram_row_sums",
    "gram_upper_bound",
    "matrix_lower_bound",
    "max_patches_per_pixel",
    "patches_bound",
    "power_iteration",
    "power_iteration_of_operator",
    "power_vectors",
    "probe_rows",
    "refine",
    "rescaled_below",
    "reshapings_bound",
    "rigorous_convolution_bound",
    "rigorous_largest_norm",
    "rigorous_matrix_bound",
    "rigorous_norm_bounds",
    "round_up",
    "seeded_direction",
    "soft_cap",
    "track",
    "track_together",
    "view_of",
]
