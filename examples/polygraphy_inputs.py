"""Inputs of a bundle's step for Polygraphy, which would draw random integers where frame slots are asked for.

In the bundle's folder: polygraphy run step.onnx --onnxrt --data-loader-script .../examples/polygraphy_inputs.py
`LIGHTFORCING_BUNDLE` names another folder, `LIGHTFORCING_COMPONENT` another component than the step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime import load_bundle

CHUNK = 1
"""The second chunk of a rollout: some frames are in the cache, and the table is sparse from there on."""


def load_data() -> Iterator[dict[str, NDArray[Any]]]:
    """One set of inputs: normal numbers, valid slots for the frames of one chunk, the first denoising step."""
    bundle = load_bundle(os.environ.get("LIGHTFORCING_BUNDLE", "."), verify=False)
    component = bundle.component(os.environ.get("LIGHTFORCING_COMPONENT", "step"))
    slots, past = bundle.manifest.cache.max_past_frames, bundle.manifest.model.chunk_frames
    generator = np.random.default_rng(0)
    inputs = {}
    for spec in component.inputs:
        shape = [slots if size == "slots" else int(size) for size in spec.shape]
        dtype = np.dtype(spec.dtype)
        if spec.name == "frame_slots":
            inputs[spec.name] = np.where(np.arange(slots) < past, np.arange(slots), -1).astype(dtype)
        elif spec.name == "chunk":
            inputs[spec.name] = np.full(shape, CHUNK, dtype)
        elif np.issubdtype(dtype, np.integer):
            inputs[spec.name] = np.zeros(shape, dtype)
        else:
            inputs[spec.name] = generator.standard_normal(shape, np.float32).astype(dtype)
    yield inputs


if __name__ == "__main__":
    for name, array in next(load_data()).items():
        print(name, array.dtype, array.shape)
