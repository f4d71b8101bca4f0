"""The head of a segmentation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from segmentation.losses import cross_entropy, deeply_supervised
from segmentation.model import SegmentationUNet
from unet import PRESETS, InputError, UNetConfig


@pytest.mark.parametrize(
    "config", [PRESETS["ddpm-cifar10"].config, UNetConfig(block="res", vector_channels=3)]
)
def test_a_trunk_that_needs_more_than_an_image_is_refused(config):
    with pytest.raises(InputError, match="no timestep, class, vector or context"):
        SegmentationUNet(config, 1)


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


@pytest.mark.parametrize("values", [{}, {"patch": 2}, {"block": "res", "skips": "block"}])
def test_deep_supervision_reaches_every_level_and_changes_no_prediction(tmp_path, values):
    config = UNetConfig(channels=4, multipliers=(1, 2, 3), **values)
    torch.manual_seed(0)
    model = SegmentationUNet(config, 2, {"deep_supervision": True})
    x, target = torch.randn(2, 1, 26, 36), torch.randint(0, 2, (2, 26, 36))
    logits = model(x, deep=True)
    assert [t.shape[1] for t in logits] == [2] * len(logits)
    assert len(logits) == 2 + (config.skips == "block")
    assert torch.equal(model.eval()(x), model(x, deep=True)[-1])

    loss = deeply_supervised(cross_entropy, model(x, deep=True), target)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.coarse_heads.parameters())
    model.save_pretrained(tmp_path)
    again = SegmentationUNet.from_pretrained(tmp_path)
    assert torch.equal(again(x), model(x))


def test_coarser_levels_count_half_of_the_next_finer_one():
    target = torch.zeros(1, 8, 12, dtype=torch.long)
    target[:, :, 6:] = 1
    fine, coarse = torch.zeros(1, 2, 8, 12), torch.zeros(1, 2, 4, 5)
    right = torch.zeros(1, 2, 2, 2)
    right[:, 0, :, 0], right[:, 1, :, 1] = 100, 100  # the two halves, at a quarter of the size
    unsure = math.log(2)
    found = deeply_supervised(cross_entropy, [right, coarse, fine], target, torch.ones(1, 8, 12))
    assert float(found) == pytest.approx((unsure + unsure / 2 + 0 / 4) / 1.75)
    nothing = deeply_supervised(cross_entropy, [right], target, torch.zeros(1, 8, 12))
    assert float(nothing) == 0


@pytest.mark.parametrize(
    "values", [{"padding": "valid"}, {"multipliers": (1, 2)}, {"decoder": "fcn-8s"}]
)
def test_deep_supervision_needs_levels_that_lie_on_the_image(values):
    config = UNetConfig(**{"channels": 4, "multipliers": (1, 2, 3), **values})
    with pytest.raises(InputError, match="deep supervision needs decoder='unet'"):
        SegmentationUNet(config, 1, {"deep_supervision": True})
