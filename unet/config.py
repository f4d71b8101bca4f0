"""`UNetConfig`: everything that decides a network's shape, checked once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from unet.errors import InputError

Block = Literal["conv", "res"]
Skips = Literal["level", "block"]
Decoder = Literal["unet", "fcn-32s", "fcn-8s"]
Padding = Literal["same", "valid"]
Norm = Literal["batch", "group", "instance", "none"]
Activation = Literal["relu", "leaky-relu", "silu", "gelu"]
Down = Literal["max", "avg", "conv", "conv-asymmetric"]
Up = Literal["transposed", "bilinear", "bilinear-aligned", "nearest", "nearest-conv"]
AttentionKind = Literal["self", "transformer"]

# Beyond any network that fits a machine: a mistyped or damaged config is an error, not a long wait.
MOST_CHANNELS = 2**20
MOST_BLOCKS = 512


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The shape of a `UNet`. Level 0 is the finest; the last multiplier is the coarsest level.

    Raises:
        InputError: a combination that cannot be built; the message gives the values and the remedy.
    """

    in_channels: int = 1  # channels of the input image
    channels: int = 32  # feature channels of level 0; everything else is a multiple of them
    multipliers: tuple[int, ...] = (1, 2, 4, 8)  # level i has channels * multipliers[i]
    decoder_multipliers: tuple[int, ...] | None = None  # of the decoder; None: as the encoder
    decoder_mid: Literal["out", "half-in"] = "out"  # width between a decoder block's two convs
    blocks: int = 1  # blocks per level
    block: Block = "conv"  # two convs (2015), or pre-activation residual blocks (DDPM)
    skips: Skips = "level"  # maps kept: one per level (2015), or of each block, stem, downsampling
    decoder: Decoder = "unet"  # or scores of the coarsest map, "fcn-8s": and of the next two
    patch: int = 1  # > 1: a pixel-unshuffle stem, the network works at 1/patch of the size
    padding: Padding = "same"  # "valid" loses two pixels a conv and crops the skips (2015)

    norm: Norm = "batch"
    groups: int = 32  # of group normalisation
    norm_eps: float = 1e-5
    conv_bias: bool = False  # a bias in the convs of a ConvBlock (a norm that follows undoes it)
    activation: Activation = "relu"
    init: Literal["torch", "he"] = "torch"  # "he": normal, std sqrt(2 / fan_in), zero biases
    zero_init: bool = False  # the last layer of every residual branch starts at zero (DDPM)
    down: Down = "max"  # "conv-asymmetric" pads right and bottom only, as TensorFlow's DDPM does
    up: Up = "transposed"  # "bilinear-aligned" has align_corners=True, "nearest-conv" a 3x3 conv
    dropout: float = 0.0
    dropout_at: Literal["blocks", "bottom"] = "blocks"  # or only where the contracting path ends

    time: bool = False  # a timestep goes into every residual block
    time_cos_first: bool = False  # order of the sinusoids: DDPM has sin first, SD cos first
    time_freq_shift: int = 1  # frequencies exp(-ln 10000 i / (half - shift)): DDPM 1, SD 0
    jumps: bool = False  # a second input says how far below t its result leads (MeanFlow)
    scale_shift: bool = False  # the embedding scales and shifts the second norm (FiLM), or is added
    classes: int = 0  # > 0: a class embedding of that many rows, added to the time embedding
    vector_channels: int = 0  # > 0: a vector of that width is embedded and added, too (SDXL)
    vector_waves: int = 256  # SDXL: it ends with sizes, each as sinusoids of that many channels

    attention: AttentionKind = "self"  # single self-attention, or a SpatialTransformer
    attention_levels: tuple[int, ...] = ()  # levels whose blocks are each followed by attention
    middle_attention: bool = False  # attention between the middle blocks
    heads: int | None = None  # attention heads, whatever the width ...
    head_channels: int | None = None  # ... or channels per head; neither: one head
    context_channels: int | None = None  # width of cross-attention tokens; None: no cross-attention
    # Transformer blocks in a SpatialTransformer, or at each level (the middle: as the coarsest).
    transformer_depth: int | tuple[int, ...] = 1
    linear_projections: bool = False  # around the transformer: linear (SD v2) or 1x1 conv (SD v1)

    def __post_init__(self) -> None:
        self._check_values()
        self._check_combinations()

    @property
    def levels(self) -> int:
        return len(self.multipliers)

    @property
    def encoder_channels(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.channels * m for m in self.multipliers)

    @property
    def decoder_channels(self) -> tuple[int, ...]:
        """Output channels of the decoder at each level, finest first."""
        return tuple(self.channels * m for m in self.decoder_multipliers or self.multipliers)

    @property
    def stride(self) -> int:
        """Pixels along a side of the input for one pixel of the coarsest level."""
        return self.patch * 2 ** (self.levels - 1)

    @property
    def out_channels(self) -> int:
        """Channels of the features that the `UNet` returns."""
        return (self.decoder_channels or self.encoder_channels)[0]

    @property
    def embedding_channels(self) -> int:
        """Width of the embedding of time, class and vector; 0 without one."""
        return 4 * self.channels if self.time or self.classes or self.vector_channels else 0

    @property
    def transformer_depths(self) -> tuple[int, ...]:
        """Transformer blocks in a SpatialTransformer of each level, finest first."""
        depth = self.transformer_depth
        return depth if isinstance(depth, tuple) else (depth,) * self.levels

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of JSON values; `from_dict` is its inverse."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UNetConfig:
        """The config of a `to_dict`; an unknown name is an error."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise InputError(
                f"UNetConfig has no field {', '.join(map(repr, unknown))}; "
                f"its fields are {', '.join(sorted(known))}"
            )
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**fields)

    def _check_values(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not _has_type(value, kind):
                choices = f": choose from {get_args(kind)}" if get_origin(kind) is Literal else ""
                raise InputError(f"{name}={value!r} is not a valid value{choices or f' ({kind})'}")
        for name in ("in_channels", "channels", "blocks", "patch", "groups", "vector_waves"):
            if not 1 <= getattr(self, name) <= MOST_CHANNELS:
                raise InputError(f"{name}={getattr(self, name)} must be from 1 to {MOST_CHANNELS}")
        for name in ("heads", "head_channels", "context_channels"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MOST_CHANNELS:
                raise InputError(f"{name}={value} must be from 1 to {MOST_CHANNELS}, or None")
        for name in ("classes", "vector_channels"):
            if not 0 <= getattr(self, name) <= MOST_CHANNELS:
                raise InputError(
                    f"{name}={getattr(self, name)} must be from 0 (none) to {MOST_CHANNELS}"
                )
        if not self.multipliers or min(self.multipliers) < 1:
            raise InputError(
                f"multipliers={self.multipliers} must be one or more numbers from 1 up"
            )
        depths = self.transformer_depths
        if len(depths) != self.levels or not 1 <= min(depths) <= max(depths) <= MOST_BLOCKS:
            raise InputError(
                f"transformer_depth={self.transformer_depth} must be from 1 to {MOST_BLOCKS}, or "
                f"such a number for each of the {self.levels} levels"
            )
        self._check_size()
        if self.time_freq_shift not in (0, 1):
            raise InputError(f"time_freq_shift={self.time_freq_shift} must be 0 or 1")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout={self.dropout} must be in [0, 1)")
        if not 0 < self.norm_eps <= 1:
            raise InputError(f"norm_eps={self.norm_eps} must be above 0 and at most 1")

    def _check_size(self) -> None:
        stem = self.in_channels * self.patch**2
        widest = max(stem, *self.encoder_channels, *self.decoder_channels)
        if widest > MOST_CHANNELS:
            raise InputError(
                f"channels={self.channels}, multipliers={self.multipliers}, in_channels="
                f"{self.in_channels} and patch={self.patch} make {widest} channels, more than "
                f"{MOST_CHANNELS}: choose smaller numbers"
            )
        blocks = self.blocks * sum(self.transformer_depths)
        if blocks > MOST_BLOCKS:
            raise InputError(
                f"{self.levels} levels, blocks={self.blocks} and transformer_depth="
                f"{self.transformer_depth} make {blocks} blocks, more than {MOST_BLOCKS}: choose "
                "smaller numbers"
            )

    def _check_combinations(self) -> None:
        decoder = self.decoder_multipliers
        needed = self.levels - 1 if self.skips == "level" else self.levels
        if decoder is not None and (len(decoder) != needed or min(decoder, default=1) < 1):
            raise InputError(
                f"decoder_multipliers={decoder} must give {needed} numbers from 1 up, one for each "
                f"decoder level of multipliers={self.multipliers}"
            )
        if self.embedding_channels and self.block != "res":
            raise InputError(
                "the embeddings of time, class and vector go into residual blocks: use block='res' "
                f"with time={self.time}, classes={self.classes}, "
                f"vector_channels={self.vector_channels}"
            )
        if self.scale_shift and not self.embedding_channels:
            raise InputError("scale_shift=True needs an embedding: set time=True or classes")
        if self.jumps and not self.time:
            raise InputError("jumps=True is from a timestep to another one: set time=True")
        if self.time and self.channels // 2 <= self.time_freq_shift:
            raise InputError(
                f"channels={self.channels} leaves no sinusoids for a time embedding with "
                f"time_freq_shift={self.time_freq_shift}: use at least 4 channels"
            )
        if self.padding == "valid" and (self.block, self.skips, self.patch) != ("conv", "level", 1):
            raise InputError(
                "padding='valid' needs block='conv', skips='level' and patch=1, not "
                f"block={self.block!r}, skips={self.skips!r}, patch={self.patch}"
            )
        if self.decoder != "unet" and (
            (self.block, self.skips, self.padding) != ("conv", "level", "same")
            or decoder is not None
            or self.levels < 2
        ):
            raise InputError(
                f"decoder={self.decoder!r} needs block='conv', skips='level', padding='same', two "
                f"levels or more and no decoder_multipliers, not block={self.block!r}, "
                f"skips={self.skips!r}, padding={self.padding!r}, multipliers={self.multipliers}, "
                f"decoder_multipliers={decoder}"
            )
        if self.context_channels is not None and self.attention != "transformer":
            raise InputError(
                f"context_channels={self.context_channels} needs attention='transformer': "
                "plain self-attention reads no context"
            )
        widths = set(self.encoder_channels) | set(self.decoder_channels[:needed])
        if self.norm == "group" and (bad := sorted(w for w in widths if w % self.groups)):
            raise InputError(
                f"groups={self.groups} does not divide {bad[0]} channels: choose groups that "
                f"divide channels={self.channels}, such as {_divisor(self.channels, self.groups)}"
            )
        self._check_attention()

    def _check_attention(self) -> None:
        if bad := [i for i in self.attention_levels if not 0 <= i < self.levels]:
            raise InputError(
                f"attention_levels={self.attention_levels} names level {bad[0]}, but "
                f"multipliers={self.multipliers} has levels 0 to {self.levels - 1}"
            )
        if self.heads is not None and self.head_channels is not None:
            raise InputError(
                f"heads={self.heads} and head_channels={self.head_channels} exclude each other: "
                "set one, leave the other None"
            )
        if not (self.attention_levels or self.middle_attention):
            if self.context_channels is not None:
                raise InputError(
                    f"context_channels={self.context_channels} has nowhere to go: set "
                    "attention_levels or middle_attention"
                )
            return
        name = "heads" if self.heads is not None else "head_channels"
        sizes = {name: getattr(self, name) or 1}
        if self.attention == "transformer":  # whose normalisation is always by groups
            sizes["groups"] = self.groups
        at = {*self.attention_levels, *([self.levels - 1] if self.middle_attention else [])}
        encoder, decoder = self.encoder_channels, self.decoder_channels
        for i in sorted(at):
            for width in {encoder[i], *decoder[i : i + 1]}:
                for name, size in sizes.items():
                    if width % size:
                        raise InputError(
                            f"{name}={size} does not divide the {width} channels of level {i}, "
                            f"which has attention: choose a divisor such as {_divisor(width, size)}"
                        )


def _divisor(n: int, limit: int) -> int:
    """The largest divisor of n that is at most limit."""
    return next(d for d in range(min(n, limit), 0, -1) if n % d == 0)


def _has_type(value: Any, kind: Any) -> bool:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin is tuple:
        return isinstance(value, tuple) and all(_has_type(v, args[0]) for v in value)
    if args:  # X | None
        return any(_has_type(value, a) for a in args)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)
