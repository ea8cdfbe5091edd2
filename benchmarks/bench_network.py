"""M-Mixer on features at the paper's size: every engine that runs here beside the same network with
eager MCUs, with these compiled, and with nn.GRU; and three modalities beside one.

On a GPU the kernels and copies that a forward and backward start are counted too. What is compiled
has "compiled" in its name.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
import torch
from clocks import add_if_it_runs
from conftest import Compare
from torch import Tensor, nn

from mmixer_kernels import FusedMCU, MMixer, engines
from mmixer_kernels.comparison import checking
from mmixer_kernels.comparison.checking import Subject
from mmixer_kernels.comparison.passes import ForwardBackward
from mmixer_kernels.comparison.timing import Contender, Times, synchronised
from mmixer_kernels.engines import of_device
from mmixer_kernels.network import Summarizer

BATCH, STEPS, HIDDEN, FEATURES, CLASSES = 8, 16, 512, 512, 60
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
ENGINES = [
    engine.NAME
    for engine in of_device(DEVICE)
    if engine.NAME != "reference" and engines()[engine.NAME].available
]
CASE = f"{STEPS}x{BATCH}x{HIDDEN}"


every_engine = pytest.mark.parametrize("engine", ENGINES or [""])
every_number = pytest.mark.parametrize("modalities", [2, 3])
needs_engine = pytest.mark.skipif(not ENGINES, reason="no engine beside the reference runs here")


@needs_engine
@every_number
@every_engine
def test_network(compare: Compare, engine: str, modalities: int, threads: int) -> None:
    error = _check(engine, modalities, threads)
    contenders = _contenders(engine, modalities)
    compare(_title(engine, modalities), CASE, contenders, threads=threads, error=error)


@pytest.mark.skipif("cpu" not in ENGINES, reason="of the CPU engine")
def test_three_modalities_cost_three(compare: Compare, threads: int) -> None:
    """M-Mixer of three beside a third of it: one modality's summary, MCU and classifier."""
    ours = _network(3, "cpu")
    features = _features(3)

    class Third(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.summarizer = Summarizer("avg", FEATURES)
            self.unit = FusedMCU(FEATURES, 2 * FEATURES, HIDDEN, batch_first=True, engine="cpu")
            self.classifier = nn.Linear(HIDDEN, CLASSES)

        def forward(self, features: Tensor) -> Tensor:
            content = self.summarizer(features)
            _, h_n = self.unit(features, torch.cat([content, content], dim=-1))
            return self.classifier(h_n[0])

    contenders = [
        _contender("N = 3", ours, features),
        Contender("N = 1", ForwardBackward(third := Third(), features[:1], [*third.parameters()])),
    ]

    def shares(times: Times) -> dict[str, str]:
        rounds = [a / b for a, b in zip(times["N = 3"], times["N = 1"], strict=True)]
        return {"N = 3 / N = 1": f"{sorted(rounds)[len(rounds) // 2]:.2f}"}

    error = _check("cpu", 3, threads)
    title = "M-Mixer of three modalities / of one, engine cpu"
    compare(title, CASE, contenders, threads=threads, error=error, shares=shares)


@needs_engine
@pytest.mark.skipif(not GPU, reason="what is started on a GPU is counted there")
@every_number
@every_engine
def test_kernels(count_kernels: Compare, engine: str, modalities: int) -> None:
    settings = {"kind": "network kernels", "engine": engine, "modalities": modalities}
    contenders = _contenders(engine, modalities)
    count_kernels(f"Kernels of {_title(engine, modalities)}", CASE, contenders, settings=settings)


@needs_engine
@every_number
@every_engine
def test_network_compiled(
    compare: Compare, engine: str, modalities: int, threads: int, compile_limit: int
) -> None:
    if threads > 1:
        pytest.skip("compiling takes a minute: once is enough")
    error = _check(engine, modalities, threads)
    contenders = _contenders(engine, modalities)[:1]
    missing: dict[str, str] = {}

    def compiled(name: str) -> Contender:
        network = torch.compile(_network(modalities, "reference"))
        return _contender(name, network, _features(modalities))

    add_if_it_runs(contenders, missing, "compiled eager MCUs", compiled, DEVICE, compile_limit)
    title = _title(engine, modalities)
    compare(title, CASE, contenders, threads=threads, error=error, missing=missing)


def _title(engine: str, modalities: int) -> str:
    return f"M-Mixer, N = {modalities}, engine {engine}, forward + backward"


def _contenders(engine: str, modalities: int) -> list[Contender]:
    features = _features(modalities)
    ours = _network(modalities, engine)
    eager = _network(modalities, "reference")
    eager.load_state_dict(ours.state_dict())
    return [
        _contender(f"M-Mixer, {engine}", ours, features),
        _contender("eager MCUs", eager, features),
        _contender("nn.GRU", _network(modalities, "auto", unit="gru"), features),
    ]


def _network(modalities: int, engine: str, unit: str = "mcu") -> MMixer:
    torch.manual_seed(0)
    sizes = [FEATURES] * modalities
    return MMixer(sizes, CLASSES, hidden_size=HIDDEN, engine=engine, unit=unit).to(DEVICE)


def _features(modalities: int) -> list[Tensor]:
    torch.manual_seed(1)
    shape = (BATCH, STEPS, FEATURES)
    return [torch.randn(shape, device=DEVICE, requires_grad=True) for _ in range(modalities)]


def _contender(name: str, network: nn.Module, features: Sequence[Tensor]) -> Contender:
    def call(*features: Tensor) -> Tensor:
        logits: Tensor = network(list(features))
        return logits

    step = ForwardBackward(call, features, list(network.parameters()))
    return synchronised(Contender(name, step), DEVICE)


@functools.cache
def _check(engine: str, modalities: int, threads: int) -> float:
    """The error of logits and of every gradient, against float64."""
    network = _network(modalities, engine)
    exact = _network(modalities, "reference").double()
    features = {f"features[{i}]": x for i, x in enumerate(_features(modalities))}
    names = [name for name, _ in network.named_parameters()]

    def truth(*operands: Tensor) -> tuple[Tensor]:
        parameters = dict(zip(names, operands[modalities:], strict=True))
        call = torch.func.functional_call(exact, parameters, (list(operands[:modalities]),))
        return (call,)

    return checking.check(
        Subject(
            lambda *operands: (network(list(operands[:modalities])),),
            truth,
            features | dict(network.named_parameters()),
        )
    )
