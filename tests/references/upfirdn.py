"""Upsample, filter, downsample, one pixel at a time."""

import torch
from torch import Tensor


def upfirdn(images: Tensor, taps: list[float], *, up: int, down: int, before: int, after: int, gain: float) -> Tensor:
    """Put ``up - 1`` zeros after each pixel, pad with zeros, convolve with the outer product of ``taps``, keep each
    ``down``-th pixel.

    Args:
        images: (batch, channels, height, width).
        taps: of the filter, the same along both axes.
        up: factor of the size.
        down: divisor of the size.
        before: zeros before the first row and column, after the zeros between the pixels.
        after: zeros after the last row and column.
        gain: factor of the output.
    """
    batch, channels, height, width = images.shape
    padded = images.new_zeros(batch, channels, before + up * height + after, before + up * width + after)
    for row in range(height):
        for column in range(width):
            padded[:, :, before + up * row, before + up * column] = images[:, :, row, column]
    rows = range(0, padded.shape[2] - len(taps) + 1, down)
    columns = range(0, padded.shape[3] - len(taps) + 1, down)
    filtered = images.new_zeros(batch, channels, len(rows), len(columns))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            for a, vertical in enumerate(reversed(taps)):
                for b, horizontal in enumerate(reversed(taps)):
                    filtered[:, :, i, j] += gain * vertical * horizontal * padded[:, :, row + a, column + b]
    return filtered


def explicit_matrix(function, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The matrix of a linear function of one image of shape (channels, height, width), in float64."""
    size = torch.Size(shape).numel()
    basis = torch.eye(size, dtype=torch.float64, device=device).view(size, *shape)
    return function(basis).flatten(1).T
