"""A loaded bundle: its engines, its pool of frame slots, and the workers that serve its sessions."""

from __future__ import annotations

import ctypes
import logging
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Literal, Self, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from runtime.host.onnxruntime import check_threads
from runtime.program.buffers import BufferPlan, check_memory, plan_buffers

from .backends import load_engine, runs_on_host
from .bundle import Bundle, Manifest, load_bundle
from .engine import Engine
from .errors import CapacityError, ClosedError, EngineError, InputError
from .host_memory import memory
from .noise import NoiseSource, check_seed
from .rollout import PromptSwitch, Rollout, rollout_kind, start_clip
from .saved.file import SavedSession
from .saved.lanes import revive
from .scheduler import ChunkStarted, Lane, Scheduler
from .session import Session
from .text import TextEncoder, check_embedding
from .verify import ensure_verified, require_fit

__all__ = ["Health", "LoadStage", "Pipeline", "TextEncoderMode"]

_log = logging.getLogger(__name__)

_MAX_SESSIONS = 65_536

LoadStage = Literal["files", "engines", "golden", "warmup", "ready"]

TextEncoderMode = Literal["auto", "on-demand", "resident", "external"]
_TEXT_ENCODER_MODES: tuple[TextEncoderMode, ...] = get_args(TextEncoderMode)
_STAYS: dict[TextEncoderMode, bool | None] = {"auto": None, "on-demand": False, "resident": True}


@dataclass(frozen=True)
class Health:
    """State of a pipeline. `alive`: its workers run and take sessions.

    `waiting` sessions have a chunk that may start and has not; `decoding` chunks wait for the decoder.
    """

    alive: bool
    sessions: int
    open: int
    waiting: int
    decoding: int


class Pipeline:
    """Serves rollouts of one bundle. Create it with `load`; close it, or use it in a `with` statement."""

    def __init__(
        self, bundle: Bundle, plan: BufferPlan, engine: Engine, text_encoder: TextEncoder | None
    ) -> None:
        self._bundle = bundle
        self._plan = plan
        self._engine = engine
        self._text_encoder = text_encoder
        self._scheduler = Scheduler()
        self._lock = threading.Lock()
        self._free = list(range(plan.sessions))
        self._forgotten: deque[Callable[[], None]] = deque()
        self._closed = False
        # Runs when the pipeline is dropped, and before the interpreter ends: workers that are still in a library's code
        # then would abort the process.
        self._finalizer = weakref.finalize(self, _shut, self._scheduler, text_encoder, engine)
        _in_children.add(self)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        sessions: int = 1,
        warmup: bool = True,
        threads: int | None = None,
        text_encoder: TextEncoderMode = "auto",
        verify: bool = True,
        golden: bool = True,
        expected: str | None = None,
        memory_limit: int | None = None,
        graphs: bool = True,
        device: int = 0,
        progress: Callable[[LoadStage], None] | None = None,
        golden_progress: Callable[[str, int, int], None] | None = None,
        engine: Engine | None = None,
    ) -> Pipeline:
        """Load a bundle for up to `sessions` rollouts at a time.

        Args:
            path: folder of the bundle.
            sessions: how many sessions may be open at once; each has its own cache.
            warmup: run every engine once now, so that the first chunk costs what the others do.
            threads: CPU threads per forward; by default `OMP_NUM_THREADS`, else all cores.
            text_encoder: read its weights for each prompt (`"on-demand"`), keep them in main memory after the first
                (`"resident"`), keep them where they take at most half of what is free (`"auto"`), or do without it
                (`"external"`: sessions then take embeddings only).
            verify: check the SHA-256 of every file that was not hashed before, or was changed since.
            golden: on a GPU that has not passed the bundle's golden vectors yet, run them first.
            expected: SHA-256 of the manifest, 64 hex digits: the bundle is this one, or is refused. It covers every
                file, all of which are read, whatever was recorded of them.
            memory_limit: bytes the pipeline may use; by default what is free, on the GPU for a GPU's bundle.
            graphs: replay CUDA graphs; without them, every operation is enqueued anew, with the same results and
                slower, for measurements and debuggers. On the host it changes nothing.
            device: number of the CUDA device that a GPU's bundle runs on, of those that the process sees.
            progress: called as each stage begins: `"files"` (reading and checking them), `"engines"`, `"golden"`
                (verification), `"warmup"`, `"ready"`.
            golden_progress: called while a bundle is verified on its first load, with a golden case, the cases done
                and their number.
            engine: executes the bundle in place of the one that its backend has; made for as many sessions, and closed
                with the pipeline, or where loading fails after it was taken. Memory is its maker's affair then, and
                `threads`, `graphs`, `device` and `memory_limit` say nothing.

        Raises:
            BundleError: the bundle is missing, incomplete, changed, or of a newer schema.
            CapacityError: it does not fit into memory; raised before anything is allocated.
            EngineError: an engine does not load, or computes something else than it should.
            InputError: an argument is out of range.
        """
        check_threads(threads)
        if isinstance(sessions, bool) or not isinstance(sessions, int) or not 1 <= sessions <= _MAX_SESSIONS:
            raise InputError(f"sessions is {sessions!r}; expected a whole number, 1 to {_MAX_SESSIONS}")
        if isinstance(device, bool) or not isinstance(device, int) or device < 0:
            raise InputError(f"device is {device!r}; expected the number of a CUDA device, from 0 on")
        if text_encoder not in _TEXT_ENCODER_MODES:
            raise InputError(
                f"text_encoder is {text_encoder!r}; expected one of {', '.join(_TEXT_ENCODER_MODES)}"
            )
        stage = _stages(progress)
        stage("files")
        bundle = load_bundle(path, verify=verify, expected=expected)
        if device and runs_on_host(bundle):
            raise InputError(
                f"device is {device}, and bundle {bundle.manifest.name!r} runs on the CPU; leave device out"
            )
        plan = require_fit(bundle, sessions) if engine is None else plan_buffers(bundle.manifest, sessions)
        if engine is None:
            free = _free_memory(bundle, device) if memory_limit is None else memory_limit
            check_memory(bundle, plan, free)
            stage("engines")
            engine = load_engine(bundle, plan, threads=threads, graphs=graphs, device=device)
        encoder = None
        try:
            if golden:
                stage("golden")
                ensure_verified(bundle, engine, golden_progress)
            if text_encoder != "external":
                encoder = TextEncoder(bundle, engine, resident=_STAYS[text_encoder])
            if warmup:
                stage("warmup")
                engine.warmup()
            stage("ready")
        except BaseException:
            if encoder is not None:
                encoder.close()
            engine.close()
            raise
        return cls(bundle, plan, engine, encoder)

    @property
    def manifest(self) -> Manifest:
        """What the bundle says about itself."""
        return self._bundle.manifest

    @property
    def starts_from_frames(self) -> bool:
        """Whether a session may be given `start`: the bundle was built `--with-encoder`."""
        return self.manifest.has_encoder

    @property
    def engine(self) -> Engine:
        """What executes the bundle."""
        return self._engine

    @property
    def memory(self) -> BufferPlan:
        """The buffers that were allocated."""
        return self._plan

    def session(
        self,
        prompt: str | None = None,
        *,
        seed: int = 0,
        embedding: ArrayLike | None = None,
        frames: Literal["host", "device"] = "host",
        label: str | None = None,
        on_start: Callable[[ChunkStarted], None] | None = None,
        noise: ArrayLike | NoiseSource | None = None,
        latents: bool = False,
        start: ArrayLike | None = None,
    ) -> Session:
        """Open a session for a prompt, or for a prompt embedding `[text_len, dim]`.

        The same seed gives the same bits on the same backend. With `frames="device"` the frames stay on the GPU, for
        encoders and others that read DLPack: `torch.from_dlpack(chunk.frames)`.

        `label` comes back with every chunk made with this prompt. `on_start` is called by a worker as each chunk
        begins, so it must be quick; an error in it ends the session.

        `noise` takes the place of what `seed` gives, for comparisons with other implementations: an array
        `[chunks, steps, channels, latent frames, h, w]`, or a function of chunk and step. Step 0 is a chunk's initial
        latent, and step s > 0 what re-noises it before forward s. A rollout that is longer than the array fails.
        `latents` keeps each chunk's clean latent as `Chunk.latent`.

        `start` is an image, uint8 `[H, W, 3]` of the bundle's size, or a video `[N, H, W, 3]`, of which the last
        frames count; the bundle must have been built `--with-encoder`. The rollout goes on from there: its first
        chunks are the given frames (an image counts as a still of one chunk) and are not delivered, so that the first
        chunk of the stream has the index behind them. See docs/start.md.

        Raises:
            CapacityError: all sessions that the pipeline was loaded for are open.
            InputError: neither or both of prompt and embedding, or an argument that is not usable.
        """
        self._scheduler.require_own_process()
        seed = check_seed(seed)
        on_device = frames == "device"
        if frames not in ("host", "device") or (on_device and not self._engine.on_device):
            raise InputError(
                f"frames is {frames!r}; expected 'host', or 'device' with a bundle that runs on a GPU (this one: "
                f"{self.manifest.backend} on {self.manifest.target.name})"
            )
        clip = None if start is None else start_clip(self.manifest, start)
        with self._place() as number:
            first = PromptSwitch(self.embed(prompt, embedding), "none", label)

            def new_lane(rollout: Rollout) -> Lane:
                given = rollout.given
                return Lane(rollout, on_start, delivered=given, flushed=given, switches=[(0, first)])

            rollout = partial(
                rollout_kind(self.manifest),
                seed=seed,
                on_device=on_device,
                noise=noise,
                latents=latents,
                start=clip,
            )
            return self._admit(number, rollout, new_lane)

    @contextmanager
    def _place(self) -> Iterator[int]:
        """A place for a session, taken before anything is done for it, and given back if that fails."""
        while self._forgotten:
            with suppress(IndexError):  # another thread was faster
                self._forgotten.popleft()()
        with self._lock:
            self._require_open()
            if not self._free:
                raise CapacityError(
                    f"all {self._plan.sessions} session(s) of this pipeline are open: another needs "
                    f"{self._plan.session_bytes:,} bytes, 0 are free; close one, or load the pipeline with more "
                    f"sessions",
                    needed=self._plan.session_bytes,
                    free=0,
                )
            number = self._free.pop(0)
        try:
            yield number
        except BaseException:
            self._release(number)
            raise

    def _admit(
        self, number: int, new_rollout: Callable[..., Rollout], new_lane: Callable[[Rollout], Lane]
    ) -> Session:
        """A session in a place; `new_lane` may refuse its rollout."""
        with self._lock:
            self._require_open()
            lane = new_lane(new_rollout(self._engine, number, self.manifest))
            self._scheduler.add(lane)
        return Session(
            scheduler=self._scheduler,
            lane=lane,
            manifest=self.manifest,
            embed=self.embed,
            release=lambda: self._release(number),
            forgotten=self._forgotten,
        )

    def resume(
        self, path: str | os.PathLike[str], *, on_start: Callable[[ChunkStarted], None] | None = None
    ) -> Session:
        """Go on with a session that `Session.save` wrote, with the same bits as without the break.

        That takes the same bundle, backend and number of threads; the process may be another one.

        Raises:
            CapacityError: all sessions that the pipeline was loaded for are open.
            InputError: the file is no saved session, or one of another bundle.
        """
        saved = SavedSession.read(path, self.manifest)
        model, text = self.manifest.model, self.manifest.text
        frame = (model.video_height, model.video_width, 3)

        def revived(rollout: Rollout) -> Lane:
            lane = Lane(rollout, on_start)
            revive(lane, saved, (text.text_len, text.dim), frame)
            return lane

        with self._place() as number:
            return self._admit(number, partial(rollout_kind(self.manifest), seed=saved.meta.seed), revived)

    def embed(self, prompt: str | None = None, embedding: ArrayLike | None = None) -> NDArray[np.float32]:
        """The embedding `[text_len, dim]` of a prompt, or a checked copy of the one given.

        Raises:
            InputError: neither or both of prompt and embedding, one that is not usable, or a prompt without a text
                encoder.
        """
        self._require_open()
        if (prompt is None) == (embedding is None):
            raise InputError(
                "expected either a prompt or an embedding, found " + ("neither" if prompt is None else "both")
            )
        if embedding is not None:
            return check_embedding(embedding, self.manifest.text)
        if self._text_encoder is None:
            raise InputError(
                "the pipeline was loaded with text_encoder='external': pass embedding= instead of a prompt, or "
                "load it with 'auto'"
            )
        assert prompt is not None
        return self._text_encoder.encode(prompt)

    def blend(self, prompts: Mapping[str, float]) -> NDArray[np.float32]:
        """A weighted mix of prompts, as an embedding `[text_len, dim]`; weights are divided by their sum.

        Raises:
            InputError: there is no prompt, a weight is negative or not finite, or all are 0.
        """
        total = math.fsum(prompts.values())
        if not prompts or not all(weight >= 0 for weight in prompts.values()) or not 0 < total < math.inf:
            raise InputError(
                f"prompts are mixed by the weights {list(prompts.values())}; expected one or more, none "
                f"negative and not all 0"
            )
        mixed = np.zeros((self.manifest.text.text_len, self.manifest.text.dim), dtype=np.float32)
        for prompt, weight in prompts.items():
            mixed += self.embed(prompt) * np.float32(weight / total)
        return mixed

    def health(self) -> Health:
        """How the pipeline is doing. Cheap, and callable from any thread."""
        ready, decoding = self._scheduler.backlog()
        with self._lock:
            alive = not self._closed and self._scheduler.alive
            taken = self._plan.sessions - len(self._free) - len(self._forgotten)
            return Health(alive, self._plan.sessions, taken, ready, decoding)

    def close(self) -> None:
        """End all sessions and free everything; waits for the forwards that are running. May be called twice.

        In a child process of the one that loaded it, there is nothing to end.
        """
        if self._scheduler.is_forked:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._finalizer()

    def _release(self, number: int) -> None:
        with self._lock:
            self._free.append(number)

    def _require_open(self) -> None:
        self._scheduler.require_own_process()
        if self._closed:
            raise ClosedError("the pipeline is closed; load it again with Pipeline.load()")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _shut(scheduler: Scheduler, text_encoder: TextEncoder | None, engine: Engine) -> None:
    """Free what a pipeline owns."""
    if scheduler.is_forked:
        return
    if scheduler.owns(threading.current_thread()):
        # The garbage collector happened to run in a worker, which cannot wait for itself.
        threading.Thread(target=_shut, args=(scheduler, text_encoder, engine)).start()
        return
    scheduler.stop()
    if text_encoder is not None:
        text_encoder.close()
    engine.close()


_in_children: weakref.WeakSet[Pipeline] = weakref.WeakSet()


def _keep_engines() -> None:
    """In a child process: let no engine be destroyed, which would wait for threads that only the parent has."""
    for pipeline in list(_in_children):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(pipeline._engine))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_engines)


def _stages(progress: Callable[[LoadStage], None] | None) -> Callable[[LoadStage], None]:
    """Reports the stages of loading, to the log too."""
    begun = time.perf_counter()

    def stage(name: LoadStage) -> None:
        _log.info("loading: %s after %.2f s", name, time.perf_counter() - begun)
        if progress is not None:
            progress(name)

    return stage


def _free_memory(bundle: Bundle, device: int) -> int | None:
    if runs_on_host(bundle):
        return memory().available
    from runtime.cuda.driver import free_memory

    try:
        return free_memory(device)
    except EngineError as error:
        manifest = bundle.manifest
        raise EngineError(
            f"bundle {manifest.name!r} was built for {manifest.target.name}, and {error}"
        ) from error
