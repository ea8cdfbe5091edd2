"""Mixed precision: autocast around the network, and the scaled loss that float16 needs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, get_args

import torch

from ..data import Batch, Split, collate
from ..errors import UserError, user_errors
from . import batches
from .model import Recognizer
from .options import Precision, RunOptions


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """A context for the network and its loss; `precision` as in `RunOptions`."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, precision))


def scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """A scaler of the loss that keeps float16's gradients from vanishing, and otherwise does
    nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "float16")


def check(recognizer: Recognizer, split: Split, run: RunOptions) -> None:
    """Tries the run's precision on one sample, before there is anything to lose.

    What an operation can do in a dtype depends on the device's kind, on its model and on PyTorch's
    build, so the operations themselves are asked. A network in training mode is tried with its
    gradients too. Its weights and batch norm's statistics stay as they are.

    Raises:
        UserError: the network works in another precision on its device, but not in this one; or
            the sample cannot be read.
    """
    if run.precision == "float32":
        return
    with user_errors():
        batch = collate([split[0]])
    error = _failure(recognizer, batch, run.precision)
    if error is None:
        return
    others = [name for name in get_args(Precision) if name != run.precision]
    working = [name for name in others if _failure(recognizer, batch, name) is None]
    if not working:
        raise error  # nothing that the precision is to blame for
    device = next(recognizer.parameters()).device
    reason = str(error).splitlines()[0].rstrip(".")
    raise UserError(
        f"--precision must be {' or '.join(working)} for --model.unit {run.model.unit} on this "
        f"{device.type}, but is {run.precision}, in which the network cannot be computed: {reason}"
    )


def _failure(recognizer: Recognizer, batch: Batch, precision: str) -> Exception | None:
    """The reason why a network cannot be computed in a precision; None where it can."""
    device = next(recognizer.parameters()).device
    inputs, _, lengths = batches.to_device(batch, device)
    training = recognizer.training
    try:
        # `forward`, not a call: torch.compile would compile for a batch of one.
        with torch.no_grad(), autocast(device, precision):
            if precision != "float32" and not torch.is_autocast_enabled(device.type):
                return RuntimeError(f"PyTorch has no autocast to it on {device.type}")
            recognizer.eval().forward(inputs, lengths)
        if training:
            # Some recurrent kernels give gradients in training mode only, and batch norm's
            # statistics would change in it.
            recognizer.mixer.train()
            with autocast(device, precision):
                loss = recognizer.forward(inputs, lengths).sum()
            loss.backward()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:  # ValueError: an engine without the dtype
        return error
    finally:
        recognizer.zero_grad()
        recognizer.train(training)
    return None
