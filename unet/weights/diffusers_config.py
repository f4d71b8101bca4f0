"""Configs from and to the `config.json` of diffusers' UNet2DModel and UNet2DConditionModel."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NoReturn

from unet.attention import head_count
from unet.config import UNetConfig
from unet.errors import InputError

# The fields that we read, with diffusers' defaults: an older config.json lacks newer fields.
_COMMON: dict[str, Any] = {
    "act_fn": "silu",
    "attention_head_dim": 8,
    "downsample_padding": 1,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "layers_per_block": 2,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "time_embedding_dim": None,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "UNet2DModel": {
        **_COMMON,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (224, 448, 672, 896),
        "down_block_types": ("DownBlock2D", *3 * ("AttnDownBlock2D",)),
        "up_block_types": (*3 * ("AttnUpBlock2D",), "UpBlock2D"),
        "mid_block_type": "UNetMidBlock2D",
        "add_attention": True,
        "attn_norm_num_groups": None,
    },
    "UNet2DConditionModel": {
        **_COMMON,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (*3 * ("CrossAttnDownBlock2D",), "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *3 * ("CrossAttnUpBlock2D",)),
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "cross_attention_dim": 1280,
        "addition_embed_type": None,
        "addition_time_embed_dim": None,
        "projection_class_embeddings_input_dim": None,
        "transformer_layers_per_block": 1,
        "use_linear_projection": False,
    },
}
# Fields of which we can express these values alone, diffusers' default among them.
_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_type": ("conv",),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "num_attention_heads": (None,),  # diffusers refuses others too
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "upsample_type": ("conv",),
}
# Fields that change nothing in a network that passes the others.
_IGNORED = {
    "addition_embed_type_num_heads",
    "num_train_timesteps",
    "sample_size",
    "upcast_attention",
}
# Types that a field may have beside that of its default.
_OTHER_TYPES: dict[str, tuple[type, ...]] = {
    "addition_embed_type": (str,),
    "addition_time_embed_dim": (int,),
    "attention_head_dim": (tuple, type(None)),
    "attn_norm_num_groups": (int,),
    "cross_attention_dim": (tuple,),
    "dropout": (int,),
    "layers_per_block": (tuple,),
    "norm_eps": (int,),
    "projection_class_embeddings_input_dim": (int,),
    "num_class_embeds": (int,),
    "time_embedding_dim": (int,),
    "transformer_layers_per_block": (tuple,),
}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu"}
_DOWN = {0: "conv-asymmetric", 1: "conv"}
_SCALE_SHIFT = {"default": False, "scale_shift": True}


def config_from_diffusers(values: Mapping[str, Any]) -> tuple[UNetConfig, int]:
    """The config and the output channels of a diffusers U-Net.

    Args:
        values: its `config.json`, with "_class_name" UNet2DModel or UNet2DConditionModel.

    Raises:
        InputError: a field that our U-Net cannot express, with its value.
    """
    given = _read_fields(values)
    cross = values["_class_name"] == "UNet2DConditionModel"
    levels = len(given["down_block_types"])
    if not levels:
        _refuse(given, "down_block_types", "it must name one or more")
    kind = "CrossAttn" if cross else "Attn"
    at = [i for i, t in enumerate(given["down_block_types"]) if t == f"{kind}DownBlock2D"]
    for name, types in _block_types(levels, at, kind).items():
        if given[name] != types:
            _refuse(given, name, f"with these attention levels it must be {types}")

    widths = _per_level(given, "block_out_channels", levels)
    if any(width % widths[0] for width in widths):
        _refuse(given, "block_out_channels", "they must be multiples of the first")
    if given["time_embedding_dim"] not in (None, 4 * widths[0]):
        _refuse(given, "time_embedding_dim", f"it must be {4 * widths[0]}")
    if not cross and given["act_fn"] not in ("silu", "swish"):
        _refuse(given, "act_fn", "UNet2DModel has silu beside it, and we have one activation")
    config = {
        "in_channels": given["in_channels"],
        "channels": widths[0],
        "multipliers": tuple(width // widths[0] for width in widths),
        "blocks": _one(given, "layers_per_block", range(levels), levels),
        "block": "res",
        "skips": "block",
        "norm": "group",
        "groups": given["norm_num_groups"],
        "norm_eps": given["norm_eps"],
        "activation": _look_up(given, "act_fn", _ACTIVATIONS),
        "zero_init": True,
        "down": _look_up(given, "downsample_padding", _DOWN),
        "up": "nearest-conv",
        "dropout": given["dropout"],
        "time": True,
        "time_cos_first": given["flip_sin_to_cos"],
        "time_freq_shift": given["freq_shift"],
        "scale_shift": _look_up(given, "resnet_time_scale_shift", _SCALE_SHIFT),
        "classes": given["num_class_embeds"] or 0,
        "attention_levels": tuple(at),
    }
    attention = (
        _transformer(given, widths, at) | _vector(given) if cross else _self_attention(given)
    )
    return UNetConfig(**config, **attention), given["out_channels"]


def config_to_diffusers(config: UNetConfig, out_channels: int) -> dict[str, Any]:
    """The `config.json` of a diffusers U-Net that computes the same: UNet2DConditionModel where
    the config attends to a context, else UNet2DModel.

    Raises:
        InputError: a field that diffusers cannot express, with its value.
    """
    attends = bool(config.attention_levels) or config.middle_attention
    cross = config.attention == "transformer" and attends
    kind = "CrossAttn" if cross else "Attn"
    activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items() if theirs != "swish"}
    values: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel" if cross else "UNet2DModel",
        "in_channels": config.in_channels,
        "out_channels": out_channels,
        "block_out_channels": list(config.encoder_channels),
        **_block_types(config.levels, config.attention_levels, kind),
        "layers_per_block": config.blocks,
        "norm_num_groups": config.groups,
        "norm_eps": config.norm_eps,
        "act_fn": activations.get(config.activation, config.activation),
        "downsample_padding": 0 if config.down == "conv-asymmetric" else 1,
        "dropout": config.dropout,
        "flip_sin_to_cos": config.time_cos_first,
        "freq_shift": config.time_freq_shift,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "num_class_embeds": config.classes or None,
    }
    if cross:
        heads = [max(1, head_count(width, config)) for width in config.encoder_channels]
        values |= {
            "attention_head_dim": heads[0] if len(set(heads)) == 1 else heads,  # really the heads
            "cross_attention_dim": config.context_channels,
            "transformer_layers_per_block": config.transformer_depth,
            "use_linear_projection": config.linear_projections,
        }
        if config.vector_channels:
            values |= {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": config.vector_waves,
                "projection_class_embeddings_input_dim": config.vector_channels,
            }
    else:
        values |= {
            "attention_head_dim": _head_channels(config),
            "add_attention": config.middle_attention,
            "attn_norm_num_groups": config.groups,  # else scale_shift's middle has no norm
        }
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    _check_same(config, values)
    return values


def _read_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """All fields that we read, of the type of their default; refuses what we cannot express."""
    name = values.get("_class_name")
    if not isinstance(name, str) or name not in _DEFAULTS:
        raise InputError(
            f"_class_name={name!r} is no U-Net that can be read here: it must be "
            f"{' or '.join(_DEFAULTS)}"
        )
    given = dict(_DEFAULTS[name])
    for field, value in values.items():
        if field in given:
            given[field] = tuple(value) if isinstance(value, list) else value
        elif field in _FIXED:
            if value not in _FIXED[field]:
                _refuse(values, field, f"it must be {_FIXED[field][0]!r}")
        elif field not in _IGNORED and not field.startswith("_"):
            _refuse(values, field, "the field is not known here")
    for field, default in _DEFAULTS[name].items():
        if type(given[field]) not in (type(default), *_OTHER_TYPES.get(field, ())):
            _refuse(given, field, f"it must be of the type of {default!r}")
    if given["mid_block_type"] != _DEFAULTS[name]["mid_block_type"]:
        _refuse(given, "mid_block_type", f"it must be {_DEFAULTS[name]['mid_block_type']!r}")
    return given


def _refuse(given: Mapping[str, Any], field: str, why: str) -> NoReturn:
    raise InputError(f"our U-Net cannot express {field}={given[field]!r} of diffusers: {why}")


def _look_up(given: Mapping[str, Any], field: str, table: Mapping[Any, Any]) -> Any:
    if given[field] not in table:
        _refuse(given, field, f"it must be {' or '.join(map(repr, table))}")
    return table[given[field]]


def _block_types(levels: int, at: Collection[int], kind: str) -> dict[str, tuple[str, ...]]:
    """The blocks' names, with attention at the levels `at`; the decoder's from the coarsest up."""
    names = [kind if i in at else "" for i in range(levels)]
    return {
        "down_block_types": tuple(f"{name}DownBlock2D" for name in names),
        "up_block_types": tuple(f"{name}UpBlock2D" for name in reversed(names)),
    }


def _per_level(given: Mapping[str, Any], field: str, levels: int) -> tuple[int, ...]:
    """A field that holds one number, or one for each level."""
    value = given[field]
    numbers = value if isinstance(value, tuple) else (value,) * levels
    if len(numbers) != levels or any(type(n) is not int or n < 1 for n in numbers):
        _refuse(given, field, f"it must give a number from 1 up for each of the {levels} levels")
    return numbers


def _one(given: Mapping[str, Any], field: str, at: Collection[int], levels: int) -> int:
    """The number of a field that must be the same at the levels `at`."""
    numbers = _per_level(given, field, levels)
    if len({numbers[i] for i in at}) != 1:
        _refuse(given, field, "it must be the same at all levels that use it")
    return numbers[min(at)]


def _self_attention(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a UNetConfig with a UNet2DModel's attention."""
    # Without scale_shift, None means norm_num_groups; with it, no norm in the middle's attention.
    default = {None} if given["resnet_time_scale_shift"] == "default" else set()
    if given["attn_norm_num_groups"] not in {given["norm_num_groups"], *default}:
        _refuse(given, "attn_norm_num_groups", f"it must be {given['norm_num_groups']}")
    if isinstance(given["attention_head_dim"], tuple):
        _refuse(given, "attention_head_dim", "UNet2DModel has one for all levels")
    return {
        "attention": "self",
        "middle_attention": given["add_attention"],
        "head_channels": given["attention_head_dim"],
    }


def _transformer(
    given: Mapping[str, Any], widths: tuple[int, ...], attention_levels: Collection[int]
) -> dict[str, Any]:
    """The fields of a UNetConfig with a UNet2DConditionModel's attention."""
    levels = len(widths)
    at = {*attention_levels, levels - 1}  # the middle attends too
    # Whatever its name says, attention_head_dim is the number of heads, not their width.
    heads = _per_level(given, "attention_head_dim", levels)
    if bad := [i for i in sorted(at) if widths[i] % heads[i]]:
        _refuse(given, "attention_head_dim", f"it must divide {widths[bad[0]]} channels")
    counts, sizes = {heads[i] for i in at}, {widths[i] // heads[i] for i in at}
    if len(counts) > 1 and len(sizes) > 1:
        _refuse(given, "attention_head_dim", "the heads must be as many, or as wide, at all levels")
    return {
        "attention": "transformer",
        "middle_attention": True,
        "heads": min(counts) if len(counts) == 1 else None,
        "head_channels": min(sizes) if len(counts) > 1 else None,
        "context_channels": _one(given, "cross_attention_dim", at, levels),
        "transformer_depth": _depth(_per_level(given, "transformer_layers_per_block", levels), at),
        "linear_projections": given["use_linear_projection"],
    }


def _depth(depths: tuple[int, ...], at: Collection[int]) -> int | tuple[int, ...]:
    """One number where the levels `at`, which alone have transformers, have the same."""
    used = {depths[i] for i in at}
    return used.pop() if len(used) == 1 else depths


def _vector(given: Mapping[str, Any]) -> dict[str, int]:
    """The fields of a UNetConfig with a UNet2DConditionModel's added embedding."""
    if given["addition_embed_type"] is None:
        return {}
    if given["addition_embed_type"] != "text_time":
        _refuse(given, "addition_embed_type", "it must be None or 'text_time'")
    found = {
        "vector_channels": given["projection_class_embeddings_input_dim"],
        "vector_waves": given["addition_time_embed_dim"],
    }
    if None in found.values():
        _refuse(
            given,
            "addition_embed_type",
            "it needs addition_time_embed_dim and projection_class_embeddings_input_dim",
        )
    return found


def _head_channels(config: UNetConfig) -> int | None:
    """UNet2DModel's attention_head_dim: channels a head, or None for one head."""
    at = {*config.attention_levels, *([config.levels - 1] if config.middle_attention else [])}
    heads = {width: head_count(width, config) for width in (config.encoder_channels[i] for i in at)}
    sizes = {width // n for width, n in heads.items()}
    if set(heads.values()) <= {1}:
        return None
    if len(sizes) > 1:
        raise InputError(
            f"diffusers' UNet2DModel cannot express heads={config.heads}: its heads are as wide "
            "at all levels, set head_channels"
        )
    return min(sizes)


def _check_same(config: UNetConfig, values: Mapping[str, Any]) -> None:
    """Whatever diffusers cannot express does not survive the way there and back."""
    back, _ = config_from_diffusers(values)
    # What changes no output, or is checked with the widths and heads themselves.
    unseen = {"init", "zero_init", "conv_bias", "decoder_mid", "heads", "head_channels"}
    if not config.dropout:
        unseen.add("dropout_at")
    if not (config.attention_levels or config.middle_attention):
        unseen.add("attention")
    if back.attention == "self":
        unseen |= {"transformer_depth", "linear_projections"}
    if not config.vector_channels:
        unseen.add("vector_waves")
    if config.decoder_channels == config.encoder_channels:
        unseen.add("decoder_multipliers")
    at = {*config.attention_levels, config.levels - 1}
    config = replace(
        config,
        attention_levels=tuple(sorted(set(config.attention_levels))),
        transformer_depth=_depth(config.transformer_depths, at),
    )
    for name, value in config.to_dict().items():
        if name not in unseen and value != back.to_dict()[name]:
            raise InputError(f"diffusers' {values['_class_name']} cannot express {name}={value!r}")
