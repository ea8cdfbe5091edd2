"""A trained network as a file that other programs run: ONNX, or a program of torch.export."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..atomic import replacing
from ..data.standardize import Standardize
from ..data.video import VideoOptions
from ..errors import UserError, user_errors
from ..modules import FusedMCU
from ..training.model import Recognizer
from .restore import Restored

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""The packages that the format onnx needs."""
MARGIN = 16
"""Multiple of float32's own rounding error by which an exported network may differ from float64:
its convolutions sum in another order, and may be merged with batch norm."""

Run = Callable[[Sequence[Tensor]], Tensor]


class Exported(NamedTuple):
    """The file that was written: `inputs`, the shape of each by modality, with the names of the
    sizes that are free; the greatest `error` of the logits that was seen, and the greatest that is
    `allowed`."""

    path: Path
    inputs: dict[str, list[str | int]]
    classes: int
    error: float
    allowed: float


class Flat(nn.Module):
    """A Recognizer that takes its modalities as arguments of their own, and features as they were
    before they were standardized."""

    def __init__(self, recognizer: Recognizer, standardize: Standardize | None) -> None:
        super().__init__()
        self.recognizer = recognizer
        self.standardize = standardize

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits `[B, K]` of a tensor `[B, T, ...]` per modality."""
        return self.recognizer(inputs if self.standardize is None else self.standardize(*inputs))


def export(
    restored: Restored, path: Path, kind: Literal["onnx", "torch"], steps: int | None = None
) -> Exported:
    """Writes a network, with the names of its modalities and classes, after a check.

    The file's inputs are float32 `[batch, time, ...]`, one per modality: features as the files of
    `arrays` have them, which the network in the file standardizes where the training did, and
    anything else as the data set's transforms leave it. Its output is the logits `[batch, K]`.
    All clips of a batch have all steps. For `onnx` the MCU is the reference in a loop, see
    `mmixer_kernels.onnx`; in a program of torch.export it is the engine's own op, so that whoever
    loads it imports mmixer_kernels first.

    What was written is loaded again and run on random inputs of other sizes. It may differ from
    the network in float64 by MARGIN times what float32 PyTorch does.

    Args:
        restored: a checkpoint's network on the CPU.
        path: the file to write.
        kind: "onnx", or "torch" for a program of torch.export.
        steps: fixes the time to so many steps; None leaves it free, but for extractors that join
            steps of the time, whose samples all have the same number.

    Raises:
        UserError: a package is missing, the time cannot be free, the extractors cannot take
            `steps`, the numbers differ, or the file cannot be written.
    """
    if kind == "onnx":
        _require_packages()
    recognizer = restored.model
    shapes = _shapes(restored)
    if steps is not None:
        _check_steps(recognizer, shapes, steps)
    elif _shortens(recognizer, shapes):
        steps = shapes[0][0]
    if steps is None and _unrolls(recognizer):
        raise UserError(
            "the time of PyTorch's GRU and LSTM cannot be left free in an export: fix the number "
            "of steps by --steps"
        )
    example_steps = steps or max(2, shapes[0][0])
    names = restored.data.modalities
    about = {"modalities": list(names), "classes": list(restored.data.classes)}
    moments = restored.data.moments
    network = Flat(recognizer, None if moments is None else Standardize(names, moments)).eval()
    example = _random(network, shapes, 2, example_steps)
    free = {0: torch.export.Dim("batch"), **({1: torch.export.Dim("time")} if not steps else {})}
    with torch.no_grad(), _quiet():
        program = torch.export.export(
            network, tuple(example), dynamic_shapes=((free,) * len(example),)
        )
        if kind == "onnx":
            content, run = _onnx(program, free, about)
        else:
            content, run = _torch(program, about)
        sizes = [(3, steps or example_steps + 3), (1, steps or 1)]
        error, allowed = _compare(run, network, [_random(network, shapes, *size) for size in sizes])
    if not error <= allowed:
        raise UserError(
            f"the exported network differs by {error:.1e} from this one, and {allowed:.1e} is "
            f"allowed, so {path} was not written: this is a fault of the export by torch "
            f"{torch.__version__}"
        )
    with user_errors(), replacing(path) as file:
        file.write(content)
    inputs: dict[str, list[str | int]] = {
        name: ["batch", steps or "time", *shape[1:]]
        for name, shape in zip(names, shapes, strict=True)
    }
    return Exported(path, inputs, len(about["classes"]), error, allowed)


def _require_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format onnx needs {', '.join(missing)}, which cannot be found: "
            "pip install 'mmixer_kernels[export]'"
        )


def _check_steps(recognizer: Recognizer, shapes: Sequence[tuple[int, ...]], steps: int) -> None:
    """Raises UserError where the extractors cannot take so many steps, as networks of video."""
    try:
        with torch.no_grad():
            recognizer.features(_noise(shapes, 1, steps))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            f"--steps must be a number of steps that the extractors take, such as {shapes[0][0]}, "
            f"that of the run, but is {steps}: {str(error).splitlines()[0]}"
        ) from error


def _shortens(recognizer: Recognizer, shapes: Sequence[tuple[int, ...]]) -> bool:
    """True where the extractors give fewer steps than they get."""
    sample = _noise(shapes, 1, max(2, shapes[0][0]))
    with torch.no_grad():
        return recognizer.features(sample)[0].shape[1] != sample[0].shape[1]


def _unrolls(recognizer: Recognizer) -> bool:
    """True where torch.export writes out each step of a recurrence, as it does PyTorch's own."""
    return any(isinstance(module, nn.GRU | nn.LSTM) for module in recognizer.modules())


def _shapes(restored: Restored) -> list[tuple[int, ...]]:
    """The shapes `[T, ...]` of a sample's modalities."""
    options = restored.options.data
    if isinstance(options, VideoOptions):
        frame = (3, options.image_size, options.image_size)
        return [(options.frames or 1, *frame)] * len(restored.data.modalities)
    return [tuple(x.shape) for x in restored.data.test[0].inputs]


def _random(
    network: Flat, shapes: Sequence[tuple[int, ...]], batch: int, steps: int
) -> list[Tensor]:
    """Random inputs, of the features' own means and deviations where the network knows them."""
    inputs = _noise(shapes, batch, steps)
    return inputs if network.standardize is None else network.standardize.inverse(inputs)


def _noise(shapes: Sequence[tuple[int, ...]], batch: int, steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return [torch.randn(batch, steps, *shape[1:], generator=generator) for shape in shapes]


def _onnx(
    program: torch.export.ExportedProgram, free: dict[int, Any], about: dict[str, Any]
) -> tuple[bytes, Run]:
    modalities = about["modalities"]
    written = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=modalities,
        output_names=["logits"],
        dynamic_shapes=((free,) * len(modalities),),
    )
    assert written is not None
    _forget_shapes(written.model.graph, len(about["classes"]))
    written.model.metadata_props.update({key: json.dumps(value) for key, value in about.items()})
    content = written.model_proto.SerializeToString()

    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(inputs: Sequence[Tensor]) -> Tensor:
        named = {name: x.numpy() for name, x in zip(modalities, inputs, strict=True)}
        return torch.from_numpy(session.run(["logits"], named)[0])

    return content, run


def _forget_shapes(graph: Any, classes: int) -> None:
    """Takes the shapes between inputs and output away, for torch 2.11 writes wrong ones for LSTM;
    whoever runs the file infers them."""
    from onnx_ir import Shape

    for node in graph:
        for value in node.outputs:
            value.shape = None
    graph.outputs[0].shape = Shape(["batch", classes])


def _torch(program: torch.export.ExportedProgram, about: dict[str, Any]) -> tuple[bytes, Run]:
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"about.json": json.dumps(about)})
    module = torch.export.load(io.BytesIO(file.getvalue())).module()
    return file.getvalue(), lambda inputs: module(*inputs)


def _compare(run: Run, network: Flat, batches: Sequence[Sequence[Tensor]]) -> tuple[float, float]:
    """The greatest difference of the logits from float64's, and the greatest that is allowed."""
    exact = copy.deepcopy(network).double()
    for module in exact.modules():
        if isinstance(module, FusedMCU):
            module.engine = "reference"
    error = rounding = 0.0
    for inputs in batches:
        truth = exact(*(x.double() for x in inputs))
        error = max(error, _difference(run(inputs), truth))
        # By chance a few logits are right to the last bit: the bound is no less than that bit.
        last_bit = torch.finfo(torch.float32).eps * truth.abs().max().item()
        rounding = max(rounding, _difference(network(*inputs), truth), last_bit)
    return error, MARGIN * rounding


def _difference(logits: Tensor, truth: Tensor) -> float:
    if logits.shape != truth.shape or not logits.isfinite().all():
        return float("inf")
    return (logits.double() - truth).abs().max().item()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the warnings that torch's exporter causes in torch's own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
