"""Gram matrices of symbols, their iteration and factorization by the compiled kernels, against torch and float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from spectralnorm.linalg import ConvolutionGeometry, cpu, rigorous_convolution_bound, symbol
from spectralnorm.linalg.cpu import compiled, panels, symbol_trial
from spectralnorm.linalg.cpu.panels import PackedKernel, PanelGrams, PanelMatrices, kernel_layout
from spectralnorm.linalg.hermitian_batch import Effort, HermitianBatch
from spectralnorm.linalg.symbol_grams import SymbolGrams, SymbolTables
from spectralnorm.linalg.torus import OnTorus, half_of_frequencies, on_torus

pytestmark = pytest.mark.skipif(not cpu.is_trusted(), reason="there is no C compiler")

# (groups, rows, columns, *taps), and the torus.
PROBLEMS = {
    "interpolated": ((1, 40, 70, 3, 3), (9, 7)),
    "as many frequencies as samples": ((1, 65, 130, 3, 3), (5, 5)),
    "even torus": ((1, 33, 20, 2, 2), (6, 4)),
    "groups": ((3, 9, 17, 3), (12,)),
    "three axes": ((1, 16, 16, 2, 3, 2), (4, 5, 3)),
    "a few rows": ((1, 3, 64, 3, 3), (16, 16)),
    "one row": ((1, 1, 5, 3), (8,)),
    "one tap along an axis": ((1, 12, 30, 1, 3), (4, 6)),
    "deeper than a sum": ((1, 130, 200, 2, 2), (4, 4)),
}


def problem(name: str) -> tuple[OnTorus, SymbolTables]:
    shape, sizes = PROBLEMS[name]
    parts = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return OnTorus(parts, sizes, 1.0, 0.0), SymbolTables(shape[3:], sizes, parts.device)


def exact(torus: OnTorus) -> Tensor:
    """Gram matrices in float64 by the definition of a symbol, in the order of the kernels."""
    symbols = torch.fft.fftn(torus.parts.double(), torus.sizes, dim=tuple(range(3, torus.parts.ndim))).conj()
    grams = torch.einsum("gik...,gjk...->...gij", symbols, symbols.conj())
    half = half_of_frequencies(torus.sizes, torus.parts.device)
    return grams[tuple(half.unbind(1))].flatten(0, 1)


def packed(torus: OnTorus) -> PackedKernel:
    return PackedKernel(torus.parts, kernel_layout(torus.parts, len(torus.sizes)))


def in_panels(torus: OnTorus, tables: SymbolTables, exponent: int = 0) -> PanelMatrices:
    (found,) = PanelGrams(packed(torus), exponent, tables)
    return found


def have_factor(matrices: PanelMatrices, square: float) -> Tensor:
    mask = torch.ones(len(matrices), dtype=torch.bool)
    failed = matrices.without_factor(square)
    if failed is not None:
        assert len(failed)
        mask[failed] = False
    return mask


def of_each(matrices: PanelMatrices, num_iterations: int, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rayleigh quotients and vectors, one matrix after the other."""
    found = [
        matrices[torch.tensor([place])].followed(
            Effort(num_iterations, 0, 0), None if start is None else start[place : place + 1]
        )
        for place in range(len(matrices))
    ]
    return torch.tensor([value for value, _ in found], dtype=torch.float64), torch.cat([vector for _, vector in found])


@pytest.mark.parametrize("name", PROBLEMS)
def test_torch_and_kernels_find_the_eigenvalues_of_the_symbol(name: str) -> None:
    torus, tables = problem(name)
    grams = exact(torus)
    eigenvalues, eigenvectors = torch.linalg.eigh(grams)
    largest, start = eigenvalues[:, -1], eigenvectors[:, :, -1].conj().to(torch.complex64)
    (batch,) = SymbolGrams(torus.parts.flatten(3).movedim(-1, 0).contiguous(), tables, chunk_bytes=2**30)
    torch.testing.assert_close(batch.matrices.to(torch.complex128), grams, rtol=0, atol=2e-6 * float(largest.max()))
    found = in_panels(torus, tables)
    assert len(found) == len(batch) == len(grams)
    for values, vectors in (batch.rayleigh(1, start), of_each(found, 1, start)):
        torch.testing.assert_close(values.double(), largest, rtol=1e-5, atol=0)
        cosines = (vectors * start.conj()).sum(-1).abs()
        torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PROBLEMS)
def test_power_iteration_from_nothing_comes_close(name: str) -> None:
    torus, tables = problem(name)
    largest = torch.linalg.eigvalsh(exact(torus))[:, -1]
    values, vectors = of_each(in_panels(torus, tables), 60, None)
    assert bool((values <= largest * (1 + 1e-5)).all())
    assert bool((values >= largest * 0.97).all())
    lengths = torch.linalg.vector_norm(vectors, dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_factorization_ends_where_the_largest_eigenvalue_is_below(name: str) -> None:
    torus, tables = problem(name)
    largest = torch.linalg.eigvalsh(exact(torus))[:, -1]
    found = in_panels(torus, tables)
    for square in (float(largest.max()) * 1.0001, float(largest.median()), float(largest.min()) * 0.9999, 1e-6):
        clear = (largest - square).abs() > 1e-5 * largest
        assert torch.equal(have_factor(found, square)[clear], (largest < square)[clear])
    assert not bool(have_factor(found, math.nan).any())
    assert found.without_factor(float(largest.max()) * 1.01) is None


def test_some_of_the_matrices_are_those_of_an_index() -> None:
    torus, tables = problem("groups")
    found = in_panels(torus, tables)
    values, vectors = of_each(found, 3, None)
    index = torch.tensor([5, 2, 2, 7])
    some = found[index]
    assert len(some) == 4
    largest, of_some = some.followed(Effort(3, 0, 0), None)
    assert largest == float(values[index].max())
    assert torch.equal(of_some, vectors[index])
    square = float(values.median())
    assert torch.equal(have_factor(some, square), have_factor(found, square)[index])
    assert torch.equal(have_factor(some[torch.tensor([3, 0])], square), have_factor(found, square)[index[[3, 0]]])
    assert 0 < int(have_factor(found, square).sum()) < len(found)


def test_the_leading_ones_are_followed_further() -> None:
    torus, tables = problem("interpolated")
    found = in_panels(torus, tables)
    values, vectors = of_each(found, 2, None)
    leading = values.topk(3).indices
    largest, together = found.followed(Effort(2, 3, 5), None)
    further, of_leading = of_each(found[leading], 5, vectors[leading])
    wanted = vectors.index_copy(0, leading, of_leading)
    assert torch.equal(together, wanted)
    assert largest == float(values.index_copy(0, leading, further).max())
    # More than there are: all of them.
    torch.testing.assert_close(found.followed(Effort(2, 1000, 5), None)[1], of_each(found, 5, vectors)[1])


def test_a_problem_is_large_enough_for_several_threads(threads, teams) -> None:
    threads(2)
    found = in_panels(*problem("deeper than a sum"))
    assert teams == [2]
    value, _ = found.followed(Effort(4, 3, 2), None)
    assert teams == [2, 2]
    have_factor(found, value * 0.9)
    assert teams == [2, 2, 2]


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_bits_do_not_depend_on_the_number_of_threads(name: str, threads) -> None:
    torus, tables = problem(name)
    results = []
    for number in (1, 2, 5):
        threads(number)
        found = in_panels(torus, tables)
        value, vectors = found.followed(Effort(4, 3, 2), None)
        passed = have_factor(found, value * 0.9)
        results.append((found._matrices, torch.tensor(value), torch.view_as_real(vectors), passed))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_without_the_threads_of_openmp_the_bits_are_the_same(threads) -> None:
    threads(2)
    torus, tables = problem("deeper than a sum")
    before = in_panels(torus, tables)._matrices
    kernels = compiled.kernels()
    try:
        kernels.spectralnorm_use_threads_of(None, None, None)
        after = in_panels(torus, tables)._matrices
    finally:
        compiled._share_threads(kernels)
    assert torch.equal(before, after)


def test_matrices_in_several_parts_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("interpolated", "as many frequencies as samples", "groups"):
        torus, tables = problem(name)
        whole = of_each(in_panels(torus, tables), 2, None)[0]
        with monkeypatch.context() as patch:
            patch.setattr(panels, "_CHUNK_BYTES", 2**12)
            parts = list(PanelGrams(packed(torus), 0, tables))
        assert len(parts) > 1
        assert torch.equal(torch.cat([of_each(part, 2, None)[0] for part in parts]), whole)


@pytest.mark.parametrize("exponent", [-30, 7, 38])
def test_a_power_of_two_in_the_kernel_changes_no_bit(exponent: int) -> None:
    torus, tables = problem("interpolated")
    scaled = torus._replace(parts=torus.parts * 2.0**exponent)
    assert torch.equal(in_panels(scaled, tables, exponent)._matrices, in_panels(torus, tables)._matrices)


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: nn.Conv2d(20, 12, 4, 2, 1), (9, 8)),
        (lambda: nn.Conv2d(6, 40, 3, 2, 1), (8, 8)),
        (lambda: nn.ConvTranspose2d(12, 20, 4, 2, 1), (5, 6)),
        (lambda: nn.Conv2d(16, 32, 3, 1, 1).to(memory_format=torch.channels_last), (7, 7)),
        (lambda: nn.Conv1d(12, 24, 5, 3, 2, groups=2), (20,)),
    ],
    ids=["strided", "more outputs", "transposed", "channels_last", "groups"],
)
def test_a_kernel_is_read_in_whatever_order_it_lies(make, size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = make()
    torus = on_torus(layer.weight.detach(), ConvolutionGeometry.of(layer), size, max_excess=0.04)
    found = packed(torus)
    groups, rows, columns, taps = found.shape
    values = found.values.view(groups, taps, columns, -1)
    kernel = torus.kernel.flatten(3)
    assert torch.equal(values[..., :rows], kernel.permute(0, 3, 2, 1))
    assert not bool(values[..., rows:].any())
    assert found.largest == float(layer.weight.detach().abs().max())
    norms = torch.linalg.matrix_norm(kernel.double().movedim(3, 1)).sum(1)
    assert found.tap_sum == pytest.approx(float(norms.max()), rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -5.0])
def test_the_largest_entry_is_found_and_none_is_not_overlooked(value: float) -> None:
    torus, _ = problem("groups")
    torus.parts.clamp_(-3, 3)[2, 8, 16, 1] = value
    largest = packed(torus).largest
    assert math.isnan(largest) if math.isnan(value) else largest == abs(value)


LAYERS = {
    "3x3": (lambda: nn.Conv2d(24, 48, 3, padding=1), (8, 8)),
    "strided": (lambda: nn.Conv2d(20, 12, 4, 2, 1), (9, 8)),
    "strided, padded to phases": (lambda: nn.Conv2d(10, 30, 3, 2, 1), (9, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(12, 20, 4, 2, 1), (5, 6)),
    "channels_last": (lambda: nn.Conv2d(16, 32, 3, 1, 1).to(memory_format=torch.channels_last), (7, 7)),
    "dilated": (lambda: nn.Conv2d(9, 9, 3, 1, 2, dilation=2), (8, 8)),
    "groups": (lambda: nn.Conv1d(32, 32, 5, 3, 2, groups=2), (20,)),
    "depthwise": (lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16), (8, 8)),
    "covers the image": (lambda: nn.Conv2d(12, 2, 4), (4, 4)),
    "smaller torus than kernel": (lambda: nn.Conv2d(4, 4, 5, padding=4, padding_mode="circular"), (4, 4)),
    "one by one": (lambda: nn.Conv2d(12, 20, 1), (4, 4)),
    "three axes": (lambda: nn.Conv3d(8, 10, (2, 3, 2)), (4, 5, 3)),
    "one input": (lambda: nn.Conv2d(1, 24, 4, 2, 1), (32, 32)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_bounds_are_those_of_torch_but_for_rounding(name: str, dtype: torch.dtype, monkeypatch) -> None:
    torch.manual_seed(0)
    make, one_size = LAYERS[name]
    layer = make().to(dtype)
    weight, geometry = layer.weight.detach(), ConvolutionGeometry.of(layer)
    for size in (one_size, None):
        rigorous = rigorous_convolution_bound(weight, geometry, size)
        mine, vectors = symbol.followed_convolution_bound(weight, geometry, size, None)
        again, _ = symbol.followed_convolution_bound(weight, geometry, size, vectors)
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "is_trusted", lambda: False)
            its, of_torch = symbol.followed_convolution_bound(weight, geometry, size, None)
        assert (vectors is None) == (of_torch is None)
        assert float(mine) == pytest.approx(float(its), rel=4e-3)
        assert float(again) == pytest.approx(float(mine), rel=4e-3)
        # A certificate looks at the layer's own grid as well, and is never looser.
        assert min(float(mine), float(again)) >= rigorous * (1 - 1e-8)


@pytest.mark.parametrize("name", PROBLEMS)
def test_no_bound_is_below_the_norm_nor_far_above(name: str) -> None:
    torus, tables = problem(name)
    largest = float(torch.linalg.eigvalsh(exact(torus)).amax()) ** 0.5
    bound, _ = bound_of(torus, tables, None)
    assert largest <= bound <= largest * 1.006


def bound_of(torus: OnTorus, tables: SymbolTables, vectors: Tensor | None) -> tuple[float, Tensor | None]:
    kernel = packed(torus)
    search = symbol._Search(4e-3, measured=False)
    return search.norm_above(lambda exponent: PanelGrams(kernel, exponent, tables), kernel.largest, torus, vectors)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
@pytest.mark.parametrize("start", ["none", "good", "of other matrices", "zero", "not finite"])
def test_bounds_hold_at_every_scale_and_from_any_vectors(scale: float, start: str) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(20, 30, 3, padding=1, padding_mode="circular")
    weight, geometry, size = layer.weight.detach() * scale, ConvolutionGeometry.of(layer), (6, 6)
    norm = rigorous_convolution_bound(weight, geometry, size)
    _, vectors = symbol.followed_convolution_bound(layer.weight, geometry, size, None)
    assert vectors is not None
    given = {
        "none": None,
        "good": vectors,
        "of other matrices": vectors.flip(0),
        "zero": vectors * 0,
        "not finite": vectors * math.nan,
    }[start]
    bound, after = symbol.followed_convolution_bound(weight, geometry, size, given)
    assert norm * (1 - 1e-7) <= float(bound) <= norm * 1.01
    assert after is not None
    assert after.shape == vectors.shape
    assert bool(torch.view_as_real(after).isfinite().all())


def test_kernels_that_bound_wrongly_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert symbol_trial.symbol_disagreement() is None
    factor, followed = PanelMatrices.without_factor, PanelMatrices.followed
    for factor_of_square in (1.01, math.inf):
        with monkeypatch.context() as patch:
            patch.setattr(PanelMatrices, "without_factor", lambda self, s, by=factor_of_square: factor(self, s * by))
            assert symbol_trial.symbol_disagreement() == "a factorization of a 70 x 70 matrix ends otherwise"
    for wrong in (1.001, math.nan):
        with monkeypatch.context() as patch:
            patch.setattr(PanelMatrices, "followed", lambda *a, by=wrong: (followed(*a)[0] * by, followed(*a)[1]))
            assert symbol_trial.symbol_disagreement() == "the largest eigenvalue of a 70 x 70 matrix differs"
    with monkeypatch.context() as patch:
        patch.setattr(PanelMatrices, "followed", lambda *a: (followed(*a)[0], followed(*a)[1].roll(1, -1)))
        assert symbol_trial.symbol_disagreement() == "the leading eigenvector of a 70 x 70 matrix differs"


def test_a_batch_measures_what_its_factors_leave() -> None:
    torus, tables = problem("interpolated")
    taps = torus.parts.flatten(3).movedim(-1, 0).double().contiguous()
    (batch,) = SymbolGrams(taps, tables, chunk_bytes=2**30)
    assert isinstance(batch, HermitianBatch)
    square = batch.largest_eigenvalue() * 1.01
    for failed, rest in (batch.without_measured_factor(square), batch.without_factor_measured_on_the_way(square)):
        assert failed is None
        assert 0 < rest < 1e-9 * square
    failed, _ = batch.without_measured_factor(square / 1.02)
    assert failed is not None
    assert len(failed) >= 1
