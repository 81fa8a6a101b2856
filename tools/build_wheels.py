"""Build the two wheels that are published from this tree.

    python tools/build_wheels.py [--out dist] [--images FOLDER] [--libraries FOLDER] [--version 1.2.3]

`lightforcing-runtime` is the folder runtime/ as the package `lightforcing_runtime`: a top-level package called
`runtime` would collide with a product's own. `lightforcing-deploy` is everything else that is installed; it depends on
the first, in the same version. Imports of `runtime` are rewritten in both. `--images` and `--libraries` put kernel
images (`python -m plugins build --out FOLDER`), and the launch library and plugin (`--tensorrt-out FOLDER`), into the
second.

Needs hatchling, and hatch-vcs for the version, which comes from the tags where none is given. An editable installation
of the tree itself is for development, and one distribution.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

__all__ = ["build_wheels", "rewritten"]

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "lightforcing_runtime"
RUNTIME_EXTRAS = ("cpu", "text", "video", "gpu", "tensorrt-rtx", "tensorrt")
"""What a product needs to run bundles; the toolchain's wheel hands them on."""

_NOT_PUBLISHED = ("train", "test", "docs", "dev")
_DEPLOY = ("lightforcing_ref", "plugins", "export", "serving", "engines")
_LEFT_OUT = (("engines", "built"), ("plugins", "eager"))
_IMPORT = re.compile(r"^(\s*(?:from|import)\s+)runtime(?=[.\s])", re.MULTILINE)
_COMMAND = re.compile(r"python -m runtime\b")
_HOOK = """
from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Hook(BuildHookInterface):
    def initialize(self, version, build_data):
        build_data["tag"] = {tag!r}
        build_data["pure_python"] = False
"""


def rewritten(source: str) -> str:
    """A module of this tree as the wheels hold it: `runtime` is called by its published name."""
    return _COMMAND.sub(f"python -m {PACKAGE}", _IMPORT.sub(rf"\g<1>{PACKAGE}", source))


def build_wheels(
    out: Path, *, images: Path | None = None, libraries: Path | None = None, version: str | None = None
) -> list[Path]:
    """Build both wheels into `out`, and return their paths: the runtime's, the toolchain's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    version = version or _version()
    out.mkdir(parents=True, exist_ok=True)
    built: list[Path] = []
    for name in ("runtime", "deploy"):
        with tempfile.TemporaryDirectory(prefix="lightforcing-wheel-") as scratch:
            stage = Path(scratch)
            if name == "runtime":
                _copy(ROOT / "runtime", stage / PACKAGE)
                metadata = _runtime_metadata(project, version)
            else:
                for room in _DEPLOY:
                    _copy(ROOT / room, stage / room)
                _add(images, stage / "plugins" / "images", "sm_*/*")
                _add(libraries, stage / "plugins" / "lib", "*.so", "*.h")
                metadata = _deploy_metadata(project, version)
            for file in ("README.md", "LICENSE"):
                shutil.copy(ROOT / file, stage / file)
            (stage / "pyproject.toml").write_text(_toml(stage, metadata), encoding="utf-8")
            command = [
                sys.executable,
                "-m",
                "hatchling",
                "build",
                "--target",
                "wheel",
                "--directory",
                str(out.resolve()),
            ]
            done = subprocess.run(command, cwd=stage, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(
                    f"error: hatchling does not build lightforcing-{name}: {done.stderr.strip()}"
                )
            built += out.glob(f"lightforcing_{name}-{version}-*.whl")
    return built


def _version() -> str:
    """As the tree's own distribution has it: from the tags."""
    command = [sys.executable, "-m", "hatchling", "version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def _copy(source: Path, destination: Path) -> None:
    for path in sorted(source.rglob("*")):
        parts = path.relative_to(ROOT).parts
        if not path.is_file() or "__pycache__" in parts or any(parts[: len(p)] == p for p in _LEFT_OUT):
            continue
        if parts[:2] in (("plugins", "lib"), ("plugins", "images")):  # only what is asked for
            continue
        target = destination / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".py":
            target.write_text(rewritten(path.read_text(encoding="utf-8")), encoding="utf-8")
        else:
            shutil.copyfile(path, target)


def _add(source: Path | None, destination: Path, *patterns: str) -> None:
    if source is None:
        return
    found = [path for pattern in patterns for path in sorted(source.glob(pattern))]
    if not found:
        raise SystemExit(f"error: {source} holds none of {', '.join(patterns)}")
    for path in found:
        target = destination / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _common(project: dict[str, Any], version: str) -> dict[str, Any]:
    keys = ("readme", "license", "license-files", "requires-python", "classifiers")
    return {"version": version, **{key: project[key] for key in keys}}


def _runtime_metadata(project: dict[str, Any], version: str) -> dict[str, Any]:
    extras = project["optional-dependencies"]
    return {
        "name": "lightforcing-runtime",
        "description": "Runs bundles of real-time autoregressive video diffusion: sessions, streams, prompt switches",
        **_common(project, version),
        "dependencies": project["dependencies"],
        "optional-dependencies": {name: extras[name] for name in RUNTIME_EXTRAS},
        "scripts": {"lightforcing": f"{PACKAGE}.cli.main:main"},
    }


def _deploy_metadata(project: dict[str, Any], version: str) -> dict[str, Any]:
    extras = {
        name: [f"lightforcing-runtime[{name}]=={version}"] if name in RUNTIME_EXTRAS else requirements
        for name, requirements in project["optional-dependencies"].items()
        if name not in _NOT_PUBLISHED
    }
    return {
        "name": "lightforcing-deploy",
        "description": project["description"],
        **_common(project, version),
        "dependencies": [*project["dependencies"], f"lightforcing-runtime=={version}"],
        "optional-dependencies": extras,
        "scripts": {"lightforcing-export": "export.cli.main:main"},
    }


def _toml(stage: Path, metadata: dict[str, Any]) -> str:
    """The project file of a stage; JSON's strings and lists are TOML's."""
    tables = {key: value for key, value in metadata.items() if isinstance(value, dict)}
    lines = [
        "[build-system]",
        'requires = ["hatchling"]',
        'build-backend = "hatchling.build"',
        "",
        "[project]",
    ]
    lines += [f"{key} = {json.dumps(value)}" for key, value in metadata.items() if key not in tables]
    for name, table in tables.items():
        lines += [
            "",
            f"[project.{name}]",
            *(f"{json.dumps(key)} = {json.dumps(value)}" for key, value in table.items()),
        ]
    packages = sorted(path.name for path in stage.iterdir() if path.is_dir())
    lines += ["", "[tool.hatch.build.targets.wheel]", f"packages = {json.dumps(packages)}"]
    # What git ignores in the tree (libraries, images) is wanted here.
    lines += [f"artifacts = {json.dumps(['plugins/lib/*', 'plugins/images/**'])}"]
    if list(stage.glob("plugins/lib/*.so")):
        tag = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        (stage / "hatch_build.py").write_text(_HOOK.format(tag=tag), encoding="utf-8")
        lines += ["", "[tool.hatch.build.targets.wheel.hooks.custom]"]
    return "\n".join(lines) + "\n"


def _lines(wheels: Sequence[Path]) -> Iterator[str]:
    for wheel in wheels:
        yield f"{wheel} ({wheel.stat().st_size / 2**20:.2f} MiB)"


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the two wheels that are published from this tree.")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--images", type=Path, help="folder of kernel images to include")
    parser.add_argument(
        "--libraries", type=Path, help="folder of the launch library and the TensorRT plugin to include"
    )
    parser.add_argument("--version", help="of both wheels (default: from the tags)")
    options = parser.parse_args()
    built = build_wheels(
        options.out, images=options.images, libraries=options.libraries, version=options.version
    )
    print("\n".join(_lines(built)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
