"""Layers of networks with a known Lipschitz constant that are no normalized ordinary layers."""

from spectralnorm.layers.group_sort import GroupSort, MaxMin
from spectralnorm.layers.residual import CPLConv2d, CPLLinear, SLLConv2d, SLLLinear

__all__ = ["CPLConv2d", "CPLLinear", "GroupSort", "MaxMin", "SLLConv2d", "SLLLinear"]
