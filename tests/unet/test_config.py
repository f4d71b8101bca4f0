"""UNetConfig: what cannot be built is refused with the numbers and the cure; JSON and back."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from unet.config import MOST_BLOCKS, MOST_CHANNELS, UNetConfig
from unet.errors import InputError
from unet.model import UNet
from unet.presets import PRESETS

RES = {"block": "res", "skips": "block"}
TOKENS = {"attention": "transformer", "context_channels": 8}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        # single values
        ({"channels": 0}, "channels=0 must be from 1 to"),
        ({"in_channels": -1}, "in_channels=-1 must be from 1 to"),
        ({"blocks": 0}, "blocks=0 must be from 1"),
        ({"patch": 0}, "patch=0 must be from 1"),
        ({"groups": 0}, "groups=0 must be from 1"),
        ({"transformer_depth": 0}, "transformer_depth=0 must be from 1"),
        ({"transformer_depth": (1, 2)}, r"transformer_depth=\(1, 2\) .* each of the 4 levels"),
        ({"transformer_depth": (1, 2, 0, 1)}, r"transformer_depth=\(1, 2, 0, 1\) must be from 1"),
        ({"vector_channels": -1}, r"vector_channels=-1 must be from 0 \(none\)"),
        ({"heads": 0}, "heads=0 must be from 1 to .* or None"),
        ({"head_channels": -4}, "head_channels=-4 must be from 1 to .* or None"),
        ({"context_channels": 0}, "context_channels=0 must be from 1 to .* or None"),
        ({"classes": -1}, r"classes=-1 must be from 0 \(none\)"),
        ({"multipliers": ()}, r"multipliers=\(\) must be one or more numbers from 1 up"),
        ({"multipliers": (1, 0)}, r"multipliers=\(1, 0\) must be one or more numbers from 1 up"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ({"dropout": float("nan")}, r"dropout=nan must be in \[0, 1\)"),
        ({"norm_eps": 0.0}, "norm_eps=0.0 must be above 0"),
        ({"time_freq_shift": 2}, "time_freq_shift=2 must be 0 or 1"),
        # types and choices
        ({"norm": "layer"}, r"norm='layer' .*'batch', 'group', 'instance', 'none'"),
        ({"block": "dense"}, r"block='dense' .*'conv', 'res'"),
        ({"activation": None}, "activation=None .*'relu'"),
        ({"up": ["transposed"]}, r"up=\['transposed'\] .*'bilinear'"),
        ({"channels": 32.0}, "channels=32.0 is not a valid value.*int"),
        ({"channels": True}, "channels=True is not a valid value.*int"),
        ({"time": 1}, "time=1 is not a valid value.*bool"),
        ({"dropout": "0.1"}, "dropout='0.1' is not a valid value.*float"),
        ({"multipliers": [1, 2]}, r"multipliers=\[1, 2\] is not a valid value.*tuple\[int"),
        ({"attention_levels": (0.5,)}, r"attention_levels=\(0.5,\) is not a valid value"),
        # combinations
        ({"decoder_multipliers": (1, 2)}, r"decoder_multipliers=\(1, 2\) must give 3 numbers"),
        ({"decoder_multipliers": (1, 2, 4, 8)}, "must give 3 numbers"),
        (RES | {"decoder_multipliers": (1, 2, 4)}, "must give 4 numbers"),
        ({"decoder_multipliers": (1, 0, 1)}, "must give 3 numbers from 1 up"),
        ({"multipliers": (1,), "decoder_multipliers": (2,)}, "must give 0 numbers"),
        ({"time": True}, "use block='res' with time=True, classes=0"),
        ({"classes": 4}, "use block='res' with time=False, classes=4"),
        ({"vector_channels": 4}, "use block='res' with .*vector_channels=4"),
        (RES | {"scale_shift": True}, "needs an embedding: set time=True or classes"),
        (RES | {"time": True, "channels": 3}, "channels=3 leaves no sinusoids"),
        ({"padding": "valid", "block": "res"}, "needs block='conv'.*not block='res'"),
        ({"padding": "valid", "skips": "block"}, "needs .*skips='level'.*not .*skips='block'"),
        ({"padding": "valid", "patch": 2}, "needs .*patch=1, not .*patch=2"),
        ({"decoder": "fcn-8s", "block": "res"}, "decoder='fcn-8s' needs block='conv'.*'res'"),
        ({"decoder": "fcn-32s", "padding": "valid"}, "needs .*padding='same'.*not .*'valid'"),
        ({"decoder": "fcn-8s", "skips": "block"}, "needs .*skips='level'.*not .*'block'"),
        ({"decoder": "fcn-8s", "multipliers": (1,)}, "two levels or more"),
        ({"decoder": "fcn-8s", "decoder_multipliers": (1, 2, 4)}, "no decoder_multipliers"),
        ({"context_channels": 8, "middle_attention": True}, "=8 needs attention='transformer'"),
        (TOKENS, "context_channels=8 has nowhere to go: set attention_levels or middle_attention"),
        ({"attention_levels": (4,)}, r"names level 4, but .* has levels 0 to 3"),
        ({"attention_levels": (-1,)}, r"names level -1, but .* has levels 0 to 3"),
        ({"heads": 2, "head_channels": 8}, "heads=2 and head_channels=8 exclude each other"),
        ({"norm": "group", "channels": 48}, "groups=32 does not divide 48 channels.*such as 24"),
        (
            {"norm": "group", "groups": 16, "channels": 8, "multipliers": (2, 4)}
            | {"decoder_multipliers": (1,)},
            "groups=16 does not divide 8 channels.*such as 8",
        ),
        (
            {"attention_levels": (1,), "heads": 6},
            "heads=6 does not divide the 64 channels of level 1, .* such as 4",
        ),
        (
            {"middle_attention": True, "head_channels": 48},
            "head_channels=48 does not divide the 256 channels of level 3, .* such as 32",
        ),
        (
            {"attention": "transformer", "middle_attention": True, "channels": 3},
            "groups=32 does not divide the 24 channels of level 3, .* such as 24",
        ),
        # nothing that no machine could build
        ({"channels": 10**30}, f"channels={10**30} must be from 1 to {MOST_CHANNELS}"),
        ({"classes": 10**12}, f"classes={10**12} must be from 0"),
        ({"multipliers": (1, 10**9)}, f"make {32 * 10**9} channels, more than {MOST_CHANNELS}"),
        ({"patch": 10**4}, f"patch=10000 make {10**8} channels, more than"),
        ({"blocks": 10**5}, f"make {4 * 10**5} blocks, more than {MOST_BLOCKS}"),
        ({"multipliers": (1,) * 600}, f"600 levels.* make 600 blocks, more than {MOST_BLOCKS}"),
    ],
)
def test_what_cannot_be_built_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        UNetConfig(**values)


def test_groups_that_do_not_divide_half_of_the_joined_channels() -> None:
    config = UNetConfig(norm="group", multipliers=(1, 2), up="bilinear", decoder_mid="half-in")
    with pytest.raises(InputError, match=r"groups=32 does not divide the 48 channels .*'out'"):
        UNet(config)
    UNet(replace(config, groups=16))


@pytest.mark.parametrize("name", PRESETS)
def test_json_and_back(name: str) -> None:
    config = PRESETS[name].config
    assert UNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_json_holds_every_field() -> None:
    changed = UNetConfig(
        in_channels=2,
        channels=16,
        multipliers=(1, 2),
        decoder_multipliers=(2, 1),
        block="res",
        skips="block",
        norm="group",
        groups=8,
        time=True,
        classes=7,
        attention="transformer",
        attention_levels=(0,),
        heads=4,
        context_channels=12,
    )
    values = json.loads(json.dumps(changed.to_dict()))
    assert set(values) == {field.name for field in dataclasses.fields(UNetConfig)}
    assert UNetConfig.from_dict(values) == changed


def test_missing_fields_have_their_defaults() -> None:
    assert UNetConfig.from_dict({"channels": 8}) == UNetConfig(channels=8)


def test_unknown_field_is_named() -> None:
    with pytest.raises(InputError, match=r"no field 'attention_resolutions', 'depth'; .*channels"):
        UNetConfig.from_dict({"depth": 4, "attention_resolutions": [8], "channels": 8})


def test_a_config_is_frozen_and_hashable() -> None:
    config = UNetConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.channels = 8  # type: ignore[misc]  # what is tested
    assert len({config, UNetConfig(), UNetConfig(channels=8)}) == 2


@pytest.mark.parametrize("name", PRESETS)
def test_presets_cite_their_source(name: str) -> None:
    assert len(PRESETS[name].source) > 20


def test_the_largest_config_is_built_in_seconds_without_memory() -> None:
    config = UNetConfig(channels=2**19, multipliers=(1, 2), groups=1)
    with torch.device("meta"):
        trunk = UNet(config)
    assert sum(p.numel() for p in trunk.parameters()) > 10**13
