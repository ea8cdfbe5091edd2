"""NTU RGB+D, NW-UCLA and a person's own recordings in miniature: the layout and the formats are the
real ones, the pictures are small and carry their frame's number.

Colour and IR pictures have the number in eight black or white blocks along their upper half, which
survive compression; depth is 1000 mm and 7 mm more per frame.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

RGB_SIZE, KINECT_SIZE = (54, 96), (54, 64)
"""Height and width of NTU's RGB, and of its depth and IR."""
CODECS = {
    "mpeg4": {"bf": "2", "sc_threshold": "1000000000"},
    "libx264": {"preset": "ultrafast", "x264-params": "bframes=2:keyint=1000:scenecut=0"},
}
"""Encoders, and options that give one key frame and B-frames."""


def ntu(
    root: Path,
    setups: Sequence[int] = (1,),
    cameras: Sequence[int] = (1,),
    subjects: Sequence[int] = (1, 2, 3),
    actions: Sequence[int] = (1, 2),
    modalities: Sequence[str] = ("rgb", "depth"),
    depth: str = "masked",
    frames: int = 17,
    per_setup: bool = False,
    codec: str = "mpeg4",
    damage: Iterable[tuple[str, str, str]] = (),
) -> list[str]:
    """Writes a tree and gives its samples' names.

    Args:
        subjects: of the cross-subject split, 1 validates, 2 trains and 3 tests.
        frames: in the shortest clip; others have up to three more.
        per_setup: archives unpacked in a folder a setup, as `nturgb+d_rgb_s001`.
        codec: a key of CODECS.
        damage: (sample's name, modality, kind) as `spoil` takes them.
    """
    names = [
        f"S{s:03d}C{c:03d}P{p:03d}R001A{a:03d}"
        for s, c, p, a in itertools.product(setups, cameras, subjects, actions)
    ]
    for name, modality in itertools.product(names, modalities):
        setup, action = name[:4].lower(), int(name[-3:])
        folder = f"nturgb+d_{modality}" + (
            "_masked" if (modality, depth) == ("depth", "masked") else ""
        )
        parent = root / (f"{folder}_{setup}" if per_setup else "") / folder
        parent.mkdir(parents=True, exist_ok=True)
        count = frames + (int(name[9:12]) + action) % 4
        if modality == "depth":
            pattern = "MDepth-{:08d}.png" if depth == "masked" else "Depth-{:08d}.png"
            for number in range(count):
                path = parent / name / pattern.format(number + 1)
                write_picture(path, depth_picture(number, KINECT_SIZE, depth == "masked"))
        else:
            size = RGB_SIZE if modality == "rgb" else KINECT_SIZE
            write_video(parent / f"{name}_{modality}.avi", count, size, codec, action)
    for name, modality, kind in damage:
        spoil(root, name, modality, kind)
    return names


def nw_ucla(
    root: Path,
    views: Sequence[int] = (1, 2, 3),
    subjects: Sequence[int] = (1, 2),
    actions: Sequence[int] = (1, 8),
    frames: int = 12,
) -> list[str]:
    """Writes a tree with an empty folder, view_2/a12_s09_e05, and gives its samples' names.

    Frames are numbered from 3 and 7 is missing, as a recorder that drops frames leaves them.
    """
    names = []
    for v, a, s in itertools.product(views, actions, subjects):
        folder = root / "multiview_action" / f"view_{v}" / f"a{a:02d}_s{s:02d}_e00"
        for n in (n for n in range(3, 4 + frames) if n != 7):
            stem = folder / f"frame_{n}_tc_{1000 + 33 * n}"
            write_picture(folder / f"{stem}_rgb.jpg", picture(n, (48, 64), a))
            write_picture(folder / f"{stem}_depth_vis.jpg", picture(0, (24, 32), a))
            path = folder / f"frame_{n}_tc_{1014 + 33 * n}_depth.png"
            write_picture(path, depth_picture(n, (24, 32), masked=False))
            (folder / f"{stem}_skeletons.txt").write_text("0\n")
        (folder / "fileList.txt").write_text("")
        names.append(f"{folder.name}_v{v:02d}")
    (root / "multiview_action" / "view_2" / "a12_s09_e05").mkdir(parents=True)
    return names


def clips(
    root: Path,
    lists: Mapping[str, Sequence[str]],
    modalities: Mapping[str, tuple[str, int]] = {"rgb": ("jpg", 12), "depth": ("16-bit", 12)},
) -> None:
    """Writes lists, and the samples that their lines name.

    Args:
        lists: lines by the name of their file; those of classes.txt name no samples.
        modalities: the kind of a modality's files, as `write_recording` takes it, and the number
            of frames of each sample.
    """
    for file, lines in lists.items():
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines))
        if path.name == "classes.txt":
            continue
        for line in lines:
            name = (line.split("\t") if "\t" in line else line.split())[0].rstrip("/")
            for modality, (kind, frames) in modalities.items():
                write_recording(root / modality / name, kind, frames)


def write_recording(path: Path, kind: str, frames: int, rate: int = 30) -> Path:
    """Writes a sample of a modality, and gives the path of its file or folder.

    Args:
        path: without the ending of a video.
        kind: "jpg" or "png" in colour, "grey.jpg", "grey.png" or "16-bit" of pictures; else the
            ending of a video, which may have "grey." or "16-bit." before.
    """
    size = (48, 64)
    form, _, ending = kind.rpartition(".")
    if ending in ("jpg", "png", "16-bit"):
        for n in range(frames):
            image = picture(n, size, 1)
            if ending == "16-bit":
                image = depth_picture(n, size, masked=True)
            elif form == "grey":
                image = grey(image)
            write_picture(path / f"{n:06}.{'png' if ending == '16-bit' else ending}", image)
        return path
    file = path.with_name(f"{path.name}.{ending}")
    file.parent.mkdir(parents=True, exist_ok=True)
    codec = {"": "mpeg4", "grey": "ffv1", "16-bit": "ffv1"}[form]
    write_video(file, frames, size, codec, rate=rate, form=form)
    return file


def grey(image: np.ndarray) -> np.ndarray:
    """uint8 `[h, w]`: the mean of a picture's channels."""
    return image.mean(-1).astype(np.uint8)


def spoil(root: Path, name: str, modality: str, kind: str) -> Path:
    """Damages a sample's video, or the fifth picture of its depth, and gives that file's path.

    Args:
        name, modality: of an NTU tree; depth of either kind.
        kind: "missing" takes the video away, or the folder, and "gap" the picture; "empty",
            "garbage", "truncated" (to half of the frames) and "flipped" (three bits) leave a file.
    """
    if modality == "depth":
        folder = next(root.rglob(name))
        path = folder if kind == "missing" else sorted(folder.iterdir())[4]
    else:
        path = next(root.rglob(f"{name}_{modality}.avi"))
    if kind in ("missing", "gap"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return path
    content = bytearray(path.read_bytes())
    first = content.find(b"movi" if path.suffix == ".avi" else b"IDAT") + 4
    if kind == "flipped":
        for place in np.linspace(first, len(content) - 1, 5).astype(int)[1:-1]:
            content[place] ^= 16
    path.write_bytes(
        {
            "empty": b"",
            "garbage": bytes(np.random.default_rng(0).bytes(1000)),
            "truncated": content[: (first + len(content)) // 2],
            "flipped": content,
        }[kind]
    )
    return path


def number(frame: torch.Tensor) -> int:
    """The number in a frame `[C, h, w]`, resized or not; uint16 is depth."""
    if frame.dtype == torch.uint16:
        return (int(frame.int().max()) - 1000) // 7
    height, width = frame.shape[-2:]
    upper = frame.float().mean(0)[height // 8 : height * 3 // 8]
    middles = [round((block + 0.5) * width / 8) for block in range(8)]
    return sum(int(upper[:, x].mean() > 127) << bit for bit, x in enumerate(middles))


def picture(number: int, size: tuple[int, int], action: int) -> np.ndarray:
    """uint8 `[h, w, 3]`: the number above, a colour of the action's below."""
    height, width = size
    image = np.full((height, width, 3), (40 * action % 256, 90, 200), np.uint8)
    bits = [255 * (number >> bit & 1) for bit in range(8)]
    image[: height // 2] = np.repeat(bits, width // 8)[:, None]
    return image


def depth_picture(number: int, size: tuple[int, int], masked: bool) -> np.ndarray:
    """uint16 `[h, w]` in millimetres: a body before a background, which is 0 when masked."""
    height, width = size
    image = np.full(size, 0 if masked else 700, np.uint16)
    image[height // 4 :, width // 4 : width // 2] = 1000 + 7 * number
    return image


def write_picture(path: Path, image: np.ndarray, format: str | None = None) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, format)


def write_video(
    path: Path,
    frames: int,
    size: tuple[int, int],
    codec: str = "mpeg4",
    action: int = 1,
    rate: int = 30,
    form: str = "",
) -> None:
    """A video of one key frame whose pictures are numbered from 0; its form is "" for colour,
    "grey" or "16-bit"."""
    import av

    pixels = {"": "rgb24", "grey": "gray", "16-bit": "gray16le"}[form]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = pixels if form else "yuv420p"
        stream.codec_context.gop_size = 1000
        stream.options = CODECS.get(codec, {})
        for n in range(frames):
            image = picture(n, size, action)
            if form:
                image = grey(image) if form == "grey" else depth_picture(n, size, masked=True)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format=pixels)))
        container.mux(stream.encode())
