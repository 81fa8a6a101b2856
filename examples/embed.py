"""Embed the runtime in a program: load a bundle, take frames as they come, and know what each chunk cost.

python examples/embed.py engines/built/demo --chunks 2
"""

from __future__ import annotations

import argparse
from pathlib import Path

from runtime import Pipeline

PROMPT = "a red circle on grey orbits clockwise from the top"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunks", type=int, default=3)
    options = parser.parse_args()

    with (
        Pipeline.load(options.bundle, progress=lambda stage: print(f"loading: {stage}")) as pipeline,
        pipeline.session(options.prompt, seed=options.seed) as session,
    ):
        for chunk in session.stream(chunks=options.chunks):
            # uint8 [frames, height, width, 3], yours to keep.
            print(f"chunk {chunk.index}: {chunk.frames.shape} after {chunk.latency:.3f} s")


if __name__ == "__main__":
    main()
