"""The network's laws: parameter counts, sizes, conditioning, initialisation, refusals."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from diffusion.model import DiffusionUNet
from segmentation.model import SegmentationUNet
from unet.attention import SelfAttention, SpatialTransformer
from unet.config import UNetConfig
from unet.errors import InputError
from unet.geometry import input_size, output_size
from unet.layers import Conditioning, ConvBlock, ResBlock
from unet.model import UNet
from unet.presets import PRESETS

PAPER = PRESETS["paper"].config
TEXT = UNetConfig(
    in_channels=2,
    channels=8,
    multipliers=(1, 2),
    block="res",
    skips="block",
    norm="group",
    groups=4,
    activation="silu",
    up="nearest-conv",
    time=True,
    classes=3,
    attention="transformer",
    attention_levels=(1,),
    heads=2,
    context_channels=6,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def arguments(config: UNetConfig, batch: int, height: int, width: int) -> dict[str, Tensor]:
    """What the forward of a config takes, drawn from torch's generator."""
    given: dict[str, Tensor] = {"x": torch.randn(batch, config.in_channels, height, width)}
    if config.time:
        given["t"] = torch.randint(0, 1000, (batch,))
    if config.jumps:
        given["jump"] = torch.randint(0, 1000, (batch,))
    if config.context_channels is not None:
        given["context"] = torch.randn(batch, 5, config.context_channels)
    if config.classes:
        given["classes"] = torch.randint(0, config.classes, (batch,))
    if config.vector_channels:
        given["vector"] = torch.randn(batch, config.vector_channels)
    return given


# --- parameters ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "out_channels", "parameters", "tensors"),
    [
        ("paper", 2, 31_030_658, 46),
        ("paper", 1, 31_030_593, 46),
        ("classic", 1, 31_037_633, None),
        ("classic-bilinear", 1, 17_262_977, None),
        ("tutorial", 1, 13_394_177, None),
        ("ddpm-cifar10", 3, 35_746_307, 328),
        ("ddpm-256", 3, 113_673_219, None),
        ("sd-v1", 4, 859_520_964, 686),
        ("sd-v2", 4, 865_910_724, 686),
        ("sdxl", 4, 2_567_463_684, 1680),
    ],
)
def test_published_parameter_counts(
    name: str, out_channels: int, parameters: int, tensors: int | None
) -> None:
    config = PRESETS[name].config
    with torch.device("meta"):
        model = (DiffusionUNet if config.time else SegmentationUNet)(config, out_channels)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert tensors in (None, len(list(model.parameters())))


def test_the_paper_has_23_convolutions() -> None:
    with torch.device("meta"):
        model = SegmentationUNet(PAPER, 2)
    assert sum(isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) for m in model.modules()) == 23


def test_ddpm_keeps_the_stem_every_block_and_every_downsampling() -> None:
    config = PRESETS["ddpm-cifar10"].config
    with torch.device("meta"):
        trunk = UNet(config)
    kept = sum(step.keeps for step in trunk.encoder)
    assert kept == 1 + config.levels * config.blocks + config.levels - 1
    assert kept == sum(step.joins for step in trunk.decoder)


# --- sizes --------------------------------------------------------------------------------------


@st.composite
def configs(draw: Any) -> UNetConfig:
    """Configs of every kind that can be built, with the same padding, at 8 channels."""
    levels = draw(st.integers(1, 3))
    some_levels = st.lists(st.sampled_from(range(levels)), unique=True).map(tuple)
    multipliers = st.lists(st.integers(1, 3), min_size=levels, max_size=levels).map(tuple)
    values: dict[str, Any] = {
        "in_channels": draw(st.integers(1, 3)),
        "channels": 8,
        "groups": 4,
        "multipliers": draw(multipliers),
        "blocks": draw(st.integers(1, 2)),
        "block": draw(st.sampled_from(["conv", "res"])),
        "skips": draw(st.sampled_from(["level", "block"])),
        "patch": draw(st.integers(1, 3)),
        "norm": draw(st.sampled_from(["batch", "group", "instance", "none"])),
        "activation": draw(st.sampled_from(["relu", "leaky-relu", "silu", "gelu"])),
        "init": draw(st.sampled_from(["torch", "he"])),
        "down": draw(st.sampled_from(["max", "avg", "conv", "conv-asymmetric"])),
        "up": draw(
            st.sampled_from(
                ["transposed", "bilinear", "bilinear-aligned", "nearest", "nearest-conv"]
            )
        ),
        "dropout": draw(st.sampled_from([0.0, 0.5])),
        "dropout_at": draw(st.sampled_from(["blocks", "bottom"])),
        "attention": draw(st.sampled_from(["self", "transformer"])),
        "attention_levels": draw(some_levels),
        "middle_attention": draw(st.booleans()),
        draw(st.sampled_from(["heads", "head_channels"])): draw(st.sampled_from([1, 2, 4])),
    }
    if (values["block"], values["skips"]) == ("conv", "level") and levels > 1:
        values["decoder"] = draw(st.sampled_from(["unet", "fcn-32s", "fcn-8s"]))
    if values.get("decoder", "unet") == "unet" and draw(st.booleans()):
        needed = levels - 1 if values["skips"] == "level" else levels
        values["decoder_multipliers"] = draw(multipliers)[:needed]
    if values["norm"] != "group":  # whose groups need not divide half of the joined channels
        values["decoder_mid"] = draw(st.sampled_from(["out", "half-in"]))
    if values["block"] == "res":
        values["time"], values["classes"] = draw(st.booleans()), draw(st.sampled_from([0, 3]))
        values["scale_shift"] = draw(st.booleans()) and bool(values["time"] or values["classes"])
    attends = bool(values["attention_levels"]) or values["middle_attention"]
    if values["attention"] == "transformer" and attends:
        values["linear_projections"] = draw(st.booleans())
        values["context_channels"] = draw(st.sampled_from([None, 6]))
    return UNetConfig(**values)


@settings(max_examples=80)
@given(configs(), st.integers(1, 19), st.integers(1, 19), st.integers(0, 2))
def test_output_has_the_input_size(config: UNetConfig, height: int, width: int, batch: int) -> None:
    given = arguments(config, batch, height, width)
    with torch.no_grad():
        assert DiffusionUNet(config, 2).eval()(**given).shape == (batch, 2, height, width)
        features = UNet(config).eval()(**given)
    coarse = (math.ceil(height / config.patch), math.ceil(width / config.patch))
    assert features.shape == (batch, config.out_channels, *coarse)
    assert features.isfinite().all()


@settings(max_examples=30)
@given(configs())
def test_every_parameter_takes_part(config: UNetConfig) -> None:
    trunk = UNet(config).eval()
    trunk(**arguments(config, 2, 12, 12)).sum().backward()
    assert [name for name, p in trunk.named_parameters() if p.grad is None] == []


@settings(max_examples=15)
@given(configs())
def test_images_of_a_batch_are_independent_in_evaluation(config: UNetConfig) -> None:
    # In float64: a norm divides by next to nothing where few pixels of one map are almost equal.
    trunk = UNet(config).eval().double()
    given = arguments(config, 2, 9, 8)
    given |= {name: given[name].double() for name in given.keys() & {"x", "context"}}
    with torch.no_grad():
        together = trunk(**given)
        alone = torch.cat([trunk(**{k: v[i : i + 1] for k, v in given.items()}) for i in (0, 1)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@settings(max_examples=20)
@given(configs(), st.integers(1, 19), st.integers(1, 19))
def test_the_maps_end_with_the_features(config: UNetConfig, height: int, width: int) -> None:
    trunk, given = UNet(config).eval(), arguments(config, 1, height, width)
    maps: list[torch.Tensor] = []
    with torch.no_grad():
        assert trunk(**given, maps=maps) is maps[-1]
    sizes = [m.shape[-2] for m in maps]
    assert sizes == sorted(sizes)
    if config.decoder == "unet":
        levels = config.levels - (config.skips == "level")
        widths = config.decoder_channels[:levels]
        assert [m.shape[1] for m in maps] == [config.encoder_channels[-1], *reversed(widths)]


@pytest.mark.parametrize(("name", "joined"), [("fcn-32s", 0), ("fcn-8s", 2)])
def test_a_fully_convolutional_decoder_adds_scores(name: str, joined: int) -> None:
    """Long et al. 2015, fig. 3: enlarge the coarse scores, add those of the finer map, go on."""
    config = replace(PRESETS[name].config, channels=4)
    model = SegmentationUNet(config, 1).double().eval()
    trunk = model.trunk
    x = torch.randn(1, 1, 33, 70).double()
    h, maps = x, []
    for step in trunk.encoder:
        h = step(h, Conditioning())
        maps += [h] if "block" in step else []
    maps.append(trunk.middle(h, Conditioning()))
    scores = [step["score"].conv for step in trunk.decoder if "score" in step]
    assert len(scores) == joined + 1
    y = scores[0](maps[-1])
    for conv, kept in zip(scores[1:], maps[-2::-1], strict=False):
        y = nn.functional.interpolate(y, size=kept.shape[-2:], mode="bilinear")
        ours, theirs = conv.weight.split([kept.shape[1], y.shape[1]], dim=1)
        y = nn.functional.conv2d(kept, ours) + nn.functional.conv2d(y, theirs, conv.bias)
    y = nn.functional.interpolate(y, size=(17, 35), mode="bilinear")
    torch.testing.assert_close(trunk(x), y)
    assert model(x).shape == x.shape


def test_paper_sizes_are_those_of_figure_1() -> None:
    with torch.device("meta"):
        model = SegmentationUNet(PAPER, 2)
        sizes: list[int] = []
        for module in model.modules():
            if isinstance(module, ConvBlock):
                module.register_forward_hook(lambda m, a, output: sizes.append(output.shape[-1]))
        logits = model(torch.empty(1, 1, 572, 572))
    assert sizes == [568, 280, 136, 64, 28, 52, 100, 196, 388]
    assert logits.shape == (1, 2, 388, 388)


def test_paper_reaches_16k_plus_60_from_188_and_loses_184() -> None:
    reachable = range(188, 1000, 16)
    for n in range(-20, 1000):
        if n in reachable:
            assert output_size(PAPER, n) == n - 184
            continue
        with pytest.raises(InputError, match=f"no output from size {n}:") as caught:
            output_size(PAPER, n)
        sizes = str(caught.value).split("that work are ")[1].split(",")[0]
        nearest = [m for m in (*reachable, 1004) if abs(m - n) < 16 or m == 188 > n]
        assert [int(m) for m in re.findall(r"\d+", sizes)] == nearest


def test_unreachable_size_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"from size 512: .* are 508 and 524, .* steps of 16"):
        SegmentationUNet(PAPER, 2)(torch.zeros(1, 1, 572, 512))


def test_input_size_is_the_smallest_that_suffices() -> None:
    for n in range(1, 600):
        size = input_size(PAPER, n)
        assert output_size(PAPER, size) >= n
        assert size == 188 or output_size(PAPER, size - 16) < n
    assert (input_size(PAPER, 512), output_size(PAPER, 700)) == (700, 516)
    assert input_size(TEXT, 512) == 512


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 2), st.integers(1, 120))
def test_output_size_is_what_the_network_gives(levels: int, blocks: int, n: int) -> None:
    config = replace(PAPER, channels=2, multipliers=(1,) * levels, blocks=blocks)
    with torch.device("meta"):
        trunk = UNet(config)
        try:
            size = output_size(config, n)
        except InputError:
            with pytest.raises(InputError, match=f"size {n}:"):
                trunk(torch.empty(1, 1, n, n))
        else:
            assert trunk(torch.empty(1, 1, n, n)).shape[-2:] == (size, size)


# --- conditioning -------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("name", ["x", "t", "context", "classes"])
def test_every_input_changes_the_output(name: str, scale_shift: bool) -> None:
    trunk = UNet(replace(TEXT, scale_shift=scale_shift)).eval()
    given = arguments(TEXT, 2, 8, 8)
    other = {"t": (given["t"] + 1), "classes": (given["classes"] + 1) % TEXT.classes}
    other |= {"x": torch.randn_like(given["x"]), "context": torch.randn_like(given["context"])}
    with torch.no_grad():
        change = (trunk(**given) - trunk(**{**given, name: other[name]})).abs().amax((1, 2, 3))
    assert (change > 1e-5).all()


def test_blocks_read_the_activated_sum_of_the_embeddings() -> None:
    trunk, given = UNet(TEXT), arguments(TEXT, 2, 8, 8)
    seen: list[Tensor] = []
    trunk.middle.block1.register_forward_pre_hook(lambda m, args: seen.append(args[1].emb))
    trunk(**given)
    total = trunk.time_embedding(given["t"]) + trunk.class_embedding(given["classes"])
    torch.testing.assert_close(seen[0], total * total.sigmoid())


def test_masked_tokens_never_count() -> None:
    trunk, given = UNet(TEXT).eval(), arguments(TEXT, 2, 8, 8)
    mask = torch.tensor([[True, True, False, False, False], [True] * 5])
    padded = given | {"context": given["context"].masked_fill(~mask[..., None], 1e4)}
    short = {k: v[:1] for k, v in given.items()} | {"context": given["context"][:1, :2]}
    with torch.no_grad():
        expected = trunk(**given, mask=mask)
        torch.testing.assert_close(trunk(**padded, mask=mask), expected, rtol=0, atol=0)
        torch.testing.assert_close(trunk(**short), expected[:1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(trunk(**given)[1:], expected[1:], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(trunk(**given)[:1], expected[:1], atol=1e-4)


def test_both_tasks_share_the_trunk() -> None:
    config = UNetConfig(channels=4, multipliers=(1, 2), block="res")
    start, other = SegmentationUNet(config, 2).trunk, DiffusionUNet(config, 2).trunk
    other.load_state_dict(start.state_dict())  # strict
    x = torch.randn(1, 1, 8, 8)
    torch.testing.assert_close(other(x), start(x), rtol=0, atol=0)


# --- initialisation -----------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["self", "transformer"])
@pytest.mark.parametrize("init", ["torch", "he"])
def test_zero_init_starts_as_zero_and_its_branches_as_the_identity(
    attention: str, init: str
) -> None:
    config = replace(TEXT, attention=attention, context_channels=None, zero_init=True, init=init)
    model, given = DiffusionUNet(config, 2), arguments(config, 2, 8, 8)
    assert (model(**given) == 0).all()
    branches = [
        m
        for m in model.modules()
        if isinstance(m, (SelfAttention, SpatialTransformer))
        or (isinstance(m, ResBlock) and isinstance(m.skip, nn.Identity))
    ]
    assert len(branches) > 3
    for branch in branches:
        norm = branch.norm1 if isinstance(branch, ResBlock) else branch.norm
        x = torch.randn(2, norm.num_channels, 4, 4)
        cond = Conditioning(emb=torch.randn(2, config.embedding_channels))
        torch.testing.assert_close(branch(x, cond), x, rtol=0, atol=0)


def test_without_zero_init_the_output_is_not_zero() -> None:
    assert (DiffusionUNet(TEXT, 2)(**arguments(TEXT, 1, 8, 8)) != 0).any()


def test_he_initialisation_keeps_the_variance() -> None:
    trunk = UNet(replace(PAPER, channels=32, multipliers=(1, 2, 4), dropout=0.0))
    for module in trunk.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and module.in_channels > 1:
            taps = 9 if isinstance(module, nn.Conv2d) else 1  # 2 x 2, stride 2: one input a pixel
            expected = math.sqrt(2 / (module.in_channels * taps))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.05)
            assert (module.bias == 0).all()
    features = trunk(torch.randn(1, 1, 108, 108))  # torch's own initialisation gives 1e-3 here
    assert 0.3 < features.square().mean() < 30


def test_dropout_stands_at_the_end_of_the_contracting_path() -> None:
    trunk = UNet(PAPER)
    active = [name for name, m in trunk.named_modules() if isinstance(m, nn.Dropout) and m.p > 0]
    assert active == ["middle.block1.dropout", "encoder.6.block.dropout"]


# --- refusals -----------------------------------------------------------------------------------

PLAIN = UNetConfig(channels=4, multipliers=(1, 2))
VECTOR = replace(TEXT, vector_channels=3)
JUMPS = replace(TEXT, jumps=True)
X, T, TOKENS = torch.zeros(2, 2, 8, 8), torch.zeros(2), torch.zeros(2, 5, 6)
GOOD = {"x": X, "t": T, "context": TOKENS, "classes": torch.zeros(2, dtype=torch.long)}


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (TEXT, GOOD | {"x": X[:, :1]}, r"shape \(2, 1, 8, 8\).*\(B, 2, H, W\).*in_channels"),
        (TEXT, GOOD | {"x": X[0]}, r"shape \(2, 8, 8\).*\(B, 2, H, W\)"),
        (TEXT, GOOD | {"x": X[:, :, :0]}, r"shape \(2, 2, 0, 8\).*at least one pixel"),
        (TEXT, GOOD | {"t": None}, "needs a timestep t: pass it"),
        (TEXT, GOOD | {"context": None}, "needs a context: pass it"),
        (TEXT, GOOD | {"classes": None}, "needs a class vector: pass it"),
        (PLAIN, {"x": X[:, :1], "t": T}, "takes no timestep t: drop it, .* time=True"),
        (
            PLAIN,
            {"x": X[:, :1], "context": TOKENS},
            "takes no context: drop it, .*context_channels",
        ),
        (PLAIN, {"x": X[:, :1], "classes": T}, "takes no class vector: drop it, .* classes=N"),
        (PLAIN, {"x": X[:, :1], "vector": TOKENS[:, 0]}, "takes no vector: drop it"),
        (PLAIN, {"x": X[:, :1], "jump": T}, "takes no jump: drop it, .* jumps=True"),
        (JUMPS, GOOD | {"jump": T[:1]}, r"jump has shape \(1,\), .* batch of 2 needs \(2,\)"),
        (VECTOR, GOOD, "needs a vector: pass it"),
        (VECTOR, GOOD | {"vector": T}, r"vector has shape \(2,\), .* need \(2, 3\)"),
        (TEXT, GOOD | {"t": T[:1]}, r"t has shape \(1,\), .* batch of 2 needs \(2,\)"),
        (TEXT, GOOD | {"classes": T[0]}, r"classes has shape \(\), .* needs \(2,\)"),
        (TEXT, GOOD | {"context": TOKENS[..., :5]}, r"shape \(2, 5, 5\), .* need \(2, L, 6\)"),
        (TEXT, GOOD | {"context": TOKENS[:1]}, r"shape \(1, 5, 6\), .* batch of 2 need"),
        (PLAIN, {"x": X[:, :1], "mask": T.bool()}, "pass a context too"),
        (TEXT, GOOD | {"mask": torch.ones(2, 4).bool()}, r"shape \(2, 4\) .* needs \(2, 5\)"),
        (TEXT, GOOD | {"mask": torch.ones(2, 5)}, r"type torch.float32, .* torch.bool"),
        (TEXT, GOOD | {"x": X.numpy()}, "x is a ndarray, .* torch.as_tensor"),
        (TEXT, GOOD | {"x": X.byte()}, "image holds torch.uint8, .* floating-point"),
        (TEXT, GOOD | {"t": 3}, "t is a int, .* torch.as_tensor"),
        (TEXT, GOOD | {"classes": [0, 1]}, "classes is a list, .* torch.as_tensor"),
        (TEXT, GOOD | {"classes": T}, r"classes hold torch.float32, .* classes.long\(\)"),
        (TEXT, GOOD | {"classes": torch.tensor([0, 3])}, "beyond those of this network, 0 to 2"),
    ],
)
def test_wrong_arguments_are_named(config: UNetConfig, given: dict[str, Any], message: str) -> None:
    trunk = UNet(config)
    with pytest.raises(InputError, match=message):
        trunk(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokens": torch.zeros(2, 5).long()}, "no text encoder for tokens: give a context"),
        ({"picture": X[:, :, :4]}, r"picture has shape \(2, 2, 4, 8\), .* image \(2, 2, 8, 8\)"),
        ({"picture": X[:1]}, "picture has shape .* for each image"),
    ],
)
def test_wrong_arguments_of_a_diffusion_model_are_named(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        DiffusionUNet(TEXT, 2)(**GOOD | given)


def test_right_arguments_are_taken() -> None:
    assert UNet(TEXT)(**GOOD).shape == (2, 8, 8, 8)
