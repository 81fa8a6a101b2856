"""Keys and values as codes: against plain loops, against attention in float64, and over whole rollouts."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from export.request.geometry import StepPlan
from export.request.targets import load_variant
from lightforcing_ref.attention import hsa_attention
from lightforcing_ref.cache import FrameCache, Products
from lightforcing_ref.config import preset
from lightforcing_ref.fp8_cache import (
    dequantize_blocks,
    dequantize_values,
    e4m3_attention,
    hsa_attention_e4m3,
    hsa_attention_fp8,
    qk_prepare_fp8,
    quantize_blocks,
    quantize_values,
    with_fp8_cache,
)
from lightforcing_ref.model import CausalWanModel
from lightforcing_ref.rollout import Rollout
from plugins.operators import HSA_FP8_INPUTS
from runtime.bundle.e4m3 import decode, encode, narrow, widen


def e4m3_values() -> list[float]:
    """The numbers of the format, from its definition: 0.mmm x 2^-6, and 1.mmm x 2^(e - 7)."""
    found = {m / 8 * 2.0**-6 for m in range(8)}
    found |= {(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)}
    return sorted({*found, *(-value for value in found)})


def nearest(x: float, values: list[float]) -> float:
    """The nearest of `values`; of two, the one whose mantissa is even."""
    best = min(abs(value - x) for value in values)
    candidates = [value for value in values if abs(value - x) == best]
    if len(candidates) == 1:
        return candidates[0]
    step = abs(candidates[0] - candidates[1])
    return next(value for value in candidates if (value / step) % 2 == 0)


def test_numpy_and_pytorch_round_as_the_definition_says() -> None:
    values = e4m3_values()
    middles = [(a + b) / 2 for a, b in itertools.pairwise(values)]
    x = np.array([*values, *middles, 449.0, 1e9, -1e9, 2.0**-11, 3e-38], dtype=np.float32)
    x = np.concatenate((x, np.nextafter(x, np.float32(1e9)), np.nextafter(x, np.float32(-1e9))))
    expected = np.array([nearest(min(448.0, max(-448.0, float(v))), values) for v in x], dtype=np.float32)
    assert np.array_equal(decode(encode(x)), expected)
    torched = torch.from_numpy(x).clamp(-448, 448).to(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(torched, expected)


@pytest.mark.parametrize("frame_tokens", [12, 13], ids=["whole blocks", "a short last block"])
def test_blocks_by_hand(frame_tokens: int) -> None:
    block, frames, heads, dim = 4, 2, 3, 8
    x = torch.randn(frames, frame_tokens, heads, dim, generator=torch.Generator().manual_seed(0))
    x[0, :4, 1] = 0  # a block of zeros
    starts = range(0, frame_tokens, block)
    means = torch.stack([x[:, s : s + block].mean(1) for s in starts], 1)
    for given in (None, means):
        codes, scales = quantize_blocks(x, block, given)
        back = dequantize_blocks(codes, scales, block, given)
        for index, start in enumerate(starts):
            part = x[:, start : start + block] - (0 if given is None else given[:, index, None])
            assert torch.allclose(scales[:, index], (part.abs().amax((1, 3)) / 448).clamp_min(2.0**-24))
            gap = (back - x)[:, start : start + block].abs().amax((1, 3))
            assert (gap <= 1.01 * 16 * scales[:, index]).all()  # half of the largest step, 32
    codes, scales = quantize_blocks(x, block)
    by_channel, same = quantize_values(x, block)
    assert torch.equal(same, scales)
    for index, start in enumerate(starts):
        rows = codes[:, start : start + block]
        assert torch.equal(by_channel[:, index, ..., : rows.shape[1]], rows.permute(0, 2, 3, 1))
        assert not by_channel[:, index, ..., rows.shape[1] :].any()
    assert torch.equal(
        dequantize_values(by_channel, scales, frame_tokens), dequantize_blocks(codes, scales, block)
    )
    for frame in range(frames):
        found, sizes = narrow(x[frame].numpy(), block)
        assert np.array_equal(sizes, scales[frame].numpy())
        assert np.array_equal(
            widen(found, sizes, block), dequantize_blocks(codes, scales, block)[frame].numpy()
        )


def inputs(frame_tokens: int = 12) -> tuple[dict[str, Tensor], dict[str, object]]:
    """A call of the attention over codes, one past frame of four slots among them, and its attributes."""
    generator = torch.Generator().manual_seed(1)
    heads, dim, block = 2, 16, 4
    blocks = math.ceil(frame_tokens / block)
    width = heads * dim
    qkv, bias, norm_q, norm_k = (
        torch.randn(shape, generator=generator)
        for shape in ((frame_tokens, 3 * width), (3 * width,), (width,), (width,))
    )
    angle = torch.randn(frame_tokens, dim // 2, generator=generator)
    geometry = {"frame_tokens": frame_tokens, "block_q": 4, "block_k": block}
    q, k, v, q_mean, *rest = qk_prepare_fp8(
        qkv, bias, norm_q, norm_k, angle.cos(), angle.sin(), heads=heads, eps=1e-6, **geometry
    )
    past = torch.randn(4, frame_tokens, heads, dim, generator=generator)
    past_means = torch.stack([past[:, s : s + block].mean(1) for s in range(0, frame_tokens, block)], 1)
    past_k, past_kscale = quantize_blocks(past, block, past_means)
    past_v, past_vscale = quantize_values(past.flip(0), block)
    slots, chunk = torch.tensor([2, 0, -1], dtype=torch.int32), torch.tensor(1, dtype=torch.int32)
    tensors = (q, k, v, q_mean, *rest, past_k, past_v, past_means, past_kscale, past_vscale, slots, chunk)
    assert past_means.shape[1] == blocks
    attributes = {"keep_frames": 2, "sink_frames": 0, "near_frames": 0, "scale": 0.25, "keep_q20": (1 << 20,)}
    return dict(zip(HSA_FP8_INPUTS, tensors, strict=True)), attributes | geometry


def test_attention_with_the_codes_themselves() -> None:
    """`scale (q . code) + q . mean`, summed in float64 by a loop, is what attention over the numbers gives."""
    given, attributes = inputs()
    out = hsa_attention_fp8(*given.values(), **attributes)
    for head in range(2):
        logits, values = [], []
        for k, k_scale, k_mean, v, v_scale in (
            *((given["past_k"][s], given["past_kscale"][s], given["past_kmean"][s],
               given["past_v"][s], given["past_vscale"][s]) for s in (2, 0)),
            (given["k"], given["k_scale"][0], given["k_mean"][0], given["v"][0], given["v_scale"][0]),
        ):  # fmt: skip
            for token in range(12):
                block = token // 4
                code = decode(k[token, head].numpy()).astype(np.float64)
                q = given["q"][:, head].double().numpy()
                logits.append(
                    float(k_scale[block, head]) * (q @ code) + q @ k_mean[block, head].double().numpy()
                )
                of_token = decode(v[block, head, :, token % 4].numpy()).astype(np.float64)
                values.append(float(v_scale[block, head]) * of_token)
        weights = np.exp(0.25 * np.stack(logits, 1))
        expected = weights / weights.sum(1, keepdims=True) @ np.stack(values)
        assert np.allclose(out[:, head].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_products_of_codes_by_hand() -> None:
    """A query's codes and the codes of weights relative to a power of two, from the definition of E4M3, in float64."""
    given, attributes = inputs()
    out, values = hsa_attention_e4m3(*given.values(), **attributes), e4m3_values()
    keys = [(given["past_k"][s], given["past_kscale"][s], given["past_kmean"][s]) for s in (2, 0)]
    keys.append((given["k"], given["k_scale"][0], given["k_mean"][0]))
    stored = [(given["past_v"][s], given["past_vscale"][s]) for s in (2, 0)]
    stored.append((given["v"][0], given["v_scale"][0]))
    for token, head in ((0, 0), (5, 1), (11, 0)):
        q = given["q"][token, head].double().numpy()
        size = max(float(np.abs(q).max()) / 448, 2.0**-24)
        codes = np.array([nearest(float(np.float32(x / size)), values) for x in q])
        logits = [
            size * float(scale[key // 4, head]) * (codes @ decode(k[key, head].numpy()).astype(np.float64))
            + q @ mean[key // 4, head].double().numpy()
            for k, scale, mean in keys
            for key in range(12)
        ]
        bits = 0.25 * np.array(logits) / math.log(2)
        weights = 2.0 ** (bits - math.ceil(bits.max()) + 8)
        mixed = sum(
            nearest(float(np.float32(weight)), values)
            * float(scale[key // 4, head])
            * decode(v[key // 4, head, :, key % 4].numpy()).astype(np.float64)
            for weight, (v, scale, key) in zip(
                weights, [(v, scale, key) for v, scale in stored for key in range(12)], strict=True
            )
        )
        found = out[token, head].double().numpy()
        # A weight that lies between two codes may fall to the other side.
        assert np.linalg.norm(found - mixed / weights.sum()) < 2e-3 * np.linalg.norm(found)


def test_products_of_codes_cost_a_few_percent() -> None:
    """Against the same keys and values in float32: what rounding queries and weights adds."""
    given, attributes = inputs()
    exact = hsa_attention_fp8(*given.values(), **attributes)
    found = hsa_attention_e4m3(*given.values(), **attributes)
    assert 2e-3 < float((found - exact).norm() / exact.norm()) < 4e-2


def test_gathered_and_masked_agree() -> None:
    given, attributes = inputs()
    gathering = with_fp8_cache(partial(hsa_attention, form="gather", attend=e4m3_attention), means_apart=True)
    expected = hsa_attention_e4m3(*given.values(), **attributes)
    assert torch.allclose(gathering(*given.values(), **attributes), expected, rtol=2e-3, atol=1e-4)


def rolled(variant: str, chunks: int, products: Products | None = None) -> tuple[Tensor, Tensor]:
    """Latents of a rollout in the compute type, and over codes."""
    model, chosen = preset("tiny"), load_variant(variant)
    torch.manual_seed(0)
    dit = CausalWanModel(model.dit).requires_grad_(False)
    found = []
    for kind in (chosen, chosen.holding("fp8", products)):
        plan = StepPlan.of(model, kind, model.height, model.width, block_q=32, block_k=32)
        height, width = plan.latent_size
        rollout = Rollout(
            dit,
            plan.spec,
            torch.randn(model.dit.text_len, model.dit.text_dim, generator=torch.Generator().manual_seed(5)),
            lambda chunk, step, size=(height, width): torch.randn(
                16, 3, *size, generator=torch.Generator().manual_seed(8 * chunk + step)
            ),
            (height // 2, width // 2),
            window_frames=kind.window_frames,
            sink_frames=kind.cache.sink_frames,
            sink_positions=kind.cache.sink_positions,
            schedule=plan.schedule,
        )
        found.append(torch.cat(list(rollout.stream(chunks)), 1))
    return found[0], found[1]


@pytest.mark.parametrize(("variant", "chunks"), [("short", 3), ("long", 6)])
def test_rollouts_stay_close(variant: str, chunks: int) -> None:
    """Six chunks of the long mode turn the sinks twice. What the codes cost is about what FP8 linears do; with the
    sinks' mode products are of codes, too.
    """
    plain, codes = rolled(variant, chunks, "fp8" if variant == "long" else None)
    error = float((codes - plain).norm() / plain.norm())
    assert 1e-4 < error < 2e-2


def test_sinks_are_turned_from_the_codes_as_committed() -> None:
    """However often the window has moved, a sink has been rounded twice: moving by 1 and then 2 is moving by 2."""
    model, variant = preset("tiny"), load_variant("long").holding("fp8")
    plan = StepPlan.of(model, variant, model.height, model.width, block_q=32, block_k=32)
    cache = FrameCache(model.dit, plan.geometry, 12, 1, "window", "fp8")
    tokens, block = plan.geometry.frame_tokens, plan.geometry.block_k
    keys = torch.randn(1, tokens, model.dit.heads, model.dit.head_dim)
    means = torch.stack([part.mean(1) for part in keys.split(block, 1)], 1)
    codes, scale = quantize_blocks(keys, block, means)
    values, _ = quantize_values(keys, block)
    cache.commit(0, [(codes[0], values, means, scale, scale)])
    cache.past(0, [0], 3)
    moved = cache.past(0, [0], 7)
    again = cache.past(0, [0], 7)
    assert all(torch.equal(a, b) for a, b in zip(moved, again, strict=True))
    plain = replace(cache, kv=None, frames={0: [(keys[0], keys[0], means[0])]}).past(0, [0], 7)
    found = dequantize_blocks(moved[0], moved[3], block, moved[2])
    assert float((found - plain[0]).norm() / plain[0].norm()) < 0.05
    assert torch.equal(moved[1], values) and torch.equal(moved[4], scale)  # values do not turn
