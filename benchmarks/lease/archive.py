"""What travels to a machine that is lent, in one file: `python -m benchmarks.lease.archive FOLDER... --out FILE`.

Standard library only. Compiled parts of bundles, kernel images and wheels; no weights, which are drawn there.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = ["MOST_BYTES", "pack", "unpack", "unpack_wheels"]

MOST_BYTES = 48 << 20
"""With the tree, which travels beside it, below the 60 MiB that such a machine takes."""


def pack(folders: Iterable[Path], build: Path, archive: Path) -> int:
    """Pack folders that lie in `build`, under their names in it; the archive's size in bytes.

    Raises:
        ValueError: a folder lies elsewhere, or the archive is larger than what travels.
    """
    archive.parent.mkdir(parents=True, exist_ok=True)
    temporary = archive.with_suffix(".partial")
    with tarfile.open(temporary, "w:xz", preset=6) as tar:
        for folder in folders:
            try:
                name = folder.absolute().relative_to(build.absolute())
            except ValueError:
                raise ValueError(f"{folder} does not lie in {build}, where it is unpacked to") from None
            tar.add(folder, arcname=str(name))
    size = temporary.stat().st_size
    if size > MOST_BYTES:
        temporary.unlink()
        raise ValueError(
            f"the archive has {size >> 20} MiB, and {MOST_BYTES >> 20} travel; leave a folder out"
        )
    temporary.replace(archive)
    return size


def unpack(archive: Path, build: Path) -> int:
    """Unpack into `build`; the number of files."""
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
        tar.extractall(build, members, filter="data")
    return sum(member.isfile() for member in members)


def unpack_wheels(build: Path) -> int:
    """Unpack `build/wheels` into `build/site`, which takes a second where pip takes ten; the number of wheels."""
    wheels = sorted((build / "wheels").glob("*.whl"))
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(build / "site")
    return len(wheels)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lease.archive", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="in the build folder")
    parser.add_argument("--build", type=Path, default=Path("build"))
    parser.add_argument("--out", type=Path, default=Path("build/lease.tar.xz"))
    args = parser.parse_args(argv)
    if missing := [str(folder) for folder in args.folders if not folder.is_dir()]:
        print(f"error: {', '.join(missing)} is not there; make it first", file=sys.stderr)
        return 2
    try:
        size = pack(args.folders, args.build, args.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {size / (1 << 20):.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
