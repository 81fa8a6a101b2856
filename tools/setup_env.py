"""Create or update the project's virtual environment. Standard library only; quick when nothing changed.

    python tools/setup_env.py VENV EXTRAS          # this project's extras, with a CPU build of PyTorch
    python tools/setup_env.py VENV REQUIREMENTS    # what a file (.txt) lists, and the project without dependencies
    python tools/setup_env.py VENV tools/lock.txt  # a file with hashes: these files and no others

The environment is up to date when its stamp holds the hash of everything it was made from.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("pyproject.toml", "tools/install_torch.py", "tools/setup_env.py")
STAMP = ".setup-stamp"
LOCKED = ("--no-deps", "--require-hashes")
"""A lock is complete: nothing is looked up that it does not have."""


def fingerprint(wanted: str) -> str:
    """Hash of what the environment is made from."""
    digest = hashlib.sha256(f"{sys.version}\n{wanted}\n{ROOT}\n".encode())
    for source in (*SOURCES, *((wanted,) if is_file(wanted) else ())):
        digest.update((ROOT / source).read_bytes())
    return digest.hexdigest()


def is_file(wanted: str) -> bool:
    """Whether a file of requirements is named, relative to the project, and not extras."""
    return wanted.endswith(".txt")


def environment_python(venv: Path) -> Path:
    """The environment's interpreter; creates the environment where there is none that works."""
    python = venv / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    works = (
        python.exists()
        and not subprocess.run(
            [python, "-m", "pip", "--version"], capture_output=True, check=False
        ).returncode
    )
    if not works:
        print(f"creating {venv} with Python {sys.version.split()[0]}", flush=True)
        if subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=False).returncode:
            sys.exit(
                "error: Python cannot create a virtual environment; install its 'venv' package and run again"
            )
    return python


def install_extras(python: Path, extras: str) -> int:
    """The project with `extras`; returns pip's exit code."""
    if code := subprocess.run([str(python), str(ROOT / "tools/install_torch.py")], check=False).returncode:
        return code
    version = subprocess.check_output(
        [python, "-c", "from importlib.metadata import version; print(version('torch'))"], text=True
    ).strip()
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        constraints.write_text(f"torch=={version}\n")  # so that nothing else replaces the CPU build
        return install(python, "--constraint", str(constraints), "--editable", f"{ROOT}[{extras}]")


def install_file(python: Path, requirements: str) -> int:
    """What the file lists, then the project, whose own bounds may be others; returns pip's exit code."""
    path = ROOT / requirements
    if "--hash=" in path.read_text(encoding="utf-8"):
        return install_locked(python, path)
    code = install(python, "--requirement", str(path))
    return code or install(python, "--no-deps", "--editable", str(ROOT))


def install_locked(python: Path, lock: Path) -> int:
    """The files whose hashes `lock` has, a CPU build of PyTorch, and the project; returns pip's exit code.

    The project is built with what is locked, too.
    """
    if code := subprocess.run([str(python), str(ROOT / "tools/install_torch.py")], check=False).returncode:
        return code
    if code := install(python, *LOCKED, "--requirement", str(lock)):
        print(
            f"error: not everything in {lock.name} could be installed by its hash; where an index has other files than "
            "those that were published, set up without it: make setup",
            file=sys.stderr,
        )
        return code
    return install(python, "--no-deps", "--no-build-isolation", "--editable", str(ROOT))


def install(python: Path, *arguments: str) -> int:
    """Run `pip install`; returns its exit code."""
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "-qq"]
    return subprocess.run([*pip, *arguments], check=False).returncode


def main() -> int:
    """Set the environment up; returns the exit code."""
    venv, what = Path(sys.argv[1]).absolute(), sys.argv[2]
    stamp, wanted = venv / STAMP, fingerprint(what)
    if stamp.exists() and stamp.read_text() == wanted:
        return 0
    python = environment_python(venv)
    print(f"installing the dependencies ({what}); this takes a few minutes the first time", flush=True)
    if code := install_file(python, what) if is_file(what) else install_extras(python, what):
        return code
    stamp.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
