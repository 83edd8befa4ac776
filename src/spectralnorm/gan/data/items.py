"""Images of a map-style dataset in Python, such as those of torchvision."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.gan.data.decode import UnreadableError, fit
from spectralnorm.gan.data.image_set import ImageSet
from spectralnorm.gan.data.load import from_tensors

__all__ = ["from_items"]


def from_items(data: Any, *, image_size: int, channels: int) -> ImageSet:
    """Use a dataset that has a length and is indexed by numbers.

    Args:
        data: its items are images, or tuples whose first two members are an image and its class, a whole number. Images
            are Pillow's, or tensors (1 or 3, height, width) of one size. ``data.classes``, if there are, name the
            classes.
        image_size: height and width to train at, in pixels.
        channels: 1 (gray) or 3 (RGB) to train with.

    Raises:
        UserError: it has no length, or its items are something else.
    """
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise UserError(
            f"data of type {type(data).__name__} has no length or cannot be indexed; give a path, a tensor, an "
            "ImageSet or a map-style dataset."
        )
    items = [data[index] for index in range(len(data))]
    if not items:
        raise UserError("the given dataset is empty; give one that holds images.")
    with_labels = isinstance(items[0], tuple | list)
    images = [item[0] if with_labels else item for item in items]
    labels = None
    if with_labels and len(items[0]) > 1:
        try:
            labels = torch.tensor([int(item[1]) for item in items])
        except (TypeError, ValueError) as error:
            raise UserError(f"the classes of the given dataset must be whole numbers ({error}).") from error
    names = getattr(data, "classes", None)
    return from_tensors(
        _stacked(images, image_size=image_size, channels=channels),
        labels,
        class_names=None if names is None or labels is None else tuple(map(str, names)),
        image_size=image_size,
        channels=channels,
        name=type(data).__name__,
    )


def _stacked(images: list[Any], *, image_size: int, channels: int) -> Tensor:
    if all(isinstance(image, Image.Image) for image in images):
        try:
            return torch.from_numpy(np.stack([fit(i, image_size=image_size, channels=channels) for i in images]))
        except UnreadableError as error:
            raise UserError(f"an image of the given dataset cannot be used: {error}.") from error
    if not all(isinstance(image, Tensor) for image in images):
        raise UserError(
            f"the images of the given dataset are of type {type(images[0]).__name__}; expected Pillow images or "
            "tensors of shape (1 or 3, height, width)."
        )
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        two = " and ".join(map(str, sorted(shapes)[:2]))
        raise UserError(
            f"the images of the given dataset have different shapes, such as {two}; "
            "leave out its conversion to tensors, so that they are resized here, or resize them there."
        )
    return torch.stack(images)
