"""A unit as ONNX, run in a process without torch: `python examples/onnx_without_torch.py`"""

import subprocess
import sys
import tempfile

import numpy as np
import onnxruntime

SEQUENCE = np.random.default_rng(0).normal(size=(20, 1, 6)).astype(np.float32)  # [T, B, features]


def export(path):
    """Writes a unit to `path`, for any number of steps, and what it makes of SEQUENCE beside it."""
    import torch

    from mmixer_kernels import FusedMCU

    unit, example = FusedMCU(6, 0, 32).eval().requires_grad_(False), (torch.randn(4, 1, 6),)
    shapes = ({0: torch.export.Dim("time")},)
    torch.onnx.export(unit, example, path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    np.save(f"{path}.npy", unit(torch.from_numpy(SEQUENCE))[0])


def run(path):
    """Runs the file by ONNX Runtime alone."""
    session = onnxruntime.InferenceSession(path)
    output, h_n = session.run(None, {session.get_inputs()[0].name: SEQUENCE})
    assert "torch" not in sys.modules
    np.testing.assert_allclose(output, np.load(f"{path}.npy"), atol=1e-5)
    print(f"without torch: output {output.shape} and h_n {h_n.shape}, as torch has them")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        export(sys.argv[1])
    else:  # another process exports, since that takes torch
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, __file__, f"{folder}/unit.onnx"], check=True)
            run(f"{folder}/unit.onnx")
