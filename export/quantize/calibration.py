"""Calibration of static FP8 activations with NVIDIA ModelOpt, saved to a file that builds take up again."""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from export.errors import InputError
from lightforcing_ref.model import CausalWanModel

from .graph import KINDS
from .numerics import Format, importance_of
from .trial import Trial, block_linears

__all__ = ["ALL", "Calibration", "calibrate", "fake_quantize", "load_calibration", "modelopt_quantization"]

Activations = Literal["dynamic", "static"]

Measured = Literal["fp8", "fp8_static", "nvfp4"]

ALL = "all"
"""In place of a kind of linears: all of them."""

_Error = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Range = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Calibration(BaseModel):
    """Ranges of the activations of one model.

    Attributes:
        preset: of the model.
        weights: what the model's weights came from, by role: SHA-256 of a file, or "random:SEED".
        prompts, chunks, steps: extent of the rollouts that were observed.
        height, width: of their video, in pixels.
        variant: attention variant they ran with.
        modelopt: version that observed them.
        amax: largest magnitude of each linear's input, by the linear's name.
        rms: root mean square of each channel of a linear's input, by the linear's name; empty = not measured.
        errors: relative error of each linear's output on the same rollouts, by name and format ("fp8" with a scale
            per token, "fp8_static", "nvfp4"); empty where they were not measured, else of every linear in all of them.
        latent_errors: of the latents after the rollouts, in the formats that were tried.
        output_errors: of the model's predictions in every forward of the rollouts where all linears of a kind are in a
            format, by kind and format; `ALL` stands for all kinds together. Activations have a scale per token.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    preset: str
    weights: dict[str, str]
    prompts: Annotated[int, Field(ge=1)]
    chunks: Annotated[int, Field(ge=1)]
    steps: Annotated[int, Field(ge=1)]
    height: int
    width: int
    variant: str
    modelopt: str
    amax: Annotated[dict[str, _Range], Field(min_length=1)]
    rms: dict[str, tuple[_Error, ...]] = {}
    errors: dict[str, dict[Measured, _Error]] = {}
    latent_errors: dict[Measured, _Error] = {}
    output_errors: dict[str, dict[Format, _Error]] = {}

    @model_validator(mode="after")
    def _errors_of_all_or_none(self) -> Calibration:
        formats = set(get_args(Measured))
        for name in self.amax if self.errors else ():
            if missing := formats - self.errors.get(name, {}).keys():
                raise ValueError(f"errors has none of {name} in {', '.join(sorted(missing))}")
        for kind in (*KINDS, ALL) if self.output_errors else ():
            if missing := set(get_args(Format)) - self.output_errors.get(kind, {}).keys():
                raise ValueError(f"output_errors has none of {kind} in {', '.join(sorted(missing))}")
        return self

    def save(self, path: Path) -> None:
        """Write the file."""
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @cached_property
    def importance(self) -> dict[str, Tensor] | None:
        """Of the input channels of each linear, as `quantize` takes it; None where it was not measured."""
        return {name: importance_of(rms) for name, rms in self.rms.items()} or None

    def require(self, preset: str, weights: Mapping[str, str], source: Path) -> None:
        """Refuse to be used for another model; `source` is the file that is to blame.

        Raises:
            InputError: the preset or the weights differ from what was calibrated.
        """
        found = {"preset": self.preset, **self.weights}
        wanted = {"preset": preset, **weights}
        for role in sorted(found.keys() | wanted.keys()):
            if found.get(role) != wanted.get(role):
                raise InputError(
                    f"the calibration {source} was made with {role} {found.get(role, 'none')}, this build has "
                    f"{wanted.get(role, 'none')}; ranges belong to one model: calibrate this one"
                )


def load_calibration(path: Path) -> Calibration:
    """Read a calibration file.

    Raises:
        InputError: it cannot be read, or is no calibration.
    """
    try:
        return Calibration.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read the calibration {path}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(
            f"{path} is no calibration: {where}: {first['msg']}; write one with `calibrate`"
        ) from error


def modelopt_config(activations: Activations) -> dict[str, Any]:
    """ModelOpt's configuration for the block linears: E4M3 weights per output channel, activations as asked for."""
    inputs: dict[str, Any] = {"num_bits": (4, 3), "axis": None}
    if activations == "dynamic":
        inputs |= {"type": "dynamic", "block_sizes": {-1: None}}
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for kind in KINDS:
        weights = {"num_bits": (4, 3), "axis": 0}
        entries += [
            {"quantizer_name": f"*blocks.*.{kind}.weight_quantizer", "cfg": weights},
            {"quantizer_name": f"*blocks.*.{kind}.input_quantizer", "cfg": inputs},
        ]
    return {"quant_cfg": entries, "algorithm": "max"}


def modelopt_quantization() -> ModuleType:
    """NVIDIA ModelOpt's quantization of PyTorch models.

    Raises:
        InputError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            # Versions of libraries that only its other features touch.
            warnings.simplefilter("ignore")
            import modelopt.torch.quantization as mtq
    except ImportError as error:
        raise InputError(
            f"calibration needs NVIDIA ModelOpt ({error}); install the `quantize` extra, or use dynamic activations"
        ) from error
    module: ModuleType = mtq
    return module


def fake_quantize(model: CausalWanModel, activations: Activations, observe: Callable[[], object]) -> None:
    """Give the block linears of `model` ModelOpt's fake quantization, in place.

    Args:
        model: with merged projections.
        observe: runs the model on representative inputs; for static activations.

    Raises:
        InputError: ModelOpt is not installed, or the projections are not merged.
    """
    block_linears(model)
    mtq = modelopt_quantization()
    stdout = sys.stdout

    def run(_: object) -> None:
        with contextlib.redirect_stdout(stdout):
            observe()

    # ModelOpt prints how many quantizers it inserted.
    with contextlib.redirect_stdout(io.StringIO()):
        mtq.quantize(model, modelopt_config(activations), run)


class _Squares:
    """Mean squares of the channels of the block linears' inputs."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}

    def watch(self, model: CausalWanModel, trial: Trial) -> None:
        """Run the trial, and add up what passes."""
        handles = [
            linear.register_forward_pre_hook(partial(self._add, name))
            for name, linear in block_linears(model).items()
        ]
        try:
            trial.run(model)
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().flatten(0, -2)
        self._sums[name] = self._sums.get(name, torch.zeros(())) + x.double().square().sum(0)
        self._tokens[name] = self._tokens.get(name, 0) + len(x)

    def rms(self) -> dict[str, tuple[float, ...]]:
        """Their roots by linear, to three digits."""
        return {
            name: tuple(float(f"{value:.3g}") for value in (sums / self._tokens[name]).sqrt().tolist())
            for name, sums in self._sums.items()
        }


def calibrate(model: CausalWanModel, trial: Trial, *, weights: Mapping[str, str]) -> Calibration:
    """Observe the inputs of the block linears over the trial's rollouts.

    Args:
        model: with merged projections; left with ModelOpt's static fake quantization.
        weights: what the model's weights came from, for the file; see `Calibration`.

    Raises:
        InputError: as `fake_quantize`; or a linear saw nothing but zeros or non-finite values.
    """
    squares = _Squares()
    fake_quantize(model, "static", lambda: squares.watch(model, trial))
    # ModelOpt adds the attribute to the modules it converts.
    quantizers: dict[str, Any] = {
        name: linear.input_quantizer for name, linear in block_linears(model).items()
    }
    amax = {name: float(quantizer.amax) for name, quantizer in quantizers.items()}
    broken = [name for name, value in amax.items() if not 0 < value < float("inf")]
    if broken:
        raise InputError(
            f"the input of {broken[0]} ranged up to {amax[broken[0]]:g} ({len(broken)} such linears); expected a "
            "positive, finite range; check the checkpoint and the prompts"
        )
    plan = trial.plan
    return Calibration(
        preset=plan.preset.name,
        weights=dict(weights),
        prompts=len(trial.embeddings),
        chunks=trial.chunks,
        steps=len(plan.schedule.row_timesteps),
        height=plan.height,
        width=plan.width,
        variant=plan.variant.name,
        modelopt=metadata.version("nvidia-modelopt"),
        amax=amax,
        rms=squares.rms(),
    )
