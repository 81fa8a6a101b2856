"""`/v1/videos`: clips, asynchronously, in the shape of OpenAI's video API."""

from __future__ import annotations

import asyncio
import json
from io import BytesIO
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import FileResponse
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException

from runtime import InputError, read_image
from serving.clips.jobs import CreateVideo
from serving.errors import RequestError
from serving.service import Service

__all__ = ["router"]

_PAGE = 20
_LARGEST_PAGE = 100


def router(service: Service) -> APIRouter:
    """The routes."""

    async def offered() -> None:
        if not service.settings.clips:
            raise RequestError(
                "no_clips",
                "several servers share this address, and a clip belongs to one of them: use live sessions here, or a "
                "server of its own for clips",
                status=501,
            )

    routes = APIRouter(dependencies=[Depends(offered)])

    @routes.post("/v1/videos")
    async def create(request: Request) -> dict[str, Any]:
        """Queue a clip: `prompt`, and optionally `seconds`, `size`, `model`, `seed`, `schedule`.

        A form may bring an image as `input_reference`, from which the clip goes on.
        """
        manifest = service.manifest
        model = manifest.model
        size = f"{model.video_width}x{model.video_height}"
        wanted, image = await _read(request)
        if image is not None:
            await asyncio.to_thread(_check_image, service, image)
        return service.clips.create(wanted, model=manifest.name, size=size, reference=image).public()

    @routes.get("/v1/videos")
    async def catalogue(limit: int = _PAGE, after: str | None = None, order: str = "desc") -> dict[str, Any]:
        """Clips, newest first unless `order` is `asc`."""
        if order not in ("asc", "desc"):
            raise RequestError("bad_request", "order is neither 'asc' nor 'desc'")
        if not 1 <= limit <= _LARGEST_PAGE:
            raise RequestError("bad_request", f"limit is {limit}; expected 1 to {_LARGEST_PAGE}")
        jobs = list(service.clips.store.jobs.values())
        if order == "desc":
            jobs.reverse()
        if after is not None:
            identities = [job.id for job in jobs]
            if after not in identities:
                raise RequestError("not_found", "there is no video with the id of 'after'", status=404)
            jobs = jobs[identities.index(after) + 1 :]
        page = [job.public() for job in jobs[:limit]]
        return {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(jobs) > limit,
        }

    @routes.get("/v1/videos/{identity}")
    async def retrieve(identity: str) -> dict[str, Any]:
        """A clip's state: `status`, `progress` in percent, `seconds_left`."""
        return service.clips.store.get(identity).public()

    @routes.get("/v1/videos/{identity}/content")
    async def content(identity: str) -> FileResponse:
        """The file."""
        job = service.clips.store.get(identity)
        if job.status != "completed":
            raise RequestError("not_ready", f"the video is {job.status}; there is no file", status=409)
        return FileResponse(service.clips.store.video(job), media_type="video/mp4", filename=f"{job.id}.mp4")

    @routes.delete("/v1/videos/{identity}")
    async def delete(identity: str) -> dict[str, Any]:
        """Remove a clip, or stop its making."""
        job = service.clips.delete(identity)
        return {"id": job.id, "object": "video.deleted", "deleted": True}

    return routes


def _check_image(service: Service, image: bytes) -> None:
    """Refuse now what would fail when the clip's turn comes."""
    model = service.manifest.model
    if not service.pipeline.starts_from_frames:
        raise RequestError(
            "no_encoder",
            "this bundle cannot start from an image; it was built without a video encoder",
            status=422,
        )
    try:
        read_image(BytesIO(image), height=model.video_height, width=model.video_width)
    except InputError as error:
        raise RequestError("bad_request", f"input_reference: {error}", status=422) from None


async def _read(request: Request) -> tuple[CreateVideo, bytes | None]:
    """The body, JSON or a form, as OpenAI's clients send it, and the image in it."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind == "application/json":
            return CreateVideo.model_validate_json(await request.body()), None
        if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
            raise RequestError("bad_request", "expected application/json or multipart/form-data", status=415)
        async with request.form(max_files=1, max_fields=16) as form:
            fields: dict[str, Any] = dict(form)
            upload = fields.pop("input_reference", None)
            image = await upload.read() if isinstance(upload, UploadFile) else None
        if upload is not None and image is None:
            raise RequestError("bad_request", "input_reference is text; expected an image's file", status=422)
        if "schedule" in fields:
            fields["schedule"] = json.loads(fields["schedule"])
        return CreateVideo.model_validate(fields), image
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise RequestError("bad_request", f"{where}: {first['msg']}", status=422) from None
    except OSError as error:
        raise RequestError(
            "no_room", f"the server cannot put the image aside: {error.strerror}", status=507
        ) from error
    except (json.JSONDecodeError, MultiPartException, RecursionError) as error:
        raise RequestError("bad_request", f"the form cannot be read: {error}") from None
