"""What it costs that weights are written: by an optimizer's step, by hand, as averages, anew.

    python benchmarks/written_weights.py            # printed
    python benchmarks/written_weights.py --out      # and written as a page of benchmarks/results
    python benchmarks/written_weights.py --quick    # few rounds

Timed is one use of every weight after all of them have been written; the write is not. The ways take turns, in an order
that is drawn anew for each round. What is reported is the median, and its ratio to torch's parametrization, which
makes one step of power iteration at every use in training, whatever has happened.
"""

import argparse

import torch
from hardware import hardware, write_result
from normalization_contenders import layer_of, ours, parametrization, weight_sets
from timing import in_turns
from torch import nn

import spectralnorm as sn

SETS = {
    "30 of 64x64": weight_sets()["30 of 64x64"],
    "two critics, 256 wide": [(256, 23), (256, 256), (1, 256)] * 2,
    "SN-CNN 32 px": weight_sets()["SN-CNN 32 px"],
}
STARTS = {
    "as initialized": lambda weight: None,
    "with a leading direction": lambda weight: weight.add_(2 / weight[0].numel() ** 0.5 / len(weight) ** 0.5),
}
"""The second is as in trained networks: a singular value of 2 above those of the first."""

LITTLE = 1e-3  # the length of a small change, of the weight's norm


class Weights:
    """A set of weights, one way to write them, and what they are then."""

    def __init__(self, shapes, start, normalize, write, device):
        torch.manual_seed(0)
        self.layers = nn.ModuleList(layer_of(shape, device) for shape in shapes)
        with torch.no_grad():
            for layer in self.layers:
                start(layer.weight)
        normalize(self.layers)
        self.raw = list(self.layers.parameters())
        self.lengths = [torch.linalg.matrix_norm(raw.detach().flatten(1), 2).item() for raw in self.raw]
        self.generator = torch.Generator(device).manual_seed(0)
        self._write = write
        for _ in range(40):  # the values of new layers are looked at in another way
            self.use()

    def write(self):
        self._write(self)

    def use(self):
        for layer in self.layers:
            layer.weight  # noqa: B018 - what is timed

    def changes(self):
        for raw, length in zip(self.raw, self.lengths, strict=True):
            change = torch.randn(raw.shape, generator=self.generator, device=raw.device)
            yield raw, change.mul_(LITTLE * length / change.norm())


def by_step(weights):
    with torch.no_grad(), sn.optimizer_step(weights.layers):
        for raw, change in weights.changes():
            raw.add_(change)


def by_hand(weights):
    with torch.no_grad():
        for raw, change in weights.changes():
            raw.add_(change)


def through_data(weights):
    list(weights.layers.parameters())  # who writes has asked for them
    for raw, change in weights.changes():
        raw.data.add_(change)


def anew(weights):
    with torch.no_grad():
        for raw in weights.raw:
            raw.normal_(std=0.05, generator=weights.generator)


def nothing(weights):
    list(weights.layers.parameters())


WAYS = {
    "torch": (parametrization, by_hand),
    "an optimizer's step": (ours, by_step),
    "a little, by hand": (ours, by_hand),
    "a little, through .data": (ours, through_data),
    "anew": (ours, anew),
    "nothing, but looked at": (ours, nothing),
}


def of_set(shapes, start, repeats, device):
    contenders = {name: Weights(shapes, start, *way, device) for name, way in WAYS.items()}
    return in_turns(
        {name: each.use for name, each in contenders.items()},
        repeats,
        device,
        before={name: each.write for name, each in contenders.items()},
    )


def main():
    parser = argparse.ArgumentParser(description="What it costs that weights are written")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="5 repeats")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", action="store_true", help="write a page of benchmarks/results")
    arguments = parser.parse_args()
    repeats, device = 5 if arguments.quick else arguments.repeats, torch.device(arguments.device)
    lines = [f"| weights | {' | '.join(WAYS)} |", "|---|" + "---|" * len(WAYS)]
    for name, shapes in SETS.items():
        for start, make in STARTS.items():
            found = of_set(shapes, make, repeats, device)
            torchs = found["torch"].median
            cells = [f"{each.median:.2f} ({each.median / torchs:.1f})" for each in found.values()]
            lines.append(f"| {name}, {start} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    page = [
        "# What it costs that weights are written",
        "",
        hardware(),
        "",
        f"`python benchmarks/written_weights.py --repeats {repeats} --device {device} --out`. One use of every weight",
        "after all of them were written, in ms, and in brackets as a multiple of torch's. A little is a random change",
        "whose Frobenius norm is a thousandth of the weight's spectral norm.",
        "",
        *lines,
        "",
    ]
    print("\n" + "\n".join(page))
    if arguments.out:
        print(write_result("written_weights", "\n".join(page), device=device.type))


if __name__ == "__main__":
    main()
