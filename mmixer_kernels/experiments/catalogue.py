"""The experiments by name: their networks, what is measured on them, and how they are reported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import ablations, action_content, comparisons, extras, nested, published
from .networks import (
    CONCATENATION,
    GRU,
    GRU_SUMMARIZER,
    LSTM,
    M_MIXER,
    MAX,
    NO_CONTEXT,
    NO_NORM,
    ORTHOGONAL,
    OWN_CONTENT,
    SELF,
    Network,
    of_engines,
    of_lengths,
    of_modalities,
)
from .results import Report, Results
from .runs import Plan, Run


@dataclass(frozen=True)
class Experiment:
    """An experiment: the networks to train, and the report of their trainings.

    Args:
        networks: the networks of a plan's trainings; UserError where the data set does not go with
            the experiment.
        report: makes the report of the trainings of these networks.
        measures: options by which `python -m mmixer_kernels.evaluate` measures more of each trained
            network: "streams", "missing", "quantized".
        before: the trainings whose results `networks` needs; UserError as `networks`.
    """

    title: str
    networks: Callable[[Plan], Sequence[Network]]
    report: Callable[[Results, Sequence[Network]], Report]
    measures: tuple[str, ...] = ()
    before: Callable[[Plan], Sequence[Run]] = lambda plan: ()


def _ablation(
    name: str, title: str, heading: str, *networks: Network, labels: dict[str, str]
) -> Experiment:
    def report(results: Results, networks: Sequence[Network]) -> Report:
        papers = published.of_ablation(name, results.plan.base)
        behind = published.behind(name)
        return ablations.compare(results, networks, labels, heading, papers, behind)

    return Experiment(title, lambda _: networks, report)


EXPERIMENTS: dict[str, Experiment] = {
    "table1": _ablation(
        "table1",
        "Table 1: action summarizing operator",
        "summarizer",
        *(GRU_SUMMARIZER, MAX, M_MIXER),
        labels={M_MIXER.name: "average pooling"},
    ),
    "table2": _ablation(
        "table2",
        "Table 2: LSTM, GRU and MCU",
        "unit",
        *(LSTM, GRU, NO_CONTEXT, M_MIXER),
        labels={M_MIXER.name: "MCU"},
    ),
    "table3": _ablation(
        "table3",
        "Table 3: the MCU's components",
        "what it has",
        *(OWN_CONTENT, CONCATENATION, NO_NORM, M_MIXER),
        labels={M_MIXER.name: "IV: mix module, cross content, LayerNorm"},
    ),
    "table4": Experiment(
        "Table 4: the other modalities' action content, stream by stream",
        lambda _: (SELF, M_MIXER),
        lambda results, _: action_content.table4(results),
        ("streams",),
    ),
    "tables5-7": Experiment(
        "Tables 5 to 7: beside published results",
        lambda _: (M_MIXER,),
        lambda results, _: comparisons.table(results),
    ),
    "figure4": Experiment(
        "Figure 4: class-wise accuracy",
        lambda _: (M_MIXER, SELF),
        lambda results, _: action_content.figure4(results),
    ),
    "figure5": Experiment(
        "Figure 5: single samples",
        lambda _: (SELF, M_MIXER),
        lambda results, _: action_content.figure5(results),
        ("streams",),
    ),
    "engines": Experiment(
        "Engines: the same training with every engine",
        lambda plan: of_engines(plan.base),
        extras.engines,
    ),
    "missing": Experiment(
        "A modality absent or noised at test time",
        lambda _: extras.DEGRADED,
        lambda results, _: extras.missing(results),
        ("missing",),
    ),
    "modalities": Experiment(
        "Two modalities, three and more",
        lambda plan: of_modalities(plan.base),
        extras.modalities,
        ("streams",),
    ),
    "init": _ablation(
        "init",
        "Initial values of the recurrent weights",
        "init",
        *(ORTHOGONAL, M_MIXER),
        labels={M_MIXER.name: "uniform"},
    ),
    "quantized": Experiment(
        "int8 weights: the same networks, step by step",
        lambda _: (M_MIXER,),
        lambda results, _: extras.quantized(results),
        ("quantized",),
    ),
    "length": Experiment(
        "Accuracy and time against T", lambda plan: of_lengths(plan.base), extras.length
    ),
    "nested": Experiment(
        "LSTM, GRU and MCU, the options of each chosen within each fold's training people",
        nested.networks,
        nested.report,
        before=nested.candidates,
    ),
}
