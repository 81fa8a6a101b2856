"""What must not need POSIX: the runtime, and builds for the CPU and for RTX cards."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from export.machine import importable
from export.parts.worker import ended_by, was_killed

ROOT = Path(__file__).resolve().parent.parent
PORTABLE = (
    "tests/runtime/test_frame_table.py",
    "tests/runtime/test_noise_and_rope.py",
    "tests/runtime/test_prompt_text.py",
    "tests/runtime/test_saved_sessions.py",
    "tests/runtime/bundle/test_dtypes.py",
    "tests/export/hub/test_known.py",
    "tests/export/request/test_targets.py",
    "tests/export/request/test_backends.py",
    "tests/export/parts/test_worker.py",
)
"""Tests that say nothing about one system, and take seconds."""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_posix_is_gone_for_this_project_and_not_for_others() -> None:
    code = (
        "import tests.without_posix, types, tempfile\n"
        "def of(room):\n"
        "    space = {'__name__': f'{room}.module'}\n"
        "    exec('''import os\n"
        "try:\n    import fcntl; found = True\nexcept ModuleNotFoundError: found = False\n"
        "try:\n    open('/proc/self/status').close(); proc = True\nexcept OSError: proc = False\n"
        "''', space)\n"
        "    return space['found'], hasattr(space['os'], 'fork'), space['proc']\n"
        "print(of('runtime'), of('torch'))\n"
    )
    assert run("-c", code).stdout == "(False, False, False) (True, True, True)\n"


def test_the_portable_part_of_the_suite_passes_without_posix() -> None:
    done = run(
        "-m", "pytest", "-q", "-n", "0", "-p", "tests.without_posix", "-p", "no:cacheprovider", *PORTABLE
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"\b[1-9]\d{2,} passed", done.stdout), done.stdout[-300:]


@pytest.mark.slow
def test_more_of_the_suite_passes_without_posix() -> None:
    """Builds, rollouts and video files of the tiny model, and an engine for an RTX card."""
    more = [
        "tests/runtime/test_rollout_tiny.py",
        "tests/runtime/test_video_files.py",
        "tests/runtime/test_sessions.py",
    ]
    if importable("tensorrt_rtx"):
        more.append("tests/export/backends/test_rtx_build.py")
    chosen = "not (memory or descriptors or killed)"
    done = run("-m", "pytest", "-q", "-n", "0", "-p", "tests.without_posix", "-k", chosen, *more)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize(
    "command", ["runtime generate", "export build", "export doctor", "plugins build", "serving run"]
)
def test_commands_start_without_posix(command: str) -> None:
    room, name = command.split()
    code = (
        f"import tests.without_posix, runpy, sys; sys.argv = [{room!r}, {name!r}, '--help']; "
        f"runpy.run_module({room!r}, run_name='__main__')"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_a_build_for_the_cpu_runs_without_posix(tmp_path: Path) -> None:
    """The step graph alone, which is traced, checked and published as a bundle is."""
    code = (
        "import tests.without_posix, sys; from export.cli.main import main; "
        f"sys.exit(main(['onnx', '--out', {str(tmp_path)!r}]))"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("step.onnx"))


def test_no_module_of_posix_is_imported_at_the_top() -> None:
    """What mypy does not see: imports that fail before any check of the system can run."""
    found = [
        f"{path.relative_to(ROOT)}: {line}"
        for room in ("runtime", "serving", "export", "plugins", "lightforcing_ref", "engines")
        for path in (ROOT / room).rglob("*.py")
        for line in re.findall(
            r"^(?:import|from) (?:fcntl|resource|pwd|grp|termios)\b.*", path.read_text(), re.M
        )
    ]
    assert found == []


@pytest.mark.parametrize(
    ("code", "killed", "by"),
    [
        (0, False, None),
        (1, False, None),
        (-9, True, "SIGKILL"),
        (-11, False, "SIGSEGV"),
        (-250, False, "signal 250"),
        (0xC0000005, False, "exception 0xc0000005"),
    ],
)
def test_how_a_process_ended_is_told_on_every_system(code: int, killed: bool, by: str | None) -> None:
    assert was_killed(code) == killed
    assert ended_by(code) == by
