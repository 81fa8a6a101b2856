"""Kernel images: compiled for real with no GPU, then read, verified, chosen and laid out by both readers."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugins.compile import kernels as builder
from plugins.compile.prebuilt import source_hash
from plugins.kernels import specs, tuning
from runtime.bundle import images
from runtime.errors import BundleIntegrityError, BundleSchemaError, EngineError
from runtime.program import kernels as reader
from tests.plugins.launch.launch_interface import WAN

pytest.importorskip("triton")

# Largest shared memory of one thread block, CUDA C++ programming guide, table of compute capabilities.
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
SAMPLE = ("attend-bf16-d128-q64-ragged", "select-b16")


def wanted(variant: specs.Variant) -> bool:
    return variant.name in SAMPLE


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    out = tmp_path_factory.mktemp("kernels")
    builder.build((90, 120), out, cache=cache, only=wanted, jobs=2)
    return out


@pytest.fixture
def altered(built: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the sm_90 images that a test may damage."""
    folder = tmp_path / "sm_90"
    folder.mkdir()
    for file in (built / "sm_90").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    yield folder


def check(image_set: images.ImageSet, cubins: dict[str, bytes], arch: int) -> None:
    for image in image_set.images:
        cubin = cubins[image.name]
        assert cubin[:4] == b"\x7fELF"
        assert image.entry.encode() in cubin
        assert str(Path(__file__).parents[3]).encode() not in cubin, "paths of this machine leak into images"
        assert image.shared_memory <= SHARED_MEMORY[arch] * 1024
        # 65,536 registers per multiprocessor and at most 255 per thread, on every architecture.
        assert 0 < image.registers <= 255
        assert image.threads * image.registers <= 65_536
        if arch in (90, 120):
            assert (image.spill_stores, image.spill_loads) == (0, 0)
        if "-ws" not in image.name:  # in CUDA C++
            assert [(a.name, a.type, a.source) for a in image.arguments[-2:]] == [
                ("global_scratch", "pointer", "null"),
                ("profile_scratch", "pointer", "null"),
            ]


@pytest.mark.parametrize("arch", [90, 120])
def test_images_hold_what_a_launch_needs(built: Path, arch: int) -> None:
    image_set, cubins = images.read_images(built / f"sm_{arch}")
    assert (image_set.arch, image_set.target) == (f"sm_{arch}", f"sm_{arch}a")
    assert image_set.driver == {90: 525, 120: 570}[arch]
    assert {image.name for image in image_set.images} == set(SAMPLE)
    check(image_set, cubins, arch)
    attend = next(image for image in image_set.images if image.kernel == "attend")
    assert attend.threads == 128
    assert attend.shared_memory > 0
    assert [argument.name for argument in attend.arguments[:3]] == ["out", "q", "k"]
    assert {argument.element for argument in attend.arguments[:6]} == {"bfloat16"}


def test_second_build_comes_from_the_cache(built: Path, cache: Path, tmp_path: Path) -> None:
    totals = []
    builder.build(
        (90,), tmp_path, cache=cache, only=wanted, progress=lambda done, total: totals.append(total)
    )
    assert totals == [0]
    first, second = images.read_images(built / "sm_90"), images.read_images(tmp_path / "sm_90")
    assert first == second


def test_what_is_damaged_in_the_cache_is_compiled_again(built: Path, cache: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(cache, tmp_path / "cache"))
    entries = sorted(copy.glob("*.json"))
    good = entries[0].read_bytes()
    for damaged in (good[:-10], good.replace(b'"threads": ', b'"threads": 1', 1), b"{}", b""):
        entries[0].write_bytes(damaged)
        totals: list[int] = []
        builder.build(
            (90, 120),
            tmp_path / "out",
            cache=copy,
            only=wanted,
            jobs=1,
            progress=lambda done, total, totals=totals: totals.append(total),
        )
        assert totals == [1, 1]
        assert entries[0].read_bytes() == good
    assert images.read_images(tmp_path / "out" / "sm_90") == images.read_images(built / "sm_90")


def test_changed_sources_are_compiled_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = source_hash()
    sources = Path(specs.__file__).parent
    copy = tmp_path / "kernels"
    copy.mkdir()
    for file in (path for ending in ("py", "cu", "cuh") for path in sources.glob(f"*.{ending}")):
        (copy / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(specs, "__file__", str(copy / "specs.py"))
    assert source_hash() == before
    (copy / "attend.py").write_text((copy / "attend.py").read_text() + "\n")
    assert source_hash() != before
    totals: list[int] = []
    builder.build(
        (90,),
        tmp_path / "out",
        cache=cache,
        only=lambda variant: variant.name == "select-b16",
        progress=lambda done, total: totals.append(total),
    )
    assert totals == [1, 1]


def test_two_builds_at_once_leave_one_sound_folder(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from plugins.compile.kernels import build\n"
        "if __name__ == '__main__':\n"
        "    build((120,), Path(sys.argv[1]) / 'out', cache=Path(sys.argv[1]) / 'cache', jobs=1,\n"
        "          only=lambda variant: variant.name == 'select-b16')\n"
    )
    program = tmp_path / "program.py"
    program.write_text(script)
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    running = [
        subprocess.Popen([sys.executable, str(program), str(tmp_path)], cwd=root, env=environment)
        for _ in range(2)
    ]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    image_set, cubins = images.read_images(tmp_path / "out" / "sm_120")
    check(image_set, cubins, 120)
    assert len(list((tmp_path / "out" / "sm_120").iterdir())) == 2, (
        "one cubin and the index, nothing temporary"
    )


def test_a_kernel_that_does_not_compile_names_itself_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = next(variant for variant in specs.variants(90) if variant.name == "prepare-bf16-d128")
    broken = replace(sound, constants={**sound.constants, "WIDTH": 1000})  # not a power of two
    monkeypatch.setattr(specs, "variants", lambda arch: (broken,))
    with pytest.raises(builder.BuildError, match=f"{broken.name} does not compile for sm_90"):
        builder.build((90,), tmp_path / "out", cache=tmp_path / "cache", jobs=1)
    assert not (tmp_path / "out").exists()


def test_images_load_on_the_drivers_of_cuda_12(built: Path) -> None:
    """Triton would assemble with CUDA 13's ptxas, whose images for Hopper need a driver of CUDA 13."""
    for arch in (90, 120):
        for cubin in images.read_images(built / f"sm_{arch}")[1].values():
            assert tuple(cubin[7:9]) == ((51, 7) if arch == 90 else (65, 8))
    assert builder.needed_driver(b"\x7fELF\2\1\1\x41\x08", 90) == 580
    with pytest.raises(builder.BuildError, match="expected an ELF header"):
        builder.needed_driver(b"\x7fELF\2\1\1\x03\x00", 90)


def test_architectures_are_checked() -> None:
    assert builder.parse_archs("sm_90, sm_120,sm_90") == (90, 120)
    with pytest.raises(builder.BuildError, match=r"sm_75.*expected some of sm_80"):
        builder.parse_archs("sm_90,sm_75")
    with pytest.raises(builder.BuildError, match="expected some of"):
        builder.parse_archs("")


def test_arguments_are_those_of_the_kernels() -> None:
    for arch in specs.ARCHS:
        for variant in specs.variants(arch):
            names = [argument.name for argument in variant.arguments]
            if variant.cuda is None:
                assert names + list(variant.constants) == list(
                    specs.kernel_function(variant.kernel).arg_names
                )
                continue
            text = (Path(specs.__file__).parent / variant.cuda.file).read_text()
            (parameters,) = re.findall(
                rf'extern "C" __global__ .*? {variant.kernel}\((.*?)\) \{{', text, re.DOTALL
            )
            assert names == re.findall(r"(\w+)(?:,|$)", parameters)


@pytest.mark.parametrize(
    "variant", specs.candidates(90), ids=lambda variant: variant.name.removeprefix("attend-bf16-d128-")
)
def test_candidates_are_not_what_ships(variant: specs.Variant) -> None:
    shipped = [{**asdict(v), "name": ""} for v in specs.variants(90)]
    assert {**asdict(variant), "name": ""} not in shipped


def test_a_kernel_in_cuda_cpp_is_built_like_the_others(tmp_path: Path) -> None:
    name = "attend-bf16-d128-q128-ws"
    built = builder.build(
        (90,), tmp_path / "out", cache=tmp_path / "cache", jobs=1, only=lambda v: v.name == name
    )
    (image,) = built[90].images
    assert image.threads == 384
    assert (image.spill_stores, image.spill_loads, image.stack) == (0, 0, 0)
    library = reader.KernelLibrary.load(tmp_path / "out", (9, 0))
    even = reader.KernelProblem(**{**WAN, "frame_tokens": 1536, "block_q": 128, "block_k": 128})
    names = ("out", "q", "k", "v", "past_k", "past_v", "frame_slots", "lists", "counts")
    plan = library.plan("attend", even, dict.fromkeys(names, 16), {"scale": 1.0})
    assert (plan.image.name, plan.grid, len(plan.values)) == (name, (132, 1, 1), 17)


LINEAR = ("sum_linear", "project_linear", "add_linear")


def test_every_operator_geometry_is_served() -> None:
    for arch in specs.ARCHS:
        for frame_tokens in (1536, 1560):
            for block_q, block_k in ((64, 64), (128, 128), (128, 64), (64, 128), (32, 32)):
                if frame_tokens == 1560 and block_k == 32:
                    continue  # 21 frames of 49 blocks do not occur: blocks of 32 are for small models
                for dtype in specs.DTYPES:
                    for head_dim in (64, 128):
                        problem = specs.KernelProblem(
                            dtype, 12, head_dim, frame_tokens, 3, 18, block_q, block_k, sinks=1
                        )
                        for kernel in specs.KERNELS:
                            if kernel.endswith(("_fp8", "_e4m3")) and dtype != "bfloat16":
                                continue  # over codes there is one compute type
                            if kernel == "attend_ordered":
                                continue  # over blocks of its own, below
                            if kernel in ("mean_key", "resemble", "pool", *LINEAR) and dtype != "bfloat16":
                                continue  # bundles for a GPU compute in it
                            if kernel == "attend_e4m3" and arch < 89:
                                continue  # nothing multiplies them there
                            scaled = kernel.startswith("prepare_scaled")
                            if scaled and (dtype != "bfloat16" or arch not in (89, 120)):
                                continue  # no engine leaves scales to it there
                            variant = specs.find_variant(kernel, problem, arch)
                            if kernel == "attend" and variant.cuda is None:
                                assert variant.constants["EVEN"] == (frame_tokens == 1536)


def test_every_order_of_tokens_is_served() -> None:
    """Every pair of block sizes that tables may have, of as many blocks as the smallest ones make of a frame."""
    for arch in specs.ARCHS:
        for block_q in tuning.QUERY_BLOCKS:
            for block_k in tuning.ORDERED_BLOCKS:
                for head_dim in (64, 128):
                    problem = specs.KernelProblem(
                        *("bfloat16", 12, head_dim, 1560, 3, 18, block_q, block_k),
                        ordered_blocks=(49, 256),
                        groups=4096,
                    )
                    for kernel in ("pool", "score_groups", "choose", "expand", "attend_ordered"):
                        variant = specs.find_variant(kernel, problem, arch)
                        programs = {"pool": (4096, 12), "score_groups": (64, 5, 12)}.get(kernel, (147, 12))
                        assert variant.grid_for(problem) == programs


def test_index_that_was_damaged_is_refused(altered: Path) -> None:
    index = json.loads((altered / images.INDEX_NAME).read_text())
    library = altered.parent

    cubin = altered / index["images"][0]["file"]
    content = cubin.read_bytes()
    cubin.write_bytes(content[:-1] + b"!")
    with pytest.raises(BundleIntegrityError, match="SHA-256"):
        images.read_images(altered)
    with pytest.raises(BundleIntegrityError, match="SHA-256"):
        reader.KernelLibrary.load(library, (9, 0))
    cubin.unlink()
    with pytest.raises(BundleIntegrityError, match="missing"):
        images.read_images(altered)
    with pytest.raises(BundleIntegrityError, match="missing"):
        reader.KernelLibrary.load(library, (9, 0))
    cubin.write_bytes(content)

    def refused(change: dict[str, Any]) -> None:
        (altered / images.INDEX_NAME).write_text(json.dumps({**index, **change}))
        with pytest.raises(BundleSchemaError, match="not an index"):
            images.read_images(altered)
        with pytest.raises(BundleSchemaError, match="not an index"):
            reader.KernelLibrary.load(library, (9, 0))

    refused({"format_version": 1})
    refused({"surprise": 1})
    refused({"images": [{**index["images"][0], "file": "../../outside.cubin"}]})
    (altered / images.INDEX_NAME).unlink()
    with pytest.raises(BundleIntegrityError, match="does not exist"):
        images.read_images(altered)
    with pytest.raises(EngineError, match="holds kernels for none"):
        reader.KernelLibrary.load(library, (9, 0))


@given(
    st.builds(
        specs.KernelProblem,
        dtype=st.sampled_from(list(specs.DTYPES)),
        **{
            name: st.integers(1, 3000)
            for name in ("heads", "head_dim", "frame_tokens", "chunk_frames", "block_q", "block_k")
        },
        past_frames=st.integers(0, 40),
        sinks=st.integers(0, 3),
    )
)
def test_both_sides_compute_the_same_sizes(problem: specs.KernelProblem) -> None:
    assert problem.sizes() == reader.KernelProblem(**asdict(problem)).sizes()


def test_plan_lays_out_grid_and_arguments(built: Path) -> None:
    library = reader.KernelLibrary.load(built, (9, 0))
    buffers = {"out": 1, "q": 2, "k": 3, "v": 4, "past_k": 5, "past_v": 6, "frame_slots": 7, "lists": 8}
    buffers["counts"] = 1 << 40
    plan = library.plan("attend", reader.KernelProblem(**WAN), buffers, {"scale": 0.5})
    assert plan.image.name == "attend-bf16-d128-q64-ragged"
    assert plan.grid == (75, 12, 1)  # 3 frames of 25 query blocks, 12 heads
    values = [(str(value.dtype), float(value)) for value in plan.values]
    assert values == [
        *(("uint64", float(address)) for address in (1, 2, 3, 4, 5, 6, 7, 8, 1 << 40)),
        ("int32", 12),
        ("int32", 1560),
        ("int32", 18),
        ("int32", 25),
        ("int32", 525),
        ("int32", 64),
        ("float32", 0.5),
        ("uint64", 0),
        ("uint64", 0),
    ]


def test_plan_says_what_is_missing(built: Path) -> None:
    library = reader.KernelLibrary.load(built, (12, 0))
    with pytest.raises(EngineError, match=r"needs argument\(s\) \['counts', 'scale'\]"):
        names = ("out", "q", "k", "v", "past_k", "past_v", "frame_slots", "lists")
        library.plan("attend", reader.KernelProblem(**WAN), dict.fromkeys(names, 0))
    with pytest.raises(EngineError, match=r"no 'attend' kernel for sm_120 .* block_q 64"):
        library.plan("attend", reader.KernelProblem(**{**WAN, "block_q": 256}), {})
    with pytest.raises(EngineError, match="no images of this kernel"):
        library.plan("unheard_of", reader.KernelProblem(**WAN), {})
    with pytest.raises(EngineError, match=r"holds kernels for sm_120a, sm_90a; .* 7\.5"):
        reader.KernelLibrary.load(built, (7, 5))


def test_target_with_a_letter_runs_on_its_own_capability_only() -> None:
    def index(arch: str, target: str) -> images.ImageSet:
        return images.ImageSet(arch=arch, target=target, driver=525, compiler={}, images=())

    assert index("sm_90", "sm_90a").runs_on((9, 0))
    assert not index("sm_120", "sm_120a").runs_on((12, 1))
    assert index("sm_80", "sm_80").runs_on((8, 7))
    assert not index("sm_86", "sm_86").runs_on((8, 0))
    assert not index("sm_80", "sm_80").runs_on((9, 0))


def test_kernel_of_another_make_takes_a_place_in_the_index(altered: Path) -> None:
    """The seam: other argument order, grid, thread count and no scratch pointers, without a change to the loader."""
    index = json.loads((altered / images.INDEX_NAME).read_text())
    ours = next(image for image in index["images"] if image["kernel"] == "attend")
    names = ("lists", "counts", "frame_slots", "past_v", "past_k", "v", "k", "q", "out")
    by_name = {argument["name"]: argument for argument in ours["arguments"]}
    theirs = {
        **ours,
        "name": "attend-by-hand",
        "entry": "attend_by_hand",
        "threads": 384,
        "grid": [{"size": "heads", "tile": 2}, {"size": "query_blocks", "tile": 4}, 1],
        "arguments": [by_name["scale"], *(by_name[name] for name in names)],
        "limits": {"heads": 12},
    }
    (altered / images.INDEX_NAME).write_text(json.dumps({**index, "images": [theirs, *index["images"]]}))
    library = reader.KernelLibrary.load(altered.parent, (9, 0))
    plan = library.plan("attend", reader.KernelProblem(**WAN), dict.fromkeys(names, 16), {"scale": 1.0})
    assert (plan.image.entry, plan.grid, len(plan.values)) == ("attend_by_hand", (6, 19, 1), 10)
    more_heads = reader.KernelProblem(**{**WAN, "heads": 13})
    assert library.serving("attend", more_heads).name == ours["name"]


def test_command_line_reports_unknown_architectures(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from plugins.__main__ import main

    assert main(["build", "--arch", "sm_75", "--out", str(tmp_path)]) == 2
    assert "sm_75" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(3600)  # what is held is processor time
def test_every_specialisation_builds_in_time_without_spilling(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    built = builder.build(specs.ARCHS, tmp_path / "out", cache=tmp_path / "cache")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 2 * 480, "eight minutes on two cores"
    assert len(built) == len(specs.ARCHS)
    for arch in specs.ARCHS:
        image_set, cubins = images.read_images(tmp_path / "out" / f"sm_{arch}")
        assert len(image_set.images) == len(specs.variants(arch))
        check(image_set, cubins, arch)
    assert builder.spilling(built) == []
