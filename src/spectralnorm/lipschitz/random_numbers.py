"""The global sources of random numbers: what runs in between must leave them alone."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from spectralnorm.errors import UserError

__all__ = ["without_random_numbers"]


@contextmanager
def without_random_numbers(device: torch.device, *, seed: int) -> Iterator[None]:
    """Put every source back as it was.

    Args:
        device: whose source counts beside torch's on the CPU, Python's, and numpy's if it is loaded.
        seed: of all of them in between. What draws and puts a source back draws something else with another seed.

    Raises:
        UserError: numbers were drawn.
    """
    devices = [device] if device.type == "cuda" else []
    numpy = sys.modules.get("numpy.random")  # not imported: it may not be there
    python_state, numpy_state = random.getstate(), numpy.get_state(legacy=False) if numpy else None

    def states() -> list[bytes]:
        cuda = [torch.cuda.get_rng_state(each) for each in devices]
        ours = [pickle.dumps(random.getstate()), pickle.dumps(numpy.get_state(legacy=False) if numpy else None)]
        return [*ours, *(bytes(each.tolist()) for each in (torch.get_rng_state(), *cuda))]

    with torch.random.fork_rng(devices=devices, device_type="cuda"):
        try:
            random.seed(seed)
            if numpy:
                numpy.seed(seed)
            torch.default_generator.manual_seed(seed)
            for each in devices:
                with torch.cuda.device(each):
                    torch.cuda.manual_seed(seed)
            before = states()
            yield
            after = states()
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.set_state(numpy_state)
    if before != after:
        raise UserError(
            "certify refuses a model that draws random numbers: it would certify one draw alone; take the noise as an "
            "input, or leave it out in eval mode."
        )
