"""Makes clips, one after the other, beside the live sessions and in the same places."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime import (
    InputError,
    LightForcingError,
    Pipeline,
    Session,
    SessionCancelledError,
    open_video,
    read_image,
)
from serving.errors import BusyError, RequestError
from serving.live.session import check_prompts
from serving.metrics import Metrics
from serving.places import Places
from serving.settings import Limits

from .jobs import CreateVideo, Job, JobStore

__all__ = ["Clips"]

_log = logging.getLogger("serving.clips")
_RECORD_EVERY = 1.0


class Clips:
    """The queue of clips. For one event loop; rollouts and files are worked on in a thread."""

    def __init__(self, folder: Path, limits: Limits, metrics: Metrics) -> None:
        self.store = JobStore(folder, limits.kept_jobs)
        self._limits = limits
        self._metrics = metrics
        self._queue: asyncio.Queue[Job] = asyncio.Queue()
        self._running: dict[str, Session] = {}
        self._stopping = False

    @property
    def busy(self) -> bool:
        """Whether a clip is being made."""
        return bool(self._running)

    def open(self) -> None:
        """Read what earlier servers recorded."""
        self.store.open()

    def create(self, request: CreateVideo, *, model: str, size: str, reference: bytes | None = None) -> Job:
        """Queue a clip, which may start from an image (the bytes of its file).

        Raises:
            RequestError: it cannot be made here.
            BusyError: too many wait.
        """
        if request.seconds > self._limits.seconds:
            raise RequestError(
                "too_long", f"seconds is {request.seconds:g}; at most {self._limits.seconds:g} are made"
            )
        if request.size not in (None, size):
            raise RequestError("wrong_size", f"size is {request.size}; this bundle makes {size}")
        if request.model not in (None, model):
            raise RequestError(
                "wrong_model", f"this server makes videos with the model {model!r}", status=404
            )
        check_prompts([request.prompt, *request.schedule.values()], self._limits)
        waiting = sum(job.status == "queued" for job in self.store.jobs.values())
        if waiting >= self._limits.jobs:
            raise BusyError(f"{waiting} clips wait already; try again later", retry_after=10)
        job = self.store.add(request, model=model, size=size, reference=reference)
        self._queue.put_nowait(job)
        return job

    def delete(self, identity: str) -> Job:
        """Remove a clip; one that is being made is stopped."""
        job = self.store.get(identity)
        session = self._running.get(identity)
        if session is not None:
            session.cancel()
        self.store.delete(job)
        return job

    async def work(self, pipeline: Pipeline, places: Places) -> None:
        """Make clips until cancelled; the one under way is then recorded as failed."""
        try:
            while True:
                job = await self._queue.get()
                if job.id not in self.store.jobs:
                    continue  # deleted while it waited
                async with places.place(lambda _: None, seconds=job.request.seconds, bounded=False):
                    await self._make(pipeline, job)
        finally:
            self._stopping = True
            for job in list(self.store.jobs.values()):
                if job.status in ("queued", "in_progress"):
                    self.store.fail(job, "server_stopped", "the server stopped before the clip was made")

    async def _make(self, pipeline: Pipeline, job: Job) -> None:
        making = asyncio.ensure_future(asyncio.to_thread(self._render, pipeline, job))
        try:
            await asyncio.shield(making)
        except asyncio.CancelledError:
            if (session := self._running.get(job.id)) is not None:
                session.cancel()
            await asyncio.gather(making, return_exceptions=True)
            raise
        self._metrics.videos.labels(job.status).inc()

    def _render(self, pipeline: Pipeline, job: Job) -> None:
        """Make one clip. Whatever goes wrong is written into its record."""
        request = job.request
        job.status = "in_progress"
        try:
            self.store.save(job)
            start = self._start(pipeline, job)
            with pipeline.session(request.prompt, seed=request.seed, start=start) as session:
                self._running[job.id] = session
                for at, prompt in sorted(request.schedule.items()):
                    session.set_prompt(prompt, at=session.given + at)
                self._write(pipeline, job, session)
            job.status, job.progress, job.seconds_left = "completed", 100, 0.0
            job.completed_at = int(time.time())
            if job.id in self.store.jobs:
                self.store.save(job)
        except SessionCancelledError:
            if job.id in self.store.jobs:
                self.store.fail(job, "server_stopped", "the server stopped before the clip was made")
        except InputError as error:
            self.store.fail(job, "bad_input", str(error))
        except LightForcingError as error:
            _log.error("clip failed", extra={"fields": {"video": job.id, "error": repr(error)}})
            self.store.fail(job, "failed", "the clip could not be made")
        except OSError as error:
            _log.error("clip cannot be stored", extra={"fields": {"video": job.id, "error": repr(error)}})
            self.store.fail(
                job, "storage", "the clip could not be stored: no room, or the folder cannot be written"
            )
        finally:
            self._running.pop(job.id, None)
            if job.id not in self.store.jobs:  # deleted meanwhile
                self.store.delete(job)

    def _start(self, pipeline: Pipeline, job: Job) -> NDArray[np.uint8] | None:
        path, model = self.store.reference(job), pipeline.manifest.model
        if not path.is_file():
            return None
        return read_image(path, height=model.video_height, width=model.video_width)

    def _write(self, pipeline: Pipeline, job: Job, session: Session) -> None:
        model = pipeline.manifest.model
        stream = session.stream(seconds=job.request.seconds, timeout=self._limits.chunk_timeout)
        assert stream.frames is not None
        begun, recorded, written = time.monotonic(), 0.0, 0
        size: dict[str, Any] = {"height": model.video_height, "width": model.video_width}
        with open_video(self.store.video(job), fps=model.fps, **size) as video:
            for chunk in stream:
                video.write(chunk.frames)
                written += len(chunk.frames)
                spent = time.monotonic() - begun
                job.progress = min(99, 100 * written // stream.frames)
                job.seconds_left = round(spent / written * (stream.frames - written), 2)
                if spent - recorded > _RECORD_EVERY:
                    recorded = spent
                    self.store.save(job)
