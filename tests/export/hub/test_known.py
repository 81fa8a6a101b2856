"""The known models: the shipped list holds together, and lists of one's own extend it."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.errors import InputError
from export.hub.known import known_models, load_model
from export.hub.reference import HubReference, is_commit
from export.request.targets import load_variant
from lightforcing_ref.config import preset

MODELS = {model.name: model for model in known_models()}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_can_be_planned(name: str) -> None:
    model = MODELS[name]
    for variant in model.variants:
        assert load_variant(variant).name == variant
    dimensions = preset(model.preset)
    assert dimensions.frame_tokens(model.height, model.width) > 0
    assert set(model.files) >= {"checkpoint", "vae", "text-encoder", "tokenizer"}


def test_sizes_and_hashes_are_pinned_together() -> None:
    """A size to the byte is that of one revision; where no revision is named, the hub's rounded figure stands."""
    files = {file.name: file for model in MODELS.values() for file in model.files.values()}
    for file in files.values():
        assert isinstance(file.source, HubReference)
        if is_commit(file.source.revision):
            assert file.bytes is not None and file.sha256 is not None, file.name
            assert file.bytes % 1000 or file.bytes % 100_000, file.name
        elif file.bytes is not None:
            assert file.bytes % 100_000 == 0, file.name


@pytest.mark.parametrize(
    ("name", "parameters", "width"),
    [
        ("self-forcing", 1_418_996_800, 4),
        ("causal-forcing", 1_418_996_800, 4),
        ("causal-forcing-framewise", 1_418_996_800, 4),
        ("causal-forcing-pp-1step", 1_418_996_800, 4),
        ("longlive-base", 1_418_996_800, 4),
        ("infinite-forcing", 1_418_996_800, 4),
        ("wan-vae", 126_900_000, 4),
        ("light-vae", 126_900_000 / 16, 4),  # a quarter of every width
        ("umt5-xxl", 5_680_000_000, 2),
        # Twice rank 256 of q, k, v, o of both attentions and of the feed-forward, in 30 layers.
        ("longlive-lora", 2 * 30 * 256 * (8 * 2 * 1536 + 2 * (1536 + 8960)), 4),
    ],
)
def test_sizes_are_those_of_their_parameters(name: str, parameters: float, width: int) -> None:
    """What the models have, by their papers, in the type that the files hold, and a little for the container."""
    files = {file.name: file for model in MODELS.values() for file in model.files.values()}
    assert files[name].bytes == pytest.approx(parameters * width, rel=0.02)


def test_the_public_models_are_there() -> None:
    assert MODELS["light-forcing-short"].variants[0] == "short"
    assert MODELS["light-forcing-short"].resolution == "512x768"
    assert MODELS["longlive"].files["lora"].base == MODELS["longlive"].files["checkpoint"].name
    assert MODELS["longlive"].files["checkpoint"].products == "forbidden"
    assert MODELS["self-forcing"].resolution == "480x832"
    assert MODELS["causal-forcing-pp-1step"].variants == ("causal-framewise-1step",)
    encoder = MODELS["self-forcing"].files["text-encoder"].source
    assert isinstance(encoder, HubReference)
    assert encoder.name == "models_t5_umt5-xxl-enc-bf16.pth"


OWN = """
schema_version = 1

[files.mine]
role = "checkpoint"
source = "mine.safetensors"
licence = "mine"
products = "allowed"

[models.mine]
title = "My own"
preset = "wan-1.3b"
variants = ["dense"]
resolution = "480x832"
checkpoint = "mine"
vae = "light-vae"
text-encoder = "umt5-xxl"
tokenizer = "umt5-tokenizer"
"""


def test_a_list_of_ones_own_uses_the_shipped_files(tmp_path: Path) -> None:
    (tmp_path / "mine.safetensors").write_bytes(b"x")
    path = tmp_path / "models.toml"
    path.write_text(OWN)
    model = load_model(str(path))
    assert model.files["checkpoint"].source == tmp_path / "mine.safetensors"
    assert model.files["vae"] == MODELS["light-forcing-short"].files["vae"]
    path.write_text(OWN + OWN[OWN.index("[models.mine]") :].replace("[models.mine]", "[models.other]"))
    with pytest.raises(InputError, match=r"holds 2 models \(mine, other\); name one as"):
        load_model(str(path))
    assert load_model(f"{path}:other").name == "other"
    with pytest.raises(InputError, match="holds 2 models"):
        load_model(f"{path}:third")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("schema_version = 1", "schema_version = 2"), "schema_version"),
        (('role = "checkpoint"', 'role = "model"'), r"files.mine.role"),
        (('products = "allowed"', 'products = "yes"'), r"files.mine.products"),
        (
            ('checkpoint = "mine"', 'checkpoint = "light-vae"'),
            "takes 'light-vae' as its checkpoint, and it is a vae",
        ),
        (('checkpoint = "mine"', 'checkpoint = "none"'), r"there is no \[files.none\]; the files are"),
        (
            ('source = "mine.safetensors"', 'source = "gone.safetensors"'),
            "neither a file beside the list nor org/repo",
        ),
        (
            ('licence = "mine"', 'licence = "mine"\ndecoder = "big"'),
            "has the decoder 'big'; expected one of wan",
        ),
        (("[files.mine]", "[files.mine"), "not readable TOML"),
    ],
)
def test_lists_with_mistakes(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.safetensors").write_bytes(b"x")
    path = tmp_path / "models.toml"
    path.write_text(OWN.replace(*change))
    with pytest.raises(InputError, match=message):
        load_model(str(path))


def test_names_that_are_none() -> None:
    with pytest.raises(InputError, match="unknown model 'light-forcing'; did you mean light-forcing-"):
        load_model("light-forcing")
    with pytest.raises(InputError, match=r"no models file at nowhere/x\.toml"):
        load_model("nowhere/x.toml")
