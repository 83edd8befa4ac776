"""A guaranteed upper bound of the norm of a convolution, from its symbol at the frequencies of a torus.

The Gram matrices of the symbol are sums over the shifts d of the kernel against itself,

    What(w) What(w)^H = sum_d R_d e^{i d w},    R_d = sum_a K_{a + d} K_a^T,

so they are formed once for all frequencies. That none of them has an eigenvalue above c^2 is proved by the Cholesky
factorization of c^2 I - What What^H, which succeeds in floating point only if that matrix is positive definite up to a
rounding error that is known (Rump 2006). Which c is tried does not matter for the proof.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spectralnorm.linalg.convolution import ConvolutionGeometry
from spectralnorm.linalg.gram import gram_upper_bound
from spectralnorm.linalg.patches import as_patches
from spectralnorm.linalg.precision import full_precision
from spectralnorm.linalg.rounding import gamma, next_up, norm_above, product_gamma
from spectralnorm.linalg.torus import OnTorus, half_of_frequencies, on_torus

__all__ = ["convolution_upper_bound", "largest_symbol_above"]

_BLOCK = 128  # columns summed in float32 before the sum goes on in float64
_TABLE_ERROR = 2.0**-48  # of the sine and cosine of a rounded angle below 2 pi
_CHUNK_BYTES = 2**26  # of Gram matrices held at once
_FIRST_ITERATIONS, _MORE_ITERATIONS = 6, 30
_NUM_LEADING = 6
_MAX_TRIES = 60


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
    torus = on_torus(weight.detach(), geometry, input_size, max_excess=max_excess)
    patches = as_patches(weight.detach(), geometry, input_size)
    with full_precision(weight.device):
        if math.prod(torus.sizes) == 1:  # a matrix
            norm = gram_upper_bound(torus.kernel.flatten(2)).amax() + torus.moved
            bound = torch.where(norm > 0, next_up(norm * (torus.factor * (1 + 2.0**-50))), 0.0)
        else:
            bound = largest_symbol_above(torus, margin=4e-3, is_certificate=False)
        if patches is not None:
            bound = torch.minimum(bound, next_up(gram_upper_bound(patches.matrices).amax() * patches.factor))
        return bound


def largest_symbol_above(torus: OnTorus, *, margin: float, is_certificate: bool) -> Tensor:
    """What the norm of the convolution that was brought to ``torus`` does not exceed.

    Args:
        torus: whose kernel is real.
        margin: what is first tried above an estimate of the squared norm, relative.
        is_certificate: take time: estimate by eigenvalues of the frequencies in question, not by power iteration alone,
            and measure what the factorizations leave instead of trusting that they are LAPACK's.

    Returns:
        Scalar, float64.
    """
    kernel = torus.kernel
    largest = kernel.abs().amax().double() if kernel.numel() else kernel.new_zeros((), dtype=torch.float64)
    if not bool(largest.isfinite()):
        return torch.full_like(largest, math.inf)
    if not bool(largest > 0):
        return torch.full_like(largest, torus.moved * torus.factor * (1 + 2.0**-50))
    exponent = math.frexp(float(largest))[1]
    dtype = torch.float64 if kernel.dtype == torch.float64 else torch.float32
    # A power of two is exact; what underflows is below 2^-149, and paid for in `error`.
    half = -exponent // 2
    kernel = (kernel.double() * 2.0**half * 2.0 ** (-exponent - half)).to(dtype)
    rows, columns = kernel.shape[1:3]
    tap_sum = float(norm_above(kernel.flatten(3).double(), (1, 2)).sum(-1).amax()) * (1 + 2.0**-40)
    shifts, correlations = _autocorrelation(kernel)
    block = min(columns, _BLOCK) if dtype == torch.float32 else columns
    num_added = math.prod(kernel.shape[3:]) * math.ceil(columns / block) + len(shifts) + 4
    # Of the correlations, of their sums, of sines and cosines, and of the Gram matrices in the working type; each in
    # units of (sum over taps of ||K_a||_F)^2, which bounds the sum over d of ||R_d||_F.
    relative = 1.01 * (gamma(block + 2, dtype) + gamma(num_added) + gamma(2, dtype)) + _TABLE_ERROR
    error = tap_sum**2 * relative + kernel.numel() * 2.0**-100 * (1 + tap_sum)

    frequencies = half_of_frequencies(torus.sizes, kernel.device)
    grams = _Grams(shifts, correlations, frequencies, torus.sizes, dtype)
    plain = tap_sum**2  # ||What|| <= sum over taps of ||K_a||
    # Libraries of other devices may invert blocks, which the a-priori bound of a factorization does not cover.
    measured = is_certificate or kernel.device.type != "cpu"
    square, rest = grams.square_above(margin, plain, eigenvalues=is_certificate, measured=measured)
    if square < plain and measured:
        square = square * (1 + 2.1 * gamma(1, dtype)) + rest
    elif square < plain:
        unit = gamma(rows + 4, dtype)
        # c^2 I - G is rounded once on its diagonal, and its trace is at most rows c^2.
        share = unit / (1 - unit) * rows * 1.01 + 2.1 * gamma(1, dtype)
        square *= 1 + share * 1.01
    return _rooted(square * (1 + 2.0**-40) + error * 1.01, exponent, torus, largest)


def _rooted(square: float, exponent: int, torus: OnTorus, like: Tensor) -> Tensor:
    try:
        norm = math.nextafter(math.ldexp(math.sqrt(square) * (1 + 2.0**-50), exponent), math.inf)
    except OverflowError:
        norm = math.inf
    return torch.full_like(like, math.nextafter((norm + torus.moved) * torus.factor * (1 + 2.0**-50), math.inf))


def _autocorrelation(kernel: Tensor) -> tuple[list[tuple[int, ...]], Tensor]:
    """R_d for one of each pair of shifts d and -d, zero first: (shifts, groups, rows, rows), in float64.

    Args:
        kernel: (groups, rows, columns, *taps).
    """
    sizes = kernel.shape[3:]
    kernel = kernel.movedim(2, -1).contiguous()  # (groups, rows, *taps, columns)
    zero = (0,) * len(sizes)
    shifts = [d for d in itertools.product(*(range(1 - size, size) for size in sizes)) if d >= zero]
    return shifts, torch.stack([_correlated(kernel, shift) for shift in shifts])


def _correlated(kernel: Tensor, shift: tuple[int, ...]) -> Tensor:
    moved = kernel[
        (slice(None), slice(None), *(slice(max(d, 0), n + min(d, 0)) for d, n in _with_sizes(kernel, shift)))
    ]
    still = kernel[
        (slice(None), slice(None), *(slice(max(-d, 0), n - max(d, 0)) for d, n in _with_sizes(kernel, shift)))
    ]
    groups, rows, columns = kernel.shape[0], kernel.shape[1], kernel.shape[-1]
    left, right = (part.reshape(groups, rows, -1, columns).movedim(2, 1) for part in (moved, still))
    if kernel.dtype == torch.float64:
        return (left @ right.mT).sum(1)
    total = torch.zeros(groups, rows, rows, dtype=torch.float64, device=kernel.device)
    for a, b in zip(left.split(_BLOCK, -1), right.split(_BLOCK, -1), strict=True):
        total += (a @ b.mT).sum(1, dtype=torch.float64)
    return total


def _with_sizes(kernel: Tensor, shift: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    return zip(shift, kernel.shape[2:-1], strict=True)


class _Grams:
    """The Gram matrices of the symbol at the frequencies, made chunk by chunk."""

    def __init__(
        self,
        shifts: Sequence[tuple[int, ...]],
        correlations: Tensor,
        frequencies: Tensor,
        sizes: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        self._dtype, self._shape = dtype, correlations.shape[1:]
        turned = correlations.mT
        once = torch.ones(len(shifts), 1, 1, 1, dtype=torch.float64, device=correlations.device)
        once[0] = 0.5  # the shift zero is its own mirror image
        self._even = ((correlations + turned) * once).flatten(1)
        self._odd = (correlations - turned).flatten(1)
        # Whole numbers keep the angle exact until its last two operations.
        of_axis = [
            frequencies[:, axis, None] * torch.tensor([d[axis] for d in shifts], device=frequencies.device) % size
            for axis, size in enumerate(sizes)
        ]
        common = math.lcm(*sizes)
        turns = sum(turn * (common // size) for turn, size in zip(of_axis, sizes, strict=True)) % common  # type: ignore[union-attr]
        self._angles = turns.double() * (2 * math.pi / common)  # type: ignore[union-attr]
        groups, rows = self._shape[:2]
        self._length = max(1, _CHUNK_BYTES // (groups * rows * rows * 2 * torch.finfo(dtype).bits // 8))

    def __iter__(self) -> Iterator[Tensor]:
        """(frequencies * groups, rows, rows), complex."""
        for angles in self._angles.split(self._length):
            real = (angles.cos() @ self._even).to(self._dtype)
            imaginary = (angles.sin() @ self._odd).to(self._dtype)
            yield torch.complex(real, imaginary).view(-1, *self._shape[1:])

    def square_above(self, margin: float, plain: float, *, eigenvalues: bool, measured: bool) -> tuple[float, float]:
        """A number above every eigenvalue but for the rounding of a Cholesky factorization; ``plain`` if none is found.

        What has been factorized for one number need not be for a larger one, so each matrix is looked at until it
        passes, and never again. The second number bounds what the factorizations leave, if that is to be measured.
        """
        square, rest = 0.0, 0.0
        for grams in self:
            step = margin
            for _ in range(_MAX_TRIES):
                if square > 0:
                    shifted = -grams
                    shifted.diagonal(dim1=-2, dim2=-1).add_(square)
                    factors, info = torch.linalg.cholesky_ex(shifted)
                    failed = info != 0
                    if measured and not bool(failed.all()):
                        rest = max(rest, _rest_above(shifted[~failed], factors[~failed]))
                    if not bool(failed.any()):
                        break
                    grams = grams[failed]
                    # The same margin once more, and a larger one where the estimate does not grow.
                    square, step = square * (1 + step), 2 * step
                square = max(square, _estimate(grams, eigenvalues=eigenvalues) * (1 + margin))
                if not square < plain:
                    return plain, 0.0
            else:
                return plain, 0.0
        return square, rest


def _rest_above(matrices: Tensor, factors: Tensor) -> float:
    """What ||M - L L^H||_F is not above for any of a batch: then no eigenvalue of M is below minus that.

    Whatever computed L. The product is rounded by `product_gamma` ||L||_F^2 at most, the difference relative to itself.
    """
    order = factors.shape[-1]
    num_blocks = 4 if order >= 64 else 1
    square = 0.0
    for block in range(num_blocks):
        start, end = order * block // num_blocks, order * (block + 1) // num_blocks
        # The lower half is a third of the multiplications, because L ends at its diagonal; the upper half mirrors it.
        rest = matrices[:, start:, start:end] - factors[:, start:, :end] @ factors[:, start:end, :end].mH
        diagonal, below = rest[:, : end - start], rest[:, end - start :]
        square = square + _length_above(diagonal) ** 2 + 2 * _length_above(below) ** 2
    # Of what was computed of M, in case its halves do not mirror each other to the last digit.
    rest = torch.as_tensor(square).sqrt() * (1 + 2.0**-48) + _length_above(matrices - matrices.mH)
    rest = rest * (1 + 2 * gamma(1, factors.dtype))
    size = _length_above(factors)
    return float((rest + product_gamma(order, factors.dtype) * size.square() * (1 + 2.0**-50)).amax())


def _length_above(matrices: Tensor) -> Tensor:
    """An upper bound of the Frobenius norm of each of a batch."""
    # Of real numbers: torch takes the modulus of complex ones by hypot first, which is slow.
    return norm_above(torch.view_as_real(matrices).double(), (-3, -2, -1))


def _estimate(grams: Tensor, *, eigenvalues: bool) -> float:
    """About the largest eigenvalue of all, and not above it but for rounding."""
    values, vectors = _rayleigh(grams, _FIRST_ITERATIONS)
    leading = values.topk(min(_NUM_LEADING, len(values))).indices
    if eigenvalues:
        return float(torch.linalg.eigvalsh(grams[leading]).amax())
    return float(_rayleigh(grams[leading], _MORE_ITERATIONS, vectors[leading])[0].amax())


def _rayleigh(grams: Tensor, num_iterations: int, vectors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rayleigh quotients after power iteration, (batch,), and the vectors, (batch, rows)."""
    # Rows from the left, x G = (conj(G) x^T)^T, are several times faster, and conj(G) has the eigenvalues of G.
    rows = (_start(grams) if vectors is None else vectors)[:, None]
    tiny = torch.finfo(grams.dtype).tiny
    for _ in range(num_iterations):
        rows = rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(tiny)
        rows = rows @ grams
    rows = rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(tiny)
    return torch.linalg.vecdot(rows, rows @ grams)[:, 0].real, rows[:, 0]


def _start(grams: Tensor) -> Tensor:
    """The column with the largest diagonal entry of each, (batch, rows): no stranger to the leading eigenvector."""
    diagonal = grams.diagonal(dim1=-2, dim2=-1).real
    index = diagonal.argmax(-1)[:, None, None].expand(-1, grams.shape[-1], 1)
    return grams.gather(-1, index)[..., 0].conj()
