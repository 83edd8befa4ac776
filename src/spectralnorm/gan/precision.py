"""The arithmetic in which networks are trained: float32, or half precision where it is enough."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spectralnorm.errors import UserError

__all__ = ["PRECISIONS", "STRATEGIES", "Precision"]

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16}
"""The type that products are computed in, by the name of the precision; None: that of the weights."""

STRATEGIES = ("ddp", "fsdp")
"""How several processes hold a network: each all of it (DistributedDataParallel), or each a part (FSDP2)."""


class Precision:
    """Weights, their gradients and the optimizers are in float32 always; products may be in half precision (autocast).

    What a network returns is float32 again, so losses are. Penalties of gradients are not taken in half precision: they
    ask for second derivatives, which lose too many digits there, and whose first ones would need a scale of their own.

    Args:
        name: one of `PRECISIONS`.
        device: where the networks are.

    Raises:
        UserError: the device cannot compute so.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.dtype = PRECISIONS[name]
        self._device_type = device.type
        if self.dtype == torch.bfloat16 and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise UserError(
                f"This GPU ({torch.cuda.get_device_name(device)}) has no bfloat16; use precision fp16-mixed."
            )

    def forward(self, network: nn.Module, *inputs: Tensor | None) -> Tensor:
        """What a network makes of its inputs, in float32."""
        if self.dtype is None:
            return network(*inputs)
        with torch.autocast(self._device_type, self.dtype):
            outputs: Tensor = network(*inputs)
        return outputs.float()

    def scaler(self) -> torch.amp.GradScaler:
        """What scales a loss, and the gradients back, so that float16 can hold them; does nothing in other types.

        The scale is halved after a step whose gradients overflowed, which is skipped, and doubled after 2000 others.
        """
        return torch.amp.GradScaler(self._device_type, enabled=self.dtype == torch.float16)

    @staticmethod
    def step(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        """Move the weights by gradients of a scaled loss; the gradients are without the scale afterwards."""
        if scaler.is_enabled():
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
