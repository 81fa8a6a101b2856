"""Verdicts: what passes, what fails, when one counts, and what the command says."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from runtime.bundle import Bundle, file_entry, load_bundle
from runtime.bundle.golden import GoldenVectors, Platform
from runtime.cli.main import main
from runtime.errors import EngineError
from runtime.host.runner import HostRunner
from runtime.pipeline import Pipeline
from runtime.verify import VERDICT_NAME, VerificationError, ensure_verified, judge
from runtime.verify.verdict import find_verdict, gpu_problem, record
from tests.runtime.device_bundles import build_device_bundle
from tests.runtime.handmade import edit_manifest

Arrays = Mapping[str, NDArray[Any]]
CARD = Platform(device="NVIDIA GeForce RTX 5090 (12.0)", driver="580.1", libraries={"tensorrt_rtx": "1.7.1"})


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(VERDICT_NAME))
    return target


def vouch(folder: Path) -> None:
    """Give every file of a changed bundle the hash it has now."""

    def edit(raw: dict[str, Any]) -> None:
        raw["files"] = [file_entry(folder, entry["path"]).model_dump() for entry in raw["files"]]

    edit_manifest(folder, edit)


def for_card(folder: Path) -> Bundle:
    """The bundle, said to be for a GPU: its files are what they were."""

    def edit(raw: dict[str, Any]) -> None:
        raw["backend"], raw["target"] = "tensorrt-rtx", {"name": "rtx5090", "compute_capability": "12.0"}
        raw["library"] = {"name": "tensorrt-rtx", "version": "1.7.1"}

    edit_manifest(folder, edit)
    return load_bundle(folder)


class CardEngine:
    """Stands in for an engine on a GPU: components run in ONNX Runtime, and `disturb` says what the GPU gets wrong."""

    def __init__(
        self, folder: Path, disturb: Callable[[str, dict[str, Any]], None] = lambda name, out: None
    ) -> None:
        self.platform = CARD
        self.runs = 0
        self.closed = 0
        self._runner, self._disturb = HostRunner(load_bundle(folder)), disturb

    def component_runner(self) -> CardEngine:
        assert not self.closed
        return self

    def close(self) -> None:
        self.closed += 1

    def run(self, component: str, inputs: Arrays) -> dict[str, NDArray[Any]]:
        self.runs += 1
        outputs = self._runner.run(component, inputs)
        self._disturb(component, outputs)
        return outputs


def test_a_bundle_passes_where_it_was_built(golden_bundle: Path) -> None:
    bundle = load_bundle(golden_bundle)
    verdict = judge(bundle, HostRunner(bundle, threads=1))
    assert verdict.passed
    assert set(verdict.components) == {
        "step",
        "clean",
        "conditioner",
        "text_encoder",
        "vae_first",
        "vae_next",
    }
    assert verdict.components["step"].cases == 2
    assert max(component.error or 0 for component in verdict.components.values()) < 1e-6


def first_weight_doubled(path: Path) -> None:
    model = onnx.load(path)
    weight = next(w for w in model.graph.initializer if w.data_type == onnx.TensorProto.FLOAT)
    weight.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(weight), weight.name))
    onnx.save(model, path)


def test_the_command_names_the_component_that_is_wrong(
    golden_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(golden_bundle, tmp_path / "changed")
    assert main(["verify", str(folder), "--threads", "1", "--json", str(tmp_path / "good.json")]) == 0
    good = json.loads((tmp_path / "good.json").read_text())
    assert good["passed"]
    assert good == json.loads((folder / VERDICT_NAME).read_text())
    assert {"created", "manifest", "platform", "components"} <= set(good)
    assert "pass" in capsys.readouterr().out

    first_weight_doubled(folder / "conditioner.onnx")
    vouch(folder)
    assert main(["verify", str(folder), "--threads", "1"]) == 1
    captured = capsys.readouterr()
    assert "component 'conditioner': relative error 1" in captured.err
    assert "FAIL" in captured.out
    assert captured.out.count("pass") == 5
    assert not json.loads((folder / VERDICT_NAME).read_text())["passed"]


def test_a_component_that_does_not_run_fails_and_the_others_are_judged(
    golden_bundle: Path, tmp_path: Path
) -> None:
    folder = copied(golden_bundle, tmp_path / "broken")
    (folder / "vae_first.onnx").write_bytes(b"no graph")
    vouch(folder)
    bundle = load_bundle(folder)
    verdict = judge(bundle, HostRunner(bundle, threads=1))
    assert [name for name, component in verdict.components.items() if not component.passed] == ["vae_first"]
    assert verdict.components["vae_first"].error is None
    assert "does not load in ONNX Runtime" in verdict.failures()


def test_json_on_standard_output_is_nothing_else(
    golden_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(golden_bundle), "--threads", "1", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"]


def test_a_bundle_without_golden_vectors_cannot_be_verified(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(bundle)]) == 2
    assert "has no golden vectors" in capsys.readouterr().err


@pytest.mark.skipif(gpu_problem() is None, reason="there is a GPU here")
def test_a_bundle_for_a_gpu_is_dry_run_on_a_machine_without(
    golden_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(golden_bundle, tmp_path / "card")
    for_card(folder)
    assert main(["verify", str(folder)]) == 2
    message = capsys.readouterr().err
    assert "was built for rtx5090" in message
    assert "--dry-run" in message


@pytest.mark.parametrize("wrong", ["", "step", "runner"])
def test_the_command_closes_the_engine(
    golden_bundle: Path, tmp_path: Path, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing is what keeps the kernels that were compiled for this GPU."""

    def disturb(name: str, outputs: dict[str, Any]) -> None:
        if name == wrong:
            raise EngineError("CUDA error 700: an illegal memory access")

    folder = copied(golden_bundle, tmp_path / "card")
    for_card(folder)
    engine = CardEngine(golden_bundle, disturb)
    if wrong == "runner":
        engine.component_runner = lambda: 1 // 0  # type: ignore[method-assign, assignment, return-value]
    monkeypatch.setattr("runtime.cli.verify.gpu_problem", lambda: None)
    monkeypatch.setattr("runtime.cli.verify.load_engine", lambda *_, **__: engine)
    assert main(["verify", str(folder)]) == (1 if wrong else 0)
    assert engine.closed == 1


# ---- at load ----


def test_a_bundle_for_a_gpu_is_verified_once(golden_bundle: Path, tmp_path: Path) -> None:
    folder = copied(golden_bundle, tmp_path / "card")
    engine = CardEngine(folder)
    bundle = for_card(folder)
    ensure_verified(bundle, engine)
    assert engine.runs > 0
    assert json.loads((folder / VERDICT_NAME).read_text())["platform"]["device"] == CARD.device
    again = CardEngine(golden_bundle)
    ensure_verified(bundle, again)
    assert again.runs == 0


def test_verification_shows_how_far_it_is(golden_bundle: Path, tmp_path: Path) -> None:
    bundle = for_card(copied(golden_bundle, tmp_path / "card"))
    shown: list[tuple[str, int, int]] = []
    ensure_verified(bundle, CardEngine(golden_bundle), lambda *at: shown.append(at))
    total = len(shown)
    assert [(done, cases) for _, done, cases in shown] == [(done, total) for done in range(total)]
    assert {name.split("@")[0] for name, _, _ in shown} == set(bundle.manifest.golden.tolerances)
    ensure_verified(bundle, CardEngine(golden_bundle), lambda *at: pytest.fail("it has been verified"))


def test_loading_shows_verification(golden_bundle: Path, tmp_path: Path) -> None:
    """The pipeline hands on what it is given to be told."""
    folder = copied(golden_bundle, tmp_path / "card")
    for_card(folder)
    shown: list[str] = []
    engine = CardEngine(golden_bundle)
    with Pipeline.load(
        folder,
        warmup=False,
        text_encoder="external",
        golden_progress=lambda case, done, total: shown.append(case),
        engine=engine,
    ) as pipeline:
        assert len(shown) > 1
        assert pipeline.engine is engine
    assert engine.closed == 1


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of open files")
def test_verification_leaves_no_file_open(golden_bundle: Path, tmp_path: Path) -> None:
    def opened() -> list[str]:
        links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        maps = Path("/proc/self/maps").read_text().split()
        return [name for name in (*links, *maps) if name.startswith(str(folder))]

    folder = copied(golden_bundle, tmp_path / "card")
    bundle = for_card(folder)
    vectors = GoldenVectors(bundle)
    assert opened()  # the test sees them
    vectors.close()
    assert not opened()
    ensure_verified(bundle, CardEngine(golden_bundle))
    assert not opened()


@pytest.mark.parametrize(
    "platform",
    [
        Platform("NVIDIA GeForce RTX 5080 (12.0)", CARD.driver, CARD.libraries),
        Platform(CARD.device, "581.0", CARD.libraries),
        Platform(CARD.device, CARD.driver, {"tensorrt_rtx": "1.7.2"}),
    ],
    ids=["device", "driver", "library"],
)
def test_a_verdict_of_another_platform_does_not_count(
    golden_bundle: Path, tmp_path: Path, platform: Platform
) -> None:
    folder = copied(golden_bundle, tmp_path / "card")
    bundle = for_card(folder)
    ensure_verified(bundle, CardEngine(golden_bundle))
    assert find_verdict(bundle, CARD) is not None
    assert find_verdict(bundle, platform) is None
    engine = CardEngine(golden_bundle)
    engine.platform = platform
    ensure_verified(bundle, engine)
    assert engine.runs > 0


def test_a_verdict_on_another_manifest_does_not_count(golden_bundle: Path, tmp_path: Path) -> None:
    folder = copied(golden_bundle, tmp_path / "card")
    bundle = for_card(folder)
    ensure_verified(bundle, CardEngine(golden_bundle))
    edit_manifest(folder, lambda raw: raw.update(variant="another"))
    assert find_verdict(load_bundle(folder), CARD) is None


def test_wrong_kernels_are_refused_at_every_load(golden_bundle: Path, tmp_path: Path) -> None:
    def swap_heads(name: str, outputs: dict[str, Any]) -> None:
        if name == "step":
            outputs["k.1"] = outputs["k.1"][::-1]

    folder = copied(golden_bundle, tmp_path / "card")
    bundle = for_card(folder)
    for _ in range(2):
        engine = CardEngine(golden_bundle, swap_heads)
        with pytest.raises(
            VerificationError, match=r"on NVIDIA .*component 'step': relative error .*step@\w+/k\.1"
        ):
            ensure_verified(bundle, engine)
        assert engine.runs > 0
    ensure_verified(bundle, CardEngine(golden_bundle))  # mended by a driver, say


def test_an_engine_that_forgets_an_output_or_fails_is_refused(golden_bundle: Path, tmp_path: Path) -> None:
    def forget(name: str, outputs: dict[str, Any]) -> None:
        outputs.pop("cross_v.1", None)

    def fail(name: str, outputs: dict[str, Any]) -> None:
        if name == "clean":
            raise EngineError("CUDA error 700: an illegal memory access")

    bundle = for_card(copied(golden_bundle, tmp_path / "card"))
    with pytest.raises(VerificationError, match="component 'conditioner': its output is not finite"):
        ensure_verified(bundle, CardEngine(golden_bundle, forget))
    with pytest.raises(VerificationError, match="component 'clean': CUDA error 700"):
        ensure_verified(bundle, CardEngine(golden_bundle, fail))


def test_a_bundle_that_cannot_be_verified_is_refused(bundle: Path, tmp_path: Path) -> None:
    card = for_card(copied(bundle, tmp_path / "card"))
    with pytest.raises(VerificationError, match="has no golden vectors"):
        ensure_verified(card, CardEngine(bundle))
    ensure_verified(load_bundle(bundle), CardEngine(bundle))  # for the host: nothing to verify


def test_a_bundle_that_cannot_be_written_has_its_verdict_in_the_cache(
    golden_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = load_bundle(copied(golden_bundle, tmp_path / "bundle"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    verdict = judge(bundle, HostRunner(bundle, threads=1))
    (bundle.root / VERDICT_NAME).mkdir()  # a folder in its place cannot be replaced, not even by root
    path = record(bundle, verdict)
    assert path.is_relative_to(tmp_path / "cache")
    assert find_verdict(bundle, HostRunner(bundle).platform) == verdict
    assert [entry for entry in os.listdir(bundle.root) if "verdict" in entry] == [VERDICT_NAME]


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"passed": true}', b"\xff\xfe"])
def test_a_damaged_verdict_is_none(golden_bundle: Path, tmp_path: Path, content: bytes) -> None:
    bundle = load_bundle(copied(golden_bundle, tmp_path / "bundle"))
    (bundle.root / VERDICT_NAME).write_bytes(content)
    assert find_verdict(bundle, HostRunner(bundle).platform) is None


def test_inputs_of_one_run_are_not_those_of_another(golden_bundle: Path) -> None:
    """A component that keeps what it saw before cannot pass: its runs differ in every drawn input."""
    from runtime.bundle.golden import GoldenVectors

    vectors = GoldenVectors(load_bundle(golden_bundle))
    empty, full = (case for case in vectors.cases if case.component == "step")
    first, second = vectors.inputs(empty), vectors.inputs(full)
    assert (first["frame_slots"] == -1).all()
    assert sorted(second["frame_slots"]) == list(range(second["frame_slots"].size))
    for name in first:
        assert not np.array_equal(first[name], second[name]), name


def test_a_dry_run_executes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, report = build_device_bundle(tmp_path / "card"), tmp_path / "dry.json"
    assert main(["verify", str(folder), "--dry-run", "--json", str(report)]) == 0
    assert "checked, not executed" in capsys.readouterr().out
    assert json.loads(report.read_text())["checked_launches"] > 0
    assert not (folder / VERDICT_NAME).exists()


def test_a_dry_run_names_what_does_not_fit(golden_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The hand-made bundle is for the host: its noise lies where no engine on a GPU would take it."""
    assert main(["verify", str(golden_bundle), "--dry-run"]) == 2
    assert "component 'step', 'noise'" in capsys.readouterr().err


def test_a_folder_for_the_json_that_does_not_exist_is_refused(
    golden_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(golden_bundle), "--json", "/nowhere/at/all.json"]) == 2
    assert "of --json does not exist" in capsys.readouterr().err
