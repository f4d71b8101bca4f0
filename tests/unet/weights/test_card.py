"""The card of a model folder: what the Hub reads of it, and who may replace it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.judging.classifier import ClassifierUNet
from diffusion.model import DiffusionUNet
from diffusion.text import WordEncoder
from segmentation.model import SegmentationUNet
from unet import UNetConfig
from unet.weights.card import Usage, is_ours, model_card
from unet.weights.folder import FolderModel

PLAIN = UNetConfig(channels=4, multipliers=(1, 2))
TIMED = UNetConfig(channels=4, multipliers=(1,), block="res", time=True, norm="none")
SEGMENTATION = {
    "classes": {"values": [0, 255], "shares": [0.2, 0.8], "ignore_value": None, "ignored_share": 0},
    "normalisation": {"mean": [128.0], "std": [40.0], "dtype": "uint8"},
    "threshold": 0.5,
}
DIFFUSION = {"size": [8, 12], "classes": ["cat", "dog"], "prediction": "v"}
TRAINING = {
    "data": ["24 images for training, 6 held out", "grey, uint8, 512 x 512"],
    "run": ["1,000 steps in 3 minutes"],
    "figures": {"dice": 0.98765, "v_rand": 0.97},
}


def parts(text: str) -> dict[str, str]:
    """The sections of a card by their titles."""
    pieces = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def test_the_card_of_a_segmentation(tmp_path: Path) -> None:
    SegmentationUNet(PLAIN, 1, SEGMENTATION | {"training": TRAINING}).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {
        "library_name": "unet-diffusion",
        "pipeline_tag": "image-segmentation",
        "tags": ["u-net", "pytorch", "segmentation"],
    }
    assert "\n# license: yours to choose" in (tmp_path / "README.md").read_text(encoding="utf-8")
    found = parts(card.text)
    assert list(found) == ["Use", "Model", "Training", "Licence"]
    assert 'model = load("path/of/this/folder")\nmask = model(' in found["Use"]
    assert "unet-predict-seg --model path/of/this/folder --input" in found["Use"]
    assert r"| Images | grey (1 channel), uint8, as stored" in found["Model"]
    assert r"0 (class 0), 255 (class 1)" in found["Model"]
    assert "1,677 weights, levels of 4, 8 channels" in found["Model"]
    assert "- 24 images for training, 6 held out\n" in found["Training"]
    assert "| dice | 0.9877 |" in found["Training"]
    assert r"| v\_rand | 0.97 |" in found["Training"]


def test_the_cards_of_diffusion_models_and_classifiers() -> None:
    card = ModelCard(DiffusionUNet(TIMED, 1, DIFFUSION).card("someone/pets"))
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert 'load("someone/pets")\nimages = sampler(16, seed=0)' in card.text
    assert "unet-sample-ddpm --model someone/pets --out samples\n" in card.text
    assert "| Classes | cat, dog |" in card.text
    assert "8 x 12 pixels, uint8, 1 channel" in card.text
    assert "was not saved with it" in parts(card.text)["Training"]
    text = WordEncoder(["cat"], 3, width=32, depth=1).to_dict()
    config = UNetConfig(
        channels=4,
        multipliers=(1,),
        block="res",
        time=True,
        norm="none",
        attention="transformer",
        attention_levels=(0,),
        context_channels=32,
        groups=4,
    )
    card = ModelCard(DiffusionUNet(config, 1, DIFFUSION | {"text": text}).card())
    assert card.data.pipeline_tag == "text-to-image"
    assert 'prompts="a text"' in card.text
    assert '--prompt "a text"' in card.text
    card = ModelCard(ClassifierUNet(PLAIN, 2, {"classes": ["a", "b"], "size": [8, 8]}).card())
    assert card.data.pipeline_tag == "image-classification"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(
    ["classes", "normalisation", "training", "size", "schedule", "prediction", "autoencoder"]
)


@settings(max_examples=100)
@given(st.dictionaries(KEYS, JSON), JSON, st.text() | st.integers())
@pytest.mark.parametrize("kind", [SegmentationUNet, DiffusionUNet, ClassifierUNet])
def test_whatever_a_config_holds_a_card_keeps_its_form(
    kind: type[FolderModel], info: dict[str, Any], figures: Any, line: Any
) -> None:
    held = {"data": [line, "---\n# x\n```"], "run": figures, "figures": figures}
    model = kind(TIMED if kind is DiffusionUNet else PLAIN, 2)
    for training in (info.get("training"), held):
        model.info = info | {"training": training}
        card = ModelCard(model.card())
        assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
        assert list(parts(card.text)) == ["Use", "Model", "Training", "Licence"]
        assert card.text.count("```") == 4
        for row in re.findall(r"^\|.*$", card.text, re.MULTILINE):
            assert len(re.findall(r"(?<!\\)\|", row)) == 3


def test_markdown_and_html_in_values_are_shown_as_they_are() -> None:
    usage = Usage(
        title="T",
        summary="S",
        pipeline_tag="image-segmentation",
        tags=(),
        python="p",
        commands=("c",),
        facts={"Classes": "a|b\n---\n<img src=x> [x](y) `z` \u202e" + "x" * 10_000},
    )
    card = model_card(usage, "n", {"figures": {"huge": 10**400, "no": True, "nan": float("nan")}})
    assert r"| Classes | a\|b --- \<img src=x\> \[x\](y) \`z\` xxx" in card
    assert len(card) < 3000
    assert "| nan | nan |" in card
    assert "huge" not in card


def test_a_card_is_replaced_until_somebody_edits_it(tmp_path: Path) -> None:
    model, file = SegmentationUNet(PLAIN, 1, SEGMENTATION), tmp_path / "README.md"
    model.save_pretrained(tmp_path)
    model.info["training"] = TRAINING
    model.save_pretrained(tmp_path)
    assert "0.9877" in file.read_text(encoding="utf-8")
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))  # as on Windows
    assert is_ours(file)
    edited = file.read_text(encoding="utf-8").replace("# license: yours to", "license: mit # to")
    file.write_text(edited, encoding="utf-8")
    model.info["training"] = None
    model.save_pretrained(tmp_path)
    assert file.read_text(encoding="utf-8") == edited
    assert json.loads((tmp_path / "config.json").read_text())["info"]["training"] is None


@pytest.mark.parametrize("found", [b"", b"# My cells\n", b"\xff\xfe", None], ids=range(4))
def test_what_else_is_there_stays(tmp_path: Path, found: bytes | None) -> None:
    file = tmp_path / "README.md"
    if found is None:
        file.mkdir()
    else:
        file.write_bytes(found)
    SegmentationUNet(PLAIN, 1, SEGMENTATION).save_pretrained(tmp_path)
    assert file.is_dir() if found is None else file.read_bytes() == found
