"""The parts of a U-Net: blocks, resampling, embeddings. Maps are (B, C, H, W) throughout."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet.config import UNetConfig
from unet.errors import InputError

_WIDE = "AVX512" in torch.backends.cpu.get_cpu_capability() and torch.backends.mkldnn.is_available()
_MANY_ROWS, _MUCH_WORK = 512, 2**24  # rows, multiplications: from where a convolution is faster


class Conditioning(NamedTuple):
    """The inputs of a step beside the map; each entry is None if the config lacks it."""

    emb: Tensor | None = None  # (B, E) embedding of time, class and vector, already activated
    context: Tensor | None = None  # (B, L, D) tokens for cross-attention
    mask: Tensor | None = None  # (B, L) bool, True where a token counts
    size: tuple[int, int] | None = None  # decoder only: (H, W) of the map joined next, or the end's


def make_activation(config: UNetConfig) -> nn.Module:
    """The config's activation. Not in place: its input may be a kept map."""
    kinds = {"relu": nn.ReLU, "leaky-relu": nn.LeakyReLU, "silu": nn.SiLU, "gelu": nn.GELU}
    return kinds[config.activation]()


class GroupNorm(nn.GroupNorm):
    """Group normalisation that also takes a group of a single value, which becomes the bias.

    `nn.GroupNorm` refuses that, as if the value's variance were missing: it is 0. Under autocast
    the sums are in float32, as autocast has it on CUDA; on a CPU that is faster, too.
    """

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if self.weight.dtype == torch.float32 else x
        y = torch.group_norm(wide, self.num_groups, self.weight, self.bias, self.eps)
        return y.to(x.dtype)


class Linear(nn.Linear):
    """A linear layer, which takes many float32 rows as a 1x1 convolution: the same sums, sooner.

    PyTorch multiplies float32 matrices by MKL, which uses half of the AVX-512 of AMD's processors,
    and convolves by oneDNN, which uses all of it.
    """

    def forward(self, x: Tensor) -> Tensor:
        tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]  # stubs lack it
        if torch.compiler.is_compiling() or tracing:  # which would tie a graph to the rows' number
            return super().forward(x)
        rows = x.numel() // self.in_features
        pays = _WIDE and rows >= _MANY_ROWS and rows * self.weight.numel() >= _MUCH_WORK
        if not pays or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        if x.dtype != torch.float32 or self.weight.dtype != torch.float32:
            return super().forward(x)
        images = 16 if rows % 16 == 0 else 1  # one thread goes to oneDNN with 16 images or more
        maps = x.reshape(images, -1, 1, self.in_features).permute(0, 3, 1, 2)
        y = F.conv2d(maps, self.weight[:, :, None, None], self.bias)
        return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], self.out_features)


def make_norm(channels: int, config: UNetConfig) -> nn.Module:
    """The config's normalisation over `channels` maps."""
    if config.norm == "batch":
        return nn.BatchNorm2d(channels, eps=config.norm_eps)
    if config.norm == "group":
        if channels % config.groups:  # the config checks all widths but those of "half-in"
            raise InputError(
                f"groups={config.groups} does not divide the {channels} channels inside a block: "
                f"choose other groups, or decoder_mid='out' instead of {config.decoder_mid!r}"
            )
        return GroupNorm(config.groups, channels, eps=config.norm_eps)
    if config.norm == "instance":  # nn.InstanceNorm2d refuses 1 x 1 maps and copies channels_last
        return GroupNorm(channels, channels, eps=config.norm_eps)
    return nn.Identity()


def zero_init(module: nn.Module) -> None:
    """Zeros all of a module's parameters, so that its residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


class ConvBlock(nn.Module):
    """Two 3x3 convolutions, each with normalisation and activation (Ronneberger 2015, sec. 2)."""

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        config: UNetConfig,
        dropout: float,
    ) -> None:
        super().__init__()
        pad = 1 if config.padding == "same" else 0
        bias = config.conv_bias or config.norm == "none"
        self.conv1 = nn.Conv2d(in_channels, mid_channels, 3, padding=pad, bias=bias)
        self.norm1 = make_norm(mid_channels, config)
        self.conv2 = nn.Conv2d(mid_channels, out_channels, 3, padding=pad, bias=bias)
        self.norm2 = make_norm(out_channels, config)
        self.act = make_activation(config)
        if isinstance(self.act, (nn.ReLU, nn.LeakyReLU)):
            self.act.inplace = True  # no backward pass needs what it overwrites
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        x = self.act(self.norm1(self.conv1(x)))
        x = self.act(self.norm2(self.conv2(x)))
        return self.dropout(x)


class ResBlock(nn.Module):
    """Pre-activation residual block with an optional embedding (DDPM, appendix B).

    The embedding is added after the first convolution, or, with `scale_shift`, scales and shifts
    the second normalisation (Improved DDPM, arXiv 2102.09672, sec. 3; FiLM).
    """

    def __init__(
        self, in_channels: int, out_channels: int, config: UNetConfig, dropout: float
    ) -> None:
        super().__init__()
        self.norm1 = make_norm(in_channels, config)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.scale_shift = config.scale_shift
        width = out_channels * (2 if config.scale_shift else 1)
        self.emb = Linear(config.embedding_channels, width) if config.embedding_channels else None
        self.norm2 = make_norm(out_channels, config)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.act = make_activation(config)
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        if config.zero_init:
            zero_init(self.conv2)

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        h = self.conv1(self.act(self.norm1(x)))
        if self.emb is None:
            h = self.norm2(h)
        elif self.scale_shift:
            scale, shift = self.emb(cond.emb)[:, :, None, None].chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + self.emb(cond.emb)[:, :, None, None])
        return self.skip(x) + self.conv2(self.dropout(self.act(h)))


class Stem(nn.Module):
    """A 3x3 convolution from pixels to features; with patch > 1 on the unshuffled image.

    The image is padded at its right and bottom to whole patches; `unpatch` crops that again.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.patch = config.patch
        channels = config.in_channels * config.patch**2
        self.conv = nn.Conv2d(channels, config.encoder_channels[0], 3, padding=1)

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        if self.patch > 1:
            down, right = -x.shape[-2] % self.patch, -x.shape[-1] % self.patch
            x = F.pad(x, (0, right, 0, down), mode="replicate")
            if 0 in x.shape:  # which pixel_unshuffle leaves as it is
                height, width = (n // self.patch for n in x.shape[-2:])
                x = x.reshape(0, self.conv.in_channels, height, width)
            else:
                x = F.pixel_unshuffle(x, self.patch)  # (B, C p p, H / p, W / p)
        return self.conv(x)


def unpatch(x: Tensor, patch: int, size: tuple[int, ...]) -> Tensor:
    """A head's (B, C p p, H / p, W / p) as the (B, C, H, W) of the given size: Stem's inverse."""
    if patch == 1:
        return x
    if 0 in x.shape:  # which pixel_shuffle leaves as it is
        return x.reshape(0, x.shape[1] // patch**2, *size)
    return F.pixel_shuffle(x, patch)[..., : size[0], : size[1]]


class Downsample(nn.Module):
    """Halves height and width, but keeps an axis of one pixel.

    Of an odd size, pooling drops the last line and "conv" keeps it.
    """

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.asymmetric = config.down == "conv-asymmetric"
        self.conv: nn.Module | None = None
        if config.down in ("conv", "conv-asymmetric"):
            pad = 0 if self.asymmetric else 1
            self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=pad)
        self.max = config.down == "max"

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        h, w = x.shape[-2:]
        if self.conv is None:
            pool = F.max_pool2d if self.max else F.avg_pool2d
            return pool(x, [min(2, h), min(2, w)])
        if self.asymmetric:
            x = F.pad(x, (0, 2 if w == 1 else 1, 0, 2 if h == 1 else 1))
        return self.conv(x)


class Upsample(nn.Module):
    """Doubles height and width, then cuts to `cond.size` where that is smaller (odd sizes)."""

    def __init__(self, in_channels: int, out_channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.up: nn.Module | None = None
        self.conv: nn.Module | None = None
        if config.up == "transposed":
            self.up = nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
        elif config.up == "nearest-conv":
            self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.mode = "nearest" if config.up.startswith("nearest") else "bilinear"
        self.align = None if self.mode == "nearest" else config.up == "bilinear-aligned"

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        if self.up is not None:
            x = self.up(x)
        else:
            x = F.interpolate(x, scale_factor=2.0, mode=self.mode, align_corners=self.align)
        if cond.size is not None:
            x = x[..., : cond.size[0], : cond.size[1]]
        return x if self.conv is None else self.conv(x)


class Score(nn.Module):
    """A 1x1 convolution (FCN, arXiv 1411.4038, sec. 4.2)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        return self.conv(x)


class Enlarge(nn.Module):
    """Bilinear interpolation to `cond.size` (FCN, arXiv 1411.4038, sec. 3.3)."""

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        return F.interpolate(x, size=cond.size, mode="bilinear", align_corners=False)


def join_padded(x: Tensor, skip: Tensor) -> Tensor:
    """The kept map before x, (B, Cs + C, H, W); x is padded by the line that pooling dropped."""
    return torch.cat([skip, _pad_to(x, skip)], dim=1)


def join_behind(x: Tensor, skip: Tensor) -> Tensor:
    """The kept map behind x, (B, C + Cs, H, W), as in DDPM: `join_padded` in the other order.

    The order matters: a group of the group normalisation that follows may lie across the border.
    """
    return torch.cat([_pad_to(x, skip), skip], dim=1)


def _pad_to(x: Tensor, skip: Tensor) -> Tensor:
    down, right = (s - n for s, n in zip(skip.shape[-2:], x.shape[-2:], strict=True))
    if down or right:
        x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
    return x


def join_cropped(x: Tensor, skip: Tensor) -> Tensor:
    """The centre of the kept map beside x, (B, Cs + C, h, w) (arXiv 1505.04597, fig. 1)."""
    h, w = x.shape[-2:]
    top, left = (skip.shape[-2] - h) // 2, (skip.shape[-1] - w) // 2
    return torch.cat([skip[..., top : top + h, left : left + w], x], dim=1)


class VectorEmbedding(nn.Module):
    """A two-layer MLP of a vector that the whole image depends on (SDXL, arXiv 2307.01952)."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.linear1 = Linear(config.vector_channels, config.embedding_channels)
        self.act = make_activation(config)
        self.linear2 = Linear(config.embedding_channels, config.embedding_channels)

    def forward(self, vector: Tensor) -> Tensor:
        return self.linear2(self.act(self.linear1(vector)))


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep, then a two-layer MLP (DDPM, appendix B)."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.channels = config.channels
        self.cos_first = config.time_cos_first
        self.freq_shift = config.time_freq_shift
        self.linear1 = Linear(config.channels, config.embedding_channels)
        self.act = make_activation(config)
        self.linear2 = Linear(config.embedding_channels, config.embedding_channels)

    def forward(self, t: Tensor) -> Tensor:
        waves = sinusoids(t, self.channels, cos_first=self.cos_first, freq_shift=self.freq_shift)
        return self.linear2(self.act(self.linear1(waves.to(self.linear1.weight.dtype))))


class JumpEmbedding(TimeEmbedding):
    """What is added to the embedding of a timestep for a jump below it: of no jump nothing.

    It starts at zero, so that a network that has learnt single timesteps is still the same.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        zero_init(self.linear2)

    def forward(self, jump: Tensor) -> Tensor:
        return super().forward(jump) - super().forward(torch.zeros_like(jump[:1]))


def sinusoids(t: Tensor, channels: int, *, cos_first: bool, freq_shift: int) -> Tensor:
    """Sines and cosines of t (B,) at geometric frequencies 1 to 1/10000: (B, channels), float32."""
    half = channels // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * steps)  # (B, half)
    waves = [angles.cos(), angles.sin()] if cos_first else [angles.sin(), angles.cos()]
    return F.pad(torch.cat(waves, dim=1), (0, channels % 2))
