"""Laws of calibration: true probabilities have no error, and a temperature is found again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import expit, logit, softmax

from segmentation.data.pairs import pairs_from_arrays
from segmentation.data.phantom import phantom_stack
from segmentation.judging.calibration import Calibration, calibrate, fit_temperature
from segmentation.judging.evaluation import evaluate
from segmentation.judging.labelled import labelled_data
from segmentation.model import SegmentationUNet
from segmentation.predict import Predictor
from segmentation.segmenter import load_models
from unet import UNetConfig
from unet.files.images import write_image
from unet.training.cli import run_script
from unet_diffusion import eval_seg


@pytest.mark.parametrize("classes", [2, 3])
def test_probabilities_that_are_true_have_no_error_and_the_brier_score_of_the_definition(classes):
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(classes), (300, 300)).transpose(2, 0, 1).astype(np.float32)
    true = (rng.random((300, 300)) > np.cumsum(p, axis=0)[:-1]).sum(axis=0).astype(np.uint8)
    whole = Calibration(classes)
    whole.add(p, true)
    assert whole.scores()["ece"] < 0.01
    onehot = np.eye(classes)[true].transpose(2, 0, 1)
    brier = ((p - onehot) ** 2).sum(axis=0).mean() / (2 if classes == 2 else 1)
    assert whole.scores()["brier"] == pytest.approx(brier, rel=1e-4)
    sure = Calibration(classes)
    sure.add(softmax(4 * np.log(p), axis=0).astype(np.float32), true)
    assert sure.scores()["ece"] > 0.1
    assert sure.scores()["brier"] > whole.scores()["brier"]
    parts = Calibration(classes), Calibration(classes)
    parts[0].add(p[:, :100], true[:100])
    parts[1].add(p[:, 100:], true[100:])
    parts[0].merge(parts[1])
    assert parts[0].scores() == pytest.approx(whole.scores())
    found = fit_temperature(softmax(2.5 * np.log(p), axis=0).reshape(classes, -1), true.ravel())
    assert found == pytest.approx(2.5, rel=0.03)


def test_the_error_is_that_of_a_sum_over_the_bins():
    rng = np.random.default_rng(1)
    p, true = rng.random((1, 40, 40), np.float32), rng.integers(0, 2, (40, 40)).astype(np.uint8)
    true[0] = 255  # without a label
    found = Calibration(2)
    found.add(p, true)
    q, y = p[0, 1:].ravel(), true[1:].ravel()
    expected = 0.0
    for k in range(15):
        inside = (q >= k / 15) & (q < (k + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(q[inside].mean() - y[inside].mean())
    assert found.scores()["ece"] == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    info = {
        "classes": {"values": [0, 255], "shares": [0.2, 0.8], "ignore_value": None}
        | {"ignored_share": 0},
        "normalisation": {"mean": [128.0], "std": [40.0], "dtype": "uint8"},
        "threshold": 0.8,
        "cells": None,
    }
    network = SegmentationUNet(UNetConfig(channels=4, multipliers=(1, 2)), 1, info)
    with torch.no_grad():
        network.head.conv.weight.mul_(-20)
    network.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_calibrated_model_keeps_its_masks_and_is_more_likely(model):
    images, labels = phantom_stack(4, (48, 56))
    (found,), table, threshold = load_models([model])
    data = labelled_data([found], pairs_from_arrays(images, labels), table)
    before = evaluate(Predictor([found]), data, [2, 3], threshold=threshold, thresholds=())
    calibrate(found, data, [0, 1])
    first = found.info["temperature"]
    assert first > 1.2
    assert found.info["threshold"] == pytest.approx(expit(logit(0.8) / first))
    after = evaluate(
        Predictor([found]), data, [2, 3], threshold=found.info["threshold"], thresholds=()
    )
    for old, new in zip(before.images, after.images, strict=True):
        assert np.array_equal(old.prediction, new.prediction)
    for key in ("ece", "brier", "loss"):
        assert after.scores()[key] < before.scores()[key]
    calibrate(found, data, [0, 1])  # once more changes nothing
    assert found.info["temperature"] == pytest.approx(first, rel=1e-3)


def test_eval_seg_calibrates_on_images_that_it_does_not_judge(model, tmp_path, capsys):
    images, labels = phantom_stack(4, (48, 56))
    for i in range(4):
        write_image(tmp_path / f"data/images/{i}.png", images[i])
        write_image(tmp_path / f"data/masks/{i}.png", labels[i])
    weights = (model / "model.safetensors").read_bytes()

    def run(*flags: str) -> int:
        argv = ["--model", str(model), "--data", str(tmp_path / "data"), "--out", *flags]
        return run_script(eval_seg.main, eval_seg.EvalOptions, argv)

    assert run(str(tmp_path / "first"), "--calibrate") == 0
    assert "fitted on 2 images and saved; of the other 2: ece " in capsys.readouterr().err
    assert (tmp_path / "first/reliability.png").exists()
    assert (model / "model.safetensors").read_bytes() == weights
    (found,), _, _ = load_models([model])
    assert found.info["calibration"]["names"] == ["0", "1"]
    assert "calibrated, temperature" in (model / "README.md").read_text()
    # Scored again, the images that it was fitted on are left out of the calibration, and told.
    (tmp_path / "data/images/0.png").rename(tmp_path / "data/images/9.png")
    (tmp_path / "data/masks/0.png").rename(tmp_path / "data/masks/9.png")
    assert run(str(tmp_path / "second")) == 0
    said = capsys.readouterr().out
    assert "the temperature was fitted on 2 images of these, left out of the calibration" in said
    assert run(str(tmp_path / "third"), "--val-names", "1", "--calibrate") == 2
    assert "here is a single one" in capsys.readouterr().err
    assert run(str(tmp_path / "third"), "--threshold", "0.3", "--calibrate") == 2
