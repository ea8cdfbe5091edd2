"""M-Mixer trained on features of your own, in arrays: `python examples/own_features.py`"""

import json
import tempfile
from pathlib import Path

import numpy as np

from mmixer_kernels import predict, train

random = np.random.default_rng(0)
CLASSES = np.array(["walk", "run", "jump"])
MEANS = {"video": random.normal(size=(3, 32)), "audio": random.normal(size=(3, 12))}


def write(path, count, labelled=True):
    """A file of samples: an array `[samples, T, features]` per modality, labels and class names."""
    label = random.integers(3, size=count)
    arrays = {
        modality: (means[label, None] + 3 * random.normal(size=(count, 8, means.shape[1])))
        for modality, means in MEANS.items()
    }
    if labelled:
        arrays |= {"label": label, "classes": CLASSES}
    np.savez(path, **arrays)
    return CLASSES[label]


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    write(folder / "train.npz", 120)
    write(folder / "test.npz", 60)
    truth = write(folder / "new.npz", 3, labelled=False)
    # As `python -m mmixer_kernels.train --data arrays --root FOLDER ...`; the others likewise.
    options = "--epochs 3 --model.hidden-size 32 --optimizer.learning-rate 5e-3 --device cpu"
    train.main(f"--data arrays --root {folder} --output {folder}/run {options}".split())
    print("test accuracy", json.loads((folder / "run/result.json").read_text())["accuracy"])
    predict.main(f"{folder}/run/best.pt {folder}/new.npz --output {folder}/new.png".split())
    print("in truth they are", *truth)
