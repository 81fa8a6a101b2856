from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from export.compare import reference_embedding
from export.weights import shipped_weights
from lightforcing_ref.config import PRESETS
from lightforcing_ref.shipped import shipped


def test_the_prompt_is_embedded_in_float32_from_files_in_half_precision() -> None:
    preset = PRESETS["tiny"]
    weights = shipped_weights(preset, dense=True)
    assert weights is not None
    stored = weights.text_weights()
    assert {value.dtype for value in stored.values()} == {torch.float16}
    reference: Any = SimpleNamespace(preset=preset, text_weights=stored)
    text = SimpleNamespace(tokenizer=shipped("tiny").tokenizer, text_len=64)
    bundle: Any = SimpleNamespace(manifest=SimpleNamespace(text=text), path=Path)
    embedding = reference_embedding(bundle, reference)
    assert not torch.equal(embedding, embedding.half().float())
