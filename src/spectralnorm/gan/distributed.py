"""Several processes that train one pair of networks: how they agree, and how they end together.

`torchrun` or Slurm starts one process for each device, and each runs the same program. Gradients, statistics of batch
normalization and weights go through torch's default process group; what the processes must agree on beside them (when
to stop, what time it is) goes through a second group, of the hosts, so that no device is waited for.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from spectralnorm.errors import UserError
from spectralnorm.gan.draws import PartOfDraws
from spectralnorm.gan.launch import Launch, launch_of

__all__ = ["Processes", "started"]

T = TypeVar("T")

# While the first process measures or writes, the others wait for it. One that has ended is noticed at once.
_PATIENCE = timedelta(hours=12)
# How gloo, NCCL and the store say that the other end is gone.
_LOST = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|recvvalue failed|sendbytes failed|gloo|nccl|remote process",
    re.IGNORECASE,
)


class Processes:
    """The processes of one run, as one of them sees them. A run that was started alone has them too, and pays nothing.

    Attributes:
        rank: of this process, from 0; the first one writes the records.
        size: processes in all.
    """

    def __init__(self, rank: int = 0, size: int = 1, *, hosts: Any = None) -> None:
        self.rank = rank
        self.size = size
        self._hosts = hosts

    @property
    def is_first(self) -> bool:
        """Whether this process writes the records, samples and checkpoints."""
        return self.rank == 0

    def mine(self, whole: Tensor, *, parts: int = 1) -> Tensor:
        """This process's rows of what all have drawn alike, ``(num, ...)`` to ``(num / size, ...)``.

        Args:
            whole: for each image of a batch.
            parts: into which the batch is split; the process has its share of each.
        """
        if self.size == 1:
            return whole
        return whole.unflatten(0, (parts, self.size, -1))[:, self.rank].flatten(0, 1)

    def agree(self, reason: str | None, times: Sequence[float]) -> tuple[str | None, list[float]]:
        """Whether to stop, and what time it is, the same on every process.

        Args:
            reason: why this process wants to stop; None: it does not.
            times: of this process's clocks.

        Returns:
            The reason of the first process that has one; the clocks of the first process.
        """
        if self.size == 1:
            return reason, list(times)
        message = torch.tensor([reason is not None, *times], dtype=torch.float64)
        if not self.is_first:
            message[1:] = 0
        dist.all_reduce(message, dist.ReduceOp.SUM, group=self._hosts)
        num_stopping, *times = message.tolist()
        if not num_stopping:
            return None, list(times)
        reasons: list[str | None] = [None] * self.size
        dist.all_gather_object(reasons, reason, group=self._hosts)
        return next(each for each in reasons if each is not None), list(times)

    def meet(self) -> None:
        """Wait for the others in the group of the hosts, for hours: what devices do together waits only minutes."""
        if self.size > 1:
            dist.barrier(group=self._hosts)

    def mean_tensor(self, tensor: Tensor) -> Tensor:
        """The mean over all processes of a tensor on the device."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total / self.size

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The mean over all processes of numbers that each has under the same names."""
        if self.size == 1 or not values:
            return values
        numbers = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(numbers, dist.ReduceOp.SUM, group=self._hosts)
        return dict(zip(values, (numbers / self.size).tolist(), strict=True))

    def first_does(self, work: Callable[[], T]) -> T:
        """Let the first process do something while the others wait, and give all of them what it returns.

        Raises:
            UserError: the work has; on every process.
        """
        if self.size == 1:
            return work()
        outcome = _outcome(work) if self.is_first else [None, None]
        dist.broadcast_object_list(outcome, src=0, group=self._hosts)
        return _result(outcome)

    def first_before_others(self, work: Callable[[], T], follow: Callable[[Any], T], *, tell: Callable[[T], Any]) -> T:
        """Let the others do something once the first process has done it: it fills the cache that they read.

        Args:
            work: of the first process.
            follow: of the others, who are given what the first one tells, so that all do it in the same way.
            tell: makes of the first one's result what it tells.

        Raises:
            UserError: the work has on the first process; then on every one.
        """
        if self.size == 1:
            return work()
        outcome = _outcome(work) if self.is_first else [None, None]
        told = self.first_does(lambda: tell(_result(outcome)))
        return _result(outcome) if self.is_first else follow(told)

    def draws(self, rows: int) -> AbstractContextManager[Any]:
        """A context in which what is drawn for each image is this process's part of what one process would draw.

        Args:
            rows: images of this process in a batch; what is drawn for several batches at once has a multiple of them.
        """
        return nullcontext() if self.size == 1 else PartOfDraws(rank=self.rank, size=self.size, rows=rows)

    def vary_noise(self, seed: int) -> None:
        """Let torch's global random state differ between processes; that of the first one stays as it is.

        It is drawn from inside networks, by dropout and by the noise of a StyleGAN2 generator: equal numbers for the
        images of different processes would tie these together.
        """
        if not self.is_first:
            torch.manual_seed(seed + 7919 * self.rank)


@contextmanager
def started(
    device: torch.device, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[Processes, torch.device]]:
    """Meet the other processes of the run, if a launcher has started any, and part from them in the end.

    Args:
        device: asked for; where it is CUDA, each process of a machine takes a GPU of its own.
        environment: of the process; None: ``os.environ``.

    Yields:
        The processes, and the device of this one.

    Raises:
        UserError: the environment is incomplete, the others do not come, there are fewer GPUs than processes, or
            another process has ended.
    """
    environment = os.environ if environment is None else environment
    launch = launch_of(environment)
    if launch is None:
        yield Processes(), device
        return
    device = _own_device(device, launch)
    backend = "nccl" if device.type == "cuda" else "gloo"
    # Whoever has made a process group already may keep it.
    is_ours = not dist.is_initialized()
    if is_ours:
        _meet(launch, backend, device)
    try:
        hosts = dist.new_group(backend="gloo", timeout=_PATIENCE)
        with warnings.catch_warnings():
            # Of kernels with one channel, whose order in memory has two names.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            yield Processes(launch.rank, launch.size, hosts=hosts), device
    except RuntimeError as error:
        if not _LOST.search(str(error)):
            raise
        raise UserError(
            f"Another of the {launch.size} processes has ended, so process {launch.rank} ends too; its own message "
            "says why, and the same command goes on from the last checkpoint."
        ) from error
    finally:
        if is_ours:
            dist.destroy_process_group()


def _meet(launch: Launch, backend: str, device: torch.device) -> None:
    try:
        # The first process listens there, unless the launcher does.
        is_listening = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = TCPStore(launch.address, launch.port, launch.size, is_master=launch.rank == 0 and not is_listening)
        dist.init_process_group(
            backend,
            store=PrefixStore("spectralnorm", store),
            rank=launch.rank,
            world_size=launch.size,
            device_id=device if backend == "nccl" else None,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"Process {launch.rank} of {launch.size} could not meet the others at {launch.address}:{launch.port} "
            f"({str(error).splitlines()[0]}); see that all were started and that the port is free."
        ) from error


def _own_device(device: torch.device, launch: Launch) -> torch.device:
    if device.type == "mps":
        raise UserError(f"MPS trains in one process, got {launch.size}; start it without torchrun, or give device cpu.")
    if device.type != "cuda":
        return device
    if launch.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"Process {launch.rank} needs a GPU of its own, number {launch.local_rank}, but this machine has "
            f"{torch.cuda.device_count()}; start as many processes on each machine as it has GPUs."
        )
    device = torch.device("cuda", launch.local_rank)
    torch.cuda.set_device(device)
    return device


def _outcome(work: Callable[[], T]) -> list[Any]:
    """What it returns, or what its `UserError` says."""
    try:
        return [work(), None]
    except UserError as error:
        return [None, str(error)]


def _result(outcome: list[Any]) -> Any:
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]
