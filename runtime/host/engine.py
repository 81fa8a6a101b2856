"""The engine that runs on the host: a program, the host executor, and components alone for verification."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.bundle import Bundle
from runtime.errors import InputError
from runtime.program.buffers import BufferPlan
from runtime.program.builder import build_program
from runtime.program.engine import ProgramEngine

from .executor import HostExecutor
from .runner import HostRunner

if TYPE_CHECKING:
    from runtime.bundle.golden import ComponentRunner
    from runtime.frames import DeviceFrames

__all__ = ["HostEngine"]


class HostEngine(ProgramEngine):
    """Implements `Engine` on the CPU."""

    on_device = False

    def __init__(self, bundle: Bundle, plan: BufferPlan, *, threads: int | None = None) -> None:
        """Load it, with so many threads per forward (default: what the executor takes).

        Raises:
            EngineError: a component does not load.
            BundleError: the manifest cannot be turned into an execution.
        """
        program = build_program(bundle, plan)
        super().__init__(bundle.manifest, program, HostExecutor(bundle, program, threads=threads))
        self._bundle = bundle
        self._threads = threads

    def decode_on_device(self, session: int, latent: int, *, first: bool) -> tuple[DeviceFrames, float]:
        """Refuse it.

        Raises:
            InputError: always; there is no device.
        """
        raise InputError(
            f"bundle {self._bundle.manifest.name!r} runs on the CPU; take its frames on the host"
        )

    def component_runner(self) -> ComponentRunner:
        """See `Engine.component_runner`."""
        return HostRunner(self._bundle, threads=self._threads)
