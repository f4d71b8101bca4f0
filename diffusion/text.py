"""Text encoders for a U-Net: their interface, and `WordEncoder`, which is trained with the
U-Net."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from unet.attention import Attention, FeedForward
from unet.config import MOST_BLOCKS, MOST_CHANNELS
from unet.errors import InputError

PADDING, UNKNOWN, BEGIN = range(3)  # tokens before those of the words
MOST_WORDS = 16_384  # of a vocabulary; rarer ones are unknown
MOST_TOKENS = 256  # of a training caption
HEAD_CHANNELS = 32


class TextContext(NamedTuple):
    """What `UNet.forward` takes of a text; `_asdict()` is a denoiser's conditioning."""

    context: Tensor  # (B, L, C)
    mask: Tensor | None  # (B, L) bool, True where a token counts; None: all do


class Tokenizer(Protocol):
    """Turns texts into numbers, without the weights of the encoder: processes that prepare batches
    get only this."""

    @property
    def longest(self) -> int:
        """Tokens of the longest text that it reads."""

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Tokens (B, L) int64 on the CPU, padded to the longest of these texts."""


class TextEncoder(Protocol):
    """Texts to tokens for cross-attention."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def channels(self) -> int:
        """Width C of the tokens: `UNetConfig.context_channels`."""

    @property
    def longest(self) -> int:
        """Tokens of the longest text that it reads."""

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Tokens (B, L) int64 on the CPU, padded to the longest of these texts."""

    def __call__(self, tokens: Tensor) -> TextContext:
        """Tokens (B, L) of `tokenize` to a context (B, L, C) and its mask, on their device."""

    def encode(self, texts: Sequence[str]) -> TextContext:
        """Tokens of B texts, as long as the longest needs; the empty text has some, too."""

    def words(self, text: str) -> list[str]:
        """What each token of a text stands for, in order and without padding; for pictures."""

    def remarks(self, text: str) -> list[str]:
        """Sentences on what the model does not read of a text, to be printed."""


def split_words(text: str) -> list[str]:
    """The words of a text in lower case, and each sign of punctuation: its tokens.

    Scripts without spaces between words make one word of a whole sentence; CLIP reads those better.
    """
    return re.findall(r"\w+|[^\w\s]", unicodedata.normalize("NFC", text).lower())


class WordTokenizer:
    """Texts to the tokens of a `WordEncoder`."""

    def __init__(self, vocabulary: Sequence[str], longest: int) -> None:
        self.longest = longest
        self._tokens = {word: BEGIN + 1 + i for i, word in enumerate(vocabulary)}

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Tokens (B, L) int64 on the CPU, padded to the longest text of these.

        Raises:
            InputError: a text that is too long, with the words that do not fit.
        """
        rows = []
        for text in texts:
            words = split_words(text)
            if rest := words[self.longest - 1 :]:
                raise InputError(
                    f"{text!r} has {len(words)} words and signs, but this model reads "
                    f"{self.longest - 1}, as many as the longest caption that it was trained on: "
                    f"shorten it by as many, such as {' '.join(rest)!r}"
                )
            rows.append(torch.tensor([BEGIN, *(self._tokens.get(w, UNKNOWN) for w in words)]))
        return pad_sequence(rows, batch_first=True, padding_value=PADDING)

    def unknown(self, text: str) -> list[str]:
        """The words of a text that are not in the vocabulary, once each."""
        return [w for w in dict.fromkeys(split_words(text)) if w not in self._tokens]


class WordEncoder(nn.Module):
    """A small transformer over the words of a caption, to be trained with a U-Net.

    Pre-norm layers of self-attention in both directions (arXiv 1706.03762; 2002.04745), after
    learned positions. Nothing but the state dict has weights, so that it can be built on the meta
    device from `to_dict`.

    Args:
        vocabulary: the words that it knows, as `split_words` gives them.
        longest: tokens of the longest text that it reads, the one at the beginning among them.
        width: channels of a token, a multiple of 32.
        depth: transformer layers.

    Raises:
        InputError: such as from a damaged file: values that build no encoder.
    """

    def __init__(
        self, vocabulary: Sequence[str], longest: int, *, width: int = 128, depth: int = 2
    ) -> None:
        super().__init__()
        _check(vocabulary, longest, width, depth)
        self.vocabulary, self.longest = tuple(vocabulary), longest
        self.channels, self.depth = width, depth
        self.tokenizer = WordTokenizer(self.vocabulary, longest)
        self.embedding = nn.Embedding(BEGIN + 1 + len(vocabulary), width, padding_idx=PADDING)
        self.positions = nn.Embedding(longest, width)
        self.layers = nn.ModuleList(_Layer(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        with torch.no_grad():  # where training meets no unknown word, it stays a blank
            self.embedding.weight[UNKNOWN].zero_()

    @classmethod
    def from_captions(
        cls, captions: Iterable[str], *, width: int = 128, depth: int = 2
    ) -> WordEncoder:
        """An encoder with the words of these captions, the commonest 16,384, and their length.

        Raises:
            InputError: a caption of more than 255 words and signs; none with a word in it.
        """
        counts: Counter[str] = Counter()
        longest = 1
        for caption in captions:
            words = split_words(caption)
            if len(words) >= MOST_TOKENS:
                raise InputError(
                    f"the caption {' '.join(words[:8])!r} ... has {len(words)} words and signs, "
                    f"more than {MOST_TOKENS - 1}: shorten it"
                )
            counts.update(words)
            longest = max(longest, 1 + len(words))
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(ranked[:MOST_WORDS], longest, width=width, depth=depth)

    def to_dict(self) -> dict[str, Any]:
        """JSON values for a model's `info`; `from_dict` is its inverse, but for the weights."""
        return {
            "vocabulary": list(self.vocabulary),
            "longest": self.longest,
            "width": self.channels,
            "depth": self.depth,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> WordEncoder:
        names = {"vocabulary", "longest", "width", "depth"}
        if not isinstance(values, Mapping) or set(values) != names:
            raise InputError(
                f"a text encoder is described by {', '.join(sorted(names))}, not by {values!r:.200}"
            )
        return cls(**values)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        return self.tokenizer.tokenize(texts)

    def forward(self, tokens: Tensor) -> TextContext:
        """Tokens (B, L) of `tokenize` to a context (B, L, C) and its mask."""
        mask = tokens != PADDING
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens) + self.positions(places)
        for layer in self.layers:
            x = layer(x, mask)
        return TextContext(self.norm(x), mask)

    def encode(self, texts: Sequence[str]) -> TextContext:
        return self(self.tokenize(texts).to(self.norm.weight.device))

    def words(self, text: str) -> list[str]:
        return ["(begin)", *split_words(text)]

    def unknown(self, text: str) -> list[str]:
        """The words of a text that are not in the vocabulary, once each."""
        return self.tokenizer.unknown(text)

    def remarks(self, text: str) -> list[str]:
        unknown = ", ".join(map(repr, self.unknown(text)))
        return [f"the model was trained without {unknown}, in {text!r}"] if unknown else []


class _Layer(nn.Module):
    """Self-attention and feed-forward, each normalised first, with a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, width // HEAD_CHANNELS)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.feed_forward(self.norm2(x))


def _check(vocabulary: Any, longest: Any, width: Any, depth: Any) -> None:
    if not isinstance(vocabulary, Sequence) or not all(isinstance(w, str) for w in vocabulary):
        raise InputError("a vocabulary is a list of words")
    if not vocabulary:
        raise InputError("no caption has a word in it: give captions to train on, such as 'a cat'")
    if twice := [word for word, n in Counter(vocabulary).items() if n > 1]:
        raise InputError(f"the vocabulary has {twice[0]!r} more than once")
    limits = {"longest": (longest, MOST_TOKENS), "width": (width, MOST_CHANNELS)}
    for name, (value, most) in {**limits, "depth": (depth, MOST_BLOCKS)}.items():
        if type(value) is not int or not 1 <= value <= most:
            raise InputError(f"{name}={value!r} of a text encoder must be from 1 to {most}")
    if width % HEAD_CHANNELS:
        raise InputError(f"width={width} of a text encoder must be a multiple of {HEAD_CHANNELS}")
