"""What is certified is one function of a sample, whatever the batch and whichever call; what is none is refused."""

import hashlib
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectralnorm as sn
from spectralnorm.lipschitz import values


class Model(nn.Module):
    """With a state of several kinds, and a function of itself and the input."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function
        self.register_buffer("buffer", torch.ones(1))
        self.tensor = torch.ones(1)
        self.parameter = nn.Parameter(torch.ones(4))
        self.number = 1
        self.generator = torch.Generator().manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.embedding = nn.Embedding(3, 4)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def _changing(name: str, change: Callable[[Any], Any]) -> Callable[[Model, Tensor], Tensor]:
    def function(model: Model, inputs: Tensor) -> Tensor:
        setattr(model, name, change(getattr(model, name)))
        return inputs * getattr(model, name)

    return function


def _in_data(model: Model, inputs: Tensor) -> Tensor:
    model.buffer.data += 1
    return inputs * model.buffer


def _clipped(model: Model, inputs: Tensor) -> Tensor:
    model.layer.weight.data.clamp_(-0.1, 0.1)
    return model.layer(inputs)


def _growing(model: Model, inputs: Tensor) -> Tensor:
    model.layer.weight.data *= 1.5
    return model.layer(inputs)


def _put_back(name: str) -> Callable[[Model, Tensor], Tensor]:
    def function(model: Model, inputs: Tensor) -> Tensor:
        tensor = getattr(model, name)
        tensor.data *= 2
        outputs = inputs * tensor
        tensor.data /= 2
        return outputs

    return function


def _put_back_between_uses(model: Model, inputs: Tensor) -> Tensor:
    outputs = inputs * model.buffer * model.buffer
    return _put_back("buffer")(model, outputs) * model.buffer


def _drawn_and_put_back(model: Model, inputs: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        return inputs * torch.rand(4)


def _drawn_by_python_and_put_back(model: Model, inputs: Tensor) -> Tensor:
    state = random.getstate()
    factor = random.random()
    random.setstate(state)
    return inputs * factor


def _drawn_by_numpy_and_put_back(np: Any, inputs: Tensor) -> float:
    state = np.random.get_state()
    factor = np.random.rand()
    np.random.set_state(state)
    return factor


def _nearly_one(inputs: Tensor) -> Tensor:
    return torch.full((4,), 1 + 2.0**-20 * len(inputs))


def _after_use(model: Model, inputs: Tensor) -> Tensor:
    factor = torch.ones(4)
    outputs = inputs * factor
    factor.mul_(3)
    return outputs * factor


def _with_numpy(factor: Callable[[Any, Tensor], Any]) -> Callable[[Model, Tensor], Tensor]:
    return lambda model, inputs: inputs * factor(pytest.importorskip("numpy"), inputs)


_calls = iter(range(1000))
_generator = torch.Generator().manual_seed(0)

REFUSED = {
    "buffer changed in place": (_changing("buffer", lambda buffer: buffer.add_(1)), "mul.*changed in place afterwards"),
    "buffer replaced": (_changing("buffer", lambda buffer: buffer + 1), "mul.*something else"),
    "data of a buffer": (_in_data, "mul.*changed in place afterwards"),
    "data of a parameter": (_growing, "linear.*changed in place afterwards.*weights"),
    **{
        f"data of a {name}, put back after its use": (_put_back(name), "mul.*changed in place afterwards")
        for name in ("buffer", "tensor", "parameter")
    },
    "data of a buffer, put back between its uses": (_put_back_between_uses, "mul.*changed in place afterwards"),
    "tensor changed in place": (_changing("tensor", lambda tensor: tensor.add_(1)), "mul.*changed in place afterwards"),
    "tensor that grows a little": (_changing("tensor", lambda tensor: tensor * 1.0002), "mul.*something else"),
    "number": (_changing("number", lambda number: number + 1), "mul.*something else"),
    "constant that is changed after its use": (_after_use, "mul.*changed in place afterwards"),
    "number of calls": (lambda model, x: x * (1 + next(_calls)), "mul.*something else"),
    "Python's random numbers": (lambda model, x: x * random.random(), "random numbers"),
    "numpy's random numbers": (_with_numpy(lambda np, x: float(np.random.rand())), "random numbers"),
    "numpy's own generator": (_with_numpy(lambda np, x: np.random.default_rng().random()), "something else"),
    "size of the batch by numpy": (_with_numpy(lambda np, x: np.prod(x.shape)), "mul.*something else"),
    "size of the batch by numpy, in float32": (_with_numpy(lambda np, x: np.float32(len(x))), "mul.*something else"),
    "random numbers of a source that is put back": (_drawn_and_put_back, "mul.*something else"),
    "Python's of a source that is put back": (_drawn_by_python_and_put_back, "mul.*something else"),
    "numpy's of a source that is put back": (_with_numpy(_drawn_by_numpy_and_put_back), "mul.*something else"),
    "generator": (lambda model, x: x + torch.rand(4, generator=_generator), "add.*numbers that it draws"),
    "model's own generator": (lambda model, x: x + torch.rand(4, generator=model.generator), "add.*something else"),
    "size of the batch": (lambda model, x: x * len(x), "mul.*11 samples in place of 7.*size of the batch"),
    "size of the batch as a tensor": (lambda model, x: x * torch.tensor(float(len(x))), "mul.*something else"),
    "size of the batch beside a large number": (
        lambda model, x: x * torch.tensor([1e6] * 3 + [len(x)]),
        "something else",
    ),
    "size of the batch in the last digits": (lambda model, x: x * _nearly_one(x), "mul.*something else"),
    "root of the batch": (lambda model, x: x / len(x) ** 0.5, "div.*something else"),
    "branch on the batch": (lambda model, x: x if len(x) < 10 else 2 * x, "something else"),
    "place in the batch": (lambda model, x: x * torch.arange(len(x))[:, None], "mul.*something else"),
    "steps by the batch": (lambda model, x: x[:, :: len(x)].sum(1), "getitem.*something else"),
    "slice up to the batch": (lambda model, x: x[:, : len(x)], "getitem.*something else"),
    "slice from the batch": (lambda model, x: torch.cat([x, x[:, len(x) :]], 1), "getitem.*something else"),
    "pieces by the batch": (lambda model, x: sum(x.split(len(x), 1)), "split.*something else"),
    "part from the batch": (lambda model, x: x.repeat(1, 8).narrow(1, len(x), 4), "narrow.*something else"),
    "slice by the batch": (lambda model, x: x[:, : len(x) % 3 + 1], "getitem.*something else"),
    "one size alone": (lambda model, x: x * torch.ones(11, 1), "11 samples and on no other number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_one_function_of_a_sample_is_refused(name: str):
    function, message = REFUSED[name]
    model = Model(function)
    before, python_state, torch_state = model.buffer.clone(), random.getstate(), torch.get_rng_state()

    with pytest.raises(sn.UserError, match=f"(?s){message}"):
        sn.certify(model, (4,), ascent_steps=0)

    assert torch.equal(model.buffer, before)
    assert random.getstate() == python_state
    assert torch.equal(torch.get_rng_state(), torch_state)


def _counting(model: Model, inputs: Tensor) -> Tensor:
    model.buffer += 1
    return 2 * inputs


def _keeping(model: Model, inputs: Tensor) -> Tensor:
    if not isinstance(model.number, Tensor):
        model.number = 2 * torch.ones(4)
    return inputs * model.number


def _indexed_by_numpy(model: Model, inputs: Tensor) -> Tensor:
    np = pytest.importorskip("numpy")
    return (
        inputs[:, np.int64(1)].unflatten(0, (-1, 1)) * np.float32(2)
        + inputs[:, : np.int64(2)].sum(np.int64(1))[:, None]
    )


CERTIFIED = {
    "reshaped": (lambda model, x: 2 * x.view(len(x), 2, 2).reshape(-1, 4), 2),
    "expanded": (lambda model, x: (x[:, None].expand(len(x), 4, 4) / 2).flatten(1), 1),
    "slice of all": (lambda model, x: 2 * x[: len(x)], 2),
    "slice of all, of some entries": (lambda model, x: 2 * x[: len(x), 1:3], 2),
    "addend that differs by rounding": (lambda model, x: 2 * (x + _nearly_one(x)), 2),
    "constant for each sample": (lambda model, x: x + torch.full((len(x), 4), 3.0), 1),
    "samples in several places": (lambda model, x: (x.reshape(-1, 2) * torch.ones(2 * len(x), 2)).view(len(x), 4), 1),
    "layer of a constant": (lambda model, x: x + model.layer(torch.ones(len(x), 4)), 1),
    "buffer that counts calls": (_counting, 2),
    "tensor made in the first call": (_keeping, 2),
    "numbers of numpy": (_indexed_by_numpy, 2 + 2**0.5),
    "constant that is not a number": (lambda model, x: 2 * x.to(dtype=torch.float32, memory_format=None), 2),
}


@pytest.mark.parametrize("name", CERTIFIED)
def test_what_has_the_size_of_the_batch_and_does_not_depend_on_it_is_certified(name: str):
    function, constant = CERTIFIED[name]

    assert sn.certify(Model(function), (4,), ascent_steps=0).upper_bound == pytest.approx(constant, rel=1e-9)


def test_weights_that_forward_changes_behind_a_parametrization_are_refused():
    def scaled(model: Model, inputs: Tensor) -> Tensor:
        model.layer.parametrizations.weight.original0.data *= 1.5
        return model.layer(inputs)

    model = Model(scaled)
    nn.utils.parametrizations.weight_norm(model.layer)

    with pytest.raises(sn.UserError, match=r"linear at 'layer'.*something else"):
        sn.certify(model, (4,), ascent_steps=0)


def test_weights_are_those_that_forward_computes_with():
    model = Model(_clipped)
    nn.init.constant_(model.layer.weight, 1)

    assert sn.certify(model, (4,), ascent_steps=0).upper_bound == pytest.approx(0.4)


def test_constants_that_are_used_often_are_hashed_seldom(monkeypatch: pytest.MonkeyPatch):
    def unrolled(model: Model, inputs: Tensor) -> Tensor:
        factors = torch.full((1, 4), 0.5).expand(len(inputs), 4)
        for _ in range(50):
            inputs = model.layer(inputs).tanh() * factors
        return inputs

    hashed: list[bytes] = []
    monkeypatch.setattr(values, "sha256", lambda content: hashed.append(content) or hashlib.sha256(content))

    sn.certify(Model(unrolled), (4,))

    # The weight, the bias and the factors twice in each of two runs, and once in the end; each time with the shape.
    assert len(hashed) <= 2 * 2 * 3 * 3
    # The factors of one sample, not those of all.
    assert max(map(len, hashed)) < 7 * 4 * 4


def test_constants_of_labels_come_again_with_them():
    def scaled(model: Model, inputs: Tensor, labels: Tensor) -> Tensor:
        return inputs * model.layer(model.embedding(labels))

    model = Model(scaled)
    largest = model.layer(model.embedding.weight).abs().max().item()

    assert sn.certify(model, (4,), num_classes=3).upper_bound == pytest.approx(largest, rel=1e-5)


OF_OTHER_LABELS = {
    "the first": lambda model, x, labels: x * model.embedding(labels[:1]),
    "the last": lambda model, x, labels: x * model.embedding(labels[-1]),
    "the largest": lambda model, x, labels: x / (1 + labels.max()),
    "their number": lambda model, x, labels: x if len(labels.unique()) > 1 else 5 * x,
    "one among them": lambda model, x, labels: x if (labels == 1).any() else 5 * x,
}


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("name", OF_OTHER_LABELS)
def test_labels_of_other_samples_are_refused(name: str, num_classes: int):
    with pytest.raises(sn.UserError, match=r"all of one label.*labels of other samples"):
        sn.certify(Model(OF_OTHER_LABELS[name]), (4,), num_classes=num_classes, ascent_steps=0)


def test_labels_are_compared_where_the_first_batch_size_is_ambiguous():
    # 28 features are a multiple of it, so that what is certified is the second record.
    def scaled(model: Model, inputs: Tensor, labels: Tensor) -> Tensor:
        return inputs * model.embedding(labels).repeat(1, 7)

    model = Model(scaled)
    largest = model.embedding.weight[:2].abs().max().item()

    bound = sn.certify(model, (28,), num_classes=2, ascent_steps=0).upper_bound
    assert bound == pytest.approx(largest, rel=1e-5)
    with pytest.raises(sn.UserError, match=r"all of one label.*labels of other samples"):
        sn.certify(Model(lambda model, x, labels: scaled(model, x, labels[:1])), (28,), num_classes=2, ascent_steps=0)


def test_model_that_cannot_run_on_samples_of_one_label_is_told():
    def scaled(model: Model, inputs: Tensor, labels: Tensor) -> Tensor:
        first, second = labels.unique()
        return inputs * (second - first)

    with pytest.raises(sn.UserError, match="could not run the model on samples that all have the label 0: ValueError"):
        sn.certify(Model(scaled), (4,), num_classes=2, ascent_steps=0)
