"""Everything that may happen to normalized weights, one after another in any order."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.parametrizations.expectations import (
    Expected,
    Held,
    Known,
    is_same,
    is_usable,
    norm_by_svd,
    normalization,
    raw,
)
from torch import Tensor, nn

import spectralnorm as sn

LAYERS = {
    "first": (lambda: nn.Linear(14, 12), {}),
    "second": (lambda: nn.Linear(14, 12), {}),
    "wide": (lambda: nn.Linear(30, 9), {"coefficient": 2.0}),
    "few": (lambda: nn.Linear(6, 5), {}),
    "image": (lambda: nn.Conv2d(3, 10, 3), {}),
    "grouped": (lambda: nn.Conv2d(4, 20, 3, groups=2), {}),
    "transposed": (lambda: nn.ConvTranspose2d(10, 9, 2), {}),
    "capped": (lambda: nn.Linear(14, 12), {"mode": "cap", "coefficient": 0.8}),
    "learned": (lambda: nn.Linear(14, 12), {"mode": "learnable", "coefficient": 2.0}),
    "strict": (lambda: nn.Linear(14, 12), {"strict": True}),
    "mean": (lambda: nn.Conv2d(3, 10, 2), {"norm": "bidirectional"}),
    "operator": (lambda: nn.Conv2d(2, 3, 3, padding=1), {"norm": "operator", "input_size": (5, 5)}),
    "strict image": (lambda: nn.Conv2d(3, 2, 3, padding=1), {"strict": True, "input_size": (4, 4)}),
    "table": (lambda: nn.Embedding(20, 11), {}),
    "large": (lambda: nn.Linear(150, 140), {}),
}
NAMES = [name for name in LAYERS if name != "large"]
seeds = st.integers(0, 2**16)
some_names = st.lists(st.sampled_from(NAMES), min_size=2, max_size=5, unique=True)
# Where one is chosen of what there is at the time.
places = st.integers(0, 11)
looks = st.sampled_from(["grad", "grad", "no_grad", "inference", "autocast", "autocast without grad"])


def random(shape: torch.Size, seed: int, like: Tensor) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(like.dtype)


@dataclass
class World:
    """A model, its optimizer, and what is expected of it."""

    model: nn.ModuleDict
    optimizer: torch.optim.Optimizer
    expected: dict[str, Expected] = field(default_factory=dict)
    held: list[Held] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.expected:
            self.expect_anew()

    def expect_anew(self) -> None:
        self.expected = {name: Expected(layer) for name, layer in self.model.items()}

    @property
    def weights(self) -> list[nn.Parameter]:
        return [raw(layer) for layer in self.model.values()]

    def at(self, place: int) -> str:
        names = list(self.model)
        return names[place % len(names)]


def an_optimizer(kind: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    kinds = {
        "sgd": lambda: torch.optim.SGD(parameters, lr=0.1, foreach=False),
        "foreach": lambda: torch.optim.SGD(parameters, lr=0.1, foreach=True),
        "momentum": lambda: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        "fused": lambda: torch.optim.SGD(parameters, lr=0.1, fused=True),
        "adam": lambda: torch.optim.Adam(parameters, lr=0.01),
        "fused adam": lambda: torch.optim.Adam(parameters, lr=0.01, fused=True),
    }
    return kinds[kind]()


class AnyOrder(RuleBasedStateMachine):
    """A few models with the layers of some kinds, of which one is worked with at a time."""

    @initialize(names=some_names, seed=seeds)
    def make(self, names: list[str], seed: int) -> None:
        torch.manual_seed(seed)
        model = nn.ModuleDict()
        for name in names:
            make, options = LAYERS[name]
            model[name] = make()
            sn.add_spectral_norm(nn.ModuleDict({name: model[name]}), **options)
        self.kind = "sgd"
        self.aside = sn.spectral_norm(nn.Linear(2, 2))
        world = World(model, an_optimizer(self.kind, list(model.parameters())))
        self.worlds = [world]
        self.world = world
        self.snapshots: list[tuple[dict[str, Tensor], dict[str, tuple[object, Tensor]]]] = []
        self.loaded: tuple[int, set[str]] | None = None
        self.gradients: list[tuple[Tensor, Tensor]] = []

    # What all rules share

    def settled(self) -> None:
        for each in self.world.expected.values():
            each.is_settled()

    def changed(self) -> None:
        self.loaded = None

    @contextlib.contextmanager
    def looking(self, how: str) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if how in ("no_grad", "autocast without grad"):
                stack.enter_context(torch.no_grad())
            if how == "inference":
                stack.enter_context(torch.inference_mode())
            if how.startswith("autocast"):
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            yield

    def look(self, name: str, how: str = "grad", world: World | None = None) -> Held | None:
        world = self.world if world is None else world
        expected = world.expected[name]
        layer = expected.layer
        was_exact = expected.demand in ("exactly", "unseen")
        with self.looking(how):
            value = layer.weight
            dtype = raw(layer).dtype
            is_rounded = how.startswith("autocast") and normalization(layer).scale is None
            is_rounded &= not isinstance(layer, nn.Embedding)
            if is_rounded and not normalization(layer).strict and dtype != torch.float64:
                dtype = torch.bfloat16
            held = expected.check(value, dtype)
        for each in self.worlds:
            for other, its in each.expected.items():
                if each is not world or other != name:
                    its.is_used_elsewhere()
        needs_grad = raw(layer).requires_grad or normalization(layer).scale is not None
        assert value.requires_grad == (needs_grad and how in ("grad", "autocast"))
        if self.loaded is not None and world is self.world and how == "grad" and was_exact:
            self._check_loaded(name, value)
        if held is not None and how == "grad":
            self._check_buffers(layer)
        is_in_graph = raw(layer).requires_grad and how in ("grad", "autocast")
        return held if is_in_graph else None

    def _check_buffers(self, layer: nn.Module) -> None:
        part = normalization(layer)
        if not part.training:
            return
        tolerance = 1e-4 if raw(layer).dtype in (torch.float32, torch.float64) else 2e-2
        for buffer in (part._u, part._v):
            assert abs(buffer.double().norm().item() - 1) < tolerance

    def _check_loaded(self, name: str, value: Tensor) -> None:
        assert self.loaded is not None
        place, names = self.loaded
        if name in names:
            return
        names.add(name)
        of_first = self.snapshots[place][1]
        part = normalization(self.world.model[name])
        options = (part.mode, part.coefficient, part.n_power_iterations, value.dtype)
        if name not in of_first:
            of_first[name] = options, value.detach().clone()
        elif of_first[name][0] == options:
            assert torch.equal(of_first[name][1], value.detach()), "what is loaded is another function"

    def look_at_all(self, how: str) -> dict[str, Held | None]:
        return {name: self.look(name, how) for name in self.world.model}

    @invariant()
    def raw_weights_move_only_by_their_rules(self) -> None:
        if not hasattr(self, "worlds"):
            return
        for world in self.worlds:
            for name, each in world.expected.items():
                if world is not self.world and each.written is None:
                    assert torch.equal(raw(each.layer).detach().double().nan_to_num(), each.seen.nan_to_num()), name
                each.note_movement()
            for held in world.held:
                held.check_numbers()
        for gradient, numbers in self.gradients:
            assert is_same(gradient, numbers), "a gradient in use was overwritten"

    # Uses

    @rule(place=places, how=looks)
    def use_one(self, place: int, how: str) -> None:
        self.look(self.world.at(place), how)

    @rule(how=looks)
    def use_all(self, how: str) -> None:
        self.look_at_all(how)

    @rule(place=places, uses=st.lists(st.sampled_from(["grad", "grad", "autocast"]), min_size=1, max_size=3))
    def hold(self, place: int, uses: list[str]) -> None:
        """Go on with other things before the backward."""
        name = self.world.at(place)
        for how in uses:
            held = self.look(name, how)
            if held is not None:
                self.world.held.append(held)
        del self.world.held[:-6]

    @rule(
        seed=seeds,
        size=st.sampled_from([1e-3, 1.0, 30.0]),
        uses=st.lists(st.sampled_from(["grad", "grad", "autocast"]), min_size=1, max_size=4),
        skipped=st.sets(places, max_size=2),
    )
    def backward(self, seed: int, size: float, uses: list[str], skipped: set[int]) -> None:
        """Of a loss of the weights, each with several uses."""
        world = self.world
        pairs = []
        for place, name in enumerate(world.model):
            for use, how in enumerate(uses):
                held = None if place in skipped else self.look(name, how)
                if held is not None:
                    given = size * random(held.output.shape, seed + use, held.output)
                    pairs.append((held, given))
        before = [held.parameter.grad for held, _ in pairs]
        before = [None if grad is None else grad.double().clone() for grad in before]
        if not pairs:
            return
        torch.autograd.backward([held.output for held, _ in pairs], [given for _, given in pairs])
        wanted: dict[int, tuple[nn.Parameter, Tensor, float, float]] = {}
        for (held, given), old in zip(pairs, before, strict=True):
            start = torch.zeros_like(held.weight) if old is None else old
            parameter, sum_of, scale, tolerance = wanted.get(id(held.parameter), (held.parameter, start, 0.0, 0.0))
            each = held.expected_gradient(given.double())
            scale = max(scale, (given.double() / held.divisor).norm().item(), start.norm().item())
            wanted[id(held.parameter)] = parameter, sum_of + each, scale, max(tolerance, held.tolerance)
        for parameter, expected, scale, tolerance in wanted.values():
            self._check_gradient(parameter, expected, scale, tolerance)

    def _check_gradient(self, parameter: nn.Parameter, expected: Tensor, scale: float, tolerance: float) -> None:
        assert parameter.grad is not None
        if scale > torch.finfo(parameter.dtype).max / 1e3:
            return
        off = (parameter.grad.double() - expected).norm().item()
        assert off <= tolerance * scale + 1e3 * torch.finfo(parameter.dtype).tiny, f"gradient off by {off} of {scale}"

    @precondition(lambda self: self.world.held)
    @rule(place=places, seed=seeds, is_kept=st.booleans())
    def backward_of_an_old_graph(self, place: int, seed: int, is_kept: bool) -> None:
        held = self.world.held.pop(place % len(self.world.held))
        if not held.parameter.requires_grad:
            return
        given = random(held.output.shape, seed, held.output)
        (gradient,) = torch.autograd.grad([held.output], [held.parameter], [given], retain_graph=is_kept)
        if is_kept:
            self.world.held.insert(0, held)
        self.gradients.append((gradient, gradient.clone()))
        del self.gradients[:-3]
        expected = held.expected_gradient(given.double())
        off, scale = (gradient.double() - expected).norm().item(), (given.double() / held.divisor).norm().item()
        assert off <= held.tolerance * scale + 1e3 * torch.finfo(gradient.dtype).tiny, (
            f"gradient off by {off} of {scale}"
        )

    @rule(seed=seeds)
    def second_derivative(self, seed: int) -> None:
        for name, layer in self.world.model.items():
            held = self.look(name)
            if held is None or raw(layer).dtype not in (torch.float32, torch.float64) or abs(held.divisor) > 1e6:
                continue
            if held.divisor < 1e-6:
                continue
            given = random(held.output.shape, seed, held.output)
            loss = (held.output.pow(2) * given).sum()
            (gradient,) = torch.autograd.grad(loss, [raw(layer)], create_graph=True)
            (second,) = torch.autograd.grad(gradient.square().sum(), [raw(layer)])
            assert bool(second.isfinite().all())

    @rule()
    def forward_and_gradient_penalty(self) -> None:
        for name, layer in self.world.model.items():
            if not isinstance(layer, nn.Linear) or raw(layer).dtype not in (torch.float32, torch.float64):
                continue
            held = self.look(name)
            if held is None:
                continue
            inputs = torch.linspace(-1, 1, 2 * layer.in_features, dtype=raw(layer).dtype).view(2, -1).requires_grad_()
            old = None if raw(layer).grad is None else raw(layer).grad.double().clone()

            def penalty(weight: Tensor, inputs: Tensor = inputs) -> Tensor:
                outputs = (inputs @ weight.T).tanh().sum()
                (slope,) = torch.autograd.grad(outputs, [inputs], create_graph=True)
                return slope.square().sum()

            alone = held.numbers.clone().requires_grad_()
            (given,) = torch.autograd.grad(penalty(alone), [alone])
            penalty(held.output).backward()
            wanted = held.expected_gradient(given.double())
            scale = (given.double() / held.divisor).norm().item()
            if old is not None:
                wanted, scale = wanted + old, scale + old.norm().item()
            self._check_gradient(held.parameter, wanted, scale, held.tolerance)

    @rule(is_training=st.booleans())
    def change_mode(self, is_training: bool) -> None:
        self.world.model.train(is_training)

    @rule(what=st.sampled_from(["monitor", "summary", "update_"]), how=looks)
    def ask(self, what: str, how: str) -> None:
        for each in self.world.expected.values():
            each.written = None if not is_usable(each.layer, raw(each.layer)) else each.written
        getattr(sn, what)(self.world.model)
        self.settled()
        if what == "update_":
            self.changed()
            for each in self.world.expected.values():
                each.is_divided_anew()
        self.look_at_all(how)

    @rule(seed=seeds, has_grad=st.booleans(), is_training=st.booleans())
    def use_with_other_weights(self, seed: int, has_grad: bool, is_training: bool) -> None:
        for name, layer in self.world.model.items():
            if not isinstance(layer, nn.Linear):
                continue
            other = random(raw(layer).shape, seed, raw(layer)).requires_grad_(has_grad)
            inputs = torch.ones(2, layer.in_features, dtype=raw(layer).dtype)
            before = {key: each.clone() for key, each in layer.named_buffers()}
            self.world.expected[name].is_settled()
            replaced = {"parametrizations.weight.original": other, **before}
            with contextlib.nullcontext() if has_grad else torch.no_grad():
                found = torch.func.functional_call(layer, replaced, (inputs,))
            assert bool(found.isfinite().all()) or not bool(layer.bias.isfinite().all())

    # Steps of optimizers

    @rule(
        kind=st.sampled_from(["sgd", "foreach", "momentum", "fused", "adam", "fused adam"]),
        lr=st.sampled_from([0.0, 1e-4, 1e-2, 1.0, 100.0]),
        num=st.sampled_from([1, 1, 1, 2]),
        everywhere=st.sampled_from([False, False, False, True]),
    )
    def step(self, kind: str, lr: float, num: int, everywhere: bool) -> None:
        worlds = self.worlds if everywhere else [self.world]
        if everywhere:
            parameters = [each for world in worlds for each in world.model.parameters()]
            for world in worlds:
                for each in world.expected.values():
                    each.is_settled()
            optimizer = an_optimizer(kind, parameters)
        elif kind != self.kind:
            self.new_optimizer(kind)
            optimizer = self.world.optimizer
        else:
            optimizer = self.world.optimizer
        for group in optimizer.param_groups:
            group["lr"] = lr
        for _ in range(num):
            self.take_step(optimizer, worlds)

    def take_step(self, optimizer: torch.optim.Optimizer, worlds: list[World]) -> None:
        self.changed()
        all_expected = [each for world in worlds for each in world.expected.values()]
        for each in all_expected:
            if each.written is not None:
                with torch.no_grad():
                    start = each.written.double()
                each.path += (start - each.seen).norm().nan_to_num(torch.inf).item()
                each.seen, each.written = start, None
        optimizer.step()
        for each in all_expected:
            each.note_movement()
            if raw(each.layer).grad is not None:
                each.is_stepped()

    @rule(
        kind=st.sampled_from(["sgd", "adam", "fused"]),
        lr=st.sampled_from([1e-4, 1e-2, 0.3]),
        num=st.integers(1, 4),
        seed=seeds,
    )
    def train(self, kind: str, lr: float, num: int, seed: int) -> None:
        for number in range(num):
            self.zero_grad(set_to_none=bool(number % 2))
            self.backward(seed + number, 1.0, ["grad", "grad"], set())
            self.step(kind, lr, 1, False)

    @rule(place=places, lr=st.sampled_from([0.0, 1e-2, 1.0]))
    def step_one_layer(self, place: int, lr: float) -> None:
        self.settled_before()
        layer = self.world.model[self.world.at(place)]
        optimizer = torch.optim.SGD(layer.parameters(), lr=lr)
        self.settled()
        optimizer.step()
        self.changed()
        expected = self.world.expected[self.world.at(place)]
        expected.note_movement()
        if raw(layer).grad is not None:
            expected.is_stepped()

    @rule(seed=seeds)
    def steps_within_backward(self, seed: int) -> None:
        """An optimizer for each weight, which moves it as soon as its gradient is there."""
        self.changed()
        handles, optimizers = [], {}
        for name, layer in self.world.model.items():
            weight = raw(layer)
            if weight.requires_grad and is_usable(layer, weight):
                optimizers[name] = torch.optim.SGD([weight], lr=1e-2)
        list(self.world.model.parameters())
        for name, optimizer in optimizers.items():

            def step(weight: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
                optimizer.step()
                weight.grad = None

            handles.append(raw(self.world.model[name]).register_post_accumulate_grad_hook(step))
        self.invalidate()  # a node that was made before the hooks knows nothing of them
        helds = {name: [self.look(name), self.look(name)] for name in optimizers}
        outputs = [held.output for of_one in helds.values() for held in of_one if held is not None]
        if outputs:
            torch.autograd.backward(outputs, [random(each.shape, seed, each) for each in outputs])
        for handle in handles:
            handle.remove()
        for name in optimizers:
            expected = self.world.expected[name]
            expected.note_movement()
            if helds[name][0] is not None:  # the hook has taken the gradient away, after the step
                expected.is_stepped()

    @rule(is_closure=st.booleans())
    def step_that_raises(self, is_closure: bool) -> None:
        self.settled_before()

        class Stop(Exception):
            pass

        def closure() -> float:
            raise Stop

        with contextlib.suppress(Stop):
            self.world.optimizer.step(closure)
        self.settled()

    @rule(is_channels_last=st.booleans())
    def lay_out(self, is_channels_last: bool) -> None:
        self.changed()
        layout = torch.channels_last if is_channels_last else torch.contiguous_format
        self.world.model.to(memory_format=layout)
        for each in self.world.expected.values():
            each.is_settled()
            each.is_written()
        self.world.held.clear()
        for parameter in self.world.model.parameters():
            parameter.grad = None

    @rule(is_lbfgs=st.booleans(), seed=seeds)
    def step_with_closure(self, is_lbfgs: bool, seed: int) -> None:
        self.settled_before()
        self.changed()
        weights = [weight for weight in self.world.weights if weight.requires_grad]
        usable = [is_usable(layer, raw(layer)) for layer in self.world.model.values()]
        if not weights or not all(usable) or weights[0].dtype in (torch.float16, torch.bfloat16):
            return
        is_lbfgs &= all(weight.is_contiguous() for weight in weights)  # it views gradients as vectors
        optimizer = torch.optim.LBFGS(weights, max_iter=3) if is_lbfgs else torch.optim.SGD(weights, lr=0.1)

        def closure() -> Tensor:
            optimizer.zero_grad()
            pairs = [
                (layer.weight, random(layer.weight.shape, seed, raw(layer))) for layer in self.world.model.values()
            ]
            loss = sum((value * given).sum() for value, given in pairs)
            loss.backward()
            return loss

        optimizer.step(closure)
        for world in self.worlds:
            for each in world.expected.values():
                if world is self.world and raw(each.layer).requires_grad:
                    each.note_movement()
                    each.is_written()
                    each.known = None
                each.is_used_elsewhere()
                if world is self.world and raw(each.layer).requires_grad and raw(each.layer).grad is not None:
                    each.known = Known(0.0, None, None, True)
                    each.is_stepped()
                elif world is self.world and each.demand == "same":
                    each.is_divided_anew()

    def new_optimizer(self, kind: str | None = None) -> None:
        if kind is not None:
            self.kind = kind
        self.world.optimizer = an_optimizer(self.kind, list(self.world.model.parameters()))
        self.settled()

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none: bool) -> None:
        self.world.model.zero_grad(set_to_none)
        self.settled()

    @rule(num=st.integers(20, 30))
    def converge(self, num: int) -> None:
        """Steps that move nothing lead to the norm."""
        self.changed()
        weights = self.world.weights
        if not all(weight.requires_grad for weight in weights):
            return
        optimizer = torch.optim.SGD(weights, lr=0.0)
        self.look_at_all("grad")
        self.settled()
        grads = [weight.grad for weight in weights]
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        for _ in range(num):
            self.take_step(optimizer, [self.world])
            self.look_at_all("grad")
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad
        for name, layer in self.world.model.items():
            if is_usable(layer, raw(layer)) and name != "strict image":
                sigma, true = float(normalization(layer).sigma(raw(layer))), norm_by_svd(layer, raw(layer))
                assert sigma >= true * 0.98, f"after {num} iterations {sigma} of {true}"

    @rule(seed=seeds, size=st.sampled_from([1e-3, 1e-1, 10.0]), through_data=st.booleans())
    def step_of_ones_own(self, seed: int, size: float, through_data: bool) -> None:
        self.changed()
        self.settled_before()
        with torch.no_grad(), sn.optimizer_step(self.world.model):
            for weight in self.world.weights:
                change = size * random(weight.shape, seed, weight)
                (weight.data if through_data else weight).add_(change)
        for each in self.world.expected.values():
            each.note_movement()
            each.is_stepped()

    def settled_before(self) -> None:
        list(self.world.model.parameters())
        self.settled()

    # Writes

    @rule(
        way=st.sampled_from(["in place", "copy", "new data", "vector", "value", "apply", "assign", "unseen"]),
        what=st.sampled_from(
            ["tiny", "little", "much", "scaled", "other", "zero", "nan", "inf", "one entry", "equal", "rank one"]
        ),
        place=places,
        all_of_them=st.booleans(),
        seed=seeds,
        occasion=st.sampled_from(["parameters", "state_dict", "step", "modes", "backward", "grad"]),
        is_before=st.booleans(),
    )
    def write(
        self, way: str, what: str, place: int, all_of_them: bool, seed: int, occasion: str, is_before: bool
    ) -> None:
        self.changed()
        names = list(self.world.model) if all_of_them else [self.world.at(place)]
        if way == "unseen":
            if is_before:
                self.make_occasion(occasion)
            if what in ("one entry", "tiny"):
                what = "other"
            for name in names:
                expected = self.world.expected[name]
                if expected.written is None:
                    new = self.numbers(name, what, seed)
                    raw(expected.layer).data.copy_(new)
                    if not self._is_like(expected, new):
                        expected.is_written_unseen()
            if not is_before:
                self.make_occasion(occasion)
            return
        for name in names:
            self.write_one(name, way, self.numbers(name, what, seed))

    def _is_like(self, expected: Expected, new: Tensor) -> bool:
        """Whether only rounding differs."""
        return torch.allclose(new.double(), expected.seen, rtol=1e-3, atol=0, equal_nan=True)

    def numbers(self, name: str, what: str, seed: int) -> Tensor:
        weight = raw(self.world.model[name]).detach()
        noise = random(weight.shape, seed, weight)
        norm = weight.double().norm().nan_to_num(1.0, 1.0, 1.0).clamp(1e-6, 1e6).item()
        if what in ("zero", "nan", "inf"):
            return torch.full_like(weight, {"zero": 0.0, "nan": torch.nan, "inf": torch.inf}[what])
        if what == "other":
            return noise
        if what == "equal":
            return weight.clone()
        if what == "scaled":
            return weight * [1e-3, -1.0, 2.0, 1e3][seed % 4]
        if what == "one entry":
            new = weight.clone()
            new[tuple(torch.unravel_index(torch.tensor(seed % new.numel()), new.shape))] = norm
            return new
        if what == "rank one":
            flat = noise.double().flatten(1)
            change = torch.outer(flat[:, 0], flat[0]).view(weight.shape)
            return (weight.double() + 0.05 * norm * change / change.norm()).to(weight)
        size = {"tiny": [1e-4, 1e-6, 1e-8][seed % 3], "little": 0.01, "much": 2.0}[what]
        return (weight.double() + size * norm * noise.double() / noise.double().norm()).to(weight)

    def make_occasion(self, occasion: str) -> None:
        model = self.world.model
        if occasion == "parameters":
            list(model.parameters())
            self.settled()
        elif occasion == "state_dict":
            model.state_dict()
            self.settled()
        elif occasion == "step":
            other = nn.Parameter(torch.ones(1))
            other.grad = torch.ones(1)
            torch.optim.SGD([other], lr=0.1).step()
        elif occasion == "grad":
            with torch.set_grad_enabled(False):
                self.aside.weight  # noqa: B018 - a use
            self.aside.weight  # noqa: B018 - a use
        elif occasion == "backward":
            self.aside.weight.sum().backward()
        else:
            model.train(not model.training)

    def write_one(self, name: str, way: str, new: Tensor) -> None:
        expected = self.world.expected[name]
        layer = expected.layer
        if way == "value" or way == "apply":
            self.look(name, "no_grad" if way == "value" else "grad")
            self.forget_held(layer)
        if way == "in place":
            with torch.no_grad():
                raw(layer).copy_(new)
        elif way == "copy":
            with torch.no_grad():
                raw(layer).mul_(0).add_(new)
        elif way == "new data":
            raw(layer).data = new.clone()
        elif way == "vector":
            torch.nn.utils.vector_to_parameters(new.flatten().clone(), [raw(layer)])
        elif way == "value":
            with torch.no_grad():
                layer.weight.copy_(new)
            expected.note_movement()
            expected.is_written()
            expected.written = new.clone()
            return
        elif way == "apply":

            def initialize(module: nn.Module) -> None:
                if module is layer:
                    module.weight.data.copy_(new)

            self.world.model.apply(initialize)
            list(self.world.model.parameters())
            self.settled()
            expected.note_movement()
            if not torch.equal(new.nan_to_num(), raw(layer).detach().nan_to_num()):
                raise AssertionError("an initialization has not reached the weight")
        else:
            # Torch gives the parameter other memory by `Tensor.set_`, and takes it out of older graphs with that.
            self.forget_held(layer)
            layer.weight = new
        expected.note_movement()
        expected.is_written()

    def forget_held(self, layer: nn.Module) -> None:
        self.world.held = [held for held in self.world.held if held.parameter is not raw(layer)]

    @rule()
    def invalidate(self) -> None:
        sn.invalidate(self.world.model)
        self.settled()
        for each in self.world.expected.values():
            each.is_written()

    # Averages and copies

    @rule(seed=seeds, how=looks)
    def use_averages(self, seed: int, how: str) -> None:
        """Swapped in through ``.data`` to be used, and out again."""
        self.changed()
        model, world = self.world.model, self.world
        parameters = list(model.parameters())
        self.settled()
        backup = [parameter.data.clone() for parameter in parameters]
        was_training = model.training
        model.eval()
        for name in model:
            weight = raw(model[name])
            weight.data.copy_(weight.data + 0.3 * random(weight.shape, seed, weight))
            world.expected[name].is_written_unseen()
        self.look_at_all(how)
        for parameter, numbers in zip(list(model.parameters()), backup, strict=True):
            parameter.data.copy_(numbers)
        for name in model:
            world.expected[name].is_written_unseen()
        model.train(was_training)

    @precondition(lambda self: len(self.worlds) > 1)
    @rule(share=st.sampled_from([0.005, 0.5, 1.0]), way=st.sampled_from(["data", "lerp_", "state"]))
    def average(self, share: float, way: str) -> None:
        """Let another model's weights move towards this one's."""
        other = next(world for world in self.worlds if world is not self.world)
        if any(mine.dtype != its.dtype for mine, its in zip(self.world.weights, other.weights, strict=True)):
            return
        slows, fasts = list(other.model.parameters()), list(self.world.model.parameters())
        if [slow.shape for slow in slows] != [fast.shape for fast in fasts]:
            return
        self.settled()
        for each in other.expected.values():
            each.is_settled()
        before = [raw(each.layer).detach().clone() for each in other.expected.values()]
        if way == "state":
            share = 1.0
            other.model.load_state_dict(self.world.model.state_dict())
        for slow, fast in zip(slows, fasts, strict=True):
            if way == "data":
                slow.data.mul_(1 - share).add_(fast.data, alpha=share)
            elif way == "lerp_":
                with torch.no_grad():
                    slow.lerp_(fast, share)
        for old, each in zip(before, other.expected.values(), strict=True):
            new = raw(each.layer).detach()
            if way != "data":
                each.is_written()
            elif not torch.allclose(new.double(), old.double(), rtol=1e-3, atol=0, equal_nan=True):
                each.is_written_unseen()
            elif not torch.equal(new, old) and each.demand == "same":
                # Of so little nothing is found, or all.
                list(other.model.parameters())
                sn.invalidate(other.model)
                each.is_written()
            each.note_movement()

    @precondition(lambda self: len(self.worlds) < 3)
    @rule(goes_on=st.booleans(), has_grad=st.booleans())
    def deepcopy(self, goes_on: bool, has_grad: bool) -> None:
        with torch.set_grad_enabled(has_grad):
            model = copy.deepcopy(self.world.model)
        self.settled()
        world = World(model, an_optimizer(self.kind, list(model.parameters())))
        for name, each in self.world.expected.items():
            its = world.expected[name]
            its.known = copy.copy(each.known)
            its.demand, its.is_maybe_renewed, its.path = each.demand, each.is_maybe_renewed, each.path
            if its.demand == "followed" and not its.is_maybe_renewed:
                its.demand = "exactly"
        self.worlds.append(world)
        if goes_on:
            self.loaded, self.world = None, world

    @precondition(lambda self: len(self.worlds) > 1)
    @rule(place=places)
    def go_on_with_another(self, place: int) -> None:
        self.loaded = None
        self.world = self.worlds[place % len(self.worlds)]

    @precondition(lambda self: len(self.worlds) > 1)
    @rule()
    def drop_the_others(self) -> None:
        self.worlds = [self.world]

    @rule()
    def pickle(self) -> None:
        model = pickle.loads(pickle.dumps(self.world.model))
        self.settled()
        self.loaded = None
        place = next(place for place, world in enumerate(self.worlds) if world is self.world)
        self.world = self.worlds[place] = World(model, an_optimizer(self.kind, list(model.parameters())))

    @rule()
    def take_snapshot(self) -> None:
        state = {name: each.clone() for name, each in self.world.model.state_dict().items()}
        self.settled()
        self.snapshots.append((state, {}))

    @precondition(lambda self: self.snapshots)
    @rule(place=places, assign=st.booleans())
    def load(self, place: int, assign: bool) -> None:
        place %= len(self.snapshots)
        state, _ = self.snapshots[place]
        model = self.world.model
        if any(state[f"{name}.parametrizations.weight.original"].dtype != raw(model[name]).dtype for name in model):
            return
        if any(
            model[name].parametrizations.weight.original.shape
            != state[f"{name}.parametrizations.weight.original"].shape
            for name in model
        ):
            return
        model.load_state_dict({name: each.clone() for name, each in state.items()}, assign=assign)
        for each in self.world.expected.values():
            each.written = None
            each.note_movement()
            each.is_written()
        self.loaded = place, set()
        if assign:
            self.world.held.clear()
            self.new_optimizer()

    # Changes of the model

    @rule(
        place=places,
        changes=st.fixed_dictionaries(
            {},
            optional={
                "coefficient": st.sampled_from([0.5, 1.0, 3.0]),
                "mode": st.sampled_from(["normalize", "cap"]),
                "n_power_iterations": st.integers(1, 3),
                "eps": st.sampled_from([1e-12, 1e-8]),
            },
        ),
        by_model=st.booleans(),
    )
    def set_options(self, place: int, changes: dict[str, object], by_model: bool) -> None:
        self.changed()
        names = [self.world.at(place)]
        if by_model:
            names = list(self.world.model)
        for name in names:
            eps = normalization(self.world.model[name]).eps
            of_this = {key: each for key, each in changes.items() if key != "mode" or name != "learned"}
            if by_model:
                sn.add_spectral_norm(nn.ModuleDict({"x": self.world.model[name]}), **of_this)
            else:
                normalization(self.world.model[name]).set_options(**of_this)
            self.world.expected[name].is_settled()
            self.world.expected[name].is_divided_anew()
            if normalization(self.world.model[name]).eps != eps:
                self.world.expected[name].is_written()

    @rule(rule=st.sampled_from(["manual", "forward"]), is_used=st.booleans())
    def other_rule_and_back(self, rule: str, is_used: bool) -> None:
        self.changed()
        for name, layer in self.world.model.items():
            if name == "operator":
                continue
            normalization(layer).set_options(update=rule)
            self.world.expected[name].is_settled()
            if is_used:
                if raw(layer).requires_grad and is_usable(layer, raw(layer)):
                    layer.weight.sum().backward()
                    torch.optim.SGD([raw(layer)], lr=1e-3).step()
                layer.weight  # noqa: B018 - a use
                self.world.expected[name].note_movement()
            normalization(layer).set_options(update="step")
            self.world.expected[name].is_written()

    @rule(
        dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float64, torch.float32, torch.float32]),
        into_new_parameters=st.booleans(),
    )
    def cast(self, dtype: torch.dtype, into_new_parameters: bool) -> None:
        self.changed()
        before = self.world.weights[0].dtype
        torch.__future__.set_overwrite_module_params_on_conversion(into_new_parameters)
        try:
            self.world.model.to(dtype)
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)
        for each in self.world.expected.values():
            if each.written is not None and before != dtype:
                each.written = each.written.to(dtype)
            each.is_settled()
            each.note_movement()
            each.is_written()
        self.world.held.clear()
        for parameter in self.world.model.parameters():
            parameter.grad = None
        self.new_optimizer()

    @rule(place=places, requires_grad=st.booleans())
    def freeze(self, place: int, requires_grad: bool) -> None:
        raw(self.world.model[self.world.at(place)]).requires_grad_(requires_grad)

    @rule(place=places, is_equal=st.booleans(), seed=seeds)
    def replace_parameter(self, place: int, is_equal: bool, seed: int) -> None:
        self.changed()
        name = self.world.at(place)
        layer, expected = self.world.model[name], self.world.expected[name]
        old = raw(layer).detach()
        new = old.clone() if is_equal else random(old.shape, seed, old)
        self.forget_held(layer)
        layer.parametrizations.weight.original = nn.Parameter(new)
        expected.written = None
        expected.note_movement()
        expected.is_written()
        self.new_optimizer()

    @rule(place=places)
    def remove_and_add(self, place: int) -> None:
        self.changed()
        name = self.world.at(place)
        layer = self.world.model[name]
        self.look(name, "no_grad")
        parameter, value = raw(layer), layer.weight.detach().clone()
        self.forget_held(layer)
        part = normalization(layer)
        options = {"coefficient": part.coefficient, "mode": part.mode, "strict": part.strict, "norm": part.norm}
        options |= {} if part.input_size is None else {"input_size": part.input_size}
        if part.coefficient <= 0 or part.coefficient != part.coefficient:
            return
        is_training = part.training
        sn.remove_spectral_norm(layer)
        assert layer.weight is parameter
        assert torch.equal(layer.weight.detach().nan_to_num(), value.nan_to_num())
        sn.add_spectral_norm(nn.ModuleDict({"x": layer}), **options)
        assert raw(layer) is parameter
        assert normalization(layer).training == layer.training or is_training
        expected = self.world.expected[name]
        expected.note_movement()
        expected.is_written()
        expected.known = None
        expected.is_used_elsewhere()  # construction finds the norm
        if part.scale is not None:
            self.new_optimizer()


@pytest.mark.filterwarnings("ignore:An optimizer has moved the weight")
@pytest.mark.usefixtures("engine_or_kernels")
def test_layers_keep_their_promises_in_any_order():
    options = settings(max_examples=35, stateful_step_count=25, deadline=None, derandomize=True, database=None)
    run_state_machine_as_test(AnyOrder, settings=options)


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore:An optimizer has moved the weight")
@pytest.mark.usefixtures("engine_or_kernels")
def test_layers_keep_their_promises_in_many_orders():
    options = settings(max_examples=1000, stateful_step_count=50, deadline=None, database=None)
    run_state_machine_as_test(AnyOrder, settings=options)
