"""A node for ComfyUI: copy this file into custom_nodes/, in an environment with the runtime.

"Light Forcing: generate" takes the folder of a bundle and a prompt, and gives images for any node that takes some.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, ClassVar

from runtime import Pipeline

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]


class LightForcingGenerate:
    """Generates a clip; the pipeline stays loaded as long as the same bundle is asked for."""

    CATEGORY = "video/light forcing"
    FUNCTION = "generate"
    RETURN_TYPES = ("IMAGE", "INT")
    RETURN_NAMES = ("images", "fps")
    _loaded: ClassVar[tuple[str, Pipeline] | None] = None

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        return {
            "required": {
                "bundle": ("STRING", {"default": "engines/built/demo"}),
                "prompt": ("STRING", {"multiline": True, "default": ""}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1}),
                "seconds": ("FLOAT", {"default": 5.0, "min": 0.5, "max": 60.0, "step": 0.5}),
            }
        }

    def generate(self, bundle: str, prompt: str, seed: int, seconds: float) -> tuple[Any, int]:
        """The clip as ComfyUI's images, float32 [frames, height, width, 3] from 0 to 1, and its frames per second."""
        import numpy as np
        import torch

        pipeline = self._pipeline(bundle)
        with pipeline.session(prompt, seed=seed) as session:
            clip = np.concatenate([chunk.frames for chunk in session.stream(seconds=seconds)])
        return torch.from_numpy(clip).float().div_(255), round(pipeline.manifest.model.fps)

    @classmethod
    def _pipeline(cls, bundle: str) -> Pipeline:
        if cls._loaded is None or cls._loaded[0] != bundle:
            if cls._loaded is not None:
                cls._loaded[1].close()
            cls._loaded = bundle, Pipeline.load(bundle)
        return cls._loaded[1]


NODE_CLASS_MAPPINGS = {"LightForcingGenerate": LightForcingGenerate}
NODE_DISPLAY_NAME_MAPPINGS = {"LightForcingGenerate": "Light Forcing: generate"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the node once, without ComfyUI.")
    parser.add_argument("bundle", type=Path)
    options = parser.parse_args()
    images, fps = LightForcingGenerate().generate(str(options.bundle), "a red fox", 0, 1.0)
    print(tuple(images.shape), images.dtype, float(images.max()) <= 1, fps)


if __name__ == "__main__":
    main()
