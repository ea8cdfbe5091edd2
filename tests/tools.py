"""The table of PyTorch's tools: what each does with each entrance of the library.

`python tests/tools.py` writes it to docs/tools.md; tests/test_tools.py runs every cell of it.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mmixer_kernels import CellStream, FusedMCU, FusedMCUCell, FusedMCUStack, MMixer, reference
from mmixer_kernels.functional import mcu, mcu_cell, mcu_group
from mmixer_kernels.reference import MCU
from mmixer_kernels.unit import Unit

DOCUMENT = Path(__file__).parents[1] / "docs" / "tools.md"
F, C, H, K = 3, 2, 4, 3
"""input_size, context_size, hidden_size, classes. In M-Mixer F and C are the modalities' sizes."""
T, B = 3, 2


# Entrances: modules of tensors, ours and what they must equal, with parameters of equal names.


class Cell(MCU):
    """`FusedMCUCell` by the reference's equations."""

    def forward(self, input: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input[None], context)[1][0]


class BareCell(Cell):
    """A cell without context."""

    def forward(self, input: Tensor, hx: Tensor) -> Tensor:  # type: ignore[override]
        return MCU.forward(self, input[None], hx[None])[1][0]


class Layers(FusedMCUStack):
    """`FusedMCUStack` in both directions and without context by the reference's equations."""

    def forward(self, input: Tensor, hx: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        states, sets = [], self.weights()
        for first in range(0, len(sets), 2):
            results = [
                reference.mcu(input, None, sets[i], hx[i], reverse=i > first)
                for i in (first, first + 1)
            ]
            input = torch.cat([output for output, _ in results], -1)
            states += [state for _, state in results]
        return input, torch.stack(states)


class Stream(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, input: Tensor, context: Tensor) -> Tensor:
        if isinstance(self.cell, Cell):
            with torch.no_grad():
                return self.cell(input, context)
        return CellStream(self.cell, context)(input).clone()


class Function(nn.Module):
    """A function of the library with weights of its own, or the equations where engine is None."""

    def __init__(self, name: str, engine: str | None) -> None:
        super().__init__()
        self.name, self.engine = name, engine
        unit = Cell if name == "mcu_cell" else MCU
        self.units = nn.ModuleList(unit(F, C, H) for _ in range(2 if name == "mcu_group" else 1))

    def forward(self, *operands: Tensor) -> Any:
        count, options = len(self.units), {"engine": self.engine}
        inputs, contexts = operands[:count], operands[count:]
        if self.engine is None:
            results = [u(x, c) for u, x, c in zip(self.units, inputs, contexts, strict=True)]
            if self.name == "mcu_group":
                outputs, states = zip(*results, strict=True)
                return torch.stack(outputs), torch.cat(states)
            return results[0]
        weights = [unit.weights() for unit in self.units]
        if self.name == "mcu_group":
            return mcu_group(inputs, contexts, weights, **options)
        function = mcu if self.name == "mcu" else mcu_cell
        return function(inputs[0], contexts[0], weights[0], **options)


class Network(nn.Module):
    def __init__(self, engine: str | None) -> None:
        super().__init__()
        self.mixer = MMixer([F, C], K, hidden_size=H, engine=engine or "auto")
        if engine is None:
            for i, (size, other) in enumerate(((F, C), (C, F))):
                self.mixer.units[i] = MCU(size, other, H)

    def forward(self, *features: Tensor) -> Tensor:
        return self.mixer(features)


class Entrance(NamedTuple):
    name: str
    make: Callable[[str | None], nn.Module]
    """Makes the module with an engine, or None for the equations."""
    shapes: Callable[[int, int], list[tuple[int, ...]]]
    """The operands' shapes for T and B."""

    def modules(self, engine: str) -> tuple[nn.Module, nn.Module]:
        """Our module, and the equations with the same parameters, in float64."""
        ours, truth = self.make(engine).double(), self.make(None).double()
        truth.load_state_dict(ours.state_dict())
        return ours, truth

    def operands(self, steps: int = T, batch: int = B) -> list[Tensor]:
        return [torch.randn(shape, dtype=torch.float64) for shape in self.shapes(steps, batch)]


def _unit(kind: type, truth: type, steps: bool) -> Any:
    def make(engine: str | None) -> nn.Module:
        return truth(F, C, H) if engine is None else kind(F, C, H, engine=engine)

    return make, lambda T, B: [(T, B, F) if steps else (B, F), (B, C)]


def _stream(engine: str | None) -> nn.Module:
    return Stream(Cell(F, C, H) if engine is None else FusedMCUCell(F, C, H, engine=engine))


def _bare_cell(engine: str | None) -> nn.Module:
    return BareCell(F, 0, H) if engine is None else FusedMCUCell(F, 0, H, engine=engine)


def _stack(engine: str | None) -> nn.Module:
    kind = Layers if engine is None else FusedMCUStack
    return kind(F, 0, H, 2, bidirectional=True, engine=engine or "auto")


ENTRANCES = [
    Entrance("FusedMCU", *_unit(FusedMCU, MCU, steps=True)),
    Entrance("FusedMCUCell", *_unit(FusedMCUCell, Cell, steps=False)),
    Entrance("CellStream", _stream, lambda T, B: [(B, F), (B, C)]),
    Entrance("mcu", lambda e: Function("mcu", e), lambda T, B: [(T, B, F), (B, C)]),
    Entrance("mcu_cell", lambda e: Function("mcu_cell", e), lambda T, B: [(B, F), (B, C)]),
    Entrance(
        "mcu_group",
        lambda e: Function("mcu_group", e),
        lambda T, B: [(T, B, F), (T, B, F), (B, C), (B, C)],
    ),
    Entrance("MMixer", Network, lambda T, B: [(B, T, F), (B, T, C)]),
    Entrance("FusedMCUStack", _stack, lambda T, B: [(T, B, F), (4, B, H)]),
    Entrance("FusedMCUCell(F, 0, H)", _bare_cell, lambda T, B: [(B, F), (B, H)]),
]
MODULES = ("FusedMCU", "FusedMCUCell", "MMixer", "FusedMCUStack", "FusedMCUCell(F, 0, H)")


# Tools: functions of a module and operands to tensors.


class Error(NamedTuple):
    """The error that a cell raises instead, and the document's words on it."""

    kind: type[Exception]
    match: str
    text: str


Outcome = str | Error
FUSED, EQUATIONS = "fused", "equations"


class Tool(NamedTuple):
    name: str
    run: Callable[[Case], Any]
    outcome: Outcome = FUSED
    but: dict[str, Outcome] = {}  # noqa: RUF012
    """Outcomes that differ from that, by entrance."""
    truth: Callable[[Case], Any] | None = None
    """The function of the equations that `run` must equal; `run` itself where it is None."""
    entrances: tuple[str, ...] = tuple(entrance.name for entrance in ENTRANCES)
    tolerance: float = 1e-10
    """The largest difference from the equations, relative to the greatest value."""
    slow: bool = False

    def expected(self, entrance: str) -> Outcome:
        return self.but.get(entrance, self.outcome)


class Case(NamedTuple):
    """A module and what it is called with."""

    entrance: Entrance
    module: nn.Module
    operands: list[Tensor]
    other_operands: list[Tensor]
    """Operands of another T and B."""

    def parameters(self) -> dict[str, Tensor]:
        return {name: x.detach().clone() for name, x in self.module.named_parameters()}

    def unit(self) -> nn.Module:
        """The module itself, or the network's first unit."""
        return next(x for x in self.module.modules() if isinstance(x, Unit))

    def weight_name(self) -> str:
        """The name of the unit's last weight_r, of a stack its second layer's in reverse."""
        names = [name for name, _ in self.unit().named_parameters()]
        return [name for name in names if name.startswith("weight_r")][-1]

    def call(self) -> Any:
        return self.module(*self.operands)

    def functional_call(self, parameters: dict[str, Tensor], *operands: Tensor) -> Any:
        return torch.func.functional_call(self.module, parameters, operands)


def sum_of_squares(results: Any) -> Tensor:
    return sum(x.square().sum() for x in pytree.tree_leaves(results))  # type: ignore[return-value]


def gradients(case: Case, function: Callable[..., Any] | None = None) -> list[Tensor]:
    """The gradients of operands and of the weights that are not frozen."""
    operands = [x.clone().requires_grad_() for x in case.operands]
    loss = sum_of_squares((case.module if function is None else function)(*operands))
    loss.backward()
    weights = [x for x in case.module.parameters() if x.requires_grad]
    return [loss.detach(), *(x.grad for x in (*operands, *weights) if x.grad is not None)]


def frozen(case: Case) -> Any:
    case.module.requires_grad_(False)
    return gradients(case)


def second_derivative(case: Case) -> list[Tensor]:
    operands = [x.clone().requires_grad_() for x in case.operands]
    wanted = [*operands, *case.module.parameters()]
    first = torch.autograd.grad(sum_of_squares(case.module(*operands)), wanted, create_graph=True)
    return list(torch.autograd.grad(sum_of_squares(first), wanted))


def within(context: Callable[[], Any]) -> Callable[[Case], Any]:
    def run(case: Case) -> Any:
        with context():
            return case.call()

    return run


def batched_gradients(case: Case) -> Any:
    operands = [x.clone().requires_grad_() for x in case.operands]
    results = pytree.tree_leaves(case.module(*operands))
    directions = [torch.stack([torch.ones_like(x), x.detach(), x.detach().cos()]) for x in results]
    wanted = [*operands, *case.module.parameters()]
    return torch.autograd.grad(results, wanted, directions, is_grads_batched=True)


def gradcheck(case: Case) -> list[Tensor]:
    operands = tuple(x.clone().requires_grad_() for x in case.operands)
    options = {"check_batched_grad": True, "check_forward_ad": True}
    assert torch.autograd.gradcheck(
        case.module, operands, check_batched_forward_grad=True, **options
    )
    return []


def gradgradcheck(case: Case) -> list[Tensor]:
    operands = tuple(x.clone().requires_grad_() for x in case.operands)
    assert torch.autograd.gradgradcheck(case.module, operands, check_batched_grad=True)
    return []


def autograd_functional(name: str, **options: Any) -> Callable[[Case], Any]:
    function = getattr(torch.autograd.functional, name)

    def run(case: Case) -> Any:
        operands = tuple(case.operands)
        if name == "jacobian":
            return function(case.module, operands, **options)
        if name == "hessian":
            return function(lambda *x: sum_of_squares(case.module(*x)), operands, **options)
        if name == "jvp":
            return function(case.module, operands, operands)
        return function(lambda *x: sum_of_squares(case.module(*x)), operands, operands)

    return run


def dual_level(case: Case) -> Any:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, x.cos()) for x in case.operands]
        results = pytree.tree_leaves(case.module(*duals))
        return [tuple(forward_ad.unpack_dual(x)) for x in results]


def dual_level_without_gradients(case: Case) -> Any:
    with torch.no_grad():
        return dual_level(case)


def dual_level_of_weights(case: Case) -> Any:
    case.module.requires_grad_(False)
    with forward_ad.dual_level():
        duals = {k: forward_ad.make_dual(x, x.cos()) for k, x in case.parameters().items()}
        results = pytree.tree_leaves(case.functional_call(duals, *case.operands))
        return [tuple(forward_ad.unpack_dual(x)) for x in results]


def func(name: str) -> Callable[[Case], Any]:
    def loss(case: Case) -> Callable[..., Tensor]:
        return lambda p: sum_of_squares(case.functional_call(p, *case.operands))

    def run(case: Case) -> Any:
        operands, every = tuple(case.operands), tuple(range(len(case.operands)))
        if name == "grad":
            return torch.func.grad(loss(case))(case.parameters())
        if name == "vjp":
            results, vjp = torch.func.vjp(case.module, *operands)
            return vjp(results)
        if name == "jvp":
            return torch.func.jvp(case.module, operands, operands)
        if name == "linearize":
            return torch.func.linearize(case.module, *operands)[1](*operands)
        if name == "hessian":
            return torch.func.hessian(lambda *x: sum_of_squares(case.module(*x)), every)(*operands)
        if name == "jacrev of jacrev":
            first = torch.func.jacrev(lambda *x: sum_of_squares(case.module(*x)), every)
            return torch.func.jacrev(first, every)(*operands)
        return getattr(torch.func, name)(case.module, every)(*operands)

    return run


def stacked(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.stack([x, 0.5 * x, x.cos()]) for x in tensors]


def several(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(parameters, stacked(list(parameters.values())), strict=True))


def vmap_samples(case: Case) -> Any:
    return torch.vmap(case.module)(*stacked(case.operands))


def vmap_last_dimension(case: Case) -> Any:
    operands = [x.movedim(0, -1) for x in stacked(case.operands)]
    in_dims = tuple(x.ndim - 1 for x in operands)
    return torch.vmap(case.module, in_dims=in_dims, out_dims=1)(*operands)


def vmap_weights(case: Case) -> Any:
    return torch.vmap(lambda p: case.functional_call(p, *case.operands))(several(case.parameters()))


def vmap_both(case: Case) -> Any:
    return torch.vmap(case.functional_call)(several(case.parameters()), *stacked(case.operands))


def vmap_nested(case: Case) -> Any:
    inner = torch.vmap(case.functional_call, in_dims=(None, *[0] * len(case.operands)))
    outer = torch.vmap(inner, in_dims=(0, *[None] * len(case.operands)))
    return outer(several(case.parameters()), *stacked(case.operands))


def vmap_backward(case: Case) -> Any:
    weights = {k: x.requires_grad_() for k, x in several(case.parameters()).items()}
    operands = [x.requires_grad_() for x in stacked(case.operands)]
    loss = sum_of_squares(torch.vmap(case.functional_call)(weights, *operands))
    return torch.autograd.grad(loss, [*operands, *weights.values()])


def gradients_per_sample(case: Case) -> Any:
    gradient = torch.func.grad(lambda p, *x: sum_of_squares(case.functional_call(p, *x)))
    in_dims = (None, *[0] * len(case.operands))
    return torch.vmap(gradient, in_dims=in_dims)(case.parameters(), *stacked(case.operands))


def other(case: Case) -> Any:
    return case.module(*case.other_operands)


def other_and_gradients(case: Case) -> Any:
    results = case.module(*case.other_operands)
    weights = list(case.module.parameters())
    return results, torch.autograd.grad(sum_of_squares(results), weights)


def traced(context: Callable[[], Any]) -> Callable[[Case], Any]:
    """The module traced, written, read, called with other sizes, and differentiated."""

    def run(case: Case) -> Any:
        with context(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.jit.trace(case.module, tuple(case.operands))
        file = io.BytesIO()
        torch.jit.save(program, file)
        file.seek(0)
        return other_and_gradients(case._replace(module=torch.jit.load(file)))

    return run


def traced_frozen(case: Case) -> Any:
    case.module.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(case.module, tuple(case.operands))(*case.other_operands)


def onnx_without_dynamo(case: Case) -> Any:
    import onnxruntime

    file = io.BytesIO()
    operands = tuple(x.float() for x in case.operands)
    names = [f"x{i}" for i in range(len(operands))]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(case.module.float(), operands, file, dynamo=False, input_names=names)
    session = onnxruntime.InferenceSession(file.getvalue())
    inputs = {name: x.numpy() for name, x in zip(names, operands, strict=True)}
    return [torch.from_numpy(x) for x in session.run(None, inputs)]


def compiled(case: Case) -> Any:
    torch._dynamo.reset()
    return gradients(case, torch.compile(case.module, fullgraph=True, backend="aot_eager"))


def compiled_forward(case: Case) -> Any:
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(case.module, backend="aot_eager")(*case.operands)


def compiled_grad(case: Case) -> Any:
    torch._dynamo.reset()
    function = torch.func.grad(lambda *x: sum_of_squares(case.module(*x)))
    return torch.compile(function, fullgraph=True, backend="aot_eager")(*case.operands)


def exported(case: Case) -> Any:
    return torch.export.export(case.module, tuple(case.operands)).module()(*case.operands)


class Model(nn.Module):
    """A user's module with a unit inside."""

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.unit(x, y)


class ModelOfFour(Model):
    def forward(self, x: Tensor, y: Tensor, z: Tensor, w: Tensor) -> Any:  # type: ignore[override]
        return self.unit(x, y, z, w)


def symbolic_trace(case: Case) -> Any:
    model = (Model if len(case.operands) == 2 else ModelOfFour)(case.module)
    return torch.fx.symbolic_trace(model)(*case.operands)


def scripted(case: Case) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(case.module)(*case.operands)


def make_fx(case: Case) -> Any:
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(case.module)(*case.operands)(*case.operands)


def functionalized(case: Case) -> Any:
    return torch.func.functionalize(case.module)(*case.operands)


def functionalized_grad(case: Case) -> Any:
    every = tuple(range(len(case.operands)))
    gradient = torch.func.grad(lambda *x: sum_of_squares(case.module(*x)), every)
    return torch.func.functionalize(gradient)(*case.operands)


def negated(x: Tensor) -> Tensor:
    """x itself, as the negation of a tensor that is carried out when it is read."""
    return torch._neg_view(-x)


def negated_operands(case: Case) -> Any:
    with torch.no_grad():
        return case.module(*map(negated, case.operands))


def negated_weights(case: Case) -> Any:
    parameters = {name: negated(x) for name, x in case.parameters().items()}
    with torch.no_grad():
        return case.functional_call(parameters, *case.operands)


def zero_tensors(case: Case) -> Any:
    shapes = [x.shape for x in case.operands]
    with torch.no_grad():
        return case.module(*(torch._efficientzerotensor(s, dtype=torch.float64) for s in shapes))


def freed_storage(case: Case) -> Any:
    case.unit().get_parameter(case.weight_name()).untyped_storage().resize_(0)
    with torch.no_grad():
        return case.call()


def freed_storage_of_views(case: Case) -> Any:
    """The weights as FSDP's first version leaves them: views of one long parameter."""
    weight = case.unit().get_parameter(case.weight_name())
    whole = torch.cat([torch.zeros(1), weight.detach().flatten()]).double()
    weight.data = whole[1:].view_as(weight)
    whole.untyped_storage().resize_(0)
    with torch.no_grad():
        return case.call()


def profiled(case: Case) -> Any:
    with torch.no_grad(), torch.profiler.profile() as profile:
        results = case.call()
    names = {event.key for event in profile.key_averages()}
    assert "mmixer_kernels::mcu_forward" in names
    return results


def counted(case: Case) -> Tensor:
    """One step, of which the equations make each product once, as the engines do."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        case.module(*case.entrance.operands(steps=1))
    return torch.tensor(counter.get_total_flops())


def counted_of_equations(case: Case) -> Tensor:
    """A stream takes a step when it is made, too."""
    return counted(case) * (2 if case.entrance.name == "CellStream" else 1)


class _Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def dispatch_mode(case: Case) -> Any:
    with torch.no_grad(), _Dispatched() as mode:
        results = case.call()
    assert "mmixer_kernels.mcu_forward.default" in mode.names
    return results


class _Called(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


def function_mode(case: Case) -> Any:
    with _Called() as mode:
        results = case.call()
    assert mode.names & {"mcu", "mcu_cell", "mcu_group"}
    return results


class Subclass(Tensor):
    pass


def subclass(case: Case) -> Any:
    results = case.module(*(x.as_subclass(Subclass) for x in case.operands))
    assert all(isinstance(x, Subclass) for x in pytree.tree_leaves(results))
    return pytree.tree_map(lambda x: x.as_subclass(Tensor), results)


def fake(case: Case) -> Any:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        shapes = [tuple(x.shape) for x in pytree.tree_leaves(case.call())]
    return [torch.tensor(shape) for shape in shapes]


def copied(case: Case) -> Any:
    module = pickle.loads(pickle.dumps(copy.deepcopy(case.module)))
    return gradients(case._replace(module=module))


def checkpointed(use_reentrant: bool) -> Callable[[Case], Any]:
    def run(case: Case) -> Any:
        return gradients(case, lambda *x: checkpoint(case.module, *x, use_reentrant=use_reentrant))

    return run


def saved_on_cpu(case: Case) -> Any:
    with torch.autograd.graph.save_on_cpu():
        return gradients(case)


def anomalies_detected(case: Case) -> Any:
    with warnings.catch_warnings(), torch.autograd.detect_anomaly():
        warnings.simplefilter("ignore")
        return gradients(case)


def empty_batch(case: Case) -> Any:
    return gradients(case._replace(operands=case.entrance.operands(batch=0)))


def hooked(case: Case) -> Any:
    unit = case.unit()
    unit.register_forward_pre_hook(lambda module, arguments: (2 * arguments[0], *arguments[1:]))
    unit.register_forward_hook(lambda *a: pytree.tree_map(lambda x: 3 * x, a[2]))
    unit.register_full_backward_hook(lambda module, inputs, outputs: (5 * inputs[0], *inputs[1:]))
    return gradients(case)


def pruned(case: Case) -> Any:
    unit, name = case.unit(), case.weight_name()
    prune.l1_unstructured(unit, name, 0.5)
    with torch.no_grad():
        unit.get_parameter(f"{name}_orig").add_(1.0)  # Results made of it before are stale.
    return gradients(case)


def parametrized(function: Callable[..., Any]) -> Callable[[Case], Any]:
    def run(case: Case) -> Any:
        torch.manual_seed(0)
        function(case.unit(), case.weight_name())
        return gradients(case)

    return run


NO_GRADIENT = {
    "CellStream": Error(ValueError, r"(input|context) must not require a gradient", "error")
}
NOT_FOLLOWED = {
    "CellStream": Error(RuntimeError, "A CellStream cannot be traced or transformed", "error")
}
_FREED = Error(ValueError, "weight_r must have its values in memory, but its storage", "error")
_NOT_SCRIPTED = Error(TypeError, "cannot be scripted: use torch.jit.trace", "error")
_NO_LEAF = Error(
    TypeError, "but is a Proxy: let torch.fx's tracer take the module as a leaf", "error"
)
_COMPILED_STREAM = {
    "CellStream": Error(
        Exception, "must not require a gradient|cannot be traced or transformed", "error"
    )
}


TOOLS = [
    Tool("`loss.backward()`", gradients, but=NO_GRADIENT),
    Tool("`loss.backward()`, frozen weights", frozen, but=NO_GRADIENT),
    Tool("`create_graph=True`, second derivatives", second_derivative, but=NO_GRADIENT),
    Tool("`torch.no_grad()`", within(torch.no_grad)),
    Tool("`torch.inference_mode()`", within(torch.inference_mode)),
    Tool("a batch of none", empty_batch, but=NO_GRADIENT),
    Tool("`copy.deepcopy`, `pickle`", copied, but=NO_GRADIENT),
    Tool("`checkpoint(use_reentrant=False)`", checkpointed(False), but=NO_GRADIENT),
    Tool("`checkpoint(use_reentrant=True)`", checkpointed(True), but=NO_GRADIENT),
    Tool("`torch.autograd.graph.save_on_cpu`", saved_on_cpu, but=NO_GRADIENT),
    Tool("`torch.autograd.detect_anomaly`", anomalies_detected, but=NO_GRADIENT),
    Tool("`torch.autograd.grad(is_grads_batched=True)`", batched_gradients, but=NO_GRADIENT),
    Tool(
        "`gradcheck`, batched and forward-mode",
        *(gradcheck, EQUATIONS, NO_GRADIENT),
        slow=True,
    ),
    Tool("`gradgradcheck`, batched", gradgradcheck, but=NO_GRADIENT, slow=True),
    Tool("`torch.autograd.functional.jacobian`", autograd_functional("jacobian"), but=NO_GRADIENT),
    Tool(
        "`jacobian(vectorize=True)`",
        autograd_functional("jacobian", vectorize=True),
        but=NO_GRADIENT,
    ),
    Tool(
        '`jacobian(vectorize=True, strategy="forward-mode")`',
        autograd_functional("jacobian", vectorize=True, strategy="forward-mode"),
        EQUATIONS,
        NOT_FOLLOWED,
    ),
    Tool(
        "`hessian(vectorize=True)`",
        autograd_functional("hessian", vectorize=True),
        but=NO_GRADIENT,
    ),
    Tool("`torch.autograd.functional.jvp`", autograd_functional("jvp"), but=NO_GRADIENT),
    Tool("`torch.autograd.functional.vhp`", autograd_functional("vhp"), but=NO_GRADIENT),
    Tool("`forward_ad.dual_level`", dual_level, EQUATIONS, NOT_FOLLOWED),
    Tool("`dual_level` in `no_grad`", dual_level_without_gradients, EQUATIONS, NOT_FOLLOWED),
    Tool("`dual_level`, dual weights", dual_level_of_weights, EQUATIONS, NOT_FOLLOWED),
    *(
        Tool(f"`torch.func.{name}`", func(name), but=NOT_FOLLOWED)
        for name in ("grad", "vjp", "jacrev")
    ),
    Tool("`jacrev` of `jacrev`", func("jacrev of jacrev"), but=NOT_FOLLOWED),
    *(
        Tool(f"`torch.func.{name}`", func(name), EQUATIONS, NOT_FOLLOWED, slow=name == "linearize")
        for name in ("jvp", "jacfwd", "hessian", "linearize")
    ),
    Tool("`torch.vmap` over samples", vmap_samples, but=NOT_FOLLOWED),
    Tool("`torch.vmap` over the last dimension", vmap_last_dimension, but=NOT_FOLLOWED),
    Tool("`torch.vmap` over weights", vmap_weights, but=NOT_FOLLOWED),
    Tool("`torch.vmap` over both", vmap_both, but=NOT_FOLLOWED),
    Tool("`torch.vmap` in `torch.vmap`", vmap_nested, but=NOT_FOLLOWED),
    Tool("`torch.vmap`, then backward", vmap_backward, but=NOT_FOLLOWED),
    Tool("`vmap(grad)`, gradients per sample", gradients_per_sample, but=NOT_FOLLOWED),
    Tool("`torch.jit.trace`", traced(nullcontext), but=NOT_FOLLOWED, truth=other_and_gradients),
    Tool(
        "`torch.jit.trace` in `no_grad`",
        traced(torch.no_grad),
        but=NOT_FOLLOWED,
        truth=other_and_gradients,
    ),
    Tool(
        "`torch.jit.trace` in `inference_mode`",
        traced(torch.inference_mode),
        but=NOT_FOLLOWED,
        truth=other_and_gradients,
    ),
    Tool("`torch.jit.trace`, frozen weights", traced_frozen, but=NOT_FOLLOWED, truth=other),
    Tool(
        "`torch.onnx.export(dynamo=False)`",
        onnx_without_dynamo,
        EQUATIONS,
        NOT_FOLLOWED,
        truth=Case.call,
        tolerance=1e-5,
        slow=True,
    ),
    Tool(
        "`torch.compile(fullgraph=True)`",
        compiled,
        but=_COMPILED_STREAM,
        truth=gradients,
        slow=True,
    ),
    Tool("`torch.compile` in `no_grad`", compiled_forward, truth=Case.call, slow=True),
    Tool(
        "`torch.compile` of `torch.func.grad`",
        compiled_grad,
        EQUATIONS,
        _COMPILED_STREAM,
        truth=lambda case: gradients(case)[1],
        slow=True,
    ),
    Tool("`torch.export.export`", exported, truth=Case.call, slow=True),
    Tool("`torch.jit.script`", scripted, _NOT_SCRIPTED),
    Tool(
        "`torch.fx.symbolic_trace`",
        symbolic_trace,
        but={"CellStream": _NO_LEAF, "MMixer": _NO_LEAF},
        truth=Case.call,
    ),
    Tool("`make_fx`", make_fx, truth=Case.call),
    Tool("`torch.func.functionalize`", functionalized, but=NOT_FOLLOWED),
    Tool("`functionalize` of `grad`", functionalized_grad, EQUATIONS, NOT_FOLLOWED),
    Tool("lazily negated operands", negated_operands),
    Tool("lazily negated weights", negated_weights),
    Tool("lazy zeros", zero_tensors),
    Tool("weights whose storage was freed", freed_storage, _FREED),
    Tool("views of a storage that was freed", freed_storage_of_views, _FREED),
    Tool('`torch.device("meta")` as a context', within(lambda: torch.device("meta"))),
    Tool("`torch.profiler`", profiled, truth=Case.call),
    Tool("`FlopCounterMode`", counted, truth=counted_of_equations),
    Tool("a `TorchDispatchMode`", dispatch_mode, truth=Case.call),
    Tool("a `TorchFunctionMode`", function_mode, truth=Case.call),
    Tool("a subclass of Tensor", subclass, truth=Case.call),
    Tool("`FakeTensorMode`", fake),
    Tool("hooks", hooked, entrances=MODULES),
    Tool("`torch.nn.utils.prune`", pruned, entrances=MODULES),
    Tool("`weight_norm`", parametrized(parametrizations.weight_norm), entrances=MODULES),
    Tool("`spectral_norm`", parametrized(parametrizations.spectral_norm), entrances=MODULES),
]


def document() -> str:
    """The table in Markdown."""
    names = [entrance.name for entrance in ENTRANCES]
    rows = [["", *(f"`{name}`" for name in names)], ["---"] * (len(names) + 1)]
    for tool in TOOLS:
        outcomes = [tool.expected(name) if name in tool.entrances else "" for name in names]
        texts = [outcome.text if isinstance(outcome, Error) else outcome for outcome in outcomes]
        rows.append([tool.name, *texts])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


BEGIN, END = "<!-- The table is written by tests/tools.py. -->\n", "<!-- End of the table. -->\n"


def documented() -> tuple[str, str, str]:
    """The text of docs/tools.md before, in and after the table."""
    before, rest = DOCUMENT.read_text().split(BEGIN)
    table, after = rest.split(END)
    return before, table, after


if __name__ == "__main__":
    before, _, after = documented()
    DOCUMENT.write_text(before + BEGIN + document() + END + after)
