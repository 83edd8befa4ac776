"""A training on two processes is the one on a single process: same images, same latents, same networks."""

import copy
import dataclasses
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from spectralnorm.errors import UserError
from spectralnorm.gan import parts
from spectralnorm.gan.config import Config
from spectralnorm.gan.data import Batch, Batches
from spectralnorm.gan.distributed import Processes
from spectralnorm.gan.in_training import InTraining
from spectralnorm.gan.models import ARCHITECTURES
from spectralnorm.gan.normalizations import normalize
from spectralnorm.gan.observers import Averaging, Checkpoints
from spectralnorm.gan.precision import Precision
from spectralnorm.gan.trainer import Trainer
from spectralnorm.transform import add_spectral_norm

CPU = torch.device("cpu")
CONFIG = Config(
    steps=4,
    batch_size=8,
    latent_dim=6,
    generator_width=2,
    discriminator_width=2,
    num_discriminator_steps=2,
    device="cpu",
)
# Wide enough that FSDP2 gathers some layers by themselves.
WIDE = {"discriminator_width": 16, "generator_width": 16, "batch_size": 4}


class Doubled:
    """Batches in float64, so that what differs between runs is not hidden by rounding."""

    def __init__(self, batches):
        self._batches = batches
        self.state_dict = batches.state_dict
        self.load_state_dict = batches.load_state_dict

    def __next__(self):
        images, labels = next(self._batches)
        return Batch(images.double(), labels)


def images():
    return torch.randint(256, (20, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def make(config, processes):
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        architecture = ARCHITECTURES[config.architecture]
        sizes = {"image_size": 32, "channels": 1}
        generator = architecture.generator(**sizes, width=config.generator_width, latent_dim=config.latent_dim)
        discriminator = architecture.discriminator(**sizes, width=config.discriminator_width)
        if config.normalization == "batch":
            discriminator = nn.Sequential(nn.BatchNorm2d(1), discriminator)
        else:
            normalize(discriminator, config.normalization)
    finally:
        torch.set_default_dtype(torch.float32)
    # Torch's float64 convolutions on a CPU want their weights in the usual order.
    with patch("spectralnorm.gan.trainer._prepare", lambda network, device, **order: network.train()):
        trainer = Trainer(
            config,
            generator=generator,
            discriminator=discriminator,
            images=images(),
            device=CPU,
            processes=processes,
        )
    trainer.batches = Doubled(trainer.batches)
    draw = trainer.latents
    trainer.latents = lambda *args, **options: draw(*args, **options).double()
    return trainer


def together():
    return Processes(dist.get_rank(), dist.get_world_size())


def advance(config, processes, *, until, state=None):
    trainer = make(config, processes)
    if state is not None:
        trainer.load_state(*state)

    def stop(trainer):
        trainer.stop_reason = "enough" if trainer.step == until else None

    trainer.run([Averaging(), stop])
    assert trainer.step == until
    return copy.deepcopy(trainer.state())


def assert_same(found, expected, *, tracked=True, rtol=1e-6, atol=1e-8):
    """Of the states of two trainings; ``tracked``: also what is tracked of each norm."""
    states = []
    for tensors, _ in (found, expected):
        # Singular vectors are pairs up to a sign, and global random numbers are for noise, which none of these has.
        left_out = ("._u", "._v", ".u", ".v", ".frame")
        names = {name for name in tensors if not name.endswith(left_out) and not name.startswith("random.torch")}
        states.append({name: tensors[name] for name in names if tracked or not name.startswith("tracking.")})
    torch.testing.assert_close(*states, rtol=rtol, atol=atol)
    for name in ("images_seen", "batches"):
        assert found[1][name] == expected[1][name]


def check(**settings):
    config = dataclasses.replace(CONFIG, **settings)
    found = advance(config, together(), until=4)
    expected = advance(dataclasses.replace(config, strategy="ddp"), Processes(), until=4)
    assert_same(found, expected, tracked=config.strategy == "ddp")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"penalty": "r1", "augmentation": "shift,flip,cutout"},
        {"accumulate": 2, "penalty": "gradient-penalty", "augmentation": "flip"},
        {"augmentation": "ada:p=0.5"},
        {"generator_batch_size": 16, "loss": "nonsaturating", "normalization": "batch", "penalty": "r1"},
        {"loss": "relativistic", "accumulate": 2, "orthonormal_weight": 0.1},
        {"strategy": "fsdp", **WIDE},
        {"strategy": "fsdp", **WIDE, "penalty": "r1-r2", "penalty_interval": 2, "augmentation": "shift,flip"},
        {"strategy": "fsdp", **WIDE, "penalty": "gradient-penalty", "accumulate": 2, "batch_size": 8},
        {"strategy": "fsdp", **WIDE, "penalty": "r1", "architecture": "sagan"},
    ],
    ids=[
        *("dcgan", "r1", "accumulated", "ada", "batch-norm", "relativistic"),
        *("fsdp", "fsdp-r1-r2", "fsdp-accumulated", "fsdp-sagan"),
    ],
)
def test_two_processes_train_what_one_does(pair, settings):
    pair.run(check, **settings)


def check_parts(architecture):
    config = dataclasses.replace(CONFIG, architecture=architecture, strategy="fsdp", num_discriminator_steps=1)
    trainer = make(config, together())
    trainer._take_step()
    assert all(isinstance(each, DTensor) for each in (*trainer.generator.parameters(), *trainer._trained))


@pytest.mark.parametrize("architecture", [name for name, each in ARCHITECTURES.items() if not each.makes_points])
def test_every_architecture_is_held_in_parts(pair, architecture):
    pair.run(check_parts, architecture=architecture)


def test_a_parameter_that_has_no_parts_is_refused():
    network = nn.Sequential(nn.Linear(4, 1))
    network.register_parameter("temperature", nn.Parameter(torch.ones(())))
    with pytest.raises(UserError, match=r"'temperature' is a single number.*shape \(1,\)"):
        InTraining(network, precision=Precision("fp32", CPU), processes=Processes(0, 2), strategy="fsdp")


@pytest.mark.parametrize("options", [{"strict": True}, {"norm": "operator"}, {"mode": "learnable"}])
def test_a_normalization_that_has_no_parts_is_refused(options):
    network = add_spectral_norm(nn.Sequential(nn.Conv2d(3, 4, 3)), **options)
    with pytest.raises(UserError, match="no normalization by strict, norm=operator or mode=learnable; leave it out"):
        InTraining(network, precision=Precision("fp32", CPU), processes=Processes(0, 2), strategy="fsdp")


def check_resume(strategy):
    config = dataclasses.replace(CONFIG, augmentation="shift", strategy=strategy)
    whole = advance(config, Processes(), until=4)
    first = advance(config, Processes(), until=1)
    second = advance(config, together(), until=3, state=first)
    found = advance(config, Processes(), until=4, state=second)
    if strategy == "ddp":
        assert_same(found, whole)
    else:  # nothing is tracked of weights that are held in parts: the norms are found anew, to 1e-4
        assert_same(found, whole, tracked=False, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_goes_on_with_other_processes(pair, strategy):
    pair.run(check_resume, strategy=strategy)


def check_noise(strategy):
    whole = make(CONFIG, Processes())
    alone = torch.rand(5)
    trainer = make(dataclasses.replace(CONFIG, strategy=strategy), together())
    drawn = [torch.zeros(5), torch.zeros(5)]
    dist.all_gather(drawn, torch.rand(5))
    assert torch.equal(drawn[0], alone)
    assert not torch.equal(drawn[1], alone)
    expected, found = (each.state()[0] for each in (whole, trainer))
    for name in [name for name in expected if name.startswith(("generator.", "discriminator."))]:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_processes_begin_with_equal_weights_and_noise_of_their_own(pair, strategy):
    pair.run(check_noise, strategy=strategy)


def check_shares(accumulate):
    config = dataclasses.replace(CONFIG, accumulate=accumulate)
    sharing, whole = make(config, together()), make(config, together())
    source = Batches(images(), torch.arange(20), batch_size=8, seed=config.seed, device=CPU)
    whole.batches = source
    for _ in range(3):
        expected, (found, labels) = sharing._next_real().images, whole._next_real()
        assert len(found) == len(labels) == 4
        assert torch.equal(found.double(), expected)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_source_that_gives_whole_batches_is_shared_alike(pair, accumulate):
    pair.run(check_shares, accumulate=accumulate)


def check_stop():
    trainer = make(dataclasses.replace(CONFIG, steps=50), together())

    def ask(trainer):
        if trainer.step == 2 and trainer.processes.rank == 1:
            trainer.request_stop("interrupted")

    trainer.run([ask])
    assert (trainer.step, trainer.stop_reason) == (2, "interrupted")


def test_what_one_process_is_asked_to_stop_for_stops_all_after_the_same_step(pair):
    pair.run(check_stop)


def check_clock():
    trainer = make(dataclasses.replace(CONFIG, steps=None, minutes=1.0), together())
    # Of clocks that differ by minutes, the first process's counts.
    trainer.clock.seconds = 59.9 if dist.get_rank() == 0 else 0.0

    def pass_time(trainer):
        trainer.clock._elapsed += 1.0

    trainer.run([pass_time])
    assert trainer.stop_reason == "minutes"
    steps = [torch.zeros((), dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(steps, torch.tensor(trainer.step))
    assert torch.equal(*steps)


def test_a_budget_of_minutes_is_spent_by_the_clock_of_the_first_process(pair):
    pair.run(check_clock)


def check_patience(measured):
    trainer = make(dataclasses.replace(CONFIG, strategy="fsdp", steps=1, **WIDE), together())
    gathered = []

    def measure(trainer):
        if trainer.processes.is_first:
            time.sleep(0.5)
            Path(measured).touch()

    def gather(tensor):
        gathered.append(Path(measured).exists())
        return parts.whole(tensor)

    with patch("spectralnorm.gan.observers.whole", gather), patch.object(Checkpoints, "_write"):
        trainer.run([measure, Checkpoints(Path(measured).parent, minutes=0)])
    assert gathered
    assert all(gathered)


def test_a_checkpoint_is_gathered_once_the_first_process_has_measured(pair, tmp_path):
    pair.run(check_patience, measured=str(tmp_path / "measured"))


def check_errors():
    processes = together()

    def refuse():
        raise UserError("the folder is taken.")

    with pytest.raises(UserError, match="the folder is taken"):
        processes.first_does(refuse)
    with pytest.raises(UserError, match="the folder is taken"):
        processes.first_before_others(refuse, lambda told: None, tell=lambda result: None)
    assert processes.first_does(lambda: dist.get_rank() + 5) == 5
    assert processes.first_before_others(lambda: "read", lambda told: told + " again", tell=str.upper) == (
        "READ again" if dist.get_rank() else "read"
    )
    assert processes.mean({"a": float(dist.get_rank()), "b": 2.0}) == {"a": 0.5, "b": 2.0}


def test_an_error_of_the_first_process_is_raised_on_all(pair):
    pair.run(check_errors)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 10}, "batch_size must be a multiple of 4"),
        ({"generator_batch_size": 4}, "generator_batch_size must be a multiple of 4"),
        ({"strategy": "fsdp", "orthonormal_weight": 0.1}, "orthonormal_weight needs them outside of it; leave"),
        ({"strategy": "fsdp", "compile": True}, "held in parts is not compiled"),
        ({"strategy": "fsdp", "precision": "fp16-mixed"}, "no scaling of float16"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    config = dataclasses.replace(CONFIG, accumulate=2, **settings)
    with pytest.raises(UserError, match=message):
        make(config, Processes(0, 2))
