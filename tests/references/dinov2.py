"""DINOv2 (Oquab et al. 2023) image by image, token by token and head by head, in float64."""

import math

import torch
from torch import Tensor

MEAN = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)
DEVIATION = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)


def dinov2(weights: dict[str, Tensor], image: Tensor, *, depth: int) -> Tensor:
    """Features (width,) of the class token of an image, (3, height, width) of 0 to 255."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    image = (image.double() / 255 - MEAN[:, None, None]) / DEVIATION[:, None, None]
    rows, columns = image.shape[1] // 14, image.shape[2] // 14
    kernel = w["patch_embed.proj.weight"].flatten(1)
    patches = [
        kernel @ image[:, 14 * r : 14 * r + 14, 14 * c : 14 * c + 14].flatten() + w["patch_embed.proj.bias"]
        for r in range(rows)
        for c in range(columns)
    ]
    tokens = [w["cls_token"][0, 0], *patches]
    positions = _positions(w["pos_embed"][0], rows, columns)
    tokens = [token + position for token, position in zip(tokens, positions, strict=True)]
    for block in range(depth):
        p = f"blocks.{block}."
        attended = _attention([_norm(t, w, p + "norm1") for t in tokens], w, p + "attn.")
        tokens = [t + w[p + "ls1.gamma"] * a for t, a in zip(tokens, attended, strict=True)]
        hidden = [_dense(_norm(t, w, p + "norm2"), w, p + "mlp.fc1") for t in tokens]
        hidden = [h * 0.5 * (1 + torch.erf(h / math.sqrt(2))) for h in hidden]
        tokens = [t + w[p + "ls2.gamma"] * _dense(h, w, p + "mlp.fc2") for t, h in zip(tokens, hidden, strict=True)]
    return _norm(tokens[0], w, "norm")


def _attention(tokens: list[Tensor], w: dict[str, Tensor], name: str) -> list[Tensor]:
    width = len(tokens[0])
    qkv = [_dense(token, w, name + "qkv") for token in tokens]
    outputs = [torch.zeros(width, dtype=torch.float64) for _ in tokens]
    for head in range(width // 64):
        part = slice(64 * head, 64 * head + 64)
        queries, keys, values = ([row[k * width : (k + 1) * width][part] for row in qkv] for k in range(3))
        for index, query in enumerate(queries):
            scores = torch.stack([query @ key / 8 for key in keys])
            outputs[index][part] = scores.softmax(0) @ torch.stack(values)
    return [_dense(output, w, name + "proj") for output in outputs]


def _positions(embedding: Tensor, rows: int, columns: int) -> list[Tensor]:
    grid = math.isqrt(len(embedding) - 1)
    squares = embedding[1:].view(grid, grid, -1)
    if (rows, columns) != (grid, grid):
        down, across = _cubic(grid, rows), _cubic(grid, columns)
        squares = torch.einsum("ri,cj,ijd->rcd", down, across, squares)
    return [embedding[0], *squares.flatten(0, 1)]


def _cubic(num: int, wanted: int) -> Tensor:
    """Weights (wanted, num) of Keys' cubic with a = -0.75; places are spaced as if 0.1 more were wanted."""
    weights = torch.zeros(wanted, num, dtype=torch.float64)
    for index in range(wanted):
        place = (index + 0.5) * num / (wanted + 0.1) - 0.5
        base = math.floor(place)
        for neighbour in range(base - 1, base + 3):
            x, a = abs(place - neighbour), -0.75
            if x <= 1:
                value = (a + 2) * x**3 - (a + 3) * x**2 + 1
            else:
                value = a * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[index, min(max(neighbour, 0), num - 1)] += value
    return weights


def _norm(token: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    centred = token - token.mean()
    scaled = centred / (centred.square().mean() + 1e-6).sqrt()
    return scaled * w[name + ".weight"] + w[name + ".bias"]


def _dense(token: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return w[name + ".weight"] @ token + w[name + ".bias"]
