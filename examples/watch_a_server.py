r"""Watch a live session of `python -m serving run BUNDLE`, switch its prompt, and keep what was seen as JPEG files.

python examples/watch_a_server.py http://127.0.0.1:8000 "a red circle on grey orbits clockwise from the top" \\
        "a blue circle on grey orbits clockwise from the top" frames/
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from websockets.sync.client import connect
from websockets.typing import Subprotocol

from serving.live.protocol import SUBPROTOCOL, MediaFrame

SECONDS = 5.0
SWITCH_AT = 2


def main(server: str, first: str, second: str, folder: str) -> None:
    """Show chunks at the video's rate, as a screen would, and say so to the server."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with connect(
        server.replace("http", "ws", 1) + "/v1/stream", subprotocols=[Subprotocol(SUBPROTOCOL)], max_size=None
    ) as socket:
        fps = json.loads(socket.recv())["fps"]
        schedule = [{"at": SWITCH_AT, "prompt": second}]
        start = {"prompt": first, "schedule": schedule, "seconds": SECONDS, "seed": 7, "format": "jpeg"}
        socket.send(json.dumps({"type": "start", "id": "start", **start}))
        due = time.monotonic()
        for data in socket:
            if isinstance(data, bytes):
                frame = MediaFrame.from_bytes(data)
                time.sleep(max(0.0, due - time.monotonic()))
                due = max(due, time.monotonic()) + 1 / fps
                if frame.first:
                    socket.send(json.dumps({"type": "ack", "chunk": frame.chunk}))
                (target / f"{frame.frame:04}.jpg").write_bytes(frame.payload)
            else:
                message = json.loads(data)
                print(message)
                if message["type"] == "ended":
                    return


if __name__ == "__main__":
    main(*sys.argv[1:])
