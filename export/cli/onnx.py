"""The command `onnx`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from runtime.terminal import write_out

from .arguments import build_request
from .command import Command, add_model_arguments

if TYPE_CHECKING:
    from export.request.request import BuildRequest


__all__ = ["Onnx"]


class Onnx(Command):
    """Export the step graph to ONNX and stop there.

    In the type of the target's bundles before anything is quantized: float32 where they run on ONNX Runtime, else
    bfloat16.
    """

    name = "onnx"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_model_arguments(parser)

    def run(self, args: argparse.Namespace) -> int:
        from export.build import export_onnx

        write_out(f"{export_onnx(graph_request(args))}\n")
        return 0


def graph_request(args: argparse.Namespace) -> BuildRequest:
    """The request of `onnx`: quantization comes after the graph that it exports, which is not called after it."""
    request, choice = build_request(args)
    if choice.precision in ("fp32", "bf16"):
        return request
    return replace(request, precision="bf16", name=f"{request.name.removesuffix(choice.precision)}bf16")
