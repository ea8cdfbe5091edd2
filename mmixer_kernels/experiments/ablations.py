"""Tables 1 to 3, and initial values: networks against M-Mixer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from . import figures
from .networks import Network
from .results import Claim, Report, Results
from .seeds import lead, over_folds, over_seeds


def compare(
    results: Results,
    networks: Sequence[Network],
    labels: Mapping[str, str],
    heading: str,
    published: Mapping[str, float],
    behind: Collection[str],
) -> Report:
    """A table with a row per network, and how far M-Mixer is ahead of each.

    Args:
        networks: M-Mixer is the last of them.
        labels: labels by network's name, where its own does not fit the table.
        heading: heading of the first column.
        published: the paper's accuracies in percent, by network's name; empty where the data are
            not the paper's.
        behind: names of the networks that the paper found M-Mixer ahead of.
    """
    accuracies = {network.name: results.accuracies(network) for network in networks}
    names = {network.name: labels.get(network.name, network.label) for network in networks}
    *_, m_mixer = networks
    ours = accuracies[m_mixer.name]
    folds = results.plan.folds
    header = [heading, "accuracy, %", "M-Mixer is ahead by"]
    header += ["folds, %"] if folds else []
    header += ["the paper, %"] if published else []
    rows = [header]
    for name, values in accuracies.items():
        ahead = "" if name == m_mixer.name else str(lead(ours, values))
        row = [names[name], str(over_seeds(values)), ahead]
        if folds:
            row.append(" ".join(f"{100 * value:.1f}" for value in over_folds(values).values()))
        if published:
            row.append(f"{published[name]:.2f}" if name in published else "")
        rows.append(row)
    return Report(
        [rows],
        claims=[
            Claim("M-Mixer", names[name], (ours, values))
            for name, values in accuracies.items()
            if name in behind
        ],
        figure=figures.dots({names[n]: list(values.values()) for n, values in accuracies.items()}),
    )
