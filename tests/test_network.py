"""M-Mixer and its ablations, against the paper's equations."""

import itertools
import os
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.modules.module as module_hooks
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.utils import parametrizations, prune

from mmixer_kernels import FusedMCU, MMixer, StreamClassifiers, engines, functional
from mmixer_kernels.engines import cpu
from mmixer_kernels.reference import MCU

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


def features(sizes=(6, 5), batch=3, steps=7):
    return [torch.randn(batch, steps, size) for size in sizes]


@pytest.mark.parametrize(
    ("sizes", "content"),
    [
        *itertools.product([(6, 5), (6, 5, 4), (3, 3, 3, 3)], ["cross", "self", "none"]),
        *(((6,), "self"), ((6,), "none")),
    ],
)
def test_equations_2_to_5(sizes, content):
    mixer = MMixer(sizes, 10, hidden_size=8, content=content)
    x = features(sizes)
    contents = [f.mean(1) for f in x]
    states = []
    for i, unit in enumerate(mixer.units):
        others = [c for j, c in enumerate(contents) if j != i]
        context = {
            "cross": lambda others=others: [torch.cat(others, -1)],
            "self": lambda i=i: [contents[i]],
            "none": list,
        }[content]()
        plain = MCU(sizes[i], sum(c.shape[1] for c in context), 8, batch_first=True)
        plain.load_state_dict(unit.state_dict())
        states.append(plain(x[i], *context)[1][0])
    for stream, state in zip(mixer.streams(x), states, strict=True):
        torch.testing.assert_close(stream, state)
    logits = torch.cat(states, -1) @ mixer.classifier.weight.T + mixer.classifier.bias
    torch.testing.assert_close(mixer(x), logits)


@pytest.mark.parametrize(
    ("unit", "summarizer", "content", "mix", "layer_norm"),
    list(
        itertools.product(
            ["mcu"], ["avg", "max", "gru"], ["cross", "self"], ["gated", "concat"], [True, False]
        )
    ),
)
def test_every_option_trains_and_heeds_lengths(unit, summarizer, content, mix, layer_norm):
    options = {"summarizer": summarizer, "content": content, "mix": mix, "layer_norm": layer_norm}
    _check_training_and_lengths(MMixer((6, 5, 4), 10, hidden_size=8, unit=unit, **options))


@pytest.mark.parametrize("layer_norm", [True, False])
def test_units_without_context_train_and_heed_lengths(layer_norm):
    mixer = MMixer((6, 5, 4), 10, hidden_size=8, content="none", layer_norm=layer_norm)
    _check_training_and_lengths(mixer)
    with_context = MMixer((6, 5, 4), 10, hidden_size=8, layer_norm=layer_norm)
    assert not {"weight_g", "weight_s"} & {n.split(".")[-1] for n in mixer.state_dict()}
    assert mixer.state_dict().keys() < with_context.state_dict().keys()


@pytest.mark.parametrize("unit", ["gru", "lstm"])
def test_one_modality_suffices_to_late_fusion(unit):
    mixer, (x,) = MMixer([6], 10, hidden_size=8, unit=unit), features((6,))
    state = mixer.units[0](x)[1]
    torch.testing.assert_close(mixer.streams([x]), [(state if unit == "gru" else state[0])[0]])
    assert mixer([x]).shape == (3, 10)


def test_orthogonal_recurrent_weights():
    for init in ("orthogonal", "uniform"):
        mixer = MMixer((6, 5), 10, hidden_size=8, init=init)
        for unit in mixer.units:
            for weight in (unit.weight_r, unit.weight_z, unit.weight_h):
                is_orthogonal = torch.allclose(weight @ weight.T, torch.eye(8), atol=1e-5)
                assert is_orthogonal == (init == "orthogonal")


@pytest.mark.parametrize("unit", ["gru", "lstm"])
def test_table_2_units_train_and_heed_lengths(unit):
    mixer = MMixer((6, 5, 4), 10, hidden_size=8, unit=unit)
    _check_training_and_lengths(mixer)
    x = features((6, 5, 4))
    stream = mixer.streams(x)[1]
    _, state = mixer.units[1](x[1])
    torch.testing.assert_close(stream, (state if unit == "gru" else state[0])[0])


def _check_training_and_lengths(mixer):
    x, lengths = features((6, 5, 4)), torch.tensor([7, 2, 4])
    logits = mixer(x, lengths)
    assert logits.shape == (3, 10)
    logits.square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    shorter = [f[1:2, :2] for f in x]
    torch.testing.assert_close(mixer(shorter), logits[1:2])


def test_time_first_is_batch_first():
    first, time = (
        MMixer((6, 5), 10, hidden_size=8),
        MMixer((6, 5), 10, hidden_size=8, batch_first=False),
    )
    time.load_state_dict(first.state_dict())
    x, lengths = features(), torch.tensor([7, 2, 4])
    expected = first(x, lengths)
    assert torch.equal(time([f.transpose(0, 1) for f in x], lengths), expected)


def test_stream_classifiers_leave_the_network_alone():
    """Eq. 15-16: no bias, and no gradient reaches the network."""
    mixer = MMixer((6, 5), 10, hidden_size=8)
    heads = StreamClassifiers(mixer)
    assert [tuple(p.shape) for p in heads.parameters()] == [(10, 8), (10, 8)]
    streams = mixer.streams(features())
    logits = heads(streams)
    torch.testing.assert_close(logits[1], streams[1] @ heads.weights[1].weight.T)
    sum(nn.functional.cross_entropy(x, torch.tensor([1, 2, 3])) for x in logits).backward()
    assert all(p.grad is not None for p in heads.parameters())
    assert all(p.grad is None for p in mixer.parameters())
    with pytest.raises(TypeError, match="network must be an MMixer, but is a Linear"):
        StreamClassifiers(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(feature_sizes=[4], num_classes=2),
            'must name two modalities or more with content="cross", but has 1',
        ),
        (dict(feature_sizes=[], num_classes=2), "must name one modality or more, but is empty"),
        (dict(feature_sizes=[4, 4], num_classes=2, init="zeros"), "init must be one of uniform,"),
        (
            dict(feature_sizes=[4, 0], num_classes=2),
            r"feature_sizes\[1\] must be a positive int",
        ),
        (dict(feature_sizes=[4, 4], num_classes=0), "num_classes must be a positive int"),
        (
            dict(feature_sizes=[4, 4], num_classes=2, unit="rnn"),
            "unit must be one of mcu, gru, lstm",
        ),
        (dict(feature_sizes=[4, 4], num_classes=2, summarizer="sum"), "summarizer must be one of"),
        (dict(feature_sizes=[4, 4], num_classes=2, content="both"), "content must be one of"),
        (dict(feature_sizes=[4, 4], num_classes=2, mix="both"), "mix must be one of"),
        (dict(feature_sizes=[4, 4], num_classes=2, engine="fast"), "engine must be one of"),
    ],
)
def test_wrong_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        MMixer(**arguments)


@pytest.mark.parametrize("unit", ["mcu", "gru"])
def test_wrong_features(unit):
    mixer, x = MMixer((6, 5), 10, hidden_size=8, unit=unit), features()
    with pytest.raises(
        ValueError, match="features must have 2 tensors, one per modality, but has 1"
    ):
        mixer(x[:1])
    with pytest.raises(ValueError, match=r"features\[1\] must be \[B, T, 5\], but has shape"):
        mixer([x[0], x[0]])
    with pytest.raises(ValueError, match="features must agree in B and T"):
        mixer([x[0], x[1][:, :6]])
    with pytest.raises(ValueError, match=r"features\[0\] must have at least one step"):
        mixer([f[:, :0] for f in x])
    with pytest.raises(ValueError, match=r"lengths must be in 1\.\.7"):
        mixer(x, torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("content", ["cross", "none"])
def test_three_modalities_are_one_native_call(
    content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not engines()["cpu"].available:
        pytest.skip(engines()["cpu"].reason)
    calls: list[str] = []
    native = cpu._native

    def counted(name: str) -> Callable[..., object]:
        def call(**arguments: Any) -> object:
            calls.append(name)
            return getattr(native, name)(**arguments)

        return call

    watched = SimpleNamespace(**vars(native))
    watched.forward, watched.backward = counted("forward"), counted("backward")
    monkeypatch.setattr(cpu, "_native", watched)
    features = [torch.randn(2, 4, size, requires_grad=True) for size in (5, 6, 7)]
    network = MMixer([5, 6, 7], num_classes=3, hidden_size=8, content=content, engine="cpu")
    network(features).sum().backward()
    assert calls == ["forward", "backward"]


class Wrapper(nn.Module):
    """An adapter, which calls what it holds and passes no attribute on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.tensor(2.0))

    def forward(self, *operands: Any, **options: Any) -> Any:
        output, h_n = self.inner(*operands, **options)
        return output, self.scale * h_n


def doubled(unit: nn.Module, operands: Any, result: Any) -> Any:
    return result[0], 2 * result[1]


def replace(units: nn.ModuleList, make: Callable[[nn.Module], nn.Module]) -> None:
    units[0] = make(units[0])


def reference(unit: nn.Module, **options: Any) -> MCU:
    plain = MCU(6, 9, 8, **options)
    plain.load_state_dict(unit.state_dict())
    return plain


def shifted(unit: FusedMCU, input: Tensor, *operands: Any, **options: Any) -> Any:
    return FusedMCU.forward(unit, input + 1, *operands, **options)


# Changes that a user may make to a unit, each of which the network's results must show.
TOOLS: dict[str, Callable[[nn.ModuleList], object]] = {
    "nothing": lambda units: None,
    "forward hook": lambda units: units[0].register_forward_hook(doubled),
    "forward pre-hook": lambda units: units[0].register_forward_pre_hook(
        lambda unit, operands: (operands[0] + 1, *operands[1:])
    ),
    "weight norm": lambda units: parametrizations.weight_norm(units[0], "weight_r"),
    # In eval mode, as each call in training mode refines the norm's estimate once more.
    "spectral norm": lambda units: parametrizations.spectral_norm(units[0].eval(), "weight_h"),
    "pruning": lambda units: prune.l1_unstructured(units[0], "weight_r", 0.5),
    "forward of its own": lambda units: setattr(
        units[0], "forward", types.MethodType(shifted, units[0])
    ),
    "unit.compile()": lambda units: units[0].compile(backend="aot_eager"),
    "torch.compile": lambda units: replace(units, lambda u: torch.compile(u, backend="aot_eager")),
    "wrapper": lambda units: replace(units, Wrapper),
    "reference": lambda units: replace(units, reference),
    "batch first": lambda units: replace(units, lambda u: reference(u, batch_first=True)),
    "no norm": lambda units: replace(units, lambda u: FusedMCU(6, 9, 8, layer_norm=False)),
    "mix": lambda units: setattr(units[0], "mix", "concat"),
    "eps": lambda units: setattr(units[0], "eps", 0.1),
    "all eps": lambda units: [setattr(unit, "eps", 0.1) for unit in units],
    "engine": lambda units: setattr(units[0], "engine", "reference"),
    "recompute": lambda units: setattr(units[0], "recompute", True),
    "fully_shard": lambda units: [fully_shard(unit, mesh=one_process()) for unit in units],
    "FSDP": lambda units: replace(
        units, lambda u: FullyShardedDataParallel(u, device_id=torch.device("cpu"))
    ),
}
KEEP_VALUES = (
    *("nothing", "weight norm", "spectral norm", "unit.compile()", "torch.compile", "reference"),
    *("batch first", "engine", "recompute", "fully_shard", "FSDP"),
)  # spectral norm, since LayerNorm takes the scale away


def one_process() -> Any:
    return distributed.init_device_mesh("cpu", (1,))


@pytest.fixture
def group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def of_each_unit(network: MMixer, x: list[Tensor], lengths: Tensor | None) -> list[Tensor]:
    """The results that `streams` must have: the units, called by hand."""
    contents = [
        summarizer(f, lengths) for summarizer, f in zip(network.summarizers, x, strict=True)
    ]
    states = []
    for i, (unit, f) in enumerate(zip(network.units, x, strict=True)):
        others = torch.cat([c for j, c in enumerate(contents) if j != i], -1)
        first = getattr(unit, "batch_first", False)
        states.append(unit(f if first else f.transpose(0, 1), others, lengths=lengths)[1][0])
    return states


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.parametrize("tool", TOOLS)
def test_what_is_done_to_a_unit_shows(tool: str) -> None:
    network, x = MMixer((6, 5, 4), 10, hidden_size=8), features((6, 5, 4))
    before = network.streams(x)
    TOOLS[tool](network.units)
    for lengths in (None, torch.tensor([7, 2, 4])):
        expected = of_each_unit(network, x, lengths)
        torch.testing.assert_close(network.streams(x, lengths), expected)
    changed = not torch.allclose(network.streams(x)[0], before[0], atol=1e-5)
    assert changed == (tool not in KEEP_VALUES)
    network(x).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name


def test_what_is_done_to_a_unit_without_context_shows() -> None:
    network, x = MMixer((6, 5), 10, hidden_size=8, content="none"), features()
    before = network.streams(x)
    plain = MCU(5, 0, 8, batch_first=True)
    plain.load_state_dict(network.units[1].state_dict())
    network.units[0].register_forward_hook(doubled)
    network.units[1] = plain
    for lengths in (None, torch.tensor([7, 2, 4])):
        inputs = x[0].transpose(0, 1), x[1]
        expected = [
            unit(f, lengths=lengths)[1][0] for unit, f in zip(network.units, inputs, strict=True)
        ]
        torch.testing.assert_close(network.streams(x, lengths), expected)
    torch.testing.assert_close(network.streams(x), [2 * before[0], before[1]])


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks_of_every_kind_fire(monkeypatch: pytest.MonkeyPatch) -> None:
    network = MMixer((6, 5), 10, hidden_size=8)
    x = [f.requires_grad_() for f in features()]
    seen: list[str] = []

    def watch(kind: str) -> Callable[..., None]:
        return lambda module, *_: seen.append(kind) if isinstance(module, FusedMCU) else None

    unit = network.units[0]
    for register, kinds in (
        (unit.register_forward_hook, "forward"),
        (unit.register_forward_pre_hook, "forward"),
        (unit.register_full_backward_hook, "backward"),
        (unit.register_full_backward_pre_hook, "backward"),
        (module_hooks.register_module_forward_hook, "forward of all"),
        (module_hooks.register_module_forward_pre_hook, "forward of all"),
        (module_hooks.register_module_full_backward_hook, "backward of all"),
        (module_hooks.register_module_full_backward_pre_hook, "backward of all"),
    ):
        seen.clear()
        with register(watch(kinds)):
            network(x).sum().backward()
        assert seen == [kinds] * (2 if "all" in kinds else 1)
    with torch.no_grad():
        network(x)
    assert len(seen) == 2  # none is left
    expected = network(x)
    monkeypatch.setattr(FusedMCU, "forward", lambda self, *operands, **options: expected.nothing)
    with pytest.raises(AttributeError, match="nothing"):
        network(x)


def test_units_are_called_where_pytorch_keeps_its_hooks_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, x = MMixer((6, 5), 10, hidden_size=8), features()
    expected = network(x)
    monkeypatch.delattr(module_hooks, "_has_any_global_hook")
    monkeypatch.delattr(functional, "mcu_group")
    torch.testing.assert_close(network(x), expected)


def test_a_unit_that_returns_something_else() -> None:
    network, x = MMixer((6, 5), 10, hidden_size=8), features()
    for unit, given in (
        (FusedMCU(5, 6, 7), r"h_n of shape \[1, 3, 7\]"),
        (nn.Bilinear(5, 6, 8), "a Tensor"),
    ):
        network.units[1] = unit
        if isinstance(unit, nn.Bilinear):
            unit.forward = lambda f, g, lengths: f
        message = rf"units\[1\] must return .* = \[1, 3, 8\], but returned {given}"
        with pytest.raises(ValueError, match=message):
            network(x)


@pytest.mark.parametrize("content", ["cross", "none"])
@pytest.mark.parametrize("hooked", [False, True])
def test_compile_is_one_op(hooked: bool, content: str) -> None:
    network, x = MMixer((6, 5), 10, hidden_size=8, content=content), features()
    if hooked:
        network.units[1].register_forward_hook(doubled)
    ops: list[str] = []

    def backend(graph: torch.fx.GraphModule, example: object) -> object:
        ops.extend(str(node.target) for node in graph.graph.nodes if "mcu" in str(node.target))
        return graph

    compiled = torch.compile(network, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), network(x))
    assert ops == ["mmixer_kernels.mcu_forward"] * (2 if hooked else 1)


def test_options_are_the_units_own(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = MMixer((6, 5), 10, hidden_size=8), features()
    calls: list[tuple[object, ...]] = []
    for name in ("mcu", "mcu_group"):
        inner = getattr(functional, name)

        def spied(*operands: Any, name: str = name, inner: Any = inner, **options: Any) -> object:
            calls.append((name, options["engine"], options["recompute"]))
            return inner(*operands, **options)

        monkeypatch.setattr(functional, name, spied)
    first, second = network.units
    first.engine = "reference"
    network(x)
    second.engine, second.recompute = "reference", True
    network(x)
    first.recompute = True
    network(x)
    assert calls == [
        *(("mcu", "reference", False), ("mcu", "auto", False)),
        *(("mcu", "reference", False), ("mcu", "reference", True)),
        ("mcu_group", "reference", True),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fully_shard", "FSDP"])
def test_units_sharded_over_two_processes(kind: str, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(sharded, (kind, tmp_path / "store"), nprocs=2)


def sharded(rank: int, kind: str, store: Path) -> None:
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    network, x = MMixer((6, 5), 10, hidden_size=9), features()
    expected = network(x)
    if kind == "fully_shard":
        for unit in network.units:
            fully_shard(unit, mesh=distributed.init_device_mesh("cpu", (2,)))
    else:
        for i, unit in enumerate(network.units):
            network.units[i] = FullyShardedDataParallel(unit, device_id=torch.device("cpu"))
    logits = network(x)
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    distributed.barrier()
    os._exit(0)  # PyTorch's own end of a group aborts one process in fifty


NETWORKS: list[dict[str, Any]] = [
    *({"summarizer": kind} for kind in ("avg", "max", "gru")),
    *({"content": "none"}, {"unit": "gru"}, {"unit": "lstm"}),
]


@pytest.mark.parametrize("options", NETWORKS, ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("lengths", [None, torch.ones(0, dtype=torch.int64)])
def test_no_samples(options: dict[str, Any], batch_first: bool, lengths: Tensor | None) -> None:
    """An empty batch gives empty results and gradients of zero, as it does for nn.GRU."""
    network = MMixer((6, 5), 10, hidden_size=8, batch_first=batch_first, **options)
    x = features(batch=0) if batch_first else [f.transpose(0, 1) for f in features(batch=0)]
    logits = network(x, lengths)
    assert logits.shape == (0, 10)
    logits.sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    assert StreamClassifiers(network)(network.streams(x, lengths))[1].shape == (0, 10)


@pytest.mark.parametrize("options", NETWORKS, ids=str)
def test_device_and_dtype(options: dict[str, Any]) -> None:
    sized = {**options, "hidden_size": 8}
    network = MMixer((6, 5), 10, **sized, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in network.parameters()} == {("meta", torch.float64)}
    empty = nn.utils.skip_init(MMixer, (6, 5), 10, **sized)
    full = MMixer((6, 5), 10, **sized)
    empty.load_state_dict(full.state_dict())
    assert torch.equal(empty(x := features()), full(x))


def test_options_that_a_unit_has_no_use_for() -> None:
    for options in (
        *({"summarizer": "max"}, {"content": "self"}, {"mix": "concat"}, {"layer_norm": False}),
        *({"init": "orthogonal"}, {"engine": "reference"}),
    ):
        (name, value), *_ = options.items()
        for unit in ("gru", "lstm"):
            with pytest.warns(UserWarning, match=f'unit="{unit}" does not use {name}={value!r}'):
                MMixer((6, 5), 10, unit=unit, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            MMixer((6, 5), 10, **options)
            MMixer((6, 5), 10, unit="gru")
            MMixer((6, 5), 10, content="none", layer_norm=False, init="orthogonal")
    for name, value in {"summarizer": "max", "mix": "concat"}.items():
        with pytest.warns(UserWarning, match=f'content="none" does not use {name}={value!r}'):
            MMixer((6, 5), 10, content="none", **{name: value})


@pytest.mark.parametrize("make", [nn.GRU, nn.LSTM])
def test_replaced_units_of_table_2(make: Callable[..., nn.Module]) -> None:
    network, x = MMixer((6, 5), 10, hidden_size=8, unit=make.__name__.lower()), features()
    expected = network.streams(x)
    time_first = make(6, 8)
    time_first.load_state_dict(network.units[0].state_dict())
    network.units[0] = time_first
    torch.testing.assert_close(network.streams(x), expected)
    network.units[1] = nn.Sequential(network.units[1])
    torch.testing.assert_close(network.streams(x), expected)


@pytest.mark.parametrize("options", NETWORKS, ids=str)
def test_another_default_device(options: dict[str, Any], default_device: None) -> None:
    network = MMixer((6, 5), 10, hidden_size=8, device="cpu", **options)
    lengths = torch.tensor([7, 2, 4], device="cpu")
    x = [torch.randn(3, 7, size, device="cpu") for size in (6, 5)]
    logits = network(x, lengths)
    assert logits.device.type == "cpu"
    logits.sum().backward()
