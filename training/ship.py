"""Ships a run's weights as half-precision safetensors in the public checkpoints' layouts, and starts runs from them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lightforcing_ref.checkpoint import (
    load_dit_state,
    load_umt5_state,
    load_vae_encoder_state,
    load_vae_state,
)
from lightforcing_ref.dimensions import TINY_VAE
from lightforcing_ref.text import umt5_keys
from training.data.latents import PatchPCA
from training.stages.run import DECODERS, PRESET, PREVIOUS, StageError, latest_transformer
from training.stages.text import CaptionEncoder

from .config import Run
from .device import load_weights
from .runner import save_tensors

__all__ = ["FILES", "adopt", "ship"]

FILES = {
    "transformer": "dit.safetensors",
    "dense": "dit_dense.safetensors",
    "framewise": "dit_framewise.safetensors",
    "nvfp4": "dit_nvfp4.safetensors",
    "decoder": "vae.safetensors",
    "tae": "tae.safetensors",
    "text": "text_encoder.safetensors",
    "tokenizer": "tokenizer.json",
    "latents": "latents.safetensors",
}
"""`dense` is the transformer before it was finetuned under sparse attention, to compare with, and `framewise` that one
for chunks of one latent frame; `nvfp4` is the finetuned one, trained on with its linears in that format. `tae` is
another decoder of the same latents, in TAEHV's layout. The latents' basis serves training only; the decoders hold its
inverse."""
LEAVE_OUT = "none"


def ship(run: Run, folder: Path, transformer: str | None = None) -> list[Path]:
    """Write transformer, decoder, text encoder (Wan's key layout), tokenizer and latent basis; returns the files.

    The video encoder lies beside the decoder, in one file.

    Args:
        transformer: the stage whose transformer to ship; None = the latest, "none" = leave it out.

    Raises:
        StageError: a stage has no weights yet, or holds values outside half precision's range.
    """
    name = transformer or latest_transformer(run, ("hsa", *PREVIOUS["hsa"]))
    transformers = {} if name == LEAVE_OUT else {"transformer": name}
    if name == "hsa":
        transformers["dense"] = latest_transformer(run, PREVIOUS["hsa"])
    for part, stage in (("framewise", "framewise"), ("nvfp4", "qat")):
        if transformers and run.weights(stage).exists():
            transformers[part] = stage
    decoder = "sharpen" if run.weights("sharpen").exists() else "decoder"
    for stage in (decoder, "text", *transformers.values()):
        if not run.weights(stage).exists():
            raise StageError(
                f"{run.weights(stage)} does not exist; run `python -m training run --stage {stage}` first"
            )
    captions = CaptionEncoder.load(PRESET, run.weights("text"))
    names = {key.name: key.wan for key in umt5_keys(PRESET.text.layers)}
    states = {
        "decoder": load_weights(run.weights(decoder)),
        "text": {names[key]: value for key, value in captions.weights.items()},
    }
    if run.weights("encoder").exists():
        states["decoder"] |= load_weights(run.weights("encoder"))
    if run.weights("tae").exists():
        states["tae"] = load_weights(run.weights("tae"))
    states |= {part: load_weights(run.weights(stage)) for part, stage in transformers.items()}
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for part, state in states.items():
        path = folder / FILES[part]
        save_tensors({key: _half(key, value) for key, value in state.items()}, path)
        written.append(path)
    captions.tokenizer.save(str(folder / FILES["tokenizer"]))
    PatchPCA.load(run.pca).save(folder / FILES["latents"])
    return [*written, folder / FILES["tokenizer"], folder / FILES["latents"]]


def adopt(run: Run, folder: Path) -> list[str]:
    """Let a new run start from shipped weights: text encoder and latents as they are, the rest to be trained on.

    Returns:
        the stages that now have something to start from.

    Raises:
        StageError: the run has begun already, or files are missing.
    """
    if run.folder.exists() and any(run.folder.iterdir()):
        raise StageError(f"{run.folder} is not empty; give an unused folder with --run")
    needed = (FILES[part] for part in ("text", "decoder", "latents"))
    missing = [name for name in needed if not (folder / name).exists()]
    if missing:
        raise StageError(f"{folder} lacks {', '.join(missing)}; expected a folder that `ship` wrote")
    PatchPCA.load(folder / FILES["latents"]).save(run.pca)
    text = load_umt5_state(folder / FILES["text"], PRESET.text, dtype=torch.float32)
    names = {key.name: f"encoder.{key.hf}" for key in umt5_keys(PRESET.text.layers)}
    decoder = load_vae_state(folder / FILES["decoder"], PRESET.vae, dtype=torch.float32)
    states = {
        run.weights("text"): {names[key]: value for key, value in text.items()},
        run.start("decoder"): decoder,
        run.weights("decoder"): decoder,
    }
    if _has_encoder(folder / FILES["decoder"]):
        encoder = load_vae_encoder_state(folder / FILES["decoder"], TINY_VAE, dtype=torch.float32)
        states[run.weights("encoder")] = encoder
    if (folder / FILES["tae"]).exists():
        tae = load_vae_state(folder / FILES["tae"], DECODERS["tae"], dtype=torch.float32)
        states |= {run.start("tae"): tae, run.weights("tae"): tae}
    transformers = (
        ("transformer", run.start("student")),
        ("transformer", run.weights("hsa")),
        ("dense", run.weights("rollout")),
        ("framewise", run.weights("framewise")),
        ("nvfp4", run.weights("qat")),
    )
    for part, path in transformers:
        if (folder / FILES[part]).exists():
            states[path] = load_dit_state(folder / FILES[part], PRESET.dit, dtype=torch.float32)
    for path, state in states.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(state, path)
    return list(dict.fromkeys(path.parent.name for path in states))


def _has_encoder(path: Path) -> bool:
    return any(key.startswith("encoder.") for key in load_weights(path))


def _half(key: str, value: Tensor) -> Tensor:
    half = value.to(torch.float16).contiguous()
    if not torch.isfinite(half).all():
        raise StageError(f"{key} holds values outside half precision's range; train with a smaller step size")
    return half
