from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from runtime.cli.generate import parse_switch
from runtime.cli.main import main
from tests.runtime.conftest import MakeBundle
from tests.runtime.handmade import TEXT_DIM, TEXT_LEN, edit_manifest, relist

ROOT = Path(__file__).parents[3]


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_generate_writes_video_and_contact_sheet(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip, sheet = tmp_path / "clip.mp4", tmp_path / "sheet.png"
    arguments = ["generate", str(bundle), "--prompt", "a red fox", "--seed", "7", "--threads", "1"]
    assert main([*arguments, "--seconds", "5", "--out", str(clip), "--contact-sheet", str(sheet)]) == 0
    assert frames_of(clip).shape == (81, 32, 32, 3)
    assert Image.open(sheet).size == (6 * 36 - 4, 2 * 36 - 4)
    captured = capsys.readouterr()
    for text in ("81 (5.06 s at 16 FPS)", "FPS", "denoise per chunk", "decode per chunk", "other per chunk"):
        assert text in captured.out
    assert "81/81" in captured.err
    assert sorted(item.name for item in tmp_path.iterdir()) == ["clip.mp4", "sheet.png"]


def test_generate_switches_prompts_where_told(bundle: Path, tmp_path: Path) -> None:
    def run(name: str, *extra: str) -> np.ndarray:
        out = tmp_path / name
        base = ["generate", str(bundle), "--prompt", "a red fox", "--seconds", "4", "--threads", "1"]
        assert main([*base, "--out", str(out), *extra]) == 0
        return frames_of(out)

    plain = run("plain.mp4")
    switched = run("switched.mp4", "--switch", "2: snow: sea", "--switch", "4:fox jumps", "--recache", "all")
    assert len(plain) == len(switched) == 69
    # Chunk 2 starts at frame 21. The encoder looks ahead, so identical frames differ a little.
    assert np.abs(plain[:20].astype(int) - switched[:20]).mean() < 5
    assert np.abs(plain[21:].astype(int) - switched[21:]).mean() > 10


def test_generate_goes_on_from_a_video(make_bundle: MakeBundle, tmp_path: Path) -> None:
    bundle = make_bundle(with_encoder=True)
    base = ["generate", str(bundle), "--prompt", "a", "--seconds", "1.5", "--threads", "1"]
    first, more, still = (tmp_path / name for name in ("first.mp4", "more.mp4", "still.mp4"))
    assert main([*base, "--out", str(first)]) == 0
    assert main([*base, "--out", str(more), "--start", str(first), "--switch", "1: snow"]) == 0
    assert main([*base, "--out", str(still), "--start", str(first)]) == 0
    # Two new chunks of 12 frames; the switch counts from the first of them.
    assert len(frames_of(more)) == len(frames_of(still)) == 24
    assert np.abs(frames_of(more)[:11].astype(int) - frames_of(still)[:11]).mean() < 5
    assert np.abs(frames_of(more)[12:].astype(int) - frames_of(still)[12:]).mean() > 5


def test_generate_from_an_embedding(bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "prompt.npy", np.ones((TEXT_LEN, TEXT_DIM)))
    embedding = ["--embedding", str(tmp_path / "prompt.npy")]
    assert (
        main(["generate", str(bundle), *embedding, "--seconds", "1", "--out", str(tmp_path / "a.mp4")]) == 0
    )
    assert len(frames_of(tmp_path / "a.mp4")) == 21


def test_long_and_empty_prompts(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--seconds", "0.5", "--out", str(tmp_path / "a.mp4"), "--threads", "1"]
    assert main(["generate", str(bundle), "--prompt", "fox " * 2500, *out]) == 0
    assert "warning: the prompt has 2500 tokens" in capsys.readouterr().err
    assert main(["generate", str(bundle), "--prompt", "", *out]) == 0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--seconds", "0"], "seconds is 0.0; expected a positive number"),
        (["--seconds", "nan"], "seconds is nan"),
        (["--seconds", "1e308"], "expected a positive number of at most 1,000,000"),
        (["--out", "folder\0/clip.mp4"], "of the output file does not exist"),
        (["--seed", "-1"], "seed is -1"),
        (["--threads", "0"], "threads is 0"),
        (["--out", "clip.gif"], "must end in .mp4"),
        (["--out", "nowhere/clip.mp4"], "does not exist; create it first"),
        (["--contact-sheet", "sheet.jpg"], "must end in .png"),
        (["--switch", "fox"], "expected a chunk index, a colon and a prompt"),
        (["--switch", "7: fox"], "--switch names chunk 7, but 5 s are 7 chunks, 0 to 6"),
        (["--prompt", "fox \udcff"], "not valid Unicode"),
    ],
)
def test_bad_input_exits_with_2_and_writes_nothing(
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    extra: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", str(bundle), "--out", "clip.mp4", *extra]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", "pickle", "wrong shape", None])
def test_bad_embedding_exits_with_2(bundle: Path, tmp_path: Path, content: Any) -> None:
    path = tmp_path / "prompt.npy"
    if content == "pickle":
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    elif content == "wrong shape":
        np.save(path, np.zeros((1, 1)))
    elif content is not None:
        path.write_bytes(content)
    out = tmp_path / "clip.mp4"
    assert main(["generate", str(bundle), "--embedding", str(path), "--out", str(out)]) == 2
    assert not out.exists()


@pytest.mark.parametrize("command", [["generate", "--out", "clip.mp4"], ["bench", "--json", "bench.json"]])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("nothing there", "no bundle at"),
        ("changed byte", "the file was changed"),
        ("missing file", "is missing"),
        ("missing component", "lacks the component(s) clean"),
        ("newer schema", "upgrade the runtime"),
        ("path out", "leads out of the bundle"),
    ],
)
def test_bad_bundle_exits_with_2_and_writes_nothing(
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    damage: str,
    message: str,
) -> None:
    copy = tmp_path / "copy"
    if damage != "nothing there":
        shutil.copytree(bundle, copy)
    if damage == "changed byte":
        data = bytearray((copy / "clean.onnx").read_bytes())
        data[len(data) // 2] ^= 1
        (copy / "clean.onnx").write_bytes(data)
    elif damage == "missing file":
        (copy / "vae_next.onnx").unlink()
    elif damage == "missing component":
        edit_manifest(copy, lambda raw: raw["components"].pop("clean"))
    elif damage == "newer schema":
        edit_manifest(copy, lambda raw: raw.update(schema_version=9))
    elif damage == "path out":
        edit_manifest(copy, lambda raw: raw["files"][0].update(path="../step.onnx"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    assert main([command[0], str(copy), *command[1:]]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert list(work.iterdir()) == []


def test_failure_while_running_exits_with_1_and_leaves_nothing(
    make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_bundle(fail_at_chunk=3)
    assert main(["generate", str(folder), "--out", str(tmp_path / "clip.mp4")]) == 1
    assert "chunk 3 failed: component 'step' failed" in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_graph_that_is_no_onnx_exits_with_1(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    (copy / "step.onnx").write_bytes(b"not a graph")
    relist(copy, "step.onnx")
    assert main(["generate", str(copy), "--out", str(tmp_path / "clip.mp4")]) == 1
    assert not (tmp_path / "clip.mp4").exists()


def test_graph_that_differs_from_its_manifest_exits_with_2(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    edit_manifest(copy, lambda raw: raw["components"]["clean"]["outputs"][0].update(shape=[13, 1, 8]))
    assert main(["generate", str(copy), "--out", str(tmp_path / "clip.mp4")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "component 'clean', output 'k.0': it is [13, 1, 8], and the model makes it [12, 1, 8]" in said


def test_bench_reports(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    arguments = ["bench", str(bundle), "--chunks", "3", "--warmup-chunks", "1", "--threads", "1"]
    assert main([*arguments, "--sessions", "2", "--json", str(path)]) == 0
    assert "time outside the engines" in capsys.readouterr().out
    result = json.loads(path.read_text())
    assert result["frames"] == 2 * 3 * 12 and result["sessions"] == 2
    assert result["fps"] == pytest.approx(72 / result["seconds"])
    assert [chunk["index"] for chunk in result["chunks"]] == [1, 2, 3] * 2
    share = sum(c["other"] for c in result["chunks"]) / sum(
        c["denoise"] + c["decode"] + c["other"] for c in result["chunks"]
    )
    assert result["overhead_percent"] == pytest.approx(100 * share)
    assert main([*arguments, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["frames"] == 36


FRAMEWISE = {  # one latent frame a chunk in two steps, the first in four
    "chunk_frames": 1,
    "window_frames": 5,
    "sink_frames": 2,
    "sigmas": (1.0, 0.8333333, 0.0),
    "first_sigmas": (1.0, 0.9375, 0.8333333, 0.625),
}


def test_generate_frame_by_frame_switches_within_one_latent_frame(
    make_bundle: MakeBundle, tmp_path: Path
) -> None:
    bundle = make_bundle(**FRAMEWISE)
    latents = []
    for name, extra in (("plain", ()), ("switched", ("--switch", "3: snow"))):
        files = ["--out", str(tmp_path / f"{name}.mp4"), "--latents", str(tmp_path / f"{name}.npy")]
        prompt = ["--prompt", "a red fox", "--seconds", "1", "--threads", "1"]
        assert main(["generate", str(bundle), *prompt, *files, *extra]) == 0
        # One frame, then four for each latent frame; a second of 16 rounds up to whole chunks.
        assert len(frames_of(tmp_path / f"{name}.mp4")) == 1 + 4 * 4
        latents.append(np.load(tmp_path / f"{name}.npy"))
    plain, switched = latents
    assert plain.shape[1] == 5
    alike = [np.array_equal(plain[:, frame], switched[:, frame]) for frame in range(5)]
    assert alike == [True, True, True, False, False]


def test_bench_frame_by_frame(make_bundle: MakeBundle, tmp_path: Path) -> None:
    """Each chunk is one latent frame; the first, which has more steps, is warm-up."""
    path = tmp_path / "bench.json"
    arguments = ["bench", str(make_bundle(**FRAMEWISE)), "--chunks", "4", "--warmup-chunks", "1"]
    assert main([*arguments, "--threads", "1", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["frames"] == 4 * 4
    assert [(chunk["index"], chunk["frames"]) for chunk in result["chunks"]] == [(n, 4) for n in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    "extra", [["--chunks", "0"], ["--warmup-chunks", "-1"], ["--sessions", "0"], ["--json", "no/b.json"]]
)
def test_bench_bad_input(bundle: Path, extra: list[str]) -> None:
    assert main(["bench", str(bundle), *extra]) == 2


@pytest.mark.parametrize(
    "arguments", [[], ["generate"], ["fly"], ["generate", "b", "--out", "a.mp4", "--recache", "x"]]
)
def test_unusable_command_line_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_parse_switch() -> None:
    assert parse_switch(" 12 :  rain: and snow\nnow ") == (12, "rain: and snow\nnow")
    assert parse_switch("0:") == (0, "")


_PROBE = """
import sys
from runtime.cli.main import main
try:
    main(["--help"])
except SystemExit:
    pass
heavy = {"numpy", "onnxruntime", "av", "PIL", "tokenizers", "ftfy", "rich", "pydantic"} & set(sys.modules)
assert not heavy, heavy
assert main(["generate", sys.argv[1], "--prompt", "a fox", "--seconds", "1", "--out", sys.argv[2]]) == 0
rooms = {"torch", "onnx", "onnx_ir", "onnxscript", "export", "plugins", "lightforcing_ref"} & set(sys.modules)
assert not rooms, rooms
"""


def test_help_is_light_and_a_rollout_imports_no_other_room(bundle: Path, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-c", _PROBE, str(bundle), str(tmp_path / "a.mp4")],
        cwd=ROOT,
        check=True,
        timeout=180,
    )


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_signals_leave_nothing(
    bundle: Path, tmp_path: Path, number: signal.Signals, code: int, word: str
) -> None:
    arguments = ["generate", str(bundle), "--seconds", "3600", "--out", str(tmp_path / "clip.mp4")]
    process = subprocess.Popen(
        [sys.executable, "-m", "runtime", *arguments, "--contact-sheet", str(tmp_path / "sheet.png")],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 180
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == code and f"{word}; nothing was written" in errors
    assert list(tmp_path.iterdir()) == []


def generate(bundle: Path, out: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runtime", "generate", str(bundle), "--seconds", "0.5", "--threads", "1"]
    return subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False, **options
    )


def test_a_clip_that_was_written_is_not_called_unwritten(bundle: Path, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    with open("/dev/full", "w") as full:
        result = generate(bundle, clip, stdout=full)
    assert result.returncode == 1 and frames_of(clip).shape[0] == 9
    last = result.stderr.splitlines()[-1]
    assert "standard output cannot be written" in last and last.endswith(f"{clip} was written")


@pytest.mark.parametrize("name", ["take: 1.mp4", "视频.mp4", "%d.mov", "a\nb.mkv", f"{'n' * 250}.mp4"])
def test_names_of_every_kind(bundle: Path, tmp_path: Path, name: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = generate(bundle, tmp_path / name, env=environment, stdout=subprocess.PIPE)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with (tmp_path / name).open("rb") as file, av.open(file) as container:
        assert sum(1 for _ in container.decode(video=0)) == 9


_FULL_DISK = """
import resource, signal, sys
from runtime.cli.main import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
sys.exit(main(["generate", sys.argv[1], "--seconds", "5", "--out", sys.argv[2]]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits file sizes with POSIX calls")
def test_full_disk_leaves_nothing(bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _FULL_DISK, str(bundle), str(tmp_path / "clip.mp4")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)
    assert result.returncode == 1 and "nothing was written" in result.stderr
    assert list(tmp_path.iterdir()) == []
