# mypy: allow-untyped-calls, no-warn-return-any
"""The convolutions of a decoder, each in every form that gives the same result: which one a GPU's library does fastest.

`python -m benchmarks.lease.convolutions --out FOLDER` needs no bundle. Forms of one convolution over time and image:

- *channels second*: as PyTorch lays tensors out by itself; the library copies what it reads and what it writes.
- *channels last*: what packages do.
- *stacked frames*: the frames of one call are channels of one image, and the weight says which of them see each other.
  A third to a half of that weight is zeros; in return one convolution has several times the output channels, which
  a narrow decoder leaves tensor cores waiting for.

Each is timed with the engine that the library proposes and with the one that it finds fastest (*searched*).
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.timing import machine_facts, microseconds, write_json
from lightforcing_ref.decoders.tae import video_decoder
from lightforcing_ref.dimensions import DECODERS

__all__ = ["FORMS", "Convolution", "convolutions_of", "stacked_weight"]


@dataclass(frozen=True)
class Convolution:
    """Shapes of one: input `[N, C, ...]`, weight `[O, C, ...]`, and the padding along each axis of the kernel."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    padding: tuple[int, ...]

    @property
    def name(self) -> str:
        """Readable, and its own."""
        return f"{'x'.join(map(str, self.x))} by {'x'.join(map(str, self.weight))}"

    @property
    def is_stackable(self) -> bool:
        """Whether it spans several frames and images."""
        return len(self.weight) == 5 and self.weight[2] > 1


class _Seen(TorchDispatchMode):
    """Takes note of every convolution that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[Convolution] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.convolution.default:
            x, weight, _, _, padding = args[:5]
            self.counted[Convolution(tuple(x.shape), tuple(weight.shape), tuple(padding))] += 1
        return func(*args, **(kwargs or {}))


def convolutions_of(decoder: str, height: int, width: int) -> Counter[Convolution]:
    """Those of one later latent frame, with how often each occurs.

    Args:
        height, width: of the latent.
    """
    with torch.device("meta"):
        model = video_decoder(DECODERS[decoder])
        latent = torch.empty(model.config.z_dim, 1, height, width)
        caches = [torch.empty(spec.shape) for spec in model.cache_specs(height, width)]
    with torch.no_grad(), _Seen() as seen:
        model.decode_next(latent, caches)
    return seen.counted


def stacked_weight(weight: Tensor, frames: int) -> Tensor:
    """The weight over stacked frames of one `[O, C, k, kh, kw]` over time: `[frames O, (frames + k - 1) C, kh, kw]`."""
    out, inner, taps, *kernel = weight.shape
    stacked = weight.new_zeros(frames, out, frames + taps - 1, inner, *kernel)
    for frame in range(frames):
        stacked[frame, :, frame : frame + taps] = weight.transpose(1, 2)
    return stacked.reshape(frames * out, (frames + taps - 1) * inner, *kernel)


def _second(x: Tensor, weight: Tensor, padding: Sequence[int]) -> Callable[[], Tensor]:
    convolve = F.conv3d if weight.ndim == 5 else F.conv2d
    return lambda: convolve(x, weight, padding=tuple(padding))


def _last(x: Tensor, weight: Tensor, padding: Sequence[int]) -> Callable[[], Tensor]:
    form = torch.channels_last_3d if weight.ndim == 5 else torch.channels_last
    return _second(x.contiguous(memory_format=form), weight.contiguous(memory_format=form), padding)


def _stacked(x: Tensor, weight: Tensor, padding: Sequence[int]) -> Callable[[], Tensor]:
    frames = x.shape[2] - weight.shape[2] + 1
    images = x.transpose(1, 2).flatten(1, 2)
    run = _last(images, stacked_weight(weight, frames), padding[1:])
    return lambda: run().unflatten(1, (frames, -1)).transpose(1, 2)


FORMS = {"channels second": _second, "channels last": _last, "stacked frames": _stacked}
"""Form -> what makes a call of it from input, weight and padding; the same result in the same shape."""


def measure(convolution: Convolution, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Microseconds of each form, and how far its result is from that of the first."""
    generator = torch.Generator(device).manual_seed(0)
    x, weight = (
        torch.randn(shape, generator=generator, device=device, dtype=dtype)
        for shape in (convolution.x, convolution.weight)
    )
    weight /= weight[0].numel() ** 0.5
    found: dict[str, Any] = {}
    expected: Tensor | None = None
    for name, form in FORMS.items():
        if name == "stacked frames" and not convolution.is_stackable:
            continue
        for searched in (False, True):
            torch.backends.cudnn.benchmark = searched
            run = form(x, weight, convolution.padding)
            result = run().float()
            expected = result if expected is None else expected
            error = float((result - expected).norm() / expected.norm())
            key = f"{name}, searched" if searched else name
            found[key] = {"us": round(_time(run, device), 1), "error": float(f"{error:.2g}")}
            if device == "cpu":
                break
    return found


def _time(run: Callable[[], Tensor], device: str) -> float:
    if device == "cuda":
        return microseconds([run], repeats=5, target_us=2000)
    from torch.utils.benchmark import Timer

    return 1e6 * Timer("run()", globals={"run": run}).timeit(2).median


def main() -> int:
    """Measure all; the file is written anew after each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lease.convolutions", description=__doc__)
    parser.add_argument("--decoder", choices=sorted(DECODERS), default="light")
    parser.add_argument("--latent", type=int, nargs=2, default=(64, 96), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    args = parser.parse_args()
    dtype = torch.float16 if args.device == "cuda" else torch.float32
    rows: list[dict[str, Any]] = []
    totals: Counter[str] = Counter()
    for convolution, count in convolutions_of(args.decoder, *args.latent).items():
        row: dict[str, Any] = {"name": convolution.name, "count": count}
        try:
            row["forms"] = measure(convolution, args.device, dtype)
        except RuntimeError as error:  # a form that the library refuses must not cost the other convolutions
            row["problem"] = str(error)[:300]
        rows.append(row)
        forms = {name: form["us"] for name, form in row.get("forms", {}).items()}
        for name in ("channels second", "channels last", "channels last, searched"):
            totals[name] += round(count * forms.get(name, 0))
        totals["best of each"] += round(count * min(forms.values(), default=0))
        result = {"machine": machine_facts(), "decoder": args.decoder, "frame_us": dict(totals), "rows": rows}
        write_json(args.out / "convolutions.json", result)
        print(f"{count} x {convolution.name}: {forms or row['problem']}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
