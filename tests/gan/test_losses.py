import math

import pytest
import torch
from torch.testing import assert_close

from spectralnorm.errors import UserError
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


def test_minimax_generator_has_no_gradient_where_the_discriminator_is_sure():
    logits = torch.tensor([-20.0], requires_grad=True)
    LOSSES["minimax"].generator(logits).backward()
    assert -1e-8 < logits.grad.item() < 0


def test_minimax_players_add_up_to_the_real_term_alone():
    # The game is zero-sum but for the real images, which the generator does not touch (Goodfellow et al. 2014, eq. 1).
    real, fake = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    total = LOSSES["minimax"].discriminator(real, fake) + LOSSES["minimax"].generator(fake)
    assert_close(total, -torch.log(torch.sigmoid(real)).mean())


def test_wasserstein_is_the_difference_of_the_means():
    loss = LOSSES["wasserstein"]
    assert loss.discriminator(torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 0.0])).item() == -2.5
    assert loss.generator(torch.tensor([-1.0, 0.0])).item() == 0.5


def test_least_squares_is_zero_at_the_labels():
    loss = LOSSES["least-squares"]
    assert loss.discriminator(torch.ones(3), torch.zeros(3)).item() == 0
    assert loss.generator(torch.ones(3)).item() == 0
    assert loss.discriminator(torch.tensor([3.0]), torch.tensor([2.0])).item() == 0.5 * 4 + 0.5 * 4
    assert loss.generator(torch.tensor([3.0])).item() == 2


def test_relativistic_compares_each_image_with_its_partner():
    real, fake = torch.tensor([0.5, -2.0]), torch.tensor([1.5, -3.0])
    loss = LOSSES["relativistic"]
    assert loss.paired_generator is not None
    of_discriminator = sum(math.log(1 + math.exp(x)) for x in (1.0, -1.0)) / 2
    assert_close(loss.discriminator(real, fake).item(), of_discriminator, rtol=1e-6, atol=0)
    of_generator = sum(math.log(1 + math.exp(x)) for x in (-1.0, 1.0)) / 2
    assert_close(loss.paired_generator(real, fake).item(), of_generator, rtol=1e-6, atol=0)


def test_relativistic_does_not_see_what_is_added_to_all_logits():
    real, fake = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    discriminator = LOSSES["relativistic"].discriminator
    assert_close(discriminator(real + 7, fake + 7), discriminator(real, fake))


def test_relativistic_refuses_batches_that_do_not_pair_up():
    with pytest.raises(UserError, match="give equally many"):
        LOSSES["relativistic"].discriminator(torch.zeros(4), torch.zeros(1))


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.paired_generator])
def test_a_paired_generator_is_its_generator_beside_real_logits_of_zero(name: str):
    loss, fake = LOSSES[name], torch.randn(4)
    assert loss.paired_generator is not None
    assert_close(loss.paired_generator(torch.zeros(4), fake), loss.generator(fake))
    assert loss.paired_generator(torch.ones(4), fake) > loss.paired_generator(torch.zeros(4), fake)


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
