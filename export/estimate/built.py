"""What the engines of a built bundle move besides their products, as their own description says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from export.errors import InputError
from runtime.bundle import Bundle, load_bundle

from .memory import Planned

__all__ = ["PARTS", "built_traffic", "matching_bundle"]

PARTS = ("first", "layer", "last", "vae_first", "vae_next")
"""Components of a segmented bundle that run once or more in every chunk."""


def matching_bundle(root: Path, request: Planned) -> Bundle:
    """Open a bundle of what is planned.

    Raises:
        BundleError: it is no bundle.
        InputError: it is one of another model, size, precision or cache.
    """
    bundle = load_bundle(root, verify=False)
    manifest = bundle.manifest
    model = manifest.model
    found = (model.preset, model.video_height, model.video_width, manifest.precision)
    wanted = (request.preset.name, request.height, request.width, request.precision)
    if found != wanted:
        raise InputError(
            "bundle {} is of {} {}x{} in {}, and {} {}x{} in {} is planned; plan the same".format(
                root, *found, *wanted
            )
        )
    variant = request.variant
    held = (manifest.cache.kv or "bf16", manifest.attention.products or "bf16")
    planned = (variant.cache.kv or "bf16", variant.products or "bf16")
    if held != planned:
        raise InputError(
            "bundle {} holds keys and values in {} and multiplies in {}, and {} and {} are planned; plan the same "
            "(--kv, --attention)".format(root, *held, *planned)
        )
    return bundle


def built_traffic(bundle: Bundle) -> Mapping[str, int]:
    """Bytes of the element-wise work of one run of each of `PARTS` that the bundle has.

    Where there are several engines of a part (a layer each, or a format), the mean of them.

    Raises:
        InputError: the engines of this backend do not tell.
        BuildError: they tell in a way that is not known.
    """
    backend = bundle.manifest.backend
    on_gpu = bundle.manifest.target.compute_capability is not None
    if backend not in ("inductor", "tensorrt-rtx") or not on_gpu:
        raise InputError(
            f"bundle {bundle.root} has the backend {backend} on {bundle.manifest.target.name}, whose engines do not "
            f"tell what they move; name one of inductor or tensorrt-rtx for a GPU, or leave --bundle out"
        )
    found = {}
    for part in PARTS:
        moved = list(_moved(bundle, part))
        if moved:
            found[part] = sum(moved) // len(moved)
    return found


def _moved(bundle: Bundle, part: str) -> Iterator[int]:
    from export.backends.inductor.generated import read_package
    from export.backends.tensorrt_rtx.engine_text import read_engine

    for name, component in bundle.manifest.components.items():
        if component.file is None or name.partition(".")[0] != part:
            continue
        path = bundle.path(component.file)
        if bundle.manifest.backend == "inductor":
            yield sum(launch.nbytes for launch in read_package(path, component) if launch.is_generated)
        else:
            yield read_engine(path).moved_bytes
