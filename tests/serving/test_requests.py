"""What HTTP requests get: health, the page, refusals, limits; nothing of the machine in any answer."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed, InvalidStatus

from serving.errors import RequestError, SettingsError
from serving.live.protocol import MediaFrame, parse_client_message
from serving.security import RateLimit, bearer_of
from serving.settings import Limits, Settings, read_token
from tests.serving.client import StreamClient, http
from tests.serving.conftest import FPS, RunningServer, StartServer

TOKEN = "correct-horse-battery"


def raw(url: str, request: bytes) -> bytes:
    """Send bytes, and read what comes."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
        connection.sendall(request)
        received = b""
        while data := connection.recv(65536):
            received += data
    return received


def test_health_and_readiness(server: RunningServer) -> None:
    assert http(f"{server.url}/healthz").json == {"status": "ok"}
    ready = http(f"{server.url}/readyz")
    assert ready.status == 200
    assert ready.json == {"status": "ready", "places": 2, "places_taken": 0, "queue": 0}


def test_the_bundle(server: RunningServer) -> None:
    bundle = http(f"{server.url}/v1/bundle").json
    assert (bundle["name"], bundle["width"], bundle["height"], bundle["fps"]) == ("handmade", 32, 32, FPS)
    assert bundle["h264_codec"].startswith("avc1.")
    assert (bundle["recache"], bundle["recache_modes"]) == (
        "window",
        ["window", "all", "none", "flush", "cut"],
    )


def test_metrics_count_what_happened(start_server: StartServer) -> None:
    server = start_server()
    with StreamClient(server.url) as client:
        client.start("a", seconds=0.5)
        client.until("ended")
    lines = http(f"{server.url}/metrics").body.decode().splitlines()
    values = {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}
    frames = len(client.frames)
    assert values["lightforcing_sent_frames_total"] == frames > 0
    assert values['lightforcing_sessions_total{reason="completed"}'] == 1
    assert values["lightforcing_first_chunk_seconds_count"] == 1
    assert values["lightforcing_chunk_interval_seconds_count"] == len(client.of("chunk")) - 1
    assert values["lightforcing_places"] == 2 and values["lightforcing_ready"] == 1
    for stage in ("denoise", "decode", "encode"):
        total = sum(chunk[stage] for chunk in client.of("chunk"))
        assert values[f'lightforcing_stage_seconds_total{{stage="{stage}"}}'] == pytest.approx(
            total,
            rel=1e-3,
            abs=1e-5,  # messages round
        )


def test_the_page_and_its_headers(server: RunningServer) -> None:
    page = http(f"{server.url}/")
    assert page.status == 200 and b"<title>Light Forcing live</title>" in page.body
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    again = http(f"{server.url}/", headers={"If-None-Match": page.headers["etag"]})
    assert again.status == 304
    for kind in ("app", "connection", "player", "strip"):
        assert http(f"{server.url}/page/{kind}.js").headers["content-type"].startswith("text/javascript")


def test_the_page_names_no_other_host() -> None:
    for path in (Path(__file__).parents[2] / "serving" / "page").iterdir():
        if path.suffix in (".html", ".css", ".js"):
            text = path.read_text().replace("http://www.w3.org/2000/svg", "")
            assert "http://" not in text and "https://" not in text, path.name


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/page/../../settings.py",
        "/page/%2e%2e/%2e%2e/settings.py",
        "/page//etc/passwd",
        "/v1/videos/..%2f..%2fetc%2fpasswd/content",
        "/v1/videos/%00",
        "/page/__init__.py",
        "/docs",
    ],
)
def test_path_tricks_find_nothing(server: RunningServer, path: str) -> None:
    head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    answer = raw(server.url, head.encode())
    assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 400"))
    assert b"root:" not in answer and b"/site-packages" not in answer


def test_a_token_where_one_is_needed(start_server: StartServer) -> None:
    server = start_server(token=TOKEN)
    for path in ("/v1/bundle", "/metrics", "/v1/videos", "/v1/openapi.json"):
        missing = http(server.url + path)
        assert missing.status == 401 and missing.headers["www-authenticate"] == "Bearer"
        wrong = http(server.url + path, headers={"Authorization": "Bearer wrong-horse-battery"})
        assert wrong.status == 401 and wrong.json["error"]["code"] == "wrong_token"
        assert http(server.url + path, headers={"Authorization": f"Bearer {TOKEN}"}).status == 200
    for path in ("/", "/healthz", "/readyz", "/page/app.js"):
        assert http(server.url + path).status == 200
    for options in ({}, {"additional_headers": {"Authorization": "Bearer nonsense-nonsense"}}):
        with pytest.raises(InvalidStatus) as refused:
            StreamClient(server.url, **options)
        assert refused.value.response.status_code == 401
    with StreamClient(server.url, additional_headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        assert client.hello["protocol"] == 1
    with StreamClient(server.url, subprotocols=["lightforcing.v1", f"bearer.{TOKEN}"]) as client:
        assert client.socket.subprotocol == "lightforcing.v1"  # the token is not sent back


def test_pages_of_other_sites_are_refused(server: RunningServer) -> None:
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
        with pytest.raises(InvalidStatus) as refused:
            StreamClient(server.url, origin=origin)
        assert refused.value.response.status_code == 403
        answer = http(
            f"{server.url}/v1/videos", method="POST", body={"prompt": "a"}, headers={"Origin": origin}
        )
        assert answer.status == 403 and answer.json["error"]["code"] == "wrong_origin"
    with StreamClient(server.url, origin=server.url) as client:
        assert client.hello["protocol"] == 1


def test_names_that_are_not_this_servers_are_refused(server: RunningServer) -> None:
    """A page of another site may make a browser resolve a name of its own to this machine."""
    assert http(f"{server.url}/v1/bundle", headers={"Host": "evil.example"}).status == 421
    assert http(f"{server.url}/v1/bundle", headers={"Host": "localhost:80"}).status == 200


def test_another_origin_may_be_allowed(start_server: StartServer) -> None:
    server = start_server(origins=("https://demo.example.com",))
    with StreamClient(server.url, origin="https://demo.example.com") as client:
        assert client.hello["protocol"] == 1


def test_requests_that_come_too_fast(start_server: StartServer) -> None:
    server = start_server(limits={"requests_per_second": 0.1, "request_burst": 5})
    answers = [http(f"{server.url}/healthz") for _ in range(8)]
    assert [answer.status for answer in answers] == [200] * 5 + [429] * 3
    assert answers[-1].headers["retry-after"] == "1"


def test_connections_of_one_client(start_server: StartServer) -> None:
    server = start_server(limits={"sessions_per_client": 2})
    with StreamClient(server.url), StreamClient(server.url), pytest.raises(ConnectionClosed) as closed:
        StreamClient(server.url)
    assert closed.value.rcvd is not None and "at most 2 connections" in closed.value.rcvd.reason


def test_large_bodies_are_refused(server: RunningServer) -> None:
    huge = b'{"prompt": "' + b"x" * 100_000 + b'"}'
    answer = http(
        f"{server.url}/v1/videos", method="POST", body=huge, headers={"Content-Type": "application/json"}
    )
    assert answer.status == 413
    head = b"POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    chunked = head + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    answer = http_status(raw(server.url, chunked + b"%x\r\n%s\r\n0\r\n\r\n" % (len(huge), huge)))
    assert answer == 413


def http_status(answer: bytes) -> int:
    return int(answer.split()[1])


def test_a_bundle_that_cannot_be_loaded(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(bundle=tmp_path / "nothing")
    assert server.service.state == "failed" and str(tmp_path) in str(server.service.error)
    assert http(f"{server.url}/healthz").status == 503
    for path in ("/readyz", "/v1/bundle"):
        answer = http(server.url + path)
        assert answer.status == 503 and str(tmp_path).encode() not in answer.body


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "can be reached from other machines"),
        ({"host": "demo.example.com"}, "can be reached from other machines"),
        ({"port": 70_000}, "--port is 70000"),
        ({"sessions": 0}, "--sessions is 0"),
        ({"drain_seconds": -1.0}, "--drain is"),
        ({"limits": Limits(queue=-1)}, "--queue is -1"),
        ({"limits": Limits(sessions_per_client=0)}, "--connections is 0"),
        ({"limits": Limits(requests_per_second=0.0)}, "--rate is 0"),
        ({"origins": ("demo.example.com",)}, "expected scheme and host"),
    ],
)
def test_unusable_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Settings(bundle=Path("b"), **options)


def test_addresses_beyond_loopback_need_a_token_or_consent() -> None:
    Settings(bundle=Path("b"), host="0.0.0.0", token=TOKEN)
    Settings(bundle=Path("b"), host="0.0.0.0", insecure=True)
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        assert Settings(bundle=Path("b"), host=host).is_loopback


def test_token_files(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    assert read_token(path) == TOKEN
    for text in ("short", "x" * 300, "spaces are not allowed here", ""):
        path.write_text(text)
        with pytest.raises(SettingsError, match="expected 16 to 256"):
            read_token(path)
    with pytest.raises(SettingsError, match="cannot be read"):
        read_token(tmp_path / "missing")


def test_rate_limits_are_for_each_client_and_fill_again() -> None:
    now = [0.0]
    limit = RateLimit(2.0, 3, lambda: now[0])
    assert [limit.allows("a") for _ in range(4)] == [True, True, True, False]
    assert limit.allows("b")
    now[0] = 1.0
    assert [limit.allows("a") for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize(
    ("headers", "token"),
    [
        ({"authorization": "Bearer abc"}, "abc"),
        ({"authorization": "bearer abc"}, "abc"),
        ({"authorization": "Basic abc"}, None),
        ({"authorization": "Bearer"}, None),
        ({"sec-websocket-protocol": "lightforcing.v1, bearer.abc"}, "abc"),
        ({"sec-websocket-protocol": "lightforcing.v1"}, None),
        ({}, None),
    ],
)
def test_where_a_token_is_found(headers: dict[str, str], token: str | None) -> None:
    assert bearer_of(headers) == token


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)
KINDS = ["start", "set_prompt", "pause", "resume", "cancel", "flush", "keyframe", "ack"]
FIELDS = ["id", "prompt", "seed", "seconds", "schedule", "format", "recache", "at", "over", "chunk"]


@given(
    st.text()
    | st.builds(json.dumps, json_values)
    | st.builds(
        lambda kind, fields: json.dumps({"type": kind, **fields}),
        st.sampled_from(KINDS),
        st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=4),
    )
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_message_is_read_or_refused(text: str) -> None:
    try:
        message = parse_client_message(text)
    except RequestError as error:
        assert error.code == "bad_message" and len(str(error)) < 400
    else:
        assert message.type in KINDS


@given(st.binary(max_size=64))
def test_any_bytes_are_a_picture_or_refused(data: bytes) -> None:
    try:
        frame = MediaFrame.from_bytes(data)
    except ValueError:
        return
    assert MediaFrame.from_bytes(frame.to_bytes()) == frame


def test_pictures_survive_the_wire() -> None:
    frame = MediaFrame("h264", 7, 93, 5_812_500, b"\0\0\1", keyframe=True, first=True, last=False, gap=True)
    assert MediaFrame.from_bytes(frame.to_bytes()) == frame
    assert frame.to_bytes()[:4] == b"LF\x01\x0b"  # what docs/serving.md says
