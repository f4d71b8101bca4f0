"""The two lives meet: a model of one task starts the training of the other, with no other flag."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage import measure

import diffusion.training
import segmentation.training
import unet_diffusion.pretraining
from diffusion.data.pixels import ValueRange, as_levels, as_tensor, to_unit
from diffusion.initial import find_start
from diffusion.model import DiffusionUNet
from diffusion.options import DiffusionOptions
from diffusion.process.denoiser import Denoiser
from diffusion.process.schedule import NoiseSchedule
from segmentation.data.normalisation import Normalisation
from segmentation.data.phantom import phantom_stack
from segmentation.model import SegmentationUNet
from segmentation.options import SegmentationOptions
from unet import UNet, UNetConfig
from unet.errors import RunError
from unet.files.images import read_mask, write_image
from unet.training.cli import run_script
from unet.weights.folder import CONFIG as CONFIG_FILE
from unet.weights.folder import WEIGHTS, FolderModel, start_folder
from unet_diffusion import describe, eval_seg, train_ddpm, train_seg
from unet_diffusion.pretraining import without_number
from unet_diffusion.starting import TIMESTEP, segmentation_start

pytestmark = pytest.mark.usefixtures("short_runs")

SCHEDULE = NoiseSchedule(kind="linear", steps=200)
CONFIG = UNetConfig(
    channels=8,
    multipliers=(1, 2),
    block="res",
    norm="group",
    groups=4,
    time=True,
    scale_shift=True,
    middle_attention=True,
)
STEM = "trunk.encoder.0.stem.conv"
GREY = Normalisation((127.5,), (60.0,), "uint8").to_dict()
SHORT = ("--steps", 1, "--lr", 1e-12, "--ema", 0, "--weight-decay", 0, "--batch-size", 2)


def run(module: Any, options: Any, *arguments: object) -> int:
    return run_script(module.main, options, list(map(str, arguments)))


def run_seg(*arguments: object) -> int:
    return run(train_seg, SegmentationOptions, *arguments)


def run_ddpm(*arguments: object) -> int:
    return run(train_ddpm, DiffusionOptions, *arguments)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for i, (image, label) in enumerate(zip(*phantom_stack(4, (40, 48), seed=0), strict=True)):
        write_image(folder / "image" / f"{i}.png", image)
        write_image(folder / "label" / f"{i}.png", label)
    return folder


def diffusion_model(folder: Path, **values: Any) -> DiffusionUNet:
    """A model folder of random weights."""
    torch.manual_seed(0)
    info = {"schedule": SCHEDULE.to_dict(), "prediction": "v", "size": [40, 48], "classes": []}
    config = UNetConfig(**{**vars(CONFIG), **values.pop("config", {})})
    model = DiffusionUNet(config, config.in_channels, info | values)
    model.save_pretrained(folder)
    return model.eval()


def test_a_diffusion_model_starts_a_segmentation(data: Path, tmp_path: Path, capsys) -> None:
    """The features of an image are those that the diffusion model has of it at that timestep."""
    teacher = diffusion_model(tmp_path / "model")
    given = ("--data", data, "--init", tmp_path / "model", "--out", tmp_path / "run")
    assert run_seg(*given, *SHORT) == 0
    told = capsys.readouterr().out
    t = round(TIMESTEP * 199)
    assert (
        f"started with trunk, head.norm of {tmp_path / 'model'}, as it is at timestep {t}" in told
    )
    assert "newly initialised: head.conv" in told
    student = SegmentationUNet.from_pretrained(tmp_path / "run/model")
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 1), np.uint8)
    seen = Normalisation.from_dict(student.info["normalisation"])(pixels)
    shown = to_unit(torch.from_numpy(pixels)).permute(2, 0, 1) * SCHEDULE.level(t).signal
    assert np.allclose(seen, shown, atol=1e-6)
    with torch.no_grad():
        found = student.trunk(torch.from_numpy(seen)[None])
        assert torch.allclose(found, teacher.trunk(shown[None], torch.tensor([t])), atol=1e-5)


def test_a_model_on_the_hub_starts_both_and_the_hub_is_asked_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Whatever is fetched before is used where there is no network, as by all that load models."""
    diffusion_model(tmp_path / "kept")
    asked = []

    def kept(repo_id: str, name: str, **options: Any) -> str:
        asked.append((repo_id, name, options))
        if repo_id != "someone/model":
            raise OSError("not fetched before")
        return str(tmp_path / "kept" / name)

    def no_network(*_: Any, **__: Any) -> None:
        raise OSError("no connection")

    monkeypatch.setattr("unet.weights.folder.hf_hub_download", kept)
    monkeypatch.setattr("unet.weights.folder.get_hf_file_metadata", no_network)
    note = "someone/model is no folder here: it is looked up on the Hugging Face Hub"
    for command, images in ((run_seg, data), (run_ddpm, data / "image")):
        start_folder.cache_clear()
        asked.clear()
        out = tmp_path / command.__name__
        given = ("--data", images, "--init", "someone/model", "--out", out)
        assert command(*given, *SHORT, *(("--size", 16) if command is run_ddpm else ())) == 0
        said = capsys.readouterr()
        assert said.err.count(note) == 1
        assert " of someone/model" in said.out
        offline = {"local_files_only": True}
        assert asked == [("someone/model", n, offline) for n in (CONFIG_FILE, WEIGHTS)]
        assert command(*given[:3], "other/model", "--out", tmp_path / "none") == 2
        told = (
            "other/model is no folder here, and the Hub gives no such model (it cannot be reached"
        )
        assert told in capsys.readouterr().err
    start_folder.cache_clear()
    assert run(describe, describe.Options, "someone/model") == 0
    assert "unet-train-seg --init someone/model" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["flow", "edm"])
def test_flow_and_edm_start_a_segmentation_at_the_noise_of_the_cosine_schedule(
    tmp_path: Path, kind: Any
) -> None:
    schedule, seen = NoiseSchedule(kind=kind), []
    teacher = diffusion_model(tmp_path, schedule=schedule.to_dict(), prediction=kind)
    start = segmentation_start(str(tmp_path))
    assert start is not None
    t = int(start.where.rpartition(" ")[2])
    cosine = NoiseSchedule(kind="cosine").level(round(TIMESTEP * 999))
    assert schedule.level(t).sigma == pytest.approx(cosine.sigma, rel=0.02)
    trunk = UNet(start.config).eval()
    state = {k.removeprefix("trunk."): v for k, v in start.read().items() if "trunk." in k}
    trunk.load_state_dict(state)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 1), np.uint8)
    image = to_unit(torch.from_numpy(pixels)).permute(2, 0, 1)[None]
    shown = torch.from_numpy(Normalisation.from_dict(start.info["normalisation"])(pixels))[None]

    def network(*given: torch.Tensor) -> torch.Tensor:
        seen.append(teacher.trunk(*given))
        return given[0]

    with torch.no_grad():
        Denoiser(network, schedule, kind)(schedule.level(t).signal * image, t)
        assert torch.allclose(trunk(shown), seen[0], atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "values"),
    [("uint16", ValueRange((0.0, 90.0), (4095.0, 700.0))), ("float32", ValueRange(-3.0, 7.0))],
)
def test_images_of_more_than_8_bits_cross_both_ways(
    tmp_path: Path, dtype: str, values: ValueRange
) -> None:
    """Each network sees what it saw in the other life, whatever the values and channels."""
    ranges, two = {dtype: values.each(2)}, {"in_channels": 2}
    diffusion_model(tmp_path / "images", dtype=dtype, ranges=ranges, config=two)
    start = segmentation_start(str(tmp_path / "images"))
    assert start is not None
    low, high = map(np.array, values.each(2))
    pixels = (low + np.random.default_rng(0).random((24, 32, 2)) * (high - low)).astype(dtype)
    x = as_tensor(as_levels(pixels, 2, values, fine=True))
    seen = Normalisation.from_dict(start.info["normalisation"])(pixels)
    signal = SCHEDULE.level(round(TIMESTEP * 199)).signal
    assert np.allclose(seen, x * signal, atol=1e-6)

    plain = UNetConfig(**{**vars(CONFIG), **two, "time": False, "scale_shift": False})
    normalisation = Normalisation((100.0, 30.0), (40.0, 600.0), dtype)
    teacher = SegmentationUNet(plain, 1, {"normalisation": normalisation.to_dict()})
    teacher.save_pretrained(tmp_path / "masks")
    back = find_start(str(tmp_path / "masks"), {dtype: values}).read()
    found, wanted = (
        F.conv2d(torch.as_tensor(image)[None], *(state[f"{STEM}.{w}"] for w in ("weight", "bias")))
        for image, state in ((x, back), (normalisation(pixels), teacher.state_dict()))
    )
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.std()))


def test_a_segmentation_starts_a_diffusion_model(data: Path, tmp_path: Path, capsys) -> None:
    """The features of an image are the same at every timestep, but for the image's border."""
    torch.manual_seed(0)
    plain = UNetConfig(**{**vars(CONFIG), "time": False, "scale_shift": False, "norm": "none"})
    normalisation = Normalisation((100.0,), (30.0,), "uint8")
    teacher = SegmentationUNet(plain, 1, {"normalisation": normalisation.to_dict()}).eval()
    teacher.save_pretrained(tmp_path / "model")
    given = ("--data", data / "image", "--init", tmp_path / "model", "--out", tmp_path / "run")
    assert run_ddpm(*given, *SHORT, "--size", 16) == 0
    assert "the same at every timestep; newly initialised: head.conv" in capsys.readouterr().out
    student = DiffusionUNet.from_pretrained(tmp_path / "run/model")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 1), np.uint8)
    x = to_unit(torch.from_numpy(pixels)).permute(2, 0, 1)
    with torch.no_grad():
        found = student.trunk(x[None].expand(2, -1, -1, -1), torch.tensor([3, 900]))
        wanted = teacher.trunk(torch.from_numpy(normalisation(pixels))[None])
    assert torch.allclose(found[0], found[1], atol=1e-5)
    inside = (..., slice(24, 40), slice(24, 40))
    assert (found[:1][inside] - wanted[inside]).abs().max() < 0.02 * wanted.std()


def test_grey_and_colour_cross(data: Path, tmp_path: Path, capsys) -> None:
    diffusion_model(tmp_path / "colour", config={"in_channels": 3})
    given = ("--data", data, "--init", tmp_path / "colour", "--out", tmp_path / "run")
    assert run_seg(*given, *SHORT) == 0
    assert "its first weights summed to grey" in capsys.readouterr().out
    assert SegmentationUNet.from_pretrained(tmp_path / "run/model").config.in_channels == 1

    diffusion_model(tmp_path / "grey")
    images = ("--data", data / "image", "--size", 16)
    for init, colour, done in (
        ("grey", "rgb", "spread over the colours"),
        ("colour", "grey", "summed to"),
    ):
        given = "--init", tmp_path / init, "--colour", colour, "--out", tmp_path / init / "run"
        assert run_ddpm(*images, *given, *SHORT) == 0
        assert f"{tmp_path / init}, its first weights {done}" in capsys.readouterr().out
        found = DiffusionUNet.from_pretrained(tmp_path / init / "run/model")
        assert found.config.in_channels == (3 if colour == "rgb" else 1)


def test_describe_says_what_a_folder_can_start(tmp_path: Path, capsys) -> None:
    diffusion_model(tmp_path / "model")
    assert run(describe, describe.Options, tmp_path / "model") == 0
    told = capsys.readouterr().out
    assert f"unet-train-seg --init {tmp_path / 'model'}" in told
    assert f"unet-train-ddpm --init {tmp_path / 'model'}" in told
    SegmentationUNet(UNetConfig(channels=8), 1, {"normalisation": GREY}).save_pretrained(
        tmp_path / "conv"
    )
    assert run(describe, describe.Options, tmp_path / "conv") == 0
    told = capsys.readouterr().out
    assert "can start a segmentation" in told
    assert "takes no timestep, which goes into residual blocks" in told


def broken(kind: str, folder: Path) -> None:
    """A model folder that starts nothing."""
    text = {"attention": "transformer", "context_channels": 8}
    model: FolderModel
    if kind == "latents":
        diffusion_model(folder, autoencoder="vae")
    elif kind == "clip":
        diffusion_model(folder, text_encoder="clip", config=text)
    elif kind == "conv":
        model = SegmentationUNet(UNetConfig(channels=8), 1, {"normalisation": GREY})
        model.save_pretrained(folder)
    elif kind == "no scaling":
        plain = {**vars(CONFIG), "time": False, "scale_shift": False}
        SegmentationUNet(UNetConfig(**plain), 1).save_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "train", "told"),
    [
        ("latents", run_seg, "works on latents of 1 channel"),
        ("clip", run_seg, "cannot start a segmentation: a network that reads text"),
        ("conv", run_ddpm, "takes no timestep"),
        ("no scaling", run_seg, "normalisation is damaged"),
        ("no scaling", run_ddpm, "normalisation is damaged"),
        ("nothing", run_seg, "is no folder"),
        ("nothing", run_ddpm, "is no folder"),
    ],
)
def test_a_model_that_starts_nothing_is_refused(
    kind: str, train: Any, told: str, data: Path, tmp_path: Path, capsys
) -> None:
    broken(kind, tmp_path / "model")
    images = data if train is run_seg else data / "image"
    given = ("--data", images, "--init", tmp_path / "model", "--out", tmp_path / "run")
    assert train(*given, *SHORT) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# -- unlabelled images first

TINY = ("--width", 8, "--batch-size", 2, "--crop", 32, "--evaluations", 1, "--log-every", 1)


@pytest.fixture
def unlabelled(tmp_path: Path) -> Path:
    """Four images, two of one name."""
    names = ("0", "day 1/0", "day 1/1", "day 2/2")
    for name, image in zip(names, phantom_stack(4, (40, 48), seed=7)[0], strict=True):
        write_image(tmp_path / f"unlabelled/{name}.png", image)
    return tmp_path / "unlabelled"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return SegmentationUNet.from_pretrained(run / "model").state_dict()


@pytest.fixture
def sparse(data: Path, tmp_path: Path) -> Path:
    """Numbered objects, of which the upper rows alone have labels."""
    shutil.copytree(data / "image", tmp_path / "cells/image")
    for i in range(4):
        numbers = measure.label(read_mask(data / f"label/{i}.png"), connectivity=1)
        numbers[16:] = 9999
        write_image(tmp_path / f"cells/label/{i}.tif", np.uint16(numbers))
    return tmp_path / "cells"


OBJECTS = ("--instances", "--ignore-value", 9999, "--crop", 32, "--batch-size", 2)


def test_objects_of_a_few_rows_start_from_a_diffusion_model(sparse, tmp_path, capsys) -> None:
    diffusion_model(tmp_path / "model")
    given = ("--data", sparse, "--init", tmp_path / "model", "--out", tmp_path / "run", *OBJECTS)
    assert run_seg(*given, "--steps", 1) == 0
    told = capsys.readouterr().out
    assert "started with trunk, head.norm of " in told
    assert "-> ignored     60.00%" in told
    model = SegmentationUNet.from_pretrained(tmp_path / "run/model")
    assert model.depth
    assert "ap" in model.info["training"]["figures"]


def test_what_was_not_measured_has_no_label_of_our_own(tmp_path: Path, capsys) -> None:
    """With --nodata nan, of which a run that goes on knows that it is what it was."""
    rng = np.random.default_rng(0)
    for place in ("cells/image", "more"):
        for i in range(4):
            image = rng.normal(100, 20, (40, 48)).astype(np.float32)
            image[:9] = np.nan
            write_image(tmp_path / place / f"{i}.tif", image)
            write_image(tmp_path / f"cells/label/{i}.png", np.uint8(np.nan_to_num(image) > 105))
    more = ("--unlabelled", tmp_path / "more", "--nodata", "nan")
    given = ("--data", tmp_path / "cells", *more, *TINY, "--steps", 6, "--out", tmp_path / "run")
    write_image(tmp_path / "more/4.tif", np.full((40, 48), np.nan, np.float32))
    assert run_seg(*given) == 2
    assert "nothing was measured in 4.tif of the unlabelled images" in capsys.readouterr().err
    (tmp_path / "more/4.tif").unlink()
    assert run_seg(*given) == 0
    assert "4 images, synthetic or with predicted labels" in capsys.readouterr().out
    # The model knows how its images are to be read.
    judged = ("--model", tmp_path / "run/model", "--data", tmp_path / "cells")
    argv = map(str, (*judged, "--out", tmp_path / "scores", "--device", "cpu"))
    assert eval_seg.command(list(argv)) == 0


def test_no_object_of_our_own_has_the_number_that_is_ignored() -> None:
    numbers = np.arange(5, dtype=np.int32)[None]
    assert without_number(numbers, 3).tolist() == [[0, 1, 2, 4, 5]]
    assert without_number(numbers, (3, 3, 3)).tolist() == [[0, 1, 2, 4, 5]]
    for none in (None, 0, 9, (1, 2, 3)):
        assert without_number(numbers, none).tolist() == numbers.tolist()


@pytest.mark.slow  # three trainings; their parts are tested each by itself
def test_a_teacher_of_objects_is_what_init_gives(sparse, unlabelled, tmp_path) -> None:
    given = ("--data", sparse, "--evaluations", 1, *OBJECTS)
    first = ("--width", 8, "--unlabelled", unlabelled, "--steps", 6, "--out", tmp_path / "one")
    assert run_seg(*given, *first) == 0
    start = tmp_path / "one/pretraining/model"
    assert run_seg(*given, "--init", start, "--steps", 1, "--out", tmp_path / "two") == 0
    ours, theirs = weights(tmp_path / "one/teacher"), weights(tmp_path / "two")
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_unlabelled_images_come_first(data: Path, unlabelled: Path, tmp_path: Path, capsys) -> None:
    """Denoising, a teacher, a student; killed in each part they end with the same weights."""
    given = ("--data", data, "--unlabelled", unlabelled, *TINY, "--steps", 6)
    assert run_seg(*given, "--out", tmp_path / "one") == 0
    told = capsys.readouterr().out
    assert told.count("started with trunk, head.norm of ") == 2
    assert "no state is saved" not in told  # which is for runs that were killed
    assert all(f"{n} step" in told for n in (3, 1, 2))
    assert "labelled 4 images" in told
    labels = tmp_path / "one/teacher/labels"
    of = {file.relative_to(unlabelled).as_posix() for file in unlabelled.rglob("*.png")}
    assert {f.relative_to(labels).as_posix() for f in labels.rglob("*.tif")} == {
        f"{name}.tif" for name in of
    }
    assert "predicted labels" in told
    assert DiffusionUNet.from_pretrained(tmp_path / "one/pretraining/model").config.time
    assert run_seg(*given, "--out", tmp_path / "one") == 2
    assert "holds a run already" in capsys.readouterr().err
    run, again = tmp_path / "two", given
    for part in ("pretraining", "teacher/labels", ""):
        with pytest.MonkeyPatch.context() as patch:
            kill_in(run / part, patch)
            assert run_seg(*again, "--out", run) == 1
        again = ("--resume",)
    assert run_seg("--resume", "--out", run) == 0
    ours, theirs = weights(run), weights(tmp_path / "one")
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


def kill_in(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Ends a run when it has trained in that folder, or is to write there."""

    def dies(real: Callable[..., object], place: Callable[..., Path]) -> Callable[..., object]:
        def run(*given: object) -> object:
            if place(*given) == folder:
                raise RunError("killed")
            return real(*given)

        return run

    for module in (diffusion.training, segmentation.training):
        patch.setattr(module, "_finish", dies(module._finish, lambda plan, *_: plan.fit.out))
    write = unet_diffusion.pretraining.write_image
    patch.setattr(
        unet_diffusion.pretraining, "write_image", dies(write, lambda path, *_: path.parent)
    )


def test_a_diffusion_model_that_is_there_is_not_learnt_again(
    data: Path, unlabelled: Path, tmp_path: Path, capsys
) -> None:
    drawn = tmp_path / "drawn"
    given = ("--data", unlabelled, "--network", "shared", *TINY[:4], "--crops", "--size", 32)
    assert run_ddpm(*given, "--steps", 1, "--out", drawn) == 0
    given = ("--data", data, "--unlabelled", unlabelled, "--init", drawn / "model", *TINY)
    given = (*given, "--synthetic-share", 0.25)
    assert run_seg(*given, "--steps", 6, "--out", tmp_path / "run") == 0
    told = capsys.readouterr().out
    assert all(f"{n} steps" in told for n in (2, 4))
    assert "0.25 of the crops" in told
    assert not (tmp_path / "run/pretraining").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--network", "segmentation"), "needs a network that takes a timestep"),
        (("--network", "sd-v1"), "choose one of shared, diffusion, ddpm-cifar10, ddpm-256\n"),
        (("--unlabelled", "LARGE", "--crop", 0), "whole images, of 40 x 48 pixels"),
        (("--unlabelled", "CUT", "--init", "MODEL"), "image file is truncated"),
        (("--init", "a/b/model"), "a/b/model"),
        (("--best-by", "ap"), "ap"),
        (("--crop", 64), "too few for a crop of 64"),
        (("--unlabelled", "COLOUR"), "RGB uint8 in the unlabelled"),
        (("--unlabelled", "MASKED"), "holds masks or predictions as well, such as "),
        (("--unlabelled", "nowhere"), "no such file or folder"),
    ],
)
def test_unlabelled_images_that_do_not_go_with_the_labelled_ones_are_refused(
    more: tuple[object, ...], told: str, data: Path, unlabelled: Path, tmp_path: Path, capsys
) -> None:
    write_image(tmp_path / "colour/0.png", np.zeros((64, 64, 3), np.uint8))
    write_image(tmp_path / "large/0.png", np.zeros((64, 64), np.uint8))
    whole = (unlabelled / "0.png").read_bytes()
    write_image(tmp_path / "masked/0.png", np.zeros((64, 64), np.uint8))
    write_image(tmp_path / "masked/masks/0.png", np.zeros((64, 64), np.uint8))
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/0.png").write_bytes(whole[: len(whole) // 2])
    diffusion_model(tmp_path / "model")
    more = tuple(tmp_path / str(m).lower() if str(m).isupper() else m for m in more)
    given = ("--data", data, "--unlabelled", unlabelled, *TINY, "--steps", 2)
    assert run_seg(*given, *more, "--out", tmp_path / "run") == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_held_out_images_among_the_unlabelled_ones_are_told(data: Path, tmp_path: Path, capsys):
    given = ("--data", data, "--unlabelled", data / "image", *TINY, "--steps", 2)
    assert run_seg(*given, "--out", tmp_path / "run") == 0
    assert "1 of the 1 held-out images are among the unlabelled ones" in capsys.readouterr().out
