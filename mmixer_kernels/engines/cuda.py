"""The CUDA engine (`csrc/cuda`): a whole sequence of the recurrence in one launch.

The products outside the recurrence are cuBLAS's, through torch; what stands between them is fused.
Recurrent weights stay on the chip for the sequence, on one of two paths: "cluster" (thread block
clusters, compute capability 9.0 and newer) or "cooperative" (exchange through L2, 8.0 and newer).
Sizes and dtypes that neither takes go step by step, each step two products and two kernels: path
"step". A step by itself without gradients is one launch: path "cell". The logger
`mmixer_kernels.engines.cuda` tells, at level DEBUG, which path a call took and why not another. The
environment variable MMIXER_CUDA_PATHS, read at import, names the paths that may be taken, separated
by commas. On "cluster" and "cooperative" a team of blocks advances 4 samples where all teams of the
call run at once, else 8; MMIXER_CUDA_SAMPLES, read at import, names those that may be taken.

float32 follows `torch.get_float32_matmul_precision()`: "highest" has float32's error in the
recurrence, "high" and "medium" 2^-16 in a product. bfloat16 products have bfloat16 operands;
float16 ones in the recurrence have float16 operands forward and 16 bits of two bfloat16 terms
backward, whose range a gradient may need. Statistics, gates and states are float32. float64 takes
path "step".
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..problem import Cotangents, Gradients, Keep, Need, Problem, Step
from . import gpu, native
from .gpu import Call, Gates, MixGradient, MixOperands, Prologue, RecurrenceGradient, product
from .protocol import EngineState

NAME = "cuda"
DEVICES: tuple[str, ...] = ("cuda",)
saved_size = gpu.saved_size
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
    try:
        return _step(step)
    except (TypeError, ValueError):
        return _step(native.stored_step(step, step.input.dtype))


def _step(step: Step) -> Tensor:
    input, context, weights = step[:3]
    B, H = input.shape[0], weights.hidden_size
    dtype = input.dtype
    with gpu.device_of(input):
        device = torch.cuda.current_device() if input.is_cuda else -1
        if "cell" not in PATHS:
            plan = 0, 0, 0, "left out by MMIXER_CUDA_PATHS"
        elif B > _STEP_SAMPLES:
            plan = 0, 0, 0, f"{B} samples, but {_STEP_SAMPLES} at most"
        else:
            sizes = B, input.shape[1], context.shape[1], H
            plan = _cell_plan(device, sizes, dtype, weights.weight_f.dtype)
        team_samples, blocks, size, refusal = plan
        _logger.debug(
            "step of B=%d H=%d %s: %s",
            *(B, H, dtype, f"a sequence of one (cell: {refusal})" if refusal else "path cell"),
        )
        if team_samples == 0:
            return forward(step.problem(), "nothing")[1].squeeze(0)
        stream = torch.cuda.current_stream().cuda_stream if input.is_cuda else 0
        next_state = input.new_empty(B, H)
        _native.cell(
            step=step,
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
        sizes: B, input_size, context_size and H.
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
    packet_bytes_per_team: int = 0

    def variant(self) -> dict[str, Any]:
        """The extension's names for a variant of the persistent kernels."""
        return {
            "path": self.path,
            "samples": self.samples,
            "terms": self.terms,
            "term_dtype": self.term_dtype,
        }

    def teams(self, call: Call) -> int:
        return call.G * -(-call.B // self.samples)


def _terms(dtype: torch.dtype, backward: bool) -> tuple[int, torch.dtype] | None:
    """How many terms of which dtype a float is split into in the recurrence's products; None: the
    persistent kernels do not take the dtype."""
    if dtype is torch.float64:
        return None
    if dtype is torch.bfloat16:
        return 1, dtype
    if dtype is torch.float16 and not backward:
        return 1, dtype
    if dtype is torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return 3, torch.bfloat16
    return 2, torch.bfloat16


@functools.cache
def _native_plan(
    device: int, plan: _Plan, hidden: int, backward: bool
) -> tuple[int, int, int, str]:
    """Padded hidden size (0: no kernel), teams at once, packets' bytes per team; why no kernel."""
    found: tuple[int, int, int, str] = _native.plan(
        **plan.variant(), hidden=hidden, backward=backward
    )
    return found


def persistent_plans(
    device: int, path: str, hidden: int, dtype: torch.dtype, backward: bool
) -> tuple[list[_Plan], str]:
    """A path's kernels for a size, by the samples per team; without any, why."""
    terms = _terms(dtype, backward)
    if terms is None:
        return [], f"no kernel for {dtype}"
    plans, refusal = [], ""
    for samples in SAMPLES:
        plan = _Plan(path, int(samples), *terms)
        padded, at_once, packets, refusal = _native_plan(device, plan, hidden, backward)
        if padded:
            plans.append(
                plan._replace(padded=padded, teams_at_once=at_once, packet_bytes_per_team=packets)
            )
    return plans, refusal


def _persistent_plan(call: Call, path: str, backward: bool) -> tuple[_Plan | None, str]:
    """How a path takes a call, or why it does not."""
    plans, refusal = persistent_plans(call.index, path, call.H, call.dtype, backward)
    if not plans:
        return None, refusal
    plan = next((plan for plan in plans if plan.teams(call) <= plan.teams_at_once), plans[-1])
    if plan.teams(call) > _MOST_ROUNDS * plan.teams_at_once:
        return None, f"{plan.teams(call)} teams, {plan.teams_at_once} at once"
    return plan, ""


def _plan(call: Call, backward: bool) -> _Plan:
    chosen, refused = None, []
    for path in PATHS:
        if path == "cell":
            continue
        if path == "step":
            chosen = _Plan("step", padded=call.H)
        else:
            chosen, refusal = _persistent_plan(call, path, backward)
            if chosen is None:
                refused.append(f"{path}: {refusal}")
        if chosen is not None:
            break
    if chosen is None:
        allowed = "" if PATHS == _DEFAULT_PATHS else f" of {', '.join(PATHS)}"
        raise RuntimeError(f"no path{allowed} takes this call: {'; '.join(refused)}")
    how = ""
    if chosen.path != "step":
        how = (
            f", H padded to {chosen.padded}, {chosen.terms} terms of {chosen.term_dtype} per "
            f"float, teams of {chosen.samples} samples"
        )
    _logger.debug(
        "%s of G=%d T=%d B=%d H=%d %s: path %s%s%s",
        "backward" if backward else "forward",
        *(call.G, call.T, call.B, call.H, call.dtype, chosen.path, how),
        f" ({'; '.join(refused)})" if refused else "",
    )
    return chosen


class _Kernels:
    def __init__(self, call: Call, backward: bool) -> None:
        self.call = call
        self.sizes = {"G": call.G, "T": call.T, "B": call.B, "H": call.H}
        self.plan = _plan(call, backward)
        self.persistent = self.plan.path != "step"
        self.removed_mean = self.persistent and call.has_norm
        self.norm_summands = call.B
        self._prepare(transposed=backward)
        # What reads and writes states.
        self.state = {"norms": self.norms, "hx": call.hx, "lengths": call.lengths}

    def _prepare(self, transposed: bool) -> None:
        call, plan = self.call, self.plan
        self.matrices = call.empty(call.G, 3, call.H, call.H, dtype=call.dtype)
        self.norms = call.empty(2, call.G, 6, call.H) if call.has_norm else None
        self.split_weights = None  # `matrices` for a persistent kernel
        if self.persistent:
            shape = call.G, plan.terms, 3, plan.padded, plan.padded
            self.split_weights = call.empty(*shape, dtype=plan.term_dtype)
        norm_weight = call.weights[0].norm_weight
        native = _native.PrepareArguments(
            weight_dtype=call.weights[0].weight_r.dtype,
            norm_dtype=call.compute if norm_weight is None else norm_weight.dtype,
            remove_mean=self.removed_mean,
            transposed=transposed,
            matrices=self.matrices,
            matrices_dtype=call.dtype,
            split_weights=self.split_weights,
            term_dtype=plan.term_dtype,
            norms=self.norms,
            **{"G": call.G, "H": call.H, "Hp": plan.padded, "terms": plan.terms},
        )
        most = _native.most_weight_sets  # of a launch
        for first in range(0, call.G, most):
            sets = [_native.WeightSet(**w._asdict()) for w in call.weights[first : first + most]]
            _native.prepare(native.set(first=first, sets=sets), call.stream)

    def _run(self, name: str, arguments: Any) -> None:
        getattr(_native, name)(arguments, self.call.stream)

    def _rows(self, rows: int, blocks: int) -> dict[str, Any]:
        call = self.call
        sizes = {"G": call.G, "rows": rows, "H": call.H, "blocks": min(rows, blocks)}
        return {**sizes, "norms": self.norms, "eps": call.eps}

    def norm_tanh(self, a: Tensor, gate: int) -> Tensor:
        y = torch.empty_like(a, dtype=self.call.dtype)
        rows = a.shape[1]
        native = _native.NormTanhArguments(**self._rows(rows, blocks=rows))
        self._run("norm_tanh", native.set(a=a, y=y, y_dtype=y.dtype, gate=gate))
        return y

    def norm_tanh_backward(
        self, a: Tensor, grad_y: list[Tensor], gate: int
    ) -> tuple[Tensor, Tensor | None]:
        da, norm = torch.empty_like(a, dtype=self.call.dtype), self.call.norm_sums(a.shape[1])
        native = _native.NormTanhBackwardArguments(
            **self._rows(a.shape[1], gpu.BLOCKS),
            a=a,
            gate=gate,
            grad_y=grad_y[0],
            grad_y_more=grad_y[1] if len(grad_y) > 1 else None,
            grad_a=da,
            grad_a_dtype=da.dtype,
            grad_norm=norm,
        )
        self._run("norm_tanh_backward", native)
        return da, norm

    def _mix_arguments(self, operands: MixOperands, blocks: int) -> Any:
        return _native.MixArguments(
            **self._rows(self.call.T * self.call.B, blocks),
            samples=self.call.B,
            **operands._asdict(),
            dtype=self.call.dtype,
            mix=self.call.mix,
        )

    def mix(self, operands: MixOperands) -> Tensor:
        f_tilde = torch.empty_like(operands.f_bar)
        native = self._mix_arguments(operands, blocks=f_tilde.shape[1])
        self._run("mix", native.set(f_tilde=f_tilde))
        return f_tilde

    def mix_backward(self, operands: MixOperands, grad_f_tilde: Tensor, into: MixGradient) -> None:
        native = self._mix_arguments(operands, gpu.BLOCKS).set(
            grad_f_tilde=grad_f_tilde,
            **{f"grad_{name}": tensor for name, tensor in into._asdict().items()},
        )
        self._run("mix_backward", native)

    def gate_products(self, x: Tensor, first: int, count: int) -> Tensor:
        return product(x, self.matrices[:, first : first + count].flatten(1, 2).mT)

    def recurrence(self, input_gates: Tensor) -> Tensor:
        states = self.call.empty(*self.sizes.values())
        (self._persistent if self.persistent else self._stepwise)(input_gates, states)
        return states

    def _packets(self) -> Tensor:
        teams = min(self.plan.teams_at_once, self.plan.teams(self.call))
        return self.call.empty(teams * self.plan.packet_bytes_per_team, dtype=torch.uint8)

    def _launch(self, name: str, arguments: Any) -> None:
        plan = self.plan
        getattr(_native, name)(
            **plan.variant(),
            teams=plan.teams_at_once,
            arguments=arguments,
            stream=self.call.stream,
        )

    def _persistent(self, input_gates: Tensor, states: Tensor) -> None:
        packets = self._packets()
        native = _native.ForwardArguments(**self.sizes, **self.state, eps=self.call.eps)
        native.set(
            weights=self.split_weights, input_gates=input_gates, states=states, packets=packets
        )
        self._launch("forward", native)

    def _gate_arguments(self, states: Tensor, steps: int) -> Any:
        native = _native.GateArguments(**self.sizes, **self.state, steps=steps)
        return native.set(states=states, dtype=self.call.dtype, eps=self.call.eps)

    def _stepwise(self, input_gates: Tensor, states: Tensor) -> None:
        call = self.call
        operand = call.empty(call.G, call.B, call.H, dtype=call.dtype)
        operand.copy_(call.hx) if call.hx is not None else operand.zero_()
        r_h = torch.empty_like(operand)
        native = self._gate_arguments(states, steps=1)
        native.set(input_gates=input_gates, operand=operand, r_h=r_h)
        for t in range(call.T):
            products = self.gate_products(operand, 0, 2)
            self._run("reset_gate", native.set(first_step=t, state_gates=products))
            candidate = self.gate_products(r_h, 2, 1)
            self._run("update_gate", native.set(candidate=candidate))

    def gates_again(self, prologue: Prologue, states: Tensor) -> Gates:
        call = self.call
        x_hat = call.empty(call.G, 3, call.T, call.B, call.H)
        self.x_hat_operand = x_hat  # of the product of _persistent_backward
        if call.dtype is not call.compute:
            self.x_hat_operand = torch.empty_like(x_hat, dtype=call.dtype)
        r_std = call.empty(call.G, 3, call.T, call.B)
        operand = call.previous(states).to(call.dtype)
        r_h, f_tilde_h, f_tilde_r_h = (torch.empty_like(operand) for _ in range(3))
        products = self.gate_products(operand, 0, 2)
        native = self._gate_arguments(states, steps=call.T).set(
            input_gates=prologue.input_gates,
            state_gates=products,
            f_tilde=prologue.f_tilde,
            r_h=r_h,
            x_hat=x_hat,
            x_hat_operand=None if self.x_hat_operand is x_hat else self.x_hat_operand,
            r_std=r_std,
            f_tilde_h=f_tilde_h,
            f_tilde_r_h=f_tilde_r_h,
        )
        self._run("reset_gate", native)
        candidate = self.gate_products(r_h, 2, 1)
        self._run("update_gate", native.set(candidate=candidate))
        return Gates(x_hat, r_std, f_tilde_h, f_tilde_r_h)

    def recurrence_backward(
        self, gates: Gates, states: Tensor, grad_output: Tensor, into: RecurrenceGradient
    ) -> None:
        common = {
            **self.sizes,
            **self.state,
            "states": states,
            "x_hat": gates.x_hat,
            "r_std": gates.r_std,
            "grad_output": grad_output,
            "grad_output_dtype": grad_output.dtype,
            "grad_output_stride_group": grad_output.stride(0),
            "grad_output_stride_step": grad_output.stride(1),
            "grad_output_stride_sample": grad_output.stride(2),
            "grad_gates": into.gates,
            "grad_f_tilde": into.f_tilde,
            "grad_norm": into.norm,
        }
        (self._persistent_backward if self.persistent else self._stepwise_backward)(into, common)

    def _persistent_backward(self, grad: RecurrenceGradient, common: dict[str, Any]) -> None:
        call = self.call
        projected = None
        if call.has_norm:
            x_hat = self.x_hat_operand.view(call.G * 3, call.T * call.B, call.H)
            projected = product(x_hat, self.matrices.flatten(0, 1))
        packets = self._packets()
        # In place: a thread reads its elements of h_n's gradient before it writes hx's.
        native = _native.BackwardArguments(**common, grad_h_n=grad.hx, grad_hx=grad.hx)
        native.set(weights=self.split_weights, projected=projected, packets=packets)
        self._launch("backward", native.set(grad_gates_dtype=call.dtype))

    def _stepwise_backward(self, grad: RecurrenceGradient, common: dict[str, Any]) -> None:
        carry = torch.empty_like(grad.hx)
        native = _native.GateBackwardArguments(**common, dtype=self.call.dtype)
        native.set(carry=carry, grad_h=grad.hx)
        state_gates, weight_h = self.matrices[:, :2].flatten(1, 2), self.matrices[:, 2]
        for t in reversed(range(self.call.T)):
            self._run("update_gate_backward", native.set(step=t))
            grad_r_h = product(grad.gates[:, t, :, 2], weight_h)
            self._run("reset_gate_backward", native.set(grad_r_h=grad_r_h))
            grad_sum = product(grad.gates[:, t, :, :2].flatten(2), state_gates)
            native.set(grad_sum=grad_sum)
        self._run("update_gate_backward", native.set(step=-1))


def forward(problem: Problem, keep: Keep) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[G, T, B, H]`, h_n `[G, B, H]`, and what is left for `backward`."""
    return gpu.forward(_Kernels, problem, keep)


def backward(
    problem: Problem, saved: Tensor, keep: Keep, cotangents: Cotangents, need: Need
) -> Gradients:
    """The gradients, from what `forward` left."""
    return gpu.backward(_Kernels, problem, saved, cotangents, need)
