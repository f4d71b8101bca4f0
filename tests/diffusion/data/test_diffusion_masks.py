"""Masks as what is made: codes and back, folders of several annotators, a model that keeps it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion import load
from diffusion.data.conditions import Condition, ImageKind
from diffusion.data.images import DiffusionData
from diffusion.data.masks import MaskCoding
from diffusion.options import DiffusionOptions, SamplingOptions
from diffusion.output import SampleFolder
from diffusion.training import train
from segmentation.data.dataset import SegmentationData
from segmentation.data.pairs import find_pairs
from unet import InputError
from unet.files.images import list_images, read_image, read_mask, write_image
from unet.files.mask_values import MaskCleaning
from unet.training.cli import run_script
from unet.training.task import Processes
from unet_diffusion import eval_ddpm, predict_seg, sample_ddpm, train_ddpm
from unet_diffusion.sampled import MaskSampler


def write(folder: Path, values: tuple[int, ...] = (0, 255), count: int = 8, side: int = 16) -> None:
    rng = np.random.default_rng(0)
    for i in range(count):
        image = rng.integers(0, 256, (side, side)).astype(np.uint8)
        write_image(folder / f"images/{i}.png", image)
        for a in (1, 2):
            mask = np.array(values, np.uint8)[(image.astype(int) * len(values) + 20 * a) // 300]
            write_image(folder / f"masks/{a}/{i}.png", mask)


@pytest.mark.parametrize("coding", ["bits", "one-hot"])
@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_codes_become_the_values_again_through_noise(coding, count):
    values = tuple(range(7, 7 + 3 * count, 3))
    masks = MaskCoding(values=values, coding=coding)
    assert masks.channels == (count if coding == "one-hot" else (count - 1).bit_length())
    assert len({tuple(code) for code in masks.codes.tolist()}) == count
    indices = np.random.default_rng(0).integers(0, count, (9, 5))
    noisy = (
        masks.codes[indices] * 0.6 + 255 * 0.2 + np.random.default_rng(1).normal(0, 9, (9, 5, 1))
    )
    decoded = masks.decode(noisy.round().astype(np.uint8))
    assert np.array_equal(decoded[..., 0], np.array(values)[indices])
    assert np.array_equal(masks.nearest(noisy.astype(np.uint8)), masks.codes[indices])
    assert MaskCoding.from_dict(masks.to_dict()) == masks
    for damaged in ({"values": [3, 1]}, {"values": [1, [0, 0, 0]]}, {"palette": "00"}):
        with pytest.raises(InputError, match="target is damaged"):
            MaskCoding.from_dict({**masks.to_dict(), **damaged})


def test_data_of_masks_are_their_codes_and_annotators_of_an_image_are_on_one_side(tmp_path):
    write(tmp_path, (0, 3, 9))
    data = DiffusionData(
        tmp_path / "masks", condition=str(tmp_path / "images"), masks="bits", size=8, val=2
    )
    assert data.channels == 2
    x, _ = data.batch(data.train)
    assert set(x.unique().tolist()) == {-1.0, 1.0}  # also once they are resized
    sides = [{Path(data.name(i)).stem for i in part} for part in (data.train, data.val)]
    assert len(data.val) == 4
    assert not sides[0] & sides[1]
    assert set(np.unique(data.images(data.train))) == {0, 128, 255}
    assert "masks of the values 0, 3, 9, as bits" in data.describe()


def test_what_is_no_mask_is_told(tmp_path):
    write(tmp_path)
    options = {"out": tmp_path / "run", "data": str(tmp_path / "images"), "target": "mask"}
    with pytest.raises(InputError, match="leave out --colour"):
        DiffusionOptions(**options, classes=True)
    with pytest.raises(InputError, match=r"hold 1.. values from 0 to 255, but masks have up to 32"):
        train(DiffusionOptions(**options, condition=str(tmp_path / "images")))


@pytest.mark.parametrize("levels", [4, 8, 200])
def test_greys_of_soft_edges_are_no_classes(tmp_path, levels):
    """As a condition they are a picture, which keeps all that they say; masks cannot be made."""
    y, x = np.indices((48, 48))
    for i in range(4):
        write_image(tmp_path / f"images/{i}.png", ((x + y + i) % 256).astype(np.uint8))
        cover = np.clip((10 + i - np.hypot(y - 20, x - 25)) / 2 + 0.5, 0, 1)
        soft = np.rint(np.rint(cover * levels) * (255 / levels))
        write_image(tmp_path / f"masks/{i}.png", soft.astype(np.uint8))
    data = DiffusionData(tmp_path / "images", condition=str(tmp_path / "masks"))
    assert data.condition.kind == "picture"
    told = "not masks, as the edges between 0, 255 are soft" in data.describe()
    assert told == (levels < 32)  # of more values nobody expects classes
    assert Condition.from_dict(data.condition.to_dict()) == data.condition
    said = r"soft edges, or .* around 0, 255\? --mask-values 0 255 gives each pixel the nearest"
    for given in ({"joint": tmp_path / "masks"}, {"masks": "bits"}):
        folder = tmp_path / ("images" if "joint" in given else "masks")
        with pytest.raises(InputError, match=said):
            DiffusionData(folder, **given)
        for cleaning in (MaskCleaning((0, 255)), MaskCleaning(threshold=True)):
            shown = DiffusionData(folder, **given, cleaning=cleaning).images([0, 1, 2, 3])
            for mask, file in zip(shown[:, :, -48:, 0], "0123", strict=True):
                soft = read_image(tmp_path / f"masks/{file}.png")[..., 0]
                assert np.array_equal(mask, np.where(soft > 127.5, 255, 0))


def test_masks_to_make_images_from_are_cleaned_in_training_and_later(tmp_path):
    """The model keeps what was done; a JPEG file is as good as a PNG file then."""
    mask = np.kron(np.eye(4, dtype=np.uint8) * 255, np.ones((8, 8), np.uint8))
    for i in range(4):
        write_image(tmp_path / f"images/{i}.png", np.full((32, 32), 60 * i, np.uint8))
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(np.roll(mask, i, 0)).save(tmp_path / f"masks/{i}.jpg", quality=60)
    given = {"data": str(tmp_path / "images"), "device": "cpu", "timesteps": 3, "batch_size": 4}
    given |= {"condition": str(tmp_path / "masks"), "steps": 1, "val": 1, "width": 8}
    train(DiffusionOptions(**given, mask_values=(0, 255), out=tmp_path / "run"))
    model = load(tmp_path / "run/model", device="cpu")
    assert model.model.condition.cleaning == MaskCleaning((0, 255))
    kind = ImageKind(size=None, channels=1)
    for read in (model.model.condition.given, model.model.condition.unread):
        seen = read(tmp_path / "masks/1.jpg", kind)
        picture = seen if isinstance(seen, torch.Tensor) else seen.read()
        assert torch.equal(picture[1] * 255, torch.from_numpy(np.roll(mask, 1, 0)).float())
        assert torch.equal(picture[0], 1 - picture[1])
    with pytest.raises(InputError, match="grey is made from the image itself, and --mask-values"):
        train(DiffusionOptions(**given | {"condition": "grey"}, threshold_masks=True))
    with pytest.raises(InputError, match="say what masks mean, and there are none"):
        DiffusionOptions(mask_values=(0, 255))


def test_two_encodings_of_masks_are_no_three_classes(tmp_path):
    for i in range(4):
        write_image(tmp_path / f"{i}.png", np.eye(9, dtype=np.uint8) * (255 if i % 2 else 1))
    with pytest.raises(InputError, match="one class\\? --threshold-masks unites them"):
        DiffusionData(tmp_path, masks="bits")
    data = DiffusionData(tmp_path, masks="bits", cleaning=MaskCleaning(threshold=True))
    assert data.masks.values == (0, 255)


def test_a_model_of_masks_alone_draws_them_from_noise(tmp_path, capsys, short_runs):
    write(tmp_path, count=4, side=8)
    made, tiny = tmp_path / "made", ["--width", 8, "--steps", 2, "--val", 1, "--device", "cpu"]

    def run(script, options, *argv):
        return run_script(script.main, options, list(map(str, argv)))

    given = ["--target", "mask", "--data", tmp_path / "masks", "--out", tmp_path / "run", *tiny]
    assert run(train_ddpm, DiffusionOptions, *given) == 0
    model = tmp_path / "run/model"
    assert "unet-sample-ddpm" in (model / "README.md").read_text()
    argv = ["--model", model, "--count", 3, "--out", made, "--steps", 2]
    assert run(sample_ddpm, sample_ddpm.SampleOptions, *argv) == 0
    files = list_images(made / "images")
    assert {int(v) for file in files for v in np.unique(read_image(file))} <= {0, 255}
    # A model that makes images from masks takes them as they are.
    given = ["--data", tmp_path / "images", "--condition", tmp_path / "masks/1"]
    given += ["--out", tmp_path / "from-masks", *tiny]
    assert run(train_ddpm, DiffusionOptions, *given) == 0
    argv = ["--model", tmp_path / "from-masks/model", "--condition", made / "images"]
    argv += ["--out", tmp_path / "drawn", "--steps", 2]
    assert run(sample_ddpm, sample_ddpm.SampleOptions, *argv) == 0
    assert [f.name for f in list_images(tmp_path / "drawn/images")] == [f.name for f in files]
    capsys.readouterr()
    given = [
        "--model",
        model,
        "--input",
        tmp_path / "images",
        "--samples",
        2,
        "--out",
        tmp_path / "p",
    ]
    assert run(predict_seg, predict_seg.PredictOptions, *given) == 2
    assert "makes no masks from images" in capsys.readouterr().err
    argv = ["--model", model, "--data", tmp_path / "masks"]
    assert run(eval_ddpm, eval_ddpm.EvalOptions, *argv) == 2
    assert "look at those that sample-ddpm makes" in capsys.readouterr().err


def test_a_model_of_masks_makes_masks_of_images(tmp_path, capsys, short_runs):
    write(tmp_path, count=4, side=8)
    options = DiffusionOptions(
        out=tmp_path / "run",
        data=str(tmp_path / "masks"),
        condition=str(tmp_path / "images"),
        target="mask",
        width=8,
        steps=2,
        evaluations=1,
        batch_size=4,
        timesteps=3,  # as many steps have the samples of predict-seg
        val=1,
        device="cpu",
    )
    train(options)
    model = tmp_path / "run/model"
    torch.manual_seed(0)
    made = load(model, device="cpu")(3, pictures=tmp_path / "images/0.png", steps=3)
    assert made.shape == (3, 8, 8, 1)
    assert set(np.unique(made)) <= {0, 255}
    assert "unet-predict-seg" in (model / "README.md").read_text()
    argv = ["--model", model, "--condition", tmp_path / "images", "--out", tmp_path / "made"]
    argv += ["--steps", "2", "--each", "2"]
    assert run_script(sample_ddpm.main, sample_ddpm.SampleOptions, list(map(str, argv))) == 0
    assert set(np.unique(read_image(tmp_path / "made/images/3_1.png"))) <= {0, 255}

    def predict(*flags: object) -> int:
        argv = ["--model", model, "--input", tmp_path / "images", "--out", tmp_path / "p", *flags]
        return run_script(predict_seg.main, predict_seg.PredictOptions, list(map(str, argv)))

    assert predict() == 2
    assert "such as --samples 16" in capsys.readouterr().err
    assert predict("--samples", 3, "--tta") == 2
    assert predict("--samples", 3, "--keep-samples") == 0
    samples = np.stack([read_image(tmp_path / f"p/3_sample_{i}.png")[..., 0] for i in range(3)])
    probability = read_image(tmp_path / "p/3_probability.png")[..., 0] / 65535
    np.testing.assert_allclose(probability, (samples == 255).mean(axis=0), atol=1e-4)
    mask = read_image(tmp_path / "p/3_mask.png")[..., 0]
    assert np.array_equal(mask == 255, probability > 0.5)
    unsure = read_image(tmp_path / "p/3_entropy.png")[..., 0] > 0
    assert np.array_equal(unsure, (samples != samples[0]).any(axis=0))
    sampler = MaskSampler(model, 3, SamplingOptions(device="cpu"))
    assert np.array_equal(sampler(tmp_path / "images/3.png") * 255, samples)
    large = tmp_path / "large.png"
    write_image(large, read_image(tmp_path / "images/3.png").repeat(2, 0).repeat(2, 1))
    assert sampler(large).shape == (3, 16, 16)
    write_image(large, np.zeros((8, 10), np.uint8))
    assert sampler(large).shape == (3, 8, 10)
    sampler.sampler.model.info["resized"] = True  # as if the training images had been
    with pytest.raises(InputError, match="cut it to these proportions"):
        sampler(large)


def test_image_and_mask_are_made_together_as_data_to_train_on(tmp_path, capsys):
    """Same geometry; the model keeps the classes; what is sampled is data for train-seg."""
    write(tmp_path, (0, 3, 9), count=6, side=20)
    masks = tmp_path / "masks/1"
    given = {"joint": masks, "crops": True, "size": 16, "flips": True, "val": 1}
    data = DiffusionData(tmp_path / "images", **given)
    x = data.samples(seed=3)[0, 1]["image"]
    assert x.shape == (3, 16, 16)
    image = (x[0] + 1) * 127.5
    index = (x[1] > 0).int() + 2 * (x[2] > 0).int()
    assert torch.equal(index, ((image.round().int() * 3 + 20) // 300).int())
    shown = data.images([0])
    assert shown.shape == (1, 16, 32, 1)
    assert set(np.unique(shown[:, :, 16:])) <= {0, 128, 255}
    assert "with masks of the values 0, 3, 9, as bits" in data.describe()
    argv = ["--data", tmp_path / "images", "--joint", masks, "--crops", "--size", 16, "--val", 1]
    argv += ["--width", 8, "--batch-size", 4, "--timesteps", 3, "--evaluations", 1, "--steps", 2]
    run = tmp_path / "run"
    assert run_script(train_ddpm.main, DiffusionOptions, list(map(str, [*argv, "--out", run]))) == 0
    again = list(map(str, ["--out", run, "--resume", "--steps", 3]))
    assert run_script(train_ddpm.main, DiffusionOptions, again) == 0
    assert "images with masks of the values 0, 3, 9" in (run / "model/README.md").read_text()
    model = load(run / "model", device="cpu")
    assert (model.channels, model.model.image_channels) == (2, 3)
    made = model(5, steps=2, seed=1)
    assert made.shape == (5, 16, 16, 2)
    assert set(np.unique(made[..., 1])) <= {0, 3, 9}
    argv = ["--model", run / "model", "--out", tmp_path / "made", "--steps", 2, "--seed", 1]
    argv = list(map(str, [*argv, "--count", 5, "--gif", "--npz"]))
    assert run_script(sample_ddpm.main, sample_ddpm.SampleOptions, argv) == 0
    assert "train-seg --data real_data --synthetic" in capsys.readouterr().out
    pairs = find_pairs(tmp_path / "made")
    assert [pair.name for pair in pairs] == [f"{i:05d}" for i in range(5)]
    for pair, both in zip(pairs, made, strict=True):
        assert np.array_equal(pair.read_image(), both[..., :1])
        assert np.array_equal(pair.read_mask(), both[..., 1])
    argv = ["--model", run / "model", "--data", tmp_path / "images", "--out", tmp_path / "judged"]
    assert run_script(eval_ddpm.main, eval_ddpm.EvalOptions, list(map(str, argv))) == 2
    assert "makes images with masks, which eval-ddpm does not judge" in capsys.readouterr().err


@pytest.mark.parametrize("condition", ["masks/2", "lowres:2"])
def test_image_and_mask_are_made_together_from_a_picture(tmp_path, condition, short_runs):
    """Beside the image and the codes of its mask the network sees the picture, and makes all else
    as without; a model without it can start one."""
    write(tmp_path, (0, 3, 9), count=6)
    images, masks = tmp_path / "images", tmp_path / "masks/1"
    given = condition if ":" in condition else str(tmp_path / condition)
    data = DiffusionData(images, joint=masks, condition=given, val=1)
    plain = DiffusionData(images, joint=masks, val=1)
    assert (data.channels, data.codes, data.condition.channels) == (3, 2, 1 if ":" in given else 3)
    for index in data.train:
        assert torch.equal(data.batch([index])[0], plain.batch([index])[0])
        picture, image = data.conditions([index])[0].picture, data.batch([index])[0][0, :1]
        read = Path(given, Path(data.name(index)).name)
        expected = (
            data.condition.make(image, np.random.default_rng(0))
            if data.condition.from_image
            else data.condition.as_tensor(data.condition.read(read))
        )
        assert torch.equal(picture, expected)

    def run(script, options, *argv):
        assert run_script(script.main, options, list(map(str, argv))) == 0

    said = ["--data", images, "--joint", masks, "--val", 1, "--width", 8, "--timesteps", 3]
    said += ["--steps", 1, "--batch-size", 4, "--device", "cpu"]
    run(train_ddpm, DiffusionOptions, *said, "--out", tmp_path / "plain")
    said += ["--condition", given, "--init", tmp_path / "plain/model"]
    run(train_ddpm, DiffusionOptions, *said, "--out", tmp_path / "run")
    pictures = tmp_path / "pictures"
    for i in range(2):
        small = read_image(images / f"{i}.png")[::2, ::2]
        write_image(pictures / f"{i}.png", small if ":" in given else read_image(masks / "1.png"))
    made = ("--model", tmp_path / "run/model", "--condition", pictures, "--out", tmp_path / "made")
    run(sample_ddpm, sample_ddpm.SampleOptions, *made, "--steps", 2, "--each", 2)
    pairs = find_pairs(tmp_path / "made")
    assert [pair.name for pair in pairs] == ["0_0", "0_1", "1_0", "1_1"]
    assert {pair.read_image().shape for pair in pairs} == {(16, 16, 1)}
    assert {v for pair in pairs for v in np.unique(pair.read_mask()).tolist()} <= {0, 3, 9}
    with pytest.raises(InputError, match="makes no masks from images"):
        MaskSampler(tmp_path / "run/model", 2, SamplingOptions(device="cpu"))


COLOURS = [(0, 0, 0), (30, 200, 30), (200, 30, 30)]


def write_colours(folder: Path, stored: str) -> None:
    for i in range(6):
        image = np.random.default_rng(i).integers(0, 256, (16, 16)).astype(np.uint8)
        write_image(folder / f"images/{i}.png", image)
        indices = (image.astype(int) * 3 // 256).astype(np.uint8)
        if stored == "colours" or (stored == "both" and i % 2):
            write_image(folder / f"masks/{i}.png", np.array(COLOURS, np.uint8)[indices])
        else:
            order = (0, 2, 1) if stored == "other palettes" and i % 2 else (0, 1, 2)
            palette = np.array([COLOURS[o] for o in order], np.uint8)
            indices = np.argsort(order).astype(np.uint8)[indices]
            write_image(folder / f"masks/{i}.png", indices, palette.tobytes())


@pytest.mark.parametrize("stored", ["colours", "palette", "both", "other palettes"])
def test_masks_in_colours_have_the_classes_of_train_seg_and_are_shown_in_colours(tmp_path, stored):
    write_colours(tmp_path, stored)
    masks = tmp_path / "masks"
    table = SegmentationData(find_pairs(images=tmp_path / "images", masks=masks)).table
    data = DiffusionData(tmp_path / "images", joint=masks, val=0)
    assert (data.masks.values, data.masks.palette) == (table.values, table.palette)
    for i, shown in zip(data.train, data.images(data.train), strict=True):
        np.testing.assert_array_equal(shown[:, 16:], read_image(masks / Path(data.name(i)).name))
    if stored != "colours":
        twins = np.array([*COLOURS[:2], COLOURS[1]], np.uint8).tobytes()
        write_image(masks / "0.png", read_mask(masks / "2.png"), twins)
        with pytest.raises(InputError, match="1 and 2 of its palette both have the colour"):
            DiffusionData(tmp_path / "images", joint=masks)


@pytest.mark.parametrize("stored", ["colours", "palette"])
def test_masks_in_colours_are_made_in_these(tmp_path, stored, short_runs):
    write_colours(tmp_path, stored)
    images, masks, made = tmp_path / "images", tmp_path / "masks", {}
    table = SegmentationData(find_pairs(images=images, masks=masks)).table

    def run(script, options, *argv):
        assert run_script(script.main, options, list(map(str, argv))) == 0

    def check(file):
        mask = read_mask(file)
        table.encode(mask)  # which refuses what is none of its values
        assert {*map(tuple, read_image(file).reshape(-1, 3).tolist())} <= set(COLOURS)
        return mask.reshape(16, 16, -1)

    for kind, argv in {
        "joint": ("--data", images, "--joint", masks),
        "alone": ("--data", masks, "--target", "mask"),
        "from-images": ("--data", masks, "--target", "mask", "--condition", images),
    }.items():
        argv = [*argv, "--out", tmp_path / kind, "--val", 0, "--width", 8, "--batch-size", 4]
        argv += ["--timesteps", 3, "--steps", 1, "--device", "cpu"]
        run(train_ddpm, DiffusionOptions, *argv)
    depth = np.size(table.values[0])
    for kind, channels in (("joint", 1 + depth), ("alone", depth)):
        model, out = tmp_path / kind / "model", tmp_path / kind / "made"
        given = ("--model", model, "--out", out, "--steps", 2, "--count", 3)
        run(sample_ddpm, sample_ddpm.SampleOptions, *given)
        made[kind] = load(model, device="cpu")(3, steps=2)
        assert made[kind].shape == (3, 16, 16, channels)
        files = list_images(out / ("label" if kind == "joint" else "images"))
        for file, values in zip(files, made[kind], strict=True):
            np.testing.assert_array_equal(check(file), values[..., -depth:])
    for pair, both in zip(find_pairs(tmp_path / "joint/made"), made["joint"], strict=True):
        np.testing.assert_array_equal(pair.read_image(), both[..., :1])
    given = ("--model", tmp_path / "from-images/model", "--input", images / "0.png")
    given += ("--out", tmp_path / "predicted", "--samples", 2, "--keep-samples")
    run(predict_seg, predict_seg.PredictOptions, *given)
    for name in ("mask", "sample_0", "sample_1"):
        check(tmp_path / f"predicted/0_{name}.png")


def test_colours_as_conditions_are_pictures_and_indices_of_one_palette_are_masks(tmp_path):
    for stored, kind in (
        ("palette", "mask"),
        ("colours", "picture"),
        ("both", "picture"),
        ("other palettes", "picture"),
    ):
        write_colours(tmp_path / stored, stored)
        masks = str(tmp_path / stored / "masks")
        data = DiffusionData(tmp_path / stored / "images", condition=masks)
        assert data.condition.kind == kind


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_sampled_data_have_the_type_of_what_was_learnt(tmp_path, dtype):
    made = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 2)).astype(dtype)
    made[..., 0] = made[..., 0] * 16 + 0.25
    folder = SampleFolder(tmp_path / "made")
    folder.begin(Processes(), 2, masks=1, dtype=dtype)
    folder.add(made, 0)
    assert np.array_equal(folder.read(range(2)), made)
    pairs = find_pairs(tmp_path / "made")
    assert [pair.info.dtype for pair in pairs] == [dtype] * 2
    assert np.array_equal(pairs[1].read_mask(), made[1, ..., 1])


def test_masks_that_do_not_go_with_the_images_are_refused(tmp_path):
    write(tmp_path)
    images = tmp_path / "images"
    with pytest.raises(InputError, match="leave out --target mask, --latents and --colour rgba"):
        DiffusionOptions(data=str(images), joint=tmp_path, colour="rgba")
    with pytest.raises(InputError, match=r"0\.png' would be its own mask"):
        DiffusionData(images, joint=images)
    (tmp_path / "masks/1/3.png").unlink()
    with pytest.raises(InputError, match=r"has no mask for 1 image, such as '.*/3\.png'"):
        DiffusionData(images, joint=tmp_path / "masks/1")
    with pytest.raises(InputError, match="not with stacks, archives or generated"):
        DiffusionData("shapes", joint=tmp_path / "masks/1")
    write_image(tmp_path / "masks/2/3.png", np.zeros((5, 5), np.uint8))
    with pytest.raises(InputError, match="is 5 x 5, but its image 16 x 16"):
        DiffusionData(images, joint=tmp_path / "masks/2")
