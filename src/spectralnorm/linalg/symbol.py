"""A guaranteed upper bound of the norm of a convolution, from its symbol at the frequencies of a torus.

That no Gram matrix What What^H of the symbol (`spectralnorm.linalg.symbol_grams`) has an eigenvalue above c^2 is proved
by the Cholesky factorization of c^2 I - What What^H, which succeeds in floating point only if that matrix is positive
definite up to a rounding error that is known (Rump 2006). Which c is tried does not matter for the proof. So vectors
of the last call, when the weight was a little different, may say which one is worth a try.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from spectralnorm.linalg import cpu
from spectralnorm.linalg.convolution import ConvolutionGeometry
from spectralnorm.linalg.cpu.panels import LIMIT, KernelLayout, PackedKernel, PanelGrams, kernel_layout
from spectralnorm.linalg.gram import gram_upper_bound
from spectralnorm.linalg.hermitian_batch import Effort, HermitianBatch, Matrices, leading_places
from spectralnorm.linalg.patches import as_patches
from spectralnorm.linalg.precision import full_precision
from spectralnorm.linalg.rounding import gamma, next_up
from spectralnorm.linalg.symbol_grams import SymbolGrams, SymbolTables
from spectralnorm.linalg.torus import OnTorus, on_torus

__all__ = ["convolution_upper_bound", "followed_convolution_bound", "largest_symbol_above"]

_COLD, _WARM = Effort(6, 6, 30), Effort(2, 3, 4)  # from a column of each matrix, from vectors of the last time
_NUM_EXAMINED = 3  # of those that a factorization failed for, whose eigenvalues are computed
_MAX_TRIES = 60
# What is first tried above an estimate of the squared norm, relative.
_MARGIN = 4e-3
_NARROW = (torch.float32, torch.bfloat16, torch.float16)  # computed in float32
_FEW_ROWS = 8  # fewer in each of several groups would fill panels with zeros
# Of Gram matrices held at once; fewer where each is looked at little more than once, so that a cache holds them.
_CHUNK_BYTES, _WARM_CHUNK_BYTES = 2**26, 2**22
_CERTIFICATE_CHUNK_BYTES = 2**24


@torch.no_grad()
def convolution_upper_bound(
    weight: Tensor,
    geometry: ConvolutionGeometry,
    input_size: Sequence[int] | None = None,
    *,
    max_excess: float = 0.04,
) -> Tensor:
    """A number that the 2-norm of a convolution, with the weight as stored, does not exceed.

    Computed in the weight's precision (float32 for the half types), all rounding accounted for; about 0.5% above what
    the torus allows. Waits for the device.

    Args:
        weight: as in `ConvolutionGeometry.apply`, real or complex.
        geometry: of the convolution.
        input_size: of the images along each axis; None: the bound holds for all sizes.
        max_excess: what a bound for all sizes may lose, relative, by looking at a finite number of frequencies; the
            number of these along each axis grows as the root of its inverse. For a given size it is a quarter of that,
            and nothing where the torus has fewer frequencies.

    Returns:
        Scalar, float64: zero for a zero weight, infinity for one that is not finite.

    Raises:
        UserError: ``input_size`` does not fit the convolution, or ``max_excess`` is not positive.
    """
    return followed_convolution_bound(weight, geometry, input_size, None, max_excess=max_excess)[0]


@torch.no_grad()
def followed_convolution_bound(
    weight: Tensor,
    geometry: ConvolutionGeometry,
    input_size: Sequence[int] | None,
    vectors: Tensor | None,
    *,
    max_excess: float = 0.04,
) -> tuple[Tensor, Tensor | None]:
    """As `convolution_upper_bound`, faster with the vectors that the call for nearly this weight returned.

    Args:
        weight: as there.
        geometry: as there.
        input_size: as there.
        vectors: they only help to guess, so any will do; those of another shape, type or device are passed over.
        max_excess: as there.

    Returns:
        The bound; and for the next call (frequencies * groups, rows), complex, or None where nothing was iterated.
    """
    weight, input_size = weight.detach(), None if input_size is None else tuple(input_size)
    if weight.device.type == "cpu" and weight.dtype in _NARROW and weight.numel() and cpu.is_trusted():
        single = weight.to(torch.float32)
        plan = _plan(single.shape, single.stride(), geometry, input_size, max_excess)
        if plan is not None:
            bound, vectors = _in_panels(single, geometry, input_size, plan, vectors, max_excess)
            return torch.tensor(bound, dtype=torch.float64, device="cpu"), vectors
    torus = on_torus(weight, geometry, input_size, max_excess=max_excess)
    patches = as_patches(weight, geometry, input_size)
    with full_precision(weight.device):
        if math.prod(torus.sizes) == 1:  # a matrix
            norm = gram_upper_bound(torus.kernel.flatten(2)).amax() + torus.moved
            bound = torch.where(norm > 0, next_up(norm * (torus.factor * (1 + 2.0**-50))), 0.0)
            vectors = None
        else:
            norm, vectors = _of_tensor(torus, _Search(_MARGIN, measured=weight.device.type != "cpu"), vectors)
            bound = torch.tensor(norm, dtype=torch.float64, device=weight.device)
        if patches is not None:
            bound = torch.minimum(bound, next_up(gram_upper_bound(patches.matrices).amax() * patches.factor))
        return bound, vectors


def largest_symbol_above(torus: OnTorus, *, margin: float, enough: float = math.inf) -> Tensor:
    """What the norm of the convolution that was brought to ``torus`` does not exceed, for a certificate.

    It takes time: the norm is estimated by eigenvalues of the frequencies in question, not by power iteration alone,
    and what the factorizations leave is measured instead of trusting that they are LAPACK's.

    Args:
        torus: whose kernel is real.
        margin: what is first tried above an estimate of the squared norm, relative.
        enough: where it turns out that the bound will not be below this number, a loose one is given at once.

    Returns:
        Scalar, float64.
    """
    search = _Search(margin, measured=True, is_certificate=True, enough=enough)
    norm, _ = _of_tensor(torus, search, None)
    return torch.tensor(norm, dtype=torch.float64, device=torus.parts.device)


class _Plan(NamedTuple):
    """How the kernels find the bound of a weight of some size.

    Attributes:
        torus: the convolution's, of some weight.
        layout: of the parts, in the memory of the weight where they are a view of it.
        are_view: whether they are; else `on_torus` copies them anew.
        tables: for the torus.
        are_patches: whether the reshaped kernel may have the smaller bound.
    """

    torus: OnTorus
    layout: KernelLayout
    are_view: bool
    tables: SymbolTables
    are_patches: bool


@lru_cache(maxsize=1024)
def _plan(
    shape: torch.Size,
    stride: tuple[int, ...],
    geometry: ConvolutionGeometry,
    input_size: tuple[int, ...] | None,
    max_excess: float,
) -> _Plan | None:
    """None where the kernels cannot do it, or torch does it as well."""
    weight = torch.empty_strided(shape, stride, dtype=torch.float32, device="cpu").zero_()
    torus = on_torus(weight, geometry, input_size, max_excess=max_excess)
    groups, rows = torus.parts.shape[:2]
    is_worth_it = groups == 1 or rows >= _FEW_ROWS
    if math.prod(torus.sizes) == 1 or torus.parts.dtype != torch.float32 or not is_worth_it:
        return None
    are_view = torus.parts.data_ptr() == weight.data_ptr()
    layout, tables = kernel_layout(torus.parts, len(torus.sizes)), _tables(torus.taps, torus.sizes, weight.device)
    are_patches = as_patches(weight, geometry, input_size) is not None
    # The weight that the parts belong to is given back.
    return _Plan(torus._replace(parts=weight.new_empty(0)), layout, are_view, tables, are_patches)


def _in_panels(
    weight: Tensor,
    geometry: ConvolutionGeometry,
    input_size: tuple[int, ...] | None,
    plan: _Plan,
    vectors: Tensor | None,
    max_excess: float,
) -> tuple[float, Tensor | None]:
    """As `followed_convolution_bound`, by the compiled kernels."""
    torus = plan.torus if plan.are_view else on_torus(weight, geometry, input_size, max_excess=max_excess)
    packed = PackedKernel(weight if plan.are_view else torus.parts, plan.layout)

    def grams_of(exponent: int) -> PanelGrams | SymbolGrams:
        if abs(exponent) <= LIMIT:
            return PanelGrams(packed, exponent, plan.tables)
        whole = on_torus(weight, geometry, input_size, max_excess=max_excess)
        return SymbolGrams(_scaled_taps(whole.kernel, exponent), plan.tables, chunk_bytes=_CHUNK_BYTES)

    bound, vectors = _Search(_MARGIN, measured=False).norm_above(grams_of, packed.largest, torus, vectors)
    patches = as_patches(weight, geometry, input_size) if plan.are_patches else None
    if patches is not None:
        norm = float(gram_upper_bound(patches.matrices).amax()) * patches.factor
        bound = min(bound, math.nextafter(norm, math.inf))
    return bound, vectors


def _of_tensor(torus: OnTorus, search: _Search, vectors: Tensor | None) -> tuple[float, Tensor | None]:
    """As `_Search.norm_above`, in torch's operations."""
    if search.is_certificate:
        # The tables of a certificate can be large, and are asked for once.
        chunk_bytes, tables_of = _CERTIFICATE_CHUNK_BYTES, SymbolTables
    else:
        chunk_bytes, tables_of = _CHUNK_BYTES if vectors is None else _WARM_CHUNK_BYTES, _tables

    def grams_of(exponent: int) -> SymbolGrams:
        tables = tables_of(torus.taps, torus.sizes, torus.parts.device)
        return SymbolGrams(_scaled_taps(torus.kernel, exponent), tables, chunk_bytes=chunk_bytes)

    return search.norm_above(grams_of, _largest_entry(torus.parts), torus, vectors)


@lru_cache(maxsize=64)
def _tables(taps: tuple[int, ...], sizes: tuple[int, ...], device: torch.device) -> SymbolTables:
    return SymbolTables(taps, sizes, device)


def _largest_entry(kernel: Tensor) -> float:
    if not kernel.numel():
        return 0.0
    least, most = torch.aminmax(kernel)
    return float(torch.maximum(-least, most))


def _scaled_taps(kernel: Tensor, exponent: int) -> Tensor:
    """(groups, rows, columns, *taps) divided by a power of two, as (taps, groups, rows, columns), float32 or float64.

    That is exact, but for what underflows.
    """
    dtype = torch.float64 if kernel.dtype == torch.float64 else torch.float32
    if abs(exponent) > 100:  # the power itself might not be a number of this type
        half = -exponent // 2
        kernel = kernel.double() * 2.0**half * 2.0 ** (-exponent - half)
        exponent = 0
    taps = kernel.flatten(3).movedim(-1, 0).to(dtype)
    return torch.mul(taps, 2.0**-exponent, out=torch.empty(taps.shape, dtype=dtype, device=taps.device))


def _scaled_down(norm: float, exponent: int) -> float:
    try:
        return math.ldexp(norm, -exponent)
    except OverflowError:
        return math.inf


def _scaled_back(norm: float, exponent: int, torus: OnTorus) -> float:
    try:
        norm = math.nextafter(math.ldexp(norm * (1 + 2.0**-50), exponent), math.inf)
    except OverflowError:
        norm = math.inf
    return math.nextafter((norm + torus.moved) * torus.factor * (1 + 2.0**-50), math.inf)


class _Search:
    """For a number above every eigenvalue of Gram matrices, but for the rounding of Cholesky factorizations."""

    def __init__(
        self, margin: float, *, measured: bool, is_certificate: bool = False, enough: float = math.inf
    ) -> None:
        """Say how.

        Args:
            margin: what is first tried above an estimate of the squared norm, relative.
            measured: whether what the factorizations leave is computed. Libraries of devices other than the CPU may
                invert blocks, which the a-priori bound of a factorization does not cover.
            is_certificate: whether time may be taken, see `largest_symbol_above`; then it is measured.
            enough: as there.
        """
        self.is_certificate = is_certificate
        self._margin, self._measured, self._enough = margin, measured, enough

    def norm_above(
        self,
        grams_of: Callable[[int], SymbolGrams | PanelGrams],
        largest: float,
        torus: OnTorus,
        vectors: Tensor | None,
    ) -> tuple[float, Tensor | None]:
        """A bound of the norm of a convolution, and vectors for the next time; None where nothing was followed.

        Args:
            grams_of: the Gram matrices of the kernel divided by two to some power.
            largest: entry of the kernel, its modulus.
            torus: that the kernel is on.
            vectors: of the last time; any will do.
        """
        if not math.isfinite(largest):
            return math.inf, None
        if not largest > 0:
            return torus.moved * torus.factor * (1 + 2.0**-50), None
        exponent = math.frexp(largest)[1]
        grams = grams_of(exponent)
        plain = grams.tap_sum**2  # ||What|| <= sum over taps of ||K_a||
        enough = max(0.0, _scaled_down(self._enough / torus.factor - torus.moved, exponent))
        limit = min(plain, enough * enough)
        square, rest, vectors = self._run(grams, limit, vectors)
        if not square < limit:
            return _scaled_back(grams.tap_sum, exponent, torus), None
        if self._measured:
            square = square * (1 + 2.1 * gamma(1, grams.dtype)) + rest
        else:
            unit = grams.factor_unit
            # c^2 I - G is rounded once on its diagonal, and its trace is at most rows c^2.
            share = unit / (1 - unit) * grams.rows * 1.01 + 2.1 * gamma(1, grams.dtype)
            square *= 1 + share * 1.01
        norm = grams.norm_above(square * (1 + 2.0**-40)) * (1 + 2.0**-48)
        return _scaled_back(norm, exponent, torus), vectors

    def _run(
        self, grams: SymbolGrams | PanelGrams, limit: float, vectors: Tensor | None
    ) -> tuple[float, float, Tensor | None]:
        """The number, ``limit`` if none is found below it; what the factorizations leave, if measured; and vectors.

        What has been factorized for one number need not be for a larger one, so each matrix is looked at until it
        passes, and never again.
        """
        if vectors is not None and not _are_usable(vectors, grams):
            vectors = None
        square, rest, done, all_found = 0.0, 0.0, 0, []
        for matrices in grams:
            step = self._margin
            start = None
            if not self.is_certificate:
                given = None if vectors is None else vectors[done : done + len(matrices)]
                done += len(matrices)
                value, start = matrices.followed(_COLD if given is None else _WARM, given)
                all_found.append(start)
                square = max(square, value * (1 + self._margin))
            for _ in range(_MAX_TRIES):
                if square > 0:
                    if not square < limit:
                        return limit, 0.0, None
                    failed, left = self._failed(matrices, square)
                    rest = max(rest, left)
                    if failed is None:
                        break
                    matrices = matrices[failed]
                    start = None if start is None else start[failed]
                    # The same margin once more, and a larger one where the estimate does not grow.
                    square, step = square * (1 + step), 2 * step
                square = max(square, self._estimate(matrices, start) * (1 + self._margin))
                start = None  # if that was not enough, then not from there
            else:
                return limit, 0.0, None
        return square, rest, torch.cat(all_found) if len(all_found) > 1 else all_found[0] if all_found else None

    def _failed(self, matrices: Matrices, square: float) -> tuple[Tensor | None, float]:
        """For which ``square`` I - G has no Cholesky factor; what those of the others leave, if that is measured."""
        if not self._measured:
            return matrices.without_factor(square), 0.0
        assert isinstance(matrices, HermitianBatch)
        if self.is_certificate:
            return matrices.without_factor_measured_on_the_way(square)
        return matrices.without_measured_factor(square)

    def _estimate(self, matrices: Matrices, start: Tensor | None) -> float:
        if not self.is_certificate:
            return matrices.followed(_COLD if start is None else _WARM, start)[0]
        assert isinstance(matrices, HermitianBatch)
        values, _ = matrices.rayleigh(_COLD.iterations, None)
        return matrices[leading_places(values, _NUM_EXAMINED)].largest_eigenvalue()


def _are_usable(vectors: Tensor, grams: SymbolGrams | PanelGrams) -> bool:
    is_like = vectors.shape == (grams.num_matrices, grams.rows) and vectors.dtype == grams.dtype.to_complex()
    return is_like and vectors.device == grams.device and bool(torch.view_as_real(vectors).sum().isfinite())
