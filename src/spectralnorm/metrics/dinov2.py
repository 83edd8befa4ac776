"""DINOv2's vision transformers, for weights from a file of one's own (Oquab et al. 2023; Dosovitskiy et al. 2020).

Written for the names and shapes of the published files: patches of 14 pixels, 64 features a head, layer scale. The
variants S, B and L differ in shape alone, so a file says itself what it is; the giant one has another feed-forward part
and is refused. With registers (Darcet et al. 2023) or without.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralnorm.errors import UserError

__all__ = ["DINOv2", "dinov2_from_weights"]

_PATCH = 14
_HEAD = 64
# In training alone: stands for patches that are hidden.
_UNUSED = frozenset({"mask_token"})


class DINOv2(nn.Module):
    """Maps RGB images to the features of the class token after the last layer norm.

    Args:
        width: features of a token: 384 (S), 768 (B) or 1,024 (L).
        depth: blocks: 12, 12 or 24.
        grid: rows and columns of patches that positions were trained for; 37 in the published files.
        num_registers: tokens beside the class and the patches: 0 or 4.
    """

    image_size = 224
    channels = 3
    mean: Tensor
    deviation: Tensor

    def __init__(self, *, width: int, depth: int, grid: int = 37, num_registers: int = 0) -> None:
        super().__init__()
        self.num_features = width
        # ImageNet's, in levels of 0 to 255.
        mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        self.register_buffer("mean", 255 * mean.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", 255 * deviation.view(1, 3, 1, 1), persistent=False)
        self.grid = grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        self.register_tokens = nn.Parameter(torch.zeros(1, num_registers, width)) if num_registers else None
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, _PATCH, stride=_PATCH)})
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        """Compute features.

        Args:
            images: (n, 3, height, width), RGB, 0 to 255, both sides divisible by 14.

        Returns:
            Features (n, width), and no logits.
        """
        patches = self.patch_embed["proj"]((images - self.mean) / self.deviation)
        rows, columns = patches.shape[2:]
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        tokens = tokens + self._positions(rows, columns)
        if self.register_tokens is not None:
            registers = self.register_tokens.expand(len(images), -1, -1)
            tokens = torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)[:, 0], None

    def _positions(self, rows: int, columns: int) -> Tensor:
        if (rows, columns) == (self.grid, self.grid):
            return self.pos_embed
        of_class, of_patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        squares = of_patches.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        if self.register_tokens is None:
            # The published code asks for a scale, with 0.1 patches more than there are, and so shifts them a little.
            scale = ((rows + 0.1) / self.grid, (columns + 0.1) / self.grid)
            squares = F.interpolate(squares, scale_factor=scale, mode="bicubic", recompute_scale_factor=False)
        else:
            squares = F.interpolate(squares, size=(rows, columns), mode="bicubic", antialias=True)
        return torch.cat([of_class, squares.flatten(2).transpose(1, 2)], dim=1)


class _Block(nn.Module):
    """Attention, then two dense layers, each after a layer norm and times a factor for each feature."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.ls1 = nn.ParameterDict({"gamma": torch.ones(width)})
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.ls2 = nn.ParameterDict({"gamma": torch.ones(width)})

    def forward(self, tokens: Tensor) -> Tensor:
        qkv = self.attn["qkv"](self.norm1(tokens)).unflatten(2, (3, -1, _HEAD)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2]).transpose(1, 2).flatten(2)
        tokens = tokens + self.ls1["gamma"] * self.attn["proj"](mixed)
        hidden = self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(tokens))))
        return tokens + self.ls2["gamma"] * hidden


def dinov2_from_weights(weights: Mapping[str, Tensor], *, what: str) -> DINOv2:
    """Build the variant that weights belong to, and fill it.

    Args:
        weights: by the published names, of any floating-point type.
        what: they come from, for messages.

    Raises:
        UserError: they are not those of such a network.
    """
    weights = {name: tensor for name, tensor in weights.items() if name not in _UNUSED}
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight")
    missing = [name for name in needed if name not in weights]
    if missing:
        raise UserError(
            f"{what} does not hold DINOv2's weights under their published names ({missing[0]!r} is missing); give a "
            "TorchScript file of the network instead."
        )
    width, positions = weights["cls_token"].shape[-1], weights["pos_embed"].shape[1] - 1
    grid, patch = round(positions**0.5), tuple(weights["patch_embed.proj.weight"].shape[2:])
    if "blocks.0.mlp.w12.weight" in weights or width % _HEAD or grid * grid != positions or patch != (_PATCH, _PATCH):
        raise UserError(
            f"{what} is not DINOv2 S, B or L with patches of {_PATCH} pixels; give a TorchScript file of it."
        )
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    registers = weights["register_tokens"].shape[1] if "register_tokens" in weights else 0
    network = DINOv2(width=width, depth=depth, grid=grid, num_registers=registers)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        line = " ".join(str(error).split())[:200]
        raise UserError(f"{what} does not fit DINOv2 of {depth} blocks and width {width} ({line}).") from error
    return network
