"""One rule per operation; importing this package registers them all."""

from spectralnorm.lipschitz.rules import (
    activations,
    arithmetic,
    attention,
    einsum,
    layers,
    pooling,
    refused,
    residual,
    shapes,
)

__all__ = ["activations", "arithmetic", "attention", "einsum", "layers", "pooling", "refused", "residual", "shapes"]
