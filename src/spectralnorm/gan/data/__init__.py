"""Images to train on: loaded from a path or built in, checked, split, and handed out in shuffled batches."""

from spectralnorm.gan.data.batches import Batch, Batches
from spectralnorm.gan.data.image_set import ImageSet
from spectralnorm.gan.data.load import from_huggingface, from_tensors, load_images, open_images
from spectralnorm.gan.data.stream import ImageStream
from spectralnorm.gan.data.streamed_batches import StreamedBatches, open_batches
from spectralnorm.gan.data.summary import DataSummary, Unreadable

__all__ = [
    "Batch",
    "Batches",
    "DataSummary",
    "ImageSet",
    "ImageStream",
    "StreamedBatches",
    "Unreadable",
    "from_huggingface",
    "from_tensors",
    "load_images",
    "open_batches",
    "open_images",
]
