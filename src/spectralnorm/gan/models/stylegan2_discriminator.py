"""StyleGAN2's residual discriminator (Karras et al. 2020), and one that is 1-Lipschitz for weights of norm 1.

The Lipschitz variant (``lipschitz=1.0``) differs where the published network multiplies norms:

| part | published | Lipschitz variant |
|---|---|---|
| residual sum | (skip + main) / sqrt 2, norm up to sqrt 2 | (skip + main) / 2, norm at most 1 |
| leaky ReLU | times sqrt 2 | slope at most 1 |
| skip's downsampling | norm 1/2, the mean is kept | times 2: norm 1, the 2-norm of a smooth image is kept |
| minibatch stddev | norm sqrt(1 + 1/channels) on a batch | divided by that |

Then every part has norm at most 1 if every weight has: as an operator on images, not as a reshaped kernel, whose norm
may be smaller (`add_spectral_norm` with ``norm="matrix"`` bounds the latter only). The logit is multiplied by the
constant.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from spectralnorm.errors import UserError
from spectralnorm.gan.models.equalized import EqualizedConv2d, EqualizedLinear, ScaledLeakyReLU
from spectralnorm.gan.models.filters import Blur, Downsample
from spectralnorm.lipschitz.registry import Call, register_rule

__all__ = ["MinibatchStddev", "StyleGAN2Discriminator", "channels_by_size"]


class StyleGAN2Discriminator(nn.Module):
    """Images ``(batch, channels, size, size)`` to logits ``(batch,)``.

    Args:
        image_size: halves evenly down to 4-7 px, such as 32, 48, 64, 128, 256.
        channels: of the images.
        width: channels of the first feature map; they double downwards, up to ``max_width``. The public code's
            ``channel_base`` is ``width * image_size``: 64 at 256 px for 16384.
        max_width: largest number of channels, 512 in the public code; None: ``8 * width``.
        stddev_group: images whose standard deviation is one more channel of the last map; 4 in the paper. It couples
            the images of a group: a logit then depends on the others, and a Lipschitz constant is one of batches. 0:
            none.
        lipschitz: None for the published network. A number: a network with this Lipschitz constant in the 2-norm, if
            every effective weight has norm at most 1; for ``stddev_group > 0`` as a map from batches to batches of
            logits.

    Raises:
        UserError: the size does not halve evenly, or ``lipschitz`` is not positive.
    """

    def __init__(
        self,
        *,
        image_size: int = 64,
        channels: int = 3,
        width: int = 64,
        max_width: int | None = None,
        stddev_group: int = 4,
        lipschitz: float | None = None,
    ) -> None:
        super().__init__()
        if lipschitz is not None and not 0 < lipschitz < math.inf:
            raise UserError(f"lipschitz must be a positive number, or None for the published network, got {lipschitz}.")
        self.lipschitz = lipschitz
        is_bounded = lipschitz is not None
        widths = list(channels_by_size(image_size, width=width, max_width=max_width).items())
        last_size, last = widths[-1]
        self.from_image = nn.Sequential(EqualizedConv2d(channels, widths[0][1], 1), _activation(is_bounded))
        self.blocks = nn.Sequential(
            *(_Block(narrow, wide, is_bounded=is_bounded) for (_, narrow), (_, wide) in pairwise(widths))
        )
        self.stddev = MinibatchStddev(stddev_group, is_bounded=is_bounded) if stddev_group else None
        self.conv = EqualizedConv2d(last + bool(stddev_group), last, 3, padding=1)
        self.dense = EqualizedLinear(last * last_size**2, last)
        self.activation = _activation(is_bounded)
        self.logit = EqualizedLinear(last, 1)

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks(self.from_image(images))
        if self.stddev is not None:
            features = self.stddev(features)
        features = self.activation(self.conv(features))
        features = self.activation(self.dense(features.flatten(1)))
        logits = self.logit(features).squeeze(1)
        return logits if self.lipschitz is None or self.lipschitz == 1 else logits * self.lipschitz


class _Block(nn.Module):
    """Halves a feature map: 3x3, 3x3 with stride 2 after a blur; beside it a 1x1 skip after downsampling."""

    def __init__(self, narrow: int, wide: int, *, is_bounded: bool) -> None:
        super().__init__()
        self.main = nn.Sequential(
            EqualizedConv2d(narrow, narrow, 3, padding=1),
            _activation(is_bounded),
            Blur(padding=2),
            EqualizedConv2d(narrow, wide, 3, stride=2),
            _activation(is_bounded),
        )
        self.skip = nn.Sequential(
            Downsample(gain=2.0 if is_bounded else 1.0),
            EqualizedConv2d(narrow, wide, 1, bias=False),
        )
        # A sum of two 1-Lipschitz maps is 2-Lipschitz: 1 / sqrt(2), which keeps the variance, does not bound it by 1.
        self.scale = 0.5 if is_bounded else math.sqrt(0.5)

    def forward(self, features: Tensor) -> Tensor:
        return (self.skip(features) + self.main(features)) * self.scale


class MinibatchStddev(nn.Module):
    """Appends one channel: the standard deviation over a group of images, averaged over channels and pixels.

    Of ``(batch, channels, height, width)`` with group size G its Lipschitz constant, as a map of the whole batch, is
    sqrt(1 + 1/channels): each of the M = channels * height * width deviations has a gradient of norm 1 / sqrt(G) with
    respect to its G entries, their mean one of 1 / sqrt(M G), and it is written to G * height * width places. Seen from
    one image, the others held fixed, its own output moves by at most sqrt(1 + (G - 1) / (channels G^2)). `certify`
    counts it with the former: its bound then is one of batches, ``||f(X) - f(Y)|| <= L ||X - Y||``, and so also one of
    each image among others that stay.

    Args:
        group: images in a group; a batch that it does not divide falls into groups of its largest divisor below that.
        is_bounded: divide the output by sqrt(1 + 1/channels), so that it is 1-Lipschitz.
    """

    mixes_images = True

    def __init__(self, group: int = 4, *, is_bounded: bool = False) -> None:
        super().__init__()
        self.group = group
        self.is_bounded = is_bounded

    def forward(self, features: Tensor) -> Tensor:
        batch, channels, height, width = features.shape
        group = next(size for size in range(min(self.group, batch), 0, -1) if batch % size == 0)
        variance = features.unflatten(0, (group, -1)).var(0, correction=0)
        # The small number bounds the derivative where all images of a group are alike.
        deviation = (variance + 1e-8).sqrt().mean((1, 2, 3))
        channel = deviation.repeat(group)[:, None, None, None].expand(batch, 1, height, width)
        features = torch.cat([features, channel], 1)
        return features / math.sqrt(1 + 1 / channels) if self.is_bounded else features


def _stddev_bound(call: Call) -> float:
    """Of the map of batches, whatever their size and groups; rounded up."""
    (_, channels, *_), module = call.input_shape, call.module
    assert isinstance(module, MinibatchStddev)
    bound = math.nextafter(math.sqrt(math.nextafter(1 + 1 / channels, math.inf)), math.inf)
    return math.nextafter(bound / math.sqrt(1 + 1 / channels), math.inf) if module.is_bounded else bound


register_rule(MinibatchStddev, _stddev_bound)


def channels_by_size(image_size: int, *, width: int, max_width: int | None) -> dict[int, int]:
    """The channels of the maps of each size, from the image's down to 4-7 px.

    Raises:
        UserError: the size does not halve evenly down to there, or is that small already.
    """
    halvings = max(1, image_size // 4).bit_length() - 1
    if halvings < 1 or image_size % 2**halvings:
        raise UserError(f"image_size must halve evenly down to 4-7 px (such as 32, 48, 64, 256), got {image_size}.")
    limit = 8 * width if max_width is None else max_width
    return {image_size >> level: min(width << level, limit) for level in range(halvings + 1)}


def _activation(is_bounded: bool) -> nn.Module:
    return nn.LeakyReLU(0.2) if is_bounded else ScaledLeakyReLU()
