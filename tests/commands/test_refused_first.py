"""What the options alone tell of is refused before any data are read, which can take minutes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from diffusion.options import DiffusionOptions
from segmentation.options import SegmentationOptions
from unet.files import images
from unet.files.images import write_image
from unet.training.config_file import field_types
from unet_diffusion import (
    crossval_seg,
    eval_ddpm,
    eval_seg,
    export,
    predict_seg,
    sample_ddpm,
    train_classifier,
    train_ddpm,
    train_seg,
    txt2img,
)

Command = Callable[[Sequence[str]], int]
TRAINERS: dict[str, tuple[Command, tuple[str, ...]]] = {
    "train-seg": (train_seg.command, ("--data", "data")),
    "train-seg --unlabelled": (train_seg.command, ("--data", "data", "--unlabelled", "data/image")),
    "train-ddpm": (train_ddpm.command, ("--data", "data/image")),
    "train-classifier": (train_classifier.command, ("--data", "data/image")),
    "crossval-seg": (crossval_seg.command, ("--data", "data")),
}
# What an option that names a path goes with.
BESIDE = {
    "images": ("--masks", "data/label"),
    "masks": ("--images", "data/image"),
    "text_encoder": ("--captions",),
}


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with images, of which none may be opened."""
    monkeypatch.chdir(tmp_path)
    for part in ("image", "label"):
        for i in range(2):
            write_image(Path("data") / part / f"{i}.png", np.zeros((8, 8), np.uint8))

    def read(*_: Any) -> None:
        raise AssertionError("an image is read")

    monkeypatch.setattr(images, "_open", read)


def told(capsys: Any, command: Command, *argv: str) -> str:
    """The sentence that a command ends with."""
    assert command(argv) == 2
    return str(capsys.readouterr().err)


@pytest.mark.parametrize("name", TRAINERS)
def test_an_out_that_is_taken_or_holds_nothing_to_go_on_with(
    name: str, tmp_path: Path, capsys: Any
) -> None:
    command, data = TRAINERS[name]
    for run in ("taken", "used"):
        Path(run).mkdir()
    Path("taken", "config.yaml").touch()
    Path("file").touch()
    assert (
        "holds a run already" in (said := told(capsys, command, *data, "--out", "taken"))
        or "is in use" in said
    )
    for out in ("file", "file/run"):
        assert "file" in told(capsys, command, *data, "--out", out)
    assert "--resume" in told(capsys, command, *data, "--out", "none", "--resume")
    if command is not crossval_seg.command:  # whose folds are locked, each by itself
        with FileLock(Path("used", ".lock")):
            said = told(capsys, command, *data, "--out", "used")
        assert "another process is training in used" in said
    assert not Path("none").exists()
    assert {path.name for path in Path("used").iterdir()} <= {".lock"}


@pytest.mark.parametrize(
    ("name", "kind"), [("train-seg", SegmentationOptions), ("train-ddpm", DiffusionOptions)]
)
def test_every_path_that_is_not_there(name: str, kind: type, capsys: Any) -> None:
    command, data = TRAINERS[name]
    named = [n for n, hint in field_types(kind).items() if "Path" in str(hint) and n != "out"]
    assert len(named) > 2
    for option in [*named, "init"]:
        given = (
            "--out",
            "run",
            f"--{option.replace('_', '-')}",
            "nowhere",
            *BESIDE.get(option, ()),
        )
        source = () if {"images", "masks"} & {option} else data
        assert "nowhere" in told(capsys, command, *source, *given)
    assert not Path("run").exists()


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize(
    ("data", "why"),
    [
        ("https://example.org/x.zip", "an address on the Web, but only local files are read"),
        ("~/nowhere", "only a shell expands ~, so give "),
        ("", "--data is empty, perhaps an unset variable"),
    ],
)
def test_data_that_are_not_here_for_a_reason(name: str, data: str, why: str, capsys: Any) -> None:
    assert why in told(capsys, TRAINERS[name][0], "--data", data, "--out", "run")
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("train-seg", "--network nope", "no preset"),
        ("train-seg", "--regions nope", "nope"),
        ("train-seg --unlabelled", "--network nope", "choose one of"),
        ("train-ddpm", "--network nope", "no preset"),
        ("train-ddpm", "--condition nowhere", "neither a folder nor"),
        ("train-ddpm", "--condition lowres:x", "lowres:4"),
        ("train-ddpm", "--levels uniform --log-sigma 0 1", "--log-sigma"),
        ("train-ddpm", "--noise flow --prediction eps", "eps-prediction is undefined"),
        ("train-ddpm", "--captions --text-encoder data", "no tokenizer/"),
        ("train-ddpm", "--init data", "data"),
        ("train-ddpm", "--init data --captions --prior shapes", "needs captions that CLIP reads"),
    ],
)
def test_options_that_cannot_be(name: str, given: str, said: str, capsys: Any) -> None:
    command, data = TRAINERS[name]
    assert said in told(capsys, command, *data, "--out", "run", *given.split())
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("command", "given"),
    [
        (predict_seg.command, "--model m --out o --input nowhere"),
        (eval_seg.command, "--model m --out o --images data/image --masks nowhere"),
        (export.command, "o --model m --to onnx --int8 data/image/0.png nowhere"),
        (eval_ddpm.command, "--model m --data nowhere"),
        (eval_ddpm.command, "--model m --data data --condition nowhere"),
        (sample_ddpm.command, "--model m --out o --condition nowhere"),
        (sample_ddpm.command, "--model m --out o --inpaint data/image/0.png --mask nowhere"),
        (txt2img.command, "--model m --out o --prompt x --init nowhere"),
    ],
)
def test_inputs_before_the_model_is_read(command: Command, given: str, capsys: Any) -> None:
    assert "'nowhere': no such file" in told(capsys, command, *given.split())
