"""The networks that the experiments train, each by its difference from M-Mixer."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from ..data import ClipsOptions
from ..data.video import VideoOptions
from ..engines import choose, of_device
from ..errors import UserError
from ..training.options import Options
from ..training.run import device_of


@dataclass(frozen=True)
class Network:
    """A network or a data set's form: options of `python -m mmixer_kernels.train`.

    Args:
        name: name of its folder, and in JSON.
        label: name in tables and pictures.
        by_fold: further options on each fold, where they were chosen fold by fold.
    """

    name: str
    label: str
    options: tuple[str, ...] = ()
    by_fold: tuple[tuple[str, ...], ...] = ()


M_MIXER = Network("m-mixer", "M-Mixer")
MAX = Network("max", "max pooling", ("--model.summarizer", "max"))
GRU_SUMMARIZER = Network("gru-summarizer", "GRU", ("--model.summarizer", "gru"))
LSTM = Network("lstm", "LSTM", ("--model.unit", "lstm"))
GRU = Network("gru", "GRU", ("--model.unit", "gru"))
NO_CONTEXT = Network("no-context", "MCU without context", ("--model.content", "none"))
SELF = Network("self", "MCU-self", ("--model.content", "self"))
# Table 3's experiments I to III are all without LayerNorm (Section 4.3.3).
OWN_CONTENT = Network(
    "own-content", "I: mix module", ("--model.content", "self", "--model.no-layer-norm")
)
CONCATENATION = Network(
    "concatenation", "II: cross content", ("--model.mix", "concat", "--model.no-layer-norm")
)
NO_NORM = Network("no-norm", "III: mix module, cross content", ("--model.no-layer-norm",))
ORTHOGONAL = Network("orthogonal", "orthogonal", ("--model.init", "orthogonal"))

CHOSEN_HERE = ("unit", "summarizer", "content", "mix", "layer_norm", "init")
"""The options of the model that are the experiments' to choose."""


def of_engines(base: Options) -> list[Network]:
    """M-Mixer by each engine that can run on the base's device."""
    device = device_of(base.run.device)
    names = [engine.NAME for engine in of_device(device) if engine.state(device).available]
    used = choose(base.run.model.engine, torch.empty(0, device=device))
    return [
        _form(M_MIXER, name, f"engine-{name}", ("--model.engine", name), name == used)
        for name in names
    ]


def of_modalities(base: Options) -> list[Network]:
    """M-Mixer on two modalities, three and more, as the data set has them.

    Raises:
        UserError: the data set leaves no choice.
    """
    name = base.run.data
    choices: dict[tuple[str, ...], str]
    if name == "watch":
        choices = {("sensors",): "2: sensors", ("gravity",): "3: gravity", ("axes",): "6: axes"}
    elif name in ("synthetic", "ntu60", "ntu120"):
        sets = (("rgb", "depth"), ("rgb", "ir"), ("depth", "ir"), ("rgb", "depth", "ir"))
        choices = {names: f"{len(names)}: {' + '.join(names)}" for names in sets}
    elif isinstance(base.data, ClipsOptions) and len(base.data.modalities) > 2:
        numbers = range(2, len(base.data.modalities) + 1)
        subsets = [s for n in numbers for s in itertools.combinations(base.data.modalities, n)]
        choices = {names: f"{len(names)}: {' + '.join(names)}" for names in subsets}
    else:
        raise UserError(
            f"modalities needs a data set with modalities to choose from, but --data is {name}: "
            "take synthetic, watch, ntu60, ntu120 or clips with three modalities or more"
        )
    now = base.data.modalities  # type: ignore[attr-defined]
    now = (now,) if isinstance(now, str) else now
    return [
        _form(
            *(M_MIXER, label, f"modalities-{'-'.join(chosen)}"),
            ("--modalities", *chosen),
            chosen == now,
        )
        for chosen, label in choices.items()
    ]


def of_lengths(base: Options) -> list[Network]:
    """M-Mixer and the GRU on sequences of several lengths T, as the data set can give them.

    Raises:
        UserError: the data set's sequences have the length they have.
    """
    name = base.run.data
    if name == "watch":
        option, values = "stride", (8, 4, 2)
    elif name == "synthetic" or isinstance(base.data, VideoOptions):
        option, values = "frames", (4, 8, 16)
    else:
        raise UserError(
            f"length needs a data set whose sequences can be made longer, but --data is {name}: "
            "take synthetic, watch or a data set of video"
        )
    now = getattr(base.data, option)
    return [
        _form(
            *(network, f"{network.label}, {option} {value}", f"{network.name}-{option}-{value}"),
            (f"--{option}", str(value)),
            value == now,
        )
        for network in (M_MIXER, GRU)
        for value in values
    ]


def _form(
    network: Network, label: str, name: str, options: tuple[str, ...], unchanged: bool
) -> Network:
    """A network in another form; where the options change nothing, its own trainings."""
    if unchanged:
        return Network(network.name, label, network.options)
    return Network(name, label, network.options + options)
