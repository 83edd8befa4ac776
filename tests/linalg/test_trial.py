"""A bound that is guessed from a leading vector and then proved, against singular value decompositions."""

import math

import pytest
import torch

from spectralnorm.linalg.trial import tried_upper_bound

SHAPES = [(1, 1), (1, 7), (7, 1), (12, 12), (64, 200), (200, 64), (3, 30, 20)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.complex64]


def exact_norms(matrix):
    """Less than what the decomposition may be off by."""
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float64))
    return torch.linalg.svdvals(wide)[..., 0] * (1 - 1e-13)


def leading_vector(matrix):
    u, _, vh = torch.linalg.svd(matrix.to(torch.promote_types(matrix.dtype, torch.float64)), full_matrices=False)
    return u[..., 0] if matrix.shape[-2] <= matrix.shape[-1] else vh[..., 0, :].conj()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_bound_is_not_below_the_norm_and_near_to_it(shape, dtype, scale, device):
    matrix = (torch.randn(shape, dtype=torch.complex64 if dtype.is_complex else torch.float32) * scale).to(dtype)
    bound = tried_upper_bound(matrix.to(device), leading_vector(matrix).to(device)).cpu()
    norms = exact_norms(matrix)
    assert (bound >= norms).all()
    assert (bound <= 1.005 * norms).all()


@pytest.mark.parametrize("kind", ["stranger", "zero", "not finite", "rank one", "equal singular values"])
def test_no_vector_makes_the_bound_too_small(kind, device):
    matrix = torch.randn(40, 60)
    vector = torch.randn(40)
    if kind == "zero":
        vector = torch.zeros(40)
    elif kind == "not finite":
        vector[3] = math.nan
    elif kind == "rank one":
        matrix = torch.outer(torch.randn(40), torch.randn(60))
    elif kind == "equal singular values":
        matrix = torch.linalg.qr(torch.randn(60, 40))[0].T.contiguous()
    bound = tried_upper_bound(matrix.to(device), vector.to(device)).cpu()
    assert exact_norms(matrix) <= bound <= 1.02 * exact_norms(matrix)


def test_matrices_of_a_batch_are_bounded_each_by_itself():
    matrices = torch.randn(4, 6, 9)
    matrices[1] = 0
    matrices[2, 3, 3] = math.inf
    bounds = tried_upper_bound(matrices, leading_vector(matrices.nan_to_num(posinf=1.0)))
    assert bounds[1] == 0
    assert bounds[2] == math.inf
    for place in (0, 3):
        assert exact_norms(matrices[place]) <= bounds[place] <= 1.001 * exact_norms(matrices[place])


def test_integer_matrices_of_which_the_norm_is_known():
    for size in (3, 50, 200):
        ones = torch.ones(size, 2 * size)
        exact = math.sqrt(2) * size
        bound = tried_upper_bound(ones, torch.ones(size)).item()
        assert exact <= bound <= exact * 1.001
