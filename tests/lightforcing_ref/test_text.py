"""Prompts, tokens, and the text encoder: whole, layer by layer, and through ONNX."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightforcing_ref.errors import CheckpointError, ConfigError
from lightforcing_ref.text import (
    LAYER_WEIGHTS,
    UMT5_TINY,
    UMT5Layer,
    build_encoder,
    byte_tokenizer,
    clean_prompt,
    encode,
    encode_prompts,
    encoder_weights,
    layer_weights,
    load_tokenizer,
    relative_buckets,
    tokenize,
)

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

TEXT_LEN = 24


@pytest.fixture(scope="module")
def model() -> UMT5EncoderModel:
    """An encoder whose norms and biases matter: their initial values are ones and nearly zeros."""
    encoder = build_encoder(UMT5_TINY, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return encoder


def tokens(prompt: str, text_len: int = TEXT_LEN) -> tuple[Tensor, Tensor]:
    return tokenize(byte_tokenizer(), prompt, text_len, UMT5_TINY)


# ---- prompts ----


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("a red fox", "a red fox"),
        ("  a\tred \n\n fox ", "a red fox"),
        ("âœ” No problems", "✔ No problems"),
        ("fish &amp;amp; chips", "fish & chips"),
        ("&amp;lt;b&amp;gt;", "<b>"),
        ("un\u00a0caf\u00e9", "un caf\u00e9"),
        ("&nbsp; &amp;nbsp;fox&nbsp;", "fox"),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_prompt_cleaning(prompt: str, cleaned: str) -> None:
    assert clean_prompt(prompt) == cleaned


# ---- tokens ----


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_byte_tokenizer_gives_the_bytes_and_the_end(text: str) -> None:
    assert byte_tokenizer().encode(text).ids == [*(3 + byte for byte in text.encode()), 1]


def test_byte_tokenizer_has_no_special_text() -> None:
    for text in ("</s>", "<pad>", "<unk>", "<0x41>"):
        assert byte_tokenizer().encode(text).ids == [*(3 + byte for byte in text.encode()), 1]
    assert byte_tokenizer().get_vocab_size() == UMT5_TINY.vocab == 259


def test_tokenizer_survives_its_file(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "ein Füchslein 🦊"
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(path).encode(text).ids == [*(3 + byte for byte in text.encode()), 1]


def test_missing_and_broken_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer at .*tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(CheckpointError, match="is no tokenizer"):
        load_tokenizer(tmp_path)


def test_tokens_are_padded_and_masked() -> None:
    ids, mask = tokens(" ab ", text_len=6)
    assert ids.tolist() == [3 + ord("a"), 3 + ord("b"), 1, 0, 0, 0]
    assert ids.dtype == torch.int64
    assert mask.tolist() == [1, 1, 1, 0, 0, 0]
    assert mask.dtype == torch.float32


def test_an_empty_prompt_is_its_end() -> None:
    ids, mask = tokens("", text_len=3)
    assert ids.tolist() == [1, 0, 0]
    assert mask.tolist() == [1, 0, 0]


def test_a_prompt_that_just_fits_does_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    ids, mask = tokens("abc", text_len=4)
    assert ids.tolist() == [100, 101, 102, 1]
    assert mask.tolist() == [1, 1, 1, 1]
    assert not recwarn.list


def test_a_long_prompt_is_cut_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="the prompt has 10000 tokens and the model reads 15"):
        ids, mask = tokens("a" * 10_000, text_len=16)
    assert ids.tolist() == [100] * 15 + [1]
    assert mask.tolist() == [1] * 16


# ---- the whole encoder ----


def test_encoder_is_reproducible_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second, other = (encoder_weights(build_encoder(UMT5_TINY, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in first.items():
        assert torch.equal(value, second[name])
    assert not torch.equal(first["layers.0.q"], other["layers.0.q"])


def test_weights_go_out_and_in(model: UMT5EncoderModel) -> None:
    weights = encoder_weights(model)
    assert set(weights) == {"token_embedding", "norm"} | {
        f"layers.{i}.{part}"
        for i in range(2)
        for part in ("norm1", "q", "k", "v", "o", "rel_bias", "norm2", "gate", "fc1", "fc2")
    }
    again = build_encoder(UMT5_TINY, weights)
    ids, mask = tokens("a red fox")
    assert torch.equal(encode(model, ids, mask), encode(again, ids, mask))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_stay_narrow_and_compute_in_float32(
    model: UMT5EncoderModel, dtype: torch.dtype
) -> None:
    narrow = {name: value.to(dtype) for name, value in encoder_weights(model).items()}
    widened = build_encoder(UMT5_TINY, {name: value.float() for name, value in narrow.items()})
    encoder = build_encoder(UMT5_TINY, narrow)
    for prompt in ("a red fox", "snow"):
        found = encode(encoder, *tokens(prompt))
        assert found.dtype == torch.float32
        assert torch.equal(found, encode(widened, *tokens(prompt)))
    for name, value in encoder_weights(encoder).items():
        assert value.data_ptr() == narrow[name].data_ptr()


def test_embedding_is_zero_past_the_prompt(model: UMT5EncoderModel) -> None:
    embedding = encode(model, *tokens("a red fox"))
    assert embedding.shape == (TEXT_LEN, UMT5_TINY.d_model)
    assert not embedding[len("a red fox") + 1 :].any()
    assert embedding[: len("a red fox") + 1].abs().sum(1).min() > 0


def test_padding_is_not_attended_to(model: UMT5EncoderModel) -> None:
    short, long = (encode(model, *tokens("a red fox", text_len)) for text_len in (12, 40))
    torch.testing.assert_close(short[:10], long[:10], rtol=1e-5, atol=1e-5)


def test_prompts_are_encoded_one_by_one(model: UMT5EncoderModel) -> None:
    prompts = ["a red fox", "", "snow"]
    together = encode_prompts(model, byte_tokenizer(), prompts, TEXT_LEN, UMT5_TINY)
    for prompt, embedding in zip(prompts, together, strict=True):
        assert torch.equal(embedding, encode(model, *tokens(prompt)))


# ---- one layer ----


def test_relative_buckets_equal_those_of_transformers(model: UMT5EncoderModel) -> None:
    position = torch.arange(512)
    attention = model.encoder.block[0].layer[0].SelfAttention
    expected = attention._relative_position_bucket(position[None, :] - position[:, None])
    buckets = relative_buckets(512, UMT5_TINY)
    assert buckets.dtype == torch.int32
    assert torch.equal(buckets.long(), expected)


@pytest.mark.parametrize(
    ("distance", "bucket"),
    [(0, 0), (1, 1), (7, 7), (8, 8), (11, 8), (12, 9), (16, 10), (90, 14), (91, 15), (128, 15)],
)
def test_relative_buckets_by_definition(distance: int, bucket: int) -> None:
    """8 exact, then 8 + floor(8 log(d / 8) / log(128 / 8)) up to 15; 16 more for keys after the query."""
    buckets = relative_buckets(200, UMT5_TINY)
    assert buckets[150, 150 - distance] == bucket
    assert buckets[20, 20 + distance] == (bucket + 16 if distance else 0)


@pytest.mark.parametrize("prompt", ["a red fox", "", "a red fox jumps over a snowy fence"[: TEXT_LEN - 1]])
def test_layers_equal_those_of_transformers(prompt: str, model: UMT5EncoderModel) -> None:
    ids, mask = tokens(prompt)
    weights = encoder_weights(model)
    layer = UMT5Layer(UMT5_TINY, TEXT_LEN)
    valid = mask > 0
    additive = ((1 - mask) * torch.finfo(torch.float32).min)[None, None, None]
    hidden = weights["token_embedding"][ids]
    with torch.no_grad():
        for i, block in enumerate(model.encoder.block):
            expected = block(hidden[None], attention_mask=additive)[0]
            hidden = layer(hidden, mask, **layer_weights(weights, i))
            torch.testing.assert_close(hidden[valid], expected[valid], rtol=1e-5, atol=1e-5)
    assert hidden.isfinite().all()
    normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6) * weights["norm"]
    torch.testing.assert_close(normed * mask[:, None], encode(model, ids, mask), rtol=1e-5, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(length=st.integers(1, 9), heads=st.integers(1, 3), used=st.integers(1, 9), seed=st.integers(0, 99))
def test_layer_by_definition(length: int, heads: int, used: int, seed: int) -> None:
    """Token by token and head by head, over the tokens that are no padding."""
    used = min(used, length)
    config = replace(UMT5_TINY, d_model=6, d_ff=5, heads=heads, d_kv=4, layers=1)
    inner = heads * config.d_kv
    generator = torch.Generator().manual_seed(seed)
    shapes = [(6,), (inner, 6), (inner, 6), (inner, 6), (6, inner), (32, heads), (6,), (5, 6), (5, 6), (6, 5)]
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    norm1, q, k, v, o, rel_bias, norm2, gate, fc1, fc2 = weights
    hidden = torch.randn(length, 6, generator=generator, dtype=torch.float64)
    mask = (torch.arange(length) < used).double()

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean() + 1e-6).sqrt() * weight

    normed = torch.stack([norm(row, norm1) for row in hidden])
    buckets = relative_buckets(length, config)
    expected = []
    for i in range(used):
        mixed = []
        for head in range(heads):
            rows = slice(head * 4, head * 4 + 4)
            logits = torch.stack(
                [
                    (q[rows] @ normed[i]) @ (k[rows] @ normed[j]) + rel_bias[buckets[i, j], head]
                    for j in range(used)
                ]
            )
            values = torch.stack([v[rows] @ normed[j] for j in range(used)])
            mixed.append(torch.softmax(logits, 0) @ values)
        x = hidden[i] + o @ torch.cat(mixed)
        y = norm(x, norm2)
        z = gate @ y
        gelu = 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))
        expected.append(x + fc2 @ (gelu * (fc1 @ y)))
    actual = UMT5Layer(config, length)(hidden, mask, *weights)
    torch.testing.assert_close(actual[:used], torch.stack(expected), rtol=1e-10, atol=1e-10)


def test_layer_refuses_an_empty_text() -> None:
    with pytest.raises(ConfigError, match="text_len is 0"):
        UMT5Layer(UMT5_TINY, 0)


def test_layer_exports_with_its_weights_as_inputs(model: UMT5EncoderModel, tmp_path: Path) -> None:
    import onnxruntime

    ids, mask = tokens("a red fox")
    weights = encoder_weights(model)
    layer = UMT5Layer(UMT5_TINY, TEXT_LEN).eval()
    hidden = weights["token_embedding"][ids].contiguous()
    inputs = (hidden, mask, *layer_weights(weights, 0).values())
    names = ["hidden", "mask", *LAYER_WEIGHTS]
    program = torch.onnx.export(
        layer,
        inputs,
        input_names=names,
        output_names=["hidden_out"],
        dynamo=True,
        opset_version=23,
        verbose=False,
    )
    assert program is not None
    program.save(tmp_path / "layer.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx", providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == names
    for i in range(2):
        feed = {"hidden": hidden, "mask": mask, **layer_weights(weights, i)}
        (actual,) = session.run(
            ["hidden_out"], {name: value.detach().numpy() for name, value in feed.items()}
        )
        hidden = layer(**feed).detach()
        torch.testing.assert_close(torch.from_numpy(actual), hidden, rtol=1e-4, atol=1e-4)
