"""No network that is drawn at random stretches a difference of inputs by more than its certificate allows."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import spectralnorm as sn

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soundness_networks.py"


def _script() -> ModuleType:
    specification = importlib.util.spec_from_file_location("soundness_networks", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _check(seeds: range, *, steps: int) -> None:
    script = _script()
    for seed in seeds:
        model, shape, num_classes = script.random_network(seed)
        upper = sn.certify(model, shape, num_classes=num_classes, ascent_steps=0).upper_bound
        stretch = script.largest_stretch(model, shape, num_classes, steps=steps)
        # 1e-9: what rounding of a float64 evaluation may add to a quotient.
        assert stretch <= upper * (1 + 1e-9) + 1e-12, seed


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_random_networks_stay_below_their_certificates():
    _check(range(10_000, 10_030), steps=12)


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_many_random_networks_stay_below_their_certificates():
    _check(range(1000), steps=30)
