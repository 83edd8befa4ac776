"""A trained generator as a program for elsewhere: ONNX, or torch.export's; compared with the eager one on the spot."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectralnorm.errors import UserError
from spectralnorm.gan.sampling import TrainedGenerator
from spectralnorm.transform import remove_spectral_norm

__all__ = ["MAX_DIFFERENCE", "export_onnx", "export_program"]

MAX_DIFFERENCE = 1e-4
"""Of pixels in [-1, 1], whose levels are 1/127.5 apart; a program that is further off is not written."""
_OPSET = 18
# Where none is said, torch up to 2.7 asks networks whether they take 2^63 - 1 images.
_MAX_BATCH = 2**31 - 1
_EXAMPLE_BATCH = 2
_CHECKED_BATCHES = (1, 3, 8)
"""Others than the example's: a batch size that was frozen in would show."""


def export_onnx(generator: TrainedGenerator, path: Path) -> float:
    """Write an ONNX file of one's own weights, for any batch size, and run it with onnxruntime.

    Inputs: ``latents`` float32 ``(batch, latent_dim)``, and ``labels`` int64 ``(batch,)`` of a conditional generator.
    Output: ``images`` float32 ``(batch, channels, size, size)`` in [-1, 1].

    Returns:
        The largest difference of a pixel from the eager generator.

    Raises:
        UserError: the name does not end in ``.onnx``, a package of the extra ``export`` is missing, the network cannot
            be exported, or the file computes something else; then none is left.
        OSError: it cannot be written.
    """
    _require_suffix(path, ".onnx")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _require(package)

    def write(network: nn.Module, inputs: tuple[Tensor, ...], file: Path) -> None:
        names = ["latents", "labels"][: len(inputs)]
        torch.onnx.export(
            network,
            inputs,
            str(file),
            dynamo=True,
            verbose=False,
            opset_version=_OPSET,
            external_data=False,  # one file
            input_names=names,
            output_names=["images"],
            dynamic_shapes=_dynamic_shapes(inputs),
        )

    def read(file: Path) -> Callable[..., Tensor]:
        session = importlib.import_module("onnxruntime").InferenceSession(str(file), providers=["CPUExecutionProvider"])
        names = [given.name for given in session.get_inputs()]
        return lambda *inputs: torch.from_numpy(
            session.run(None, {name: given.numpy() for name, given in zip(names, inputs, strict=True)})[0]
        )

    return _export(generator, path, write, read)


def export_program(generator: TrainedGenerator, path: Path) -> float:
    """Write a ``.pt2`` file of `torch.export`, for any batch size, and run it; inputs and output as `export_onnx`.

    Returns:
        The largest difference of a pixel from the eager generator.

    Raises:
        UserError: the name does not end in ``.pt2``, the network cannot be exported, or the file computes something
            else; then none is left.
        OSError: it cannot be written.
    """
    _require_suffix(path, ".pt2")

    def write(network: nn.Module, inputs: tuple[Tensor, ...], file: Path) -> None:
        program = torch.export.export(network, inputs, dynamic_shapes=_dynamic_shapes(inputs), strict=False)
        torch.export.save(program, str(file))

    def read(file: Path) -> Callable[..., Tensor]:
        return torch.export.load(str(file)).module()

    return _export(generator, path, write, read)


class _Network(nn.Module):
    """The network with as many inputs as it uses, all of them named."""

    def __init__(self, network: nn.Module, *, conditional: bool) -> None:
        super().__init__()
        self.network = network
        self.conditional = conditional

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.network(latents, labels) if self.conditional else self.network(latents)


def _export(
    generator: TrainedGenerator,
    path: Path,
    write: Callable[[nn.Module, tuple[Tensor, ...], Path], None],
    read: Callable[[Path], Callable[..., Tensor]],
) -> float:
    # Baked: where it runs there is no training, and so nothing to normalize.
    network = remove_spectral_norm(copy.deepcopy(generator.network).cpu().float()).eval().requires_grad_(False)
    network = _Network(network, conditional=generator.config.conditional)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        try:
            with _silenced():
                write(network, _inputs(generator, _EXAMPLE_BATCH), temporary)
                run = read(temporary)
            difference = max(_difference(network, run, _inputs(generator, batch)) for batch in _CHECKED_BATCHES)
        except (OSError, UserError):
            raise
        except Exception as error:  # whatever an exporter, or what runs its file, meets in a network of one's own
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{type(generator.network).__name__} cannot be exported ({first}).") from error
        # Written so that NaN, which fails every comparison, is refused too.
        if not difference <= MAX_DIFFERENCE:
            raise UserError(
                f"The exported generator differs from the trained one by {difference:.3g}, and {MAX_DIFFERENCE:g} is "
                "the most that is allowed; nothing was written, choose another --format."
            )
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return difference


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """The exporters print, warn and log of their own affairs."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@torch.no_grad()
def _difference(network: nn.Module, run: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> float:
    expected, found = network(*inputs), run(*inputs)
    if expected.shape != found.shape:
        return float("inf")
    return float((expected - found).abs().max())


def _inputs(generator: TrainedGenerator, batch: int) -> tuple[Tensor, ...]:
    latents = generator.latents(batch, seed=batch)
    if not generator.config.conditional:
        return (latents,)
    return latents, torch.arange(batch) % len(generator.class_names)


def _dynamic_shapes(inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    batch = torch.export.Dim("batch", min=1, max=_MAX_BATCH)
    return {name: {0: batch} for name in ("latents", "labels")[: len(inputs)]}


def _require_suffix(path: Path, suffix: str) -> None:
    if path.suffix != suffix:
        raise UserError(f"The name of this file must end in {suffix}, got '{path}'.")


def _require(package: str) -> None:
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise UserError(
            f"ONNX needs the package '{cast(str, error.name)}'; install it with: pip install \"spectralnorm[export]\"."
        ) from error
