"""Bundle against reference model, through Polygraphy: per component, per step, and over a whole rollout."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightforcing_ref.text import UMT5Layer, build_encoder, encode, layer_weights, load_tokenizer, tokenize
from lightforcing_ref.vae import to_uint8
from runtime.bundle import Bundle, Component, load_bundle
from runtime.onnxruntime_engine import OnnxGraph, default_threads
from runtime.pipeline import Pipeline
from runtime.segmented import load_segments

from .components import VAEFirst, VAENext, per_chunk_name
from .modules import LAYER_STEMS, ConditionerModule, StepModule
from .reference import Reference, exact_length, step_feeds

__all__ = ["Row", "TorchRunner", "compare_bundle"]

TOLERANCES = {"fp32": 1e-4}
"""Largest relative L2 error of one run of a component, by precision."""

ROLLOUT_FACTOR = 30.0
"""How much larger the error of a whole rollout's frames may be: forwards feed on each other's errors."""

PIXELS = 1e-3
"""Relative L2 error of pixels that is nothing but rounding: a value on the edge may fall to either level."""

Feed = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Row:
    """One comparison: the worst output over all runs.

    Attributes:
        scope: "component", "step" (real states of a rollout, one forward each), or "rollout".
        relative: L2 norm of the difference over the L2 norm of the reference.
        largest: largest absolute difference; for pixels, in levels of 0..255.
    """

    scope: str
    name: str
    runs: int
    output: str
    relative: float
    largest: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """A comparison that came out as not-a-number fails."""
        return self.relative <= self.tolerance


@dataclass(frozen=True)
class _Difference:
    relative: float
    largest: float
    tolerance: float

    def __bool__(self) -> bool:
        return self.relative <= self.tolerance


def _difference(actual: NDArray[Any], expected: NDArray[Any], tolerance: float) -> _Difference:
    wide, reference = actual.astype(np.float64), expected.astype(np.float64)
    gap = np.linalg.norm(wide - reference)
    scale = np.linalg.norm(reference)
    relative = float(gap / scale) if scale else float(gap)
    return _Difference(relative, float(np.abs(wide - reference).max(initial=0.0)), tolerance)


class TorchRunner(BaseRunner):
    """Polygraphy runner for a PyTorch callable.

    Args:
        function: arrays by name -> tensors by name.
        component: the component it stands for; gives names, shapes and types.
    """

    def __init__(self, function: Callable[[Feed], Mapping[str, Tensor]], component: Component) -> None:
        super().__init__(prefix="torch")
        self._function = function
        self._component = component

    def activate_impl(self) -> None:
        """Nothing to set up: the model is loaded by the caller."""

    def deactivate_impl(self) -> None:
        """Nothing to tear down."""

    def get_input_metadata_impl(self) -> TensorMetadata:
        return _metadata(self._component)

    def infer_impl(self, feed_dict: Feed) -> OrderedDict[str, NDArray[Any]]:
        start = time.perf_counter()
        with torch.no_grad():
            outputs = self._function(feed_dict)
        self.inference_time = time.perf_counter() - start
        return OrderedDict((spec.name, outputs[spec.name].numpy()) for spec in self._component.outputs)


class SegmentedRunner(BaseRunner):
    """Polygraphy runner for the step of a bundle that executes it as segments, through the runtime's own code."""

    def __init__(self, bundle: Bundle, name: str) -> None:
        super().__init__(prefix="segments")
        self._bundle = bundle
        self._component = bundle.component(name)
        self._is_clean = name == "clean"

    def activate_impl(self) -> None:
        segments = self._bundle.manifest.segments
        assert segments is not None
        forwards = load_segments(
            self._bundle, segments, lambda name: OnnxGraph(self._bundle, name, default_threads())
        )
        self._forward = forwards[self._is_clean]

    def deactivate_impl(self) -> None:
        del self._forward

    def get_input_metadata_impl(self) -> TensorMetadata:
        return _metadata(self._component)

    def infer_impl(self, feed_dict: Feed) -> OrderedDict[str, NDArray[Any]]:
        inputs = {name: np.ascontiguousarray(value) for name, value in feed_dict.items()}
        if self._is_clean:
            inputs["step"] = np.array(self._bundle.manifest.schedule.denoise_steps, dtype=np.int32)
        outputs = OrderedDict(
            (spec.name, np.full([int(dim) for dim in spec.shape], np.nan, dtype=spec.dtype))
            for spec in self._component.outputs
        )
        self.inference_time = self._forward.run(self._forward.bind(inputs, outputs))
        return outputs


def _metadata(component: Component) -> TensorMetadata:
    metadata = TensorMetadata()
    for spec in component.inputs:
        metadata.add(spec.name, np.dtype(spec.dtype), spec.shape)
    return metadata


def _bundle_runner(bundle: Bundle, name: str) -> BaseRunner:
    file = bundle.component(name).file
    if file is None:
        return SegmentedRunner(bundle, name)
    return OnnxrtRunner(SessionFromOnnx(str(bundle.path(file)), providers=["CPUExecutionProvider"]))


def _run(
    bundle: Bundle,
    name: str,
    function: Callable[[Feed], Mapping[str, Tensor]],
    feeds: Sequence[Feed],
    tolerance: float,
    scope: str = "component",
) -> Row:
    """Compare one component on `feeds`; the row holds the worst output."""
    component = bundle.component(name)
    runners = [TorchRunner(function, component), _bundle_runner(bundle, name)]
    worst: list[tuple[str, _Difference]] = []

    def compare(expected: Feed, actual: Feed) -> OrderedDict[str, _Difference]:
        differences = OrderedDict(
            (key, _difference(actual[key], expected[key], tolerance)) for key in expected
        )
        # NaN compares false with everything and must not hide: sort it last.
        worst.append(
            max(
                differences.items(), key=lambda item: (item[1].relative != item[1].relative, item[1].relative)
            )
        )
        return differences

    results = Comparator.run(runners, data_loader=list(feeds))
    Comparator.compare_accuracy(results, compare_func=compare)
    output, difference = max(worst, key=lambda item: (item[1].relative != item[1].relative, item[1].relative))
    return Row(scope, name, len(feeds), output, difference.relative, difference.largest, tolerance)


def _named(names: Sequence[str], values: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip(names, values, strict=True))


def _step_function(module: StepModule, clean_step: int | None = None) -> Callable[[Feed], dict[str, Tensor]]:
    """The step (or, with `clean_step`, the clean forward) as a function of a feed."""
    layers = module.model.config.layers

    def function(feed: Feed) -> dict[str, Tensor]:
        tensor = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in feed.items()}
        latent, config = tensor["latent"], module.model.config
        # A specialised first chunk has no cache inputs, and the clean graph none for the last layer's attention,
        # whose result it does not need.
        geometry = module.spec.geometry
        for stem in LAYER_STEMS:
            rows = geometry.k_blocks if stem == "past_kmean" else geometry.frame_tokens
            nothing = torch.zeros(0, rows, config.heads, config.head_dim)
            for layer in range(layers):
                tensor.setdefault(f"{stem}.{layer}", torch.zeros_like(tensor.get(f"{stem}.0", nothing)))
        outputs = module(
            latent,
            tensor.get("noise", torch.zeros_like(latent)),
            tensor["step"] if clean_step is None else torch.tensor(clean_step, dtype=torch.int32),
            tensor.get("chunk", torch.zeros((), dtype=torch.int32)),
            tensor.get("frame_slots", torch.zeros(0, dtype=torch.int32)),
            tensor["rope_cos"],
            tensor["rope_sin"],
            *([tensor[f"{stem}.{layer}"] for layer in range(layers)] for stem in LAYER_STEMS),
        )
        following, x0, *lists = outputs
        return _named(module.output_names, [following, x0, *(value for values in lists for value in values)])

    return function


def _component_rows(bundle: Bundle, reference: Reference, tolerance: float) -> Iterator[Row]:
    manifest, rng = bundle.manifest, np.random.default_rng(0)

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape, dtype=np.float32)

    config = reference.preset.text
    layer = UMT5Layer(config, manifest.text.text_len).eval()
    text_weights = reference.text_weights
    feeds = []
    for index in range(config.layers):
        weights = {name: value.numpy() for name, value in layer_weights(text_weights, index).items()}
        mask = (np.arange(manifest.text.text_len) < 1 + 7 * (index + 1)).astype(np.float32)
        feeds.append({"hidden": normal(manifest.text.text_len, config.d_model), "mask": mask, **weights})
    yield _run(
        bundle,
        "text_encoder",
        lambda feed: {"hidden_out": layer(*(torch.from_numpy(value) for value in feed.values()))},
        feeds,
        tolerance,
    )

    conditioner = ConditionerModule(reference.model)
    yield _run(
        bundle,
        "conditioner",
        lambda feed: _named(
            conditioner.output_names,
            [x for part in conditioner(torch.from_numpy(feed["text"])) for x in part],
        ),
        [{"text": normal(manifest.text.text_len, manifest.text.dim)} for _ in range(2)],
        tolerance,
    )

    model = manifest.model
    latent = normal(model.latent_channels, 1, model.latent_height, model.latent_width)
    specs = reference.caches(manifest)
    first, later = VAEFirst(reference.decoder, specs), VAENext(reference.decoder)
    written = [cache.name.replace("cache.", "cache_out.") for cache in specs if cache.written_by_first]
    every = [cache.name.replace("cache.", "cache_out.") for cache in specs]

    def run_first(feed: Feed) -> dict[str, Tensor]:
        frames, caches = first(torch.from_numpy(feed["latent"]))
        return {"frames": frames, **_named(written, caches)}

    def run_next(feed: Feed) -> dict[str, Tensor]:
        caches = [torch.from_numpy(feed[cache.name]) for cache in specs]
        frames, caches = later(torch.from_numpy(feed["latent"]), caches)
        return {"frames": frames, **_named(every, caches)}

    pixels = max(tolerance, PIXELS)
    yield _run(bundle, "vae_first", run_first, [{"latent": latent}], pixels)
    feed = {"latent": latent, **{cache.name: normal(*cache.shape) for cache in specs}}
    yield _run(bundle, "vae_next", run_next, [feed], pixels)


def _step_rows(bundle: Bundle, reference: Reference, chunks: int, tolerance: float) -> Iterator[Row]:
    """Every forward of a reference rollout, each from the reference's own state."""
    clean = bundle.manifest.schedule.denoise_steps
    wanted = {
        name: {spec.name for spec in component.inputs}
        for name, component in bundle.manifest.components.items()
    }
    denoising, cleaning = [], []
    by_chunk: dict[int, dict[str, NDArray[Any]]] = {}
    for chunk, step, feed in step_feeds(reference, bundle.manifest, chunks):
        if step == clean:
            cleaning.append({name: value for name, value in feed.items() if name in wanted["clean"]})
            continue
        denoising.append(feed)
        name = per_chunk_name(chunk)
        if name in wanted and step == 0:
            exact = exact_length(feed)
            by_chunk[chunk] = {key: exact[key] for key in wanted[name]}
    module = reference.step_module(bundle.manifest)
    yield _run(bundle, "step", _step_function(module), denoising, tolerance, "step")
    yield _run(bundle, "clean", _step_function(module, clean), cleaning, tolerance, "step")
    for chunk, feed in by_chunk.items():
        function = _step_function(reference.step_module(bundle.manifest, chunk=chunk))
        yield _run(bundle, per_chunk_name(chunk), function, [feed], tolerance, "step")


def _rollout_rows(bundle: Bundle, reference: Reference, chunks: int, tolerance: float) -> Iterator[Row]:
    """Prompt to pixels through the runtime, against the reference from the same prompt and noise."""
    prompt, seed, manifest = "a red square moves right", 3, bundle.manifest
    encoder = build_encoder(reference.preset.text, reference.text_weights)
    tokenizer = load_tokenizer(bundle.path(manifest.text.tokenizer))
    embedding = encode(
        encoder, *tokenize(tokenizer, prompt, manifest.text.text_len, reference.preset.text)
    ).float()
    with Pipeline.load(bundle.root, warmup=False, verify=False) as pipeline:
        difference = _difference(pipeline.embed(prompt), embedding.numpy(), tolerance)
        yield Row("rollout", "embedding", 1, "text", difference.relative, difference.largest, tolerance)
        with pipeline.session(prompt, seed=seed) as session:
            frames = np.concatenate([chunk.frames for chunk in session.stream(chunks=chunks)])
    latents = torch.cat(list(reference.rollout(manifest, embedding, seed).stream(chunks)), dim=1)
    with torch.no_grad():
        video = to_uint8(reference.decoder.decode(latents.transpose(0, 1))).numpy()
    allowed = max(tolerance * ROLLOUT_FACTOR, PIXELS)
    difference = _difference(frames, video, allowed)
    yield Row("rollout", f"{chunks} chunks", 1, "frames", difference.relative, difference.largest, allowed)


_FIGURES = ("runs", "relative L2", "largest", "tolerance")


def _table(rows: Sequence[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="Bundle against PyTorch", title_justify="left")
    for heading in ("scope", "name", "runs", "worst output", "relative L2", "largest", "tolerance", ""):
        justify: Literal["left", "right"] = "right" if heading in _FIGURES else "left"
        table.add_column(heading, justify=justify, overflow="fold")
    for row in rows:
        verdict = "[green]pass[/]" if row.passed else "[bold red]FAIL[/]"
        figures = f"{row.relative:.1e}", f"{row.largest:.1e}", f"{row.tolerance:.0e}"
        table.add_row(row.scope, row.name, str(row.runs), row.output, *figures, verdict)
    return table


def compare_bundle(
    path: Path,
    *,
    chunks: int = 3,
    tolerance: float | None = None,
    json_path: Path | None = None,
    reference: Reference | None = None,
) -> bool:
    """Compare the bundle at `path` with the reference model, print the table, and say whether all rows passed.

    Args:
        chunks: length of the rollout whose forwards are compared.
        tolerance: largest relative L2 error of one run; None = the precision's.
        json_path: also write the table there.
        reference: the model with the bundle's weights; None = rebuilt from the seed that the manifest names.

    Raises:
        BundleError: the bundle cannot be used.
        ComparisonError: the reference's weights are needed and were not given.
    """
    G_LOGGER.module_severity = G_LOGGER.ERROR
    bundle = load_bundle(path)
    reference = reference or Reference.of(bundle.manifest)
    limit = TOLERANCES[bundle.manifest.precision] if tolerance is None else tolerance
    rows = [
        *_component_rows(bundle, reference, limit),
        *_step_rows(bundle, reference, chunks, limit),
        *_rollout_rows(bundle, reference, chunks, limit),
    ]
    Console().print(_table(rows))
    passed = all(row.passed for row in rows)
    if json_path is not None:
        document = {
            "bundle": bundle.manifest.name,
            "passed": passed,
            "tools": bundle.manifest.provenance.tools,
            "rows": [{**asdict(row), "passed": row.passed} for row in rows],
        }
        json_path.write_text(json.dumps(document, indent=1) + "\n")
    return passed
