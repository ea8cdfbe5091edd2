"""The memory that a forward keeps for its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def saved_bytes(call: Callable[[], object], apart: Iterable[Tensor]) -> int:
    """Bytes of the memory that autograd keeps after a call, for its backward.

    Each storage counts once and whole, whatever views of it are kept, and so does the reserve of
    cuDNN or oneDNN, which is a tensor to autograd. The output counts where backward reads it.

    Args:
        apart: the parameters and operands, whose storages do not count: they are there anyway.
    """
    kept: list[Tensor] = []  # alive to the end, so that no two have the same address

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    there = {x.untyped_storage().data_ptr() for x in apart}
    return sum(size for address, size in storages.items() if address not in there)
