"""Gram matrices of symbols, their iteration and factorization by the compiled kernels, against torch and float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from spectralnorm.linalg import ConvolutionGeometry, convolution_upper_bound, cpu, symbol
from spectralnorm.linalg.cpu import compiled, panels, symbol_trial
from spectralnorm.linalg.cpu.panels import PackedKernel, PanelGrams, PanelMatrices
from spectralnorm.linalg.hermitian_batch import HermitianBatch
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
    "deeper than a sum": ((1, 130, 200, 2, 2), (3, 3)),
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


def in_panels(torus: OnTorus, tables: SymbolTables, exponent: int = 0) -> PanelMatrices:
    (found,) = PanelGrams(PackedKernel(torus), exponent, tables)
    return found


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


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
    for each in (batch, found):
        values, vectors = each.rayleigh(1, start)
        torch.testing.assert_close(values.double(), largest, rtol=1e-5, atol=0)
        cosines = (vectors * start.conj()).sum(-1).abs()
        torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PROBLEMS)
def test_power_iteration_from_nothing_comes_close(name: str) -> None:
    torus, tables = problem(name)
    largest = torch.linalg.eigvalsh(exact(torus))[:, -1]
    values, vectors = in_panels(torus, tables).rayleigh(60, None)
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
        assert torch.equal(found.have_factor(square)[clear], (largest < square)[clear])
    assert not bool(found.have_factor(math.nan).any())


def test_some_of_the_matrices_are_those_of_an_index_or_a_mask() -> None:
    torus, tables = problem("groups")
    found = in_panels(torus, tables)
    values, vectors = found.rayleigh(3, None)
    index = torch.tensor([5, 2, 2, 7])
    some, of_some = found[index].rayleigh(3, None)
    assert torch.equal(some, values[index])
    assert torch.equal(of_some, vectors[index])
    mask = torch.zeros(4, dtype=torch.bool)
    mask[[0, 3]] = True
    assert torch.equal(found[index][mask].rayleigh(3, None)[0], values[index[mask]])
    square = float(values.median())
    assert torch.equal(found[index].have_factor(square), found.have_factor(square)[index])
    assert 0 < int(found.have_factor(square).sum()) < len(found)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_bits_do_not_depend_on_the_number_of_threads(name: str, threads) -> None:
    torus, tables = problem(name)
    results = []
    for number in (1, 2, 5):
        threads(number)
        found = in_panels(torus, tables)
        values, vectors = found.rayleigh(4, None)
        results.append((found._matrices, values, torch.view_as_real(vectors), found.have_factor(float(values.max()))))
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
        whole = in_panels(torus, tables).rayleigh(2, None)[0]
        with monkeypatch.context() as patch:
            patch.setattr(panels, "_CHUNK_BYTES", 2**12)
            parts = list(PanelGrams(PackedKernel(torus), 0, tables))
        assert len(parts) > 1
        assert torch.equal(torch.cat([part.rayleigh(2, None)[0] for part in parts]), whole)


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
    packed = PackedKernel(torus)
    groups, rows, columns, taps = packed.shape
    values = packed.values.view(groups, taps, columns, packed.order)
    assert torch.equal(values[..., :rows], torus.kernel.flatten(3).permute(0, 3, 2, 1))
    assert not bool(values[..., rows:].any())
    assert float(packed.largest) == float(layer.weight.detach().abs().max())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -5.0])
def test_the_largest_entry_is_found_and_none_is_not_overlooked(value: float) -> None:
    torus, _ = problem("groups")
    torus.parts.clamp_(-3, 3)[2, 8, 16, 1] = value
    largest = float(PackedKernel(torus).largest)
    assert math.isnan(largest) if math.isnan(value) else largest == abs(value)


@pytest.mark.parametrize("name", PROBLEMS)
def test_no_bound_is_below_the_norm_nor_far_above(name: str) -> None:
    torus, _ = problem(name)
    largest = float(torch.linalg.eigvalsh(exact(torus)).amax()) ** 0.5
    bound, _ = symbol._largest(torus, margin=4e-3, is_certificate=False, vectors=None)
    assert largest <= float(bound) <= largest * 1.006


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
@pytest.mark.parametrize("start", ["none", "good", "of other matrices", "zero"])
def test_bounds_hold_at_every_scale_and_from_any_vectors(scale: float, start: str) -> None:
    torus, _ = problem("interpolated")
    scaled = torus._replace(parts=torus.parts * scale)
    norm = float(torch.linalg.eigvalsh(exact(scaled)).amax()) ** 0.5
    _, vectors = symbol._largest(torus, margin=4e-3, is_certificate=False, vectors=None)
    assert vectors is not None
    given = {"none": None, "good": vectors, "of other matrices": vectors.flip(0), "zero": vectors * 0}[start]
    bound, after = symbol._largest(scaled, margin=4e-3, is_certificate=False, vectors=given)
    assert norm <= float(bound) <= norm * 1.01
    assert after is not None
    assert after.shape == vectors.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bounds_of_layers_are_those_of_torch_but_for_rounding(dtype: torch.dtype, monkeypatch) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(24, 48, 3, padding=1, dtype=dtype)
    geometry = ConvolutionGeometry.of(layer)
    for size in ((8, 8), None):
        mine = float(convolution_upper_bound(layer.weight, geometry, size))
        with monkeypatch.context() as patch:
            patch.setattr(symbol, "can_be_in_panels", lambda torus: False)
            its = float(convolution_upper_bound(layer.weight, geometry, size))
        assert mine == pytest.approx(its, rel=4e-3)


def test_kernels_that_bound_wrongly_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert symbol_trial.symbol_disagreement() is None
    factor, rayleigh = PanelMatrices.have_factor, PanelMatrices.rayleigh
    with monkeypatch.context() as patch:
        patch.setattr(PanelMatrices, "have_factor", lambda self, square: factor(self, square * 1.01))
        assert symbol_trial.symbol_disagreement() == "a factorization of a 70 x 70 matrix ends otherwise"
    with monkeypatch.context() as patch:
        patch.setattr(PanelMatrices, "have_factor", lambda self, square: factor(self, math.inf))
        assert symbol_trial.symbol_disagreement() == "a factorization of a 70 x 70 matrix ends otherwise"
    for wrong in (1.001, math.nan):
        with monkeypatch.context() as patch:
            patch.setattr(PanelMatrices, "rayleigh", lambda *a, by=wrong: (rayleigh(*a)[0] * by, rayleigh(*a)[1]))
            assert symbol_trial.symbol_disagreement() == "the largest eigenvalue of a 70 x 70 matrix differs"


def test_a_batch_measures_what_its_factors_leave() -> None:
    torus, tables = problem("interpolated")
    taps = torus.parts.flatten(3).movedim(-1, 0).double().contiguous()
    (batch,) = SymbolGrams(taps, tables, chunk_bytes=2**30)
    assert isinstance(batch, HermitianBatch)
    square = batch.largest_eigenvalue() * 1.01
    for passed, rest in (batch.have_measured_factor(square), batch.have_factor_measured_on_the_way(square)):
        assert bool(passed.all())
        assert 0 < rest < 1e-9 * square
    assert not bool(batch.have_measured_factor(square / 1.02)[0].all())
