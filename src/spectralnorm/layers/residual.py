"""Residual layers that stretch nothing, whatever their weights are: steps down a convex potential.

``x - 2 J^T diag(t)^-1 s(J x + b)`` is 1-Lipschitz if ``diag(t)`` is not below ``J J^T`` and the slopes of the
activation s lie in [0, 1]. With D the diagonal of the slopes and M = diag(t)^-1 D, the Jacobian times its transpose is
``1 - 4 J^T M J + 4 J^T M J J^T M J``, which is at most ``1 - 4 J^T (M - M diag(t) M) J``, and M - M diag(t) M =
diag(t)^-1 (D - D^2) is not negative.
Meunier et al. 2022 take one number for t, the squared norm of J (CPL, convex potential layer); Araujo et al. 2023 sums
of rows with shares that are learned (SLL). Here both t are bounds with the rounding included.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralnorm.errors import UserError
from spectralnorm.linalg.convolution import ConvolutionGeometry
from spectralnorm.linalg.directions import chirp
from spectralnorm.linalg.gram import gram_upper_bound
from spectralnorm.linalg.power_iteration import compute_dtype
from spectralnorm.linalg.rescaling import gram_row_sums
from spectralnorm.linalg.rounding import round_up
from spectralnorm.linalg.symbol import convolution_upper_bound

__all__ = ["CPLConv2d", "CPLLinear", "SLLConv2d", "SLLLinear"]

_POWER_ITERATIONS = 8


class _Residual(nn.Module):
    """What the four layers share: the weight ``J``, the bias, the activation and the step."""

    def __init__(self, shape: tuple[int, ...], activation: nn.Module | None, device: object, dtype: object) -> None:
        super().__init__()
        if min(shape) < 1:
            raise UserError(f"Features, channels and kernel sizes must be positive, got {shape}.")
        options: dict = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(shape, **options))
        self.bias = nn.Parameter(torch.zeros(shape[0], **options))
        self.activation = nn.ReLU() if activation is None else activation
        nn.init.xavier_normal_(self.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        """Same shape as ``inputs``."""
        hidden = self.activation(self._map(inputs, self.bias))
        per_channel = self._steps().reshape(-1, *(1,) * (self.weight.ndim - 2))
        return inputs - self._adjoint(hidden / per_channel)

    def _steps(self) -> Tensor:
        """(hidden,) or (1,): half of t, in the weight's dtype, rounded up."""
        with torch.autocast(self.weight.device.type, enabled=False):
            bound = self._squares()
        # The value is rounded up, the gradient passes by.
        return round_up(bound.detach() / 2, self.weight.dtype) + ((bound - bound.detach()) / 2).to(self.weight.dtype)

    def exact_twin(self) -> nn.Module:
        """A copy in float64 that computes with the very numbers of this one, steps that were rounded included."""
        with torch.no_grad():
            steps = self._steps().double()
        twin = copy.deepcopy(self).double()
        object.__setattr__(twin, "_steps", lambda: steps.to(twin.weight.dtype))
        return twin

    def _squares(self) -> Tensor:
        raise NotImplementedError

    def _map(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(inputs, self.weight, bias)

    def _adjoint(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight.mT)

    def extra_repr(self) -> str:
        hidden, features, *kernel = self.weight.shape
        return f"{features}, hidden={hidden}" + (f", kernel_size={tuple(kernel)}" if kernel else "")


class _ResidualConv2d(_Residual):
    def __init__(
        self,
        channels: int,
        kernel_size: int,
        hidden: int | None,
        activation: nn.Module | None,
        device: object,
        dtype: object,
    ) -> None:
        if kernel_size % 2 != 1:
            raise UserError(f"kernel_size must be odd, so that images keep their size, got {kernel_size}.")
        shape = (channels if hidden is None else hidden, channels, kernel_size, kernel_size)
        super().__init__(shape, activation, device, dtype)

    @property
    def _padding(self) -> int:
        return self.weight.shape[-1] // 2

    def _map(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(inputs, self.weight, bias, padding=self._padding)

    def _adjoint(self, hidden: Tensor) -> Tensor:
        return F.conv_transpose2d(hidden, self.weight, padding=self._padding)


class _RowSums(_Residual):
    """t of SLL."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.log_shares = nn.Parameter(torch.zeros_like(self.bias))

    def _squares(self) -> Tensor:
        wide = compute_dtype(self.weight.dtype)
        return gram_row_sums(self.weight.transpose(0, 1), shares=self.log_shares.to(wide).exp())


class _SquaredNorm(_Residual):
    """t of CPL."""

    def _squares(self) -> Tensor:
        bound = self._norm_bound()
        value = round_up(bound * bound * (1 + 2.0**-50), torch.float64)
        value = value.clamp_min(torch.finfo(self.weight.dtype).smallest_normal * 4)
        square = self._square_along_leading_direction().double()
        held = square.detach()
        ratio = torch.where(held > 0, value / held, 1.0)
        return (value + ratio * (square - held)).reshape(1)

    def _norm_bound(self) -> Tensor:
        return gram_upper_bound(self.weight)

    def _square_along_leading_direction(self) -> Tensor:
        """|J v|^2 with the leading singular vector v: its derivative is that of the squared norm."""
        shape = self._input_shape()
        weight = self.weight.detach()
        wide = weight.to(compute_dtype(weight.dtype))
        vector = chirp(shape.numel(), wide).reshape(shape)
        for _ in range(_POWER_ITERATIONS):
            with torch.no_grad():
                vector = self._normal_map(wide, vector)
                vector = vector / torch.linalg.vector_norm(vector).clamp_min(torch.finfo(vector.dtype).smallest_normal)
        image = self._image(self.weight.to(wide.dtype), vector)
        return image.square().sum()

    def _input_shape(self) -> torch.Size:
        return self.weight.shape[1:]

    def _image(self, weight: Tensor, vector: Tensor) -> Tensor:
        return weight @ vector

    def _normal_map(self, weight: Tensor, vector: Tensor) -> Tensor:
        return weight.mT @ (weight @ vector)


class SLLLinear(_RowSums):
    """``x - 2 W^T diag(t)^-1 s(W x + b)`` with ``t_i = sum_j |W W^T|_ij q_j / q_i`` (Araujo et al. 2023).

    1-Lipschitz in the 2-norm for all values of the parameters ``weight``, ``bias`` and ``log_shares`` (log q), as
    stored, for which t is within the range of their dtype: of float32, weights up to about 1e18 with shares that do not
    differ much. Beyond it the outputs are not finite.

    Args:
        features: of the inputs and outputs.
        hidden: rows of ``weight``; None: as many as features.
        activation: elementwise and with slopes in [0, 1], which is not checked: ReLU, LeakyReLU, tanh, sigmoid,
            softplus. None: ReLU.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UserError: a size is not positive.
    """

    def __init__(
        self,
        features: int,
        *,
        hidden: int | None = None,
        activation: nn.Module | None = None,
        device: object = None,
        dtype: object = None,
    ) -> None:
        super().__init__((features if hidden is None else hidden, features), activation, device, dtype)


class SLLConv2d(_RowSums, _ResidualConv2d):
    """As `SLLLinear` for images: ``W`` is a convolution with stride 1 that keeps the size, padded with zeros.

    The sums run over shifts too, so the layer is 1-Lipschitz for images of any size. (batch, channels, height, width).

    Args:
        channels: of the inputs and outputs.
        kernel_size: of both axes, odd.
        hidden: channels in between; None: as many.
        activation: as in `SLLLinear`.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UserError: a size is not positive, or ``kernel_size`` is even.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        *,
        hidden: int | None = None,
        activation: nn.Module | None = None,
        device: object = None,
        dtype: object = None,
    ) -> None:
        super().__init__(channels, kernel_size, hidden, activation, device, dtype)


class CPLLinear(_SquaredNorm):
    """``x - (2 / n^2) W^T s(W x + b)`` with n a guaranteed bound of the norm of ``W`` (Meunier et al. 2022).

    1-Lipschitz in the 2-norm for all values of the parameters, as stored, for which n^2 is within the range of their
    dtype, as in `SLLLinear`: the paper's power iteration, which stays below the norm, is replaced by
    `spectralnorm.linalg.gram_upper_bound`. A single large direction shortens the step of all.

    Args:
        features: of the inputs and outputs.
        hidden: rows of ``weight``; None: as many as features.
        activation: as in `SLLLinear`.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UserError: a size is not positive.
    """

    def __init__(
        self,
        features: int,
        *,
        hidden: int | None = None,
        activation: nn.Module | None = None,
        device: object = None,
        dtype: object = None,
    ) -> None:
        super().__init__((features if hidden is None else hidden, features), activation, device, dtype)


class CPLConv2d(_SquaredNorm, _ResidualConv2d):
    """As `CPLLinear` for images: ``W`` is a convolution with stride 1 that keeps the size, padded with zeros.

    The bound is that of the convolution for images of any size, computed at every forward, and waits for the device.

    Args:
        channels: of the inputs and outputs.
        kernel_size: of both axes, odd.
        hidden: channels in between; None: as many.
        activation: as in `SLLLinear`.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UserError: a size is not positive, or ``kernel_size`` is even.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        *,
        hidden: int | None = None,
        activation: nn.Module | None = None,
        device: object = None,
        dtype: object = None,
    ) -> None:
        super().__init__(channels, kernel_size, hidden, activation, device, dtype)

    def _norm_bound(self) -> Tensor:
        size = self.weight.shape[-1]
        ends = ((self._padding, self._padding),) * 2
        geometry = ConvolutionGeometry((size, size), (1, 1), (1, 1), ends)
        return convolution_upper_bound(self.weight, geometry)

    def _input_shape(self) -> torch.Size:
        # Of four kernels' size the norm is within a few percent of that for large images.
        return torch.Size((1, self.weight.shape[1], *(4 * size for size in self.weight.shape[2:])))

    def _image(self, weight: Tensor, vector: Tensor) -> Tensor:
        return F.conv2d(vector, weight, padding=self._padding)

    def _normal_map(self, weight: Tensor, vector: Tensor) -> Tensor:
        return F.conv_transpose2d(self._image(weight, vector), weight, padding=self._padding)
