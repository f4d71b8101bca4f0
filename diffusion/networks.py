"""Chooses a network for the images and the budget, if the user names none."""

from __future__ import annotations

from dataclasses import replace

from unet import PRESETS, UNetConfig
from unet.training.plan import DEFAULT_MINUTES
from unet.words import counted

_COARSEST = 8  # side of the coarsest map, at most: self-attention is cheap there
_ACCELERATOR = 30  # minutes of this kind of processor that a minute of a GPU is worth, roughly
# Channels, and minutes on a CPU up to which, for a finest map of _PLACES; larger ones take longer.
_WIDTHS = ((32, 20), (48, 80), (64, 300), (96, 2000))
_WIDEST = 128
_TEXT = 0.5  # of the minutes count where a network reads: transformers make each step longer
_PLACES = 16 * 16
_FEW = 2_000  # images, of which a wide network would learn each by heart


def automatic_config(
    channels: int,
    size: tuple[int, int],
    count: int,
    minutes: float | None,
    *,
    accelerator: bool,
    text: bool = False,
) -> tuple[UNetConfig, str]:
    """A config of the family of the "diffusion" preset, and why it is this one, in words.

    Args:
        channels, size, count: of the images.
        minutes: the budget; None: it is in steps or epochs, and taken as the default minutes.
        accelerator: the network is trained on a GPU.
        text: it reads captions.
    """
    side = max(size)
    patch = 1 if side < 24 else 2 if side < 128 else 4
    levels = 1
    while -(-side // patch) > _COARSEST * 2 ** (levels - 1):
        levels += 1
    levels = max(2, levels)
    minutes = minutes or DEFAULT_MINUTES
    places = -(-size[0] // patch) * -(-size[1] // patch)
    budget = minutes * (_ACCELERATOR if accelerator else 1) * _PLACES / places
    budget *= _TEXT if text else 1
    width = next((w for w, most in _WIDTHS if budget <= most), _WIDEST)
    reasons = [f"{counted(minutes, 'minute')} on a {'GPU' if accelerator else 'CPU'}"]
    if count < _FEW and width > 64:
        width = 64
        reasons.append(f"only {counted(count, 'image')}")
    multipliers = (1, *[2] * (levels - 1))
    config = replace(
        PRESETS["diffusion"].config,
        in_channels=channels,
        channels=width,
        multipliers=multipliers,
        patch=patch,
        attention_levels=(levels - 1,),
    )
    coarsest = -(-side // (patch * 2 ** (levels - 1)))
    return config, (
        f"{width} channels for {' and '.join(reasons)}; patches of {patch} and {levels} levels for "
        f"images of {size[0]} x {size[1]}, so that attention works at {coarsest} x {coarsest}"
    )
