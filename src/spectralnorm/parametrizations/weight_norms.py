"""`WeightNorms`: which norm of a weight is meant, estimates of it for maps of images, and bounds from above."""

from __future__ import annotations

from torch import Tensor, nn

from spectralnorm.errors import UserError
from spectralnorm.linalg import MatrixView, view_of
from spectralnorm.linalg.gram import gram_upper_bound
from spectralnorm.linalg.leading_of_map import LeadingImages
from spectralnorm.linalg.symbol import followed_convolution_bound
from spectralnorm.linalg.trial import tried_upper_bound
from spectralnorm.parametrizations.arithmetic import is_eager, plain_arithmetic
from spectralnorm.parametrizations.image_size import gain_of, geometry_of, require_input_size_of, usual_input_size
from spectralnorm.parametrizations.map_norm import MapNorm, found_map, map_norm
from spectralnorm.parametrizations.options import checked_input_size
from spectralnorm.parametrizations.vector_buffers import VectorBuffers

__all__ = ["WeightNorms"]


class WeightNorms(VectorBuffers):
    """A module that knows which norm of one weight is meant, with buffers for the singular vectors.

    Of a convolution it may be that of its map from image to image. An estimate of that is followed from step to step by
    the images that it stretches most, which are for one size; a bound holds whatever their size.

    Attributes:
        norm: ``"matrix"``, ``"operator"`` or ``"bidirectional"``, see `spectralnorm.SpectralNorm`.
        strict: whether the norm is bounded and not estimated.
        input_size: the size of images that the norm is meant for; None: see `spectralnorm.SpectralNorm`.
        learned_size: that of the first image that came, where it was waited for.
        geometry: of a convolution whose map is meant; None: a matrix is.
        leading_images: that an estimate of the map's norm goes on from.
        symbol_vectors: that the next bound of a strict convolution's symbol goes on from.
        n_power_iterations: power iterations per change of the weight.
    """

    n_power_iterations: int

    def __init__(
        self,
        module: nn.Module,
        name: str,
        weight: Tensor,
        *,
        norm: str,
        strict: bool,
        input_size: tuple[int, ...] | None,
        dim: int | None,
    ) -> None:
        """Of the ``weight`` with this ``name`` in a layer.

        Raises:
            UserError: the weight has no such norm.
        """
        super().__init__()
        self.name = name
        self.norm = norm
        self.strict = strict
        self.input_size = checked_input_size(input_size)
        self.geometry = geometry_of(module, name, weight) if strict or norm == "operator" else None
        self._gain = 1.0
        self.learned_size: tuple[int, ...] | None = None
        self.leading_images: LeadingImages | None = None
        self.symbol_vectors: Tensor | None = None
        if self.geometry is not None:
            if weight.is_complex():
                raise UserError('strict=True and norm="operator" are not offered for complex convolutions.')
            if self.input_size is not None:
                require_input_size_of(self.geometry, self.input_size)
            self._gain = gain_of(self.geometry, self.input_size)
        elif self.input_size is not None:
            raise UserError(
                f'input_size is for convolutions with strict=True or norm="operator", not for {name!r} of this '
                f"{type(module).__name__} with strict={strict} and norm={norm!r}; leave it out."
            )
        self.views = _views(view_of(module, weight, dim), norm)
        self._is_vector = weight.ndim < 2

    @property
    def view(self) -> MatrixView:
        """How the weight is read as the matrix with outputs first."""
        return self.views[0]

    def weight_matrix(self, weight: Tensor) -> Tensor:
        """``weight`` as the matrix whose norm is meant: (out, in), or (groups, out / groups, in / groups)."""
        return weight.unsqueeze(1) if self._is_vector else self.view.matrix(weight)

    # Bounds

    def upper_bound(self, weight: Tensor, leading: Tensor | None = None, *, is_followed: bool = False) -> Tensor:
        """As `sigma_upper`, computed now for any tensor of the weight's shape.

        Args:
            weight: real or complex.
            leading: vectors of the shorter side of each block near to the leading singular ones, in the order of
                `MatrixView.memory_blocks`; they say what is worth a try, and tighten.
            is_followed: whether the next bound will be of nearly this weight, and may start from this one.
        """
        if self.is_bounded_by_symbol and is_eager(weight):
            assert self.geometry is not None
            upper, vectors = followed_convolution_bound(
                weight.detach(), self.geometry, self.input_size, self.symbol_vectors
            )
            if is_followed:
                self.symbol_vectors = vectors
            return upper
        if self.geometry is not None:
            # A convolution copies its patches out, which has the norm `gain`, before its reshaped kernel; a transposed
            # one is the adjoint of that. That is looser than its symbol, but has no branch on values, which what is
            # compiled or transformed cannot have.
            kernel = weight.detach().unflatten(0, (self.geometry.groups, -1)).flatten(2)
            if leading is None or self.geometry.transposed:  # whose vectors are of the kernel with outputs first
                return gram_upper_bound(kernel).amax() * self._gain
        if leading is None:
            return gram_upper_bound(self.weight_matrix(weight.detach())).amax()
        return tried_upper_bound(self.view.memory_blocks(weight.detach()), leading).amax() * self._gain

    @property
    def is_bounded_by_symbol(self) -> bool:
        """Whether the bound of a weight is one of a convolution's symbol, where values may be looked at."""
        return self.geometry is not None and self._gain > 1

    # Maps of images

    @property
    def follows_map(self) -> bool:
        """Whether the norm is an estimate of the norm of a map of images."""
        return self.geometry is not None and not self.strict

    @property
    def waits_for_size(self) -> bool:
        """Whether the norm is to be meant for images of a size that nobody has told yet."""
        return self.follows_map and self.input_size is None and self.learned_size is None

    def _map_size(self) -> tuple[int, ...]:
        assert self.geometry is not None
        return self.input_size or self.learned_size or usual_input_size(self.geometry)

    def followed_map(self, weight: Tensor) -> MapNorm:
        """The norm of the map one step after it was looked at."""
        return self._map_found(weight, self.leading_images, is_kept=True)

    def refined_map(self, weight: Tensor) -> MapNorm:
        """The norm of the map from nothing but the weight, to be followed from then on."""
        return self._map_found(weight, None, is_kept=True)

    def map_of(self, weight: Tensor) -> MapNorm:
        """The norm of the map with any tensor of the weight's shape."""
        return self._map_found(weight, None, is_kept=False)

    def map_again(self, weight: Tensor, leading: LeadingImages | None = None) -> MapNorm:
        """The norm of the map by the images that are there, or by those that are given."""
        if leading is not None:
            self.leading_images = leading
        assert self.geometry is not None
        assert self.leading_images is not None
        with plain_arithmetic(weight):
            return map_norm(weight.detach(), self.geometry, self.leading_images)

    def _map_found(self, weight: Tensor, leading: LeadingImages | None, *, is_kept: bool) -> MapNorm:
        assert self.geometry is not None
        size = self._map_size()
        if leading is not None and tuple(leading.images.shape[2:]) != size:
            leading = None
        with plain_arithmetic(weight):
            detached = weight.detach()
            leading = found_map(detached, self.geometry, size, leading, self.n_power_iterations)
            if is_kept:
                self.leading_images = leading
            return map_norm(detached, self.geometry, leading)


def _views(view: MatrixView, norm: str) -> tuple[MatrixView, ...]:
    """The matrices whose norms are averaged."""
    if norm != "bidirectional":
        return (view,)
    return view, MatrixView(out_dim=1 if view.out_dim == 0 else 0, groups=view.groups)
