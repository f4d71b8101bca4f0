"""A picture beside classes and texts, and models that start others with another input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion import load
from diffusion.data.conditions import Asked, Condition
from diffusion.data.shapes import example, example_caption
from diffusion.decisions import decide
from diffusion.model import DiffusionUNet
from diffusion.options import DiffusionOptions, SamplingOptions
from diffusion.sampling import ImageSampler
from diffusion.training import NoisedSamples, load_data, make_model
from segmentation.data.normalisation import Normalisation
from segmentation.model import SegmentationUNet
from unet import UNetConfig
from unet.errors import InputError
from unet.files.images import read_image, write_image
from unet.training.cli import run_script
from unet_diffusion import sample_ddpm, train_ddpm
from unet_diffusion.sampled import MaskSampler
from unet_diffusion.starting import segmentation_start

pytestmark = pytest.mark.usefixtures("short_runs")

SIDE = 16
TINY = ("--width", 8, "--batch-size", 4, "--timesteps", 3, "--evaluations", 1, "--steps", 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images in a folder of two classes, with captions, and masks of them."""
    lines = []
    for i in range(8):
        picture = example(0, i, SIDE)[1].picture
        name = f"{'ab'[i % 2]}/{i}.png"
        write_image(tmp_path / "images" / name, picture)
        write_image(tmp_path / f"masks/{i}.png", (picture.mean(axis=2) > 128) * np.uint8(7))
        lines.append(json.dumps({"file_name": name, "text": example_caption(0, i)}))
    (tmp_path / "images/metadata.jsonl").write_text("\n".join(lines))
    return tmp_path


def options(folder: Path, **more: Any) -> DiffusionOptions:
    given: dict[str, Any] = {
        "data": str(folder / "images"),
        "width": 8,
        "device": "cpu",
        "steps": 1,
    }
    return DiffusionOptions(out=folder / "run", **(given | more))


def run(module: Any, kind: Any, *arguments: object) -> int:
    return run_script(module.main, kind, list(map(str, arguments)))


@pytest.mark.usefixtures("reports")
@pytest.mark.parametrize("beside", ["classes", "captions"])
def test_a_picture_goes_with_classes_and_with_texts(folder: Path, beside: str) -> None:
    """Trained, gone on with, sampled from both or either, from the command and from Python."""
    data = ("--data", folder / "images", "--condition", folder / "masks", f"--{beside}")
    out = ("--out", folder / "run")
    assert run(train_ddpm, DiffusionOptions, *data, *TINY, *out) == 0
    if beside == "classes":
        assert run(train_ddpm, DiffusionOptions, *out, "--resume", "--steps", 2) == 0
    card = (folder / "run/model/README.md").read_text()
    assert 'pictures="image.png"' in card
    assert "--condition pictures" in card
    assert not (folder / "run/model/samples.png").exists()  # which would show the pictures
    words = ["b", "a"] if beside == "classes" else [example_caption(0, i) for i in (1, 2)]
    kind = "classes" if beside == "classes" else "prompts"
    given: dict[str, Any] = {kind: words[0]}
    generator = load(folder / "run/model", device="cpu")
    # Heads start at zero: of weights that say something both the picture and the word must tell.
    torch.nn.init.normal_(generator.model.head.conv.weight, std=0.1)
    for p in generator.model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    pictures = [folder / f"masks/{i}.png" for i in (0, 1)]
    how: dict[str, Any] = {"steps": 2, "guidance": 2.0, "seed": 3}
    both = generator(2, pictures=pictures[0], **given, **how)
    assert both.shape == (2, SIDE, SIDE, 3)
    others = (
        generator(2, pictures=pictures[1], **given, **how),
        generator(2, pictures=pictures[0], **how),
        generator(2, **given, **how),
    )
    assert not any(np.array_equal(both, other) for other in others)
    assert np.array_equal(generator(pictures=pictures, **given, **how)[0], both[0])
    model = ("--model", folder / "run/model", "--condition", folder / "masks")
    flag = "--class" if beside == "classes" else "--prompt"
    more = ("--each", 2, "--steps", 2, "--guidance", 2, "--npz", "--out", folder / "made")
    assert run(sample_ddpm, sample_ddpm.SampleOptions, *model, flag, *words, *more) == 0
    names = [folder / f"masks/{i}.png" for i in (0, 0, 1, 1)]
    ours = load(folder / "run/model", device="cpu")(
        pictures=names, **{kind: words}, steps=2, guidance=2.0
    )
    for name, image in zip(("0_0", "0_1", "1_0", "1_1"), ours, strict=True):
        assert np.array_equal(read_image(folder / f"made/images/{name}.png"), image)
    if beside == "classes":
        assert np.load(folder / "made/samples.npz")["labels"].tolist() == [1, 0] * 8


def test_either_or_both_are_left_out(folder: Path) -> None:
    """All of it in a share of the images, each alone in half as many."""
    asked = options(folder, condition=str(folder / "masks"), classes=True, label_dropout=0.2)
    data = load_data(asked)
    samples = NoisedSamples(data, plan := decide(asked, data), make_model(plan))
    seen = [samples[epoch, i] for epoch in range(400) for i in range(len(samples))]
    none = [int(s["label"]) == 2 for s in seen], [not s["picture"].any() for s in seen]
    shares = [
        np.mean(np.logical_and(a, b))
        for a in (none[0], np.logical_not(none[0]))
        for b in (none[1], np.logical_not(none[1]))
    ]
    np.testing.assert_allclose(shares, [0.2, 0.1, 0.1, 0.6], atol=0.03)


def test_what_is_asked_for_becomes_rows_of_both(folder: Path) -> None:
    asked = options(folder, condition=str(folder / "masks"), classes=True)
    data = load_data(asked)
    model = make_model(decide(asked, data))
    picture = torch.rand(2, SIDE, SIDE)
    given = model.conditioning([Asked(1, picture), 0, picture, None])
    assert given["classes"].tolist() == [1, 0, 2, 2]
    assert [bool(row.any()) for row in given["picture"]] == [True, False, True, False]


@pytest.mark.parametrize("joint", [False, True])
def test_what_is_around_a_hole_stays_as_it_is(folder: Path, joint: bool) -> None:
    """Also of a picture smaller than the model's images, and beside an image without a picture."""
    masks = {"joint": folder / "masks"} if joint else {"classes": True}
    asked = options(folder, condition="hole", **masks)
    model = make_model(decide(asked, load_data(asked)))
    randomised(model)
    sampler = ImageSampler(model, SamplingOptions(steps=2, sampler="ddim"))
    image = np.random.default_rng(0).integers(0, 256, (11, 13, 3), np.uint8)
    hole = np.zeros((11, 13), bool)
    hole[3:7, 2:9] = True
    cover = np.where(hole, np.uint8(0), np.uint8(255))
    write_image(folder / "holed.png", np.dstack([image, cover]))
    shown = None if joint else 0
    made = next(sampler.batches(1, [Asked(shown, sampler.made_from(folder / "holed.png"))]))[0]
    assert made.shape == (11, 13, 3 + joint)
    made = made[..., :3]
    assert np.array_equal(made[~hole], image[~hole])
    assert not np.array_equal(made[hole], image[hole])
    any_image = next(sampler.batches(1, [shown]))[0]
    assert any_image.shape == (SIDE, SIDE, 3 + joint)
    assert any_image.std() > 0


# -- starts


def randomised(model: torch.nn.Module) -> None:
    torch.manual_seed(1)
    for p in model.parameters():
        p.data = 0.1 * torch.randn_like(p)


@pytest.mark.parametrize("over", [(255, 255, 255), (0, 0, 0)])
def test_a_given_image_is_laid_over_what_those_of_training_were(
    folder: Path, over: tuple[int, int, int]
) -> None:
    asked = options(folder, background=over)
    model = make_model(decide(asked, load_data(asked)))
    write_image(folder / "clear.png", np.full((SIDE, SIDE, 4), (9, 9, 9, 0), np.uint8))
    image = sample_ddpm.picture(folder / "clear.png", ImageSampler(model, SamplingOptions()))
    assert (image == over[0] / 127.5 - 1).all()
    model.info["background"] = [0, 0]
    with pytest.raises(InputError, match="background is damaged"):
        sample_ddpm.picture(folder / "clear.png", ImageSampler(model, SamplingOptions()))


@pytest.mark.parametrize("how", ["condition", "joint", "dropped", "unjoined"])
def test_what_is_beside_the_image_starts_at_zero(folder: Path, how: str, capsys) -> None:
    """The network is what it was, whatever is beside the noisy image."""
    joint, variance = {"joint": folder / "masks"}, {"learn_variance": how == "joint"}
    given = {"dropped": {"condition": "grey"}, "unjoined": joint, "joint": variance}
    before = options(folder, **given.get(how, {}))
    teacher = make_model(decide(before, load_data(before)))
    randomised(teacher)
    teacher.save_pretrained(folder / "teacher")
    more = {"condition": {"condition": str(folder / "masks")}, "joint": joint}
    asked = options(folder, init=str(folder / "teacher"), **more.get(how, {}))
    data = load_data(asked)
    student = make_model(decide(asked, data)).eval()
    told = capsys.readouterr().out
    wanted = {
        "condition": "its first weights with zeros for 2 channels of the condition",
        "joint": "its first and last weights with zeros for 1 channel of the masks",
        "dropped": "without the first weights of its condition",
        "unjoined": "without the first and last weights of its masks",
    }
    assert wanted[how] in told
    assert "anew" not in told
    x, t = torch.randn(2, student.config.in_channels, SIDE, SIDE), torch.tensor([5, 700])
    seen = x[:, :3]
    if how in ("dropped", "unjoined"):
        seen = torch.cat([seen, torch.zeros(2, 1, SIDE, SIDE)], dim=1)
    with torch.no_grad():
        ours, theirs = student.trunk(x, t), teacher.eval().trunk(seen, t)
        torch.testing.assert_close(ours, theirs)
        made, before = student.head(ours), teacher.head(theirs)
        rows = 3 * student.config.patch**2
        torch.testing.assert_close(made[:, :rows], before[:, :rows])
        assert not made[:, rows:].any()  # the codes of a mask
        assert (made.shape[1] > rows) == (how == "joint")


def test_the_same_condition_keeps_its_weights_and_lora_needs_it(folder: Path, capsys) -> None:
    before = options(folder, condition="lowres:4")
    teacher = make_model(decide(before, load_data(before)))
    randomised(teacher)
    teacher.save_pretrained(folder / "teacher")
    for more in ({}, {"trained": "lora"}):
        asked = options(
            folder, init=str(folder / "teacher"), condition="lowres:2", width=None, **more
        )
        student = make_model(decide(asked, load_data(asked)))
        assert "first weights" not in capsys.readouterr().out
        assert student.condition is not None
        assert student.condition.amount == 2
        x, t, picture = (
            torch.randn(1, 3, SIDE, SIDE),
            torch.tensor([5]),
            torch.randn(1, 3, SIDE, SIDE),
        )
        with torch.no_grad():
            ours, theirs = (m.eval()(x, t, picture=picture) for m in (student, teacher))
        torch.testing.assert_close(ours, theirs)
    asked = options(folder, init=str(folder / "teacher"), width=None, trained="lora")
    with pytest.raises(InputError, match="trained with another --condition or --joint"):
        decide(asked, load_data(asked))


def test_a_segmentation_starts_a_model_with_a_condition_and_the_reverse(folder: Path) -> None:
    config = UNetConfig(in_channels=3, channels=8, multipliers=(1, 2), block="res", norm="none")
    scaled = Normalisation((100.0,) * 3, (30.0,) * 3, "uint8").to_dict()
    SegmentationUNet(config, 1, {"normalisation": scaled}).save_pretrained(folder / "seg")
    asked = options(folder, init=str(folder / "seg"), condition=str(folder / "masks"))
    model = make_model(decide(asked, load_data(asked))).eval()
    x, t = torch.randn(1, 5, SIDE, SIDE), torch.tensor([5])
    with torch.no_grad():
        other = torch.cat([x[:, :3], torch.rand(1, 2, SIDE, SIDE)], dim=1)
        torch.testing.assert_close(model.trunk(x, t), model.trunk(other, t))
    model.save_pretrained(folder / "conditioned")
    back = segmentation_start(str(folder / "conditioned"))
    assert back is not None
    assert back.config.in_channels == 3
    assert "without the first weights of its condition" in back.where
    masked = options(folder, joint=folder / "masks")
    make_model(decide(masked, load_data(masked))).save_pretrained(folder / "joint")
    with pytest.raises(InputError, match="makes masks with its images, and a segmentation starts"):
        segmentation_start(str(folder / "joint"))
    assert DiffusionUNet.from_pretrained(folder / "joint").joint


def test_images_have_the_size_of_their_pictures(folder: Path) -> None:
    """Larger, smaller and narrower than in training, from the command and from Python, and masks
    of images; of one training on resized images the size of training.
    """
    images = folder / "images"
    data = ("--data", folder / "masks", "--condition", images / "a", "--size", 8)
    for i in range(8):
        write_image(images / f"a/{i}.png", example(0, i, SIDE)[1].picture)
    out = ("--target", "mask", "--out")
    assert run(train_ddpm, DiffusionOptions, *data, *TINY, "--crops", *out, folder / "run") == 0
    assert run(train_ddpm, DiffusionOptions, *data, *TINY, *out, folder / "small") == 0
    given = {"large": (21, 16), "little": (5, 9), "one": (8, 8)}
    for name, size in given.items():
        write_image(folder / f"given/{name}.png", np.full((*size, 3), 99, np.uint8))
    model = ("--model", folder / "run/model", "--steps", 2, "--each", 2)
    made = ("--condition", folder / "given", "--out", folder / "made")
    assert run(sample_ddpm, sample_ddpm.SampleOptions, *model, *made) == 0
    for name, size in given.items():
        file = folder / f"given/{name}.png"
        samples = [read_image(folder / f"made/images/{name}_{i}.png") for i in (0, 1)]
        assert {sample.shape for sample in samples} == {(*size, 1)}
        found = MaskSampler(folder / "run/model", 2, SamplingOptions(steps=2))(file)
        assert found.shape == (2, *size)
        ours = load(folder / "small/model", device="cpu")(pictures=file, steps=2)
        assert ours.shape == (1, 8, 8, 1)
    # An image depends on its number alone, whatever is made beside it.
    generator = load(folder / "run/model", device="cpu")
    alone = generator(pictures=folder / "given/little.png", steps=2, first=2)[0]
    assert np.array_equal(alone, read_image(folder / "made/images/little_0.png"))
    with pytest.raises(InputError, match="different sizes"):
        generator(pictures=[folder / f"given/{name}.png" for name in given], steps=2)
    again = ("--overwrite", "--npz")
    assert run(sample_ddpm, sample_ddpm.SampleOptions, *model, *made, *again) == 2


def test_a_tree_of_pictures_becomes_a_tree_of_images(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of masks, wherever --out is, and whatever was made before; what could be written over a
    picture, or two into one file, is refused before anything is written, and nothing is lost.
    """
    data = ("--data", folder / "images", "--condition", folder / "masks")
    assert run(train_ddpm, DiffusionOptions, *data, *TINY, "--out", folder / "run") == 0
    tree, names = folder / "tree", ["0", "a/0", "a/10/0", "b/label/0"]
    for i, name in enumerate((*names, ".hidden/0", "__MACOSX/0")):
        write_image(tree / f"{name}.png", read_image(folder / f"masks/{i}.png"))
    pictures = [tree / f"{name}.png" for name in names]
    wanted = load(folder / "run/model", device="cpu")(pictures=pictures, steps=1)
    model = ("--model", folder / "run/model", "--steps", 1, "--batch-size", 4)
    sample = (sample_ddpm, sample_ddpm.SampleOptions, *model, "--condition")
    made = (folder / "made", tree / "made", tree / "a/made")
    for out in made:
        for _ in range(2):
            again = ("--overwrite",) if out.is_dir() else ()
            there = sum(other.is_dir() for other in made[1:])
            assert run(*sample, tree, "--out", out, *again) == 0
            said = capsys.readouterr().err
            assert "stay" not in said
            assert ("left out: " in said) == bool(there)
            assert ("2 folders of runs, evaluations or samples, such as" in said) == (there == 2)
            written = {f.relative_to(out / "images") for f in (out / "images").rglob("*.png")}
            assert written == {Path(f"{name}.png") for name in names}
            for name, image in zip(names, wanted, strict=True):
                assert np.array_equal(read_image(out / f"images/{name}.png"), image)
    shutil.copytree(folder / "masks", folder / "label/images")
    shutil.copytree(folder / "masks", folder / "label/label")
    (folder / "volume.zarr").mkdir()
    (folder / "volume.zarr/zarr.json").touch()
    write_image(folder / "twins/a/0.png", read_image(folder / "masks/0.png"))
    write_image(folder / "twins/a/0.tif", read_image(folder / "masks/0.png"))
    before = sorted(folder.rglob("*"))
    for given, out, told in (
        (tree, tree, f"holds conditions, in {tree}, that samples could be written over"),
        (tree, tree / "a", f"holds conditions, in {tree / 'a'}, that"),
        (
            folder / "label/label",
            folder / "label",
            f"holds conditions, in {folder / 'label/label'}",
        ),
        (tree / "a/made/images", tree / "a/made", "holds conditions, in"),
        (folder / "label", folder / "new", "holds images beside masks"),
        (folder / "volume.zarr", folder / "new", "volume.zarr is a volume: save its slices"),
        (folder / "twins", folder / "new", "would both be written to 'a/0'"),
    ):
        assert run(*sample, given, "--out", out, "--overwrite") == 2
        assert told in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before
    one = (folder / "masks/1.png", "--out", folder / "made", "--overwrite")
    assert run(*sample, *one) == 0
    assert "still holds 4 files" in capsys.readouterr().err


def test_pictures_are_read_batch_by_batch(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once before anything is made, so that a bad one stops it all, and again when they are due."""
    data = ("--data", folder / "images", "--condition", folder / "masks")
    assert run(train_ddpm, DiffusionOptions, *data, *TINY, "--out", folder / "run") == 0
    events: list[str] = []
    given, evaluated = Condition.given, DiffusionUNet.forward

    def reading(self: Condition, file: Path, *args: Any) -> torch.Tensor:
        events.append(file.stem)
        return given(self, file, *args)

    def evaluating(self: DiffusionUNet, *args: Any, **more: Any) -> torch.Tensor:
        events.append("network")
        return evaluated(self, *args, **more)

    monkeypatch.setattr(Condition, "given", reading)
    monkeypatch.setattr(DiffusionUNet, "forward", evaluating)
    made = ("--condition", folder / "masks", "--steps", 1, "--batch-size", 4, "--out")
    sample = (sample_ddpm, sample_ddpm.SampleOptions, "--model", folder / "run/model", *made)
    assert run(*sample, folder / "made") == 0
    assert events[:8] == [*"01234567"]
    assert events[8:] == [*"0123", "network", *"4567", "network"]
    before = (folder / "made/grid.png").stat()
    for shape, told in (((SIDE, SIDE, 3), "it holds colours, but"), ((SIDE, SIDE), "values [9]")):
        write_image(folder / "masks/7.png", np.full(shape, 9, np.uint8))
        events.clear()
        assert run(*sample, folder / "made", "--overwrite") == 2
        assert told in capsys.readouterr().err
        assert "network" not in events
    assert (folder / "made/grid.png").stat() == before
