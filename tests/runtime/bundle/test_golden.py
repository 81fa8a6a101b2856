"""Golden vectors: what is drawn from a seed, what is kept of an output, and how an output is judged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from runtime.bundle import Bundle, TensorSpec, file_entry, golden, load_bundle
from runtime.bundle.golden import Expected, GoldenVectors, Integers, Mask, Normal, Rotary, Stored
from runtime.bundle.weights_file import WeightsFile
from runtime.errors import BundleError

SEEDS = st.integers(0, 2**63 - 1)


def expected_of(output: np.ndarray, seed: int = 3, centre: float = 0.0) -> tuple[Expected, np.ndarray]:
    blank = Expected(size=output.size, seed=seed, norm=0.0, centre=centre)
    samples, norm = golden.sample(output, blank)
    return blank.model_copy(update={"norm": norm}), samples


def test_numbers_are_sums_of_four_parts_of_random_words() -> None:
    words = [int(word) for word in np.random.Philox(key=np.array([7, 0], np.uint64)).random_raw(5)]
    for word, found in zip(words, golden.standard_normal(7, 5), strict=True):
        lanes = [(word >> shift) & 0xFFFF for shift in (0, 16, 32, 48)]
        assert found == pytest.approx(
            (sum(lanes) - 4 * 65535 / 2) / np.sqrt(4 * (65536**2 - 1) / 12), rel=1e-6
        )


def test_numbers_never_change() -> None:
    """Bundles in the field were built with these."""
    assert golden.standard_normal(5, 4) == pytest.approx(
        [-0.40742943, -0.1398094, 1.2386739, -2.115694], rel=1e-6
    )
    assert golden.positions(3, 10**9)[:3].tolist() == [19521, 63025, 87046]
    assert golden.seed_of("layer@0", "x") == 7696466962058238663


def test_numbers_are_normal_and_do_not_depend_on_how_many_are_drawn() -> None:
    many = golden.standard_normal(11, (1 << 20) + 1000)
    assert np.array_equal(many[:1000], golden.standard_normal(11, 1000))
    assert abs(many.mean()) < 0.005
    assert abs(many.std() - 1) < 0.005
    assert abs((many**4).mean() - 3) < 0.35  # a sum of four uniform numbers has 2.7
    other = golden.standard_normal(12, many.size)
    assert abs(np.corrcoef(many, other)[0, 1]) < 0.005


@given(SEEDS, st.integers(0, 1 << 40))
def test_positions_are_within_the_output_and_ascend(seed: int, size: int) -> None:
    found = golden.positions(seed, size)
    assert found.size == min(size, golden.SAMPLES)
    assert np.all(np.diff(found) >= 0)
    assert size == 0 or 0 <= found[0] <= found[-1] < size
    assert size > golden.SAMPLES or np.array_equal(found, np.arange(size))


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.floats(1e-4, 0.5))
def test_error_is_relative_and_counts_what_lies_between_the_samples(seed: int, gap: float) -> None:
    output = golden.standard_normal(seed, 3 * golden.SAMPLES)
    expected, samples = expected_of(output)
    assert golden.error_of(output, expected, samples) == 0.0
    assert golden.error_of(output * np.float32(1 + gap), expected, samples) == pytest.approx(gap, rel=0.02)
    unseen = np.setdiff1d(np.arange(output.size), golden.positions(expected.seed, output.size))
    blind = output.copy()
    blind[unseen[0]] = np.nan
    assert golden.error_of(blind, expected, samples) == float("inf")
    blind[unseen] = 2 * output[unseen]
    assert golden.error_of(blind, expected, samples) > 0.3


def test_an_output_of_another_size_or_not_finite_is_infinitely_wrong() -> None:
    output = golden.standard_normal(1, 100)
    expected, samples = expected_of(output)
    assert golden.error_of(output.reshape(10, 10), expected, samples) == 0.0
    for wrong in (output[:99], np.append(output, 0), np.where(output > 2, np.inf, output)):
        assert golden.error_of(wrong, expected, samples) == float("inf")


def test_pixels_are_compared_around_the_middle_of_their_range() -> None:
    pixels = (127.5 + 20 * golden.standard_normal(2, 4096)).clip(0, 255).astype(np.uint8)
    expected, samples = expected_of(pixels, centre=127.5)
    grey = np.full_like(pixels, 127)
    assert golden.error_of(grey, expected, samples) == pytest.approx(1.0, abs=0.05)


def test_inputs_come_in_the_types_and_shapes_of_the_component(tmp_path: Path) -> None:
    save_file({"w": np.arange(6, dtype=np.float32)}, tmp_path / "weights.safetensors")
    files = {"weights.safetensors": WeightsFile(tmp_path / "weights.safetensors")}

    def shaped(recipe: golden.Recipe, dtype: str, *shape: int | str) -> np.ndarray:
        spec = TensorSpec.model_validate({"name": "t", "dtype": dtype, "shape": shape})
        return golden.shaped(recipe, spec, 3, files)

    scaled = shaped(Normal(seed=1, scale=2.0), "bfloat16", "slots", 4)
    assert (scaled.shape, scaled.dtype.name) == ((3, 4), "bfloat16")
    plain = golden.standard_normal(1, 12).reshape(3, 4)
    assert np.allclose(scaled.astype(np.float32), 2 * plain, rtol=2**-8)
    cos, sin = (shaped(Rotary(kind=kind, seed=1), "float32", 5, 2) for kind in ("cos", "sin"))
    assert np.allclose(cos**2 + sin**2, 1)
    assert shaped(Integers(values=(4,)), "int32").tolist() == 4
    assert shaped(Mask(ones=2), "float32", 3).tolist() == [1, 1, 0]
    stored = Stored(file="weights.safetensors", tensor="w")
    assert shaped(stored, "float16", 1, 6).tolist() == [[0, 1, 2, 3, 4, 5]]
    with pytest.raises(BundleError, match="6 elements for an input of 5"):
        shaped(stored, "float32", 5)
    with pytest.raises(BundleError, match="no tensor 'v'"):
        shaped(Stored(file="weights.safetensors", tensor="v"), "float32", 5)


# ---- the file ----


def write_cases(folder: Path, text: str, samples: dict[str, np.ndarray]) -> None:
    save_file(samples, folder / "golden.safetensors", metadata={golden.METADATA_KEY: text})


def opened(golden_bundle: Path, folder: Path, case: dict[str, object]) -> GoldenVectors:
    bundle = load_bundle(golden_bundle)
    write_cases(folder, json.dumps({"cases": [case]}), {"x": np.zeros(1, np.float32)})
    files = tuple(
        file_entry(folder, entry.path) if entry.path == "golden.safetensors" else entry
        for entry in bundle.manifest.files
    )
    return GoldenVectors(Bundle(folder, bundle.manifest.model_copy(update={"files": files})))


CONDITIONER = {
    "name": "conditioner",
    "component": "conditioner",
    "slots": 1,
    "inputs": {"text": {"kind": "normal", "seed": 1}},
    "outputs": {
        name: {"size": 1, "seed": 1, "norm": 1.0}
        for name in ("cross_k.0", "cross_k.1", "cross_v.0", "cross_v.1")
    },
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": {}}, "has the inputs , the component text"),
        (
            {"outputs": {"cross_k.0": {"size": 1, "seed": 1, "norm": 1.0}}},
            "the component cross_k.0, cross_k.1",
        ),
        ({"component": "layer"}, "no component 'layer'"),
        ({"slots": 0}, "greater than 0"),
        ({"inputs": {"text": {"kind": "file", "path": "/etc/passwd"}}}, "tag 'file'"),
        ({"inputs": {"text": {"kind": "stored", "file": "../x", "tensor": "t"}}}, "refers to ../x"),
        ({"surprise": 1}, "not permitted"),
    ],
)
def test_golden_vectors_that_do_not_fit_are_refused(
    golden_bundle: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    assert opened(golden_bundle, tmp_path, CONDITIONER).cases[0].name == "conditioner"
    with pytest.raises(BundleError, match=message):
        opened(golden_bundle, tmp_path, CONDITIONER | change)


def test_a_bundle_without_golden_vectors_says_so(bundle: Path) -> None:
    with pytest.raises(BundleError, match="has no golden vectors"):
        GoldenVectors(load_bundle(bundle))
