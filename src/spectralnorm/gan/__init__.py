"""Training generative adversarial networks with a spectrally normalized discriminator, and using what was trained."""

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
