"""One rule per operation; importing this package registers them all."""

from spectralnorm.lipschitz.rules import activations, arithmetic, layers, pooling, refused, shapes

__all__ = ["activations", "arithmetic", "layers", "pooling", "refused", "shapes"]
