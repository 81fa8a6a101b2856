"""Stream to a video file, and switch the prompt on the way.

python examples/stream_to_file.py engines/built/demo clip.mp4 --switch-at 2
"""

from __future__ import annotations

import argparse
from pathlib import Path

from runtime import Pipeline, open_video


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("out", type=Path, help="an .mp4, .mov or .mkv file")
    parser.add_argument("--first", default="a red circle on grey grows at the centre")
    parser.add_argument("--then", default="a blue square on grey moves right from the left")
    parser.add_argument("--switch-at", type=int, default=2, metavar="CHUNK")
    parser.add_argument("--seconds", type=float, default=5)
    options = parser.parse_args()

    with Pipeline.load(options.bundle) as pipeline, pipeline.session(options.first) as session:
        model = pipeline.manifest.model
        stream = session.stream(seconds=options.seconds)
        applies = session.set_prompt(options.then, at=options.switch_at)
        with open_video(
            options.out, fps=model.fps, height=model.video_height, width=model.video_width
        ) as video:
            for chunk in stream:
                video.write(chunk.frames)
    print(f"{options.out}: {stream.frames} frames, the second prompt from chunk {applies} on")


if __name__ == "__main__":
    main()
