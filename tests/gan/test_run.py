import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from spectralnorm.cli import main
from spectralnorm.errors import UserError
from spectralnorm.gan import load, make_config, train
from spectralnorm.gan.checkpoint import latest_checkpoint
from spectralnorm.gan.config import Config
from spectralnorm.gan.data import ImageSet, ImageStream
from spectralnorm.gan.models import ARCHITECTURES
from spectralnorm.gan.precision import Precision
from spectralnorm.gan.run import Display
from spectralnorm.gan.trainer import Trainer
from spectralnorm.metrics import CriticOptions, wasserstein_lower_bound
from spectralnorm.records import Ending, Evaluation, Metric, Picture, Scalars, Session, Spectra, read_records

TINY = {"batch_size": 4, "generator_width": 2, "discriminator_width": 2, "latent_dim": 8, "log_every": 2}


def _config(steps: int = 6, **settings) -> Config:
    settings = {"data": None, "device": "cpu", "num_sample_grids": 2, **TINY, **settings}
    return make_config("fashion", steps=steps, **settings)


def _images(num: int = 40) -> torch.Tensor:
    return torch.randint(256, (num, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _train(folder: Path, config: Config | None = None, **settings):
    return train(_config() if config is None else config, out=folder, data=_images(), **settings)


def _generator(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "generator.safetensors")


def test_a_run_leaves_a_complete_folder(tmp_path: Path):
    run = _train(tmp_path / "run")
    assert (run.step, run.reason) == (6, "steps")
    names = {path.name for path in run.folder.iterdir()} - {".lock"}
    assert names == {
        "config.json",
        "data.json",
        "metrics.jsonl",
        "checkpoints",
        "samples",
        "generator.safetensors",
        "tensorboard",
    }
    records = list(read_records(run.folder / "metrics.jsonl"))
    assert [type(record) for record in records if isinstance(record, Session | Ending)] == [Session, Ending]
    assert {record.role for record in records if isinstance(record, Picture)} == {
        "samples",
        "final",
        "real",
        "neighbours",
        "interpolation",
    }
    for record in records:
        if isinstance(record, Picture):
            assert (run.folder / record.file).stat().st_size > 0


def test_every_scalar_is_recorded_and_finite(tmp_path: Path):
    run = _train(tmp_path)
    scalars = [record for record in read_records(run.folder / "metrics.jsonl") if isinstance(record, Scalars)]
    assert [record.step for record in scalars] == [2, 4, 6]
    expected = {
        "loss/discriminator",
        "loss/generator",
        "logits/real",
        "logits/fake",
        "gradient_norm/discriminator",
        "gradient_norm/generator",
        "images_per_second",
    }
    for record in scalars:
        sigmas = {name for name in record.values if name.startswith("sigma/")}
        assert len(sigmas) == 4
        assert expected <= record.values.keys()
        assert all(abs(value) < float("inf") for value in record.values.values())


def test_the_spectra_are_those_of_the_weights_in_use(tmp_path: Path):
    run = _train(tmp_path)
    (spectra,) = [record for record in read_records(run.folder / "metrics.jsonl") if isinstance(record, Spectra)]
    assert len(spectra.layers) == 4
    for values in spectra.layers.values():
        assert list(values) == sorted(values, reverse=True)
        assert values[0] == pytest.approx(1.0, abs=0.2)


def test_a_run_without_normalization_is_watched_by_the_same_numbers(tmp_path: Path):
    discriminator = ARCHITECTURES["dcgan"].discriminator(image_size=32, channels=1, width=2)
    run = _train(tmp_path, _config(normalization="none"), discriminator=discriminator)
    records = list(read_records(run.folder / "metrics.jsonl"))
    (spectra,) = [record for record in records if isinstance(record, Spectra)]
    logged = [record.values for record in records if isinstance(record, Scalars)][-1]
    layers = {name: layer for name, layer in discriminator.named_modules() if isinstance(layer, nn.Conv2d)}
    assert spectra.layers.keys() == layers.keys()
    for name, layer in layers.items():
        expected = torch.linalg.svdvals(layer.weight.detach().double().flatten(1))
        assert spectra.layers[name] == pytest.approx(expected.tolist(), rel=1e-6)
        assert logged[f"sigma/{name}"] == pytest.approx(float(expected[0]), rel=1e-3)


def test_the_same_command_again_says_it_is_finished(tmp_path: Path):
    _train(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert _train(tmp_path).reason == "already finished"
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_larger_budget_goes_on_exactly_where_the_run_ended(tmp_path: Path):
    config = _config(lr_decay_from=1.0)
    _train(tmp_path / "parts", config)
    run = _train(tmp_path / "parts", dataclasses.replace(config, steps=12))
    assert run.step == 12
    _train(tmp_path / "whole", dataclasses.replace(config, steps=12))
    whole = _generator(tmp_path / "whole")
    for name, tensor in _generator(tmp_path / "parts").items():
        assert torch.equal(tensor, whole[name]), name


def test_each_step_size_follows_from_the_step_alone_in_every_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    taken = []
    take = Precision.step

    def step(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        taken.append(optimizer.param_groups[0]["lr"])
        take(optimizer, scaler)

    def stop_at_three(trainer: Trainer) -> None:
        trainer.stop_reason = "interrupted" if trainer.step == 3 else trainer.stop_reason

    monkeypatch.setattr(Precision, "step", staticmethod(step))
    config = _config(lr_decay_from=0.0, generator_lr=6e-4, discriminator_lr=6e-4)
    _train(tmp_path, config, observers=[stop_at_three])
    _train(tmp_path, config)
    assert taken[::2] == taken[1::2] == pytest.approx([6e-4, 5e-4, 4e-4, 3e-4, 2e-4, 1e-4])
    # More steps are another schedule.
    taken.clear()
    _train(tmp_path, dataclasses.replace(config, steps=8))
    assert taken[::2] == taken[1::2] == pytest.approx([1.5e-4, 0.75e-4])


def test_a_changed_setting_is_refused_with_the_differing_lines(tmp_path: Path):
    _train(tmp_path)
    with pytest.raises(UserError, match=r"batch_size: 4 -> 8; seed: 0 -> 1\)"):
        _train(tmp_path, _config(batch_size=8, seed=1))


def test_settings_that_are_refused_leave_no_folder(tmp_path: Path):
    with pytest.raises(UserError, match="batch_size must be a multiple of 3"):
        _train(tmp_path / "run", _config(accumulate=3))
    assert not (tmp_path / "run").exists()


def test_a_folder_where_nothing_was_saved_is_taken_with_other_settings(tmp_path: Path):
    def fail(trainer: Trainer) -> None:
        raise UserError("no luck")

    with pytest.raises(UserError, match="no luck"):
        _train(tmp_path, observers=[fail])
    assert _train(tmp_path, _config(seed=1)).step == 6
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1
    records = list(read_records(tmp_path / "metrics.jsonl"))
    assert [type(record) for record in records].count(Session) == 1


def test_the_weights_of_a_run_without_checkpoints_are_not_written_over(tmp_path: Path):
    _train(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="other settings"):
        _train(tmp_path, _config(seed=1))


@pytest.mark.parametrize("steps", [6, 12])
def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_stays_as_it_is(tmp_path: Path, steps: int):
    _train(tmp_path)
    for file in (tmp_path / "checkpoints").iterdir():
        file.write_bytes(file.read_bytes()[:-9])  # as by a copy that ended early
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"No checkpoint in .* is whole: step-000000006\.safetensors \(.*; put a whole"):
        _train(tmp_path, _config(steps))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_changed_images_are_refused(tmp_path: Path):
    _train(tmp_path)
    with pytest.raises(UserError, match="not those"):
        train(_config(steps=9), out=tmp_path, data=_images(50))
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 6


def test_a_folder_that_is_not_a_run_is_refused_and_left_alone(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not a run folder"):
        _train(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="choose another --out"):
        _train(tmp_path / "run")


def test_a_folder_whose_claim_was_killed_or_found_no_space_is_taken(tmp_path: Path):
    (tmp_path / ".config.json.tmp").write_text('{"recipe": ')
    (tmp_path / ".lock").write_text("")
    assert _train(tmp_path).reason == "steps"
    assert not (tmp_path / ".config.json.tmp").exists()


def test_a_batch_larger_than_the_data_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"at most the number of training images \(\d+\), got 64"):
        _train(tmp_path, _config(batch_size=64))


@pytest.mark.parametrize("num_held_out", [4, 39])
def test_a_critic_with_too_few_held_out_images_is_refused_before_training(tmp_path: Path, num_held_out: int):
    with pytest.raises(UserError, match=f"critic strict needs at least 40 held-out images, and .* has {num_held_out};"):
        train(_config(critic="strict"), out=tmp_path / "run", data=_images(10 * num_held_out))
    assert not (tmp_path / "run").exists()


def test_a_critic_with_just_enough_held_out_images_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    quick = partial(wasserstein_lower_bound, options=CriticOptions(width=4, num_hidden=1, num_steps=3))
    monkeypatch.setattr("spectralnorm.metrics.measures.wasserstein_lower_bound", quick)
    config = _config(steps=100, critic="strict", num_evaluation_samples=100, num_evaluations=1, num_sample_grids=1)
    run = train(config, out=tmp_path, data=_images(400))
    (evaluation,) = [r for r in read_records(run.folder / "metrics.jsonl") if isinstance(r, Evaluation)]
    assert "W1 lower bound-SqueezeNet" in {metric.name for metric in evaluation.metrics}


def test_cuda_where_there_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA GPU here; use --device cpu"):
        _train(tmp_path, _config(device="cuda"))


def test_the_global_random_state_is_left_alone(tmp_path: Path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    _train(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_ones_own_networks_and_dataset_are_trained(tmp_path: Path):
    class Pairs(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return _images()[index], index % 3

    generator = nn.Sequential(nn.Linear(8, 32 * 32), nn.Tanh(), nn.Unflatten(1, (1, 32, 32)))
    discriminator = nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, 1), nn.Flatten(0))
    before = generator[0].weight.detach().clone()
    run = train(_config(), out=tmp_path, generator=generator, discriminator=discriminator, data=Pairs())
    assert not torch.equal(generator[0].weight, before)
    assert nn.utils.parametrize.is_parametrized(discriminator[1], "weight")
    fresh = nn.Sequential(nn.Linear(8, 32 * 32), nn.Tanh(), nn.Unflatten(1, (1, 32, 32)))
    samples = load(run.folder, generator=fresh).sample(5, seed=1)
    assert samples.shape == (5, 1, 32, 32)
    assert samples.dtype == torch.uint8
    with pytest.raises(UserError, match="generator="):
        load(run.folder)


@pytest.mark.parametrize("settings", [{}, {"generator_batch_size": 2}], ids=["shared", "own"])
def test_a_generator_whose_images_do_not_fit_the_data_is_refused(tmp_path: Path, settings: dict):
    generator = nn.Sequential(nn.Linear(8, 16 * 16), nn.Tanh(), nn.Unflatten(1, (1, 16, 16)))
    with pytest.raises(
        UserError, match=r"makes images of shape \(1, 16, 16\), and those of the data are \(1, 32, 32\)"
    ):
        _train(tmp_path, _config(**settings), generator=generator)


def test_metrics_are_measured_when_the_run_is_long_enough(tmp_path: Path):
    run = _train(tmp_path, _config(steps=100, num_evaluation_samples=100, num_evaluations=1))
    evaluations = [r for r in read_records(run.folder / "metrics.jsonl") if isinstance(r, Evaluation)]
    assert [record.final for record in evaluations] == [True]
    assert {metric.name for metric in evaluations[0].metrics} == {"FD-SqueezeNet", "KID-SqueezeNet"}
    assert all(metric.provenance.num_fake == 100 for metric in evaluations[0].metrics)


def test_an_evaluation_that_was_killed_is_made_once_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Killed(BaseException):
        pass

    def measure(*arguments: object, **options: object) -> tuple[Metric, ...]:
        calls.append(arguments)
        if len(calls) == 2:
            raise Killed
        return ()

    calls = []
    monkeypatch.setattr("spectralnorm.gan.run._MIN_STEPS_FOR_METRICS", 1)
    monkeypatch.setattr("spectralnorm.gan.observers.measure", measure)
    monkeypatch.setattr("spectralnorm.gan.final.measure", lambda *arguments, **options: ())
    config = _config(steps=8, num_evaluations=4, num_sample_grids=4)
    with pytest.raises(Killed):
        _train(tmp_path, config)
    _train(tmp_path, config)
    records = list(read_records(tmp_path / "metrics.jsonl"))
    assert [record.step for record in records if isinstance(record, Evaluation)] == [1, 3, 6, 8]
    assert [record.step for record in records if isinstance(record, Picture) and record.role == "samples"] == [
        *(0, 1, 3, 6, 8)
    ]


def test_tensorboard_shows_the_steps_that_the_records_hold(tmp_path: Path):
    _train(tmp_path)
    _train(tmp_path, _config(steps=10))
    records = [record for record in read_records(tmp_path / "metrics.jsonl") if isinstance(record, Scalars)]
    # Their names hold the second in which they were begun.
    for number, file in enumerate(sorted((tmp_path / "tensorboard").iterdir(), key=lambda file: file.stat().st_mtime)):
        file.rename(file.with_name(f"events.out.tfevents.{number}"))
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss/generator")] == [record.step for record in records]


@pytest.mark.gpu
def test_a_run_on_a_gpu_is_measured_and_goes_on_on_the_cpu_and_back(tmp_path: Path):
    for steps, device in ((100, "cuda"), (104, "cpu"), (108, "cuda")):
        run = _train(tmp_path, _config(steps, device=device, num_evaluation_samples=100))
        assert (run.step, run.reason) == (steps, "steps")
    records = list(read_records(tmp_path / "metrics.jsonl"))
    assert [record.hardware["device"] for record in records if isinstance(record, Session)] == ["cuda", "cpu", "cuda"]
    assert [record.step for record in records if isinstance(record, Evaluation) and record.final] == [100, 104, 108]


def test_divergence_ends_the_run_and_names_the_layer(tmp_path: Path):
    def poison(trainer: Trainer) -> None:
        if trainer.step == 3:
            with torch.no_grad():
                next(trainer.generator.parameters()).fill_(float("nan"))

    with pytest.raises(
        UserError, match=r"diverged at step 4: .*first non-finite weights: .*generator layers\.0\.weight"
    ):
        _train(tmp_path, observers=[poison])


def test_a_state_with_a_nan_is_never_checkpointed(tmp_path: Path):
    def poison(trainer: Trainer) -> None:
        if trainer.step == 4:
            with torch.no_grad():
                trainer.discriminator.layers[0].bias.fill_(float("nan"))

    # It is saved after each step, before any loss is looked at.
    with pytest.raises(UserError, match="diverged at step 5: a weight is not finite"):
        _train(tmp_path, _config(log_every=100, checkpoint_minutes=1e-9), observers=[poison])
    saved = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in saved] == ["step-000000003.safetensors", "step-000000004.safetensors"]
    for path in saved:
        assert all(tensor.isfinite().all() for tensor in load_file(path).values() if tensor.is_floating_point())


def test_a_full_disk_ends_the_run_with_one_sentence_and_a_good_checkpoint(tiny_disk: Path):
    config = _config(steps=10_000, checkpoint_minutes=1e-6, generator_width=4)
    with pytest.raises(UserError, match=r"is full; .*; free some space and run the same command") as told:
        _train(tiny_disk / "run", config)
    loaded = latest_checkpoint(tiny_disk / "run" / "checkpoints")
    assert loaded is not None
    assert f"the checkpoint of step {loaded.numbers['step']} is intact" in str(told.value)
    assert not list((tiny_disk / "run" / "checkpoints").glob(".*.tmp"))


def _words(folder: Path, *options: str) -> list[str]:
    tiny = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return ["train", "--out", str(folder), "--device", "cpu", *tiny, *options]


def _start(words: list[str], **settings) -> subprocess.Popen:
    """The command line in a process of its own, with as many threads as here."""
    code = f"from spectralnorm.cli import main; raise SystemExit(main({words!r}))"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, **settings)


def _wait_for_checkpoint(folder: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not list((folder / "checkpoints").glob("step-*.safetensors")):
        assert process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--steps", "90", "--num-sample-grids", "1"]
    assert main(_words(tmp_path / "whole", *options)) == 0

    killed = _words(tmp_path / "killed", *options, "--checkpoint-minutes", "0.0001")
    process = _start(killed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _wait_for_checkpoint(tmp_path / "killed", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = list(read_records(tmp_path / "killed" / "metrics.jsonl"))
    assert not any(isinstance(record, Ending) for record in before), "the run was over before it was killed"
    assert load(tmp_path / "killed").sample(2).shape == (2, 1, 32, 32)
    for path in (tmp_path / "killed" / "checkpoints").glob("step-*.safetensors"):
        assert load_file(path)

    capsys.readouterr()
    assert main(_words(tmp_path / "killed", *options)) == 0
    assert "Going on from the checkpoint of step" in capsys.readouterr().out
    whole = _generator(tmp_path / "whole")
    for name, tensor in _generator(tmp_path / "killed").items():
        assert torch.equal(tensor, whole[name]), name
    records = list(read_records(tmp_path / "killed" / "metrics.jsonl"))
    steps = [record.step for record in records if isinstance(record, Scalars)]
    assert steps == sorted(set(steps))
    assert steps[-1] == 90


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path):
    # Three seconds: soon, and not so often that the last one could be there without the interruption.
    words = _words(tmp_path / "run", "--steps", "100000", "--checkpoint-minutes", "0.05")
    process = _start(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _wait_for_checkpoint(tmp_path / "run", process)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == ""
    command = shlex.join(["spectralnorm", "train", "--out", str(tmp_path / "run"), "--device", "cpu"])
    assert f"Go on with: {command}" in output
    endings = [r for r in read_records(tmp_path / "run" / "metrics.jsonl") if isinstance(r, Ending)]
    assert [ending.reason for ending in endings] == ["interrupted"]
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert newest.name == f"step-{endings[0].step:09d}.safetensors"


def test_two_processes_cannot_train_in_one_folder(tmp_path: Path):
    def second(trainer: Trainer) -> None:
        if trainer.step == 1:
            for config in (_config(), _config(seed=1)):
                with pytest.raises(UserError, match="Another process is training"):
                    _train(tmp_path, config)

    assert _train(tmp_path, observers=[second]).step == 6
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 0


def test_a_run_that_began_since_the_folder_was_checked_keeps_it(tmp_path: Path):
    class Rival(Display):
        def data(self, images: ImageSet | ImageStream) -> None:
            _train(tmp_path)

    with pytest.raises(UserError, match="other settings"):
        _train(tmp_path, _config(seed=1), display=Rival())
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 0


def test_the_config_file_is_plain_json_with_every_setting(tmp_path: Path):
    _train(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields.keys() == {field.name for field in dataclasses.fields(Config)}
    assert fields["batch_size"] == 4
