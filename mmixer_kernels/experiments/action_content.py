"""The effect of the other modalities' action content: Table 4 and Figures 4 and 5."""

from __future__ import annotations

import dataclasses
import random

from ..trained import pictures, predictions
from ..trained.predictions import Prediction
from ..trained.restore import restore
from . import figures, published
from .networks import M_MIXER, SELF
from .results import Claim, Report, Results
from .seeds import Trained, lead, over_seeds, pooled

SAMPLES, CANDIDATES = 4, 64


def table4(results: Results) -> Report:
    """MCU-self against MCU, a row per stream and all together last."""
    networks = {SELF.name: SELF, M_MIXER.name: M_MIXER}
    together = "+".join(results.runs(M_MIXER)[0].result()["modalities"])
    accuracies: dict[str, dict[str, dict[Trained, float]]] = {}
    for name, network in networks.items():
        streams = results.stream_accuracies(network)
        for stream, values in {**streams, together: results.accuracies(network)}.items():
            accuracies.setdefault(stream, {})[name] = values
    papers = published.of_streams(results.plan.base)
    header = ["stream", "MCU-self, %", "MCU, %", "difference"]
    rows = [header + (["the paper: MCU-self, %", "MCU, %"] if papers else [])]
    for stream, of_stream in accuracies.items():
        own, cross = of_stream[SELF.name], of_stream[M_MIXER.name]
        row = [stream, str(over_seeds(own)), str(over_seeds(cross)), str(lead(cross, own))]
        rows.append(row + [f"{value:.2f}" for value in papers.get(stream, {}).values()])
    dots = {
        f"{stream}, {label}": list(values[network].values())
        for stream, values in accuracies.items()
        for network, label in ((SELF.name, "MCU-self"), (M_MIXER.name, "MCU"))
    }
    claims = [
        Claim(f"MCU, {stream}", "MCU-self", (values[M_MIXER.name], values[SELF.name]))
        for stream, values in accuracies.items()
    ]
    return Report([rows], claims, numbers={"accuracies": dots}, figure=figures.dots(dots))


def figure4(results: Results) -> Report:
    """The class-wise accuracy of both, the classes in descending order of M-Mixer's."""
    names = results.runs(M_MIXER)[0].result()["classes"]
    accuracies = {
        network.label: [
            pooled(column)
            for column in zip(
                *(run.result()["per_class_accuracy"] for run in results.runs(network)), strict=True
            )
        ]
        for network in (M_MIXER, SELF)
    }
    present = [place for place in range(len(names)) if accuracies[M_MIXER.label][place] is not None]
    order = sorted(present, key=lambda place: -(accuracies[M_MIXER.label][place] or 0))
    ordered = {
        label: [values[place] or 0.0 for place in order] for label, values in accuracies.items()
    }
    labels = [names[place] for place in order]
    rows = [["class", "M-Mixer, %", "MCU-self, %", "difference"]]
    for label, cross, own in zip(labels, *ordered.values(), strict=True):
        rows.append(
            [label, f"{100 * cross:.2f}", f"{100 * own:.2f}", f"{100 * (cross - own):+.2f}"]
        )
    better = sum(cross > own for cross, own in zip(*ordered.values(), strict=True))
    equal = sum(cross == own for cross, own in zip(*ordered.values(), strict=True))
    note = (
        f"M-Mixer is ahead in {better} of {len(labels)} classes, and equal in {equal}; the paper: "
        "ahead in most."
    )
    return Report([rows], notes=[note], figure=figures.classes(labels, ordered))


def figure5(results: Results) -> Report:
    """The predictions of both networks' streams for single samples, with the first seed.

    CANDIDATES test samples are drawn at random; shown are the first ones of different classes that
    not every stream of both networks gets right.
    """
    paths = [results.runs(network)[0].checkpoint for network in (SELF, M_MIXER)]
    networks = [restore(path) for path in paths]
    data = networks[0].data
    drawn = random.Random(0).sample(range(len(data.test)), min(CANDIDATES, len(data.test)))
    own, cross = (
        predictions.of_split(network, path, "test", drawn)
        for network, path in zip(networks, paths, strict=True)
    )
    shown = _choose([_merged(*both) for both in zip(own, cross, strict=True)])
    rows = [["sample", "class", *shown[0].confidences]]
    for prediction in shown:
        best = [ranked[0] for ranked in prediction.top(1).values()]
        cells = [f"{data.classes[label]} ({100 * confidence:.2f})" for label, confidence in best]
        truth = "" if prediction.label is None else data.classes[prediction.label]
        rows.append([prediction.name, truth, *cells])
    note = (
        f"Chosen out of {len(drawn)} test samples drawn at random: the first ones of different "
        "classes that some stream gets wrong. They show cases, not rates."
    )
    return Report([rows], notes=[note], figure=pictures.figure(shown, data, top=3))


def _merged(own: Prediction, cross: Prediction) -> Prediction:
    """A sample with both networks' streams; MCU-self's joint one is left out, as in the paper."""
    streams = list(own.logits)[:-1]
    logits = {
        **{f"{SELF.label}, {stream}": own.logits[stream] for stream in streams},
        **{f"{M_MIXER.label}, {stream}": values for stream, values in cross.logits.items()},
    }
    return dataclasses.replace(cross, logits=logits)


def _choose(candidates: list[Prediction]) -> list[Prediction]:
    """Samples that some stream gets wrong, of different classes where there are enough."""

    def wrong(prediction: Prediction) -> bool:
        return any(ranked[0][0] != prediction.label for ranked in prediction.top(1).values())

    first: dict[int | None, Prediction] = {}
    for prediction in filter(wrong, candidates):
        first.setdefault(prediction.label, prediction)
    rest = [p for p in candidates if not any(p is chosen for chosen in first.values())]
    rest.sort(key=lambda prediction: not wrong(prediction))
    return [*first.values(), *rest][:SAMPLES]
