"""Spectral normalization for PyTorch, and a GAN trainer (`spectralnorm.gan`) that shows what it does."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spectralnorm.errors import UserError
from spectralnorm.lipschitz import Certificate, certify, register_rule
from spectralnorm.parametrizations import SpectralNorm, spectral_norm
from spectralnorm.transform import (
    add_spectral_norm,
    export_state_dict,
    invalidate,
    keep_values,
    monitor,
    remove_spectral_norm,
    summary,
    update_,
)

if TYPE_CHECKING:
    from spectralnorm import gan as gan

__version__ = "0.1.0"

__all__ = [
    "Certificate",
    "SpectralNorm",
    "UserError",
    "__version__",
    "add_spectral_norm",
    "certify",
    "export_state_dict",
    "invalidate",
    "keep_values",
    "monitor",
    "register_rule",
    "remove_spectral_norm",
    "spectral_norm",
    "summary",
    "update_",
]


def __getattr__(name: str) -> Any:
    # The trainer needs more than torch, and time to import: only who asks for it pays.
    if name == "gan":
        return import_module("spectralnorm.gan")
    raise AttributeError(f"module 'spectralnorm' has no attribute {name!r}")
