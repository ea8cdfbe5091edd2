"""`torch.autocast` around a call: its tensors are cast once, and no product inside is touched."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from .problem import Problem, Step

_Call = TypeVar("_Call", Problem, Step)


def is_on(device_type: str) -> bool:
    """Whether the caller is inside `torch.autocast` of this type of device."""
    # The meta device knows no autocast; asking what does would break torch 2.11's full graph.
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def cast(call: _Call, device_type: str) -> _Call:
    """The call as it is, or inside autocast with all but float64 in autocast's dtype, as for a
    matrix product."""
    if not is_on(device_type):
        return call
    dtype = torch.get_autocast_dtype(device_type)

    def cast_tensor(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor  # which `arguments.check` will name
        if not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(dtype)

    return call.map(cast_tensor)


def off(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context in which products are of the dtypes that their operands have: what `cast` has cast
    stays so, also in a derivative that is taken inside autocast."""
    device_type = tensor.device.type
    if not is_on(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
