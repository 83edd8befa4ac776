"""Other ways to a weight that stretches nothing, as torch parametrizations: orthogonal, capped, rescaled by channel.

Each is a function of the weight alone, without a state, computed at every use (`torch.nn.utils.parametrize.cached`
computes once for several), and strict: what the layer uses has the promised norm as stored, in float64 arithmetic.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spectralnorm import linalg
from spectralnorm.errors import UserError
from spectralnorm.linalg.convolution import ConvolutionGeometry
from spectralnorm.linalg.patches import patches_of_any_size

__all__ = ["AlmostOrthogonal", "MappedMatrix", "almost_orthogonal", "bjorck", "cayley", "soft_cap"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

Layer = TypeVar("Layer", bound=nn.Module)


class MatrixMap(Protocol):
    """What a function has to be like to be put on a weight: (groups, rows, columns) to the same shape."""

    def __call__(self, matrix: Tensor, /) -> Tensor: ...


class MappedMatrix(nn.Module):
    """A weight as a function of its matrix, with norm at most ``coefficient``.

    The parametrization behind `bjorck`, `cayley` and `soft_cap`. The kernel of a convolution is reshaped to (out, in *
    kernel), of a transposed one to (in, out * kernel). The map makes the norm of each group's matrix at most one; then
    it is divided by the root of how many patches share a pixel.

    Args:
        function: from `spectralnorm.linalg.orthogonal`, with the options bound: norm at most one but for rounding.
        geometry: of the convolution; None: a dense layer.
        coefficient: what the layer may stretch by.
    """

    def __init__(
        self, function: MatrixMap, *, geometry: ConvolutionGeometry | None = None, coefficient: float = 1.0
    ) -> None:
        super().__init__()
        _require_positive(coefficient)
        self.function = function
        self.geometry = geometry
        self.coefficient = coefficient

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer uses: same shape and dtype."""
        groups, scale = 1, self.coefficient
        if self.geometry is not None:
            groups = self.geometry.groups
            scale = self.coefficient / math.sqrt(patches_of_any_size(self.geometry)) * (1 - 2.0**-50)
        blocks = weight.unflatten(0, (groups, -1)).flatten(2)
        with torch.autocast(weight.device.type, enabled=False):
            mapped = self.function(blocks.to(linalg.compute_dtype(weight.dtype))) * scale
            return linalg.rescaled_below(mapped.to(weight.dtype), scale).reshape(weight.shape)

    def extra_repr(self) -> str:
        function = self.function
        options = {}
        if isinstance(function, partial):
            function, options = function.func, function.keywords
        told = "".join(f", {name}={value}" for name, value in options.items())
        return f"{getattr(function, '__name__', function)}{told}, coefficient={self.coefficient}"


class AlmostOrthogonal(nn.Module):
    """The parametrization behind `almost_orthogonal`.

    Args:
        geometry: of the convolution; None: a dense layer.
        coefficient: what the layer may stretch by.
    """

    def __init__(self, *, geometry: ConvolutionGeometry | None = None, coefficient: float = 1.0) -> None:
        super().__init__()
        _require_positive(coefficient)
        self.geometry = geometry
        self.coefficient = coefficient

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer uses: same shape and dtype."""
        with torch.autocast(weight.device.type, enabled=False):
            return linalg.almost_orthogonal(weight, self.geometry, coefficient=self.coefficient)

    def extra_repr(self) -> str:
        return f"coefficient={self.coefficient}"


def bjorck(layer: Layer, name: str = "weight", *, num_iterations: int = 15, coefficient: float = 1.0) -> Layer:
    """Bring all singular values of a layer's matrix near to one, from below (`spectralnorm.linalg.bjorck`).

    A dense layer gets norm at most ``coefficient``, in most cases all but equal to it; singular values that were small
    beside the largest stay smaller. Of a convolution the reshaped kernel becomes orthogonal and is then divided by the
    root of how many patches share a pixel, so that its norm is at most ``coefficient`` for images of any size, but as a
    map of images it is not orthogonal and usually smaller by a third or more.

    Args:
        layer: with a dense weight, or a convolution.
        name: of its weight.
        num_iterations: more make small singular values larger.
        coefficient: what the layer may stretch by.

    Returns:
        The same layer, parametrized.

    Raises:
        UserError: the weight is neither a matrix nor a convolution's kernel, or ``coefficient`` is not positive.
    """
    return _register(layer, name, partial(linalg.bjorck, num_iterations=num_iterations), coefficient)


def cayley(layer: Layer, name: str = "weight", *, coefficient: float = 1.0) -> Layer:
    """Make a layer's matrix orthogonal by the Cayley transform (`spectralnorm.linalg.cayley`): one solve.

    All singular values of a dense layer are ``coefficient``, but for rounding, from below. For convolutions as
    `bjorck`.

    Args:
        layer: with a dense weight, or a convolution.
        name: of its weight.
        coefficient: what the layer may stretch by.

    Returns:
        The same layer, parametrized.

    Raises:
        UserError: the weight is neither a matrix nor a convolution's kernel, or ``coefficient`` is not positive.
    """
    return _register(layer, name, linalg.cayley, coefficient)


def soft_cap(layer: Layer, name: str = "weight", *, coefficient: float = 1.0) -> Layer:
    """Bend singular values below a limit, and leave small ones (`spectralnorm.linalg.soft_cap`).

    Unlike division by the norm it does not shorten all directions for the sake of the longest. The norm is below
    ``coefficient``, and comes near to it only where the raw weight's is several times as large.
    For convolutions, the limit holds for the map of images of any size, as in `bjorck`.

    Args:
        layer: with a dense weight, or a convolution.
        name: of its weight.
        coefficient: the limit.

    Returns:
        The same layer, parametrized.

    Raises:
        UserError: the weight is neither a matrix nor a convolution's kernel, or ``coefficient`` is not positive.
    """
    _require_positive(coefficient)
    geometry = _geometry_of(layer, name)
    patches = 1 if geometry is None else patches_of_any_size(geometry)
    limit = coefficient / math.sqrt(patches)
    return _register(layer, name, partial(_capped_to_one, limit=limit), coefficient)


def almost_orthogonal(layer: Layer, name: str = "weight", *, coefficient: float = 1.0) -> Layer:
    """Rescale the channels of a layer such that it cannot stretch (AOL; `spectralnorm.linalg.almost_orthogonal`).

    Strict for images of any size, cheap, without iteration. The norm reaches ``coefficient`` only where the channels
    are orthogonal, which training tends to; a random layer is made far too short.

    Args:
        layer: with a dense weight, or a convolution.
        name: of its weight.
        coefficient: what the layer may stretch by.

    Returns:
        The same layer, parametrized.

    Raises:
        UserError: the weight is neither a real matrix nor a real convolution's kernel, or ``coefficient`` is not
            positive.
    """
    return _registered(layer, name, AlmostOrthogonal(geometry=_geometry_of(layer, name), coefficient=coefficient))


def _capped_to_one(matrix: Tensor, *, limit: float) -> Tensor:
    return linalg.soft_cap(matrix, limit) / limit


def _register(layer: Layer, name: str, function: MatrixMap, coefficient: float) -> Layer:
    geometry = _geometry_of(layer, name)
    return _registered(layer, name, MappedMatrix(function, geometry=geometry, coefficient=coefficient))


def _registered(layer: Layer, name: str, parametrization: nn.Module) -> Layer:
    parametrize.register_parametrization(layer, name, parametrization)
    return layer


def _geometry_of(layer: nn.Module, name: str) -> ConvolutionGeometry | None:
    weight = getattr(layer, name, None)
    if not isinstance(weight, Tensor):
        raise UserError(f"{type(layer).__name__} has no weight {name!r}.")
    if isinstance(layer, _CONVOLUTIONS) and name == "weight":
        return ConvolutionGeometry.of(layer)
    if weight.ndim != 2:
        raise UserError(
            f"The weight {name!r} of {type(layer).__name__} must be a matrix or the kernel of a convolution, "
            f"but has shape {tuple(weight.shape)}."
        )
    return None


def _require_positive(coefficient: float) -> None:
    if not coefficient > 0:
        raise UserError(f"coefficient must be positive, got {coefficient}.")
