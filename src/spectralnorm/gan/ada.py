"""The augmentation pipeline of adaptive discriminator augmentation (Karras et al. 2020, appendix B): ``bgc``.

Pixel blitting, general geometry and color, each transformation on each image with probability p. As long as p stays
well below 1 a generator cannot make the augmentations its own (section 2.2 there); with p = 0 every pixel is passed on
as it came. Whether and how an image is changed is drawn on the images' device, and nothing waits for it.

Two things differ from the public code. Blitting copies pixels by index, so that an image which is only mirrored, turned
or moved by whole pixels is not resampled; there it goes through the warp with the rest. And what lies beyond the edges
is the mirrored image at any distance, where the public code pads as far as the batch at hand needs, which waits for the
device. The images, once warped, are sampled bilinearly at twice the resolution between the orthogonal lowpass filters
of the paper, which undo one another where nothing is moved.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from spectralnorm.errors import UserError

__all__ = ["blit", "recolor", "transform", "warp", "warp_matrices"]

# The wavelet sym6 (Daubechies 1992), a lowpass filter orthogonal to its own shifts by even numbers of taps.
_SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
_CENTER = sum(index * tap for index, tap in enumerate(_SYM6)) / sum(_SYM6)
_MARGIN = len(_SYM6) // 2
"""Pixels around an image that the filters reach."""
_GRAY = 1 / math.sqrt(3)


def transform(images: Tensor, p: Tensor, random: torch.Generator) -> Tensor:
    """The whole pipeline.

    Args:
        images: (batch, 1 or 3, size, size), in [-1, 1]; what leaves that range is not cut off.
        p: scalar on the same device, the probability of each transformation on each image.
        random: on the same device.

    Returns:
        As the images. With p = 0, the same numbers.

    Raises:
        UserError: the images are not square, smaller than 6 pixels, or have neither 1 nor 3 channels.
    """
    batch, channels, height, width = images.shape
    if height != width or height < _MARGIN:
        raise UserError(f"ADA turns images: they must be square, of at least {_MARGIN} px, got {height} x {width}.")
    if channels not in (1, 3):
        raise UserError(f"ADA changes colors: images must have 1 or 3 channels, got {channels}.")
    images = blit(images, p, random)
    matrices, is_warped = warp_matrices(batch, height, p, random)
    # Where, and not a product with an identity: an image that is let alone keeps its bits.
    images = torch.where(is_warped[:, None, None, None], warp(images, matrices), images)
    return recolor(images, p, random)


def blit(images: Tensor, p: Tensor, random: torch.Generator) -> Tensor:
    """Mirror, turn by quarters, move by up to an eighth in whole pixels: every pixel is a copy of one that came."""
    batch, channels, size, _ = images.shape
    mirrored = _happens(batch, p, random) & (_uniform(batch, random) < 0.5)
    turns = torch.where(_happens(batch, p, random), (_uniform(batch, random) * 4).floor(), 0.0).long()
    reach = 0.125 * size
    moves = ((2 * _uniform(2 * batch, random) - 1) * reach).round().view(2, batch)
    down, right = torch.where(_happens(batch, p, random), moves, 0.0).long()[:, :, None, None]

    # From the place of each output pixel back to where it was, last transformation first.
    places = torch.arange(size, device=images.device)
    y, x = _mirror(places[:, None] - down, size), _mirror(places[None, :] - right, size)
    # Twice the distance from the center is a whole number in images of even size, too.
    v, u = (2 * place - (size - 1) for place in (y, x))
    turns = turns[:, None, None]
    cosine = (turns == 0).long() - (turns == 2).long()
    sine = (turns == 1).long() - (turns == 3).long()
    u, v = cosine * u + sine * v, cosine * v - sine * u
    u = torch.where(mirrored[:, None, None], -u, u)
    index = (v + size - 1) // 2 * size + (u + size - 1) // 2
    index = index.flatten(1)[:, None].expand(-1, channels, -1)
    return images.flatten(2).gather(2, index).view_as(images)


def warp_matrices(batch: int, size: int, p: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """General geometry: scale, rotation, stretching along any axis, rotation again, fractional translation.

    Args:
        batch: images.
        size: their height and width, in pixels.
        p: probability of each; of the two rotations together.
        random: of the device.

    Returns:
        Inverse maps ``(batch, 2, 3)``, from the place of an output pixel (x, y, 1), in pixels from the center of the
        image, to the place it is read from; and ``(batch,)`` bool: whether anything was drawn for the image.
    """
    # The paper's: two rotations, of which with probability p at least one takes place.
    p_rotation = 1 - (1 - p).clamp(0, 1).sqrt()

    def log_normal() -> Tensor:
        return torch.exp2(0.2 * _normal(batch, random))

    def angle() -> Tensor:
        return math.pi * (2 * _uniform(batch, random) - 1)

    zero = torch.zeros(batch, device=random.device)
    scale, stretch = log_normal(), log_normal()
    before, after = angle(), angle()
    shift = 0.125 * size * _normal(2 * batch, random).view(2, batch)
    steps = [
        (p, _matrix([[1 / scale, zero], [zero, 1 / scale]])),
        (p_rotation, _matrix([[before.cos(), before.sin()], [-before.sin(), before.cos()]])),
        (p, _matrix([[1 / stretch, zero], [zero, stretch]])),
        (p_rotation, _matrix([[after.cos(), after.sin()], [-after.sin(), after.cos()]])),
        (p, _matrix([[zero + 1, zero, -shift[0]], [zero, zero + 1, -shift[1]]])),
    ]
    matrices = torch.eye(3, device=random.device).expand(batch, 3, 3)
    is_warped = torch.zeros(batch, dtype=torch.bool, device=random.device)
    for chance, step in steps:
        happens = _happens(batch, chance, random)
        matrices = torch.where(happens[:, None, None], matrices @ step, matrices)
        is_warped = is_warped | happens
    return matrices[:, :2], is_warped


def warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Images ``(batch, channels, height, width)`` read through the maps of `warp_matrices`, differentiable twice."""
    height, width = images.shape[2:]
    dtype = torch.promote_types(images.dtype, torch.float32)
    (up_y, down_y), (up_x, down_x) = (_resampling(size, dtype, images.device) for size in (height, width))
    canvas = up_y @ images.to(dtype) @ up_x.T

    # A sample at index m of an upsampled axis lies at pixel (m - _CENTER) / 2: there its filter has its weight.
    y, x = (
        (torch.arange(2 * size + len(_SYM6) - 2, dtype=dtype, device=images.device) - _CENTER) / 2 - (size - 1) / 2
        for size in (height, width)
    )
    places = torch.stack(torch.broadcast_tensors(x[None, :], y[:, None], torch.ones_like(x[None, :])), dim=-1)
    sources = torch.einsum("hwk,bik->bhwi", places, matrices.to(dtype))
    grid = torch.stack(
        [
            _on_canvas(sources[..., axis], size, length)
            for axis, size, length in ((0, width, canvas.shape[3]), (1, height, canvas.shape[2]))
        ],
        dim=-1,
    )
    sampled: Tensor = _Sample.apply(canvas, grid)  # pyright: ignore[reportAssignmentType]
    return (down_y @ sampled @ down_x.T).to(images.dtype)


def recolor(images: Tensor, p: Tensor, random: torch.Generator) -> Tensor:
    """Brightness, contrast, luma flip, and for colour images hue and saturation, as one matrix for each image."""
    batch, channels = images.shape[:2]
    device = random.device
    gray = torch.tensor([_GRAY, _GRAY, _GRAY, 0.0], device=device)
    along = torch.outer(gray, gray)
    identity = torch.eye(4, device=device)
    moves = torch.zeros(4, 4, device=device)
    moves[:3, 3] = 1.0
    colors = identity - along - torch.diag(torch.tensor([0.0, 0.0, 0.0, 1.0], device=device))

    brightness = 0.2 * _normal(batch, random)[:, None, None]
    contrast = torch.exp2(0.5 * _normal(batch, random))[:, None, None]
    flips = (_uniform(batch, random) < 0.5).float()[:, None, None]
    hue = math.pi * (2 * _uniform(batch, random) - 1)[:, None, None]
    saturation = torch.exp2(_normal(batch, random))[:, None, None]
    # Rodrigues' formula around the gray axis: the cross product with it, then the part across it.
    across = _GRAY * torch.tensor(
        [[0.0, -1.0, 1.0, 0.0], [1.0, 0.0, -1.0, 0.0], [-1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], device=device
    )
    steps = [
        (identity + brightness * moves, flips >= 0),
        (identity + (contrast - 1) * (along + colors), flips >= 0),
        (identity - 2 * flips * along, flips > 0),
    ]
    if channels == 3:
        steps += [
            (identity + hue.sin() * across + (hue.cos() - 1) * colors, flips >= 0),
            (identity + (saturation - 1) * colors, flips >= 0),
        ]
    matrices = identity.expand(batch, 4, 4)
    is_changed = torch.zeros(batch, 1, 1, dtype=torch.bool, device=device)
    for step, acts in steps:
        happens = _happens(batch, p, random)[:, None, None]
        matrices = torch.where(happens, step @ matrices, matrices)
        is_changed = is_changed | (happens & acts)
    matrices = matrices.to(images.dtype)
    factors, offsets = matrices[:, :3, :3], matrices[:, :3, 3:]
    if channels == 1:  # the mean over the channels of a gray image in colour
        factors, offsets = factors.sum(2, keepdim=True).mean(1, keepdim=True), offsets.mean(1, keepdim=True)
    changed = (factors @ images.flatten(2) + offsets).view(images.shape)
    return torch.where(is_changed[..., None], changed, images)


class _Sample(Function):
    """Bilinear sampling, linear in the image: its backward is its adjoint, and the adjoint's backward is itself.

    Torch's own is not differentiable twice in all the versions that this package runs on.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.shape = images.shape
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grid,) = ctx.saved_tensors
        return _Adjoint.apply(gradient, grid, ctx.shape), None  # pyright: ignore[reportReturnType]


class _Adjoint(Function):
    """The adjoint of `_Sample`."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, grid: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(grid)
        # The operator looks at the shape of the images alone where the grid's own gradient is not asked for.
        bilinear, border, align_corners, images = 0, 1, False, gradient.new_empty(shape)
        backward = torch.ops.aten.grid_sampler_2d_backward
        return backward(gradient, images, grid, bilinear, border, align_corners, (True, False))[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grid,) = ctx.saved_tensors
        return _Sample.apply(gradient, grid), None, None  # pyright: ignore[reportReturnType]


def _happens(batch: int, p: Tensor, random: torch.Generator) -> Tensor:
    # A number drawn from [0, 1) is never below 0 and always below 1.
    return _uniform(batch, random) < p


def _uniform(num: int, random: torch.Generator) -> Tensor:
    return torch.rand(num, generator=random, device=random.device)


def _normal(num: int, random: torch.Generator) -> Tensor:
    return torch.randn(num, generator=random, device=random.device)


def _mirror(places: Tensor, size: int) -> Tensor:
    """Indices up to ``size - 1`` outside an axis, mirrored in its first and last pixel."""
    return size - 1 - (size - 1 - places.abs()).abs()


def _matrix(rows: list[list[Tensor]]) -> Tensor:
    """``(batch, 3, 3)`` of the first two rows, whose last column is zero if it is missing."""
    zero = torch.zeros_like(rows[0][0])
    rows = [row if len(row) == 3 else [*row, zero] for row in rows]
    return torch.stack([torch.stack(row, dim=1) for row in [*rows, [zero, zero, zero + 1]]], dim=1)


@lru_cache(maxsize=16)
def _resampling(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Along one axis, the matrices to twice the resolution with a mirrored margin, ``(canvas, size)``, and back."""
    taps = torch.tensor(_SYM6, dtype=torch.float64)
    pixels = torch.eye(size, dtype=torch.float64)
    padded = torch.cat([pixels[:, :_MARGIN].flip(1), pixels, pixels[:, -_MARGIN:].flip(1)], dim=1)
    # The rows of the identity, upsampled, are the columns of the matrix. The factor keeps the mean of the pixels.
    up = F.conv_transpose1d(padded[:, None], math.sqrt(2) * taps[None, None], stride=2)[:, 0].T
    samples = torch.eye(2 * size + len(_SYM6) - 2, dtype=torch.float64)
    down = F.conv1d(samples[:, None], math.sqrt(0.5) * taps[None, None], stride=2)[:, 0].T
    return up.to(device, dtype), down.to(device, dtype)


def _on_canvas(places: Tensor, size: int, length: int) -> Tensor:
    """Places in pixels from the center of an axis as coordinates of the upsampled axis, as `F.grid_sample` has them."""
    places = places + (size - 1) / 2
    folded = size - (torch.remainder(places + 0.5, 2 * size) - size).abs() - 0.5
    # Close to the edges the canvas itself holds what the filters need, so that they undo one another there as well.
    is_near = (places >= -_MARGIN / 2) & (places <= size - 1 + _MARGIN / 2)
    index = 2 * torch.where(is_near, places, folded) + _CENTER + 2 * _MARGIN
    return (2 * index + 1) / length - 1
