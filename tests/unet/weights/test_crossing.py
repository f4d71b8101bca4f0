"""A trunk at a fixed timestep is a trunk without one, and a trunk without one is one at any."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusion.text import WordEncoder
from unet.config import UNetConfig
from unet.errors import InputError
from unet.model import UNet
from unet.presets import PRESETS
from unet.weights.crossing import (
    Trunk,
    with_channels,
    with_inputs,
    with_jumps,
    with_pixels,
    with_time,
    without_conditioning,
    without_jumps,
)

PLAIN = UNetConfig(channels=8, multipliers=(1, 2), block="res", norm="group", groups=4, patch=2)


@st.composite
def configs(draw: st.DrawFn, **fixed: Any) -> UNetConfig:
    """Small networks of residual blocks of every kind, without conditioning where not fixed."""
    attention = draw(st.sampled_from(["none", "self", "transformer"]))
    if "context_channels" in fixed:
        attention = "transformer"
    fields: dict[str, Any] = {
        "in_channels": draw(st.sampled_from([1, 3])),
        "channels": 8,
        "multipliers": draw(st.sampled_from([(1,), (1, 2), (2, 1, 1)])),
        "blocks": draw(st.integers(1, 2)),
        "block": "res",
        "skips": draw(st.sampled_from(["level", "block"])),
        "patch": draw(st.sampled_from([1, 2])),
        "norm": draw(st.sampled_from(["batch", "group", "instance", "none"])),
        "groups": 4,
        "activation": draw(st.sampled_from(["relu", "leaky-relu", "silu", "gelu"])),
        "down": draw(st.sampled_from(["max", "avg", "conv", "conv-asymmetric"])),
        "up": draw(st.sampled_from(["transposed", "bilinear", "nearest", "nearest-conv"])),
        "dropout": 0.1,
        "time_cos_first": draw(st.booleans()),
        "time_freq_shift": draw(st.integers(0, 1)),
        "heads": 2,
        "linear_projections": draw(st.booleans()),
        "transformer_depth": draw(st.integers(1, 2)),
    }
    if attention != "none":
        fields |= {"attention": attention, "middle_attention": True, "attention_levels": (0,)}
    return UNetConfig(**(fields | fixed))


def trunk(config: UNetConfig, seed: int) -> UNet:
    """A trunk in evaluation mode with no parameter at a special value."""
    torch.manual_seed(seed)
    model = UNet(config)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point() and not name.endswith("running_var"):
                value.add_(0.1 * torch.randn_like(value))
    return model.eval()


def loaded(found: Trunk) -> UNet:
    model = UNet(found.config)
    model.load_state_dict(found.state)
    return model.eval()


def differs(found: Tensor, wanted: Tensor) -> float:
    """The largest difference beside the size of what is wanted."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1))


@settings(max_examples=40)
@given(st.data(), st.integers(0, 999), st.integers(0, 100))
def test_a_trunk_at_a_timestep_is_one_without(data: st.DataObject, t: int, seed: int) -> None:
    time, classes = data.draw(st.sampled_from([(True, 0), (True, 3), (False, 3)]))
    text = data.draw(st.sampled_from([{}, {"context_channels": 6}]))
    scale_shift = data.draw(st.booleans())
    config = data.draw(configs(time=time, classes=classes, scale_shift=scale_shift, **text))
    model = trunk(config, seed)
    x = torch.randn(2, config.in_channels, 13, 10)
    given: dict[str, Tensor] = {"t": torch.full((2,), t)} if time else {}
    context = torch.randn(1, 6).expand(data.draw(st.integers(1, 3)), 6) if text else None
    if context is not None:
        given["context"] = context.expand(2, *context.shape)
    if classes:
        given["classes"] = torch.full((2,), classes - 1)
    with torch.no_grad():
        wanted = model(x, **given)
        plain = without_conditioning(config, model.state_dict(), t=t, context=context)
        assert differs(loaded(plain)(x), wanted) < 1e-5
    assert not plain.config.embedding_channels
    assert plain.config.context_channels is None


@settings(max_examples=20)
@given(st.data(), st.integers(0, 100), st.booleans())
def test_a_trunk_without_a_timestep_is_one_at_any(
    data: st.DataObject, seed: int, scale_shift: bool
) -> None:
    config = data.draw(configs())
    model = trunk(config, seed)
    timed = with_time(config, model.state_dict(), scale_shift=scale_shift)
    x = torch.randn(3, config.in_channels, 13, 10)
    with torch.no_grad():
        found = loaded(timed)(x, torch.tensor([0, 10, 999]))
        assert differs(found, model(x)) < 1e-5
    back = without_conditioning(*timed, t=7)
    for name, value in model.state_dict().items():
        assert torch.allclose(back.state[name], value, atol=1e-6), name


def test_a_trained_embedding_learns_from_zero() -> None:
    model = loaded(with_time(PLAIN, trunk(PLAIN, 0).state_dict()))
    model(torch.randn(2, 1, 8, 8), torch.tensor([3, 500])).square().mean().backward()
    blocks = [m for n, m in model.named_modules() if n.endswith(".emb")]
    assert blocks
    assert all(block.weight.grad.abs().sum() > 0 for block in blocks)


def test_a_trunk_that_is_told_of_jumps_is_the_same_until_it_learns() -> None:
    config = replace(PLAIN, time=True)
    model = trunk(config, 0)
    told = with_jumps(config, model.state_dict())
    jumping = loaded(told)
    x, t, jump = torch.randn(2, 1, 8, 8), torch.tensor([3, 500]), torch.tensor([4.0, 250.5])
    with torch.no_grad():
        wanted = model(x, t)
        for found in (jumping(x, t), jumping(x, t, jump=jump)):
            assert torch.equal(found, wanted)
    jumping(x, t, jump=jump).square().mean().backward()
    assert jumping.jump_embedding.linear2.weight.grad.abs().sum() > 0
    # However much it has learnt of jumps, without one it is what it was, and so is what follows.
    learnt = loaded(told)
    torch.nn.init.normal_(learnt.jump_embedding.linear2.weight)
    with torch.no_grad():
        for found in (learnt(x, t), learnt(x, t, jump=torch.zeros(2))):
            assert differs(found, wanted) < 1e-6
        assert differs(learnt(x, t, jump=jump), wanted) > 0.01
        assert differs(loaded(without_jumps(told.config, learnt.state_dict()))(x, t), wanted) < 1e-6
        plain = without_conditioning(told.config, learnt.state_dict(), t=3)
        assert differs(loaded(plain)(x[:1]), wanted[:1]) < 1e-5


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("block", ["conv", "res"])
def test_grey_shown_in_colour_is_the_same_to_the_trunk(channels: int, block: Any) -> None:
    config = replace(PLAIN, block=block, patch=2 if block == "res" else 1, in_channels=channels)
    model = trunk(config, 1)
    turned = with_channels(config, model.state_dict(), 4 - channels)
    grey = torch.randn(2, 1, 12, 8)
    with torch.no_grad():
        found = loaded(turned)(grey.expand(-1, 4 - channels, -1, -1))
        assert differs(found, model(grey.expand(-1, channels, -1, -1))) < 1e-5


@pytest.mark.parametrize("block", ["conv", "res"])
def test_other_channels_change_nothing_at_first(block: Any) -> None:
    config = replace(PLAIN, block=block, patch=2 if block == "res" else 1, in_channels=3)
    model = trunk(config, 1)
    wider = loaded(with_inputs(config, model.state_dict(), 2, 4))
    x = torch.randn(2, 6, 12, 8)
    with torch.no_grad():
        wanted = model(torch.cat([x[:, :2], torch.zeros(2, 1, 12, 8)], dim=1))
        assert differs(wider(x), wanted) < 1e-5


def test_other_pixels_are_the_same_to_the_trunk() -> None:
    config = replace(PLAIN, in_channels=3, norm="none")  # group norm would see the border
    model = trunk(config, 1)
    scale, shift = torch.tensor([2.0, 0.5, 1.0]), torch.tensor([0.3, -1.0, 0.0])
    moved = loaded(with_pixels(config, model.state_dict(), scale.tolist(), shift.tolist()))
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        found = moved(x)
        wanted = model(x * scale[:, None, None] + shift[:, None, None])
    inside = (..., slice(16, 32), slice(16, 32))
    assert differs(found[inside], wanted[inside]) < 1e-5


def test_the_empty_text_of_our_own_encoder_folds_and_that_of_clip_is_refused() -> None:
    fields = {"attention": "transformer", "middle_attention": True, "context_channels": 32}
    config = replace(PLAIN, time=True, **fields)
    words = WordEncoder(["circle"], 4, width=32).eval()
    (context,) = words.encode([""]).context.detach()
    model = trunk(config, 0)
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([5])
    with torch.no_grad():
        found = without_conditioning(config, model.state_dict(), t=5, context=context)
        assert differs(loaded(found)(x), model(x, t, context[None])) < 1e-5
    for context, reason in (
        (torch.randn(77, 32), "attention to 77 tokens that differ depends on the pixel"),
        (torch.randn(1, 8), r"of shape \(L, 32\), not \(1, 8\)"),
        (None, "reads text of 32 channels"),
    ):
        with pytest.raises(InputError, match=reason):
            without_conditioning(config, model.state_dict(), context=context)


def test_what_cannot_cross_is_refused() -> None:
    classic = PRESETS["segmentation"].config
    with pytest.raises(InputError, match="residual blocks"):
        with_time(classic, {})
    config = replace(PLAIN, classes=4)
    with pytest.raises(InputError, match=r"class_index=4 is beyond the 4 classes .* 0 to 3"):
        without_conditioning(config, UNet(config).state_dict(), class_index=4)
    with pytest.raises(InputError, match="4 channels cannot become one for 3"):
        with_channels(replace(PLAIN, in_channels=4), {}, 3)
