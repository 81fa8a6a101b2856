"""Builds for real: contents, resuming, interruptions, and everything that can stand in the way."""

from __future__ import annotations

import collections
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

import lightforcing_ref
import plugins
import runtime
from export.build import check_build, export_onnx
from export.errors import BuildError
from export.parts import keys as build_keys
from export.parts.keys import BuildKeys
from export.parts.workspace import open_workspace
from export.preflight import check_disk
from export.request.geometry import StepPlan
from export.request.request import BuildRequest
from export.request.targets import load_target, load_variant
from export.request.weights import Weights
from lightforcing_ref.config import PRESETS
from runtime.bundle import load_bundle
from runtime.errors import BundleError
from runtime.host_memory import Memory
from tests.conftest import build
from tests.export.backends.rtx_bundles import partial, request

LAYERS = PRESETS["tiny"].dit.layers


def graph(bundle: Path, name: str) -> onnx.ModelProto:
    return onnx.load(bundle / f"{name}.onnx", load_external_data=False)


def test_the_step_graph_keeps_one_node_per_operator_and_layer(tiny_bundle):
    model = graph(tiny_bundle, "step")
    counts = collections.Counter(node.op_type for node in model.graph.node)
    assert counts["QKPrepare"] == counts["HierarchicalSparseAttention"] == LAYERS
    assert {function.name for function in model.functions} == {"QKPrepare", "HierarchicalSparseAttention"}
    onnx.checker.check_model(tiny_bundle / "step.onnx", full_check=False)


def test_timesteps_are_folded_and_the_scheduler_is_inside(tiny_bundle):
    model = graph(tiny_bundle, "step")
    names = {initializer.name for initializer in model.graph.initializer}
    assert not any("time_embedding" in name or "time_projection" in name for name in names)
    assert {"next_latent", "x0"} <= {output.name for output in model.graph.output}
    tables = {i.name: tuple(i.dims) for i in model.graph.initializer if i.name.startswith("modulation_")}
    assert tables == {f"modulation_{layer}": (5, 6, PRESETS["tiny"].dit.dim) for layer in range(LAYERS)}


def test_the_clean_graph_ends_with_the_last_keys_and_values(tiny_bundle):
    model = graph(tiny_bundle, "clean")
    counts = collections.Counter(node.op_type for node in model.graph.node)
    assert (counts["QKPrepare"], counts["HierarchicalSparseAttention"]) == (LAYERS, LAYERS - 1)
    inputs = {value.name for value in model.graph.input}
    assert not inputs & {"noise", "step", f"past_k.{LAYERS - 1}", f"cross_k.{LAYERS - 1}"}


def test_all_step_graphs_share_one_weights_file(tiny_bundle):
    for name in ("step", "clean", *(f"step_chunk{chunk}" for chunk in range(7))):
        model = graph(tiny_bundle, name)
        locations = {e.value for i in model.graph.initializer for e in i.external_data if e.key == "location"}
        assert locations == {"step.weights"}
        assert (tiny_bundle / f"{name}.onnx").stat().st_size < 200_000


def test_specialised_graphs_have_exact_caches_and_their_own_budget(tiny_bundle):
    table = load_bundle(tiny_bundle).manifest.sparsity.keep_q20
    for chunk in range(7):
        model = graph(tiny_bundle, f"step_chunk{chunk}")
        shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
        assert "chunk" not in shapes
        if chunk == 0:
            assert not any(name.startswith(("past_", "frame_slots")) for name in shapes)
        else:
            assert shapes["past_k.0"] == [3 * chunk, 64, 2, 64]
            assert shapes["frame_slots"] == [3 * chunk]
        for node in model.graph.node:
            if node.op_type == "HierarchicalSparseAttention":
                budget = next(a.ints for a in node.attribute if a.name == "keep_q20")
                assert list(budget) == [table[chunk]]


def test_the_manifest_tells_where_everything_comes_from(tiny_bundle):
    manifest = load_bundle(tiny_bundle).manifest
    assert manifest.provenance.checkpoint.random == 0
    assert manifest.provenance.tools["onnx"] == onnx.__version__
    assert manifest.sparsity.values[1:3] == pytest.approx((0.827, 0.855), abs=5e-4)
    assert manifest.cache.max_past_frames == 18
    assert manifest.model.rope.dims_thw == (24, 20, 20)


def test_the_manifest_has_the_models_own_eps():
    preset = PRESETS["tiny"]
    odd = replace(preset, dit=replace(preset.dit, eps=3e-5))
    plan = StepPlan.of(odd, load_variant("short"), preset.height, preset.width, block_q=32, block_k=32)
    assert plan.manifest_sections()["attention"].eps == 3e-5


def test_the_same_request_gives_the_same_bytes(tiny_bundle, tmp_path):
    again = build(tmp_path, "short", per_chunk=True, with_encoder=True)
    ours = {entry.path: entry.sha256 for entry in load_bundle(tiny_bundle).manifest.files}
    theirs = {entry.path: entry.sha256 for entry in load_bundle(again).manifest.files}
    assert ours == theirs


def command(out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "export", "build", "--gpu", "cpu", "--out", str(out), "--name", "b", *more]


def components(folder: Path) -> set[str]:
    state = folder / ".b.partial" / ".finished.json"
    try:
        import json

        return set(json.loads(state.read_text())["components"])
    except (FileNotFoundError, ValueError):
        return set()


def test_an_interrupted_build_leaves_nothing_that_loads_and_resumes(tmp_path):
    process = subprocess.Popen(
        command(tmp_path), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    deadline = time.monotonic() + 120
    while "text encoder" not in components(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "resumes" in stderr
    assert not (tmp_path / "b").exists()
    with pytest.raises(BundleError):
        load_bundle(tmp_path / ".b.partial")

    partial = tmp_path / ".b.partial"
    finished = {
        path.name: path.stat().st_mtime_ns for path in partial.iterdir() if "text_encoder" in path.name
    }
    assert finished
    subprocess.run(command(tmp_path), check=True, stdout=subprocess.DEVNULL)
    bundle = tmp_path / "b"
    load_bundle(bundle)
    assert {name: (bundle / name).stat().st_mtime_ns for name in finished} == finished
    assert not partial.exists()


def test_a_full_disk_is_named_and_the_build_resumes(tmp_path):
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        command(tmp_path), preexec_fn=limit, capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 2
    assert "while writing 'video decoder'" in result.stderr
    assert "run the same command again: it resumes" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "b").exists()
    assert components(tmp_path) == {"tokenizer", "text encoder"}


def touch(name: str):
    def write(folder: Path) -> list[str]:
        (folder / name).write_text(name)
        return [name]

    return write


def test_components_are_taken_over_only_if_intact_and_of_the_same_request(tmp_path):
    with open_workspace(tmp_path, "b", "key") as workspace:
        assert workspace.component("one", touch("1.txt"))[1] is False
    with open_workspace(tmp_path, "b", "key") as workspace:
        assert workspace.component("one", touch("1.txt"))[1] is True
        (workspace.folder / "1.txt").write_text("x")
        assert workspace.component("one", touch("1.txt"))[1] is False
    with open_workspace(tmp_path, "b", "other key") as workspace:
        assert workspace.component("one", touch("1.txt"))[1] is False


def test_a_component_with_a_key_of_its_own_outlives_a_change_of_the_rest(tmp_path):
    with open_workspace(tmp_path, "b", "fp8") as workspace:
        workspace.component("graph", touch("graph"), key="model")
        workspace.component("engine", touch("engine"))
    with open_workspace(tmp_path, "b", "bf16") as workspace:
        assert workspace.component("graph", touch("graph"), key="model")[1] is True
        assert workspace.component("engine", touch("engine"))[1] is False


@pytest.mark.parametrize("package", [lightforcing_ref, plugins, runtime])
def test_parts_of_another_version_are_not_taken_over(tmp_path, monkeypatch, package):
    digest = build_keys._source_digest.__wrapped__  # computed once per process
    copy = tmp_path / package.__name__
    shutil.copytree(package.__path__[0], copy, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    monkeypatch.setattr(package, "__path__", [str(copy)])
    if package is runtime:  # found by a module of it, since the export side imports no more
        monkeypatch.setattr(build_keys.bundle, "__file__", str(copy / "bundle" / "__init__.py"))  # type: ignore[attr-defined]
    before = digest()
    assert digest() == before
    changed = copy / "bundle" if package is runtime else copy
    (changed / "__init__.py").write_text("# another version\n")
    assert digest() != before


def test_parts_of_another_patch_level_of_python_are_taken_over(monkeypatch):
    def versions(*python: str) -> dict[str, str]:
        monkeypatch.setattr(build_keys.platform, "python_version_tuple", lambda: python)  # type: ignore[attr-defined]
        return build_keys._deciding_versions()

    assert versions("3", "12", "1") == versions("3", "12", "3")
    assert versions("3", "12", "1") != versions("3", "13", "1")


@pytest.mark.parametrize("name", ["attend_sm90.cu", "hopper.cuh"])
def test_kernels_in_cuda_are_sources_too(tmp_path, monkeypatch, name):
    digest = build_keys._source_digest.__wrapped__
    copy = tmp_path / "plugins"
    shutil.copytree(plugins.__path__[0], copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(plugins, "__path__", [str(copy)])
    before = digest()
    with (copy / "kernels" / name).open("a") as file:
        file.write("// another version")
    assert digest() != before


def install(folder, name: str, version: str) -> None:
    """What `importlib.metadata` takes for an installed package, where `folder` is on the path."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_what_compiles_engines_tells_their_builds_apart(tmp_path, monkeypatch):
    def keys(backend: str, *installed: tuple[str, str], driver: str | None = None) -> BuildKeys:
        folder = tmp_path / f"site-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for name, version in installed:
            install(folder, name, version)
        proc = folder / "version"
        if driver is not None:
            proc.write_text(
                f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {driver}  Release Build\n"
            )
        with monkeypatch.context() as patch:
            patch.syspath_prepend(folder)
            patch.setattr("export.machine._DRIVER", proc)
            tiny = PRESETS["tiny"]
            asked = BuildRequest(
                target=load_target("rtx5090"), variant=load_variant("short"), weights=Weights(tiny, seed=0),
                height=tiny.height, width=tiny.width, backend=backend, precision="bf16", out=tmp_path, name="b",
            )  # fmt: skip
            return BuildKeys.of(asked, asked.plan, {})

    first = keys("tensorrt", ("tensorrt", "11.4.0"), driver="580.65.06")
    assert keys("tensorrt", ("tensorrt", "11.4.0"), driver="580.65.06") == first
    for other in (
        keys("tensorrt", ("tensorrt", "11.4.1"), driver="580.65.06"),
        keys("tensorrt", ("tensorrt-cu13", "11.4.2"), driver="580.65.06"),
        keys("tensorrt", ("tensorrt", "11.4.0"), driver="581.10"),
    ):
        assert (other.model, other.graphs) == (first.model, first.graphs)
        assert other.engines != first.engines and other.build != first.build
    rtx = keys("tensorrt-rtx", ("tensorrt-rtx-cu13", "1.7.0"))
    assert keys("tensorrt-rtx", ("tensorrt-rtx-cu13", "1.7.9")).engines != rtx.engines
    # Packages for a GPU are compiled on one machine and finished on another.
    compiled = keys("inductor", ("tensorrt", "11.4.0"), driver="580.65.06")
    assert keys("inductor", driver=None) == compiled


def test_publishing_replaces_the_old_result_and_drops_leftovers(tmp_path):
    for content in ("old", "new"):
        with open_workspace(tmp_path, "b", content, marker="m.txt") as workspace:
            (workspace.folder / "leftover").write_text("x")
            files, _ = workspace.component("m", touch("m.txt"))
            (workspace.folder / "m.txt").write_text(content)
            workspace.publish(files)
        assert {path.name for path in (tmp_path / "b").iterdir()} == {"m.txt"}
        assert (tmp_path / "b" / "m.txt").read_text() == content
    assert {path.name for path in tmp_path.iterdir()} == {"b", ".b.lock"}


def test_two_builds_of_one_bundle_at_once_are_refused(tmp_path):
    with (
        open_workspace(tmp_path, "b", "key"),
        pytest.raises(BuildError, match="another process is building"),
        open_workspace(tmp_path, "b", "key"),
    ):
        pass


def test_a_folder_that_is_no_bundle_is_not_replaced(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("do not lose")
    with (
        pytest.raises(BuildError, match="is no result of an earlier build"),
        open_workspace(tmp_path, "b", "key"),
    ):
        pass
    assert (tmp_path / "b" / "thesis.txt").read_text() == "do not lose"


def test_a_build_that_cannot_fit_is_refused_at_once(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(BuildError, match=r"the build needs [\d.]+ MiB and .* has 1\.0 MiB free"):
        build(tmp_path, "short")


@pytest.mark.parametrize("backend", ["onnxruntime", "inductor"])
def test_a_build_that_memory_cannot_hold_is_refused_at_once(tmp_path, monkeypatch, backend):
    """1.42e9 parameters, drawn in float32 with half as much again around them, and 2 GiB."""
    preset = PRESETS["wan-1.3b"]
    large = request(
        tmp_path,
        "fp32",
        target=load_target("cpu"),
        backend=backend,
        execution="whole",
        weights=Weights(preset, seed=0),
        height=preset.height,
        width=preset.width,
    )
    gib = 1 << 30
    enough = Memory(total=64 * gib, available=64 * gib)
    monkeypatch.setattr(
        "export.estimate.memory.memory", lambda: enough
    )  # that of the target, which is this machine
    monkeypatch.setattr("export.preflight.memory", lambda: Memory(total=24 * gib, available=9 * gib))
    message = r"the build takes about 9\.93 GiB of memory and 9\.00 GiB are free; close"
    with pytest.raises(BuildError, match=message):
        check_build(large)
    with pytest.raises(BuildError, match=message):
        export_onnx(large)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("export.preflight.memory", lambda: enough)
    check_build(large)


def test_files_that_are_hard_links_become_the_builds_own(tmp_path):
    """As `cp -l` or a backup leaves them: they resume, and the other copy is not written into."""
    with open_workspace(tmp_path, "b", "key") as workspace:
        workspace.component("kept", touch("kept"))
        workspace.component("changed", touch("changed"))
        backup = tmp_path / "backup"
        shutil.copytree(workspace.folder, backup, copy_function=os.link)
    with open_workspace(tmp_path, "b", "key") as workspace:
        assert workspace.component("kept", touch("kept"))[1] is True
        (workspace.folder / "changed").write_text("something else")
        assert (backup / "changed").read_text() == "changed"
        names = {path.name for path in workspace.folder.iterdir()}
        assert names == {"kept", "changed", ".finished.json"}
        assert all(path.stat().st_nlink == 1 for path in workspace.folder.iterdir())


def test_what_an_interrupted_build_left_counts_as_room(tmp_path, monkeypatch):
    wanted = request(tmp_path, "bf16")
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(BuildError, match="make room"):
        check_disk(wanted, wanted.plan)
    left = partial(wanted) / "text_encoder.safetensors"
    left.parent.mkdir()
    left.touch()
    os.truncate(left, 1 << 30)
    check_disk(wanted, wanted.plan)
