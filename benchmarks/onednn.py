"""oneDNN's own recurrent primitives, called without torch around them.

The package `onednn-cpu-gomp` brings the library, whose C interface ctypes calls: nothing is
compiled. Descriptors, primitives, workspace and results are made once, outside of what is timed,
which is the primitives at their best. Numbers without a name are those of oneDNN 3's headers.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable
from ctypes import c_int, c_int64, c_uint, c_void_p
from importlib import metadata

import torch
from torch import Tensor

PACKAGE = "onednn-cpu-gomp"
CPU, IN_ORDER, LEFT_TO_RIGHT, FLOAT32, ANY, ALLOCATE = 1, 1, 1, 3, 1, -1
TRAINING, INFERENCE, BACKWARD = 64, 96, 128
OVERWRITE = 1
"""Gradients of weights are written, not added to what is there."""
ARGUMENT_LAYOUT = 255
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
"""What an argument's number is below that of its gradient."""
WEIGHTS = ("weights_layer", "weights_iter")

Step = Callable[[], None]


@functools.cache
def library() -> ctypes.CDLL:
    """The package's libdnnl; ImportError where there is none that loads."""
    try:
        files = metadata.files(PACKAGE) or []
        (path,) = (file.locate() for file in files if file.name == "libdnnl.so.3")
        loaded = ctypes.CDLL(str(path))
    except (metadata.PackageNotFoundError, ValueError, OSError) as problem:
        raise ImportError(
            f"oneDNN's primitives are those of {PACKAGE}, which x86-64 Linux has: "
            f"pip install {PACKAGE} ({problem!r})"
        ) from problem
    loaded.dnnl_primitive_desc_query_md.restype = c_void_p
    return loaded


def _call(function: str, *arguments: object) -> None:
    status = getattr(library(), function)(*arguments)
    if status:
        raise RuntimeError(f"{function} must answer 0, but answers {status} (dnnl_status_t)")


class Handle(c_void_p):
    """An object of oneDNN's, which ends with its last reference here."""


def _create(function: str, *arguments: object) -> Handle:
    handle = Handle()
    _call(function, ctypes.byref(handle), *arguments)
    kind, _, _ = function.partition("_create")
    kind = "dnnl_primitive_desc" if kind.endswith("_primitive_desc") else kind
    destroy = getattr(library(), f"{kind}_destroy")
    weakref.finalize(handle, destroy, c_void_p(handle.value)).atexit = False
    return handle


@functools.cache
def _engine() -> Handle:
    return _create("dnnl_engine_create", c_int(CPU), ctypes.c_size_t(0))


@functools.cache
def _stream() -> Handle:
    return _create("dnnl_stream_create", _engine(), c_uint(IN_ORDER))


def _layout(tensor: Tensor) -> Handle:
    """A tensor's layout, as it lies in memory."""
    Numbers = c_int64 * tensor.ndim
    sizes, strides = Numbers(*tensor.shape), Numbers(*tensor.stride())
    function = "dnnl_memory_desc_create_with_strides"
    return _create(function, c_int(tensor.ndim), sizes, c_int(FLOAT32), strides)


def _any_layout(tensor: Tensor) -> Handle:
    """The layout that a primitive asks for."""
    sizes = (c_int64 * tensor.ndim)(*tensor.shape)
    function = "dnnl_memory_desc_create_with_tag"
    return _create(function, c_int(tensor.ndim), sizes, c_int(FLOAT32), c_int(ANY))


def _memory(layout: c_void_p, tensor: Tensor | None = None) -> Handle:
    """A tensor's memory, or memory of oneDNN's own."""
    address = ALLOCATE if tensor is None else tensor.data_ptr()
    return _create("dnnl_memory_create", layout, _engine(), c_void_p(address))


class _Argument(ctypes.Structure):
    _fields_ = (("number", c_int), ("memory", c_void_p))


class _Primitive:
    """A primitive by the function that makes its descriptor."""

    def __init__(self, function: str, *arguments: object) -> None:
        self.descriptor = _create(f"{function}_primitive_desc_create", *arguments)
        self._primitive = _create("dnnl_primitive_create", self.descriptor)

    def layout(self, argument: int) -> c_void_p:
        """The layout of an argument that the primitive asks for."""
        query = library().dnnl_primitive_desc_query_md
        return c_void_p(query(self.descriptor, c_int(ARGUMENT_LAYOUT), c_int(argument)))

    def step(self, memories: dict[int, Handle]) -> Step:
        """The execution on memories by the number of their argument."""
        arguments = (_Argument * len(memories))(*(_Argument(*x) for x in memories.items()))
        count = c_int(len(memories))

        def execute(_keep: object = (self, memories)) -> None:
            _call("dnnl_primitive_execute", self._primitive, _stream(), count, arguments)

        return execute


def _reorder(source: Handle, layout: c_void_p, target: Handle, wanted: c_void_p) -> Step:
    """The copy from one memory and its layout into another."""
    primitive = _Primitive("dnnl_reorder", layout, _engine(), wanted, _engine(), None)
    return primitive.step({ARGUMENTS["src_layer"]: source, ARGUMENTS["dst_layer"]: target})


class Layer:
    """One layer from left to right in float32, for the number of threads that torch has now.

    Args:
        primitive: "gru", "lbr_gru" or "lstm".
        operands: tensors by oneDNN's names, in its order and with its sizes, which are read where
            they lie. Weights may have any strides.

    results has the tensors that a call writes, gradients the ones of the operands, and of the
    results what `forward_backward` begins with: ones of the output, zeros of the last states.
    """

    def __init__(self, primitive: str, operands: dict[str, Tensor]) -> None:
        # A wheel's libgomp may be another one than torch's.
        library().omp_set_num_threads(c_int(torch.get_num_threads()))
        states = {name.replace("src", "dst"): x for name, x in operands.items() if "src" in name}
        self.operands = operands
        self.results = {name: torch.empty_like(x) for name, x in states.items()}
        tensors = operands | self.results
        self.gradients = {name: torch.zeros_like(x) for name, x in tensors.items()}
        self.gradients["dst_layer"].fill_(1)

        layouts = {name: _layout(x) for name, x in tensors.items()}
        memories = {name: _memory(layouts[name], x) for name, x in tensors.items()}
        gradients = {name: _memory(layouts[name], x) for name, x in self.gradients.items()}
        arguments: list[Handle | None] = [
            _any_layout(x) if name in WEIGHTS else layouts[name] for name, x in tensors.items()
        ]
        if primitive == "lstm":  # which may have peepholes and a projection
            place = list(tensors).index("bias")
            arguments[place:place] = [None, None]

        def make(way: str, kind: int, *more: object) -> _Primitive:
            first = _engine(), c_int(kind), c_int(LEFT_TO_RIGHT)
            return _Primitive(f"dnnl_{primitive}_{way}", *first, *arguments, *more, None)

        def packed(primitive: _Primitive) -> tuple[list[Step], dict[str, Handle]]:
            """The steps that bring the weights into the primitive's layouts, and all memories."""
            steps, where = [], dict(memories)
            for name in WEIGHTS:
                wanted = primitive.layout(ARGUMENTS[name])
                if not library().dnnl_memory_desc_equal(wanted, layouts[name]):
                    where[name] = _memory(wanted)
                    steps.append(_reorder(memories[name], layouts[name], where[name], wanted))
            return steps, where

        inference = make("forward", INFERENCE, c_uint(0))
        steps, where = packed(inference)
        for step in steps:
            step()
        self._inference = inference.step(_numbered(where))

        training = make("forward", TRAINING, c_uint(0))
        workspace = {"workspace": _memory(training.layout(ARGUMENTS["workspace"]))}
        steps, where = packed(training)
        self._steps = [*steps, training.step(_numbered(where | workspace))]

        backward = make("backward", BACKWARD, *arguments, c_uint(OVERWRITE), training.descriptor)
        steps, where = packed(backward)
        unpack = []
        for name in WEIGHTS:
            layout = backward.layout(ARGUMENTS[name] + GRADIENT)
            if not library().dnnl_memory_desc_equal(layout, layouts[name]):
                memory = _memory(layout)
                unpack.append(_reorder(memory, layout, gradients[name], layouts[name]))
                gradients[name] = memory
        numbered = _numbered(where | workspace) | _numbered(gradients, GRADIENT)
        self._steps += [*steps, backward.step(numbered), *unpack]

    def forward(self) -> None:
        """Inference with the weights as they were when the layer was made."""
        self._inference()

    def forward_backward(self) -> None:
        """The weights into the layouts of each way, forward, and the gradients of all operands in
        the layouts of the operands."""
        for step in self._steps:
            step()


def _numbered(handles: dict[str, Handle], more: int = 0) -> dict[int, Handle]:
    return {ARGUMENTS[name] + more: handle for name, handle in handles.items()}
