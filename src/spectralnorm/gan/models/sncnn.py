"""The standard CNN of Miyato et al. 2018 (Table 3), and the wider variant that their public code and Kurach et al. use.

Generator: dense to an ``M x M x 512`` map, three 4x4 stride-2 transposed convolutions, 3x3 to the image; M is 4, 6 or 8
for 32, 48 or 64 px. Discriminator: 3x3 convolutions alternating with 4x4 stride-2 ones, then a dense logit.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from spectralnorm.gan.models.bounded import output_gain

__all__ = ["SNCNNDiscriminator", "SNCNNGenerator", "SNDCGANDiscriminator"]


class SNCNNGenerator(nn.Module):
    """Latents ``(batch, latent_dim)`` to images ``(batch, channels, size, size)`` in [-1, 1].

    Args:
        image_size: a multiple of 8: the first map has an eighth of it.
        channels: of the images.
        width: channels of the last feature map; 64 in the paper (512-256-128-64).
        latent_dim: dimensions of the latent; 128 in the paper.
    """

    def __init__(self, *, image_size: int = 32, channels: int = 3, width: int = 64, latent_dim: int = 128) -> None:
        super().__init__()
        self.start_size = _eighth(image_size)
        self.start_width = 8 * width
        self.dense = nn.Linear(latent_dim, self.start_width * self.start_size**2)
        layers: list[nn.Module] = [nn.BatchNorm2d(self.start_width), nn.ReLU(inplace=True)]
        for wide, narrow in ((8, 4), (4, 2), (2, 1)):
            layers += [
                nn.ConvTranspose2d(wide * width, narrow * width, 4, stride=2, padding=1),
                nn.BatchNorm2d(narrow * width),
                nn.ReLU(inplace=True),
            ]
        layers += [nn.Conv2d(width, channels, 3, padding=1), nn.Tanh()]
        self.layers = nn.Sequential(*layers)
        self.apply(_initialize)

    def forward(self, latents: Tensor) -> Tensor:
        maps = self.dense(latents).unflatten(1, (self.start_width, self.start_size, self.start_size))
        return self.layers(maps)


class _Discriminator(nn.Module):
    """Convolutions ``3x3, 4x4 stride 2, 3x3, ...`` with the given channels, leaky ReLU 0.1, then one dense logit.

    Beside the weights there is only leaky ReLU, of slope at most 1, so the network certifies as it is: with the product
    of the norms of its convolutions and of the dense layer, times ``lipschitz``.
    """

    def __init__(self, *, image_size: int, channels: int, widths: Sequence[int], lipschitz: float | None) -> None:
        super().__init__()
        self.gain = output_gain(lipschitz)
        layers: list[nn.Module] = []
        for position, (narrow, wide) in enumerate(zip([channels, *widths], widths, strict=False)):
            kernel, stride = (4, 2) if position % 2 else (3, 1)
            layers += [nn.Conv2d(narrow, wide, kernel, stride, padding=1), nn.LeakyReLU(0.1, inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.dense = nn.Linear(widths[-1] * _eighth(image_size) ** 2, 1)
        self.apply(_initialize)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.dense(self.layers(images)).squeeze(1)
        return logits if self.gain == 1.0 else self.gain * logits


class SNCNNDiscriminator(_Discriminator):
    """Images ``(batch, channels, size, size)`` to logits ``(batch,)``, channels as in the paper's Table 3.

    Args:
        image_size: a multiple of 8.
        channels: of the images.
        width: channels of the first feature map; 64 in the paper (64, 64, 128, 128, 256, 256, 512).
        lipschitz: a number that the logits are multiplied by: the Lipschitz constant if the norm of every weight (for a
            convolution, of the convolution) is at most 1. None, as published: 1.

    Raises:
        UserError: ``lipschitz`` is not a positive number.
    """

    def __init__(
        self, *, image_size: int = 32, channels: int = 3, width: int = 64, lipschitz: float | None = None
    ) -> None:
        widths = [width * k for k in (1, 1, 2, 2, 4, 4, 8)]
        super().__init__(image_size=image_size, channels=channels, widths=widths, lipschitz=lipschitz)


class SNDCGANDiscriminator(_Discriminator):
    """Images ``(batch, channels, size, size)`` to logits ``(batch,)``, channels as in the public code of the paper.

    Args:
        image_size: a multiple of 8.
        channels: of the images.
        width: channels of the first feature map; 64 in the code (64, 128, 128, 256, 256, 512, 512).
        lipschitz: a number that the logits are multiplied by: the Lipschitz constant if the norm of every weight (for a
            convolution, of the convolution) is at most 1. None, as published: 1.

    Raises:
        UserError: ``lipschitz`` is not a positive number.
    """

    def __init__(
        self, *, image_size: int = 32, channels: int = 3, width: int = 64, lipschitz: float | None = None
    ) -> None:
        widths = [width * k for k in (1, 2, 2, 4, 4, 8, 8)]
        super().__init__(image_size=image_size, channels=channels, widths=widths, lipschitz=lipschitz)


def _eighth(image_size: int) -> int:
    if image_size % 8:
        raise ValueError(f"image_size must be a multiple of 8, got {image_size}.")
    return image_size // 8


def _initialize(module: nn.Module) -> None:
    """N(0, 0.02) for weights and zero for biases, as the public code of the paper."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
