"""What a Cholesky factor leaves is bounded, whatever computed its small blocks."""

from fractions import Fraction

import pytest
import torch

from spectralnorm.linalg.cholesky import measured_cholesky

_KINDS = [torch.float64, torch.complex128]


def _below(order, dtype, *, share, seed=0, count=1):
    """c^2 I - A A^H, c^2 being ``share`` times the largest eigenvalue of A A^H."""
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn(count, order, order, generator=generator, dtype=dtype)
    grams = matrices @ matrices.mH
    levels = share * torch.linalg.eigvalsh(grams)[:, -1]
    return torch.diag_embed(levels[:, None].expand(-1, order)).to(dtype) - grams


def _exact(number):
    number = complex(number)
    return Fraction(number.real), Fraction(number.imag)


def _left_exactly(matrix, factor):
    """||M - L L^H||_F^2 in fractions, from the lower halves."""
    rows = [[_exact(entry) for entry in row[: i + 1]] for i, row in enumerate(factor.tolist())]
    total = Fraction(0)
    for i, row in enumerate(rows):
        for j in range(i + 1):
            real, imaginary = _exact(matrix[i, j])
            for (a, b), (c, d) in zip(row[: j + 1], rows[j], strict=True):
                real -= a * c + b * d
                imaginary -= b * c - a * d
            total += (1 if i == j else 2) * (real**2 + imaginary**2)
    return total


@pytest.mark.parametrize("dtype", _KINDS)
@pytest.mark.parametrize("order", [1, 7, 16, 17, 40])
def test_rest_is_above_the_exact_one_and_is_rounding_alone(dtype, order):
    matrices = _below(order, dtype, share=1 + 1e-9)
    passed, factors, rests = measured_cholesky(matrices)

    assert passed.tolist() == [True]
    assert _left_exactly(matrices[0], factors[0]) <= Fraction(rests.item()) ** 2
    trace = matrices.diagonal(dim1=-2, dim2=-1).real.sum().item()
    assert rests.item() <= 6 * (order + 18) * 2.0**-53 * trace


@pytest.mark.parametrize("dtype", _KINDS)
def test_factor_is_that_of_lapack(dtype, device):
    matrices = _below(50, dtype, share=1.1, count=3).to(device)
    passed, factors, _ = measured_cholesky(matrices)

    assert bool(passed.all())
    torch.testing.assert_close(factors.tril(), torch.linalg.cholesky(matrices), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("step", ["cholesky_ex", "solve_triangular"])
@pytest.mark.parametrize("dtype", _KINDS)
def test_wrong_small_step_makes_the_rest_large_and_nothing_false(monkeypatch, dtype, step):
    right = getattr(torch.linalg, step)

    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        return (result[0] * 1.001, result[1]) if step == "cholesky_ex" else result * 1.001

    matrices = _below(40, dtype, share=1.5)
    monkeypatch.setattr(torch.linalg, step, wrong)
    passed, factors, rests = measured_cholesky(matrices)

    assert passed.tolist() == [True]
    exact = _left_exactly(matrices[0], factors[0])
    assert Fraction(1e-6) < exact <= Fraction(rests.item()) ** 2 <= 4 * exact


@pytest.mark.parametrize("dtype", _KINDS)
def test_no_eigenvalue_of_what_passes_is_below_minus_the_rest(dtype):
    shares = [1 + offset for offset in (-1e-6, -1e-12, -1e-14, -1e-15, 0.0, 1e-15, 1e-14, 1e-12)]
    matrices = torch.cat([_below(30, dtype, share=share, seed=seed) for share in shares for seed in range(20)])
    passed, _, rests = measured_cholesky(matrices)

    assert 0.2 < passed.double().mean() < 0.9
    least = torch.linalg.eigvalsh(matrices[passed])[:, 0]
    assert bool((least >= -rests).all())
    assert not bool(passed[:20].any())
    assert bool(passed[-20:].all())


@pytest.mark.parametrize("dtype", _KINDS)
def test_each_of_a_batch_passes_or_fails_by_itself(monkeypatch, dtype):
    order = 60
    matrices = _below(order, dtype, share=1.2, count=4)
    for place, bad in enumerate([None, 2, 35, order - 1]):
        if bad is not None:
            matrices[place, bad, bad] = -1
    together = measured_cholesky(matrices)
    alone = measured_cholesky(matrices[:1])

    assert together.passed.tolist() == [True, False, False, False]
    torch.testing.assert_close(together.factors.tril(), alone.factors.tril())
    torch.testing.assert_close(together.rests, alone.rests)

    sizes = []
    solved = torch.linalg.solve_triangular
    monkeypatch.setattr(
        torch.linalg, "solve_triangular", lambda *args, **kwargs: sizes.append(len(args[0])) or solved(*args, **kwargs)
    )
    measured_cholesky(matrices)
    assert sizes == [3, 3, 2]  # of four panels, the last of which solves for nothing


@pytest.mark.parametrize("dtype", _KINDS)
def test_upper_halves_are_not_read(dtype):
    matrices = _below(40, dtype, share=1.1, count=2)
    spoilt = matrices.tril() + torch.full_like(matrices, torch.nan).triu(1).nan_to_num(nan=1e300)
    spoilt[:, 0, 1:] = torch.nan
    for one, other in zip(measured_cholesky(matrices), measured_cholesky(spoilt), strict=True):
        torch.testing.assert_close(one.tril() if one.ndim == 3 else one, other.tril() if other.ndim == 3 else other)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_matrix_that_is_not_finite_does_not_pass(bad):
    matrices = _below(20, torch.float64, share=1.1, count=3)
    matrices[1, 18, 3] = bad
    assert measured_cholesky(matrices).passed.tolist() == [True, False, True]


def test_batch_of_which_none_passes_gives_no_rest():
    passed, factors, rests = measured_cholesky(-torch.eye(40, dtype=torch.float64).expand(3, -1, -1))
    assert not bool(passed.any())
    assert len(factors) == len(rests) == 0
