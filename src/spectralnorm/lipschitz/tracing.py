"""Which operations a model performs on its input: what every one of several runs of it shows (`recording`)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm

from spectralnorm.errors import UserError
from spectralnorm.lipschitz.agreement import refuse_disagreement
from spectralnorm.lipschitz.graph import Graph
from spectralnorm.lipschitz.recording import Record, record, refuse_changed

__all__ = ["trace"]

# Batch sizes to record with. No other size may be a multiple of it, or samples could be mixed unseen; and the last ones
# divide by four, for layers that form groups of samples.
_BATCH_SIZES = (7, 11, 13, 17, 19, 23, 44, 52, 68, 76, 92)


def trace(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    mode: str,
    num_classes: int | None,
    is_whole: Callable[[nn.Module], bool],
    batch_sizes: Sequence[int] = _BATCH_SIZES,
    is_known: bool = False,
) -> Graph:
    """Run a copy of ``model`` without values and record what it does: twice, to see that it does the same every time.

    With labels also on samples that all have the first one, or the last.

    Args:
        model: stays as it is.
        input_shape: of one sample.
        mode: ``"eval"`` or ``"train"``; parametrizations keep still in both.
        num_classes: labels ``0 ... num_classes - 1`` are its second argument; None: it takes the input alone.
        is_whole: whether a module is one node, because there is a rule for its class.
        batch_sizes: to try, each for every class.
        is_known: that the model was recorded before, so that one run will do, and other dimensions may look like the
            batch. Nothing can be proved of such a graph.

    Raises:
        UserError: something cannot be recorded; the message says where and why.
    """
    model = _copied(model, mode)
    # What is looked into in the first run is so in all: a convolution within may learn the size of its images there.
    whole = {id(module) for module in model.modules() if is_whole(module)}
    run = functools.partial(
        record,
        model,
        input_shape,
        is_whole=lambda module: id(module) in whole and is_whole(module),
        is_labelled=num_classes is not None,
        is_known=is_known,
    )
    records: list[Record] = []
    chosen: Record | None = None
    refused: Exception | None = None
    for base in batch_sizes:
        labels = torch.arange(base * (num_classes or 1)) % (num_classes or 1)
        try:
            found = run(labels)
        except UserError:
            raise
        except Exception as error:
            # Some layers want whole groups of samples: another batch size may do.
            refused = refused or error
            continue
        if is_known:
            return found.graph
        records.append(found)
        if chosen is None and found.ambiguous is None:
            chosen = found
        if chosen is not None and len(records) > 1:
            # As many as in a record beside the chosen one: of the same size they could not be compared.
            compared = next(each.labels for each in records if each is not chosen)
            of_one_label = [torch.full_like(compared, label) for label in sorted({0, (num_classes or 1) - 1})]
            for same in of_one_label if num_classes not in (None, 1) else []:
                try:
                    records.append(run(same))
                except UserError:
                    raise
                except Exception as error:
                    raise UserError(
                        f"certify could not run the model on samples that all have the label {int(same[0])}: "
                        f"{type(error).__name__}: {error}"
                    ) from error
            refuse_changed(records)
            for other in records:
                if other is not chosen:
                    refuse_disagreement(chosen.graph, other.graph, (chosen.labels, other.labels))
            return chosen.graph
    if chosen is not None:
        raise UserError(
            f"certify could run the model on {chosen.graph.batch_size} samples and on no other number that it tried, "
            "so what it does to one is not known; let forward take batches of any size."
        )
    if refused is None:
        raise UserError(
            f"certify refuses {records[-1].ambiguous}: the batch moves to another dimension than the first; keep it "
            "there."
        )
    raise UserError(
        f"certify could not run the model on a batch of inputs of shape {tuple(input_shape)}: "
        f"{type(refused).__name__}: {refused}"
    ) from refused


def _copied(model: nn.Module, mode: str) -> nn.Module:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UserError(
                f"certify cannot look into the scripted module {name!r}; give it the module it was made from."
            )
    try:
        copied = copy.deepcopy(getattr(model, "_orig_mod", model)).eval()
    except Exception as error:  # torch's older weight_norm keeps one that has a gradient's history
        reason = str(error).partition(". ")[0]
        raise UserError(
            f"certify could not copy the model ({reason}); make the tensors that it keeps under "
            "torch.no_grad(), by calling it there once."
        ) from error
    if mode == "train":
        copied.train()
        for module in copied.modules():
            hooks = module._forward_pre_hooks.values()
            if isinstance(module, parametrize.ParametrizationList) or any(isinstance(h, SpectralNorm) for h in hooks):
                module.eval()
    return copied
