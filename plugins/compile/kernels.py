"""Compile the kernels ahead of time: Triton sources to cubins and their index, with no GPU and no network."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypedDict

from filelock import FileLock

from plugins.errors import PluginError
from plugins.kernels import specs
from runtime.bundle import images
from runtime.files import cache_folder, keep, kept, temporary_folder
from runtime.host_memory import processors

from .prebuilt import source_hash

__all__ = ["BuildError", "build", "default_cache", "needed_driver", "parse_archs", "spilling"]

_POINTER_TYPES = {
    "bfloat16": "*bf16",
    "float16": "*fp16",
    "float32": "*fp32",
    "int32": "*i32",
    "int16": "*i16",
    "uint8": "*u8",
}
_SCALAR_TYPES = {"int32": "i32", "float32": "fp32"}
# Old enough for every driver of CUDA 12.8 or later; the instruction set is the same.
_PTX_VERSION = 87
_SCRATCH = ("global_scratch", "profile_scratch")
_PTXAS_REGISTERS = re.compile(r"Used (\d+) registers")
_PTXAS_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_PTX_HEADER = re.compile(r"^\.version \d+\.\d+", re.MULTILINE)
_TARGET = re.compile(r"\.target (sm_\d+[af]?)")
# Of the assemblers that Triton brings, the one of CUDA 12: the images of CUDA 13's ask for a driver of CUDA 13.
_ASSEMBLER = "ptxas"
_COMPILER_OVERRIDES = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH", "PTXAS_OPTIONS")


class BuildError(PluginError):
    """A kernel does not compile."""


class _Entry(TypedDict):
    """What the compiler said about one specialisation; `cubin` in base64. One file of the cache."""

    cubin: str
    entry: str
    target: str
    threads: int
    shared_memory: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


def default_cache() -> Path:
    """Where compiled kernels are kept between builds."""
    return cache_folder("kernels")


def parse_archs(text: str) -> tuple[int, ...]:
    """`"sm_90,sm_120"` -> `(90, 120)`.

    Raises:
        BuildError: an architecture there are no kernels for.
    """
    known = {f"sm_{arch}": arch for arch in specs.ARCHS}
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise BuildError(
            f"unknown architecture(s) {unknown} in {text!r}; expected some of {', '.join(known)}"
        )
    return tuple(dict.fromkeys(known[name] for name in names))


def _cache_key(variant: specs.Variant, arch: int, source: str) -> str:
    what = {
        "variant": asdict(variant),
        "arch": arch,
        "source": source,
        "triton": version("triton"),
        "ptx": _PTX_VERSION,
        "assembler": _ASSEMBLER,
        "overrides": {name: os.environ.get(name) for name in _COMPILER_OVERRIDES},
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def _start_worker(scratch: str) -> None:
    # Runs before Triton is imported in this process. Line information would put the paths of this machine into the
    # images.
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = scratch
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"


def _compile(variant: specs.Variant, arch: int) -> _Entry:
    """Compile one specialisation. Runs in a worker process; needs no GPU."""
    if variant.cuda is None:
        return _compile_triton(variant, arch)
    return _compile_cuda(variant, variant.cuda, arch)


def _resources(variant: specs.Variant, log: str) -> dict[str, int]:
    """Registers and bytes of memory of a thread, from what ptxas said."""
    registers, stack = _PTXAS_REGISTERS.search(log), _PTXAS_STACK.search(log)
    if not (registers and stack):
        raise BuildError(f"cannot read the resources of {variant.name} from ptxas: {log!r}")
    return {
        "registers": int(registers[1]),
        "stack": int(stack[1]),
        "spill_stores": int(stack[2]),
        "spill_loads": int(stack[3]),
    }


def _compile_cuda(variant: specs.Variant, source: specs.CudaSource, arch: int) -> _Entry:
    """Through NVRTC and the ptxas that Triton brings, so that all images come out of one assembler."""
    from triton import knobs

    from .nvrtc import to_ptx

    target = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    ptx = to_ptx(Path(specs.__file__).parent / source.file, target, variant.constants)
    # As Triton does: the instructions are old enough, whatever the compiler's own version is.
    ptx = _PTX_HEADER.sub(f".version {_PTX_VERSION // 10}.{_PTX_VERSION % 10}", ptx, count=1)
    with tempfile.TemporaryDirectory(prefix="ptxas-", dir=temporary_folder()) as scratch:
        given, made = Path(scratch) / "kernel.ptx", Path(scratch) / "kernel.cubin"
        given.write_text(ptx)
        command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={target}", str(given), "-o", str(made)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise BuildError(f"ptxas refuses {variant.name}: {run.stderr.strip()}")
        cubin = made.read_bytes()
    return {
        "cubin": base64.b64encode(cubin).decode(),
        "entry": variant.kernel,
        "target": target,
        "threads": 32 * variant.num_warps,
        "shared_memory": source.shared_memory,
        **_resources(variant, run.stderr),  # type: ignore[typeddict-item]
    }


def _compile_triton(variant: specs.Variant, arch: int) -> _Entry:
    import io
    from contextlib import redirect_stdout

    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {
        argument.name: _POINTER_TYPES[argument.element] if argument.element else _SCALAR_TYPES[argument.type]
        for argument in variant.arguments
    }
    # Buffers start at a multiple of 16 bytes; sizes are not specialised.
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, argument in enumerate(variant.arguments)
        if argument.type == "pointer"
    }
    source = ASTSource(
        fn=specs.kernel_function(variant.kernel),
        signature=signature | dict.fromkeys(variant.constants, "constexpr"),
        constexprs=dict(variant.constants),
        attrs=aligned,
    )
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "maxnreg": variant.max_registers,
        "ptx_version": _PTX_VERSION,
        "enable_fp_fusion": True,
    }
    # Triton's own choice for the newer architectures is the other assembler.
    os.environ.setdefault("TRITON_PTXAS_BLACKWELL_PATH", knobs.nvidia.ptxas.path)
    knobs.nvidia.dump_ptxas_log = True
    log = io.StringIO()
    with redirect_stdout(log):
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    target = _TARGET.search(compiled.asm["ptx"])
    if not target:
        raise BuildError(f"the PTX of {variant.name} names no target")
    metadata = compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise BuildError(f"{variant.name} needs global scratch memory, which launchers do not provide")
    return {
        "cubin": base64.b64encode(compiled.asm["cubin"]).decode(),
        "entry": metadata.name,
        "target": target[1],
        "threads": 32 * metadata.num_warps,
        "shared_memory": metadata.shared,
        **_resources(variant, log.getvalue()),  # type: ignore[typeddict-item]
    }


# e_ident[EI_OSABI] and e_ident[EI_ABIVERSION] of what CUDA 12's assembler makes for Hopper and older, and of what CUDA
# 13's makes for them and both make for Blackwell.
_ABI_CUDA_12, _ABI_CUDA_13 = (51, 7), (65, 8)


def needed_driver(cubin: bytes, arch: int) -> int:
    """The branch of the oldest driver that loads `cubin` on compute capability `arch` (times ten).

    Blackwell's images are taken to come from CUDA 12's assembler, which their header does not tell.

    Raises:
        BuildError: `cubin` is no image of a CUDA 12 or 13 compiler.
    """
    if cubin[:4] != b"\x7fELF" or tuple(cubin[7:9]) not in (_ABI_CUDA_12, _ABI_CUDA_13):
        raise BuildError(
            f"an image for sm_{arch} begins with {cubin[:9].hex()}; expected an ELF header with ABI {_ABI_CUDA_12} or "
            f"{_ABI_CUDA_13} of a CUDA 12 or 13 compiler"
        )
    newer = arch < 100 and tuple(cubin[7:9]) == _ABI_CUDA_13
    return 580 if newer else specs.least_driver(arch)


def _image(variant: specs.Variant, entry: _Entry, cubin: bytes, source: str) -> images.Image:
    digest = hashlib.sha256(cubin).hexdigest()
    grid: list[images.GridAxis | int] = [
        axis if isinstance(axis, int) else images.GridAxis(size=axis.size, tile=axis.tile)
        for axis in variant.grid
    ]
    arguments: list[dict[str, Any]] = [asdict(argument) for argument in variant.arguments]
    if variant.cuda is None:
        arguments += [{"name": name, "type": "pointer", "source": "null"} for name in _SCRATCH]
    return images.Image.model_validate(
        {
            "name": variant.name,
            "kernel": variant.kernel,
            "file": f"{variant.name}-{digest[:12]}.cubin",
            "sha256": digest,
            "bytes": len(cubin),
            "grid": [*grid, 1, 1][:3],
            "arguments": arguments,
            "serves": variant.serves,
            "limits": variant.limits,
            "source_sha256": source,
            **{key: value for key, value in entry.items() if key not in ("cubin", "target")},
        }
    )


def build(
    archs: Sequence[int],
    out: Path,
    *,
    cache: Path | None = None,
    jobs: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    only: Callable[[specs.Variant], bool] = lambda variant: True,
    candidates: bool = False,
) -> dict[int, images.ImageSet]:
    """Compile every specialisation for `archs` and write `out/sm_XX/` for each.

    Args:
        archs: compute capabilities times ten.
        cache: folder of compiled kernels, keyed by source, specialisation and compiler; safe to share between
            builds that run at once. What is damaged in there is compiled again. Default: `default_cache()`.
        jobs: worker processes; default: one per processor that may be used.
        progress: called with the number of kernels compiled and to compile.
        only: which specialisations to build.
        candidates: build `specs.candidates` too, after the shipped ones, so that by default none of them is used.

    Returns:
        The index of each architecture.

    Raises:
        BuildError: a kernel does not compile. Nothing is written to `out` then.
    """
    cache = cache or default_cache()
    cache.mkdir(parents=True, exist_ok=True)
    source = source_hash()
    wanted = [
        (variant, arch)
        for arch in archs
        for variant in (*specs.variants(arch), *(specs.candidates(arch) if candidates else ()))
        if only(variant)
    ]
    paths = {
        (variant.name, arch): cache / f"{_cache_key(variant, arch, source)}.json" for variant, arch in wanted
    }
    found = {key: kept(path) for key, path in paths.items()}
    missing = [(variant, arch) for variant, arch in wanted if found[variant.name, arch] is None]
    progress(0, len(missing))
    if missing:
        _fill(missing, paths, jobs or processors(), progress)
    stored = {key: content or kept(paths[key]) or b"" for key, content in found.items()}

    built = {}
    for arch in archs:
        entries: list[tuple[specs.Variant, _Entry]] = [
            (variant, json.loads(stored[variant.name, arch]))
            for variant, of_arch in wanted
            if of_arch == arch
        ]
        cubins = {variant.name: base64.b64decode(entry["cubin"]) for variant, entry in entries}
        built[arch] = images.ImageSet(
            arch=f"sm_{arch}",
            target=entries[0][1]["target"],
            driver=max(needed_driver(cubin, arch) for cubin in cubins.values()),
            compiler={"triton": version("triton")},
            images=tuple(_image(variant, entry, cubins[variant.name], source) for variant, entry in entries),
        )
        folder = out / f"sm_{arch}"
        with FileLock(cache / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]}.lock"):
            images.write_images(folder, built[arch], cubins)
    return built


def _fill(
    missing: Sequence[tuple[specs.Variant, int]],
    paths: dict[tuple[str, int], Path],
    jobs: int,
    progress: Callable[[int, int], None],
) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="triton-", dir=temporary_folder()) as scratch,
        ProcessPoolExecutor(
            min(jobs, len(missing)),
            mp_context=get_context("spawn"),
            initializer=_start_worker,
            initargs=(scratch,),
        ) as pool,
    ):
        futures = {pool.submit(_compile, variant, arch): (variant, arch) for variant, arch in missing}
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                variant, arch = futures[future]
                try:
                    entry = future.result()
                except Exception as error:
                    raise BuildError(f"{variant.name} does not compile for sm_{arch}: {error}") from error
                keep(paths[variant.name, arch], json.dumps(entry).encode())
                progress(done, len(missing))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def spilling(built: dict[int, images.ImageSet]) -> list[str]:
    """`"sm_90 attend-...: 16 bytes"` for each image that keeps registers in memory."""
    return [
        f"{image_set.arch} {image.name}: {image.spill_stores} bytes"
        for image_set in built.values()
        for image in image_set.images
        if image.spill_stores or image.spill_loads
    ]
