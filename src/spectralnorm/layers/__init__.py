"""Layers of networks with a known Lipschitz constant that are no normalized ordinary layers."""

from spectralnorm.layers.group_sort import GroupSort, MaxMin

__all__ = ["GroupSort", "MaxMin"]
