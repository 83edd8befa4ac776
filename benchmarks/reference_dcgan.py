"""The plain script that the default recipe is measured against: a DCGAN as most people would write it today.

32 px, width 32, torch's own spectral normalization in the discriminator, the settings and the loop of the well-known
PyTorch DCGAN example. It runs for ``--seconds`` of training time and saves generated images (uint8) to ``--out``.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from spectralnorm.gan import load_images


def up(wide, narrow):
    return nn.ConvTranspose2d(wide, narrow, 4, 2, 1, bias=False), nn.BatchNorm2d(narrow), nn.ReLU(True)


def down(narrow, wide):
    return spectral_norm(nn.Conv2d(narrow, wide, 4, 2, 1)), nn.LeakyReLU(0.2, True)


def initialize(module):
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


def networks(latent_dim=100, width=32):
    first = nn.ConvTranspose2d(latent_dim, 4 * width, 4, 1, 0, bias=False), nn.BatchNorm2d(4 * width), nn.ReLU(True)
    last = nn.ConvTranspose2d(width, 1, 4, 2, 1), nn.Tanh()
    generator = nn.Sequential(*first, *up(4 * width, 2 * width), *up(2 * width, width), *last)
    head = spectral_norm(nn.Conv2d(4 * width, 1, 4)), nn.Flatten(0)
    discriminator = nn.Sequential(*down(1, width), *down(width, 2 * width), *down(2 * width, 4 * width), *head)
    # A normalized layer keeps torch's own initial weights: its scale is divided out, so N(0, 0.02) would change little.
    return generator.apply(initialize), discriminator


def train(seconds, seed, batch_size=64, latent_dim=100):
    torch.manual_seed(seed)
    images = load_images(None, image_size=32, channels=1).images.float() / 127.5 - 1
    generator, discriminator = networks(latent_dim)
    loader = torch.utils.data.DataLoader(images, batch_size, shuffle=True, drop_last=True)  # pyright: ignore[reportArgumentType]
    loss = nn.BCEWithLogitsLoss()
    ones, zeros = torch.ones(batch_size), torch.zeros(batch_size)
    optimizer_g = torch.optim.Adam(generator.parameters(), 2e-4, (0.5, 0.999))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), 2e-4, (0.5, 0.999))
    steps, start = 0, time.perf_counter()
    while True:
        for real in loader:
            if time.perf_counter() - start >= seconds:
                return generator, steps
            fake = generator(torch.randn(batch_size, latent_dim, 1, 1))
            optimizer_d.zero_grad()
            (loss(discriminator(real), ones) + loss(discriminator(fake.detach()), zeros)).backward()
            optimizer_d.step()
            optimizer_g.zero_grad()
            loss(discriminator(fake), ones).backward()
            optimizer_g.step()
            steps += 1


@torch.no_grad()
def sample(generator, num, seed, latent_dim=100):
    latents = torch.randn(num, latent_dim, 1, 1, generator=torch.Generator().manual_seed(seed))
    images = torch.cat([generator.eval()(part) for part in latents.split(500)])
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90, help="training time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num", type=int, default=5000, help="images to generate")
    parser.add_argument("--out", type=Path, default=Path("reference.pt"), help="a tensor saved by torch.save")
    arguments = parser.parse_args()
    generator, steps = train(arguments.seconds, arguments.seed)
    torch.save(sample(generator, arguments.num, seed=1_000_003 + arguments.seed), arguments.out)
    print(f"{steps} steps in {arguments.seconds:.0f} s; {arguments.num} images in {arguments.out}")
