"""What the rollout benchmark measures, as data: the rungs, the cases, and the bundle that each rung needs.

Imports nothing heavy, so that the command line can describe the ladder at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from export import BuildRequest, Target, Variant
    from lightforcing_ref.config import Preset

__all__ = [
    "CHUNK_PIXEL_FRAMES",
    "FIRST_CHUNK_PIXEL_FRAMES",
    "LADDER",
    "RESOLUTIONS",
    "SHORT_FRAMES",
    "BundleSpec",
    "Case",
    "Platform",
    "Rung",
    "bundle_spec",
    "chunks_for",
    "ladder_preset",
    "variant_for",
]

FIRST_CHUNK_PIXEL_FRAMES, CHUNK_PIXEL_FRAMES = 9, 12
SHORT_FRAMES = 81
"""Pixel frames that the short variants are planned for; a longer clip runs in the long mode, with a window."""

DECODER_WIDTHS: Mapping[str, tuple[int, int]] = MappingProxyType({"tiny": (8, 2), "wan-1.3b": (96, 24)})
"""Width of the full and of the light decoder, whose every layer is a quarter as wide."""


@dataclass(frozen=True)
class Rung:
    """One step of the ladder; each adds something to the one before.

    Attributes:
        runner: "eager" is PyTorch alone, "executor" a bundle and the public runtime API.
        sparse: hierarchical sparse attention with chunk-aware budgets; otherwise dense.
        fp8: the block linears in FP8, where the device has it.
        light_vae: the narrow decoder in place of the full one.
        overlap: decoding runs beside the next chunk's forwards.
        graphs: forwards are replayed as CUDA graphs.
    """

    number: int
    name: str
    runner: Literal["eager", "executor"]
    sparse: bool = False
    fp8: bool = False
    light_vae: bool = False
    overlap: bool = False
    graphs: bool = False


LADDER: tuple[Rung, ...] = (
    Rung(0, "PyTorch eager, dense", "eager"),
    Rung(1, "+ HSA/CAG in PyTorch and Triton", "eager", sparse=True),
    Rung(2, "executor, dense", "executor"),
    Rung(3, "+ HSA kernels", "executor", sparse=True),
    Rung(4, "+ fp8", "executor", sparse=True, fp8=True),
    Rung(5, "+ LightVAE", "executor", sparse=True, fp8=True, light_vae=True),
    Rung(
        6,
        "+ overlap and graphs",
        "executor",
        sparse=True,
        fp8=True,
        light_vae=True,
        overlap=True,
        graphs=True,
    ),
)


@dataclass(frozen=True)
class Case:
    """One clip to generate: a resolution in pixels and a number of pixel frames, rounded up to whole chunks."""

    preset: str
    height: int
    width: int
    asked_frames: int

    @property
    def chunks(self) -> int:
        return chunks_for(self.asked_frames)

    @property
    def frames(self) -> int:
        """Pixel frames of the whole chunks."""
        return FIRST_CHUNK_PIXEL_FRAMES + (self.chunks - 1) * CHUNK_PIXEL_FRAMES

    @property
    def is_long(self) -> bool:
        return self.asked_frames > SHORT_FRAMES

    @property
    def name(self) -> str:
        return f"{self.height}x{self.width}, {self.asked_frames} frames"


def chunks_for(frames: int) -> int:
    """Whole chunks that cover `frames` pixel frames."""
    return 1 + max(0, -(-(frames - FIRST_CHUNK_PIXEL_FRAMES) // CHUNK_PIXEL_FRAMES))


@dataclass(frozen=True)
class Platform:
    """What this run builds for and with.

    Attributes:
        device: "cpu" or "cuda".
        target: name of a target of `engines`.
        backend: of the bundles.
        base_precision: of the rungs before fp8.
        problem: why no bundle can be built here; None where one can.
        fp8_problem: why the fp8 rung cannot run here; None where it can. Later rungs then stay at `base_precision`.
    """

    device: Literal["cpu", "cuda"]
    target: Target
    backend: str
    base_precision: str
    problem: str | None = None
    fp8_problem: str | None = None

    @classmethod
    def here(
        cls, device: Literal["cpu", "cuda"], backend: str = "auto", gpu: tuple[str, str] = ("", "")
    ) -> Platform:
        """What can be built for this machine.

        Args:
            backend: a backend's name, or "auto".
            gpu: name and compute capability of the device.

        Raises:
            InputError: there is no target for this GPU.
        """
        from export import InputError, choose_backend

        base = "fp32" if device == "cpu" else "bf16"
        target = _target(device, gpu)
        try:
            chosen = choose_backend(target, backend, base).backend
        except InputError as error:
            return cls(device, target, backend, base, str(error), str(error))
        try:
            choose_backend(target, chosen, "fp8")
        except InputError as error:
            return cls(device, target, chosen, base, None, str(error))
        return cls(device, target, chosen, base)


def _target(device: str, gpu: tuple[str, str]) -> Target:
    from export import InputError, list_targets, load_target

    if device == "cpu":
        return load_target("cpu")
    name, capability = gpu
    fitting = [target for target in list_targets() if target.compute_capability == capability]
    if not fitting:
        raise InputError(
            f"there is no target of compute capability {capability} ({name}); add one to engines/targets/"
        )
    plain = name.lower().replace(" ", "")
    return next((target for target in fitting if target.name in plain), fitting[0])


@dataclass(frozen=True)
class BundleSpec:
    """What distinguishes the bundles of a case. Rungs with equal specs share a bundle."""

    precision: str
    sparse: bool
    light_vae: bool

    def name(self, case: Case, platform: Platform) -> str:
        """Folder name."""
        mode = (
            ("long" if case.is_long else "short")
            if self.sparse
            else ("dense-long" if case.is_long else "dense")
        )
        decoder = "light" if self.light_vae else "full"
        parts = (
            platform.backend,
            platform.target.name,
            self.precision,
            f"{case.height}x{case.width}",
            mode,
            decoder,
        )
        return "-".join((case.preset, *parts))

    def request(self, case: Case, platform: Platform, out: object, seed: int = 0) -> BuildRequest:
        """The build request, with random weights."""
        from pathlib import Path
        from typing import cast

        from export import BACKENDS, BuildRequest, Weights
        from runtime.bundle import BackendName, Precision

        backend = cast(BackendName, platform.backend) if platform.problem is None else "onnxruntime"
        preset = ladder_preset(case.preset, light_vae=self.light_vae)
        return BuildRequest(
            target=platform.target,
            variant=variant_for(case, platform.target, preset, sparse=self.sparse),
            weights=Weights(preset, seed=seed),
            height=case.height,
            width=case.width,
            backend=backend,
            execution=BACKENDS[backend].execution[0],
            precision=cast(Precision, self.precision),
            out=Path(str(out)),
            name=self.name(case, platform),
            command="python -m benchmarks.rollout",
        )


def bundle_spec(rung: Rung, platform: Platform) -> BundleSpec:
    """The bundle of an executor rung."""
    precision = "fp8" if rung.fp8 and platform.fp8_problem is None else platform.base_precision
    return BundleSpec(precision, rung.sparse, rung.light_vae)


def ladder_preset(name: str, *, light_vae: bool) -> Preset:
    """The preset with the full or the light decoder, and a text encoder too small to matter.

    Prompts enter as embeddings, as every rung takes them: the encoder is not part of what is measured, and the real
    one would add 11 GB to each bundle.
    """
    from lightforcing_ref.config import preset
    from lightforcing_ref.dimensions import VAEConfig
    from lightforcing_ref.text import UMT5_TINY

    model = preset(name)
    vae = VAEConfig(dim=DECODER_WIDTHS[name][light_vae])
    return replace(model, vae=vae, text=replace(UMT5_TINY, d_model=model.dit.text_dim, layers=1))


def variant_for(case: Case, target: Target, preset: Preset, *, sparse: bool) -> Variant:
    """The variant that a case runs: the target's own for short clips, a window of twelve frames for long ones.

    The dense one has the window and the blocks of the sparse one and keeps every block.
    """
    from export import load_variant

    variant = load_variant("long" if case.is_long else target.default_variant)
    if preset.block < 64:  # blocks that suit a GPU would be larger than a frame of a small model
        variant = load_variant("long" if case.is_long else "short").model_copy(update={"block": preset.block})
    return variant if sparse else variant.changed(target=0.0, keep_frames=max(1, variant.max_past_frames))


RESOLUTIONS: Mapping[str, Sequence[tuple[int, int]]] = MappingProxyType(
    {"tiny": ((128, 128),), "wan-1.3b": ((512, 768), (480, 832))}
)
"""Height and width in pixels that are measured by default."""
