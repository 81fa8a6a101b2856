"""Download the wheels that a GPU machine without network commonly lacks. Standard library only.

Such a machine has PyTorch and Triton, pytest, numpy, cuda-core, cuda-bindings, onnx, onnxscript, rich, safetensors,
tokenizers and ml-dtypes. What else the GPU tests, the benchmarks and `python -m export build --backend inductor` import
is fetched here, for CPython 3.12 on x86-64 Linux with glibc 2.28 or newer:

    python3 tools/gpu_wheels.py                # into build/wheels, a few megabytes

Carry the folder along with the project. There, `make gpu` installs what it finds in it into build/site; by hand:

    python3 -m pip install --no-index --no-deps --upgrade --target build/site build/wheels/*.whl
    export PYTHONPATH=$PWD/build/site

Nothing is installed into the machine's own Python, whose PyTorch and CUDA packages stay what they are: `--no-deps`,
and none of those is in the list.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

WHEELS = (
    "platformdirs==4.14.8",
    "pydantic==2.14.3",
    "pydantic-core==2.50.4",
    "annotated-types==0.8.0",
    "typing-inspection==0.4.5",
    "typing-extensions==4.16.0",
    "ftfy==6.3.1",
    "wcwidth==0.9.4",
    "onnx-ir==1.1.0",
)
"""Each with the versions that its neighbours ask for; pip takes no dependencies along."""
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
MOST_BYTES = 60 << 20


def command(folder: Path) -> list[str]:
    """The pip call that downloads everything."""
    platforms = [part for platform in PLATFORMS for part in ("--platform", platform)]
    wanted = ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON]
    quiet = ["--quiet", "--disable-pip-version-check", "--no-input"]
    return [
        sys.executable,
        "-m",
        "pip",
        "download",
        *quiet,
        *wanted,
        *platforms,
        "--dest",
        str(folder),
        *WHEELS,
    ]


def check(folder: Path) -> tuple[int, str | None]:
    """Bytes of the wheels in `folder`, and what is wrong with them: a package twice, or too much in all."""
    files = sorted(folder.glob("*.whl"))
    size = sum(file.stat().st_size for file in files)
    names = [file.name.split("-")[0].lower() for file in files]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        return (
            size,
            f"{folder} holds more than one version of {', '.join(twice)}; delete the folder and run again",
        )
    missing = sorted({wheel.split("==")[0].replace("-", "_") for wheel in WHEELS} - set(names))
    if missing:
        return size, f"{folder} lacks {', '.join(missing)}; run again with the network"
    if size > MOST_BYTES:
        return (
            size,
            f"{folder} holds {size:,} bytes, at most {MOST_BYTES:,} travel; take something out of the list",
        )
    return size, None


def main(argv: Sequence[str] | None = None) -> int:
    """Download and check; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/wheels"), help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help="download nothing, look at what is there")
    args = parser.parse_args(argv)
    if not args.check:
        args.out.mkdir(parents=True, exist_ok=True)
        if status := subprocess.run(command(args.out), check=False).returncode:
            print(f"pip could not download the wheels (exit status {status})", file=sys.stderr)
            return 1
    size, problem = check(args.out)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    print(f"{args.out}: {len(WHEELS)} wheels, {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
