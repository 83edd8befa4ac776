"""What `torchrun` and Slurm tell a process about the others that they have started."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from spectralnorm.errors import UserError

__all__ = ["Launch", "first_node", "launch_of"]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One of several processes."""

    rank: int
    """Of this process, from 0."""
    size: int
    """Processes in all."""
    local_rank: int
    """Of this process among those of its machine: the number of its GPU."""
    address: str
    """Machine of the first process."""
    port: int
    """Where the first process waits for the others."""


def launch_of(environment: Mapping[str, str]) -> Launch | None:
    """What `torchrun` or Slurm's ``srun`` has put into the environment; None for a process that was started alone.

    Raises:
        UserError: a part of it is missing or is no number.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        launch = Launch(
            rank=_number(environment, "RANK"),
            size=_number(environment, "WORLD_SIZE"),
            local_rank=_number(environment, "LOCAL_RANK"),
            address=_text(environment, "MASTER_ADDR"),
            port=_number(environment, "MASTER_PORT"),
        )
    # Of the step, not of the job: a script that sbatch runs is one process of a job with many tasks.
    elif "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        launch = Launch(
            rank=_number(environment, "SLURM_PROCID"),
            size=_number(environment, "SLURM_STEP_NUM_TASKS"),
            local_rank=_number(environment, "SLURM_LOCALID"),
            address=environment.get("MASTER_ADDR") or first_node(_text(environment, "SLURM_STEP_NODELIST")),
            port=_port_of_step(environment),
        )
    else:
        return None
    return launch if launch.size > 1 else None


def first_node(nodes: str) -> str:
    """The first machine of Slurm's list.

    >>> first_node("gpu[07-09,12],login1"), first_node("a1,a2"), first_node("rack[3,5]-n[01-02]")
    ('gpu07', 'a1', 'rack3-n01')
    """
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def _port_of_step(environment: Mapping[str, str]) -> int:
    if "MASTER_PORT" in environment:
        return _number(environment, "MASTER_PORT")
    # Two steps that share a machine must not meet at one port; below 15000 many are taken.
    step = _number(environment, "SLURM_STEP_ID") if "SLURM_STEP_ID" in environment else 0
    return 15000 + (97 * _number(environment, "SLURM_JOB_ID") + step) % 15000


def _text(environment: Mapping[str, str], name: str) -> str:
    if not environment.get(name):
        raise UserError(
            f"The environment says that this is one of several processes but has no {name}; start them with torchrun "
            "or srun."
        )
    return environment[name]


def _number(environment: Mapping[str, str], name: str) -> int:
    text = _text(environment, name)
    if not text.isdecimal():
        raise UserError(f"{name} must be a whole number, got {text!r}; start the processes with torchrun or srun.")
    return int(text)
