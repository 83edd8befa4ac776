"""Train your own networks on your own images: any generator, any discriminator, any map-style dataset.

Run it with ``python examples/own_networks.py``; it draws discs and learns to draw them, in about a minute on a CPU.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from spectralnorm import gan


class Discs(Dataset):
    """Gray 32 x 32 images of one bright disc each; drawn when asked for."""

    def __len__(self) -> int:
        return 2000

    def __getitem__(self, index: int) -> Tensor:
        random = torch.Generator().manual_seed(index)
        x, y = torch.randint(8, 24, (2,), generator=random)
        radius = torch.randint(4, 8, (), generator=random)
        rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
        inside = (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
        return (inside * 255).to(torch.uint8)[None]


class MyGenerator(nn.Sequential):
    """Latents ``(batch, 16)`` to images ``(batch, 1, 32, 32)`` in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(16, 64 * 8 * 8),
            nn.Unflatten(1, (64, 8, 8)),
            nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),
            nn.Tanh(),
        )


class MyDiscriminator(nn.Sequential):
    """Images to logits ``(batch,)``. Spectral normalization is put on it by the trainer."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 4, stride=2, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(32, 64, 4, stride=2, padding=1),
            nn.LeakyReLU(0.1),
            nn.Flatten(),
            nn.Linear(64 * 8 * 8, 1),
            nn.Flatten(0),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=Path("runs/discs"))
    options = parser.parse_args()

    config = gan.make_config("fashion", steps=options.steps, latent_dim=16, ema_half_life_kimg=0.5)
    run = gan.train(config, out=options.out, generator=MyGenerator(), discriminator=MyDiscriminator(), data=Discs())

    trained = gan.load(run.folder, generator=MyGenerator())
    images = trained.sample(64, seed=0)
    print(f"{len(images)} images of {tuple(images.shape[1:])}; {run.step} steps; everything is in {run.folder}")


if __name__ == "__main__":
    main()
