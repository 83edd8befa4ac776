import math

import pytest
import torch
from torch.testing import assert_close

from spectralnorm.gan.losses import LOSSES


def test_hinge_charges_only_logits_inside_the_margin():
    real = torch.tensor([2.0, 0.5, -1.0], dtype=torch.float64)
    fake = torch.tensor([-2.0, 0.0, 1.0], dtype=torch.float64)
    assert_close(LOSSES["hinge"].discriminator(real, fake).item(), (0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3)


def test_hinge_generator_raises_the_logit_of_its_images():
    assert_close(LOSSES["hinge"].generator(torch.tensor([1.0, 3.0])).item(), -2.0)


def test_nonsaturating_is_the_cross_entropy_of_the_two_labels():
    real, fake = torch.tensor([0.3, -1.2]), torch.tensor([0.7, 2.0])
    expected = -sum(math.log(1 / (1 + math.exp(-x))) for x in real.tolist()) / 2
    expected += -sum(math.log(1 - 1 / (1 + math.exp(-x))) for x in fake.tolist()) / 2
    assert_close(LOSSES["nonsaturating"].discriminator(real, fake).item(), expected, rtol=1e-6, atol=0)


def test_nonsaturating_generator_has_a_gradient_where_the_discriminator_is_sure():
    logits = torch.tensor([-20.0], requires_grad=True)
    LOSSES["nonsaturating"].generator(logits).backward()
    assert_close(logits.grad, torch.tensor([-1.0]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_falls_when_its_player_does_better(name: str):
    loss = LOSSES[name]
    worse, better = torch.tensor([-0.5]), torch.tensor([0.5])
    assert loss.discriminator(better, worse) < loss.discriminator(worse, better)
    assert loss.generator(better) < loss.generator(worse)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_stays_finite_at_huge_logits(name: str):
    huge = torch.tensor([1e4, -1e4])
    assert torch.isfinite(LOSSES[name].discriminator(huge, huge))
    assert torch.isfinite(LOSSES[name].generator(huge))
