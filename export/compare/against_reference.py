"""Bundle against reference model, through Polygraphy: per component, per step, and over a whole rollout."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.common import TensorMetadata
from polygraphy.logger import G_LOGGER
from torch import Tensor

from export.errors import ComparisonError
from export.graph.components import VAEFirst, VAENext, per_chunk_name
from export.graph.modules import ConditionerModule, StepModule, layer_stems
from export.tolerances import CODES, FORWARD, PIXELS, ROLLOUT_FACTOR
from lightforcing_ref.decoders.vae import to_uint8
from lightforcing_ref.text import UMT5Layer, build_encoder, encode, layer_weights, load_tokenizer, tokenize
from runtime import Pipeline
from runtime.backends import runs_on_host
from runtime.bundle import ENCODER_COMPONENTS, Bundle, Component, load_bundle, numpy_dtype
from runtime.bundle.e4m3 import decode
from runtime.host import HostRunner

from .reference import Feed, Reference, exact_length, step_feeds
from .result import Comparison, Difference, Film, Plot, Row, Scope, Series, difference, film_rows
from .trials import SEED, Trials, check_memory

__all__ = [
    "Measured",
    "TorchRunner",
    "against_reference",
    "bundle_runner",
    "decoded",
    "facts_of",
    "layer_plot",
    "measure",
    "open_bundle",
    "play",
    "reference_embedding",
    "step_function",
    "step_plot",
    "tolerance_of",
]

_COPIES = 3
"""Of the transformer in float32 that are there at once: the reference, and a bundle's step and clean forward."""


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


class HostBundleRunner(BaseRunner):
    """Polygraphy runner for a component that the runtime executes on the host and that is no ONNX file."""

    def __init__(self, bundle: Bundle, name: str) -> None:
        super().__init__(prefix=bundle.manifest.backend)
        self._bundle, self._name = bundle, name

    def activate_impl(self) -> None:
        self._runner = HostRunner(self._bundle)

    def deactivate_impl(self) -> None:
        del self._runner

    def get_input_metadata_impl(self) -> TensorMetadata:
        return _metadata(self._bundle.component(self._name))

    def infer_impl(self, feed_dict: Feed) -> OrderedDict[str, NDArray[Any]]:
        start = time.perf_counter()
        outputs = self._runner.run(self._name, _typed(feed_dict, self._bundle.component(self._name)))
        self.inference_time = time.perf_counter() - start
        return OrderedDict(outputs)


def _metadata(component: Component) -> TensorMetadata:
    metadata = TensorMetadata()
    for spec in component.inputs:
        metadata.add(spec.name, numpy_dtype(spec.dtype), spec.shape)
    return metadata


def _typed(feed: Feed, component: Component) -> dict[str, NDArray[Any]]:
    """A feed in the component's own types; the reference computes in float32."""
    types = {spec.name: numpy_dtype(spec.dtype) for spec in component.inputs}
    return {
        name: np.asarray(value, dtype=types.get(name, value.dtype), order="C") for name, value in feed.items()
    }


def bundle_runner(bundle: Bundle, name: str) -> BaseRunner:
    file = bundle.component(name).file
    if file is None or not file.endswith(".onnx"):
        return HostBundleRunner(bundle, name)
    return OnnxrtRunner(SessionFromOnnx(str(bundle.path(file)), providers=["CPUExecutionProvider"]))


def open_bundle(path: Path) -> Bundle:
    """Load a bundle that can be executed on this machine's processor.

    Raises:
        BundleError: it cannot be used.
        ComparisonError: it holds engines for a GPU.
    """
    G_LOGGER.module_severity = G_LOGGER.ERROR
    bundle = load_bundle(path)
    if not runs_on_host(bundle):
        manifest = bundle.manifest
        raise ComparisonError(
            f"{manifest.name} holds {manifest.backend} engines for {manifest.target.name}, which do not run on a "
            "processor; compare what their precision costs with --precisions, and run `python -m runtime verify` on "
            "the target"
        )
    return bundle


@dataclass(frozen=True)
class Measured:
    """A row, and the difference of every output in every run."""

    row: Row
    runs: tuple[Mapping[str, Difference], ...]


def _widened(name: str, value: NDArray[Any]) -> NDArray[Any]:
    """What codes of keys and values stand for; anything else as it is."""
    return decode(value) if value.dtype == np.uint8 and name.partition(".")[0] in ("k", "v") else value


def measure(
    runners: Sequence[BaseRunner],
    feeds: Iterable[Feed],
    *,
    scope: Scope,
    name: str,
    tolerance: float | Mapping[str, float],
) -> Measured:
    """Run two runners, the reference first, on each of `feeds` in turn; the row holds the worst output of all runs.

    Feeds may be made while this runs: of them, and of what comes out, one is in memory at a time.

    Args:
        tolerance: of every output, or of each by name; the worst is then the one that is furthest past its own.
    """
    runs: list[Mapping[str, Difference]] = []
    with ExitStack() as stack:
        right, other = (stack.enter_context(runner) for runner in runners)
        for feed in feeds:
            expected, actual = right.infer(feed), other.infer(feed)
            limits = dict.fromkeys(expected, tolerance) if isinstance(tolerance, float) else tolerance
            runs.append(
                {
                    key: difference(_widened(key, actual[key]), _widened(key, expected[key]), limits[key])
                    for key in expected
                }
            )
    output, worst = max((item for run in runs for item in run.items()), key=lambda item: item[1].excess)
    row = Row(scope, name, len(runs), output, worst.relative, worst.largest, worst.tolerance)
    return Measured(row, tuple(runs))


def _run(
    bundle: Bundle,
    name: str,
    function: Callable[[Feed], Mapping[str, Tensor]],
    feeds: Iterable[Feed],
    tolerance: float,
    scope: Scope = "component",
) -> Measured:
    """Compare one component with a PyTorch callable."""
    runners = [TorchRunner(function, bundle.component(name)), bundle_runner(bundle, name)]
    return measure(runners, feeds, scope=scope, name=name, tolerance=tolerance)


def _named(names: Sequence[str], values: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip(names, values, strict=True))


def step_function(module: StepModule, clean_step: int | None = None) -> Callable[[Feed], dict[str, Tensor]]:
    """The step (or, with `clean_step`, the clean forward) as a function of a feed."""
    layers = module.model.config.layers

    def function(feed: Feed) -> dict[str, Tensor]:
        tensor = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in feed.items()}
        latent, config = tensor["latent"], module.model.config
        # A specialised first chunk has no cache inputs, and the clean graph none for the last layer's attention,
        # whose result it does not need.
        geometry, stems = module.spec.geometry, layer_stems(module.spec.kv)
        codes = torch.float32 if module.spec.kv is None else torch.uint8
        for stem in stems:
            by_block = codes == torch.uint8 and stem == "past_v"
            per_block = stem not in ("past_k", "past_v") or by_block
            shape: tuple[int, ...] = (
                0,
                geometry.k_blocks if per_block else geometry.frame_tokens,
                config.heads,
            )
            if not stem.endswith("scale"):
                shape = (*shape, config.head_dim)
            if by_block:
                shape = (*shape, geometry.block_k)
            nothing = torch.zeros(shape, dtype=codes if stem in ("past_k", "past_v") else torch.float32)
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
            *([tensor[f"{stem}.{layer}"] for layer in range(layers)] for stem in stems),
            *((tensor["pinned"],) if module.spec.persistent_frames else ()),
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
        weights = {name: value.float().numpy() for name, value in layer_weights(text_weights, index).items()}
        mask = (np.arange(manifest.text.text_len) < 1 + 7 * (index + 1)).astype(np.float32)
        feeds.append({"hidden": normal(manifest.text.text_len, config.d_model), "mask": mask, **weights})
    yield _run(
        bundle,
        "text_encoder",
        lambda feed: {"hidden_out": layer(*(torch.from_numpy(value) for value in feed.values()))},
        feeds,
        tolerance,
    ).row

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
    ).row

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
    yield _run(bundle, "vae_first", run_first, [{"latent": latent}], pixels).row
    feed = {"latent": latent, **{cache.name: normal(*cache.shape) for cache in specs}}
    yield _run(bundle, "vae_next", run_next, [feed], pixels).row
    if manifest.has_encoder:
        yield from _encoder_rows(bundle, reference, normal, tolerance)


def _encoder_rows(
    bundle: Bundle, reference: Reference, normal: Callable[..., NDArray[np.float32]], tolerance: float
) -> Iterator[Row]:
    model, encoder = bundle.manifest.model, reference.encoder
    specs = encoder.cache_specs(model.latent_height, model.latent_width)
    outputs = ["latent", *(cache.name.replace("cache.", "cache_out.") for cache in specs)]

    def run(feed: Feed) -> dict[str, Tensor]:
        video, *caches = (torch.from_numpy(value) for value in feed.values())
        latent, written = encoder.encode_next(video, caches) if caches else encoder.encode_first(video)
        return _named(outputs, [latent, *written])

    first, following = ENCODER_COMPONENTS
    size = (3, model.video_height, model.video_width)
    yield _run(bundle, first, run, [{"video": normal(1, *size)}], tolerance).row
    feed = {"video": normal(encoder.config.temporal_factor, *size)}
    feed |= {cache.name: normal(*cache.shape) for cache in specs}
    yield _run(bundle, following, run, [feed], tolerance).row


def _reference_steps(
    bundle: Bundle, reference: Reference, chunks: int, tolerance: float
) -> tuple[list[Row], list[Plot]]:
    """Every forward of a reference rollout, each from the reference's own state."""
    clean = bundle.manifest.schedule.clean_step
    wanted = {
        name: {spec.name for spec in component.inputs}
        for name, component in bundle.manifest.components.items()
    }

    def feeds(component: Literal["step", "clean"]) -> Iterator[Feed]:
        for _, step, feed in step_feeds(reference, bundle.manifest, chunks):
            if (step == clean) == (component == "clean"):
                yield {name: value for name, value in feed.items() if name in wanted[component]}

    module = reference.step_module(bundle.manifest)
    steps = _run(bundle, "step", step_function(module), feeds("step"), tolerance, "step")
    cleans = _run(bundle, "clean", step_function(module, clean), feeds("clean"), tolerance, "step")
    rows = [steps.row, cleans.row]
    seen: set[int] = set()
    for chunk, _, feed in step_feeds(reference, bundle.manifest, chunks):
        name = per_chunk_name(chunk)
        if name in wanted and chunk not in seen:
            exact = exact_length(feed)
            function = step_function(reference.step_module(bundle.manifest, chunk=chunk))
            given = {key: exact[key] for key in wanted[name]}
            rows.append(_run(bundle, name, function, [given], tolerance, "step").row)
        seen.add(chunk)
    plots = [step_plot(bundle, {"x0": steps}), layer_plot(bundle, {"": steps})]
    return rows, plots


def step_plot(bundle: Bundle, measured: Mapping[str, Measured]) -> Plot:
    """Error of the clean latent that each denoising forward predicts, a curve for each entry."""
    runs, schedule = len(next(iter(measured.values())).runs), bundle.manifest.schedule
    every = (f"{chunk}.{step}" for chunk in count() for step in range(len(schedule.rows(chunk))))
    labels = tuple(islice(every, runs))
    series = tuple(
        Series(name, tuple(_figure(run["x0"].relative) for run in entry.runs))
        for name, entry in measured.items()
    )
    return Plot("Error of each forward, from equal states", labels, series, "chunk.step")


def layer_plot(bundle: Bundle, measured: Mapping[str, Measured]) -> Plot:
    """Largest error of each layer's keys and values, two curves for each entry."""
    layers = range(bundle.manifest.model.layers)
    series = []
    for name, entry in measured.items():
        for stem, title in (("k", "keys"), ("v", "values")):
            worst = [max((run[f"{stem}.{i}"] for run in entry.runs), key=lambda d: d.rank) for i in layers]
            values = tuple(_figure(d.relative) for d in worst)
            series.append(Series(f"{name} {title}".strip(), values))
    return Plot("Error of each layer's keys and values", tuple(map(str, layers)), tuple(series), "layer")


def _figure(value: float) -> float | None:
    return value if np.isfinite(value) else None


def play(
    bundle: Bundle,
    chunks: int,
    *,
    prompt: str | None = None,
    seed: int = SEED,
    embedding: NDArray[np.float32] | None = None,
) -> NDArray[np.uint8]:
    """Frames of a rollout through the runtime, by default of the prompt of `Trials`."""
    if embedding is None:
        (prompt,) = Trials.of(bundle.manifest, () if prompt is None else (prompt,)).prompts
    with (
        Pipeline.load(bundle.root, warmup=False, verify=False) as pipeline,
        pipeline.session(prompt, seed=seed, embedding=embedding) as session,
    ):
        return np.concatenate([chunk.frames for chunk in session.stream(chunks=chunks)])


def reference_embedding(bundle: Bundle, reference: Reference, prompt: str | None = None) -> Tensor:
    """The reference's embedding of a prompt, by default that of `Trials`, with the bundle's tokenizer."""
    (text,) = Trials.of(bundle.manifest, () if prompt is None else (prompt,)).prompts
    manifest = bundle.manifest
    encoder = build_encoder(reference.preset.text, reference.text_weights)
    tokenizer = load_tokenizer(bundle.path(manifest.text.tokenizer))
    return encode(encoder, *tokenize(tokenizer, text, manifest.text.text_len, reference.preset.text)).float()


def _reference_rollouts(
    bundle: Bundle, reference: Reference, chunks: int, trials: Trials, tolerance: float
) -> tuple[list[Row], list[Film]]:
    """Prompts to pixels through the runtime, against the reference from the same prompts and noise."""
    embeddings = [reference_embedding(bundle, reference, prompt) for prompt in trials.prompts]
    reference.forget("text_weights")
    with Pipeline.load(bundle.root, warmup=False, verify=False) as pipeline:
        gaps = [
            difference(pipeline.embed(prompt), embedding.numpy(), tolerance)
            for prompt, embedding in zip(trials.prompts, embeddings, strict=True)
        ]
    worst = max(gaps, key=lambda gap: gap.rank)
    text = Row("rollout", "embedding", len(gaps), "text", worst.relative, worst.largest, tolerance)
    pairs = []
    for prompt, embedding in zip(trials.prompts, embeddings, strict=True):
        latents = reference.latents(bundle.manifest, embedding, trials.seed, chunks)
        theirs = Film("PyTorch", decoded(reference, torch.cat(list(latents), dim=1)))
        ours = Film(bundle.manifest.name, play(bundle, chunks, prompt=prompt, seed=trials.seed))
        pairs.append((theirs, ours))
    allowed = max(tolerance * ROLLOUT_FACTOR, PIXELS)
    return [text, *film_rows(pairs, chunks, allowed)], list(pairs[0])


def decoded(reference: Reference, latents: Tensor) -> NDArray[np.uint8]:
    """Frames of a rollout's latents `[channels, frames, h, w]`."""
    with torch.no_grad():
        frames: NDArray[np.uint8] = to_uint8(reference.decoder.decode(latents.transpose(0, 1))).numpy()
    return frames


def facts_of(bundle: Bundle) -> dict[str, str]:
    """Where a bundle comes from, for a report."""
    manifest = bundle.manifest
    model, provenance = manifest.model, manifest.provenance
    return {
        "bundle": manifest.name,
        "target": manifest.target.name,
        "backend": f"{manifest.backend} in {manifest.precision}",
        "execution": "segmented" if manifest.segments else "whole",
        "model": f"{model.preset}, {model.video_height}x{model.video_width}, variant {manifest.variant}",
        "weights": provenance.checkpoint.described,
        "built": manifest.created,
        "command": provenance.command or "-",
    }


def tolerance_of(bundle: Bundle, asked: float | None) -> float:
    if asked is not None:
        return asked
    manifest = bundle.manifest
    return max(FORWARD[manifest.precision], CODES if manifest.cache.kv else 0.0)


def against_reference(
    path: Path,
    *,
    chunks: int = 3,
    prompts: Sequence[str] = (),
    seed: int | None = None,
    tolerance: float | None = None,
    reference: Reference | None = None,
) -> Comparison:
    """Compare the bundle at `path` with the reference model.

    Args:
        chunks: length of the rollout whose forwards are compared.
        prompts, seed: what is played; by default one that the weights can show something for.
        tolerance: largest relative L2 error of one run; None = the precision's.
        reference: the model with the bundle's weights; None = rebuilt from the seed that the manifest names.

    Raises:
        BundleError: the bundle cannot be used.
        ComparisonError: the reference's weights are needed and were not given, or the bundle is for a GPU.
    """
    bundle = open_bundle(path)
    reference = reference or Reference.of(bundle.manifest)
    check_memory(bundle.manifest, reference.preset, _COPIES)
    limit, trials = tolerance_of(bundle, tolerance), Trials.of(bundle.manifest, prompts, seed)
    components = list(_component_rows(bundle, reference, limit))
    rollout, films = _reference_rollouts(bundle, reference, chunks, trials, limit)
    steps, plots = _reference_steps(bundle, reference, chunks, limit)
    return Comparison(
        title=f"{bundle.manifest.name} against PyTorch",
        bundle=bundle.manifest.name,
        facts=facts_of(bundle),
        tools=bundle.manifest.provenance.tools,
        rows=[*components, *steps, *rollout],
        plots=plots,
        films=films,
    )
