"""A bundle behind a Gradio page: the video appears frame by frame while it is made.

pip install gradio; python examples/gradio_app.py engines/built/demo
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime import Pipeline

PROMPT = "a red circle on grey orbits clockwise from the top"


def frames(pipeline: Pipeline, prompt: str, seed: float, seconds: float) -> Iterator[Any]:
    """Every frame of a clip as soon as its chunk is there; uint8 [height, width, 3]."""
    with pipeline.session(prompt, seed=int(seed)) as session:
        for chunk in session.stream(seconds=seconds):
            yield from chunk.frames


def page(pipeline: Pipeline) -> Any:
    """The page, as Gradio's `Interface`."""
    import gradio

    def generate(prompt: str, seed: float, seconds: float) -> Iterator[Any]:
        yield from frames(pipeline, prompt, seed, seconds)

    return gradio.Interface(
        generate,
        [
            gradio.Textbox(PROMPT, label="prompt"),
            gradio.Number(0, label="seed", precision=0),
            gradio.Slider(1, 15, 5, label="seconds"),
        ],
        gradio.Image(label="frame"),
        title=pipeline.manifest.name,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--count", type=int, help="print how many frames a second of video has, and open no page"
    )
    options = parser.parse_args()
    with Pipeline.load(options.bundle) as pipeline:
        if options.count is not None:
            print(sum(1 for _ in frames(pipeline, PROMPT, 0, options.count)))
            return
        page(pipeline).launch(server_name="127.0.0.1")


if __name__ == "__main__":
    main()
