"""A model folder gives the same model again, and a damaged or foreign one is refused."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import unet.weights.folder
from diffusion.model import DiffusionUNet
from segmentation.model import SegmentationUNet
from unet.config import UNetConfig
from unet.errors import InputError
from unet.weights.folder import FolderModel
from unet.weights.start import read_start

PLAIN = UNetConfig(channels=4, multipliers=(1, 2))
TIMED = UNetConfig(channels=4, multipliers=(1, 2), block="res", time=True, norm="none")
INFO = {"mean": [0.5], "values": [0, 255], "note": "ä", "nested": {"a": None}}


def segmentation() -> SegmentationUNet:
    model = SegmentationUNet(PLAIN, 3, INFO)
    model(torch.randn(2, 1, 8, 8))  # the running statistics differ from the initial ones
    return model


def diffusion() -> DiffusionUNet:
    return DiffusionUNet(TIMED, 1, INFO)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    segmentation().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# --- there and back -----------------------------------------------------------------------------


@pytest.mark.parametrize("build", [segmentation, diffusion])
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model,
        lambda model: model.to(memory_format=torch.channels_last),
        lambda model: model.bfloat16(),
    ],
    ids=["float32", "channels_last", "bfloat16"],
)
def test_the_same_model_comes_back(
    build: Callable[[], FolderModel],
    change: Callable[[FolderModel], FolderModel],
    tmp_path: Path,
) -> None:
    model = change(build())
    model.save_pretrained(tmp_path / "run" / "model")
    loaded = type(model).from_pretrained(tmp_path / "run" / "model")
    assert (loaded.config, loaded.out_channels, loaded.info) == (
        model.config,
        model.out_channels,
        INFO,
    )
    assert not loaded.training
    for (key, v), (loaded_key, w) in zip(
        model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert (key, v.dtype, v.device) == (loaded_key, w.dtype, w.device)
        assert torch.equal(v, w), key
    assert all(p.requires_grad for p in loaded.parameters())
    assert sorted(f.name for f in (tmp_path / "run" / "model").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_weights_are_stored_row_by_row(folder: Path) -> None:
    first = load_file(folder / "model.safetensors")
    model = SegmentationUNet.from_pretrained(folder)
    model.to(memory_format=torch.channels_last).save_pretrained(folder)
    assert all(torch.equal(v, first[k]) for k, v in load_file(folder / "model.safetensors").items())


def test_a_loaded_model_can_be_trained_on(folder: Path) -> None:
    model = SegmentationUNet.from_pretrained(folder).train()
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_failed_save_leaves_the_previous_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {f.name: f.read_bytes() for f in folder.iterdir()}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unet.weights.folder, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        segmentation().save_pretrained(folder)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


def test_info_that_json_cannot_hold_is_refused_before_anything_is_written(folder: Path) -> None:
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    model = segmentation()
    model.info["mean"] = torch.zeros(1)
    with pytest.raises(InputError, match=r"cannot be saved \(.*Tensor.*\): let it hold numbers"):
        model.save_pretrained(folder)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing: a model folder holds"):
        SegmentationUNet.from_pretrained(folder)


def test_folders_around_models_are_told(tmp_path: Path) -> None:
    segmentation().save_pretrained(tmp_path / "run/model")
    with pytest.raises(InputError, match=r"run is .* the folder of a run: give .*run.model$"):
        SegmentationUNet.from_pretrained(tmp_path / "run")
    (tmp_path / "model_index.json").touch()
    with pytest.raises(InputError, match="a pipeline of diffusers: txt2img makes pictures"):
        SegmentationUNet.from_pretrained(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="by the path of its folder, not by a list: of several"):
        SegmentationUNet.from_pretrained([folder, folder])
    with pytest.raises(InputError, match="nothing is no folder: give a model folder"):
        SegmentationUNet.from_pretrained(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is no folder"):
        SegmentationUNet.from_pretrained(tmp_path / "file")


def test_a_model_of_another_task(folder: Path) -> None:
    with pytest.raises(InputError, match="for segmentation, but diffusion is asked for"):
        DiffusionUNet.from_pretrained(folder)


def test_weights_that_do_not_fit_the_config(folder: Path) -> None:
    edit(folder, unet=PLAIN.to_dict() | {"conv_bias": True})
    with pytest.raises(InputError, match=r"model.safetensors .* lacks trunk\S+conv1.bias \(8,\)"):
        SegmentationUNet.from_pretrained(folder)
    edit(folder, unet=UNetConfig(channels=8, multipliers=(1, 2)).to_dict())
    with pytest.raises(
        InputError, match=r"conv1.weight with shape \(8, 4, 3, 3\) instead of \(16, 8,"
    ):
        SegmentationUNet.from_pretrained(folder)
    edit(folder, unet=PLAIN.to_dict() | {"multipliers": [1, 2, 4]})
    with pytest.raises(InputError, match="does not fit the model: it lacks"):
        SegmentationUNet.from_pretrained(folder)


def test_superfluous_weights_are_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"extra": torch.zeros(2)}, file)
    with pytest.raises(InputError, match=r"has an unknown extra \(2,\)"):
        SegmentationUNet.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 5000, -1])
def test_truncated_weights(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"model.safetensors cannot be read as safetensors"):
        SegmentationUNet.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_weights_that_are_no_numbers_to_train(folder: Path, dtype: torch.dtype) -> None:
    file = folder / "model.safetensors"
    save_file({k: v.to(dtype) for k, v in load_file(file).items()}, file)
    with pytest.raises(InputError, match=f"conv1.weight of type {dtype} instead of torch.float32"):
        SegmentationUNet.from_pretrained(folder)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"task": "segmentation"}', "[" * 100_000, "\x00", '{"task": 1}'],
    ids=range(8),
)
def test_a_config_that_is_none(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config.json (cannot be read as JSON|lacks a valid)"):
        SegmentationUNet.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet": {"depth": 4}}, "no field 'depth'"),
        ({"unet": {"channels": "4"}}, "channels='4'"),
        ({"unet": {"channels": [4]}}, r"channels=\(4,\)"),
        ({"unet": {"multipliers": [[1]]}}, "multipliers="),
        ({"out_channels": 0}, "out_channels=0 must be from 1"),
        ({"out_channels": "1"}, "lacks a valid 'out_channels'"),
        ({"out_channels": True}, "lacks a valid 'out_channels'"),
        ({"info": None}, "lacks a valid 'info'"),
        ({"task": "poetry"}, "for poetry, but segmentation is asked for"),
    ],
)
def test_a_config_with_wrong_values(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit(folder, **changes)
    with pytest.raises(InputError, match=message):
        SegmentationUNet.from_pretrained(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"unet": {"channels": 10**18}},
        {"unet": {"channels": 10**5, "multipliers": [1, 2, 4, 8]}},
        {"unet": {"multipliers": [1] * 100_000}},
        {"unet": {"blocks": 10**9}},
        {"unet": {"block": "res", "classes": 10**6, "channels": 100_000, "multipliers": [1]}},
        {
            "unet": {
                "attention": "transformer",
                "middle_attention": True,
                "transformer_depth": 10**7,
            }
        },
        {"out_channels": 10**18},
    ],
    ids=range(7),
)
def test_huge_declared_shapes_are_refused_at_once(folder: Path, changes: dict[str, Any]) -> None:
    edit(folder, **changes)
    start = time.monotonic()
    with pytest.raises(InputError):
        SegmentationUNet.from_pretrained(folder)
    assert time.monotonic() - start < 5  # and the machine has no memory for them


def test_the_largest_allowed_shapes_are_never_allocated(folder: Path) -> None:
    edit(folder, unet=UNetConfig(channels=2**19, multipliers=(1, 2)).to_dict())  # 10^14 weights
    with pytest.raises(InputError, match="does not fit the model"):
        SegmentationUNet.from_pretrained(folder)


# --- the Hub ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*args: Any, **options: Any) -> None:
        raise OSError("no connection")

    monkeypatch.setattr(unet.weights.folder, "get_hf_file_metadata", ask)


def test_a_repository_that_was_fetched_before_needs_no_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def download(repo_id: str, name: str, **options: Any) -> str:
        asked.append((repo_id, name, options))
        return str(folder / name)

    monkeypatch.setattr(unet.weights.folder, "hf_hub_download", download)
    model = SegmentationUNet.from_pretrained("someone/cells", revision="v1")
    assert model.config == PLAIN
    options = {"revision": "v1", "local_files_only": True}
    assert asked == [("someone/cells", n, options) for n in ("config.json", "model.safetensors")]
    note = "note: someone/cells is no folder here: it is looked up on the Hugging Face Hub\n"
    assert capsys.readouterr().err == note


@pytest.mark.parametrize("size", [2**40, None])
def test_a_file_on_the_hub_has_a_limit(monkeypatch: pytest.MonkeyPatch, size: int | None) -> None:
    monkeypatch.setattr(
        unet.weights.folder, "get_hf_file_metadata", lambda *a, **k: SimpleNamespace(size=size)
    )
    monkeypatch.setattr(
        unet.weights.folder, "hf_hub_download", lambda *a, **k: pytest.fail("fetched it")
    )
    with pytest.raises(InputError, match=r"config.json of someone/cells has .* bytes on the Hub"):
        SegmentationUNet.from_pretrained("someone/cells")


def test_a_hub_that_cannot_be_reached_is_asked_once(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"no such model \(it cannot be reached: no connection\): g"
    ):
        SegmentationUNet.from_pretrained("someone/cells", cache_dir=tmp_path)


def test_a_mistyped_path_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/mine").mkdir(parents=True)
    monkeypatch.setattr(
        "unet.weights.folder._download", lambda *a, **k: pytest.fail("asked the Hub")
    )
    there = {"runs": "the folder mine", "runs/mine": "no folder", ".": "the folder runs"}
    for path, place in {"runs/x": "runs", "runs/mine/model": "runs/mine", "./model": "."}.items():
        said = rf"is no folder: .* RUN/model; '{place}' holds {there[place]}$"
        for read in (SegmentationUNet.from_pretrained, read_start):
            with pytest.raises(InputError, match=said):
                read(path)
