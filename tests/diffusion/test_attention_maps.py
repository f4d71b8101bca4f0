from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from einops import repeat
from torch import Tensor, nn
from torch.testing import assert_close

from diffusion.attention_maps import attention_figure, mass_inside, recorded_attention
from diffusion.model import DiffusionUNet
from diffusion.process.denoiser import Denoiser
from diffusion.process.guidance import Guided
from diffusion.process.samplers import finish, sample
from diffusion.process.schedule import NoiseSchedule
from unet.attention import SpatialTransformer
from unet.config import UNetConfig
from unet.errors import InputError
from unet.layers import Conditioning
from unet.model import UNet

S = NoiseSchedule()
CONFIG = UNetConfig(
    in_channels=3,
    channels=8,
    multipliers=(1, 2, 2),
    block="res",
    skips="block",
    norm="group",
    groups=4,
    time=True,
    attention_levels=(1, 2),
    middle_attention=True,
    attention="transformer",
    context_channels=6,
    heads=2,
)
LAYERS = 2 + 1 + 4  # of cross-attention: encoder, middle, decoder


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def model() -> DiffusionUNet:
    return DiffusionUNet(CONFIG, 3).eval().requires_grad_(False)


def inputs(count: int = 2, length: int = 5) -> dict[str, Tensor]:
    return {
        "x": torch.randn(count, 3, 12, 16),
        "t": torch.full((count,), 500),
        "context": torch.randn(count, length, 6),
    }


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_recording_changes_nothing_and_leaves_nothing(model: DiffusionUNet) -> None:
    given = inputs() | {"mask": torch.arange(5) < torch.tensor([[5], [3]])}
    before = model(**given)
    with recorded_attention(model) as record:
        during = model(**given)
        assert hooks(model) > LAYERS
    assert_close(during, before, rtol=0, atol=1e-5)
    assert hooks(model) == 0
    model(**given)
    assert len(record) == 1
    with pytest.raises(RuntimeError, match="stop"), recorded_attention(model):
        raise RuntimeError("stop")
    assert hooks(model) == 0


@pytest.mark.parametrize("size", [(12, 16), (13, 7), (1, 1)])
def test_at_each_pixel_the_words_share_the_attention(
    model: DiffusionUNet, size: tuple[int, int]
) -> None:
    given = inputs() | {"mask": torch.arange(5) < torch.tensor([[5], [3]])}
    with recorded_attention(model) as record:
        model(**given)
        model(**given)
    maps = record.maps(size)
    assert maps.shape == (2, 5, *size)
    assert maps.dtype == torch.float32
    assert maps.min() >= 0
    assert_close(maps.sum(1), torch.ones(2, *size))
    assert maps[1, 3:].abs().max() == 0  # padding
    assert maps[0].amin() > 0


def test_a_layer_that_sees_nothing_in_the_words_looks_at_all_alike(model: DiffusionUNet) -> None:
    for module in model.modules():
        if isinstance(module, SpatialTransformer):
            nn.init.zeros_(module.blocks[0].cross_attention.k.weight)
    with recorded_attention(model) as record:
        model(**inputs(length=4))
    assert_close(record.maps((6, 8)), torch.full((2, 4, 6, 8), 0.25))


class Signs(UNet):
    """A transformer whose pixels attend to token 0 where the image is positive, else to token 1."""

    def __init__(self) -> None:
        super().__init__(CONFIG)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        self.only = SpatialTransformer(8, CONFIG, 1)
        attention = self.only.blocks[0].cross_attention
        self.only.norm = self.only.proj_in = nn.Identity()
        self.only.blocks[0].norm2 = nn.Identity()
        nn.init.zeros_(self.only.blocks[0].self_attention.out.weight)
        nn.init.zeros_(self.only.blocks[0].self_attention.out.bias)
        nn.init.zeros_(attention.q.weight)
        nn.init.zeros_(attention.k.weight)
        attention.q.weight.data[[0, 4], 0] = 100.0  # of each head the first channel
        attention.k.weight.data[[0, 4], 0] = 100.0

    def forward(self, x: Tensor, t: Any, context: Tensor) -> Tensor:
        return self.only(repeat(x, "b 1 h w -> b c h w", c=8), Conditioning(context=context))


def test_a_known_attention_gives_its_picture() -> None:
    model = Signs().eval().requires_grad_(False)
    image = torch.where(torch.rand(1, 1, 5, 7) > 0.5, 1.0, -1.0)
    context = torch.zeros(1, 2, 6)
    context[0, :, 0] = torch.tensor([1.0, -1.0])
    with recorded_attention(model) as record:
        model(image, None, context)
        record.paused = True
        model(-image, None, context)
        record.paused = False
    positive = image[0, 0] > 0
    maps = record.maps((5, 7))
    assert_close(maps[0], torch.stack([positive, ~positive]).float())
    assert mass_inside(maps[0, 0], positive) == pytest.approx(1)
    assert mass_inside(maps[0, 1], positive) == pytest.approx(0)

    with recorded_attention(model) as record:
        for part in (image, image, image, -image):
            model(part, None, context)
    assert_close(record.maps((5, 7), slice(2))[0, 0], positive.float())
    assert_close(record.maps((5, 7), slice(-1, None))[0, 1], positive.float())
    assert_close(record.maps((5, 7))[0, 0], torch.where(positive, 0.75, 0.25))
    larger = record.maps((10, 14), slice(1))[0, 0]
    assert_close(larger.mean(), positive.float().mean(), rtol=0, atol=0.1)
    assert_close(larger[0, 0], positive[0, 0].float())


def test_layers_count_alike_whatever_their_size(model: DiffusionUNet) -> None:
    """One layer that attends to the first word alone has a share of 1 / LAYERS in the mean."""
    layers = [m for m in model.modules() if isinstance(m, SpatialTransformer)]
    assert len(layers) == LAYERS
    given = inputs(count=1, length=2)
    with recorded_attention(model) as record:
        model(**given)
        before = record.maps((3, 4))
        only = layers[0].blocks[0].cross_attention
        only.probabilities = lambda x, context, mask: torch.eye(2)[0].expand(1, 2, x.shape[1], 2)
        model(**given)
    change = record.maps((3, 4), slice(1, 2)) - before
    assert change[0, 0].amin() > 0
    assert change[0, 0].amax() < 1 / LAYERS
    assert_close(change[0, 0], -change[0, 1])


@pytest.mark.parametrize("null_length", [1, 8])
def test_under_guidance_it_is_the_prompts_attention(model: DiffusionUNet, null_length: int) -> None:
    """The same as without, though rows and tokens of the null prompt come and go."""
    given = inputs(length=5)
    prompt = {"context": given["context"]}
    null = {"context": torch.randn(1, null_length, 6)}
    plain = Denoiser(model, S, "eps")
    guided = Guided(plain, 3.0, null, interval=(0.0, S.level(700).sigma))
    run = sample(guided, given["x"], [900, 500], "ddim", conditioning=prompt)
    with recorded_attention(model, images=2) as record:
        seen = [step.x for step in run]
    assert len(record) == 2
    with recorded_attention(model) as expected:
        plain(given["x"], 900, **prompt)
        plain(seen[0], 500, **prompt)
    maps = record.maps((12, 16))
    assert_close(maps[:, :5], expected.maps((12, 16)), rtol=0, atol=1e-5)
    assert maps[:, 5:].abs().sum() == 0
    with recorded_attention(model, images=1) as first:
        finish(sample(guided, given["x"], [900, 500], "ddim", conditioning=prompt))
    assert_close(first.maps((12, 16)), maps[:1])


def test_half_precision_is_recorded_in_full(model: DiffusionUNet) -> None:
    given = inputs()
    with recorded_attention(model) as record:
        model(**given)
        with torch.autocast("cpu", torch.bfloat16):
            model(**given)
    exact, half = (record.maps((12, 16), slice(i, i + 1)) for i in range(2))
    assert half.dtype == torch.float32
    assert_close(half, exact, rtol=0, atol=0.02)


def test_chance_is_the_area() -> None:
    mask = torch.rand(20, 30) > 0.7
    assert mass_inside(torch.ones(20, 30), mask) == pytest.approx(mask.float().mean().item())
    assert mass_inside(torch.ones(20, 30), torch.zeros(20, 30).bool()) == 0


# -- figures


@pytest.mark.parametrize(("side", "channels"), [(16, 1), (32, 3), (512, 3)])
def test_the_figure_is_hot_where_the_map_is(side: int, channels: int) -> None:
    image = np.full((side, side, channels), 128, np.uint8)
    maps = torch.full((3, side, side), 0.01)  # a right half, a lower half, and padding
    maps[0, :, side // 2 :] = 0.4
    maps[1, side // 2 :] = 0.2
    figure = np.asarray(attention_figure(image, ["right", "low"], maps))
    assert figure.shape == (20 + 128 + 8, 3 * 132 + 4, 3)
    plain, right, low = (figure[24:152, left : left + 128, 0] for left in (4, 136, 268))
    assert (plain == 128).all()
    cold, hot = right[:, :60], right[:, 68:]
    assert cold.max() < 60 < 180 < hot.min()
    assert (right[:, 68:] == low[68:].T).all()  # each as bright, whatever its share
    titles = figure[4:24].min(axis=(0, 2))
    assert [titles[left : left + 128].min() < 100 for left in (4, 136, 268)] == [True] * 3


def test_many_words_take_more_lines() -> None:
    figure = attention_figure(np.zeros((8, 8, 3), np.uint8), ["$a$"] * 20, torch.rand(20, 8, 8))
    assert figure.size == (8 * 132 + 4, 3 * 152 + 4)


# -- mistakes


@pytest.mark.parametrize(
    "config",
    [
        UNetConfig(in_channels=3),
        UNetConfig(in_channels=3, attention="transformer", middle_attention=True, groups=8),
    ],
)
def test_a_network_without_text_is_refused(config: UNetConfig) -> None:
    with (
        pytest.raises(InputError, match="a model that reads text: this one has no cross-attention"),
        recorded_attention(UNet(config)),
    ):
        pass


def test_nothing_recorded_is_said(model: DiffusionUNet) -> None:
    with recorded_attention(model) as record:
        with pytest.raises(InputError, match="0 forward passes are recorded"):
            record.maps((4, 4))
        model(**inputs())
        with pytest.raises(InputError, match=r"1 forward passes are recorded, and slice\(3, None"):
            record.maps((4, 4), slice(3, None))


@pytest.mark.parametrize(
    ("words", "shape"), [(3, (2, 8, 8)), (2, (2, 8, 9)), (2, (2, 8)), (2, (2, 3, 8, 8))]
)
def test_a_figure_of_other_maps_is_refused(words: int, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=f"{words} words and an image of 8 x 8"):
        attention_figure(np.zeros((8, 8, 3), np.uint8), ["a"] * words, torch.ones(shape))


@pytest.mark.parametrize(
    ("heat", "mask", "says"),
    [
        (torch.zeros(2, 2), torch.ones(2, 2).bool(), "nothing attends to this token"),
        (torch.full((2, 2), torch.nan), torch.ones(2, 2).bool(), "nothing attends to this token"),
        (torch.ones(2, 2), torch.ones(2, 3).bool(), "of one size"),
        (torch.ones(2, 2), torch.ones(2, 2), r"of torch\.float32"),
    ],
)
def test_a_mass_of_nothing_is_refused(heat: Tensor, mask: Tensor, says: str) -> None:
    with pytest.raises(InputError, match=says):
        mass_inside(heat, mask)
