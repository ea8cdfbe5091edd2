"""The networks that the experiments train, each by its difference from M-Mixer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..data.video import VideoOptions
from ..engines import engines, get
from ..training.command import UserError
from ..training.options import Options
from ..training.run import device_of


@dataclass(frozen=True)
class Network:
    """A network or a data set's form: options of `python -m mmixer_kernels.train`.

    Args:
        name: of its folder and in JSON.
        label: in tables and pictures.
    """

    name: str
    label: str
    options: tuple[str, ...] = ()


M_MIXER = Network("m-mixer", "M-Mixer")
MAX = Network("max", "max pooling", ("--model.summarizer", "max"))
GRU_SUMMARIZER = Network("gru-summarizer", "GRU", ("--model.summarizer", "gru"))
LSTM = Network("lstm", "LSTM", ("--model.unit", "lstm"))
GRU = Network("gru", "GRU", ("--model.unit", "gru"))
SELF = Network("self", "MCU-self", ("--model.content", "self"))
# Table 3's experiments I to III are all without LayerNorm (Section 4.3.3).
OWN_CONTENT = Network(
    "own-content", "I: mix module", ("--model.content", "self", "--model.no-layer-norm")
)
CONCATENATION = Network(
    "concatenation", "II: cross content", ("--model.mix", "concat", "--model.no-layer-norm")
)
NO_NORM = Network("no-norm", "III: mix module, cross content", ("--model.no-layer-norm",))
QUERY = Network("query", "queries", ("--model.content", "query"))

CHOSEN_HERE = ("unit", "summarizer", "content", "mix", "layer_norm")
"""The options of the model that are the experiments' to choose."""


def of_engines(base: Options) -> list[Network]:
    """M-Mixer by each engine that can run on the base's device."""
    import torch

    probe = torch.empty(0, device=device_of(base.run.device))
    names = [
        name
        for name, state in engines().items()
        if state.available and get(name).unsupported(probe) is None
    ]
    return [Network(f"engine-{name}", name, ("--model.engine", name)) for name in names]


def of_modalities(base: Options) -> list[Network]:
    """M-Mixer on two modalities, three and more, as the data set has them.

    Raises:
        UserError: the data set leaves no choice.
    """
    data = base.run.data
    if data == "watch":
        streams = {"sensors": 2, "gravity": 3, "axes": 6}
        return [
            Network(f"modalities-{name}", f"{count}: {name}", ("--modalities", name))
            for name, count in streams.items()
        ]
    if data in ("synthetic", "ntu60", "ntu120"):
        sets: Sequence[tuple[str, ...]] = (
            *(("rgb", "depth"), ("rgb", "ir"), ("depth", "ir")),
            ("rgb", "depth", "ir"),
        )
        return [
            Network(
                f"modalities-{'-'.join(names)}",
                f"{len(names)}: {' + '.join(names)}",
                ("--modalities", *names),
            )
            for names in sets
        ]
    raise UserError(
        f"modalities needs a data set with modalities to choose from, but --data is {data}: take "
        "synthetic, watch, ntu60 or ntu120"
    )


def of_lengths(base: Options) -> list[Network]:
    """M-Mixer and the GRU on sequences of several lengths T, as the data set can give them.

    Raises:
        UserError: the data set's sequences have the length they have.
    """
    data = base.run.data
    if data == "synthetic":
        forms = [(f"frames {count}", ("--frames", str(count))) for count in (4, 8, 16, 32)]
    elif data == "watch":
        forms = [(f"stride {step}", ("--stride", str(step))) for step in (8, 4, 2, 1)]
    elif isinstance(base.data, VideoOptions):
        forms = [(f"frames {count}", ("--frames", str(count))) for count in (4, 8, 16, 32)]
    else:
        raise UserError(
            f"length needs a data set whose sequences can be made longer, but --data is {data}: "
            "take synthetic, watch or a data set of video"
        )
    return [
        Network(
            f"{network.name}-{form.replace(' ', '-')}",
            f"{network.label}, {form}",
            network.options + options,
        )
        for network in (M_MIXER, GRU)
        for form, options in forms
    ]
