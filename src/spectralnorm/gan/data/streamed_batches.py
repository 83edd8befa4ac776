"""Shuffled batches of images that are read while training goes on."""

from __future__ import annotations

import os
import queue
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.gan.data.batches import Batch, Batches
from spectralnorm.gan.data.decode import UnreadableError
from spectralnorm.gan.data.image_set import ImageSet, digest
from spectralnorm.gan.data.prepare import MOST_UNREADABLE
from spectralnorm.gan.data.stream import ImageStream, epoch_order
from spectralnorm.gan.data.stream_cache import Kept, StreamCache
from spectralnorm.gan.data.summary import Unreadable, printable

__all__ = ["StreamedBatches", "open_batches"]

_BUFFER_IMAGES = 2**14
_BUFFER_BYTES = 2**29
# A thread takes so many images at a time, since handing over costs as much as a small image does.
_TASK = 16
# Fewer images say nothing about what share is unreadable.
_LEAST_JUDGED = 256
_COPY = "equals a held-out image"


class StreamedBatches(Iterator[Batch]):
    """Batches of a streamed set, without end, with the face of `Batches`.

    Every epoch takes each image once, but for those that cannot be read and those that equal a held-out one, which
    are skipped; batches are always full. An image that the set keeps on disk is read there and not decoded again, which
    changes no bit. The order is that of `spectralnorm.gan.data.stream.epoch_order`. Threads
    read ahead by a buffer of at most 16,384 images and 512 MB. The first batch waits until it is filled, also when a
    run goes on; from then on epochs go over into each other.

    Args:
        stream: the images.
        batch_size: at most their number.
        seed: of the order.
        device: where the batches are wanted.
        with_labels: whether batches bring labels.
        buffer: images that are kept read; None: as many as fit. The order depends on it.
        num_threads: that decode; None: as many as there are cores, at most 8.

    Raises:
        UserError: the batch is larger than the data; while reading, more than 5 % of the images cannot be read.
    """

    def __init__(
        self,
        stream: ImageStream,
        *,
        batch_size: int,
        seed: int,
        device: torch.device | str,
        with_labels: bool = False,
        buffer: int | None = None,
        num_threads: int | None = None,
    ) -> None:
        if not 1 <= batch_size <= stream.num_training:
            raise UserError(
                f"a batch of {batch_size:,} cannot be taken from {stream.num_training:,} training images; "
                f"choose a batch size from 1 to {stream.num_training:,}, or give more images."
            )
        self._stream = stream
        self._labels = stream.labels if with_labels else None
        self._batch_size = batch_size
        self._seed = seed
        self._device = torch.device(device)
        image_bytes = stream.channels * stream.image_size**2
        fits = min(_BUFFER_IMAGES, max(1, _BUFFER_BYTES // image_bytes))
        self._buffer = min(fits if buffer is None else buffer, stream.num_training)
        self._num_threads = min(8, os.cpu_count() or 1) if num_threads is None else num_threads
        self._drawn = 0
        self._reader: _Reader | None = None
        self._failed: dict[int, str] = {}
        self._told_problem = False

    @property
    def unreadable(self) -> tuple[Unreadable, ...]:
        """Images that were met so far in this process and could not be read."""
        return tuple(
            Unreadable(file=printable(self._stream.file_name(index)), reason=printable(reason))
            for index, reason in self._failed.items()
        )

    def __next__(self) -> Batch:
        """The next batch, on the device."""
        if self._reader is None:
            self._reader = _Reader(
                self._stream,
                buffer=self._buffer,
                spare=self._batch_size,
                seed=self._seed,
                drawn=self._drawn,
                num_threads=self._num_threads,
            )
        slots = np.empty(0, np.int64)
        indices = np.empty(0, np.int64)
        skipped = 0
        while len(slots) < self._batch_size:
            taken = self._reader.take(self._batch_size - len(slots))
            for place, problem in taken.problems.items():
                skipped += 1
                self._drawn += place + 1
                if problem != _COPY:
                    self._note(int(taken.indices[place]), problem)
                self._drawn -= place + 1
            self._drawn += len(taken.indices)
            if skipped > 2 * self._stream.num_training:
                raise UserError(f"all images of {self._stream.name!r} are among the held-out ones; give others too.")
            good = np.ones(len(taken.slots), bool)
            good[list(taken.problems)] = False
            self._reader.free(taken.slots[~good])
            slots, indices = np.append(slots, taken.slots[good]), np.append(indices, taken.indices[good])
        self._tell_problem()
        shape = (len(slots), *self._reader.store.shape[1:])
        # Pinned memory is copied while the CPU goes on; torch keeps it until the copy is done.
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        torch.index_select(self._reader.store, 0, torch.from_numpy(slots), out=images)
        self._reader.free(slots)
        labels = None if self._labels is None else self._to_device(self._labels[torch.from_numpy(indices)])
        return Batch(self._to_device(images).to(torch.float32).div_(127.5).sub_(1), labels)

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands: a few integers."""
        return {**self._identity(), "drawn": self._drawn}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from where `state_dict` was taken; the batch size may have changed.

        Raises:
            UserError: the state belongs to another number of images, another seed or another buffer.
        """
        expected = self._identity()
        given = {name: state.get(name) for name in expected}
        if given != expected:
            raise UserError(f"the order of batches was saved for {given} and cannot go on with {expected}.")
        self.close()
        self._drawn = state["drawn"]

    def close(self) -> None:
        """End the threads; a later batch starts them again."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _identity(self) -> dict[str, int]:
        return {"seed": self._seed, "num_images": self._stream.num_training, "buffer": self._buffer}

    def _to_device(self, part: Tensor) -> Tensor:
        if self._device.type == "cuda" and not part.is_pinned():
            part = part.pin_memory()
        return part.to(self._device, non_blocking=True)

    def _tell_problem(self) -> None:
        kept = self._stream.kept
        if not self._told_problem and isinstance(kept, StreamCache) and kept.problem is not None:
            self._told_problem = True
            warnings.warn(
                f"no more decoded images of {self._stream.name!r} are kept in {str(kept.path)!r} ({kept.problem}); "
                "training goes on, and those that are missing there are decoded in every epoch.",
                stacklevel=3,
            )

    def _note(self, index: int, reason: str) -> None:
        name = printable(self._stream.file_name(index))
        if not self._failed:
            warnings.warn(
                f"{name!r} cannot be read ({printable(reason)}) and is skipped, as are others, up to "
                f"{MOST_UNREADABLE:.0%}.",
                stacklevel=3,
            )
        self._failed[index] = reason
        seen = min(self._drawn, self._stream.num_training)
        if len(self._failed) > MOST_UNREADABLE * max(seen, min(_LEAST_JUDGED, self._stream.num_training)):
            raise UserError(
                f"{len(self._failed):,} of the first {seen:,} images of {self._stream.name!r} cannot be read, more "
                f"than {MOST_UNREADABLE:.0%} ({name!r}: {printable(reason)}); replace or remove them."
            )


def open_batches(
    images: ImageSet | ImageStream,
    *,
    batch_size: int,
    seed: int,
    device: torch.device | str,
    with_labels: bool = False,
) -> Batches | StreamedBatches:
    """Shuffled batches without end, of images in memory, on disk, or read while training goes on.

    Args:
        images: what to train on.
        batch_size: at most their number.
        seed: of the order.
        device: where the batches are wanted.
        with_labels: whether batches bring labels; ``images.require_labels()`` makes sure that there are.

    Raises:
        UserError: the batch is larger than the data.
    """
    if isinstance(images, ImageStream):
        return StreamedBatches(images, batch_size=batch_size, seed=seed, device=device, with_labels=with_labels)
    labels = images.labels if with_labels else None
    return Batches(images.images, labels, batch_size=batch_size, seed=seed, device=device)


class _Taken(NamedTuple):
    """Images that follow one another in the order, and were read or not."""

    indices: np.ndarray
    """int64 (num,)."""
    slots: np.ndarray
    """int64 (num,): where their pixels lie in the reader's store, until they are freed."""
    problems: dict[int, str]
    """By their place here: why some are skipped."""


class _Reader:
    """Reads ahead from a place in the order, into slots of one tensor.

    Args:
        stream: the images.
        buffer: images that are read ahead.
        spare: slots that may be taken and not yet freed, on top.
        seed: of the order.
        drawn: images that were handed out before.
        num_threads: that decode.
    """

    def __init__(
        self, stream: ImageStream, *, buffer: int, spare: int, seed: int, drawn: int, num_threads: int
    ) -> None:
        size = (buffer + spare + _TASK, stream.channels, stream.image_size, stream.image_size)
        self.store = torch.empty(size, dtype=torch.uint8)
        self._pixels = self.store.numpy()
        self._stream, self._seed, self._buffer = stream, seed, buffer
        self._num = stream.num_training
        self._free = deque(range(len(self.store)))
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        # Whole batches are looked up in arrays, since a step of Python for each image is what small networks wait for.
        # Reading is never more than one epoch ahead, so two rows do.
        self._slot_of = np.zeros((2, self._num), np.int64)
        self._is_read = np.zeros(len(self.store), bool)
        self._task_of: list[_Task | None] = [None] * len(self.store)
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        # What Pillow says of odd metadata is not for the terminal; its own way to silence it is not safe with threads.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        stopped = threading.Event()
        arguments = (self._tasks, stopped, stream, self._pixels, self._is_read)
        # They hold no reference to the reader. Daemons, since Python waits for others before it ends anything at exit.
        threads = [threading.Thread(target=_work, args=arguments, daemon=True) for _ in range(num_threads)]
        for thread in threads:
            thread.start()
        self.close = weakref.finalize(self, _stop, self._tasks, stopped, threads)
        epoch, done = divmod(drawn, self._num)
        reading, handing = self._order(epoch)
        until = min(done + buffer, self._num)
        missing = np.ones(self._num, bool)
        missing[handing[:done]] = False
        part = reading[:until]
        self._submit(epoch, part[missing[part]])
        self._read = epoch * self._num + until
        self._taken = drawn

    def take(self, most: int) -> _Taken:
        """The next images of the order, at least one and at most so many; waits until they are read."""
        epoch, place = divmod(self._taken, self._num)
        num = min(most, self._num - place)
        # Epochs follow one another in the order of reading, too, so that none begins with an empty buffer.
        while self._read < self._taken + num - 1 + self._buffer:
            epoch_read, start = divmod(self._read, self._num)
            part = self._order(epoch_read)[0][start : start + _TASK]
            self._submit(epoch_read, part)
            self._read += len(part)
        indices = self._order(epoch)[1][place : place + num]
        slots = self._slot_of[epoch % 2, indices]
        self._taken += num
        problems: dict[int, str] = {}
        # What was read without a problem needs no further look.
        for place in np.flatnonzero(~self._is_read[slots]).tolist():
            slot = int(slots[place])
            task = self._task_of[slot]
            assert task is not None
            problem = task.future.result()[task.slots.index(slot)]
            if problem is not None:
                problems[place] = problem
        return _Taken(indices, slots, problems)

    def free(self, slots: np.ndarray) -> None:
        """Let others use these slots."""
        self._free.extend(slots.tolist())

    def _submit(self, epoch: int, indices: np.ndarray) -> None:
        for start in range(0, len(indices), _TASK):
            part = indices[start : start + _TASK]
            task = _Task(part.tolist(), [self._free.popleft() for _ in part], Future())
            self._slot_of[epoch % 2, part] = task.slots
            self._is_read[task.slots] = self._is_read_at_once(task)
            if self._is_read[task.slots[0]]:
                continue
            for slot in task.slots:
                self._task_of[slot] = task
            self._tasks.put(task)

    def _is_read_at_once(self, task: _Task) -> bool:
        """Read what lies in memory already: handing it to a thread costs a small network more than that."""
        kept = self._stream.kept
        found = kept.read_at_once(task.indices) if isinstance(kept, StreamCache) else None
        if found is None or not self._stream.held_out_digests.isdisjoint(found[1]):
            return False
        self._pixels[task.slots] = found[0]
        return True

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if epoch not in self._orders:
            self._orders.pop(epoch - 2, None)
            self._orders[epoch] = epoch_order(self._stream.starts, buffer=self._buffer, seed=self._seed, epoch=epoch)
        return self._orders[epoch]


class _Task(NamedTuple):
    """Images that one thread reads, one after another."""

    indices: list[int]
    slots: list[int]
    future: Future[list[str | None]]
    """For each None, or why it is skipped."""


def _work(
    tasks: queue.SimpleQueue[_Task | None],
    stopped: threading.Event,
    stream: ImageStream,
    store: np.ndarray,
    is_read: np.ndarray,
) -> None:
    """What a thread does until it finds None among its tasks, or is stopped."""
    while (task := tasks.get()) is not None:
        problems: list[str | None] = []
        try:
            found = _kept(stream, task.indices)
            for index, slot, image in zip(task.indices, task.slots, found, strict=True):
                if stopped.is_set():
                    return
                problems.append(_read_into(store[slot], stream, index, image))
            # Before the result: once that is seen, others may have the slots.
            is_read[task.slots] = [problem is None for problem in problems]
            task.future.set_result(problems)
        # Whatever it is, it belongs to the one who waits.
        except BaseException as error:
            task.future.set_exception(error)


def _kept(stream: ImageStream, indices: list[int]) -> Sequence[Kept | None]:
    return stream.kept.read(indices) if isinstance(stream.kept, StreamCache) else [None] * len(indices)


def _read_into(place: np.ndarray, stream: ImageStream, index: int, image: Kept | None) -> str | None:
    if image is None:
        try:
            pixels = stream.read(index).pixels
        except UnreadableError as error:
            return str(error) or type(error).__name__
        image = Kept(pixels, digest(pixels))
        if isinstance(stream.kept, StreamCache):
            stream.kept.write(index, image)
    if image.digest in stream.held_out_digests:
        return _COPY
    place[:] = image.pixels
    return None


def _stop(tasks: queue.SimpleQueue[_Task | None], stopped: threading.Event, threads: list[threading.Thread]) -> None:
    """End the threads, each after the image it is at. One that outlived the interpreter would take it down."""
    stopped.set()
    for _ in threads:
        tasks.put(None)
    for thread in threads:
        # The garbage collector may have called this from any thread.
        if thread is not threading.current_thread():
            thread.join(timeout=30)
