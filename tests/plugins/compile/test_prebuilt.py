"""Kernel images that come with the package: taken where they are those of the sources, and only then."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from plugins.compile.prebuilt import has_images, source_hash, write_prebuilt
from runtime.bundle.images import Image, ImageSet, read_images, write_images
from runtime.errors import BundleIntegrityError


def image(name: str, cubin: bytes) -> Image:
    digest = hashlib.sha256(cubin).hexdigest()
    return Image.model_validate(
        {
            "name": name,
            "kernel": name.partition("-")[0],
            "file": f"{name}.cubin",
            "sha256": digest,
            "bytes": len(cubin),
            "entry": name,
            "threads": 128,
            "shared_memory": 0,
            "grid": [1, 1, 1],
            "arguments": [{"name": "q", "type": "pointer", "source": "buffer", "element": "float32"}],
            "serves": {},
            "limits": {},
            "registers": 32,
            "stack": 0,
            "spill_stores": 0,
            "spill_loads": 0,
            "source_sha256": source_hash(),
        }
    )


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two images of this package's sources for one architecture."""
    cubins = {name: b"\x7fELF" + name.encode() * 40 for name in ("attend-a", "select-b")}
    made = tuple(image(name, cubin) for name, cubin in cubins.items())
    index = ImageSet(arch="sm_90", target="sm_90a", driver=525, compiler={}, images=made)
    write_images(tmp_path / "images" / "sm_90", index, cubins)
    return tmp_path / "images"


def test_those_that_are_asked_for_are_copied(images: Path, tmp_path: Path) -> None:
    index = write_prebuilt(90, {"select-b"}, tmp_path / "out", images)
    assert index is not None
    copied, cubins = read_images(tmp_path / "out" / "sm_90")
    assert [image.name for image in copied.images] == ["select-b"] == list(cubins)
    assert cubins == {"select-b": read_images(images / "sm_90")[1]["select-b"]}


def test_nothing_is_taken_where_one_is_missing(images: Path, tmp_path: Path) -> None:
    assert write_prebuilt(90, {"select-b", "commit-c"}, tmp_path / "out", images) is None
    assert write_prebuilt(80, {"select-b"}, tmp_path / "out", images) is None
    assert not (tmp_path / "out").exists()


def test_images_of_other_sources_are_left_alone(images: Path, tmp_path: Path) -> None:
    index = images / "sm_90" / "kernels.json"
    index.write_text(index.read_text().replace(source_hash(), "0" * 64))
    assert not has_images(90, images)
    assert write_prebuilt(90, {"select-b"}, tmp_path / "out", images) is None


def test_a_damaged_image_is_named(images: Path, tmp_path: Path) -> None:
    (name,) = [
        image["file"] for image in json.loads((images / "sm_90" / "kernels.json").read_text())["images"]
    ][:1]
    (images / "sm_90" / name).write_bytes(b"\x7fELF" + bytes(60))
    with pytest.raises(BundleIntegrityError, match=name):
        write_prebuilt(90, {"attend-a"}, tmp_path / "out", images)
