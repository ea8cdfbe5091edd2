"""Fused recurrent kernels for PyTorch, and Modality Mixer action recognition built on them."""

from . import functional, reference
from . import onnx as onnx
from .engines import EngineState, engines
from .modules import FusedMCU, FusedMCUCell
from .network import MMixer, StreamClassifiers
from .prepacked import PrepackedMCU
from .quantized import QuantizedMCUCell
from .stack import FusedMCUStack
from .streaming import CellStream
from .version import __version__ as __version__

__all__ = [
    "CellStream",
    "EngineState",
    "FusedMCU",
    "FusedMCUCell",
    "FusedMCUStack",
    "MMixer",
    "PrepackedMCU",
    "QuantizedMCUCell",
    "StreamClassifiers",
    "engines",
    "functional",
    "reference",
]
