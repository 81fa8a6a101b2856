"""Sparse policies, rollouts and schedules as bundles of TensorRT-RTX engines for an RTX 5090.

Each is asked for on the command line, built for real on a machine without the GPU, and read back. What its forwards
launch is worked out by hand.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from export.backends.tensorrt_rtx.engine_text import read_engine
from export.cli.main import main
from runtime.bundle import Manifest, load_bundle
from runtime.verify.dry_run import dry_run

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra tensorrt-rtx)")
pytest.importorskip("triton", reason="Triton is not installed (extra kernels)")

LAYERS = 6
HSA = ("score", "select", "attend")
SPARGE_CDF = '[attention]\npolicy = "sparge"\nmode = "cdf"\ncumulative = 0.9\nsimilarity = 0.2\n'
"""Similarity is judged, and how many blocks are kept differs from row to row."""
SLA_LINEAR = '[attention]\npolicy = "sla"\nlinear = true\n'
NO_CLEAN = "[schedule]\nsteps = [1000, 400]\nfirst_steps = [1000, 700, 400]\nclean_forward = false\n"
VARIANT = """
schema_version = 1
name = "mine"
title = "A variant of one's own"
{section}
[sparsity]
target = 0.88
base = 0.98
table_frames = 21
keep_frames = 6
sink_frames = 1
near_frames = 2
[cache]
sink_frames = 1
"""


@dataclass(frozen=True)
class Case:
    """A bundle that is asked for, and what comes of it.

    Attributes:
        options: of `build`.
        section: of a variant file of one's own, in place of options.
        selects: the kernels that a layer's attention launches after `prepare`, with repetitions.
        steps: denoising forwards that the schedule tells apart, the first chunk's own among them.
        forwards: engine runs of further forwards, and kernels that they launch.
        tables: whether attention selects by tables.
        others: kernels that are launched besides.
        decoder: the layout of the video decoder.
    """

    name: str
    options: str = ""
    section: str = ""
    selects: tuple[str, ...] = HSA
    policy: str = "hsa"
    steps: int = 4
    forwards: dict[str, tuple[int, int]] = field(default_factory=dict)
    tables: bool = False
    others: tuple[str, ...] = ()
    decoder: str = "wan"


def together(chunks: int, *, clean: bool) -> tuple[int, int]:
    """A forward of several chunks under full attention, layer by layer, which commits all but the latest.

    Clean, it ends in the last layer's `prepare`.
    """
    runs = LAYERS if clean else LAYERS + 1
    kernels = LAYERS * 4 - (3 if clean else 0)
    return runs * chunks, kernels * chunks + LAYERS * (chunks - 1)


WINDOWS = {f"window.{chunks}": together(chunks, clean=False) for chunks in range(1, 6)}
JOINT = {f"joint.{chunks}": together(chunks, clean=True) for chunks in range(1, 5)}
CASES = (
    Case("dense", "--policy dense", policy="dense"),
    Case("sla", "--policy sla", policy="sla"),
    Case(
        "sla-linear",
        "--init random",  # the shipped weights have no projections
        section=SLA_LINEAR,
        policy="sla",
        selects=(*HSA, "sum_linear", "project_linear", "add_linear"),
    ),
    Case("sparge", "--policy sparge", policy="sparge"),
    Case(
        "sparge-cdf",
        section=SPARGE_CDF,
        policy="sparge",
        selects=("mean_key", "resemble", "score", "select_sparge", "attend"),
    ),
    Case("sta", "--policy sta", policy="sta", selects=("expand", "attend_ordered"), tables=True),
    Case("radial", "--policy radial", policy="radial", selects=("expand", "attend"), tables=True),
    Case(
        "vmoba",
        "--policy vmoba",
        policy="vmoba",
        selects=("pool", "score_groups", "choose", "expand", "attend_ordered"),
        tables=True,
    ),
    Case(
        "sta-long",
        "--variant long --policy sta",
        policy="sta",
        selects=("expand", "attend_ordered"),
        tables=True,
        others=("rope_sink",),
    ),
    Case(
        "pbsa",
        "--policy pbsa",
        policy="pbsa",
        selects=("score", "select_pinned", "attend"),
        forwards={"persist": (0, LAYERS * len(("score", "weigh", "persist")))},
        others=("weigh", "persist"),
    ),
    Case("causal-chunkwise", "--variant causal-chunkwise"),
    Case("causal-framewise", "--variant causal-framewise"),
    Case("causal-framewise-2step", "--variant causal-framewise-2step", steps=2 + 4),
    Case("causal-framewise-1step", "--variant causal-framewise-1step", steps=1 + 4),
    Case("no-clean-forward", section=NO_CLEAN, steps=2 + 3),
    Case("rolling", "--variant rolling", steps=5, forwards=WINDOWS, others=("rope_sink",)),
    Case("longlive", "--variant longlive", forwards=JOINT),
    Case("infinite", "--variant infinite", others=("rope_sink",)),
    Case("tiny-decoder", "--init random --decoder tiny-tae", decoder="tae"),
)


def built(case: Case, folder: Path) -> Path:
    options = case.options.split()
    if case.section:
        file = folder / "mine.toml"
        file.write_text(VARIANT.format(section=case.section))
        options += ["--variant", str(file)]
    command = ["build", "--gpu", "rtx5090", "--preset", "tiny", "--backend", "tensorrt-rtx", *options]
    assert main([*command, "--name", case.name, "--out", str(folder)]) == 0
    return folder / case.name


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_member_of_the_family_is_built_for_a_gpu(case: Case, tmp_path: Path) -> None:
    bundle = load_bundle(built(case, tmp_path))
    manifest = bundle.manifest
    assert (manifest.backend, manifest.status) == ("tensorrt-rtx", "built, not executed")
    assert manifest.attention.method.policy == case.policy
    assert getattr(manifest.attention.method, "gating", "pooled") == "pooled"  # the one that kernels have
    assert manifest.vae.kind == case.decoder
    check_engines(bundle.root, manifest)
    check_images(bundle.root, manifest, case)
    report = dry_run(bundle, sessions=2)
    assert report.unbound == ()
    assert len(report.images) == len(set(case.selects)) + 2 + len(case.others)
    found = {cost.name: (cost.engine_runs, cost.kernel_launches) for cost in report.forwards}
    denoise = (LAYERS + 1, LAYERS * (1 + len(case.selects)))
    one_by_one = () if manifest.schedule.rolling else rows(manifest, case)
    expected = {f"denoise.{row}": denoise for row in one_by_one} | case.forwards
    expected["clean"] = (
        LAYERS,
        LAYERS + (LAYERS - 1) * len(case.selects),
    )  # prompt switches recompute by it, too
    kinds = ("denoise.", "window.", "joint.", "clean", "persist")
    assert {name: costs for name, costs in found.items() if name.startswith(kinds)} == expected


def rows(manifest: Manifest, case: Case) -> list[int]:
    """The rows of the modulation table that denoising forwards have: behind the clean one come the first chunk's."""
    clean = len(manifest.schedule.timesteps) - 1
    return [row for row in range(case.steps + 1) if row != clean]


def check_engines(folder: Path, manifest: Manifest) -> None:
    for name, component in manifest.components.items():
        if component.file is None:
            continue
        plan = read_engine(folder / component.file)
        assert plan.architecture == "sm120" and plan.capturable
        assert set(plan.inputs) == {spec.name for spec in component.inputs}, name
        assert component.cost is not None and component.cost.gemms == plan.gemms
    layer = manifest.components["layer"]
    assert layer.cost is not None and layer.cost.gemms == {"fp8": 6}


def check_images(folder: Path, manifest: Manifest, case: Case) -> None:
    assert manifest.kernels is not None
    assert (manifest.kernels.tables is not None) == case.tables
    index = json.loads((folder / "kernels/sm_120/kernels.json").read_text())
    kernels = {image["kernel"] for image in index["images"]}
    assert kernels == {"prepare", "commit", *case.selects, *case.others}
    assert all((folder / "kernels/sm_120" / image["file"]).is_file() for image in index["images"])
