"""Layers of networks with a known Lipschitz constant that are no normalized ordinary layers."""

from spectralnorm.layers.attention import L2Attention, l2_attention_bound
from spectralnorm.layers.group_sort import GroupSort, MaxMin
from spectralnorm.layers.residual import CPLConv2d, CPLLinear, SLLConv2d, SLLLinear

__all__ = [
    "CPLConv2d",
    "CPLLinear",
    "GroupSort",
    "L2Attention",
    "MaxMin",
    "SLLConv2d",
    "SLLLinear",
    "l2_attention_bound",
]
