"""The code blocks of README and the documents, executed, document by document, in order, as a reader pastes them.

Names that a block takes for granted (`show`, `request`, `model`) come from a function of this file for each document;
files and bundles that its commands name are small ones. Commands that build something are `slow`. What is not executed
is listed in `tests/snippets.py`, with the reasons.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.cli.main import main as export_main
from export.request.targets import load_target, load_variant
from plugins.__main__ import main as plugins_main
from runtime import Pipeline
from runtime.cli.main import main as runtime_main
from tests.runtime import device_bundles, handmade
from tests.snippets import (
    DOCUMENTS,
    DRAWINGS,
    ROOT,
    SHELL,
    Block,
    Command,
    blocks,
    commands,
    reason,
    why_not,
)

SLOW = r"python -m (export (build|calibrate|compare|attention-map|plan --all)|plugins build) ?.*"
"""Command lines that take longer than a test of the default tier may."""

MAINS: dict[str, Callable[[list[str]], int]] = {
    "export": export_main,
    "runtime": runtime_main,
    "plugins": plugins_main,
}
Names = dict[str, Any]
RTX_BUNDLE = "engines/built/rtx5090-wan-1.3b-short-fp8"


def run(command: str) -> int:
    """A command line of ours, in this process and the current folder."""
    _, _, room, *arguments = shlex.split(command)
    return MAINS[room](arguments)


# ---- what documents take for granted ----


def nothing(folder: Path) -> Names:
    return {}


def demo(folder: Path) -> Names:
    return {"show": shown(folder).append}


def shown(folder: Path) -> list[object]:
    """What `show` was called with in a document's folder."""
    return SHOWN.setdefault(folder, [])


SHOWN: dict[Path, list[object]] = {}


def readme(folder: Path) -> Names:
    device_bundles.build_device_bundle(folder / RTX_BUNDLE)
    return demo(folder)


def start(folder: Path) -> Names:
    from PIL import Image

    handmade.build_bundle(folder / "engines/built/start", with_encoder=True)
    Image.new("RGB", (32, 32), "red").save(folder / "photo.png")
    frames = np.zeros((9, 32, 32, 3), np.uint8)
    return demo(folder) | {"pipeline": Pipeline.load(folder / "engines/built/start"), "frames": frames}


def bundle(folder: Path) -> Names:
    shutil.copytree(folder / "BUNDLE", folder / "mine")
    names = [path.name for path in (folder / "mine").iterdir() if path.name != "manifest.json"]
    return {"folder": folder / "mine", "names": names}


def planning(folder: Path) -> Names:
    from export.request.plan import PlanRequest
    from lightforcing_ref.config import preset
    from runtime.terminal import console

    wan = preset("wan-1.3b")
    request = PlanRequest(load_target("rtx5090"), load_variant("short"), wan, wan.height, wan.width, "fp8")
    return {"request": request, "console": console()}


def published_script(folder: Path) -> Names:
    """A stand-in for the authors' pipeline: as many draws of noise as it makes, in its order and layout."""
    sampled = torch.randn(1, 21, handmade.CHANNELS, handmade.SIZE, handmade.SIZE)

    class Published:
        def inference(self, *, noise: torch.Tensor, text_prompts: list[str], return_latents: bool) -> Any:
            latents = torch.cat([self.chunk(part) for part in noise.split(3, dim=1)], dim=1)
            return torch.zeros(1, 81, 3, 32, 32), latents

        def chunk(self, latent: torch.Tensor) -> torch.Tensor:
            for _ in range(3):  # fresh noise after every forward but the last
                latent = latent + torch.randn_like(latent.flatten(0, 1)).unflatten(0, latent.shape[:2])
            return latent

    return {"pipeline": Published(), "sampled_noise": sampled, "prompts": ["..."]}


def small_model(folder: Path) -> Names:
    from lightforcing_ref.rollout import Rollout
    from tests.lightforcing_ref import test_model

    names = {"model": test_model.small_model(), "spec": test_model.spec(), "text": test_model.text()}
    return names | {"noise": test_model.noise, "grid": test_model.GRID, "Rollout": Rollout}


def operators(folder: Path) -> Names:
    """A module that calls the attention operator once."""
    import plugins.nodes.ops  # noqa: F401
    from tests import brute_force

    case = brute_force.random_case(np.random.default_rng(0))

    class Module(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            return torch.ops.lightforcing.hierarchical_sparse_attention(*tensors, *case.attributes.values())

    return {"module": Module(), "inputs": tuple(torch.from_numpy(value) for value in case.inputs.values())}


def graph(folder: Path) -> Names:
    """`step.onnx` of three narrow layers, and what it was made from."""
    from export.graph.components import write_step
    from export.request.geometry import StepPlan
    from export.request.weights import Weights
    from lightforcing_ref.config import preset

    tiny = preset("tiny")
    small = replace(tiny, dit=replace(tiny.dit, dim=64, ffn_dim=192, heads=1, layers=3), block=16)
    plan = StepPlan.of(small, load_variant("dense"), 64, 64, block_q=16, block_k=16)
    weights = Weights(small, seed=3)
    write_step(folder, weights.dit(torch.float32), plan, per_chunk=False)
    return {"plan": plan, "weights": weights}


def quantization(folder: Path) -> Names:
    import onnx_ir
    import onnxruntime

    import export.quantize
    from export.quantize import Trial, calibrate, embed_prompts, load_calibration, merge_qkv, read_prompts

    pytest.importorskip("modelopt", reason="ModelOpt is not installed (extra quantize)")
    (folder / "prompts.txt").write_text("a red square moves right\n")
    names = graph(folder) | {"graph": onnx_ir.load(folder / "step.onnx"), "path": folder / "prompts.txt"}
    names |= {"export": export, "options": onnxruntime.SessionOptions(), "torch": torch, "sha256": "0" * 64}
    names |= {"Trial": Trial, "calibrate": calibrate, "embed_prompts": embed_prompts, "merge_qkv": merge_qkv}
    return names | {"load_calibration": load_calibration, "read_prompts": read_prompts}


def kernels(folder: Path) -> Names:
    device_bundles.write_kernels(folder / "build/kernels", 90)
    index = json.loads((folder / "build/kernels/sm_90/kernels.json").read_text())
    arguments = [one for image in index["images"] for one in image["arguments"] if one["source"] == "buffer"]
    return {"Path": Path, "buffers": {one["name"]: 256 for one in arguments}}


def component_runner(folder: Path) -> Names:
    from collections.abc import Mapping
    from typing import Protocol

    from numpy.typing import NDArray

    from runtime.bundle.golden import Platform

    return {"Protocol": Protocol, "Mapping": Mapping, "NDArray": NDArray, "Platform": Platform}


READERS: dict[str, Callable[[Path], Names]] = {
    "README.md": readme,
    "docs/bundle.md": bundle,
    "docs/embedding.md": demo,
    "docs/inference_py.md": published_script,
    "docs/kernels.md": kernels,
    "docs/operators.md": operators,
    "docs/planning.md": planning,
    "docs/policies.md": small_model,
    "docs/quantization.md": quantization,
    "docs/rolling.md": small_model,
    "docs/runtime.md": demo,
    "docs/start.md": start,
    "docs/tensorrt_plugin.md": graph,
    "docs/verification.md": component_runner,
}
"""Document -> what prepares its folder and gives the names that its Python takes for granted."""


# ---- running them ----


def python(block: Block, names: Names) -> None:
    exec(compile(block.text, str(block), "exec"), names)


def c(block: Block, folder: Path) -> None:
    """As the body of a function that is given what the block takes for granted."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    include, _, body = block.text.partition("\n")
    given = "const int32_t* keep_q20, lf_attention_buffers buffers, void* workspace, void* stream"
    source = folder / "block.c"
    source.write_text(
        f"#include <stdio.h>\n{include}\nvoid block({given});\nvoid block({given})\n{{\n{body}\n}}\n"
    )
    strict = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    command = [compiler, *strict, f"-I{ROOT / 'plugins/launch'}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def toml(block: Block, folder: Path) -> None:
    """As the file, or the part of a file, that it is."""
    from export.hub.known import load_model

    parsed, path = tomllib.loads(block.text), folder / "mine.toml"
    if "models" in parsed:
        path.write_text(block.text)
        assert load_model(str(path)).title == next(iter(parsed["models"].values()))["title"]
    elif "compute_capability" in parsed:
        path.write_text(block.text)
        assert load_target(str(path)).name == parsed["name"]
    elif "peak" in parsed:
        complete = (ROOT / "engines/targets/rtx5090.toml").read_text()
        path.write_text(complete.partition("[peak]")[0] + block.text)
        assert load_target(str(path)).peak is not None
    else:  # tables of a variant
        complete = (ROOT / "engines/variants/dense.toml").read_text()
        tables = "|".join(map(re.escape, parsed))
        others = re.sub(rf"^\[({tables})\]\n(?:(?!\[).*\n)*", "", complete, flags=re.MULTILINE)
        path.write_text(others + "\n" + block.text)
        load_variant(str(path))


def code(document: Path) -> list[Block]:
    """The blocks that are executed, or hold command lines that are."""
    found = []
    for block in blocks(document):
        if block.language in DRAWINGS or why_not(block):
            continue
        if block.language not in SHELL or any(quick(command) for command in lines(block)):
            found.append(block)
    return found


def lines(block: Block) -> list[Command]:
    return [command for command in commands(block.path) if command.block == block]


def quick(command: Command) -> bool:
    return reason(command.text) is None and not re.fullmatch(SLOW, command.text)


def prepared(folder: Path) -> None:
    """What any document may name."""
    handmade.build_bundle(folder / "engines/built/demo")
    (folder / "BUNDLE").symlink_to(folder / "engines/built/demo", target_is_directory=True)


@pytest.mark.parametrize(
    "document",
    [path for path in DOCUMENTS if code(path)],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_document(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepared(tmp_path)
    name = document.relative_to(ROOT).as_posix()
    names = {"__name__": "snippets"} | READERS.get(name, nothing)(tmp_path)
    for block in code(document):
        if block.language == "python":
            python(block, names)
        elif block.language == "toml":
            toml(block, tmp_path)
        elif block.language == "c":
            c(block, tmp_path)
        else:
            assert block.language in SHELL, f"{block}: nothing here runs {block.language}"
            for command in filter(quick, lines(block)):
                assert run(command.text) == 0, f"{block}: {command}"
    if isinstance(pipeline := names.get("pipeline"), Pipeline):
        pipeline.close()
    if any("show(" in block.text for block in code(document)):
        assert shown(tmp_path)


def test_the_protocol_in_the_documents_is_the_runtimes() -> None:
    from runtime.bundle.golden import ComponentRunner

    (block,) = (block for block in blocks(ROOT / "docs/verification.md") if block.language == "python")
    names = component_runner(Path())
    python(block, names)

    def members(protocol: type) -> set[str]:
        return {name for name in [*vars(protocol), *protocol.__annotations__] if not name.startswith("_")}

    assert members(names["ComponentRunner"]) == members(ComponentRunner)


@pytest.fixture(scope="module")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with the options that the Makefile has: the shipped weights, dense."""
    recipe = re.search(
        r"^BUILD_DEMO = .* -m export (build .*?) --name", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    assert recipe is not None
    out = tmp_path_factory.mktemp("demo")
    assert export_main([*recipe[1].split(), "--name", "demo", "--out", str(out)]) == 0
    return out / "demo"


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    sorted(
        {
            command.text
            for path in DOCUMENTS
            for command in commands(path)
            if reason(command.text) is None and re.fullmatch(SLOW, command.text)
        }
    ),
)
def test_a_command_that_takes_longer(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """BUNDLE is what `make demo` builds. Exit code 1 says that a plan does not fit, which some are to show."""
    monkeypatch.chdir(tmp_path)
    if "BUNDLE" in command:
        (tmp_path / "BUNDLE").symlink_to(request.getfixturevalue("demo_bundle"), target_is_directory=True)
    (tmp_path / "prompts.txt").write_text("a red square moves right\n")
    mine = next(block for block in blocks(ROOT / "docs/policies.md") if block.language == "toml")
    toml(mine, tmp_path)
    if "ranges.json" in command and "calibrate" not in command:
        assert run("python -m export calibrate --gpu rtx5090 --prompts prompts.txt --out ranges.json") == 0
    assert run(command) in ((0, 1) if " plan " in command else (0,))
