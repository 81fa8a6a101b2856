"""What a build request means in numbers: geometry, budgets, cache, schedule. Checked before any long work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightforcing_ref.cache import AttentionSpec
from lightforcing_ref.config import Preset
from lightforcing_ref.errors import ConfigError
from lightforcing_ref.rope import rope_axes
from lightforcing_ref.schedule import FlowSchedule
from lightforcing_ref.sparsity import BlockGeometry, HSAConfig, SparsityTable
from runtime import bundle
from runtime.bundle.policies import StaPolicy, has_linear_branch, persistent_frames, stated_window

from .methods import attends
from .targets import Variant

__all__ = ["StepPlan"]


@dataclass(frozen=True)
class StepPlan:
    """Everything about one variant of one model at one resolution that its graphs and its manifest depend on."""

    preset: Preset
    variant: Variant
    height: int
    width: int
    geometry: BlockGeometry
    table: SparsityTable
    spec: AttentionSpec
    schedule: FlowSchedule

    @classmethod
    def of(
        cls, preset: Preset, variant: Variant, height: int, width: int, *, block_q: int, block_k: int
    ) -> StepPlan:
        """Resolve a variant for a preset.

        Raises:
            ConfigError: the resolution does not divide, the sparsity has no exact fixed-point form, or the method
                does not fit the model's heads.
        """
        geometry = BlockGeometry(preset.frame_tokens(height, width), block_q, block_k)
        table, method = variant.table(), variant.attention
        if isinstance(method, StaPolicy) and len(method.windows) not in (1, preset.dit.heads):
            raise ConfigError(
                f"the variant {variant.name} has {len(method.windows)} windows; expected one, or one for each of the "
                f"{preset.dit.heads} heads of {preset.name}"
            )
        schedule = variant.schedule.resolved()
        resident = range(schedule.chunk_frames, variant.window_frames + 1)
        spec = AttentionSpec(
            heads=preset.dit.heads,
            geometry=geometry,
            hsa=HSAConfig(*variant.frame_choice),
            keep_q20=table.keep_q20(frames * geometry.k_blocks for frames in resident),
            scale=preset.dit.head_dim**-0.5,
            kv=variant.cache.kv,
            products=variant.products,
            persistent_frames=persistent_frames(method),
            linear_branch=has_linear_branch(method),
        )
        return cls(preset, variant, height, width, geometry, table, spec, schedule)

    @property
    def chunk_frames(self) -> int:
        """Latent frames of a chunk."""
        return self.schedule.chunk_frames

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a chunk."""
        return self.chunk_frames * self.geometry.frame_tokens

    @property
    def latent_size(self) -> tuple[int, int]:
        """Latent (height, width)."""
        return self.preset.latent_size(self.height, self.width)

    @property
    def max_past_frames(self) -> int:
        """Frame slots of a rollout: what the window holds besides the current chunk."""
        return self.variant.max_past_frames

    def past_frames(self, chunk: int) -> int:
        """Past frames that are resident when `chunk` runs."""
        return min(chunk * self.chunk_frames, self.max_past_frames)

    def attends(self, kernels: Mapping[str, Callable[..., Any]]) -> list[Callable[..., Any]]:
        """The attention of every layer, made of one kernel for each attention operator."""
        columns = self.preset.token_grid(self.height, self.width)[1]
        return attends(self.variant.attention, self.preset.dit.layers, columns, kernels)

    @property
    def planned_chunks(self) -> int:
        """Chunks of the clip that the sparsity table was planned for."""
        return self.variant.sparsity.table_frames // self.chunk_frames

    def manifest_sections(self) -> dict[str, Any]:
        """The manifest's model, schedule, attention, sparsity and cache sections."""
        dit, policy, cache = self.preset.dit, self.variant.sparsity, self.variant.cache
        latent_height, latent_width = self.latent_size
        return {
            "model": bundle.Model(
                preset=self.preset.name,
                layers=dit.layers,
                heads=dit.heads,
                head_dim=dit.head_dim,
                dim=dit.dim,
                latent_channels=dit.channels,
                latent_height=latent_height,
                latent_width=latent_width,
                patch=dit.patch,
                chunk_frames=self.chunk_frames,
                frame_tokens=self.geometry.frame_tokens,
                rope=bundle.Rope(theta=dit.rope_theta, dims_thw=rope_axes(dit.head_dim)),
                video_height=self.height,
                video_width=self.width,
                fps=self.preset.fps,
            ),
            "schedule": bundle.Schedule(
                timesteps=self.schedule.timesteps,
                sigmas=self.schedule.sigmas,
                first_timesteps=self.schedule.first_timesteps,
                first_sigmas=self.schedule.first_sigmas,
                clean_forward=self.schedule.clean_forward,
                rolling=self.variant.schedule.rolling,
            ),
            "attention": bundle.Attention(
                block_q=self.geometry.block_q,
                block_k=self.geometry.block_k,
                keep_frames=self.spec.hsa.keep_frames,
                sink_frames=self.spec.hsa.sink_frames,
                near_frames=self.spec.hsa.near_frames,
                scale=self.spec.scale,
                eps=self.preset.dit.eps,
                method=self.variant.attention,
                products=self.variant.products,
            ),
            "sparsity": bundle.Sparsity(
                table_frames=policy.table_frames,
                target=policy.target,
                base=policy.base,
                values=self.table.values,
                keep_q20=self.spec.keep_q20,
            ),
            "cache": bundle.Cache(
                window_frames=stated_window(self.variant.attention, cache.sink_frames, cache.window_frames),
                max_past_frames=self.max_past_frames,
                sink_frames=cache.sink_frames,
                sink_positions=cache.sink_positions,
                recache=cache.recache,
                flush_frames=cache.flush_frames,
                cut_frames=cache.cut_frames,
                kv=cache.kv,
            ),
        }

    def fingerprint(self) -> Sequence[object]:
        """What distinguishes this plan's graphs from another's."""
        return (
            self.preset,
            self.variant.model_dump(),
            self.height,
            self.width,
            self.geometry,
            self.spec,
            self.schedule,
        )
