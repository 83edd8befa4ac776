"""Bounds for certificates: upper and lower enclose the norm, and are near to one another."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spectralnorm.errors import UserError
from spectralnorm.linalg import (
    convolution_lower_bound,
    gram_upper_bound,
    matrix_lower_bound,
    rigorous,
    rigorous_largest_norm,
    rigorous_matrix_bound,
    rigorous_norm_bounds,
)
from spectralnorm.linalg import lower as lower_module
from spectralnorm.linalg.convolution import ConvolutionGeometry

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128)


def integers_of_known_norm(dtype: torch.dtype, device: torch.device) -> list[tuple[Tensor, int]]:
    """Matrices of integers and the exact squares of their norms."""
    cases = []
    sylvester = torch.ones(1, 1, dtype=dtype, device=device)
    for _ in range(6):
        sylvester = torch.cat((torch.cat((sylvester, sylvester), 1), torch.cat((sylvester, -sylvester), 1)))
        cases.append((sylvester, len(sylvester)))
    for rows, columns in ((1, 1), (1, 40), (40, 1), (3, 50), (70, 70)):
        left = torch.randint(1, 1000, (rows,), device=device)
        right = torch.randint(-1000, 1000, (columns,), device=device)
        cases.append((torch.outer(left, right).to(dtype), int((left**2).sum()) * int((right**2).sum())))
        cases.append((torch.ones(rows, columns, dtype=dtype, device=device), rows * columns))
    cases.append((torch.diag(torch.arange(1, 60, device=device)).to(dtype), 59**2))
    # Blocks [[1, 1], [0, 1]] have no rational norm, [[3, 4], [4, -3]] has 5.
    cases.append((torch.block_diag(*[torch.tensor([[3.0, 4], [4, -3]])] * 20).to(device, dtype), 25))
    return cases


def relative_gap(matrix: Tensor) -> float:
    lower, upper = matrix_lower_bound(matrix), rigorous_matrix_bound(matrix)
    assert lower <= upper
    return upper / lower - 1


class TestRigorousBound:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
    def test_it_encloses_norms_that_are_known_exactly(self, dtype, device):
        for matrix, square in integers_of_known_norm(dtype, device):
            for factor in (1, 1j) if dtype.is_complex else (1, -1):
                upper, lower = rigorous_matrix_bound(matrix * factor), matrix_lower_bound(matrix * factor)
                # Compared as fractions: without a rounding of their own.
                assert Fraction(lower) ** 2 <= square <= Fraction(upper) ** 2
                assert upper / lower - 1 < 1e-10

    @given(
        rows=st.integers(1, 30),
        columns=st.integers(1, 60),
        dtype=st.sampled_from(DTYPES),
        kind=st.sampled_from(["normal", "rank_one", "orthogonal", "sparse", "mixed"]),
        exponent=st.integers(-250, 250),
        seed=st.integers(0, 2**31),
    )
    @settings(deadline=None, max_examples=150)
    def test_bounds_are_ordered_and_near(self, rows, columns, dtype, kind, exponent, seed):
        generator = torch.Generator().manual_seed(seed)
        high = torch.promote_types(dtype, torch.float64)
        matrix = torch.randn(rows, columns, dtype=high, generator=generator)
        if kind == "rank_one":
            matrix = matrix[:, :1] @ matrix[:1]
        elif kind == "orthogonal":
            matrix = torch.linalg.qr(matrix)[0]
        elif kind == "sparse":
            matrix = matrix * (torch.rand(matrix.shape, generator=generator) < 0.1)
        elif kind == "mixed":
            matrix = matrix * 10.0 ** torch.randint(-40, 40, matrix.shape, generator=generator)
        matrix = matrix * 10.0**exponent if dtype == high else matrix
        matrix = matrix.to(dtype)
        if not bool(matrix.isfinite().all()):
            assert rigorous_matrix_bound(matrix) == math.inf
            return
        lower, upper = matrix_lower_bound(matrix), rigorous_matrix_bound(matrix)
        norm = torch.linalg.matrix_norm(matrix.to(high), 2).item()
        assert lower <= norm * (1 + 1e-12)
        assert norm * (1 - 1e-12) <= upper
        assert lower <= upper <= lower * (1 + 1e-9)
        assert lower <= gram_upper_bound(matrix).item()

    @pytest.mark.sweep
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_of_twenty_thousand_matrices_none_is_out_of_order(self, dtype, device):
        high = torch.promote_types(dtype, torch.float64)
        generator = torch.Generator().manual_seed(2)
        for number in range(105):
            rows, columns = torch.randint(1, 40, (2,), generator=generator).tolist()
            rank = 1 + number % min(rows, columns)
            left = torch.randn(32, rows, rank, dtype=high, generator=generator)
            right = torch.randn(32, rank, columns, dtype=high, generator=generator)
            matrices = (left @ right).to(dtype)
            norms = torch.linalg.matrix_norm(matrices.to(high), 2)
            upper = rigorous_norm_bounds(matrices.to(device)).cpu()
            assert bool((upper >= norms * (1 - 1e-13)).all())
            assert bool((upper <= norms * (1 + 1e-9)).all())
            for matrix, norm in zip(matrices[:4].to(device), norms.tolist(), strict=False):
                assert norm * (1 - 1e-9) <= matrix_lower_bound(matrix) <= norm * (1 + 1e-13)

    def test_it_is_tight_on_the_sizes_of_layers(self, device):
        assert relative_gap(torch.randn(64, 576, device=device)) < 1e-11
        assert relative_gap(torch.randn(512, 256, device=device)) < 1e-10
        assert relative_gap(torch.randn(150, 150, dtype=torch.complex128, device=device)) < 1e-10
        assert relative_gap(torch.linalg.qr(torch.randn(300, 300, dtype=torch.float64, device=device))[0]) < 1e-10

    def test_edges(self, device):
        assert rigorous_matrix_bound(torch.zeros(3, 4, device=device)) == 0
        assert rigorous_matrix_bound(torch.zeros(3, 0, device=device)) == 0
        for bad in (math.nan, math.inf, -math.inf):
            assert rigorous_matrix_bound(torch.tensor([[1.0, bad]], device=device)) == math.inf
            assert matrix_lower_bound(torch.tensor([[1.0, bad]], device=device)) == 0
        assert matrix_lower_bound(torch.zeros(3, 4, device=device)) == 0
        assert matrix_lower_bound(torch.zeros(0, 4, device=device)) == 0
        least = torch.full((3, 4), 5e-324, dtype=torch.float64, device=device)
        assert matrix_lower_bound(least) <= math.sqrt(12) * 5e-324
        assert 3 * 5e-324 < rigorous_matrix_bound(least) <= 5 * 5e-324
        huge = torch.full((3, 4), 1e308, dtype=torch.float64, device=device)
        assert rigorous_matrix_bound(huge) == math.inf
        assert rigorous_matrix_bound(huge / 16) / (math.sqrt(12) * 6.25e306) - 1 < 1e-12
        with pytest.raises(UserError, match="takes one matrix"):
            rigorous_matrix_bound(torch.ones(2, 3, 4))
        with pytest.raises(UserError, match="floating matrices"):
            rigorous_matrix_bound(torch.ones(2, 3, dtype=torch.int64))
        with pytest.raises(UserError, match="one floating matrix"):
            matrix_lower_bound(torch.ones(2))

    @pytest.mark.parametrize("level", [0.5, 1 - 1e-12, 1 + 1e-6, 3.0])
    def test_a_wrong_approximation_makes_no_false_bound(self, level, monkeypatch, device):
        matrices = torch.randn(4, 20, 30, dtype=torch.float64, device=device)
        exact = rigorous._eigenvalues
        monkeypatch.setattr(rigorous, "_eigenvalues", lambda gram: level * exact(gram))
        norms = torch.linalg.matrix_norm(matrices, 2)
        bounds = rigorous_norm_bounds(matrices)
        assert bool((bounds >= norms * (1 - 1e-14)).all())
        # Below the norm there is no factor, and another method steps in.
        assert bool((bounds <= norms * max(1, level) ** 0.5 * (1 + 1e-7)).all())

    @pytest.mark.parametrize("level", [0.5, 1 - 1e-9, 2.0])
    @pytest.mark.parametrize("factor", [torch.zeros_like, torch.ones_like, lambda below: 3 * below.tril()])
    def test_a_wrong_factor_makes_no_false_bound(self, factor, level, device):
        scaled = torch.randn(3, 20, 30, dtype=torch.float64, device=device)
        gram, slack, _ = rigorous._gram(scaled)
        squares = torch.linalg.matrix_norm(scaled, 2) ** 2
        with pytest.MonkeyPatch.context() as patch:
            none = torch.zeros(3, dtype=torch.int32, device=device)
            patch.setattr(torch.linalg, "cholesky_ex", lambda below: (factor(below), none))
            bounds = rigorous._attempt(gram, slack, level * squares)
        assert bool((bounds >= squares * (1 - 1e-14)).all())

    def test_what_the_gram_matrix_may_be_wrong_by_is_added(self, device):
        scaled = torch.randn(3, 20, 30, dtype=torch.float64, device=device)
        gram, slack, _ = rigorous._gram(scaled)
        level = 1.01 * torch.linalg.matrix_norm(scaled, 2) ** 2
        assert bool((rigorous._attempt(gram, slack + 1, level) >= level + 1).all())

    def test_an_eigenvalue_iteration_that_does_not_end_is_done_without(self, monkeypatch, device):
        def failing(*_):
            raise torch.linalg.LinAlgError("did not converge")

        monkeypatch.setattr(torch.linalg, "eigvalsh", failing)
        matrices = torch.randn(10, 6, 8, dtype=torch.float64, device=device)
        norms = torch.linalg.matrix_norm(matrices, 2)
        assert bool((rigorous_norm_bounds(matrices) >= norms * (1 - 1e-14)).all())
        assert norms.max().item() * (1 - 1e-14) <= rigorous_largest_norm(matrices) <= norms.max().item() * (1 + 1e-7)


class TestBatches:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
    def test_of_many_matrices_each_has_its_bound_and_the_largest_is_theirs(self, dtype, device):
        matrices = torch.randn(6, 7, 12, 9, dtype=dtype, device=device)
        matrices *= torch.logspace(-200, 100, 7, dtype=torch.float64, device=device)[:, None, None]
        norms = torch.linalg.matrix_norm(matrices, 2)
        bounds = rigorous_norm_bounds(matrices)
        assert bounds.shape == (6, 7)
        assert bool((bounds >= norms * (1 - 1e-14)).all())
        assert bool((bounds <= norms * (1 + 1e-11)).all())
        largest = rigorous_largest_norm(matrices)
        assert norms.max().item() * (1 - 1e-14) <= largest <= norms.max().item() * (1 + 1e-11)

    def test_the_largest_is_found_where_the_guess_is_wrong(self, monkeypatch, device):
        matrices = torch.randn(50, 12, 9, dtype=torch.float64, device=device)
        norms = torch.linalg.matrix_norm(matrices, 2)
        monkeypatch.setattr(rigorous, "_estimates", lambda gram: -torch.linalg.matrix_norm(gram, 2))
        largest = rigorous_largest_norm(matrices)
        assert norms.max().item() * (1 - 1e-14) <= largest <= norms.max().item() * (1 + 1e-11)

    @pytest.mark.parametrize(
        "bound",
        [
            rigorous_norm_bounds,
            lambda *args, **options: torch.tensor(rigorous_largest_norm(*args, **options), dtype=torch.float64),
        ],
        ids=["each", "largest"],
    )
    def test_what_the_matrices_may_be_wrong_by_is_added(self, bound, device):
        matrices = torch.randn(20, 5, 6, dtype=torch.float64, device=device)
        plain = bound(matrices)
        assert bool((bound(matrices, error=0.5) >= plain + 0.5).all())
        assert bool((bound(matrices, error=0.5) <= plain + 0.5 + 1e-14).all())
        errors = torch.linspace(0, 1, 20, device=device)
        assert bound(matrices, error=errors).max() <= plain.max() + 1 + 1e-14
        assert bound(0 * matrices, error=errors).max() >= 1
        assert bound(matrices, error=math.inf).max() == math.inf
        with pytest.raises(UserError, match="zero or more"):
            bound(matrices, error=-1.0)

    def test_few_none_zero_and_bad_matrices_have_a_largest(self, device):
        assert rigorous_largest_norm(torch.zeros(0, 3, 4, device=device)) == 0
        assert rigorous_largest_norm(torch.zeros(9, 3, 4, device=device)) == 0
        assert rigorous_largest_norm(torch.zeros(9, 3, 0, device=device)) == 0
        matrices = torch.randn(9, 3, 4, device=device)
        matrices[2] = 0
        norm = torch.linalg.matrix_norm(matrices.double(), 2).max().item()
        assert norm <= rigorous_largest_norm(matrices) * (1 + 1e-14)
        matrices[3, 0, 0] = math.nan
        assert rigorous_largest_norm(matrices) == math.inf


_LAYERS = [
    (nn.Conv1d(2, 3, 3, padding=1), (9,)),
    (nn.Conv2d(4, 6, 4, stride=2, padding=1, groups=2), (6, 8)),
    (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (5, 4)),
    (nn.Conv2d(2, 2, 3, padding=2, dilation=2, padding_mode="circular"), (5, 5)),
    (nn.ConvTranspose2d(3, 2, 4, stride=2, padding=1), (3, 4)),
    (nn.Conv3d(1, 2, 2, padding=1, padding_mode="replicate"), (3, 2, 4)),
]


class TestQuotient:
    @given(
        image=st.lists(st.floats(-2, 2), min_size=1, max_size=20),
        vector=st.lists(st.floats(-2, 2), min_size=1, max_size=20).filter(lambda v: max(map(abs, v)) > 1e-3),
        error=st.floats(0, 1e-3),
        exponent=st.integers(-100, 100),
    )
    def test_a_lower_bound_is_below_the_exact_quotient(self, image, vector, error, exponent):
        lower = Fraction(
            lower_module._quotient(
                torch.tensor(image, dtype=torch.float64),
                torch.tensor(vector, dtype=torch.float64),
                error,
                2.0**exponent,
            )
        )
        assert lower >= 0
        # ||image|| / ||vector|| >= lower / scale + error, squared; if not zero, which is always a bound.
        least = lower / Fraction(2) ** exponent + Fraction(error)
        square = sum(Fraction(x) ** 2 for x in vector)
        assert lower == 0 or least**2 * square <= sum(Fraction(x) ** 2 for x in image)


class TestConvolutionLowerBound:
    @pytest.mark.parametrize(("layer", "size"), _LAYERS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex64])
    def test_it_is_the_norm_of_the_map_rounded_down(self, layer, size, dtype, device):
        geometry = ConvolutionGeometry.of(layer)
        weight = torch.randn(layer.weight.shape, dtype=dtype, device=device)
        high = weight.to(torch.promote_types(dtype, torch.float64))
        channels = geometry.channels(weight)[0]
        columns = torch.eye(channels * math.prod(size), dtype=high.dtype, device=device).view(-1, channels, *size)
        norm = torch.linalg.matrix_norm(geometry.apply(columns, high).flatten(1), 2).item()
        lower = convolution_lower_bound(weight, geometry, size)
        assert norm * (1 - 1e-6) <= lower <= norm

    @pytest.mark.parametrize("n", [1, 2, 8, 40])
    def test_of_all_ones_it_is_the_known_norm(self, n, device):
        layer = nn.Conv2d(1, 1, 3, padding=1, bias=False, dtype=torch.float64, device=device)
        # The symmetric tridiagonal matrix of ones has the eigenvalues 1 + 2 cos(j pi / (n + 1)).
        norm = (1 + 2 * math.cos(math.pi / (n + 1))) ** 2
        lower = convolution_lower_bound(nn.init.ones_(layer.weight), ConvolutionGeometry.of(layer), (n, n))
        assert norm * (1 - 1e-6) <= lower <= norm * (1 + 1e-15)

    def test_a_basis_that_memory_ends_is_begun_anew(self, monkeypatch, device):
        layer = nn.Conv1d(1, 1, 3, padding=1, bias=False, dtype=torch.float64, device=device)
        monkeypatch.setattr("spectralnorm.linalg.lower._BASIS_BYTES", 1)
        norm = 1 + 2 * math.cos(math.pi / 41)
        lower = convolution_lower_bound(nn.init.ones_(layer.weight), ConvolutionGeometry.of(layer), (40,))
        assert norm * (1 - 1e-6) <= lower <= norm

    def test_edges(self, device):
        layer = nn.Conv2d(1, 2, 3, bias=False, device=device)
        geometry = ConvolutionGeometry.of(layer)
        weight = layer.weight.detach()
        assert convolution_lower_bound(0 * weight, geometry, (5, 5)) == 0
        assert convolution_lower_bound(weight * math.nan, geometry, (5, 5)) == 0
        tiny = convolution_lower_bound(weight.double() * 2.0**-900, geometry, (5, 5))
        assert tiny == convolution_lower_bound(weight, geometry, (5, 5)) * 2.0**-900 > 0
        with pytest.raises(UserError, match="no output for inputs of size"):
            convolution_lower_bound(weight, geometry, (2, 5))
