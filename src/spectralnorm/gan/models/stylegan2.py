"""StyleGAN2's generator (Karras et al. 2020): mapping network, modulated convolutions, noise, skips to the image.

The discriminator is in `stylegan2_discriminator`. With ``width=64`` at 256 px the channels are those of the public code
with ``channel_base=16384``, with ``width=128, max_width=512`` those with 32768.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from spectralnorm.gan.models.equalized import EqualizedLinear, ScaledLeakyReLU
from spectralnorm.gan.models.filters import Blur, Upsample
from spectralnorm.gan.models.modulated import ModulatedConv2d, ModulatedConvTranspose2d
from spectralnorm.gan.models.stylegan2_discriminator import StyleGAN2Discriminator, channels_by_size

__all__ = ["StyleGAN2Discriminator", "StyleGAN2Generator"]


class StyleGAN2Generator(nn.Module):
    """Latents ``(batch, latent_dim)`` to images ``(batch, channels, size, size)``.

    In training mode noise is drawn anew, styles are mixed, and the mean style is tracked; in eval mode noise is that
    of the buffers, so that a latent means one image.

    Args:
        image_size: halves evenly down to 4-7 px, such as 32, 48, 64, 128, 256.
        channels: of the images.
        width: channels of the last feature map; they double towards the first, up to ``max_width``.
        max_width: largest number of channels, 512 in the public code; None: ``8 * width``.
        latent_dim: dimensions of the latent; 512 in the paper.
        style_dim: dimensions of the style w; None: as the latent.
        num_mapping_layers: dense layers from latent to style; 8 in the paper.
        style_mixing: probability that an image takes the style of another latent from a random layer on.
        bounded: end with tanh, so that images lie in [-1, 1] as the trainer's other generators'; the published network
            has no such end.

    Raises:
        UserError: the size does not halve evenly.
    """

    style_average: Tensor

    def __init__(
        self,
        *,
        image_size: int = 64,
        channels: int = 3,
        width: int = 64,
        max_width: int | None = None,
        latent_dim: int = 512,
        style_dim: int | None = None,
        num_mapping_layers: int = 8,
        style_mixing: float = 0.9,
        bounded: bool = True,
    ) -> None:
        super().__init__()
        style_dim = latent_dim if style_dim is None else style_dim
        self.style_mixing = style_mixing
        self.bounded = bounded
        mapping: list[nn.Module] = []
        for number in range(num_mapping_layers):
            features = latent_dim if number == 0 else style_dim
            mapping += [EqualizedLinear(features, style_dim, learning_rate=0.01), ScaledLeakyReLU()]
        self.mapping = nn.Sequential(*mapping)
        self.register_buffer("style_average", torch.zeros(style_dim))

        sizes = sorted(channels_by_size(image_size, width=width, max_width=max_width).items())
        first_size, first = sizes[0]
        self.constant = nn.Parameter(torch.randn(first, first_size, first_size))
        self.blocks = nn.ModuleList([_Block(None, first, size=first_size, channels=channels, style_dim=style_dim)])
        for (_, wide), (size, narrow) in pairwise(sizes):
            self.blocks.append(_Block(wide, narrow, size=size, channels=channels, style_dim=style_dim))
        self.num_styles = 2 * len(sizes)
        """Layers that take a style of their own: the convolutions, and the last skip to the image."""

    def forward(self, latents: Tensor, *, truncation: float = 1.0) -> Tensor:
        """Images of the latents.

        Args:
            latents: (batch, latent_dim).
            truncation: psi: styles are moved towards the mean style; 1: not at all, 0: all the way.
        """
        return self.synthesize(self.styles(latents, truncation=truncation))

    def styles(self, latents: Tensor, *, truncation: float = 1.0) -> Tensor:
        """The style of each layer, ``(batch, num_styles, style_dim)``, of latents ``(batch, latent_dim)``."""
        styles = self._map(latents)
        if self.training:
            with torch.no_grad():  # the public code's decay
                self.style_average.lerp_(styles.mean(0).to(self.style_average.dtype), 1 - 0.998)
        styles = styles[:, None].expand(-1, self.num_styles, -1)
        if self.training and self.style_mixing > 0:
            styles = self._mixed(styles, self._map(torch.randn_like(latents)))
        return styles if truncation == 1 else torch.lerp(self.style_average.to(styles.dtype), styles, truncation)

    def synthesize(self, styles: Tensor) -> Tensor:
        """Images ``(batch, channels, size, size)`` of the styles of each layer."""
        # Not len(): an exporter would take it for a constant.
        features = self.constant.expand(styles.shape[0], -1, -1, -1)
        image: Tensor | None = None
        layer = 0
        for block in self.blocks:
            # A block's skip to the image shares its style with the first convolution of the next block.
            features, image = block(features, image, styles[:, layer:])
            layer += len(block.convolutions)  # pyright: ignore[reportArgumentType]
        assert image is not None
        return torch.tanh(image) if self.bounded else image

    def _map(self, latents: Tensor) -> Tensor:
        return self.mapping(latents * (latents.square().mean(1, keepdim=True) + 1e-8).rsqrt())

    def _mixed(self, styles: Tensor, others: Tensor) -> Tensor:
        # Drawn and compared on the device, per image, so that the loop does not wait.
        batch, layers, _ = styles.shape
        crossover = torch.randint(1, layers, (batch, 1), device=styles.device)
        is_mixed = torch.rand(batch, 1, device=styles.device) < self.style_mixing
        takes_other = is_mixed & (torch.arange(layers, device=styles.device) >= crossover)
        return torch.where(takes_other[:, :, None], others[:, None], styles)


class _Block(nn.Module):
    """One size of the generator: convolutions, the first of which doubles the map, and a skip to the image."""

    def __init__(self, wide: int | None, narrow: int, *, size: int, channels: int, style_dim: int) -> None:
        super().__init__()
        layers = [] if wide is None else [_StyledConvolution(wide, narrow, size=size, style_dim=style_dim, up=True)]
        layers.append(_StyledConvolution(narrow, narrow, size=size, style_dim=style_dim))
        self.convolutions = nn.ModuleList(layers)
        self.to_image = _ToImage(narrow, channels, style_dim=style_dim)
        self.upsample = Upsample()

    def forward(self, features: Tensor, image: Tensor | None, styles: Tensor) -> tuple[Tensor, Tensor]:
        for number, layer in enumerate(self.convolutions):
            features = layer(features, styles[:, number])
        addition = self.to_image(features, styles[:, len(self.convolutions)])
        return features, addition if image is None else self.upsample(image) + addition


class _StyledConvolution(nn.Module):
    """3x3 convolution modulated by the style, noise, bias, leaky ReLU."""

    fixed_noise: Tensor

    def __init__(self, in_channels: int, out_channels: int, *, size: int, style_dim: int, up: bool = False) -> None:
        super().__init__()
        self.style = EqualizedLinear(style_dim, in_channels, bias=1.0)
        if up:
            self.convolution = ModulatedConvTranspose2d(in_channels, out_channels)
        else:
            self.convolution = ModulatedConv2d(in_channels, out_channels, 3)
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.noise_strength = nn.Parameter(torch.zeros(1))
        self.register_buffer("fixed_noise", torch.randn(size, size))
        self.blur = Blur(padding=1, gain=4.0) if up else None
        self.activation = ScaledLeakyReLU()

    def forward(self, features: Tensor, style: Tensor) -> Tensor:
        features = self.convolution(features, self.style(style))
        if self.blur is not None:
            features = self.blur(features)
        if self.training:
            noise = torch.randn_like(features[:, :1])
        else:
            noise = self.fixed_noise.to(features.dtype)
        return self.activation(features + noise * self.noise_strength + self.bias[:, None, None])


class _ToImage(nn.Module):
    """1x1 convolution to the image, modulated and not demodulated: the image's scale is to be learned."""

    def __init__(self, in_channels: int, channels: int, *, style_dim: int) -> None:
        super().__init__()
        self.style = EqualizedLinear(style_dim, in_channels, bias=1.0)
        self.convolution = ModulatedConv2d(in_channels, channels, 1, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, features: Tensor, style: Tensor) -> Tensor:
        return self.convolution(features, self.style(style)) + self.bias[:, None, None]
