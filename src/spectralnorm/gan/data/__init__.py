"""Images to train on: loaded from a path or built in, checked, split, and handed out in shuffled batches."""

from spectralnorm.gan.data.batches import Batch, Batches
from spectralnorm.gan.data.image_set import ImageSet
from spectralnorm.gan.data.load import from_tensors, load_images
from spectralnorm.gan.data.summary import DataSummary, Unreadable

__all__ = ["Batch", "Batches", "DataSummary", "ImageSet", "Unreadable", "from_tensors", "load_images"]
