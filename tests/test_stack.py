"""`FusedMCUStack`, and the units without context, against the equations written out."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from mmixer_kernels import FusedMCU, FusedMCUCell, FusedMCUStack, engines
from mmixer_kernels.functional import Weights, mask_to_lengths, mcu, mcu_group
from mmixer_kernels.reference import MCU

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
ENGINES = [name for name in ("reference", "cpu") if engines()[name].available]
T, B, F_IN, C, H = 7, 5, 3, 4, 6


def direction(w, suffix, x, context, h, lengths, mix, reverse):
    """Equations 7-14, sample by sample and step by step: `[T, B, H]` and `[B, H]`."""
    rows = "fgsrzh" if context is not None else "frzh"

    def norm(a, gate):
        if f"norm_weight{suffix}" not in w:
            return a
        row, centred = rows.index(gate), a - a.mean()
        scaled = centred / (centred.square().mean() + 1e-5).sqrt()
        return scaled * w[f"norm_weight{suffix}"][row] + w[f"norm_bias{suffix}"][row]

    def product(gate, a):
        return norm(w[f"weight_{gate}{suffix}"] @ a, gate)

    outputs, states = [], []
    for b in range(x.shape[1]):
        state, length = h[b], int(lengths[b])
        steps = {}
        for t in reversed(range(length)) if reverse else range(length):
            f_bar = product("f", x[t, b]).tanh()
            v = f_bar
            if context is not None:
                g_bar = product("g", context[b]).tanh()
                s = product("s", torch.cat([f_bar, g_bar]))
                v = s
                if mix == "gated":
                    v = s.sigmoid() * f_bar + (1 - s.sigmoid()) * g_bar
            r, z = product("r", v + state).sigmoid(), product("z", v + state).sigmoid()
            n = product("h", r * state + v).tanh()
            state = z * n + (1 - z) * state
            steps[t] = state
        zero = torch.zeros_like(state)
        outputs.append(torch.stack([steps.get(t, zero) for t in range(x.shape[0])]))
        states.append(state)
    return torch.stack(outputs, 1), torch.stack(states)


def equations(stack, x, context, hx, lengths):
    """The whole stack: `[T, B, D H]` and `[L D, B, H]`."""
    w = dict(stack.named_parameters())
    if lengths is None:
        lengths = torch.full((x.shape[1],), x.shape[0])
    if hx is None:
        count = stack.num_layers * (1 + stack.bidirectional)
        hx = x.new_zeros(count, x.shape[1], stack.hidden_size)
    states, i = [], 0
    for layer in range(stack.num_layers):
        outputs = []
        for reverse in (False, True)[: 1 + stack.bidirectional]:
            suffix = f"_l{layer}" + ("_reverse" if reverse else "")
            y, h = direction(w, suffix, x, context, hx[i], lengths, stack.mix, reverse)
            outputs.append(y)
            states.append(h)
            i += 1
        x = torch.cat(outputs, -1)
    return x, torch.stack(states)


FORMS = [
    dict(zip(("context", "layers", "bidirectional", "lengths", "hx"), form, strict=True))
    for form in itertools.product((0, C), (1, 2), (False, True), (False, True), (False, True))
]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))
def test_against_the_equations(engine, form):
    number = FORMS.index(form)
    options = {"layer_norm": number % 3 != 2, "mix": ("gated", "concat")[number % 2]}
    stack = FusedMCUStack(
        F_IN,
        form["context"],
        H,
        form["layers"],
        bidirectional=form["bidirectional"],
        engine=engine,
        dtype=torch.float64,
        **options,
    )
    with torch.no_grad():
        for name, parameter in stack.named_parameters():
            if name.startswith("norm"):
                parameter += 0.3 * torch.randn_like(parameter)
    count = form["layers"] * (1 + form["bidirectional"])
    leaves = {"input": torch.randn(T, B, F_IN, dtype=torch.float64)}
    if form["context"]:
        leaves["context"] = torch.randn(B, C, dtype=torch.float64)
    if form["hx"]:
        leaves["hx"] = torch.randn(count, B, H, dtype=torch.float64)
    lengths = torch.tensor([3, 7, 1, 5, 7]) if form["lengths"] else None
    cotangents = [
        torch.randn(T, B, H * (1 + form["bidirectional"]), dtype=torch.float64),
        torch.randn(count, B, H, dtype=torch.float64),
    ]

    def results(call, module, dtype):
        own = {name: x.to(dtype, copy=True).requires_grad_() for name, x in leaves.items()}
        output = call(own["input"], own.get("context"), own.get("hx"), lengths)
        differentiated = own | dict(module.named_parameters())
        grads = torch.autograd.grad(
            output, list(differentiated.values()), [x.to(dtype) for x in cotangents]
        )
        return dict(zip(("output", "h_n"), output, strict=True)) | {
            f"grad {name}": grad for name, grad in zip(differentiated, grads, strict=True)
        }

    truth = results(lambda *a: equations(stack, *a), stack, torch.float64)
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        module = copy.deepcopy(stack).to(dtype)
        for name, x in results(module, module, dtype).items():
            error = (x - truth[name]).norm() / truth[name].norm()
            assert error < bound, (dtype, name, float(error))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("context", [0, 2])
def test_gradcheck(engine, bidirectional, context):
    stack = FusedMCUStack(
        2, context, 3, 2, bidirectional=bidirectional, engine=engine, dtype=torch.float64
    )
    count = 2 * (1 + bidirectional)
    operands = [torch.randn(3, 2, 2), torch.randn(2, context), torch.randn(count, 2, 3)]
    operands = [x.double().requires_grad_() for x in operands]
    names = [name for name, _ in stack.named_parameters()]

    def call(x, c, hx, *parameters):
        arguments = (x, c, hx) if context else (x, None, hx)
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(stack, named, (*arguments, torch.tensor([1, 3])))

    assert torch.autograd.gradcheck(call, [*operands, *stack.parameters()])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", [FusedMCU, FusedMCUStack, MCU])
def test_the_first_state_may_stand_in_the_place_of_a_context(engine, kind):
    options = {} if kind is MCU else {"engine": engine}
    unit = kind(F_IN, 0, H, **options)
    x, h_0 = torch.randn(T, B, F_IN), torch.randn(1, B, H)
    expected = unit(x, hx=h_0)
    for call in ((x, h_0), (x, None, h_0)):
        for result, value in zip(unit(*call), expected, strict=True):
            assert torch.equal(result, value)
    assert not torch.equal(unit(x)[0], expected[0])
    if kind is FusedMCU:
        cell = FusedMCUCell(F_IN, 0, H, **options)
        cell.load_state_dict(unit.state_dict())
        step = cell(x[0], h_0[0])
        torch.testing.assert_close(step, expected[0][0])
        torch.testing.assert_close(cell(x[0, 0], h_0[0, 0]), step[0])
        assert torch.equal(cell(x[0]), cell(x[0], torch.zeros(B, H)))


def test_state_dicts_of_units_without_context_move_both_ways():
    fused, plain = FusedMCU(F_IN, 0, H), MCU(F_IN, 0, H)
    plain.load_state_dict(fused.state_dict(), strict=True)
    assert plain.weight_g is None
    assert plain.weight_s is None
    assert plain.norm_weight.shape == (4, H)
    x = torch.randn(T, B, F_IN)
    torch.testing.assert_close(fused(x), plain(x))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("batch_first", [False, True])
def test_layouts_are_those_of_a_gru(engine, batch_first):
    options = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first}
    stack, gru = FusedMCUStack(F_IN, 0, H, engine=engine, **options), nn.GRU(F_IN, H, **options)
    lengths = torch.tensor([3, 7, 1, 5, 7])
    x, hx = torch.randn(T, B, F_IN), torch.randn(4, B, H)
    if batch_first:
        x = x.transpose(0, 1)
    one = x[0] if batch_first else x[:, 0]
    for call in ((x,), (x, hx), (one,), (one, hx[:, 0])):
        for result, expected in zip(stack(*call), gru(*call), strict=True):
            assert result.shape == expected.shape
    output, h_n = stack(x, hx=hx, lengths=lengths)
    packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
    result, state = stack(packed, hx)
    expected, _ = gru(packed, hx)
    for field, of_gru in zip(result[1:], expected[1:], strict=True):
        assert torch.equal(field, of_gru)
    unpacked, _ = pad_packed_sequence(result, batch_first)
    torch.testing.assert_close(unpacked, output)
    torch.testing.assert_close(state, h_n)
    first = 0 if batch_first else 1
    alone, _ = stack(x.narrow(first, 2, 1).narrow(1 - first, 0, 1), hx[:, 2:3])
    torch.testing.assert_close(alone, output.narrow(first, 2, 1).narrow(1 - first, 0, 1))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_layer_of_one_direction_is_the_unit(engine):
    unit, stack = FusedMCU(F_IN, C, H, engine=engine), FusedMCUStack(F_IN, C, H, engine=engine)
    stack.load_state_dict({f"{name}_l0": x for name, x in unit.state_dict().items()}, strict=True)
    x, c = torch.randn(T, B, F_IN), torch.randn(B, C)
    for result, expected in zip(stack(x, c), unit(x, c), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_dropout_stands_between_layers(engine):
    def made(dropout):
        torch.manual_seed(0)
        return FusedMCUStack(F_IN, 0, H, 3, dropout=dropout, engine=engine)

    stack, without = made(0.4), made(0.0)
    x = torch.randn(T, B, F_IN)
    for result, expected in zip(stack.eval()(x), without(x), strict=True):
        assert torch.equal(result, expected)
    torch.manual_seed(1)
    output, _ = stack.train()(x)
    torch.manual_seed(1)
    layers, y = stack.weights(), x
    for i, weights in enumerate(layers):
        y, _ = mcu(F.dropout(y, 0.4) if i else y, None, weights, engine=engine)
    assert torch.equal(output, y)
    assert not torch.equal(output, stack(x)[0])  # another mask


def test_autocast_casts_the_input_of_both_directions_once():
    shapes = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default:
                shapes.append(args[0].shape)
            return function(*args, **(kwargs or {}))

    stack = FusedMCUStack(F_IN, C, H, bidirectional=True)
    x, c = torch.randn(T, B, F_IN), torch.randn(B, C)
    with Casts(), torch.autocast("cpu"):
        output, _ = stack(x, c)
    assert output.dtype is torch.bfloat16
    assert (shapes.count(x.shape), shapes.count(c.shape)) == (1, 1)


def test_parameters_are_named_and_drawn_as_a_grus():
    stack = FusedMCUStack(F_IN, C, H, 2, bidirectional=True)
    suffixes = [name.removeprefix("weight_f") for name in stack.state_dict() if "weight_f" in name]
    assert suffixes == ["_l0", "_l0_reverse", "_l1", "_l1_reverse"]
    gru = nn.GRU(F_IN, H, 2, bidirectional=True)
    assert [f"weight_ih{suffix}" in gru.state_dict() for suffix in suffixes] == [True] * 4
    assert stack.weight_f_l1.shape == (H, 2 * H)
    for name, parameter in stack.named_parameters():
        if name.startswith("weight"):
            assert parameter.abs().max() <= H**-0.5
            assert parameter.abs().max() > 0.8 * H**-0.5


@pytest.mark.parametrize("kind", [MCU, FusedMCU, FusedMCUCell, FusedMCUStack])
def test_orthogonal_recurrent_weights(kind):
    torch.manual_seed(0)
    unit = kind(F_IN, C, H, init="orthogonal")
    assert "init='orthogonal'" in repr(unit)
    names = [name for name, _ in unit.named_parameters() if name.startswith("weight_")]
    for name in names:
        matrix = getattr(unit, name)
        is_orthogonal = name.startswith(("weight_r", "weight_z", "weight_h"))
        if matrix.shape[0] == matrix.shape[1]:
            error = (matrix @ matrix.T - torch.eye(H)).abs().max()
            assert (error < 1e-5) == is_orthogonal, name
        else:
            assert matrix.abs().max() <= H**-0.5
    first = unit.weight_r if kind is not FusedMCUStack else unit.weight_r_l0
    before = first.detach().clone()
    unit.reset_parameters()
    assert not torch.equal(first, before)


@pytest.mark.parametrize("kind", [nn.GRU, MCU, FusedMCU, FusedMCUCell, FusedMCUStack])
def test_what_programs_ask_of_a_recurrent_layer(kind):
    unit = kind(F_IN, H) if kind is nn.GRU else kind(F_IN, 0, H)
    assert unit.num_layers == 1
    assert unit.bidirectional is False
    assert unit.bias is (kind is nn.GRU)  # projections have none
    assert unit.flatten_parameters() is None
    assert (unit.input_size, unit.hidden_size) == (F_IN, H)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(copied):
    stack = FusedMCUStack(F_IN, 0, H, 2, bidirectional=True)
    x = torch.randn(T, B, F_IN)
    assert torch.equal(copied(stack)(x)[0], stack(x)[0])


def test_a_module_that_an_earlier_version_pickled():
    unit = FusedMCU(F_IN, C, H)
    for name in ("init", "_names"):
        del unit.__dict__[name]
    x, c = torch.randn(T, B, F_IN), torch.randn(B, C)
    assert torch.equal(pickle.loads(pickle.dumps(unit))(x, c)[0], unit(x, c)[0])
    assert repr(unit) == f"FusedMCU({F_IN}, {C}, {H})"


@pytest.mark.parametrize("engine", ENGINES)
def test_groups_without_context(engine):
    units = [FusedMCU(size, 0, H) for size in (2, 3)]
    inputs = [torch.randn(T, B, unit.input_size) for unit in units]
    weights = [unit.weights() for unit in units]
    output, h_n = mcu_group(inputs, None, weights, engine=engine)
    for i, unit in enumerate(units):
        expected, state = unit(inputs[i])
        torch.testing.assert_close(output[i], expected)
        torch.testing.assert_close(h_n[i], state[0])


def test_a_mask_of_another_library():
    stack = FusedMCUStack(F_IN, 0, H, bidirectional=True, batch_first=True)
    mask = torch.arange(T) < torch.tensor([3, 7, 1, 5, 7])[:, None]
    x = torch.randn(B, T, F_IN)
    output, _ = stack(x, lengths=mask_to_lengths(mask))
    assert torch.equal(output.ne(0).all(-1), mask)


def test_weights_are_named_by_their_fields():
    assert Weights._fields[1:3] == ("weight_g", "weight_s")
    assert not FusedMCU(F_IN, 0, H).weights().has_context
    assert FusedMCU(F_IN, C, H).weights().has_context
