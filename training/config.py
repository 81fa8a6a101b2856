"""Training settings: one TOML file per run, validated; and where a run keeps its files."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

__all__ = ["CONFIGS", "STAGES", "ConfigError", "Run", "StageConfig", "StageName", "TrainingConfig"]

CONFIGS = Path(__file__).parent / "configs"
StageName = Literal[
    "latents", "encoder", "text", "decoder", "tae", "still", "student", "rollout", "hsa", "sla", "qat",
    "sharpen", "framewise",
]  # fmt: skip
STAGES: tuple[StageName, ...] = get_args(StageName)
"""In the order in which they build on each other."""


class ConfigError(Exception):
    """A configuration cannot be used; the message says why."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StageConfig(_Model):
    """One stage. It ends at `steps` or when `minutes` of training are used up, whichever comes first.

    The step size rises for `warmup` steps, stays, and falls linearly to zero over the last `decay` of the budget.
    """

    steps: int = Field(gt=0)
    minutes: float = Field(gt=0)
    batch: int = Field(default=1, gt=0)
    lr: float = Field(default=0.0, ge=0)
    """Step size of Muon (matrices)."""
    adam_lr: float = Field(default=0.0, ge=0)
    warmup: int = Field(default=20, ge=0)
    decay: float = Field(default=0.3, ge=0, le=1)
    ema: float = Field(default=0.995, ge=0, lt=1)
    clip: float = Field(default=1.0, gt=0)
    """Largest gradient norm."""
    chunks: int = Field(default=4, ge=1)
    """Chunks of the longest training windows (transformer stages but the first)."""


class DataConfig(_Model):
    """Clips that the latents stage renders once for all later stages."""

    kinds: tuple[str, ...]
    clips: int = Field(gt=0)
    """At most; there are no more than captions."""
    pca_clips: int = Field(gt=0)


class LossConfig(_Model):
    """Weights shared by the transformer stages."""

    foreground: float = Field(ge=1)
    """Weight of latent pixels that the object touches or is about to touch; the ground has 1."""
    outline: float = Field(ge=0)
    """Weight, in the rollout and hsa stages, of a latent pixel's squared difference from the same clip of another
    shape: what tells shapes apart is small."""
    context_noise: float = Field(ge=0)
    """Standard deviation of the noise on clean context."""
    full_noise: float = Field(ge=0, le=1)
    """Fraction of noisy chunks at the first step's noise level; the other steps share the rest."""
    place: float = Field(ge=0)
    """Weight of the readout of each token's own place (still and student stages)."""
    first_window: float = Field(ge=0, le=1)
    """Fraction of the steps that train the first chunk alone, on as many clips as take the same time."""
    own_rollouts: float = Field(ge=0, le=1)
    """Fraction of the rollout and hsa stages' steps that put new rollouts of the model's own into the pool of clips."""
    renewed: float = Field(ge=0, le=1)
    """How often a clip that those stages draw from the pool is replaced by a new one."""
    blended: float = Field(ge=0, le=1)
    """How often a new clip is blended with the same clip of another shape."""


class TrainingConfig(_Model):
    """A whole run."""

    schema_version: Literal[1]
    seed: int
    threads: int = Field(ge=1)
    device: str = "cpu"
    """A PyTorch device: cpu, cuda, cuda:1."""
    data: DataConfig
    loss: LossConfig
    text: StageConfig
    decoder: StageConfig
    tae: StageConfig
    still: StageConfig
    student: StageConfig
    rollout: StageConfig
    hsa: StageConfig
    sla: StageConfig
    qat: StageConfig
    sharpen: StageConfig
    framewise: StageConfig

    @classmethod
    def load(cls, path: Path) -> TrainingConfig:
        """Read and validate a TOML file.

        Raises:
            ConfigError: there is none, or it is not valid.
        """
        if not path.exists():
            names = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.toml")))
            raise ConfigError(f"no configuration {path}; give a TOML file or one of: {names}")
        try:
            return cls.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except (ValidationError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid: {error}") from error

    def stage(self, name: StageName) -> StageConfig:
        """The settings of an optimised stage."""
        found: StageConfig = getattr(self, name)
        return found


class Run:
    """The folder of a run, outside version control."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def pca(self) -> Path:
        return self.folder / "latents" / "pca.safetensors"

    def stage(self, name: str) -> Path:
        """Folder of one stage: state.pt, curve.csv, weights.safetensors."""
        return self.folder / name

    def weights(self, name: str) -> Path:
        """Averaged weights of a stage, written at every checkpoint."""
        return self.folder / name / "weights.safetensors"

    def start(self, name: str) -> Path:
        """Weights from elsewhere that a stage begins with; absent where it begins anew."""
        return self.folder / name / "start.safetensors"
