"""What is compiled in tests."""

import torch
from torch import Tensor, nn

from spectralnorm import spectral_norm

__all__ = ["IMAGES", "Block", "images_model"]

IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)


def images_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1),
        nn.Flatten(),
        nn.Linear(1024, 5),
    )


class Block(nn.Module):
    """One of many equal ones."""

    def __init__(self, **options: str) -> None:
        super().__init__()
        self.inner = spectral_norm(nn.Linear(6, 6), **options)
        self.outer = spectral_norm(nn.Linear(6, 6), **options)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.outer(self.inner(inputs).relu())
