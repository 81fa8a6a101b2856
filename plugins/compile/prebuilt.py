"""Kernel images that came with this package: what a build takes where there is no compiler, and faster where there is.

`python -m plugins build --out plugins/images` leaves them there before a wheel is made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

from plugins.kernels import specs
from runtime.bundle import images
from runtime.errors import BundleError

__all__ = ["FOLDER", "has_images", "source_hash", "write_prebuilt"]

FOLDER = Path(__file__).resolve().parents[1] / "images"


def source_hash() -> str:
    """SHA-256 over the kernel sources."""
    digest = hashlib.sha256()
    folder = Path(specs.__file__).parent
    for path in sorted(path for ending in ("py", "cu", "cuh") for path in folder.glob(f"*.{ending}")):
        if path.name not in ("__init__.py", "specs.py", "tuning.py", "variant.py"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def has_images(arch: int, folder: Path = FOLDER) -> bool:
    """Whether images for an architecture (compute capability times ten) are here, made of these sources."""
    try:
        found = images.read_index(folder / f"sm_{arch}")
    except BundleError:
        return False
    source = source_hash()
    return all(image.source_sha256 == source for image in found.images)


def write_prebuilt(
    arch: int, names: Collection[str], out: Path, folder: Path = FOLDER
) -> images.ImageSet | None:
    """Copy the images called `names` to `out/sm_XX/`.

    Returns:
        their index; None where there are no images of these sources here, or not all of them.

    Raises:
        BundleError: an image is damaged.
    """
    place = folder / f"sm_{arch}"
    if not has_images(arch, folder):
        return None
    index = images.read_index(place)
    wanted = tuple(image for image in index.images if image.name in names)
    if {image.name for image in wanted} != set(names):
        return None
    chosen = index.model_copy(update={"images": wanted})
    images.write_images(
        out / f"sm_{arch}", chosen, {image.name: images.read_cubin(place, image) for image in wanted}
    )
    return chosen
