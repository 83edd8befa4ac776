"""Training generative adversarial networks with a spectrally normalized discriminator, and using what was trained."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectralnorm.gan.config import Config
    from spectralnorm.gan.data import ImageSet, load_images
    from spectralnorm.gan.recipes import RECIPES, make_config
    from spectralnorm.gan.run import Run, train
    from spectralnorm.gan.sampling import TrainedGenerator, load

__all__ = [
    "RECIPES",
    "Config",
    "ImageSet",
    "Run",
    "TrainedGenerator",
    "load",
    "load_images",
    "make_config",
    "train",
]

# Where each name is from. It is imported when it is first used: settings and recipes are read without torch.
_SOURCES = {
    "Config": "config",
    "ImageSet": "data",
    "load_images": "data",
    "RECIPES": "recipes",
    "make_config": "recipes",
    "Run": "run",
    "train": "run",
    "TrainedGenerator": "sampling",
    "load": "sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _SOURCES:
        raise AttributeError(f"module 'spectralnorm.gan' has no attribute {name!r}")
    value = getattr(import_module(f"spectralnorm.gan.{_SOURCES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
