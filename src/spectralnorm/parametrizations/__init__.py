"""Normalized weights: the state (u, v) and the kept value, a thin shell around `spectralnorm.linalg`.

What happens when a weight is used, and which file does what: docs/library/inside-the-layer.md.

Beside them, weights that are functions of the raw weight alone: orthogonal, capped, rescaled by channel.
"""

from spectralnorm.parametrizations.by_function import (
    AlmostOrthogonal,
    MappedMatrix,
    almost_orthogonal,
    bjorck,
    cayley,
    soft_cap,
)
from spectralnorm.parametrizations.handed_over import handed_over
from spectralnorm.parametrizations.layer import is_normalized, spectral_norm
from spectralnorm.parametrizations.layer_class import can_be_handed_over
from spectralnorm.parametrizations.registration import normalization_of
from spectralnorm.parametrizations.spectral_norm import SpectralNorm

__all__ = [
    "AlmostOrthogonal",
    "MappedMatrix",
    "SpectralNorm",
    "almost_orthogonal",
    "bjorck",
    "can_be_handed_over",
    "cayley",
    "handed_over",
    "is_normalized",
    "normalization_of",
    "soft_cap",
    "spectral_norm",
]
