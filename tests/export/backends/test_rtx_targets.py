"""Every target of TensorRT-RTX in every precision that it has: built, read back, and run dry."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.build import build_bundle
from export.request.capability import BACKENDS
from export.request.targets import list_targets
from runtime.bundle import load_bundle
from runtime.verify.dry_run import dry_run
from tests.export.backends.rtx_bundles import request

pytest.importorskip("tensorrt_rtx")

# One card of each architecture: the builder asks for the capability alone.
ONE_EACH = {
    target.compute_capability: target
    for target in reversed(list_targets())
    if "tensorrt-rtx" in target.backends
}
CASES = [
    (target, precision)
    for target in ONE_EACH.values()
    for precision in target.precisions
    if precision in BACKENDS["tensorrt-rtx"].precisions
]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "precision"), CASES, ids=lambda value: getattr(value, "name", value))
def test_a_bundle_is_built_for_every_target(tmp_path: Path, target, precision) -> None:
    """Expectations are checked while it is built: what one architecture merges, another may not."""
    built = build_bundle(request(tmp_path, precision, target=target, name="bundle"))
    manifest = load_bundle(built).manifest
    assert (manifest.target.compute_capability, manifest.precision) == (
        target.compute_capability,
        precision,
    )
    assert dry_run(load_bundle(built)).checked_runs
