"""Few open files, and no folder for temporary files: one line that says what to do, before any work is done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from runtime.files import LEAST_FILES, temporary_folder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="limits and folders are those of POSIX")

ROOT = Path(__file__).resolve().parent.parent
ABSENT = Path("/nowhere/at/all")
COMMANDS = (
    "export build --gpu cpu --init random",
    "export compare BUNDLE",
    "export doctor",
    "export onnx --init random",
    "export plan",
    "plugins build",
    "runtime bench BUNDLE",
    "runtime generate BUNDLE --out clip.mp4",
    "runtime verify BUNDLE",
    "serving run BUNDLE",
    "training status",
)


def run(command: list[str], *, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("TMPDIR", "TEMP", "TMP")}
    return subprocess.run(
        command,
        cwd=cwd,
        env={**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def limited(soft: int, hard: int, *arguments: str) -> list[str]:
    """A command line of Python that may have so many files open."""
    return [
        *("sh", "-c", f'ulimit -S -n {soft} && ulimit -H -n {hard} && exec "$@"'),
        *("sh", sys.executable, *arguments),
    ]


# ---- open files ----


@pytest.mark.parametrize("command", COMMANDS)
def test_too_few_open_files_are_one_line(command: str, tmp_path: Path) -> None:
    result = run(limited(32, 32, "-m", *command.replace("BUNDLE", str(ROOT)).split()), cwd=tmp_path)
    assert result.returncode in (1, 2)
    assert len(result.stderr.splitlines()) == 1 and result.stdout == ""
    assert "this process may have 32 files open at a time, and needs 64; raise the limit: ulimit -n" in (
        result.stderr
    )
    assert list(tmp_path.iterdir()) == []


def test_a_low_limit_that_may_be_raised_is_raised(tmp_path: Path) -> None:
    count = (
        "import os, resource, sys\n"
        "from runtime.terminal import run_command\n"
        "def work():\n"
        "    files = [open(os.devnull) for _ in range(500)]\n"
        "    print(len(files), resource.getrlimit(resource.RLIMIT_NOFILE))\n"
        "    return 0\n"
        "sys.exit(run_command(work, print, expected=lambda error: None, install=''))\n"
    )
    result = run(limited(16, 1000, "-c", count), cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "500 (1000, 1000)\n")


@pytest.mark.parametrize(
    "opening",
    [
        "[open(os.devnull) for _ in range(500)]",
        "[open(os.devnull) for _ in range(60)] + [subprocess.Popen(['true'], stdout=-1) for _ in range(60)]",
        "wrapped()",
    ],
    ids=["files", "processes", "a library's error"],
)
def test_running_out_of_open_files_says_what_to_do(opening: str, tmp_path: Path) -> None:
    script = (
        "import os, subprocess, sys\n"
        "from runtime.terminal import run_command\n"
        "def wrapped():\n"
        "    files = []\n"
        "    try:\n"
        "        while True:\n"
        "            files.append(open(os.devnull))\n"
        "    except OSError as error:\n"
        "        raise RuntimeError('the library does not start') from error\n"
        "def work():\n"
        f"    kept = {opening}\n"
        "    return 0\n"
        "say = lambda line: print(line, file=sys.stderr)\n"
        "sys.exit(run_command(work, say, expected=lambda error: None, install=''))\n"
    )
    result = run(limited(100, 100, "-c", script), cwd=tmp_path)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert "raise the limit: ulimit -n 4096" in result.stderr


def test_a_server_asks_for_as_many_as_it_has_clients(tmp_path: Path) -> None:
    command = ["serving", "run", str(tmp_path), "--sessions", "4", "--queue", "1000"]
    result = run(limited(500, 500, "-m", *command), cwd=tmp_path)
    assert result.returncode == 1
    assert f"may have 500 files open at a time, and needs {LEAST_FILES + 1004}" in result.stderr


# ---- temporary files ----


@pytest.fixture(params=["absent", "a file"])
def unusable(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """What TMPDIR names."""
    if request.param == "absent":
        return str(ABSENT)
    (tmp_path / "file").touch()
    return str(tmp_path / "file")


@pytest.mark.parametrize("variable", ["TMPDIR", "TEMP", "TMP"])
def test_a_variable_that_names_no_folder_is_named(
    variable: str, unusable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, unusable)
    with pytest.raises(OSError, match=f"^{variable} names .*{unusable}.*set it to a folder"):
        temporary_folder()


@pytest.mark.parametrize("command", ["export build --gpu cpu --init random", "plugins build --arch sm_90"])
def test_commands_that_need_temporary_files_say_so_first(command: str, unusable: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [sys.executable, "-m", *command.split(), "--out", str(out)]
    result = run(arguments, cwd=tmp_path, TMPDIR=unusable)
    assert result.returncode in (1, 2)
    assert len(result.stderr.splitlines()) == 1
    assert (
        f"TMPDIR names the folder for temporary files, {unusable}, and none can be written" in result.stderr
    )
    assert not out.exists()


def test_doctor_finds_it(tmp_path: Path) -> None:
    result = run([sys.executable, "-m", "export", "doctor", "--json"], cwd=tmp_path, TMPDIR=str(ABSENT))
    assert result.returncode == 1
    assert any(problem.startswith("TMPDIR names") for problem in json.loads(result.stdout)["problems"])


def test_a_package_that_cannot_be_unpacked_does_not_ask_for_a_new_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.errors import EngineError
    from runtime.host.inductor import load_package_file

    monkeypatch.setenv("TMPDIR", str(ABSENT))
    with pytest.raises(EngineError, match=r"component 'step' .* does not load: TMPDIR names") as caught:
        load_package_file(tmp_path / "step.pt2", "step", -1)
    assert "rebuild" not in str(caught.value)


READ_ONLY = (
    "for folder in /tmp /var/tmp; do "
    "mount --bind $folder $folder && mount -o remount,bind,ro $folder || exit 1; done; cd /tmp; "
)
"""What is in them stays: the checkout may be."""


def test_a_machine_where_nothing_can_be_written(tmp_path: Path) -> None:
    """As in a container whose root is read-only: Python's own folders and the working folder refuse, too."""
    apart = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else []), "sh", "-c"]
    if not Path("/var/tmp").is_dir() or run([*apart, READ_ONLY + "true"], cwd=tmp_path).returncode:
        pytest.skip("this process may not mount")
    command = (
        f"{READ_ONLY}exec {sys.executable} -m export build --gpu cpu --init random --out {ROOT}/build/none"
    )
    result = run([*apart, command], cwd=tmp_path)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "there is no folder for temporary files" in result.stderr and "set TMPDIR to one" in result.stderr
    assert not (ROOT / "build" / "none").exists()


def test_everything_temporary_goes_where_it_was_looked_for() -> None:
    """Whatever uses `tempfile` in a room gives a folder, or stands behind a build's own check."""
    checked = {"export/parts/worker.py"}
    for room in ("runtime", "export", "plugins", "serving", "training", "benchmarks"):
        for path in (ROOT / room).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            for line in path.read_text(encoding="utf-8").splitlines():
                if "tempfile." in line and name not in checked | {"runtime/files.py"}:
                    assert "dir=" in line, f"{name}: {line.strip()}"


def test_the_folder_is_python_s_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert temporary_folder() == tempfile.gettempdir() == str(tmp_path)
