"""Extractors of the features by which sets of images are compared.

`ClassifierFeatures` takes a classifier that `unet-train-classifier` trained on these or similar
images. `InceptionFeatures` takes the standard Inception network: only the figures on its features
are FID and KID, and each extractor knows what its figures are called.
"""

from __future__ import annotations

import hashlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from diffusion.judging.classifier import ClassifierUNet
from unet.device import pick_device
from unet.errors import InputError

Images: TypeAlias = NDArray[np.uint8]  # (N, H, W, C), C = 1 or 3

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_INSTALL = "pip install torch-fidelity"


class FeatureExtractor(ABC):
    """Images, uint8 (N, H, W, C), to features, float32 (N, D).

    Attributes:
        name: what stands beside the figures.
        frechet_name, kernel_name: what the Fréchet and the kernel distance on these features are
            called.
    """

    name: str
    batch_size: int = 250

    @property
    def frechet_name(self) -> str:
        return f"Fréchet distance (features of {self.name})"

    @property
    def kernel_name(self) -> str:
        return f"kernel distance (features of {self.name})"

    @torch.inference_mode()
    def __call__(self, images: Images) -> NDArray[np.float32]:
        """Features of the images, computed batch by batch.

        Raises:
            InputError: images that are not uint8 (N, H, W, C) or that the network does not take.
        """
        return torch.cat([self.features(batch) for batch in self._batches(images)]).numpy()

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """A batch, uint8 (B, C, H, W), to features (B, D), float32 on the CPU."""

    def _batches(self, images: Images) -> Iterator[Tensor]:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
            raise InputError(
                f"the images are {images.dtype} of shape {images.shape}: features are taken of "
                "uint8 (N, H, W, C), C = 1 or 3"
            )
        if not images.size:
            raise InputError("there are no images to take features of: give at least one")
        for start in range(0, len(images), self.batch_size):
            part = torch.tensor(images[start : start + self.batch_size])  # a copy: of a map, say
            yield rearrange(part, "b h w c -> b c h w")


class ClassifierFeatures(FeatureExtractor):
    """The features before the last layer of a classifier, and the classes it finds.

    Args:
        folder: model folder of a `ClassifierUNet`.

    Raises:
        InputError: no such classifier.
    """

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu") -> None:
        self.name = f"the classifier {folder}"
        self.model = ClassifierUNet.from_pretrained(folder).to(device).float()
        self.device = device

    @property
    def classes(self) -> tuple[str, ...]:
        return self.model.classes

    def features(self, images: Tensor) -> Tensor:
        return self.model.features(self._input(images)).cpu()

    @torch.inference_mode()
    def classify(self, images: Images) -> NDArray[np.int64]:
        """The most likely class of each image, (N,), as an index into `classes`."""
        logits = [self.model(self._input(batch)) for batch in self._batches(images)]
        return torch.cat(logits).argmax(dim=1).cpu().numpy()

    def _input(self, images: Tensor) -> Tensor:
        """As the classifier was trained: the same size, [-1, 1]; grey becomes RGB."""
        channels, size = self.model.config.in_channels, self.model.size
        if tuple(images.shape[2:]) != size:
            raise InputError(
                f"{self.name} was trained on images of {size[0]} x {size[1]}, not "
                f"{images.shape[2]} x {images.shape[3]}: train one on images of this size"
            )
        if images.shape[1] > channels:
            raise InputError(
                f"{self.name} was trained on grey images, not on RGB: train one on such images"
            )
        return images.to(self.device).float().expand(-1, channels, -1, -1) / 127.5 - 1


class InceptionFeatures(FeatureExtractor):
    """The 2,048 features of the standard Inception network: those of FID (arXiv 1706.08500).

    Through torch-fidelity, whose resizing and weights are those of the original figures
    (torchmetrics takes the same network from it). Grey images become RGB.

    Args:
        weights: the file INCEPTION_FILE; any other weights are refused, by their checksum.

    Raises:
        InputError: the package or the file is missing, or it is another file.
    """

    name = "Inception"
    frechet_name = "FID"
    kernel_name = "KID"
    batch_size = 50

    def __init__(self, weights: Path, device: str | torch.device = "cpu") -> None:
        try:
            module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        except ImportError as error:
            raise InputError(
                f"FID and KID need the package torch-fidelity ({_INSTALL}) beside the weights "
                f"{INCEPTION_FILE}: install it, or judge by a classifier instead"
            ) from error
        _check_weights(weights)
        network: Any = module.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
        )
        self.network = network.to(device)
        self.device = device

    def features(self, images: Tensor) -> Tensor:
        (found,) = self.network(images.to(self.device).expand(-1, 3, -1, -1))
        return found.float().cpu()


def _check_weights(path: Path) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.sha256()
            while part := file.read(2**20):
                found.update(part)
    except OSError as error:
        raise InputError(
            f"the Inception weights '{path}' cannot be read ({error.strerror}): give the path of "
            f"{INCEPTION_FILE}, which the releases of torch-fidelity offer"
        ) from error
    if found.hexdigest() != INCEPTION_SHA256:
        raise InputError(
            f"'{path}' is not {INCEPTION_FILE} (its SHA-256 is {found.hexdigest()[:8]}...): FID is "
            "defined by these weights; download them anew, or judge by a classifier instead"
        )


def open_extractor(
    classifier: str | None, inception: Path | None, device: str
) -> FeatureExtractor | None:
    """The extractor for a classifier's folder or a file of Inception weights; None if neither is
    given.

    Args:
        device: as on the command line.
    """
    if classifier:
        return ClassifierFeatures(classifier, pick_device(device))
    return InceptionFeatures(inception, pick_device(device)) if inception else None
