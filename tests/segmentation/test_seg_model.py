"""The head of a segmentation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from segmentation.model import SegmentationUNet
from unet import PRESETS, InputError, UNetConfig


def test_a_trunk_that_needs_a_timestep_is_refused():
    with pytest.raises(InputError, match="no timestep, class or context"):
        SegmentationUNet(PRESETS["ddpm-cifar10"].config, 1)


def test_a_residual_trunk_is_normalised_and_activated_before_the_head():
    plain = SegmentationUNet(UNetConfig(channels=4, multipliers=(1, 2)), 3)
    residual = SegmentationUNet(UNetConfig(channels=4, multipliers=(1, 2), block="res"), 3)
    assert [type(m) for m in plain.head] == [nn.Conv2d]
    assert [type(m) for m in residual.head] == [nn.BatchNorm2d, nn.ReLU, nn.Conv2d]


def test_he_initialisation_covers_the_head():
    config = UNetConfig(channels=64, multipliers=(1,), norm="none", init="he")
    torch.manual_seed(0)
    head = SegmentationUNet(config, 200).head.conv
    assert float(head.weight.detach().std()) == pytest.approx(math.sqrt(2 / 64), rel=0.03)
    assert not head.bias.any()


@pytest.mark.parametrize("patch", [1, 2, 3])
def test_every_pixel_has_a_logit_of_its_own(patch):
    model = SegmentationUNet(UNetConfig(channels=4, multipliers=(1, 2), patch=patch), 2).eval()
    x = torch.randn(1, 1, 25, 31)
    logits = model(x)
    assert logits.shape == (1, 2, 25, 31)
    alike = logits[..., 1:] == logits[..., :-1]  # nowhere the same value for a whole patch
    assert alike.float().mean() < 0.02
