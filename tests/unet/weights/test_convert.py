"""Conversion: the same outputs under other names, there and back without loss, misfits named."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.model import DiffusionUNet
from segmentation.model import SegmentationUNet
from unet.config import UNetConfig
from unet.errors import InputError
from unet.layers import sinusoids
from unet.presets import PRESETS
from unet.weights.convert import detect_layout, from_layout, to_layout
from unet.weights.diffusers_config import config_to_diffusers
from unet.weights.folder import FolderModel, load_strictly
from unet.weights.layouts import COMPVIS_PREFIX


def small(preset: str, **changes: Any) -> UNetConfig:
    """A preset of less width; everything else is as published, and no dropout."""
    narrow = {"channels": 16, "groups": 8, "dropout": 0.0}
    config = PRESETS[preset].config
    if config.context_channels:
        narrow["context_channels"] = 24
    if config.head_channels:
        narrow["head_channels"] = 8
    if config.vector_channels:
        narrow |= {"vector_channels": 12 + 6 * 4, "vector_waves": 4, "transformer_depth": (1, 2, 3)}
    return replace(config, **{**narrow, **changes})


DDPM = {
    "ddpm": small("ddpm-cifar10"),
    "ddpm-scale-shift": small("ddpm-cifar10", scale_shift=True),
    "ddpm-classes": small("ddpm-cifar10", classes=5),
    "ddpm-heads": small("ddpm-cifar10", head_channels=8, down="conv"),
    "ddpm-no-attention": small("ddpm-cifar10", attention_levels=(), middle_attention=False),
    "ddpm-deep": small("ddpm-256"),
}
SD = {
    "sd-v1": small("sd-v1"),
    "sd-v2": small("sd-v2"),
    "sdxl": small("sdxl"),
    "sd-scale-shift": small("sd-v1", scale_shift=True, activation="gelu"),
    "sd-classes-depth": small("sd-v2", classes=5, transformer_depth=2),
    "sd-three-levels": small("sd-v1", multipliers=(1, 2, 3), blocks=1, attention_levels=(0, 2)),
}
CLASSIC = {
    name: replace(PRESETS[name].config, channels=8)
    for name in ("classic", "classic-bilinear", "tutorial")
}
BUILD: dict[str, tuple[type[FolderModel], UNetConfig, str]] = {
    **{name: (SegmentationUNet, config, "classic") for name, config in CLASSIC.items()},
    **{f"{n}-diffusers": (DiffusionUNet, c, "diffusers") for n, c in (DDPM | SD).items()},
    **{
        f"{n}-compvis": (DiffusionUNet, c, "compvis")
        for n, c in (DDPM | SD).items()
        if c.middle_attention
    },
}


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every weight and buffer at random, also those that start at zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                value.fill_(7)
            elif name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
                value.copy_(torch.empty(value.shape).uniform_(0.5, 1.5, generator=generator))
            else:
                scale = 0.1 if value.ndim == 1 else (value[0].numel()) ** -0.5
                value.copy_(scale * torch.randn(value.shape, generator=generator))
    return model.eval()


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def on_meta(kind: type[FolderModel], config: UNetConfig, channels: int) -> FolderModel:
    with torch.device("meta"):
        return kind(config, channels)


def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def assert_same_state(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """Same keys, types and bits."""
    assert set(a) == set(b)
    assert all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def oracle_of(config: UNetConfig, channels: int) -> nn.Module:
    """diffusers' network of the same config."""
    values = config_to_diffusers(config, channels)
    return getattr(diffusers, values["_class_name"]).from_config(values).eval()


def difference(ours: nn.Module, theirs: nn.Module, config: UNetConfig, size: int | tuple) -> float:
    """Largest absolute difference of the outputs on two random images."""
    h, w = (size, size) if isinstance(size, int) else size
    x, t = noise(2, config.in_channels, h, w), torch.tensor([3, 871])
    classes = torch.tensor([1, 4]) if config.classes else None
    context = noise(2, 7, config.context_channels, seed=2) if config.context_channels else None
    vector, added = None, None
    if config.vector_channels:
        text, sizes = noise(2, 12, seed=3), torch.tensor([[9, 13, 0, 2, 9, 13], [1, 2, 3, 4, 5, 6]])
        waves = sinusoids(sizes.flatten(), config.vector_waves, cos_first=True, freq_shift=0)
        vector = torch.cat([text, waves.reshape(2, -1)], dim=1)
        added = {"text_embeds": text, "time_ids": sizes}
    with torch.no_grad():
        y = ours(x, t, context, classes=classes, vector=vector)
        if context is None:
            wanted = theirs(x, t, class_labels=classes).sample
        else:
            wanted = theirs(x, t, context, class_labels=classes, added_cond_kwargs=added).sample
    assert wanted.std() > 0.1  # or equality would say little
    return float((y - wanted).abs().max())


@pytest.mark.parametrize("name", DDPM | SD)
def test_outputs_equal_diffusers_in_both_directions(name: str) -> None:
    config = (DDPM | SD)[name]
    size = (9, 13) if name in SD else 32
    theirs = randomized(oracle_of(config, 4))
    ours = on_meta(DiffusionUNet, config, 4)
    load_strictly(ours, from_layout(theirs.state_dict(), config, "diffusers"), "diffusers")
    worst = difference(ours.eval(), theirs, config, size)
    assert worst < 1e-4

    ours = randomized(copy.deepcopy(ours), seed=3)
    theirs.load_state_dict(to_layout(ours.state_dict(), config, "diffusers"), strict=True)
    worst = difference(ours, theirs, config, size)
    assert worst < 1e-4


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (16, 16), (21, 34)])
def test_conditional_outputs_equal_diffusers_at_any_size(size: tuple[int, int]) -> None:
    config = SD["sd-v1"]
    theirs = randomized(oracle_of(config, 4))
    ours = on_meta(DiffusionUNet, config, 4)
    load_strictly(ours, from_layout(theirs.state_dict(), config, "diffusers"), "diffusers")
    worst = difference(ours.eval(), theirs, config, size)
    assert worst < 1e-4


def test_older_names_of_diffusers_attention_are_read() -> None:
    config = DDPM["ddpm"]
    state = to_layout(randomized(DiffusionUNet(config, 3)).state_dict(), config, "diffusers")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, value in state.items():
        for new, former in old.items():
            key = key.replace(f".{new}.", f".{former}.")
        renamed[key] = value
    assert set(renamed) != set(state)
    assert_same_state(
        from_layout(renamed, config, "diffusers"), from_layout(state, config, "diffusers")
    )


class DoubleConv(nn.Module):
    """The classic U-Net by its well-known module names, as the oracle."""

    def __init__(self, inside: int, out: int, mid: int | None = None, bias: bool = False) -> None:
        super().__init__()
        mid = mid or out
        self.double_conv = nn.Sequential(
            nn.Conv2d(inside, mid, 3, padding=1, bias=bias),
            nn.BatchNorm2d(mid),
            nn.ReLU(),
            nn.Conv2d(mid, out, 3, padding=1, bias=bias),
            nn.BatchNorm2d(out),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class Down(nn.Module):
    def __init__(self, inside: int, out: int, bias: bool) -> None:
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), DoubleConv(inside, out, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool_conv(x)


class Up(nn.Module):
    def __init__(self, inside: int, out: int, bilinear: bool, halve: bool, bias: bool) -> None:
        super().__init__()
        if bilinear:
            self.up: nn.Module = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        else:
            self.up = nn.ConvTranspose2d(inside, inside // 2, kernel_size=2, stride=2)
        mid = inside // 2 if bilinear and halve else out
        self.conv = DoubleConv(inside, out, mid, bias)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)
        dy, dx = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
        x = F.pad(x, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return self.conv(torch.cat([skip, x], dim=1))


class ClassicUNet(nn.Module):
    def __init__(
        self, inside: int, out: int, width: int, bilinear: bool, halve: bool, bias: bool
    ) -> None:
        super().__init__()
        n, f = width, 2 if bilinear else 1
        self.inc = DoubleConv(inside, n, bias=bias)
        self.down1 = Down(n, 2 * n, bias)
        self.down2 = Down(2 * n, 4 * n, bias)
        self.down3 = Down(4 * n, 8 * n, bias)
        self.down4 = Down(8 * n, 16 * n // f, bias)
        self.up1 = Up(16 * n, 8 * n // f, bilinear, halve, bias)
        self.up2 = Up(8 * n, 4 * n // f, bilinear, halve, bias)
        self.up3 = Up(4 * n, 2 * n // f, bilinear, halve, bias)
        self.up4 = Up(2 * n, n, bilinear, halve, bias)
        self.outc = nn.Module()
        self.outc.conv = nn.Conv2d(n, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x4 = self.down3(x3)
        x = self.up1(self.down4(x4), x4)
        x = self.up3(self.up2(x, x3), x2)
        return self.outc.conv(self.up4(x, x1))


def classic_of(name: str, width: int = 8, channels: int = 2) -> ClassicUNet:
    variants = {
        "classic": {"inside": 3, "bilinear": False, "halve": False, "bias": False},
        "classic-bilinear": {"inside": 3, "bilinear": True, "halve": True, "bias": False},
        "tutorial": {"inside": 1, "bilinear": True, "halve": False, "bias": True},
    }
    return ClassicUNet(out=channels, width=width, **variants[name])


@pytest.mark.parametrize("size", [(48, 64), (37, 53), (16, 31)])
@pytest.mark.parametrize("name", CLASSIC)
def test_outputs_equal_the_classic_unet_in_both_directions(
    name: str, size: tuple[int, int]
) -> None:
    config, x = CLASSIC[name], noise(2, CLASSIC[name].in_channels, *size)
    theirs, ours = randomized(classic_of(name)), on_meta(SegmentationUNet, config, 2)
    load_strictly(ours, from_layout(theirs.state_dict(), config, "classic"), "classic")
    with torch.no_grad():
        assert theirs(x).std() > 0.1
        torch.testing.assert_close(ours.eval()(x), theirs(x), atol=1e-4, rtol=0)

    ours = randomized(copy.deepcopy(ours), seed=3)
    theirs.load_state_dict(to_layout(ours.state_dict(), config, "classic"), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CLASSIC)
def test_full_classic_presets_have_the_keys_and_shapes_of_the_classic_unet(name: str) -> None:
    config, channels = PRESETS[name].config, PRESETS[name].out_channels
    with torch.device("meta"):
        theirs = classic_of(name, config.channels, channels).state_dict()
    state = on_meta(SegmentationUNet, config, channels).state_dict()
    assert shapes(to_layout(state, config, "classic")) == shapes(theirs)


def test_classic_checkpoint_with_data_values_and_without_batch_counters_is_read() -> None:
    config = CLASSIC["classic"]
    theirs = randomized(classic_of("classic")).state_dict()
    older = {k: v for k, v in theirs.items() if not k.endswith("num_batches_tracked")}
    state = from_layout({**older, "mask_values": [0, 255]}, config, "classic")
    counters = {k: v for k, v in state.items() if k.endswith("num_batches_tracked")}
    assert len(counters) == 18
    assert all(v.dtype == torch.int64 and v == 0 for v in counters.values())
    wanted = from_layout(theirs, config, "classic")
    assert_same_state({**state, **{k: wanted[k] for k in counters}}, wanted)


@pytest.mark.parametrize("name", BUILD)
def test_round_trip_is_bit_identical(name: str) -> None:
    kind, config, layout = BUILD[name]
    model = randomized(on_meta(kind, config, 3).to_empty(device="cpu"))
    state = model.bfloat16().state_dict()  # as converted files often are
    theirs = to_layout(state, config, layout)
    assert detect_layout(theirs) == layout
    assert not set(theirs) & set(state)
    back = from_layout(theirs, config, layout)
    assert_same_state(back, state)
    assert_same_state(to_layout(back, config, layout), theirs)


@pytest.mark.parametrize("layout", ["diffusers", "compvis"])
@pytest.mark.parametrize("name", ["ddpm-cifar10", "ddpm-256", "sd-v1", "sd-v2"])
def test_full_presets_go_there_and_back_by_keys_and_shapes(name: str, layout: str) -> None:
    preset = PRESETS[name]
    state = on_meta(DiffusionUNet, preset.config, preset.out_channels).state_dict()
    theirs = to_layout(state, preset.config, layout)
    assert shapes(from_layout(theirs, preset.config, layout)) == shapes(state)


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [
        ("ddpm-cifar10", 328, 35_746_307),
        ("ddpm-256", None, 113_673_219),
        ("sd-v1", 686, 859_520_964),
        ("sd-v2", 686, 865_910_724),
    ],
)
def test_full_presets_have_the_keys_and_shapes_of_diffusers(
    name: str, tensors: int | None, parameters: int
) -> None:
    preset = PRESETS[name]
    with torch.device("meta"):
        theirs = oracle_of(preset.config, preset.out_channels).state_dict()
    state = on_meta(DiffusionUNet, preset.config, preset.out_channels).state_dict()
    converted = shapes(to_layout(state, preset.config, "diffusers"))
    assert converted == shapes(theirs)
    assert tensors in (None, len(converted))
    assert sum(value.numel() for value in theirs.values()) == parameters


def stable_diffusion_shapes(version: int) -> dict[str, tuple[int, ...]]:
    """CompVis' keys and shapes of Stable Diffusion 1 and 2, written down level by level."""
    made: dict[str, tuple[int, ...]] = {}
    token = 768 if version == 1 else 1024

    def put(key: str, *shape: int, bias: bool = True) -> None:
        made[f"{key}.weight"] = shape
        if bias:
            made[f"{key}.bias"] = shape[:1]

    def resblock(key: str, inside: int, out: int) -> None:
        put(f"{key}.in_layers.0", inside)
        put(f"{key}.in_layers.2", out, inside, 3, 3)
        put(f"{key}.emb_layers.1", out, 1280)
        put(f"{key}.out_layers.0", out)
        put(f"{key}.out_layers.3", out, out, 3, 3)
        if inside != out:
            put(f"{key}.skip_connection", out, inside, 1, 1)

    def transformer(key: str, c: int) -> None:
        put(f"{key}.norm", c)
        for projection in ("proj_in", "proj_out"):
            put(f"{key}.{projection}", *((c, c, 1, 1) if version == 1 else (c, c)))
        block = f"{key}.transformer_blocks.0"
        for attention, source in (("attn1", c), ("attn2", token)):
            put(f"{block}.{attention}.to_q", c, c, bias=False)
            put(f"{block}.{attention}.to_k", c, source, bias=False)
            put(f"{block}.{attention}.to_v", c, source, bias=False)
            put(f"{block}.{attention}.to_out.0", c, c)
        put(f"{block}.ff.net.0.proj", 8 * c, c)
        put(f"{block}.ff.net.2", c, 4 * c)
        for norm in ("norm1", "norm2", "norm3"):
            put(f"{block}.{norm}", c)

    put("time_embed.0", 1280, 320)
    put("time_embed.2", 1280, 1280)
    put("input_blocks.0.0", 320, 4, 3, 3)
    for n, inside, out in (
        (1, 320, 320),
        (2, 320, 320),
        (4, 320, 640),
        (5, 640, 640),
        (7, 640, 1280),
        (8, 1280, 1280),
        (10, 1280, 1280),
        (11, 1280, 1280),
    ):
        resblock(f"input_blocks.{n}.0", inside, out)
        if n < 9:
            transformer(f"input_blocks.{n}.1", out)
    for n, c in ((3, 320), (6, 640), (9, 1280)):
        put(f"input_blocks.{n}.0.op", c, c, 3, 3)
    resblock("middle_block.0", 1280, 1280)
    transformer("middle_block.1", 1280)
    resblock("middle_block.2", 1280, 1280)
    joined = (2560, 2560, 2560, 2560, 2560, 1920, 1920, 1280, 960, 960, 640, 640)
    for n, (inside, out) in enumerate(zip(joined, [1280] * 6 + [640] * 3 + [320] * 3, strict=True)):
        resblock(f"output_blocks.{n}.0", inside, out)
        if n >= 3:
            transformer(f"output_blocks.{n}.1", out)
    put("output_blocks.2.1.conv", 1280, 1280, 3, 3)
    put("output_blocks.5.2.conv", 1280, 1280, 3, 3)
    put("output_blocks.8.2.conv", 640, 640, 3, 3)
    put("out.0", 320)
    put("out.2", 4, 320, 3, 3)
    return made


@pytest.mark.parametrize("version", [1, 2])
def test_compvis_keys_and_shapes_are_those_of_stable_diffusion(version: int) -> None:
    config = PRESETS[f"sd-v{version}"].config
    state = on_meta(DiffusionUNet, config, 4).state_dict()
    wanted = stable_diffusion_shapes(version)
    assert len(wanted) == 686
    assert shapes(to_layout(state, config, "compvis")) == wanted


def test_compvis_and_diffusers_agree_weight_by_weight() -> None:
    """diffusers' own converter of CompVis checkpoints is the oracle."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = SD["sd-v2"]
    state = randomized(DiffusionUNet(config, 4)).state_dict()
    theirs = config_to_diffusers(config, 4) | {"class_embed_type": None}
    compvis = to_layout(state, config, "compvis", prefix=COMPVIS_PREFIX)
    wanted = convert_ldm_unet_checkpoint(dict(compvis), theirs)
    assert_same_state(to_layout(state, config, "diffusers"), wanted)


def test_compvis_self_attention_joins_q_k_v_head_by_head() -> None:
    """The output of CompVis' AttentionBlock on the joined weights equals ours."""
    config = small("ddpm-cifar10", channels=32, head_channels=8)
    model = randomized(DiffusionUNet(config, 3))
    state = to_layout(model.state_dict(), config, "compvis")
    ours, key = model.trunk.middle.attention1, "middle_block.1"
    x = noise(2, 64, 4, 5)
    flat = F.group_norm(
        x, config.groups, state[f"{key}.norm.weight"], state[f"{key}.norm.bias"], config.norm_eps
    ).flatten(2)
    qkv = F.conv1d(flat, state[f"{key}.qkv.weight"], state[f"{key}.qkv.bias"])
    q, k, v = qkv.reshape(2 * 8, 3 * 8, 20).split(8, dim=1)  # 8 heads of 8 channels
    weight = torch.einsum("bct,bcs->bts", q, k).div(8**0.5).softmax(dim=-1)
    y = torch.einsum("bts,bcs->bct", weight, v).reshape(2, 64, 20)
    y = F.conv1d(y, state[f"{key}.proj_out.weight"], state[f"{key}.proj_out.bias"])
    with torch.no_grad():
        torch.testing.assert_close(ours(x, None), x + y.reshape(x.shape), atol=1e-5, rtol=0)


def test_compvis_prefix_is_written_and_read_and_hides_other_keys() -> None:
    config = SD["sd-v1"]
    state = randomized(DiffusionUNet(config, 4)).state_dict()
    plain = to_layout(state, config, "compvis")
    full = to_layout(state, config, "compvis", prefix=COMPVIS_PREFIX)
    assert_same_state({f"{COMPVIS_PREFIX}{key}": value for key, value in plain.items()}, full)
    full["first_stage_model.encoder.conv_in.weight"] = torch.zeros(2)
    full["cond_stage_model.transformer.text_model.final_layer_norm.bias"] = torch.zeros(2)
    full["model_ema.decay"] = torch.tensor(0.9)
    assert detect_layout(full) == "compvis"
    assert_same_state(from_layout(full, config, "compvis"), state)
    assert_same_state(from_layout(plain, config, "compvis"), state)


@pytest.mark.parametrize("layout", ["classic", "diffusers", "compvis"])
def test_misfits_name_keys_and_shapes_and_arguments_stay_as_they_are(layout: str) -> None:
    name = {"classic": "classic", "diffusers": "sd-v1-diffusers", "compvis": "sd-v1-compvis"}
    kind, config, _ = BUILD[name[layout]]
    ours = kind(config, 3).state_dict()
    theirs = to_layout(ours, config, layout)
    for state, convert in ((ours, to_layout), (theirs, from_layout)):
        keys = list(state)
        first = next(key for key in keys[5:] if key.endswith("weight"))
        second = next(key for key in keys[20:] if state[key].ndim == 4)
        broken = {k: v for k, v in state.items() if k != first}
        broken[second] = torch.zeros(1, 2, 3, 4)
        broken["stray.weight"] = torch.zeros(5)
        before = dict(broken)
        with pytest.raises(InputError) as caught:
            convert(broken, config, layout)
        assert f"lacks {first} {tuple(state[first].shape)}" in str(caught.value)
        assert "unknown stray.weight (5,)" in str(caught.value)
        shape = tuple(state[second].shape)
        assert f"{second} with shape (1, 2, 3, 4) instead of {shape}" in str(caught.value)
        assert_same_state(broken, before)


def test_head_that_does_not_fit_is_a_misfit() -> None:
    config = CLASSIC["classic"]
    with pytest.raises(InputError, match=r"unknown head\.norm\.weight \(8,\)"):
        to_layout(DiffusionUNet(config, 1).state_dict(), config, "classic")
    config = DDPM["ddpm"]
    state = DiffusionUNet(config, 1).state_dict()
    state["head.conv.weight"] = state["head.conv.weight"][..., :1, :1]  # as of a segmentation
    with pytest.raises(InputError, match=r"head\.conv\.weight with shape \(1, 16, 1, 1\)"):
        to_layout(state, config, "diffusers")
    state = to_layout(DiffusionUNet(config, 3).state_dict(), config, "diffusers")
    weight = r"has conv_out\.weight with shape \(3, 16, 3, 3\) instead of \(1, 16, 3, 3\)"
    with pytest.raises(InputError, match=rf"lacks conv_out\.bias \(1,\); {weight}$"):
        from_layout({k: v for k, v in state.items() if k != "conv_out.bias"}, config, "diffusers")
    with pytest.raises(InputError, match=r"has conv_out\.bias with shape \(\) instead of \(1,\)"):
        from_layout(state | {"conv_out.bias": torch.tensor(0.0)}, config, "diffusers")


@pytest.mark.parametrize(
    ("config", "layout", "named"),
    [
        (PRESETS["paper"].config, "classic", "norm='none'"),
        (replace(CLASSIC["classic"], blocks=2), "classic", "blocks=2"),
        (replace(CLASSIC["classic"], up="nearest-conv"), "classic", "up='nearest-conv'"),
        (DDPM["ddpm"], "classic", "block='res'"),
        (CLASSIC["classic"], "diffusers", "block='conv'"),
        (replace(DDPM["ddpm"], time=False), "diffusers", "time=False"),
        (replace(DDPM["ddpm"], down="avg"), "diffusers", "down='avg'"),
        (replace(DDPM["ddpm"], patch=2), "compvis", "patch=2"),
        (DDPM["ddpm-no-attention"], "compvis", "middle_attention=False"),
        (replace(SD["sd-v1"], context_channels=None), "compvis", "context_channels=None"),
    ],
)
def test_config_without_names_in_a_layout_is_named(
    config: UNetConfig, layout: str, named: str
) -> None:
    for convert in (to_layout, from_layout):
        with pytest.raises(InputError, match=named):
            convert({}, config, layout)


def test_resampling_without_weights_keeps_its_place_in_compvis() -> None:
    config = replace(DDPM["ddpm"], down="avg", up="nearest")
    state = randomized(DiffusionUNet(config, 3)).state_dict()
    theirs = to_layout(state, config, "compvis")
    assert not any(".op." in key or ".conv." in key for key in theirs)
    assert_same_state(from_layout(theirs, config, "compvis"), state)


def test_unknown_layouts_and_files_around_a_state_dict_are_refused() -> None:
    config = DDPM["ddpm"]
    state = DiffusionUNet(config, 3).state_dict()
    for convert in (to_layout, from_layout):
        with pytest.raises(InputError, match="unknown layout 'keras': choose from classic, diff"):
            convert(state, config, "keras")
    with pytest.raises(InputError, match="'state_dict' holds a OrderedDict instead of a tensor"):
        from_layout({"state_dict": state}, config, "compvis")
    with pytest.raises(InputError, match=r"'trunk\.time_embedding\.linear1\.weight'.*of none of"):
        detect_layout(state)
    both = to_layout(state, config, "compvis") | to_layout(state, config, "diffusers")
    with pytest.raises(InputError, match="diffusers and compvis"):
        detect_layout(both)
    with pytest.raises(InputError, match="of none of the layouts"):
        detect_layout({})


@pytest.mark.slow
def test_full_stable_diffusion_v1_equals_diffusers() -> None:
    config = PRESETS["sd-v1"].config
    with torch.device("meta"):
        theirs = oracle_of(config, 4)
    ours = randomized(on_meta(DiffusionUNet, config, 4).to_empty(device="cpu"))
    assert sum(p.numel() for p in ours.parameters()) == 859_520_964
    state = to_layout(ours.state_dict(), config, "diffusers")  # shares ours' memory
    theirs.load_state_dict(state, strict=True, assign=True)
    worst = difference(ours, theirs, config, (9, 13))
    print(f"largest difference {worst:.2e}")
    assert worst < 1e-4
