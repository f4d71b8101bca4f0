"""Laws of uncertainty: entropy and disagreement against their definitions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from scipy.stats import entropy as scipy_entropy

from segmentation import load, output
from segmentation.data.inputs import find_inputs
from segmentation.data.phantom import phantom_stack
from segmentation.model import SegmentationUNet
from segmentation.output import FilePredictor, predict_files
from segmentation.predict import Predictor, TensorSource, classes
from segmentation.segmenter import load_models
from segmentation.uncertainty import disagreement_map, entropy_map
from segmentation.volumes import predict_volume
from unet import InputError, UNetConfig
from unet.files.images import read_image

CONFIG = UNetConfig(channels=4, multipliers=(1, 2))
INFO = {
    "classes": {"values": [0, 255], "shares": [0.2, 0.8], "ignore_value": None, "ignored_share": 0},
    "normalisation": {"mean": [128.0], "std": [40.0], "dtype": "uint8"},
    "threshold": 0.5,
}


def network(outputs: int, seed: int, **info: object) -> SegmentationUNet:
    torch.manual_seed(seed)
    model = SegmentationUNet(CONFIG, outputs, {**INFO, **info}).eval()
    with torch.no_grad():
        model.head.conv.weight.mul_(8)  # sure in some places, unsure in others
    return model


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    for seed in (0, 1):
        network(1, seed).save_pretrained(tmp_path / f"model{seed}")
    return [str(tmp_path / f"model{seed}") for seed in (0, 1)]


@pytest.mark.parametrize("outputs", [1, 3])
def test_entropy_is_the_definition_and_disagreement_what_the_members_do_not_share(outputs):
    models, image = [network(outputs, seed) for seed in (0, 1)], torch.randn(1, 24, 40)
    each = np.stack([Predictor([model])(TensorSource(image)) for model in models])
    found = Predictor(models)(TensorSource(image), entropies=True)
    np.testing.assert_allclose(found[:-1], each.mean(0), atol=1e-6)

    def by_hand(p):
        full = np.concatenate([1 - p, p]) if outputs == 1 else p
        return scipy_entropy(full.astype(np.float64), base=max(2, outputs), axis=0)

    np.testing.assert_allclose(entropy_map(found[:-1]), by_hand(each.mean(0)), atol=1e-5)
    expected = by_hand(each.mean(0)) - np.mean([by_hand(p) for p in each], axis=0)
    np.testing.assert_allclose(disagreement_map(found[:-1], found[-1]), expected, atol=1e-5)
    twins = Predictor([models[0], models[0]])(TensorSource(image), entropies=True)
    assert disagreement_map(twins[:-1], twins[-1]).max() < 1e-5
    tiled = Predictor(models, tile=16, overlap=8)(TensorSource(image), entropies=True)
    assert (entropy_map(tiled[:-1]) >= tiled[-1] - 1e-5).all()  # entropy is concave


def test_maps_are_written_as_probabilities_are_at_once_in_bands_and_of_volumes(
    folders, tmp_path, monkeypatch
):
    image = phantom_stack(2, (70, 50))[0]
    tifffile.imwrite(tmp_path / "x.tif", image)
    models, table, threshold = load_models(folders)
    predict = Predictor(models, tile=32, overlap=8)
    predictor = FilePredictor(predict, table, threshold, uncertainty=True, labels=False)
    assert predict_files(predictor, find_inputs(tmp_path / "x.tif"), tmp_path / "once") == []
    segmenter = load(*folders, tile=32, overlap=8)
    names = {"entropy": segmenter.uncertainty, "disagreement": segmenter.disagreement}
    for name, find in names.items():
        stored = read_image(tmp_path / f"once/x_1_{name}.png")[..., 0]
        assert stored.dtype == np.uint16
        np.testing.assert_allclose(stored / 65535, find(image[1]), atol=1e-4)
    zarr = pytest.importorskip("zarr")
    zarr.create_array(tmp_path / "v.zarr", data=image)
    assert predict_volume(predictor, tmp_path / "v.zarr", tmp_path / "out") == []
    monkeypatch.setattr(output, "AT_ONCE", 100)
    assert predict_files(predictor, find_inputs(tmp_path / "x.tif"), tmp_path / "bands") == []
    for name in names:
        once = read_image(tmp_path / f"once/x_1_{name}.png")
        assert np.array_equal(once, read_image(tmp_path / f"bands/x_1_{name}.tif"))
        found = zarr.open(tmp_path / f"out/v_{name}.zarr", mode="r")["0"][1]
        assert np.array_equal(found, once[..., 0])


def test_one_prediction_has_no_disagreement(folders, tmp_path):
    model = load(folders[0])
    with pytest.raises(InputError, match="load several models, or one with tta"):
        model.disagreement(np.zeros((8, 8), np.uint8))
    models, table, threshold = load_models(folders[:1])
    assert FilePredictor(Predictor(models), table, threshold, uncertainty=True).unsure == [
        "entropy"
    ]
    turned = Predictor(models, symmetries=True)
    assert turned.members == 8
    assert len(FilePredictor(turned, table, threshold, uncertainty=True).unsure) == 2


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_temperature_changes_probabilities_and_not_what_is_most_probable(outputs):
    image = TensorSource(torch.randn(1, 24, 40))
    plain = Predictor([network(outputs, 0)])(image)
    warm = Predictor([network(outputs, 0, temperature=3.0)])(image)
    assert np.array_equal(classes(plain), classes(warm))
    assert (entropy_map(warm) >= entropy_map(plain) - 1e-6).all()
    with pytest.raises(InputError, match="temperature -1"):
        Predictor([network(outputs, 0, temperature=-1)])
