"""A bundle behind FastAPI: one pipeline, loaded in the process that serves, and a stream of JPEGs that browsers show.

python examples/fastapi_app.py engines/built/demo --port 8001, then open http://127.0.0.1:8001/stream?prompt=...

Places, queues, limits, tokens and metrics are the business of `python -m serving`; this is the least that works.
"""

from __future__ import annotations

import argparse
import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from numpy.typing import NDArray
from PIL import Image

from runtime import CapacityError, Pipeline

BOUNDARY = "frame"


def create_app(bundle: Path, *, sessions: int = 1) -> FastAPI:
    """The application: `GET /stream?prompt=...&chunks=7` streams frames as they are made."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with await asyncio.to_thread(Pipeline.load, bundle, sessions=sessions) as pipeline:
            app.state.pipeline = pipeline
            yield

    app = FastAPI(lifespan=lifespan)

    @app.get("/stream")
    async def stream(prompt: str, chunks: int = 7, seed: int = 0) -> StreamingResponse:
        try:
            session = await asyncio.to_thread(app.state.pipeline.session, prompt, seed=seed)
        except CapacityError as error:
            raise HTTPException(503, str(error)) from error

        async def parts() -> AsyncIterator[bytes]:
            with session:
                async for chunk in session.stream(chunks=chunks):
                    for frame in chunk.frames:
                        yield await asyncio.to_thread(_part, frame)

        return StreamingResponse(parts(), media_type=f"multipart/x-mixed-replace; boundary={BOUNDARY}")

    return app


def _part(frame: NDArray[np.uint8]) -> bytes:
    jpeg = io.BytesIO()
    Image.fromarray(frame).save(jpeg, "JPEG", quality=90)
    return b"--%s\r\nContent-Type: image/jpeg\r\n\r\n%s\r\n" % (BOUNDARY.encode(), jpeg.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--port", type=int, default=8001)
    options = parser.parse_args()
    uvicorn.run(create_app(options.bundle), host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
