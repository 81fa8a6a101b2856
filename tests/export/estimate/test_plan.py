"""Planning: sizes against the real models and bundles, work against hand-computed figures, and the command."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from export.estimate.efficiency import assumed
from export.estimate.elementwise import decoder_passes
from export.estimate.memory import plan_memory
from export.estimate.roofline import ELEMENT_WISE, KINDS, Workload, predict
from export.report.plan import plan_tables
from export.request.plan import PlanRequest
from export.request.sizes import (
    decoder_convs,
    decoder_parameters,
    layer_linears,
    text_layer_parameters,
    text_outer_parameters,
    transformer_parameters,
)
from export.request.targets import load_target, load_variant
from lightforcing_ref.checkpoint.spec import dit_shapes, tae_decoder_shapes, umt5_shapes, vae_decoder_shapes
from lightforcing_ref.config import PRESETS, preset
from lightforcing_ref.decoders.tae import TAE, TINY_TAE, TAEDecoder
from lightforcing_ref.decoders.vae import VAEDecoder
from lightforcing_ref.dimensions import LIGHT_VAE, TINY_VAE, WAN_VAE


def planned(target="rtx5090", variant="short", model="wan-1.3b", size=None, precision="bf16") -> PlanRequest:
    chosen = preset(model)
    height, width = size or (chosen.height, chosen.width)
    return PlanRequest(load_target(target), load_variant(variant), chosen, height, width, precision)


def total(shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


# ---- what the authors measured ----


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({}, None),
        ({"size": (480, 832)}, "480x832"),
        ({"precision": "bf16"}, "bf16"),
        ({"variant": "dense"}, "another sparsity than that of short"),
        ({"variant": "long"}, "another sparsity than that of short"),
        ({"target": "rtx4090"}, "nothing"),
    ],
)
def test_published_figures_are_compared_with_their_own_case_only(changes, difference):
    request = planned(**{"precision": "fp8", **changes})
    text = "\n".join(part for part in plan_tables(request, 1, assumed(0.6)) if isinstance(part, str))
    assert ("The release runs at" in text) == (difference is None)
    assert ("not compared with this floor" in text) == (difference not in (None, "nothing"))
    if difference not in (None, "nothing"):
        assert difference in text


# ---- sizes ----


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_those_of_the_checkpoints(name):
    model = preset(name)
    assert transformer_parameters(model.dit) == total(dit_shapes(model.dit))
    text = model.text
    assert text.layers * text_layer_parameters(text) + text_outer_parameters(text) == total(umt5_shapes(text))


def test_published_parameters():
    assert transformer_parameters(preset("wan-1.3b").dit) == 1_418_996_800
    assert transformer_parameters(preset("wan-14b").dit) == 14_288_491_584
    assert round(decoder_parameters(WAN_VAE) / 1e6, 1) == 73.3
    assert round(decoder_parameters(LIGHT_VAE) / 1e6, 2) == 4.62


@pytest.mark.parametrize("vae", [WAN_VAE, LIGHT_VAE, TINY_VAE], ids=["wan", "light", "tiny"])
def test_decoder_convolutions_are_those_of_the_decoder(vae):
    assert decoder_parameters(vae) == total(vae_decoder_shapes(vae))
    with torch.device("meta"):
        real = VAEDecoder(vae).cache_specs(60, 104)
    caches = [shape for conv in decoder_convs(vae) if (shape := conv.cache_shape(60, 104))]
    assert caches == [cache.shape for cache in real]
    assert len(caches) == 32


@pytest.mark.parametrize("tae", [TAE, TINY_TAE], ids=["taehv", "tiny"])
def test_tiny_decoder_convolutions_are_those_of_the_decoder(tae):
    assert decoder_parameters(tae) == total(tae_decoder_shapes(tae))
    with torch.device("meta"):
        real = TAEDecoder(tae).cache_specs(60, 104)
    caches = [shape for conv in decoder_convs(tae) if (shape := conv.cache_shape(60, 104))]
    assert caches == [cache.shape for cache in real]


def test_tiny_decoder_work_is_what_pytorch_counts():
    with torch.device("meta"), torch.no_grad():
        decoder = TAEDecoder(TAE)
        latent = torch.empty(16, 1, 8, 12)
        with FlopCounterMode(display=False) as first:
            _, caches = decoder.decode_first(latent)
        with FlopCounterMode(display=False) as later:
            decoder.decode_next(latent, caches)
    convs = decoder_convs(TAE)
    assert sum(conv.flops(8, 12, first=True) for conv in convs) == first.get_total_flops()
    assert sum(conv.flops(8, 12) for conv in convs) == later.get_total_flops()


def test_tiny_decoder_passes():
    """Its blocks write their input beside the frame before: 256 channels at the latent's size, first."""
    passes = list(decoder_passes(TAE, 64, 96, 2, first=False))
    memory = [one for one in passes if one.name == "memory"]
    frame = 64 * 96 * 2
    assert [one.written for one in memory[::3]] == [256 * 3 * frame, 128 * 3 * 4 * frame, 64 * 5 * 16 * frame]
    assert memory[0].read == 256 * 2 * frame
    assert passes[-1].written == 3 * 4 * 512 * 768


def test_published_decoder_figures():
    caches = [shape for conv in decoder_convs(WAN_VAE) if (shape := conv.cache_shape(60, 104))]
    assert sum(map(math.prod, caches)) == 944_286_720
    attention = 4 * (60 * 104) ** 2 * 384
    flops = sum(conv.flops(60, 104) for conv in decoder_convs(WAN_VAE)) + attention
    assert round(flops / 1e12, 2) == 13.55


def test_decoder_work_is_what_pytorch_counts():
    workload = Workload(planned(model="tiny"))
    with torch.device("meta"), torch.no_grad():
        decoder = VAEDecoder(TINY_VAE)
        latent = torch.empty(16, 1, 16, 16)
        with FlopCounterMode(display=False) as first:
            _, caches = decoder.decode_first(latent)
        with FlopCounterMode(display=False) as later:
            decoder.decode_next(latent, caches)
    assert sum(work.flops for work in workload.decode(first=True)) == first.get_total_flops()
    assert sum(work.flops for work in workload.decode(first=False)) == later.get_total_flops()


def test_weights_in_each_precision():
    """1.42B in bf16: 2.50 GB of block linears in the step graph; 1.25 GB in fp8 and 0.70 GB in nvfp4."""
    step = layer_linears(preset("wan-1.3b").dit)[:-2]
    sizes = {p: 30 * sum(linear.bytes(p) for linear in step) / 1e9 for p in ("bf16", "fp8", "nvfp4")}
    assert {p: round(size, 2) for p, size in sizes.items()} == {"bf16": 2.50, "fp8": 1.25, "nvfp4": 0.70}


# ---- memory ----


def test_cache_by_hand():
    """1560-token frames: 287.5 MB of keys and values per latent frame in bf16, and 18 frames besides the chunk."""
    plan = plan_memory(planned(size=(480, 832)))
    sizes = {item.name: item.bytes for item in plan.items}
    assert sizes["keys and values of past frames"] == 18 * 30 * 2 * 1560 * 1536 * 2
    assert round(sizes["keys and values of past frames"] / 18 / 1e6, 1) == 287.5
    assert sizes["block means of the keys"] == 18 * 30 * 25 * 1536 * 4
    latent_channels = 16 * 2 * 60 * 104  # the one cache that is as wide in LightVAE as in the full decoder
    assert sizes["video decoder, two sets"] == 2 * 2 * (
        (944_286_720 - latent_channels) // 4 + latent_channels
    )
    assert sizes["cross-attention keys and values"] == 30 * 2 * 512 * 1536 * 2


def test_a_prompt_reads_the_text_encoders_layers():
    """24 layers of four 4096 x 4096, three 4096 x 10240, two norms, and 32 biases for each of 64 heads, in bf16."""
    layer = 4 * 4096**2 + 3 * 4096 * 10240 + 2 * 4096 + 32 * 64
    plan = plan_memory(planned())
    assert plan.prompt_bytes == 2 * 24 * layer == 9_261_514_752
    assert plan.host_bytes - plan.prompt_bytes == 2 * (256384 * 4096 + 4096)


def test_long_clips_cost_a_window():
    short, long = plan_memory(planned()), plan_memory(planned(variant="long"))
    name = "keys and values of past frames"
    frames = {plan: next(i.bytes for i in plan.items if i.name == name) for plan in (short, long)}
    assert frames[short] * 9 == frames[long] * 18


@pytest.mark.parametrize(
    ("target", "precision", "variant", "fits"),
    [
        ("rtx5090", "bf16", "dense", False),
        ("rtx5090", "fp8", "longlive", False),
        ("rtx5090", "nvfp4", "longlive", True),
        ("h200", "bf16", "dense", True),
    ],
)
def test_fourteen_billion_parameters(target, precision, variant, fits):
    """Weights of 40 layers by hand: 13.0e9 elements of block linears in the step, in 2, 1 or 0.5 to 1 bytes."""
    request = PlanRequest(load_target(target), load_variant(variant), preset("wan-14b"), 480, 832, precision)
    plan = plan_memory(request)
    assert plan.fits == fits
    sizes = {item.name: item.bytes for item in plan.items}
    elements = (
        40 * (3 + 1 + 1 + 1) * 5120**2 + 40 * 2 * 5120 * 13824
    )  # qkv, o; q, o of cross-attention; feed-forward
    each = {"bf16": (2.0, 2.0), "fp8": (1.0, 1.001), "nvfp4": (0.5625, 0.564)}[precision]
    assert each[0] * elements <= sizes["transformer, block linears"] <= each[1] * elements
    past = {"dense": 18, "longlive": 9}[variant]
    assert sizes["keys and values of past frames"] == past * 40 * 2 * 1560 * 5120 * 2


def test_verdicts():
    one = plan_memory(planned())
    assert one.fits
    assert one.verdict.startswith("fits: 1 session needs ")
    assert one.peak == one.shared + one.per_session == sum(item.bytes for item in one.items)
    assert one.most_sessions is not None
    edge, over = (plan_memory(planned(), one.most_sessions + extra) for extra in (0, 1))
    assert edge.fits
    assert not over.fits
    assert over.verdict.startswith("does not fit: ")
    assert over.peak - edge.peak == one.per_session


@pytest.mark.parametrize("precision", ["fp8", "nvfp4"])
def test_narrower_weights_take_less(precision):
    wide, narrow = plan_memory(planned()), plan_memory(planned(precision=precision))
    assert narrow.group("weights") < wide.group("weights")
    assert narrow.group("cache") == wide.group("cache")


# ---- work ----


def test_published_work_per_forward():
    """4680 queries at 480x832: linears 11.70 TFLOP, cross-attention 0.44, self-attention 4.04 per chunk of history."""
    workload = Workload(planned(variant="dense", size=(480, 832)))
    work = list(workload.forward(0))
    by_kind = {kind: sum(w.flops for w in work if w.kind == kind) / 1e12 for kind in {w.kind for w in work}}
    assert by_kind["linears"] == pytest.approx(11.70, abs=0.01)
    assert by_kind["cross-attention"] == pytest.approx(0.44, abs=0.005)
    for chunk in range(7):
        assert 30 * workload.attention(chunk).flops / 1e12 == pytest.approx(4.037 * (chunk + 1), rel=1e-3)
    assert workload.attention(6).flops == pytest.approx(0.942e12, rel=1e-3)


def test_dense_attention_of_the_last_chunk_at_512x768():
    workload = Workload(planned(variant="dense"))
    assert workload.attention(6).flops == 4 * (3 * 1536) * (21 * 1536) * 1536
    assert Workload(planned()).attention(6, dense=True) == workload.attention(6)


@pytest.mark.parametrize(
    ("target", "variant", "kept"),
    [
        ("rtx5090", "short", ["72/72", "24/144", "31/216", "36/288", "42/360", "46/432", "51/504"]),
        ("h200", "hopper", ["36/36", "18/72", "24/108", "29/144", "35/180", "40/216", "45/252"]),
    ],
)
def test_published_budgets(target, variant, kept):
    workload = Workload(planned(target, variant))
    assert ["{}/{}".format(*workload.visible_blocks(chunk)) for chunk in range(7)] == kept
    share = [int(a) / int(b) for a, b in (entry.split("/") for entry in kept)]
    for chunk in range(7):
        dense = workload.attention(chunk, dense=True).flops
        assert workload.attention(chunk).flops == pytest.approx(dense * share[chunk])


def test_the_clean_forward_ends_with_the_last_keys():
    workload = Workload(planned())
    whole, clean = (sum(w.flops for w in workload.forward(2, clean=clean)) for clean in (False, True))
    tokens, dim, ffn = 3 * 1536, 1536, 8960
    rest = 2 * tokens * (3 * dim * dim + 2 * dim * ffn + 64 * dim) + 4 * tokens * 512 * dim
    assert whole - clean == rest + workload.attention(2).flops


# ---- element-wise work ----

TOKENS, DIM, FFN = 3 * 1536, 1536, 8960
STREAM = TOKENS * DIM
"""Elements of the residual stream of a chunk."""


def test_passes_of_one_fp8_layer_by_hand():
    """Blocks of 128: 12 a frame. bf16 is two bytes, fp8 one and four for the scale of each token."""
    passes = Workload(planned("h200", "hopper", precision="fp8")).passes
    found = [(one.name, one.read, one.written) for one in (passes.prepare(), *passes.layer())]
    scales = 4 * TOKENS
    assert found == [
        ("prepare q, k, v", 6 * STREAM + 2 * TOKENS * 64 * 4, 6 * STREAM + 3 * (12 + 12) * DIM * 4),
        ("quantize attention", 2 * STREAM, STREAM + scales),
        ("residual, norm", 4 * STREAM, 3 * STREAM + scales),
        ("norm of cross q", 2 * STREAM, 2 * STREAM),
        ("quantize cross-attention", 2 * STREAM, STREAM + scales),
        ("residual, norm, modulation", 4 * STREAM, 3 * STREAM + scales),
        ("GELU", 2 * TOKENS * FFN, TOKENS * FFN + scales),
        ("residual, norm, modulation", 4 * STREAM, 3 * STREAM + scales),
    ]
    assert sum(read + written for _, read, written in found) == 431_124_480


def test_passes_of_one_bf16_layer_by_hand():
    """Nothing is quantized: two passes fewer, and the inputs of products are as wide as everything else."""
    passes = Workload(planned("h200", "hopper")).passes
    found = [(one.read // STREAM, one.written // STREAM) for one in passes.layer() if one.name != "GELU"]
    assert found == [(4, 4), (2, 2), (4, 4), (4, 4)]
    assert [one.bytes for one in passes.layer() if one.name == "GELU"] == [4 * TOKENS * FFN]
    assert [one.written for one in passes.layer(29)][-1] == 2 * STREAM  # no residual goes on


def test_inputs_in_nvfp4_are_four_bits_and_scales():
    passes = {one.name: one for one in Workload(planned(precision="nvfp4")).passes.layer()}
    assert passes["GELU"].written == TOKENS * FFN // 2 + TOKENS * FFN // 16 + 4 * TOKENS
    assert passes["quantize attention"].written == STREAM // 2 + STREAM // 16 + 4 * TOKENS


def test_every_element_wise_pass_of_a_forward():
    def moved(workload: Workload, *, clean: bool) -> int:
        return sum(w.bytes for w in workload.forward(2, clean=clean) if w.kind == "element-wise")

    workload = Workload(planned("h200", "hopper", precision="fp8"))
    passes, layers = workload.passes, 30
    layer = sum(one.bytes for one in passes.layer())
    ends = sum(one.bytes for one in (*passes.first(), *passes.last()))
    unquantized = 4 * TOKENS  # the head's input is bf16, and no residual stream goes on from it
    whole = moved(workload, clean=False)
    assert whole == ends + layers * (passes.prepare().bytes + layer) - STREAM - unquantized
    last = sum(one.bytes for one in (*passes.layer(29), *passes.last()))
    assert whole - moved(workload, clean=True) == last
    latent = 16 * 3 * 64 * 96  # elements: bf16 flow, float32 latent and noise, two float32 results
    assert sum(one.bytes for one in passes.last()) == latent * (2 + 4 + 4 + 4 + 4)


def test_built_engines_stand_in_for_passes():
    asked = planned("h200", "hopper", precision="fp8")
    built = {"layer": 500_000_000, "vae_next": 8_000_000_000}
    clip, passes = predict(asked, built), predict(asked)
    assert clip is not None and passes is not None
    layer = sum(one.bytes for one in Workload(asked).passes.layer())
    more = clip.part("element-wise").bytes - passes.part("element-wise").bytes
    assert more == 34 * 29 * (500_000_000 - layer)
    first, later = (
        sum(one.bytes for one in decoder_passes(LIGHT_VAE, 64, 96, 2, first=on)) for on in (True, False)
    )
    assert passes.part("decoder, element-wise").bytes == first + 20 * later
    assert clip.part("decoder, element-wise").bytes == first + 20 * 8_000_000_000


def test_passes_of_the_decoder_by_hand():
    """LightVAE, 512x768: the last ones, and one in front of everything that convolves."""
    passes = list(decoder_passes(LIGHT_VAE, 64, 96, 2, first=False))
    frame = 512 * 768
    head, colours = passes[-2:]
    # Two summands of four frames and two frames of history; six frames for the convolution, two for the next time.
    assert (head.read, head.written) == (24 * (2 * 4 + 2) * frame * 2, 24 * (4 + 2 + 2) * frame * 2)
    assert (colours.read, colours.written) == (3 * 4 * frame * 2, 3 * 4 * frame)
    enlarged = [one for one in passes if one.name == "enlarge"]
    assert [one.written for one in enlarged] == [
        96 * 2 * 128 * 192 * 2,
        96 * 4 * 256 * 384 * 2,
        48 * 4 * 512 * 768 * 2,
    ]
    caches = [conv for conv in decoder_convs(LIGHT_VAE) if conv.cache_scale]
    assert len(passes) == len(caches) + len(("attention", "to bytes")) + len(enlarged)


def test_history_is_what_the_decoder_keeps():
    """The first frame reads no history, and bypasses the two convolutions over time; everything else is a frame's."""
    tiny = [conv for conv in decoder_convs(TINY_VAE) if conv.cache_scale]
    later, first = (list(decoder_passes(TINY_VAE, 16, 16, 2, first=on)) for on in (False, True))
    assert len(later) - len(first) == sum(conv.only_later for conv in tiny) == 2
    with torch.device("meta"), torch.no_grad():
        decoder = VAEDecoder(TINY_VAE)
        sizes: list[int] = []
        for module in decoder.modules():
            if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
                module.register_forward_pre_hook(lambda _, args: sizes.append(args[0].numel()))
        _, caches = decoder.decode_first(torch.empty(16, 1, 16, 16))
        assert [2 * size for size in sizes] == [one.written for one in first if one.name == "enlarge"]
        sizes.clear()
        decoder.decode_next(torch.empty(16, 1, 16, 16), caches)
        assert [2 * size for size in sizes] == [one.written for one in later if one.name == "enlarge"]


# ---- prediction ----


def test_published_floor():
    """DiT-only floor of 35 whole forwards at 480x832, dense, in seconds."""
    published = {
        ("rtx5090", "bf16"): 4.74,
        ("rtx5090", "fp8"): 3.76,
        ("h200", "bf16"): 1.0,
        ("h200", "fp8"): 0.79,
    }
    for (target, precision), seconds in published.items():
        asked = planned(target, "dense", size=(480, 832), precision=precision)
        workload, peak = Workload(asked), asked.target.peak
        work = [w for chunk in range(7) for w in workload.forward(chunk) if w.kind != "element-wise"]
        assert 5 * sum(w.seconds(peak) for w in work) == pytest.approx(seconds, abs=0.02)


def test_a_clip_of_81_frames():
    clip = predict(planned(precision="fp8"))
    assert clip is not None
    assert [chunk.frames for chunk in clip.chunks] == [9, 12, 12, 12, 12, 12, 12]
    assert clip.frames == 81
    assert clip.seconds == pytest.approx(sum(chunk.seconds for chunk in clip.chunks))
    assert clip.fps == pytest.approx(81 / clip.seconds)
    assert assumed(0.5).fps(clip) == pytest.approx(81 / clip.seconds / 2)


def test_fp8_alone_does_not_double_the_authors_speed_and_nvfp4_can():
    """2.96 s on the 5090: half of it would take 99 % of the peak rates in fp8."""
    clips = {p: predict(planned(precision=p)) for p in ("bf16", "fp8", "nvfp4")}
    computed = {
        p: sum(clip.part(kind).seconds for kind in KINDS if kind not in ELEMENT_WISE)
        for p, clip in clips.items()
    }
    assert computed["fp8"] == pytest.approx(1.46, abs=0.01)
    assert computed["nvfp4"] / 0.7 < 2.96 / 2
    for p, clip in clips.items():
        assert clip.compute_bound == pytest.approx(computed[p] / clip.seconds, rel=0.01)


def test_element_wise_work_is_a_quarter_of_a_clip_on_an_h200():
    clip = predict(planned("h200", "hopper", precision="fp8"))
    assert clip is not None
    moved = sum(clip.part(kind).seconds for kind in ELEMENT_WISE)
    assert moved / clip.seconds == pytest.approx(0.24, abs=0.01)
    assert clip.part("element-wise").seconds == pytest.approx(clip.part("element-wise").bytes / 4.8e12)


def test_memory_limits_what_moves_more_than_it_computes():
    slow = load_target("rtx5090")
    slow = slow.model_copy(update={"peak": slow.peak.model_copy(update={"memory_gb_s": 1.0})})
    asked = PlanRequest(slow, load_variant("short"), preset("wan-1.3b"), 512, 768, "bf16")
    clip = predict(asked)
    assert clip is not None
    assert clip.compute_bound == 0
    work = Workload(asked).attention(6)
    assert work.seconds(slow.peak) == work.bytes / 1e9 == 2 * (3 + 21) * 1536 * 1536 * 2 / 1e9


def test_nothing_is_predicted_without_rates():
    assert predict(planned("cpu", model="tiny", precision="fp32")) is None
