import dataclasses

import pytest
import torch
from torch import nn

from spectralnorm.gan.config import Config
from spectralnorm.gan.models.stylegan2_discriminator import MinibatchStddev
from spectralnorm.gan.observers import Averaging, Milestones, StepSizeDecay
from spectralnorm.gan.parts import part_like
from spectralnorm.gan.penalties import PENALTIES
from spectralnorm.gan.trainer import Clock, RunningMeans, Trainer
from spectralnorm.transform import add_spectral_norm

CONFIG = Config(steps=6, batch_size=4, latent_dim=5, num_discriminator_steps=2, augmentation="shift,flip", device="cpu")


def _trainer(device: torch.device, config: Config = CONFIG) -> Trainer:
    torch.manual_seed(config.seed)
    generator = nn.Sequential(nn.Linear(5, 64), nn.BatchNorm1d(64), nn.Unflatten(1, (1, 8, 8)), nn.Tanh())
    discriminator = nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1),
        nn.LeakyReLU(0.1),
        nn.Conv2d(4, 4, 3, 1, 1),  # several channels in and out: channels-last order is another order
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(64, 1),
        nn.Flatten(0),
    )
    images = torch.randint(256, (20, 1, 8, 8), dtype=torch.uint8)
    return Trainer(
        config,
        generator=generator,
        discriminator=add_spectral_norm(discriminator),
        images=images,
        device=device,
    )


def _weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    tensors, _ = trainer.state()
    # On the CPU, because loading moves a number of NAdam's from there to the weights' device.
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}


def test_a_run_takes_as_many_steps_as_it_is_given(device: torch.device):
    trainer = _trainer(device)
    seen = []
    trainer.run([lambda trainer: seen.append(trainer.step)])
    assert seen == [1, 2, 3, 4, 5, 6]
    assert trainer.stop_reason == "steps"
    assert trainer.images_seen == 6 * 2 * 4


def test_a_minutes_budget_ends_the_run(device: torch.device):
    trainer = _trainer(device, dataclasses.replace(CONFIG, steps=None, minutes=1e-9))
    trainer.clock.seconds = 1.0
    trainer.run([])
    assert trainer.stop_reason == "minutes"
    assert trainer.step == 0


def test_an_observer_can_end_the_run(device: torch.device):
    trainer = _trainer(device)

    def stop(trainer: Trainer) -> None:
        trainer.stop_reason = "interrupted"

    trainer.run([stop])
    assert trainer.step == 1


def test_each_update_changes_its_own_network_only(device: torch.device):
    trainer = _trainer(device)
    before = _weights(trainer)
    fake = trainer.generate(4)
    trainer.update_discriminator(next(trainer.batches), fake)
    after = _weights(trainer)
    trainable = dict(trainer.generator.named_parameters())
    assert all(torch.equal(before[f"generator.{name}"], after[f"generator.{name}"]) for name in trainable)
    assert not torch.equal(
        before["discriminator.0.parametrizations.weight.original"],
        after["discriminator.0.parametrizations.weight.original"],
    )
    trainer.update_generator(fake)
    last = _weights(trainer)
    assert not torch.equal(after["generator.0.weight"], last["generator.0.weight"])
    for name in dict(trainer.discriminator.named_parameters()):
        assert torch.equal(after[f"discriminator.{name}"], last[f"discriminator.{name}"])
    assert all(parameter.requires_grad for parameter in trainer.discriminator.parameters())


def test_gradients_of_the_generator_take_no_memory_while_the_discriminator_learns(device: torch.device):
    trainer = _trainer(device)
    held = []

    def look(module: nn.Module, inputs: object) -> None:
        if torch.is_grad_enabled() and next(module.parameters()).requires_grad:
            held.append([parameter.grad for parameter in trainer.generator.parameters() if parameter.grad is not None])

    trainer.discriminator.register_forward_pre_hook(look)
    after_steps = []
    trainer.run([lambda trainer: after_steps.append([parameter.grad for parameter in trainer.generator.parameters()])])
    assert len(held) == 6 * 2
    assert held == [[]] * len(held)
    assert not any(gradient is None for gradients in after_steps for gradient in gradients)


def test_a_resumed_run_is_the_uninterrupted_run_to_the_last_bit(device: torch.device):
    config = dataclasses.replace(CONFIG, lr_decay_from=0.5)
    whole = _trainer(device, config)
    whole.run([Averaging(), StepSizeDecay(whole)])

    first = _trainer(device, config)

    def stop_after_four(trainer: Trainer) -> None:
        trainer.stop_reason = "interrupted" if trainer.step == 4 else None

    first.run([Averaging(), StepSizeDecay(first), stop_after_four])
    tensors, numbers = first.state()
    tensors = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
    second = _trainer(device, config)
    second.load_state(tensors, numbers)
    torch.rand(7)  # what happens between two processes must not matter
    second.random.manual_seed(99)
    second.load_state(tensors, numbers)
    second.run([Averaging(), StepSizeDecay(second)])

    expected = _weights(whole)
    for name, tensor in _weights(second).items():
        assert torch.equal(tensor, expected[name]), name


def test_step_sizes_fall_linearly_to_zero_over_the_last_part(device: torch.device):
    config = dataclasses.replace(CONFIG, steps=10, lr_decay_from=0.5, generator_lr=0.4, discriminator_lr=0.2)
    trainer = _trainer(device, config)
    decay = StepSizeDecay(trainer)
    sizes = []
    for trainer.step in range(11):
        decay(trainer)
        sizes.append(trainer.generator_optimizer.param_groups[0]["lr"])
        assert trainer.discriminator_optimizer.param_groups[0]["lr"] == pytest.approx(sizes[-1] / 2)
    assert sizes == pytest.approx([0.4] * 6 + [0.32, 0.24, 0.16, 0.08, 0.0])


def test_a_penalty_is_taken_at_every_nth_update_and_counts_n_times(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
):
    calls = []

    def penalty(discriminator, real, fake, *, random):
        calls.append((real.shape, fake.shape))
        return discriminator(real).square().mean()

    monkeypatch.setitem(PENALTIES, "r1", penalty)
    config = dataclasses.replace(CONFIG, penalty="r1", penalty_weight=0.5, penalty_interval=3)
    trainer = _trainer(device, config)
    losses = []
    monkeypatch.setattr(
        trainer.means, "add", lambda name, value: losses.append(name) if name.startswith("penalty") else None
    )
    trainer.run([])
    assert len(calls) == len(losses) == 4  # of the 12 updates of the discriminator: 0, 3, 6 and 9
    assert set(calls) == {((4, 1, 8, 8), (4, 1, 8, 8))}


def test_a_penalty_of_every_third_update_keeps_its_mean_weight(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    # Without a gradient, so that both runs go the same way.
    monkeypatch.setitem(PENALTIES, "r1", lambda discriminator, real, fake, *, random: real.new_tensor(2.0))

    def losses(config: Config) -> torch.Tensor:
        trainer, found = _trainer(device, config), []
        monkeypatch.setattr(
            trainer.means, "add", lambda name, value: found.append(value.item()) if "loss/d" in name else None
        )
        trainer.run([])
        return torch.tensor(found)

    with_penalty = losses(dataclasses.replace(CONFIG, penalty="r1", penalty_weight=0.5, penalty_interval=3))
    torch.testing.assert_close(with_penalty - losses(CONFIG), torch.tensor([3.0, 0.0, 0.0] * 4))


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_large_penalty_flattens_the_discriminator(penalty: str, device: torch.device):
    settings = {"steps": 40, "loss": "wasserstein", "normalization": "none", "discriminator_lr": 5e-2}
    config = dataclasses.replace(CONFIG, **settings)

    def slope(config: Config) -> float:
        torch.manual_seed(0)
        generator = nn.Sequential(nn.Linear(5, 64), nn.Unflatten(1, (1, 8, 8)))
        discriminator = nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.Flatten(0))
        images = torch.randint(256, (20, 1, 8, 8), dtype=torch.uint8)
        trainer = Trainer(config, generator=generator, discriminator=discriminator, images=images, device=device)
        trainer.run([])
        return trainer.discriminator[1].weight.norm().item()

    assert slope(dataclasses.replace(config, penalty=penalty, penalty_weight=100.0)) < 2 < 4 < slope(config)


def test_a_relativistic_generator_sees_the_real_images_of_the_last_batch(device: torch.device):
    trainer = _trainer(device, dataclasses.replace(CONFIG, steps=1, loss="relativistic", num_discriminator_steps=1))
    seen = []
    trainer.discriminator.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    trainer.run([])
    assert seen == [8, 8]


def test_a_run_goes_on_on_another_kind_of_device_with_other_random_numbers(device: torch.device):
    first = _trainer(device, dataclasses.replace(CONFIG, steps=2))
    first.run([])
    tensors, numbers = first.state()
    # Of a GPU it is a seed and a place, of the CPU all of a Mersenne twister.
    tensors["random.run"] = (
        torch.arange(16, dtype=torch.uint8) if device.type == "cpu" else torch.Generator().get_state()
    )
    drawn = []
    for _ in range(2):
        second = _trainer(device)
        at_start = second.latents(4)
        second.load_state(tensors, numbers)
        drawn.append(second.latents(4))
        second.run([])
        assert second.step == 6
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], at_start)


def test_the_steps_of_a_single_number_are_still_counted_on_the_cpu_after_a_resume():
    weight, steps = torch.zeros((), device="meta"), torch.tensor(3.0)
    assert part_like(weight, steps) is steps


@pytest.mark.parametrize(
    "settings",
    [
        {"generator_optimizer": "sgd:momentum=0.9", "discriminator_optimizer": "sgd"},
        {"generator_optimizer": "rmsprop:alpha=0.9", "discriminator_optimizer": "adagrad"},
        {"generator_optimizer": "muon", "discriminator_optimizer": "muon:momentum=0.5"},
        {"generator_optimizer": "NAdam", "discriminator_optimizer": "adamw:weight_decay=0.1"},
        {"orthonormal_weight": 0.1, "weight_clip": 0.05, "generator_batch_size": 6},
    ],
    ids=["sgd", "rmsprop-adagrad", "muon", "nadam-adamw", "controls"],
)
def test_other_optimizers_and_controls_resume_exactly(settings: dict, device: torch.device):
    config = dataclasses.replace(CONFIG, steps=4, **settings)
    whole = _trainer(device, config)
    whole.run([StepSizeDecay(whole)])
    first = _trainer(device, dataclasses.replace(config, steps=2))
    first.run([StepSizeDecay(first)])
    tensors, numbers = first.state()
    second = _trainer(device, config)
    second.load_state({name: tensor.cpu().clone() for name, tensor in tensors.items()}, numbers)
    second.run([StepSizeDecay(second)])
    resumed, expected = _weights(second), _weights(whole)
    start = _weights(_trainer(device, config))
    for name in resumed.keys() - {"random.torch"}:  # the line above has drawn from it
        assert torch.equal(resumed[name], expected[name]), name
    moved = "discriminator.0.parametrizations.weight.original"
    assert not torch.equal(start[moved], expected[moved])


def test_a_batch_of_its_own_for_the_generator(device: torch.device):
    trainer = _trainer(device, dataclasses.replace(CONFIG, steps=2, generator_batch_size=6))
    sizes = []
    trainer.generator.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    trainer.run([])
    assert sizes == [4, 4, 6, 4, 4, 6]


def test_clipped_weights_stay_in_their_interval(device: torch.device):
    trainer = _trainer(device, dataclasses.replace(CONFIG, weight_clip=0.02, discriminator_lr=0.1))
    trainer.run([])
    largest = max(parameter.abs().max().item() for parameter in trainer.discriminator.parameters())
    assert largest == pytest.approx(0.02)


class _ByClass(nn.Module):
    """A network that is told labels, and remembers them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.told: list[list[int]] = []

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.told.append(labels.tolist())
        return self.network(inputs)


@pytest.mark.parametrize("settings", [{}, {"generator_batch_size": 6}, {"penalty": "r2"}])
def test_both_networks_of_a_conditional_run_are_told_labels(settings: dict, device: torch.device):
    generator = _ByClass(nn.Sequential(nn.Linear(5, 4), nn.Unflatten(1, (1, 2, 2))))
    discriminator = _ByClass(nn.Sequential(nn.Flatten(), nn.Linear(4, 1), nn.Flatten(0)))
    labels = torch.arange(20) % 3
    images = (labels * 100).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    trainer = Trainer(
        dataclasses.replace(CONFIG, steps=1, num_discriminator_steps=1, augmentation="none", **settings),
        generator=generator,
        discriminator=discriminator,
        images=images,
        labels=labels,
        device=device,
    )
    seen = []
    discriminator.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][:, 0, 0, 0].clone()))
    trainer.run([])
    real_and_fake = discriminator.told[0]
    assert real_and_fake[:4] == ((seen[0][:4] + 1) * 1.275).round().long().tolist()
    assert generator.told[0] == real_and_fake[4:] == real_and_fake[:4]
    assert generator.told[-1] == discriminator.told[-1]
    assert len(generator.told[-1]) == settings.get("generator_batch_size", 4)


def test_the_path_length_penalty_draws_lengths_together(device: torch.device):
    class Styled(nn.Module):
        """Half of its styles move the image ten times as far as the other half."""

        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.tensor([1.0, 10.0]))

        def styles(self, latents: torch.Tensor) -> torch.Tensor:
            return latents[:, None].clone().requires_grad_()  # no mapping network would do it here

        def synthesize(self, styles: torch.Tensor) -> torch.Tensor:
            gains = torch.where(styles[:, :1, :1] > 0, self.gain[0], self.gain[1])
            return (styles[:, 0, :4] * gains[:, 0]).view(-1, 1, 2, 2)

        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            return self.synthesize(self.styles(latents))

    def spread(weight: float) -> float:
        torch.manual_seed(0)
        config = dataclasses.replace(
            CONFIG, steps=60, architecture="stylegan2", path_length_weight=weight, generator_lr=0.02,
            num_discriminator_steps=1, batch_size=16, normalization="none", discriminator_lr=1e-9,
            generator_optimizer="sgd",
        )  # fmt: skip
        dull = nn.Linear(4, 1)
        nn.init.zeros_(dull.weight)  # gives the generator nothing to learn, so that only the penalty moves it
        trainer = Trainer(
            config,
            generator=Styled(),
            discriminator=nn.Sequential(nn.Flatten(), dull, nn.Flatten(0)),
            images=torch.randint(256, (20, 1, 2, 2), dtype=torch.uint8),
            device=device,
        )
        trainer.run([])
        gains = trainer.generator.gain.detach().abs()
        return float(gains.max() - gains.min())

    assert spread(2.0) < 0.5 * spread(0.0)


def test_running_means_are_over_the_steps_since_last_read():
    means = RunningMeans()
    for value in (1.0, 2.0, 6.0):
        means.add("loss", torch.tensor(value, requires_grad=True))
    assert means.pop() == {"loss": 3.0}
    means.add("loss", torch.tensor(5.0))
    assert means.pop() == {"loss": 5.0}


def test_the_clock_stands_still_while_paused(monkeypatch: pytest.MonkeyPatch):
    now = 0.0
    monkeypatch.setattr("spectralnorm.gan.clock.time.perf_counter", lambda: now)
    clock = Clock(torch.device("cpu"))
    clock.start()
    now = 3.0
    with clock.paused():
        now = 100.0
    now = 102.0
    assert clock.seconds == 5.0
    clock.stop()
    now = 200.0
    with clock.paused():
        now = 250.0
    now = 300.0
    assert clock.seconds == 5.0


@pytest.mark.parametrize("power", [1.0, 1.5])
def test_milestones_are_all_reached_and_the_last_is_the_end(power: float):
    milestones = Milestones(6, power=power)
    reached = [step for step in range(1, 601) if milestones.reached(step / 600)]
    assert len(reached) == 6
    assert reached[-1] == 600
    assert reached[0] == (100 if power == 1 else 41)


def test_milestones_passed_before_a_resume_do_not_come_again():
    milestones = Milestones(4, progress=0.6)
    assert [step for step in range(60, 101) if milestones.reached(step / 100)] == [75, 100]


@pytest.mark.parametrize(
    "mixing", [nn.Sequential(nn.BatchNorm2d(1)), nn.Sequential(MinibatchStddev())], ids=["norm", "stddev"]
)
def test_what_mixes_the_images_of_a_batch_never_sees_real_and_fake_together(mixing: nn.Module, device: torch.device):
    torch.manual_seed(0)
    seen = []
    discriminator = nn.Sequential(mixing, nn.Flatten(), nn.LazyLinear(1), nn.Flatten(0)).to(device)
    discriminator(torch.zeros(2, 1, 8, 8, device=device))
    mixing[0].register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    generator = nn.Sequential(nn.Linear(5, 64), nn.Unflatten(1, (1, 8, 8)))
    images = torch.randint(256, (20, 1, 8, 8), dtype=torch.uint8)
    Trainer(
        dataclasses.replace(CONFIG, steps=1, num_discriminator_steps=1),
        generator=generator,
        discriminator=discriminator,
        images=images,
        device=device,
    ).run([])
    assert seen == [4, 4, 4]
