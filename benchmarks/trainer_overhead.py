"""What the trainer costs: its images/s against a bare loop over the same networks.

Both run in one process and take turns, a block of steps each, so that whatever else the machine does falls on both. The
trainer is the real one, called as any user calls it, with its averaging, its records and its checks; the bare loop has
two networks, two optimizers and the loss, and nothing else. Both do the same arithmetic on them: one batch of generated
images serves both players, real and generated ones pass the discriminator together, and its weights get no gradients in
the generator's update. The ratio is the median over the blocks, by wall clock and by process CPU time. Grids,
evaluations and checkpoints are not training time and not counted.

    python benchmarks/trainer_overhead.py --blocks 40
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from hardware import hardware, write_result
from timing import synchronize

from spectralnorm import gan
from spectralnorm.gan.losses import LOSSES
from spectralnorm.gan.networks import build_discriminator, build_generator


class BareLoop:
    """The trainer's networks, optimizers and losses in the fewest lines."""

    def __init__(self, trainer):
        self.config, self.device = trainer.config, trainer.device
        config = trainer.config
        self.generator, self.discriminator = build_generator(config), build_discriminator(config)
        for network in (self.generator, self.discriminator):
            network.to(trainer.device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        options = {key: trainer.generator_optimizer.defaults[key] for key in ("betas", "fused", "foreach")}
        self.update_g = torch.optim.Adam(self.generator.parameters(), config.generator_lr, **options)
        self.update_d = torch.optim.Adam(self.discriminator.parameters(), config.discriminator_lr, **options)
        self.weights = list(self.discriminator.parameters())
        self.loss = LOSSES[config.loss]
        self.images = gan.load_images(None, image_size=config.image_size, channels=config.channels).images
        self.images = self.images.to(trainer.device)

    def __call__(self, steps):
        batch_size = self.config.batch_size
        for _ in range(steps):
            fake = self.generator(torch.randn(batch_size, self.config.latent_dim, device=self.device))
            index = torch.randint(len(self.images), (batch_size,), device=self.device)
            real = self.images[index].float().div_(127.5).sub_(1)
            # As the trainer does, both batches pass together, which is faster than one after the other.
            logits = self.discriminator(torch.cat([real, fake.detach()]))
            loss = self.loss.discriminator(*logits.split(batch_size))
            self.update_d.zero_grad()
            loss.backward()
            self.update_d.step()
            for weight in self.weights:
                weight.requires_grad_(False)
            loss = self.loss.generator(self.discriminator(fake))
            self.update_g.zero_grad()
            loss.backward()
            self.update_g.step()
            for weight in self.weights:
                weight.requires_grad_(True)


class TakeTurns:
    """An observer: after a block of the trainer's steps, times as many of the bare loop's while the clock stands."""

    def __init__(self, block):
        self.block = block
        self.bare = None
        self.began = (0.0, 0.0)
        self.trainer_times, self.bare_times = [], []

    def __call__(self, trainer):
        if trainer.step % self.block:
            return
        with trainer.clock.paused():
            trainer_time = self._since(self.began)
            if self.bare is None:
                self.bare = BareLoop(trainer)
                self.bare(self.block)  # warms up, as the block that the trainer has just done
            else:
                began = self._now(trainer)
                self.bare(self.block)
                synchronize(trainer.device)
                self.bare_times.append(self._since(began))
                self.trainer_times.append(trainer_time)
        self.began = self._now(trainer)

    def _now(self, trainer):
        synchronize(trainer.device)
        return time.perf_counter(), time.process_time()

    @staticmethod
    def _since(began):
        return time.perf_counter() - began[0], time.process_time() - began[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="fashion")
    parser.add_argument("--blocks", type=int, default=40, help="turns of each")
    parser.add_argument("--block", type=int, default=50, help="steps in a turn")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()

    # Nothing but training happens within the blocks: the one grid, evaluation and checkpoint come at the end.
    config = gan.make_config(
        arguments.recipe,
        steps=arguments.block * (arguments.blocks + 1),
        device=arguments.device,
        num_sample_grids=1,
        num_evaluations=1,
        num_evaluation_samples=100,
        checkpoint_minutes=1e6,
    )
    turns = TakeTurns(arguments.block)
    with tempfile.TemporaryDirectory() as folder:
        gan.train(config, out=Path(folder) / "run", observers=[turns])

    images = arguments.block * config.batch_size
    lines = ["| | trainer, images/s | bare loop, images/s | ratio (median of blocks) |", "|---|---|---|---|"]
    for index, name in enumerate(("wall clock", "process CPU time")):
        ours, bare = ([times[index] for times in both] for both in (turns.trainer_times, turns.bare_times))
        ratio = statistics.median(b / o for o, b in zip(ours, bare, strict=True))
        speeds = [images / statistics.median(times) for times in (ours, bare)]
        lines.append(f"| {name} | {speeds[0]:.0f} | {speeds[1]:.0f} | {ratio:.3f} |")
    print("\n".join(lines))
    text = (
        "# What the trainer costs\n\n"
        f"{hardware()}\n\n"
        f"`python benchmarks/trainer_overhead.py --recipe {arguments.recipe} --blocks {arguments.blocks} "
        f"--block {arguments.block} --device {arguments.device}`: {len(turns.bare_times)} turns of {arguments.block} "
        f"steps each, batch {config.batch_size}. A ratio of 1 is a trainer that costs nothing.\n\n"
        + "\n".join(lines)
        + "\n"
    )
    print(f"written to {write_result('trainer_overhead', text, device=arguments.device)}")


if __name__ == "__main__":
    main()
