"""Who looks on at a call: whether it may pass by the dispatcher, and whether the ops can serve it.

Subclasses, modes, tracers, transforms and profilers see what goes through the dispatcher. What is
used of torch's private functions is looked up here; without one of them a call is dispatched.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import autocast

_logger = logging.getLogger(__name__)
_told: set[str] = set()
_is_profiled = getattr(torch.autograd, "_profiler_enabled", lambda: True)
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_functorch = getattr(torch._C, "_functorch", None)
_interpreters = getattr(_functorch, "get_interpreter_stack", lambda: None)
_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore: True)
_is_nested = attrgetter("is_nested")
_hooks_of_module = attrgetter(
    "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"
)
_global_hooks = getattr(nn.modules.module, "_has_any_global_hook", lambda: True)
_MOST_GUARDS = 16


class Plain(NamedTuple):
    """A kind of call that nothing looks on at, by the types, dtypes, devices, numbers of dimensions
    and requires_grad of its tensors."""

    guard: Any
    requires_grad: bool
    is_on_one_device: bool

    @property
    def needs_gradient(self) -> bool:
        """Whether autograd records the call."""
        return self.requires_grad and torch.is_grad_enabled()


_known: dict[int, list[Plain]] = {}
"""The kinds that were seen, by number of tensors, the last one first."""


def is_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether `plain` knows the call."""
    return plain(tensors) is not None


def plain(tensors: Sequence[Tensor]) -> Plain | None:
    """The kind of a call that nothing looks on at: no compiler, mode, transform, tracer, autocast
    or profiler; and no operand is of a subclass, or lazily negated or zero. Else None.

    Then the dispatcher, which costs a streaming step as much as its products, can be left out.
    Modes of __torch_function__ have seen the call before it comes here.
    """
    if torch.compiler.is_compiling() or getattr(forward_ad, "_current_level", 0) >= 0:
        return None
    # Guards do not look at the modes of torch's own tracers.
    if _dispatch_modes() or _is_profiled():
        return None
    try:
        if True in map(_is_nested, tensors):  # A guard that meets one ends the process.
            return None
    except AttributeError:  # of what is no tensor
        return None
    for kind in _known.get(len(tensors), ()):
        if kind.guard.check(*tensors):
            return kind
    return _learn(tensors)


def saved_tensors_have_hooks() -> bool:
    """Whether hooks of saved tensors are on, as in a checkpoint."""
    return _hooks(False) is not None


def is_forward_alone(module: nn.Module) -> bool:
    """Whether a call of the module is a call of its class's forward, without hooks, and neither
    compiled nor replaced."""
    try:
        hooks, is_compiled = _hooks_of_module(module), module._compiled_call_impl is not None
    except AttributeError:
        return False
    return not (any(hooks) or is_compiled or "forward" in module.__dict__ or _global_hooks())


def _learn(tensors: Sequence[Tensor]) -> Plain | None:
    """Looks at the dispatch keys of the thread and of the operands. Where they are the plain ones,
    a guard such as torch.compile has knows them again: all of them for the price of one."""
    different = list({id(tensor): tensor for tensor in tensors}.values())
    if len(different) < len(tensors):
        return plain(different)  # A guard takes the same tensor once.
    try:
        if _has_other_keys(tensors):
            return None
        any_size: list[Any] = [[None] * tensor.ndim for tensor in tensors]
        guard = torch._C._dynamo.guards.TensorGuards(
            *tensors, dynamic_dims_sizes=any_size, dynamic_dims_strides=any_size
        )
    except (AttributeError, TypeError):
        return None
    requires_grad = any(tensor.requires_grad for tensor in tensors)
    kind = Plain(guard, requires_grad, len({tensor.device for tensor in tensors}) == 1)
    known = _known.setdefault(len(tensors), [])
    known.insert(0, kind)
    del known[_MOST_GUARDS:]
    return kind


def _has_other_keys(tensors: Sequence[Tensor]) -> bool:
    if autocast.is_on(tensors[0].device.type):
        return True
    of_thread = torch._C._dispatch_tls_local_include_set()
    plain = _keys("BackendSelect")
    if of_thread | plain != plain:
        return True
    for tensor in tensors:
        backend = tensor.device.type.upper()
        plain = _keys(backend, f"Autograd{backend}", f"Autocast{backend}")
        if type(tensor) not in (Tensor, nn.Parameter):
            return True
        if torch._C._dispatch_keys(tensor) | plain != plain:
            return True
    return False


@functools.cache
def _keys(*names: str) -> Any:
    """The keys of these names, and that of views and changes in place."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
    for name in names:
        keys |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    return keys


def needs_equations(is_compiling: bool) -> bool:
    """Whether a tool looks on that the ops have no rule for, so that a call has to be made of
    ordinary operations. The logger of this module tells at level DEBUG, once for each tool."""
    tool = None
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
        tool = "torch.onnx.export(dynamo=False)"
    elif _dual_level_is_open():
        tool = "forward-mode differentiation"
    elif is_differentiated_by_functorch():
        if is_compiling:
            tool = "torch.compile of torch.func's differentiation"
        elif "Functionalize" in _transforms():
            tool = "torch.func.functionalize of torch.func's differentiation"
    if tool is not None and tool not in _told:
        _told.add(tool)
        _logger.debug("%s has no rule for the fused ops: the reference's equations follow", tool)
    return tool is not None


def is_transformed() -> bool:
    """Whether a tracer, forward-mode differentiation or a transform of torch.func looks on."""
    return torch.jit.is_tracing() or _dual_level_is_open() or _interpreters() is not None


def a_mode_looks_on() -> bool:
    """Whether a TorchDispatchMode, such as a counter of operations, is on."""
    return not torch.compiler.is_compiling() and _dispatch_modes() > 0


def _dual_level_is_open() -> bool:
    """Whether forward-mode differentiation looks on."""
    level = getattr(forward_ad, "_current_level", None)
    if level is not None:
        return bool(level >= 0)
    number = torch.zeros(())
    try:
        forward_ad.make_dual(number, number)
    except RuntimeError:
        return False
    return True


def is_differentiated_by_functorch() -> bool:
    """Whether a level of `torch.func.grad`, `vjp` or `jacrev` is open."""
    return "Grad" in _transforms()


def is_batched() -> bool:
    """Whether a level of `torch.vmap` is open."""
    return "Vmap" in _transforms()


def _transforms() -> set[str]:
    """The kinds of the open levels of torch.func."""
    return {interpreter.key().name for interpreter in _interpreters() or ()}


# torch.compile takes the answers as they are, and guards levels and transforms by itself. This is
# the mark that torch.compiler.assume_constant_result sets, which would import the compiler.
_constants: tuple[Any, ...] = (
    needs_equations,
    is_differentiated_by_functorch,
    is_batched,
    is_transformed,
)
for _constant in _constants:
    _constant._dynamo_marked_constant = True
