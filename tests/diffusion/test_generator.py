"""A trained model that is called: the images of the command, what is asked for, refusals."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion import ImageGenerator, load
from diffusion.model import DiffusionUNet
from diffusion.process.schedule import NoiseSchedule
from diffusion.text import WordEncoder
from unet import PRESETS, InputError
from unet_diffusion import sample_ddpm
from unet_diffusion.sample_ddpm import SampleOptions

SMALL = {"in_channels": 1, "channels": 8, "multipliers": (1, 2), "attention_levels": ()}
WORDS = WordEncoder(["a", "red", "circle"], 4, width=32, depth=1)
CAPTIONED = {"attention": "transformer", "context_channels": 32, "attention_levels": (1,)}


def build(kind: str) -> DiffusionUNet:
    torch.manual_seed(0)
    classes = ["cat", "dog"] if kind == "classes" else []
    schedule = NoiseSchedule(kind="cosine", steps=50)
    info = {"schedule": schedule.to_dict(), "prediction": "v", "size": [8, 12], "classes": classes}
    values: dict[str, Any] = {**SMALL, "head_channels": None, "groups": 4}
    if classes:
        values["classes"] = len(classes) + 1
    if kind == "captions":
        values |= CAPTIONED
        info["text"] = WORDS.to_dict()
    model = DiffusionUNet(replace(PRESETS["diffusion"].config, **values), 1, info)
    for parameter in model.parameters():  # the head starts at zero
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for kind in ("plain", "classes", "captions"):
        found[kind] = tmp_path_factory.mktemp(kind) / "model"
        build(kind).save_pretrained(found[kind])
    return found


@pytest.fixture(scope="module")
def generators(folders: dict[str, Path]) -> dict[str, ImageGenerator]:
    return {kind: load(folder, device="cpu") for kind, folder in folders.items()}


@pytest.mark.parametrize(
    ("kind", "command", "call"),
    [
        ("plain", {}, {}),
        ("plain", {"sampler": "ddim", "eta": 0.5, "batch_size": 2}, {}),
        ("classes", {}, {}),
        ("classes", {"guidance": 2.0, "class_": ("dog",)}, {"classes": "dog"}),
        ("classes", {"first": 1, "class_": ("dog", "cat")}, {"classes": [1, "cat"]}),
        ("captions", {"prompt": ("a red circle",)}, {"prompts": "a red circle"}),
        (
            "captions",
            {"prompt": ("red", "a circle"), "guidance": 3.0, "negative": "a"},
            {"prompts": ["red", "a circle"]},
        ),
    ],
    ids=range(7),
)
def test_a_call_gives_what_the_command_writes(
    folders: dict[str, Path],
    generators: dict[str, ImageGenerator],
    tmp_path: Path,
    kind: str,
    command: dict[str, Any],
    call: dict[str, Any],
) -> None:
    options = SampleOptions(
        model=str(folders[kind]),
        out=tmp_path / "out",
        count=3,
        seed=4,
        npz=True,
        device="cpu",
        **({"steps": 3} | command),
    )
    sample_ddpm.main(options)
    with np.load(tmp_path / "out" / "samples.npz") as written:
        wanted = written["images"]
    settings = {k: v for k, v in command.items() if k not in ("class_", "prompt")}
    images = generators[kind](3, seed=4, steps=3, **settings, **call)
    assert images.shape == (3, 8, 12, 1)
    assert images.dtype == np.uint8
    assert np.array_equal(images, wanted)


def test_defaults_are_those_of_the_command(generators: dict[str, ImageGenerator]) -> None:
    generator = generators["plain"]
    assert np.array_equal(generator(2), generator(2, seed=0, steps=20, sampler="dpmpp-2m-sde"))


def test_how_many_images(generators: dict[str, ImageGenerator]) -> None:
    assert len(generators["plain"](steps=1)) == 1
    assert len(generators["captions"](prompts=["red", "a"], steps=1)) == 2
    by_index = generators["classes"](classes=np.array([1, 0]), steps=2)
    assert np.array_equal(by_index, generators["classes"](classes=["dog", "cat"], steps=2))
    any_class = generators["classes"](2, classes=[None], steps=2)
    assert not np.array_equal(any_class, generators["classes"](2, classes="dog", steps=2))


def test_what_a_model_says_of_itself(generators: dict[str, ImageGenerator]) -> None:
    found = generators["classes"]
    assert (found.size, found.channels, found.classes) == ((8, 12), 1, ("cat", "dog"))
    assert generators["captions"].reads_prompts
    assert not found.reads_prompts
    assert repr(found) == (
        "ImageGenerator(8 x 12, channels=1, classes=('cat', 'dog'), reads_prompts=False)"
    )


def test_a_word_that_the_model_does_not_know_is_a_warning(
    generators: dict[str, ImageGenerator],
) -> None:
    with pytest.warns(UserWarning, match="was trained without 'blue'"):
        generators["captions"](prompts="a blue circle", steps=1)


@pytest.mark.parametrize(
    ("kind", "call", "told"),
    [
        ("plain", {"count": 0}, "count=0 must be at least 1"),
        ("plain", {"count": 2.5}, "count=2.5 must be a whole number"),
        ("plain", {"steps": 0}, "steps=0 must be at least 1"),
        ("plain", {"steps": 51}, "51 sampling steps are asked for"),
        ("plain", {"seed": -1}, "seed=-1"),
        ("plain", {"seed": 2**40}, "^seed 1099511627776 must be from 0"),
        ("plain", {"batch_size": 0}, "batch_size=0"),
        (
            "plain",
            {"guidance": 2.0},
            "^guidance 2.0 needs a model that knows classes, captions or a condition",
        ),
        ("plain", {"sampler": "plms"}, "sampler 'plms' is unknown; choose one of ddpm"),
        ("plain", {"classes": "cat"}, "class 'cat' is none of the model's, which was trained with"),
        ("plain", {"pictures": np.zeros((8, 8, 3))}, "^pictures are paths of image files, not the"),
        ("plain", {"prompts": "red"}, "^a prompt needs a model that was trained with --captions"),
        ("plain", {"stepz": 3}, "'stepz' is no setting of a call: choose from count"),
        ("plain", {"device": "cpu"}, "'device' is no setting of a call.* given to load"),
        ("plain", {"eta": 0.5}, "^eta 0.5 is for sampler ddim, not dpmpp-2m-sde"),
        ("classes", {"classes": "cow"}, "class 'cow' is none of the model's, which knows cat, dog"),
        ("classes", {"classes": 2}, "class 2 is none of the model's"),
        ("classes", {"classes": 1.0}, "class 1.0 is none of the model's"),
        (
            "classes",
            {"classes": [0, 1, 0], "count": 2},
            "3 classes, prompts or pictures are given for 2",
        ),
        ("classes", {"negative": "cat", "guidance": 2.0}, "^negative 'cat' needs a model"),
        ("captions", {"negative": "red"}, "^negative does nothing without guidance above 1"),
        ("captions", {"prompts": "a a a a a"}, "has 5 words and signs, but this model reads 3"),
        ("captions", {"prompts": [1]}, r"prompts are texts, not \[1\]"),
    ],
)
def test_a_mistake_is_one_sentence(
    generators: dict[str, ImageGenerator], kind: str, call: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        generators[kind](**call)


def test_weights_of_any_precision_and_other_processes_make_the_same(
    generators: dict[str, ImageGenerator],
) -> None:
    generator = generators["classes"]
    wanted = generator(2, steps=2)
    assert np.array_equal(pickle.loads(pickle.dumps(generator))(2, steps=2), wanted)
    for dtype in (torch.float64, torch.bfloat16):
        found = ImageGenerator(copy.deepcopy(generator.model).to(dtype))(2, steps=2)
        assert np.abs(found.astype(int) - wanted).mean() < 1


def test_loading_refuses_what_is_no_diffusion_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder: give a model folder"):
        load(tmp_path / "none")
    for wrong, kind in ((None, "NoneType"), ([tmp_path, tmp_path], "list")):
        with pytest.raises(InputError, match=f"by the path of its folder, not by a {kind}"):
            load(wrong)  # type: ignore[arg-type]
    model = build("plain")
    del model.info["schedule"]
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no 'schedule' in its info"):
        load(tmp_path)
