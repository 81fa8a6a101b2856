"""Every component at the size of the 1.3B model, three layers deep, built for an RTX 5090."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from export.build import build_bundle, check_build
from export.errors import InputError
from export.request.targets import load_target
from export.request.weights import Weights
from lightforcing_ref.config import PRESETS
from runtime.bundle import load_bundle
from tests.export.backends.rtx_bundles import ENGINES, request

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra tensorrt-rtx)")

WAN = PRESETS["wan-1.3b"]
SHALLOW = replace(WAN, dit=replace(WAN.dit, layers=3), text=replace(WAN.text, layers=1, vocab=1000))


def full_size(out: Path, precision: str, **changes: object):
    sizes = {"weights": Weights(SHALLOW, seed=0), "height": WAN.height, "width": WAN.width}
    return request(out, precision, **sizes | changes)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("precision", "height", "width", "products", "launches"),
    [
        ("bf16", 480, 832, {"bf16": 6}, 15),
        ("fp8", 512, 768, {"fp8": 6}, 16),
        ("nvfp4", 512, 768, {"fp4": 6}, 35),
    ],
)
def test_full_size_components_are_what_they_should_be(tmp_path, precision, height, width, products, launches):
    """The build itself holds each engine to its expectations; here, to the figures of one layer (docs/planning.md)."""
    folder = build_bundle(full_size(tmp_path, precision, height=height, width=width))
    found = load_bundle(folder).manifest
    assert all(found.components[name].cost is not None for name in ENGINES)
    layer = found.components["layer"].cost
    assert layer.gemms == products
    assert layer.launches == launches
    assert layer.activation_bytes < 200 << 20
    assert (folder / "layer.engine").stat().st_size < 4 << 20
    tokens = 3 * (height // 16) * (width // 16)
    assert next(spec.shape for spec in found.components["layer"].inputs if spec.name == "x") == (tokens, 1536)


def test_a_bundle_that_does_not_fit_into_its_target_is_refused(tmp_path):
    large = full_size(
        tmp_path, "bf16", weights=Weights(WAN, seed=0), height=1024, width=1024, target=load_target("rtx5080")
    )
    with pytest.raises(InputError, match=r"does not fit: 1 session needs .* GiB \(GeForce RTX 5080\)"):
        check_build(large)
    assert not list(tmp_path.iterdir())
