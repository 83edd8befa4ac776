"""Normalized weights: the state (u, v) and the kept value, a thin shell around `spectralnorm.linalg`."""

from spectralnorm.parametrizations.registration import is_normalized, normalization_of, spectral_norm
from spectralnorm.parametrizations.spectral_norm import SpectralNorm

__all__ = ["SpectralNorm", "is_normalized", "normalization_of", "spectral_norm"]
