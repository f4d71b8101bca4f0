"""`UNet`: the assembly of the parts, and its forward pass."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unet.attention import SelfAttention, SpatialTransformer
from unet.config import UNetConfig
from unet.errors import InputError
from unet.geometry import output_size
from unet.layers import (
    Conditioning,
    ConvBlock,
    Downsample,
    Enlarge,
    JumpEmbedding,
    ResBlock,
    Score,
    Stem,
    TimeEmbedding,
    Upsample,
    VectorEmbedding,
    join_behind,
    join_cropped,
    join_padded,
    make_activation,
)


class Step(nn.ModuleDict):
    """A few named parts in a row, each called with (x, cond), and their role in the skips."""

    def __init__(
        self, parts: dict[str, nn.Module], *, keeps: bool = False, joins: bool = False
    ) -> None:
        super().__init__(parts)
        self.keeps = keeps  # encoder: the output is kept; decoder: it is its level's last map
        self.joins = joins  # decoder: the last kept map is joined first

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        for part in self.values():
            x = part(x, cond)
        return x


class UNet(nn.Module):
    """A U-Net trunk: it maps an image, with timestep and context where it has them, to features.

    The 2015 network (arXiv 1505.04597), DDPM's (arXiv 2006.11239) and Stable Diffusion's
    (arXiv 2112.10752) are the same forward pass over different lists of steps. The heads are
    `segmentation.model.SegmentationUNet` and `diffusion.model.DiffusionUNet`.

    Args:
        config: the network's shape.

    Attributes:
        checkpointing: recompute the steps' activations in the backward pass instead of keeping
            them (arXiv 1604.06174): the same gradients in less memory, for about a third more time.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        same = join_behind if config.skips == "block" else join_padded
        self.join = join_cropped if config.padding == "valid" else same
        width = config.embedding_channels
        self.time_embedding = TimeEmbedding(config) if config.time else None
        self.jump_embedding = JumpEmbedding(config) if config.jumps else None
        self.class_embedding = nn.Embedding(config.classes, width) if config.classes else None
        self.vector_embedding = VectorEmbedding(config) if config.vector_channels else None
        self.act = make_activation(config)
        encoder, self.middle, decoder = _plan(config)
        self.encoder, self.decoder = nn.ModuleList(encoder), nn.ModuleList(decoder)
        if config.init == "he":
            he_init(self)

    def forward(
        self,
        x: Tensor,
        t: Tensor | None = None,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        classes: Tensor | None = None,
        vector: Tensor | None = None,
        jump: Tensor | None = None,
        maps: list[Tensor] | None = None,
    ) -> Tensor:
        """Features of an image, (B, config.out_channels, H / patch, W / patch) with same padding.

        Args:
            x: (B, in_channels, H, W), any height and width; with valid padding see `output_size`.
            t: (B,) timesteps, where the config has time.
            context: (B, L, context_channels) tokens, where the config has cross-attention.
            mask: (B, L) bool, True where a token of the context counts; None: all of them.
            classes: (B,) class indices, where the config has classes.
            vector: (B, vector_channels), where the config has that.
            jump: (B,) timesteps below t that the result leads to, where the config has jumps; None:
                it is for t itself.
            maps: a list that gets the middle's map and the last one of each decoder level, of which
                the last are the features.

        Raises:
            InputError: an argument that does not fit the config.
        """
        self._check(x, t, context, mask, classes, vector, jump)
        finest = [-(-n // self.config.patch) for n in x.shape[-2:]]
        cond = Conditioning(self._embed(t, classes, vector, jump), context, mask)
        kept: list[Tensor] = []
        for step in self.encoder:
            x = self._run(step, x, cond)
            if step.keeps:
                kept.append(x)
        x = self._run(self.middle, x, cond)
        if maps is not None:
            maps.append(x)
        for step in self.decoder:
            if step.joins:
                x = self.join(x, kept.pop())
            h, w = kept[-1].shape[-2:] if kept else finest
            x = self._run(step, x, cond._replace(size=(h, w)))
            if maps is not None and step.keeps:
                maps.append(x)
        return x

    def _embed(
        self,
        t: Tensor | None,
        classes: Tensor | None,
        vector: Tensor | None,
        jump: Tensor | None,
    ) -> Tensor | None:
        """The activated sum of the embeddings, (B, 4 * channels): once here, not in every block."""
        terms = []
        if self.time_embedding is not None:
            terms.append(self.time_embedding(t))
        if self.jump_embedding is not None and jump is not None:
            terms.append(self.jump_embedding(jump))
        if self.class_embedding is not None:
            try:
                terms.append(self.class_embedding(classes))
            except IndexError as error:  # not on a GPU, which reports it later
                raise InputError(
                    f"a class is beyond those of this network, 0 to {self.config.classes - 1}"
                ) from error
        if self.vector_embedding is not None:
            terms.append(self.vector_embedding(vector))
        return self.act(sum(terms)) if terms else None

    def _run(self, step: nn.Module, x: Tensor, cond: Conditioning) -> Tensor:
        if not (self.checkpointing and torch.is_grad_enabled()):
            return step(x, cond)
        if torch.compiler.is_compiling():  # a compiled step changes its statistics once anyway
            return checkpoint(step, x, cond, use_reentrant=False)
        contexts = lambda: (contextlib.nullcontext(), _spare_statistics(step))  # noqa: E731
        return checkpoint(step, x, cond, use_reentrant=False, context_fn=contexts)

    def _check(
        self,
        x: Tensor,
        t: Tensor | None,
        context: Tensor | None,
        mask: Tensor | None,
        classes: Tensor | None,
        vector: Tensor | None,
        jump: Tensor | None,
    ) -> None:
        config = self.config
        given = {"x": x, "t": t, "context": context, "mask": mask, "classes": classes}
        for name, value in (given | {"vector": vector, "jump": jump}).items():
            if value is not None and not isinstance(value, Tensor):
                raise InputError(
                    f"{name} is a {type(value).__name__}, but networks take tensors: convert it "
                    "with torch.as_tensor"
                )
        if not x.is_floating_point():
            raise InputError(
                f"the image holds {x.dtype}, but this network takes floating-point numbers: "
                "convert and scale it, such as image / 127.5 - 1 of 8 bits"
            )
        if x.ndim != 4 or x.shape[1] != config.in_channels or 0 in x.shape[2:]:
            raise InputError(
                f"the image has shape {tuple(x.shape)}, but this network takes (B, "
                f"{config.in_channels}, H, W) of at least one pixel: change the image, or build "
                "with another in_channels"
            )
        if config.padding == "valid":
            for n in x.shape[-2:]:
                output_size(config, n)
        cross = config.context_channels is not None
        for name, value, wanted, cure in (
            ("timestep t", t, config.time, "time=True"),
            ("context", context, cross, "context_channels and attention='transformer'"),
            ("class vector", classes, config.classes > 0, "classes=N"),
            ("vector", vector, config.vector_channels > 0, "vector_channels=N"),
        ):
            if wanted and value is None:
                raise InputError(f"this network needs a {name}: pass it to forward")
            if value is not None and not wanted:
                raise InputError(f"this network takes no {name}: drop it, or build with {cure}")
        if jump is not None and not config.jumps:
            raise InputError("this network takes no jump: drop it, or build with jumps=True")
        batch = x.shape[0]
        for name, value in (("t", t), ("classes", classes), ("jump", jump)):
            if value is not None and value.shape != (batch,):
                raise InputError(
                    f"{name} has shape {tuple(value.shape)}, but a batch of {batch} needs "
                    f"({batch},): one value per image"
                )
        if classes is not None and classes.dtype not in (torch.int64, torch.int32):
            raise InputError(f"classes hold {classes.dtype}, no indices: give classes.long()")
        if vector is not None and vector.shape != (batch, config.vector_channels):
            raise InputError(
                f"the vector has shape {tuple(vector.shape)}, but this network and a batch of "
                f"{batch} need ({batch}, {config.vector_channels})"
            )
        width = config.context_channels
        if context is not None and (
            context.ndim != 3 or context.shape[0] != batch or context.shape[2] != width
        ):
            raise InputError(
                f"the context has shape {tuple(context.shape)}, but this network and a batch of "
                f"{batch} need ({batch}, L, {width})"
            )
        if mask is not None:
            if context is None:
                raise InputError("a mask says which context tokens count: pass a context too")
            if mask.dtype != torch.bool or mask.shape != context.shape[:2]:
                raise InputError(
                    f"the mask has shape {tuple(mask.shape)} and type {mask.dtype}, but this "
                    f"context needs {tuple(context.shape[:2])} and torch.bool"
                )


def _plan(config: UNetConfig) -> tuple[list[Step], Step, list[Step]]:
    """The network as data: the encoder's steps, the middle, the decoder's steps."""
    by_block = config.skips == "block"
    widths, bottom = config.encoder_channels, config.levels - 1
    first_joined = bottom - _JOINED.get(config.decoder, bottom)
    encoder: list[Step] = []
    decoder: list[Step] = []
    channels = config.in_channels
    kept: list[int] = []  # channels of the maps kept so far

    def keep(step: Step) -> None:
        encoder.append(step)
        if step.keeps:
            kept.append(channels)

    if config.block == "res" or by_block or config.patch > 1:
        channels = widths[0]
        keep(Step({"stem": Stem(config)}, keeps=by_block))
    for level in range(config.levels if by_block else bottom):
        at_bottom = level >= (bottom if by_block else bottom - 1)
        for i in range(config.blocks):
            parts = _block(channels, widths[level], config, level, at_bottom=at_bottom)
            channels = widths[level]
            last = i == config.blocks - 1 and level >= first_joined
            keep(Step(parts, keeps=by_block or last))
        if level < bottom:
            keep(Step({"down": Downsample(channels, config)}, keeps=by_block))

    middle = _middle(channels, config)
    if config.decoder in _JOINED:
        return encoder, middle, _scores(config)
    channels = widths[-1]

    for level in reversed(range(config.levels if by_block else bottom)):
        width = config.decoder_channels[level]
        if level < bottom:
            reduced = width if config.up == "transposed" else channels
            decoder.append(Step({"up": Upsample(channels, reduced, config)}))
            channels = reduced
        for i in range(config.blocks + by_block):
            joins = by_block or i == 0
            channels += kept.pop() if joins else 0
            mid = channels // 2 if joins and config.decoder_mid == "half-in" else width
            last = i == config.blocks + by_block - 1
            parts = _block(channels, width, config, level, mid=mid)
            decoder.append(Step(parts, keeps=last, joins=joins))
            channels = width
    return encoder, middle, decoder


_JOINED = {"fcn-32s": 0, "fcn-8s": 2}  # levels above the coarsest whose maps are scored, too


def _scores(config: UNetConfig) -> list[Step]:
    """A fully convolutional network's decoder (Long et al. 2015, arXiv 1411.4038, fig. 3).

    1x1 scores of the coarsest map, enlarged and added to those of the next one, and so on; the rest
    of the way is interpolation. A 1x1 convolution of two joined maps is the sum of their scores.
    """
    width, bottom = config.out_channels, config.levels - 1
    steps = [Step({"score": Score(config.encoder_channels[bottom], width)})]
    for level in reversed(range(max(0, bottom - _JOINED[config.decoder]), bottom)):
        steps.append(Step({"up": Enlarge()}))
        score = Score(width + config.encoder_channels[level], width)
        steps.append(Step({"score": score}, joins=True))
    return [*steps, Step({"up": Enlarge()}, keeps=True)]


def _block(
    in_channels: int,
    out_channels: int,
    config: UNetConfig,
    level: int,
    *,
    mid: int | None = None,
    at_bottom: bool = False,
) -> dict[str, nn.Module]:
    """A block, and the attention behind it where its level has one."""
    dropout = config.dropout if config.dropout_at == "blocks" or at_bottom else 0.0
    parts: dict[str, nn.Module] = {}
    if config.block == "conv":
        mid = mid or out_channels
        parts["block"] = ConvBlock(in_channels, mid, out_channels, config, dropout)
    else:
        parts["block"] = ResBlock(in_channels, out_channels, config, dropout)
    if level in config.attention_levels:
        parts["attention"] = _attention(out_channels, config, level)
    return parts


def _attention(channels: int, config: UNetConfig, level: int) -> nn.Module:
    if config.attention == "self":
        return SelfAttention(channels, config)
    return SpatialTransformer(channels, config, config.transformer_depths[level])


def _middle(channels: int, config: UNetConfig) -> Step:
    """Skips by level: the coarsest level's blocks. Skips by block: block, attention, block."""
    by_block, bottom = config.skips == "block", config.levels - 1
    width = config.encoder_channels[-1]
    attends = config.middle_attention or (not by_block and bottom in config.attention_levels)
    parts: dict[str, nn.Module] = {}
    for i in range(2 if by_block else config.blocks):
        block = _block(channels, width, config, level=-1, at_bottom=True)
        parts[f"block{i + 1}"] = block["block"]
        if attends and (i == 0 or not by_block):
            parts[f"attention{i + 1}"] = _attention(width, config, bottom)
        channels = width
    return Step(parts)


def he_init(model: nn.Module) -> None:
    """Normal weights, std sqrt(2 / N) for N incoming nodes a neuron (arXiv 1505.04597, sec. 3).

    Layers that are all zero stay so.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            if not (module.weight.is_meta or module.weight.any()):
                continue  # stays as zero_init made it
            # Each output pixel of a 2x2, stride 2 transposed convolution sees one input pixel.
            taps = math.prod(module.kernel_size) if isinstance(module, nn.Conv2d) else 1
            nn.init.normal_(module.weight, std=math.sqrt(2 / (module.in_channels * taps)))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


@contextlib.contextmanager
def _spare_statistics(step: nn.Module) -> Iterator[None]:
    """Lets batch normalisation update copies of its statistics, so that a batch counts once."""
    buffers = [(m, k, v) for m in step.modules() for k, v in m.named_buffers(recurse=False)]
    for module, name, value in buffers:
        setattr(module, name, value.clone())
    try:
        yield
    finally:
        for module, name, value in buffers:
            setattr(module, name, value)
