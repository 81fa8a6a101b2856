"""Packages for a GPU that is not here: compiled by a CUDA build of PyTorch, and read as far as that tells.

Such a PyTorch takes 5 GB, so it is in no default set-up: the tests take this interpreter's, or that of
`make setup-gpu-versions`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from export.backends.inductor.modules import _TextLayer
from export.backends.inductor.null_gpu import GPUS, compile_library, environment
from export.backends.inductor.packages import needed_drivers
from export.backends.inductor.pretend import best_config
from export.errors import BuildError, InputError
from export.request.targets import load_target
from lightforcing_ref.checkpoint.spec import umt5_shapes
from lightforcing_ref.config import CHUNK_FRAMES, PRESETS
from lightforcing_ref.text import LAYER_WEIGHTS, UMT5_TINY, UMT5Layer
from runtime.bundle import load_bundle
from runtime.verify.dry_run import dry_run
from tests.export.backends.package_expectations import load_package_expectations

ROOT = Path(__file__).resolve().parents[3]
TINY = PRESETS["tiny"]


def cuda_python() -> str:
    """An interpreter whose PyTorch is a CUDA build; skips the test where there is none."""
    if torch.version.cuda is not None:
        return sys.executable
    own = ROOT / ".venv-gpu" / "bin" / "python"
    if own.is_file():
        code = "import sys, torch; sys.exit(torch.version.cuda is None)"
        if subprocess.run([own, "-c", code], check=False).returncode == 0:
            return str(own)
    pytest.skip(
        "no CUDA build of PyTorch is installed; `make setup-gpu-versions` makes an environment with one"
    )


# ---- the GPU that is none ----


def test_every_gpu_that_can_be_compiled_for_is_a_target() -> None:
    for name, gpu in GPUS.items():
        assert load_target(name).compute_capability == "{}.{}".format(*gpu.capability)
    assert set(GPUS) == {"a100", "h100", "h200", "b200"}


def test_another_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="without one, there are a100, h100, h200, b200"):
        environment(tmp_path / "libcuda.so.1", "rtx5090")


def test_what_was_not_computed_cannot_be_read(tmp_path: Path) -> None:
    """PyTorch sees the GPU and launches kernels; looking at a result fails."""
    python = cuda_python()
    code = (
        "import torch\n"
        "assert torch.cuda.get_device_capability() == (9, 0) and torch.cuda.device_count() == 1\n"
        "x = torch.zeros(4, device='cuda') + 1\n"
        "try:\n    x[0].item()\nexcept RuntimeError as error:\n    print('refused', error)\n"
    )
    variables = {**os.environ, **environment(compile_library(tmp_path), "h200")}
    result = subprocess.run([python, "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert "refused" in result.stdout, result.stderr


# ---- configurations that nobody timed ----

CHANNELS = """
    r0_numel = 24
    tmp0 = tl.load(in_out_ptr0 + (x0 + 1572864*r0_1), r0_mask, other=0.0).to(tl.float32)
    tmp1 = tl.load(in_ptr0 + (r0_1), r0_mask, eviction_policy='evict_last', other=0.0).to(tl.float32)
"""
ROWS = """
    r0_numel = 8960
    tmp0 = tl.load(in_ptr0 + (r0_1 + 8960*x0), r0_mask, other=0.0).to(tl.float32)
"""


def test_threads_go_along_what_lies_side_by_side() -> None:
    offered = [{"XBLOCK": size, "warps": warps} for size, warps in ((1, 2), (8, 2), (32, 8), (128, 8))]
    assert best_config("PERSISTENT_REDUCTION", CHANNELS, {"x": 2097152, "r0_": 32}, offered) == 3
    assert best_config("PERSISTENT_REDUCTION", ROWS, {"x": 8192, "r0_": 512}, offered) == 1  # 8 rows of 512
    assert best_config("PERSISTENT_REDUCTION", ROWS, {"x": 8192, "r0_": 2048}, offered) == 0


def test_a_loop_over_a_row_does_not_run_far_beyond_its_end() -> None:
    offered = [{"XBLOCK": 1, "R0_BLOCK": size, "warps": 16} for size in (16384, 2048)]
    assert best_config("REDUCTION", ROWS, {"x": 8192, "r0_": 16384}, offered) == 1


# ---- what packages hold ----


@pytest.mark.parametrize("length", [64, 512])
def test_buckets_of_positions_need_no_table(length: int) -> None:
    reference, compiled = UMT5Layer(UMT5_TINY, length), _TextLayer(UMT5_TINY, length)
    assert not list(compiled.buffers())
    generator = torch.Generator().manual_seed(0)
    shapes = umt5_shapes(UMT5_TINY)
    weights = [torch.randn(shapes[f"layers.0.{name}"], generator=generator) for name in LAYER_WEIGHTS]
    hidden = torch.randn(length, UMT5_TINY.d_model, generator=generator)
    mask = torch.ones(length)
    assert torch.equal(reference(hidden, mask, *weights), compiled(hidden, mask, *weights)[0])


def test_packages_need_the_driver_of_pytorch_and_of_each_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ABI versions in the header of a kernel's file: 7 is CUDA 12's assembler, 8 with the newer ABI is CUDA 13's."""

    def package(name: str, *abis: tuple[int, int]) -> Path:
        path = tmp_path / name
        with zipfile.ZipFile(path, "w") as archive:
            for index, abi in enumerate(abis):
                archive.writestr(f"model/{index}.cubin", b"\x7fELF\x02\x01\x01" + bytes(abi) + bytes(55))
        return path

    older = package("a.pt2", (51, 7))
    mixed = package("b.pt2", (51, 7), (65, 8))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert needed_drivers([older], 90) == 525
    assert needed_drivers([older, mixed], 90) == 580
    assert needed_drivers([mixed], 100) == 570
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert needed_drivers([older], 90) == 580
    monkeypatch.setattr(torch.version, "cuda", "14.0")
    with pytest.raises(BuildError, match="the drivers that run packages are known for CUDA 12 and 13"):
        needed_drivers([older], 90)


def check_bundle(bundle: Path) -> None:
    """A bundle, as far as it can be judged without the GPU that it is for."""
    opened = load_bundle(bundle)
    manifest = opened.manifest
    assert manifest.status == "built, not executed"
    assert manifest.target.compute_capability == load_target(manifest.target.name).compute_capability
    library, kernels = manifest.library, manifest.kernels
    assert library is not None and library.name == "torch" and library.triton
    assert kernels is not None and library.driver is not None and library.driver >= kernels.driver
    assert not dry_run(opened, sessions=2).unbound
    tokens = {"text_encoder": manifest.text.text_len}
    chunk = CHUNK_FRAMES * manifest.model.frame_tokens
    for name, expected in load_package_expectations(manifest.precision).items():
        component = manifest.components[name]
        assert component.file is not None
        path = bundle / component.file
        assert not expected.problems(path, component, tokens.get(name, chunk)), name
        assert path.stat().st_size < 8 << 20, name


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("precision", "target"),
    [
        ("fp8", "h200"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("bf16", "h200"), ("bf16", "h100"), ("bf16", "a100"), ("fp8", "b200"))
        ),
    ],
)
def test_a_bundle_is_built_without_its_gpu(precision: str, target: str, tmp_path: Path) -> None:
    build_tiny(cuda_python(), precision, tmp_path, target)
    check_bundle(tmp_path / f"inductor-{precision}")


def build_tiny(python: str, precision: str, folder: Path, target: str = "h200") -> None:
    command = [python, "-m", "tests.gpu.bundles", f"inductor-{precision}", str(folder), target]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_environment_that_compiles_for_gpus_can_be_made(tmp_path: Path) -> None:
    python = shutil.which("python3.12") or shutil.which("python3.13")
    if python is None:
        pytest.skip("PyTorch's and numpy's versions of the GPU machine need Python 3.12 or newer")
    made = tmp_path / "venv"
    command = [python, "tools/setup_env.py", str(made), "tools/gpu_versions.txt"]
    subprocess.run(command, cwd=ROOT, check=True)
    build_tiny(str(made / "bin" / "python"), "fp8", tmp_path)
    check_bundle(tmp_path / "inductor-fp8")
