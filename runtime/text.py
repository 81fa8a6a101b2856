"""From a prompt to a prompt embedding: cleaning, tokenising, and the text encoder run layer by layer.

Rows of the token table are gathered one by one out of the file, and each layer's weights are read when its turn comes,
so that an encoder of 5.7 billion parameters never has to be in memory at once. Where there is room for them, the layers
stay there after the first prompt, and later ones read nothing.
"""

from __future__ import annotations

import html
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from runtime.bundle.dtypes import nbytes, numpy_dtype
from runtime.bundle.weights_file import WeightsFile

from .bundle import Bundle, Text
from .errors import BundleError, ClosedError, EngineError, InputError
from .host_memory import memory

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["MAX_PROMPT", "TextEncoder", "check_embedding", "clean_prompt"]

MAX_PROMPT = 1 << 16
"""Characters of a prompt; the model reads some hundred words of it. Longer ones are refused before any work is done."""

CACHED_BYTES = 64 << 20
"""Size of the embeddings that an encoder keeps, by prompt: hundreds at full size, where a token's is 16 KiB."""

_WHITE_SPACE = re.compile(r"\s+")


class _LayerEngine(Protocol):
    def encode_text_layer(
        self, hidden: NDArray[np.float32], mask: NDArray[np.float32], weights: Mapping[str, NDArray[Any]]
    ) -> NDArray[np.float32]: ...


def clean_prompt(prompt: str) -> str:
    """Repair mojibake, unescape HTML twice, and collapse white space, as the text encoder was trained with. It
    may be empty.

    Raises:
        InputError: `prompt` is not a string of valid Unicode, or longer than `MAX_PROMPT`. It may be empty.
    """
    import ftfy

    if not isinstance(prompt, str):
        raise InputError(f"prompt is a {type(prompt).__name__}; expected a string")
    if len(prompt) > MAX_PROMPT:
        raise InputError(f"the prompt has {len(prompt):,} characters; expected at most {MAX_PROMPT:,}")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"prompt is not valid Unicode ({error}); pass it as UTF-8") from None
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return _WHITE_SPACE.sub(" ", text).strip()


def check_embedding(embedding: ArrayLike, text: Text) -> NDArray[np.float32]:
    """A prompt embedding as a float32 copy `[text_len, dim]`.

    Raises:
        InputError: it has another shape or type, or values that are not finite.
    """
    array = np.asarray(embedding)
    expected = (text.text_len, text.dim)
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        raise InputError(f"embedding has dtype {array.dtype}; expected floating point of shape {expected}")
    if array.shape != expected:
        raise InputError(
            f"embedding has shape {array.shape}; expected {expected}, with zero rows past the prompt's end"
        )
    with np.errstate(over="ignore"):  # becomes infinite and is refused below
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise InputError("embedding holds values that are not finite; expected finite numbers")
    return array


class TextEncoder:
    """Encodes prompts with a bundle's tokenizer and text encoder. Safe to call from several threads.

    `resident=True` keeps the layers' weights in memory after the first prompt instead of reading them again, `False`
    does not, and `None` does where they take at most half of what is free. Either way the embeddings of the latest
    prompts are kept, so that a prompt that comes back costs nothing.
    """

    def __init__(self, bundle: Bundle, engine: _LayerEngine, *, resident: bool | None = False) -> None:
        self._text = bundle.manifest.text
        self._engine = engine
        self._tokenizer = _load_tokenizer(bundle)
        self._weights = WeightsFile(bundle.opened(self._text.weights))
        component = bundle.component("text_encoder")
        # What the layer reads besides what it is called with are its weights, under the same names in the file.
        self._dtypes = {
            spec.name: numpy_dtype(spec.dtype)
            for spec in component.inputs
            if spec.name not in ("hidden", "mask")
        }
        self._may_stay = resident is None
        self._layer_bytes = sum(
            nbytes(spec.dtype, (size for size in spec.shape if isinstance(size, int)))
            for spec in component.inputs
            if spec.name in self._dtypes
        )
        self._resident: dict[int, dict[str, NDArray[Any]]] | None = {} if resident else None
        self._embeddings: OrderedDict[tuple[int, ...], NDArray[np.float32]] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = False

    def tokenize(self, prompt: str) -> list[int]:
        """Token ids of a prompt, cleaned, ended by the end token, cut to `text_len` with a warning."""
        limit = self._text.text_len
        cleaned = clean_prompt(prompt)
        if self._text.words and (unknown := set(cleaned.split()).difference(self._text.words)):
            warnings.warn(
                f"the model was never shown {', '.join(sorted(map(repr, unknown)))}; it knows captions of these words: "
                f"{' '.join(self._text.words)}",
                stacklevel=2,
            )
        ids = list(self._tokenizer.encode(cleaned, add_special_tokens=False).ids)
        if len(ids) > limit - 1:
            warnings.warn(
                f"the prompt has {len(ids)} tokens, the model reads {limit - 1}: the rest was cut off; shorten it",
                stacklevel=2,
            )
        return [*ids[: limit - 1], self._text.eos_id]

    def encode(self, prompt: str) -> NDArray[np.float32]:
        """The embedding of a prompt, `[text_len, dim]` float32, zero past its last token.

        Raises:
            ClosedError: the pipeline is closed.
            EngineError: the embedding is not finite.
            InputError: the prompt is not usable.
        """
        ids = self.tokenize(prompt)
        text = self._text
        if (known := self._known(tuple(ids))) is not None:
            return known
        mask = np.zeros(text.text_len, dtype=np.float32)
        mask[: len(ids)] = 1
        padded = ids + [text.pad_id] * (text.text_len - len(ids))
        with self._lock:
            if self._closed:
                raise ClosedError("the pipeline is closed; load it again with Pipeline.load()")
            self._weights.check()
            if self._resident is None and self._may_stay and self._there_is_room():
                self._resident = {}
            tokens = sorted(set(padded))
            table = self._weights.rows("token_embedding", tokens).astype(np.float32)
            hidden = table[np.searchsorted(tokens, padded)]
            for layer in range(text.layers):
                hidden = self._engine.encode_text_layer(hidden, mask, self._layer(layer))
            scale = self._weights.get_required("norm").astype(np.float32)
            self._weights.check()
        mean_square = np.mean(np.square(hidden), axis=-1, keepdims=True, dtype=np.float32)
        embedding = hidden / np.sqrt(mean_square + np.float32(text.eps)) * scale
        embedding[len(ids) :] = 0
        if not np.isfinite(embedding).all():
            raise EngineError(
                "the text encoder gives values that are not finite for this prompt; its weights or its engine are "
                "faulty: run 'python -m runtime verify', or rebuild the bundle from weights that are intact"
            )
        self._remember(tuple(ids), embedding[: len(ids)].astype(np.float32))
        return np.asarray(embedding, dtype=np.float32)

    def _known(self, ids: tuple[int, ...]) -> NDArray[np.float32] | None:
        """A copy of the embedding of a prompt that was encoded lately."""
        with self._lock:
            rows = self._embeddings.get(ids)
            if rows is None or self._closed:
                return None
            self._embeddings.move_to_end(ids)
        embedding = np.zeros((self._text.text_len, rows.shape[1]), dtype=np.float32)
        embedding[: len(ids)] = rows
        return embedding

    def _remember(self, ids: tuple[int, ...], rows: NDArray[np.float32]) -> None:
        """Keep the rows of a prompt's tokens, in place of those that were not asked for for longest."""
        with self._lock:
            self._embeddings[ids] = rows
            while sum(kept.nbytes for kept in self._embeddings.values()) > CACHED_BYTES:
                self._embeddings.popitem(last=False)

    def close(self) -> None:
        """Refuse further prompts; waits for one that is being encoded."""
        with self._lock:
            self._closed = True
            self._resident = None
            self._embeddings.clear()
            self._weights.close()

    def _there_is_room(self) -> bool:
        """Asked anew for every prompt that reads them: what is free now may be taken by others then."""
        free = memory().available
        return free is not None and self._text.layers * self._layer_bytes <= free // 2

    def _layer(self, layer: int) -> dict[str, NDArray[Any]]:
        if self._resident is not None and layer in self._resident:
            return self._resident[layer]
        arrays = {
            name: self._weights.get_required(f"layers.{layer}.{name}").astype(dtype, copy=False)
            for name, dtype in self._dtypes.items()
        }
        if self._resident is not None:
            self._resident[layer] = arrays
        return arrays


def _load_tokenizer(bundle: Bundle) -> Tokenizer:
    from tokenizers import Tokenizer

    name = bundle.manifest.text.tokenizer
    with bundle.opened(name) as file:
        content = file.contents()
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception
        raise BundleError(
            f"the tokenizer {name} cannot be read: {error}; expected a tokenizer.json of the tokenizers library; "
            f"rebuild the bundle"
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
