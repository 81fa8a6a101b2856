"""Dependencies, the wheel, the set-up and the make targets."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {
    name: [Requirement(text) for text in texts] for name, texts in PROJECT["optional-dependencies"].items()
}

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def names(extra: str) -> set[str]:
    return {requirement.name for requirement in EXTRAS[extra]}


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_base_dependencies_are_few() -> None:
    assert {Requirement(text).name for text in PROJECT["dependencies"]} == {"numpy", "pydantic", "rich"}


def test_every_dependency_has_a_lower_and_an_upper_bound() -> None:
    base = [Requirement(text) for text in PROJECT["dependencies"]]
    for requirement in [*base, *(r for extra in EXTRAS.values() for r in extra)]:
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators == {">=", "<"}, requirement


def test_heavy_dependencies_are_kept_apart() -> None:
    assert names("cpu") == {"onnxruntime"}
    for extra in EXTRAS:
        assert extra == "cpu" or "onnxruntime" not in names(extra)
        assert "onnxruntime-gpu" not in names(extra)  # nothing here runs on its CUDA provider
        assert extra in ("export", "inductor-cuda") or "torch" not in names(extra)


def test_set_up_uses_extras_that_exist_and_no_gpu_ones() -> None:
    match = re.search(r"^EXTRAS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert match is not None
    used = set(match[1].split(","))
    assert used <= set(EXTRAS)
    assert not used & {"inductor-cuda", "tensorrt"}


def test_pinned_torch_is_within_the_bounds() -> None:
    (torch,) = (requirement for requirement in EXTRAS["export"] if requirement.name == "torch")
    pin = Requirement(tool("install_torch").REQUIREMENT)
    (exact,) = pin.specifier
    assert (pin.name, exact.operator) == ("torch", "==")
    assert torch.specifier.contains(exact.version)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_the_rooms_and_their_data(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    rooms = ("lightforcing_ref", "plugins", "export", "runtime", "engines", "serving")
    for path in [
        *ROOT.glob("engines/*/*.toml"),
        *(path for room in rooms for path in (ROOT / room).rglob("*.py")),
    ]:
        if path.parent.name not in ("built", "eager"):
            assert path.relative_to(ROOT).as_posix() in held
    assert {f"{room}/py.typed" for room in rooms} <= held
    assert not [
        name for name in held if name.startswith(("tests/", "tools/", "benchmarks/", "engines/built/"))
    ]
    page = [path for path in (ROOT / "serving" / "page").iterdir() if path.is_file()]
    assert {path.relative_to(ROOT).as_posix() for path in page} <= held
    assert any(name.endswith("licenses/LICENSE") for name in held)


def test_commands_run_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """From its files alone, in another folder; the libraries are this environment's."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
        ).stdout

    found = run("-c", "import export, runtime; print(export.__file__, runtime.__file__)").split()
    assert all(Path(path).is_relative_to(tmp_path / "site") for path in found)
    assert "generate" in run("-m", "runtime", "--help")
    assert '"rtx5090"' in run("-m", "export", "targets", "--json")


@pytest.mark.slow
def test_the_wheel_installs_into_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """Needs a package index. Nothing but the base dependencies: help and targets work, a build says what it lacks."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", str(wheel)], check=True, cwd=tmp_path)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [python, "-m", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert run("runtime", "--help").returncode == 0
    assert '"rtx5090"' in run("export", "targets", "--json").stdout
    build = run("export", "build")
    assert build.returncode == 2
    assert "not installed" in build.stderr or "install the export tools" in build.stderr


def write_wheel(folder: Path, name: str, version: str, requires: str = "") -> None:
    """A pure-Python wheel that holds nothing but its metadata."""
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    if requires:
        metadata += f"Requires-Dist: {requires}\n"
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {f"{info}/METADATA": metadata, f"{info}/WHEEL": wheel}
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in (files | {f"{info}/RECORD": record}).items():
            archive.writestr(path, text)


def test_torch_is_installed_only_without_cuda_packages(tmp_path: Path) -> None:
    index = tmp_path / "index"
    index.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    (tmp_path / "tools").mkdir()
    # Found without an import: importing pip switches setuptools' distutils off for the rest of the process.
    pip = importlib.metadata.distribution("pip").locate_file("pip")
    (tmp_path / "tools/pip").symlink_to(Path(str(pip)))
    # pip sees only the folder: every other index and setting is off.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index)}
    environment["PYTHONPATH"] = str(tmp_path / "tools")

    def install() -> subprocess.CompletedProcess[str]:
        command = [python, ROOT / "tools/install_torch.py"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    nothing = install()
    assert nothing.returncode == 1
    assert "no index has torch==2.13.0" in nothing.stderr

    write_wheel(index, "torch", "2.13.0", "nvidia-big-library")
    write_wheel(index, "nvidia-big-library", "13.0")
    refused = install()
    assert refused.returncode == 1
    assert "1 CUDA packages (nvidia-big-library" in refused.stderr
    assert "--index-url https://download.pytorch.org/whl/cpu" in refused.stderr

    write_wheel(index, "torch", "2.13.0+cpu")
    installed = install()
    assert installed.returncode == 0, installed.stderr
    assert install().stdout == "torch 2.13.0+cpu is installed\n"


def test_set_up_does_nothing_when_nothing_changed(tmp_path: Path) -> None:
    (tmp_path / ".setup-stamp").write_text(tool("setup_env").fingerprint("cpu,test"))
    command = [sys.executable, str(ROOT / "tools/setup_env.py"), str(tmp_path), "cpu,test"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert [path.name for path in tmp_path.iterdir()] == [".setup-stamp"]


def test_the_gpu_machines_versions_are_pinned_once() -> None:
    lines = (ROOT / "tools/gpu_versions.txt").read_text().splitlines()
    found = {r.name: r for r in (Requirement(line) for line in lines if line and not line.startswith("#"))}
    for name in ("torch", "triton", "numpy", "cuda-core", "cuda-bindings"):
        (specifier,) = found[name].specifier
        assert specifier.operator == "==", name
    carried = {r.name: r for r in map(Requirement, tool("gpu_wheels").WHEELS)}
    for name in ("pydantic", "ftfy", "onnx-ir"):
        assert found[name] == carried[name]


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL", "OUT"}
    }
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@needs_make
def test_make_names_a_python_that_is_too_old() -> None:
    result = make("setup", "PYTHON=")
    assert result.returncode == 2
    assert "Python 3.11 or newer is needed" in result.stderr


@needs_make
def test_gpu_target_sets_nothing_up() -> None:
    plan = make("--dry-run", "gpu").stdout
    assert "-m gpu" in plan
    assert "setup_env" not in plan
    assert ".venv" not in plan
    assert "setup_env" in make("--dry-run", "test").stdout


@needs_make
def test_help_lists_the_two_commands() -> None:
    text = make("help").stdout
    assert "make demo" in text
    assert "make test" in text


def test_ci_script_is_executable_and_calls_make() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()


def test_readme_names_only_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (ROOT / target).exists(), target
