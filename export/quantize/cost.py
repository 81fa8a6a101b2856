"""What quantization costs: the output error of every block linear, and the error of the latents after a rollout."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightforcing_ref.cache import LayerKV
from lightforcing_ref.model import CausalWanModel
from lightforcing_ref.rollout import Rollout

from .numerics import FoldedWeight, Format, fake_linear, fold_weight, relative_error
from .trial import Trial, block_linears

__all__ = [
    "Importance",
    "LatentError",
    "fake_quantized",
    "latent_error",
    "layer_errors",
    "output_errors",
    "perturbed",
    "seeded_error",
]

Importance = Mapping[str, Tensor]
"""How much each input channel of a linear matters, by the linear's name."""

_Option = TypeVar("_Option", bound=Hashable)
_Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]


@dataclass(frozen=True)
class LatentError:
    """Relative L2 error of the latents, of all chunks together and of each chunk.

    Later chunks build on the errors of earlier ones, and selections of key blocks flip where scores are close.
    """

    total: float
    per_chunk: tuple[float, ...]


@contextmanager
def _hooked(model: CausalWanModel, hooks: Mapping[str, _Hook]) -> Iterator[None]:
    """Run forward hooks on block linears while the context lasts."""
    linears = block_linears(model)
    handles = [linears[name].register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _weight(linear: nn.Module) -> Tensor:
    assert isinstance(linear, nn.Linear)
    return linear.weight.detach()


def layer_errors(
    model: CausalWanModel,
    trial: Trial,
    formats: Sequence[Format],
    *,
    amax: Mapping[str, float] | None = None,
    importance: Importance | None = None,
) -> dict[str, dict[Format, float]]:
    """Relative L2 error of each block linear's output (bias left out) over the trial's rollouts, by format.

    Every linear sees what it sees in the unquantized model; activations are compared as they pass, not stored.

    Args:
        model: with merged projections.
        amax: static ranges of the inputs, for FP8; None = dynamic.
        importance: of the input channels, for NVFP4; see `fold_weight`.
    """
    sums: dict[str, dict[Format, list[float]]] = {}
    hooks: dict[str, _Hook] = {}
    for name in block_linears(model):
        sums[name] = {format: [0.0, 0.0] for format in formats}
        hooks[name] = _observer(sums[name], _static(name, amax), _important(name, importance))
    with _hooked(model, hooks):
        trial.run(model)
    return {
        name: {format: (gap / scale) ** 0.5 if scale else 0.0 for format, (gap, scale) in errors.items()}
        for name, errors in sums.items()
    }


def _static(name: str, amax: Mapping[str, float] | None) -> Callable[[Format], float | None]:
    """Static range of a linear's input; NVFP4 is always dynamic."""
    return lambda format: None if amax is None or format == "nvfp4" else amax[name]


def _important(name: str, importance: Importance | None) -> Tensor | None:
    return None if importance is None else importance[name]


def _observer(
    sums: dict[Format, list[float]], static: Callable[[Format], float | None], important: Tensor | None
) -> _Hook:
    folded: dict[Format, FoldedWeight] = {}

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = _weight(module)
        expected = torch.nn.functional.linear(inputs[0], weight).float()
        for format, total in sums.items():
            limit = static(format)
            if format not in folded:
                folded[format] = fold_weight(weight, format, amax=limit, importance=important)
            actual = fake_linear(inputs[0], folded[format], format, amax=limit)
            total[0] += float((actual - expected).double().square().sum())
            total[1] += float(expected.double().square().sum())

    return hook


SEEDED_ROWS = 64
"""Tokens of the inputs on which `seeded_error` judges a weight."""


def seeded_error(name: str, format: Format, weight: Tensor, folded: FoldedWeight) -> float:
    """Relative L2 error of a quantized linear's output on normally distributed inputs, seeded by its name.

    It takes no model to run and shows what the weight does; what real activations do, `layer_errors` shows.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    x = torch.empty(SEEDED_ROWS, weight.shape[1]).normal_(generator=generator)
    return relative_error(fake_linear(x, folded, format), x @ weight.float().T)


@contextmanager
def fake_quantized(
    model: CausalWanModel,
    formats: Mapping[str, Format],
    *,
    amax: Mapping[str, float] | None = None,
    importance: Importance | None = None,
) -> Iterator[None]:
    """Let the linears named in `formats` compute as the quantized graph does, while the context lasts.

    Args:
        model: with merged projections.
        amax: static ranges of the inputs, for FP8; None = dynamic.
        importance: of the input channels, for NVFP4; see `fold_weight`.
    """
    hooks = {
        name: _substitute(format, _static(name, amax)(format), _important(name, importance))
        for name, format in formats.items()
    }
    with _hooked(model, hooks):
        yield


@contextmanager
def perturbed(model: CausalWanModel, errors: Mapping[str, float], *, seed: int = 0) -> Iterator[None]:
    """Let the linears named in `errors` be off by noise of that relative L2 size, while the context lasts.

    What that costs is what any format of such errors has to cost in this model, trained or not.

    Args:
        model: with merged projections.
    """
    generator = torch.Generator().manual_seed(seed)
    with _hooked(model, {name: _noise(error, generator) for name, error in errors.items()}):
        yield


def _noise(error: float, generator: torch.Generator) -> _Hook:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        drawn = torch.empty_like(output).normal_(generator=generator)
        return torch.addcmul(output, drawn, error * output.norm() / drawn.norm().clamp_min(1e-30))

    return hook


def _substitute(format: Format, amax: float | None, important: Tensor | None) -> _Hook:
    folded: list[FoldedWeight] = []

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert isinstance(module, nn.Linear)
        if not folded:
            weight, dtype = _weight(module), output.dtype
            folded.append(fold_weight(weight, format, dtype=dtype, amax=amax, importance=important))
        result = fake_linear(inputs[0], folded[0], format, amax=amax).to(output.dtype)
        return result if module.bias is None else result + module.bias

    return hook


def output_errors(
    model: CausalWanModel,
    trial: Trial,
    options: Mapping[_Option, Mapping[str, Format]],
    *,
    importance: Importance | None = None,
) -> dict[_Option, float]:
    """Relative L2 error of what the model predicts, over all forwards of the trial's rollouts, by option.

    Every forward begins where the unquantized rollout is, so that an option shows what it does to one forward and not
    what later ones make of that. Selections of key blocks may differ within the forward.

    Args:
        model: with merged projections.
        options: formats of some linears, with activations quantized per token; the others are not quantized.
        importance: of the input channels, for NVFP4; see `fold_weight`.
    """
    hooks = {
        option: {
            name: _substitute(format, None, _important(name, importance)) for name, format in formats.items()
        }
        for option, formats in options.items()
    }
    sums = dict.fromkeys(options, 0.0)
    scale = 0.0

    class Compared(Rollout):
        """A rollout that repeats each forward with every option."""

        def _forward(
            self, x: Tensor, row: int, chunks: Sequence[int], frames: list[int]
        ) -> tuple[Tensor, list[LayerKV]]:
            nonlocal scale
            expected, new = super()._forward(x, row, chunks, frames)
            scale += float(expected.double().square().sum())
            plain = self.cross
            for option, own in hooks.items():
                with _hooked(model, own):
                    self.cross = self._condition(self.text)
                    actual, _ = super()._forward(x, row, chunks, frames)
                sums[option] += float((actual - expected).double().square().sum())
            self.cross = plain
            return expected, new

    trial.run(model, Compared)
    return {option: (total / scale) ** 0.5 if scale else 0.0 for option, total in sums.items()}


def latent_error(
    model: CausalWanModel,
    trial: Trial,
    formats: Mapping[str, Format],
    *,
    amax: Mapping[str, float] | None = None,
    importance: Importance | None = None,
) -> LatentError:
    """Error of the latents after the trial's rollouts, quantized against not, from the same noise.

    Args:
        As `fake_quantized`.
    """
    expected = torch.stack(trial.run(model))
    with fake_quantized(model, formats, amax=amax, importance=importance):
        actual = torch.stack(trial.run(model))
    chunks = zip(actual.chunk(trial.chunks, dim=2), expected.chunk(trial.chunks, dim=2), strict=True)
    return LatentError(
        relative_error(actual, expected), tuple(relative_error(ours, theirs) for ours, theirs in chunks)
    )
