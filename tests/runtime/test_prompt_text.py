from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import runtime.text
from runtime import BundleError, InputError, Pipeline
from runtime.bundle import Text, file_entry, load_bundle
from runtime.bundle.weights_file import WeightsFile
from runtime.host_memory import Memory
from runtime.pipeline import TextEncoderMode
from runtime.text import check_embedding, clean_prompt
from tests.runtime.handmade import TEXT_DIM, TEXT_LEN, VOCAB, edit_manifest, text_weights


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("a red fox", "a red fox"),
        ("  a \t red\n\nfox\u00a0 ", "a red fox"),
        ("l&#39;\u00e9t\u00e9", "l'\u00e9t\u00e9"),
        ("Tom &amp;amp; Jerry", "Tom & Jerry"),
        ("&amp;lt;b&amp;gt;", "<b>"),
        ("sch\u00c3\u00b6n", "sch\u00f6n"),  # UTF-8 read as Latin-1
        ("\u201cquoted\u201d", '"quoted"'),
        ("\u3000\u96ea\u306e\u72d0\u3000", "\u96ea\u306e\u72d0"),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_cleaning(raw: str, clean: str) -> None:
    assert clean_prompt(raw) == clean


@pytest.mark.parametrize("prompt", [None, 7, b"a fox", ["a"]])
def test_prompt_must_be_a_string(prompt: object) -> None:
    with pytest.raises(InputError, match="expected a string"):
        clean_prompt(prompt)  # type: ignore[arg-type]


def test_prompt_must_be_unicode() -> None:
    with pytest.raises(InputError, match="not valid Unicode"):
        clean_prompt("fox \udcff")


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(bundle, threads=1, warmup=False) as pipeline:
        yield pipeline


def encode(ids: list[int], weights: dict[str, np.ndarray]) -> np.ndarray:
    """The hand-made text encoder in float64: see `handmade.text_layer`."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    x = w["token_embedding"][ids + [0] * (TEXT_LEN - len(ids))]
    real = np.arange(TEXT_LEN) < len(ids)
    for layer in range(2):
        p = {name.split(".")[-1]: value for name, value in w.items() if name.startswith(f"layers.{layer}.")}
        y = x * p["norm1"]
        scores = (y @ p["q"].T) @ (y @ p["k"].T).T + p["rel_bias"].mean()
        scores[:, ~real] = -np.inf
        share = np.exp(scores - scores.max(axis=1, keepdims=True))
        share /= share.sum(axis=1, keepdims=True)
        x = x + share @ (y @ p["v"].T) @ p["o"].T
        y = x * p["norm2"]
        x = x + (np.tanh(y @ p["gate"].T) * (y @ p["fc1"].T)) @ p["fc2"].T
    x = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6) * w["norm"]
    x[~real] = 0
    return x


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [("a red fox", [3, 4, 5, 1]), ("", [1]), ("RED &amp; sea", [2, 10, 9, 1]), ("a a a a a", [3] * 5 + [1])],
)
def test_embedding_against_the_formula(pipe: Pipeline, prompt: str, ids: list[int]) -> None:
    found = pipe.embed(prompt)
    assert found.dtype == np.float32 and found.shape == (TEXT_LEN, TEXT_DIM)
    np.testing.assert_allclose(found, encode(ids, text_weights()), atol=2e-5)
    assert not found[len(ids) :].any()


def test_long_prompt_is_cut_with_a_warning(pipe: Pipeline) -> None:
    prompt = ("red fox in snow " * 625)[:10_000]
    assert len(prompt) == 10_000
    with pytest.warns(
        UserWarning, match="the prompt has 2500 tokens, the model reads 5: the rest was cut off"
    ):
        found = pipe.embed(prompt)
    np.testing.assert_allclose(found, encode([4, 5, 6, 7, 4, 1], text_weights()), atol=2e-5)


def test_prompt_that_just_fits_does_not_warn(pipe: Pipeline) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.embed("a a a a a")


def test_resident_weights_give_the_same(pipe: Pipeline, bundle: Path) -> None:
    with Pipeline.load(bundle, threads=1, warmup=False, text_encoder="resident") as resident:
        for prompt in ("a red fox", "a fox"):
            np.testing.assert_array_equal(resident.embed(prompt), pipe.embed(prompt))


def test_prompts_with_words_that_a_model_never_saw_are_told_what_it_knows(
    bundle: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    edit_manifest(copy, lambda raw: raw["text"].update(words=["a", "red", "fox"]))
    with Pipeline.load(copy, threads=1, warmup=False) as pipe:
        with pytest.warns(UserWarning, match=r"never shown 'Red', 'snow'; it knows .*: a red fox"):
            pipe.embed("a Red fox &amp;amp; snow".replace("&amp;amp; ", ""))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipe.embed("a  red\nfox")
            pipe.embed("")


def test_a_prompt_that_comes_back_is_not_encoded_again(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Pipeline.load(bundle, threads=1, warmup=False) as pipe:
        layers, encode_layer = [], pipe.engine.encode_text_layer

        def counted(*arguments: object) -> np.ndarray:
            layers.append(arguments)
            return encode_layer(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(pipe.engine, "encode_text_layer", counted)
        first = pipe.embed("a red fox")
        expected, count = first.copy(), len(layers)
        first[:] = 7  # the caller's own
        np.testing.assert_array_equal(pipe.embed(" a red  fox "), expected)
        assert len(layers) == count == 2
        row = first[: len(["a", "red", "fox"]) + 1].nbytes
        monkeypatch.setattr("runtime.text.CACHED_BYTES", 2 * row)
        pipe.embed("fox a red")
        pipe.embed("red a fox")  # no room for the first any more
        assert len(layers) == 6
        np.testing.assert_array_equal(pipe.embed("a red fox"), expected)
        assert len(layers) == 8


def reseal(folder: Path, name: str) -> None:
    entry = file_entry(folder, name).model_dump()
    edit_manifest(
        folder, lambda raw: raw.update(files=[entry if f["path"] == name else f for f in raw["files"]])
    )


def test_bfloat16_weights(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    weights = {name: value.astype(ml_dtypes.bfloat16) for name, value in text_weights().items()}
    save_file(weights, copy / "text_encoder.safetensors")
    reseal(copy, "text_encoder.safetensors")
    with Pipeline.load(copy, threads=1, warmup=False) as pipe:
        np.testing.assert_allclose(pipe.embed("a red fox"), encode([3, 4, 5, 1], weights), atol=2e-5)


def test_weights_that_lack_a_tensor(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    weights = load_file(copy / "text_encoder.safetensors")
    del weights["layers.1.gate"]
    save_file(weights, copy / "text_encoder.safetensors")
    reseal(copy, "text_encoder.safetensors")
    with pytest.raises(BundleError, match=r"layers\.1\.gate"):
        Pipeline.load(copy, threads=1, warmup=False)


def test_tokenizer_that_is_none(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    (copy / "tokenizer.json").write_text("{}")
    reseal(copy, "tokenizer.json")
    with pytest.raises(BundleError, match=r"the tokenizer tokenizer\.json cannot be read"):
        Pipeline.load(copy, threads=1, warmup=False)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8, ml_dtypes.bfloat16])
def test_embeddings_become_float32_copies(bundle: Path, dtype: type) -> None:
    given = np.arange(TEXT_LEN * TEXT_DIM).reshape(TEXT_LEN, TEXT_DIM).astype(dtype)
    found = check_embedding(given, load_bundle(bundle).manifest.text)
    assert found.dtype == np.float32 and not np.shares_memory(found, given)
    np.testing.assert_array_equal(found, given.astype(np.float32))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((TEXT_LEN, TEXT_DIM), dtype=complex), "dtype complex128"),
        (np.full((TEXT_LEN, TEXT_DIM), "a"), "dtype <U1"),
        (np.zeros((TEXT_LEN + 1, TEXT_DIM)), r"shape \(7, 8\); expected \(6, 8\)"),
        (np.zeros(TEXT_DIM), "shape"),
        (np.full((TEXT_LEN, TEXT_DIM), np.nan), "not finite"),
        (np.full((TEXT_LEN, TEXT_DIM), 1e300), "not finite"),
    ],
)
def test_unusable_embeddings(bundle: Path, value: np.ndarray, message: str) -> None:
    text: Text = load_bundle(bundle).manifest.text
    with pytest.raises(InputError, match=message):
        check_embedding(value, text)


def test_the_vocabulary_of_these_tests() -> None:
    assert [VOCAB.index(word) for word in ("a", "red", "fox", "in", "snow", "sea", "&")] == [
        3,
        4,
        5,
        6,
        7,
        9,
        10,
    ]


def test_a_prompt_of_any_length_is_refused_at_once(bundle: Path) -> None:
    with Pipeline.load(bundle, threads=1, warmup=False) as pipe:
        with pytest.raises(InputError, match=r"has 50,000,000 characters; expected at most 65,536"):
            pipe.session("x" * 50_000_000)
        with pytest.warns(UserWarning, match="the rest was cut off"):
            pipe.embed("a " * (1 << 15))


@pytest.mark.parametrize(
    ("mode", "free", "again"),
    [
        ("auto", "twice", False),
        ("auto", "less", True),
        ("auto", None, True),
        ("resident", "less", False),
        ("on-demand", "twice", True),
    ],
)
def test_layers_stay_where_there_is_room(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, mode: TextEncoderMode, free: str | None, again: bool
) -> None:
    with WeightsFile(bundle / load_bundle(bundle).manifest.text.weights) as weights:
        layers = sum(entry.nbytes for name, entry in weights.tensors.items() if name.startswith("layers."))
    available = {"twice": 2 * layers, "less": 2 * layers - 1, None: None}[free]
    monkeypatch.setattr(runtime.text, "memory", lambda: Memory(None, available))
    read: list[str] = []
    get_required = WeightsFile.get_required

    def noted(file: WeightsFile, name: str) -> np.ndarray:
        read.append(name)
        return get_required(file, name)

    monkeypatch.setattr(WeightsFile, "get_required", noted)
    with Pipeline.load(bundle, threads=1, warmup=False, text_encoder=mode) as pipeline:
        first = pipeline.embed("a red fox")
        once = len([name for name in read if name.startswith("layers.")])
        assert once == 20  # ten tensors in each of two layers
        pipeline.embed("a sea in snow")
        twice = len([name for name in read if name.startswith("layers.")])
        assert (twice == 2 * once) == again
    with Pipeline.load(bundle, threads=1, warmup=False, text_encoder="on-demand") as pipeline:
        assert np.array_equal(pipeline.embed("a red fox"), first)
