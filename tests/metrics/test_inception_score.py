"""The Inception Score's formula, against torchmetrics and against sums written out."""

import math

import pytest
import torch

from spectralnorm.errors import UserError
from spectralnorm.metrics import inception_score


def logits(num: int, classes: int = 10, *, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(num, classes, generator=torch.Generator().manual_seed(0))


def test_the_score_is_torchmetrics_for_the_same_order() -> None:
    from torchmetrics.image.inception import InceptionScore

    class Given(torch.nn.Module):
        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return given

    metric = InceptionScore(feature=Given(), splits=10)
    metric.update(logits(500))
    torch.manual_seed(3)
    mean, spread = metric.compute()
    found = inception_score(logits(500), splits=10, seed=3)
    # torchmetrics takes the deviation of a sample of parts.
    assert found == (pytest.approx(float(mean), rel=1e-5), pytest.approx(float(spread) * math.sqrt(0.9), rel=1e-4))


def test_the_score_of_one_part_is_the_exponential_of_the_mean_divergence() -> None:
    p = logits(40).double().softmax(1).tolist()
    marginal = [sum(row[c] for row in p) / 40 for c in range(10)]
    divergence = sum(sum(q * math.log(q / m) for q, m in zip(row, marginal, strict=True)) for row in p) / 40
    assert inception_score(logits(40), splits=1)[0] == pytest.approx(math.exp(divergence))


def test_clear_and_evenly_spread_classes_score_their_number() -> None:
    clear = 100 * torch.eye(5).repeat(20, 1)
    assert inception_score(clear, splits=1)[0] == pytest.approx(5)


def test_images_that_all_look_alike_score_one() -> None:
    assert inception_score(torch.tensor([[3.0, 1.0]]).repeat(20, 1)) == (pytest.approx(1), pytest.approx(0, abs=1e-7))


def test_parts_that_do_not_divide_the_images_differ_by_one() -> None:
    ordered = [inception_score(part, splits=1)[0] for part in logits(103).split([25, 26, 26, 26])]
    assert inception_score(logits(103), splits=4, seed=None)[0] == pytest.approx(sum(ordered) / 4)


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(UserError, match="splits must be from 1 to the 5 images, got 6"):
        inception_score(logits(5), splits=6)
    with pytest.raises(UserError, match="matrix of at least one row"):
        inception_score(torch.zeros(0, 10))
