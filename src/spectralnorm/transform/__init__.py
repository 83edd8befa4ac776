"""Whole models: which weights are normalized, adding and removing it, and looking at it."""

from spectralnorm.transform.apply import add_spectral_norm, remove_spectral_norm
from spectralnorm.transform.table import Row, Summary, summary
from spectralnorm.transform.upkeep import invalidate, monitor, normalized_weights, update_

__all__ = [
    "Row",
    "Summary",
    "add_spectral_norm",
    "invalidate",
    "monitor",
    "normalized_weights",
    "remove_spectral_norm",
    "summary",
    "update_",
]
