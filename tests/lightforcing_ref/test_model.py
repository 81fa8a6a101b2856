"""The transformer: sizes, patching, RoPE, and the cached rollout against uncached computations."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from lightforcing_ref.attention import apply_rope, hsa_attention, rms_norm  # type: ignore[attr-defined]
from lightforcing_ref.cache import AttentionSpec
from lightforcing_ref.config import PRESETS, DiTConfig
from lightforcing_ref.model import CausalWanModel
from lightforcing_ref.rollout import Rollout
from lightforcing_ref.rope import rope_angles, rope_axes, rope_tables
from lightforcing_ref.sparsity import BlockGeometry, HSAConfig, SparsityTable

GRID = (3, 4)
FRAME = GRID[0] * GRID[1]
SMALL = DiTConfig(dim=48, ffn_dim=96, heads=2, layers=3, text_dim=20, text_len=5)
DENSE = SparsityTable.dense().keep_q20(())
ANY_FRAME = HSAConfig(32, 0, 0)


def small_model(seed: int = 0) -> CausalWanModel:
    torch.manual_seed(seed)
    model = CausalWanModel(SMALL).eval().requires_grad_(False)
    for block in model.blocks:  # make every parameter matter
        for norm in (block.self_attn.norm_q, block.self_attn.norm_k, block.cross_attn.norm_k):
            norm.weight.uniform_(0.5, 1.5)
    return model


def spec(keep_q20=DENSE, hsa=ANY_FRAME, block=4) -> AttentionSpec:
    return AttentionSpec(
        SMALL.heads, BlockGeometry(FRAME, block, block), hsa, tuple(keep_q20), SMALL.head_dim**-0.5
    )


def noise(chunk: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * chunk + step)
    return torch.randn(16, 3, 2 * GRID[0], 2 * GRID[1], generator=generator)


def text(seed: int = 0) -> torch.Tensor:
    return torch.randn(5, 20, generator=torch.Generator().manual_seed(seed))


def rollout(model, spec, **settings) -> Rollout:
    return Rollout(model, spec, text(), noise, GRID, **settings)


def test_full_size_parameter_count():
    with torch.device("meta"):
        model = CausalWanModel(PRESETS["wan-1.3b"].dit)
    assert len(model.state_dict()) == 825
    assert sum(p.numel() for p in model.parameters()) == 1_418_996_800


def test_rope_axes_of_the_public_head_size():
    assert rope_axes(128) == (44, 42, 42)
    assert sum(rope_axes(64)) == 64


def test_rope_angles_follow_the_formula_on_each_axis():
    angles = rope_angles(torch.tensor([5.0]), (2, 3), 128)
    token = 1 * 3 + 2  # row 1, column 2
    assert angles[token, 3].item() == pytest.approx(5 * 10000 ** (-6 / 44))
    assert angles[token, 22 + 4].item() == pytest.approx(1 * 10000 ** (-8 / 42))
    assert angles[token, 43 + 20].item() == pytest.approx(2 * 10000 ** (-40 / 42))


def test_rope_rotates_interleaved_pairs_as_complex_numbers():
    x = torch.randn(4, 2, 24)
    angles = torch.rand(4, 12, dtype=torch.float64)
    expected = torch.view_as_real(
        torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
        * torch.polar(torch.ones_like(angles), angles)[:, None]
    ).flatten(-2)
    assert torch.allclose(apply_rope(x.double(), angles.cos(), angles.sin()), expected)


def test_patching_equals_the_strided_convolution():
    model = small_model()
    x = torch.randn(1, 16, 3, 6, 8)
    expected = model.patch_embedding(x).flatten(2).transpose(1, 2)
    assert torch.allclose(model.tokens(x), expected, atol=1e-5)


def test_unpatching_puts_channels_innermost():
    model = small_model()
    tokens = torch.arange(FRAME * 64, dtype=torch.float32).reshape(1, FRAME, 64)
    out = model.latents(tokens, 1, 2 * GRID[0], 2 * GRID[1])
    row, column, channel = 3, 5, 7
    token = (row // 2) * GRID[1] + column // 2
    assert out[0, channel, 0, row, column] == tokens[0, token, (row % 2 * 2 + column % 2) * 16 + channel]


def test_timestep_embedding_is_cosines_then_sines():
    model = small_model()
    e, e0 = model.modulations(torch.tensor([937.5]))
    angles = torch.tensor([937.5 * 10000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    sinusoid = torch.cat((angles.cos(), angles.sin())).float()
    expected = model.time_embedding(sinusoid)
    assert torch.allclose(e[0], expected, atol=1e-6)
    assert torch.allclose(e0[0].flatten(), model.time_projection(expected), atol=1e-6)


def test_merging_the_projections_changes_nothing():
    model = small_model()
    plain = rollout(model, spec()).generate_chunk()
    for block in model.blocks:
        block.self_attn.merge()
    assert torch.allclose(rollout(model, spec()).generate_chunk(), plain, atol=1e-6)


class BlockCausalCore:
    """The whole clip in one forward under a block-causal mask: no cache, no operators."""

    def __init__(self, frames: int):
        positions = torch.arange(frames)
        self.cos, self.sin = rope_tables(positions, GRID, SMALL.head_dim)
        chunk = torch.arange(frames * FRAME) // (3 * FRAME)
        self.mask = chunk[:, None] >= chunk[None, :]

    def __call__(self, layer, qkv, params):
        q, k, v = (qkv + params.bias).chunk(3, -1)
        q, k = rms_norm(q, params.norm_q, params.eps), rms_norm(k, params.norm_k, params.eps)
        q, k, v = (x.unflatten(-1, (SMALL.heads, -1)) for x in (q, k, v))
        q, k = apply_rope(q, self.cos, self.sin), apply_rope(k, self.cos, self.sin)
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), self.mask)
        return out.transpose(1, 2).flatten(2)


def test_cached_rollout_equals_the_uncached_block_causal_forward():
    model = small_model()
    reference = rollout(model, spec())
    chunks = list(reference.stream(3))
    clean = torch.cat(chunks[:2], dim=1)
    for step in range(4):
        x = noise(2, 0) if step == 0 else x  # noqa: F821 - carried over from the previous step
        frames = torch.cat((clean, x), dim=1)[None]
        t = torch.cat((torch.zeros(6), torch.full((3,), reference.schedule.timesteps[step])))[None]
        flow = model(frames, t, model.embed_text(text()[None]), BlockCausalCore(9))[0, :, 6:]
        sigma, following = reference.schedule.sigmas[step : step + 2]
        x0 = x - sigma * flow
        x = x0 if step == 3 else (1 - following) * x0 + following * noise(2, step + 1)
    assert torch.allclose(chunks[2], x, atol=2e-5)


class RawKeyWindowCore:
    """Upstream's long mode, literally: keys cached without RoPE, all roped at window-relative positions 0..n-1."""

    def __init__(self, raw):
        self.raw = raw  # per layer: list of (frame, k, v), oldest first
        self.new = []

    def __call__(self, layer, qkv, params):
        q, k, v = (qkv[0] + params.bias).chunk(3, -1)
        q, k = rms_norm(q, params.norm_q, params.eps), rms_norm(k, params.norm_k, params.eps)
        q, k, v = (x.unflatten(-1, (SMALL.heads, -1)) for x in (q, k, v))
        self.new.append((k, v))
        past = self.raw[layer]
        keys = torch.cat([p[1] for p in past] + [k])
        values = torch.cat([p[2] for p in past] + [v])
        cos, sin = rope_tables(torch.arange(len(past) + 3), GRID, SMALL.head_dim)
        keys = apply_rope(keys, cos, sin)
        q = apply_rope(q, cos[-3 * FRAME :], sin[-3 * FRAME :])
        q, keys, values = (x.transpose(0, 1)[None] for x in (q, keys, values))
        return F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("window", "sink"), [(8, 1), (7, 2), (6, 3), (9, 4)])
def test_long_mode_equals_upstreams_raw_key_window_relative_form(window, sink):
    model = small_model()
    ours = rollout(model, spec(), window_frames=window, sink_frames=sink, sink_positions="window")
    chunks = list(ours.stream(5))
    cross = model.embed_text(text()[None])
    raw = [[] for _ in range(SMALL.layers)]

    def forward(x, t):
        core = RawKeyWindowCore(raw)
        return model(x[None], torch.full((1, 3), t, dtype=torch.float64), cross, core)[0], core.new

    for chunk in range(5):
        for layer in raw:
            while len(layer) > window - 3:
                del layer[next(i for i, entry in enumerate(layer) if entry[0] >= sink)]
        x = noise(chunk, 0)
        for step in range(4):
            flow, _ = forward(x, ours.schedule.timesteps[step])
            x0 = x - ours.schedule.sigmas[step] * flow
            following = ours.schedule.sigmas[step + 1] if step < 3 else 0.0
            x = (1 - following) * x0 + (following * noise(chunk, step + 1) if step < 3 else 0)
        assert torch.allclose(chunks[chunk], x, atol=5e-5), f"chunk {chunk}"
        _, new = forward(x, 0.0)
        for layer, (k, v) in zip(raw, new, strict=True):
            for f in range(3):
                rows = slice(f * FRAME, (f + 1) * FRAME)
                layer.append((3 * chunk + f, k[rows], v[rows]))


def test_absolute_sinks_differ_from_window_sinks_once_the_window_slides():
    model = small_model()
    settings = {"window_frames": 7, "sink_frames": 1}
    absolute = list(rollout(model, spec(), **settings).stream(4))
    window = list(rollout(model, spec(), **settings, sink_positions="window").stream(4))
    assert torch.equal(absolute[1], window[1])
    assert not torch.allclose(absolute[3], window[3], atol=1e-4)


@pytest.mark.parametrize("block", [4, 5])
def test_both_forms_of_sparse_attention_agree_over_a_rollout(block):
    model = small_model()
    table = SparsityTable.chunk_aware(0.5, 0.7)
    blocks = -(-FRAME // block)
    keep = table.keep_q20([f * blocks for f in range(3, 22)])
    sparse = spec(keep, HSAConfig(3, 1, 1), block)
    mask = list(rollout(model, sparse).stream(3))

    gather = list(rollout(model, sparse, attend=partial(hsa_attention, form="gather")).stream(3))
    dense = list(rollout(model, spec()).stream(3))
    for a, b in zip(mask, gather, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert torch.allclose(mask[0], dense[0], atol=1e-5)  # the first chunk is dense
    assert not torch.allclose(mask[2], dense[2], atol=1e-3)


def test_prompt_switch_changes_nothing_before_its_chunk_and_everything_after():
    model = small_model()
    plain = list(rollout(model, spec()).stream(4))
    for recache in ("window", "all", "none"):
        switched = rollout(model, spec(), sink_frames=1)
        before = list(switched.stream(2))
        assert switched.set_prompt(text(9), recache) == 2
        after = list(switched.stream(2))
        assert all(torch.equal(a, b) for a, b in zip(plain, before, strict=False))
        assert not torch.allclose(plain[2], after[0], atol=1e-3)


def test_recaching_everything_equals_a_history_made_under_the_new_prompt():
    """With every resident frame recomputed, the cache is what clean passes under the new prompt would leave."""
    model = small_model()
    switched = rollout(model, spec())
    clean = list(switched.stream(2))
    switched.set_prompt(text(9), "all")
    fresh = Rollout(model, spec(), text(9), noise, GRID)
    for chunk, latent in enumerate(clean):
        _, new = fresh.forward(latent, 4, chunk)
        fresh.cache.commit(3 * chunk, new)
    for frame in range(6):
        for ours, theirs in zip(switched.cache.frames[frame], fresh.cache.frames[frame], strict=True):
            assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


def test_no_position_limit():
    model = small_model()
    late = rollout(model, spec(), window_frames=6, sink_frames=1)
    late.next_chunk = 5000
    assert torch.isfinite(late.generate_chunk()).all()
    assert math.isfinite(late.generate_chunk().std().item())
