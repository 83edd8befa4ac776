"""Certificates: a guaranteed Lipschitz constant of a whole network."""

from spectralnorm.lipschitz.certificate import Certificate, LayerBound
from spectralnorm.lipschitz.certify import certify
from spectralnorm.lipschitz.mlp import mlp_bound
from spectralnorm.lipschitz.registry import Call, register_rule

__all__ = ["Call", "Certificate", "LayerBound", "certify", "mlp_bound", "register_rule"]
