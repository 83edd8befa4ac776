"""GroupSort and MaxMin: what they compute, their gradients, and that they stretch nothing."""

import pytest
import torch

from spectralnorm.errors import UserError
from spectralnorm.layers import GroupSort, MaxMin


@pytest.mark.parametrize(
    ("shape", "dim"), [((5, 12), 1), ((5, 12), -1), ((2, 12, 3, 4), 1), ((2, 3, 12), 2), ((12,), 0)]
)
@pytest.mark.parametrize("group_size", [1, 2, 3, None])
def test_each_group_is_sorted_along_the_dimension(shape, dim, group_size, device):
    features = torch.randn(shape, device=device)
    found = GroupSort(group_size, dim=dim)(features).movedim(dim, -1)
    size = group_size or 12
    groups = features.movedim(dim, -1).reshape(-1, size).tolist()
    expected = torch.tensor([sorted(group) for group in groups], device=device).reshape(found.shape)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("shape", "dim"), [((5, 12), 1), ((5, 12), -1), ((2, 12, 3, 4), 1), ((2, 3, 12), -1)])
def test_max_min_is_a_sort_of_pairs_with_the_larger_first(shape, dim, device):
    features = torch.randn(shape, device=device)
    pairs = GroupSort(2, dim=dim)(features).movedim(dim, -1).unflatten(-1, (-1, 2))
    expected = pairs.flip(-1).flatten(-2).movedim(-1, dim)
    torch.testing.assert_close(MaxMin(dim=dim)(features), expected)


@pytest.mark.parametrize("activation", [GroupSort(2), GroupSort(3), GroupSort(None), MaxMin()])
def test_gradients_keep_their_length_also_at_ties(activation, device):
    for features in (torch.randn(4, 6, dtype=torch.float64, device=device), torch.zeros(4, 6, device=device)):
        features.requires_grad_()
        outputs = activation(features)
        gradient = torch.randn_like(outputs)
        (found,) = torch.autograd.grad(outputs, features, gradient)
        torch.testing.assert_close(found.norm(dim=1), gradient.norm(dim=1))


@pytest.mark.parametrize("activation", [GroupSort(2), GroupSort(4), GroupSort(None), MaxMin()])
@pytest.mark.parametrize("order", [1, 2, float("inf")])
def test_no_difference_grows(activation, order, device):
    first = torch.randn(4000, 8, dtype=torch.float64, device=device)
    second = first + torch.randn_like(first) * torch.logspace(-3, 1, 4000, dtype=torch.float64, device=device)[:, None]
    before = torch.linalg.vector_norm(first - second, order, dim=1)
    after = torch.linalg.vector_norm(activation(first) - activation(second), order, dim=1)
    assert (after <= before * (1 + 1e-12)).all()


@pytest.mark.parametrize("activation", [GroupSort(2), MaxMin()])
def test_a_width_that_does_not_divide_is_refused(activation, device):
    with pytest.raises(UserError, match="groups of 2, but there are 7"):
        activation(torch.randn(3, 7, device=device))
    with pytest.raises(UserError, match="group_size must be positive"):
        GroupSort(0)


def test_they_compile_without_a_graph_break(device):
    features = torch.randn(3, 8, device=device)
    for activation in (GroupSort(4), MaxMin()):
        compiled = torch.compile(activation, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(features), activation(features))
