"""Who trains in `trainer.py`: this package's trainer, a script with torch's spectral norm, and torch-mimicry.

A contender is built for a `Task` and called with a number of generator updates. All get their real images from the same
place: uint8 in memory, a batch picked by index and scaled.
"""

import importlib
import importlib.util
import sys
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.tensorboard import SummaryWriter

from spectralnorm import gan
from spectralnorm.gan.losses import LOSSES
from spectralnorm.gan.models.resampled import DoubledConv2d, HalvedConv2d
from spectralnorm.gan.networks import build_discriminator, build_generator
from spectralnorm.gan.observers import Averaging, RecordLog, ScalarLog, StepSizeDecay
from spectralnorm.gan.trainer import Trainer
from spectralnorm.records import RecordFile

NUM_IMAGES = 2048


@dataclass(frozen=True)
class Task:
    """What is trained.

    ``fresh``: the generator's update has images made for it alone, as in Algorithm 1. ``our_blocks``: the script has
    this package's residual blocks, which make one convolution of a change of resolution and the one beside it.
    """

    recipe: str
    settings: tuple[tuple[str, object], ...]
    device: str = "cpu"
    fresh: bool = False
    our_blocks: bool = False

    def config(self):
        settings = {"steps": 10**9, "device": self.device, **dict(self.settings)}
        config = gan.make_config(self.recipe, **settings)
        settings["generator_batch_size"] = config.batch_size if self.fresh else None
        return gan.make_config(self.recipe, **settings)

    def images(self):
        config = self.config()
        shape = (max(NUM_IMAGES, config.batch_size), config.channels, config.image_size, config.image_size)
        return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Ours:
    """The trainer with what accompanies it in every run: averaged weights, falling step sizes, records."""

    def __init__(self, task):
        torch.manual_seed(0)
        config = task.config()
        self.trainer = Trainer(
            config,
            generator=build_generator(config),
            discriminator=build_discriminator(config),
            images=task.images(),
            device=torch.device(task.device),
        )
        folder = tempfile.mkdtemp(prefix="benchmark-")
        log = RecordLog(RecordFile(Path(folder) / "metrics.jsonl"), SummaryWriter(folder))
        self.observers = [
            Averaging(),
            StepSizeDecay(self.trainer),
            ScalarLog(log, lambda trainer, record: None, trainer=self.trainer),
            self.stop,
        ]
        self.until = 0

    def stop(self, trainer):
        if trainer.step >= self.until:
            trainer.stop_reason = "interrupted"

    def __call__(self, steps):
        self.until = self.trainer.step + steps
        self.trainer.stop_reason = None
        self.trainer.run(self.observers)


class Script:
    """A plain training script, written as well as such scripts are: torch's spectral norm, Adam as torch chooses it.

    It has our networks' modules, so that what differs is how they are normalized and driven; but unless the task says
    so, residual blocks take their steps one by one, as they are published. Real and generated images pass one after the
    other; images that only the discriminator will see are made without a graph.
    """

    def __init__(self, task):
        torch.manual_seed(0)
        self.config, self.device, self.fresh = task.config(), torch.device(task.device), task.fresh
        config = self.config
        self.generator = build_generator(config).to(self.device)
        self.discriminator = build_discriminator(config, normalized=False).to(self.device)
        if not task.our_blocks:
            _take_two_steps(self.generator)
            _take_two_steps(self.discriminator)
        for module in list(self.discriminator.modules()):
            if isinstance(module, nn.Conv2d | nn.Linear):
                spectral_norm(module)
        betas = (config.beta1, config.beta2)
        self.optimizer_g = torch.optim.Adam(self.generator.parameters(), config.generator_lr, betas)
        self.optimizer_d = torch.optim.Adam(self.discriminator.parameters(), config.discriminator_lr, betas)
        self.images = task.images().to(self.device)
        self.loss = LOSSES[config.loss]

    def generate(self):
        latents = torch.randn(self.config.batch_size, self.config.latent_dim, device=self.device)
        return self.generator(latents)

    def __call__(self, steps):
        num_updates = self.config.num_discriminator_steps
        for _ in range(steps):
            for update in range(num_updates):
                with torch.set_grad_enabled(update == num_updates - 1 and not self.fresh):
                    fake = self.generate()
                real = real_batch(self.images, self.config.batch_size)
                loss = self.loss.discriminator(self.discriminator(real), self.discriminator(fake.detach()))
                self.optimizer_d.zero_grad()
                loss.backward()
                self.optimizer_d.step()
            if self.fresh:
                fake = self.generate()
            loss = self.loss.generator(self.discriminator(fake))
            self.optimizer_g.zero_grad()
            loss.backward()
            self.optimizer_g.step()


class _DoubledInTwoSteps(nn.Conv2d):
    def forward(self, input):
        return super().forward(functional.interpolate(input, scale_factor=2, mode="nearest"))


class _HalvedInTwoSteps(nn.Conv2d):
    def forward(self, input):
        return functional.avg_pool2d(super().forward(input), 2)


def _take_two_steps(network):
    kinds = {DoubledConv2d: _DoubledInTwoSteps, HalvedConv2d: _HalvedInTwoSteps}
    for module in network.modules():
        module.__class__ = kinds.get(type(module), type(module))


class Mimicry:
    """torch-mimicry's SNGAN-32: its networks, its train steps in the order of its trainer, its step size schedule."""

    def __init__(self, task):
        torch.manual_seed(0)
        _import_past_init_files()
        self.config, self.device = task.config(), torch.device(task.device)
        config = self.config
        if not task.fresh or (config.architecture, config.image_size, config.channels) != ("resnet", 32, 3):
            raise ValueError("torch-mimicry is compared on SNGAN-32, with images of their own for the generator.")
        nets = importlib.import_module("torch_mimicry.nets.sngan.sngan_32")
        self.log = importlib.import_module("torch_mimicry.training.metric_log").MetricLog
        self.generator = nets.SNGANGenerator32(ngf=4 * config.generator_width).to(self.device)
        self.discriminator = nets.SNGANDiscriminator32(ndf=2 * config.discriminator_width).to(self.device)
        betas = (config.beta1, config.beta2)
        self.optimizer_g = torch.optim.Adam(self.generator.parameters(), config.generator_lr, betas)
        self.optimizer_d = torch.optim.Adam(self.discriminator.parameters(), config.discriminator_lr, betas)
        schedule = importlib.import_module("torch_mimicry.training.scheduler").LRScheduler
        self.schedule = schedule("linear", self.optimizer_d, self.optimizer_g, num_steps=10**9)
        self.images = task.images().to(self.device)
        self.labels = torch.zeros(config.batch_size, dtype=torch.int64, device=self.device)
        self.step = 0

    def __call__(self, steps):
        for _ in range(steps):
            log = self.log()
            for update in range(self.config.num_discriminator_steps):
                batch = real_batch(self.images, self.config.batch_size), self.labels
                log = self.discriminator.train_step(
                    real_batch=batch, netG=self.generator, optD=self.optimizer_d, log_data=log, device=self.device
                )
                if update == self.config.num_discriminator_steps - 1:
                    log = self.generator.train_step(
                        real_batch=batch,
                        netD=self.discriminator,
                        optG=self.optimizer_g,
                        log_data=log,
                        device=self.device,
                    )
            self.step += 1
            log = self.schedule.step(log_data=log, global_step=self.step)


CONTENDERS = {"trainer": Ours, "script": Script, "mimicry": Mimicry}


def real_batch(images, batch_size):
    chosen = torch.randint(len(images), (batch_size,), device=images.device)
    return images[chosen].float().div_(127.5).sub_(1)


def has_mimicry():
    return "torch_mimicry" in sys.modules or importlib.util.find_spec("torch_mimicry") is not None


def _import_past_init_files():
    """Its top package imports TensorFlow and torchvision, which its networks and train steps do not use."""
    if isinstance(sys.modules.get("torch_mimicry"), types.ModuleType):
        return
    spec = importlib.util.find_spec("torch_mimicry")
    (folder,) = (spec and spec.submodule_search_locations) or [""]
    for name in ("torch_mimicry", "torch_mimicry.training"):
        module = types.ModuleType(name)
        module.__path__ = [str(Path(folder).joinpath(*name.split(".")[1:]))]
        sys.modules[name] = module
