"""The classifier of whole images: its network, its model folder, its training, its mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.data.images import DiffusionData
from diffusion.judging.classifier import ClassifierTask, ClassifierUNet, classifier_config
from diffusion.judging.features import ClassifierFeatures
from diffusion.model import DiffusionUNet
from unet import InputError, UNet, UNetConfig
from unet.training.cli import run_script
from unet.training.run import read_log
from unet.training.task import Processes
from unet_diffusion.train_classifier import ClassifierOptions, main

QUICK = ("--width", "4", "--batch-size", "20", "--device", "cpu", "--precision", "fp32")


def run(*arguments: object) -> int:
    return run_script(main, ClassifierOptions, list(map(str, arguments)))


def bars(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Grey noise with a bright bar: across (0), upright (1), or none (2)."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 120, (count, 12, 12), np.uint8)
    labels = rng.integers(0, 3, count).astype(np.uint8)
    for image, label, place in zip(images, labels, rng.integers(2, 10, count), strict=True):
        if label < 2:
            (image if label == 0 else image.T)[place] = 255
    return images, labels


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images, labels = bars(400)
    file = tmp_path_factory.mktemp("bars") / "bars.npz"
    np.savez(file, images=images, labels=labels)
    return file


# -- the network ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "channels", "levels"), [((28, 28), 1, 3), ((64, 48), 3, 4), ((7, 5), 1, 1)]
)
def test_images_of_any_size_give_logits_and_features(size, channels, levels):
    config = classifier_config(size, channels, 8)
    assert config.levels == levels
    model = ClassifierUNet(config, 5).eval()
    for more in (0, 9):
        x = torch.rand(2, channels, size[0] + more, size[1])
        with torch.no_grad():
            features, logits = model.features(x), model(x)
        assert features.shape == (2, 8 * 2 ** (levels - 1))
        assert logits.shape == (2, 5)
        torch.testing.assert_close(logits, model.head(features))


def test_features_are_the_mean_of_the_coarsest_map_of_a_unet():
    config = classifier_config((28, 28), 1, 8)
    model, unet = ClassifierUNet(config, 5).eval(), UNet(config).eval()
    missing, unknown = unet.load_state_dict(model.trunk.state_dict(), strict=False)
    assert unknown == []
    assert {name.split(".")[0] for name in missing} == {"decoder"}
    x, maps = torch.rand(2, 1, 28, 28), []
    with torch.no_grad():
        unet(x, maps=maps)
        torch.testing.assert_close(model.features(x), maps[0].mean(dim=(2, 3)))


def test_every_weight_is_used():
    model = ClassifierUNet(classifier_config((32, 32), 1, 4), 3)
    model(torch.rand(2, 1, 32, 32)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_coarsest_map_is_small_for_any_size():
    for size in (1, 5, 8, 12, 28, 32, 64, 128, 1000):
        config = classifier_config((size, 2 * size), 1, 8)
        assert max(config.multipliers) <= 8
        assert min(size, 3) <= -(-size // config.stride) * 2
        assert -(-size // config.stride) <= 6 or config.levels == 5


def test_a_model_folder_gives_the_model_back(tmp_path):
    info = {"classes": ["cat", "dog"], "size": [20, 24]}
    model = ClassifierUNet(classifier_config((20, 24), 3, 4), 2, info).eval()
    model.save_pretrained(tmp_path / "model")
    again = ClassifierUNet.from_pretrained(tmp_path / "model")
    x = torch.rand(2, 3, 20, 24)
    torch.testing.assert_close(again(x), model(x))
    assert (again.classes, again.size) == (("cat", "dog"), (20, 24))
    with pytest.raises(InputError, match="holds a model for classification, but diffusion"):
        DiffusionUNet.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    "info",
    [{}, {"classes": ["a"], "size": [4]}, {"classes": "ab", "size": 4}, {"size": ["4", "4"]}],
)
def test_a_damaged_config_is_named(info):
    model = ClassifierUNet(UNetConfig(channels=4, multipliers=(1,)), 2, info)
    with pytest.raises(InputError, match=r"must name its 2 classes in info\.classes"):
        _ = model.classes
    with pytest.raises(InputError, match=r"info\.size"):
        _ = model.size


def test_a_network_with_a_timestep_is_refused():
    with pytest.raises(InputError, match="time=False"):
        ClassifierUNet(UNetConfig(block="res", time=True), 2)


# -- training -------------------------------------------------------------------------------------


def test_training_tells_the_classes_apart(archive, tmp_path, capsys):
    out = tmp_path / "run"
    options = (*QUICK, "--width", 8, "--steps", 80, "--evaluations", 2)
    assert run("--data", archive, "--out", out, *options) == 0
    assert "held-out images recognised" in capsys.readouterr().out
    evaluated = [e for e in read_log(out / "metrics.jsonl") if "val_accuracy" in e]
    assert [e["step"] for e in evaluated] == [40, 80]
    extract = ClassifierFeatures(out / "model")
    images, labels = bars(300, seed=1)
    names = np.array([int(name) for name in extract.classes])
    accuracy = (names[extract.classify(images[..., None])] == labels).mean()
    assert accuracy > 0.9
    described = json.loads((out / "model/config.json").read_text())
    told = described["info"].pop("training")
    assert described["info"] == {"classes": ["0", "1", "2"], "size": [12, 12]}
    assert told["figures"].keys() == {"loss", "accuracy"}


def test_resumed_is_uninterrupted(archive, tmp_path):
    for run_name, sittings in (("one", [4]), ("two", [2, 4])):
        for i, steps in enumerate(sittings):
            more = ("--resume",) if i else ()
            out = ("--out", tmp_path / run_name, "--steps", steps, "--schedule", "constant")
            assert run("--data", archive, *out, *QUICK, "--warmup", 0, *more) == 0
    one, two = (
        torch.load(tmp_path / name / "state/state.pt", weights_only=True)["model"]
        for name in ("one", "two")
    )
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_colour_images_in_class_folders(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(40):
        colour = ("blue", "red")[i % 2]
        pixels = rng.integers(0, 60, (9, 14, 3), np.uint8)
        pixels[..., 2 if colour == "blue" else 0] += 150
        (tmp_path / "data" / colour).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "data" / colour / f"{i}.png")
    out = tmp_path / "run"
    assert run("--data", tmp_path / "data", "--out", out, *QUICK, "--steps", 30) == 0
    extract = ClassifierFeatures(out / "model")
    assert extract.classes == ("blue", "red")
    red = np.zeros((3, 9, 14, 3), np.uint8) + np.array([180, 30, 30], np.uint8)
    assert extract.classify(red).tolist() == [1, 1, 1]


def task(archive: Path, shift: int) -> ClassifierTask:
    return ClassifierTask(DiffusionData(str(archive), flips=False), shift, seed=0)


def test_shifts_move_the_whole_image_by_up_to_their_limit(archive):
    plain, shifted = task(archive, 0), task(archive, 2)
    seen = set()
    for epoch in range(40):
        image, moved = plain[epoch, 3]["image"], shifted[epoch, 3]["image"]
        torch.testing.assert_close(image, plain[0, 3]["image"])
        found = [
            (dy, dx)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            if torch.equal(moved[:, 2 + dy : 10 + dy, 2 + dx : 10 + dx], image[:, 2:10, 2:10])
        ]
        assert len(found) == 1
        seen.add(found[0])
        assert torch.equal(moved, shifted[epoch, 3]["image"])
        assert moved.min() >= image.min()  # the edge is repeated, not filled with another grey
    assert {dy for dy, _ in seen} == {dx for _, dx in seen} == {-2, -1, 0, 1, 2}


def test_held_out_figures_do_not_depend_on_the_number_of_processes(archive):
    judge = task(archive, 2)
    model = ClassifierUNet(classifier_config((12, 12), 1, 4), 3).eval()
    data = judge.data
    images, labels = data.batch(data.val)
    with torch.no_grad():
        logits = model(images)
        found = judge.evaluate(model, Processes())
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)))
    assert found["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))

    parts = []

    class OneOfTwo(Processes):
        def gather(self, part):
            parts.append(part)
            return [part]

    with torch.no_grad():
        for rank in (0, 1):
            judge.evaluate(model, OneOfTwo(rank, 2))
    loss, right = np.sum(parts, axis=0) / len(data.val)
    assert (loss, right) == pytest.approx((found["loss"], found["accuracy"]))


def test_digits_are_recognised(mnist):
    data = DiffusionData(str(mnist / "mnist_train.npz"), flips=False)
    digits = ClassifierTask(data, 2, seed=0)
    assert digits.classes == tuple("0123456789")
    assert (digits.size, digits.channels) == ((28, 28), 1)
    assert digits[0, 0]["image"].shape == (1, 28, 28)


# -- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--width", "0"), "--width 0"),
        (("--shift", "-1"), "--shift -1"),
        (("--size", "0"), "--size 0"),
        (("--batch-size", "0"), "--batch-size 0"),
    ],
)
def test_wrong_options_are_named(archive, tmp_path, capsys, arguments, part):
    assert run("--data", archive, "--out", tmp_path / "run", *arguments) == 2
    assert part in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("labels", "told"),
    [(None, "has no classes: put"), (np.zeros(400, np.uint8), "tells two or more apart")],
)
def test_images_without_two_classes_are_refused(tmp_path, capsys, labels, told):
    images, _ = bars(400)
    arrays = {"images": images} if labels is None else {"images": images, "labels": labels}
    np.savez(tmp_path / "one.npz", **arrays)
    assert run("--data", tmp_path / "one.npz", "--out", tmp_path / "run", *QUICK) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_batch_of_one_pixel_is_refused(tmp_path, capsys):
    np.savez(tmp_path / "tiny.npz", images=bars(60)[0][:, :2, :2], labels=bars(60)[1])
    arguments = ("--data", tmp_path / "tiny.npz", "--out", tmp_path / "run", "--batch-size", 1)
    assert run(*arguments) == 2
    assert "single pixel at the coarsest level" in capsys.readouterr().err
