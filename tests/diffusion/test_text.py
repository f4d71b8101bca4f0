from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from diffusion.data.shapes import example_caption
from diffusion.model import DiffusionUNet
from diffusion.stable.clip import ClipText
from diffusion.text import (
    BEGIN,
    MOST_TOKENS,
    PADDING,
    UNKNOWN,
    TextContext,
    TextEncoder,
    WordEncoder,
    split_words,
)
from unet.config import UNetConfig
from unet.errors import InputError

CAPTIONS = [example_caption(0, i) for i in range(200)]
LONG = "a small red circle left of a large blue square"
TEXTS = ["a red circle", LONG, "", "a purple dog"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def words() -> WordEncoder:
    torch.manual_seed(0)
    return WordEncoder.from_captions(CAPTIONS, width=64)


def network(info: dict[str, Any] | None = None) -> DiffusionUNet:
    config = UNetConfig(
        in_channels=3,
        channels=8,
        multipliers=(1, 2),
        block="res",
        skips="block",
        norm="group",
        groups=4,
        time=True,
        attention_levels=(1,),
        attention="transformer",
        context_channels=64,
        heads=2,
    )
    return DiffusionUNet(config, 3, info)


# -- words


def test_a_text_is_its_words_and_signs() -> None:
    assert split_words("A red-hot  Circle,\n2 m²!") == [
        *("a", "red", "-", "hot", "circle", ",", "2", "m²", "!")
    ]
    assert split_words("Cafe\u0301") == ["café"]  # composed and decomposed are one word
    assert split_words(" \t") == []


def test_the_vocabulary_goes_by_count_then_alphabet_and_not_by_order() -> None:
    captions = ["b a", "b c a", "b d ."]
    encoder = WordEncoder.from_captions(captions)
    assert encoder.vocabulary == ("b", "a", ".", "c", "d")
    assert encoder.longest == 4  # the longest caption and the beginning
    assert WordEncoder.from_captions(captions[::-1]).vocabulary == encoder.vocabulary


def test_tokens_begin_and_are_padded(words: WordEncoder) -> None:
    tokens = words.tokenize(["a red dog", "A", ""])
    assert tokens.shape == (3, 4)
    assert tokens[1:, 2:].eq(PADDING).all()
    assert tokens[:, 0].eq(BEGIN).all()
    assert tokens[0, 3] == UNKNOWN
    assert tokens[1, 1] == tokens[0, 1]
    assert tokens[2].tolist() == [BEGIN, PADDING, PADDING, PADDING]
    known = words.tokenize([" ".join(words.vocabulary[:5])])[0].tolist()
    assert known == [BEGIN, *range(BEGIN + 1, BEGIN + 6)]


def alone(encoder: TextEncoder, text: str) -> TextContext:
    return encoder.encode([text])


@given(st.lists(st.sampled_from([*TEXTS, *CAPTIONS[:9]]), min_size=1, max_size=5))
def test_padding_never_influences_a_text(texts: list[str]) -> None:
    torch.manual_seed(0)
    encoder = WordEncoder.from_captions(CAPTIONS, width=32)
    context, mask = encoder.encode(texts)
    assert mask is not None
    assert context.shape == (len(texts), mask.shape[1], encoder.channels)
    for row, (text, counts) in enumerate(zip(texts, mask, strict=True)):
        n = len(encoder.words(text))
        assert counts.tolist() == [True] * n + [False] * (len(counts) - n)
        assert_close(context[row, :n], alone(encoder, text).context[0], rtol=0, atol=1e-6)


def test_nor_does_it_influence_the_picture(words: WordEncoder) -> None:
    model, x, t = network(), torch.randn(2, 3, 8, 8), torch.tensor([10, 500])
    together = model(x, t, **words.encode([LONG, "a red circle"])._asdict())
    short = model(x[1:], t[1:], **alone(words, "a red circle")._asdict())
    assert_close(together[1:], short, rtol=0, atol=1e-5)
    other = model(x[1:], t[1:], **alone(words, "a blue circle")._asdict())
    assert (short - other).abs().max() > 1e-4


def test_order_and_position_matter(words: WordEncoder) -> None:
    first = words.encode(["a red circle above a blue square"]).context
    second = words.encode(["a blue circle above a red square"]).context
    assert (first[:, 3] - second[:, 3]).abs().max() > 1e-2  # "circle", behind another colour


def test_unknown_words_are_one_blank_token_and_reported(words: WordEncoder) -> None:
    assert words.unknown("a pink circle above a pink Star") == ["pink", "star"]
    (remark,) = words.remarks("a pink circle above a pink Star")
    assert "'pink', 'star'" in remark
    assert words.remarks(LONG) == []
    one, other = words.encode(["a pink circle", "a dotted circle"]).context
    assert_close(one, other, rtol=0, atol=0)
    assert words.embedding.weight[UNKNOWN].abs().max() == 0


def test_the_rarest_words_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion.text.MOST_WORDS", 2)
    encoder = WordEncoder.from_captions(["b a c", "b a d"])
    assert encoder.vocabulary == ("a", "b")
    assert encoder.unknown("a b c") == ["c"]


def test_gradients_reach_every_weight_but_the_blanks(words: WordEncoder) -> None:
    encoder = WordEncoder.from_captions(CAPTIONS, width=32)
    context, mask = encoder.encode([LONG, *CAPTIONS])
    assert mask is not None
    (context[mask] * torch.randn_like(context[mask])).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        if name == "embedding.weight":
            assert parameter.grad[[PADDING, UNKNOWN]].abs().max() == 0
            assert parameter.grad[BEGIN:].abs().amax(dim=1).min() > 0
        elif name != "positions.weight":
            assert parameter.grad.abs().max() > 0, name
    used = len(encoder.words(LONG))
    assert encoder.positions.weight.grad is not None
    assert encoder.positions.weight.grad[:used].abs().amax(dim=1).min() > 0


class TextNetwork(DiffusionUNet):
    """A model with its text encoder, built from what its folder says."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.text = WordEncoder.from_dict(self.info["text"])


def test_a_model_folder_takes_it_along(tmp_path: Path, words: WordEncoder) -> None:
    model = network()
    saved = TextNetwork(model.config, 3, {"text": words.to_dict()})
    saved.save_pretrained(tmp_path)
    loaded = TextNetwork.from_pretrained(tmp_path)
    assert loaded.text.vocabulary == words.vocabulary
    assert_close(loaded.text.encode(TEXTS), saved.text.encode(TEXTS), rtol=0, atol=0)
    assert json.loads(json.dumps(words.to_dict())) == words.to_dict()


def test_a_text_that_is_too_long_is_refused_with_what_does_not_fit(words: WordEncoder) -> None:
    words.encode([" ".join(["red"] * (words.longest - 1))])
    with pytest.raises(InputError, match=r"has 12 words.* reads 10.*'square !'"):
        words.encode(["", f"very {LONG}!"])


DESCRIBED = {"vocabulary": ["a", "b"], "longest": 5, "width": 32, "depth": 1}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"vocabulary": ["a", 1]}, "a vocabulary is a list of words"),
        ({"vocabulary": None}, "a vocabulary is a list of words"),
        ({"vocabulary": []}, "no caption has a word"),
        ({"vocabulary": ["b", "a", "b"]}, "'b' more than once"),
        ({"longest": 0}, "longest=0"),
        ({"longest": MOST_TOKENS + 1}, "longest=257"),
        ({"width": 33}, "width=33 of a text encoder must be a multiple of 32"),
        ({"width": 0}, "width=0"),
        ({"depth": True}, "depth=True"),
        ({"depth": "2"}, "depth='2'"),
        ({"heads": 2}, "described by depth, longest"),
    ],
)
def test_a_damaged_description_is_refused(wrong: dict[str, Any], says: str) -> None:
    WordEncoder.from_dict(DESCRIBED)
    with pytest.raises(InputError, match=says):
        WordEncoder.from_dict(DESCRIBED | wrong)


@pytest.mark.parametrize("values", [None, [], "text", {}])
def test_so_is_no_description(values: Any) -> None:
    with pytest.raises(InputError, match="is described by"):
        WordEncoder.from_dict(values)


@pytest.mark.parametrize(
    ("captions", "says"),
    [
        ([], "no caption has a word"),
        (["", " "], "no caption has a word"),
        (["a", "b " * MOST_TOKENS], r"'b b b b b b b b' \.\.\. has 256 words and signs"),
    ],
)
def test_captions_that_teach_nothing_are_refused(captions: Sequence[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        WordEncoder.from_captions(captions)


# -- CLIP

LETTERS = [chr(c) for c in range(33, 127)]
MERGES = ["r e", "re d</w>", "b l", "u e</w>", "bl ue</w>"]
VOCABULARY = [
    *LETTERS,
    *(letter + "</w>" for letter in LETTERS),
    *("".join(merge.split()) for merge in MERGES),
    *("<|startoftext|>", "<|endoftext|>"),
]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text half of a diffusers pipeline, tiny and random."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("pipeline")
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    index = {word: i for i, word in enumerate(VOCABULARY)}
    tokenizer.joinpath("vocab.json").write_text(json.dumps(index))
    tokenizer.joinpath("merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    settings = {
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "tokenizer_class": "CLIPTokenizer",
    }
    settings |= dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    tokenizer.joinpath("tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=len(VOCABULARY) - 2,
        eos_token_id=len(VOCABULARY) - 1,
        pad_token_id=len(VOCABULARY) - 1,
    )
    transformers.CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="module")
def clip(pipeline: Path) -> ClipText:
    return ClipText.from_pretrained(pipeline)


@pytest.mark.parametrize("masked", [False, True])
def test_clip_is_that_of_transformers(pipeline: Path, masked: bool) -> None:
    """With a mask where the model's config says that it takes one, as diffusers reads it."""
    import transformers

    clip = ClipText.from_pretrained(pipeline)
    clip.model.config.use_attention_mask = masked

    texts = ["a red circle", "", "Blue! " * 60]
    start, end = len(VOCABULARY) - 2, len(VOCABULARY) - 1
    rows = [
        [start, *map(VOCABULARY.index, ("a</w>", "red</w>", *"circl", "e</w>"))],
        [start],
        [start, *[VOCABULARY.index("blue</w>"), VOCABULARY.index("!</w>")] * 38][:76],
    ]
    ids = torch.tensor([row + [end] * (77 - len(row)) for row in rows])
    model = transformers.CLIPTextModel.from_pretrained(pipeline / "text_encoder").eval()
    lengths = torch.tensor([len(row) + 1 for row in rows])
    mask = (torch.arange(77) < lengths[:, None]).long() if masked else None
    found = clip.encode(texts)
    assert found.mask is None
    assert clip.channels == 16
    expected = model(input_ids=ids, attention_mask=mask).last_hidden_state.detach()
    assert_close(found.context, expected)
    assert not found.context.requires_grad
    assert not any(p.requires_grad for p in clip.model.parameters())
    assert_close(found.context[:1], clip.encode(texts[:1]).context)


def test_clip_says_what_it_cuts(clip: ClipText, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    fits = "red " * 75
    assert clip.remarks(fits) == clip.remarks("") == []
    assert clip.cut(fits + "blue a") == "blue a"
    (remark,) = clip.remarks(fits + "blue a")
    assert "77 tokens" in remark
    assert "'blue a'" in remark
    assert len(clip.words(fits + "blue a")) == 77
    assert not caplog.records


def test_clip_names_its_tokens(clip: ClipText) -> None:
    assert clip.words("A red cab") == ["(begin)", "a", "red", "c", "a", "b", "(end)"]
    assert clip.words("") == ["(begin)", "(end)"]


def test_with_either_encoder_the_empty_text_is_one_to_look_at(
    words: WordEncoder, clip: ClipText
) -> None:
    encoders: list[TextEncoder] = [words, clip]
    for encoder in encoders:
        context = encoder.encode([""]).context
        assert context.shape == (1, 1 if encoder is words else 77, encoder.channels)
        assert context.isfinite().all()
        assert encoder.remarks("") == []


def _without(name: str, folder: Path) -> None:
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _with(name: str, text: str, folder: Path) -> None:
    (folder / name).write_text(text)


def _without_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "text_encoder/model.safetensors"
    state: dict[str, Tensor] = load_file(file)
    state.pop(next(key for key in state if key.endswith("final_layer_norm.weight")))
    save_file(state, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: _without("tokenizer", f), "has no tokenizer/"),
        (lambda f: _without("text_encoder", f), "has no text_encoder/"),
        (lambda f: _without("tokenizer/merges.txt", f), r"lacks vocab\.json and merges\.txt"),
        (lambda f: _without("text_encoder/config.json", f), "cannot be read"),
        (lambda f: _without("text_encoder/model.safetensors", f), "cannot be read"),
        (lambda f: _with("text_encoder/model.safetensors", "x", f), "cannot be read"),
        (lambda f: _with("tokenizer/vocab.json", "{", f), "cannot be read"),
        (_without_a_weight, r"do not fit .*final_layer_norm\.weight"),
        (
            lambda f: _with(
                "tokenizer/vocab.json",
                json.dumps({w: i for i, w in enumerate([*VOCABULARY, "more"])}),
                f,
            ),
            "has 196 tokens, but the model beside it knows 195",
        ),
    ],
)
def test_a_damaged_pipeline_is_refused(
    damage: Any, says: str, pipeline: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(pipeline, folder)
    damage(folder)
    with pytest.raises(InputError, match=says) as caught:
        ClipText.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_without_transformers_it_says_what_to_install(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        InputError, match=r"needs transformers.* pip install 'unet-diffusion\[sd\]'"
    ):
        ClipText.from_pretrained(pipeline)
