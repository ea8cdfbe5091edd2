"""Several processes as one training: torchrun starts them, torch.distributed connects them.

Where torchrun did not start the process it is alone: world 1, rank 0, and nothing is exchanged.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..errors import UserError


def world() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if _connected() else 1


def rank() -> int:
    """The number of this process, from 0; before and after `job` too."""
    if _connected():
        return dist.get_rank()
    return int(os.environ["RANK"]) if _launched() else 0


def is_first() -> bool:
    """True in the one process that writes files and prints."""
    return rank() == 0


@contextmanager
def job(device: torch.device) -> Iterator[None]:
    """Connects the processes that torchrun started, on one machine or many.

    What the processes agree on goes through gloo, gradients on a GPU through NCCL.
    """
    if not _launched():
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    yield
    # After an exception the others may be in a collective: leaving the process is what ends it.
    dist.destroy_process_group()


@contextmanager
def silence_other_ranks() -> Iterator[None]:
    """Lets one process per machine print, around what every process does alike before `job`."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        yield
        return
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        try:
            yield
        except UserError as error:
            raise SystemExit(2) from error


@contextmanager
def fail_together() -> Iterator[None]:
    """Ends every process where one of them raises UserError, and lets the first of those raise it;
    it belongs around work without collectives."""
    error: UserError | None = None
    try:
        yield
    except UserError as raised:
        error = raised
    texts = gather(None if error is None else str(error))
    failed = [number for number, text in enumerate(texts) if text is not None]
    if not failed:
        return
    if error is None or rank() != failed[0]:
        raise SystemExit(2)
    if len(set(texts)) > 1:
        raise UserError(f"process {rank()}: {error}") from error
    raise error


def reported_once(error: UserError) -> BaseException:
    """The exception to raise where every process has the same error, so that one of them reports
    it."""
    return error if is_first() else SystemExit(2)


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank; plain types, or tensors on the CPU."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Waits until every process is here."""
    gather(None)


def broadcast(tensors: Sequence[Tensor]) -> None:
    """Gives every process the first one's values, in place."""
    if world() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def own_device(device: torch.device) -> torch.device:
    """This process's GPU where the device is `cuda`: that of its number on the machine.

    Raises:
        UserError: a GPU is named by its index for several processes, or there are more processes
            than GPUs.
    """
    if device.type != "cuda" or not _launched():
        return device
    if device.index is not None:
        raise UserError(
            f"--device must be cuda for several processes, so that each takes the GPU of its "
            f"number, but is {device}"
        )
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= count:
        raise UserError(
            f"process {local} of this machine needs a GPU of its own, but there are {count}: "
            f"start torchrun with --nproc-per-node {count}"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def seed(number: int) -> None:
    """Seeds the process's random numbers; the first process has those of a process alone."""
    if rank() > 0:
        sequence = np.random.SeedSequence((number, rank()))
        number = int(sequence.generate_state(1, np.uint64).view(np.int64)[0])
    torch.manual_seed(number)


class _Share(nn.Module):
    """The model on a process's share of a step; without samples it gives a loss of 0 with gradients
    of 0, so that the process takes part in the sums over all."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Sequence[Tensor] | None, lengths: Tensor | None) -> Tensor:
        """Logits of the inputs, or the loss of 0 where they are None."""
        if inputs is not None:
            return self.model(inputs, lengths)
        return 0 * torch.stack([parameter.sum() for parameter in self.model.parameters()]).sum()


def replica(model: nn.Module) -> nn.Module:
    """`(inputs, lengths) -> logits` whose gradients are the mean over the processes.

    `(None, None)`, for a share without samples, gives a loss of 0 instead.
    """
    if world() == 1:
        return model
    shared = DistributedDataParallel(_Share(model))
    # DDP lays its buckets out anew after its first backward, and sums of more than two numbers
    # depend on the layout: this backward makes it the same for a start and for a resume.
    shared(None, None).backward()
    model.zero_grad()
    return shared


def synchronized(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """A context for forward and backward of a `replica`, in which only the last ones before an
    update reduce gradients."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def _launched() -> bool:
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def _connected() -> bool:
    return dist.is_available() and dist.is_initialized()
