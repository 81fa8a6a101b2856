"""Install the pinned PyTorch without its CUDA packages. Standard library only; run with the environment's own Python.

A plain `pip install torch` on Linux brings gigabytes of CUDA libraries that the CPU tools never use. This tries
PyTorch's CPU wheels first and then whatever the configured index has, and installs only what a dry run has shown to
come without CUDA packages. A torch that is already there is left alone.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

REQUIREMENT = "torch==2.13.0"
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
CUDA_PREFIXES = ("nvidia-", "cuda-")

PIP = (sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-input")


def installed() -> str | None:
    """Version of the torch in this environment."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


def sources() -> list[tuple[str, ...]]:
    """Pip arguments of the places to look, in order."""
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        return [("--index-url", CPU_WHEELS, "--retries", "0", "--timeout", "10"), ()]
    return [()]


def resolve(source: tuple[str, ...]) -> list[str] | None:
    """Names of the packages that installing from `source` would bring; None where it does not have them."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [*PIP, "--quiet", "--dry-run", "--report", str(report), *source, REQUIREMENT]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return None
        packages = json.loads(report.read_text(encoding="utf-8"))["install"]
    return sorted(package["metadata"]["name"].lower().replace("_", "-") for package in packages)


def cuda_packages(names: list[str]) -> list[str]:
    """Those of `names` that belong to CUDA."""
    return [name for name in names if name.startswith(CUDA_PREFIXES)]


def main() -> int:
    """Install; returns the exit code."""
    if version := installed():
        print(f"torch {version} is installed")
        return 0
    refused: list[str] = []
    for source in sources():
        names = resolve(source)
        if names is None:
            continue
        if refused := cuda_packages(names):
            continue
        print(f"installing {REQUIREMENT}", flush=True)
        return subprocess.run([*PIP, "--quiet", "--quiet", *source, REQUIREMENT], check=False).returncode
    if refused:
        found = f"the only one found brings {len(refused)} CUDA packages ({', '.join(refused[:3])}, ...)"
    else:
        found = f"no index has {REQUIREMENT} for Python {platform.python_version()}"
    print(
        f"error: no CPU build of PyTorch can be installed: {found}. Nothing was installed.\n"
        f"Install one yourself and run the same command again, for example\n"
        f"  {sys.executable} -m pip install {REQUIREMENT} --index-url {CPU_WHEELS}\n"
        f"or, to accept the CUDA packages,\n"
        f"  {sys.executable} -m pip install {REQUIREMENT}",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
