"""Which backend is built, why, and what is refused before any work starts."""

from __future__ import annotations

import pytest

from export.errors import InputError
from export.machine import Gpu, GpuReport, importable
from export.request.capability import BACKENDS, choose_backend
from export.request.targets import list_targets, load_target

NONE = GpuReport(problem="no NVIDIA driver (libcuda.so.1 is not there)")
H200 = GpuReport((Gpu("NVIDIA H200", "9.0", 150 << 30),), "13.0")


RTX = pytest.mark.skipif(not importable("tensorrt_rtx"), reason="TensorRT-RTX is not installed")


@pytest.mark.parametrize("target", list_targets(), ids=lambda target: target.name)
def test_every_target_can_be_built_without_a_gpu(target) -> None:
    choice = choose_backend(target, "onnxruntime", gpus=NONE)
    assert (choice.backend, choice.precision) == ("onnxruntime", "fp32")


@RTX
@pytest.mark.parametrize(
    ("target", "precision"), [("rtx5090", "fp8"), ("rtx5080", "fp8"), ("rtx4090", "fp8"), ("rtx3090", "bf16")]
)
def test_geforce_cards_get_engines_on_any_machine(target, precision) -> None:
    choice = choose_backend(load_target(target), gpus=NONE)
    assert (choice.backend, choice.precision) == ("tensorrt-rtx", precision)
    assert choice.reason == "it is the target's first choice"


@RTX
def test_a_precision_that_is_asked_for_is_taken() -> None:
    for precision in ("bf16", "nvfp4"):
        assert choose_backend(load_target("rtx5090"), precision=precision, gpus=NONE).precision == precision


def test_auto_says_why() -> None:
    assert choose_backend(load_target("cpu"), gpus=NONE).reason == "it is the target's first choice"
    assert choose_backend(load_target("cpu"), "onnxruntime", gpus=NONE).reason == "it was asked for"
    reason = choose_backend(load_target("b200"), gpus=NONE).reason
    assert "no NVIDIA driver" in reason
    assert "no NVIDIA driver" not in choose_backend(load_target("h200"), gpus=H200).reason


@pytest.mark.parametrize(
    ("target", "backend", "precision", "messages"),
    [
        (
            "h200",
            "tensorrt-rtx",
            None,
            ("only for compute capability 7.5, 8.0", "h200 (9.0)", "--backend onnxruntime"),
        ),
        ("b200", "tensorrt-rtx", "bf16", ("12.0, 12.1", "b200 (10.0)")),
        ("rtx4090", "tensorrt", "bf16", ("target GPU itself", "no NVIDIA driver", "use --backend")),
        ("a100", "auto", "fp8", ("a100 (sm_80) does not compute in fp8", "--precision fp32 or bf16")),
        ("rtx3090", "tensorrt-rtx", "fp8", ("rtx3090 (sm_86) does not compute in fp8",)),
        ("h100", "auto", "nvfp4", ("does not compute in nvfp4",)),
        ("h200", "auto", "fp8", ("onnxruntime (no fp8, only fp32)", "--precision fp32")),
        ("rtx5090", "onnxruntime", "bf16", ("no bf16, only fp32",)),
        ("cpu", "tensorrt", None, ("cpu (no GPU)", "--backend onnxruntime")),
        ("cpu", "tensor-rt", None, ("did you mean tensorrt", "auto, inductor, onnxruntime")),
        ("cpu", "auto", "fp9", ("did you mean fp8", "bf16, fp32, fp8, nvfp4")),
    ],
)
def test_refusals_name_cause_and_alternative(
    target: str, backend: str, precision: str | None, messages: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as caught:
        choose_backend(load_target(target), backend, precision, gpus=NONE)
    for message in messages:
        assert message in str(caught.value)


def test_gpu_of_another_architecture_does_not_count() -> None:
    with pytest.raises(InputError, match=r"here there is NVIDIA H200 \(9\.0\)"):
        choose_backend(load_target("a100"), "tensorrt", gpus=H200)


def test_the_suggested_alternative_works() -> None:
    for target in list_targets():
        for backend in BACKENDS:
            try:
                choose_backend(target, backend, gpus=NONE)
            except InputError as error:
                words = str(error).rpartition("; use ")[2].split()
                assert words[::2] == ["--backend", "--precision"]
                assert choose_backend(target, words[1], words[3], gpus=NONE)
