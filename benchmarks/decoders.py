"""Video decoders side by side, in one run on the CPU: `python -m benchmarks.decoders --decoder NAME[=FILE] --out FILE`.

Files are decoders of the shipped tiny model's latents. Clips are encoded by the latents' basis and streamed through
each decoder in turn. Figures are seconds for each frame of video (the fastest of several rounds, and only good as
ratios of one run), PSNR against the true frames and against the first decoder's, and what memory each takes: weights,
caches of a stream, and by how much the resident memory of a process of its own grows while it decodes.

A decoder that is only named (`--decoder tae`) has random weights: the clips are then noise, and there is no PSNR.

What this shows: what one decoder costs beside another. What it cannot show: quality on natural video; and a bundle's
engines compute the same in other kernels.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from lightforcing_ref.decoders.tae import VideoDecoder

__all__ = ["main"]

WEIGHTS = Path(__file__).parents[1] / "lightforcing_ref" / "assets" / "tiny"
PROBED = 3
"""Latent frames that a process decodes to find out what memory it takes."""


@dataclass
class Row:
    """What a decoder costs and gives.

    Attributes:
        peak_bytes: by which a process grows while it decodes, weights not included; None = this system does not say.
        seconds_per_frame: of video.
        psnr: against the true frames, in dB; None = random weights.
        psnr_to_first: against the first decoder's frames; None = random weights, or it is the first.
    """

    name: str
    weights_bytes: int
    cache_bytes: int
    peak_bytes: int | None
    seconds_per_frame: float = 0.0
    psnr: float | None = None
    psnr_to_first: float | None = None
    seconds: list[float] = field(default_factory=list)


def _decoder(asked: str) -> VideoDecoder:
    """The decoder of `NAME` or `NAME=FILE`."""
    import torch

    from lightforcing_ref.checkpoint import load_vae_state, vae_config_of
    from lightforcing_ref.decoders.tae import video_decoder
    from lightforcing_ref.dimensions import DECODERS
    from training.stages.decoder import use_planar_convolutions

    name, _, file = asked.partition("=")
    if not file and name not in DECODERS:
        raise ValueError(f"unknown decoder {name!r}; expected NAME=FILE or one of {', '.join(DECODERS)}")
    torch.manual_seed(0)
    config = vae_config_of(file) if file else DECODERS[name]
    decoder = video_decoder(config)
    if file:
        decoder.load_state_dict(load_vae_state(file, config, dtype=torch.float32))
    use_planar_convolutions(decoder)  # else Wan's would be timed in PyTorch's slow 3-D convolutions
    return decoder.eval().requires_grad_(False)


def _streamed(decoder: VideoDecoder, latents: Tensor) -> NDArray[np.uint8]:
    """Frames uint8 `[N, H, W, 3]` of latents `[F, 16, h, w]`, one latent frame at a time."""
    import numpy as np
    import torch

    from lightforcing_ref.decoders.vae import to_uint8

    with torch.inference_mode():
        video, caches = decoder.decode_first(latents[:1].transpose(0, 1))
        parts = [to_uint8(video).numpy()]
        for latent in latents[1:]:
            video, caches = decoder.decode_next(latent[:, None], caches)
            parts.append(to_uint8(video).numpy())
    return np.concatenate(parts)


def _peak(asked: str, height: int, width: int) -> int | None:
    """Bytes by which this process grows while it decodes latents of that size; None where that cannot be told."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    import torch

    torch.set_num_threads(1)
    decoder = _decoder(asked)
    latents = torch.randn(PROBED, 16, height, width)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _streamed(decoder, latents)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return grown * (1 if sys.platform == "darwin" else 1024)


def _clips(count: int, frames: int) -> list[tuple[NDArray[np.uint8], Tensor]]:
    """True frames, and their latents `[frames, 16, h, w]`."""
    import numpy as np
    import torch

    from training.data.clips import random_clip
    from training.data.latents import PatchPCA

    pca, generator = PatchPCA.load(WEIGHTS / "latents.safetensors"), np.random.default_rng([0, 17])
    shown = [random_clip(generator, held_out=True).render(0, 1 + 4 * (frames - 1)) for _ in range(count)]
    return [(clip, torch.from_numpy(pca.encode(clip))) for clip in shown]


def _mean_psnr(found: Sequence[NDArray[np.uint8]], expected: Sequence[NDArray[np.uint8]]) -> float:
    from .quality.scores import psnr

    return statistics.mean(psnr(one, other) for one, other in zip(found, expected, strict=True))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decoders",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--decoder", action="append", required=True, metavar="NAME[=FILE]", help="may be given several times"
    )
    parser.add_argument("--resolution", default="128x128", help="of decoders with random weights")
    parser.add_argument("--clips", type=int, default=6)
    parser.add_argument("--frames", type=int, default=21, help="latent frames of a clip")
    parser.add_argument("--rounds", type=int, default=3, help="how often each decoder is timed, in turns")
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    return parser


def _measured(options: argparse.Namespace) -> list[Row]:
    import torch

    asked: list[str] = options.decoder
    trained = all("=" in one for one in asked)
    decoders = [_decoder(one) for one in asked]
    height, width = (int(size) // 8 for size in options.resolution.split("x"))
    if trained:
        clips = _clips(options.clips, options.frames)
        height, width = clips[0][1].shape[2:]
    latents = [clip[1] for clip in clips] if trained else [torch.randn(options.frames, 16, height, width)]
    rows = []
    for one, decoder in zip(asked, decoders, strict=True):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            peak = pool.submit(_peak, one, height, width).result()
        weights = sum(4 * value.numel() for value in decoder.state_dict().values())
        caches = sum(4 * torch.Size(spec.shape).numel() for spec in decoder.cache_specs(height, width))
        rows.append(Row(one.partition("=")[0], weights, caches, peak))
    made: list[list[NDArray[np.uint8]]] = [[] for _ in rows]
    for _ in range(options.rounds):
        for index, decoder in enumerate(decoders):
            begin = time.perf_counter()
            made[index] = [_streamed(decoder, one) for one in latents]
            rows[index].seconds.append((time.perf_counter() - begin) / sum(map(len, made[index])))
    for row, films in zip(rows, made, strict=True):
        row.seconds_per_frame = min(row.seconds)
        if trained:
            row.psnr = _mean_psnr(films, [clip[0] for clip in clips])
            row.psnr_to_first = _mean_psnr(films, made[0]) if films is not made[0] else None
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = _parser().parse_args(arguments)

    import torch

    from lightforcing_ref.errors import CheckpointError

    torch.set_num_threads(1)
    try:
        rows = _measured(options)
    except (CheckpointError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    document = {
        "schema_version": 1,
        "resolution": options.resolution,
        "clips": options.clips,
        "frames": options.frames,
        "rounds": options.rounds,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "date": datetime.now(UTC).date().isoformat(),
        "rows": [asdict(row) for row in rows],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(
        "| decoder | time, of the first's | weights, MB | caches, MB | peak, MB | PSNR, dB | to the first, dB |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        sizes = (row.weights_bytes, row.cache_bytes, row.peak_bytes)
        cells = [f"{row.seconds_per_frame / rows[0].seconds_per_frame:.2f}"]
        cells += ["-" if size is None else f"{size / 1e6:.2f}" for size in sizes]
        cells += ["-" if signal is None else f"{signal:.1f}" for signal in (row.psnr, row.psnr_to_first)]
        print(f"| {row.name} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
