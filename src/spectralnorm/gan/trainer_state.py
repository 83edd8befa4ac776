"""The state of a training as tensors and numbers: what a checkpoint holds, and how a run goes on from it.

It does not depend on the number of processes nor on how they hold the networks.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spectralnorm.gan.checkpoint import under
from spectralnorm.gan.parts import part_like, whole
from spectralnorm.transform import load_tracking_state, tracking_state

if TYPE_CHECKING:
    from spectralnorm.gan.trainer import Trainer

__all__ = ["restore", "state_of"]


def state_of(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything needed to go on exactly from here: tensors by name, and the numbers JSON can hold."""
    tensors = {f"generator.{k}": v for k, v in trainer.generator.state_dict().items()}
    tensors |= {f"discriminator.{k}": v for k, v in trainer.discriminator.state_dict().items()}
    tensors |= {f"tracking.{k}": v for k, v in tracking_state(trainer.discriminator).items()}
    tensors |= {f"generator_tracking.{k}": v for k, v in tracking_state(trainer.generator).items()}
    tensors |= {f"average.{k}": v for k, v in trainer.average.module.state_dict().items()}
    for name, optimizer in _optimizers(trainer):
        for index, slots in optimizer.state_dict()["state"].items():
            filled = {slot: value for slot, value in slots.items() if value is not None}
            tensors |= {f"{name}.{index}.{slot}": torch.as_tensor(value) for slot, value in filled.items()}
    tensors |= {f"augmentation.{k}": v for k, v in trainer.augment.state_dict().items()}
    if trainer.config.path_length_weight:
        tensors["average_path_length"] = trainer.average_path_length
    tensors["random.run"] = trainer.random.get_state()
    tensors["random.torch"] = torch.get_rng_state()
    if trainer.device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(trainer.device)
    tensors = {name: whole(tensor) for name, tensor in tensors.items()}
    numbers = {
        "step": trainer.step,
        "images_seen": trainer.images_seen,
        "training_seconds": trainer.clock.seconds,
        "batches": trainer.batches.state_dict(),
        "scalers": {name: scaler.state_dict() for name, scaler in trainer.scalers.items() if scaler.is_enabled()},
    }
    return tensors, numbers


def restore(trainer: Trainer, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Go back to what `state_of` returned, on as many processes as there are now."""
    for name, network in (("generator", trainer.generator), ("discriminator", trainer.discriminator)):
        held = network.state_dict()
        given = under(f"{name}.", tensors)
        network.load_state_dict({k: part_like(held[k], v) if k in held else v for k, v in given.items()})
    load_tracking_state(trainer.discriminator, under("tracking.", tensors))
    load_tracking_state(trainer.generator, under("generator_tracking.", tensors))
    trainer.average.module.load_state_dict(under("average.", tensors))
    for name, optimizer in _optimizers(trainer):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state: dict[Any, dict[str, Tensor]] = {}
        for key, value in under(f"{name}.", tensors).items():
            index, slot = key.split(".", 1)
            state.setdefault(int(index), {})[slot] = part_like(parameters[int(index)], value)
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    trainer.augment.load_state_dict(under("augmentation.", tensors))
    if "average_path_length" in tensors:
        trainer.average_path_length = tensors["average_path_length"].to(trainer.device)
    _set_random(trainer.random, tensors["random.run"])
    torch.set_rng_state(tensors["random.torch"])
    if trainer.device.type == "cuda" and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"], trainer.device)
    trainer.step = numbers["step"]
    trainer.images_seen = numbers["images_seen"]
    trainer.clock.seconds = numbers["training_seconds"]
    trainer.batches.load_state_dict(numbers["batches"])
    for name, state in numbers.get("scalers", {}).items():
        trainer.scalers[name].load_state_dict(state)
    trainer.processes.vary_noise(trainer.config.seed + trainer.step)


def _set_random(random: torch.Generator, state: Tensor) -> None:
    """Go on with random numbers from ``state``, or from a seed made of it if it is that of another kind of device."""
    if state.shape == random.get_state().shape:
        random.set_state(state)
    else:
        digest = hashlib.blake2b(state.numpy().tobytes(), digest_size=8).digest()
        random.manual_seed(int.from_bytes(digest, "little") >> 1)


def _optimizers(trainer: Trainer) -> list[tuple[str, torch.optim.Optimizer]]:
    return [
        ("generator_optimizer", trainer.generator_optimizer),
        ("discriminator_optimizer", trainer.discriminator_optimizer),
    ]
