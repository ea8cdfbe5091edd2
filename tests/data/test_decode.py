from __future__ import annotations

import contextlib
import importlib.util
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("torchvision")

from data import miniature

from mmixer_kernels.data.decode import (
    DepthFolderSource,
    NumberedPicturesSource,
    PictureFilesSource,
    VideoSource,
    require,
)
from mmixer_kernels.errors import DamagedFile


def numbers(frames):
    return [miniature.number(frame) for frame in frames]


@pytest.fixture(params=miniature.CODECS)
def video(request, tmp_path):
    path = tmp_path / "clip.avi"
    miniature.write_video(path, 50, miniature.RGB_SIZE, request.param)
    return path


def test_the_miniature_videos_have_b_frames_and_one_key_frame(video):
    import av

    with av.open(str(video)) as container:
        frames = list(container.decode(video=0))
    assert sum(frame.key_frame for frame in frames) == 1
    assert av.video.frame.PictureType.B in {frame.pict_type for frame in frames}


@pytest.mark.parametrize("indices", [range(50), range(0, 50, 8), [3, 3, 20, 49, 49], [0]])
def test_decoded_frames_are_those_asked_for(video, indices):
    source = VideoSource(str(video))
    assert source.count() == 50
    frames = source.read(indices, 32)
    assert numbers(frames) == list(indices)
    assert frames.shape == (len(indices), 3, 32, 57)
    assert frames.dtype == torch.uint8


@pytest.mark.parametrize("count", [1, 2, 5])
def test_short_videos(tmp_path, count):
    miniature.write_video(tmp_path / "clip.avi", count, miniature.RGB_SIZE)
    source = VideoSource(str(tmp_path / "clip.avi"))
    assert source.count() == count
    assert numbers(source.read(range(count), 54)) == list(range(count))


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_other_containers(tmp_path, suffix):
    path = tmp_path / f"clip.{suffix}"
    miniature.write_video(path, 30, miniature.RGB_SIZE, "libx264")
    source = VideoSource(str(path))
    assert source.count() == 30
    assert numbers(source.read([0, 13, 29], 54)) == [0, 13, 29]
    source.verify(full=False)


def test_colours_are_rgb_and_grey_is_one_channel(video):
    colour = VideoSource(str(video)).read([0], 54)[0, :, 45, 48].tolist()
    np.testing.assert_allclose(colour, miniature.picture(0, (54, 96), 1)[45, 48], atol=12)
    grey = VideoSource(str(video), "grey").read([0, 40], 27)
    assert grey.shape == (2, 1, 27, 48)
    assert numbers(grey) == [0, 40]
    np.testing.assert_allclose(
        grey[0, 0, 22, 24], 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2], atol=12
    )


@pytest.mark.parametrize("kind", ["empty", "garbage", "truncated", "flipped"])
def test_damaged_videos_are_named(video, kind):
    path = video.rename(video.with_name("S001C001P001R001A001_rgb.avi"))
    miniature.spoil(video.parent, "S001C001P001R001A001", "rgb", kind)
    for read in (
        lambda source: source.read([0], 32),
        lambda source: source.read(range(0, 50, 8), 32),
        lambda source: source.verify(full=True),
    ):
        with pytest.raises(DamagedFile, match=f"^{path}: "):
            read(VideoSource(str(path)))
    if kind != "flipped":
        with pytest.raises(DamagedFile, match=f"^{path}: "):
            VideoSource(str(path)).verify(full=False)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_header_that_says_another_count_is_damage(video, change):
    content = bytearray(video.read_bytes())
    place = content.find(b"strh") + 40  # dwLength of the stream's header
    assert struct.unpack_from("<I", content, place) == (50,)
    struct.pack_into("<I", content, place, 50 + change)
    video.write_bytes(content)
    source = VideoSource(str(video))
    message = f"{video}: has 50 frames, but its header says {50 + change}"
    for look in (
        lambda: source.read([0], 32),
        lambda: source.verify(full=True),
        lambda: source.verify(full=False),
    ):
        with pytest.raises(DamagedFile, match=message):
            look()


def test_flipped_bits_never_shift_the_frames(video):
    content = video.read_bytes()
    start = content.find(b"movi")
    damaged = 0
    for seed in range(30):
        random = np.random.default_rng(seed)
        flipped = bytearray(content)
        for place in random.integers(start, len(content), 3):
            flipped[place] ^= 1 << random.integers(8)
        video.write_bytes(flipped)
        try:
            read = numbers(VideoSource(str(video)).read(range(50), 54))
        except DamagedFile:
            damaged += 1
        else:
            # A stream that stays valid has other pixels here and there, and no lost frame.
            assert sum(number != index for index, number in enumerate(read)) <= 2
    assert damaged > 20


def test_files_without_video_are_named(tmp_path):
    with pytest.raises(DamagedFile, match=r"missing\.avi: cannot be decoded: No such file"):
        VideoSource(str(tmp_path / "missing.avi")).count()
    miniature.write_picture(tmp_path / "picture.avi", miniature.picture(0, (16, 16), 0), "PNG")
    with pytest.raises(DamagedFile, match=r"picture\.avi: "):
        VideoSource(str(tmp_path / "picture.avi")).count()


@pytest.fixture
def folder(tmp_path):
    for number in range(12):
        picture = miniature.depth_picture(number, miniature.KINECT_SIZE, masked=True)
        miniature.write_picture(tmp_path / f"MDepth-{number + 1:08d}.png", picture)
    (tmp_path / "notes.txt").write_text("no frame")
    return tmp_path


def test_depth_folders_are_read_by_number(folder):
    source = DepthFolderSource(str(folder))
    assert source.count() == 12
    assert numbers(source.read(range(12), 54)) == list(range(12))
    assert numbers(source.read([2, 2, 11], 30)) == [2, 2, 11]
    source.verify(full=False)
    source.verify(full=True)


def test_depth_is_exact(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (40, 50), np.uint16)
    miniature.write_picture(tmp_path / "Depth-00000001.png", values)
    source = DepthFolderSource(str(tmp_path))
    frames = source.read([0], 40)
    assert frames.dtype == torch.uint16
    np.testing.assert_array_equal(frames[0, 0].numpy(), values)
    # Every second pixel, as half the size has none in the middle of two.
    np.testing.assert_array_equal(source.read([0], 20)[0, 0].numpy(), values[1::2, 1::2])
    assert source.read([0], 32).shape == (1, 1, 32, 40)


@pytest.mark.parametrize("kind", ["empty", "garbage", "truncated", "flipped"])
def test_damaged_depth_is_named(folder, kind):
    path = folder / "MDepth-00000005.png"
    content = bytearray(path.read_bytes())
    content[content.find(b"IDAT") + 8] ^= 16
    wrong = {"empty": b"", "garbage": b"x" * 999, "truncated": content[:80], "flipped": content}
    path.write_bytes(wrong[kind])
    source = DepthFolderSource(str(folder))
    assert numbers(source.read([3, 5], 54)) == [3, 5]
    for look in (lambda: source.read([3, 4], 54), lambda: source.verify(full=True)):
        with pytest.raises(DamagedFile, match=f"^{path}: (cannot be decoded|is (cut off|damaged))"):
            look()
    if kind != "flipped":
        with pytest.raises(DamagedFile, match=f"^{path}: is "):
            source.verify(full=False)


def test_a_missing_depth_frame_is_named(folder):
    (folder / "MDepth-00000005.png").unlink()
    with pytest.raises(DamagedFile, match=r"has no frame 5, but MDepth-00000006\.png"):
        DepthFolderSource(str(folder)).count()


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(DamagedFile, match=f"{tmp_path}: has no frame"):
        DepthFolderSource(str(tmp_path)).count()
    with pytest.raises(DamagedFile, match="gone: cannot be listed: No such file"):
        DepthFolderSource(str(tmp_path / "gone")).count()


def test_depth_of_8_bits_is_refused(folder):
    path = folder / "MDepth-00000001.png"
    miniature.write_picture(path, np.zeros((54, 64), np.uint8))
    with pytest.raises(DamagedFile, match="must have 16 bits in one channel, but is 8-bit grey"):
        DepthFolderSource(str(folder)).read([0], 54)


def test_pictures_of_another_size_are_refused(folder):
    picture = miniature.depth_picture(1, (54, 80), masked=True)
    miniature.write_picture(folder / "MDepth-00000002.png", picture)
    with pytest.raises(DamagedFile, match=r"00000002\.png: has a size other than .*00000001\.png"):
        DepthFolderSource(str(folder)).read([0, 1], 54)


@pytest.mark.parametrize(
    "names",
    [
        ["9.jpg", "10.jpg", "100.JPEG"],
        ["a2_frame_9_t1.png", "a2_frame_10_t1.png", "a2_frame_11_t0.png"],
        ["1548339819.87426.png", "1548339819.9.png", "1548339820.1.png"],
        ["v1.9_left.jpg", "v1.10_left.jpg", "v2.0_left.jpg"],
    ],
)
def test_pictures_are_in_the_order_of_their_numbers(tmp_path, names):
    for number, name in enumerate(names):
        kind = "PNG" if name.endswith(".png") else "JPEG"
        miniature.write_picture(tmp_path / name, miniature.picture(number, (48, 64), 5), kind)
    for name in ("._9.jpg", "notes7.txt", ".thumb_1.png"):
        (tmp_path / name).write_text("no frame")
    source = NumberedPicturesSource(str(tmp_path), "colour", given_rate=25)
    assert source.names() == names
    assert (source.count(), source.rate()) == (3, 25)
    assert numbers(source.read([0, 1, 2], 48)) == [0, 1, 2]
    assert source.stored_form() == "colour"
    source.verify(full=False)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["1.jpg", "1.png"], r"has two pictures of one number, 1\.jpg and 1\.png"),
        (["01.jpg", "1.jpg"], r"has two pictures of one number, 01\.jpg and 1\.jpg"),
        (["1.jpg", "cover.jpg"], r"cover\.jpg: has no number in its name"),
        ([], "has no frame: it must hold pictures, JPEG or PNG"),
    ],
)
def test_pictures_without_an_order_are_named(tmp_path, names, message):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DamagedFile, match=f"{tmp_path}.*{message}"):
        NumberedPicturesSource(str(tmp_path), "colour").count()


@pytest.mark.parametrize(
    ("names", "gap"),
    [
        (["000001", "000002", "000003"], False),
        (["t_8", "t_16", "t_24"], False),
        (["1"], False),
        (["1", "2", "4"], True),
        (["p3_1_t9", "p3_2_t7", "p3_3_t2"], False),
        (["p3_1_t9", "p3_2_t7", "p3_4_t8"], True),
        (["15_100", "15_140", "16_020"], False),
        (["9.5", "9.7", "10.25"], False),
    ],
)
def test_a_picture_that_may_be_missing_shows(tmp_path, names, gap):
    for name in names:
        (tmp_path / f"{name}.jpg").touch()
    assert NumberedPicturesSource(str(tmp_path), "colour").has_gap() == gap


def test_values_of_8_bits_are_those_of_the_nearest_pixels(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (40, 50), np.uint8)
    miniature.write_picture(tmp_path / "1.png", values)
    source = NumberedPicturesSource(str(tmp_path), "8-bit")
    np.testing.assert_array_equal(source.read([0], 40)[0, 0].numpy(), values)
    np.testing.assert_array_equal(source.read([0], 20)[0, 0].numpy(), values[1::2, 1::2])


@pytest.mark.parametrize(("form", "pixels"), [("8-bit", "gray"), ("16-bit", "gray16le")])
def test_values_in_a_video_are_those_of_the_nearest_pixels(tmp_path, form, pixels):
    import av

    dtype = np.uint8 if form == "8-bit" else np.uint16
    values = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (7, 48, 64), dtype)
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=12)
        stream.height, stream.width, stream.pix_fmt = 48, 64, pixels
        for image in values:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format=pixels)))
        container.mux(stream.encode())
    source = VideoSource(str(tmp_path / "a.mkv"), form, strict=True)
    assert source.stored_form() == ("16-bit" if form == "16-bit" else "grey")
    assert (source.count(), source.rate()) == (7, 12.0)
    frames = source.read([0, 3, 6], 24)
    np.testing.assert_array_equal(frames[:, 0].numpy(), values[[0, 3, 6], 1::2, 1::2])


@pytest.mark.parametrize(
    ("kind", "form", "message"),
    [
        ("16-bit.mkv", "8-bit", "must have 8 bits per channel, but its pixels are gray16le"),
        ("grey.mkv", "16-bit", "must have 16 bits in one channel, but its pixels are gray"),
        ("grey.mkv", "colour", "must be colour, but is grey"),
        ("avi", "grey", "must be grey, but is colour"),
    ],
)
def test_a_video_of_another_form_is_refused(tmp_path, kind, form, message):
    path = miniature.write_recording(tmp_path / "a", kind, 2)
    with pytest.raises(DamagedFile, match=f"^{path}: {message}"):
        VideoSource(str(path), form, strict=True).read([0], 24)


@pytest.mark.parametrize("form", ["colour", "8-bit"])
def test_a_phone_s_video_is_turned_upright(tmp_path, form):
    path = tmp_path / "a.mp4"
    miniature.write_video(path, 3, (48, 64))
    lying = VideoSource(str(path), form).read([1], 24)
    content = path.read_bytes()
    matrix = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    place = content.index(matrix, content.index(b"tkhd"))  # the track's, not the film's
    turned = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(content[:place] + turned + content[place + len(matrix) :])
    upright = VideoSource(str(path), form).read([1], 24)
    assert upright.shape[-2:] == (32, 24)
    assert torch.equal(upright, lying.rot90(-1, (-2, -1)))


def test_a_header_without_a_rate_is_named(video, monkeypatch):
    assert VideoSource(str(video)).rate() == 30
    assert VideoSource(str(video), given_rate=12.5).rate() == 12.5

    @contextlib.contextmanager
    def opened(source):
        yield None, SimpleNamespace(average_rate=None)

    monkeypatch.setattr(VideoSource, "_opened", opened)
    with pytest.raises(DamagedFile, match=f"^{video}: its header has no frame rate: .* --rates"):
        VideoSource(str(video)).rate()


def test_colour_pictures(tmp_path):
    names = ("b.jpg", "a.jpg")
    for number, name in enumerate(names):
        miniature.write_picture(tmp_path / name, miniature.picture(number, (48, 64), 5))
    source = PictureFilesSource(str(tmp_path), names, "colour")
    frames = source.read([0, 1], 48)
    assert numbers(frames) == [0, 1]
    np.testing.assert_allclose(frames[1, :, 40, 30], (200, 90, 200), atol=12)
    assert source.read([1], 24).shape == (1, 3, 24, 32)
    path = tmp_path / "a.jpg"
    path.write_bytes(path.read_bytes()[:400])
    for look in (
        lambda: source.read([1], 24),
        lambda: source.verify(full=True),
        lambda: source.verify(full=False),
    ):
        with pytest.raises(DamagedFile, match=f"^{path}: "):
            look()


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"av, .*pip install 'mmixer_kernels\[video\]'"):
        require("av")
