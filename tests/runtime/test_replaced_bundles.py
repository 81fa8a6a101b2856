"""A bundle that is replaced or written over under a pipeline: what was verified goes on, or an error says so."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from runtime import Pipeline
from runtime.bundle import OpenFile, load_bundle
from runtime.bundle.weights_file import WeightsFile
from runtime.errors import BundleError, BundleIntegrityError
from runtime.pipeline import TextEncoderMode
from tests.runtime.handmade import relist

ROOT = Path(__file__).resolve().parents[2]


PROMPT = "a red circle"
NEW_PROMPT = "a blue square"


def video(pipe: Pipeline, embedding: np.ndarray) -> str:
    with pipe.session(embedding=embedding, seed=7) as session:
        return hashlib.sha256(next(session.stream()).frames.tobytes()).hexdigest()


def renamed(live: Path) -> None:
    """As a build publishes: the new folder takes the name, the old one is deleted. Every byte in it is another."""
    new = Path(shutil.copytree(live, live.with_name("new")))
    for path in new.iterdir():
        path.write_bytes(bytes(255 - byte for byte in path.read_bytes()[:4096]))
    live.rename(live.with_name("old"))
    new.rename(live)
    shutil.rmtree(live.with_name("old"))


def written_over(live: Path) -> None:
    for path in live.iterdir():
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))


def written_over_keeping_times(live: Path) -> None:
    """As rsync --inplace --times does."""
    for path in live.iterdir():
        times = path.stat()
        with path.open("r+b") as file:
            file.write(bytes(times.st_size))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def one_bit(live: Path) -> None:
    path = live / load_bundle(live).manifest.text.weights
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def cut_short(live: Path) -> None:
    for path in live.iterdir():
        os.truncate(path, 0)


def deleted(live: Path) -> None:
    shutil.rmtree(live)


STILL_THERE = (renamed, deleted)
CHANGED = (written_over, written_over_keeping_times, one_bit, cut_short)


@pytest.mark.parametrize(
    ("name", "text_encoder", "changes"),
    [
        ("bundle", "on-demand", (*STILL_THERE, *CHANGED)),
        ("bundle", "resident", (*STILL_THERE, *CHANGED)),
        ("tiny_bundle", "on-demand", (cut_short,)),  # with weights in files of their own
    ],
)
def test_what_was_verified_stays_in_use_or_is_an_error(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    name: str,
    text_encoder: TextEncoderMode,
    changes: tuple[Callable[[Path], None], ...],
) -> None:
    with Pipeline.load(request.getfixturevalue(name), warmup=False) as untouched:
        expected = untouched.embed(NEW_PROMPT)
    for change in changes:
        live = Path(shutil.copytree(request.getfixturevalue(name), tmp_path / change.__name__ / "live"))
        with Pipeline.load(live, text_encoder=text_encoder, warmup=False) as pipe:
            embedding = pipe.embed(PROMPT)
            before = video(pipe, embedding)
            change(live)
            if change in STILL_THERE:
                assert np.array_equal(pipe.embed(NEW_PROMPT), expected), change.__name__
            else:
                with pytest.raises(BundleIntegrityError, match=r"text.* was changed since"):
                    pipe.session(NEW_PROMPT)
            assert np.array_equal(pipe.embed(PROMPT), embedding), change.__name__  # kept since before
            assert video(pipe, embedding) == before, change.__name__


def touched(live: Path) -> None:
    for path in live.iterdir():
        path.touch()


def linked_elsewhere(live: Path) -> None:
    for path in live.iterdir():
        os.link(path, live.with_name(path.name))


@pytest.mark.parametrize("change", [touched, linked_elsewhere])
def test_what_changes_no_contents_is_no_error(
    bundle: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    live = Path(shutil.copytree(bundle, tmp_path / "live"))
    with Pipeline.load(bundle, warmup=False) as untouched, Pipeline.load(live, warmup=False) as pipe:
        pipe.embed(PROMPT)
        change(live)
        assert np.array_equal(pipe.embed(NEW_PROMPT), untouched.embed(NEW_PROMPT))


CUT_WHILE_READ = """
import os, sys
from pathlib import Path
from runtime import Pipeline
from runtime.errors import BundleIntegrityError
live = Path(sys.argv[1])
with Pipeline.load(live, warmup=False) as pipe:
    weights, layer = live / pipe.manifest.text.weights, pipe.engine.encode_text_layer
    def cut(*arguments):
        os.truncate(weights, 0)
        return layer(*arguments)
    pipe.engine.encode_text_layer = cut
    try:
        pipe.embed("a red circle")
    except BundleIntegrityError as error:
        print(error)
"""


def test_a_file_that_is_cut_short_while_it_is_read_ends_no_process(bundle: Path, tmp_path: Path) -> None:
    live = Path(shutil.copytree(bundle, tmp_path / "live"))
    result = subprocess.run(
        [sys.executable, "-c", CUT_WHILE_READ, str(live)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result
    assert "cut short" in result.stdout or "was changed" in result.stdout


def test_a_file_replaced_between_checking_and_opening_is_found(bundle: Path, tmp_path: Path) -> None:
    live = Path(shutil.copytree(bundle, tmp_path / "live"))
    loaded = load_bundle(live)
    for entry in loaded.manifest.files:
        path = live / entry.path
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
        with loaded.opened(entry.path) as file:
            assert file.contents() == content, "another file with the same contents will do"
        path.write_bytes(content[::-1])
        with pytest.raises(BundleIntegrityError, match=f"'{entry.path}' was changed since"):
            loaded.opened(entry.path)
    with pytest.raises(BundleIntegrityError, match="is not among the manifest's files"):
        loaded.opened("manifest.json")


def test_a_name_that_leads_elsewhere_now_is_found(bundle: Path, tmp_path: Path) -> None:
    live = Path(shutil.copytree(bundle, tmp_path / "live"))
    with load_bundle(live).opened("step.onnx") as file:
        file.check_name()
        content = (live / "step.onnx").read_bytes()
        (live / "step.onnx").rename(live / "other")
        (live / "step.onnx").write_bytes(content)
        file.check_name()
        (live / "step.onnx").write_bytes(b"x" * len(content))
        with pytest.raises(BundleIntegrityError, match="was changed"):
            file.check_name()
        assert file.contents() == content, "the file that is open is the old one"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero"), tmp_path / "nothing"):
        with pytest.raises(BundleError, match="cannot read"):
            OpenFile(path)


def external(copy: Path, name: str, location: str) -> None:
    """Let the first initializer that lies in another file lie in `location`."""
    path = copy / name
    model = onnx.load(path, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in tensor.external_data if entry.key == "location").value = location
    path.write_bytes(model.SerializeToString())
    relist(copy, name)


@pytest.mark.parametrize("location", ["unlisted.weights", "../outside.weights", "/dev/zero", "manifest.json"])
def test_weights_of_a_graph_lie_in_a_listed_file(tiny_bundle: Path, tmp_path: Path, location: str) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    for name in ("unlisted.weights", "../outside.weights"):
        (copy / name).write_bytes((copy / "vae_next.weights").read_bytes())
    external(copy, "vae_next.onnx", location)
    with pytest.raises(BundleIntegrityError, match="is not among the manifest's files"):
        Pipeline.load(copy)


@pytest.mark.parametrize("name", ["offset", "length"])
def test_weights_of_a_graph_lie_inside_their_file(tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    path = copy / "vae_next.onnx"
    model = onnx.load(path, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in tensor.external_data if entry.key == name).value = str(1 << 40)
    path.write_bytes(model.SerializeToString())
    relist(copy, "vae_next.onnx")
    with pytest.raises(Exception, match=r"was cut short|has its values at") as caught:
        Pipeline.load(copy)
    assert type(caught.value).__module__ == "runtime.errors"


def test_rows_are_those_of_the_table(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    table = np.arange(12, dtype=np.float16).reshape(4, 3)
    save_file({"table": table, "none": np.empty((2, 0), np.float32)}, tmp_path / "w")
    with WeightsFile(tmp_path / "w") as weights:
        assert np.array_equal(weights.rows("table", [3, 0, 3]), table[[3, 0, 3]])
        assert weights.rows("table", []).shape == (0, 3)
        assert weights.rows("none", [1]).shape == (1, 0)
        for row in (4, -1):
            with pytest.raises(BundleError, match="has 4 rows"):
                weights.rows("table", [row])
