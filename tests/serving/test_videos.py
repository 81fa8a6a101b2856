"""Clips: the API, its records, and what becomes of them when something goes wrong."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from runtime import Pipeline
from tests.serving.client import Answer, StreamClient, http, wait_until
from tests.serving.conftest import RunningServer, StartServer


def create(server: RunningServer, **body: Any) -> Answer:
    return http(f"{server.url}/v1/videos", method="POST", body=body)


def finish(server: RunningServer, identity: str) -> dict[str, Any]:
    """Wait until a clip is made, or is not."""
    video: dict[str, Any] = {}

    def done() -> bool:
        video.update(http(f"{server.url}/v1/videos/{identity}").json)
        return video["status"] in ("completed", "failed")

    assert wait_until(done, 60)
    return video


def test_a_clip(server: RunningServer, tmp_path: Path) -> None:
    answer = create(server, prompt="a red fox", seconds=0.5, seed=7, schedule={"1": "snow"})
    assert answer.status == 200
    video = answer.json
    assert video["object"] == "video" and video["status"] in ("queued", "in_progress")
    assert (video["seconds"], video["size"], video["model"]) == ("0.5", "32x32", "handmade")
    video = finish(server, video["id"])
    assert (video["status"], video["progress"], video["error"]) == ("completed", 100, None)
    content = http(f"{server.url}/v1/videos/{video['id']}/content")
    assert content.headers["content-type"] == "video/mp4"
    path = tmp_path / "clip.mp4"
    path.write_bytes(content.body)
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with (
        Pipeline.load(server.service.settings.bundle, threads=1) as pipe,
        pipe.session("a red fox", seed=7) as s,
    ):
        s.set_prompt("snow", at=1)
        expected = np.concatenate([chunk.frames for chunk in s.stream(seconds=0.5)])
    assert len(frames) == len(expected)
    for frame, wanted in zip(frames, expected, strict=True):
        assert np.abs(frame.mean((0, 1)) - wanted.mean((0, 1))).max() < 8
    part = http(f"{server.url}/v1/videos/{video['id']}/content", headers={"Range": "bytes=0-9"})
    assert part.status == 206 and part.body == content.body[:10]


def test_a_form_is_taken_as_openai_clients_send_it(server: RunningServer) -> None:
    boundary = "b0undary"
    fields = {"prompt": "a red fox", "seconds": "1", "model": "handmade", "size": "32x32"}
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'
        for k, v in fields.items()
    ]
    answer = http(
        f"{server.url}/v1/videos",
        method="POST",
        body="".join([*parts, f"--{boundary}--\r\n"]).encode(),
        headers={"Content-Type": f"multipart/form-data; boundary={boundary}"},
    )
    assert answer.status == 200 and answer.json["seconds"] == "1"
    assert finish(server, answer.json["id"])["status"] == "completed"


def form(fields: dict[str, str], image: bytes | None = None) -> dict[str, Any]:
    """Body and header of a form, with a file named as OpenAI's clients name it."""
    parts = [
        f'--b0undary\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode()
        for k, v in fields.items()
    ]
    if image is not None:
        head = 'Content-Disposition: form-data; name="input_reference"; filename="a.png"\r\nContent-Type: image/png'
        parts.append(f"--b0undary\r\n{head}\r\n\r\n".encode() + image + b"\r\n")
    body = b"".join([*parts, b"--b0undary--\r\n"])
    return {"body": body, "headers": {"Content-Type": "multipart/form-data; boundary=b0undary"}}


def png(colour: tuple[int, int, int], size: tuple[int, int] = (64, 48)) -> bytes:
    file = BytesIO()
    Image.new("RGB", size, colour).save(file, format="PNG")
    return file.getvalue()


def test_a_clip_goes_on_from_an_image(
    start_server: StartServer, starting_bundle: Path, tmp_path: Path
) -> None:
    server = start_server(bundle=starting_bundle)
    assert http(f"{server.url}/v1/bundle").json["input_reference"] is True
    url = f"{server.url}/v1/videos"
    answer = http(url, method="POST", **form({"prompt": "a", "seconds": "0.5"}, png((250, 10, 10))))
    assert answer.status == 200
    assert finish(server, answer.json["id"])["status"] == "completed"
    path = tmp_path / "clip.mp4"
    path.write_bytes(http(f"{url}/{answer.json['id']}/content").body)
    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    still = np.full((32, 32, 3), (250, 10, 10), np.uint8)
    with (
        Pipeline.load(server.service.settings.bundle, threads=1) as pipe,
        pipe.session("a", start=still) as session,
    ):
        expected = np.concatenate([chunk.frames for chunk in session.stream(seconds=0.5)])
    assert frames.shape == expected.shape
    assert np.abs(frames.mean((1, 2)) - expected.mean((1, 2))).max() < 8
    folder = server.service.settings.videos
    assert len(list(folder.glob("*.reference"))) == 1
    assert http(f"{url}/{answer.json['id']}", method="DELETE").status == 200
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "image",
    [b"no image", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n", png((1, 2, 3))[:60], b""],
    ids=["text", "playlist", "cut", "empty"],
)
def test_what_is_no_image_is_refused_at_once(
    start_server: StartServer, starting_bundle: Path, image: bytes
) -> None:
    server = start_server(bundle=starting_bundle)
    answer = http(f"{server.url}/v1/videos", method="POST", **form({"prompt": "a"}, image))
    assert (answer.status, answer.json["error"]["code"]) == (422, "bad_request")
    assert "PNG, JPEG or WebP" in answer.json["error"]["message"]
    assert not list(server.service.settings.videos.iterdir())


def test_images_are_bounded_and_need_an_encoder(start_server: StartServer) -> None:
    server = start_server(limits={"reference_bytes": 1000})
    url = f"{server.url}/v1/videos"
    answer = http(url, method="POST", **form({"prompt": "a"}, png((1, 2, 3))))
    assert (answer.status, answer.json["error"]["code"]) == (422, "no_encoder")
    answer = http(url, method="POST", **form({"prompt": "a"}, bytes(70_000)))
    assert answer.status == 413
    answer = http(url, method="POST", **form({"prompt": "a", "input_reference": "photo.png"}))
    assert answer.status == 422 and "expected an image's file" in answer.json["error"]["message"]


def test_an_image_that_finds_no_room_is_refused(
    start_server: StartServer, starting_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server(bundle=starting_bundle)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    noise = np.random.default_rng(0).integers(0, 256, (800, 800, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(noise).save(file, format="PNG")  # of 1.9 MB; a form keeps 1 MiB in memory
    answer = http(f"{server.url}/v1/videos", method="POST", **form({"prompt": "a"}, file.getvalue()))
    assert (answer.status, answer.json["error"]["code"]) == (507, "no_room")
    assert str(tmp_path) not in answer.json["error"]["message"]


def test_list_and_delete(start_server: StartServer) -> None:
    server = start_server()
    made = [create(server, prompt="a", seconds=0.1).json["id"] for _ in range(3)]
    for identity in made:
        finish(server, identity)
    page = http(f"{server.url}/v1/videos?limit=2").json
    assert [video["id"] for video in page["data"]] == made[:0:-1] and page["has_more"]
    rest = http(f"{server.url}/v1/videos?after={page['last_id']}").json
    assert [video["id"] for video in rest["data"]] == made[:1] and not rest["has_more"]
    gone = http(f"{server.url}/v1/videos/{made[0]}", method="DELETE")
    assert gone.json == {"id": made[0], "object": "video.deleted", "deleted": True}
    assert http(f"{server.url}/v1/videos/{made[0]}").status == 404
    assert http(f"{server.url}/v1/videos/{made[0]}/content").status == 404
    assert not list(server.service.settings.videos.glob(f"{made[0]}*"))


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({}, 422, "bad_request"),
        ({"prompt": 7}, 422, "bad_request"),
        ({"prompt": "a", "seconds": -1}, 422, "bad_request"),
        ({"prompt": "a", "seconds": 1e9}, 400, "too_long"),
        ({"prompt": "a", "size": "64x64"}, 400, "wrong_size"),
        ({"prompt": "a", "size": "big"}, 422, "bad_request"),
        ({"prompt": "a", "model": "sora-2"}, 404, "wrong_model"),
        ({"prompt": "a", "input_reference": "x"}, 422, "bad_request"),
        ({"prompt": "x" * 3000}, 400, "prompt_too_long"),
        ({"prompt": "a", "schedule": {"-1": "b"}}, 422, "bad_request"),
    ],
)
def test_refused_clips(server: RunningServer, body: dict[str, Any], status: int, code: str) -> None:
    answer = create(server, **body)
    assert (answer.status, answer.json["error"]["code"]) == (status, code)


def test_a_server_that_makes_no_clips_says_so(start_server: StartServer) -> None:
    server = start_server(clips=False)
    for answer in (
        create(server, prompt="a"),
        http(f"{server.url}/v1/videos"),
        http(f"{server.url}/v1/videos/video_x"),
    ):
        assert (answer.status, answer.json["error"]["code"]) == (501, "no_clips")


def test_other_content_types_are_refused(server: RunningServer) -> None:
    for kind, body, status in (
        ("text/plain", b"a", 415),
        ("application/json", b"{", 422),
        ("multipart/form-data; boundary=x", b"nonsense", 400),
        ("multipart/form-data", b"nonsense", 400),
    ):
        answer = http(f"{server.url}/v1/videos", method="POST", body=body, headers={"Content-Type": kind})
        assert answer.status == status, (kind, answer)


def test_a_bounded_queue_of_clips(start_server: StartServer) -> None:
    server = start_server(sessions=1, limits={"jobs": 2})
    with StreamClient(server.url) as client:
        client.start("a")  # takes the only place
        made = [create(server, prompt="a", seconds=0.1) for _ in range(4)]
        assert [answer.status for answer in made][-1] == 503
        assert int(made[-1].headers["retry-after"]) >= 1
        waiting = [answer.json["id"] for answer in made if answer.status == 200]
        assert http(f"{server.url}/v1/videos/{waiting[0]}/content").status == 409
        http(f"{server.url}/v1/videos/{waiting[1]}", method="DELETE")
    assert finish(server, waiting[0])["status"] == "completed"
    assert http(f"{server.url}/v1/videos/{waiting[1]}").status == 404


def test_a_clip_that_is_deleted_while_it_is_made(start_server: StartServer) -> None:
    server = start_server()
    identity = create(server, prompt="a", seconds=300).json["id"]
    assert wait_until(lambda: http(f"{server.url}/v1/videos/{identity}").json["status"] == "in_progress")
    http(f"{server.url}/v1/videos/{identity}", method="DELETE")
    assert wait_until(lambda: server.service.places.taken == 0)
    assert not list(server.service.settings.videos.glob(f"*{identity}*"))


def test_clips_of_a_server_that_stopped_have_failed_and_say_so(
    start_server: StartServer, tmp_path: Path
) -> None:
    folder = tmp_path / "videos"
    server = start_server(videos=folder, sessions=1)
    done = create(server, prompt="a", seconds=0.1).json["id"]
    finish(server, done)
    # As a server that was killed leaves them.
    record = json.loads((folder / f"{done}.json").read_text())
    killed = {**record, "id": "video_killed", "status": "in_progress", "progress": 40, "completed_at": None}
    (folder / "video_killed.json").write_text(json.dumps(killed))
    (folder / "video_broken.json").write_text("{")
    again = start_server(videos=folder)
    assert http(f"{again.url}/v1/videos/{done}").json["status"] == "completed"
    lost = http(f"{again.url}/v1/videos/video_killed").json
    assert lost["status"] == "failed" and lost["error"]["code"] == "server_restarted"
    assert http(f"{again.url}/v1/videos/video_broken").status == 404
    assert (folder / "video_broken.unreadable").exists()


def test_a_clip_under_way_when_the_server_stops(small_bundle: Path, tmp_path: Path) -> None:
    from serving.settings import Settings
    from tests.serving.conftest import running

    settings = Settings(bundle=small_bundle, port=0, threads=1, videos=tmp_path, drain_seconds=0.0)
    with running(settings) as server:
        identity = create(server, prompt="a", seconds=300).json["id"]
        assert wait_until(lambda: http(f"{server.url}/v1/videos/{identity}").json["status"] == "in_progress")
    record = json.loads((tmp_path / f"{identity}.json").read_text())
    assert record["status"] == "failed" and record["error"]["code"] == "server_stopped"
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_no_room_for_a_clip(start_server: StartServer, tmp_path: Path) -> None:
    """A folder that takes no files stands for a full disk, where the user is one that it stops."""
    folder = tmp_path / "videos"
    server = start_server(videos=folder)
    full = tmp_path / "full"
    os.rename(folder, full)  # nothing can be written any more
    answer = create(server, prompt="a", seconds=0.1)
    assert answer.status == 507 and answer.json["error"]["code"] == "storage"
    assert str(tmp_path).encode() not in answer.body
    os.rename(full, folder)
    identity = create(server, prompt="a", seconds=300).json["id"]
    assert wait_until(lambda: http(f"{server.url}/v1/videos/{identity}").json["status"] == "in_progress")
    os.rename(folder, full)
    video = finish(server, identity)
    assert video["status"] == "failed" and video["error"]["code"] == "storage"
    os.rename(full, folder)
    assert finish(server, create(server, prompt="a", seconds=0.1).json["id"])["status"] == "completed"
    assert stat.S_ISDIR(folder.stat().st_mode)
