"""Named configs, each with its source."""

from __future__ import annotations

from dataclasses import dataclass, replace

from unet.config import UNetConfig


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published or measured network: its trunk, and the channels that its head puts out."""

    config: UNetConfig
    out_channels: int  # classes of a segmentation (1: a single logit), or channels of the noise
    size: int  # height and width of the images, or latents, that it is made for
    source: str  # the paper, or the code whose variant it is


_CLASSIC = UNetConfig(
    in_channels=3, channels=64, multipliers=(1, 2, 4, 8, 16), decoder_mid="half-in"
)

_DDPM = UNetConfig(
    in_channels=3,
    channels=128,
    multipliers=(1, 2, 2, 2),
    blocks=2,
    block="res",
    skips="block",
    norm="group",
    norm_eps=1e-6,
    activation="silu",
    zero_init=True,
    down="conv-asymmetric",
    up="nearest-conv",
    dropout=0.1,
    time=True,
    attention_levels=(1,),  # 16 x 16
    middle_attention=True,
)

_SD_V1 = UNetConfig(
    in_channels=4,
    channels=320,
    multipliers=(1, 2, 4, 4),
    blocks=2,
    block="res",
    skips="block",
    norm="group",
    activation="silu",
    zero_init=True,
    down="conv",
    up="nearest-conv",
    time=True,
    time_cos_first=True,
    time_freq_shift=0,
    attention="transformer",
    attention_levels=(0, 1, 2),
    middle_attention=True,
    heads=8,
    context_channels=768,
)

_SEGMENTATION = UNetConfig(channels=32, multipliers=(1, 2, 4, 8), patch=2)

PRESETS: dict[str, Preset] = {
    "segmentation": Preset(
        config=_SEGMENTATION,
        out_channels=1,
        size=512,
        source="our default for segmentation, chosen by measurement: docs/experiments.md",
    ),
    "segmentation-quick": Preset(
        config=replace(_SEGMENTATION, channels=24, multipliers=(1, 2, 4), patch=4),
        out_channels=1,
        size=512,
        source="learns most in the first minute on a processor: docs/experiments.md",
    ),
    "shared": Preset(
        config=replace(_SEGMENTATION, block="res", norm="group", groups=8, zero_init=True),
        out_channels=1,
        size=512,
        source="our default for segmentation with residual blocks and group norm, for both lives",
    ),
    "fcn-32s": Preset(
        config=replace(_SEGMENTATION, decoder="fcn-32s"),
        out_channels=1,
        size=512,
        source="our default's encoder, the decoder of Long et al. 2015, arXiv 1411.4038",
    ),
    "fcn-8s": Preset(
        config=replace(_SEGMENTATION, decoder="fcn-8s"),
        out_channels=1,
        size=512,
        source="the same, with the scores of two finer maps added",
    ),
    "diffusion": Preset(
        config=UNetConfig(
            in_channels=3,
            channels=32,
            multipliers=(1, 2),
            blocks=2,
            block="res",
            skips="block",
            patch=2,
            norm="group",
            groups=8,
            activation="silu",
            zero_init=True,
            down="conv",
            up="nearest-conv",
            time=True,
            time_freq_shift=0,
            scale_shift=True,
            attention_levels=(1,),
            middle_attention=True,
            head_channels=32,
        ),
        out_channels=3,
        size=32,
        source="our default for small diffusion models, chosen by measurement: docs/experiments.md",
    ),
    "paper": Preset(
        config=UNetConfig(
            channels=64,
            multipliers=(1, 2, 4, 8, 16),
            padding="valid",
            norm="none",
            init="he",
            dropout=0.5,
            dropout_at="bottom",
        ),
        out_channels=2,
        size=572,
        source="Ronneberger, Fischer, Brox 2015, arXiv 1505.04597, fig. 1",
    ),
    "classic": Preset(
        config=_CLASSIC,
        out_channels=1,
        size=512,
        source="the 2015 network with same padding and batch norm, as commonly reimplemented",
    ),
    "classic-bilinear": Preset(
        config=replace(
            _CLASSIC,
            multipliers=(1, 2, 4, 8, 8),
            decoder_multipliers=(1, 1, 2, 4),
            up="bilinear-aligned",
        ),
        out_channels=1,
        size=512,
        source="classic with bilinear upsampling, the coarsest level and the decoder halved",
    ),
    "tutorial": Preset(
        config=UNetConfig(
            channels=64,
            multipliers=(1, 2, 4, 8, 8),
            decoder_multipliers=(1, 1, 2, 4),
            conv_bias=True,
            up="bilinear-aligned",
        ),
        out_channels=1,
        size=512,
        source="the variant that ISBI 2012 tutorials train with RMSprop on whole slices",
    ),
    "ddpm-cifar10": Preset(
        config=_DDPM,
        out_channels=3,
        size=32,
        source="Ho, Jain, Abbeel 2020, arXiv 2006.11239, appendix B",
    ),
    "ddpm-256": Preset(
        config=replace(_DDPM, multipliers=(1, 1, 2, 2, 4, 4), attention_levels=(4,), dropout=0.0),
        out_channels=3,
        size=256,
        source="Ho, Jain, Abbeel 2020, arXiv 2006.11239, appendix B (LSUN, CelebA-HQ)",
    ),
    "sd-v1": Preset(
        config=_SD_V1,
        out_channels=4,
        size=64,
        source="Rombach et al. 2022, arXiv 2112.10752; Stable Diffusion 1.1 to 1.5",
    ),
    "sd-v2": Preset(
        config=replace(
            _SD_V1, heads=None, head_channels=64, context_channels=1024, linear_projections=True
        ),
        out_channels=4,
        size=64,
        source="Stable Diffusion 2.0 and 2.1 (OpenCLIP context, linear projections)",
    ),
    "sdxl": Preset(
        config=replace(
            _SD_V1,
            multipliers=(1, 2, 4),
            attention_levels=(1, 2),
            heads=None,
            head_channels=64,
            context_channels=2048,
            transformer_depth=(1, 2, 10),  # the first is of a level without attention
            linear_projections=True,
            vector_channels=1280 + 6 * 256,  # the pooled text, and six numbers of sizes and crops
        ),
        out_channels=4,
        size=128,
        source="Podell et al. 2023, arXiv 2307.01952; Stable Diffusion XL base",
    ),
}
