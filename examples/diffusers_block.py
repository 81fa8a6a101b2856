"""A bundle as a block of Diffusers' modular pipelines, so that other blocks can come before and after it.

pip install diffusers; python examples/diffusers_block.py engines/built/demo
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam

from runtime import Pipeline

PROMPT = "a red circle on grey orbits clockwise from the top"


class LightForcingBlock(ModularPipelineBlocks):  # type: ignore[misc]
    """From `prompt`, `seed` and `seconds` to `videos`, uint8 [frames, height, width, 3]."""

    model_name = "light-forcing"

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__()
        self._pipeline = pipeline

    def __deepcopy__(self, memo: dict[int, Any]) -> LightForcingBlock:
        # Diffusers copies its blocks; the loaded bundle is shared.
        return LightForcingBlock(self._pipeline)

    @property
    def description(self) -> str:
        return "Generates a clip with a bundle of Light Forcing."

    @property
    def inputs(self) -> list[Any]:
        return [
            InputParam("prompt", type_hint=str, required=True, description="what the video shows"),
            InputParam("seed", type_hint=int, default=0, description="of the noise"),
            InputParam(
                "seconds", type_hint=float, default=5.0, description="length, rounded up to whole chunks"
            ),
        ]

    @property
    def intermediate_outputs(self) -> list[Any]:
        return [OutputParam("videos", type_hint=np.ndarray, description="frames of the clip")]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block = self.get_block_state(state)
        with self._pipeline.session(block.prompt, seed=block.seed) as session:
            block.videos = np.concatenate([chunk.frames for chunk in session.stream(seconds=block.seconds)])
        self.set_block_state(state, block)
        return components, state


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    with Pipeline.load(options.bundle) as pipeline:
        pipe = LightForcingBlock(pipeline).init_pipeline()
        videos = pipe(prompt=PROMPT, seconds=options.seconds, output="videos")
        print(videos.shape, videos.dtype)


if __name__ == "__main__":
    main()
