"""A guaranteed upper bound of the norm of a convolution, from its symbol at the frequencies of a torus.

That no Gram matrix What What^H of the symbol (`spectralnorm.linalg.symbol_grams`) has an eigenvalue above c^2 is proved
by the Cholesky factorization of c^2 I - What What^H, which succeeds in floating point only if that matrix is positive
definite up to a rounding error that is known (Rump 2006). Which c is tried does not matter for the proof. So vectors
of the last call, when the weight was a little different, may say which one is worth a try.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from spectralnorm.linalg.convolution import ConvolutionGeometry
from spectralnorm.linalg.cpu.panels import LIMIT, PackedKernel, PanelGrams, can_be_in_panels
from spectralnorm.linalg.gram import gram_upper_bound
from spectralnorm.linalg.hermitian_batch import HermitianBatch, Matrices
from spectralnorm.linalg.patches import as_patches
from spectralnorm.linalg.precision import full_precision
from spectralnorm.linalg.rounding import gamma, next_up
from spectralnorm.linalg.symbol_grams import SymbolGrams, SymbolTables
from spectralnorm.linalg.torus import OnTorus, on_torus

__all__ = ["convolution_upper_bound", "followed_convolution_bound", "largest_symbol_above"]

_FIRST_ITERATIONS, _MORE_ITERATIONS = 6, 30
_WARM_ITERATIONS, _MORE_WARM_ITERATIONS = 2, 4
_NUM_LEADING, _NUM_WARM_LEADING = 6, 3
_NUM_EXAMINED = 3  # of those that a factorization failed for, whose eigenvalues are computed
_MAX_TRIES = 60
# What is first tried above an estimate of the squared norm, relative.
_MARGIN = 4e-3
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
    torus = on_torus(weight.detach(), geometry, input_size, max_excess=max_excess)
    patches = as_patches(weight.detach(), geometry, input_size)
    with full_precision(weight.device):
        if math.prod(torus.sizes) == 1:  # a matrix
            norm = gram_upper_bound(torus.kernel.flatten(2)).amax() + torus.moved
            bound = torch.where(norm > 0, next_up(norm * (torus.factor * (1 + 2.0**-50))), 0.0)
            vectors = None
        else:
            bound, vectors = _largest(torus, margin=_MARGIN, is_certificate=False, vectors=vectors)
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
    return _largest(torus, margin=margin, is_certificate=True, vectors=None, enough=enough)[0]


def _largest(
    torus: OnTorus, *, margin: float, is_certificate: bool, vectors: Tensor | None, enough: float = math.inf
) -> tuple[Tensor, Tensor | None]:
    packed = PackedKernel(torus) if not is_certificate and can_be_in_panels(torus) else None
    largest = _largest_entry(torus.parts) if packed is None else packed.largest
    if not bool(largest.isfinite()):
        return torch.full_like(largest, math.inf), None
    if not bool(largest > 0):
        return torch.full_like(largest, torus.moved * torus.factor * (1 + 2.0**-50)), None
    exponent = math.frexp(float(largest))[1]
    device, (groups, rows) = torus.parts.device, torus.parts.shape[:2]
    # The tables of a certificate can be large, and are asked for once.
    tables = (SymbolTables if is_certificate else _tables)(torus.taps, torus.sizes, device)
    if packed is not None and abs(exponent) <= LIMIT:
        grams = PanelGrams(packed, exponent, tables)
    else:
        chunk_bytes = _CHUNK_BYTES if vectors is None else _WARM_CHUNK_BYTES
        if is_certificate:
            chunk_bytes = _CERTIFICATE_CHUNK_BYTES
        grams = SymbolGrams(_scaled_taps(torus.kernel, exponent), tables, chunk_bytes=chunk_bytes)
    dtype, shape = grams.dtype, (tables.num_frequencies * groups, rows)
    if vectors is not None and not _are_usable(vectors, shape, dtype.to_complex(), device):
        vectors = None
    plain = grams.tap_sum**2  # ||What|| <= sum over taps of ||K_a||
    # Libraries of other devices may invert blocks, which the a-priori bound of a factorization does not cover.
    measured = is_certificate or device.type != "cpu"
    enough = max(0.0, _scaled_down(enough / torus.factor - torus.moved, exponent))
    limit = min(plain, enough * enough)
    search = _Search(margin, limit, is_certificate=is_certificate, measured=measured)
    square, rest = search.run(grams, vectors)
    if not square < limit:
        return _scaled_back(grams.tap_sum, exponent, torus, largest), None
    if measured:
        square = square * (1 + 2.1 * gamma(1, dtype)) + rest
    else:
        unit = grams.factor_unit
        # c^2 I - G is rounded once on its diagonal, and its trace is at most rows c^2.
        share = unit / (1 - unit) * rows * 1.01 + 2.1 * gamma(1, dtype)
        square *= 1 + share * 1.01
    norm = grams.norm_above(square * (1 + 2.0**-40)) * (1 + 2.0**-48)
    return _scaled_back(norm, exponent, torus, largest), search.vectors()


@lru_cache(maxsize=64)
def _tables(taps: tuple[int, ...], sizes: tuple[int, ...], device: torch.device) -> SymbolTables:
    return SymbolTables(taps, sizes, device)


def _largest_entry(kernel: Tensor) -> Tensor:
    if not kernel.numel():
        return kernel.new_zeros((), dtype=torch.float64)
    least, most = torch.aminmax(kernel)
    return torch.maximum(-least, most).double()


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


def _are_usable(vectors: Tensor, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> bool:
    is_like = vectors.shape == shape and vectors.dtype == dtype and vectors.device == device
    return is_like and bool(torch.view_as_real(vectors).isfinite().all())


def _scaled_down(norm: float, exponent: int) -> float:
    try:
        return math.ldexp(norm, -exponent)
    except OverflowError:
        return math.inf


def _scaled_back(norm: float, exponent: int, torus: OnTorus, like: Tensor) -> Tensor:
    try:
        norm = math.nextafter(math.ldexp(norm * (1 + 2.0**-50), exponent), math.inf)
    except OverflowError:
        norm = math.inf
    return torch.full_like(like, math.nextafter((norm + torus.moved) * torus.factor * (1 + 2.0**-50), math.inf))


class _Search:
    """For a number above every eigenvalue of Gram matrices, but for the rounding of Cholesky factorizations."""

    def __init__(self, margin: float, limit: float, *, is_certificate: bool, measured: bool) -> None:
        self._margin, self._limit = margin, limit
        self._is_certificate, self._measured = is_certificate, measured
        self._vectors: list[Tensor] = []

    def vectors(self) -> Tensor | None:
        """Of all matrices after `run`, (batch, rows); None if none were followed."""
        return torch.cat(self._vectors) if self._vectors else None

    def run(self, chunks: Iterable[Matrices], vectors: Tensor | None) -> tuple[float, float]:
        """The number, ``limit`` if none is found below it; and what the factorizations leave, if that is measured.

        What has been factorized for one number need not be for a larger one, so each matrix is looked at until it
        passes, and never again.
        """
        square, rest, done = 0.0, 0.0, 0
        for grams in chunks:
            step = self._margin
            start = None
            if not self._is_certificate:
                given = None if vectors is None else vectors[done : done + len(grams)]
                done += len(grams)
                value, start = _followed(grams, given)
                self._vectors.append(start)
                square = max(square, value * (1 + self._margin))
            for _ in range(_MAX_TRIES):
                if square > 0:
                    if not square < self._limit:
                        return self._given_up()
                    passed, left = self._factorized(grams, square)
                    rest, failed = max(rest, left), ~passed
                    if bool(passed.all()):
                        break
                    grams = grams[failed]
                    start = None if start is None else start[failed]
                    # The same margin once more, and a larger one where the estimate does not grow.
                    square, step = square * (1 + step), 2 * step
                square = max(square, self._estimate(grams, start) * (1 + self._margin))
                start = None  # if that was not enough, then not from there
            else:
                return self._given_up()
        return square, rest

    def _factorized(self, grams: Matrices, square: float) -> tuple[Tensor, float]:
        """Which of ``square`` I - G have a Cholesky factor, (batch,); what those leave, if that is to be measured."""
        if not self._measured:
            return grams.have_factor(square), 0.0
        assert isinstance(grams, HermitianBatch)
        if self._is_certificate:
            return grams.have_factor_measured_on_the_way(square)
        return grams.have_measured_factor(square)

    def _estimate(self, grams: Matrices, start: Tensor | None) -> float:
        if not self._is_certificate:
            return _followed(grams, start)[0]
        assert isinstance(grams, HermitianBatch)
        values, _ = grams.rayleigh(_FIRST_ITERATIONS, None)
        return grams[_leading(values, _NUM_EXAMINED)].largest_eigenvalue()

    def _given_up(self) -> tuple[float, float]:
        self._vectors = []
        return self._limit, 0.0


def _followed(grams: Matrices, start: Tensor | None) -> tuple[float, Tensor]:
    """About the largest eigenvalue of all, not above it but for rounding; and vectors for the next time."""
    is_cold = start is None
    values, vectors = grams.rayleigh(_FIRST_ITERATIONS if is_cold else _WARM_ITERATIONS, start)
    leading = _leading(values, _NUM_LEADING if is_cold else _NUM_WARM_LEADING)
    more = _MORE_ITERATIONS if is_cold else _MORE_WARM_ITERATIONS
    values, vectors[leading] = grams[leading].rayleigh(more, vectors[leading])
    return float(values.amax()), vectors


def _leading(values: Tensor, count: int) -> Tensor:
    return values.topk(min(count, len(values))).indices
