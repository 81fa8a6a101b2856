"""The code blocks of README and the documents, and which of them no test runs, with the reasons."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "DOCUMENTS",
    "DRAWINGS",
    "NOT_RUN",
    "NOT_RUN_BLOCKS",
    "ROOT",
    "SHELL",
    "Block",
    "Command",
    "blocks",
    "commands",
    "reason",
    "why_not",
]

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")), *(ROOT / "docs").glob("*.md")]
)

SHELL = frozenset({"bash", "shell"})
DRAWINGS = frozenset({"text", "mermaid"})
"""Languages of blocks that are no code."""

_GPU = "needs a GPU"
_HUB = "fetches gigabytes from a model hub"
_FILES = "takes files of a published model, gigabytes that are not here"
_INDEX = "installs from a package index; tests/test_packaging.py installs the wheels (slow)"
_TOOL = "a program that is not part of this project and not in the environment"
_LONG = "takes minutes to hours; its room has tests of its own"
_MAKE = "the recipe is other commands; tests/test_packaging.py reads the Makefile"
_SERVER = "runs until it is stopped; tests/serving starts it as this command does"
_HUB_WRITE = "writes to a hub's repository; tests/export/hub does so on a hub of its own"

NOT_RUN: tuple[tuple[str, str], ...] = (
    (r"make .*", _MAKE),
    (r"\.venv/bin/pre-commit install", "changes the checkout's git hooks"),
    (r"(uv )?pip install .*", _INDEX),
    (r"(openssl|docker|tritonserver|trtexec) .*", _TOOL),
    (r"polygraphy run .*--trt .*", _GPU),
    (r"polygraphy .*", "tests/test_examples.py runs them in the folder of a bundle"),
    (r"python -m export build .*--gpu auto.*", _GPU),
    (r"python -m export plan .*--gpu auto.*", _GPU),
    (r"python -m export build .*--backend tensorrt( .*)?", _GPU),
    (
        r"python -m export build .*--gpu h200 --backend inductor.*",
        "takes minutes and a CUDA build of PyTorch",
    ),
    (r"python -m export build .*--model .*", _HUB),
    (r"python -m export models .*--fetch", _HUB),
    (r"python -m export build .*--checkpoint .*", _FILES),
    (r"python -m export (push|pull) .*", _HUB_WRITE),
    (
        r"python -m export plan .*--layer",
        "takes engines of the 1.3B model; tests/export/backends/test_rtx_bundle.py lists those of a small one",
    ),
    (
        r"python -m export plan .*--measured .*",
        "takes figures that a GPU has measured; tests/export/estimate makes some",
    ),
    (r"python -m runtime verify engines/built/\S+", _GPU),
    (r"python -m runtime generate engines/built/first .*", _GPU),
    (r"python -m runtime bench engines/built/mine .*", _GPU),
    (r"python -m plugins build --tensorrt .*", "compiles C++ for minutes; tests/plugins/compile does so"),
    (r"python -m serving .*", _SERVER),
    (r"python3? -m benchmarks\..*", _LONG),
    (r"python -m training .*", _LONG),
    (r"python -m tests\.fuzz .*", _LONG),
)
"""(what a command line is wholly, why it is not run). The first that fits counts."""

NOT_RUN_BLOCKS: tuple[tuple[str, str, str], ...] = (
    ("docs/deployment.md", "[Service]", "a unit of systemd, which is not here"),
    ("docs/deployment.md", "location /", "a part of nginx's configuration, which is not here"),
    ("docs/kernels.md", "launcher = KernelLauncher(", _GPU),
    (
        "docs/serving.md",
        "from openai import",
        "another project's client; tests/serving/test_videos.py sends what it sends",
    ),
    (
        "docs/tensorrt_plugin.md",
        "IRuntime*",
        "TensorRT's interface, which needs a GPU; tests/plugins has its headers",
    ),
    (
        "docs/tensorrt_rtx.md",
        "from pathlib",
        "takes minutes; tests/export/backends/test_rtx.py builds engines so",
    ),
)
"""(document, how the block begins, why it is not run)."""


@dataclass(frozen=True)
class Block:
    """A block of a document; what is indented and nothing else is `shell`."""

    path: Path
    line: int
    language: str
    text: str

    @property
    def document(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command line: joined, without what is said behind it."""

    block: Block
    text: str

    def __str__(self) -> str:
        return self.text


def blocks(path: Path) -> Iterator[Block]:
    """All blocks of a document, fenced and indented, in order."""
    lines = path.read_text().splitlines()
    index = 0
    while index < len(lines):
        begin, fence = index, re.fullmatch(r"```(\w*)", lines[index])
        index += 1
        if fence is not None:
            while lines[index] != "```":
                index += 1
            yield Block(path, begin + 1, fence[1], "\n".join(lines[begin + 1 : index]) + "\n")
            index += 1
        elif lines[begin].startswith("    ") and (begin == 0 or not lines[begin - 1].strip()):
            while index < len(lines) and lines[index].startswith("    "):
                index += 1
            text = "\n".join(line[4:] for line in lines[begin:index]) + "\n"
            yield Block(path, begin + 1, "shell", text)


def commands(path: Path) -> Iterator[Command]:
    """The command lines of a document's shell blocks."""
    for block in blocks(path):
        if block.language in SHELL:
            for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
                text = re.split(r"(?:^|\s+)#\s|\s{4,}(?=[a-z])|\s{2,}(?=\()", line)[0].strip()
                if text:
                    yield Command(block, text)


def reason(command: str) -> str | None:
    """Why a command line is not run; None = it is run."""
    return next((why for pattern, why in NOT_RUN if re.fullmatch(pattern, command)), None)


def why_not(block: Block) -> str | None:
    """Why a block is not run; None = it is, or it holds command lines, which have reasons of their own."""
    return next(
        (
            why
            for document, beginning, why in NOT_RUN_BLOCKS
            if block.document == document and block.text.startswith(beginning)
        ),
        None,
    )
