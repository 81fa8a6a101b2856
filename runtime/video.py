"""Video files and contact sheets. Both appear complete or not at all."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .files import atomic_output

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.video.stream import VideoStream
    from PIL.Image import Image

__all__ = [
    "VIDEO_SUFFIXES",
    "VideoWriter",
    "check_output",
    "open_video",
    "read_frames",
    "read_image",
    "write_contact_sheet",
]

_FORMATS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
VIDEO_SUFFIXES = tuple(_FORMATS)
_CRF = "18"
_BT709 = 1
"""FFmpeg's number of BT.709, the same for matrix, primaries and transfer."""
_LIMITED_RANGE = 1
_MOST_PIXELS = 1 << 26
_SHEET_COLUMNS = 6
_SHEET_GAP = 4


class VideoWriter:
    """Appends frames to an open video; made by `open_video`."""

    def __init__(self, container: OutputContainer, stream: VideoStream, size: tuple[int, int]) -> None:
        self._container = container
        self._stream = stream
        self._shape = (*size, 3)

    def write(self, frames: NDArray[np.uint8]) -> None:
        """Append frames, uint8 `[N, H, W, 3]`.

        Raises:
            InputError: they are no frames of this video.
        """
        from av import VideoFrame

        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != self._shape:
            raise InputError(f"frames are {frames.dtype} {frames.shape}; expected uint8 (N, *{self._shape})")
        height, width, _ = self._shape
        padded = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        with _translated():
            for image in padded:
                picture = VideoFrame.from_ndarray(image, format="rgb24").reformat(
                    format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED_RANGE
                )
                self._container.mux(self._stream.encode(picture))


@contextmanager
def open_video(path: str | os.PathLike[str], *, fps: int, height: int, width: int) -> Iterator[VideoWriter]:
    """Open an H.264 file (yuv420p, BT.709 in limited range, and marked as such), to be written while frames arrive.

    The file is there when the block ends; if it ends with an exception, nothing is left. H.264 needs even sizes:
    an odd last row or column is repeated once.

    Raises:
        InputError: `path` cannot be written.
        OSError: writing failed, such as on a full disk.
    """
    import av

    target = check_output(path, VIDEO_SUFFIXES)
    # A file of Python's: FFmpeg takes a name with a colon for a protocol.
    with atomic_output(target) as temporary, temporary.open("wb") as file:
        with _translated():
            container = av.open(file, "w", format=_FORMATS[target.suffix.lower()])
        with container:
            stream: VideoStream = container.add_stream("libx264", rate=Fraction(fps))
            stream.height, stream.width = height + height % 2, width + width % 2
            stream.pix_fmt = "yuv420p"
            context = stream.codec_context
            context.color_range, context.colorspace = _LIMITED_RANGE, _BT709
            context.color_primaries = context.color_trc = _BT709
            stream.options = {"crf": _CRF}
            yield VideoWriter(container, stream, (height, width))
            with _translated():
                container.mux(stream.encode(None))
                container.close()


@contextmanager
def _translated() -> Iterator[None]:
    """FFmpeg's errors as the system's."""
    from av.error import FFmpegError

    try:
        yield
    except FFmpegError as error:
        if isinstance(error, OSError):
            raise
        raise OSError(error.errno, f"the video cannot be encoded: {error.strerror}") from error


def read_frames(path: str | os.PathLike[str], *, height: int, width: int, last: int) -> NDArray[np.uint8]:
    """The `last` frames of a video, or an image, uint8 `[N, height, width, 3]`.

    Pictures of another size are scaled until they cover this one, and what is too much is cut off on both sides.

    Raises:
        InputError: the file cannot be read, or holds no picture.
    """
    import av
    from PIL import Image

    frames: deque[av.VideoFrame] = deque(maxlen=last)
    try:
        # A playlist must not make a file of the network's out of this one.
        with av.open(os.fspath(path), options={"protocol_whitelist": "file"}) as container:
            if not container.streams.video:
                raise InputError(f"{os.fspath(path)!r} holds no video; expected an image or a video file")
            for frame in container.decode(video=0):
                frames.append(frame)
    except (OSError, ValueError) as error:  # PyAV's errors are among these
        raise InputError(
            f"{os.fspath(path)!r} cannot be read: {error}; expected an image or a video file"
        ) from error
    if not frames:
        raise InputError(f"{os.fspath(path)!r} holds no picture; expected an image or a video file")
    pictures = [Image.fromarray(frame.to_ndarray(format="rgb24")) for frame in frames]
    return np.stack([_fitted(picture, height, width) for picture in pictures])


def read_image(file: str | os.PathLike[str] | IO[bytes], *, height: int, width: int) -> NDArray[np.uint8]:
    """A PNG, JPEG or WebP image of whatever origin, uint8 `[height, width, 3]`; scaled and cut as by `read_frames`.

    Nothing but these formats is tried, and no image of more than 64 million pixels is unpacked. Raises
    `InputError` if it cannot be read.

    Raises:
        InputError: it cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(file, formats=("PNG", "JPEG", "WEBP")) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise InputError(
                    f"the image has {image.width} x {image.height} pixels; expected at most 64 million"
                )
            return _fitted(image.convert("RGB"), height, width)
    except InputError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # all of them Pillow's
        raise InputError("the image cannot be read; expected a PNG, JPEG or WebP file") from error


def _fitted(picture: Image, height: int, width: int) -> NDArray[np.uint8]:
    from PIL import Image, ImageOps

    fitted = ImageOps.fit(picture, (width, height), method=Image.Resampling.LANCZOS)
    return np.asarray(fitted, dtype=np.uint8)


def write_contact_sheet(
    path: str | os.PathLike[str], frames: Sequence[NDArray[np.uint8]], *, columns: int = _SHEET_COLUMNS
) -> None:
    """Write frames, each uint8 `[H, W, 3]`, as a PNG grid, row by row.

    Raises:
        InputError: there are no frames.
    """
    from PIL import Image

    target = check_output(path, (".png",))
    if not frames:
        raise InputError("a contact sheet needs at least one frame, found none")
    height, width = frames[0].shape[:2]
    columns = min(columns, len(frames))
    rows = -(-len(frames) // columns)
    sheet = np.full(
        (rows * (height + _SHEET_GAP) - _SHEET_GAP, columns * (width + _SHEET_GAP) - _SHEET_GAP, 3),
        255,
        np.uint8,
    )
    for index, frame in enumerate(frames):
        top, left = (index // columns) * (height + _SHEET_GAP), (index % columns) * (width + _SHEET_GAP)
        sheet[top : top + height, left : left + width] = frame
    with atomic_output(target) as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG")


def check_output(path: str | os.PathLike[str], suffixes: Sequence[str]) -> Path:
    """`path`, where a file of one of the `suffixes` can be written.

    Raises:
        InputError: the name has another ending, or no file can be written there.
    """
    target = Path(path)
    if target.suffix.lower() not in suffixes:
        raise InputError(f"output file {str(path)!r} must end in {' or '.join(suffixes)}")
    try:
        if not target.parent.is_dir():
            raise InputError(
                f"folder {str(target.parent)!r} of the output file does not exist; create it first"
            )
        if target.exists() and not target.is_file():
            what = "a folder" if target.is_dir() else "no file"
            raise InputError(f"output file {str(path)!r} is {what}; expected the name of a file")
    except (OSError, ValueError) as error:  # ValueError: it holds a NUL
        if isinstance(error, InputError):
            raise
        raise InputError(f"output file {str(path)!r} cannot be written: {error}; expected a name") from error
    return target
