"""Feature extractors: what goes into the networks, what comes out, and what is called FID."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from diffusion.judging import features
from diffusion.judging.classifier import ClassifierUNet, classifier_config
from diffusion.judging.features import ClassifierFeatures, InceptionFeatures
from unet import InputError

INFO = {"classes": ["a", "b", "c"], "size": [12, 16]}


def images(count: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Noise, each image of another brightness."""
    rng = np.random.default_rng(seed)
    brightest = rng.integers(2, 256, (count, 1, 1, 1))
    return rng.integers(0, brightest, (count, 12, 16, channels), np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_classifier(tmp_path / "model")


def save_classifier(folder: Path, channels: int = 1, info: dict[str, object] = INFO) -> Path:
    torch.manual_seed(0)
    model = ClassifierUNet(classifier_config((12, 16), channels, 4), 3, info).eval()
    noise = torch.from_numpy(images(40, channels)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():  # so that not all of them are of one class
        model.head.bias.copy_(-model.head.weight @ model.features(noise).mean(dim=0))
    model.save_pretrained(folder)
    return folder


# -- our classifier -------------------------------------------------------------------------------


def test_features_are_those_of_the_model_before_its_last_layer(folder):
    extract, pixels = ClassifierFeatures(folder), images(7)
    found = extract(pixels)
    model = ClassifierUNet.from_pretrained(folder)
    x = torch.from_numpy(pixels[..., 0]).float()[:, None] / 127.5 - 1
    assert found.dtype == np.float32
    assert found.shape == (7, model.head.in_features)
    with torch.no_grad():
        np.testing.assert_allclose(found, model.features(x), rtol=1e-5, atol=1e-6)
        logits = model.head(torch.from_numpy(found))
    np.testing.assert_array_equal(extract.classify(pixels), logits.argmax(1))
    assert len(set(extract.classify(images(40)))) > 1


def test_batches_do_not_change_features(folder, monkeypatch):
    extract = ClassifierFeatures(folder)
    mapped = images(7)
    mapped.flags.writeable = False  # as of a file that is mapped, which need not fit into memory
    whole = extract(mapped)
    monkeypatch.setattr(extract, "batch_size", 3)
    np.testing.assert_allclose(extract(images(7)), whole, rtol=1e-5, atol=1e-6)
    assert extract.classify(images(7)).shape == (7,)


def test_a_classifier_of_rgb_takes_grey_as_rgb(tmp_path):
    extract = ClassifierFeatures(save_classifier(tmp_path / "rgb", channels=3))
    grey = images(4)
    colour = np.repeat(grey, 3, axis=3)
    np.testing.assert_allclose(extract(grey), extract(colour), rtol=1e-5, atol=1e-6)


def test_figures_are_named_after_the_classifier(folder):
    extract = ClassifierFeatures(folder)
    assert extract.frechet_name == f"Fréchet distance (features of the classifier {folder})"
    assert extract.kernel_name == f"kernel distance (features of the classifier {folder})"
    assert extract.classes == ("a", "b", "c")


@pytest.mark.parametrize(
    ("pixels", "part"),
    [
        (images(2, 3), "grey images, not on RGB"),
        (images(2)[:, :, :12], "12 x 16, not 12 x 12: train one"),
        (images(2)[..., 0], r"shape \(2, 12, 16\)"),
        (images(2).astype(float), "float64"),
        (images(2, 2), "C = 1 or 3"),
        (images(0), "at least one"),
    ],
)
def test_images_that_the_classifier_does_not_take(folder, pixels, part):
    with pytest.raises(InputError, match=part):
        ClassifierFeatures(folder)(pixels)


# -- Inception ------------------------------------------------------------------------------------
# The package and its 95 MB of weights are not at hand here: below stands a stand-in for the network
# that records what it is given. The real one's numbers are not tested.


class StandIn(torch.nn.Module):
    def __init__(self, name: str, wanted: list[str], feature_extractor_weights_path: str) -> None:
        super().__init__()
        self.given = SimpleNamespace(wanted=wanted, path=feature_extractor_weights_path, shapes=[])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        assert x.dtype == torch.uint8
        assert x.shape[1] == 3
        self.given.shapes.append(tuple(x.shape))
        return (x.double().mean(dim=(2, 3)),)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that passes for the standard weights, and a package that passes for torch-fidelity."""
    module = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = StandIn
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    file = tmp_path / "weights.pth"
    file.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setattr(features, "INCEPTION_SHA256", digest)
    return file


def test_without_the_package_the_command_and_the_file_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(InputError, match="pip install torch-fidelity") as caught:
        InceptionFeatures(tmp_path / "weights.pth")
    assert "weights-inception-2015-12-05-6726825d.pth" in str(caught.value)


def test_the_weights_bear_their_checksum_in_their_name():
    assert f"-{features.INCEPTION_SHA256[:8]}.pth" in features.INCEPTION_FILE


def test_only_the_standard_weights_are_taken(weights, tmp_path):
    InceptionFeatures(weights)
    weights.write_bytes(b"others")
    with pytest.raises(InputError, match=r"is not weights-inception.*download them anew"):
        InceptionFeatures(weights)
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            InceptionFeatures(path)


def test_inception_gets_rgb_bytes_and_its_figures_are_fid_and_kid(weights):
    extract = InceptionFeatures(weights)
    grey, colour = images(120), images(3, 3)
    np.testing.assert_allclose(extract(grey), grey.mean(axis=(1, 2)).repeat(3, axis=1), rtol=1e-6)
    np.testing.assert_allclose(extract(colour), colour.mean(axis=(1, 2)), rtol=1e-6)
    given = extract.network.given
    assert given.shapes == [(50, 3, 12, 16)] * 2 + [(20, 3, 12, 16), (3, 3, 12, 16)]
    assert (given.wanted, given.path) == (["2048"], str(weights))
    assert extract(colour).dtype == np.float32
    assert (extract.frechet_name, extract.kernel_name) == ("FID", "KID")
