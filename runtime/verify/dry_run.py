"""Type-checks the whole execution of a bundle on a machine without its device.

Everything the executor would do is walked in the order of a rollout: each run of an engine is held against the
component's tensors in the manifest, each launch of a kernel against the images' own description and the limits of
the device, the weights file against what is bound to it, and every tensor against the memory it lies in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from runtime.bundle import Bundle
from runtime.errors import BundleError, LightForcingError
from runtime.program.buffers import BufferPlan, plan_buffers, runs_on_gpu
from runtime.program.builder import build_program
from runtime.program.kernels import KernelLibrary
from runtime.program.program import Copy, EngineRun, Fill, Forward, KernelLaunch, Operation, Program

from .contents import check_contents
from .contract import check_contract
from .memory import MemoryChecker
from .steps import Flaws, LaunchChecker, RunChecker

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["DryRunError", "DryRunReport", "ForwardCost", "dry_run", "require_fit"]

_SHOWN = 5


class DryRunError(BundleError):
    """The bundle cannot be executed as it is. `flaws` has one sentence for each thing that is wrong."""

    def __init__(self, bundle: Bundle, flaws: tuple[str, ...]) -> None:
        more = len(flaws) - _SHOWN
        listed = "; ".join(flaws[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
        super().__init__(
            f"bundle {bundle.manifest.name!r} cannot be executed, {len(flaws)} flaw(s): {listed}. Rebuild it with "
            f"the exporter of this version"
        )
        self.flaws = flaws


@dataclass(frozen=True)
class ForwardCost:
    """One kind of forward: what is enqueued, and the bytes that cross the bus or are copied on the device.

    `gpu_launches` counts what the engines launch themselves too; `None` if one does not tell.
    """

    name: str
    engine_runs: int
    kernel_launches: int
    copies: int
    gpu_launches: int | None
    fed_bytes: int
    copied_bytes: int


@dataclass(frozen=True)
class DryRunReport:
    """What was checked. Sizes in bytes; `unbound` names tensors of the weights file that nothing uses."""

    bundle: str
    target: str
    kernels: str | None
    images: tuple[str, ...]
    forwards: tuple[ForwardCost, ...]
    checked_runs: int
    checked_launches: int
    checked_tensors: int
    weights_bytes: int
    shared_bytes: int
    session_bytes: int
    unbound: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)

    def __rich__(self) -> Table:
        from rich import box
        from rich.table import Table

        table = Table(title=f"{self.bundle} for {self.target}: checked, not executed", box=box.SIMPLE_HEAD)
        columns = ("forward", "engine runs", "kernels", "copies", "GPU launches", "fed MB", "copied MB")
        for column in columns:
            name = column == "forward"
            width = max(map(len, column.split()))
            table.add_column(column, justify="left" if name else "right", min_width=width, no_wrap=name)
        for row in self.forwards:
            launches = "?" if row.gpu_launches is None else f"{row.gpu_launches:,}"
            counts = (row.engine_runs, row.kernel_launches, row.copies)
            sizes = (row.fed_bytes, row.copied_bytes)
            table.add_row(
                row.name, *(f"{n:,}" for n in counts), launches, *(f"{n / 1e6:,.3f}" for n in sizes)
            )
        table.caption = (
            f"{self.checked_runs:,} engine runs, {self.checked_launches:,} kernel launches ({len(self.images)} images) "
            f"and {self.checked_tensors:,} tensors hold; weights {self.weights_bytes:,} B, shared "
            f"{self.shared_bytes:,} B with them, each session {self.session_bytes:,} B"
        )
        return table


def dry_run(bundle: Bundle, *, sessions: int = 1) -> DryRunReport:
    """Walk the execution of `bundle` for `sessions` sessions. Needs no device and no engine library.

    Raises:
        DryRunError: something does not fit; all flaws are listed.
        BundleError: the manifest cannot be turned into an execution at all.
    """
    flaws = Flaws()
    check_contents(bundle, flaws)
    check_contract(bundle, flaws)
    try:
        program = build_program(bundle, plan_buffers(bundle.manifest, sessions))
        return check_program(bundle, program, flaws)
    except DryRunError:
        raise
    except Exception:  # tensors that are not what they must be leave nothing to walk
        _require_none(bundle, flaws)
        raise


def require_fit(bundle: Bundle, sessions: int) -> BufferPlan:
    """The part of a dry run that costs next to nothing, before engines are loaded: what the manifest says of the model
    and of each component's tensors, what is bound to them, and what the weights files hold.

    Returns:
        The buffers for `sessions` sessions.

    Raises:
        DryRunError: something does not fit; all flaws are listed.
        BundleError: the manifest cannot be turned into an execution at all.
    """
    flaws = Flaws()
    check_contract(bundle, flaws)
    _require_none(bundle, flaws)
    runs = RunChecker(bundle.manifest, flaws)
    plan = plan_buffers(bundle.manifest, sessions)
    for forward, operation in build_program(bundle, plan).walk():
        if isinstance(operation, EngineRun):
            runs.check(operation, _where(forward, operation))
        elif isinstance(operation, KernelLaunch):
            runs.check_operator(operation, _where(forward, operation))
    _require_none(bundle, flaws)
    return plan


def _require_none(bundle: Bundle, flaws: Flaws) -> None:
    if flaws.found:
        raise DryRunError(bundle, tuple(flaws.found))


def check_program(bundle: Bundle, program: Program, flaws: Flaws | None = None) -> DryRunReport:
    """Hold a program against its bundle; see `dry_run`. `flaws` has what was found before."""
    manifest = bundle.manifest
    flaws = flaws or Flaws()
    check_contract(bundle, flaws)
    runs = RunChecker(manifest, flaws)
    launches = LaunchChecker(_library(bundle, flaws), flaws)
    memory = MemoryChecker(program, flaws)
    memory.check_layout()
    for forward in _rollout(program):
        memory.feed(forward)
        for operation in forward.operations:
            where = _where(forward, operation)
            memory.check(operation, where, forward)
            if isinstance(operation, EngineRun):
                runs.check(operation, where)
            elif isinstance(operation, KernelLaunch):
                runs.check_operator(operation, where)
                launches.check(operation, where)
    memory.check_queues()
    _require_none(bundle, flaws)
    return DryRunReport(
        bundle=manifest.name,
        target=manifest.target.name,
        kernels=None if manifest.kernels is None else manifest.kernels.arch,
        images=tuple(sorted(launches.images)),
        forwards=tuple(_cost(manifest.components, forward) for forward in program.forwards.values()),
        checked_runs=runs.count,
        checked_launches=launches.count,
        checked_tensors=memory.tensors,
        weights_bytes=sum(view.nbytes for view in program.weights.values()),
        shared_bytes=program.shared_bytes,
        session_bytes=program.session_bytes,
        unbound=memory.unbound(),
    )


def _library(bundle: Bundle, flaws: Flaws) -> KernelLibrary | None:
    """The images for the bundle's target; `None` on a host, where nothing is launched."""
    kernels, capability = bundle.manifest.kernels, bundle.manifest.target.compute_capability
    if capability is None or not runs_on_gpu(bundle.manifest):
        return None
    if kernels is None:
        flaws.add("kernels", "the bundle is for a GPU and holds no kernel images")
        return None
    major, minor = (int(part) for part in capability.split("."))
    try:
        return KernelLibrary.of(bundle, (major, minor))
    except LightForcingError as error:
        flaws.add("kernels", str(error))
        return None


def _rollout(program: Program) -> Iterator[Forward]:
    """Every forward in the order in which a rollout comes to it, with the copies between them."""

    def between(name: str, operation: Operation) -> Forward:
        return Forward(name, "decode" if name.startswith("decode") else "forward", (), (operation,))

    last_denoise = [name for name in program.forwards if name.startswith(("denoise.", "window."))][-1]
    for name, forward in program.forwards.items():
        if name.startswith("joint."):
            number = int(name.removeprefix("joint.")) - 1
            for slot in range(program.latent_slots):
                yield between(f"load_joint_latent.{slot}.{number}", program.load_joint_latent(slot, number))
        yield forward
        if name == last_denoise:
            for slot in range(program.latent_slots):
                yield between(f"store_latent.{slot}", program.store_latent(slot))
        elif name == "encode_next.b":
            for slot in range(program.latent_slots):
                for frame in range(program.buffers["latents"].buffer.shape[2]):
                    yield between(f"store_encoded.{slot}.{frame}", program.store_encoded(slot, frame))
        elif name == "begin_clean":
            for slot in range(program.latent_slots):
                yield between(f"load_latent.{slot}", program.load_latent(slot))
            # The decoder's first input; it must be there before the first forward that decodes.
            frames = program.buffers["latents"].buffer.shape[2]
            for slot in range(program.latent_slots):
                for frame in range(frames):
                    yield between(f"decode_latent.{slot}.{frame}", program.decode_latent(slot, frame))


def _where(forward: Forward, operation: Operation) -> str:
    what = {EngineRun: "component", KernelLaunch: "kernel", Copy: "copy", Fill: "fill"}[type(operation)]
    name = getattr(operation, "component", None) or getattr(operation, "kernel", "")
    layer = "" if operation.layer is None else f", layer {operation.layer}"
    return f"forward {forward.name!r}{layer}, {what}" + (f" {name!r}" if name else "")


def _cost(components: Any, forward: Forward) -> ForwardCost:
    runs = [op for op in forward.operations if isinstance(op, EngineRun)]
    kernels = sum(isinstance(op, KernelLaunch) for op in forward.operations)
    copies = [op for op in forward.operations if isinstance(op, Copy | Fill)]
    costs = [components[run.component].cost for run in runs]
    return ForwardCost(
        name=forward.name,
        engine_runs=len(runs),
        kernel_launches=kernels,
        copies=len(copies),
        gpu_launches=None if None in costs else kernels + sum(cost.launches for cost in costs),
        fed_bytes=sum(view.nbytes for view in forward.feeds),
        copied_bytes=sum(copy.target.nbytes for copy in copies),
    )
