from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.bundle import Model, Rope
from runtime.errors import InputError
from runtime.noise import check_seed, fill_noise
from runtime.program.rope import RopeTables


def model(rows: int, columns: int, dims: tuple[int, int, int]) -> Model:
    return Model(
        preset="test",
        layers=1,
        heads=1,
        head_dim=sum(dims),
        dim=sum(dims),
        latent_channels=16,
        latent_height=2 * rows,
        latent_width=2 * columns,
        patch=(1, 2, 2),
        chunk_frames=3,
        frame_tokens=rows * columns,
        rope=Rope(theta=10000.0, dims_thw=dims),
        video_height=16 * rows,
        video_width=16 * columns,
        fps=16,
    )


def angle(position: int, pair: int, dim: int) -> float:
    return position * 10000.0 ** (-2 * pair / dim)


@given(first=st.integers(0, 100_000), rows=st.integers(1, 5), columns=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_tables_against_the_formula(first: int, rows: int, columns: int) -> None:
    dims = (12, 8, 4)
    tokens = 3 * rows * columns
    cos, sin = (np.full((tokens, 12), np.nan, dtype=np.float32) for _ in range(2))
    RopeTables(model(rows, columns, dims)).fill(first, cos, sin)
    for token in range(tokens):
        frame, row, column = token // (rows * columns), token // columns % rows, token % columns
        positions = (first + frame, row, column)
        angles = [angle(p, j, d) for p, d in zip(positions, dims, strict=True) for j in range(d // 2)]
        np.testing.assert_allclose(cos[token], np.array([math.cos(a) for a in angles], np.float32), atol=2e-7)
        np.testing.assert_allclose(sin[token], np.array([math.sin(a) for a in angles], np.float32), atol=2e-7)


def test_tables_are_rounded_once_from_float64() -> None:
    """At frame 10**6 float32 angles would be off by 0.03."""
    cos, sin = np.empty((2, 3, 6), dtype=np.float32)
    RopeTables(model(1, 1, (8, 2, 2))).fill(1_000_000, cos, sin)
    assert cos[1, 1] == np.float32(math.cos(1_000_001 * 10000.0 ** (-2 / 8)))
    assert sin[2, 0] == np.float32(math.sin(1_000_002))


def roped(raw: np.ndarray, position: int, time_dim: int) -> np.ndarray:
    out = raw.astype(np.float64)
    for j in range(time_dim // 2):
        a = angle(position, j, time_dim)
        even, odd = raw[..., 2 * j].astype(np.float64), raw[..., 2 * j + 1].astype(np.float64)
        out[..., 2 * j] = even * math.cos(a) - odd * math.sin(a)
        out[..., 2 * j + 1] = even * math.sin(a) + odd * math.cos(a)
    return out


def turned(tables: RopeTables, source: np.ndarray, frames: int, out: np.ndarray) -> None:
    """What the kernel does with `turn`: roped keys, or means of them, moved by `frames` in time."""
    cos, sin = tables.turn(frames)
    pairs = len(cos)
    even, odd = (source[..., side : 2 * pairs : 2].astype(np.float32) for side in (0, 1))
    out[..., 0 : 2 * pairs : 2], out[..., 1 : 2 * pairs : 2] = even * cos - odd * sin, even * sin + odd * cos
    out[..., 2 * pairs :] = source[..., 2 * pairs :]


@given(start=st.integers(0, 8), shift=st.integers(-500, 2000), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_shifted_keys_equal_keys_roped_there(start: int, shift: int, seed: int) -> None:
    raw = np.random.default_rng(seed).standard_normal((6, 2, 24)).astype(np.float32)
    source = roped(raw, start, 12).astype(np.float32)
    out = np.full_like(source, np.nan)
    turned(RopeTables(model(2, 3, (12, 8, 4))), source, shift, out)
    np.testing.assert_allclose(out, roped(raw, start + shift, 12), atol=2e-6)


def test_shifted_means_equal_means_of_shifted_keys() -> None:
    keys = np.random.default_rng(0).standard_normal((6, 2, 24)).astype(np.float32)
    tables = RopeTables(model(2, 3, (12, 8, 4)))
    moved, mean = np.empty_like(keys), np.empty_like(keys[0])
    turned(tables, keys, 7, moved)
    turned(tables, keys.mean(axis=0), 7, mean)
    np.testing.assert_allclose(mean, moved.mean(axis=0), atol=1e-6)


def test_shift_by_zero_keeps_every_bit_and_half_precision_stays_half() -> None:
    keys = np.random.default_rng(0).standard_normal((6, 24)).astype(np.float16)
    out = np.empty_like(keys)
    turned(RopeTables(model(2, 3, (12, 8, 4))), keys, 0, out)
    np.testing.assert_array_equal(out, keys)


def draw(seed: int, chunk: int, step: int) -> np.ndarray:
    out = np.empty((2, 3, 4, 4), dtype=np.float32)
    fill_noise(out, seed=seed, chunk=chunk, step=step)
    return out


def test_noise_is_philox_keyed_by_seed_and_chunk_and_step() -> None:
    key = np.array([2**64 - 1, (5 << 8) | 3], dtype=np.uint64)
    expected = np.random.Generator(np.random.Philox(key=key)).standard_normal((2, 3, 4, 4), np.float32)
    np.testing.assert_array_equal(draw(2**64 - 1, 5, 3), expected)


def test_every_key_draws_differently_and_repeatably() -> None:
    draws = {(s, c, t): draw(s, c, t).tobytes() for s in (0, 1) for c in (0, 1, 256) for t in range(4)}
    assert len(set(draws.values())) == len(draws)
    assert draw(1, 256, 2).tobytes() == draws[1, 256, 2]


def test_noise_is_standard_normal() -> None:
    sample = np.concatenate([draw(7, chunk, 0).ravel() for chunk in range(200)])
    assert abs(sample.mean()) < 0.03 and abs(sample.std() - 1) < 0.03


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "7", None, True])
def test_unusable_seed(seed: object) -> None:
    with pytest.raises(InputError, match="seed"):
        check_seed(seed)


def test_numpy_seed_is_fine() -> None:
    assert check_seed(np.uint64(2**64 - 1)) == 2**64 - 1
