"""Spectral normalization for PyTorch, and a GAN trainer (`spectralnorm.gan`) that shows what it does."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectralnorm import gan as gan
    from spectralnorm.errors import UserError
    from spectralnorm.lipschitz import Certificate, certify, register_rule
    from spectralnorm.parametrizations import SpectralNorm, spectral_norm
    from spectralnorm.transform import (
        add_spectral_norm,
        compile,
        export_state_dict,
        invalidate,
        keep_values,
        monitor,
        optimizer_step,
        remove_spectral_norm,
        summary,
        update_,
    )

__version__ = "0.1.0"

__all__ = [
    "Certificate",
    "SpectralNorm",
    "UserError",
    "__version__",
    "add_spectral_norm",
    "certify",
    "compile",
    "export_state_dict",
    "invalidate",
    "keep_values",
    "monitor",
    "optimizer_step",
    "register_rule",
    "remove_spectral_norm",
    "spectral_norm",
    "summary",
    "update_",
]


# Where each name is from. It is imported when it is first used: a help page of the command line needs no torch, and
# only the trainer needs more than torch.
_SOURCES = {
    "UserError": "errors",
    **dict.fromkeys(("Certificate", "certify", "register_rule"), "lipschitz"),
    **dict.fromkeys(("SpectralNorm", "spectral_norm"), "parametrizations"),
    **dict.fromkeys(
        (
            "add_spectral_norm",
            "compile",
            "export_state_dict",
            "invalidate",
            "keep_values",
            "monitor",
            "optimizer_step",
            "remove_spectral_norm",
            "summary",
            "update_",
        ),
        "transform",
    ),
}
_MODULES = ("errors", "gan", "layers", "linalg", "lipschitz", "parametrizations", "transform")


def __getattr__(name: str) -> Any:
    if name in _SOURCES:
        value = getattr(import_module(f"spectralnorm.{_SOURCES[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"spectralnorm.{name}")
    else:
        raise AttributeError(f"module 'spectralnorm' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
