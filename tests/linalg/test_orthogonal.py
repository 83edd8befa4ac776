"""Orthogonal and capped matrices, against SVD."""

import pytest
import torch

from spectralnorm.errors import UserError
from spectralnorm.linalg.orthogonal import bjorck, cayley, rescaled_below, soft_cap

SHAPES = [(12, 12), (20, 7), (7, 20), (1, 9), (9, 1), (3, 8, 5)]
SVD = 1e-12


def _random(shape, device, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", SHAPES)
def test_bjorck_goes_to_the_nearest_orthogonal_matrix(shape, dtype, device):
    matrix = _random(shape, device, dtype)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(bjorck(matrix, num_iterations=60), left @ right)


@pytest.mark.parametrize("num_squarings", [0, 1, 3, 6])
def test_bjorck_never_passes_one_and_rises_with_each_iteration(num_squarings, device):
    matrix = torch.diag(torch.logspace(-3, 2, 16, dtype=torch.float64, device=device))
    before = torch.zeros(16, dtype=torch.float64, device=device)
    for num_iterations in range(30):
        found = bjorck(matrix, num_iterations=num_iterations, num_squarings=num_squarings).diagonal()
        assert found.amax() <= 1 + 16 * torch.finfo(torch.float64).eps
        assert (found >= before * (1 - 1e-12)).all()
        before = found


def test_bjorck_takes_singular_values_by_the_cubic(device):
    values = torch.tensor([1.0, 0.2, 0.005], dtype=torch.float64, device=device)
    expected = values / values.pow(16).sum().pow(1 / 16)
    for _ in range(15):
        expected = 1.5 * expected - 0.5 * expected**3
    found = torch.linalg.svdvals(bjorck(cayley(_random((6, 3), device)) * values))
    torch.testing.assert_close(found.sort().values, expected.sort().values)
    assert expected[2] > 0.9  # a two-hundredth, as its docstring says


def test_bjorck_keeps_zero_and_what_has_too_few_directions(device):
    assert (bjorck(torch.zeros(3, 4, device=device)) == 0).all()
    rank_one = torch.ones(4, 4, dtype=torch.float64, device=device)
    torch.testing.assert_close(bjorck(rank_one, num_iterations=30), rank_one / 4)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e3, 1e30])
def test_bjorck_does_not_depend_on_the_scale(scale, device):
    matrix = _random((6, 9), device, torch.float32)
    torch.testing.assert_close(bjorck(matrix * scale), bjorck(matrix), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", SHAPES)
def test_cayley_is_orthogonal_for_any_matrix(shape, dtype, device):
    for scale in (0.0, 1e-3, 1.0, 30.0):
        values = torch.linalg.svdvals(cayley(_random(shape, device, dtype) * scale))
        torch.testing.assert_close(values, torch.ones_like(values))


def test_cayley_of_a_square_matrix_is_the_classical_transform(device):
    matrix = _random((5, 5), device)
    skew, identity = matrix - matrix.mT, torch.eye(5, dtype=torch.float64, device=device)
    torch.testing.assert_close(cayley(matrix), torch.linalg.inv(identity + skew) @ (identity - skew))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("limit", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_soft_cap_takes_singular_values_below_the_limit(shape, limit, dtype, device):
    matrix = _random(shape, device, dtype)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    capped = values / torch.sqrt(1 + (values / limit) ** 2)
    found = soft_cap(matrix, limit)
    torch.testing.assert_close(torch.linalg.svdvals(found), capped)
    # One side's vectors stay.
    if shape[-2] >= shape[-1]:
        torch.testing.assert_close(found @ found.mH, (left * capped[..., None, :] ** 2) @ left.mH)
    else:
        torch.testing.assert_close(found.mH @ found, (right.mH * capped[..., None, :] ** 2) @ right)


def test_a_soft_cap_hardly_changes_what_is_far_below(device):
    matrix = 1e-3 * torch.eye(4, dtype=torch.float64, device=device)
    torch.testing.assert_close(soft_cap(matrix), matrix, rtol=1e-6, atol=0)


@pytest.mark.parametrize("function", [bjorck, cayley, soft_cap])
@pytest.mark.parametrize("shape", [(3, 3), (4, 2), (2, 4)])
def test_gradients_are_the_functions(function, shape, device):
    assert torch.autograd.gradcheck(function, _random(shape, device).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("limit", [1.0, 0.3, 2.0])
def test_what_was_rescaled_is_below_the_limit_as_stored(limit, dtype, device):
    for shape in [(64, 64), (5, 200), (200, 5), (1, 1)]:
        orthogonal = cayley(_random(shape, device, torch.float32))
        for matrix in (orthogonal * limit, orthogonal * limit * (1 + 1e-6), _random(shape, device), orthogonal * 1e-3):
            found = rescaled_below(matrix.to(dtype), limit)
            assert torch.linalg.matrix_norm(found.double(), 2) <= limit * (1 + SVD)


def test_what_is_below_the_limit_is_not_rescaled(device):
    matrix = cayley(_random((8, 5), device)) * 0.9
    assert torch.equal(rescaled_below(matrix), matrix)


def test_rescaling_costs_little_beyond_the_excess(device):
    matrix = cayley(_random((256, 128), device, torch.float32))
    assert torch.linalg.matrix_norm(rescaled_below(matrix), 2) > 0.999


@pytest.mark.parametrize("function", [bjorck, cayley, soft_cap])
def test_what_is_no_matrix_is_refused(function, device):
    with pytest.raises(UserError, match="takes floating matrices"):
        function(torch.ones(3, device=device))
    with pytest.raises(UserError, match="takes floating matrices"):
        function(torch.ones(3, 3, device=device, dtype=torch.int64))


def test_settings_that_make_no_sense_are_refused(device):
    matrix = torch.ones(2, 2, device=device)
    with pytest.raises(UserError, match="zero or more"):
        bjorck(matrix, num_iterations=-1)
    with pytest.raises(UserError, match="limit must be positive"):
        soft_cap(matrix, 0.0)
