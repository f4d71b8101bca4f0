"""Attention over the pixels of a map: plain self-attention, and Stable Diffusion's transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet.config import UNetConfig
from unet.layers import Conditioning, GroupNorm, Linear, make_norm, zero_init

_FEW_KEYS = 256
_VECTOR = 16  # float32 numbers that a wide processor multiplies at once


def head_count(channels: int, config: UNetConfig) -> int:
    """Attention heads at a width of `channels`, from `heads` or `head_channels`."""
    if config.head_channels is not None:
        return channels // config.head_channels
    return config.heads or 1


class Attention(nn.Module):
    """Multi-head attention, softmax(Q K^T / sqrt(d)) V (arXiv 1706.03762, eq. 1).

    Goes through `scaled_dot_product_attention`, whose memory grows linearly with the tokens. On a
    CPU its kernel is helped: heads narrower than a vector are padded to one, and in bfloat16, where
    it is slow for a few tokens, these are multiplied by hand.
    """

    def __init__(
        self, channels: int, heads: int, context_channels: int | None = None, *, bias: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        self.q = Linear(channels, channels, bias=bias)
        self.k = Linear(context_channels or channels, channels, bias=bias)
        self.v = Linear(context_channels or channels, channels, bias=bias)
        self.out = Linear(channels, channels)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """x (B, N, C) attends to context (B, L, D), or to itself; mask (B, L), True = attend."""
        source = x if context is None else context
        q, k, v = map(self._split, (self.q(x), self.k(source), self.v(source)))
        mask = None if mask is None else mask[:, None, None, :]  # (B, 1, 1, L)
        on_cpu = q.device.type == "cpu"
        if on_cpu and q.dtype == torch.bfloat16 and k.shape[2] <= _FEW_KEYS:
            y = attend_by_hand(q, k, v, mask)
        elif on_cpu and q.shape[3] < _VECTOR:
            y = attend_padded(q, k, v, mask)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.out(y.transpose(1, 2).flatten(2))

    def probabilities(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """The softmax alone, for pictures: how x attends to each token, (B, heads, N, L)."""
        q, k = map(self._split, (self.q(x), self.k(context)))
        mask = None if mask is None else mask[:, None, None, :]
        return _scores(q, k, mask).softmax(dim=-1, dtype=torch.float32)

    def _split(self, y: Tensor) -> Tensor:
        return y.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, d)


def attend_by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`scaled_dot_product_attention` written out: queries (B, heads, N, d), keys and values L."""
    return _scores(q, k, mask).softmax(dim=-1) @ v


def attend_padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`scaled_dot_product_attention` of heads with zeros behind, which change no sum."""
    d = q.shape[-1]
    q, k, v = (F.pad(z, (0, _VECTOR - d)) for z in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=d**-0.5)[..., :d]


def _scores(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, heads, N, L)
    return scores if mask is None else scores.masked_fill(~mask, torch.finfo(scores.dtype).min)


# Not with einops: torch.compile traces its parsing of a pattern, which takes longer than all else.
def _as_tokens(x: Tensor) -> Tensor:
    """The pixels of a map (B, C, H, W) as tokens (B, H W, C)."""
    return x.flatten(2).transpose(1, 2)


def _as_map(tokens: Tensor, like: Tensor) -> Tensor:
    """Tokens (B, H W, C) as a map (B, C, H, W) of the height and width of another one."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[-2:])


class SelfAttention(nn.Module):
    """Normalised self-attention over all pixels, with a residual (DDPM, appendix B)."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm = make_norm(channels, config)
        self.attention = Attention(channels, head_count(channels, config), bias=True)
        if config.zero_init:
            zero_init(self.attention.out)

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        return x + _as_map(self.attention(_as_tokens(self.norm(x))), x)


class FeedForward(nn.Module):
    """Position-wise MLP with a gated GELU (GEGLU, arXiv 2002.05202), four times as wide inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = Linear(channels, 8 * channels)
        self.out = Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return self.out(x * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention where the config has a context, feed-forward; pre-norm."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        heads = head_count(channels, config)
        self.norm1 = nn.LayerNorm(channels)
        self.self_attention = Attention(channels, heads)
        self.cross_attention: nn.Module | None = None
        if config.context_channels is not None:
            self.norm2 = nn.LayerNorm(channels)
            self.cross_attention = Attention(channels, heads, config.context_channels)
        self.norm3 = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels)

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        x = x + self.self_attention(self.norm1(x))
        if self.cross_attention is not None:
            x = x + self.cross_attention(self.norm2(x), cond.context, cond.mask)
        return x + self.feed_forward(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a map, with a residual (LDM, arXiv 2112.10752, app. E).

    The projections around the blocks are 1x1 convolutions (SD v1) or linear layers (SD v2): the
    same function, weights of another shape.
    """

    def __init__(self, channels: int, config: UNetConfig, depth: int) -> None:
        super().__init__()
        # Always group normalisation with this epsilon, whatever the residual blocks have: as LDM.
        self.norm = GroupNorm(config.groups, channels, eps=1e-6)
        self.linear = config.linear_projections
        self.proj_in = _projection(channels, linear=self.linear)
        self.blocks = nn.ModuleList(TransformerBlock(channels, config) for _ in range(depth))
        self.proj_out = _projection(channels, linear=self.linear)
        if config.zero_init:
            zero_init(self.proj_out)

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        h = self.norm(x)
        tokens = _as_tokens(h if self.linear else self.proj_in(h))
        if self.linear:
            tokens = self.proj_in(tokens)
        for block in self.blocks:
            tokens = block(tokens, cond)
        if self.linear:
            tokens = self.proj_out(tokens)
        h = _as_map(tokens, x)
        return x + (h if self.linear else self.proj_out(h))


def _projection(channels: int, *, linear: bool) -> nn.Module:
    return Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
