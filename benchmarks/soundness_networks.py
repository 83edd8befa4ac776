"""Random small networks: does any pair of inputs show a larger Lipschitz constant than the certificate allows?

    python benchmarks/soundness_networks.py [NETWORKS] [STEPS]

Chains of linear layers, convolutions of all kinds, transposed and grouped ones, blurs, norms, pools, strides,
activations, residuals, concatenations, shared modules, layers that never stretch, parts, labels and functional calls,
some of them with rare arguments. Each is certified, and searched by gradient ascent in float64 on the model itself, not
on what was recorded of it.
"""

from __future__ import annotations

import copy
import random
import sys
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spectralnorm as sn
from spectralnorm.layers import MaxMin, SLLConv2d, SLLLinear


class Residual(nn.Module):
    def __init__(self, branch: nn.Module, *, share: float | None) -> None:
        super().__init__()
        self.branch, self.share = branch, share

    def forward(self, inputs: Tensor) -> Tensor:
        branch = self.branch(inputs)
        return inputs + branch if self.share is None else (1 - self.share) * inputs + self.share * branch


class Concatenation(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([branch(inputs) for branch in self.branches], dim=1)


class Functional(nn.Module):
    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.choice = draw.randrange(16)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.choice == 0:
            return 2 - 0.5 * F.leaky_relu(inputs, -1.5)
        if self.choice == 1:
            first, second = inputs.chunk(2, dim=1)
            return torch.cat([torch.maximum(first, second), first - second], dim=1)
        if self.choice == 2:
            return inputs.sort(dim=1).values.clamp_(-1.0, 2.0)
        if self.choice == 3:
            return F.softmax(3 * inputs, dim=1)
        if self.choice == 4:
            return inputs.flip(1) / 3 + inputs.abs().mean(1, keepdim=True)
        if self.choice == 5:
            return F.log_softmax(inputs, dim=-1) + inputs.amax(dim=1, keepdim=True)
        if self.choice == 6:
            return torch.lerp(inputs, torch.tanh(inputs), 0.3)
        if self.choice == 7:
            first, second = inputs.unflatten(1, (-1, 2)).unbind(2)
            larger = torch.where(first >= second, first, second)
            return torch.cat([larger, torch.minimum(first, second)], dim=1)
        if self.choice == 8:
            # In float32 first: the certificate is of the function with these numbers.
            weight = torch.linspace(-1, 1, inputs.shape[1] ** 2).reshape(inputs.shape[1], -1).to(inputs.dtype)
            return torch.einsum("bi...,oi->bo...".replace("...", "hw"[: inputs.ndim - 2]), inputs, weight)
        if self.choice == 9:
            return inputs - torch.ones(inputs.shape).type_as(inputs)
        if self.choice == 10:
            slope = torch.linspace(-1, 1, inputs.shape[1]).reshape(-1, *[1] * (inputs.ndim - 2)).to(inputs)
            return inputs * slope.expand_as(inputs)
        if self.choice == 11:
            # Of two matrices of the same value, where the input is flat.
            weight = torch.linspace(-1, 1, inputs.shape[1] ** 2).reshape(inputs.shape[1], -1).to(inputs.dtype)
            mixed = torch.einsum("bi...,io->bo...".replace("...", "hw"[: inputs.ndim - 2]), inputs, weight)
            return torch.lerp(torch.lerp(-mixed, mixed, 1.5), inputs, -0.25)
        if self.choice == 12:
            weight = torch.linspace(1, 2, 3 * inputs[0].numel()).reshape(3, -1).to(inputs.dtype)
            return torch.einsum("bkn,kn->bkn", inputs.flatten(1)[:, None], weight).mean(1).reshape(inputs.shape)
        if self.choice == 13:
            weight = torch.linspace(-1, 1, inputs[0].numel())[None].to(inputs.dtype)
            return torch.einsum("bn,nk->bk", inputs.flatten(1), weight).reshape(inputs.shape)
        if self.choice == 14:
            # Pieces that overlap.
            first, _, last = inputs.tensor_split((-1, 1), dim=1)
            return torch.cat([first, 1.5 * last.relu()], dim=1)[:, : inputs.shape[1]]
        half = inputs.shape[1] // 2
        return torch.cat([2 * inputs[:, :half].relu(), inputs[:, half:].sin()], dim=1)


class Labelled(nn.Module):
    """A network whose input is scaled, channel by channel, as its label says."""

    def __init__(self, network: nn.Module, channels: int, num_classes: int) -> None:
        super().__init__()
        self.network, self.scales = network, nn.Embedding(num_classes, channels)

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        scales = self.scales(labels)
        return self.network(inputs * scales.reshape(*scales.shape, *[1] * (inputs.ndim - 2)))


class Blur(nn.Module):
    """A fixed filter on every channel, zero-padded by ``padding``."""

    kernel: Tensor

    def __init__(self, channels: int, padding: int, stride: int) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(taps, taps).expand(channels, 1, 4, 4).clone())
        self.padding, self.stride = padding, stride

    def forward(self, inputs: Tensor) -> Tensor:
        kernel = self.kernel.to(inputs.dtype)
        return F.conv2d(inputs, kernel, padding=self.padding, stride=self.stride, groups=inputs.shape[1])


class Every(nn.Module):
    """Every second pixel."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs[:, :, ::2, ::2]


def _activation(draw: random.Random) -> nn.Module:
    kinds = (
        nn.ReLU,
        nn.Tanh,
        nn.GELU,
        nn.SiLU,
        nn.Mish,
        nn.SELU,
        nn.Hardswish,
        nn.Sigmoid,
        nn.Softplus,
        nn.ELU,
        nn.PReLU,
        MaxMin,
    )
    return draw.choice(kinds)()


def _normalized(layer: nn.Module, draw: random.Random) -> nn.Module:
    kind = draw.randrange(5)
    if kind == 0:
        return sn.spectral_norm(layer)
    if kind == 1:
        return nn.utils.parametrizations.weight_norm(layer)
    return layer


def _convolution(channels: int, size: int, draw: random.Random) -> nn.Module:
    groups = draw.choice((1, 1, 2))
    kernel = draw.choice((1, 2, 3))
    mode = draw.choice(("zeros", "zeros", "circular", "reflect", "replicate"))
    dilation = draw.choice((1, 1, 2))
    layer = nn.Conv2d(
        channels,
        channels,
        kernel,
        padding="same",
        padding_mode=mode if kernel > 1 and size > 2 else "zeros",
        dilation=dilation,
        groups=groups,
    )
    return _normalized(layer, draw)


def _image_layer(channels: int, size: int, draw: random.Random) -> tuple[nn.Module, int]:
    """One that keeps the channels, and the size after it."""
    kind = draw.randrange(16)
    if kind <= 2:
        return _convolution(channels, size, draw), size
    if kind == 3 and size >= 4:
        kernel, padding = draw.choice(((2, 0), (4, 1), (3, 1)))
        layer = nn.Conv2d(channels, channels, kernel, stride=2, padding=padding, groups=draw.choice((1, 2)))
        return layer, (size + 2 * padding - kernel) // 2 + 1
    if kind == 4 and size <= 6:
        layer = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1, groups=draw.choice((1, 2)))
        return layer, 2 * size
    if kind == 5 and size >= 4:
        kernel, stride = draw.choice(((2, 2), (3, 2), (2, 1)))
        pool = draw.choice((nn.MaxPool2d, nn.AvgPool2d))(kernel, stride, ceil_mode=draw.random() < 0.5)
        return pool, pool(torch.zeros(1, 1, size, size)).shape[-1]
    if kind == 6:
        return nn.BatchNorm2d(channels), size
    if kind == 7 and size <= 6:
        return nn.Upsample(scale_factor=2, mode=draw.choice(("nearest", "bilinear"))), 2 * size
    if kind == 8:
        return Functional(draw), size
    if kind == 9:
        inner = nn.Sequential(_convolution(channels, size, draw), _activation(draw))
        return Residual(inner, share=draw.choice((None, 0.25, 0.5))), size
    if kind == 10:
        halves = (nn.Conv2d(channels, channels // 2, 1), nn.Conv2d(channels, channels // 2, 3, padding=1))
        return Concatenation(*halves), size
    if kind == 11 and size >= 4:
        padding, stride = draw.choice(((2, 1), (1, 2)))
        return Blur(channels, padding, stride), (size + 2 * padding - 4) // stride + 1
    if kind == 12 and size >= 3:
        return Every(), (size + 1) // 2
    if kind == 13 and size >= 3:
        return nn.Conv2d(channels, channels, 2, stride=1), size - 1
    if kind == 14 and size <= 6:
        return nn.ConvTranspose2d(channels, channels, 2, stride=2), 2 * size
    if kind == 15:
        return SLLConv2d(channels), size
    return _activation(draw), size


def _image_network(draw: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    channels, size = draw.choice((2, 4)), draw.choice((3, 4, 5, 8))
    shape = (channels, size, size)
    layers: list[nn.Module] = []
    for _ in range(draw.randint(1, 5)):
        layer, size = _image_layer(channels, size, draw)
        layers += [layer] if draw.random() < 0.6 else [layer, _activation(draw)]
    if draw.random() < 0.5:
        layers += [nn.AdaptiveAvgPool2d(draw.choice((1, 2))), nn.Flatten(), nn.LazyLinear(3)]
    return nn.Sequential(*layers), shape


def _vector_network(draw: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    width = draw.choice((2, 4, 8))
    shared = _normalized(nn.Linear(width, width), draw)
    layers: list[nn.Module] = []
    for _ in range(draw.randint(1, 6)):
        kind = draw.randrange(8)
        layer: nn.Module
        if kind == 0:
            layer = shared
        elif kind == 1:
            layer = Residual(nn.Sequential(nn.Linear(width, width), _activation(draw)), share=draw.choice((None, 0.5)))
        elif kind == 2:
            layer = Residual(nn.Linear(width, width), share=draw.choice((None, 0.5)))
        elif kind == 3:
            layer = Concatenation(nn.Linear(width, width // 2), nn.Linear(width, width - width // 2))
        elif kind == 4:
            layer = nn.BatchNorm1d(width)
        elif kind == 5:
            layer = Functional(draw)
        elif kind == 6:
            layer = SLLLinear(width)
        else:
            layer = _normalized(nn.Linear(width, width), draw)
        layers += [layer] if draw.random() < 0.6 else [layer, _activation(draw)]
    return nn.Sequential(*layers), (width,)


def random_network(seed: int) -> tuple[nn.Module, tuple[int, ...], int | None]:
    """A network, the shape of a sample and how many labels it takes, if it does; the same for the same seed."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model, shape = draw.choice((_image_network, _vector_network))(draw)
    model.eval()
    with torch.no_grad():
        model(torch.zeros(2, *shape))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_var.uniform_(0.3, 2)  # type: ignore[union-attr]
                module.weight.uniform_(-2, 2)
    if draw.random() < 0.2:
        num_classes = draw.choice((2, 3))
        return Labelled(model, shape[0], num_classes).eval(), shape, num_classes
    return model, shape, None


def largest_stretch(
    model: nn.Module, shape: tuple[int, ...], num_classes: int | None = None, *, steps: int, pairs: int = 32
) -> float:
    """The largest quotient of a search over pairs of inputs, in float64 on the model itself."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, SLLConv2d | SLLLinear):  # with the steps that the float32 layer takes
            model.set_submodule(name, module.exact_twin())
    for module in model.modules():
        if nn.utils.parametrize.is_parametrized(module):
            # The weight that the float32 layer computes with, not that of a float64 one.
            nn.utils.parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    model = model.double().eval()
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-2, 0.7, pairs, dtype=torch.float64).reshape(-1, *[1] * len(shape))
    base = scales * torch.randn(pairs, *shape, generator=generator, dtype=torch.float64)
    offset = 0.01 * scales * torch.randn(pairs, *shape, generator=generator, dtype=torch.float64)
    labels = () if num_classes is None else (torch.arange(pairs) % num_classes,)
    best = 0.0
    for step in range(steps):
        base, offset = base.detach().requires_grad_(), offset.detach().requires_grad_()
        change = (model(base + offset, *labels) - model(base, *labels)).flatten(1).norm(dim=1)
        ratio = change / offset.flatten(1).norm(dim=1)
        best = max(best, ratio.max().item())
        direction, motion = torch.autograd.grad(ratio.clamp_min(1e-300).log().sum(), (offset, base))
        with torch.no_grad():
            if step < steps // 2:  # on a linear piece: power iteration
                square = offset.flatten(1).square().sum(1).reshape(scales.shape)
                grown = direction + offset / square
                offset = grown * (square.sqrt() / grown.flatten(1).norm(dim=1).clamp_min(1e-300).reshape(scales.shape))
            else:
                base = base + 0.1 * scales * motion / motion.flatten(1).norm(dim=1).clamp_min(1e-12).reshape(
                    scales.shape
                )
                square = offset.flatten(1).square().sum(1).reshape(scales.shape)
                offset = offset + 0.2 * square * direction
    return best


def main() -> None:
    networks = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 60
    begin, violations, ratios = time.perf_counter(), [], []
    for seed in range(networks):
        model, shape, num_classes = random_network(seed)
        upper = sn.certify(model, shape, num_classes=num_classes, ascent_steps=0).upper_bound
        stretch = largest_stretch(model, shape, num_classes, steps=steps)
        # 1e-9: what rounding of a float64 evaluation may add to a quotient.
        if stretch > upper * (1 + 1e-9) + 1e-12:
            violations.append(seed)
            print(f"seed {seed}: {stretch} > {upper}\n{model}")
        if upper > 0:
            ratios.append(stretch / upper)
    ratios.sort()
    print(f"{networks} networks, {len(violations)} violations {violations}; {time.perf_counter() - begin:.0f} s")
    print(
        f"largest stretch found / certificate: median {ratios[len(ratios) // 2]:.3f}, best {ratios[-1]:.6f}; "
        f"above 0.9 in {sum(ratio > 0.9 for ratio in ratios)}"
    )


if __name__ == "__main__":
    main()
