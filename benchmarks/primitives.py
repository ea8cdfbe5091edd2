"""Recurrent layers of other runtimes, without torch around them: what they compute, in float64, and
the check that each has to pass before it is a baseline."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import onednn
import torch
from problems import Size
from torch import Tensor

from mmixer_kernels.comparison.checking import largest, relative_error
from mmixer_kernels.comparison.timing import Contender, torch_threads


class Kind(NamedTuple):
    """A layer by oneDNN's name of its primitive.

    "gru" multiplies with r before the recurrent product (Cho et al., 2014), "lbr_gru" after it, as
    torch's GRU does.
    """

    primitive: str
    gates: int
    biases: int


GRU, LBR_GRU, LSTM = Kind("gru", 3, 3), Kind("lbr_gru", 3, 4), Kind("lstm", 4, 4)


def multiply_adds(size: Size) -> dict[str, float]:
    """Those of each contender's forward, per row and in units of H^2; forward + backward has three
    times as many. FusedMCU's products with the context are those of a sample."""
    torchs = {"nn.GRU": LBR_GRU, "nn.LSTM": LSTM}
    kinds = torchs | {name: kind for name, (kind, _) in (ONEDNN | ONNX).items()}
    ours = dict.fromkeys(("FusedMCU", "PrepackedMCU"), 5 + 2 / size.steps)
    return ours | {name: float(2 * kind.gates) for name, kind in kinds.items()}


def draw(kind: Kind, size: Size) -> dict[str, Tensor]:
    """Operands by oneDNN's names, in its order and with its sizes, the weights `[L, D, I, G, H]`
    lying in memory as those of torch's modules do, `[G, H, I]`; the same in every call."""
    torch.manual_seed(0)
    T, B, H = size
    states = ["src_iter", "src_iter_c"] if kind is LSTM else ["src_iter"]

    def uniform(*sizes: int) -> Tensor:
        return torch.empty(sizes).uniform_(-(H**-0.5), H**-0.5)

    def weights() -> Tensor:
        return uniform(1, 1, kind.gates, H, H).permute(0, 1, 4, 2, 3)

    return {
        "src_layer": torch.randn(T, B, H),
        **{name: torch.randn(1, 1, B, H) for name in states},
        "weights_layer": weights(),
        "weights_iter": weights(),
        "bias": uniform(1, 1, kind.biases, H),
    }


def truth(kind: Kind, operands: dict[str, Tensor]) -> dict[str, Tensor]:
    """The results by oneDNN's names; of a GRU's gates the first keeps the state, the second is r,
    and an LSTM's are i, f, the candidate and o."""
    weights_layer, weights_iter, bias = (
        operands[name][0, 0] for name in ("weights_layer", "weights_iter", "bias")
    )
    h = operands["src_iter"][0, 0]
    c = operands["src_iter_c"][0, 0] if kind is LSTM else h

    def product(x: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("bi,igo->gbo", x, weights)

    output = []
    for x in operands["src_layer"]:
        gates = product(x, weights_layer) + bias[: kind.gates, None]
        if kind is LSTM:
            gates = gates + product(h, weights_iter)
            i, f, _, o = gates.sigmoid()
            c = f * c + i * gates[2].tanh()
            h = o * c.tanh()
        else:
            u, r = (gates[:2] + product(h, weights_iter[:, :2])).sigmoid()
            if kind is GRU:
                recurrent = (r * h) @ weights_iter[:, 2]
            else:
                recurrent = r * (h @ weights_iter[:, 2] + bias[3])
            h = u * h + (1 - u) * (gates[2] + recurrent).tanh()
        output.append(h)
    results = {"dst_layer": torch.stack(output), "dst_iter": h[None, None]}
    return results | ({"dst_iter_c": c[None, None]} if kind is LSTM else {})


class Layer(Protocol):
    """Operands that are read where they lie, results, and the call that writes these."""

    operands: dict[str, Tensor]
    results: dict[str, Tensor]

    def forward(self) -> None: ...


class OnnxLayer:
    """ONNX Runtime's GRU, inference alone, for the number of threads that torch has now.

    Its threads spin inside a call, which is its fastest, and not after it, where they would slow
    the next contender.
    """

    def __init__(self, kind: Kind, operands: dict[str, Tensor]) -> None:
        try:
            import onnx
            import onnxruntime
        except ImportError as problem:
            raise ImportError(
                f"ONNX Runtime's GRU is that of onnxruntime, its graph is made by onnx: "
                f"pip install onnx onnxruntime ({problem!r})"
            ) from problem
        self.operands = operands
        T, B, H = operands["src_layer"].shape
        self.results = {"dst_layer": torch.empty(T, B, H), "dst_iter": torch.empty(1, 1, B, H)}
        bias = operands["bias"][0, 0]
        recurrent = torch.zeros(3, H)
        recurrent[3 - len(bias[3:]) :] = bias[3:]
        constants = {
            **{
                name: operands[weights].permute(0, 1, 3, 4, 2).reshape(1, 3 * H, H)
                for name, weights in {"W": "weights_layer", "R": "weights_iter"}.items()
            },
            "B": torch.cat([bias[:3], recurrent]).reshape(1, 6 * H),
        }
        make = onnx.helper
        values = {
            name: make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
            for name, shape in {
                "X": (T, B, H),
                "initial_h": (1, B, H),
                "Y": (T, 1, B, H),
                "Y_h": (1, B, H),
            }.items()
        }
        node = make.make_node(
            "GRU",
            ["X", "W", "R", "B", "", "initial_h"],
            ["Y", "Y_h"],
            hidden_size=H,
            linear_before_reset=int(kind is LBR_GRU),
        )
        graph = make.make_graph(
            [node],
            "GRU",
            [values["X"], values["initial_h"]],
            [values["Y"], values["Y_h"]],
            [onnx.numpy_helper.from_array(x.numpy(), name) for name, x in constants.items()],
        )
        opset = [make.make_opsetid("", 14)]
        model = make.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.force_spinning_stop", "1")
        provider = ["CPUExecutionProvider"]
        self._session = onnxruntime.InferenceSession(model, options, providers=provider)
        self._binding = binding = self._session.io_binding()
        where = "cpu", 0, np.float32
        for name, x in {"X": operands["src_layer"], "initial_h": operands["src_iter"][0]}.items():
            binding.bind_input(name, *where, x.shape, x.data_ptr())
        output, last = self.results.values()
        for name, x in {"Y": output.unsqueeze(1), "Y_h": last[0]}.items():
            binding.bind_output(name, *where, x.shape, x.data_ptr())

    def forward(self) -> None:
        self._session.run_with_iobinding(self._binding)


def _onednn(kind: Kind, operands: dict[str, Tensor]) -> onednn.Layer:
    return onednn.Layer(kind.primitive, operands)


Baselines = dict[str, tuple[Kind, Callable[[Kind, dict[str, Tensor]], Layer]]]
ONEDNN: Baselines = {
    "oneDNN GRU": (GRU, _onednn),
    "oneDNN LBR-GRU": (LBR_GRU, _onednn),
    "oneDNN LSTM": (LSTM, _onednn),
}
ONNX: Baselines = {
    "ONNX Runtime GRU": (GRU, OnnxLayer),
    "ONNX Runtime LBR-GRU": (LBR_GRU, OnnxLayer),
}
BASELINES = {"forward": ONEDNN | ONNX, "forward + backward": ONEDNN}
METHODS = {"forward": "forward", "forward + backward": "forward_backward"}


def check(kind: Kind, layer: Layer) -> float:
    """The largest relative error of a layer's results and, where it has any, gradients against
    float64; AssertionError where one passes the tolerance or is not finite."""
    operands = {name: x.double().requires_grad_() for name, x in layer.operands.items()}
    with torch_threads(1):
        expected = truth(kind, operands)
    errors = {}

    def compare(title: str, call: Callable[[], None]) -> None:
        for x in layer.results.values():
            x.fill_(torch.nan)  # what a call leaves out then shows
        call()
        for name, x in expected.items():
            errors[f"{name} of {title}"] = relative_error(layer.results[name], x)

    compare("forward", layer.forward)
    if isinstance(layer, onednn.Layer):
        directions = {name: torch.randn_like(x) for name, x in layer.results.items()}
        given = {name: layer.gradients[name].clone() for name in directions}
        for name, x in directions.items():
            layer.gradients[name].copy_(x)
        compare("forward + backward", layer.forward_backward)
        with torch_threads(1):
            gradients = torch.autograd.grad(
                list(expected.values()),
                list(operands.values()),
                [directions[name].double() for name in expected],
            )
        for name, x in zip(operands, gradients, strict=True):
            errors[f"gradient of {name}"] = relative_error(layer.gradients[name], x)
        for name, x in given.items():
            layer.gradients[name].copy_(x)
    return largest(errors)


def baselines(size: Size, passes: str) -> tuple[list[Contender], dict[str, str]]:
    """Those that are installed and pass their `check`; of the others the names, and why."""
    contenders, missing = [], {}
    for name, (kind, make) in BASELINES[passes].items():
        try:
            layer = make(kind, draw(kind, size))
        except ImportError as problem:
            missing[name] = str(problem)
        else:
            check(kind, layer)
            contenders.append(Contender(name, getattr(layer, METHODS[passes])))
    return contenders, missing
