"""Prompts to embeddings: cleaning, tokenising, and the UMT5 encoder, whole and layer by layer.

The whole encoder is the one of `transformers`, built here without any download. `UMT5Layer` is one of its layers with
the weights as inputs, for engines through which the weights are streamed.

One set of weight names serves both: `token_embedding`, `norm`, and `layers.{i}.` + `LAYER_WEIGHTS`, matrices in
torch's `[out, in]` layout. `UMT5_KEYS` and `umt5_keys` relate them to the two public layouts.
"""

from __future__ import annotations

import html
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dimensions import UMT5_TINY, UMT5_XXL, UMT5Config
from .errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import UMT5EncoderModel

__all__ = [
    "LAYER_WEIGHTS",
    "UMT5_TINY",
    "UMT5_XXL",
    "UMT5Config",
    "UMT5Key",
    "UMT5Layer",
    "build_encoder",
    "byte_tokenizer",
    "check_tokenizer",
    "clean_prompt",
    "encode",
    "encode_prompts",
    "encoder_weights",
    "layer_weights",
    "load_tokenizer",
    "relative_buckets",
    "tokenize",
    "umt5_keys",
]


# ---- prompts and tokens ----


def clean_prompt(prompt: str) -> str:
    """Repair mojibake, unescape HTML twice, strip, and collapse white space, as Wan does before tokenising."""
    import ftfy  # here, because a model without its tokenizer needs it not

    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


def byte_tokenizer() -> Tokenizer:
    """The tokenizer of `UMT5_TINY`: one token per UTF-8 byte, then the end token.

    Save it with its `save(path)`. No text reads as a special token, and the tokenizer neither pads nor truncates.
    """
    from tokenizers import Tokenizer, models, processors

    vocab = {"<pad>": UMT5_TINY.pad_id, "</s>": UMT5_TINY.eos_id, "<unk>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    # No character has a token of its own and there are no merges, so the model falls back to bytes for all of them.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", UMT5_TINY.eos_id)]
    )
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a `tokenizer.json`, given as the file or as its folder; padding and truncation are switched off.

    Raises:
        CheckpointError: there is no such file, or it is no tokenizer.
    """
    from tokenizers import Tokenizer

    file = Path(path)
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(
            f"no tokenizer at {file}; expected the tokenizer.json that comes with the text encoder (google/umt5-xxl)"
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more specific
        raise CheckpointError(
            f"{file} is no tokenizer of the tokenizers library ({error}); expected the tokenizer.json that comes with "
            "the text encoder"
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def check_tokenizer(path: str | Path, config: UMT5Config) -> None:
    """Hold a tokenizer against the encoder that reads its ids.

    Raises:
        CheckpointError: it gives ids that the encoder has no row for, or its `<pad>` and `</s>` are others.
    """
    tokenizer = load_tokenizer(path)
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    special = {"<pad>": config.pad_id, "</s>": config.eos_id}
    found = {token: tokenizer.token_to_id(token) for token in special}
    if largest >= config.vocab or found != special:
        raise CheckpointError(
            f"the tokenizer {path} is not the text encoder's: its largest id is {largest}, its special tokens are "
            f"{found}; expected ids below {config.vocab}, and {special}: use the tokenizer.json that comes with the "
            "text encoder"
        )


def tokenize(tokenizer: Tokenizer, prompt: str, text_len: int, config: UMT5Config) -> tuple[Tensor, Tensor]:
    """Clean a prompt and turn it into ids and mask, each `[text_len]` (int64; float32 with 1 = token, 0 = padding).

    The end token closes the prompt. A prompt that is too long loses its end, with a warning.
    """
    ids = tokenizer.encode(clean_prompt(prompt), add_special_tokens=False).ids
    room = text_len - 1
    if len(ids) > room:
        warnings.warn(
            f"the prompt has {len(ids)} tokens and the model reads {room}; the rest is cut off", stacklevel=2
        )
    ids = [*ids[:room], config.eos_id]
    padding = text_len - len(ids)
    return (
        torch.tensor(ids + [config.pad_id] * padding),
        torch.tensor([1.0] * len(ids) + [0.0] * padding),
    )


# ---- names of the weights ----


@dataclass(frozen=True)
class UMT5Key:
    """One weight of the encoder under its three names."""

    name: str
    wan: str
    hf: str


_OUTER_KEYS = (
    UMT5Key("token_embedding", "token_embedding.weight", "shared.weight"),
    UMT5Key("norm", "norm.weight", "encoder.final_layer_norm.weight"),
)
_LAYER_KEYS = (
    UMT5Key("norm1", "norm1.weight", "layer.0.layer_norm.weight"),
    UMT5Key("q", "attn.q.weight", "layer.0.SelfAttention.q.weight"),
    UMT5Key("k", "attn.k.weight", "layer.0.SelfAttention.k.weight"),
    UMT5Key("v", "attn.v.weight", "layer.0.SelfAttention.v.weight"),
    UMT5Key("o", "attn.o.weight", "layer.0.SelfAttention.o.weight"),
    UMT5Key(
        "rel_bias", "pos_embedding.embedding.weight", "layer.0.SelfAttention.relative_attention_bias.weight"
    ),
    UMT5Key("norm2", "norm2.weight", "layer.1.layer_norm.weight"),
    UMT5Key("gate", "ffn.gate.0.weight", "layer.1.DenseReluDense.wi_0.weight"),
    UMT5Key("fc1", "ffn.fc1.weight", "layer.1.DenseReluDense.wi_1.weight"),
    UMT5Key("fc2", "ffn.fc2.weight", "layer.1.DenseReluDense.wo.weight"),
)

LAYER_WEIGHTS = tuple(key.name for key in _LAYER_KEYS)
"""Names of one layer's weights, in the order of `UMT5Layer`'s inputs."""


def umt5_keys(layers: int) -> list[UMT5Key]:
    """Every weight of an encoder with `layers` layers: our name, Wan's, and Hugging Face's."""
    return [*_OUTER_KEYS] + [
        UMT5Key(f"layers.{i}.{key.name}", f"blocks.{i}.{key.wan}", f"encoder.block.{i}.{key.hf}")
        for i in range(layers)
        for key in _LAYER_KEYS
    ]


# ---- the whole encoder ----


def build_encoder(
    config: UMT5Config, weights: Mapping[str, Tensor] | None = None, *, seed: int = 0
) -> UMT5EncoderModel:
    """The encoder of `transformers`, with `weights` under our names, or drawn from `seed`; in evaluation mode.

    Given weights are used in place, not copied. Where they are narrower than float32, each layer's are widened while it
    runs, so that the encoder computes in float32 and is held in memory (or mapped from its file) as it came.
    """
    from transformers import UMT5Config as HFConfig
    from transformers import UMT5EncoderModel

    settings = HFConfig(
        vocab_size=config.vocab,
        d_model=config.d_model,
        d_kv=config.d_kv,
        d_ff=config.d_ff,
        num_layers=config.layers,
        num_heads=config.heads,
        relative_attention_num_buckets=config.buckets,
        relative_attention_max_distance=config.max_distance,
        layer_norm_epsilon=config.eps,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=config.pad_id,
        eos_token_id=config.eos_id,
    )
    if weights is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = UMT5EncoderModel(settings)
    else:
        with torch.device("meta"):
            model = UMT5EncoderModel(settings)
        state = {key.hf: weights[key.name] for key in umt5_keys(config.layers)}
        state["encoder.embed_tokens.weight"] = state["shared.weight"]
        model.load_state_dict(state, strict=True, assign=True)
        if any(value.dtype != torch.float32 for value in state.values()):
            model.shared.register_forward_hook(lambda _module, _inputs, output: output.float())
            for part in (*model.encoder.block, model.encoder.final_layer_norm):
                _widen_while_it_runs(part)
    model.set_attn_implementation("eager")
    model.eval()
    return model


def _widen_while_it_runs(module: nn.Module) -> None:
    narrow: list[Tensor] = []

    def widen(*_: object) -> None:
        for parameter in module.parameters():
            narrow.append(parameter.data)
            parameter.data = parameter.data.float()

    def restore(*_: object) -> None:
        for parameter, stored in zip(module.parameters(), narrow, strict=True):
            parameter.data = stored
        narrow.clear()

    module.register_forward_pre_hook(widen)
    module.register_forward_hook(restore, always_call=True)


@torch.no_grad()
def encode(model: UMT5EncoderModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Embedding `[text_len, dim]` of ids and mask `[text_len]`, zero past the prompt's length."""
    hidden: Tensor = model(input_ids=ids[None], attention_mask=mask[None]).last_hidden_state[0]
    return hidden * mask[:, None].to(hidden.dtype)


def encode_prompts(
    model: UMT5EncoderModel, tokenizer: Tokenizer, prompts: list[str], text_len: int, config: UMT5Config
) -> Tensor:
    """Embeddings `[len(prompts), text_len, dim]`, one prompt at a time."""
    return torch.stack([encode(model, *tokenize(tokenizer, prompt, text_len, config)) for prompt in prompts])


def encoder_weights(model: UMT5EncoderModel) -> dict[str, Tensor]:
    """The model's weights under our names; the tensors are shared, not copied."""
    state = model.state_dict()
    return {key.name: state[key.hf] for key in umt5_keys(model.config.num_layers)}


def layer_weights(weights: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """The weights of one layer, named and ordered as `UMT5Layer` takes them."""
    return {name: weights[f"layers.{layer}.{name}"] for name in LAYER_WEIGHTS}


# ---- one layer ----


def relative_buckets(length: int, config: UMT5Config) -> Tensor:
    """Bucket of each key position as seen from each query position, int32 `[length, length]`.

    T5's bidirectional rule: half of the buckets for keys after the query; of each half, the first half one bucket per
    distance, the rest spaced logarithmically up to `max_distance`. Integer arithmetic, so the same everywhere.
    """
    half = config.buckets // 2
    exact = half // 2
    spaced = half - exact

    def bucket(distance: int) -> int:
        if distance < exact:
            return distance
        step = 0  # the largest with distance / exact >= (max_distance / exact) ** (step / spaced)
        while step < spaced - 1 and distance**spaced * exact ** (step + 1) >= (
            config.max_distance ** (step + 1) * exact**spaced
        ):
            step += 1
        return exact + step

    by_distance = torch.tensor([bucket(distance) for distance in range(length)], dtype=torch.int32)
    position = torch.arange(length)
    offset = position[None, :] - position[:, None]
    return by_distance[offset.abs()] + half * (offset > 0).to(torch.int32)


class UMT5Layer(nn.Module):
    """One encoder layer whose weights are inputs: any layer's weights can stream through one engine.

    Self-attention with a relative bias of its own, no scaling, padding masked; then a gated GELU-tanh feed-forward.
    """

    buckets: Tensor

    def __init__(self, config: UMT5Config, text_len: int) -> None:
        super().__init__()
        if text_len < 1:
            raise ConfigError(f"text_len is {text_len}; expected at least 1 token")
        self.heads = config.heads
        self.d_kv = config.d_kv
        self.eps = config.eps
        self.register_buffer("buckets", relative_buckets(text_len, config), persistent=False)

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor,
        norm1: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        rel_bias: Tensor,
        norm2: Tensor,
        gate: Tensor,
        fc1: Tensor,
        fc2: Tensor,
    ) -> Tensor:
        """`hidden` `[text_len, dim]`, `mask` `[text_len]` (1 = token, 0 = padding) -> hidden `[text_len, dim]`.

        Weights: norms `[dim]`; q, k, v `[heads d_kv, dim]`; o `[dim, heads d_kv]`; rel_bias `[buckets, heads]`;
        gate, fc1 `[d_ff, dim]`; fc2 `[dim, d_ff]`. Rows of padding come out finite and mean nothing.
        """
        length, dim = hidden.shape
        x = F.rms_norm(hidden, (dim,), norm1, self.eps)
        queries, keys, values = (
            F.linear(x, weight).reshape(length, self.heads, self.d_kv).transpose(0, 1) for weight in (q, k, v)
        )
        scores = queries @ keys.transpose(1, 2) + F.embedding(self.buckets, rel_bias).permute(2, 0, 1)
        scores = scores.masked_fill(mask <= 0, torch.finfo(scores.dtype).min)
        mixed = torch.softmax(scores, dim=-1) @ values
        hidden = hidden + F.linear(mixed.transpose(0, 1).reshape(length, self.heads * self.d_kv), o)
        x = F.rms_norm(hidden, (dim,), norm2, self.eps)
        return hidden + F.linear(F.gelu(F.linear(x, gate), approximate="tanh") * F.linear(x, fc1), fc2)
