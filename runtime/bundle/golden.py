"""Golden vectors: seeded inputs and expected outputs, by which a component is judged on the machine it runs on.

Full-size inputs and outputs are too large to store. Inputs are therefore drawn again from seeds, weights are the
bundle's own, and of each output only samples at seeded positions and the norm are kept. Everything that both sides
must do alike is defined here, from raw bits of a counter-based generator and integer arithmetic, so that it depends
neither on the machine nor on a numpy version.

The golden file is a safetensors file. Its metadata entry `golden` holds the cases as JSON (`GoldenCases`),
the tensor `CASE/OUTPUT` the expected samples of that case, float32.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Annotated, Any, Final, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from runtime.errors import BundleError

from .dtypes import numpy_dtype
from .e4m3 import E4M3_MAX, decode, encode
from .fields import BundlePath, Count, Finite, NonNegative, NonNegativeFloat, Part, PositiveFloat, Seed, Size
from .load import Bundle
from .manifest import Component, TensorSpec
from .weights_file import WeightsFile

__all__ = [
    "METADATA_KEY",
    "SAMPLES",
    "Arrays",
    "Codes",
    "ComponentRunner",
    "Expected",
    "GoldenCase",
    "GoldenCases",
    "GoldenVectors",
    "Integers",
    "Mask",
    "Normal",
    "Platform",
    "Recipe",
    "Rotary",
    "Scales",
    "Stored",
    "error_of",
    "generate",
    "positions",
    "sample",
    "seed_of",
    "shaped",
    "standard_normal",
]

METADATA_KEY: Final = "golden"
SAMPLES: Final = 1 << 14
"""Samples kept of a larger output: a tile of 64 rows in 4608 that is wrong holds some 200 of them."""

_PARTS: Final = 4
_PART_MAX: Final = (1 << 16) - 1
_DRAW: Final = 1 << 20
"""Numbers drawn at a time, so that what is computed on the way stays in the caches."""

Arrays = Mapping[str, NDArray[Any]]
"""Tensors of a component, by name."""


class Normal(Part):
    """Numbers that are normally distributed for all purposes here, times `scale`; see `standard_normal`."""

    kind: Literal["normal"] = "normal"
    seed: Seed
    scale: PositiveFloat = 1.0


class Rotary(Part):
    """Cosines or sines of angles that are uniform over the circle; the two of one seed belong together."""

    kind: Literal["cos", "sin"]
    seed: Seed


class Scales(Part):
    """Numbers between `scale` / 8 and about four times `scale`: scales of blocks."""

    kind: Literal["scales"] = "scales"
    seed: Seed
    scale: PositiveFloat


class Codes(Part):
    """Codes of E4M3, of normally distributed numbers with a deviation of a quarter of the largest one."""

    kind: Literal["e4m3"] = "e4m3"
    seed: Seed


class Integers(Part):
    """The integers themselves: a step, a chunk's index, a table of slots."""

    kind: Literal["integers"] = "integers"
    values: tuple[Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)], ...]


class Mask(Part):
    """Ones, then zeros."""

    kind: Literal["mask"] = "mask"
    ones: NonNegative


class Stored(Part):
    """A tensor of one of the bundle's weights files."""

    kind: Literal["stored"] = "stored"
    file: BundlePath
    tensor: str


Recipe = Annotated[Normal | Rotary | Scales | Codes | Integers | Mask | Stored, Field(discriminator="kind")]


class Expected(Part):
    """What is known of one output besides its samples.

    `size` is its number of elements, `seed` gives the positions of the samples, and `norm` is the L2 norm of
    all of it. `centre` is taken from every element first: pixels are spread around the middle of their range, and
    what lies in the middle is no signal. `codes`: the output is codes of E4M3, which are judged by what they stand
    for.
    """

    size: Size
    seed: Seed
    norm: NonNegativeFloat
    centre: Finite = 0.0
    codes: bool = False


class GoldenCase(Part):
    """One run of a component: what goes in, and what is known of what must come out.

    `name` is unique. `slots` is the size of the dimension of that name.
    """

    name: str
    component: str
    slots: Count
    inputs: dict[str, Recipe]
    outputs: Annotated[dict[str, Expected], Field(min_length=1)]


class GoldenCases(Part):
    """The cases of a golden file, in the order they are run."""

    version: Literal[1] = 1
    cases: Annotated[tuple[GoldenCase, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Platform:
    """What a component was run on. A verdict counts on an equal platform only.

    Attributes:
        device: the GPU's name and compute capability, or the CPU's model.
        driver: version of the GPU's driver; None on a CPU.
        libraries: versions by name of what executes the components (the engine's library, CUDA, ...).
    """

    device: str
    driver: str | None
    libraries: Mapping[str, str]


class ComponentRunner(Protocol):
    """Runs single components of a bundle, as verification needs it.

    A backend's engine offers one through `component_runner()`. Runs are independent: nothing of one may be seen
    by the next. Speed does not matter, and memory only so far that one component at a time fits.
    """

    @property
    def platform(self) -> Platform:
        """What the components run on. Must be cheap: it decides whether anything has to be run at all."""

    def run(self, component: str, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run `component` once, with the engine or kernel that the rollout uses.

        `inputs` has every input of the component in the manifest, in the manifest's shapes and
        `numpy_dtype` (bfloat16 and float8 of ml_dtypes, packed float4 as uint8);
        where weights are inputs, they are among them. The dimension `slots` has any size of 1 or more. Returns host
        arrays of every output by name, in the output's type and any shape of the right number of elements.

        Raises:
            EngineError: the component does not load or run.
        """


def seed_of(case: str, tensor: str) -> int:
    """The seed of a tensor of a case: below 2**63, different for different names."""
    digest = hashlib.sha256(f"{case}/{tensor}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _bits(seed: int, count: int) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    """`count` random 64-bit words, some at a time, each with the index of the first."""
    generator = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64))
    for start in range(0, count, _DRAW):
        yield start, generator.random_raw(min(_DRAW, count - start))


def standard_normal(seed: int, count: int) -> NDArray[np.float32]:
    """`count` numbers of mean 0 and variance 1: sums of four uniform ones, at most 3.46 large.

    Each is the sum of the four 16-bit parts of a word, shifted and scaled once in float32.
    """
    out = np.empty(count, dtype=np.float32)
    deviation = np.float32(1.0 / np.sqrt(_PARTS * ((_PART_MAX + 1) ** 2 - 1) / 12))
    for start, words in _bits(seed, count):
        parts = words.astype("<u8", copy=False).view("<u2")
        total = parts[0::_PARTS].astype(np.int32)
        for part in range(1, _PARTS):
            total += parts[part::_PARTS]
        total -= _PARTS * _PART_MAX // 2
        np.multiply(total, deviation, out=out[start : start + words.size], dtype=np.float32)
    return out


def _angles(seed: int, count: int) -> NDArray[np.float64]:
    turns = np.empty(count, dtype=np.float64)
    for start, words in _bits(seed, count):
        turns[start : start + words.size] = (words >> np.uint64(40)) * 2.0**-24
    return (turns - 0.5) * (2 * np.pi)


def positions(seed: int, size: int) -> NDArray[np.int64]:
    """Positions of the samples in an output of `size` elements, ascending: all of them, or `SAMPLES`."""
    if size <= SAMPLES:
        return np.arange(size, dtype=np.int64)
    words = np.concatenate([words for _, words in _bits(seed, SAMPLES)])
    return np.sort((words >> np.uint64(1)).astype(np.int64) % size)


def generate(recipe: Recipe, count: int, files: Mapping[str, WeightsFile]) -> NDArray[Any]:
    """The `count` elements of an input, flat; float32, int64, or as the weights file has them.

    `files` are the weights files that recipes refer to.

    Raises:
        BundleError: a tensor is missing, or has another number of elements.
    """
    match recipe:
        case Normal():
            return standard_normal(recipe.seed, count) * np.float32(recipe.scale)
        case Rotary():
            angles = _angles(recipe.seed, count)
            return (np.cos(angles) if recipe.kind == "cos" else np.sin(angles)).astype(np.float32)
        case Scales():
            drawn = np.abs(standard_normal(recipe.seed, count)) + np.float32(0.125)
            return drawn * np.float32(recipe.scale)
        case Codes():
            return encode(standard_normal(recipe.seed, count) * (E4M3_MAX / 4))
        case Mask():
            return (np.arange(count) < recipe.ones).astype(np.float32)
        case Integers():
            values = np.array(recipe.values, dtype=np.int64)
        case Stored():
            values = files[recipe.file].get_required(recipe.tensor).reshape(-1)
    if values.size != count:
        raise BundleError(
            f"the golden vectors give {values.size} elements for an input of {count}; rebuild the bundle"
        )
    return values


def sample(output: NDArray[Any], expected: Expected) -> tuple[NDArray[np.float32], float]:
    """Samples of an output at its positions, and its norm; see `Expected`."""
    flat = decode(output.reshape(-1)) if expected.codes else output.reshape(-1)
    picked = flat[positions(expected.seed, flat.size)].astype(np.float32) - np.float32(expected.centre)
    square = 0.0
    for start in range(0, flat.size, _DRAW):
        part = flat[start : start + _DRAW].astype(np.float32) - np.float32(expected.centre)
        square += float(np.dot(part.astype(np.float64), part.astype(np.float64)))
    return picked, float(np.sqrt(square))


def error_of(output: NDArray[Any], expected: Expected, samples: NDArray[np.float32]) -> float:
    """How wrong an output is: the larger of the relative L2 error of its samples and that of its norm.

    Infinite where the output is not finite, or has another number of elements.
    """
    if output.size != expected.size:
        return float("inf")
    found, norm = sample(output, expected)
    if not np.isfinite(norm):
        return float("inf")
    gap = float(np.linalg.norm(found.astype(np.float64) - samples))
    scale = float(np.linalg.norm(samples.astype(np.float64)))
    return max(_ratio(gap, scale), _ratio(abs(norm - expected.norm), expected.norm))


def _ratio(gap: float, scale: float) -> float:
    return gap / scale if scale else gap


class GoldenVectors:
    """The golden vectors of a bundle, opened. Close them, or use them in a `with` statement.

    Raises:
        BundleError: the bundle has none, or they do not fit it.
    """

    def __init__(self, bundle: Bundle) -> None:
        golden = bundle.manifest.golden
        if golden is None:
            raise BundleError(
                f"bundle {bundle.root} has no golden vectors, so nothing tells whether it computes what it should; "
                f"rebuild it with the exporter of this version"
            )
        self._bundle = bundle
        self._samples = WeightsFile(bundle.opened(golden.file))
        self.tolerances = dict(golden.tolerances)
        try:
            self.cases = GoldenCases.model_validate_json(self._samples.metadata.get(METADATA_KEY, "")).cases
        except ValidationError as error:
            raise BundleError(
                f"{golden.file!r} of bundle {bundle.root} holds no golden vectors that this runtime can read "
                f"({error.error_count()} problems, the first: {error.errors()[0]['msg']}); rebuild the bundle"
            ) from None
        listed = {entry.path for entry in bundle.manifest.files}
        for case in self.cases:
            self._check(case, listed)
        stored = {
            recipe.file
            for case in self.cases
            for recipe in case.inputs.values()
            if isinstance(recipe, Stored)
        }
        self._files = {file: WeightsFile(bundle.opened(file)) for file in sorted(stored)}

    def close(self) -> None:
        """Close the files. May be called twice."""
        for file in (self._samples, *self._files.values()):
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, case: GoldenCase, listed: set[str]) -> None:
        component = self._bundle.component(case.component)
        for kind, specs, known in (
            ("input", component.inputs, case.inputs.keys()),
            ("output", component.outputs, case.outputs.keys()),
        ):
            names = {spec.name for spec in specs}
            if names != known:
                raise BundleError(
                    f"golden case {case.name!r} has the {kind}s {', '.join(sorted(known))}, the component "
                    f"{', '.join(sorted(names))}; rebuild the bundle"
                )
        unlisted = [
            recipe.file
            for recipe in case.inputs.values()
            if isinstance(recipe, Stored) and recipe.file not in listed
        ]
        if unlisted or case.component not in self.tolerances:
            raise BundleError(
                f"golden case {case.name!r} refers to {unlisted[0] if unlisted else 'a tolerance'} "
                f"that the manifest does not list; rebuild the bundle"
            )

    def require_complete(self) -> None:
        """See that there is what every case needs, without running one.

        Raises:
            BundleError: an output has no samples, or an input no tensor, of the right size.
        """
        for case in self.cases:
            component = self._bundle.component(case.component)
            for spec in component.outputs:
                expected, name = case.outputs[spec.name], f"{case.name}/{spec.name}"
                size, samples = _elements(spec, case.slots), self._samples.get_required(name)
                if expected.size != size or samples.shape != (min(size, SAMPLES),):
                    raise BundleError(
                        f"golden case {case.name!r} has {samples.size} samples of {expected.size} elements for the "
                        f"output {spec.name!r}, which has {size}; rebuild the bundle"
                    )
            for spec in component.inputs:
                recipe = case.inputs[spec.name]
                if isinstance(recipe, Stored):
                    generate(recipe, math.prod(_stored_shape(spec, case.slots)), self._files)

    def inputs(self, case: GoldenCase) -> dict[str, NDArray[Any]]:
        """The inputs of a case, in the shapes and types of the bundle's component."""
        component = self._bundle.component(case.component)
        return {
            spec.name: shaped(case.inputs[spec.name], spec, case.slots, self._files)
            for spec in component.inputs
        }

    def errors(self, case: GoldenCase, outputs: Arrays) -> dict[str, float]:
        """The error of each output of a case; infinite for one that is missing."""
        component: Component = self._bundle.component(case.component)
        found = {}
        for spec in component.outputs:
            samples = self._samples.get_required(f"{case.name}/{spec.name}")
            output = outputs.get(spec.name)
            found[spec.name] = (
                float("inf") if output is None else error_of(output, case.outputs[spec.name], samples)
            )
        return found


def _elements(spec: TensorSpec, slots: int) -> int:
    return math.prod(slots if isinstance(dim, str) else dim for dim in spec.shape)


def _stored_shape(spec: TensorSpec, slots: int) -> list[int]:
    """The shape of an input's array: numbers of four bits lie two to a byte."""
    shape = [slots if isinstance(dim, str) else dim for dim in spec.shape]
    if spec.dtype == "float4_e2m1":
        shape[-1] //= 2
    return shape


def shaped(recipe: Recipe, spec: TensorSpec, slots: int, files: Mapping[str, WeightsFile]) -> NDArray[Any]:
    """An input as a component takes it. `slots` is the size of its one symbolic dimension.

    Raises:
        BundleError: as `generate`.
    """
    shape = _stored_shape(spec, slots)
    values = generate(recipe, math.prod(shape), files)
    return values.astype(numpy_dtype(spec.dtype), copy=False).reshape(shape)
