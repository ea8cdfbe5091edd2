"""The files of an experiment: NAME.json, NAME.png, and README.md with all of a folder's."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import provenance
from ..atomic import replacing
from ..command import processors
from ..training.result import versions
from .catalogue import EXPERIMENTS
from .networks import Network
from .results import Claim, Report, Results
from .runs import PROG, Run
from .seeds import lead


def write(
    output: Path,
    name: str,
    results: Results,
    networks: Sequence[Network],
    report: Report,
    arguments: Sequence[str],
) -> None:
    """Writes an experiment's files in `output`, and README.md anew.

    Args:
        arguments: the command line without names, for the record.
    """
    trained = [run for network in networks for run in results.runs(network)]
    document = {
        "name": name,
        "title": EXPERIMENTS[name].title,
        "command": f"{PROG} {shlex.join((name, *arguments))}",
        "data": results.plan.base.run.data,
        "training": shlex.join(results.plan.arguments),
        "seeds": list(results.plan.seeds),
        "folds": bool(results.plan.folds),
        "markdown": _markdown(report),
        "claims": [_verdict(claim) for claim in report.claims],
        "numbers": report.numbers,
        "networks": [
            {
                "name": n.name,
                "label": n.label,
                "options": list(n.options),
                **({"by fold": [list(options) for options in n.by_fold]} if n.by_fold else {}),
            }
            for n in networks
        ],
        "trainings": [_training(run) for run in trained],
        "machine": _machine(),
    }
    output.mkdir(parents=True, exist_ok=True)
    with replacing(output / f"{name}.json") as file:
        file.write((json.dumps(document, indent=1) + "\n").encode())
    if report.figure is not None:
        with replacing(output / f"{name}.png") as file:
            report.figure.savefig(file, format="png", dpi=110, bbox_inches="tight")
    with replacing(output / "README.md") as file:
        file.write(_page(output).encode())


def _training(run: Run) -> dict[str, Any]:
    result, spent = run.result(), run.report("run")
    keys = ("accuracy", "mean_class_accuracy", "epoch", "engine", "threads")
    return {
        "network": run.network.name,
        "seed": run.seed,
        "fold": run.fold,
        **{key: result[key] for key in keys},
        "commit": spent["commit"],
        "seconds": spent["seconds"],
    }


def _machine() -> dict[str, Any]:
    return {
        "processor": provenance.processor(),
        "processors": processors(),
        "system": platform.system(),
        "commit of the report": provenance.commit(),
        "versions": {key: value for key, value in versions().items() if key != "platform"},
    }


def _verdict(claim: Claim) -> dict[str, str]:
    found = lead(*claim.values)
    return {
        "first": claim.first,
        "second": claim.second,
        "lead": str(found),
        "verdict": found.verdict(),
    }


def _markdown(report: Report) -> str:
    parts = [_table(rows) for rows in report.tables]
    if report.claims:
        parts.append("What the paper found, and what was found here:\n")
        for claim in report.claims:
            found = _verdict(claim)
            parts[-1] += (
                f"\n- {found['first']} before {found['second']}: {found['verdict']} "
                f"({found['lead']} points)"
            )
    parts += report.notes
    return "\n\n".join(parts)


def _table(rows: Sequence[Sequence[str]]) -> str:
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _page(output: Path) -> str:
    """The text of README.md: the experiments that the folder holds, in the catalogue's order."""
    paths = [output / f"{name}.json" for name in EXPERIMENTS if (output / f"{name}.json").exists()]
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    first = documents[0]
    parts = [
        f"# Experiments on {first['data']}\n\n"
        f"A training is `python -m mmixer_kernels.train {first['training']}` with the options of "
        "its network, which the JSON files name, for each seed"
        f"{' and fold' if first['folds'] else ''}."
    ]
    parts += [_section(output, document) for document in documents]
    parts.append(_provenance(documents))
    return "\n\n".join(parts) + "\n"


def _section(output: Path, document: dict[str, Any]) -> str:
    name = document["name"]
    lines = [f"## {document['title']}", document["markdown"]]
    if (output / f"{name}.png").exists():
        lines.append(f"![{document['title']}]({name}.png)")
    lines.append(f"`{document['command']}`")
    return "\n\n".join(lines)


def _provenance(documents: Sequence[dict[str, Any]]) -> str:
    trainings = {
        (training["network"], training["seed"], training["fold"]): training
        for document in documents
        for training in document["trainings"]
    }
    minutes = sum(training["seconds"] for training in trainings.values()) / 60
    commits = sorted({training["commit"] for training in trainings.values()})
    threads = sorted({training["threads"] for training in trainings.values()})
    machine = documents[-1]["machine"]
    return (
        "## Where it ran\n\n"
        f"{len(trainings)} trainings and what was measured on them took {minutes:.1f} minutes, "
        f"added up (threads of each: {' or '.join(map(str, threads))}; divide by those that ran "
        f"side by side), on {machine['processor']}, {machine['processors']} processors; Python "
        f"{machine['versions']['python']}, torch {machine['versions']['torch']}; commit "
        f"{', '.join(commits)}. ± after an accuracy is the standard deviation over seeds; after a "
        "difference it is half of its 95 % confidence interval, over folds where there are folds, "
        "else over seeds."
    )
