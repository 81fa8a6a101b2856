# mypy: allow-untyped-calls, no-warn-return-any
"""Puts stages together from a configuration and a run folder, in the order in which they need each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from lightforcing_ref.config import PRESETS
from lightforcing_ref.dimensions import TINY_VAE, DecoderConfig, TAEConfig
from lightforcing_ref.schedule import FlowSchedule
from lightforcing_ref.sparsity import HSAConfig, SparsityTable
from training.config import Run, StageConfig, StageName, TrainingConfig
from training.data.clips import FRAMES, random_clip
from training.data.dataset import LATENT_FRAMES, ClipSet, build_latents
from training.data.latents import PatchPCA
from training.device import load_weights
from training.runner import Stage, run_stage, save_tensors

from .decoder import DecoderStage
from .dit import SPARSITY_BASE, SPARSITY_TARGET, RolloutStage, StillStage, StudentStage, attention_spec
from .encoder import derive_encoder
from .qat import QATStage
from .sharpen import SharpenStage
from .text import CaptionEncoder, TextStage

__all__ = ["PREVIOUS", "StageError", "latest_transformer", "run"]

PRESET = PRESETS["tiny"]
SMALL_TAE = TAEConfig(widths=(32, 16, 16, 16))
PREVIOUS: dict[str, tuple[str, ...]] = {
    "student": ("still",),
    "rollout": ("student", "still"),
    "hsa": ("rollout", "student", "still"),
    "sla": ("rollout", "student", "still"),
    "qat": ("hsa",),
    "framewise": ("rollout", "student"),
}
"""Stages whose transformer a stage starts from: the first that exists."""
SPARSE = {
    "hsa": HSAConfig(),
    "qat": HSAConfig(),
    "sla": HSAConfig(keep_frames=LATENT_FRAMES, sink_frames=0, near_frames=0),
}
"""Stages under sparse attention: Light Forcing's, and one stage of selection among all blocks, which is SLA's sparse
branch."""


DECODERS: Mapping[str, DecoderConfig] = {"decoder": TINY_VAE, "tae": SMALL_TAE}
"""Stages that train a video decoder: Wan's layout, and TAEHV's."""


class StageError(Exception):
    """A stage cannot run; the message says what is missing and how to get it."""


def _need(path: Path, stage: str) -> Path:
    if not path.exists():
        raise StageError(f"{path} does not exist; run `python -m training run --stage {stage}` first")
    return path


def latest_transformer(run: Run, candidates: tuple[str, ...]) -> str:
    """The first of `candidates` that has weights.

    Raises:
        StageError: no stage has weights yet.
    """
    for name in candidates:
        if run.weights(name).exists():
            return name
    raise StageError(
        f"none of {', '.join(candidates)} has weights under {run.folder}; run the still stage first"
    )


def _build(name: StageName, config: TrainingConfig, run: Run, settings: StageConfig) -> Stage:
    torch.manual_seed(config.seed)
    if name == "text":
        return TextStage(settings, PRESET, config.seed)
    if name in DECODERS:
        stage = DecoderStage(settings, config.data, PatchPCA.load(_need(run.pca, "latents")), DECODERS[name])
        stage.name = name
        if run.start(name).exists():
            stage.module.load_state_dict(load_weights(run.start(name)))
        return stage
    clips = ClipSet(_need(run.stage("latents"), "latents"))
    captions = CaptionEncoder.load(PRESET, _need(run.weights("text"), "text"))
    if name == "sharpen":
        transformer = load_weights(run.weights(latest_transformer(run, PREVIOUS["hsa"])))
        pca = PatchPCA.load(run.pca)
        sharpen = SharpenStage(settings, config.data, pca, PRESET, clips, captions, transformer)
        sharpen.module.load_state_dict(load_weights(_need(run.weights("decoder"), "decoder")))
        return sharpen
    start = None
    if run.start(name).exists():
        start = load_weights(run.start(name))
    elif name in PREVIOUS:
        start = load_weights(run.weights(latest_transformer(run, PREVIOUS[name])))
    common = (settings, config.loss, PRESET, clips, captions, start)
    if name == "still":
        return StillStage(*common)
    if name == "student":
        return StudentStage(*common)
    if name == "framewise":
        framewise = RolloutStage(*common, FlowSchedule.warped(chunk_frames=1))
        framewise.name = name
        return framewise
    rollout = QATStage(*common) if name == "qat" else RolloutStage(*common)
    if name in SPARSE:
        rollout.name = name
        table = SparsityTable.chunk_aware(SPARSITY_TARGET, SPARSITY_BASE)
        rollout.spec = attention_spec(PRESET, table, SPARSE[name])
    return rollout


def _windows(config: TrainingConfig) -> Iterator[npt.NDArray[np.uint8]]:
    """The clips that the encoder is derived for: three latent frames each, from anywhere."""
    generator = np.random.default_rng([config.seed, 3])
    for _ in range(config.data.pca_clips):
        clip = random_clip(generator, config.data.kinds)
        yield clip.render(int(generator.integers(FRAMES - 8)), 9)


def run(
    name: StageName,
    config: TrainingConfig,
    folder: Run,
    *,
    minutes: float | None = None,
    report: Callable[[str, float], None] | None = None,
) -> None:
    """Run one stage to the end of its budget.

    Args:
        minutes: training time of the stage in all, earlier sittings included; None = as configured.

    Raises:
        StageError: an earlier stage's result is missing.
    """
    torch.set_num_threads(config.threads)
    if config.device != "cpu":
        torch.set_default_device(config.device)
    if name == "latents":
        build_latents(config, folder, report)
    elif name == "encoder":
        encoder = derive_encoder(PatchPCA.load(_need(folder.pca, "latents")), _windows(config), TINY_VAE)
        folder.stage(name).mkdir(parents=True, exist_ok=True)
        save_tensors(encoder.state_dict(), folder.weights(name))
    elif name == "text" and folder.weights(name).exists() and not (folder.stage(name) / "state.pt").exists():
        return  # adopted: training on would change what the transformer reads
    else:
        settings = config.stage(name)
        if minutes is not None:
            settings = settings.model_copy(update={"minutes": minutes})
        stage = _build(name, config, folder, settings)
        run_stage(stage, settings, folder.stage(name), seed=config.seed, report=report)
