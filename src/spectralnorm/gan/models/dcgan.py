"""DCGAN (Radford et al. 2016): transposed convolutions up, strided convolutions down, doubling widths.

With ``width=64`` at 64 px the channels are the paper's: 512-256-128-64 in the generator and their mirror image in the
discriminator. Other sizes start from ``size / 2^n`` pixels between 4 and 6.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from spectralnorm.gan.models.bounded import output_gain

__all__ = ["DCGANDiscriminator", "DCGANGenerator"]


class DCGANGenerator(nn.Module):
    """Latents ``(batch, latent_dim)`` to images ``(batch, channels, size, size)`` in [-1, 1].

    Args:
        image_size: 32, 48, 64 or 128 (any size that halves down to 4-7 px).
        channels: of the images.
        width: channels of the last feature map; it doubles towards the latent, up to 8 x.
        latent_dim: dimensions of the latent.
    """

    def __init__(self, *, image_size: int = 64, channels: int = 3, width: int = 64, latent_dim: int = 100) -> None:
        super().__init__()
        start, widths = _plan(image_size, width)
        widths.reverse()
        layers: list[nn.Module] = [
            nn.ConvTranspose2d(latent_dim, widths[0], start, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        ]
        for wide, narrow in pairwise(widths):
            layers += [
                nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(narrow),
                nn.ReLU(inplace=True),
            ]
        layers += [nn.ConvTranspose2d(widths[-1], channels, 4, stride=2, padding=1), nn.Tanh()]
        self.layers = nn.Sequential(*layers)
        self.apply(_initialize)

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(latents[:, :, None, None])


class DCGANDiscriminator(nn.Module):
    """Images ``(batch, channels, size, size)`` to logits ``(batch,)``.

    No batch normalization: it would mix the images of a batch, and leave no Lipschitz constant to speak of. Beside
    the weights there is only leaky ReLU, of slope at most 1: the network certifies as it is, with the product of the
    norms of its convolutions.

    Args:
        image_size: 32, 48, 64 or 128 (any size that halves down to 4-7 px).
        channels: of the images.
        width: channels of the first feature map; it doubles downwards, up to 8 x.
        lipschitz: a number that the logits are multiplied by: the Lipschitz constant if the norm of every convolution
            is at most 1. None, as published: 1.

    Raises:
        UserError: ``lipschitz`` is not a positive number.
    """

    def __init__(
        self, *, image_size: int = 64, channels: int = 3, width: int = 64, lipschitz: float | None = None
    ) -> None:
        super().__init__()
        self.gain = output_gain(lipschitz)
        start, widths = _plan(image_size, width)
        layers: list[nn.Module] = []
        for narrow, wide in zip([channels, *widths], widths, strict=False):
            layers += [nn.Conv2d(narrow, wide, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        layers.append(nn.Conv2d(widths[-1], 1, start))
        self.layers = nn.Sequential(*layers)
        self.apply(_initialize)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.layers(images).flatten()
        return logits if self.gain == 1.0 else self.gain * logits


def _plan(image_size: int, width: int) -> tuple[int, list[int]]:
    """Pixels of the smallest map, and the channels of each map from the largest to the smallest."""
    halvings = max(1, image_size // 4).bit_length() - 1
    if image_size % 2**halvings:
        raise ValueError(f"image_size must halve evenly down to 4-7 px (such as 32, 48, 64), got {image_size}.")
    return image_size // 2**halvings, [width * min(2**level, 8) for level in range(halvings)]


def _initialize(module: nn.Module) -> None:
    """N(0, 0.02) for weights, N(1, 0.02) for the scale of batch normalization (Radford et al. 2016, section 4)."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
