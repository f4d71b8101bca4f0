"""`ClipText`: the text model of a Stable Diffusion pipeline, as it comes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.stable.folder import read_text_model
from diffusion.text import TextContext
from unet.errors import InputError


@dataclass(frozen=True)
class ClipTokenizer:
    """A `CLIPTokenizer` of transformers, with the length to which texts are padded or cut."""

    whole: Any
    longest: int

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        tokens: Tensor = self.whole(
            list(texts),
            padding="max_length",
            max_length=self.longest,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return tokens


def check_clip_parts(folder: str | Path) -> None:
    """Raises an InputError for a folder without the parts that `ClipText` reads."""
    for part in ("tokenizer", "text_encoder"):
        if not os.path.isdir(Path(folder, part)):  # False for an impossible name, too
            raise InputError(f"'{folder}' has no {part}/: give a diffusers pipeline")


class ClipText:
    """The text model of a Stable Diffusion pipeline, frozen (LDM, arXiv 2112.10752, sec. 3.3).

    A text is padded or cut to the model's length, 77 tokens, and all of them count, padding too,
    as in Stable Diffusion.

    Args:
        tokenizer, model: a `CLIPTokenizer` and a `CLIPTextModel` of transformers.
    """

    def __init__(self, tokenizer: Any, model: Any) -> None:
        # A tokenizer that was saved without its length has an astronomic one.
        self.longest = min(tokenizer.model_max_length, model.config.max_position_embeddings)
        self.tokenizer = ClipTokenizer(tokenizer, self.longest)
        self.model = model.eval().requires_grad_(False)
        self.channels: int = model.config.hidden_size

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ClipText:
        """Of a diffusers pipeline folder: its `text_encoder/` and `tokenizer/`.

        Raises:
            InputError: a part is missing or unreadable, or transformers is not installed.
        """
        check_clip_parts(folder)
        parts = Path(folder, "tokenizer"), Path(folder, "text_encoder")
        whole = {"tokenizer.json"}, {"vocab.json", "merges.txt"}  # otherwise it would be empty
        if not any(names <= {file.name for file in parts[0].iterdir()} for names in whole):
            raise InputError(f"'{parts[0]}' lacks vocab.json and merges.txt: copy it whole")
        model, tokenizer = read_text_model(Path(folder))
        if len(tokenizer) > model.config.vocab_size:
            raise InputError(
                f"'{parts[0]}' has {len(tokenizer)} tokens, but the model beside it knows "
                f"{model.config.vocab_size}: take both from one pipeline"
            )
        return cls(tokenizer, model)

    def __deepcopy__(self, memo: dict[int, Any]) -> ClipText:
        return self  # frozen: the averaged copy of a network can share it

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Tokens (B, L) int64 on the CPU, padded or cut to the model's length."""
        return self.tokenizer.tokenize(texts)

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> TextContext:
        """Tokens (B, L) of `tokenize` to a context (B, L, C), on their device."""
        if self.model.device != tokens.device:
            self.model.to(tokens.device)
        given: dict[str, Any] = {}
        if getattr(self.model.config, "use_attention_mask", False):  # as diffusers asks
            ends = (tokens == self.tokenizer.whole.eos_token_id).long()
            given["attention_mask"] = (ends.cumsum(dim=1) - ends == 0).long()
        return TextContext(self.model(tokens, **given).last_hidden_state, None)

    def encode(self, texts: Sequence[str]) -> TextContext:
        return self(self.tokenize(texts).to(self.model.device))

    @torch.no_grad()
    def encode_below(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """What the last layer but one makes of texts (B, L, C), as Stable Diffusion XL has it, and
        of a model with a projection each text as one vector (B, P)."""
        tokens = self.tokenize(texts).to(self.model.device)
        found = self.model(tokens, output_hidden_states=True)
        return found.hidden_states[-2], getattr(found, "text_embeds", None)

    def words(self, text: str) -> list[str]:
        ids = self.tokenizer.whole(text, max_length=self.longest, truncation=True).input_ids
        return ["(begin)", *(self.tokenizer.whole.decode([i]) for i in ids[1:-1]), "(end)"]

    def cut(self, text: str) -> str:
        """What of a text is behind the model's length, and not read."""
        ids = self.tokenizer.whole(text, verbose=False).input_ids
        return self.tokenizer.whole.decode(ids[self.longest - 1 : -1])

    def remarks(self, text: str) -> list[str]:
        cut = self.cut(text)
        return [f"the model reads {self.longest} tokens, and not the last: {cut!r}"] if cut else []
