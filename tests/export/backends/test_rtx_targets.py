"""Every target of TensorRT-RTX, in every precision that it has and in every variant: built, read back, and run dry.

Expectations are checked while a bundle is built: what the builder merges for one architecture, it may not for another.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from export.backends.tensorrt_rtx.engine_text import read_engine
from export.request.capability import BACKENDS
from export.request.targets import Target, list_targets, list_variants, load_target
from runtime.bundle import load_bundle
from runtime.verify.dry_run import dry_run
from tests.export.backends.rtx_bundles import ENGINES, Bundles, build_until, exported, request

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra tensorrt-rtx)")
pytest.importorskip("triton", reason="Triton is not installed (extra kernels)")

TARGETS = [target for target in list_targets() if "tensorrt-rtx" in target.backends]
OFTEN = [("rtx3090", "bf16"), ("rtx4090", "bf16"), ("rtx4090", "fp8"), ("rtx5080", "nvfp4")]
"""Built in every run; so is the RTX 5090, in all of its precisions, by test_rtx_bundle.py."""
ONE_EACH = {target.compute_capability: target for target in reversed(TARGETS)}
"""A card of each architecture: the builder asks for the capability alone."""


def precisions(target: Target) -> list[str]:
    return [name for name in target.precisions if name in BACKENDS["tensorrt-rtx"].precisions]


def check(folder: Path, target: Target, precision: str, variant: str = "short") -> None:
    manifest = load_bundle(folder).manifest
    assert (manifest.target.name, manifest.precision) == (target.name, precision)
    assert (manifest.target.compute_capability, manifest.variant) == (target.compute_capability, variant)
    sm = f"sm{str(target.compute_capability).replace('.', '')}"
    assert {read_engine(folder / f"{name}.engine").architecture for name in ENGINES} == {sm}
    assert dry_run(load_bundle(folder)).checked_runs


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    return Bundles(tmp_path_factory.mktemp("targets"), exported(tmp_path_factory))


@pytest.mark.parametrize(("name", "precision"), OFTEN)
def test_cards_that_many_have_get_their_bundle(bundles: Bundles, name: str, precision: str) -> None:
    target = load_target(name)
    folder = bundles.build(precision, target=target, name=f"{name}-{precision}")
    check(folder, target, precision)


ALL = [(target, precision) for target in TARGETS for precision in precisions(target)]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "precision"), ALL, ids=lambda value: getattr(value, "name", value))
def test_a_bundle_is_built_for_every_target(bundles: Bundles, target: Target, precision: str) -> None:
    name = f"{target.name}-{precision}"
    if (target.name, precision) not in OFTEN:
        check(bundles.build(precision, target=target, name=name), target, precision)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("variant", [variant.name for variant in list_variants() if variant.name != "short"])
def test_a_bundle_is_built_of_every_variant(tmp_path: Path, variant: str) -> None:
    """On every architecture, in every precision; the graphs are exported once."""
    graphs = build_until(request(tmp_path, "bf16", variant, name="exported"), "quantization")
    built = Bundles(tmp_path, graphs)
    for target in ONE_EACH.values():
        for precision in precisions(target):
            name = f"{target.name}-{precision}"
            check(built.build(precision, variant, target=target, name=name), target, precision, variant)
