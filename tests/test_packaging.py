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
    assert {Requirement(text).name for text in PROJECT["dependencies"]} == {
        "numpy",
        "platformdirs",
        "pydantic",
        "rich",
    }


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
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheels that are published: the runtime's, the toolchain's."""
    out = tmp_path_factory.mktemp("dist")
    runtime, deploy = tool("build_wheels").build_wheels(out)
    return runtime, deploy


def held(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def requirements(wheel: Path) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = archive.read(name).decode().splitlines()
    return [Requirement(line.partition(": ")[2]) for line in lines if line.startswith("Requires-Dist: ")]


def test_the_runtimes_wheel_is_one_package(wheels: tuple[Path, Path]) -> None:
    names = held(wheels[0])
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"lightforcing_runtime"}
    for path in (ROOT / "runtime").rglob("*.py"):
        assert f"lightforcing_{path.relative_to(ROOT).as_posix()}" in names
    assert "lightforcing_runtime/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    base = {r.name for r in requirements(wheels[0]) if r.marker is None}
    assert base == {"numpy", "platformdirs", "pydantic", "rich"}


def test_the_toolchains_wheel_holds_the_rooms_and_their_data(wheels: tuple[Path, Path]) -> None:
    names = held(wheels[1])
    rooms = ("lightforcing_ref", "plugins", "export", "serving", "engines")
    for path in [
        *ROOT.glob("engines/*/*.toml"),
        ROOT / "engines/models.toml",
        *(ROOT / "lightforcing_ref" / "assets").rglob("*.safetensors"),
        *(path for path in (ROOT / "serving" / "page").iterdir() if path.is_file()),
        *(path for room in rooms for path in (ROOT / room).rglob("*.py")),
    ]:
        if path.parent.name not in ("built", "eager"):
            assert path.relative_to(ROOT).as_posix() in names
    assert {f"{room}/py.typed" for room in rooms} <= names
    unwanted = ("runtime/", "tests/", "tools/", "benchmarks/", "engines/built/", "plugins/eager/")
    assert not [name for name in names if name.startswith(unwanted)]
    assert any(name.endswith("licenses/LICENSE") for name in names)
    (own,) = [r for r in requirements(wheels[1]) if r.name == "lightforcing-runtime" and r.marker is None]
    assert str(own.specifier) == f"=={wheels[0].name.split('-')[1]}"


def test_imports_of_the_runtime_are_renamed_and_nothing_else() -> None:
    source = (
        "from runtime.bundle import load_bundle\nimport runtimes\nfrom runtime import Pipeline\n"
        "    from runtime.errors import EngineError\nx = 'runtime.bundle'  # from runtime.bundle\n"
        "print('python -m runtime verify')\n"
    )
    assert tool("build_wheels").rewritten(source) == (
        "from lightforcing_runtime.bundle import load_bundle\nimport runtimes\nfrom lightforcing_runtime import "
        "Pipeline\n    from lightforcing_runtime.errors import EngineError\nx = 'runtime.bundle'  # from "
        "runtime.bundle\nprint('python -m lightforcing_runtime verify')\n"
    )


def test_images_and_libraries_come_along_where_they_are_given(tmp_path: Path) -> None:
    (tmp_path / "images/sm_90").mkdir(parents=True)
    (tmp_path / "images/sm_90/kernels.json").write_text("{}")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libone.so").write_bytes(b"x")
    build = tool("build_wheels").build_wheels
    _, deploy = build(tmp_path / "dist", images=tmp_path / "images", libraries=tmp_path / "lib")
    assert {"plugins/images/sm_90/kernels.json", "plugins/lib/libone.so"} <= held(deploy)
    assert not deploy.name.endswith("-any.whl")
    with pytest.raises(SystemExit, match="holds none of"):
        build(tmp_path / "dist", images=tmp_path / "lib")


@pytest.fixture(scope="module")
def site(wheels: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both wheels, unpacked."""
    folder = tmp_path_factory.mktemp("site")
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return folder


def from_wheels(site: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code against the wheels' files alone, in their folder; the libraries are this environment's, and its own
    `runtime` cannot be imported.
    """
    hidden = f"import sys; sys.modules['runtime'] = None; sys.path.insert(0, {str(site)!r}); {code}"
    return subprocess.run(
        [sys.executable, "-c", hidden], cwd=site, capture_output=True, text=True, check=False
    )


def test_every_module_of_the_wheels_finds_what_it_imports(site: Path) -> None:
    code = (
        "import importlib, pathlib\n"
        "for path in sorted(pathlib.Path('lightforcing_runtime').rglob('*.py')):\n"
        "    if path.name not in ('__main__.py', 'inductor.py'):\n"
        "        importlib.import_module('.'.join(path.with_suffix('').parts))\n"
        "import export, serving, plugins.compile.prebuilt, export.cli.main, export.hub.download\n"
        "print(export.__file__)"
    )
    done = from_wheels(site, f"exec({code!r})")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(site)


def test_commands_run_from_the_wheels(site: Path) -> None:
    run = "import runpy; sys.argv = {argv!r}; runpy.run_module({module!r}, run_name='__main__')"
    helped = from_wheels(site, run.format(argv=["lightforcing", "--help"], module="lightforcing_runtime"))
    assert "generate" in helped.stdout
    listed = from_wheels(site, run.format(argv=["x", "targets", "--json"], module="export"))
    assert '"rtx5090"' in listed.stdout, listed.stderr


def test_a_bundle_runs_with_the_published_package(site: Path, tmp_path: Path) -> None:
    from tests.runtime import handmade

    handmade.build_bundle(tmp_path / "bundle")
    code = (
        "from lightforcing_runtime import Pipeline\n"
        f"with Pipeline.load({str(tmp_path / 'bundle')!r}) as pipe, pipe.session(prompt='a red fox', seed=1) as one:\n"
        "    print(next(iter(one.stream(chunks=1))).frames.shape)"
    )
    done = from_wheels(site, f"exec({code!r})")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\(9, \d+, \d+, 3\)\n", done.stdout)


def test_a_product_with_a_runtime_of_its_own_embeds_ours(site: Path, tmp_path: Path) -> None:
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "__init__.py").write_text("OWN = 1\n")
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(site)!r}]; "
        "import runtime, lightforcing_runtime as ours; "
    )
    done = subprocess.run(
        [sys.executable, "-c", code + "print(runtime.OWN, ours.Pipeline.__module__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "1 lightforcing_runtime.pipeline\n", done.stderr


@pytest.mark.slow
def test_the_wheels_install_into_an_empty_environment(wheels: tuple[Path, Path], tmp_path: Path) -> None:
    """Needs a package index. Nothing but the base dependencies: help and targets work, a build says what it lacks."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    binaries = tmp_path / "venv" / "bin"

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [binaries / arguments[0], *arguments[1:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    alone = run("python", "-m", "pip", "install", "--quiet", wheels[0])
    assert alone.returncode == 0, alone.stderr
    assert run("lightforcing", "--help").returncode == 0
    assert run("python", "-c", "import runtime").returncode == 1
    both = run("python", "-m", "pip", "install", "--quiet", *wheels)
    assert both.returncode == 0, both.stderr
    assert '"rtx5090"' in run("lightforcing-export", "targets", "--json").stdout
    build = run("lightforcing-export", "build")
    assert build.returncode == 2
    assert "not installed" in build.stderr or "install it: pip install" in build.stderr


@pytest.mark.slow
def test_wheels_with_kernels_make_a_clip_and_need_no_triton(tmp_path: Path) -> None:
    """Needs a package index. Real images of one architecture and the launch library, in an environment of its own."""
    pytest.importorskip("triton", reason="kernels are compiled with Triton (extra kernels)")
    from tests.runtime import handmade

    images, libraries = tmp_path / "images", tmp_path / "lib"
    command = [
        sys.executable,
        "-m",
        "plugins",
        "build",
        "--arch",
        "sm_120",
        "--out",
        str(images),
        "--tensorrt",
    ]
    subprocess.run([*command, "--tensorrt-out", str(libraries)], cwd=ROOT, check=True, capture_output=True)
    runtime, deploy = tool("build_wheels").build_wheels(tmp_path / "dist", images=images, libraries=libraries)
    assert {"plugins/images/sm_120/kernels.json", "plugins/lib/liblightforcing_launch.so"} <= held(deploy)

    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    binaries = tmp_path / "venv" / "bin"
    install = [binaries / "python", "-m", "pip", "install", "--quiet", f"{runtime}[cpu,text,video]", deploy]
    subprocess.run(install, check=True)
    handmade.build_bundle(tmp_path / "bundle")

    def run(*arguments: str | Path) -> str:
        done = subprocess.run(
            [binaries / arguments[0], *arguments[1:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("lightforcing", "generate", "bundle", "--prompt", "a red fox", "--seconds", "1", "--out", "clip.mp4")
    assert (tmp_path / "clip.mp4").stat().st_size > 500
    assert '"rtx5090"' in run("lightforcing-export", "targets", "--json")
    code = (
        "import importlib.util, plugins.compile.prebuilt as p; "
        "print(p.has_images(120), p.has_images(90), importlib.util.find_spec('triton'))"
    )
    assert run("python", "-c", code) == "True False None\n"


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
