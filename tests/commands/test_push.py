"""--push-to-hub: who may not is told before training, and what was trained goes to the Hub.

The Hub is the stand-in of tests/unet/weights/hub.py, in this process.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
from huggingface_hub import HfApi
from PIL import Image

from diffusion.options import DiffusionOptions
from segmentation.data.phantom import phantom_stack
from segmentation.options import SegmentationOptions
from tests.unet.weights.hub import READ_ONLY, TOKEN, Hub, running_hub
from unet.errors import InputError
from unet.files.images import write_image
from unet.training.plan import plan_fit
from unet.training.run import run_folder
from unet_diffusion import crossval_seg, train_classifier, train_ddpm, train_seg
from unet_diffusion.pretraining import teacher_part

pytestmark = pytest.mark.usefixtures("short_runs")

TINY = ("--width", 8, "--batch-size", 4, "--evaluations", 1, "--steps", 1, "--device", "cpu")
FILES = ["README.md", "config.json", "model.safetensors"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with running_hub() as running:
        for name, value in {
            "ENDPOINT": running.address,
            "HUGGINGFACE_CO_URL_TEMPLATE": (
                running.address + "/{repo_id}/resolve/{revision}/{filename}"
            ),
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": True,
            "HF_TOKEN_PATH": str(tmp_path / "no token"),
        }.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        yield running


@pytest.fixture
def images(tmp_path: Path) -> Path:
    file = tmp_path / "images.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
    np.savez(file, images=pixels, labels=np.arange(12) % 2)
    return file


def labelled(folder: Path) -> Path:
    stack = zip(*phantom_stack(4, (40, 56), seed=1), strict=True)
    for i, (image, label) in enumerate(stack):
        write_image(folder / f"data/image/{i}.png", image)
        write_image(folder / f"data/label/{i}.png", label)
    return folder / "data"


def draw_samples(run: Path, *drawn: Any) -> Path:
    Image.new("L", (8, 8)).save(drawn[4])  # the picture alone: the rest takes seconds
    return run / "report.png"


def train(module: Any, *arguments: object) -> int:
    found: int = module.command(list(map(str, arguments)))
    return found


def test_a_diffusion_model_goes_up_with_its_samples(
    hub: Hub, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("diffusion.training.write_report", draw_samples)
    given = (*TINY, "--data", images, "--out", tmp_path / "run", "--push-to-hub", "someone/discs")
    assert train(train_ddpm, *given) == 0
    assert hub.commits["someone/discs"] == [[*FILES, "samples.png"]]
    held = hub.files["someone/discs"]
    for name in (*FILES, "samples.png"):
        assert held[name] == (tmp_path / "run/model" / name).read_bytes()
    card = held["README.md"].decode()
    assert "\n\n![Samples](samples.png)\n\n## Use\n" in card
    assert 'load("someone/discs")' in card
    assert f"uploaded: {hub.address}/someone/discs/commit/" in capsys.readouterr().out


def test_a_segmentation_goes_up_without_a_picture_and_later_where_the_hub_was_away(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    given = ("--data", labelled(tmp_path), "--crop", 32, "--out", tmp_path / "run", *TINY)
    away = [True]
    upload = HfApi.upload_folder

    def upload_folder(*args: Any, **options: Any) -> Any:
        if away.pop():
            raise ConnectionError("it went away")
        return upload(*args, **options)

    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    assert train(train_seg, *given, "--push-to-hub", "someone/cells") == 1
    told = capsys.readouterr().err
    assert told.count("error:") == 1
    assert f"its model is in {tmp_path / 'run/model'}, but the Hub does not take" in told
    assert "it cannot be reached (it went away); the same command with --resume uploads" in told
    away.append(False)
    weights = (tmp_path / "run/model/model.safetensors").read_bytes()
    assert train(train_seg, "--out", tmp_path / "run", "--resume") == 0
    assert hub.commits["someone/cells"] == [FILES]
    assert hub.files["someone/cells"]["model.safetensors"] == weights
    away.append(False)
    again = ("--resume", "--push-to-hub", "someone/again")
    assert train(train_seg, "--out", tmp_path / "run", *again) == 0
    assert hub.commits["someone/again"] == [FILES]
    assert "continuing with --push-to-hub someone/again" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("token", "repository", "told"),
    [
        (TOKEN, "other/known", "your token has no right to write there"),
        (TOKEN, "other/new", "your token has no right to write there"),
        (READ_ONLY, "someone/known", "your token has no right to write there"),
        ("", "someone/known", "it knows no valid token of yours; log in with `hf auth login` or"),
        (TOKEN, "a b", "Repo id must use alphanumeric chars"),
    ],
)
def test_who_may_not_write_is_told_before_training(
    hub: Hub,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    token: str,
    repository: str,
    told: str,
) -> None:
    for known in ("other/known", "someone/known"):  # which everybody may read
        hub.files[known], hub.commits[known] = {}, []
    monkeypatch.setenv("HF_TOKEN", token)
    run = tmp_path / "run"
    given = ("--data", images, "--out", run, "--push-to-hub", repository)
    trainer = train_classifier if repository == "a b" else train_ddpm
    assert train(trainer, *TINY, *given) == 2
    error = capsys.readouterr().err
    assert f"error: the Hub does not take the model for {repository}: " in error
    assert told in error
    assert error.count("\n") == 1
    assert not run.exists()
    assert not any(hub.commits.values())


def test_a_run_of_three_parts_asks_before_the_first_and_uploads_the_last(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("HF_TOKEN", READ_ONLY)
    data, run = labelled(tmp_path), tmp_path / "run"
    given = ("--data", data, "--unlabelled", data / "image", "--crop", 32, "--out", run, *TINY)
    assert train(train_seg, *given, "--push-to-hub", "someone/cells") == 2
    assert "your token has no right to write there" in capsys.readouterr().err
    assert not run.exists()
    options = SegmentationOptions(data="x", out=run, push_to_hub="someone/cells")
    assert teacher_part(options, "y").push_to_hub is None


def test_one_of_several_processes_speaks_with_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = DiffusionOptions(data="x", out=tmp_path / "run", push_to_hub="someone/shared")
    monkeypatch.setenv("RANK", "1")
    with run_folder(plan_fit(options)):
        assert not hub.files
    monkeypatch.setenv("RANK", "0")
    with run_folder(plan_fit(options)):
        assert list(hub.files) == ["someone/shared"]


def test_what_has_no_whole_model_of_its_own_is_refused(tmp_path: Path) -> None:
    given: dict[str, Any] = {"out": tmp_path, "data": "x", "push_to_hub": "someone/thing"}
    for more in (
        {"trained": "lora", "init": "y"},
        {"latents": Path("y")},
        {"captions": True, "text_encoder": Path("y")},
    ):
        with pytest.raises(InputError, match="whole by themselves, and one of --"):
            DiffusionOptions(**given, **more)
    with pytest.raises(InputError, match="--push-to-hub does not go with a cross-validation"):
        crossval_seg.CrossvalOptions(**given)
