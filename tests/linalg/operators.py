"""Convolutions as explicit matrices, and layers to compare on."""

import torch
from torch import nn


def explicit(geometry, weight, input_size):
    """(outputs, inputs): the matrix of a convolution in float64."""
    channels, _ = geometry.channels(weight)
    shape = (channels, *input_size)
    basis = torch.eye(channels * torch.Size(input_size).numel(), dtype=torch.float64, device=weight.device)
    return geometry.apply(basis.reshape(-1, *shape), weight.double()).flatten(1).mT


# Class, options, input size; four channels in, eight out.
LAYERS = [
    (nn.Conv1d, {"kernel_size": 3, "padding": 1}, (9,)),
    (nn.Conv1d, {"kernel_size": 5, "padding": 1, "stride": 2}, (10,)),
    (nn.Conv1d, {"kernel_size": 4, "stride": 3, "dilation": 2}, (13,)),
    (nn.Conv1d, {"kernel_size": 4, "stride": 2, "dilation": 4, "padding": 5}, (13,)),
    (nn.Conv1d, {"kernel_size": 2, "stride": 3}, (11,)),
    (nn.Conv1d, {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"}, (5,)),
    (nn.Conv1d, {"kernel_size": 3, "padding": 2, "padding_mode": "replicate"}, (1,)),
    (nn.Conv1d, {"kernel_size": 3, "padding": 2, "padding_mode": "circular", "stride": 2}, (5,)),
    (nn.Conv1d, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, (7,)),
    (nn.Conv1d, {"kernel_size": 5, "padding": 2, "padding_mode": "circular"}, (3,)),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1}, (6, 5)),
    (nn.Conv2d, {"kernel_size": 4, "padding": 1, "stride": 2}, (6, 8)),
    (nn.Conv2d, {"kernel_size": (3, 2), "padding": "same", "groups": 4}, (5, 6)),
    (nn.Conv2d, {"kernel_size": 3, "padding": (1, 2), "stride": (1, 2), "groups": 2}, (5, 6)),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, (4, 4)),
    (nn.Conv3d, {"kernel_size": 2, "padding": 1}, (3, 2, 3)),
    (nn.ConvTranspose1d, {"kernel_size": 4, "stride": 2, "padding": 1}, (6,)),
    (nn.ConvTranspose2d, {"kernel_size": 3, "stride": 2, "output_padding": 1, "groups": 2}, (3, 4)),
    (nn.ConvTranspose2d, {"kernel_size": 3, "padding": 1, "dilation": 2}, (5, 4)),
]
