"""Whole-image prediction: an image of any size to class probabilities of the same size."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segmentation.augment import mirror
from segmentation.model import SegmentationUNet
from unet.model import input_size


@torch.inference_mode()
def predict_logits(model: SegmentationUNet, image: Tensor) -> Tensor:
    """Logits (K, H, W) of a normalised image (C, H, W), on the model's device.

    A network with valid convolutions sees the image with its border mirrored, so that the output
    covers every pixel (arXiv 1505.04597, fig. 2).
    """
    parameter = next(model.parameters())
    image = image.to(parameter.device)
    h, w = image.shape[-2:]
    if model.config.padding == "valid":
        image = _with_context(model, image)
    batch = image[None].contiguous(memory_format=torch.channels_last)
    logits = model(batch)[0].float()
    top, left = (logits.shape[-2] - h) // 2, (logits.shape[-1] - w) // 2
    return logits[:, top : top + h, left : left + w]


def probabilities(logits: Tensor) -> Tensor:
    """Class probabilities along dim -3: sigmoid of a single logit (of class 1), else softmax."""
    return logits.sigmoid() if logits.shape[-3] == 1 else logits.softmax(dim=-3)


def classes(probability: NDArray[np.floating], threshold: float = 0.5) -> NDArray[np.uint8]:
    """Class indices (H, W) of probabilities (K, H, W); a single one is class 1 above threshold."""
    if probability.shape[0] == 1:
        return (probability[0] > threshold).astype(np.uint8)
    return probability.argmax(axis=0).astype(np.uint8)


def _with_context(model: SegmentationUNet, image: Tensor) -> Tensor:
    """The image with a mirrored border, at the smallest size whose output covers it."""
    h, w = image.shape[-2:]
    rows, columns = input_size(model.config, h), input_size(model.config, w)
    y = mirror(torch.arange(rows, device=image.device) - (rows - h) // 2, h)
    x = mirror(torch.arange(columns, device=image.device) - (columns - w) // 2, w)
    return image[:, y[:, None], x[None, :]]
