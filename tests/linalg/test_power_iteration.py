"""Power iteration, plain and tracked, and the refinement, against the singular value decomposition."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from spectralnorm.linalg import (
    Frame,
    compute_dtype,
    power_iteration,
    power_iteration_of_operator,
    probe_rows,
    refine,
    track,
    track_together,
)


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def with_spectrum(values: torch.Tensor, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=torch.float64))
    return left * values.double() @ right.T


class TestPowerIteration:
    @pytest.mark.parametrize("shape", [(5, 7), (7, 5), (1, 4), (4, 1), (1, 1)])
    def test_converges_to_the_largest_singular_value(self, shape):
        matrix = with_spectrum(torch.linspace(1, 0.2, min(shape)) * 3, *shape)
        found = power_iteration(matrix, unit(shape[0]), unit(shape[1]), 200)
        assert found.sigma.item() == pytest.approx(3, rel=1e-10)
        torch.testing.assert_close(matrix @ found.v, found.sigma * found.u, rtol=1e-8, atol=1e-8)

    def test_batch_gives_what_each_matrix_alone_gives(self):
        matrices, u, v = torch.randn(3, 4, 6, dtype=torch.float64), unit(3, 4), unit(3, 6)
        together = power_iteration(matrices, u, v, 3)
        for index, matrix in enumerate(matrices):
            alone = power_iteration(matrix, u[index], v[index], 3)
            for part, expected in zip(together, alone, strict=True):
                torch.testing.assert_close(part[index], expected)

    def test_operator_gives_what_its_matrix_gives(self):
        matrix, u, v = torch.randn(6, 8, dtype=torch.float64), unit(6), unit(8)
        found = power_iteration_of_operator(
            lambda x: (matrix @ x.flatten()).view(2, 3),
            lambda y: (matrix.T @ y.flatten()).view(2, 4),
            u.view(2, 3),
            v.view(2, 4),
            5,
        )
        expected = power_iteration(matrix, u, v, 5)
        torch.testing.assert_close(found.sigma, expected.sigma)
        torch.testing.assert_close(found.v.flatten(), expected.v)

    def test_complex_matrix(self):
        matrix = torch.randn(4, 5, dtype=torch.complex128)
        start = unit(5).to(torch.complex128)
        found = power_iteration(matrix, unit(4).to(torch.complex128), start, 500)
        assert not found.sigma.is_complex()
        torch.testing.assert_close(found.sigma, torch.linalg.matrix_norm(matrix, 2))

    @pytest.mark.parametrize("entry", [0.0, math.nan, math.inf])
    def test_vectors_stay_finite_and_unit_for_any_matrix(self, entry):
        found = power_iteration(torch.full((3, 4), entry), unit(3).float(), unit(4).float(), 2)
        assert torch.linalg.vector_norm(found.u).item() == pytest.approx(1, rel=1e-5)
        assert torch.linalg.vector_norm(found.v).item() == pytest.approx(1, rel=1e-5)

    def test_arguments_are_left_alone(self):
        matrix, u, v = torch.randn(3, 4), unit(3).float(), unit(4).float()
        before = matrix.clone(), u.clone(), v.clone()
        power_iteration(matrix, u, v, 3)
        for tensor, old in zip((matrix, u, v), before, strict=True):
            torch.testing.assert_close(tensor, old, rtol=0, atol=0)

    def test_half_types_are_computed_in_float32(self):
        assert compute_dtype(torch.bfloat16) == compute_dtype(torch.float16) == torch.float32
        assert compute_dtype(torch.float64) == torch.float64


def follow(matrix: torch.Tensor, rows: torch.Tensor, steps: int) -> list[float]:
    """Norm of the matrix divided by the estimate, after each step; 1 is right."""
    norm = torch.linalg.matrix_norm(matrix, 2)
    frame = Frame(rows, is_left=True)
    ratios = []
    for step in range(steps):
        direction = unit(frame.rows.shape[-1], seed=1, dtype=matrix.dtype)
        found = track(matrix, frame, probe_rows(direction, frame.rows.shape[-2]).roll(step, dims=-1))
        frame = found.frame
        ratios.append((norm / found.sigma).item())
    return ratios


@pytest.fixture(params=["eigenvectors", "products"])
def _either_rotation(request, monkeypatch):
    """The rotation of accelerators on the CPU too."""
    if request.param == "products":
        module = __import__("sys").modules["spectralnorm.linalg.tracking"]
        monkeypatch.setattr(module, "_ritz_rotation", module._ritz_reflection)


@pytest.mark.usefixtures("_either_rotation")
class TestTrackedPowerIteration:
    @pytest.mark.parametrize("shape", [(40, 30), (30, 40), (3, 5), (5, 2), (1, 4), (4, 1), (1, 1)])
    def test_converges_to_the_largest_singular_value(self, shape):
        matrix = with_spectrum(torch.linspace(2, 0.1, min(shape)), *shape)
        frame = unit(min(8, *shape), shape[0])
        assert follow(matrix, frame, 60)[-1] == pytest.approx(1, abs=1e-9)

    def test_estimate_is_the_rayleigh_value_of_its_vectors_and_never_above_the_norm(self):
        matrix = torch.randn(20, 30, dtype=torch.float64)
        frame = unit(8, 20)
        found = track(matrix, Frame(frame, is_left=True))
        torch.testing.assert_close(found.u @ matrix @ found.v, found.sigma)
        assert torch.linalg.vector_norm(found.u).item() == pytest.approx(1)
        assert torch.linalg.vector_norm(found.v).item() == pytest.approx(1)
        assert found.sigma <= torch.linalg.matrix_norm(matrix, 2) * (1 + 1e-12)

    def test_orthogonal_direction_that_overtakes_is_seen_at_once(self):
        frame = torch.eye(2, dtype=torch.float64)
        assert follow(torch.diag(torch.tensor([1.0, 10.0], dtype=torch.float64)), frame, 1)[-1] == pytest.approx(1)

    def test_direction_outside_of_the_frame_that_overtakes_is_found_within_a_few_steps(self):
        values = torch.linspace(1, 0.1, 100)
        values[50] = 2.0
        left, _ = torch.linalg.qr(torch.randn(100, 100, dtype=torch.float64))
        right, _ = torch.linalg.qr(torch.randn(100, 100, dtype=torch.float64))
        frame = left[:, :8].T.contiguous()
        assert follow(left * values.double() @ right.T, frame, 12)[-1] < 1.01

    def test_nearly_equal_leading_values_converge_all_the_same(self):
        values = torch.cat([torch.tensor([1.0, 0.9999, 0.999]), torch.full((20,), 0.5)])
        matrix = with_spectrum(values, 30, 40)
        assert follow(matrix, unit(8, 30), 16)[-1] == pytest.approx(1, abs=1e-6)

    @pytest.mark.parametrize("num_iterations", [1, 2, 3])
    def test_matrices_of_all_shapes_together_give_what_each_alone_gives(self, num_iterations):
        shapes = [(3, 10, 12), (1, 20, 9), (2, 1, 7), (1, 30, 40)]
        matrices = [torch.randn(*shape, dtype=torch.float64) for shape in shapes]
        frames = [
            Frame(unit(len(matrix), 8, matrix.shape[1 if left else 2], seed=number), left)
            for number, (matrix, left) in enumerate(zip(matrices, [True, False, True, False], strict=True))
        ]
        together = track_together(matrices, frames, [None] * 4, num_iterations)
        for found, matrix, frame in zip(together, matrices, frames, strict=True):
            for index in range(len(matrix)):
                alone = track(matrix[index], Frame(frame.rows[index], frame.is_left), None, num_iterations)
                torch.testing.assert_close(found.sigma[index], alone.sigma)
                torch.testing.assert_close(
                    found.u[index].outer(found.v[index]), alone.u.outer(alone.v), rtol=1e-6, atol=1e-8
                )

    @pytest.mark.parametrize("shape", [(5, 40), (40, 5), (8, 8), (1, 30)])
    def test_norm_of_a_matrix_with_a_short_side_is_exact_whatever_it_was_before(self, shape):
        matrices = torch.randn(2, *shape, dtype=torch.float64)
        frame = refine(matrices[0], unit(shape[1])).frame
        for matrix in matrices:
            found = track(matrix, frame, probe_rows(unit(frame.rows.shape[-1]), 8))
            assert found.sigma.item() == pytest.approx(torch.linalg.matrix_norm(matrix, 2).item(), rel=1e-9)
            frame = found.frame

    def test_next_frame_is_on_the_other_side_and_its_first_row_is_orthogonal_to_the_others(self):
        matrix = with_spectrum(torch.linspace(1, 0.5, 15), 20, 15)
        frame = track(matrix, Frame(unit(8, 20), is_left=True)).frame
        assert not frame.is_left
        gram = frame.rows @ frame.rows.T
        torch.testing.assert_close(gram.diagonal(), torch.ones(8, dtype=torch.float64))
        assert gram[0, 1:].abs().max() < 1e-3

    @pytest.mark.parametrize("rank", [1, 3])
    def test_low_rank_does_not_break_the_frame(self, rank):
        matrix = with_spectrum(torch.linspace(2, 1, rank), 20, 30).float()
        assert follow(matrix, unit(8, 20).float(), 30)[-1] == pytest.approx(1, abs=1e-5)

    @pytest.mark.parametrize("scale", [1e-34, 1e-20, 1e-9, 1e18, 1e21, 1e30, 1e36])
    def test_scales_near_the_ends_of_the_range_are_followed(self, scale):
        matrices = torch.stack([torch.randn(20, 30), scale * torch.randn(20, 30)])
        frame = Frame(unit(2, 8, 20).float(), is_left=True)
        (found,) = track_together([matrices], [frame], [None], 20, eps=1e-36)
        torch.testing.assert_close(
            found.sigma.double(), torch.linalg.matrix_norm(matrices.double(), 2), rtol=1e-3, atol=0
        )
        for vectors in (found.u, found.v, found.frame.rows[:, 0]):
            torch.testing.assert_close(torch.linalg.vector_norm(vectors, dim=-1), torch.ones(2))

    @pytest.mark.parametrize("entry", [math.nan, math.inf])
    def test_matrix_that_is_not_finite_gives_no_finite_norm_and_no_error(self, entry):
        matrix = torch.ones(9, 9)
        matrix[2, 3] = entry
        assert not track(matrix, Frame(unit(8, 9).float(), is_left=True)).sigma.isfinite()


class TestRefine:
    @settings(max_examples=40, deadline=None)
    @given(
        rows=st.sampled_from([1, 2, 7, 100, 129, 180]),
        columns=st.sampled_from([1, 3, 90, 140, 200]),
        decay=st.sampled_from([0.0, 1e-4, 0.5, 3.0]),
        scale=st.sampled_from([1e-25, 1.0, 1e25]),
        seed=st.integers(0, 10),
    )
    def test_norm_is_right_to_the_tolerance_asked(self, rows, columns, decay, scale, seed):
        size = min(rows, columns)
        values = torch.arange(1, size + 1, dtype=torch.float64) ** -decay
        matrix = scale * with_spectrum(values, rows, columns, seed)
        found = refine(matrix, unit(columns, seed=seed + 1), rtol=1e-4, eps=1e-30)
        assert found.sigma.item() / scale == pytest.approx(1, rel=1e-4)
        torch.testing.assert_close(matrix @ found.v / scale, found.sigma * found.u / scale, rtol=0, atol=2e-2)

    @pytest.mark.parametrize("gap", [1e-2, 1e-3, 1e-4])
    def test_hidden_larger_direction_is_found(self, gap):
        values = torch.ones(300, dtype=torch.float64)
        values[0] += gap
        matrix = with_spectrum(values, 300, 400)
        assert refine(matrix, unit(400), rtol=1e-4).sigma.item() == pytest.approx(1 + gap, rel=1e-4)

    def test_float32_is_right_to_1e_5(self):
        for rows, columns in ((64, 576), (200, 300), (512, 300)):
            matrix = torch.randn(rows, columns)
            norm = torch.linalg.matrix_norm(matrix.double(), 2).item()
            assert refine(matrix, unit(columns), rtol=1e-5).sigma.item() == pytest.approx(norm, rel=1e-5)

    @pytest.mark.parametrize("exponent", [-60, -39, -20, -13, -11, 11, 13, 20, 31, 39, 60, 100])
    @pytest.mark.parametrize("shape", [(20, 300), (150, 300), (300, 150)], ids=["exact", "wide", "tall"])
    def test_float32_of_any_size_neither_overflows_nor_underflows(self, shape, exponent):
        matrix = torch.randn(shape)
        norm = torch.linalg.matrix_norm(matrix.double(), 2).item()
        found = refine(matrix * 2.0**exponent, unit(shape[1]).float(), rtol=1e-5, eps=0.0)
        assert found.sigma.item() / 2.0**exponent == pytest.approx(norm, rel=1e-5)

    def test_frame_starts_with_u_and_spans_the_leading_left_vectors(self):
        for rows in (20, 150):
            matrix = with_spectrum(torch.linspace(1, 0.2, 10) ** 2, rows, 160)
            found = refine(matrix, unit(160), rtol=1e-8)
            torch.testing.assert_close(found.frame.rows[0], found.u)
            leading = torch.linalg.svd(matrix).U[:, 0]
            assert (found.frame.rows @ leading).norm().item() == pytest.approx(1, rel=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
    @pytest.mark.parametrize("shape", [(280, 300), (300, 280)])
    def test_all_directions_of_the_frame_of_a_large_matrix_are_leading_ones(self, shape, dtype):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
        found = refine(matrix, unit(shape[1]).to(dtype))
        images = torch.linalg.vector_norm(found.frame.rows.conj() @ matrix, dim=-1)
        assert (images > 0.95 * torch.linalg.svdvals(matrix)[:8]).all()

    def test_complex_matrix(self):
        for size in (20, 140):
            matrix = torch.randn(size, 150, dtype=torch.complex64)
            norm = torch.linalg.matrix_norm(matrix, 2).item()
            assert refine(matrix, unit(150).float(), rtol=1e-4).sigma.item() == pytest.approx(norm, rel=1e-4)

    @pytest.mark.parametrize("size", [4, 150])
    def test_zero_matrix_has_the_norm_eps_and_unit_vectors(self, size):
        found = refine(torch.zeros(size, size), unit(size).float(), eps=1e-12)
        assert found.sigma.item() == pytest.approx(1e-12)
        assert found.u.norm().item() == pytest.approx(1)
        assert found.v.norm().item() == pytest.approx(1)

    @pytest.mark.parametrize("size", [4, 150])
    @pytest.mark.parametrize("entry", [math.nan, math.inf])
    def test_matrix_that_is_not_finite_has_no_norm_but_finite_vectors(self, size, entry):
        matrix = torch.ones(size, size)
        matrix[1, 2] = entry
        found = refine(matrix, unit(size).float())
        assert math.isnan(found.sigma.item())
        assert found.u.isfinite().all()
        assert found.v.isfinite().all()
        assert found.frame.rows.isfinite().all()

    def test_same_arguments_give_the_same_bits(self):
        matrix, start = torch.randn(200, 200), unit(200)
        (*first, frame), (*second, again) = refine(matrix, start), refine(matrix, start)
        for part, other in zip((*first, frame.rows), (*second, again.rows), strict=True):
            assert torch.equal(part, other)
