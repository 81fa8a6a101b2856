"""Quantization: formats, what they cost, calibration, and which layers are left out."""

from export.graph.modules import merge_qkv

from .calibration import Calibration, calibrate, load_calibration
from .cost import fake_quantized, latent_error, layer_errors
from .formats import (
    ORT_SESSION_CONFIG,
    QuantPrecision,
    choose_formats,
    linear_names,
    quantize,
    save_quantized,
)
from .numerics import (
    Format,
    dequantize_weight,
    fake_activation,
    fake_linear,
    fold_weight,
    importance_of,
    relative_error,
)
from .trial import Trial, block_linears, embed_prompts, read_prompts

__all__ = [
    "ORT_SESSION_CONFIG",
    "Calibration",
    "Format",
    "QuantPrecision",
    "Trial",
    "block_linears",
    "calibrate",
    "choose_formats",
    "dequantize_weight",
    "embed_prompts",
    "fake_activation",
    "fake_linear",
    "fake_quantized",
    "fold_weight",
    "importance_of",
    "latent_error",
    "layer_errors",
    "linear_names",
    "load_calibration",
    "merge_qkv",
    "quantize",
    "read_prompts",
    "relative_error",
    "save_quantized",
]
