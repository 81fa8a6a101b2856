"""Clips to be made, in the shape of OpenAI's video API, and their records on disk."""

from __future__ import annotations

import json
import os
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime import atomic_output
from serving.errors import RequestError

__all__ = ["CreateVideo", "Job", "JobStore", "Status"]

Status = Literal["queued", "in_progress", "completed", "failed"]
_ID = "video_"
_RECORD = ".json"
_VIDEO = ".mp4"
_REFERENCE = ".reference"


class CreateVideo(BaseModel):
    """The body of `POST /v1/videos`. `seed` and `schedule` are ours; the rest is OpenAI's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str
    model: str | None = None
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 5.0
    size: Annotated[str, Field(pattern=r"^\d{1,5}x\d{1,5}$")] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    schedule: dict[Annotated[int, Field(ge=0)], str] = Field(default_factory=dict)


class JobError(BaseModel):
    """Why a clip was not made."""

    code: str
    message: str


class Job(BaseModel):
    """A clip and how far it is. Times are Unix seconds."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    id: str
    request: CreateVideo
    model: str
    size: str
    status: Status = "queued"
    created_at: int
    completed_at: int | None = None
    progress: int = 0
    seconds_left: float | None = None
    error: JobError | None = None

    def public(self) -> dict[str, Any]:
        """The video object that clients get."""
        return {
            "id": self.id,
            "object": "video",
            "model": self.model,
            "status": self.status,
            "progress": self.progress,
            "created_at": self.created_at,
            "completed_at": self.completed_at,
            "expires_at": None,
            "prompt": self.request.prompt,
            "seconds": f"{self.request.seconds:g}",
            "size": self.size,
            "seed": self.request.seed,
            "seconds_left": self.seconds_left,
            "remixed_from_video_id": None,
            "error": None if self.error is None else self.error.model_dump(),
        }


class JobStore:
    """Jobs by id, each with a record in a folder and, once made, a file beside it."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep
        self.jobs: dict[str, Job] = {}

    def open(self) -> None:
        """Read the records. What a server was working on when it ended has failed, and says so."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self._folder.glob(f"{_ID}*{_RECORD}")):
            try:
                job = Job.model_validate_json(path.read_text(encoding="utf-8"))
            except (ValidationError, OSError, UnicodeDecodeError):
                path.replace(path.with_suffix(".unreadable"))
                continue
            self.jobs[job.id] = job
            if job.status in ("queued", "in_progress"):
                self.fail(
                    job, "server_restarted", "the server stopped before the clip was made; ask for it again"
                )
            elif job.status == "completed" and not self.video(job).is_file():
                self.fail(job, "file_lost", "the clip's file is gone; ask for it again")
        self.jobs = dict(sorted(self.jobs.items(), key=lambda item: item[1].created_at))

    def add(self, request: CreateVideo, *, model: str, size: str, reference: bytes | None) -> Job:
        """A new job, recorded, with the file of the image that it starts from, if there is one.

        Raises:
            RequestError: it cannot be recorded.
        """
        job = Job(
            id=_ID + secrets.token_hex(12),
            request=request,
            model=model,
            size=size,
            created_at=int(time.time()),
        )
        try:
            if reference is not None:
                self.reference(job).write_bytes(reference)
            self.save(job)
        except OSError as error:
            with suppress(OSError):
                self.reference(job).unlink(missing_ok=True)
            raise RequestError("storage", "the clip cannot be recorded: no room", status=507) from error
        self.jobs[job.id] = job
        self._forget_old()
        return job

    def get(self, identity: str) -> Job:
        """A job.

        Raises:
            RequestError: (404) there is none of that id.
        """
        job = self.jobs.get(identity)
        if job is None:
            raise RequestError("not_found", "there is no video of that id", status=404)
        return job

    def save(self, job: Job) -> None:
        """Write the record."""
        with atomic_output(self._folder / f"{job.id}{_RECORD}") as temporary:
            temporary.write_text(json.dumps(job.model_dump(mode="json"), indent=1), encoding="utf-8")

    def fail(self, job: Job, code: str, message: str) -> None:
        """Record a failure; if even that cannot be written, it is known until the server ends."""
        job.status, job.error, job.completed_at = (
            "failed",
            JobError(code=code, message=message),
            int(time.time()),
        )
        job.seconds_left = None
        with suppress(OSError):
            self.save(job)

    def delete(self, job: Job) -> None:
        """Remove a job, its record and its file."""
        self.jobs.pop(job.id, None)
        for path in (self.video(job), self.reference(job), self._folder / f"{job.id}{_RECORD}"):
            path.unlink(missing_ok=True)

    def video(self, job: Job) -> Path:
        """Where the clip's file is, or will be. The id is one that this server made."""
        return self._folder / f"{os.path.basename(job.id)}{_VIDEO}"

    def reference(self, job: Job) -> Path:
        """Where the image is that the clip starts from, if it starts from one."""
        return self.video(job).with_suffix(_REFERENCE)

    def _forget_old(self) -> None:
        done = [job for job in self.jobs.values() if job.status in ("completed", "failed")]
        for job in done[: max(0, len(done) - self._keep)]:
            self.delete(job)
