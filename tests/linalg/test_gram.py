"""The Gram bound against the singular value decomposition: never below it, and not far above."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.linalg import gram_upper_bound

# Of the reference: an SVD in float64 is off by a few units of 2^-53 times the order.
SLACK = 1e-12

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.complex64)
KINDS = "normal rank_one orthogonal equal_rows ones sparse power_law one_tiny_row mixed_scales".split()


def example(kind: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Matrices of one kind in float64 or complex128."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    *batch, rows, columns = shape
    matrix = normal(*shape)
    match kind:
        case "rank_one":
            return normal(*batch, rows, 1) @ normal(*batch, 1, columns)
        case "orthogonal":
            basis = torch.linalg.qr(normal(*batch, max(rows, columns), min(rows, columns)))[0]
            return basis if rows >= columns else basis.mH
        case "equal_rows":
            return matrix[..., :1, :].expand(shape).clone()
        case "ones":
            return torch.ones_like(matrix)
        case "sparse":
            return matrix * (uniform(*shape) < 0.1)
        case "power_law":
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
            return left * (1.0 / torch.arange(1, values.shape[-1] + 1) ** 2) @ right
        case "one_tiny_row":
            matrix[..., 0, :] *= 1e-20
        case "mixed_scales":
            matrix = matrix * 10 ** (60 * uniform(*shape) - 30)
    return matrix


def violations(
    kind: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    num_squarings: int,
    seed: int,
    device: torch.device | None = None,
    with_vector: bool = False,
) -> int:
    """In how many of a batch of matrices, each of another size of numbers, the bound is below the norm."""
    generator = torch.Generator().manual_seed(seed)
    high = torch.complex128 if dtype.is_complex else torch.float64
    scale = 10 ** (60 * torch.rand(*shape[:-2], 1, 1, dtype=torch.float64, generator=generator) - 30)
    matrix = (example(kind, shape, high, generator) * scale).to(dtype)
    vector = torch.randn(*shape[:-2], min(shape[-2:]), dtype=high, generator=generator) if with_vector else None
    if device is not None:
        vector = vector if vector is None else vector.to(device)
    bound = gram_upper_bound(matrix.to(device), vector=vector, num_squarings=num_squarings).cpu()
    finite = matrix.isfinite().all((-2, -1))
    assert bool((bound[~finite] == math.inf).all())
    norm = torch.linalg.matrix_norm(matrix[finite].to(high), 2)
    return int((bound[finite] < norm * (1 - SLACK)).sum())


class TestGuarantee:
    @given(
        kind=st.sampled_from(KINDS),
        rows=st.integers(1, 40),
        columns=st.integers(1, 200),
        dtype=st.sampled_from(DTYPES),
        num_squarings=st.integers(0, 9),
        with_vector=st.booleans(),
        seed=st.integers(0, 2**31),
    )
    @settings(deadline=None, max_examples=150)
    def test_it_is_never_below_the_norm(self, kind, rows, columns, dtype, num_squarings, with_vector, seed):
        assert not violations(kind, (8, rows, columns), dtype, num_squarings, seed, with_vector=with_vector)

    @pytest.mark.sweep
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", KINDS)
    def test_it_is_never_below_the_norm_of_twenty_thousand(self, kind, dtype, device):
        # 36 combinations of 20 shapes with 32 matrices each.
        shapes = torch.randint(1, 65, (20, 2), generator=torch.Generator().manual_seed(1)).tolist()
        shapes[::5] = [(rows, 20 * columns) for rows, columns in shapes[::5]]
        for number, shape in enumerate(shapes):
            assert not violations(kind, (32, *shape), dtype, number % 9, number, device, with_vector=number % 2 == 0)

    @pytest.mark.parametrize("num_squarings", [0, 1, 5])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
    def test_it_is_not_below_norms_that_are_known_exactly(self, dtype, num_squarings, device):
        # In float64 an SVD is no better than the bound. Sylvester's matrices have orthogonal columns of length sqrt n;
        # the norm of an outer product of vectors of integers is that of one times that of the other.
        sylvester = torch.ones(1, 1, dtype=dtype, device=device)
        for _ in range(7):
            sylvester = torch.cat((torch.cat((sylvester, sylvester), 1), torch.cat((sylvester, -sylvester), 1)))
            bound = gram_upper_bound(sylvester, num_squarings=num_squarings).item()
            assert bound**2 >= len(sylvester)
            assert bound**2 <= len(sylvester) * (1 + 1e-10)
        if dtype.is_complex:
            sylvester = sylvester * 1j
        for rows, columns in ((1, 1), (3, 50), (50, 3), (100, 100)):
            left = torch.randint(-1000, 1000, (rows,), device=device)
            right = torch.randint(-1000, 1000, (columns,), device=device)
            matrix = torch.outer(left, right).to(dtype) * (0.6 + 0.8j if dtype.is_complex else 1)
            square = int((left**2).sum()) * int((right**2).sum())
            bound = gram_upper_bound(matrix, num_squarings=num_squarings).item()
            # 0.6 + 0.8i has length one but for rounding.
            assert bound >= math.sqrt(square) * (1 - (4e-16 if dtype.is_complex else 0))
            assert bound <= math.sqrt(square) * (1 + 1e-11)

    @pytest.mark.parametrize("offset", [0.0, 1e-4, 2e-4, 1e-3])
    def test_a_vector_that_is_almost_leading_does_not_cancel(self, offset):
        # Differences of squares fall 1e-4 below the norm here.
        matrix = torch.tensor([[1, offset], [offset, 1]])
        vector = torch.tensor([1.0, 0])
        norm = torch.linalg.matrix_norm(matrix.double(), 2).item()
        for num_squarings in range(4):
            assert gram_upper_bound(matrix, vector=vector, num_squarings=num_squarings).item() >= norm


class TestTightness:
    def test_of_gaussian_matrices_it_is_a_few_thousandths_of_a_percent_above(self, device):
        # A quarter of such matrices have two leading singular values so close that they are above 1e-4.
        matrices = torch.randn(25, 256, 512, dtype=torch.float64).to(device)
        norms = torch.linalg.matrix_norm(matrices, 2)
        excess = (gram_upper_bound(matrices) / norms - 1).median()
        assert 0 <= excess < 1e-4
        # float32 adds its rounding margin
        rounded = matrices[:3].float()
        excess = (gram_upper_bound(rounded) / torch.linalg.matrix_norm(rounded.double(), 2) - 1).median()
        assert 0 <= excess < 1e-3

    def test_summing_blocks_in_float64_keeps_the_margin_of_long_rows_small(self, device):
        matrix = torch.randn(64, 9216, device=device)
        norm = torch.linalg.matrix_norm(matrix.double(), 2)
        # The margin of one sum in float32 would be 9216 u times the stable rank, a half of that for the root: 1.5e-2.
        assert gram_upper_bound(matrix, num_squarings=8) / norm - 1 < 4e-4

    def test_of_an_orthogonal_matrix_only_the_margin_is_above(self, device):
        matrix = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64, device=device))[0]
        assert 0 <= gram_upper_bound(matrix, num_squarings=0) - 1 < 1e-11

    def test_each_squaring_halves_what_it_is_above(self, device):
        matrix = torch.randn(100, 200, dtype=torch.float64, device=device)
        norm = torch.linalg.matrix_norm(matrix, 2)
        excess = [(gram_upper_bound(matrix, num_squarings=n) / norm - 1).item() for n in range(0, 12)]
        assert all(after < 0.6 * before + 1e-11 for before, after in itertools.pairwise(excess))

    def test_a_singular_vector_tightens_what_has_not_been_squared(self, device):
        matrix = torch.randn(80, 120, dtype=torch.float64, device=device)
        left, values, right = torch.linalg.svd(matrix)
        plain = gram_upper_bound(matrix, num_squarings=0)
        assert values[0] <= gram_upper_bound(matrix, vector=left[:, 0], num_squarings=0) <= plain
        assert values[0] <= gram_upper_bound(matrix.T, vector=left[:, 0], num_squarings=0) <= plain
        assert gram_upper_bound(matrix, vector=left[:, -1], num_squarings=0) >= values[0]
        assert right.shape == (120, 120)


class TestEdges:
    @pytest.mark.parametrize(
        "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
    )
    def test_zero_is_zero_and_what_is_not_finite_is_infinity(self, dtype, device):
        matrices = torch.zeros(4, 3, 5, dtype=dtype, device=device)
        matrices[1, 2, 3] = math.nan
        matrices[2, 0, 0] = -math.inf
        matrices[3, 1, 1] = 2
        bound = gram_upper_bound(matrices)
        assert bound.dtype == torch.float64
        assert bound[:3].tolist() == [0, math.inf, math.inf]
        assert 2 <= bound[3] < 2.001

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_the_smallest_and_the_largest_numbers(self, dtype, device):
        smallest = torch.zeros((), dtype=dtype)
        smallest = torch.nextafter(smallest, smallest + 1) if dtype != torch.float16 else smallest + 2.0**-24
        matrix = torch.full((3, 3), smallest.item(), dtype=dtype, device=device)
        exact = 3 * smallest.double().item()
        assert exact <= gram_upper_bound(matrix).item() <= exact * 1.0001 + 5e-324
        largest = torch.finfo(dtype).max
        matrix = torch.diag(torch.full((3,), largest, dtype=dtype, device=device))
        assert largest <= gram_upper_bound(matrix).item() <= (largest * 1.0001 if dtype != torch.float64 else math.inf)

    def test_vectors_that_are_none_are_not_used(self, device):
        matrix = torch.randn(5, 20, 30, device=device)
        vector = torch.randn(5, 20, device=device)
        vector[0] = 0
        vector[1, 3] = math.nan
        vector[2, 4] = math.inf
        vector[3] = 1e-40
        norms = torch.linalg.matrix_norm(matrix.double(), 2)
        bound = gram_upper_bound(matrix, vector=vector)
        assert bool((bound >= norms).all())
        assert bool((bound <= norms * 1.001).all())

    def test_empty_matrices_have_no_norm(self, device):
        assert gram_upper_bound(torch.zeros(0, 3, device=device)).item() == 0
        assert gram_upper_bound(torch.zeros(2, 3, 0, device=device)).tolist() == [0, 0]
        assert gram_upper_bound(torch.zeros(0, 3, 4, device=device)).shape == (0,)

    def test_leading_dimensions_are_a_batch(self, device):
        matrices = torch.randn(2, 3, 7, 5, dtype=torch.float64, device=device)
        together = gram_upper_bound(matrices)
        assert together.shape == (2, 3)
        alone = torch.stack([gram_upper_bound(matrix) for matrix in matrices.flatten(0, 1)]).view(2, 3)
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)

    def test_a_view_is_read_as_it_stands(self, device):
        matrix = torch.randn(6, 9, dtype=torch.complex64, device=device)
        expected = gram_upper_bound(matrix)
        torch.testing.assert_close(gram_upper_bound(matrix.mH), expected)
        torch.testing.assert_close(gram_upper_bound(matrix.conj()), expected)

    def test_integers_vectors_and_negative_numbers_of_squarings_are_refused(self):
        with pytest.raises(UserError, match="takes floating matrices"):
            gram_upper_bound(torch.ones(3, 3, dtype=torch.int64))
        with pytest.raises(UserError, match="takes floating matrices"):
            gram_upper_bound(torch.ones(3))
        with pytest.raises(UserError, match="zero or more, got -1"):
            gram_upper_bound(torch.ones(3, 3), num_squarings=-1)


class TestCircumstances:
    def test_no_gradient_goes_through(self, device):
        assert not gram_upper_bound(torch.randn(3, 4, device=device, requires_grad=True)).requires_grad

    def test_under_autocast_nothing_is_rounded(self, device):
        matrix = torch.randn(40, 60, device=device)
        expected = gram_upper_bound(matrix)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            assert gram_upper_bound(matrix) == expected

    @pytest.mark.usefixtures("vmap_of_bits")
    def test_under_vmap_it_is_the_same(self, device):
        matrices = torch.randn(4, 10, 20, device=device)
        torch.testing.assert_close(torch.vmap(gram_upper_bound)(matrices), gram_upper_bound(matrices))

    @pytest.mark.parametrize("precision", ["highest", "high"])
    def test_compiled_it_is_one_graph_and_still_a_bound(self, precision, device):
        matrix = torch.randn(3, 40, 600, device=device)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            bound = torch.compile(gram_upper_bound, fullgraph=True, backend="aot_eager")(matrix)
        finally:
            torch.set_float32_matmul_precision(before)
        norms = torch.linalg.matrix_norm(matrix.double(), 2)
        assert bool((bound >= norms).all())
        assert bool((bound <= norms * 1.001).all())

    @pytest.mark.gpu
    def test_it_is_captured_in_a_cuda_graph(self):
        matrix = torch.randn(64, 576, device="cuda")
        gram_upper_bound(matrix)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            bound = gram_upper_bound(matrix)
        matrix.copy_(3 * torch.randn_like(matrix))
        graph.replay()
        norm = torch.linalg.matrix_norm(matrix.double(), 2)
        assert norm <= bound <= norm * 1.001


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.complex128])
@pytest.mark.parametrize("scale", [2.0**-140, 1e-20, 1.0, 1e4, 2.0**120])
@pytest.mark.parametrize("shape", [(1, 300), (300, 1), (1, 1)])
def test_a_matrix_with_one_row_or_column_has_the_norm_of_a_vector(shape, scale, dtype, device) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    matrix = (torch.randn(2, *shape, dtype=wide, generator=generator) * scale).to(dtype).to(device)
    exact = [math.sqrt(math.fsum(abs(x) ** 2 for x in each.flatten().tolist())) for each in matrix.to(wide).cpu()]
    for found, norm in zip(gram_upper_bound(matrix).tolist(), exact, strict=True):
        assert math.isinf(norm) is math.isinf(found)
        assert norm * (1 - 2.0**-52) <= found <= norm * (1 + 1e-12)
    matrix[0].flatten()[-1] = math.nan
    assert gram_upper_bound(matrix).isinf().tolist()[0]
    assert gram_upper_bound(torch.zeros_like(matrix)).tolist() == [0, 0]
