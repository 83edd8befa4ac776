"""Who takes part in `normalization.py`: the weights, the normalizations, and the steps that are timed."""

from importlib import import_module
from importlib.util import find_spec

import torch
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize

import spectralnorm as sn
from spectralnorm.gan.models import ARCHITECTURES


def weight_sets():
    """Shapes of the weights of discriminators, by name."""
    sncnn = [(64, 3, 3, 3), (64, 64, 4, 4), (128, 64, 3, 3), (128, 128, 4, 4), (256, 128, 3, 3), (256, 256, 4, 4)]
    dcgan = [(64, 3, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4), (1, 8192)]
    channels = {256: 128, 128: 256, 64: 512, 32: 512, 16: 512, 8: 512, 4: 512}
    stylegan2 = [(128, 3, 1, 1)]
    for size in (256, 128, 64, 32, 16, 8):
        inner, outer = channels[size], channels[size // 2]
        stylegan2 += [(inner, inner, 3, 3), (outer, inner, 3, 3), (outer, inner, 1, 1)]
    resnet = [(64, 3, 3, 3), (64, 64, 3, 3), (64, 3, 1, 1)]
    for inner, outer in ((64, 128), (128, 256), (256, 512), (512, 1024)):
        resnet += [(inner, inner, 3, 3), (outer, inner, 3, 3), (outer, inner, 1, 1)]
    return {
        "30 of 64x64": [(64, 64)] * 30,
        "SN-CNN 32 px": [*sncnn, (512, 256, 3, 3), (1, 8192)],
        "DCGAN 64 px": dcgan,
        "SN-ResNet 64 px": [*resnet, (1, 1024)],
        "StyleGAN2 256 px": [*stylegan2, (512, 513, 3, 3), (512, 8192), (1, 512)],
    }


def layer_of(shape, device):
    if len(shape) == 2:
        return nn.Linear(shape[1], shape[0], bias=False, device=device)
    return nn.Conv2d(shape[1], shape[0], shape[2:], bias=False, device=device)


def ours(layers):
    return sn.add_spectral_norm(layers)


def parametrization(layers):
    for layer in layers:
        torch_parametrizations.spectral_norm(layer)
    return layers


def hook(layers):
    for layer in layers:
        nn.utils.spectral_norm(layer)
    return layers


def torchlip(layers):
    modules = import_module("deel.torchlip")
    replaced = []
    for layer in layers:
        if isinstance(layer, nn.Linear):
            new = modules.SpectralLinear(layer.in_features, layer.out_features, bias=False, eps_bjorck=None)
        else:
            sizes = layer.in_channels, layer.out_channels, layer.kernel_size
            new = modules.SpectralConv2d(*sizes, bias=False, eps_bjorck=None)
        replaced.append(new.to(layer.weight.device))
    return nn.ModuleList(replaced)


class Reshaped(nn.Module):
    """orthogonium's power iteration on the weight as a matrix."""

    def __init__(self, weight):
        super().__init__()
        matrix = weight.flatten(1)
        self.normalize = import_module("orthogonium.reparametrizers").BatchedPowerIteration(matrix.shape)
        self.normalize.to(weight.device)

    def forward(self, weight):
        return self.normalize(weight.flatten(1)).reshape(weight.shape)


def orthogonium(layers):
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", Reshaped(layer.weight))
    return layers


TORCHS = {"P": parametrization, "O": hook}
PEERS = {}
if find_spec("deel") and find_spec("deel.torchlip"):
    PEERS["deel-torchlip"] = torchlip
if find_spec("orthogonium"):
    PEERS["orthogonium"] = orthogonium
CONTENDERS = {"plain": lambda layers: layers, "ours": ours, **TORCHS, **PEERS}
NETS = ("plain", "ours", "P")
"""Those that go along where not all do."""


class Step:
    """The normalization of one discriminator step for one contender."""

    def __init__(self, shapes, normalize, device):
        torch.manual_seed(0)
        self.layers = normalize(nn.ModuleList(layer_of(shape, device) for shape in shapes))
        self.optimizer = torch.optim.SGD(self.layers.parameters(), lr=1e-6)
        self.grads = [torch.randn(shape, device=device) for shape in shapes] * 2

    def read(self):
        weights = []
        for layer in self.layers:
            for pre_hook in layer._forward_pre_hooks.values():  # the old hook computes its weight in the forward
                pre_hook(layer, None)
            weights.append(layer.weight)
        return weights

    def __call__(self):
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward([*self.read(), *self.read()], self.grads)

    def change(self):
        self.optimizer.step()


class OtherWork:
    """What fills the caches between two uses of a network's weights: a convolution of images of 64 x 32 x 32.

    There are 16 of them, and on a GPU, whose cache is larger, 256 (67 MB).
    """

    def __init__(self, device):
        self.images = torch.randn(256 if device.type == "cuda" else 16, 64, 32, 32, device=device)
        self.layer = nn.Conv2d(64, 64, 3, device=device)

    @torch.no_grad()
    def __call__(self):
        self.layer(self.images)


class Floor:
    """What memory allows: two copies by one kernel each, as if of the weights and of their gradients."""

    def __init__(self, numel, device):
        self.source, self.target = torch.randn(numel, device=device), torch.empty(numel, device=device)

    def __call__(self):
        torch.mul(self.source, 1.5, out=self.target)
        torch.mul(self.source, 1.5, out=self.target)


class DiscriminatorStep:
    """One whole hinge step of a discriminator of 32 px.

    Args:
        normalize: of `CONTENDERS`.
        batch: images.
        device: of everything.
        architecture: name of the network.
        in_half: its products in bfloat16 (autocast), and Adam as one kernel (fused).
        penalty: the weight of WGAN-GP's.
        compiler: makes code for the network, as `torch.compile`; None: none is made.
    """

    def __init__(self, normalize, batch, device, *, architecture="sncnn", in_half=False, penalty=0.0, compiler=None):
        torch.manual_seed(0)
        network = ARCHITECTURES[architecture].discriminator(image_size=32, channels=3, width=64).to(device)
        layers = [layer for layer in network.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
        normalize(nn.ModuleList(layers))
        self.layers = layers
        self.network, self.penalty = network if compiler is None else compiler(network), penalty
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=in_half)
        self.real, self.fake = torch.randn(2, batch, 3, 32, 32, device=device)
        options = {"fused": True} if in_half else {}
        if device.type == "cuda":
            options["capturable"] = True  # in a CUDA graph
        self.optimizer = torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.0, 0.9), **options)

    def __call__(self):
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast:
            real, fake = self.network(self.real), self.network(self.fake)
        loss = (1 - real).relu().mean() + (1 + fake).relu().mean()
        if self.penalty:
            share = torch.rand(len(self.real), 1, 1, 1, device=self.real.device)
            between = (share * self.real + (1 - share) * self.fake).requires_grad_()
            (slope,) = torch.autograd.grad(self.network(between).sum(), between, create_graph=True)
            loss = loss + self.penalty * (slope.flatten(1).norm(dim=1) - 1).square().mean()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def judge(self):
        with self.autocast:
            self.network(self.real)

    @torch.no_grad()
    def read(self):
        for layer in self.layers:
            layer.weight  # noqa: B018
