"""`python -m runtime generate`: a clip from a prompt, as a video file and a contact sheet."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from runtime.bundle import Manifest, Model
from runtime.errors import InputError
from runtime.files import atomic_output
from runtime.pipeline import Pipeline
from runtime.rollout import most_start_frames
from runtime.scheduler import ChunkTimes
from runtime.session import ChunkStream, Session
from runtime.terminal import console
from runtime.video import VIDEO_SUFFIXES, check_output, open_video, read_frames, write_contact_sheet

__all__ = ["load_options", "parse_switch", "read_prompt", "run_generate"]

_SWITCH = re.compile(r"\s*(\d+)\s*:(.*)", re.DOTALL)
_SHEET_FRAMES = 12


def parse_switch(text: str) -> tuple[int, str]:
    """Parse `"12: prompt"` into chunk index and prompt."""
    match = _SWITCH.fullmatch(text)
    if match is None:
        raise InputError(
            f"--switch is {text!r}; expected a chunk index, a colon and a prompt, such as '12: rain'"
        )
    return int(match[1]), match[2].strip()


def read_prompt(options: argparse.Namespace) -> dict[str, Any]:
    """The prompt, or the embedding read from its file, as keyword arguments of `Pipeline.session`."""
    if options.embedding is None:
        return {"prompt": options.prompt}
    return {"embedding": _read_array("--embedding", options.embedding)}


def load_options(options: argparse.Namespace) -> dict[str, Any]:
    """How the bundle is loaded, as keyword arguments of `Pipeline.load`."""
    return {
        "threads": options.threads,
        "verify": not options.no_verify,
        "golden": not options.no_golden,
        "expected": options.expect,
    }


def _read_array(option: str, path: str) -> NDArray[Any]:
    try:
        found = np.load(path, allow_pickle=False, mmap_mode="r")
    except (OSError, ValueError, EOFError, SyntaxError, MemoryError) as error:
        raise InputError(f"{option} {path!r} cannot be read: {error}; expected a .npy file") from error
    if not isinstance(found, np.ndarray):
        raise InputError(f"{option} {path!r} holds several arrays; expected a .npy file, which holds one")
    return found


def run_generate(options: argparse.Namespace, notes: Console, written: list[str]) -> None:
    """Generate the clip and print a closing table. Arguments are checked before any work starts.

    `written` gets the names of the files once they are there.
    """
    check_output(options.out, VIDEO_SUFFIXES)
    if options.contact_sheet is not None:
        check_output(options.contact_sheet, (".png",))
    if options.latents is not None:
        check_output(options.latents, (".npy",))
    noise = None if options.noise_file is None else _read_array("--noise-file", options.noise_file)
    switches = [parse_switch(text) for text in options.switch]
    prompt = read_prompt(options)
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=notes,
    )
    with progress:
        loading = progress.add_task("load bundle", total=1)
        verified = partial(_show_verified, progress, loading)
        with Pipeline.load(options.bundle, golden_progress=verified, **load_options(options)) as pipeline:
            progress.update(loading, description="load bundle", completed=1, total=1)
            keeps = options.latents is not None
            if options.start is not None:
                prompt["start"] = _read_start(options.start, pipeline.manifest)
            with pipeline.session(seed=options.seed, noise=noise, latents=keeps, **prompt) as session:
                stream = session.stream(seconds=options.seconds)
                if noise is not None and stream.chunks is not None and stream.chunks > len(noise):
                    raise InputError(
                        f"--noise-file holds the noise of {len(noise)} chunks, and {options.seconds:g} s are "
                        f"{stream.chunks}; shorten --seconds"
                    )
                for index, text in switches:
                    _schedule_switch(session, stream, index, text, options)
                task = progress.add_task("generate frames", total=stream.frames)
                start = time.perf_counter()
                chunks = _record(
                    stream,
                    pipeline.manifest.model,
                    options,
                    written,
                    lambda count: progress.advance(task, count),
                )
                seconds = time.perf_counter() - start
            fps = pipeline.manifest.model.fps
    console().print(_summary(chunks, seconds, fps, " and ".join(written)))


def _show_verified(progress: Progress, task: TaskID, case: str, done: int, total: int) -> None:
    """Verification takes a while, but only when a bundle is loaded on this machine for the first time."""
    progress.update(task, description=f"verify {case}", completed=done, total=total)


def _read_start(path: str, manifest: Manifest) -> NDArray[np.uint8]:
    model = manifest.model
    most = most_start_frames(manifest)
    return read_frames(path, height=model.video_height, width=model.video_width, last=most)


def _schedule_switch(
    session: Session, stream: ChunkStream, index: int, text: str, options: argparse.Namespace
) -> None:
    assert stream.chunks is not None
    if index >= stream.chunks:
        raise InputError(
            f"--switch names chunk {index}, but {options.seconds:g} s are {stream.chunks} chunks, "
            f"0 to {stream.chunks - 1}"
        )
    session.set_prompt(text, recache=options.recache, at=session.given + index)


@contextmanager
def _noting(path: str, written: list[str]) -> Iterator[None]:
    """Note a file that a block inside of this one completes."""
    yield
    written.append(path)


def _record(
    stream: ChunkStream,
    model: Model,
    options: argparse.Namespace,
    written: list[str],
    advance: Callable[[int], None],
) -> list[ChunkTimes]:
    """Write the stream to the video file, and frames spread over it to the contact sheet."""
    assert stream.frames is not None
    picked = set(np.linspace(0, stream.frames - 1, _SHEET_FRAMES).round().astype(int).tolist())
    sheet: list[NDArray[np.uint8]] = []
    times: list[ChunkTimes] = []
    latents: list[NDArray[np.float32]] = []
    shown = 0
    size = {"height": model.video_height, "width": model.video_width}
    with ExitStack() as stack:
        # Opened first, hence renamed last: if the video fails, there is no contact sheet either.
        latents_file = sheet_file = None
        if options.latents:
            stack.enter_context(_noting(options.latents, written))
            latents_file = stack.enter_context(atomic_output(options.latents))
        if options.contact_sheet:
            stack.enter_context(_noting(options.contact_sheet, written))
            sheet_file = stack.enter_context(atomic_output(options.contact_sheet))
        stack.enter_context(_noting(options.out, written))
        video = stack.enter_context(open_video(options.out, fps=model.fps, **size))
        for chunk in stream:
            video.write(chunk.frames)
            sheet += [frame for number, frame in enumerate(chunk.frames, shown) if number in picked]
            times.append(ChunkTimes.of(chunk))
            latents += [] if chunk.latent is None else [chunk.latent]
            shown += len(chunk.frames)
            advance(len(chunk.frames))
        if sheet_file is not None:
            write_contact_sheet(sheet_file, sheet)
        if latents_file is not None:
            with latents_file.open("wb") as file:
                np.save(file, np.concatenate(latents, axis=1))
    return times


def _summary(chunks: list[ChunkTimes], seconds: float, fps: int, title: str) -> Table:
    frames = sum(chunk.frames for chunk in chunks)
    table = Table(title=escape(title), show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("frames", f"{frames} ({frames / fps:.2f} s at {fps} FPS)")
    table.add_row("time", f"{seconds:.2f} s")
    table.add_row("FPS", f"{frames / seconds:.2f}")
    for name in ("denoise", "decode", "other", "latency"):
        average = mean(getattr(chunk, name) for chunk in chunks)
        table.add_row(f"{name} per chunk", f"{1000 * average:.1f} ms")
    return table
