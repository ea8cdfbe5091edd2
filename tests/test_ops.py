"""The dispatcher ops: opcheck, autograd, second derivatives, compile, export, autocast."""

import contextlib
import copy
from functools import partial

import pytest
import torch
import torch._dynamo.testing
from helpers import Size, op_operands, problem, relative_errors, with_gradients
from torch.utils.checkpoint import checkpoint

from mmixer_kernels import FusedMCU, FusedMCUCell, FusedMCUStack, dispatch, ops, reference
from mmixer_kernels.derivatives import tensors_of
from mmixer_kernels.engines import cpu, of_device
from mmixer_kernels.functional import mcu
from mmixer_kernels.problem import Cotangents, Form, Need, Problem, Weights

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

ENGINES = [engine.NAME for engine in of_device(torch.device("cpu"))]
CPU = torch.profiler.ProfilerActivity.CPU
FORWARD = torch.ops.mmixer_kernels.mcu_forward.default
BACKWARD = torch.ops.mmixer_kernels.mcu_backward.default


OPCHECKS = [
    pytest.param(
        engine,
        options,
        keep,
        marks=pytest.mark.slow if "lengths" in options or keep == "states" else (),
    )
    for engine in ENGINES
    for options in (
        {"groups": 2},
        {"groups": 2, "bidirectional": True, "context": False},
        {"hx": False, "lengths": False},
        {"groups": 2, "bidirectional": True, "layer_norm": False, "lengths": False},
    )
    for keep in ("gates", "states")
]


@pytest.mark.parametrize(("engine", "options", "keep"), OPCHECKS)
def test_opcheck(engine, options, keep):
    arguments, grads = op_operands(**options)
    torch.library.opcheck(FORWARD, (*arguments, engine, keep))
    _, _, saved = FORWARD(*arguments, engine, keep)
    grads = [grad.requires_grad_() for grad in grads]
    call = (*grads, saved.detach(), *arguments, engine, keep, True, True)
    torch.library.opcheck(BACKWARD, call)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_kept_has_the_compute_dtype_also_where_it_is_nothing(engine):
    p = problem(Size(2, 3, 4, 5, 6), dtype=torch.bfloat16).call()
    torch.library.opcheck(FORWARD, (*p.flat(), engine, "nothing"), test_utils="test_faketensor")
    assert FORWARD(*p.flat(), engine, "nothing")[2].dtype == torch.float32


@pytest.mark.parametrize(
    ("engine", "mix", "layer_norm", "lengths"),
    [
        ("cpu", "gated", True, False),
        ("cpu", "gated", True, True),
        ("cpu", "gated", False, False),
        ("cpu", "concat", True, True),
        ("cpu", "concat", False, False),
        ("reference", "gated", True, True),
    ],
)
def test_gradcheck_and_gradgradcheck(engine, mix, layer_norm, lengths):
    p = problem(Size(2, 2, 2, 3, 3), layer_norm=layer_norm, lengths=lengths)
    tensors = [x.requires_grad_() for x in p.operands().values()]

    def run(input, context, hx, *weights):
        return mcu(input, context, Weights(*weights), hx[None], p.lengths, mix=mix, engine=engine)

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("context", [False, True])
def test_gradcheck_and_gradgradcheck_of_both_directions(engine, context):
    arguments, _ = op_operands(groups=2, context=context, bidirectional=True)
    form, (*tensors, lengths) = Form.of(arguments), tensors_of(arguments)

    def run(*tensors):
        return FORWARD(*form.fill([*tensors, lengths]), engine, "gates")[:2]

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


def test_second_derivative_of_operands_that_depend_on_each_other():
    """The content is made from the sequence: only the total derivative may count it twice."""
    p = problem(Size(3, 2, 4, 4, 5))
    x = p.input.requires_grad_()

    def penalty(function):
        output, _ = function(x, x.mean(0))
        (grad,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    ours = penalty(lambda f, g: mcu(f, g, p.weights, engine="cpu"))
    truth = penalty(lambda f, g: reference.mcu(f, g, p.weights))
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-12)


def test_second_derivative_under_hooks_of_saved_tensors_and_batched():
    """Offloading and checkpoints set hooks; a Hessian is the batch of its rows."""
    p = problem(Size(3, 2, 4, 4, 5))
    x = p.input.requires_grad_()
    output, _ = mcu(x, p.context, p.weights, engine="cpu")
    (grad,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    truth = torch.autograd.grad(grad, x, grad.detach(), retain_graph=True)
    with torch.autograd.graph.save_on_cpu():
        inside = torch.autograd.grad(grad, x, grad.detach(), retain_graph=True)
    assert torch.equal(inside[0], truth[0])
    batched = torch.vmap(lambda v: torch.autograd.grad(grad, x, v)[0])(grad.detach()[None])
    torch.testing.assert_close(batched[0], truth[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batch_first", [False, True])
def test_hooks_may_give_back_tensors_of_other_strides(batch_first):
    p = problem(Size(3, 2, 4, 4, 5))
    x = (p.input.transpose(0, 1) if batch_first else p.input).contiguous().requires_grad_()

    def grad(unpack):
        with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.clone, unpack):
            output, _ = mcu(x, p.context, p.weights, batch_first=batch_first, engine="cpu")
        return torch.autograd.grad(output.square().sum(), x)[0]

    assert torch.equal(grad(lambda t: torch.stack([t, t], -1)[..., 0]), grad(torch.Tensor.clone))


def stack(**options):
    """A stack in both directions, and without context."""
    return FusedMCUStack(3, 0, 5, 2, bidirectional=True, **options)


@pytest.mark.parametrize("batch_first", [False, True])
def test_hooks_may_give_back_tensors_of_other_strides_to_both_directions(batch_first):
    unit, x = stack(batch_first=batch_first), torch.randn(6, 6, 3, requires_grad=True)

    def grads(unpack):
        with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.clone, unpack):
            output, h_n = unit(x, lengths=torch.tensor([6, 1, 3, 6, 4, 2]))
        return torch.autograd.grad(output.square().sum() + h_n.sum(), [x, *unit.parameters()])

    same = grads(torch.Tensor.clone)
    for strided, grad in zip(grads(lambda t: torch.stack([t, t], -1)[..., 0]), same, strict=True):
        assert torch.equal(strided, grad)


@pytest.mark.parametrize("moved", [1, 2])
def test_hooks_may_not_move_tensors_to_another_device(moved):
    """An address of another device would end a kernel's process."""
    p = problem(Size(3, 2, 4, 4, 5))

    def unpack(tensor):
        return tensor.to("meta") if tensor.dim() == moved else tensor

    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.clone, unpack):
        output, _ = mcu(p.input.requires_grad_(), p.context, p.weights, engine="cpu")
    with pytest.raises(ValueError, match="back on the device"):
        output.sum().backward()
    call, cotangents = p.call(), Cotangents(output.detach()[None], None)
    with pytest.raises(ValueError, match="one device, but are on meta and cpu"):
        cpu.backward(call, output.to("meta"), "states", cotangents, Need(True, True))


def test_an_error_of_a_hook_is_the_callers():
    x, errors = torch.randn(6, 2, 3, requires_grad=True), [ValueError("full")]

    def pack(tensor):
        if errors:
            raise errors.pop()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, pytest.raises(ValueError, match="full"):
        FusedMCU(3, 4, 5)(x, torch.randn(2, 4))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("made", [partial(FusedMCU, 3, 4, 5), stack])
def test_a_checkpoint_may_be_profiled_in_one_direction(made, first, batch_first):
    unit, x = made(batch_first=batch_first), torch.randn(6, 6, 3, requires_grad=True)
    operands = (x, torch.randn(6, 4)) if unit.context_size else (x,)
    (expected,) = torch.autograd.grad(unit(*operands)[0].sum(), x)
    profiler, nothing = torch.profiler.profile(activities=[CPU]), contextlib.nullcontext()
    with profiler if first else nothing:
        output, _ = checkpoint(unit, *operands, use_reentrant=False)
    with nothing if first else profiler:
        output.sum().backward()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_drops_the_same(use_reentrant):
    unit, x = stack(dropout=0.5), torch.randn(6, 6, 3, requires_grad=True)
    grads = []
    for around in (partial(checkpoint, use_reentrant=use_reentrant), lambda f, x: f(x)):
        torch.manual_seed(1)
        around(unit, x)[0].sum().backward()
        grads.append(x.grad)
        x.grad = None
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("first", [False, True])
def test_a_checkpoint_of_a_step_may_be_profiled_in_one_direction(first):
    cell, x = FusedMCUCell(3, 4, 5), torch.randn(6, 3, requires_grad=True)
    profiler, nothing = torch.profiler.profile(activities=[CPU]), contextlib.nullcontext()
    with profiler if first else nothing:
        state = checkpoint(cell, x, torch.randn(6, 4), torch.randn(6, 5), use_reentrant=False)
    with nothing if first else profiler:
        state.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("engine", ENGINES)
def test_third_derivative(engine):
    p = problem(Size(2, 1, 2, 2, 3))

    def first_derivative(x):
        output, _ = mcu(x, p.context, p.weights, engine=engine)
        return torch.autograd.grad(output.square().sum(), x, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(first_derivative, p.input.requires_grad_())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("recompute", [False, True])
def test_retain_graph_twice(engine, recompute):
    unit = FusedMCU(3, 4, 5, engine=engine, recompute=recompute)
    x, c = torch.randn(6, 2, 3, requires_grad=True), torch.randn(2, 4)
    output, h_n = unit(x, c)
    loss = output.sum() + h_n.square().sum()
    first = torch.autograd.grad(loss, [x, *unit.parameters()], retain_graph=True)
    second = torch.autograd.grad(loss, [x, *unit.parameters()])
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_output_may_be_changed_in_place():
    unit = FusedMCU(3, 4, 5)
    x, c = torch.randn(6, 2, 3, requires_grad=True), torch.randn(2, 4)
    output, _ = unit(x, c)
    (expected,) = torch.autograd.grad(output.relu().sum(), x)
    output, _ = unit(x, c)
    (changed,) = torch.autograd.grad(output.relu_().sum(), x)
    assert torch.equal(changed, expected)


def test_gradients_in_eval_mode_and_of_frozen_weights():
    unit = FusedMCU(3, 4, 5).eval().requires_grad_(False)
    x, c = torch.randn(6, 2, 3, requires_grad=True), torch.randn(2, 4)
    unit(x, c)[0].sum().backward()
    assert x.grad is not None
    assert all(parameter.grad is None for parameter in unit.parameters())


@pytest.mark.parametrize("dispatched", [False, True])
def test_nothing_is_saved_without_gradients(dispatched, monkeypatch):
    unit, frozen = FusedMCU(3, 4, 5), FusedMCU(3, 4, 5).requires_grad_(False)
    forward, saved = cpu.run_forward, []

    def spied(*arguments, **options):
        result = forward(*arguments, **options)
        saved.append(0 if result[2] is None else result[2].numel())
        return result

    monkeypatch.setattr(cpu, "run_forward", spied)
    if dispatched:
        monkeypatch.setattr(dispatch, "plain", lambda tensors: None)
    operands = torch.randn(6, 2, 3), torch.randn(2, 4)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            unit(*operands)
    frozen(*operands)
    assert saved == [0, 0, 0]
    unit(*operands)
    assert saved[3] > 0


@pytest.mark.parametrize("engine", ENGINES)
def test_a_call_that_saved_nothing_is_computed_again_for_backward(engine):
    """A trace of a frozen unit is one, which another layer's gradient may have to pass."""
    operands, _ = op_operands()
    results = [FORWARD(*operands, engine, keep)[0].square().sum() for keep in ("nothing", "gates")]
    wanted = [*operands[0], *operands[1], *operands[2], operands[3]]
    again, saved = (torch.autograd.grad(result, wanted) for result in results)
    assert all(map(torch.equal, again, saved))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend):
    unit = FusedMCU(3, 4, 5)
    compiled = torch.compile(unit, fullgraph=True, backend=backend)
    c, lengths = torch.randn(2, 4), torch.tensor([6, 3])
    x = torch.randn(6, 2, 3, requires_grad=True)
    grads = []
    for function in (unit, compiled):
        output, h_n = function(x, c, None, lengths)
        tensors = [x, *unit.parameters()]
        grads.append(torch.autograd.grad(output.square().sum() + h_n.sum(), tensors))
    for eager, fused in zip(*grads, strict=True):
        torch.testing.assert_close(fused, eager)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_fullgraph_of_both_directions(backend):
    unit, x, hx = stack(), torch.randn(6, 2, 3), torch.randn(4, 2, 5, requires_grad=True)
    results = []
    for function in (unit, torch.compile(unit, fullgraph=True, backend=backend)):
        output, h_n = function(x, hx, lengths=torch.tensor([6, 3]))
        loss = output.square().sum() + h_n.sum()
        results.append((output, h_n, *torch.autograd.grad(loss, [hx, *unit.parameters()])))
    torch.testing.assert_close(*results)


def test_compile_of_a_stack_does_not_recompile_for_sizes():
    """A sequence of one step, which has a way of its own outside, is right in either."""
    both, one = stack(), FusedMCUStack(3, 0, 5, 2)
    for unit, mode in ((both, torch.enable_grad), (one, torch.no_grad)):
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(unit, fullgraph=True, backend=counter, dynamic=True)
        counts = []
        for steps, batch in ((6, 2), (9, 3), (4, 7)):
            x, lengths = torch.randn(steps, batch, 3), torch.randint(1, steps + 1, (batch,))
            with mode():
                output, _ = compiled(x, None, None, lengths)
                assert torch.equal(output, unit(x, None, None, lengths)[0])
            counts.append(counter.frame_count)
        assert counts[1:] == counts[:1] * 2
    with torch.no_grad():
        torch.testing.assert_close(compiled(x[:1]), one(x[:1]))


def test_compile_does_not_recompile_for_sizes():
    unit = FusedMCU(3, 4, 5)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(unit, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for steps, batch in ((6, 2), (9, 3), (4, 7)):
        x, c = torch.randn(steps, batch, 3, requires_grad=True), torch.randn(batch, 4)
        output, _ = compiled(x, c)
        output.sum().backward()
        assert torch.equal(output, unit(x, c)[0])
        counts.append(counter.frame_count)
    assert counts[1:] == counts[:1] * 2


def test_export():
    unit = FusedMCU(3, 4, 5)
    x, c = torch.randn(6, 2, 3), torch.randn(2, 4)
    program = torch.export.export(unit, (x, c))
    targets = [str(node.target) for node in program.graph.nodes]
    assert any("mmixer_kernels.mcu_forward" in target for target in targets)
    for exported, eager in zip(program.module()(x, c), unit(x, c), strict=True):
        assert torch.equal(exported, eager)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_export_of_a_stack_for_any_sizes(bidirectional):
    unit = FusedMCUStack(3, 0, 5, 2, bidirectional=bidirectional)
    steps, batch = torch.export.Dim("steps"), torch.export.Dim("batch")
    example = torch.randn(6, 3, 3), None, None, torch.tensor([6, 3, 2])
    shapes = {0: steps, 1: batch}, None, None, {0: batch}
    with torch.no_grad():
        program = torch.export.export(unit, example, dynamic_shapes=shapes)
        for size in ((9, 5), (1, 1), (2, 7)):
            x, lengths = torch.randn(*size, 3), torch.randint(1, size[0] + 1, size[1:])
            exported = program.module()(x, None, None, lengths)
            torch.testing.assert_close(exported, unit(x, None, None, lengths))


def test_autocast():
    """The rules are a matrix product's: bfloat16 comes out, float32 gradients arrive at the
    parameters."""
    unit = FusedMCU(6, 5, 24)
    x, c = torch.randn(9, 3, 6, requires_grad=True), torch.randn(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        output, h_n = unit(x, c)
    assert output.dtype == h_n.dtype == torch.bfloat16
    low = Weights(*(w.detach().bfloat16() for w in unit.weights()))
    assert torch.equal(output, mcu(x.detach().bfloat16(), c.bfloat16(), low)[0])
    output.sum().backward()
    assert x.grad.dtype == unit.weight_r.grad.dtype == torch.float32

    double = FusedMCU(6, 5, 24, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert double(x.double(), c.double())[0].dtype == torch.float64


def test_autocast_of_a_stack():
    unit, x = stack(), torch.randn(6, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        results = unit(x)
        with torch.no_grad():  # by the way of a step
            assert FusedMCUStack(3, 0, 5)(x[:1])[1].dtype == torch.bfloat16
    narrow = copy.deepcopy(unit).bfloat16()
    assert all(map(torch.equal, results, narrow(x.detach().bfloat16())))
    results[0].sum().backward()
    assert {x.grad.dtype, unit.weight_r_l1_reverse.grad.dtype} == {torch.float32}


def test_second_derivative_inside_autocast():
    """It is no coarser there: what is differentiated has been cast before."""
    unit, c = FusedMCU(6, 5, 24), torch.randn(3, 5)
    x = torch.randn(9, 3, 6, requires_grad=True)
    loss = lambda x: unit(x, c)[0].float().square().sum()  # noqa: E731
    with torch.autocast("cpu", torch.bfloat16):
        (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
        first_of_func, vjp = torch.func.vjp(torch.func.grad(loss), x.detach())
        inside = torch.autograd.grad(first, x, first.detach(), retain_graph=True)
        inside_of_func = vjp(first_of_func)
    assert torch.equal(torch.autograd.grad(first, x, first.detach())[0], inside[0])
    assert torch.equal(vjp(first_of_func)[0], inside_of_func[0])


def test_float32_error_of_the_reference_engine():
    p = problem(Size(5, 3, 4, 5, 6), lengths=True, dtype=torch.float32)

    def run(input, context, weights, hx, lengths):
        call = Problem([input], [context], [weights], hx[None], lengths)
        output, h_n = ops.run(call, "reference")
        return output[0], h_n[0]

    truth = with_gradients(reference.mcu, p.to(torch.float64))
    for name, error in relative_errors(with_gradients(run, p), truth).items():
        assert error < 1e-4, name


@pytest.mark.parametrize("layout", ["to_sparse", "to_mkldnn"])
@pytest.mark.parametrize("name", ["weight_f", "norm_bias"])
@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.enable_grad])
def test_weights_that_are_not_dense_are_named(layout, name, grad_mode):
    for unit, input in (
        (FusedMCU(3, 4, 5), torch.randn(6, 2, 3)),
        (FusedMCUCell(3, 4, 5), torch.randn(2, 3)),
    ):
        values = getattr(getattr(unit, name).detach(), layout)()
        unit._parameters[name] = torch.nn.Parameter(values, requires_grad=False)
        with grad_mode(), pytest.raises(TypeError, match=f"{name} must be a dense Tensor, but is"):
            unit(input, torch.randn(2, 4))


@pytest.mark.parametrize("name", ["input", "context", "hx"])
def test_operands_of_a_step_whose_storage_was_freed_are_named(name):
    operands = {"input": torch.randn(2, 3), "context": torch.randn(2, 4), "hx": torch.randn(2, 5)}
    operands[name].untyped_storage().resize_(0)
    with torch.no_grad(), pytest.raises(ValueError, match=f"{name} must have its values in memory"):
        FusedMCUCell(3, 4, 5)(**operands)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", ["input", "weight_r"])
def test_a_storage_that_was_freed_before_backward_is_named(dtype, offset, batch_first, name):
    unit = FusedMCU(3, 4, 5, batch_first=batch_first, dtype=dtype)
    memory = torch.randn(25 + offset, dtype=dtype)
    x, weights = torch.randn(2, 2, 3, dtype=dtype, requires_grad=True), unit.weights()
    if name == "input":
        x = memory[offset : offset + 12].view(2, 2, 3)
    else:
        weights = weights._replace(weight_r=memory[offset:].view(5, 5))
    output, _ = mcu(x, torch.randn(2, 4, dtype=dtype), weights, batch_first=batch_first)
    memory.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"{name} must have its values in memory, but its"):
        output.sum().backward()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_graph_exported_without_gradients_can_be_trained(frozen):
    unit = FusedMCU(3, 4, 5).requires_grad_(not frozen)
    operands = torch.randn(6, 2, 3), torch.randn(2, 4)
    with torch.no_grad():
        program = torch.export.export(unit, operands).module().requires_grad_()
    unit.requires_grad_()
    for module in (program, unit):
        module(*operands)[0].sum().backward()
    for name, parameter in program.named_parameters():
        assert torch.equal(parameter.grad, unit.get_parameter(name).grad), name


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("enabled", [False, True])
def test_autocast_has_the_error_of_its_dtype(engine, enabled):
    """Operands are cast once, not every product inside."""
    unit = FusedMCU(24, 24, 24, engine=engine)
    exact = reference.MCU(24, 24, 24).double()
    exact.load_state_dict({name: x.bfloat16() for name, x in unit.state_dict().items()})
    x, c = torch.randn(30, 3, 24).bfloat16(), torch.randn(3, 24).bfloat16()
    truth = exact(x.double(), c.double())[0]
    with torch.set_grad_enabled(enabled), torch.autocast("cpu", torch.bfloat16):
        output, _ = unit(x.float(), c.float())
    assert (output.double() - truth).norm() < 2.0**-8 * truth.norm()


@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_both_directions_are_of_an_even_number_of_weight_sets(engine):
    arguments, _ = op_operands(3, bidirectional=True)
    with pytest.raises(ValueError, match="bidirectional must be of an even number of"):
        torch.ops.mmixer_kernels.mcu_forward(*arguments, engine, "nothing")
