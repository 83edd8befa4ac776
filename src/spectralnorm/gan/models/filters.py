"""Resampling with the low-pass filter [1, 3, 3, 1] / 8 along both axes (Zhang 2019), as StyleGAN2 uses it.

Each is a depthwise (transposed) convolution, zero-padded: exact on every device, differentiable as often as one likes.
Their norms as linear maps, for images of any size: `Blur` at most its gain, because the filter is positive and sums to
1; `Downsample` at most half its gain: along an axis each of the two polyphase components of the filter sums to 1/2, so
their symbols are at most (1/2, 1/2), of norm sqrt(1/2), and two axes make the square of that; `Upsample` at most 2, as
four times the adjoint of `Downsample`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Blur", "Downsample", "Upsample"]

_TAPS = (1 / 8, 3 / 8, 3 / 8, 1 / 8)


class _Filter(nn.Module):
    kernel: Tensor

    def __init__(self, gain: float) -> None:
        super().__init__()
        taps = torch.tensor(_TAPS)
        self.register_buffer("kernel", gain * torch.outer(taps, taps)[None, None], persistent=False)
        self.gain = gain

    def _kernel_for(self, images: Tensor) -> Tensor:
        return self.kernel.to(images.dtype).expand(images.shape[1], 1, 4, 4)

    def extra_repr(self) -> str:
        return f"gain={self.gain:g}"


class Blur(_Filter):
    """Filters images ``(batch, channels, height, width)``; each axis grows by ``2 * padding - 3``.

    Args:
        padding: zeros around the images.
        gain: factor of the output.
    """

    def __init__(self, *, padding: int, gain: float = 1.0) -> None:
        super().__init__(gain)
        self.padding = padding

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images, self._kernel_for(images), padding=self.padding, groups=images.shape[1])


class Downsample(_Filter):
    """Filters images of even size and keeps every second pixel: ``(batch, channels, height / 2, width / 2)``.

    Args:
        gain: factor of the output. 1 keeps the mean of the pixels, 2 the 2-norm of a smooth image.
    """

    def __init__(self, *, gain: float = 1.0) -> None:
        super().__init__(gain)

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images, self._kernel_for(images), stride=2, padding=1, groups=images.shape[1])


class Upsample(_Filter):
    """Doubles images to ``(batch, channels, 2 height, 2 width)``: zeros between the pixels, then the filter times 4.

    The factor keeps the mean of the pixels.
    """

    def __init__(self) -> None:
        super().__init__(4.0)

    def forward(self, images: Tensor) -> Tensor:
        return F.conv_transpose2d(images, self._kernel_for(images), stride=2, padding=1, groups=images.shape[1])
