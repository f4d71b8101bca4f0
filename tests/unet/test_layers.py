"""Each part against the formula it stands for, written out here."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from unet.attention import Attention, FeedForward, SelfAttention, SpatialTransformer
from unet.config import UNetConfig
from unet.layers import (
    Conditioning,
    ConvBlock,
    Downsample,
    GroupNorm,
    Linear,
    ResBlock,
    Stem,
    TimeEmbedding,
    Upsample,
    join_behind,
    join_cropped,
    join_padded,
    make_norm,
    sinusoids,
    unpatch,
)

NOTHING = Conditioning()
GROUPED = UNetConfig(channels=8, norm="group", groups=4, activation="silu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# --- normalisation ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 8, 5, 3), (1, 8, 1, 1), (3, 8, 1, 2)])
def test_group_norm_is_torchs(shape: tuple[int, ...]) -> None:
    ours, theirs = GroupNorm(4, 8), nn.GroupNorm(4, 8)
    nn.init.normal_(ours.weight), nn.init.normal_(ours.bias)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(shape)
    close(ours(x), theirs(x))


def test_a_group_of_one_value_becomes_the_bias() -> None:
    norm = GroupNorm(8, 8)
    nn.init.normal_(norm.bias)
    close(norm(torch.randn(1, 8, 1, 1)), norm.bias[None, :, None, None])


def test_instance_norm_is_torchs() -> None:
    x = torch.randn(2, 6, 5, 4)
    norm = make_norm(6, UNetConfig(norm="instance", norm_eps=1e-3))
    close(norm(x), nn.InstanceNorm2d(6, eps=1e-3)(x))


def test_no_norm_brings_biases_into_the_convolutions() -> None:
    assert ConvBlock(2, 4, 4, UNetConfig(norm="none"), 0.0).conv1.bias is not None
    assert ConvBlock(2, 4, 4, UNetConfig(), 0.0).conv1.bias is None
    assert ConvBlock(2, 4, 4, UNetConfig(conv_bias=True), 0.0).conv1.bias is not None


# --- blocks -------------------------------------------------------------------------------------


def normalised(x: Tensor, norm: nn.Module, groups: int, eps: float) -> Tensor:
    """Group normalisation with plain means."""
    b, c, h, w = x.shape
    y = x.reshape(b, groups, -1)
    y = (y - y.mean(2, keepdim=True)) / (y.var(2, keepdim=True, unbiased=False) + eps).sqrt()
    return y.reshape(b, c, h, w) * norm.weight[:, None, None] + norm.bias[:, None, None]


@pytest.mark.parametrize(
    "shape",
    [(1040, 128), (4, 300, 128), (2, 521, 128), (1, 128), (0, 128)],
    ids=["rows", "tokens", "odd", "one", "none"],
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("wide", [True, False])
def test_linear_is_torchs(shape: tuple[int, ...], bias: bool, wide: bool, monkeypatch: Any) -> None:
    """Values and gradients, where many rows go another way, and where the rows lie apart."""
    monkeypatch.setattr("unet.layers._WIDE", wide)
    torch.manual_seed(0)
    layer = Linear(128, 160, bias=bias)
    plain = nn.Linear(128, 160, bias=bias)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(*shape[:-1], 256)[..., ::2]
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    seed = torch.randn(*shape[:-1], 160)
    assert torch.allclose(layer(x), plain(x), atol=1e-5)
    (layer(mine) * seed).sum().backward()
    (plain(theirs) * seed).sum().backward()
    for a, b in zip([mine, *layer.parameters()], [theirs, *plain.parameters()], strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-4, rtol=1e-4)


def test_linear_in_bfloat16_is_torchs(monkeypatch: Any) -> None:
    monkeypatch.setattr("unet.layers._WIDE", True)
    layer, x = Linear(128, 160), torch.randn(1040, 128)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    wide, x = Linear(128, 160).double(), x.double()
    assert torch.equal(wide(x), F.linear(x, wide.weight, wide.bias))


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("out_channels", [8, 12])
def test_res_block_is_its_formula(scale_shift: bool, out_channels: int) -> None:
    config = replace(GROUPED, block="res", time=True, scale_shift=scale_shift)
    block = ResBlock(8, out_channels, config, dropout=0.0)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, emb = torch.randn(2, 8, 5, 6), torch.randn(2, 32)

    h = F.conv2d(
        F.silu(normalised(x, block.norm1, 4, 1e-5)), block.conv1.weight, block.conv1.bias, padding=1
    )
    e = (emb @ block.emb.weight.T + block.emb.bias)[:, :, None, None]
    if scale_shift:
        scale, shift = e[:, :out_channels], e[:, out_channels:]
        h = normalised(h, block.norm2, 4, 1e-5) * (1 + scale) + shift
    else:
        h = normalised(h + e, block.norm2, 4, 1e-5)
    h = F.conv2d(F.silu(h), block.conv2.weight, block.conv2.bias, padding=1)
    skip = x if out_channels == 8 else F.conv2d(x, block.skip.weight, block.skip.bias)
    close(block(x, Conditioning(emb=emb)), skip + h)


def test_conv_block_is_two_convolutions_with_relu() -> None:
    block = ConvBlock(2, 5, 3, UNetConfig(norm="none", padding="valid"), dropout=0.0)
    x = torch.randn(1, 2, 9, 7)
    h = F.conv2d(x, block.conv1.weight, block.conv1.bias).relu()
    h = F.conv2d(h, block.conv2.weight, block.conv2.bias).relu()
    assert h.shape == (1, 3, 5, 3)
    close(block(x, NOTHING), h)


def test_group_norm_sums_in_float32_under_autocast() -> None:
    norm, x = GroupNorm(2, 8), (100 + torch.randn(2, 8, 5, 7)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, norm(x.float()).bfloat16())


# --- attention ----------------------------------------------------------------------------------


def attended(module: Attention, x: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V, image by image and head by head."""
    width = module.q.out_features // module.heads
    images = []
    for i in range(len(x)):
        heads = []
        for h in range(module.heads):
            part = slice(h * width, (h + 1) * width)
            q, k, v = (
                y[i] @ m.weight[part].T + (0 if m.bias is None else m.bias[part])
                for y, m in ((x, module.q), (source, module.k), (source, module.v))
            )
            scores = q @ k.T / math.sqrt(width)
            if mask is not None:
                scores[:, ~mask[i]] = -math.inf
            heads.append(scores.softmax(1) @ v)
        images.append(torch.cat(heads, 1) @ module.out.weight.T + module.out.bias)
    return torch.stack(images)


@pytest.mark.parametrize(("channels", "heads"), [(8, 1), (8, 2), (8, 4), (32, 2), (60, 3)])
def test_attention_is_its_formula(channels: int, heads: int) -> None:
    x, context = torch.randn(2, 7, channels), torch.randn(2, 5, 6)
    own = Attention(channels, heads, bias=True)  # heads of 8 and less are padded, others not
    close(own(x), attended(own, x, x))
    cross = Attention(channels, heads, 6)
    close(cross(x, context), attended(cross, x, context))
    mask = torch.tensor([[True, False, True, True, False], [False, True, False, False, False]])
    close(cross(x, context, mask), attended(cross, x, context, mask))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("keys", [5, 257])  # multiplied by hand, and by the fused kernel
def test_attention_in_bfloat16_rounds_that_in_float32(keys: int, masked: bool) -> None:
    cross, x, context = Attention(8, 2, 6), torch.randn(2, 7, 8), torch.randn(2, keys, 6)
    mask = torch.arange(keys) < torch.tensor([[keys], [2]]) if masked else None
    exact = cross(x, context, mask)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = cross(x, context, mask)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("masked", [False, True])
def test_probabilities_are_what_attention_weighs_its_values_with(masked: bool) -> None:
    cross, x, context = Attention(8, 2, 6), torch.randn(2, 7, 8), torch.randn(2, 5, 6)
    mask = torch.arange(5) < torch.tensor([[5], [2]]) if masked else None
    found = cross.probabilities(x, context, mask)
    assert found.shape == (2, 2, 7, 5)
    close(found.sum(3), torch.ones(2, 2, 7))
    if mask is not None:
        assert found[1, :, :, 2:].abs().max() == 0
    values = cross.v(context).reshape(2, 5, 2, 4)
    mixed = torch.einsum("bhnl,blhd->bnhd", found, values).reshape(2, 7, 8)
    close(cross.out(mixed), cross(x, context, mask))


def test_a_text_of_padding_alone_gives_finite_values() -> None:
    cross, x, context = Attention(8, 2, 6), torch.randn(1, 7, 8), torch.randn(1, 5, 6)
    assert cross(x, context, torch.zeros(1, 5).bool()).isfinite().all()


def test_self_attention_reads_the_pixels_of_the_normalised_map() -> None:
    module, x = SelfAttention(8, replace(GROUPED, head_channels=4)), torch.randn(2, 8, 3, 5)
    assert module.attention.heads == 2
    tokens = normalised(x, module.norm, 4, 1e-5).flatten(2).mT  # (B, H W, C)
    y = attended(module.attention, tokens, tokens)
    close(module(x, NOTHING), x + y.mT.reshape(x.shape))


def test_feed_forward_is_geglu() -> None:
    module, x = FeedForward(6), torch.randn(2, 4, 6)
    h = x @ module.proj.weight.T + module.proj.bias
    value, gate = h[..., :24], h[..., 24:]
    gelu = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    close(module(x), (value * gelu) @ module.out.weight.T + module.out.bias)


def test_spatial_transformer_is_its_formula() -> None:
    config = replace(
        GROUPED, attention="transformer", middle_attention=True, heads=2, context_channels=6
    )
    module = SpatialTransformer(8, config, 1)
    x, context = 0.01 * torch.randn(2, 8, 3, 5), torch.randn(2, 4, 6)  # small: the epsilon counts
    h = normalised(x, module.norm, 4, 1e-6).flatten(2).mT
    h = h @ module.proj_in.weight[:, :, 0, 0].T + module.proj_in.bias
    block = module.blocks[0]
    y = block.norm1(h)
    h = h + attended(block.self_attention, y, y)
    h = h + attended(block.cross_attention, block.norm2(h), context)
    h = h + block.feed_forward(block.norm3(h))
    h = h @ module.proj_out.weight[:, :, 0, 0].T + module.proj_out.bias
    close(module(x, Conditioning(context=context)), x + h.mT.reshape(x.shape))


def test_linear_projections_are_1x1_convolutions() -> None:
    config = replace(GROUPED, attention="transformer", middle_attention=True)
    conv = SpatialTransformer(8, config, 2)
    linear = SpatialTransformer(8, replace(config, linear_projections=True), 2)
    shapes = linear.state_dict()
    linear.load_state_dict({k: v.reshape(shapes[k].shape) for k, v in conv.state_dict().items()})
    x = torch.randn(2, 8, 3, 5)
    close(linear(x, NOTHING), conv(x, NOTHING))


# --- resampling, joining, patches ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("down", "size", "expected"),
    [
        *(((k, (8, 6), (4, 3))) for k in ("max", "avg", "conv", "conv-asymmetric")),
        *(((k, (7, 1), (3, 1))) for k in ("max", "avg", "conv-asymmetric")),
        ("conv", (7, 1), (4, 1)),
        *(((k, (1, 1), (1, 1))) for k in ("max", "avg", "conv", "conv-asymmetric")),
    ],
)
def test_downsampling_halves(down: str, size: tuple[int, int], expected: tuple[int, int]) -> None:
    module = Downsample(3, UNetConfig(down=down))
    assert module(torch.randn(2, 3, *size), NOTHING).shape == (2, 3, *expected)


def test_pooling_takes_the_largest_or_the_mean() -> None:
    x = torch.tensor([[1.0, 2.0, 5.0], [3.0, 6.0, 5.0]])[None, None]
    assert Downsample(1, UNetConfig(down="max"))(x, NOTHING).tolist() == [[[[6.0]]]]
    assert Downsample(1, UNetConfig(down="avg"))(x, NOTHING).tolist() == [[[[3.0]]]]


def test_asymmetric_convolution_reads_nothing_left_of_its_pixel() -> None:
    module = Downsample(1, UNetConfig(down="conv-asymmetric"))
    x = torch.zeros(1, 1, 8, 8)
    reaches = torch.autograd.functional.jacobian(lambda y: module(y, NOTHING)[0, 0, 1, 1], x)
    rows, columns = reaches[0, 0].nonzero(as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 4, 2, 4)


@pytest.mark.parametrize(
    "up", ["transposed", "bilinear", "bilinear-aligned", "nearest", "nearest-conv"]
)
def test_upsampling_doubles_and_cuts(up: str) -> None:
    module, x = Upsample(4, 4, UNetConfig(up=up)), torch.randn(2, 4, 3, 5)
    assert module(x, NOTHING).shape == (2, 4, 6, 10)
    assert module(x, Conditioning(size=(5, 10))).shape == (2, 4, 5, 10)
    assert module(x, Conditioning(size=(7, 11))).shape == (2, 4, 6, 10)


@pytest.mark.parametrize(("up", "last"), [("bilinear", 0.75), ("bilinear-aligned", 2 / 3)])
def test_bilinear_with_and_without_aligned_corners(up: str, last: float) -> None:
    x = torch.tensor([[0.0, 1.0]])[None, None]
    row = Upsample(1, 1, UNetConfig(up=up))(x, NOTHING)[0, 0, 0]
    assert row.tolist() == pytest.approx([0, 1 - last, last, 1])


@given(st.integers(1, 9), st.integers(1, 9))
def test_padded_join_keeps_both_maps(height: int, width: int) -> None:
    skip = torch.randn(1, 2, height, width)
    x = torch.randn(1, 3, height - height % 2 or 1, width - width % 2 or 1)
    joined = join_padded(x, skip)
    assert joined.shape == (1, 5, height, width)
    assert torch.equal(joined[:, :2], skip)
    assert torch.equal(joined[:, 2:, : x.shape[2], : x.shape[3]], x)
    assert joined[:, 2:].abs().sum() == pytest.approx(x.abs().sum().item(), rel=1e-5)
    assert torch.equal(join_behind(x, skip), torch.cat([joined[:, 2:], skip], dim=1))


def test_cropped_join_keeps_the_centre() -> None:
    skip = torch.arange(64.0).reshape(1, 1, 8, 8)
    joined = join_cropped(torch.zeros(1, 1, 4, 2), skip)
    assert torch.equal(joined[:, :1], skip[..., 2:6, 3:5])
    assert joined.shape == (1, 2, 4, 2)


@given(st.integers(1, 4), st.integers(1, 11), st.integers(1, 11))
def test_unpatch_undoes_the_stem(patch: int, height: int, width: int) -> None:
    stem = Stem(UNetConfig(in_channels=2, channels=2 * patch**2, patch=patch))
    nn.init.dirac_(stem.conv.weight)  # each feature is one pixel of its patch
    nn.init.zeros_(stem.conv.bias)
    x = torch.randn(2, 2, height, width)
    y = stem(x, NOTHING)
    assert y.shape[-2:] == (math.ceil(height / patch), math.ceil(width / patch))
    assert torch.equal(unpatch(y, patch, (height, width)), x)
    rows = torch.arange(y.shape[2] * patch).clamp(max=height - 1)  # the last lines, repeated
    columns = torch.arange(y.shape[3] * patch).clamp(max=width - 1)
    whole = unpatch(y, patch, (len(rows), len(columns)))
    assert torch.equal(whole, x[:, :, rows][:, :, :, columns])


# --- time ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [8, 9, 320])
@pytest.mark.parametrize("freq_shift", [0, 1])
@pytest.mark.parametrize("cos_first", [False, True])
def test_sinusoids_are_their_formula(channels: int, freq_shift: int, cos_first: bool) -> None:
    half = channels // 2
    expected = np.zeros((4, channels))
    for row, t in enumerate([0, 1, 499, 999]):
        for i in range(half):
            angle = t * 10000 ** (-i / (half - freq_shift))
            sine, cosine = (i + half, i) if cos_first else (i, i + half)
            expected[row, sine], expected[row, cosine] = np.sin(angle), np.cos(angle)
    waves = sinusoids(
        torch.tensor([0, 1, 499, 999]), channels, cos_first=cos_first, freq_shift=freq_shift
    )
    assert waves.dtype == torch.float32
    np.testing.assert_allclose(waves, expected, atol=2e-4)  # float32 angles of up to 999


def test_time_embedding_takes_fractions_and_half_precision() -> None:
    module = TimeEmbedding(replace(GROUPED, block="res", time=True))
    t = torch.tensor([0.0, 0.25, 999.0])
    expected = module(t)
    assert expected.shape == (3, 32)
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    half = module.bfloat16()(t)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.05)
