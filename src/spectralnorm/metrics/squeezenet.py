"""SqueezeNet 1.1 up to its last fire module, the feature extractor for images of any kind.

Iandola et al. 2016, "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters", in the 1.1 variant of the authors'
repository (3 x 3 first convolution, earlier pooling), trained on ImageNet.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["SqueezeNet"]


class SqueezeNet(nn.Module):
    """Maps RGB images to 512 features: the mean over space of the last fire module.

    The classifying layer is left out: its 1,000 ImageNet classes say little about generated images.
    """

    image_size = 128
    """Pixels; smaller images leave too little after the four halvings."""
    channels = 3
    num_features = 512

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Of blue, green and red: the weights come from Caffe, which reads images in this order.
        self.register_buffer("mean", torch.tensor([103.939, 116.779, 123.68]).view(1, 3, 1, 1), persistent=False)
        self.conv1 = nn.Conv2d(3, 64, 3, stride=2)
        self.fire2 = Fire(64, squeeze=16, expand=64)
        self.fire3 = Fire(128, squeeze=16, expand=64)
        self.fire4 = Fire(128, squeeze=32, expand=128)
        self.fire5 = Fire(256, squeeze=32, expand=128)
        self.fire6 = Fire(256, squeeze=48, expand=192)
        self.fire7 = Fire(384, squeeze=48, expand=192)
        self.fire8 = Fire(384, squeeze=64, expand=256)
        self.fire9 = Fire(512, squeeze=64, expand=256)

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        """Compute features.

        Args:
            images: (n, 3, height, width), RGB, 0 to 255, at least 128 pixels wide and high.

        Returns:
            Features (n, 512), and no logits.
        """
        hidden = images.flip(1) - self.mean
        hidden = _halve(F.relu_(self.conv1(hidden)))
        hidden = _halve(self.fire3(self.fire2(hidden)))
        hidden = _halve(self.fire5(self.fire4(hidden)))
        hidden = self.fire9(self.fire8(self.fire7(self.fire6(hidden))))
        return hidden.mean(dim=(2, 3)), None


class Fire(nn.Module):
    """A narrow 1 x 1 convolution feeding a 1 x 1 and a 3 x 3 convolution side by side."""

    def __init__(self, num_inputs: int, *, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze1x1 = nn.Conv2d(num_inputs, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        squeezed = F.relu_(self.squeeze1x1(images))
        return F.relu_(torch.cat([self.expand1x1(squeezed), self.expand3x3(squeezed)], dim=1))


def _halve(images: Tensor) -> Tensor:
    return F.max_pool2d(images, 3, stride=2)
