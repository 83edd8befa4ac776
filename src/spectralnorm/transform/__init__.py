"""Whole models: which weights are normalized, adding and removing it, and looking at it."""

from spectralnorm.transform.apply import add_spectral_norm
from spectralnorm.transform.compiling import compile
from spectralnorm.transform.export import export_state_dict
from spectralnorm.transform.remove import remove_spectral_norm
from spectralnorm.transform.table import Row, Summary, summary
from spectralnorm.transform.tracking import load_tracking_state, tracking_state
from spectralnorm.transform.upkeep import (
    invalidate,
    keep_values,
    monitor,
    normalized_weights,
    optimizer_step,
    update_,
)

__all__ = [
    "Row",
    "Summary",
    "add_spectral_norm",
    "compile",
    "export_state_dict",
    "invalidate",
    "keep_values",
    "load_tracking_state",
    "monitor",
    "normalized_weights",
    "optimizer_step",
    "remove_spectral_norm",
    "summary",
    "tracking_state",
    "update_",
]
