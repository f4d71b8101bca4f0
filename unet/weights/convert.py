"""Weights to and from the layouts of other projects: the classic U-Net, diffusers, CompVis.

A layout is one table of `unet.weights.layouts`; writing and reading are its two directions. Ours is
the state dict of a `SegmentationUNet` or `DiffusionUNet`. A layout names weights and nothing else:
padding, activation or epsilon are the config's business (`unet.weights.diffusers_config` reads and
writes that of diffusers).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, get_args

import torch
from einops import rearrange
from torch import Tensor

from unet.attention import head_count
from unet.config import UNetConfig
from unet.errors import InputError
from unet.model import UNet
from unet.weights.folder import check_fit
from unet.weights.layouts import Layout, check_layout, module_names
from unet.weights.wrappings import has_network, unwrapped

# Names that UNet2DModel's attention has in older checkpoints: read, but not written.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def to_layout(
    state: Mapping[str, Tensor], config: UNetConfig, layout: Layout, *, prefix: str = ""
) -> dict[str, Tensor]:
    """Our state dict under another project's names.

    Args:
        state: the state dict of a `SegmentationUNet` ("classic") or a `DiffusionUNet`.
        config: the config of that model.
        layout: "classic" is the common reimplementation (`inc.double_conv.0.weight` ...),
            "diffusers" its UNet2DModel or UNet2DConditionModel, "compvis" Stable Diffusion's own.
        prefix: put before every key, such as `layouts.COMPVIS_PREFIX`.

    Raises:
        InputError: an unknown layout; a config that it has no names for; a state that does not fit
            the config, with the keys and shapes that differ.
    """
    check_layout(config, layout)
    _check_tensors(state)
    check_fit(_meta_state(config, layout, state.get("head.conv.bias")), state, "the state dict")
    return {prefix + key: value for key, value in _write(state, config, layout).items()}


def from_layout(state: Mapping[str, Any], config: UNetConfig, layout: Layout) -> dict[str, Tensor]:
    """Another project's state dict under our names: the inverse of `to_layout`.

    It may be as people save it, inside a wrapper, with prefixes or beside other parts: see
    `unet.weights.wrappings.unwrapped`. Older names of diffusers' attention, and a classic
    checkpoint without `num_batches_tracked` (PyTorch before 0.4.1) or with the `mask_values` of its
    data, are read too.

    Raises:
        InputError: as `to_layout`.
    """
    check_layout(config, layout)
    state = _current(unwrapped(state, layout), layout)
    _check_tensors(state)
    table = module_names(config, layout)
    out_bias = state.get(f"{table['head.conv']}.bias")
    wanted = _write(_meta_state(config, layout, out_bias), config, layout)
    check_fit(wanted, state, f"the {layout} checkpoint")
    ours = _rename(state, {theirs: ours for ours, theirs in table.items()})
    return _split_qkv(ours, config) if layout == "compvis" else ours


def detect_layout(state: Mapping[str, Any]) -> Layout:
    """The layout of a state dict, by its keys; it may be as people save it, as for `from_layout`.

    Raises:
        InputError: the keys are those of none or of several layouts.
    """
    found: list[Layout] = [layout for layout in get_args(Layout) if has_network(state, layout)]
    if len(found) != 1:
        what = " and ".join(found) or "none"
        raise InputError(
            f"the keys {', '.join(map(repr, list(state)[:3]))} ... are those of {what} of the "
            f"layouts {', '.join(get_args(Layout))}: give the state dict of one U-Net"
        )
    return found[0]


def _check_tensors(state: Mapping[str, Any]) -> None:
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"{key!r} holds a {type(value).__name__} instead of a tensor: give the state dict "
                "itself, not the file around it"
            )


@lru_cache(maxsize=4)  # as the network takes longer to build than its weights to rename
def _meta_trunk(config: UNetConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return {f"trunk.{key}": value for key, value in UNet(config).state_dict().items()}


def _meta_state(config: UNetConfig, layout: Layout, out_bias: Tensor | None) -> dict[str, Tensor]:
    """Our state dict without memory, with as many output channels as the given one has."""
    with torch.device("meta"):
        out_channels = len(out_bias) if out_bias is not None and out_bias.ndim else 1
        state = dict(_meta_trunk(config))
        if layout != "classic":
            for kind in ("weight", "bias"):
                state[f"head.norm.{kind}"] = torch.empty(config.out_channels)
        size = 1 if layout == "classic" else 3
        state["head.conv.weight"] = torch.empty(out_channels, config.out_channels, size, size)
        state["head.conv.bias"] = torch.empty(out_channels)
    return state


def _current(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """A checkpoint with today's names, and nothing but the U-Net."""
    if layout == "compvis":
        return dict(state)
    if layout == "diffusers":
        old = re.compile(r"(?<=\.)(query|key|value|proj_attn)(?=\.(weight|bias)$)")
        return {old.sub(lambda m: _OLD_ATTENTION[m[1]], k): v for k, v in state.items()}
    norms = [k.removesuffix("running_mean") for k in state if k.endswith(".running_mean")]
    counters = {f"{norm}num_batches_tracked": torch.tensor(0) for norm in norms}
    return counters | {k: v for k, v in state.items() if k != "mask_values"}


def _write(state: Mapping[str, Tensor], config: UNetConfig, layout: Layout) -> dict[str, Tensor]:
    if layout == "compvis":
        state = _join_qkv(state, config)
    return _rename(state, module_names(config, layout))


def _rename(state: Mapping[str, Tensor], table: Mapping[str, str]) -> dict[str, Tensor]:
    parts = ((key.rpartition("."), value) for key, value in state.items())
    return {f"{table[module]}.{kind}": value for (module, _, kind), value in parts}


def _join_qkv(state: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """Self-attention as CompVis has it: 1D convolutions, and q, k, v in one, head by head.

    Rows of `qkv`: the first head's q, its k, its v, then the second head's (`QKVAttentionLegacy`).
    """
    joined = {}
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        if module.endswith((".attention.k", ".attention.v")):
            continue
        if module.endswith(".attention.q"):
            module = f"{module[:-1]}qkv"
            qkv = [value, *(state[key.replace(".attention.q.", f".attention.{n}.")] for n in "kv")]
            heads = head_count(len(value), config)
            value = rearrange(qkv, "three (h d) ... -> (h three d) ...", h=heads)
        if module.endswith((".attention.qkv", ".attention.out")) and kind == "weight":
            value = rearrange(value, "o i -> o i 1")
        joined[f"{module}.{kind}"] = value
    return joined


def _split_qkv(state: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """The inverse of `_join_qkv`."""
    split = {}
    for key, value in state.items():
        if key.endswith((".attention.qkv.weight", ".attention.out.weight")):
            value = rearrange(value, "o i 1 -> o i")
        if ".attention.qkv." not in key:
            split[key] = value
            continue
        heads = head_count(len(value) // 3, config)
        qkv = rearrange(value, "(h three d) ... -> three (h d) ...", h=heads, three=3)
        for n, part in zip("qkv", qkv, strict=True):
            split[key.replace(".qkv.", f".{n}.")] = part.clone()  # without the other two's memory
    return split
