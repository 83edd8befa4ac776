"""Normalized weights: the state (u, v) and the kept value, a thin shell around `spectralnorm.linalg`."""

from spectralnorm.parametrizations.layer import is_normalized, spectral_norm
from spectralnorm.parametrizations.registration import normalization_of
from spectralnorm.parametrizations.spectral_norm import SpectralNorm

__all__ = ["SpectralNorm", "is_normalized", "normalization_of", "spectral_norm"]
