"""A pytest plugin that takes POSIX away, as far as that can be done on a machine that has it.

    python -m pytest -p tests.without_posix tests/runtime ...

Modules that other systems lack cannot be imported by this project's code, the functions of `os` and `signal` that they
lack are gone for it, and so are /proc and /sys. Libraries keep theirs: on Windows they have others.
"""

from __future__ import annotations

import builtins
import os
import signal
import sys
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from tests.structure import ROOMS

__all__ = ["ABSENT", "block"]

MODULES = {"fcntl", "grp", "nis", "posix", "pty", "pwd", "resource", "spwd", "syslog", "termios", "tty"}
ABSENT: dict[ModuleType, tuple[str, ...]] = {
    os: (
        *(
            "fork",
            "forkpty",
            "register_at_fork",
            "getuid",
            "geteuid",
            "getpgid",
            "setsid",
            "killpg",
            "sysconf",
        ),
        *(
            "pread",
            "pwrite",
            "preadv",
            "posix_fadvise",
            "sched_getaffinity",
            "getloadavg",
            "mkfifo",
            "statvfs",
        ),
        *(
            "chown",
            "lchown",
            "fchmod",
            "fchown",
            "sync",
            "memfd_create",
            "eventfd",
            "O_NOFOLLOW",
            "O_DIRECTORY",
        ),
        *("O_NONBLOCK", "O_CLOEXEC"),
    ),
    signal: ("SIGKILL", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGPIPE", "alarm", "setitimer", "pthread_kill"),
}
"""What the modules of Windows do not have; `os.statvfs` and others are left to `shutil`, which looked when it began."""

_OURS = tuple(ROOMS)
_SYSTEM_FOLDERS = ("/proc/", "/sys/")


def _ours(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] in _OURS


class _Portable(ModuleType):
    """A module as this project sees it: without what other systems lack."""

    def __init__(self, real: ModuleType, absent: tuple[str, ...]) -> None:
        super().__init__(real.__name__)
        self.__dict__.update({name: value for name, value in vars(real).items() if name not in absent})


def block() -> None:
    """Take POSIX away from modules of this project that are imported from now on."""
    portable = {real.__name__: _Portable(real, absent) for real, absent in ABSENT.items()}
    real_import, real_open = builtins.__import__, builtins.open

    def limited_import(name: str, *arguments: Any, **keywords: Any) -> ModuleType:
        if not _ours(sys._getframe(1)):
            return real_import(name, *arguments, **keywords)
        if name.partition(".")[0] in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r} (taken away by the test)", name=name)
        return portable.get(name) or real_import(name, *arguments, **keywords)

    def limited_open(file: Any, *arguments: Any, **keywords: Any) -> Any:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_globals.get("__name__") in (
            "pathlib",
            "pathlib._local",
            __name__,
        ):
            frame = frame.f_back
        hidden = isinstance(file, (str, Path)) and str(file).startswith(_SYSTEM_FOLDERS)
        if hidden and frame is not None and _ours(frame):
            raise FileNotFoundError(f"no {file} (taken away by the test)")
        return real_open(file, *arguments, **keywords)

    builtins.__import__ = limited_import
    builtins.open = limited_open
    Path.open = limited_open  # type: ignore[method-assign,assignment]


block()
