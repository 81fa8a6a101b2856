"""From frames to what a browser shows: H.264 access units, or JPEG files."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from serving.errors import ServingError

__all__ = ["Encoded", "Encoder", "H264Encoder", "JpegEncoder", "VideoShape", "h264_codec", "new_encoder"]

_BT709 = 1
_LIMITED_RANGE = 1
_JPEG_QUALITY = 88
# Encoders in the order tried. Each sends one access unit per frame, at once, with its headers before every keyframe,
# and begins a keyframe only where it is told to.
_H264: tuple[tuple[str, dict[str, str]], ...] = (
    (
        "h264_nvenc",
        {
            "preset": "p3",
            "tune": "ull",
            "rc": "vbr",
            "cq": "21",
            "zerolatency": "1",
            "forced-idr": "1",
            "bf": "0",
        },
    ),
    (
        "libx264",
        {
            "preset": "veryfast",
            "tune": "zerolatency",
            "crf": "19",
            "forced-idr": "1",
            "x264-params": "keyint=infinite:scenecut=0:repeat-headers=1:annexb=1",
        },
    ),
)
_SPS = 7


@dataclass(frozen=True)
class VideoShape:
    """Size and rate of a video. H.264 needs even sizes: an odd last row or column is repeated once."""

    height: int
    width: int
    fps: int


@dataclass(frozen=True)
class Encoded:
    """One encoded frame."""

    payload: bytes
    keyframe: bool


class Encoder(Protocol):
    """Encodes the frames of one session, in order."""

    kind: Literal["h264", "jpeg"]

    def encode(self, frames: NDArray[np.uint8], *, keyframe: bool) -> list[Encoded]:
        """Encode frames, uint8 `[N, H, W, 3]`; with `keyframe` the first of them can be shown on its own."""

    def close(self) -> None:
        """Let go of the encoder."""


class H264Encoder:
    """H.264 in Annex B, one access unit per frame: NVENC where it works, else x264."""

    kind: Literal["h264", "jpeg"] = "h264"

    def __init__(self, shape: VideoShape, codec: str | None = None) -> None:
        self._shape = shape
        self._context = _open(shape, codec or h264_codec(shape)[0])
        self._count = 0

    def encode(self, frames: NDArray[np.uint8], *, keyframe: bool) -> list[Encoded]:
        """See `Encoder.encode`.

        Raises:
            ServingError: the library gave another number of pictures than it was given.
        """
        from av.video.frame import PictureType

        units: list[Encoded] = []
        for index, frame in enumerate(self._pictures(frames)):
            frame.pts = self._count
            forced = self._count == 0 or (keyframe and index == 0)
            frame.pict_type = PictureType.I if forced else PictureType.NONE
            self._count += 1
            units += [Encoded(bytes(packet), packet.is_keyframe) for packet in self._context.encode(frame)]
        if len(units) != len(frames):
            raise ServingError(
                f"the encoder gave {len(units)} access units for {len(frames)} frames; expected one each"
            )
        return units

    def close(self) -> None:
        """See `Encoder.close`."""
        self._context = None

    def _pictures(self, frames: NDArray[np.uint8]) -> Iterator[Any]:
        from av import VideoFrame

        height, width = frames.shape[1:3]
        padded = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        for image in padded:
            yield VideoFrame.from_ndarray(image, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED_RANGE
            )


class JpegEncoder:
    """One JPEG file per frame; every one is a keyframe."""

    kind: Literal["h264", "jpeg"] = "jpeg"

    def encode(self, frames: NDArray[np.uint8], *, keyframe: bool) -> list[Encoded]:
        """See `Encoder.encode`."""
        from PIL import Image

        files: list[Encoded] = []
        for frame in frames:
            buffer = io.BytesIO()
            Image.fromarray(frame).save(buffer, format="JPEG", quality=_JPEG_QUALITY, subsampling=0)
            files.append(Encoded(buffer.getvalue(), keyframe=True))
        return files

    def close(self) -> None:
        """Nothing to let go of."""


def new_encoder(kind: Literal["h264", "jpeg"], shape: VideoShape) -> Encoder:
    """An encoder for one session."""
    return H264Encoder(shape) if kind == "h264" else JpegEncoder()


@lru_cache(maxsize=8)
def h264_codec(shape: VideoShape) -> tuple[str, str]:
    """The H.264 encoder that works here for this shape, and its codec string for WebCodecs, such as `avc1.64000b`.

    Found by encoding a frame.

    Raises:
        ServingError: none works.
    """
    reasons = []
    for name, _ in _H264:
        try:
            encoder = H264Encoder(shape, name)
            unit = encoder.encode(np.zeros((1, shape.height, shape.width, 3), np.uint8), keyframe=True)[0]
            return name, _codec_string(unit.payload)
        except (OSError, ValueError, ServingError) as error:  # PyAV's errors derive from the first two
            reasons.append(f"{name}: {error}")
    raise ServingError(
        f"no H.264 encoder works for {shape.width}x{shape.height} ({'; '.join(reasons)}); install another build of av"
    )


def _open(shape: VideoShape, name: str) -> Any:
    from av import CodecContext

    context: Any = CodecContext.create(name, "w")
    context.width, context.height = shape.width + shape.width % 2, shape.height + shape.height % 2
    context.pix_fmt = "yuv420p"
    context.framerate, context.time_base = Fraction(shape.fps), Fraction(1, shape.fps)
    context.color_range, context.colorspace = _LIMITED_RANGE, _BT709
    context.color_primaries = context.color_trc = _BT709
    context.thread_count = 1
    context.options = dict(_H264)[name]
    context.open()
    return context


def _codec_string(unit: bytes) -> str:
    """`avc1.` and profile, constraints and level in hexadecimal, from the access unit's parameter set."""
    position = unit.find(b"\0\0\1")
    while position >= 0:
        if unit[position + 3] & 0x1F == _SPS:
            return f"avc1.{unit[position + 4 : position + 7].hex()}"
        position = unit.find(b"\0\0\1", position + 3)
    raise ServingError(
        "the encoder's first access unit has no parameter set; expected one before every keyframe"
    )
