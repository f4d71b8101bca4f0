"""Weights of a trunk with a timestep as those of one without, and vice versa: the same function.

All are pure functions of a config and the state dict of its `UNet`, and give both anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

from unet.config import UNetConfig
from unet.errors import InputError
from unet.model import UNet

_JUMP = "jump_embedding."


class Trunk(NamedTuple):
    """A network's shape and the state dict of its `UNet`."""

    config: UNetConfig
    state: dict[str, Tensor]


def plain(config: UNetConfig) -> UNetConfig:
    """The same network without timestep, class, vector and text."""
    return replace(
        config,
        time=False,
        jumps=False,
        classes=0,
        vector_channels=0,
        scale_shift=False,
        context_channels=None,
    )


def timed(config: UNetConfig, *, scale_shift: bool = True) -> UNetConfig:
    """The same network with a timestep.

    Raises:
        InputError: a network whose blocks take no embedding.
    """
    if config.block != "res":
        raise InputError(
            f"a network of block={config.block!r} takes no timestep, which goes into residual "
            "blocks: train it with --network shared"
        )
    return replace(config, time=True, scale_shift=scale_shift)


def without_conditioning(
    config: UNetConfig,
    state: Mapping[str, Tensor],
    *,
    t: float = 0.0,
    class_index: int = -1,
    context: Tensor | None = None,
) -> Trunk:
    """The trunk without timestep, class and text that gives what this one gives for fixed ones.

    At a fixed timestep and class the embedding is a constant, and so is what each block makes of
    it: it goes into the affine map of the block's second norm (scale and shift), or into the bias
    of its first convolution (added). Cross-attention to a single token gives its value whatever the
    pixel asks, which goes into the bias of the self-attention before it.

    Args:
        t: the timestep, where the config has time.
        class_index: row of the class embedding; the last is our models' "no class".
        context: (L, context_channels) the tokens, where the config has cross-attention.

    Raises:
        InputError: cross-attention to tokens that differ, which is no constant; a network that
            takes a vector; a class that it does not have.
    """
    if config.vector_channels:
        raise InputError(
            f"a network that takes a vector of {config.vector_channels} numbers, such as that of "
            "Stable Diffusion XL, cannot become one without"
        )
    folded = dict(state)
    if config.embedding_channels:
        emb = _embedding(config, state, t, class_index)
        for block in _blocks_with(state, ".emb.weight"):
            weight, bias = (folded.pop(f"{block}.emb.{kind}") for kind in ("weight", "bias"))
            _fold_embedding(folded, block, weight.double() @ emb + bias.double(), config)
        folded = {k: v for k, v in folded.items() if "_embedding." not in k}
    if config.context_channels is not None:
        token = only_token(context, config.context_channels)
        for block in _blocks_with(state, ".cross_attention.v.weight"):
            _fold_token(folded, block, token)
    return Trunk(plain(config), folded)


def with_time(
    config: UNetConfig, state: Mapping[str, Tensor], *, scale_shift: bool = True
) -> Trunk:
    """A trunk with a timestep, which has no effect yet: the same function at every t.

    The projections of the embedding start at zero, the embedding itself at random weights (of
    PyTorch's generator).

    Args:
        scale_shift: the embedding scales and shifts the second norm of a block, or is added.

    Raises:
        InputError: a network whose blocks take no embedding.
    """
    config = timed(config, scale_shift=scale_shift)
    fresh = UNet(config).state_dict()
    for block in _blocks_with(fresh, ".emb.weight"):
        for kind in ("weight", "bias"):
            fresh[f"{block}.emb.{kind}"].zero_()
    return Trunk(config, {**fresh, **state})


def with_jumps(config: UNetConfig, state: Mapping[str, Tensor]) -> Trunk:
    """A trunk with an input for jumps, which has no effect yet: the same function for every jump.

    The last layer of the embedding of jumps is zero; the first one is that of the embedding of
    timesteps, whose sinusoids it has learnt.
    """
    config = replace(config, jumps=True)
    fresh = {k: v for k, v in UNet(config).state_dict().items() if k.startswith(_JUMP)}
    known = {
        k: state[k.replace(_JUMP, "time_embedding.")].clone() for k in fresh if ".linear1." in k
    }
    return Trunk(config, {**fresh, **known, **state})


def without_jumps(config: UNetConfig, state: Mapping[str, Tensor]) -> Trunk:
    """The trunk without an input for jumps: the function of this one without a jump."""
    kept = {k: v for k, v in state.items() if not k.startswith(_JUMP)}
    return Trunk(replace(config, jumps=False), kept)


def with_channels(config: UNetConfig, state: Mapping[str, Tensor], in_channels: int) -> Trunk:
    """The trunk for images of another number of channels, of which one side is 1.

    It gives the same for a grey image in colour, or the reverse: the weights of the first
    convolution are divided among equal channels, or summed over the channels.

    Raises:
        InputError: two numbers of channels that are both above 1.
    """
    check_channels(config.in_channels, in_channels)
    if in_channels == config.in_channels:
        return Trunk(config, dict(state))
    name = _first_convolution(state)
    weight = rearrange(state[name], "o (c p) h w -> o c p h w", c=config.in_channels)
    if in_channels == 1:
        weight = weight.sum(dim=1)
    else:
        weight = repeat(weight / in_channels, "o 1 p h w -> o (c p) h w", c=in_channels)
    return Trunk(replace(config, in_channels=in_channels), {**state, name: weight})


def with_inputs(config: UNetConfig, state: Mapping[str, Tensor], kept: int, more: int) -> Trunk:
    """The trunk that reads the first channels of its input, and others that change nothing yet.

    It gives what this one gives where all channels but those are 0, whatever the others are: their
    weights start at zero.

    Args:
        kept: how many of the channels are kept.
        more: how many come after them.
    """
    name = _first_convolution(state)
    weight = rearrange(state[name], "o (c p) h w -> o c p h w", c=config.in_channels)[:, :kept]
    zeros = weight.new_zeros(weight.shape[0], more, *weight.shape[2:])
    weight = torch.cat([weight, zeros], dim=1).flatten(1, 2)
    return Trunk(replace(config, in_channels=kept + more), {**state, name: weight})


def check_channels(given: int, wanted: int) -> None:
    """Raises an InputError unless one of two numbers of channels is 1, or they are the same."""
    if given != wanted and 1 not in (given, wanted):
        raise InputError(
            f"a network for {given} channels cannot become one for {wanted}: only grey and colour "
            "are converted into each other"
        )


def with_pixels(
    config: UNetConfig, state: Mapping[str, Tensor], scale: Sequence[float], shift: Sequence[float]
) -> Trunk:
    """The trunk that gives for x what this one gives for scale x + shift, of each channel.

    Exact but at the border, where the zeros around the image mean another grey.

    Args:
        scale, shift: a number for each channel.
    """
    name = _first_convolution(state)
    bias = f"{name.removesuffix('weight')}bias"
    weight = rearrange(state[name], "o (c p) h w -> o c p h w", c=config.in_channels)
    per_channel = (1, -1, 1, 1, 1)
    a, b = (weight.new_tensor(list(v)).view(per_channel) for v in (scale, shift))
    moved = {name: (weight * a).flatten(1, 2)}
    if bias in state:
        moved[bias] = state[bias] + (weight * b).sum(dim=(1, 2, 3, 4))
    return Trunk(config, {**state, **moved})


def _embedding(
    config: UNetConfig, state: Mapping[str, Tensor], t: float, class_index: int
) -> Tensor:
    """The activated embedding that every block gets, (4 channels,), in float64."""
    with torch.device("meta"):
        trunk = UNet(config)
    parts = {}
    for name in ("time_embedding", "class_embedding"):
        if (part := getattr(trunk, name)) is not None:
            own = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(name)}
            part.load_state_dict({k: v.double() for k, v in own.items()}, assign=True)
            parts[name] = part
    terms = []
    with torch.no_grad():
        if "time_embedding" in parts:
            terms.append(parts["time_embedding"](torch.tensor([t]))[0])
        if "class_embedding" in parts:
            if not -config.classes <= class_index < config.classes:
                raise InputError(
                    f"class_index={class_index} is beyond the {config.classes} classes of the "
                    f"network: choose from 0 to {config.classes - 1}, or -1 for the last"
                )
            terms.append(parts["class_embedding"].weight[class_index])
        return trunk.act(sum(terms))


def _fold_embedding(state: dict[str, Tensor], block: str, emb: Tensor, config: UNetConfig) -> None:
    """Enters what a block makes of the embedding, (C,), or with scale and shift (2 C,)."""
    if not config.scale_shift:
        _change(state, f"{block}.conv1.bias", lambda bias: bias + emb)
        return
    scale, shift = emb.chunk(2)
    # Without a norm the convolution before it is scaled, which is followed by nothing else.
    target = "norm2" if f"{block}.norm2.weight" in state else "conv1"
    _change(
        state,
        f"{block}.{target}.weight",
        lambda weight: weight * (1 + scale).view(-1, *[1] * (weight.ndim - 1)),
    )
    _change(state, f"{block}.{target}.bias", lambda bias: bias * (1 + scale) + shift)


def only_token(context: Tensor | None, channels: int) -> Tensor:
    """The token of a context in which there is no other."""
    if context is None or context.ndim != 2 or context.shape[1] != channels or not len(context):
        found = None if context is None else tuple(context.shape)
        raise InputError(
            f"a network that reads text of {channels} channels becomes one without text only for "
            f"a given context of shape (L, {channels}), not {found}"
        )
    if not torch.equal(context, context[:1].expand_as(context)):
        raise InputError(
            f"attention to {len(context)} tokens that differ depends on the pixel, so it cannot "
            "be folded into weights: only a context of one token can, such as the empty text of a "
            "text encoder that was trained with it; that of CLIP has 77"
        )
    return context[0].double()


def _fold_token(state: dict[str, Tensor], block: str, token: Tensor) -> None:
    """Drops a transformer block's cross-attention for the constant that it adds."""
    cross = f"{block}.cross_attention"
    value = state[f"{cross}.out.weight"].double() @ (state[f"{cross}.v.weight"].double() @ token)
    value = value + state[f"{cross}.out.bias"].double()
    _change(state, f"{block}.self_attention.out.bias", lambda bias: bias + value)
    for key in [k for k in state if k.startswith((f"{cross}.", f"{block}.norm2."))]:
        del state[key]


def _change(state: dict[str, Tensor], key: str, change: object) -> None:
    """Replaces a tensor by what `change` makes of it in float64."""
    assert callable(change)
    state[key] = change(state[key].double()).to(state[key].dtype)


def _blocks_with(state: Mapping[str, Tensor], end: str) -> list[str]:
    """The names of the modules with such a part."""
    return [key.removesuffix(end) for key in state if key.endswith(end)]


def _first_convolution(state: Mapping[str, Tensor]) -> str:
    """The name of the weights that read the pixels."""
    modules = ("encoder.0.stem.conv", "encoder.0.block.conv1", "middle.block1.conv1")
    return next(f"{name}.weight" for name in modules if f"{name}.weight" in state)
