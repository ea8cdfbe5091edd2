"""Fused recurrent kernels for PyTorch, and Modality Mixer action recognition built on them."""

from . import functional, reference
from . import onnx as onnx
from .engines import EngineState, engines
from .modules import FusedMCU, FusedMCUCell
from .network import MMixer, StreamClassifiers
from .streaming import CellStream

__all__ = [
    "CellStream",
    "EngineState",
    "FusedMCU",
    "FusedMCUCell",
    "MMixer",
    "StreamClassifiers",
    "engines",
    "functional",
    "reference",
]
__version__ = "0.1.0"
