"""Pure tensor functions: no modules, no state."""

from spectralnorm.linalg.matrix_view import MatrixView, view_of
from spectralnorm.linalg.power_iteration import (
    NUM_TRACKED,
    SingularTriplet,
    TrackedTriplet,
    compute_dtype,
    power_iteration,
    power_iteration_of_operator,
    probe_rows,
    tracked_power_iteration,
)
from spectralnorm.linalg.refine import refine

__all__ = [
    "NUM_TRACKED",
    "MatrixView",
    "SingularTriplet",
    "TrackedTriplet",
    "compute_dtype",
    "power_iteration",
    "power_iteration_of_operator",
    "probe_rows",
    "refine",
    "tracked_power_iteration",
    "view_of",
]
