from __future__ import annotations

import os
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from runtime.errors import InputError
from runtime.files import atomic_output
from runtime.video import open_video, read_frames, write_contact_sheet


def ramp(count: int, height: int, width: int) -> np.ndarray:
    """Smooth frames that get brighter, with colours that differ."""
    x = np.linspace(0, 60, width)[None, None, :, None]
    t = np.linspace(20, 120, count)[:, None, None, None]
    tint = np.array([1.0, 1.2, 0.8])
    return np.broadcast_to((x + t) * tint, (count, height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (33, 47)])
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_video_reads_back(tmp_path: Path, height: int, width: int, suffix: str) -> None:
    frames = ramp(10, height, width)
    path = tmp_path / f"clip{suffix}"
    with open_video(path, fps=16, height=height, width=width) as video:
        video.write(frames[:3])
        assert not path.exists()
        video.write(frames[3:])
    assert [item.name for item in tmp_path.iterdir()] == [path.name]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == 16
        found = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert found.shape == (10, height + height % 2, width + width % 2, 3)
    difference = np.abs(found[:, :height, :width].astype(int) - frames)
    assert difference.mean() < 3 and difference.max() < 25


COLOURS = [
    (235, 20, 30),
    (20, 200, 60),
    (30, 40, 220),
    (200, 200, 20),
    (128, 128, 128),
    (0, 0, 0),
    (255, 255, 255),
]


def bt709(red: int, green: int, blue: int) -> tuple[float, float, float]:
    """Luma and chroma in 8 bits and limited range, as ITU-R BT.709 defines them."""
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return (
        16 + 219 / 255 * luma,
        128 + 224 / 255 * (blue - luma) / 1.8556,
        128 + 224 / 255 * (red - luma) / 1.5748,
    )


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_video_says_what_its_colours_mean_and_holds_them_so(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"colours{suffix}"
    with open_video(path, fps=16, height=64, width=64) as video:
        for colour in COLOURS:
            video.write(np.full((1, 64, 64, 3), colour, dtype=np.uint8))
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        # 1 is BT.709 in each of the three, and limited ("MPEG") in the range.
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (
            1,
            1,
            1,
            1,
        )
        pictures = [picture.reformat(format="yuv420p").to_ndarray() for picture in container.decode(video=0)]
    for colour, picture in zip(COLOURS, pictures, strict=True):
        chroma = picture[64:].reshape(2, -1)
        found = picture[:64].mean(), chroma[0].mean(), chroma[1].mean()
        assert found == pytest.approx(bt709(*colour), abs=2), colour


def test_failure_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        open_video(tmp_path / "clip.mp4", fps=16, height=32, width=32) as video,
    ):
        video.write(ramp(3, 32, 32))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_failure_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    with (
        pytest.raises(InputError, match="expected uint8"),
        open_video(path, fps=16, height=32, width=32) as video,
    ):
        video.write(ramp(3, 32, 34))
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clip.gif", r"must end in \.mp4 or \.mov or \.mkv"),
        ("clip", "must end in"),
        ("no/such/folder/clip.mp4", "does not exist; create it first"),
        ("folder.mp4", "is a folder"),
    ],
)
def test_unusable_output(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(InputError, match=message), open_video(tmp_path / name, fps=16, height=32, width=32):
        pass
    assert [item.name for item in tmp_path.iterdir()] == ["folder.mp4"]


def test_contact_sheet_shows_the_frames_in_order(tmp_path: Path) -> None:
    colours = [(10 * i, 255 - 10 * i, 7 * i) for i in range(8)]
    frames = [np.full((20, 30, 3), colour, dtype=np.uint8) for colour in colours]
    write_contact_sheet(tmp_path / "sheet.png", frames, columns=3)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (3 * 24 - 4, 3 * 34 - 4, 3)
    for index, colour in enumerate(colours):
        top, left = index // 3 * 24, index % 3 * 34
        assert (sheet[top : top + 20, left : left + 30] == colour).all()
    assert (sheet[48:, 68:] == 255).all()  # the ninth place is empty


def test_contact_sheet_of_few_frames_and_none(tmp_path: Path) -> None:
    write_contact_sheet(tmp_path / "sheet.png", [np.zeros((4, 4, 3), np.uint8)])
    assert Image.open(tmp_path / "sheet.png").size == (4, 4)
    with pytest.raises(InputError, match="at least one frame"):
        write_contact_sheet(tmp_path / "none.png", [])
    with pytest.raises(InputError, match=r"must end in \.png"):
        write_contact_sheet(tmp_path / "sheet.jpg", [np.zeros((4, 4, 3), np.uint8)])


def test_atomic_output_replaces_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    target.write_text("old")
    with pytest.raises(OSError), atomic_output(target) as temporary:
        temporary.write_text("half")
        raise OSError("no space left on device")
    assert target.read_text() == "old"
    with atomic_output(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new" and list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no FIFOs")
def test_atomic_output_replaces_no_device(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.mp4"
    os.mkfifo(fifo)
    with pytest.raises(FileExistsError, match="Expected the name of a file"), atomic_output(fifo):
        pass
    with pytest.raises(InputError, match="is no file"), open_video(fifo, fps=16, height=32, width=32):
        pass
    assert list(tmp_path.iterdir()) == [fifo]


def test_the_last_frames_of_a_video_are_read_in_its_colours(tmp_path: Path) -> None:
    frames = ramp(10, 64, 96)
    with open_video(tmp_path / "clip.mp4", fps=16, height=64, width=96) as video:
        video.write(frames)
    found = read_frames(tmp_path / "clip.mp4", height=64, width=96, last=4)
    assert found.shape == (4, 64, 96, 3) and found.dtype == np.uint8
    difference = np.abs(found.astype(int) - frames[-4:])
    assert difference.mean() < 3 and difference.max() < 25


@pytest.mark.parametrize(("size", "kept"), [((40, 120), "width"), ((120, 40), "height")])
def test_an_image_covers_the_frame_and_is_cut_in_the_middle(
    tmp_path: Path, size: tuple[int, int], kept: str
) -> None:
    """Red in the middle, blue at both ends of the longer side."""
    height, width = size
    image = np.zeros((height, width, 3), np.uint8)
    image[...] = (0, 0, 255)
    long = np.s_[:, 40:80] if width > height else np.s_[40:80]
    image[long] = (255, 0, 0)
    Image.fromarray(image).save(tmp_path / "image.png")
    found = read_frames(tmp_path / "image.png", height=40, width=40, last=8)
    assert found.shape == (1, 40, 40, 3)
    assert (found == (255, 0, 0)).all()


@pytest.mark.parametrize("content", [b"", b"no picture at all", None], ids=["empty", "text", "missing"])
def test_what_is_no_picture_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "start.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="expected an image or a video file"):
        read_frames(path, height=8, width=8, last=1)


def test_sound_is_no_picture(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "tone.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(InputError, match="holds no video"):
        read_frames(tmp_path / "tone.wav", height=8, width=8, last=1)
