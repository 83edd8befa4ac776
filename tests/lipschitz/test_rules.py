"""Every rule against what the operation does: the largest stretch found, the explicit matrix where it is linear."""

import math
import random
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spectralnorm as sn
from spectralnorm import layers


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, inputs):
        return self.function(inputs)


def _matrix(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Of a model that is linear up to a constant."""
    model = model.eval().double()
    size = math.prod(shape)
    basis = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    with torch.no_grad():
        return (model(basis).reshape(size, -1) - model(torch.zeros_like(basis)).reshape(size, -1)).T


def _matrix_of(*shape: int) -> Tensor:
    return torch.arange(1.0, 1 + math.prod(shape)).reshape(shape).sin()


LINEAR = {
    "einsum, channels": (Lambda(lambda x: torch.einsum("bchw,oc->bohw", x, _matrix_of(2, 3).to(x.dtype))), (3, 2, 2)),
    "einsum, dense": (Lambda(lambda x: torch.einsum("bi,io->bo", x, _matrix_of(3, 4).to(x.dtype))), (3,)),
    "einsum, a matrix for each head": (
        Lambda(lambda x: torch.einsum("bhi,hoi->bho", x, _matrix_of(2, 3, 4).to(x.dtype))),
        (2, 4),
    ),
    "einsum, sums": (Lambda(lambda x: torch.einsum("bij->bi", x)), (3, 4)),
    "einsum, sums and a weight": (Lambda(lambda x: torch.einsum("o,bij->bo", _matrix_of(3).to(x.dtype), x)), (2, 4)),
    "einsum, diagonal": (Lambda(lambda x: torch.einsum("bij,j->bji", x, _matrix_of(4).to(x.dtype))), (2, 4)),
    "einsum, input repeated": (
        Lambda(lambda x: torch.einsum("bij,ij->bij", x, _matrix_of(4, 3).to(x.dtype))),
        (1, 3),
    ),
    "einsum, input repeated and summed": (
        Lambda(lambda x: torch.einsum("bij,kij->bik", x, _matrix_of(2, 4, 3).to(x.dtype))),
        (1, 3),
    ),
    "einsum, weight repeated": (Lambda(lambda x: torch.einsum("bi,i->b", x, _matrix_of(1).to(x.dtype))), (9,)),
    "einsum, weight repeated, dense": (
        Lambda(lambda x: torch.einsum("bi,io->bo", x, _matrix_of(1, 3).to(x.dtype))),
        (4,),
    ),
    "einsum, both repeated": (
        Lambda(lambda x: torch.einsum("ij,bij->bji", _matrix_of(4, 1).to(x.dtype), x)),
        (1, 3),
    ),
    "linear": (nn.Linear(5, 7), (5,)),
    "linear, a vector as weight": (Lambda(lambda x: F.linear(x, _matrix_of(3).to(x.dtype))), (2, 3)),
    "linear, a vector as weight, one entry": (Lambda(lambda x: F.linear(x, _matrix_of(1).to(x.dtype))), (1,)),
    "linear on sequences": (nn.Linear(5, 7), (3, 5)),
    "identity": (nn.Identity(), (4,)),
    "conv1d circular": (nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (2, 8)),
    "conv2d, small image": (nn.Conv2d(2, 3, 3, padding=1), (2, 4, 4)),
    "conv2d, no padding": (nn.Conv2d(2, 3, 4), (2, 4, 4)),
    "conv2d, stride and groups": (nn.Conv2d(4, 6, 4, stride=2, padding=1, groups=2), (4, 6, 6)),
    "conv2d, same": (nn.Conv2d(2, 2, 4, padding="same"), (2, 5, 5)),
    "conv2d, reflect": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 5, 5)),
    "conv2d, replicate": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="replicate"), (2, 5, 5)),
    "conv3d": (nn.Conv3d(1, 2, 2), (1, 3, 3, 3)),
    "transposed": (nn.ConvTranspose2d(3, 2, 4, stride=2, padding=1), (3, 3, 3)),
    "transposed, output padding, groups": (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1, groups=2), (4, 5)),
    "average pool": (nn.AvgPool2d(2), (2, 6, 6)),
    "average pool, overlapping, padded": (nn.AvgPool2d(3, stride=2, padding=1), (2, 7, 7)),
    "average pool, padding not counted": (nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False), (1, 7, 7)),
    "average pool, ceil": (nn.AvgPool1d(3, stride=2, ceil_mode=True), (2, 8)),
    "average pool, divisor": (nn.AvgPool2d(2, divisor_override=3), (1, 4, 4)),
    "average pool, negative divisor": (nn.AvgPool2d(3, stride=1, divisor_override=-4), (2, 4, 5)),
    "average pool, negative divisor, padded": (
        nn.AvgPool3d(2, padding=1, ceil_mode=True, divisor_override=-2),
        (1, 3, 2, 4),
    ),
    "adaptive average pool": (nn.AdaptiveAvgPool2d((3, 2)), (2, 7, 5)),
    "global mean": (Lambda(lambda x: x.mean((2, 3))), (2, 3, 3)),
    "global sum": (Lambda(lambda x: x.sum(dim=(1, 2, 3))), (2, 3, 3)),
    "nearest": (nn.Upsample(scale_factor=2), (2, 3, 3)),
    "nearest to a size": (nn.Upsample(size=(5, 7)), (1, 3, 3)),
    "nearest-exact down": (nn.Upsample(size=4, mode="nearest-exact"), (1, 6)),
    "bilinear": (nn.Upsample(scale_factor=2, mode="bilinear"), (1, 4, 4)),
    "bilinear, corners": (nn.Upsample(size=(7, 3), mode="bilinear", align_corners=True), (1, 4, 5)),
    "area": (Lambda(lambda x: F.interpolate(x, size=(2, 3), mode="area")), (1, 5, 6)),
    "pixel shuffle": (nn.PixelShuffle(2), (4, 3, 3)),
    "pixel unshuffle": (nn.PixelUnshuffle(2), (2, 4, 4)),
    "flatten": (nn.Flatten(), (2, 3)),
    "zero padding": (nn.ZeroPad2d((1, 0, 2, 1)), (1, 3, 3)),
    "reflection padding": (nn.ReflectionPad2d(1), (1, 4, 4)),
    "replication padding": (nn.ReplicationPad1d((2, 1)), (2, 4)),
    "circular padding": (nn.CircularPad2d((1, 0, 1, 1)), (1, 3, 3)),
    "crop": (Lambda(lambda x: x[:, :, 1:-1, 1:]), (1, 4, 4)),
    "batch norm": (nn.BatchNorm2d(3), (3, 2, 2)),
    "batch norm, weight first": (
        Lambda(
            lambda x: torch.ops.aten.batch_norm(
                x, *(_matrix_of(4, 3).exp().to(x.dtype)[[2, 3, 1, 0]]), False, 0.1, 1e-3, False
            )
        ),
        (3, 2),
    ),
    "batch norm after conv": (nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)), (2, 4, 4)),
    "batch norm before conv": (nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3)), (2, 4, 4)),
    "batch norm after transposed": (
        nn.Sequential(nn.ConvTranspose2d(2, 4, 3, groups=2), nn.BatchNorm2d(4)),
        (2, 3, 3),
    ),
    "batch norm between dense": (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), (3,)),
    "scaling": (Lambda(lambda x: -3 * x / 2 + 1), (4,)),
    "scaling of channels": (Lambda(lambda x: x * torch.tensor([1.0, -4.0])[:, None]), (2, 3)),
    "repetition": (Lambda(lambda x: x[:, :, None].expand(-1, -1, 5)), (3,)),
    "repetition by numbers": (
        Lambda(lambda x: x.repeat_interleave(torch.tensor([3, 0, 1]), 1, output_size=4)),
        (3,),
    ),
    "repetition by adding": (Lambda(lambda x: x[:, :, None] + torch.zeros(5)), (3,)),
    "repetition by multiplying": (Lambda(lambda x: x[:, :, None] * torch.tensor([1.0, 2.0])), (3,)),
    "matrix from the right": (Lambda(lambda x: x @ torch.arange(6.0).reshape(3, 2).to(x.dtype)), (3,)),
    "matrix from the left": (Lambda(lambda x: torch.arange(6.0).reshape(2, 3).to(x.dtype) @ x), (3, 4)),
    "constant to the input's type": (Lambda(lambda x: x - torch.ones(x.shape).to(x)), (3,)),
    "constant of the input's type": (Lambda(lambda x: torch.cat([torch.ones(len(x), 1).type_as(x), x], 1)), (3,)),
    "constant viewed as the input": (Lambda(lambda x: x - torch.ones(x.numel()).view_as(x)), (3,)),
    "constant shaped as the input": (Lambda(lambda x: x + torch.ones(x.numel()).reshape_as(x)), (3,)),
    "constant expanded as the input": (Lambda(lambda x: x - torch.arange(3.0).expand_as(x)), (3,)),
    "constant expanded to the batch": (Lambda(lambda x: x + torch.arange(3.0).expand(len(x), -1).to(x)), (3,)),
    "constant of each channel": (Lambda(lambda x: x - torch.ones(1, 3, 1, 1).to(x)), (3, 2, 2)),
    "mask of the input's type": (Lambda(lambda x: x * torch.tensor([0.5, 0.0, 2.0]).to(x)), (3,)),
    "input to a constant's type": (Lambda(lambda x: 2 * x.to(torch.ones(1, dtype=x.dtype))), (3,)),
    "input like another value": (Lambda(lambda x: x[:, :1].expand_as(2 * x).view_as(x).type_as(x.sum(1))), (3,)),
    "area of no pixel": (Lambda(lambda x: F.interpolate(x, scale_factor=0.3, mode="area")), (1, 3)),
    "difference from a constant input": (
        Lambda(lambda x: x @ _matrix_of(3, 2).to(x) - torch.zeros(x.shape).type_as(x) @ _matrix_of(3, 2).to(x)),
        (3,),
    ),
    "filled by name": (Lambda(lambda x: x * torch.full_like(input=x, fill_value=3.0)), (3,)),
    "index_select": (Lambda(lambda x: x.index_select(1, torch.tensor([0, 0, 2]))), (3,)),
    "index_select, one entry": (Lambda(lambda x: x.index_select(1, torch.tensor(2))), (3,)),
    "index_select, no entry": (Lambda(lambda x: x.index_select(-1, torch.tensor([], dtype=torch.long))), (3,)),
    "flip and roll": (Lambda(lambda x: x.flip(1).roll(1, dims=1)), (4,)),
    "linear after linear": (nn.Sequential(nn.Linear(5, 40), nn.Linear(40, 6)), (5,)),
    "x + linear": (Lambda(lambda x: x + x @ -torch.eye(3, dtype=x.dtype)), (3,)),
    **{
        f"mix of two matrices by {share}": (
            Lambda(lambda x, share=share: torch.lerp(x @ _matrix_of(3, 2).to(x), x @ _matrix_of(2, 3).T.to(x), share)),
            (3,),
        )
        for share in (-0.5, 0.3, 1.0, 1.5, 100.25)
    },
    "mix with a matrix, by a tensor": (
        Lambda(lambda x: torch.lerp(x, x @ _matrix_of(3, 3).to(x), torch.tensor(1.75).to(x))),
        (3,),
    ),
    "mix with a constant": (Lambda(lambda x: torch.lerp(x, torch.ones(3).to(x), 1.7)), (3,)),
    "mix of a constant": (Lambda(lambda x: torch.lerp(torch.ones(3).to(x), x, -1.7)), (3,)),
    "mix with what is repeated": (Lambda(lambda x: torch.lerp(torch.ones(1, 4).to(x), x, 2.5)), (1,)),
    "linear + linear": (
        Lambda(lambda x: x @ torch.eye(3, dtype=x.dtype) - 0.5 * (x @ torch.ones(3, 3, dtype=x.dtype))),
        (3,),
    ),
}


@pytest.fixture(autouse=True)
def _running_statistics():
    for model, _ in LINEAR.values():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                with torch.no_grad():
                    module.running_var.uniform_(0.5, 2)
                    module.weight.uniform_(-2, 2)


@pytest.mark.parametrize("name", LINEAR)
def test_linear_rule_gives_the_norm_of_the_explicit_matrix(name: str):
    model, shape = LINEAR[name]
    upper = sn.certify(model, shape, ascent_steps=0).upper_bound

    # Not matrix_norm, which has none for a matrix without entries before torch 2.10.
    norm = max(torch.linalg.svdvals(_matrix(model, shape)).tolist(), default=0.0)

    assert norm * (1 - 1e-12) <= upper <= norm * (1 + 1e-6) + 1e-12


def _larger_and_smaller(inputs: Tensor) -> Tensor:
    first, second = inputs[:, ::2], inputs[:, 1::2]
    return torch.cat([torch.maximum(first, second), torch.minimum(first, second)], dim=1)


def _chosen(inputs: Tensor) -> Tensor:
    first, second = inputs.chunk(2, dim=1)
    return torch.cat([torch.where(first < second, first, second), (first).where(first > second, second)], dim=1)


ATTAINED = {
    "relu": (nn.ReLU(), (3,), 1.0),
    "leaky relu": (nn.LeakyReLU(0.2), (3,), 1.0),
    "steep leaky relu": (nn.LeakyReLU(3.0), (3,), 3.0),
    "prelu": (nn.PReLU(init=-2.0), (3,), 2.0),
    "elu": (nn.ELU(2.0), (3,), 2.0),
    "celu": (nn.CELU(2.0), (3,), 1.0),
    "tanh": (nn.Tanh(), (3,), 1.0),
    "sigmoid": (nn.Sigmoid(), (3,), 0.25),
    "hardsigmoid": (nn.Hardsigmoid(), (3,), 1 / 6),
    "gelu": (nn.GELU(), (3,), 1.128905),
    "tanh gelu": (nn.GELU(approximate="tanh"), (3,), 1.128994),
    "silu": (nn.SiLU(), (3,), 1.09984),
    "mish": (nn.Mish(), (3,), 1.088499),
    "selu": (nn.SELU(), (3,), 1.7581),
    "hardswish": (nn.Hardswish(), (3,), 1.5),
    "softplus": (nn.Softplus(), (3,), 1.0),
    "softplus, falling": (nn.Softplus(beta=-2.0, threshold=25), (3,), 1.0),
    "logsigmoid": (nn.LogSigmoid(), (3,), 1.0),
    "abs": (Lambda(torch.abs), (3,), 1.0),
    "sin": (Lambda(torch.sin), (3,), 1.0),
    "erf": (Lambda(torch.erf), (3,), 2 / math.pi**0.5),
    "softmax": (nn.Softmax(dim=1), (2,), 0.5),
    "log-softmax": (nn.LogSoftmax(dim=1), (4,), 2.0),
    "logsumexp": (Lambda(lambda x: torch.logsumexp(x, 1)), (4,), 1.0),
    "max pool": (nn.MaxPool2d(2), (1, 4, 4), 1.0),
    "max pool, ceil": (nn.MaxPool1d(3, stride=2, ceil_mode=True), (1, 6), 2**0.5),
    "max pool, dilated": (nn.MaxPool1d(2, stride=1, dilation=2), (1, 5), 2**0.5),
    "adaptive max pool": (nn.AdaptiveMaxPool1d(2), (1, 3), 2**0.5),
    "largest": (Lambda(lambda x: x.amax(1)), (4,), 1.0),
    "maximum": (Lambda(lambda x: torch.maximum(x[:, :2], x[:, 2:])), (4,), 1.0),
    "sort": (Lambda(lambda x: x.sort(dim=1).values), (4,), 1.0),
    "norm": (Lambda(lambda x: x.norm(dim=1)), (4,), 1.0),
    "norm, as a function": (Lambda(lambda x: torch.norm(x, 2, (1, 2))), (2, 2), 1.0),
    "norm of order 1": (Lambda(lambda x: torch.linalg.vector_norm(x, 1, dim=1)), (4,), 2.0),
    "clamp": (Lambda(lambda x: x.clamp(-1, 1)), (3,), 1.0),
    "halves": (Lambda(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1)), (4,), 1.0),
    "halves that differ": (Lambda(lambda x: torch.cat([3 * x[:, :2].relu(), x[:, 2:].tanh()], 1)), (4,), 3.0),
    "parts that overlap": (Lambda(lambda x: torch.cat([x[:, :3], x[:, 1:]], 1)), (4,), 2**0.5),
    "one part twice": (Lambda(lambda x: torch.stack([x[:, 0], x[:, 0]], 1)), (4,), 2**0.5),
    "pieces between indices": (Lambda(lambda x: torch.cat(torch.tensor_split(x, (1, 1, -1), 1), 1)), (4,), 1.0),
    "pieces that overlap": (Lambda(lambda x: torch.cat(torch.tensor_split(x, (3, 1), 1), 1)), (4,), 2**0.5),
    "pieces that overlap, from the end": (Lambda(lambda x: torch.cat(x.tensor_split([-1, -3], 1), 1)), (4,), 2**0.5),
    "pieces of about the same size": (Lambda(lambda x: torch.cat(x.tensor_split(3, 1), 1)), (4,), 1.0),
    "halves out": (Lambda(lambda x: x.split(2, dim=1)), (4,), 1.0),
    "larger and smaller": (Lambda(_larger_and_smaller), (4,), 1.0),
    "larger and smaller of two, chosen": (Lambda(_chosen), (4,), 1.0),
    "MaxMin": (layers.MaxMin(), (4,), 1.0),
    "MaxMin of channels": (layers.MaxMin(), (2, 2, 2), 1.0),
    "GroupSort": (layers.GroupSort(3), (6,), 1.0),
    "convex mix": (Lambda(lambda x: torch.lerp(x, x.relu(), 0.25)), (3,), 1.0),
    "x + relu(x)": (Lambda(lambda x: x + x.relu()), (3,), 2.0),
    "relu by clamp in place": (Lambda(lambda x: (2 * x).clamp_(min=0)), (3,), 2.0),
    "two outputs": (Lambda(lambda x: (x, {"other": 2 * x})), (3,), 5**0.5),
    "reshapes": (Lambda(lambda x: x.unflatten(1, (2, 2)).transpose(1, 2).flatten(1)[:, None].squeeze(1)), (4,), 1.0),
}


@pytest.mark.parametrize("name", ATTAINED)
def test_bound_is_attained(name: str):
    model, shape, expected = ATTAINED[name]

    certificate = sn.certify(model, shape, ascent_steps=120)

    assert certificate.upper_bound == pytest.approx(expected, rel=1e-5)
    assert certificate.lower_bound == pytest.approx(certificate.upper_bound, rel=0.02)


SLOPES = {
    name: (model, expected)
    for name, (model, _, expected) in ATTAINED.items()
    if isinstance(model, nn.GELU | nn.SiLU | nn.Mish | nn.SELU | nn.Hardswish | nn.Sigmoid | nn.ELU)
}


def test_pixel_that_four_windows_read_attains_the_bound_of_a_max_pool():
    model = nn.MaxPool2d(3, stride=2)
    image, peak = torch.zeros(2, 1, 1, 5, 5).double()
    peak[0, 0, 2, 2] = 1

    change = torch.linalg.vector_norm(model(peak) - model(image)).item()

    assert sn.certify(model, (1, 5, 5), ascent_steps=0).upper_bound == change == 2


@pytest.mark.parametrize(("size", "out"), [(2, 82), (12, 492)])
def test_nearest_upsampling_is_bounded_for_the_pixels_that_each_type_copies(size: int, out: int):
    # 41 copies each in float64; in float32 the last bit of 1 / 41 makes it 42 of some.
    model = nn.Upsample(size=out)
    images = torch.eye(size)[:, None]

    copies = {
        dtype: model(images.to(dtype)).square().sum((1, 2)).max().item() for dtype in (torch.float32, torch.float64)
    }

    assert copies == {torch.float32: 42, torch.float64: 41}
    assert sn.certify(model, (1, size), ascent_steps=0).upper_bound == pytest.approx(42**0.5, rel=1e-12)


def test_nearest_upsampling_of_two_axes_multiplies_the_copies():
    certificate = sn.certify(nn.Upsample(size=(82, 6)), (1, 2, 3), ascent_steps=0)

    assert certificate.upper_bound == pytest.approx(84**0.5, rel=1e-12)


@pytest.mark.parametrize("name", SLOPES)
def test_constant_of_an_activation_is_above_every_slope(name: str):
    model, _ = SLOPES[name]
    points = torch.linspace(-12, 12, 2_000_001, dtype=torch.float64)[:, None].requires_grad_()

    (slopes,) = torch.autograd.grad(model(points).sum(), points)

    upper = sn.certify(model, (1,), ascent_steps=0).upper_bound
    assert slopes.abs().max().item() <= upper <= slopes.abs().max().item() * (1 + 1e-8)


def test_dropout_in_training_multiplies_by_what_it_keeps():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.75))

    trained, evaluated = (sn.certify(model, (3,), mode=mode).upper_bound for mode in ("train", "eval"))

    assert trained == pytest.approx(4 * evaluated, rel=1e-12)


def test_dropout_is_bounded_for_the_rounding_of_what_it_keeps():
    draw = random.Random(0)
    for _ in range(200):
        probability = draw.uniform(0.45, 0.4999)
        upper = sn.certify(nn.Dropout(probability), (3,), mode="train", ascent_steps=0).upper_bound
        assert 0 <= Fraction(upper) * (1 - Fraction(probability)) - 1 < 2.0**-50


def test_marking_a_value_for_gradients_changes_nothing():
    assert sn.certify(Lambda(lambda x: (2 * x).requires_grad_().relu()), (3,), ascent_steps=0).upper_bound == 2


class Projection(nn.Module):
    """psi' phi + <e_y, phi>, of Miyato and Koyama 2018."""

    def __init__(self):
        super().__init__()
        self.features = nn.Linear(4, 6)
        self.psi = nn.Linear(6, 1)
        self.embedding = nn.Embedding(5, 6)

    def forward(self, inputs, labels):
        phi = F.relu(self.features(inputs))
        return self.psi(phi) + (self.embedding(labels) * phi).sum(1, keepdim=True)


def test_projection_head_is_bounded_by_its_longest_row_for_any_label():
    model = Projection()
    features = torch.linalg.matrix_norm(model.features.weight.detach().double(), 2)
    rows = (model.psi.weight + model.embedding.weight).detach().double().norm(dim=1)

    certificate = sn.certify(model, (4,), num_classes=5)

    assert certificate.upper_bound == pytest.approx((features * rows.max()).item(), rel=1e-6)
    assert certificate.lower_bound <= certificate.upper_bound
