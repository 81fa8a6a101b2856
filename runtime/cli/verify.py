"""`python -m runtime verify`: the golden vectors on this machine, or a dry run where it has no GPU."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

from runtime.backends import load_engine, runs_on_host
from runtime.bundle import Bundle, load_bundle
from runtime.bundle.golden import ComponentRunner
from runtime.bundle.signature import check_signature
from runtime.errors import InputError
from runtime.files import atomic_output
from runtime.host.onnxruntime import check_threads
from runtime.program.buffers import plan_buffers
from runtime.terminal import console, write_out
from runtime.verify import Verdict, VerificationError, judge
from runtime.verify.dry_run import dry_run, require_fit
from runtime.verify.verdict import gpu_problem, record, refusal

__all__ = ["run_verify"]


def run_verify(options: argparse.Namespace, notes: Console, written: list[str]) -> None:
    """Verify the bundle, print a table, record the verdict, and write JSON where asked to.

    `written` gets the names of the files once they are there.

    Raises:
        VerificationError: a component failed.
        DryRunError: a launch does not fit its kernel or engine.
        BundleIntegrityError: it is another bundle than was asked for, or not signed by the one asked for.
        InputError: the bundle is for a GPU and there is none, or an argument does not fit.
    """
    target = None if options.json in (None, "-") else Path(options.json)
    if target is not None and not target.parent.is_dir():
        raise InputError(f"folder {str(target.parent)!r} of --json does not exist; create it first")
    if options.signature is not None and options.public_key is None:
        raise InputError("--signature is given without --public-key: whose signature it is has to be known")
    check_threads(options.threads)
    bundle = load_bundle(options.bundle, expected=options.expect, reread=True)
    notes.print(f"manifest: SHA-256 {bundle.digest}", markup=False, highlight=False, soft_wrap=True)
    if options.public_key is not None:
        check_signature(
            bundle.root,
            Path(options.public_key),
            None if options.signature is None else Path(options.signature),
        )
        notes.print(
            f"signed by the owner of {options.public_key}", markup=False, highlight=False, soft_wrap=True
        )
    if options.dry_run:
        report = dry_run(bundle)
        _write(json.dumps(report.to_json(), indent=1), report, options.json, target, written)
        return
    require_fit(bundle, 1)
    with _runner(bundle, options.threads) as runner, notes.status("verifying") as status:
        verdict = judge(
            bundle,
            runner,
            lambda case, done, total: status.update(f"verifying {case} ({done + 1} of {total})"),
        )
    path = record(bundle, verdict)
    if path is not None:
        written.append(str(path))
    _write(verdict.model_dump_json(indent=1), _table(bundle, verdict), options.json, target, written)
    if path is not None:
        notes.print(f"verdict recorded in {path}", markup=False, highlight=False, soft_wrap=True)
    if not verdict.passed:
        raise VerificationError(refusal(bundle, verdict))


def _write(
    text: str, table: RenderableType, destination: str | None, target: Path | None, written: list[str]
) -> None:
    """Print the table, or the JSON in its place; and write the JSON to a file where one is given."""
    if target is not None:
        with atomic_output(target) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
        written.append(str(target))
    if destination == "-":
        write_out(text + "\n")
    else:
        console().print(table)


@contextmanager
def _runner(bundle: Bundle, threads: int | None) -> Iterator[ComponentRunner]:
    """Runs the bundle's components; its engine is closed at the end, which keeps the kernels that were compiled."""
    if runs_on_host(bundle):
        from runtime.host.runner import HostRunner

        yield HostRunner(bundle, threads=threads)
        return
    manifest = bundle.manifest
    if problem := gpu_problem():
        raise InputError(
            f"bundle {manifest.name!r} was built for {manifest.target.name} and here {problem}, so its engines cannot "
            f"run: use --dry-run to check what can be checked without a GPU, and verify it on the target"
        )
    engine = load_engine(bundle, plan_buffers(manifest, 1), threads=threads)
    try:
        yield engine.component_runner()
    finally:
        engine.close()


def _table(bundle: Bundle, verdict: Verdict) -> Table:
    table = Table(title=escape(f"{bundle.manifest.name} on {verdict.platform.device}"), title_justify="left")
    for heading in ("component", "runs", "error", "limit", "worst output", "verdict"):
        numeric = heading in ("runs", "error", "limit")
        table.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    for name, component in verdict.components.items():
        error = "-" if component.error is None else f"{component.error:.1e}"
        passed = "[green]pass[/]" if component.passed else "[bold red]FAIL[/]"
        limit = f"{component.tolerance:.0e}"
        table.add_row(escape(name), str(component.cases), error, limit, escape(component.worst), passed)
    return table
