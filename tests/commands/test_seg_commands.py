"""unet-eval-seg and unet-crossval-seg: what they write, on which images, and their refusals."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from segmentation.data.classes import ClassTable
from segmentation.data.pairs import pairs_from_arrays
from segmentation.data.phantom import phantom_stack
from segmentation.judging import report
from segmentation.judging.evaluation import evaluate
from segmentation.judging.labelled import known_cells, labelled_data
from segmentation.model import SegmentationUNet
from segmentation.options import RECIPES, SegmentationOptions
from segmentation.predict import Predictor
from segmentation.segmenter import load_models
from segmentation.training import load_data, train
from unet import UNetConfig
from unet.errors import InputError
from unet.files.images import read_image, write_image
from unet.training.cli import run_script
from unet.training.fit import Trainer
from unet.training.run import read_log
from unet_diffusion import crossval_seg, eval_seg

pytestmark = pytest.mark.usefixtures("short_runs")

NETWORK: dict[str, Any] = {"width": 4, "crop": 32, "batch_size": 2, "evaluations": 1}
NETWORK["best_by"] = "v_rand"  # of images too small to show by themselves that membranes part them
FLAGS = [f"--{k.replace('_', '-')}={v}" for k, v in NETWORK.items()]


def run_eval(*arguments: object) -> int:
    return run_script(eval_seg.main, eval_seg.EvalOptions, list(map(str, arguments)))


def run_crossval(*arguments: object) -> int:
    argv = list(map(str, arguments))
    return run_script(crossval_seg.main, crossval_seg.CrossvalOptions, argv, recipes=RECIPES)


def write_data(folder: Path, count: int = 6, seed: int = 1) -> Path:
    images, labels = phantom_stack(count, (40, 56), seed=seed)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        label[0, :2] = 0, 255
        write_image(folder / "image" / f"{i}.png", image)
        write_image(folder / "label" / f"{i}.png", label)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/, and run/ and other/, trained on it with images 3 to 5 held out."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_data(folder / "data")
    for name, seed in (("run", 0), ("other", 1)):
        train(
            SegmentationOptions(
                out=folder / name, data=str(data), val=0.5, steps=2, seed=seed, **NETWORK
            )
        )
    return folder


def scores_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "scores.json").read_text())
    return found


def names_of(out: Path) -> list[str]:
    return sorted(image["name"] for image in scores_of(out)["per_image"])


# -- eval_seg.py ----------------------------------------------------------------------------------


def test_a_model_is_scored_on_what_its_run_held_out(trained, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_eval("--model", trained / "run/model", "--out", out, "--pictures", "2") == 0
    printed = capsys.readouterr()
    assert "scoring 3 of 6 images" in printed.err
    assert "V_Rand" in printed.out
    facts = scores_of(out)

    models, _, threshold = load_models([str(trained / "run/model")])
    data = load_data(SegmentationOptions(out=out, data=str(trained / "data"), val=0.5))
    expected = evaluate(Predictor(models), data, data.val, threshold=threshold, cells=1)
    assert facts["scores"] == pytest.approx(expected.scores())
    assert facts["challenge"] == pytest.approx(expected.challenge())
    assert facts["models"] == [str(trained / "run/model")]

    ranked = [image.name for image in expected.worst_first()]
    with (out / "scores.csv").open(newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == ranked
    pictures = sorted(p.name for p in (out / "pictures").iterdir())
    assert pictures == [f"001_{ranked[0]}.png", f"002_{ranked[1]}.png"]
    with Image.open(out / "pictures" / pictures[0]) as picture:
        assert picture.width > 4 * 56  # image, mask, prediction, errors
        assert picture.height > 40


# Figures of one name and the same weights and images, as each place shows them.
def shown_figures(run: Path, printed: str) -> list[dict[str, float]]:
    model = SegmentationUNet.from_pretrained(run / "model")
    (line,) = re.findall(r"(?m)^step \d+: held out: (.*)$", printed)
    step = {name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+)", line)}
    logged = [e for e in read_log(run / "metrics.jsonl") if e.get("kept")][-1]
    report = (run / "title.txt").read_text()
    titles = {"dice": "Dice", "iou": "IoU", "v_rand": "V_Rand", "threshold": "threshold"}
    found = {k: re.findall(rf"{text} ([\d.]+)", report) for k, text in titles.items()}
    return [
        step,
        {k.removeprefix("val_"): v for k, v in logged.items() if k.startswith("val_")},
        model.info["training"]["figures"],
        {k: float(v[0]) for k, v in found.items() if v},
        {"threshold": model.info["threshold"]},
    ]


@pytest.mark.parametrize(("by", "membrane"), [("loss", 0), ("dice", 255), ("v_rand", 0)])
def test_one_figure_is_the_same_wherever_it_is_shown(tmp_path, capsys, monkeypatch, by, membrane):
    """Step line, log, model card, report and eval-seg, whichever mask value is the membrane."""
    data, run = tmp_path / "data", tmp_path / "run"
    for i, (image, label) in enumerate(zip(*phantom_stack(4, (96, 128), seed=3), strict=True)):
        write_image(data / "image" / f"{i}.png", image)
        write_image(data / "label" / f"{i}.png", 255 - label if membrane else label)

    def titled(figure: Any, name: str, evaluation: Any, kind: str) -> None:
        title(figure, name, evaluation, kind)
        (run / "title.txt").write_text(figure.get_suptitle())

    title = report._title
    monkeypatch.setattr(report, "_title", titled)
    monkeypatch.setattr(  # the page is laid out, and not drawn
        "segmentation.training.write_report",
        lambda run, found, data: report.report_figure(run.name, [], found, data),
    )
    small = {**NETWORK, "width": 8, "lr": 0.02, "best_by": by}
    figures = train(SegmentationOptions(out=run, data=str(data), val=0.5, steps=6, **small))
    printed = capsys.readouterr().out
    assert run_eval("--model", run / "model", "--out", tmp_path / "out") == 0
    facts = scores_of(tmp_path / "out")
    scores = {**facts["scores"], "threshold": facts["threshold"]}
    assert "v_rand" in scores  # the membranes were found, and that is saved with the model
    for place in (figures, *shown_figures(run, printed)):
        assert place["threshold"] == scores["threshold"]
        for name, value in place.items():
            assert value == pytest.approx(scores[name], abs=6e-5), name
    assert ("v_rand" in figures) == (by == "v_rand")
    assert f"{scores['dice']:.4f}" in capsys.readouterr().out
    for name in ("v_rand", "v_info"):
        assert facts["challenge"][name] >= scores[name]


def test_a_part_of_many_held_out_images_is_scored_in_training_and_all_at_the_end(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("segmentation.decisions.SCORED", 4 * 40 * 56)
    data, run = write_data(tmp_path / "data", 16), tmp_path / "run"
    options = SegmentationOptions(out=run, data=str(data), val=0.75, max_minutes=0.02, **NETWORK)
    figures = train(options)
    printed = capsys.readouterr().out
    assert re.search(r"scored +4 of 12 held-out images", printed)
    assert re.search(r"(?m)^step \d+: held out, 4 of 12 images: loss", printed)
    assert f"kept weights: held out, all 12 images: loss {figures['loss']:.4f}" in printed
    assert run_eval("--model", run / "model", "--out", tmp_path / "out") == 0
    scores = scores_of(tmp_path / "out")["scores"]
    assert {k: scores[k] for k in figures if k != "threshold"} == pytest.approx(
        {k: v for k, v in figures.items() if k != "threshold"}
    )
    saved = SegmentationUNet.from_pretrained(run / "model").info
    assert saved["training"]["figures"] == figures
    assert saved["threshold"] == figures["threshold"]


def test_a_model_of_an_earlier_version_is_asked_by_its_masks_for_cells(tmp_path, trained):
    """It does not know whether membranes part cells, and which class they are."""
    model = SegmentationUNet.from_pretrained(trained / "run/model")
    del model.info["cells"]
    for name, inverted in (("plain", False), ("inverted", True)):
        images, labels = phantom_stack(3, (96, 128), seed=3)
        pairs = pairs_from_arrays(images, 255 - labels if inverted else labels)
        table = ClassTable.from_dict(model.info["classes"])
        data = labelled_data([model], pairs, table)
        assert known_cells([model], data) == (0 if inverted else 1), name
    model.info["cells"] = None
    assert known_cells([model], data) is None
    model.info["cells"] = "all"
    with pytest.raises(InputError, match="'all'"):
        known_cells([model], data)


def test_the_images_to_score_can_be_chosen(trained, tmp_path, capsys):
    model = ("--model", trained / "run/model")
    assert run_eval(*model, "--split", "all", "--out", tmp_path / "all") == 0
    assert "was trained on" in capsys.readouterr().err
    assert names_of(tmp_path / "all") == ["0", "1", "2", "3", "4", "5"]
    assert run_eval(*model, "--val-names", "0", "4-5", "--out", tmp_path / "named") == 0
    assert names_of(tmp_path / "named") == ["0", "4", "5"]


def test_pixels_of_the_ignored_value_are_not_scored(trained, tmp_path, capsys):
    data = write_data(tmp_path / "new", 2)
    mask = read_image(data / "label/0.png").copy()
    mask[20:, :] = 100
    write_image(data / "label/0.png", mask)
    arguments = ("--model", trained / "run/model", "--data", data, "--out", tmp_path / "out")
    assert run_eval(*arguments, "--ignore-value", 255) == 2
    assert "255 is a class of the model" in capsys.readouterr().err
    assert run_eval(*arguments, "--ignore-value", 100) == 0
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    assert np.sum(scores["confusion"]) == 2 * 40 * 56 - 20 * 56


@pytest.mark.parametrize("count", [1, 3])
def test_other_data_are_scored_whole_and_need_no_run(trained, tmp_path, count, capsys):
    model = shutil.copytree(trained / "run/model", tmp_path / "model")
    data = write_data(tmp_path / "new", count, seed=9)
    arguments = ("--model", model, "--data", data, "--out", tmp_path / "out")
    assert run_eval(*arguments) == 0
    assert names_of(tmp_path / "out") == [str(i) for i in range(count)]
    assert "was trained on" not in capsys.readouterr().err


def test_an_ensemble_with_symmetries_at_another_threshold(trained, tmp_path, capsys):
    models = [str(trained / name / "model") for name in ("run", "other")]
    folders = ("--images", trained / "data/image", "--masks", trained / "data/label")
    flags = ("--tta", "--threshold", "0.3", "--json", "--warping", "--pictures", "0")
    assert run_eval("--model", *models, *folders, *flags, "--out", tmp_path) == 0
    facts = scores_of(tmp_path)
    assert json.loads(capsys.readouterr().out) == facts
    assert (facts["models"], facts["tta"], facts["threshold"]) == (models, True, 0.3)
    assert "warping_error" in facts["scores"]
    assert not (tmp_path / "pictures").exists()

    loaded, _, _ = load_models(models)
    data = load_data(SegmentationOptions(out=tmp_path, data=str(trained / "data")))
    predict = Predictor(loaded, symmetries=True)
    # the folders are no run's --data, so all images are scored
    expected = evaluate(predict, data, range(6), threshold=0.3, cells=1, warping=True)
    assert facts["scores"] == pytest.approx(expected.scores())


def test_overwriting_leaves_nothing_of_before(trained, tmp_path):
    arguments = ("--model", trained / "run/model", "--out", tmp_path)
    assert run_eval(*arguments, "--split", "all") == 0
    (tmp_path / "mine.txt").write_text("kept")
    assert run_eval(*arguments, "--val-names", "1", "--overwrite") == 0
    assert [p.name for p in (tmp_path / "pictures").iterdir()] == ["001_1.png"]
    assert (tmp_path / "mine.txt").exists()


def spoil(kind: str, data: Path) -> None:
    for i in range(2):
        image, label = data / "image" / f"{i}.png", data / "label" / f"{i}.png"
        with Image.open(image) as picture, Image.open(label) as mask:
            grey, values = np.array(picture), np.array(mask)
        if kind == "other values":
            write_image(label, np.where(values > 0, 128, 0).astype(np.uint8))
        elif kind == "colour":
            write_image(image, np.stack([grey] * 3, 2))
        elif kind == "16 bits":
            write_image(image, grey.astype(np.uint16))
        elif kind == "another size":
            write_image(label, values[:-1])


@pytest.mark.parametrize(
    ("kind", "arguments", "told"),
    [
        ("other values", (), "unexpected values 128"),
        ("colour", (), "3 channels of uint8"),
        ("16 bits", (), "1 channel of uint16"),
        ("another size", (), "39 x 56"),
        ("", ("--data", "no/such/folder"), "no/such/folder"),
        ("", ("--model", "no/such/model"), "no/such/model is no folder"),
        ("", ("--threshold", "1.5"), "--threshold 1.5"),
        ("", ("--split", "val", "--val-names", "1"), "give one of them"),
        ("", ("--val-names", "99"), "99"),
        ("", ("--pictures", "-1"), "--pictures -1"),
        ("", ("--images", "x"), "--images and --masks"),
        ("", ("--data", "None"), "is in no run folder"),
        ("", ("--split", "val"), "--val-names"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(
    trained, tmp_path, capsys, kind, arguments, told
):
    model = shutil.copytree(trained / "run/model", tmp_path / "model")
    data = write_data(tmp_path / "new", 2)
    spoil(kind, data)
    base = [] if "--data" in arguments or "--images" in arguments else ["--data", data]
    base += [] if "--model" in arguments else ["--model", model]
    assert run_eval(*base, "--out", tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert told in error
    assert not (tmp_path / "out").exists()


def test_of_three_classes_no_threshold_is_taken(tmp_path, capsys):
    data, values = write_data(tmp_path / "data", 2), (0, 128, 255)
    for file in (data / "label").iterdir():
        mask = read_image(file)[..., 0].copy()
        mask[:, :20][mask[:, :20] > 0] = 128
        write_image(file, mask)
    info = {
        "classes": ClassTable(values=values, shares=(0.2, 0.4, 0.4)).to_dict(),
        "normalisation": {"mean": [128.0], "std": [40.0], "dtype": "uint8"},
        "threshold": 0.5,
    }
    model = SegmentationUNet(UNetConfig(channels=2, multipliers=(1, 2)), 3, info)
    model.save_pretrained(tmp_path / "model")
    arguments = ("--model", tmp_path / "model", "--data", data, "--out", tmp_path / "out")
    assert run_eval(*arguments, "--threshold", "0.4") == 2
    assert "the model has 3 and takes" in capsys.readouterr().err
    assert run_eval(*arguments, "--warping") == 2
    assert "cells between thin membranes" in capsys.readouterr().err
    assert run_eval(*arguments) == 0
    printed = capsys.readouterr().out
    assert not any(word in printed for word in ("threshold", "V_Rand", "pixel error"))
    assert "threshold" not in scores_of(tmp_path / "out")


def test_files_in_the_way_are_kept(trained, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a")
    for out in (tmp_path, tmp_path / "a.txt"):
        assert run_eval("--model", trained / "run/model", "--out", out) == 2
        assert str(out) in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "a"


def test_folds_have_no_image_in_common_to_be_scored_on(trained, tmp_path, capsys):
    shutil.copytree(trained / "run", tmp_path / "run")
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace("fold: null", "fold: 1/2"))
    models = (trained / "run/model", tmp_path / "run/model")
    assert run_eval("--model", *models, "--out", tmp_path / "out") == 2
    assert "one of the models was trained on each image" in capsys.readouterr().err


# -- crossval_seg.py ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crossval(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/ and whole/, a cross-validation of it in three folds."""
    folder = tmp_path_factory.mktemp("crossval")
    data = write_data(folder / "data")
    arguments = ("--data", data, "--folds", 3, "--steps", 3, *FLAGS)
    assert run_crossval(*arguments, "--out", folder / "whole") == 0
    return folder


def test_every_image_is_scored_by_the_model_that_did_not_see_it(crossval):
    facts = json.loads((crossval / "whole/crossval.json").read_text())
    folds = {i["name"]: i["fold"] for i in facts["per_image"]}
    assert folds == {str(i): f"{i // 2 + 1}/3" for i in range(6)}
    dice = [i["dice"] for i in facts["per_image"]]
    assert dice == sorted(dice)
    for k, fold in enumerate(facts["folds"], 1):
        models, _, threshold = load_models([str(crossval / f"whole/fold-{k}/model")])
        options = SegmentationOptions(out=crossval, data=str(crossval / "data"), fold=f"{k}/3")
        data = load_data(options)
        expected = evaluate(Predictor(models), data, data.val, threshold=threshold, cells=1)
        assert fold["scores"] == pytest.approx(expected.scores())
    for kind in ("scores", "challenge"):
        for key, found in facts[kind].items():
            values = [fold[kind][key] for fold in facts["folds"]]
            assert found["mean"] == pytest.approx(np.mean(values))
            assert found["std"] == pytest.approx(np.std(values, ddof=1))


def test_an_interrupted_cross_validation_ends_as_one_that_is_not(
    crossval, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "cv"
    step, steps = Trainer._step, []

    def interrupted(trainer: Trainer, batches: Any) -> float:
        steps.append(trainer.folder.path.name)
        if len(steps) == 5:  # the second of the second fold
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer, batches)

    arguments = ("--data", crossval / "data", "--folds", 3, "--steps", 3, *FLAGS, "--out", out)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        patch.setattr(sys, "argv", ["scripts/crossval_seg.py"])
        assert run_crossval(*arguments) == 130
    told = re.findall("(?m)^continue with: (.*)$", capsys.readouterr().out)
    (command,) = told  # by the name of Python, or by its path where that is not found
    assert command.endswith(f"python scripts/crossval_seg.py --out {out} --resume")
    assert not (out / "crossval.json").exists()
    assert not (out / "fold-3").exists()
    first = (out / "fold-1/model/model.safetensors").stat()

    assert run_crossval("--out", out, "--resume") == 0
    assert (out / "fold-1/model/model.safetensors").stat() == first
    expected = (crossval / "whole/crossval.json").read_bytes()
    assert (out / "crossval.json").read_bytes() == expected
    log = read_log(out / "fold-2/metrics.jsonl")
    assert [e["step"] for e in log if "val_loss" in e] == [3]

    # killed after the training of a fold, before it was scored
    (out / "fold-3/scores.json").unlink()
    (out / "crossval.json").unlink()
    assert run_crossval("--out", out, "--resume") == 0
    assert (out / "crossval.json").read_bytes() == expected


def test_a_finished_cross_validation_only_reports_again(crossval, capsys, monkeypatch):
    monkeypatch.setattr("segmentation.training.train", lambda options: pytest.fail("trained"))
    assert run_crossval("--out", crossval / "whole", "--resume") == 0
    printed = capsys.readouterr().out
    for line in ("1/3", "2/3", "3/3", "mean", "std", "v_rand"):
        assert line in printed


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--folds", "1"), "--folds 1 must be at least 2"),
        (("--folds", "7"), "fold '1/7'"),
        (("--fold", "1/3"), "--fold does not go with a cross-validation"),
        (("--val", "0.5"), "--val does not go with a cross-validation"),
        (("--val-names", "1"), "--val-names does not go with a cross-validation"),
        (("--network", "unett"), "'unett' is no preset"),
        (("--data", "no/such/folder"), "no/such/folder"),
        (("--recipe", "none"), "no recipe 'none'"),
        (("--resume",), "holds no cross-validation"),
    ],
)
def test_a_mistaken_cross_validation_is_one_sentence(crossval, tmp_path, capsys, arguments, told):
    data = () if "--data" in arguments else ("--data", crossval / "data")
    assert run_crossval(*data, *FLAGS, "--out", tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert told in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


def test_a_cross_validation_goes_on_with_its_own_settings(crossval, trained, tmp_path, capsys):
    before = (crossval / "whole/crossval.json").read_bytes()
    assert run_crossval("--out", crossval / "whole", "--resume", "--lr", "0.1") == 2
    assert "--lr was not given for the folds" in capsys.readouterr().err
    assert run_crossval("--out", crossval / "whole", "--resume", "--scale", "0.5") == 2
    assert "--scale was 0.15 for the folds" in capsys.readouterr().err
    assert run_crossval("--out", crossval / "whole", "--data", crossval / "data") == 2
    assert "--resume" in capsys.readouterr().err
    assert (crossval / "whole/crossval.json").read_bytes() == before
    shutil.copytree(trained / "run", tmp_path / "run")
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace("val: 0.5", "val: 0.2"))
    assert run_crossval("--out", tmp_path / "run", "--resume") == 2  # a run, not of folds
    assert "holds no cross-validation" in capsys.readouterr().err
