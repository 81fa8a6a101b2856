"""The dry run passes what can be executed and finds whatever is changed in it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.numpy import load_file, save_file

from export.request.selection import selection_bytes
from lightforcing_ref.sparsity import BlockGeometry
from runtime.bundle import Bundle, Manifest, load_bundle
from runtime.errors import BundleError
from runtime.program.buffers import plan_buffers
from runtime.program.builder import build_program
from runtime.program.program import KernelLaunch
from runtime.verify.dry_run import DryRunError, check_program, dry_run, require_fit
from tests.runtime import device_bundles as device
from tests.runtime.conftest import MakeBundle
from tests.runtime.handmade import edit_manifest, relist

pytest.importorskip("ml_dtypes")

Raw = dict[str, Any]


@pytest.fixture(scope="session")
def device_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for an RTX 5090 with window-relative sinks. Do not change its files."""
    return device.build_device_bundle(tmp_path_factory.mktemp("device") / "bundle")


def changed(folder: Path, change: Callable[[Raw], None]) -> Bundle:
    """The bundle with another manifest, as the loader would hand it over."""
    raw = json.loads((folder / "manifest.json").read_text())
    change(raw)
    return Bundle(root=folder, manifest=Manifest.model_validate(raw))


def flaws(bundle: Bundle) -> list[str]:
    try:
        dry_run(bundle)
    except DryRunError as error:
        return list(error.flaws)
    except BundleError as error:
        return [str(error)]
    return []


def test_chunks_that_are_recomputed_at_once_are_walked(tmp_path: Path) -> None:
    folder = device.build_device_bundle(tmp_path / "joint", sink_positions="absolute")
    bundle = load_bundle(folder)
    cache = bundle.manifest.cache.model_copy(update={"recache": "joint"})
    bundle = Bundle(root=folder, manifest=bundle.manifest.model_copy(update={"cache": cache}))
    costs = {cost.name: cost for cost in dry_run(bundle, sessions=2).forwards}
    layers = device.LAYERS
    # A window of three chunks. The last layer's attention is not needed, and the last chunk is not committed.
    for chunks in (1, 2, 3):
        cost = costs[f"joint.{chunks}"]
        assert cost.engine_runs == chunks * layers
        assert cost.kernel_launches == chunks * (layers + 3 * (layers - 1)) + (chunks - 1) * layers
    assert "joint.4" not in costs


def test_chunks_that_are_denoised_at_once_are_walked(tmp_path: Path) -> None:
    folder = device.build_device_bundle(tmp_path / "rolling")

    def rolling(raw: dict[str, Any]) -> None:
        raw["schedule"] = {"timesteps": [1000, 600, 0], "sigmas": [1.0, 0.6, 0.0], "rolling": True}
        raw["sparsity"] |= {"target": 0.0, "base": 0.0}
        raw["cache"]["recache"] = "none"

    costs = {cost.name: cost for cost in dry_run(changed(folder, rolling), sessions=2).forwards}
    layers = device.LAYERS
    # A window of two chunks. All but the last are committed, and all go through the last layer's attention.
    for chunks in (1, 2):
        cost = costs[f"window.{chunks}"]
        assert cost.engine_runs == chunks * (layers + 1)
        assert cost.kernel_launches == chunks * 4 * layers + (chunks - 1) * layers
    assert "window.3" not in costs


def test_a_sound_bundle_is_counted(device_bundle: Path) -> None:
    report = dry_run(load_bundle(device_bundle), sessions=2)
    costs = {cost.name: cost for cost in report.forwards}
    layers = device.LAYERS
    denoise, clean = costs["denoise.2"], costs["clean"]
    assert (denoise.engine_runs, denoise.kernel_launches) == (layers + 1, 4 * layers)
    assert denoise.gpu_launches == 4 + 17 * (layers - 1) + 18 + 4 * layers
    assert (clean.engine_runs, clean.kernel_launches) == (layers, 4 * (layers - 1) + 1)
    assert costs["commit"].kernel_launches == layers
    kept = (
        3 * (device.FRAME_TOKENS * 2 + 2 * 4) * device.DIM
    )  # bfloat16 keys, two float32 means of each frame
    assert costs["keep_sinks.0"].copied_bytes == layers * kept
    latent = 16 * 3 * 16 * 16 * 4
    tables = 4 + 6 * 4 + 2 * device.TOKENS * 32 * 4
    assert costs["begin"].fed_bytes == 4 * latent + tables
    assert costs["begin_clean"].fed_bytes == tables
    assert report.unbound == ()
    assert {name.split("-")[0] for name in report.images} == set(device.KERNELS)
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report)
    assert "denoise.3" in console.export_text()
    assert json.loads(json.dumps(report.to_json()))["bundle"] == "device"


@pytest.mark.parametrize(
    "options", [{"embedded": True}, {"sink_positions": "absolute"}, {"sinks": 4}], ids=str
)
def test_other_bundles_pass(options: Raw, tmp_path: Path) -> None:
    report = dry_run(load_bundle(device.build_device_bundle(tmp_path / "bundle", **options)))
    names = {cost.name for cost in report.forwards}
    assert ("place_sinks" in names) == (options.get("sink_positions") != "absolute")
    assert ("keep_sinks.1" in names) == (options.get("sinks") == 4)


METHODS: dict[str, Raw] = {
    "sta": {"policy": "sta", "windows": [[3, 1, 3], [5, 3, 1]], "tile": [3, 5], "sink_frames": 1},
    "radial": {"policy": "radial", "decay": 0.1},
    "sparge": {"policy": "sparge", "mode": "cdf", "similarity": 0.2},
    "vmoba": {"policy": "vmoba", "gating": "pooled", "query_block": 32},
    "pbsa": {"policy": "pbsa", "persistent_frames": 2, "local_frames": 6},
    "sla": {"policy": "sla", "linear": True},
}
TABLED = ["sta", "radial", "vmoba"]


def bundle_of(policy: str, folder: Path) -> Bundle:
    sinks = {"sinks": 1} if policy == "pbsa" else {}  # a window of 9 frames
    return load_bundle(device.build_device_bundle(folder, method=METHODS[policy], **sinks))


@pytest.mark.parametrize("policy", METHODS)
def test_bundles_of_every_method_pass(policy: str, tmp_path: Path) -> None:
    """Their tables are found, fed and as large as their kernels take them to be."""
    report = dry_run(bundle_of(policy, tmp_path / "bundle"), sessions=2)
    selects, _ = device.selection_of(METHODS[policy], 6)
    assert {name.split("-")[0] for name in report.images} == {*device.CACHE_KERNELS, *selects}
    assert {name.partition(".")[0] for name in report.to_json()["unbound"]} == set()


@pytest.mark.parametrize("policy", METHODS)
def test_a_memory_plan_knows_what_a_method_needs(policy: str, tmp_path: Path) -> None:
    """The buffers that kernels of selection share, to the byte; but for `keep_q20`."""
    bundle = bundle_of(policy, tmp_path / "bundle")
    placed = build_program(bundle, plan_buffers(bundle.manifest, 1)).buffers
    work = ("lists", "counts", "scores", "shift", "unlike_q", "unlike_k", "q_pool", "k_pool", "block_map")
    work += ("frame_state", "frame_features", "linear_state", "linear_features")
    found = [part.buffer.nbytes for name, part in placed.items() if name in work or name.startswith("table.")]
    geometry = BlockGeometry(device.FRAME_TOKENS, device.BLOCK, device.BLOCK)
    sizes = (geometry, 8, 6, device.CHUNK, device.HEADS, device.HEAD_DIM)
    assert sum(found) == selection_bytes(bundle.manifest.attention.method, *sizes)


@pytest.mark.parametrize("policy", TABLED)
def test_tables_that_kernels_would_read_past_are_refused(policy: str, tmp_path: Path) -> None:
    folder = device.build_device_bundle(tmp_path / "bundle", method=METHODS[policy])
    kernels = load_bundle(folder).manifest.kernels
    assert kernels is not None and kernels.tables is not None
    path = folder / kernels.tables
    sound = load_file(path)
    for turn in kernels.turns:
        for buffer, name in turn.tensors.items():
            wrong = {**sound, name: sound[name].copy()}
            if buffer == "block_map":
                wrong[name] = wrong[name][..., 1:].copy()
            else:
                wrong[name].flat[-1] = 99
            save_file(wrong, path)
            relist(folder, kernels.tables)
            found = flaws(load_bundle(folder))
            assert any(name in flaw or "not what the manifest lists" in flaw for flaw in found), (name, found)


def test_a_method_that_has_lost_its_tables_is_refused(tmp_path: Path) -> None:
    folder = device.build_device_bundle(tmp_path / "bundle", method=METHODS["radial"])
    bundle = changed(folder, lambda raw: raw["kernels"].update(tables=None, tensors=[], turns=[]))
    assert any("the policy radial selects by tables" in flaw for flaw in flaws(bundle))


def test_host_bundles_pass(make_bundle: MakeBundle) -> None:
    """Their kernels of the cache are checked for what they are given."""
    for options in ({}, {"sink_positions": "absolute"}, {"window_frames": None}):
        found = flaws(load_bundle(make_bundle(**options)))
        # Its latents are smaller than what TensorRT asks for; nothing else is odd about it.
        assert all("expected a multiple of 256" in flaw for flaw in found), found


# What each change does, and what the message must name.
CHANGES: dict[str, tuple[Callable[[Raw], object], str]] = {
    "no engine for the layers": (
        lambda raw: raw["components"]["layer"].update(file=None),
        r"forward 'denoise\.0', layer 0, component 'layer': the component has no file",
    ),
    "more activation memory than planned": (
        lambda raw: raw["components"]["conditioner"].update(cost=device.cost("layer")),
        "",
    ),
    "a binding to nothing": (
        lambda raw: raw["segments"]["layers"][1].update({"o.scale": "blocks.9.o.scale"}),
        r"component 'layer' is bound to the tensor 'blocks\.9\.o\.scale'",
    ),
    "weights of another type": (
        lambda raw: raw["segments"]["layers"][1].update({"o.weight": "blocks.1.ffn.weight"}),
        r"forward 'denoise\.0', layer 1, component 'layer', input 'o\.weight': it is float8_e4m3fn and bound to "
        r"bfloat16",
    ),
    "weights of another size": (
        lambda raw: raw["segments"]["prepare"][2].update(norm_q="blocks.0.bias"),
        r"layer 2, kernel 'prepare', buffer 'norm_q': it has 384 elements, expected 128",
    ),
    "an unbound weight": (
        lambda raw: raw["segments"]["layers"][0].pop("modulation"),
        r"component 'layer' has a tensor 'modulation' that this runtime does not know",
    ),
    "no kernels": (lambda raw: raw.update(kernels=None), r"holds no kernel images|has no file"),
    "blocks without a kernel": (
        lambda raw: raw["attention"].update(block_q=16),
        r"kernel 'attend'.*no 'attend' kernel|expected",
    ),
    "another capability": (
        lambda raw: raw["target"].update(compute_capability="9.0"),
        r"this device has compute capability 9\.0",
    ),
    "a decoder that is not given its caches": (
        lambda raw: raw["components"]["vae_next"]["inputs"].pop(),
        r"component 'vae_next', input 'cache\.1': it is missing",
    ),
    "more layers than tensors": (
        lambda raw: raw["components"]["step"]["inputs"].pop(),
        r"'past_kmean\.2'|past_kmean\.2",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_to_the_manifest_are_named(device_bundle: Path, name: str) -> None:
    change, message = CHANGES[name]
    bundle = changed(device_bundle, lambda raw: change(raw) and None)
    if not message:  # the plan follows the manifest
        assert flaws(bundle) == []
        return
    with pytest.raises(BundleError, match=message):
        dry_run(bundle)


@pytest.mark.parametrize("component", ["step", "clean", "conditioner"])
def test_what_a_component_does_not_write_is_missed_before_engines_are_loaded(
    device_bundle: Path, component: str
) -> None:
    written = load_bundle(device_bundle).manifest.components[component].outputs
    assert len(written) >= 6
    for index, spec in enumerate(written):
        without = changed(
            device_bundle, lambda raw, index=index: raw["components"][component]["outputs"].pop(index)
        )
        with pytest.raises(
            BundleError, match=f"'{component}', output '{re.escape(spec.name)}': it is missing"
        ):
            require_fit(without, 1)


def test_activation_memory_is_promised_by_the_manifest(device_bundle: Path) -> None:
    bundle = load_bundle(device_bundle)
    program = build_program(bundle, plan_buffers(bundle.manifest, 1))
    grown = changed(
        device_bundle, lambda raw: raw["components"]["last"]["cost"].update(activation_bytes=1 << 20)
    )
    with pytest.raises(
        DryRunError, match=r"'last': it needs 1,048,576 bytes of activation memory and gets 32,768"
    ):
        check_program(grown, program)


def test_the_norms_eps_is_the_manifests(device_bundle: Path) -> None:
    """Bundles that do not tell were built when there was one value only."""

    def launched(bundle: Bundle) -> set[float]:
        operations = (
            operation for _, operation in build_program(bundle, plan_buffers(bundle.manifest, 1)).walk()
        )
        return {
            op.options["eps"] for op in operations if isinstance(op, KernelLaunch) and op.kernel == "prepare"
        }

    assert launched(changed(device_bundle, lambda raw: raw["attention"].pop("eps"))) == {1e-6}
    assert launched(changed(device_bundle, lambda raw: raw["attention"].update(eps=3e-5))) == {3e-5}


EXECUTED = (
    "first",
    "layer",
    "last",
    "conditioner",
    "text_encoder",
    "vae_first",
    "vae_next",
    "qk_prepare",
    "attention",
)
# The host converts what it feeds, so these may have any floating type.
CONVERTED = {("conditioner", "text")}


def tensors_of(raw: Raw) -> list[tuple[str, str, int]]:
    return [
        (name, kind, index)
        for name in EXECUTED
        for kind in ("inputs", "outputs")
        for index in range(len(raw["components"][name][kind]))
    ]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_tensor_is_found_and_named(device_bundle: Path, data: st.DataObject) -> None:
    raw = json.loads((device_bundle / "manifest.json").read_text())
    component, kind, index = data.draw(st.sampled_from(tensors_of(raw)))
    spec = raw["components"][component][kind][index]
    what = data.draw(st.sampled_from(["dtype", "grow", "shrink", "rename", "drop", "rank"]))
    name = spec["name"]
    if what == "dtype":
        others = {"float32", "bfloat16", "float16", "int32", "uint8"} - {spec["dtype"]}
        if (component, name) in CONVERTED or component == "text_encoder":
            others &= {"int32", "uint8"}
        spec["dtype"] = data.draw(st.sampled_from(sorted(others)))
    elif what in ("grow", "shrink"):
        sizes = [axis for axis, size in enumerate(spec["shape"]) if isinstance(size, int) and size > 1]
        if not sizes:
            return
        axis = data.draw(st.sampled_from(sizes))
        spec["shape"][axis] += 1 if what == "grow" else -1
    elif what == "rename":
        spec["name"] = f"{name}x"  # what is missing or what is unknown may be named
    elif what == "drop":
        del raw["components"][component][kind][index]
        if component == "vae_first" and name.startswith("cache_out"):
            return  # a cache that the first frame does not write
    else:
        spec["shape"].append(2)
    found = flaws(Bundle(root=device_bundle, manifest=Manifest.model_validate(raw)))
    assert found, f"{what} of {component}.{name} goes unnoticed"
    assert any(name.split(".")[0] in flaw for flaw in found), found[:3]


def kernel_index(folder: Path) -> Path:
    return folder / "kernels" / "sm_120" / "kernels.json"


def with_index(folder: Path, index: Raw) -> Bundle:
    """The bundle with another index of kernels, listed as it is."""
    kernel_index(folder).write_text(json.dumps(index))
    return load_bundle(relist(folder, kernel_index(folder).relative_to(folder).as_posix()))


@pytest.fixture
def own_bundle(device_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(device_bundle, tmp_path / "own"))


SERVED = (
    "prepare-bf16-d64",
    "score-d64",
    "select-b16",
    "attend-bf16-d64-q32",
    "commit-d64",
    "rope_sink-bf16-d64",
)


def wrong(argument: Raw, what: str) -> Raw:
    """A change that makes the argument wrong."""
    pointer = argument["type"] == "pointer"
    if what == "name":
        return {"name": f"no_{argument['name']}"}
    if what == "type":
        return {"type": "int32" if pointer else "pointer"}
    if not pointer:
        return {"source": "size" if argument["source"] == "option" else "option"}
    # `commit` moves bits of any 16-bit type.
    return {"element": "float32" if argument["element"] != "float32" else "float16"}


@pytest.mark.parametrize("what", ["name", "type", "meaning"])
def test_every_argument_of_every_image_is_checked(own_bundle: Path, what: str) -> None:
    original = json.loads(kernel_index(own_bundle).read_text())
    for name in SERVED:
        index = json.loads(json.dumps(original))
        image = next(image for image in index["images"] if image["name"] == name)
        arguments = [argument for argument in image["arguments"] if argument["source"] != "null"]
        assert len(arguments) >= 7
        for argument in arguments:
            argument.update(wrong(argument, what))
        bundle = with_index(own_bundle, index)
        sources = (f"kernel '{name.split('-')[0]}'", "is not an index")  # the step, or already the index
        found = [flaw for flaw in flaws(bundle) if any(source in flaw for source in sources)]
        for argument in arguments:
            assert any(f"'{argument['name']}'" in flaw for flaw in found), (name, argument, found[:3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image: image.update(shared_memory=102_000), "102,000 bytes of shared memory"),
        (lambda image: image.update(threads=1024, registers=128), "1024 threads with 128 registers"),
        (lambda image: image.update(grid=[1, 70_000, 1]), "70000 thread blocks along y"),
        (lambda image: image.update(grid=[{"size": "nonsense", "tile": 1}, 1, 1]), "'nonsense'"),
        (lambda image: image["serves"].update(head_dim=[128]), "no 'attend' kernel for sm_120 serves"),
        (lambda image: image["arguments"].pop(0), "buffer 'out': the image does not take it"),
        (lambda image: image["arguments"].append(image["arguments"][0]), "two arguments of one name"),
        (lambda image: image.update(sha256="0" * 64), "its index says 0000"),
    ],
)  # fmt: skip
def test_limits_of_the_device_and_the_image(
    own_bundle: Path, change: Callable[[Raw], object], message: str
) -> None:
    index = json.loads(kernel_index(own_bundle).read_text())
    index["images"] = [
        image for image in index["images"] if image["name"] in SERVED
    ]  # no other serves instead
    change(next(image for image in index["images"] if image["name"] == "attend-bf16-d64-q32"))
    found = flaws(with_index(own_bundle, index))
    assert any(re.search(message, flaw) for flaw in found), found


BF16 = "BF16"


def rewrite(path: Path, change: Callable[[Raw], object]) -> None:
    """Change a safetensors file's header and data; a tensor is [type, shape, bytes]."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    data = raw[8 + length :]
    tensors = {
        name: [entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])]]
        for name, entry in header.items()
    }
    change(tensors)
    blob, entries = b"", {}
    for name, (dtype, shape, content) in tensors.items():
        offsets = [len(blob), len(blob) + len(content)]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        blob += content
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + blob)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "transformer",
            lambda t: t.pop("blocks.0.o.scale"),
            r"'blocks\.0\.o\.scale', which the weights file",
        ),
        ("transformer", lambda t: t["head"].__setitem__(1, [128, 64]), r"'head\.weight': it is \[64, 128\]"),
        ("transformer", lambda t: t["head_bias"].__setitem__(0, "I32"), r"'head\.bias': it is float32"),
        ("text", lambda t: t.pop("layers.1.fc2"), r"tensor 'layers\.1\.fc2': it is missing"),
        (
            "text",
            lambda t: t.update(norm=[BF16, [63], b"\0" * 126]),
            r"tensor 'norm': it is \[63\], expected \[64\]",
        ),
    ],
    ids=["missing", "transposed", "type", "text missing", "text shape"],
)
def test_weights_are_held_against_what_is_bound(
    own_bundle: Path, file: str, change: Callable[[Raw], object], message: str
) -> None:
    rewrite(own_bundle / f"{file}.safetensors", change)
    found = flaws(load_bundle(relist(own_bundle, f"{file}.safetensors")))
    assert any(re.search(message, flaw) for flaw in found), found


def test_unused_weights_are_reported_and_no_flaw(own_bundle: Path) -> None:
    rewrite(own_bundle / "transformer.safetensors", lambda t: t.update(extra=[BF16, [2], b"\0" * 4]))
    assert dry_run(load_bundle(relist(own_bundle, "transformer.safetensors"))).unbound == ("extra",)


PERSISTENT_FLAWS: dict[str, tuple[Callable[[Raw], object], str]] = {
    "no set": (lambda raw: raw["components"].pop("persist"), r"lacks the component\(s\) persist"),
    "a set of another size": (
        lambda raw: raw["components"]["persist"]["outputs"][0].update(shape=[3, 64, 2, 64]),
        r"component 'persist', output 'kept_k': it is \[3, 64, 2, 64\], and the model makes it \[2, 64, 2, 64\]",
    ),
    "a pool of another type": (
        lambda raw: raw["components"]["persist"]["inputs"][2].update(dtype="float16"),
        r"forward 'persist', layer 0, kernel 'persist', tensor 'past_k' of the operator: it is float16 and bound to "
        r"bfloat16",
    ),
    "a step that leaves no query means": (
        lambda raw: raw["components"]["step"]["outputs"].pop(),
        r"component 'step', output 'qmean\.2': it is missing",
    ),
}


@pytest.mark.parametrize("name", PERSISTENT_FLAWS)
def test_a_persistent_set_that_cannot_be_is_refused(name: str, tmp_path: Path) -> None:
    change, message = PERSISTENT_FLAWS[name]
    folder = bundle_of("pbsa", tmp_path / "bundle").root
    edit_manifest(folder, change)
    with pytest.raises(BundleError) as caught:
        dry_run(load_bundle(folder))
    assert re.search(message, str(caught.value)), str(caught.value)
