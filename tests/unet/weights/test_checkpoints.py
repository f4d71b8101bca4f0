"""Other projects' segmentations start a training with what they computed, or are refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from segmentation.model import SegmentationUNet
from unet import PRESETS, UNet
from unet.errors import InputError
from unet.weights.checkpoints import read_checkpoint
from unet.weights.convert import to_layout
from unet.weights.start import read_start

IMAGE = torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(0))


def seasoned(model: nn.Module) -> nn.Module:
    """A network whose norms have seen images."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.bias):
                nn.init.normal_(values, 0, 0.3)
            for values in (module.running_var, module.weight):
                nn.init.uniform_(values, 0.5, 2)
    return model.eval()


@pytest.mark.parametrize("preset", ["classic", "classic-bilinear", "tutorial"])
@pytest.mark.parametrize("classes", [1, 2, 3])
def test_the_classic_network_is_the_same_function(preset: str, classes: int, tmp_path) -> None:
    torch.manual_seed(0)
    config = replace(PRESETS[preset].config, channels=2, in_channels=3)
    theirs = seasoned(SegmentationUNet(config, classes))
    state = to_layout(theirs.state_dict(), config, "classic", prefix="module.")
    file = tmp_path / "checkpoint_epoch5.pth"
    torch.save({"model": state, "epoch": 5} if classes == 1 else state, file)
    found = read_checkpoint(file)
    ours = SegmentationUNet(found.config, 1 if classes < 3 else 3)
    ours.load_state_dict(found.state)
    image = IMAGE[..., :61, :29]
    with torch.no_grad():
        wanted, got = theirs(image), ours.eval()(image)
    wanted = wanted[:, 1:] - wanted[:, :1] if classes == 2 else wanted
    assert torch.allclose(got, wanted, atol=1e-6)
    assert found.info["normalisation"]["std"] == [255.0] * 3


class Smp(nn.Module):
    """The Unet of segmentation_models.pytorch with vgg13_bn and thin levels, by its own names."""

    def __init__(self, widths: Sequence[int], decoder: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((3, *widths), widths, strict=False):
            for channels in (before, width):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width)]
                layers += [nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        self.encoder, self.decoder = nn.Module(), nn.Module()
        self.encoder.features = nn.Sequential(*layers)
        deepest = widths[-1]
        self.decoder.center = nn.Sequential(*(self.convolved(deepest, deepest) for _ in "12"))
        self.decoder.blocks = nn.ModuleList()
        channels = deepest
        for width, skip in zip(decoder, [*widths[:0:-1], 0], strict=True):
            block = nn.Module()
            block.conv1 = self.convolved(channels + skip, width)
            block.conv2 = self.convolved(width, width)
            self.decoder.blocks.append(block)
            channels = width
        self.segmentation_head = nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1))

    @staticmethod
    def convolved(before: int, width: int) -> nn.Sequential:
        convolution = nn.Conv2d(before, width, 3, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())

    def features(self, x: Tensor) -> Tensor:
        kept = []
        for layer in self.encoder.features:
            if isinstance(layer, nn.MaxPool2d):
                kept.append(x)
            x = layer(x)
        x, kept = self.decoder.center(x), kept[1:]  # the finest one has no skip
        for block in self.decoder.blocks:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = torch.cat([x, kept.pop()], dim=1) if kept else x
            x = block.conv2(block.conv1(x))
        return x


WIDTHS, DECODER = (4, 6, 8, 10, 10), (8, 6, 6, 4, 2)


@pytest.mark.parametrize("decoder", [DECODER, WIDTHS[::-1]])
def test_smps_unet_with_vgg13_bn_gives_the_same_features(decoder, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = seasoned(Smp(WIDTHS, decoder))
    state = {f"model.{key}": value for key, value in theirs.state_dict().items()}
    aside = {"mean": torch.ones(1, 3, 1, 1), "model.classification_head.3.weight": torch.ones(2, 2)}
    torch.save({"state_dict": state | aside, "epoch": 3}, tmp_path / "last.ckpt")
    start = read_start(str(tmp_path / "last.ckpt"))
    trunk = UNet(start.config)
    trunk.load_state_dict({k.removeprefix("trunk."): v for k, v in start.read().items()})
    with torch.no_grad():
        assert torch.allclose(trunk.eval()(IMAGE), theirs.features(IMAGE), atol=1e-6)
    assert start.info["normalisation"]["mean"] == pytest.approx([123.675, 116.28, 103.53])
    half = {key: value.half() if value.ndim else value for key, value in state.items()}
    save_file(half, tmp_path / "half.safetensors")
    found = read_checkpoint(tmp_path / "half.safetensors").state
    assert {value.dtype for value in found.values()} == {torch.float32, torch.int64}


def changed(change: str) -> dict[str, Tensor]:
    """A state dict with no counterpart here."""
    torch.manual_seed(0)
    state = Smp(WIDTHS, DECODER).state_dict()
    weight = torch.ones(1, 1, 3, 3)
    if change == "resnet":
        state = {k: v for k, v in state.items() if not k.startswith("encoder.")}
        return state | {"encoder.conv1.weight": weight, "encoder.layer1.0.conv1.weight": weight}
    if change == "plus plus":
        state = {k: v for k, v in state.items() if not k.startswith("decoder.")}
        return state | {"decoder.blocks.x_0_0.conv1.0.weight": weight}
    if change == "scse":
        return state | {"decoder.blocks.0.attention1.attention.sSE.0.weight": weight}
    if change == "cut":
        config = replace(PRESETS["classic"].config, channels=2)
        state = to_layout(SegmentationUNet(config, 1).state_dict(), config, "classic")
        return {k: v for k, v in state.items() if not k.startswith("up4.conv")}
    return {"backbone.conv1.weight": weight, "classifier.4.weight": weight}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            "resnet",
            "has 5 there and 2 convolutional layers in its encoder, encoder.conv1.weight, en",
        ),
        ("plus plus", "and this one has 0 there"),
        ("scse", "unknown decoder.blocks.0.attention1"),
        ("cut", "lacks the convolution up4.conv.double_conv.3.weight"),
        ("other", "no network that starts a training here, with its 'backbone.conv1.weight'"),
    ],
)
def test_a_network_without_counterpart_is_refused_by_name(change, told, tmp_path) -> None:
    torch.save(changed(change), tmp_path / "best.pth")
    with pytest.raises(InputError, match=r"best\.pth") as caught:
        read_start(str(tmp_path / "best.pth"))
    assert told in str(caught.value)
    assert str(caught.value).count("best.pth") == 1


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("weights")
    (tmp_path / "bad.pt").write_bytes(b"\x80\x02cos\nsystem\n(S'true'\ntR.")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, told in (
        ("notes.txt", "is no checkpoint"),
        ("bad.pt", "pickle with code in it"),
        ("list.pt", "holds a list"),
    ):
        with pytest.raises(InputError, match=told):
            read_start(str(tmp_path / name))
