"""What a convolution's norm depends on beside its weight: its geometry, and the size of its input if given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spectralnorm.errors import UserError
from spectralnorm.linalg.convolution import ConvolutionGeometry, max_patches_per_pixel
from spectralnorm.linalg.patches import patches_of_any_size

__all__ = [
    "forget_input_size",
    "gain_of",
    "geometry_of",
    "look_at_input",
    "require_input_size_of",
    "takes_input_size",
    "usual_input_size",
    "watch_input_size",
]

# Where no image has been seen: so large that most of it is far from the edges.
_USUAL_SIZE = 16

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def geometry_of(module: nn.Module, name: str, weight: Tensor) -> ConvolutionGeometry | None:
    """That of the convolution whose kernel ``weight`` is; None if it is not one."""
    if not isinstance(module, _CONVOLUTIONS) or name != "weight":
        return None
    geometry = ConvolutionGeometry.of(module)
    return geometry if tuple(weight.shape[2:]) == geometry.kernel_size else None


def takes_input_size(module: nn.Module, name: str, *, norm: str, strict: bool) -> bool:
    """Whether the norm of a weight is one for images of some size; the weight of a lazy layer needs no shape yet."""
    return isinstance(module, _CONVOLUTIONS) and name == "weight" and (strict or norm == "operator")


def require_input_size_of(geometry: ConvolutionGeometry, input_size: tuple[int, ...]) -> None:
    """Refuse an ``input_size`` that is none of the convolution's inputs.

    Raises:
        UserError: it has another number of axes, or the kernel does not fit into it.
    """
    if len(input_size) != geometry.num_axes or min(geometry.output_size(input_size)) < 1:
        raise UserError(
            f"input_size must have one integer for each of {geometry.num_axes} axes, large enough for the kernel "
            f"{geometry.kernel_size}, got {input_size}."
        )


def gain_of(geometry: ConvolutionGeometry, input_size: Sequence[int] | None) -> float:
    """The norm of a convolution is at most this many times that of its reshaped kernel.

    The root of the number of patches that read one pixel; without a size its largest value over all.
    """
    patches = patches_of_any_size(geometry) if input_size is None else max_patches_per_pixel(geometry, input_size)
    return 1.0 if patches == 1 else math.sqrt(patches) * (1 + 2.0**-50)


def usual_input_size(geometry: ConvolutionGeometry) -> tuple[int, ...]:
    """A size to normalize for before the first image has come."""
    return tuple(max(_USUAL_SIZE, extent) for extent in geometry.extent)


class InputSizeLearner:
    """A forward pre-hook of a convolution that is normalized for the size of the first image that comes.

    Attributes:
        normalization: a `SpectralNorm`.
        num_axes: of the image.
    """

    def __init__(self, normalization: Any, num_axes: int) -> None:
        self.normalization = normalization
        self.num_axes = num_axes

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Look at the first image."""
        is_awaited = self.normalization.learned_size is None and _is_on(module)
        if is_awaited and torch._C._get_tracing_state() is None:
            images = args[0] if args else kwargs["input"]
            size = images.shape[-self.num_axes :]
            # What is exported may have sizes that are no numbers, and what has no values is only tried out.
            if all(type(each) is int for each in size) and not images.is_meta:
                self.normalization.learn_size(tuple(map(int, size)))

    @property
    def only_looks(self) -> bool:
        """Whether it changes nothing, as `certify` wants to know: once it has learned a size."""
        return self.normalization.learned_size is not None


class InputSizeCheck:
    """A forward pre-hook of a convolution that is normalized for one size of its input.

    Attributes:
        geometry: of the convolution.
        input_size: the size that it is normalized for.
        only_looks: that it changes nothing, as `certify` wants to know.
    """

    only_looks = True

    def __init__(self, geometry: ConvolutionGeometry, input_size: tuple[int, ...]) -> None:
        self.geometry = geometry
        self.input_size = input_size

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Refuse another input.

        Raises:
            UserError: its size is another, or the layer is asked for a size of its output.
        """
        if not _is_on(module):
            return
        images = args[0] if args else kwargs["input"]
        size = tuple(images.shape[-self.geometry.num_axes :])
        if size != self.input_size:
            raise UserError(
                f"This {type(module).__name__} is normalized for inputs of size {self.input_size}, got {size}; leave "
                "input_size out to use others: a strict norm then holds for all sizes, an estimate for the first one."
            )
        if len(args) > 1 or kwargs.get("output_size") is not None:
            raise UserError(
                "A transposed convolution that is normalized for one input_size has one size of its output, too; leave "
                "output_size or input_size out."
            )


def watch_input_size(module: nn.Module, normalization: Any) -> None:
    """Put the one of this module's two classes on a convolution that its normalization needs; of others none.

    Args:
        module: the layer.
        normalization: a `SpectralNorm`.
    """
    geometry = normalization.geometry
    if geometry is None:
        return
    forget_input_size(module)  # of an earlier normalization
    if normalization.input_size is not None:
        module.register_forward_pre_hook(InputSizeCheck(geometry, normalization.input_size), with_kwargs=True)
    elif normalization.follows_map:
        module.register_forward_pre_hook(InputSizeLearner(normalization, geometry.num_axes), with_kwargs=True)


def look_at_input(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """What the hooks of this module's two classes do, for a forward that has begun without them."""
    for hook in _hooks(module).values():
        hook(module, args, kwargs)


def forget_input_size(module: nn.Module) -> None:
    """Take the hooks of this module's two classes off a convolution."""
    for key in _hooks(module):
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)


def _hooks(module: nn.Module) -> dict[int, InputSizeCheck | InputSizeLearner]:
    return {
        key: hook
        for key, hook in module._forward_pre_hooks.items()
        if isinstance(hook, (InputSizeCheck, InputSizeLearner))
    }


def _is_on(module: nn.Module) -> bool:
    """Whether the weight is still normalized: torch's own function takes that off, and no hooks."""
    lists: Any = module._modules.get("parametrizations")
    parts = () if lists is None or "weight" not in lists else lists["weight"]
    return any(getattr(part, "geometry", None) is not None for part in parts)
