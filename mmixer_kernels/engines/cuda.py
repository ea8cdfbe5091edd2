"""The CUDA engine (`csrc/cuda`): a whole sequence of the recurrence in one launch.

A pass, forward or backward, is one native call. Its products outside the recurrence are made by the
cuBLASLt that torch has loaded, or by a kernel of the extension's own where there is none; what
stands between them is fused. Recurrent weights stay on the chip for the sequence, on one of two
paths: "cluster" (thread block clusters, compute capability 9.0 and newer) or "cooperative"
(exchange through L2, 8.0 and newer). Sizes and dtypes that neither takes go step by step, each step
two products and two kernels: path "step". A step by itself without gradients is one launch: path
"cell". The logger `mmixer_kernels.engines.cuda` tells, at level DEBUG, which path a call took and
why not another. The
environment variable MMIXER_CUDA_PATHS, read at import, names the paths that may be taken, separated
by commas. On "cluster" and "cooperative" a team of blocks advances 4 samples where all teams of the
call run at once, else 8; MMIXER_CUDA_SAMPLES, read at import, names those that may be taken.

float32 follows `torch.set_float32_matmul_precision`, or torch's newer name for it,
`torch.backends.cuda.matmul.fp32_precision`: "highest" has float32's error in the recurrence, "high"
and "medium" (TF32) 2^-16 in a product. bfloat16 products have bfloat16 operands; float16 ones in
the recurrence have float16 operands forward and 16 bits of two bfloat16 terms backward, whose range
a gradient may need. Statistics, gates and states are float32. float64 takes path "step".

Where there is no cuBLASLt the first pass on a device warns of it, and the logger tells, at level
WARNING, each product that cuBLASLt does not take.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..problem import Call, Cotangents, Form, Gradients, Keep, Need, Problem, Step
from . import native
from .protocol import EngineState

NAME = "cuda"
DEVICES: tuple[str, ...] = ("cuda",)
_native: Any = None
_import_error: ImportError | None = None
try:
    from .. import _native as _extension  # type: ignore[attr-defined]
except ImportError as error:
    _import_error = error
else:
    _native = getattr(_extension, "cuda", None)

_EVERY_PATH = ("cell", "cluster", "cooperative", "wide", "step")
_DEFAULT_PATHS = tuple(path for path in _EVERY_PATH if path != "wide")
PATHS = tuple((os.environ.get("MMIXER_CUDA_PATHS") or ",".join(_DEFAULT_PATHS)).split(","))
"""The paths, in the order in which they are tried; "cell" is for single steps, the others for
sequences. "wide" is "cooperative" with packets of 16 bytes, to be measured: it has to be named."""
_UNKNOWN_PATHS = [path for path in PATHS if path not in _EVERY_PATH]

_EVERY_SAMPLES = ("4", "8")
SAMPLES = tuple((os.environ.get("MMIXER_CUDA_SAMPLES") or ",".join(_EVERY_SAMPLES)).split(","))
"""The samples that a persistent kernel's team may have. The first number is taken whose teams all
run at once, else the last."""
_UNKNOWN_SAMPLES = [samples for samples in SAMPLES if samples not in _EVERY_SAMPLES]
_MOST_ROUNDS = 8  # of persistent kernels one after another; beyond, a step's products fill the GPU
_FIRST_CAPABILITY = (8, 0)

_logger = logging.getLogger(__name__)


def state(device: torch.device | None = None) -> EngineState:
    """The state on a GPU; without one given, on the current GPU, else on any that there is."""
    if _import_error is not None:
        reason = f"the extension mmixer_kernels._native cannot load: {_import_error}"
        return EngineState(False, reason, _import_error)
    if _native is None:
        return EngineState(
            False, "this build has no CUDA: install again where nvcc is on the path (or CUDACXX)"
        )
    if _UNKNOWN_PATHS:
        return EngineState(
            False,
            f"MMIXER_CUDA_PATHS must name some of {', '.join(_EVERY_PATH)}, separated by commas, "
            f"but names {', '.join(map(repr, _UNKNOWN_PATHS))}",
        )
    if _UNKNOWN_SAMPLES:
        return EngineState(
            False,
            f"MMIXER_CUDA_SAMPLES must name some of {', '.join(_EVERY_SAMPLES)}, separated by "
            f"commas, but names {', '.join(map(repr, _UNKNOWN_SAMPLES))}",
        )
    if torch.version.cuda is None:
        return EngineState(False, "this torch has no CUDA: install one that has")
    if device is not None and device.type == "cuda" and device.index is not None:
        return _state_of(device.index)
    if not torch.cuda.is_available():
        return EngineState(False, "torch finds no CUDA device or driver")
    # The current GPU comes first: to ask one takes some of its memory.
    current = torch.cuda.current_device()
    refused = []
    for index in sorted(range(torch.cuda.device_count()), key=lambda index: index != current):
        state = _state_of(index)
        if state.available:
            return state
        refused.append(state)
    return EngineState(False, "; ".join(state.reason for state in refused), refused[0].error)


def _state_of(index: int) -> EngineState:
    """The state on one GPU; an error that may pass, such as a lack of memory, is asked again."""
    try:
        refusal = _refusal(index)
    except RuntimeError as error:
        return EngineState(False, f"cuda:{index}: {error}", error)
    if refusal:
        return EngineState(False, f"cuda:{index}: {refusal}")
    return _running()


@functools.cache
def _running() -> EngineState:
    """The state on every GPU that can run the kernels."""
    return EngineState(True, f"CUDA, {_extension.build_info()['cuda']}")


# torch.compile takes the answer as it is, since it cannot look into the extension. This is the mark
# that torch.compiler.assume_constant_result sets, after it has imported torch._dynamo: that would
# double the time of an import of this package.
_state_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _refusal(index: int) -> str:
    """Why a GPU cannot run this build's kernels; empty where it can."""
    capability = torch.cuda.get_device_capability(index)
    if capability < _FIRST_CAPABILITY:
        return f"its compute capability is {capability[0]}.{capability[1]}, not 8.0 or newer"
    with torch.cuda.device(index):
        refusal: str = _native.refusal()
    return refusal


_STEP_SAMPLES = 64  # a step of more is not a stream's, and the general way is as good


def step(step: Step) -> Tensor:
    """One step without gradients: the next state `[B, H]`, in one launch up to 64 samples."""
    return native.step(run_forward, step)


def _cell(call: Call, tensors: Sequence[Tensor]) -> Tensor | None:
    """The next state by one launch, on the current device; None where the general way is taken."""
    has_context = call.form.has_context
    input, weight_f = tensors[0], tensors[1 + has_context]
    (B, F), (H, _) = input.shape, weight_f.shape
    C = tensors[1].shape[1] if has_context else 0
    dtype = input.dtype
    device = input.device.index if input.is_cuda else -1
    if "cell" not in PATHS:
        plan = 0, 0, 0, "left out by MMIXER_CUDA_PATHS"
    elif B > _STEP_SAMPLES:
        plan = 0, 0, 0, f"{B} samples, but {_STEP_SAMPLES} at most"
    else:
        plan = _cell_plan(device, (B, F, C, H), dtype, weight_f.dtype)
    team_samples, blocks, size, refusal = plan
    _logger.debug(
        "step of B=%d H=%d %s: %s",
        *(B, H, dtype, f"a sequence of one (cell: {refusal})" if refusal else "path cell"),
    )
    if team_samples == 0:
        return None
    stream = _stream(input)
    next_state = input.new_empty(B, H)
    _native.cell(
        call=call,
        tensors=tensors,
        team_samples=team_samples,
        blocks=blocks,
        next_state=next_state,
        workspace=_workspace(device, stream, H, size, input),
        stream=stream,
    )
    return next_state


@functools.cache
def _cell_plan(
    device: int, sizes: tuple[int, int, int, int], dtype: torch.dtype, weight_dtype: torch.dtype
) -> tuple[int, int, int, str]:
    """Samples per team (0: no kernel), blocks per team, bytes of workspace; why no kernel.

    Args:
        sizes: B, input_size, context_size, which is 0 without context, and H.
    """
    B, F, C, H = sizes
    plan: tuple[int, int, int, str] = _native.cell_plan(
        batch=B, input_size=F, context_size=C, hidden=H, dtype=dtype, weight_dtype=weight_dtype
    )
    return plan


_workspaces: dict[tuple[int, int, int, bool], Tensor] = {}
"""The workspaces of `step`, the oldest first, by device, stream, hidden size and whether it is
float64. A stream runs its steps one after another; it goes by its number, as another stream may
have its handle later."""
_MOST_WORKSPACES = 64


def _workspace(device: int, stream: int, H: int, size: int, like: Tensor) -> Tensor:
    zeros = functools.partial(torch.zeros, dtype=torch.uint8, device=like.device)
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        return zeros(size)  # the graph's own: it may be replayed on any stream
    key = device, _native.stream_number(stream), H, like.dtype is torch.float64
    workspace = _workspaces.get(key)
    if workspace is None or workspace.numel() < size:
        # What is dropped goes back to the pool of its stream, whose steps come before other uses.
        if len(_workspaces) >= _MOST_WORKSPACES:
            _workspaces.pop(next(iter(_workspaces)), None)
        workspace = _workspaces[key] = zeros(size)
    return workspace


class _Plan(NamedTuple):
    path: str
    samples: int = 0  # per team of a persistent kernel
    terms: int = 0  # per float in the recurrence's products
    term_dtype: torch.dtype = torch.bfloat16
    padded: int = 0  # hidden size
    teams_at_once: int = 0

    def variant(self) -> dict[str, Any]:
        """The extension's names for a variant of the persistent kernels."""
        return {
            "path": self.path,
            "samples": self.samples,
            "terms": self.terms,
            "term_dtype": self.term_dtype,
        }

    def teams(self, groups: int, batch: int) -> int:
        """The number of teams for so many weight sets and samples."""
        return groups * -(-batch // self.samples)


def _terms(dtype: torch.dtype, precision: str, backward: bool) -> tuple[int, torch.dtype] | None:
    """How many terms of which dtype a float is split into in the recurrence's products; None: the
    persistent kernels do not take the dtype."""
    if dtype is torch.float64:
        return None
    if dtype is torch.bfloat16:
        return 1, dtype
    if dtype is torch.float16 and not backward:
        return 1, dtype
    if dtype is torch.float32 and precision == "highest":
        return 3, torch.bfloat16
    return 2, torch.bfloat16


@functools.cache
def _native_plan(device: int, plan: _Plan, hidden: int, backward: bool) -> tuple[int, int, str]:
    """Padded hidden size (0: no kernel), teams at once; why there is no kernel."""
    found: tuple[int, int, str] = _native.plan(**plan.variant(), hidden=hidden, backward=backward)
    return found


def persistent_plans(
    device: int, path: str, hidden: int, dtype: torch.dtype, backward: bool
) -> tuple[list[_Plan], str]:
    """A path's kernels for a size, by the samples per team; without any, why."""
    terms = _terms(dtype, native.matmul_precision(), backward)
    if terms is None:
        return [], f"no kernel for {dtype}"
    plans, refusal = [], ""
    for samples in SAMPLES:
        plan = _Plan(path, int(samples), *terms)
        padded, at_once, refusal = _native_plan(device, plan, hidden, backward)
        if padded:
            plans.append(plan._replace(padded=padded, teams_at_once=at_once))
    return plans, refusal


class _Size(NamedTuple):
    """The sizes and settings that a pass's way depends on."""

    device: int
    groups: int
    batch: int
    hidden: int
    dtype: torch.dtype
    backward: bool
    # The settings of this process.
    precision: str
    paths: tuple[str, ...]
    samples: tuple[str, ...]


class _Way(NamedTuple):
    size: _Size
    pass_plan: Any  # the extension's
    plan: _Plan
    refused: str  # in words, the reasons why it is no path before that


def _persistent_plan(size: _Size, path: str) -> tuple[_Plan | None, str]:
    """How a path takes a pass, or why it does not."""
    plans, refusal = persistent_plans(size.device, path, size.hidden, size.dtype, size.backward)
    if not plans:
        return None, refusal
    counts = size.groups, size.batch
    plan = next((plan for plan in plans if plan.teams(*counts) <= plan.teams_at_once), plans[-1])
    if plan.teams(*counts) > _MOST_ROUNDS * plan.teams_at_once:
        return None, f"{plan.teams(*counts)} teams, {plan.teams_at_once} at once"
    return plan, ""


@functools.lru_cache(maxsize=1024)
def _way(*of_size: Any) -> _Way:
    """The first path that takes a size, whose fields are given: they cost less than a `_Size`."""
    size = _Size(*of_size)
    chosen, refused = None, []
    for path in size.paths:
        if path == "cell":
            continue
        if path == "step":
            chosen = _Plan("step", padded=size.hidden)
        else:
            chosen, refusal = _persistent_plan(size, path)
            if chosen is None:
                refused.append(f"{path}: {refusal}")
        if chosen is not None:
            break
    if chosen is None:
        allowed = "" if size.paths == _DEFAULT_PATHS else f" of {', '.join(size.paths)}"
        raise RuntimeError(f"no path{allowed} takes this call: {'; '.join(refused)}")
    pass_plan = _native.PassPlan(
        **chosen.variant(),
        teams=chosen.teams_at_once,
        allow_tf32=size.precision != "highest",
    )
    return _Way(size, pass_plan, chosen, "; ".join(refused))


def _way_of(call: Call, tensors: Sequence[Tensor], backward: bool) -> _Way:
    """The way of a pass on the current device; the tensors are not checked yet."""
    input, form = tensors[0], call.form
    groups = form.groups
    batch = input.shape[0 if call.batch_first or call.layout == "step" else 1]
    hidden, _ = tensors[groups + form.contexts].shape
    device = input.device.index if input.is_cuda else -1
    precision = native.matmul_precision() if input.dtype is torch.float32 else "highest"
    return _way(device, groups, batch, hidden, input.dtype, backward, precision, PATHS, SAMPLES)


def path(problem: Problem, backward: bool) -> str:
    """`protocol.Engine`'s: the path, its kernels' variant, and why not a path before it."""
    call, tensors = Call(Form.of(problem.flat()), "gates"), problem.tensors()
    with native.device_of(tensors[0]):
        return _words(_way_of(call, tensors, backward))


def _words(way: _Way) -> str:
    plan, how = way.plan, ""
    if plan.path != "step":
        how = (
            f", H padded to {plan.padded}, {plan.terms} terms of {plan.term_dtype} per float, "
            f"teams of {plan.samples} samples"
        )
    return f"path {plan.path}{how}" + (f" ({way.refused})" if way.refused else "")


def _tell(way: _Way, call: Call, tensors: Sequence[Tensor]) -> None:
    """Logs the way that a pass has gone."""
    if not _logger.isEnabledFor(logging.DEBUG):
        return
    size = way.size
    steps = 1 if call.layout == "step" else tensors[0].shape[call.batch_first]
    _logger.debug(
        "%s of G=%d T=%d B=%d H=%d %s: %s",
        "backward" if size.backward else "forward",
        *(size.groups, steps, size.batch, size.hidden),
        *(size.dtype, _words(way)),
    )


_told_devices: set[int] = set()
_told_products: set[str] = set()
"""What `_tell_products` has told: devices, and lines of the extension's `product_fallbacks`."""


def _tell_products(device: int) -> None:
    """Warns, once for the current device, where cuBLASLt is not there for the products outside the
    recurrence, and logs each product that it has not taken."""
    if device not in _told_devices:
        _told_devices.add(device)
        library: str = _native.product_library()
        _logger.debug("products on %s: %s", f"cuda:{device}", library)
        kind, _, reason = library.partition(": ")
        if kind == "own kernel":
            warnings.warn(
                f"the CUDA engine's products outside the recurrence are slow on cuda:{device}: "
                f"{reason}, so that a kernel of its own makes them, which is not tuned for speed. "
                "Install a PyTorch that brings cuBLAS",
                RuntimeWarning,
                stacklevel=2,
            )
    for line in _native.product_fallbacks():
        if line not in _told_products:
            _told_products.add(line)
            _logger.warning(
                "cuBLASLt does not take a product, which a kernel makes that is not tuned for "
                "speed: %s",
                line,
            )


def _stream(tensor: Tensor) -> int:
    """The handle of the current stream of the tensor's device."""
    return _current_stream(tensor.device.index) if tensor.is_cuda else 0


def _current_stream_of_python(device: int) -> int:
    handle: int = torch.cuda.current_stream(device).cuda_stream
    return handle


# The private function takes a tenth of the time.
_current_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", _current_stream_of_python
)


def saved_size(problem: Problem, keep: Keep) -> int:
    """Number of elements that `forward` leaves for `backward`: `Saved` of csrc/cuda/buffers.h.

    "states" keeps G T B H numbers, the states. "gates" keeps besides, for Eq. 7-10, two such tables
    and two in the inputs' dtype: with bfloat16 inputs 4 G T B H numbers in all. Without context it
    is one of each, with bfloat16 inputs 2.5 G T B H numbers.

    Computed here too, since under torch.compile the sizes are symbols.
    """
    if keep == "nothing":
        return 0
    groups, steps, batch, hidden = problem.sizes
    sequence, state = groups * steps * batch * hidden, groups * batch * hidden
    if keep == "states":
        return sequence
    if problem.has_context:
        wide, narrow = 3 * sequence + 2 * state, 2 * sequence + state
    else:
        wide, narrow = 2 * sequence, sequence
    ratio = problem.compute_dtype.itemsize // problem.dtype.itemsize
    return wide + (narrow + ratio - 1) // ratio


def run_forward(call: Call, tensors: Sequence[Tensor]) -> native.Results:
    """`protocol.NativeEngine.run_forward`."""
    with native.device_of(tensors[0]):
        if call.layout == "step" and call.keep == "nothing":
            next_state = _cell(call, tensors)
            if next_state is not None:
                return next_state, None, None
        way = _way_of(call, tensors, backward=False)
        results: native.Results = _native.forward(
            call=call, tensors=tensors, plan=way.pass_plan, stream=_stream(tensors[0])
        )
        _tell_products(way.size.device)
    _tell(way, call, tensors)
    return results


def run_backward(
    call: Call,
    tensors: Sequence[Tensor],
    saved: Tensor,
    cotangents: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> Sequence[Tensor | None]:
    """`protocol.NativeEngine.run_backward`."""
    with native.device_of(saved):
        way = _way_of(call, tensors, backward=True)
        grads: Sequence[Tensor | None] = _native.backward(
            call=call,
            tensors=tensors,
            saved=saved,
            grad_output=cotangents[0],
            grad_h_n=cotangents[1],
            needs=needs,
            plan=way.pass_plan,
            stream=_stream(saved),
        )
        _tell_products(way.size.device)
    _tell(way, call, tensors)
    return grads


def forward(problem: Problem, keep: Keep) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output `[G, T, B, H]`, h_n `[G, B, H]`, and what is left for `backward`."""
    return native.forward(run_forward, problem, keep)


def backward(
    problem: Problem, saved: Tensor, keep: Keep, cotangents: Cotangents, need: Need
) -> Gradients:
    """The gradients, from what `forward` left."""
    return native.backward(run_backward, problem, saved, keep, cotangents, need)
