"""Two networks that two processes train together are those that one process trains on the same images."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import spectralnorm as sn
from spectralnorm.gan.distributed import Processes
from spectralnorm.gan.in_training import InTraining
from spectralnorm.gan.penalties import PENALTIES
from spectralnorm.gan.precision import Precision

CPU = torch.device("cpu")


def networks():
    torch.manual_seed(0)
    generator = nn.Sequential(
        nn.Linear(6, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 256), nn.Unflatten(1, (4, 8, 8)), nn.Tanh()
    )
    discriminator = nn.Sequential(
        nn.Conv2d(4, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Tanh(), nn.Flatten(), nn.Linear(128, 640), nn.Tanh(),
        nn.Linear(640, 1),
    )  # fmt: skip
    return generator.double(), sn.add_spectral_norm(discriminator.double())


def train(processes, *, strategy="ddp", penalty=None, accumulate=1, num_steps=3):
    generator, discriminator = networks()
    precision = Precision("fp32", CPU)
    g, d = (InTraining(each, precision=precision, processes=processes, strategy=strategy) for each in networks())
    generator, discriminator = g.module, d.module
    adam_g, adam_d = (
        torch.optim.Adam(each.parameters(), lr=1e-2, betas=(0.5, 0.9), eps=1e-3) for each in (generator, discriminator)
    )
    random = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        batches = []
        adam_d.zero_grad()
        for place in range(accumulate):
            latents = processes.mine(torch.randn(8 // accumulate, 6, dtype=torch.float64, generator=random))
            real = processes.mine(torch.randn(8 // accumulate, 4, 8, 8, dtype=torch.float64, generator=random))
            batches.append(latents)
            with d.summing(is_last=place == accumulate - 1):
                fake = g(latents)
                loss = (1 - d(real)).relu().mean() + (1 + d(fake.detach())).relu().mean()
                if penalty is not None:
                    compute = partial(PENALTIES[penalty], d.exactly, real, fake.detach(), random=random)
                    loss = loss + d.penalty(compute, share=1 / accumulate)
                (loss / accumulate).backward()
        adam_d.step()
        gradients = [parameter.grad for parameter in discriminator.parameters()]
        adam_g.zero_grad()
        with d.frozen():
            for place, latents in enumerate(batches):
                with g.summing(is_last=place == accumulate - 1):
                    (-d(g(latents)).mean() / accumulate).backward()
        adam_g.step()
        assert all(a is b.grad for a, b in zip(gradients, discriminator.parameters(), strict=True))
    return {
        f"{role}.{name}": tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for role, network in (("generator", generator), ("discriminator", discriminator))
        for name, tensor in network.state_dict().items()
        if not name.endswith(("._u", "._v"))
    }


def check(**settings):
    found = train(Processes(dist.get_rank(), dist.get_world_size()), **settings)
    expected = train(Processes(), **{**settings, "strategy": "ddp"})
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"penalty": "r1"},
        {"accumulate": 2},
        {"accumulate": 2, "penalty": "r1-r2"},
        {"strategy": "fsdp"},
        {"strategy": "fsdp", "accumulate": 2},
        {"strategy": "fsdp", "penalty": "r1"},
        {"strategy": "fsdp", "accumulate": 2, "penalty": "r1-r2"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "ddp",
)
def test_networks_and_gradients_are_those_of_one_process(pair, settings):
    pair.run(check, **settings)
