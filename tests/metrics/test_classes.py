"""What is counted from a classifier's logits."""

import math

import pytest
import torch
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.metrics import class_statistics


def votes(*counts: int, strength: float = 20.0) -> Tensor:
    """Logits with so many images of each class."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return strength * torch.nn.functional.one_hot(labels, len(counts)).float()


def test_shares_are_the_votes() -> None:
    assert class_statistics(votes(1, 0, 3)).shares == (0.25, 0.0, 0.75)


def test_a_class_is_covered_from_two_percent_on() -> None:
    assert class_statistics(votes(979, 20, 1)).coverage == 2
    assert class_statistics(votes(980, 19, 1)).coverage == 1


def test_entropy_is_largest_when_all_classes_are_equally_frequent() -> None:
    assert class_statistics(votes(7, 7, 7, 7)).entropy == pytest.approx(math.log(4))


def test_entropy_is_zero_when_there_is_one_class_only() -> None:
    assert class_statistics(votes(0, 9)).entropy == 0


def test_entropy_is_that_of_the_shares() -> None:
    expected = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert class_statistics(votes(1, 3)).entropy == pytest.approx(expected)


def test_an_image_is_recognised_from_nine_tenths_of_probability_on() -> None:
    logits = torch.tensor([[0.0, math.log(9.1)], [0.0, math.log(8.9)], [30.0, 0.0], [0.0, 0.0]])
    assert class_statistics(logits).confident_share == 0.5


@pytest.mark.parametrize("wrong", [torch.zeros(0, 10), torch.zeros(10)], ids=["empty", "vector"])
def test_other_than_a_matrix_of_logits_is_refused(wrong: Tensor) -> None:
    with pytest.raises(UserError, match="logits must be a matrix of at least one row"):
        class_statistics(wrong)
