from __future__ import annotations

import itertools
import tarfile
import zlib
from pathlib import Path

import pytest
import torch
from data.sources import made_clips
from torch.utils.data import DataLoader, Dataset

from mmixer_kernels.data import convert, shards
from mmixer_kernels.data.clips import Clip
from mmixer_kernels.data.shards import Conversion
from mmixer_kernels.data.transforms import Sampling
from mmixer_kernels.errors import DamagedFile

SIZE = 24
FRAMES = {"rgb": 20, "depth": 17, "ir": 33}
"""Numbers of frames of the first clip; each other one has a frame more than the one before."""


def converted(folder: Path, clips: list[Clip], sampling: Sampling) -> Path:
    conversion = Conversion(
        "ntu60", tuple(FRAMES), shards.sampling_options(sampling), SIZE, 95, 2, {"depth": "masked"}
    )
    assert convert.convert(clips, ["a note"], "abc", conversion, folder, 1, False).complete
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(tmp_path_factory.mktemp("converted"), made_clips(5, FRAMES), Sampling(8))


def opened(folder: Path, **changed: object) -> list[Clip]:
    arguments = {
        "data": "ntu60",
        "modalities": tuple(FRAMES),
        "sampling": Sampling(8),
        "size": SIZE,
        "source": {"depth": "masked"},
        **changed,
    }
    answer = shards.clips(folder, **arguments)  # type: ignore[arg-type]
    assert answer is not None
    return answer.clips


@pytest.mark.parametrize("sampling", [Sampling(8), Sampling(3), Sampling(frames=4)])
def test_every_choice_of_modalities_reads_what_the_raw_form_gives(
    tmp_path: Path, sampling: Sampling
) -> None:
    raw = made_clips(5, FRAMES)
    folder = converted(tmp_path, raw, sampling)
    for number in (1, 2, 3):
        for modalities in itertools.permutations(FRAMES, number):
            clips = opened(folder, modalities=modalities, sampling=sampling)
            assert [(c.name, c.label) for c in clips] == [(c.name, c.label) for c in raw]
            for clip, original in zip(clips, raw, strict=True):
                assert list(clip.sources) == list(modalities)
                counts = [clip.sources[m].count() for m in modalities]
                assert counts == [original.sources[m].count() for m in modalities]
                indices = sampling(min(counts))
                for modality in modalities:
                    found = clip.sources[modality].read(indices, SIZE)
                    expected = original.sources[modality].read(indices, SIZE)
                    assert found.dtype == expected.dtype
                    assert found.shape == expected.shape
                    error = (found.int() - expected.int()).abs().max()
                    assert error <= (0 if modality == "depth" else 3)


def test_frames_repeat_where_they_are_asked_for_twice(folder: Path) -> None:
    source = opened(folder)[0].sources["depth"]
    frames = source.read([0, 8, 8, 16], SIZE)
    assert torch.equal(frames[1].int(), frames[2].int())
    assert not torch.equal(frames[0].int(), frames[1].int())


def test_what_was_not_stored_is_refused(folder: Path) -> None:
    source = opened(folder)[0].sources["rgb"]
    with pytest.raises(ValueError, match=r"frame 3 of clip000 was not stored.* 0, 8, 16"):
        source.read([0, 3], SIZE)
    with pytest.raises(ValueError, match="shorter side of 24 pixels, but 48 is asked for"):
        source.read([0], 48)


def test_a_folder_of_other_files_is_not_converted(tmp_path: Path) -> None:
    assert shards.clips(tmp_path, "ntu60", ["rgb"], Sampling(), 256, {}) is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sampling": Sampling(4)}, r"^--stride 4 .* converted with --stride 8: pass --stride 8"),
        ({"sampling": Sampling(frames=16)}, r"^--frames 16 .* with --stride 8: pass --stride 8"),
        ({"source": {"depth": "full"}}, r"^--depth full .* converted with --depth masked"),
        ({"data": "ntu120"}, r"^--data ntu120 .* converted from ntu60"),
        ({"modalities": ("rgb", "sound")}, r"rgb depth ir: leave out sound, or convert"),
        ({"size": 256}, r"256 pixels are asked for, but .* with --size 24"),
    ],
)
def test_another_conversion_is_refused(
    folder: Path, changed: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        opened(folder, **changed)


def test_how_depth_was_read_does_not_matter_without_it(folder: Path) -> None:
    assert len(opened(folder, modalities=("rgb", "ir"), source={})) == 5


def test_a_conversion_that_has_not_ended_is_refused(tmp_path: Path) -> None:
    converted(tmp_path, made_clips(2, FRAMES), Sampling(8))
    (tmp_path / "index.json").unlink()
    with pytest.raises(ValueError, match=r"no index\.json: its conversion has not ended"):
        opened(tmp_path)


def test_a_conversion_of_an_older_version_has_the_same_bytes_and_is_read(tmp_path: Path) -> None:
    converted(tmp_path, made_clips(2, FRAMES), Sampling(8))
    assert (tmp_path / "conversion.json").read_text() == (
        '{"data":"ntu60","modalities":["rgb","depth","ir"],"sampling":{"stride":8},"size":24,'
        '"quality":95,"samples_per_shard":2,"source":{"depth":"masked"},"format":1}\n'
    )
    assert shards.read_json(tmp_path / "index.json").keys() == {"classes", "notes", "shards"}
    samples = shards.read_json(tmp_path / "shard-000000.json")["samples"]
    assert all(sample.keys() == {"name", "label", "frames", "places"} for sample in samples)


def test_another_format_is_refused(tmp_path: Path) -> None:
    converted(tmp_path, made_clips(2, FRAMES), Sampling(8))
    path = tmp_path / "conversion.json"
    path.write_text(path.read_text().replace('"format":1', '"format":2'))
    with pytest.raises(ValueError, match=r"conversion\.json must have format 1, but has 2"):
        opened(tmp_path)


@pytest.mark.parametrize("change", ["longer", "shorter", "missing"])
def test_a_shard_of_another_size_is_named(tmp_path: Path, change: str) -> None:
    converted(tmp_path, made_clips(5, FRAMES), Sampling(8))
    path = tmp_path / "shard-000001.tar"
    content = path.read_bytes()
    if change == "missing":
        path.unlink()
    else:
        path.write_bytes(content + b"0" if change == "longer" else content[:-1])
    with pytest.raises(ValueError, match=rf"shard-000001\.tar must have {len(content)} bytes"):
        opened(tmp_path)


@pytest.mark.parametrize("modality", list(FRAMES))
def test_a_damaged_picture_is_named_when_it_is_read(tmp_path: Path, modality: str) -> None:
    converted(tmp_path, made_clips(5, FRAMES), Sampling(8))
    source = opened(tmp_path)[3].sources[modality]
    _, offset, length, _ = source.places[1]  # type: ignore[attr-defined]
    path = tmp_path / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    content[offset + length // 2] ^= 1
    path.write_bytes(content)
    source.read([0, 16], SIZE)
    with pytest.raises(DamagedFile, match=rf"shard-000001\.tar: clip003\.{modality}\.00008\."):
        source.read([0, 8, 16], SIZE)
    with pytest.raises(DamagedFile):
        source.verify(full=True)  # type: ignore[attr-defined]


def test_a_member_that_is_no_picture_is_named(tmp_path: Path) -> None:
    """The checksum of such a picture is right: it was written so."""
    converted(tmp_path, made_clips(5, FRAMES), Sampling(8))
    source = opened(tmp_path)[3].sources["rgb"]
    _, offset, length, _ = source.places[1]  # type: ignore[attr-defined]
    path = tmp_path / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    content[offset : offset + length] = bytes(length)
    path.write_bytes(content)
    source.places[1, 3] = zlib.crc32(bytes(length))  # type: ignore[attr-defined]
    with pytest.raises(
        DamagedFile, match=r"shard-000001\.tar: clip003\.rgb\.00008\.jpg cannot be decoded"
    ):
        source.read([0, 8, 16], SIZE)


def test_samples_are_groups_of_members_as_webdataset_makes_them(folder: Path) -> None:
    with tarfile.open(folder / "shard-000000.tar") as archive:
        names = archive.getnames()
    groups = [
        (key, [name.removeprefix(f"{key}.") for name in group])
        for key, group in itertools.groupby(names, lambda name: name.split(".")[0])
    ]
    assert [key for key, _ in groups] == ["clip000", "clip001"]
    assert groups[0][1] == [
        "json",
        *(f"rgb.{index:05}.jpg" for index in (0, 8, 16)),
        *(f"depth.{index:05}.png" for index in (0, 8, 16)),
        *(f"ir.{index:05}.jpg" for index in (0, 8, 16, 24, 32)),
    ]


class Frames(Dataset[torch.Tensor]):
    def __init__(self, clips: list[Clip]) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.clips[index].sources["depth"].read([0, 8, 16], SIZE).int()


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_loader_processes_read_as_one_does(folder: Path, start: str) -> None:
    frames = Frames(opened(folder))
    expected = torch.stack([frames[i] for i in range(5)])
    assert shards._opened.cache_info().currsize  # what the processes may inherit
    loader = DataLoader(frames, batch_size=1, num_workers=2, multiprocessing_context=start)
    for _ in range(2):
        assert torch.equal(torch.cat(list(loader)), expected)
