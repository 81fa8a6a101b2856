"""What a server is told when it starts, checked at the door."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from runtime.files import state_folder

from .errors import SettingsError

__all__ = ["Limits", "Settings", "default_videos_folder", "read_token"]

_TOKEN = re.compile(r"[A-Za-z0-9._~-]{16,256}")


@dataclass(frozen=True)
class Limits:
    """Bounds on what one client, or all of them, may ask for."""

    message_bytes: int = 64 * 1024
    """Largest control message and request body."""
    reference_bytes: int = 8 << 20
    """Largest image that a clip may start from."""
    prompt_chars: int = 2000
    schedule_prompts: int = 64
    seconds: float = 600.0
    """Longest clip, and longest live session with a length; a live session may also be endless."""
    queue: int = 16
    """Clients that wait for a place."""
    jobs: int = 16
    """Clips that wait to be made."""
    kept_jobs: int = 100
    """Finished clips that are kept; the oldest goes first."""
    sessions_per_client: int = 8
    """WebSockets that one address may hold."""
    requests_per_second: float = 20.0
    request_burst: int = 80
    bad_messages: int = 10
    """Messages that cannot be read before the socket is closed."""
    ack_timeout: float = 5.0
    """Seconds without a word from a client that should be showing something."""
    idle_timeout: float = 600.0
    """Seconds that a session may stay paused, and a socket open without a session."""
    chunk_timeout: float = 120.0
    """Seconds after which a chunk that did not come counts as a failure."""


def default_videos_folder() -> Path:
    """Where clips are kept unless told otherwise."""
    return state_folder("videos")


@dataclass(frozen=True)
class Settings:
    """The options of `python -m serving run`."""

    bundle: Path
    host: str = "127.0.0.1"
    port: int = 8000
    sessions: int = 2
    threads: int | None = None
    token: str | None = None
    insecure: bool = False
    origins: tuple[str, ...] = ()
    """Further origins whose pages may connect, such as `https://demo.example.com`."""
    hosts: tuple[str, ...] = ()
    """Further names by which the server may be addressed."""
    videos: Path = field(default_factory=default_videos_folder)
    clips: bool = True
    """Whether clips are made; not where requests for one clip may reach different servers."""
    drain_seconds: float = 30.0
    log_prompts: bool = False
    ice_servers: tuple[str, ...] = ()
    """STUN and TURN servers for WebRTC, such as `stun:stun.example.com:3478`."""
    examples: tuple[str, ...] = ()
    """Prompts that the page offers."""
    resident_text_encoder: bool = False
    verify: bool = True
    golden: bool = True
    expected: str | None = None
    """SHA-256 of the manifest of the only bundle that is served."""
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise SettingsError(f"--port is {self.port}; expected 0 to 65535")
        if self.sessions < 1:
            raise SettingsError(f"--sessions is {self.sessions}; expected 1 or more")
        if not self.drain_seconds >= 0:
            raise SettingsError(f"--drain is {self.drain_seconds}; expected seconds, 0 or more")
        if not self.is_loopback and self.token is None and not self.insecure:
            raise SettingsError(
                f"--host {self.host} can be reached from other machines: give --token-file, or --insecure if anybody "
                f"may use this server"
            )
        if self.limits.queue < 0:
            raise SettingsError(f"--queue is {self.limits.queue}; expected 0 or more")
        if self.limits.sessions_per_client < 1:
            raise SettingsError(f"--connections is {self.limits.sessions_per_client}; expected 1 or more")
        if not self.limits.requests_per_second > 0:
            raise SettingsError(f"--rate is {self.limits.requests_per_second:g}; expected more than 0")
        for origin in self.origins:
            if not re.fullmatch(r"https?://[^/\s]+", origin):
                raise SettingsError(
                    f"--origin is {origin!r}; expected scheme and host, such as https://demo.example.com"
                )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def read_token(path: str | os.PathLike[str]) -> str:
    """The bearer token in a file: one line of 16 to 256 letters, digits and `. _ ~ -`.

    Raises:
        SettingsError: the file cannot be read, or holds no token.
    """
    try:
        token = Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--token-file cannot be read: {error}") from error
    if not _TOKEN.fullmatch(token):
        raise SettingsError(
            f"--token-file holds {len(token)} characters; expected 16 to 256 letters, digits, '.', '_', '~', '-', "
            f"such as `openssl rand -hex 24` prints"
        )
    return token
