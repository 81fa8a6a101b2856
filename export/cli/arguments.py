"""What several commands make of their arguments: the request of a build, a variant, weights."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from export.errors import InputError

from .sources import check_pairing, check_sources, fetch_sources, fill_model, merged_loras, usual_variant

if TYPE_CHECKING:
    from export.quantize.formats import QuantPrecision
    from export.request.capability import BackendChoice
    from export.request.plan import PlanRequest
    from export.request.request import BuildRequest, QuantizationRequest
    from export.request.targets import Target, Variant
    from export.request.weights import Weights
    from lightforcing_ref.config import Preset

__all__ = ["build_request", "chosen_variant", "chosen_weights"]

AUTO = "auto"
"""The precision that leaves it to a budget of error which linear is in which format."""


def build_request(args: argparse.Namespace) -> tuple[BuildRequest, BackendChoice]:
    """Check everything about the request that can be known before the work starts."""
    from export.request.capability import BACKENDS, choose_backend

    target, variant = chosen_variant(args)
    wanted = getattr(args, "precision", None)
    is_searched = wanted == AUTO
    choice = choose_backend(target, getattr(args, "backend", "auto"), None if is_searched else wanted)
    ways = BACKENDS[choice.backend].execution
    together = variant.cache.recache == "joint" or variant.schedule.rolling
    usual = "segmented" if together and "segmented" in ways else ways[0]
    execution = getattr(args, "execution", None) or usual
    if execution not in ways:
        raise InputError(
            f"{choice.backend} executes the step {ways[0]} only, not {execution}; drop --execution, or choose another "
            "--backend"
        )
    embedded = getattr(args, "weights", "inputs") == "embedded"
    if embedded and execution == "whole":
        raise InputError("--weights embedded is about segments; a whole graph always holds its weights")
    check_sources(args)

    from export.request.plan import PlanRequest
    from export.request.request import BuildRequest, QuantizationRequest

    model = chosen_preset(args)
    height, width = args.resolution or (model.height, model.width)
    quantization = QuantizationRequest(
        static=getattr(args, "fp8_activations", "dynamic") == "static",
        calibration=getattr(args, "calibration", None),
        skip=tuple(getattr(args, "skip", ())),
    )
    weights = chosen_weights(args, model, variant)
    name = getattr(args, "name", None) or _default_name(target, model, variant, choice, searched=is_searched)
    if is_searched or getattr(args, "error_budget", None) is not None:
        planned = PlanRequest(target, variant, model, height, width, choice.precision)
        choice, quantization = _searched(args, planned, choice, quantization, weights, embedded=embedded)
    request = BuildRequest(
        target=target,
        variant=variant,
        weights=weights,
        height=height,
        width=width,
        backend=choice.backend,
        precision=choice.precision,
        per_chunk=args.per_chunk,
        execution=execution,
        embedded=embedded,
        with_encoder=getattr(args, "with_encoder", False) or getattr(args, "encoder", None) is not None,
        quantization=quantization,
        out=args.out,
        name=name,
        command=args.command_line,
    )
    return request, choice


def _searched(
    args: argparse.Namespace,
    request: PlanRequest,
    choice: BackendChoice,
    quantization: QuantizationRequest,
    weights: Weights,
    *,
    embedded: bool,
) -> tuple[BackendChoice, QuantizationRequest]:
    """The precision, and what differs from it, that `--precision auto --error-budget X` leads to.

    Raises:
        InputError: options that belong together are not together, or contradict each other.
    """
    from export.estimate.formats import find_formats
    from export.quantize.calibration import load_calibration
    from export.quantize.decision import weights_identity
    from export.request.capability import BACKENDS
    from export.request.request import QuantizationRequest

    if args.precision != AUTO:
        raise InputError("--error-budget is for --precision auto; drop it, or let it decide")
    if args.error_budget is None or quantization.calibration is None:
        raise InputError(
            "--precision auto needs --error-budget X, and --calibration FILE with what each format costs (python -m "
            "export calibrate writes one)"
        )
    if quantization.skip or quantization.static:
        raise InputError(
            "--precision auto decides about every linear, with a scale per token; drop --skip and --fp8-activations"
        )
    backend = BACKENDS[choice.backend]
    known: tuple[QuantPrecision, ...] = ("fp8", "nvfp4")
    formats = [f for f in known if f in backend.precisions and f in request.target.precisions]
    if backend.library is None or not formats:
        raise InputError(
            f"--precision auto is for TensorRT-RTX and TensorRT on GPUs that compute in fp8, which {choice.backend} on "
            f"{request.target.name} is not; name a precision"
        )
    calibration = load_calibration(quantization.calibration)
    calibration.require(request.preset.name, weights_identity(weights), quantization.calibration)
    found = find_formats(request, formats, calibration, args.error_budget, each=embedded)
    if found.precision is None:
        return replace(choice, precision="bf16"), QuantizationRequest()
    chosen = replace(quantization, skip=found.skip, search=found.search)
    return replace(choice, precision=found.precision), chosen


def _default_name(
    target: Target, model: Preset, variant: Variant, choice: BackendChoice, *, searched: bool
) -> str:
    """What a bundle is called: precision and backend are in it where they are not what the target gives by itself."""
    parts = [target.name, model.name, variant.name]
    parts += [AUTO] if searched else [] if choice.precision == "fp32" else [choice.precision]
    parts += [] if choice.backend == target.backends[0] else [choice.backend]
    return "-".join(parts)


def chosen_preset(args: argparse.Namespace) -> Preset:
    """The model's dimensions, with the decoder that is asked for.

    Raises:
        InputError: no such decoder, or it is chosen twice, or not for random weights.
    """
    from lightforcing_ref.config import preset
    from lightforcing_ref.dimensions import DECODERS

    model, name = preset(args.preset), getattr(args, "decoder", None)
    if name is None:
        vae = None if args.known is None or not args.model else args.known.files["vae"].decoder
        return model if vae is None else replace(model, vae=DECODERS[vae])
    if getattr(args, "checkpoint", None):
        raise InputError(
            "--decoder is about random weights; a decoder's file says itself what it holds: pass --vae alone"
        )
    if name not in DECODERS:
        raise InputError(f"unknown decoder {name!r}; expected one of {', '.join(DECODERS)}")
    return replace(model, vae=DECODERS[name])


def chosen_weights(args: argparse.Namespace, model: Preset, variant: Variant) -> Weights:
    """Where the weights come from: files, what the package ships, or a seed."""
    from export.request.weights import Weights, shipped_weights

    if args.checkpoint:
        named = fetch_sources(args, args.known)
        vae = getattr(args, "vae", None)
        if vae is not None:
            from lightforcing_ref.checkpoint import vae_config_of

            model = replace(model, vae=vae_config_of(vae))
        return Weights(
            model,
            checkpoint=args.checkpoint,
            section=getattr(args, "section", None),
            loras=merged_loras(args),
            vae=vae,
            encoder=getattr(args, "encoder", None),
            text_encoder=getattr(args, "text_encoder", None),
            tokenizer=getattr(args, "tokenizer", None),
            any_values=args.allow_values,
            named=named,
        )
    if not args.init and args.seed is None and getattr(args, "decoder", None) is None:
        shipped = shipped_weights(model, dense=variant.is_dense, chunk_frames=variant.schedule.chunk_frames)
        if shipped is not None:
            return shipped
    return Weights(model, seed=args.seed or 0)


def chosen_variant(args: argparse.Namespace) -> tuple[Target, Variant]:
    """The target, and the variant with the command line's changes."""
    from export.request.detect import detected_target
    from export.request.targets import load_target, load_variant
    from lightforcing_ref.config import planned_latents

    args.known = fill_model(args)
    target = detected_target() if args.gpu == "auto" else load_target(args.gpu)
    name = usual_variant(args, args.known, target)
    variant = load_variant(name)
    check_pairing(args, args.known, name)
    if args.policy is not None:
        variant = variant.with_policy(args.policy)
    changed = variant.changed(
        target=args.sparsity,
        base=args.sparsity_base,
        keep_frames=args.keep_frames,
        sink_frames=args.sink,
        near_frames=args.near,
        window_frames=args.window,
        table_frames=(
            None if args.frames is None else planned_latents(args.frames, variant.schedule.chunk_frames)
        ),
    )
    changed.table()
    if (recache := getattr(args, "recache", None)) is not None:
        changed = changed.switching(recache)
    return target, _multiplied(args, changed)


def _multiplied(args: argparse.Namespace, variant: Variant) -> Variant:
    """The variant with keys and values held, and multiplied, as the command line says; fp8 products imply codes."""
    kv, attention = getattr(args, "kv", None), getattr(args, "attention", None)
    products: Literal["fp8"] | None = variant.products if attention is None else _fp8(attention)
    if products is not None and kv == "bf16":
        raise InputError(
            "attention in fp8 multiplies keys and values that are held in fp8; drop --kv bf16, or give --attention bf16"
        )
    held = products or (variant.cache.kv if kv is None else _fp8(kv))
    return variant.holding(held, products)


def _fp8(name: str) -> Literal["fp8"] | None:
    return "fp8" if name == "fp8" else None
