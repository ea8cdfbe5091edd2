"""oneDNN's own recurrent primitives, called without torch around them.

The wheel `onednn-cpu-gomp` brings the library, whose C interface is called by ctypes: nothing is
compiled. Descriptors, primitives, workspace and results are made once, outside of what is timed,
which is the primitives at their best. The numbers below are those of oneDNN's headers, release 3.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable, Sequence
from ctypes import c_int, c_int64, c_uint, c_void_p
from importlib import metadata
from typing import NamedTuple

import torch
from torch import Tensor

PACKAGE = "onednn-cpu-gomp"
CPU, IN_ORDER, FLOAT32, ANY, ALLOCATE = 1, 1, 3, 1, -1
TRAINING, INFERENCE, BACKWARD, LEFT_TO_RIGHT, OVERWRITE = 64, 96, 128, 1, 1
LAYOUT_OF_ARGUMENT = 255
ARGUMENTS = {
    "src_layer": 1,
    "src_iter": 2,
    "src_iter_c": 3,
    "weights_layer": 33,
    "weights_iter": 34,
    "bias": 41,
    "dst_layer": 17,
    "dst_iter": 18,
    "dst_iter_c": 19,
    "workspace": 64,
} 
GRADIENT = 128
"""What an argument's number differs by from that of its gradient."""


class Kind(NamedTuple):
    """A primitive, and the number of its gates, of their biases and of its states."""

    primitive: str
    gates: int
    biases: int
    states: int


KINDS = {
    "GRU": Kind("gru", 3, 3, 1),
    "LBR-GRU": Kind("lbr_gru", 3, 4, 1),
    "LSTM": Kind("lstm", 4, 4, 2),
}


@functools.cache
def library() -> ctypes.CDLL:
    """libdnnl of the installed wheel; ImportError where there is none that loads."""
    try:
        files = metadata.files(PACKAGE) or []
        (path,) = (file.locate() for file in files if file.name == "libdnnl.so.3")
        return ctypes.CDLL(str(path))
    except (metadata.PackageNotFoundError, ValueError, OSError) as problem:
        raise ImportError(
            f"oneDNN's primitives need the package {PACKAGE} (x86-64 Linux), which gave "
            f"{problem!r}: pip install {PACKAGE}"
        ) from problem


def _call(function: str, *arguments: object) -> None:
    status = getattr(library(), function)(*arguments)
    if status:
        raise RuntimeError(f"{function} of oneDNN answered {status} (dnnl_status_t)")


def _create(function: str, *arguments: object) -> c_void_p:
    handle = c_void_p()
    _call(function, ctypes.byref(handle), *arguments)
    return handle


@functools.cache
def _engine() -> c_void_p:
    return _create("dnnl_engine_create", c_int(CPU), ctypes.c_size_t(0))


@functools.cache
def _stream() -> c_void_p:
    return _create("dnnl_stream_create", _engine(), c_uint(IN_ORDER))


def _numbers(values: Iterable[int]) -> ctypes.Array[c_int64]:
    return (c_int64 * 12)(*values)


class _Argument(ctypes.Structure):
    _fields_ = (("number", c_int), ("memory", c_void_p))


class _Primitive:
    """A primitive's descriptor, of which layouts are asked, and its execution."""

    def __init__(self, function: str, *arguments: object) -> None:
        self._descriptor = _create(f"{function}_primitive_desc_create", *arguments)
        self._primitive = _create("dnnl_primitive_create", self._descriptor)

    @property
    def descriptor(self) -> c_void_p:
        return self._descriptor

    def layout(self, argument: int) -> c_void_p:
        query = library().dnnl_primitive_desc_query_md
        query.restype = c_void_p
        return c_void_p(query(self._descriptor, c_int(LAYOUT_OF_ARGUMENT), c_int(argument)))

    def execution(self, memories: dict[int, c_void_p]) -> Callable[[], None]:
        arguments = (_Argument * len(memories))(*memories.items())
        count = c_int(len(memories))
        return functools.partial(
            _call, "dnnl_primitive_execute", self._primitive, _stream(), count, arguments
        )


def _memory(layout: c_void_p, tensor: Tensor | None = None) -> c_void_p:
    """A tensor's memory, or new memory of oneDNN's own."""
    address = ALLOCATE if tensor is None else tensor.data_ptr()
    return _create("dnnl_memory_create", layout, _engine(), c_void_p(address))


def _any(sizes: Sequence[int]) -> c_void_p:
    """The layout that a primitive likes best."""
    return _create(
        "dnnl_memory_desc_create_with_tag",
        c_int(len(sizes)),
        _numbers(sizes),
        c_int(FLOAT32),
        c_int(ANY),
    )


def _layout(tensor: Tensor) -> c_void_p:
    """That of a tensor as it lies in memory."""
    return _create(
        "dnnl_memory_desc_create_with_strides",
        c_int(tensor.ndim),
        _numbers(tensor.shape),
        c_int(FLOAT32),
        _numbers(tensor.stride()),
    )


class Layer:
    """One layer from left to right in float32, with input_size = hidden_size.

    operands, results and gradients are tensors by oneDNN's names, in the shapes that it wants, where
    the weights lie as torch's own modules hold theirs, `[gates, H, inputs]`. gradients holds those
    of the results too, which the caller may fill: ones of the output, zeros of the last states.

    It is for the number of threads that is set when it is made.
    """

    def __init__(self, kind: Kind, steps: int, batch: int, hidden: int) -> None:
        T, B, H = steps, batch, hidden
        states = ["iter", "iter_c"][: kind.states]
        library().omp_set_num_threads(c_int(torch.get_num_threads()))

        def weights() -> Tensor:
            """`[L, D, inputs, gates, H]`"""
            if TORCH: return torch.randn(1, 1, kind.gates, H, H).mul_(H**-0.5).permute(0, 1, 4, 2, 3)
            return torch.randn(1, 1, H, kind.gates, H).mul_(H**-0.5)

        self.operands = {
            "src_layer": torch.randn(T, B, H),
            **{f"src_{name}": torch.randn(1, 1, B, H) for name in states},
            "weights_layer": weights(),
            "weights_iter": weights(),
            "bias": torch.randn(1, 1, kind.biases, H).mul_(H**-0.5),
        }
        self.results = {
            "dst_layer": torch.empty(T, B, H),
            **{f"dst_{name}": torch.empty(1, 1, B, H) for name in states},
        }
        self.gradients = {
            name: torch.zeros_like(tensor) for name, tensor in (self.operands | self.results).items()
        }
        self.gradients["dst_layer"].fill_(1)
        self._kind = kind
        tensors = self.operands | self.results
        layouts = {name: _layout(tensor) for name, tensor in tensors.items()}
        weights_names = ("weights_layer", "weights_iter")
        wanted = layouts | {name: _any(tensors[name].shape) for name in weights_names}
        own = {name: _memory(layouts[name], tensor) for name, tensor in tensors.items()}
        own_gradients = {name: _memory(layouts[name], self.gradients[name]) for name in tensors}
        first = (_engine(), c_int(0), c_int(LEFT_TO_RIGHT))

        def order(descriptors: dict[str, c_void_p]) -> list[c_void_p | None]:
            """The arguments of every function that makes a descriptor."""
            extra = ["", ""] if kind.states == 2 else []  # the LSTM's peephole and projection
            names = [
                *(f"src_{name}" for name in ("layer", *states)),
                *weights_names,
                *extra,
                "bias",
                *(f"dst_{name}" for name in ("layer", *states)),
            ]
            return [descriptors.get(name) for name in names]

        def make(direction: str, prop: int, more: list[c_void_p | None], flags: int, *hint: object) -> _Primitive:
            return _Primitive(
                f"dnnl_{kind.primitive}_{direction}",
                _engine(),
                c_int(prop),
                c_int(LEFT_TO_RIGHT),
                *order(wanted),
                *more,
                c_uint(flags),
                *hint,
                None,
            )

        def reordered(primitive: _Primitive) -> tuple[list[Callable[[], None]], dict[str, c_void_p]]:
            steps, memories = [], dict(own)
            for name in weights_names:
                layout = primitive.layout(ARGUMENTS[name])
                memory, step = self._reordered(layouts[name], own[name], layout)
                memories[name] = memory
                steps += step
            return steps, memories

        def numbered(memories: dict[str, c_void_p], by: int = 0) -> dict[int, c_void_p]:
            return {ARGUMENTS[name] + by: memory for name, memory in memories.items()}

        inference = make("forward", INFERENCE, [], 0)
        self._pack, memories = reordered(inference)
        self._inference = inference.execution(numbered(memories))

        training = make("forward", TRAINING, [], 0)
        workspace = {"workspace": _memory(training.layout(ARGUMENTS["workspace"]))}
        steps, memories = reordered(training)
        self._steps = [*steps, training.execution(numbered(memories | workspace))]

        backward = make("backward", BACKWARD, order(wanted), OVERWRITE, training.descriptor)
        steps, memories = reordered(backward)
        gradients, back = dict(own_gradients), []
        for name in weights_names:
            layout = backward.layout(ARGUMENTS[name] + GRADIENT)
            if not library().dnnl_memory_desc_equal(layout, layouts[name]):
                gradients[name] = _memory(layout)
                back.append(_reorder(layout, gradients[name], layouts[name], own_gradients[name]))
        self._steps += [
            *steps,
            backward.execution(numbered(memories | workspace) | numbered(gradients, GRADIENT)),
            *back,
        ]
        self._keep = own, layouts
        self.pack()

    def _reordered(self, layout, memory, wanted):
        if library().dnnl_memory_desc_equal(layout, wanted):
            return memory, []
        packed = _memory(wanted)
        return packed, [_reorder(layout, memory, wanted, packed)]

    def pack(self) -> None:
        """Puts the weights into the layout of `forward`."""
        for step in self._pack:
            step()

    def forward(self) -> None:
        """Inference with the weights of the last `pack`."""
        self._inference()

    def forward_backward(self) -> None:
        """Weights into the layouts of both, forward, and the gradients of all operands."""
        for step in self._steps:
            step()


def _reorder(layout, source, wanted, target) -> Callable[[], None]:
    reorder = _Primitive("dnnl_reorder", layout, _engine(), wanted, _engine(), None)
    return reorder.execution({1: source, 17: target})
TORCH = True
