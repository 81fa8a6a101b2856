"""Files by name on the command line: what is filled in, what is refused, and a build whose files come from a hub."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from export.cli.arguments import chosen_preset, chosen_variant, chosen_weights
from export.cli.main import _parser, main
from export.cli.sources import LoRAArgument, lora
from export.hub.download import Hub
from export.hub.reference import HubReference
from lightforcing_ref.dimensions import LIGHT_VAE
from lightforcing_ref.shipped import shipped
from tests.export.hub.server import LocalHub, local_hub

ROOT = Path(__file__).resolve().parents[3]


def parsed(*arguments: str) -> argparse.Namespace:
    return _parser().parse_args(list(arguments))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    return capsys.readouterr().err


def test_a_model_fills_in_everything() -> None:
    args = parsed("build", "--gpu", "rtx5090", "--model", "longlive")
    _, variant = chosen_variant(args)
    assert variant.name == "longlive"
    assert (args.preset, args.resolution) == ("wan-1.3b", (480, 832))
    for role in ("checkpoint", "vae", "text_encoder", "tokenizer"):
        assert isinstance(getattr(args, role), HubReference), role
        assert len(args.expected[role]) == 64
    assert [(type(one.source), one.strength) for one in args.lora] == [(HubReference, 1.0)]
    assert len(args.expected["lora.0"]) == 64


def test_the_targets_variant_is_taken_where_the_weights_know_it() -> None:
    assert (
        chosen_variant(parsed("plan", "--gpu", "h200", "--model", "light-forcing-short"))[1].name == "hopper"
    )
    assert chosen_variant(parsed("plan", "--gpu", "h200", "--model", "light-forcing-long"))[1].name == "long"
    assert chosen_variant(parsed("plan", "--gpu", "rtx5090", "--model", "self-forcing"))[1].name == "dense"


def test_plans_know_the_models_decoder() -> None:
    args = parsed("plan", "--gpu", "rtx5090", "--model", "light-forcing-short")
    chosen_variant(args)
    assert chosen_preset(args).vae == LIGHT_VAE


def test_what_is_given_stays() -> None:
    own = ROOT / "pyproject.toml"
    args = parsed("build", "--model", "self-forcing", "--vae", str(own), "--resolution", "512x768")
    chosen_variant(args)
    assert args.vae == own
    assert "vae" not in args.expected
    assert args.resolution == (512, 768)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model self-forcin", "unknown model 'self-forcin'; did you mean self-forcing"),
        ("--model self-forcing --preset tiny", "self-forcing is a wan-1.3b, not a tiny; drop --preset"),
        ("--model self-forcing --init random", "--model and random weights exclude each other"),
        (
            "--model self-forcing --variant short",
            "made for dense, not for the variant short; use --variant dense --resolution 480x832",
        ),
        (
            "--checkpoint gdhe17/Self-Forcing:checkpoints/self_forcing_dmd.pt@dev --variant long",
            "the weights of self-forcing were made for dense",
        ),
        (
            "--model self-forcing --lora Efficient-Large-Model/LongLive-1.3B:models/lora.pt",
            "changes longlive-base, and the checkpoint is self-forcing; give the one it belongs to",
        ),
        ("--checkpoint org/repo:x.pt", "--checkpoint without --vae, --text-encoder, --tokenizer"),
        (
            "--checkpoint org/repo",
            "org/repo does not exist, and is no hub reference (org/repo:file@revision)",
        ),
    ],
)
def test_wrong_pairings_are_refused(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, "build", *arguments.split())


def test_a_pairing_of_ones_own_is_possible() -> None:
    args = parsed(
        "plan", "--gpu", "rtx5090", "--model", "self-forcing", "--variant", "short", "--any-pairing"
    )
    assert chosen_variant(args)[1].name == "short"


@pytest.fixture
def server() -> Iterator[LocalHub]:
    with local_hub() as running:
        yield running


OWN = """
schema_version = 1

[files.tiny-dit]
role = "checkpoint"
source = "tests/tiny:dit.safetensors"
licence = "CC-BY-NC-4.0"
products = "forbidden"

[files.tiny-vae]
role = "vae"
source = "tests/tiny:vae/vae.safetensors"
licence = "Apache-2.0"
products = "allowed"

[files.tiny-text]
role = "text-encoder"
source = "tests/tiny:text_encoder.safetensors"
licence = "Apache-2.0"
products = "allowed"

[files.tiny-tokenizer]
role = "tokenizer"
source = "tests/tiny:tokenizer.json"
licence = "Apache-2.0"
products = "allowed"

[models.tiny]
title = "The tiny model, from a hub"
preset = "tiny"
variants = ["dense"]
resolution = "96x96"
checkpoint = "tiny-dit"
vae = "tiny-vae"
text-encoder = "tiny-text"
tokenizer = "tiny-tokenizer"
"""


@pytest.fixture
def tiny_hub(server: LocalHub, tmp_path: Path) -> dict[str, str]:
    """The tiny model's files on a hub, and a list of models that names them; the environment of its clients."""
    files = shipped("tiny")
    assert files is not None
    names = {
        "dit.safetensors": files.dense_transformer,
        "vae/vae.safetensors": files.vae,
        "text_encoder.safetensors": files.text_encoder,
        "tokenizer.json": files.tokenizer,
    }
    for name, path in names.items():
        server.files["tests/tiny", name] = path.read_bytes()
    (tmp_path / "models.toml").write_text(OWN)
    return {
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "XDG_CACHE_HOME": str(tmp_path / "xdg"),
        "OMP_NUM_THREADS": "1",
    }


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "export", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_models_files_are_fetched_once_and_said_to_be_here(
    tiny_hub: dict[str, str], tmp_path: Path
) -> None:
    models = str(tmp_path / "models.toml")
    fetched = run(tiny_hub, "models", models, "--fetch", "--json")
    assert fetched.returncode == 0, fetched.stderr
    assert "checkpoint: tests/tiny:dit.safetensors (to be fetched)" in fetched.stderr
    assert "licence: CC-BY-NC-4.0; it forbids use in products" in fetched.stderr
    offline = run(tiny_hub | {"HF_HUB_OFFLINE": "1"}, "models", models, "--fetch", "--json")
    assert offline.returncode == 0, offline.stderr
    assert all(file["here"] for file in json.loads(offline.stdout)[0]["files"].values())
    missing = tiny_hub | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    refused = run(missing, "models", models, "--fetch")
    assert refused.returncode == 2
    assert "is not in the cache" in refused.stderr and "HF_HUB_OFFLINE" in refused.stderr


def test_weights_are_called_by_their_references(
    server: LocalHub, tiny_hub: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.hub.download.Hub", partial(Hub, server.endpoint, tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", tiny_hub["XDG_CACHE_HOME"])
    args = parsed("build", "--model", str(tmp_path / "models.toml"))
    _, variant = chosen_variant(args)
    weights = chosen_weights(args, chosen_preset(args), variant)
    weights.check()
    assert weights.source == weights.described == "tests/tiny:dit.safetensors"
    files = shipped("tiny")
    assert files is not None
    assert weights.digests()["checkpoint"] == hashlib.sha256(files.dense_transformer.read_bytes()).hexdigest()


def test_what_a_licence_forbids_is_said_before_the_download(
    server: LocalHub, tiny_hub: dict[str, str], tmp_path: Path
) -> None:
    server.gated.add("tests/tiny")
    fetched = run(tiny_hub, "models", str(tmp_path / "models.toml"), "--fetch")
    assert fetched.returncode == 2
    licence, _, refusal = fetched.stderr.partition("error: ")
    assert "it forbids use in products" in licence
    assert "asks for its terms to be accepted" in refusal


@pytest.mark.slow
def test_a_bundle_is_built_from_a_hub(tiny_hub: dict[str, str], tmp_path: Path) -> None:
    model = ["--model", f"{tmp_path / 'models.toml'}:tiny", "--out", str(tmp_path / "built")]
    built = run(tiny_hub, "build", *model, "--name", "first")
    assert built.returncode == 0, built.stderr
    manifest = json.loads((tmp_path / "built" / "first" / "manifest.json").read_text())
    assert manifest["provenance"]["checkpoint"]["source"] == "tests/tiny:dit.safetensors"
    assert manifest["model"]["video_height"] == 96


def test_loras_on_the_command_line(tmp_path: Path) -> None:
    style, odd = tmp_path / "style.safetensors", tmp_path / "odd:0.5"
    for path in (style, odd):
        path.write_bytes(b"")
    assert lora(str(style)) == LoRAArgument(style)
    assert lora(f"{style}:0.8") == LoRAArgument(style, 0.8)
    assert lora(f"{style}:-1") == LoRAArgument(style, -1.0)
    assert lora(str(odd)) == LoRAArgument(odd)  # the file of that very name
    assert lora(f"{odd}:2") == LoRAArgument(odd, 2.0)
    reference = lora("org/repo:lora.pt@v2:0.5")
    assert (str(reference.source), reference.strength) == ("org/repo:lora.pt@v2", 0.5)
    for text, message in (
        (f"{style}:0", "that is not 0"),
        (f"{style}:nan", "that is not 0"),
        (f"{style}:1e9", "up to 100"),
        (f"{style}:much", "does not exist"),
        (f"{tmp_path / 'none'}:0.5", "does not exist"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            lora(text)
