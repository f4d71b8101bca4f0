"""The path from images to pictures of the result, and every mistake on the way."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.judging.report import write_report
from segmentation.data.dataset import SegmentationData
from segmentation.data.pairs import find_pairs, pairs_from_arrays
from segmentation.data.phantom import phantom_stack
from segmentation.decisions import chosen_fit, chosen_part, decide
from segmentation.judging.evaluation import COARSE, evaluate
from segmentation.model import SegmentationUNet
from segmentation.options import RECIPES, SegmentationOptions
from segmentation.predict import Predictor
from segmentation.training import also_balanced, load_data, make_model, train
from tests.forks import SCRIPTS, run_forked
from tests.unet.training.toy_training import compiled_in_one_graph
from unet import InputError, UNetConfig
from unet.files.images import read_image, write_image
from unet.training.cli import run_script
from unet.training.config_file import load_config
from unet.training.run import read_log
from unet.weights.start import Start
from unet_diffusion import demo, eval_seg, predict_seg, train_seg

pytestmark = pytest.mark.usefixtures("short_runs")

SMALL = ("--width", "4", "--crop", "32", "--batch-size", "2", "--steps", "2", "--evaluations", "1")


def run_train(*arguments: object) -> int:
    argv = list(map(str, arguments))
    return run_script(train_seg.main, SegmentationOptions, argv, recipes=RECIPES)


def run_predict(*arguments: object) -> int:
    return run_script(predict_seg.main, predict_seg.PredictOptions, list(map(str, arguments)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six small images with masks of values 0 and 255."""
    images, labels = phantom_stack(6, (40, 56), seed=1)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        label[0, :2] = 0, 255  # both classes in every mask, however small it is
        write_image(tmp_path / "data/image" / f"{i}.png", image)
        write_image(tmp_path / "data/label" / f"{i}.png", label)
    return tmp_path / "data"


# -- the whole path -------------------------------------------------------------------------------


def test_from_a_folder_of_images_to_masks_of_new_ones(folder, tmp_path, capsys, reports):
    run, out = tmp_path / "run", tmp_path / "out"
    assert run_train("--data", folder, "--out", run, *SMALL) == 0
    printed = capsys.readouterr().out
    for fact in ("6 images of 40 x 56", "uint8", "value 255", "training: 5", "validation: 1"):
        assert fact in printed
    assert [e["step"] for e in read_log(run / "metrics.jsonl")] == [2, 2]
    assert (run / "samples/held-out-000002.png").exists()
    assert not (run / "samples/held-out-000001.png").exists()

    # A folder of images of another size, one of which is damaged.
    new = tmp_path / "new"
    write_image(new / "b.png", phantom_stack(1, (33, 47), seed=9)[0][0])
    (new / "a.png").write_bytes(b"")
    assert run_predict("--model", run / "model", "--input", new, "--out", out) == 1
    assert "a.png" in capsys.readouterr().err
    assert sorted(p.name for p in out.iterdir()) == [
        "b_mask.png",
        "b_overlay.png",
        "b_probability.png",
        "legend.png",
    ]
    mask, probability = read_image(out / "b_mask.png"), read_image(out / "b_probability.png")
    assert mask.shape == probability.shape == (33, 47, 1)
    assert probability.dtype == np.uint16
    assert set(np.unique(mask)) <= {0, 255}
    # The mask is the probability, cut at the threshold that was best on the held-out image.
    threshold = SegmentationUNet.from_pretrained(run / "model").info["threshold"]
    assert np.array_equal(mask == 255, probability > threshold * 65535)
    assert (run / "report.png").stat().st_size > 10_000
    assert read_image(out / "b_overlay.png").shape == (33, 47, 3)


@pytest.fixture
def corner(tmp_path: Path) -> Path:
    """Three images, of which the second has labels in one corner; the rest of the masks is 7."""
    images, labels = phantom_stack(3, (96, 128), seed=1)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        seen = label.copy()
        label[:] = 7
        if i == 1:
            label[:64, 40:] = seen[:64, 40:]
        write_image(tmp_path / "corner/image" / f"{i}.png", image)
        write_image(tmp_path / "corner/label" / f"{i}.png", label)
    return tmp_path / "corner"


def test_what_this_project_wrote_among_the_data_is_left_out_which_is_said(folder, tmp_path, capsys):
    given = ("--data", folder, "--out", tmp_path / "run", *SMALL)
    assert run_train(*given) == 0
    assert "left out" not in capsys.readouterr().err
    (tmp_path / "run").rename(folder / "old")
    for name in ("mask", "probability", "overlay"):
        write_image(folder / "image" / f"2_{name}.png", np.zeros((40, 56), np.uint8))
    told = (
        f"left out: 3 files of predictions, such as {folder / 'image/2_mask.png'}, and 1 folder of "
        f"runs, evaluations or samples, such as {folder / 'old'}; name one by itself if it is meant"
    )
    assert run_train(*given) == 0
    said = capsys.readouterr()
    assert said.err.splitlines().count(told) == 1
    assert "6 images of 40 x 56" in said.out
    score = ("--model", folder / "old/model", "--data", folder, "--out", tmp_path / "scores")
    assert run_script(eval_seg.main, eval_seg.EvalOptions, list(map(str, score))) == 0
    assert told in capsys.readouterr().err


def test_one_labelled_corner_is_enough(corner, tmp_path, capsys):
    """A strip of the corner is held out, and scoring finds the same strip again."""
    run = tmp_path / "run"
    given = ("--data", corner, "--ignore-value", 7, *SMALL)
    assert run_train(*given, "--out", run) == 0
    printed = capsys.readouterr().out
    for fact in (
        "2 images without any label left out",
        "training: 1 image (1_columns_0-109)",
        "validation: 1 image (1_columns_110-127)",
    ):
        assert fact in printed
    scored = ("--model", run / "model", "--out", tmp_path / "scores")
    assert run_script(eval_seg.main, eval_seg.EvalOptions, list(map(str, scored))) == 0
    found = json.loads((tmp_path / "scores/scores.json").read_text())
    assert [image["name"] for image in found["per_image"]] == ["1_columns_110-127"]


def test_nothing_need_be_held_out(corner, tmp_path, capsys, reports):
    """The last weights are kept then, and the figures are said to be of the training images."""
    given = ("--data", corner, "--ignore-value", 7, *SMALL, "--val", 0, "--out", tmp_path / "run")
    assert run_train(*given) == 0
    printed = capsys.readouterr().out
    assert "nothing is held out, so no figure tells how the model does on new images" in printed
    assert "the last ones" in printed
    model = SegmentationUNet.from_pretrained(tmp_path / "run/model")
    assert model.info["threshold"] == 0.5
    assert model.info["training"]["figures"] == {}
    assert (tmp_path / "run/report.png").exists()
    assert (tmp_path / "run/samples/training-000002.png").exists()


def test_a_run_repeats_from_its_config(folder, tmp_path):
    assert run_train("--data", folder, "--out", tmp_path / "a", *SMALL, "--elastic", "3") == 0
    again = ("--config", tmp_path / "a/config.yaml", "--out", tmp_path / "b")
    assert run_train(*again) == 0
    weights = [(tmp_path / r / "model/model.safetensors").read_bytes() for r in "ab"]
    assert weights[0] == weights[1]


def test_a_run_resumes_with_its_own_settings_and_their_reasons(folder, tmp_path, capsys):
    def reasons():
        lines = (tmp_path / "a/config.yaml").read_text().splitlines()
        return [line.removeprefix("# ") for line in lines if line.startswith("# ")]

    assert run_train("--data", folder, "--out", tmp_path / "a", *SMALL) == 0
    before = reasons()
    assert any("muon" in line and "learns fastest" in line for line in before)
    capsys.readouterr()
    assert run_train("--out", tmp_path / "a", "--resume", "--steps", "4") == 0
    assert reasons() == [line.replace("2 steps", "4 steps") for line in before]
    assert set(reasons()[1:]) <= set(capsys.readouterr().out.splitlines())
    assert [e["step"] for e in read_log(tmp_path / "a/metrics.jsonl") if "val_loss" in e] == [2, 4]
    config = load_config(SegmentationOptions, tmp_path / "a/config.yaml")
    assert config["width"] == 4
    assert not config["resume"]


OTHERS = {
    "--data": "elsewhere",
    "--seed": 1,
    "--batch-size": 4,
    "--network": "classic",
    "--width": 8,
    "--val": 0.5,
    "--loss": "dice",
    "--crop": 16,
    "--rotation": 90.0,
    "--best-by": "dice",
    "--init": "model",
}


def test_a_run_is_not_made_another_one_when_it_goes_on(folder, tmp_path, capsys):
    run = tmp_path / "a"
    assert run_train("--data", folder, "--out", run, *SMALL) == 0
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    saved = load_config(SegmentationOptions, run / "config.yaml")
    for option, value in OTHERS.items():
        capsys.readouterr()
        was = saved[option[2:].replace("-", "_")]
        model = tmp_path / "a/model" if option == "--init" else value  # which is read first
        assert run_train("--out", run, "--resume", "--steps", 9, option, model) == 2
        told = f"no {option}" if was is None else f"{option} {was}"
        error = capsys.readouterr().err
        assert f"a was started with {told}, not {option} {model}: leave that out to" in error
        assert ("have moved" in error) == (option == "--data")
    assert run_train("--out", run, "--resume", "--flips", "False", "--recipe", "paper") == 2
    error = capsys.readouterr().err
    assert "--network segmentation" in error
    assert "--network paper" in error
    assert "--flips False" in error
    assert {file: file.read_bytes() for file in before} == before


def test_how_a_run_trains_may_change_and_is_said(folder, tmp_path, capsys):
    run, weights = tmp_path / "a", tmp_path / "b"
    assert run_train("--data", folder, "--out", weights, *SMALL, "--steps", 1) == 0
    assert run_train("--data", folder, "--out", run, *SMALL, "--init", weights / "model") == 0
    capsys.readouterr()
    assert run_train("--out", run, "--resume", "--max-minutes", 0.01, "--workers", 1) == 0
    told = capsys.readouterr().out
    assert "continuing with --max-minutes 0.01, --workers 1 instead of --steps 2\n" in told
    assert "started with" not in told  # the weights are those of the state
    found = load_config(SegmentationOptions, run / "config.yaml")
    assert (found["steps"], found["max_minutes"], found["workers"]) == (None, 0.01, 1)


def test_from_python_what_is_not_given_is_the_runs_own(folder, tmp_path, capsys):
    run = tmp_path / "a"
    assert run_train("--data", folder, "--out", run, *SMALL, "--lr", 0.01) == 0
    again = {"out": run, "data": str(folder), "resume": True}
    train(SegmentationOptions(**again, evaluations=1))
    assert "continuing with" not in capsys.readouterr().out
    found = load_config(SegmentationOptions, run / "config.yaml")
    assert (found["lr"], found["steps"], found["width"]) == (0.01, 2, 4)
    with pytest.raises(InputError, match=r"--data .*, not --data phantom"):
        train(SegmentationOptions(out=run, resume=True))


def test_a_stopped_and_resumed_training_is_that_of_one_sitting(folder, tmp_path, capsys):
    """With whole samples: shuffled, turned, deformed, averaged, and synthetic ones among them."""
    made = tmp_path / "made"
    for i, (image, label) in enumerate(zip(*phantom_stack(2, (32, 32), seed=3), strict=True)):
        write_image(made / "image" / f"{i}.png", image)
        write_image(made / "label" / f"{i}.png", label)
    options = ("--data", folder, *SMALL, "--schedule", "constant", "--warmup", "0")
    options = (*options, "--synthetic", made, "--synthetic-share", "0.75")
    for run, sittings in (("one", [4]), ("two", [2, 4])):
        for sitting, steps in enumerate(sittings):
            more = ("--resume",) if sitting else ()
            budget = ("--out", tmp_path / run, "--steps", steps, *more)
            assert run_train(*options, *budget) == 0
    states = [
        torch.load(tmp_path / run / "state/state.pt", weights_only=True) for run in ("one", "two")
    ]
    for part in ("model", "ema"):
        assert all(torch.equal(v, states[1][part][k]) for k, v in states[0][part].items())
    told = capsys.readouterr().out
    assert "also for training: 2 images" in told
    assert "0.75 of the crops, never scored" in told


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("empty", "no image in this folder"),
        ("colour", "holds images of RGB uint8, but the real ones are grey uint8"),
        ("values", "label/0.png': unexpected values 3 in"),
        ("small", "--crop 32 is larger than a synthetic image, 16 pixels a side"),
        ("share", "--synthetic-share 1.0 must be above 0"),
        ("alone", "--synthetic-share 0.25 has no effect without"),
    ],
)
def test_synthetic_images_that_do_not_go_with_the_real_ones_are_refused(
    folder, tmp_path, capsys, change, told
):
    made, side = tmp_path / "made", 16 if change == "small" else 32
    image, label = np.zeros((side, side), np.uint8), np.full((side, side), 255, np.uint8)
    if change == "empty":
        made.mkdir()
    else:
        write_image(
            made / "image/0.png", np.stack([image] * 3, -1) if change == "colour" else image
        )
        write_image(made / "label/0.png", label * 0 + 3 if change == "values" else label)
    flags = {"share": ("--synthetic", made, "--synthetic-share", 1.0)}
    flags["alone"] = ("--synthetic-share", 0.25)
    given = flags.get(change, ("--synthetic", made))
    assert run_train("--data", folder, "--out", tmp_path / "run", *SMALL, *given) == 2
    error = capsys.readouterr().err.strip()
    assert told in error
    assert "\n" not in error
    assert not (tmp_path / "run").exists()


def test_the_demo_shows_what_it_says(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diffusion.training.write_report", write_report)
    for name, value in {"PHANTOM_SLICES": 6, "STAINED_SLICES": 4}.items():
        monkeypatch.setattr(f"segmentation.training.{name}", value)
    for name, value in {"UNSEEN_SLICES": 1, "SHEET": 4, "LABELLED": 2}.items():
        monkeypatch.setattr(demo, name, value)
    options = demo.DemoOptions(out=tmp_path, minutes=0.02)
    demo.main(options)
    printed = capsys.readouterr().out
    (run,) = tmp_path.iterdir()
    for folder in ("segmentation/samples", "segmentation/predictions"):
        assert f"{run / folder}:" in printed
        assert any((run / folder).iterdir())
    for picture in ("samples/appearing.png", "samples/forward.png", "report.png"):
        assert str(run / "diffusion" / picture) in printed
        assert (run / "diffusion" / picture).exists()
    assert re.search(r"V_Rand 0\.\d+, V_Info 0\.\d+, pixel error 0\.\d+", printed)
    assert re.search(r"random weights 0\.\d+, from the diffusion model 0\.\d+", printed)
    assert (run / "meeting/meeting.png").exists()


def test_three_classes_keep_their_values(tmp_path):
    images, labels = phantom_stack(4, (48, 48), seed=3)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        values = np.where(label > 0, np.where(np.arange(48) < 24, 7, 200), 0).astype(np.uint8)
        values[0, :3] = 0, 7, 200
        write_image(tmp_path / "images" / f"{i}.png", np.stack([image] * 3, axis=2))
        write_image(tmp_path / "masks" / f"{i}_mask.png", values)
    folders = ("--images", tmp_path / "images", "--masks", tmp_path / "masks")
    assert run_train(*folders, "--out", tmp_path / "run", *SMALL) == 0
    model = SegmentationUNet.from_pretrained(tmp_path / "run/model")
    assert (model.config.in_channels, model.out_channels) == (3, 3)
    arguments = ("--model", tmp_path / "run/model", "--input", tmp_path / "images")
    assert run_predict(*arguments, "--out", tmp_path / "out") == 0
    assert set(np.unique(read_image(tmp_path / "out/0_mask.png"))) <= {0, 7, 200}


def test_instances_are_learned_and_come_back_as_numbers(tmp_path, capsys):
    for i in range(4):
        numbers = np.zeros((40, 40), np.uint16)
        for n in range(36):
            row, column = divmod(n, 6)
            numbers[6 * row + 2 : 6 * row + 8, 6 * column + 2 : 6 * column + 8] = 1 + n + 40 * i
        write_image(tmp_path / "images" / f"{i}.png", (numbers % 7 * 30).astype(np.uint8))
        write_image(tmp_path / "masks" / f"{i}.tif", numbers)
    folders = ("--images", tmp_path / "images", "--masks", tmp_path / "masks")
    assert run_train(*folders, "--out", tmp_path / "found", *SMALL) == 0
    assert "the masks number objects" in capsys.readouterr().out
    deep = ("--deep-supervision", "--border-weight", "5")
    assert run_train(*folders, "--instances", "--out", tmp_path / "run", *SMALL, *deep) == 0
    said = capsys.readouterr().out
    assert re.search(r"smallest object +36 pixels", said)
    assert re.search(r"kept weights +best by ap", said)
    assert re.search(r"held out: .*ap50 \d\.\d+", said)
    model = SegmentationUNet.from_pretrained(tmp_path / "run/model")
    assert model.info["smallest_object"] == 36
    assert 0 <= model.info["training"]["figures"]["ap"] <= 1
    arguments = ("--model", tmp_path / "run/model", "--input", tmp_path / "images", "--labels")
    assert run_predict(*arguments, "--out", tmp_path / "out") == 0
    labels = read_image(tmp_path / "out/0_labels.tif")
    assert labels.dtype == np.uint16
    assert (np.bincount(labels.ravel())[1:] >= 36).all()
    assert run_predict(*arguments, "--out", tmp_path / "all", "--min-size", "0") == 0
    assert read_image(tmp_path / "all/0_labels.tif").max() >= labels.max()
    before = json.loads((tmp_path / "found/model/config.json").read_text())
    assert before["info"].pop("objects") == "depth"
    (tmp_path / "found/model/config.json").write_text(json.dumps(before))
    assert run_train(*folders, "--out", tmp_path / "found", "--resume", "--steps", "9") == 2
    assert "learns a border between objects, as earlier versions did" in capsys.readouterr().err


def test_average_precision_is_of_objects(tmp_path):
    images, masks = phantom_stack(4, (40, 40))
    numbers = np.zeros((40, 40), np.uint8)
    numbers[4:12, 4:12], numbers[4:12, 12:20] = 1, 2
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        for folder, labels in (("classes", mask), ("objects", numbers * (i < 3))):
            write_image(tmp_path / folder / "image" / f"{i}.png", image)
            write_image(tmp_path / folder / "label" / f"{i}.png", labels)
    for given, message in (
        ({"data": str(tmp_path / "classes")}, "compares numbered objects"),
        ({"data": str(tmp_path / "objects"), "instances": True}, "held-out masks have none"),
    ):
        options = SegmentationOptions(out=tmp_path / "run", best_by="ap", **given)
        with pytest.raises(InputError, match=message):
            decide(options, load_data(options))
    options = SegmentationOptions(out=tmp_path / "run", data=given["data"], instances=True)
    assert decide(options, load_data(options)).best_by == "loss"


@pytest.mark.parametrize(
    "options",
    [
        ("--loss", "dice-ce", "--label-smoothing", "0.1"),
        ("--loss", "focal", "--focal-gamma", "1.5", "--balance"),
        ("--loss", "tversky"),
        ("--loss", "lovasz", "--class-weights", "1", "3"),
        ("--border-weight", "10", "--border-sigma", "3"),
        ("--best-by", "v_rand", "--deep-supervision"),
        ("--best-by", "dice", "--network", "fcn-8s"),
    ],
)
def test_every_kind_of_training_runs(folder, tmp_path, options):
    run = tmp_path / "run"
    assert run_train("--data", folder, "--out", run, *SMALL, *options) == 0
    assert all(np.isfinite(e["loss"]) for e in read_log(run / "metrics.jsonl") if "loss" in e)
    assert (run / "samples/augmented.png").exists()


def test_a_network_with_deep_supervision_is_compiled_as_one_graph(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", compiled_in_one_graph)
    found = []
    for compiled in (False, True):
        options = SegmentationOptions(
            out=tmp_path / str(compiled),
            data=str(folder),
            steps=2,
            crop=32,
            width=4,
            batch_size=2,
            evaluations=1,
            precision="bf16",
            network="segmentation-quick",
            deep_supervision=True,
            compile=compiled,
        )
        found.append(train(options))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_the_paper_recipe_can_be_followed(folder, tmp_path):
    """At a hundredth of its width: valid convolutions, border weights, momentum 0.99."""
    small = ("--width", "1", "--epochs", "None", "--steps", "1", "--crop", "188")
    arguments = ("--recipe", "paper", "--data", folder, "--out", tmp_path / "run", *small)
    assert run_train(*arguments) == 0
    assert load_config(SegmentationOptions, tmp_path / "run/config.yaml")["momentum"] == 0.99


def test_a_model_starts_as_another_one_with_its_network_and_its_scaling(folder, tmp_path):
    """Of a start whose classes are the same the head comes along, else it starts anew."""
    given = {"out": tmp_path / "run", "data": str(folder)}
    first = SegmentationOptions(**given, width=8, network="segmentation-quick", crop=32)
    model = make_model(decide(first, load_data(first)))
    model.info["normalisation"] = {"mean": [10.0], "std": [2.0], "dtype": "uint8"}
    model.save_pretrained(tmp_path / "first")
    options = SegmentationOptions(**given, init=str(tmp_path / "first"))
    data = load_data(options)
    plan = decide(options, data)
    assert plan.network == model.config
    assert data.normalisation.mean == (10.0,)
    started, theirs = make_model(plan).state_dict(), model.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in started.items())
    other = decide(SegmentationOptions(**given, init=options.init, network="fcn-8s"), data)
    with pytest.raises(InputError, match="first does not fit the model"):
        make_model(other)


def test_the_quick_recipe_learns_the_phantom(tmp_path, monkeypatch):
    """Better than the best threshold on the grey value can be, after a few seconds."""
    monkeypatch.setattr("segmentation.training.PHANTOM_SLICES", 12)
    recipe = load_config(SegmentationOptions, RECIPES / "quick.yaml")
    options = SegmentationOptions(out=tmp_path / "run", steps=60, **recipe | {"crop": 128})
    figures = train(options)
    assert figures["accuracy"] > 0.85
    assert figures["dice"] > 0.75


def test_the_threshold_is_best_for_the_kept_weights(folder, tmp_path):
    for by in ("v_rand", "dice"):
        options = SegmentationOptions(
            out=tmp_path / by,
            data=str(folder),
            steps=9,
            crop=32,
            width=4,
            evaluations=3,
            best_by=by,
        )
        figures = train(options)
        data = load_data(options)
        model = SegmentationUNet.from_pretrained(tmp_path / by / "model")
        found = evaluate(Predictor([model]), data, data.val, thresholds=COARSE, cells=1)
        assert figures["threshold"] == model.info["threshold"] == found.best_threshold(by)


def test_swapping_the_mask_values_changes_no_decision(tmp_path):
    """Border weights, kept weights and cells, and the loss of inverted logits."""
    images, labels = phantom_stack(4, (96, 128), seed=3)
    plans = []
    for name, masks in (("plain", labels), ("swapped", 255 - labels)):
        for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
            write_image(tmp_path / name / "image" / f"{i}.png", image)
            write_image(tmp_path / name / "label" / f"{i}.png", mask)
        options = SegmentationOptions(out=tmp_path / "run", data=str(tmp_path / name), balance=True)
        plans.append(decide(options, load_data(options)))
    plain, swapped = plans
    assert (plain.border, plain.best_by) == (swapped.border, swapped.best_by) == ((10, 5), "v_rand")
    assert (plain.cells, swapped.cells) == (plain.info["cells"], swapped.info["cells"]) == (1, 0)
    logits = torch.randn(1, 1, 96, 128)
    target = torch.from_numpy(labels[:1] // 255)
    found = swapped.loss(-logits, 1 - target)
    assert torch.allclose(plain.loss(logits, target), found)


def test_a_class_without_pixels_gets_no_weight_and_that_is_said(tmp_path):
    numbers = np.zeros((40, 40), np.uint8)
    numbers[4:12, 4:12], numbers[20:30, 20:30] = 1, 1
    for i, image in enumerate(phantom_stack(4, (40, 40))[0]):
        write_image(tmp_path / "image" / f"{i}.png", image)
        write_image(tmp_path / "label" / f"{i}.png", numbers)
    named = ("background", "cell", "border")
    given = {"data": str(tmp_path), "class_names": named, "balance": True}
    options = SegmentationOptions(out=tmp_path / "run", **given)
    plan = decide(options, load_data(options))
    said = "\n".join(plan.lines())
    assert re.search(r"class weights +0.557, 4.88, 0 .*no pixel is border", said)
    assert re.search(r"not scored +border .*no held-out mask has it", said)
    target = torch.zeros(1, 4, 4, dtype=torch.long)
    assert torch.isfinite(plan.loss(torch.randn(1, 3, 4, 4), target))


@pytest.mark.parametrize(
    ("given", "side", "told"),
    [
        ({}, 2, True),
        ({"balance": True}, 2, False),
        ({"class_weights": (1, 9)}, 2, False),
        ({}, 9, False),
    ],
)
def test_what_is_rare_and_never_predicted_is_to_be_balanced(tmp_path, given, side, told):
    masks = np.zeros((2, 32, 32), np.uint8)
    masks[:, 4 : 4 + side, 4 : 4 + side] = 1
    data = SegmentationData(pairs_from_arrays(masks, masks), names=["ground", "spot"])
    said = also_balanced(["spot"], SegmentationOptions(out=tmp_path, **given), data)
    assert ("--balance" in said) is told


def test_cells_that_are_not_held_out_keep_no_weights(tmp_path):
    images, labels = phantom_stack(4, (96, 128), seed=3)
    labels[3] = 0
    for i, (image, mask) in enumerate(zip(images, labels, strict=True)):
        write_image(tmp_path / "image" / f"{i}.png", image)
        write_image(tmp_path / "label" / f"{i}.png", mask)
    options = SegmentationOptions(out=tmp_path / "run", data=str(tmp_path))
    plan = decide(options, load_data(options))
    assert (plan.best_by, plan.border) == ("loss", (10, 5))
    assert re.search("not scored +class 1", "\n".join(plan.lines()))
    asked = replace(options, best_by="v_rand")
    with pytest.raises(InputError, match=r"the held-out masks have none \(class 1\)"):
        decide(asked, load_data(asked))


@pytest.mark.parametrize(
    ("budget", "count"),
    [
        ({"max_minutes": 0.1}, 2),
        ({"max_minutes": 1}, 2),
        ({"max_minutes": 3}, 6),
        ({"max_minutes": 5}, 9),
        ({}, 9),
        ({"steps": 3}, 9),
        ({"epochs": 3}, 9),
    ],
)
def test_the_part_that_is_scored_follows_the_minutes(tmp_path, monkeypatch, budget, count):
    monkeypatch.setattr("segmentation.decisions.SCORED", 2 * 32 * 32)
    pairs = pairs_from_arrays(*phantom_stack(12, (32, 32)))
    data = SegmentationData(pairs[:3], pairs[3:])
    fit = chosen_fit(SegmentationOptions(out=tmp_path, **budget))[0]
    scored, told = chosen_part(data, fit)
    assert len(set(scored)) == len(scored) == count
    assert set(scored) <= set(data.val)
    assert np.ptp(np.diff(scored)) <= 1
    assert bool(told) == (count < 9)


def test_the_default_recipe_is_what_training_does_anyway():
    recipe = load_config(SegmentationOptions, RECIPES / "default.yaml")
    assert {name: getattr(SegmentationOptions, name) for name in recipe} == recipe


def start_of(crossed: bool) -> Start:
    """A start of a segmentation, or of a diffusion model."""
    return Start(where="a/model", config=UNetConfig(), info={}, read=dict, crossed=crossed)


def test_the_optimizer_follows_the_weights_and_the_rate():
    chosen = [
        chosen_fit(SegmentationOptions(out=Path("run"), **given), start)[0]
        for given, start in (
            ({}, None),
            ({}, start_of(False)),
            ({}, start_of(True)),
            ({"shard": True}, None),
            ({"lr": 0.01}, None),
            ({"optimizer": "muon"}, None),
        )
    ]
    assert [(c.optimizer, c.lr, c.momentum) for c in chosen] == [
        ("muon", 0.08, 0.8),
        ("adamw", 2e-3, 0.9),
        ("muon", 0.08, 0.8),
        ("adamw", 2e-3, 0.9),
        ("adamw", 0.01, 0.9),
        ("muon", 0.08, 0.8),
    ]


def test_the_tutorial_recipe_says_what_it_is():
    recipe = load_config(SegmentationOptions, RECIPES / "tutorial.yaml")
    assert (recipe["network"], recipe["optimizer"]) == ("tutorial", "rmsprop")
    assert (recipe["lr"], recipe["momentum"], recipe["weight_decay"]) == (1e-5, 0.9, 1e-8)
    assert (recipe["batch_size"], recipe["crop"]) == (1, 0)


# -- mistakes -------------------------------------------------------------------------------------


def break_folder(kind: str, data: Path) -> None:
    if kind == "no label":
        (data / "label/3.png").unlink()
    elif kind == "no image":
        (data / "image/3.png").unlink()
    elif kind == "another size":
        Image.new("L", (40, 40)).save(data / "label/2.png")
    elif kind == "truncated":
        file = data / "image/4.png"
        file.write_bytes(file.read_bytes()[:200])
    elif kind == "empty":
        for file in data.glob("*/*.png"):
            file.unlink()
    elif kind == "one value":
        for file in (data / "label").iterdir():
            write_image(file, np.zeros((40, 56), np.uint8))
    elif kind == "many values":
        write_image(data / "label/1.png", np.arange(40 * 56, dtype=np.uint16).reshape(40, 56))


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("no label", "3"),
        ("no image", "3"),
        ("another size", "2.png"),
        ("truncated", "4.png"),
        ("empty", "image"),
        ("one value", "value"),
        ("many values", "values"),
    ],
)
def test_bad_data_is_one_sentence_before_anything_is_written(folder, tmp_path, capsys, kind, told):
    break_folder(kind, folder)
    assert run_train("--data", folder, "--out", tmp_path / "run", *SMALL) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    assert told in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--data", "no/such/folder"), "no/such/folder"),
        (("--network", "unett"), "'unett' is no preset"),
        (("--network", "sd-v1"), "reads text"),
        (("--network", "paper", "--crop", "100"), "nearest sizes that work"),
        (("--images", "x"), "--images and --masks"),
        (("--fold", "6/5"), "6/5"),
        (("--val-names", "99"), "99"),
        (("--init", "no/such/model"), "no/such/model is no folder"),
        (("--batch-size", "3", "--accumulate", "2"), "--batch-size 3"),
        (("--steps", "1", "--epochs", "1"), "both budgets"),
        (("--balance", "--class-weights", "1", "2"), "--balance and --class-weights"),
        (("--loss", "ce", "--focal-gamma", "2"), "gamma"),
        (("--recipe", "unknown"), "no recipe 'unknown': choose from"),
        (("--lrr", "1"), "no option --lrr; did you mean --lr?"),
    ],
)
def test_a_mistaken_option_is_one_sentence(folder, tmp_path, capsys, arguments, told):
    data = () if {"--data", "--images"} & set(arguments) else ("--data", folder)
    assert run_train("--out", tmp_path / "run", *data, *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert told in error
    assert "\n" not in error
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_another_run_in_the_folder_is_kept(folder, tmp_path, capsys):
    assert run_train("--data", folder, "--out", tmp_path / "run", *SMALL) == 0
    before = (tmp_path / "run/metrics.jsonl").read_text()
    assert run_train("--data", folder, "--out", tmp_path / "run", *SMALL) == 2
    assert "--resume" in capsys.readouterr().err
    assert (tmp_path / "run/metrics.jsonl").read_text() == before


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    info = {
        "classes": {
            "values": [0, 255],
            "shares": [0.2, 0.8],
            "ignore_value": None,
            "ignored_share": 0.0,
        },
        "normalisation": {"mean": [128.0], "std": [40.0], "dtype": "uint8"},
        "threshold": 0.5,
    }
    model = SegmentationUNet(UNetConfig(channels=2, multipliers=(1, 2)), 1, info)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_stack_is_predicted_slice_by_slice(model_folder, tmp_path):
    import tifffile

    stack = phantom_stack(3, (24, 24))[0]
    tifffile.imwrite(tmp_path / "stack.tif", stack, photometric="minisblack")
    arguments = ("--model", model_folder, "--input", tmp_path / "stack.tif")
    assert run_predict(*arguments, "--out", tmp_path / "out") == 0
    assert {p.name for p in (tmp_path / "out").glob("*_mask.png")} == {
        f"stack_{i}_mask.png" for i in range(3)
    }


def test_two_processes_share_the_images_to_predict(model_folder, tmp_path):
    images = tmp_path / "images"
    for i, image in enumerate(phantom_stack(3, (33, 47), seed=2)[0]):
        write_image(images / f"{i}.png", image)
    (images / "damaged.png").write_bytes(b"")
    arguments = ("--model", model_folder, "--input", images, "--out")
    assert run_predict(*arguments, tmp_path / "one") == 1
    done = run_forked(SCRIPTS / "predict_seg.py", *arguments, tmp_path / "two", processes=2)
    assert done.returncode != 0
    assert done.stdout.count("3 of 4 images predicted") == 1, done.stderr
    one, two = ({p.name: p for p in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one.keys() == two.keys()
    assert len(one) == 10
    for name in one:
        first, second = (read_image(files[name]).astype(int) for files in (one, two))
        # Of 65535 and of 255: other threads may round otherwise.
        assert np.mean(first != second) < 0.01, name


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m, i, o: (m / "config.json").unlink(), "config.json is missing"),
        (lambda m, i, o: (m / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda m, i, o: (m / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda m, i, o: (m / "model.safetensors").write_bytes(b"x"), "cannot be read as safe"),
        (lambda m, i, o: edit(m, task="diffusion"), "holds a model for diffusion"),
        (lambda m, i, o: edit(m, out_channels=2), "does not fit the model"),
        (lambda m, i, o: edit(m, info={}), "was not saved by train-seg"),
        (lambda m, i, o: i.unlink(), "no such file or folder"),
        (lambda m, i, o: write_image(o / "x_mask.png", np.zeros((2, 2), np.uint8)), "--overwrite"),
    ],
)
def test_a_mistake_in_predicting_is_one_sentence(model_folder, tmp_path, capsys, change, told):
    image, out = tmp_path / "x.png", tmp_path / "out"
    write_image(image, np.zeros((20, 20), np.uint8))
    change(model_folder, image, out)
    before = sorted(out.glob("*"))
    assert run_predict("--model", model_folder, "--input", image, "--out", out) == 2
    error = capsys.readouterr().err.strip()
    assert told in error
    assert "\n" not in error
    assert sorted(out.glob("*")) == before


def edit(model: Path, **values: object) -> None:
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_an_image_unlike_the_training_images_is_reported(model_folder, tmp_path, capsys):
    write_image(tmp_path / "rgb.png", np.zeros((20, 20, 3), np.uint8))
    arguments = ("--model", model_folder, "--input", tmp_path / "rgb.png")
    assert run_predict(*arguments, "--out", tmp_path / "out") == 2
    assert "3 channels" in capsys.readouterr().err


def test_more_models_than_one_task_are_told_apart(tmp_path):
    with pytest.raises(InputError, match="is no folder"):
        SegmentationUNet.from_pretrained(tmp_path / "none")


# -- real data ------------------------------------------------------------------------------------


@pytest.mark.slow  # 24 steps on whole slices take more than a minute
def test_the_tutorial_recipe_falls_as_published(isbi2012, tmp_path):
    """From about 0.76 at the first step to 0.42 to 0.50 within fifteen."""
    arguments = ("--recipe", "tutorial", "--data", isbi2012, "--val-names", "24-29")
    budget = ("--epochs", "None", "--steps", "24", "--evaluations", "0", "--precision", "fp32")
    assert run_train(*arguments, *budget, "--out", tmp_path / "run") == 0
    curve = [e["loss"] for e in read_log(tmp_path / "run/metrics.jsonl") if "loss" in e]
    assert len(curve) == 24
    assert 0.6 < curve[0] < 0.9
    assert 0.40 < np.mean(curve[12:16]) < 0.52


@pytest.mark.slow  # three minutes of training, as the README says
def test_three_minutes_on_isbi_slices(isbi2012, tmp_path):
    arguments = ("--data", isbi2012, "--val-names", "24-29", "--max-minutes", "3")
    assert run_train(*arguments, "--out", tmp_path / "run") == 0
    held_out = [e for e in read_log(tmp_path / "run/metrics.jsonl") if "val_loss" in e]
    best = min(held_out, key=lambda e: e["val_loss"])
    assert best["val_loss"] <= 0.20
    assert best["val_accuracy"] >= 0.915


def test_membranes_are_trained_to_close_and_other_masks_are_not(folder, tmp_path, capsys):
    """What was not asked for is decided by the masks, said, and saved; what was asked for stays."""
    cells = tmp_path / "cells"
    for i, (image, mask) in enumerate(zip(*phantom_stack(4, (96, 128), seed=3), strict=True)):
        write_image(cells / "image" / f"{i}.png", image)
        write_image(cells / "label" / f"{i}.png", mask)
    for name, given, weight, by in (
        ("plain", (), 10.0, "v_rand"),
        ("asked", ("--border-weight", "0", "--best-by", "dice"), 0.0, "dice"),
        ("half", ("--best-by", "loss"), 10.0, "loss"),
    ):
        assert run_train("--data", cells, "--out", tmp_path / name, *SMALL, *given) == 0
        assert ("thin membranes separate" in capsys.readouterr().out) == (name != "asked")
        saved = load_config(SegmentationOptions, tmp_path / name / "config.yaml")
        assert (saved["border_weight"], saved["best_by"]) == (weight, by)
    blobs = tmp_path / "blobs"
    for i, image in enumerate(sorted((folder / "image").iterdir())):
        mask = np.zeros((40, 56), np.uint8)
        mask[5:20, 5 + i : 20 + i] = 255
        write_image(blobs / "image" / image.name, read_image(image))
        write_image(blobs / "label" / image.name, mask)
    assert run_train("--data", blobs, "--out", tmp_path / "other", *SMALL) == 0
    saved = load_config(SegmentationOptions, tmp_path / "other/config.yaml")
    assert (saved["border_weight"], saved["best_by"]) == (0.0, "loss")


def test_an_option_that_was_renamed_is_told_by_its_new_name(tmp_path):
    (tmp_path / "old.yaml").write_text("threshold_by: dice\n")
    with pytest.raises(InputError, match="'threshold_by'; it is best_by now"):
        load_config(SegmentationOptions, tmp_path / "old.yaml")


def test_the_nuclei_of_the_data_science_bowl_are_read_whole(nuclei, tmp_path, capsys):
    """As they were published, fluorescent and stained ones mixed, by one command."""
    for pair in find_pairs(nuclei):
        numbers = pair.read_mask()
        assert pair.read_image().shape == (*numbers.shape, 3)
        assert numbers.max() == len(list((nuclei / pair.name / "masks").iterdir()))
    data = tmp_path / "stage1_train"  # a few of them, to train on
    data.mkdir()
    ids = sorted(path.name for path in nuclei.iterdir() if path.is_dir())
    for name in ids[:8]:
        (data / name).symlink_to(nuclei / name)
    assert run_train("--data", data, "--out", tmp_path / "run", *SMALL) == 0
    assert "value 1 -> cell" in capsys.readouterr().out
    image = nuclei / ids[-1] / "images"
    model, out = tmp_path / "run/model", tmp_path / "out"
    assert run_predict("--model", model, "--input", image, "--out", out, "--labels") == 0
    labels = read_image(out / f"{ids[-1]}_labels.tif")
    assert labels.shape == read_image(image / f"{ids[-1]}.png")[..., :1].shape
