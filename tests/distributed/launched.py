"""What a launched process does: it trains and exits, with its output and its errors in files."""

import os
import signal
import sys

import torch

from spectralnorm.errors import UserError
from spectralnorm.gan import make_config, train


def train_and_exit(environment: dict[str, str], files: list[str], folder: str, steps: int, die_at: int) -> None:
    """Train in ``folder``; the second process kills itself after the step ``die_at``."""
    os.environ.update(environment)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    torch.set_num_threads(1)
    images = torch.randint(256, (40, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sizes = {"generator_width": 2, "discriminator_width": 2, "latent_dim": 8, "batch_size": 8}
    config = make_config("fashion", steps=steps, device="cpu", log_every=2, num_sample_grids=2, **sizes)

    def die(trainer):
        if trainer.step == die_at and trainer.processes.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        run = train(config, out=folder, data=images, observers=[die])
        print("ended", run.step, run.reason)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
