"""Create or update the project's virtual environment. Standard library only; quick when nothing changed.

    python tools/setup_env.py VENV EXTRAS

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


def fingerprint(extras: str) -> str:
    """Hash of what the environment is made from."""
    digest = hashlib.sha256(f"{sys.version}\n{extras}\n{ROOT}\n".encode())
    for source in SOURCES:
        digest.update((ROOT / source).read_bytes())
    return digest.hexdigest()


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


def main() -> int:
    """Set the environment up; returns the exit code."""
    venv, extras = Path(sys.argv[1]).absolute(), sys.argv[2]
    stamp, wanted = venv / STAMP, fingerprint(extras)
    if stamp.exists() and stamp.read_text() == wanted:
        return 0
    python = environment_python(venv)
    if code := subprocess.run([str(python), str(ROOT / "tools/install_torch.py")], check=False).returncode:
        return code
    version = subprocess.check_output(
        [python, "-c", "from importlib.metadata import version; print(version('torch'))"], text=True
    ).strip()
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        constraints.write_text(f"torch=={version}\n")  # so that nothing else replaces the CPU build
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "-qq"]
        command = [*pip, "--constraint", str(constraints), "--editable", f"{ROOT}[{extras}]"]
        print(f"installing the dependencies ({extras}); this takes a few minutes the first time", flush=True)
        if code := subprocess.run(command, check=False).returncode:
            return code
    stamp.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
