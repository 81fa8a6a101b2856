"""The scripts of `examples/`, run as a reader runs them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=None, capture_output=True, text=True, check=False, timeout=300
    )


def test_every_example_is_run_here() -> None:
    tested = set(re.findall(r'run\("(\w+)"', Path(__file__).read_text()))
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == tested


def test_embedding(tiny_bundle: Path) -> None:
    done = run("embed", tiny_bundle, "--chunks", 2)
    assert done.returncode == 0, done.stderr
    assert "loading: ready" in done.stdout
    assert re.search(r"chunk 0: \(9, \d+, \d+, 3\)", done.stdout)
    assert re.search(r"chunk 1: \(12, \d+, \d+, 3\)", done.stdout)


def test_streaming_to_a_file_with_a_switch(tiny_bundle: Path, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    out = tmp_path / "clip.mp4"
    done = run("stream_to_file", tiny_bundle, out, "--seconds", 1.2, "--switch-at", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}: 21 frames, the second prompt from chunk 1 on\n"
    with av.open(str(out)) as video:
        assert sum(1 for _ in video.decode(video=0)) == 21


def test_watching_a_server(tmp_path: Path) -> None:
    from serving.settings import Settings
    from tests.runtime import handmade
    from tests.serving.conftest import running

    handmade.build_bundle(tmp_path / "bundle")
    with running(
        Settings(bundle=tmp_path / "bundle", port=0, threads=1, videos=tmp_path / "videos")
    ) as server:
        done = run("watch_a_server", server.url, "a red fox", "snow in sea", tmp_path / "frames")
    assert done.returncode == 0, done.stderr
    assert "'switched': True" in done.stdout and "'reason': 'completed'" in done.stdout
    assert "'type': 'dropped'" not in done.stdout
    assert len(list((tmp_path / "frames").glob("*.jpg"))) == 81


def test_comparing_with_polygraphy(tiny_bundle: Path, tiny_long_bundle: Path) -> None:
    same = run("compare_polygraphy", tiny_bundle, tiny_long_bundle)  # one model, two variants of attention
    assert same.returncode == 0, same.stderr + same.stdout
    strict = run("compare_polygraphy", tiny_bundle, tiny_bundle, "--component", "no_such_component")
    assert strict.returncode != 0


@pytest.fixture(scope="module")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.runtime import handmade

    folder = tmp_path_factory.mktemp("small") / "bundle"
    handmade.build_bundle(folder)
    return folder


def test_the_fastapi_app_streams_jpegs(small_bundle: Path) -> None:
    pytest.importorskip("fastapi")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    script = ROOT / "examples" / "fastapi_app.py"  # stands for run("fastapi_app"), which would not return
    command = [sys.executable, str(script), str(small_bundle), "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            url = f"http://127.0.0.1:{port}/stream?prompt=a%20red%20fox&chunks=2"
            until = time.monotonic() + 60
            while True:
                try:
                    with urllib.request.urlopen(url, timeout=60) as answer:
                        assert answer.headers["Content-Type"].startswith("multipart/x-mixed-replace")
                        body = answer.read()
                    break
                except urllib.error.URLError:
                    assert process.poll() is None, process.stderr.read() if process.stderr else ""
                    assert time.monotonic() < until
                    time.sleep(0.2)
        finally:
            process.terminate()
    assert body.count(b"Content-Type: image/jpeg") == body.count(b"\xff\xd8\xff") == 9 + 12


def test_the_gradio_apps_frames(small_bundle: Path) -> None:
    done = run("gradio_app", small_bundle, "--count", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "21\n"


def test_the_gradio_page_is_built(small_bundle: Path) -> None:
    gradio = pytest.importorskip("gradio", reason="a large package, in no default set-up")
    from examples.gradio_app import page
    from runtime import Pipeline

    with Pipeline.load(small_bundle) as pipeline:
        assert isinstance(page(pipeline), gradio.Interface)


def test_the_comfyui_node(small_bundle: Path) -> None:
    done = run("comfyui_node", small_bundle)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\(21, \d+, \d+, 3\) torch.float32 True 16\n", done.stdout)


def test_the_diffusers_block(small_bundle: Path) -> None:
    pytest.importorskip("diffusers", reason="a large package, in no default set-up")
    done = run("diffusers_block", small_bundle)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\(21, \d+, \d+, 3\) uint8", done.stdout)


def test_polygraphy_as_its_page_prints_it(tiny_bundle: Path) -> None:
    """The commands of docs/polygraphy.md, in the folder of a bundle."""
    pytest.importorskip("polygraphy")
    page = (ROOT / "docs" / "polygraphy.md").read_text()
    commands = re.findall(r"^    (polygraphy .*)$", page, re.MULTILINE)
    assert len(commands) == 3
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for command in commands:
        name, *arguments = shlex.split(command.replace("../../../examples", str(ROOT / "examples")))
        tool = shutil.which(name, path=str(Path(sys.executable).parent)) or name
        done = subprocess.run(
            [tool, *arguments], cwd=tiny_bundle, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "PASSED" in done.stdout or "Graph Input" in done.stdout
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "examples" / "polygraphy_inputs.py"),
        ],  # also as run("polygraphy_inputs") would
        cwd=tiny_bundle,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert re.search(r"^frame_slots int32 \(18,\)$", done.stdout, re.MULTILINE), done.stderr
