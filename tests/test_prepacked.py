from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_padded_sequence
from torch.overrides import TorchFunctionMode

from mmixer_kernels import FusedMCU, FusedMCUStack, PrepackedMCU, _native, functional
from mmixer_kernels.engines import cpu
from mmixer_kernels.problem import Call, Form

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

UNIT = FusedMCU(5, 7, 9)
FRAMES, CONTEXT, HX = torch.randn(4, 2, 5), torch.randn(2, 7), torch.randn(1, 2, 9)
LENGTHS = torch.tensor([2, 4])


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A call of the unit fails after this one is called."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the unit was called")

    return lambda: monkeypatch.setattr(functional, "mcu", refuse)


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """A list to which each packing of weights adds its call."""
    made: list[Call] = []

    def prepack(call: Call, tensors: Any, prepack: Any = cpu.prepack) -> Any:
        made.append(call)
        return prepack(call, tensors)

    monkeypatch.setattr(cpu, "prepack", prepack)
    return made


def of_unit(unit: Any, *operands: Any, **others: Any) -> Any:
    with torch.no_grad():
        return unit(*operands, **others)


def same_bits(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


KINDS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "float32": ({}, torch.float32),
    "float64": ({"mix": "concat", "dtype": torch.float64}, torch.float64),
    "bfloat16 weights": ({"dtype": torch.bfloat16}, torch.float32),
    "without norms": ({"layer_norm": False}, torch.float32),
    "without context": ({"context_size": 0, "eps": 1e-3}, torch.float32),
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_results_are_the_units_to_the_bit(
    kind: str, batch_first: bool, count: int, threads: None, direct: Any, packs: list[Call]
) -> None:
    """H = 151 is that of a team of two. The weights are packed in a call of one thread."""
    options, dtype = KINDS[kind]
    calls, expected = [], []
    for hidden in (1, 9, 151):
        sizes = {"input_size": 5, "context_size": 7, "hidden_size": hidden, **options}
        unit = FusedMCU(**sizes, batch_first=batch_first)
        prepacked = PrepackedMCU(unit)
        for steps, batch in ((4, 3), (2, 1), (1, 3), (7, 13)):
            frames = torch.randn(steps, batch, 5, dtype=dtype)
            frames = frames.transpose(0, 1) if batch_first else frames
            context = torch.randn(batch, 7, dtype=dtype) if unit.context_size else None
            for hx in (None, torch.randn(1, batch, hidden, dtype=dtype)):
                for lengths in (None, torch.randint(1, steps + 1, (batch,))):
                    calls.append((prepacked, frames, context, hx, lengths))
                    expected.append(of_unit(unit, frames, context, hx, lengths))
    direct()
    for i, ((prepacked, *operands), results) in enumerate(zip(calls, expected, strict=True)):
        torch.set_num_threads(count if i else 1)
        assert same_bits(prepacked(*operands), results)
    assert len(packs) == 3


def test_a_unit_without_context_takes_hx_in_its_place(direct: Callable[[], None]) -> None:
    unit = FusedMCU(5, 0, 9)
    expected = of_unit(unit, FRAMES, HX)
    direct()
    prepacked = PrepackedMCU(unit)
    assert same_bits(prepacked(FRAMES, HX), expected)
    assert same_bits(prepacked(input=FRAMES, hx=HX), expected)


def test_weights_are_packed_once() -> None:
    """Changes that PyTorch does not count show when they are packed again."""
    unit = copy.deepcopy(UNIT)
    prepacked = PrepackedMCU(unit)
    expected = of_unit(unit, FRAMES, CONTEXT, HX)
    prepacked(FRAMES, CONTEXT)
    for weight in (unit.weight_f, unit.weight_s[:, :9], unit.weight_r, unit.weight_z):
        weight.data.fill_(torch.nan)
    unit.weight_h.data.fill_(torch.nan)
    assert same_bits(prepacked(FRAMES, CONTEXT, HX), expected)
    prepacked.repack()
    assert prepacked(FRAMES, CONTEXT)[0].isnan().all()


def _train(unit: FusedMCU) -> None:
    for parameter in unit.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.SGD(unit.parameters(), lr=0.1).step()
    unit.zero_grad()


def _assign(unit: FusedMCU) -> None:
    unit.weight_r = nn.Parameter(2 * unit.weight_r)


def _move(unit: FusedMCU) -> None:
    unit.weight_s.data = 2 * unit.weight_s.data


def _prune(unit: FusedMCU) -> None:
    prune.l1_unstructured(unit, "weight_r", 0.5)


CHANGES: dict[str, Callable[[FusedMCU], Any]] = {
    "optimizer": _train,
    "load_state_dict": lambda unit: unit.load_state_dict(FusedMCU(5, 7, 9).state_dict()),
    "load_state_dict, assign": lambda unit: unit.load_state_dict(
        FusedMCU(5, 7, 9).state_dict(), assign=True
    ),
    "to": lambda unit: unit.to(torch.bfloat16).to(torch.float32),
    "bfloat16 weights": lambda unit: unit.bfloat16(),
    "inference mode": torch.inference_mode()(lambda unit: unit.weight_h.mul_(2)),
    "detach": lambda unit: unit.weight_f.detach().mul_(2),
    ".data = ": _move,
    "another parameter": _assign,
    "pruned": _prune,
    "mix": lambda unit: setattr(unit, "mix", "concat"),
    "eps": lambda unit: setattr(unit, "eps", 1.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_prepacked_unit_follows_its_unit(
    change: str, direct: Callable[[], None], packs: list[Call]
) -> None:
    unit = copy.deepcopy(UNIT)
    prepacked = PrepackedMCU(unit)
    old = prepacked(FRAMES, CONTEXT)
    CHANGES[change](unit)
    new = of_unit(unit, FRAMES, CONTEXT)
    if change != "pruned":  # whose hook has to run
        direct()
    for _ in range(2):
        assert same_bits(prepacked(FRAMES, CONTEXT), new)
    assert not torch.equal(new[0], old[0])
    assert len(packs) == (1 if change in ("pruned", "mix", "eps") else 2)


def test_an_address_tells_whose_memory_it_is() -> None:
    """The next tensor of a size may get the memory of one that is freed."""
    unit = copy.deepcopy(UNIT)
    prepacked = PrepackedMCU(unit)
    prepacked(FRAMES, CONTEXT)
    address = unit.weight_r.data_ptr()
    unit.weight_r.data = torch.empty(0)
    others = [torch.randn(9, 9) for _ in range(100)]
    assert address not in {x.data_ptr() for x in others}


def test_parameters_that_are_not_counted() -> None:
    with torch.inference_mode():
        unit = copy.deepcopy(UNIT)
        prepacked = PrepackedMCU(unit)
        for _ in range(2):
            unit.weight_r.add_(1)
            assert same_bits(prepacked(FRAMES, CONTEXT), unit(FRAMES, CONTEXT))


class _Model(nn.Module):
    """A module that has a unit and calls it prepacked."""

    def __init__(self, unit: FusedMCU) -> None:
        super().__init__()
        self.unit, self.prepacked = unit, PrepackedMCU(unit)

    def forward(self, input: Tensor, context: Tensor) -> Any:
        return self.prepacked(input, context)


def test_a_swapped_parameter() -> None:
    model = _Model(UNIT)
    before = model(FRAMES, CONTEXT)
    swapped = torch.randn(9, 9)
    found = torch.func.functional_call(model, {"unit.weight_z": swapped}, (FRAMES, CONTEXT))
    operands = {"weight_z": swapped}, (FRAMES, CONTEXT)
    assert same_bits(found, of_unit(torch.func.functional_call, UNIT, *operands))
    assert same_bits(model(FRAMES, CONTEXT), before)


class _Doubled(FusedMCU):
    def forward(self, *operands: Any) -> Any:
        return _doubled(super().forward(*operands))


def _doubled(results: Any) -> Any:
    return tuple(2 * x for x in results)


class _Calls(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        results = function(*args, **(kwargs or {}))
        return _doubled(results) if function is functional.mcu else results


def _hooked(unit: FusedMCU) -> Any:
    unit.register_forward_hook(lambda module, operands, results: _doubled(results))


def _replaced(unit: FusedMCU) -> Any:
    forward = unit.forward
    unit.forward = lambda *operands: _doubled(forward(*operands))  # type: ignore[method-assign]


def _of_subclass(unit: FusedMCU) -> Any:
    unit.__class__ = _Doubled


@pytest.mark.parametrize("look", [_hooked, _replaced, _of_subclass, lambda _: _Calls()])
def test_whoever_looks_on_at_the_unit_is_heard(look: Callable[[FusedMCU], Any]) -> None:
    unit = copy.deepcopy(UNIT)
    prepacked = PrepackedMCU(unit)
    expected = prepacked(FRAMES, CONTEXT)
    with look(unit) or nullcontext():
        assert same_bits(prepacked(FRAMES, CONTEXT), _doubled(expected))


@pytest.mark.filterwarnings("ignore")  # of torch's tracer and profiler
def test_tools_that_see_every_call() -> None:
    model = _Model(UNIT)
    prepacked, expected = model.prepacked, model(FRAMES, CONTEXT)
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(prepacked(FRAMES, CONTEXT), of_unit(UNIT, FRAMES, CONTEXT))
    with torch.profiler.profile() as profile:
        prepacked(FRAMES, CONTEXT)
    assert "mmixer_kernels::mcu_forward" in {event.key for event in profile.key_averages()}

    traced = torch.jit.trace(model, (FRAMES, CONTEXT))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for tool in (traced, compiled):
        torch.testing.assert_close(tool(FRAMES, CONTEXT), expected)
    batch = torch.stack([FRAMES, 2 * FRAMES])
    of_batch = torch.vmap(prepacked, (0, None))(batch, CONTEXT)
    torch.testing.assert_close([x[0] for x in of_batch], list(expected))
    tangent = torch.func.jvp(prepacked, (FRAMES, CONTEXT), (FRAMES, CONTEXT))[1]
    of_its_unit = torch.func.jvp(UNIT, (FRAMES, CONTEXT), (FRAMES, CONTEXT))[1]
    torch.testing.assert_close(tangent, of_its_unit)


def test_what_the_unit_takes_itself() -> None:
    """Integers of other sizes, 16-bit inputs, strides, no sample, one step, no batch and packed
    sequences."""
    prepacked = PrepackedMCU(UNIT)
    spaced = torch.randn(4, 2, 10)[..., ::2]
    for operands in (
        (FRAMES, CONTEXT, HX, LENGTHS.int()),
        (spaced, CONTEXT),
        (FRAMES[:, 0], CONTEXT[0], HX[:, 0]),
        (FRAMES[:, :0], CONTEXT[:0]),
        (FRAMES[:1], CONTEXT),
    ):
        found = prepacked(*operands)
        assert same_bits(found, of_unit(UNIT, *operands))
        assert not any(x.requires_grad for x in found)
    packed = pack_padded_sequence(FRAMES, LENGTHS, enforce_sorted=False)
    (output, h_n), (of_its_unit, last) = prepacked(packed, CONTEXT), of_unit(UNIT, packed, CONTEXT)
    assert same_bits((output.data, h_n), (of_its_unit.data, last))
    narrow = copy.deepcopy(UNIT).bfloat16()
    operands = FRAMES.bfloat16(), CONTEXT.bfloat16()
    assert same_bits(PrepackedMCU(narrow)(*operands), of_unit(narrow, *operands))
    by_name = FusedMCU(5, 7, 9, engine="reference")
    assert same_bits(PrepackedMCU(by_name)(FRAMES, CONTEXT), of_unit(by_name, FRAMES, CONTEXT))


def test_errors_are_the_units() -> None:
    prepacked = PrepackedMCU(UNIT)
    expected = prepacked(FRAMES, CONTEXT)
    for wrong in (
        (FRAMES,),
        (FRAMES.double(), CONTEXT),
        (FRAMES, CONTEXT[:1]),
        (FRAMES, CONTEXT, HX[:, :1]),
        (FRAMES, CONTEXT, None, LENGTHS + 1),
        (FRAMES, CONTEXT.to("meta")),
        (1.0, CONTEXT),
        ([FRAMES], CONTEXT),
    ):
        with pytest.raises((TypeError, ValueError)) as of_its_unit:
            UNIT(*wrong)
        with pytest.raises(of_its_unit.type) as found:
            prepacked(*wrong)  # type: ignore[arg-type]
        assert str(found.value) == str(of_its_unit.value)
    assert same_bits(prepacked(FRAMES, CONTEXT), expected)
    with pytest.raises(TypeError, match="unit must be a FusedMCU, but is a FusedMCUStack"):
        PrepackedMCU(FusedMCUStack(5, 7, 9))  # type: ignore[arg-type]


def test_no_gradient_is_dropped_in_silence() -> None:
    prepacked = PrepackedMCU(UNIT)
    assert not any(x.requires_grad for x in prepacked(FRAMES, CONTEXT))
    for i, name in enumerate(("input", "context", "hx")):
        operands = [FRAMES, CONTEXT, HX]
        operands[i] = operands[i].clone().requires_grad_()
        with pytest.raises(ValueError, match=f"{name} must not require a gradient"):
            prepacked(*operands)
        assert same_bits(of_unit(prepacked, *operands), of_unit(UNIT, *operands))
    packed = pack_padded_sequence(FRAMES.clone().requires_grad_(), LENGTHS, enforce_sorted=False)
    with pytest.raises(ValueError, match="input must not require a gradient"):
        prepacked(packed, CONTEXT)
    with pytest.raises(ValueError, match="input must not require a gradient"):
        torch.func.grad(lambda frames: prepacked(frames, CONTEXT)[0].sum())(FRAMES)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_have_their_own_parameters(
    copied: Callable[[PrepackedMCU], PrepackedMCU], direct: Callable[[], None]
) -> None:
    prepacked = PrepackedMCU(copy.deepcopy(UNIT))
    expected = prepacked(FRAMES, CONTEXT)
    other = copied(prepacked)
    direct()
    with torch.no_grad():
        other.unit.weight_r.zero_()
    assert not torch.equal(other(FRAMES, CONTEXT)[0], expected[0])
    assert same_bits(prepacked(FRAMES, CONTEXT), expected)


def test_no_instruction_set_reads_what_another_packed() -> None:
    default, *others = _native.build_info()["instruction_sets_here"]
    prepacked = PrepackedMCU(UNIT)
    prepacked(FRAMES, CONTEXT)
    tensors = [FRAMES, CONTEXT, *UNIT.parameters()]
    call = Call(Form(1, 8, True, False, False, "gated", 1e-5), "nothing", "sequence")
    packed = _native.pack(call=call, tensors=tensors, threads=1)
    wide = [x.double() for x in tensors]
    with pytest.raises(ValueError, match="packed must be of this dtype and of the instruction set"):
        _native.forward(call=call, tensors=wide, threads=1, packed=packed)
    for name in others:
        _native.use_instruction_set(name)
        try:
            assert same_bits(prepacked(FRAMES, CONTEXT), of_unit(UNIT, FRAMES, CONTEXT))
            with pytest.raises(ValueError, match=r"packed must be .* instruction set in use"):
                _native.forward(call=call, tensors=tensors, threads=1, packed=packed)
        finally:
            _native.use_instruction_set(default)
