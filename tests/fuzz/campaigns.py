"""What is tried. A trial returns "right" (as without damage), "clear" (an error of this project) or raises."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from runtime.errors import LightForcingError

from .damage import change_json, damaged, pick

__all__ = ["CAMPAIGNS", "Outcome", "prepare"]

Outcome = Literal["right", "clear", "accepted"]
"""`accepted`: the hashes were redone, and what loads is another bundle that computes."""

ROOT: Final = Path(__file__).resolve().parents[2]
_TERMINAL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_INJECTED: Final = (
    "\x1b[31mred",
    "\x1b]0;title\x07",
    "\x9b2J",
    "[bold red]x[/]",
    "[link=file:///etc]x[/link]",
    "a\rb",
    "\x08" * 5,
)


def prepare(folder: Path) -> None:
    """What every trial starts from: a hand-made bundle, and checkpoints of both formats."""
    import torch
    from safetensors.torch import load_file

    from tests.runtime import handmade

    bundle = folder / "bundle"
    handmade.build_bundle(bundle)
    handmade.add_golden(bundle)
    (folder / "frames").write_text(_frames(bundle))
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir()
    for name in ("dit", "vae", "text_encoder"):
        source = ROOT / "lightforcing_ref/assets/tiny" / f"{name}.safetensors"
        shutil.copy(source, checkpoints)
        torch.save(load_file(source), checkpoints / f"{name}.pt")


def _frames(bundle: Path) -> str:
    """One chunk from a prompt, as a hash; warnings are no news here."""
    from runtime import Pipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with (
            Pipeline.load(bundle, threads=1, warmup=False) as pipe,
            pipe.session("a red fox", seed=7) as session,
        ):
            frames = next(session.stream(timeout=60)).frames
            model = pipe.manifest.model
            assert frames.shape[1:] == (model.video_height, model.video_width, 3), frames.shape
            assert frames.dtype == np.uint8
            return hashlib.sha256(frames.tobytes()).hexdigest()


def _loaded(folder: Path, prepared: Path) -> Outcome:
    try:
        found = _frames(folder)
    except LightForcingError as error:
        assert str(error).strip(), "an error without a word"
        return "clear"
    return "right" if found == (prepared / "frames").read_text() else "accepted"


def bundle_damage(chance: random.Random, folder: Path, prepared: Path) -> Outcome:
    """A file of a bundle is damaged, and its manifest does not know."""
    shutil.copytree(prepared / "bundle", folder, dirs_exist_ok=True)
    path = pick(folder, chance)
    path.write_bytes(damaged(path.read_bytes(), chance))
    outcome = _loaded(folder, prepared)
    assert outcome != "accepted" or path.name == "manifest.json", f"damage of {path.name} changes frames"
    return outcome


def bundle_vouched(chance: random.Random, folder: Path, prepared: Path) -> Outcome:
    """A file is damaged, and the manifest vouches for it."""
    from tests.runtime.handmade import relist

    shutil.copytree(prepared / "bundle", folder, dirs_exist_ok=True)
    path = pick(folder, chance)
    if path.name == "manifest.json":
        path = folder / "step.onnx"
    path.write_bytes(damaged(path.read_bytes(), chance))
    relist(folder, path.name)
    return _loaded(folder, prepared)


def manifest_changed(chance: random.Random, folder: Path, prepared: Path) -> Outcome:
    """The manifest says something else, of any type and size."""
    shutil.copytree(prepared / "bundle", folder, dirs_exist_ok=True)
    raw = json.loads((folder / "manifest.json").read_text())
    for _ in range(chance.choice((1, 1, 2))):
        change_json(raw, chance)
    (folder / "manifest.json").write_text(json.dumps(raw))
    return _loaded(folder, prepared)


def checkpoint_damage(chance: random.Random, folder: Path, prepared: Path) -> Outcome:
    """A checkpoint is damaged. Archives of PyTorch carry checksums, so that damage to values is found in them."""
    import torch

    from lightforcing_ref import checkpoint
    from lightforcing_ref.config import PRESETS
    from lightforcing_ref.errors import LightForcingError as ReferenceError

    preset = PRESETS["tiny"]
    loaders: dict[str, Callable[[Path], Mapping[str, Any]]] = {
        "dit": lambda path: checkpoint.load_dit_state(path, preset.dit),
        "vae": lambda path: checkpoint.load_vae_state(path, preset.vae),
        "text_encoder": lambda path: checkpoint.load_umt5_state(path, preset.text),
    }
    source = pick(prepared / "checkpoints", chance)
    path = folder / source.name
    path.write_bytes(damaged(source.read_bytes(), chance))
    try:
        found = loaders[path.stem](path)
    except ReferenceError:
        return "clear"
    good = loaders[path.stem](source)
    same = found.keys() == good.keys() and all(torch.equal(found[name], good[name]) for name in good)
    assert same or path.suffix == ".safetensors", "a checkpoint whose checksums do not hold is taken"
    return "right" if same else "accepted"


def terminal_injection(chance: random.Random, folder: Path, prepared: Path) -> Outcome:
    """Texts of a manifest, or a prompt, that would steer a terminal or be markup."""
    from export.cli.main import main as export
    from runtime.cli.main import main as runtime

    shutil.copytree(prepared / "bundle", folder, dirs_exist_ok=True)
    raw = json.loads((folder / "manifest.json").read_text())
    text = chance.choice(_INJECTED)
    places: list[tuple[dict[str, Any], str]] = [
        (raw, "created"),
        (raw, "variant"),
        (raw, "status"),
        (raw["target"], "name"),
        (raw["provenance"], "command"),
        (raw["model"], "preset"),
    ]
    for part, key in [(raw, "name"), *chance.sample(places, 2)]:
        part[key] = text
    (folder / "manifest.json").write_text(json.dumps(raw))
    clip = ["generate", str(folder), "--threads", "1", "--out", str(folder / "c.mp4")]
    command, arguments = chance.choice(
        (
            (export, ["inspect", str(folder)]),
            (runtime, ["verify", str(folder), "--threads", "1"]),
            (runtime, ["verify", str(folder), "--dry-run"]),
            (runtime, [*clip, "--prompt", text, "--seconds", "1"]),
            (runtime, [*clip, "--switch", f"9: {text}"]),
        )
    )
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
        code = command(arguments)
    said = heard.getvalue()
    assert not _TERMINAL.search(said), f"reaches the terminal: {_TERMINAL.findall(said)[:3]}"
    assert code in (0, 1, 2), code
    assert "Traceback" not in said
    if command is export and text.startswith("["):
        assert text in said, "markup was obeyed"
    return "right" if code == 0 else "clear"


_PUBLISH: Final = """
import sys
from pathlib import Path
from export.parts.workspace import open_workspace
out = Path(sys.argv[1])
print("ready", flush=True)
for turn in range(10_000):
    with open_workspace(out, "b", str(turn), marker="m") as workspace:
        def write(folder):
            for name in ("m", "n"):
                (folder / name).write_text(str(turn) * 50)
            return ["m", "n"]
        workspace.publish(workspace.component("all", write)[0])
"""


def publish_killed(chance: random.Random, folder: Path, prepared: Path) -> Outcome:
    """A process that publishes one result after another is killed: the result under the name is whole."""
    from export.parts.workspace import open_workspace

    process = subprocess.Popen(
        [sys.executable, "-c", _PUBLISH, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(chance.uniform(0.0, 0.15))
    process.kill()
    process.wait()
    process.stdout.close()
    result = folder / "b"
    if result.exists():
        assert (result / "m").read_text() == (result / "n").read_text() != ""
        assert {path.name for path in result.iterdir()} == {"m", "n"}
    with open_workspace(folder, "b", "after", marker="m"):
        pass
    return "right"


_LIVE: Final = """
import os, signal, sys, threading, time
import numpy as np
from runtime import Pipeline
pipe = Pipeline.load(sys.argv[1], threads=1, sessions=2)
how, wait = sys.argv[2], float(sys.argv[3])
text = pipe.manifest.text
def go(session):
    for chunk in session.stream():
        pass
for _ in range(2):
    session = pipe.session(embedding=np.zeros((text.text_len, text.dim), np.float32))
    threading.Thread(target=go, args=(session,), daemon=True).start()
time.sleep(wait)
if how == "exit": sys.exit(0)
if how == "raise": raise KeyError("of the user")
if how == "term": signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); os.kill(os.getpid(), signal.SIGTERM)
if how == "close": pipe.close()
if how == "drop": del pipe, session
"""
_CODES: Final = {"exit": 0, "raise": 1, "term": 143, "close": 0, "drop": 0, "end": 0}


def exit_live(chance: random.Random, folder: Path, prepared: Path) -> Outcome:
    """An interpreter ends while two streams are being computed."""
    how = chance.choice(sorted(_CODES))
    result = subprocess.run(
        [sys.executable, "-c", _LIVE, str(prepared / "bundle"), how, str(chance.uniform(0, 0.1))],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == _CODES[how], (how, result.returncode, result.stderr[-300:])
    assert signal.SIGABRT not in (-result.returncode, result.returncode - 128)
    return "right"


Campaign = Callable[[random.Random, Path, Path], Outcome]
CAMPAIGNS: Final[dict[str, Campaign]] = {
    "bundle damage": bundle_damage,
    "bundle damage, hashes redone": bundle_vouched,
    "manifest changes": manifest_changed,
    "checkpoint damage": checkpoint_damage,
    "terminal injections": terminal_injection,
    "kills while publishing": publish_killed,
    "exits under live streams": exit_live,
}
