"""The messages of `/v1/stream`, version 1. docs/serving.md describes them for people who write clients."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from serving.errors import RequestError

__all__ = [
    "PROTOCOL",
    "SUBPROTOCOL",
    "Ack",
    "Cancel",
    "ClientMessage",
    "Control",
    "Flush",
    "Keyframe",
    "MediaFrame",
    "Pause",
    "Resume",
    "SetPrompt",
    "Start",
    "parse_client_message",
    "receipt",
    "refusal",
]

PROTOCOL = 1
SUBPROTOCOL = "lightforcing.v1"
_HEADER = struct.Struct("<2sBBIIQ")
_MAGIC = b"LF"

Prompt = Annotated[str, Field(min_length=0)]
ChunkIndex = Annotated[int, Field(ge=0, lt=2**31)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: Annotated[str | int | None, Field(description="comes back in the receipt")] = None


class ScheduledPrompt(BaseModel):
    """A prompt that applies from chunk `at` on, over `over` chunks."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    at: ChunkIndex
    prompt: Prompt
    over: Annotated[int, Field(ge=1, le=64)] = 1


class Start(_Message):
    """Begin a session. `seconds` is whole chunks rounded up, or null for no end."""

    type: Literal["start"]
    prompt: Prompt
    schedule: tuple[ScheduledPrompt, ...] = Field(default=(), strict=False)
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    format: Literal["h264", "jpeg"] = "h264"


class SetPrompt(_Message):
    """Switch the prompt."""

    type: Literal["set_prompt"]
    prompt: Prompt
    recache: Literal["window", "all", "none", "joint", "flush", "cut"] | None = None
    at: ChunkIndex | None = None
    over: Annotated[int, Field(ge=1, le=64)] = 1


class Pause(_Message):
    """Send nothing more until `resume`."""

    type: Literal["pause"]


class Resume(_Message):
    """Go on after `pause`."""

    type: Literal["resume"]


class Cancel(_Message):
    """End the session and give its place back."""

    type: Literal["cancel"]


class Flush(_Message):
    """Drop what is computed or queued and not shown."""

    type: Literal["flush"]


class Keyframe(_Message):
    """Begin the next chunk with a keyframe."""

    type: Literal["keyframe"]


class Ack(BaseModel):
    """The client begins to show a chunk. Has no receipt."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    type: Literal["ack"]
    chunk: ChunkIndex


Control = SetPrompt | Pause | Resume | Cancel | Flush | Keyframe
ClientMessage = Annotated[Start | Control | Ack, Field(discriminator="type")]
_CLIENT: TypeAdapter[Start | Control | Ack] = TypeAdapter(ClientMessage)


def parse_client_message(text: str) -> Start | Control | Ack:
    """Read one message.

    Raises:
        RequestError: it is no message of this protocol; says what is wrong with it, without repeating it.
    """
    try:
        return _CLIENT.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "message"
        raise RequestError("bad_message", f"{where}: {first['msg']}") from None


def receipt(message: Start | Control, *, chunk: int, time: float, **more: Any) -> dict[str, Any]:
    """The answer to a control that was accepted: the chunk and the second of video where it takes effect."""
    return {
        "type": "receipt",
        "id": message.id,
        "action": message.type,
        "accepted": True,
        "chunk": chunk,
        "time": round(time, 6),
        **more,
    }


def refusal(message: Start | Control, error: RequestError) -> dict[str, Any]:
    """The answer to a control that was refused, and why."""
    return {
        "type": "receipt",
        "id": message.id,
        "action": message.type,
        "accepted": False,
        "error": {"code": error.code, "message": str(error)},
    }


@dataclass(frozen=True)
class MediaFrame:
    """One picture: an H.264 access unit (Annex B) or a JPEG file.

    On the wire, little-endian: `"LF"`, kind (1 H.264, 2 JPEG), flags (1 keyframe, 2 first of its chunk, 4 last of its
    chunk, 8 a gap lies before it), chunk (u32), frame (u32, from the start of the session), presentation time
    (u64, microseconds), then the payload.
    """

    kind: Literal["h264", "jpeg"]
    chunk: int
    frame: int
    time_us: int
    payload: bytes
    keyframe: bool
    first: bool
    last: bool
    gap: bool

    def to_bytes(self) -> bytes:
        """The binary message."""
        flags = self.keyframe | self.first << 1 | self.last << 2 | self.gap << 3
        kind = 1 if self.kind == "h264" else 2
        return _HEADER.pack(_MAGIC, kind, flags, self.chunk, self.frame, self.time_us) + self.payload

    @classmethod
    def from_bytes(cls, data: bytes) -> MediaFrame:
        """Read a binary message, for clients in Python.

        Raises:
            ValueError: it is not one.
        """
        if len(data) < _HEADER.size or data[:2] != _MAGIC or data[2] not in (1, 2):
            raise ValueError(f"{len(data)} bytes are no picture of this protocol")
        _, kind, flags, chunk, frame, time_us = _HEADER.unpack_from(data)
        return cls(
            kind="h264" if kind == 1 else "jpeg",
            chunk=chunk,
            frame=frame,
            time_us=time_us,
            payload=data[_HEADER.size :],
            keyframe=bool(flags & 1),
            first=bool(flags & 2),
            last=bool(flags & 4),
            gap=bool(flags & 8),
        )
