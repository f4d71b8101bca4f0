"""A trained segmentation as a file that other programs run: pixels in, probabilities out."""

from __future__ import annotations

import json

import torch
from torch import Tensor, nn

from segmentation.data.classes import ClassTable
from segmentation.data.normalisation import known_normalisation
from segmentation.data.regions import known_regions
from segmentation.data.slices import channel_names, known_slices
from segmentation.model import SegmentationUNet
from segmentation.predict import folded, probabilities
from unet.config import UNetConfig
from unet.geometry import input_size, output_size
from unet.weights.formats import Exportable

EXAMPLE = 3  # strides a side of the image that is traced, and half of one more


class PixelsToProbabilities(nn.Module):
    """All of a prediction but the tiles: what `Predictor` gives for an image that fits into one.

    Args:
        model: a copy of it predicts, without batch normalisation.
    """

    def __init__(self, model: SegmentationUNet) -> None:
        super().__init__()
        network = folded(model).cpu().float().requires_grad_(False)
        self.network = network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        saved = known_normalisation(model.info)
        self.nodata, self.floats = saved.nodata, saved.dtype == "float32"
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(saved.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(saved.std)[:, None, None])
        self.stride = model.config.stride
        self.kinds = 1 if model.depth else model.out_channels  # the depth of objects stays here
        self.overlapping = model.overlapping
        self.least, self.margin = _margins(model.config)

    def forward(self, image: Tensor) -> Tensor:
        """Pixels (N, C, H, W) as stored, in float32, to probabilities (N, K, H, W), which add up
        to 1 unless they are of regions that overlap.
        """
        h, w = image.shape[-2:]
        x = self.normalised(image)
        x = x[:, :, self._mirrored(h)[:, None], self._mirrored(w)[None]]
        logits = self.network(x)[:, : self.kinds]
        found = probabilities(logits, apart=self.overlapping)[..., :h, :w]
        return torch.cat([1 - found, found], dim=1) if found.shape[1] == 1 else found

    def normalised(self, image: Tensor) -> Tensor:
        """What `Normalisation` gives: 0 where nothing was measured."""
        x = (image - self.mean) / self.std
        if self.floats:
            x = x.masked_fill(image.isnan().any(dim=1, keepdim=True), 0)
        if self.nodata is not None and self.nodata == self.nodata:
            equal = image == torch.tensor(self.nodata)
            unknown = equal.any(1, keepdim=True) if self.floats else equal.all(1, keepdim=True)
            x = x.masked_fill(unknown, 0)
        return x

    def _mirrored(self, n: int) -> Tensor:
        """Indices of the pixels along an axis of n that the network is given.

        All in tensors: a number would be tied to the image that is traced.
        """
        size = (n + self.stride - 1) // self.stride * self.stride
        if self.margin:
            more = (size - self.least + self.stride - 1) // self.stride
            size = self.least + more * self.stride + 2 * self.margin
        last = torch.arange(n, device=self.mean.device)[-1:]
        period = (2 * last).clamp(min=1)
        index = (torch.arange(size, device=self.mean.device) - self.margin).abs() % period
        return torch.minimum(index, period - index)


def _margins(config: UNetConfig) -> tuple[int, int]:
    """The smallest output of valid convolutions, and the pixels that they take on each side."""
    size = input_size(config, 1)
    least = output_size(config, size)
    return least, (size - least) // 2


def exportable(model: SegmentationUNet) -> Exportable:
    """A model, as `load_models` gives it, with its classes, names and threshold as metadata."""
    config = model.config
    side = EXAMPLE * config.stride + config.stride // 2 + 1
    return Exportable(
        module=PixelsToProbabilities(model).eval(),
        inputs={"image": torch.full((2, config.in_channels, side, side + config.stride), 1.0)},
        axes={"image": {0: "batch", 2: "height", 3: "width"}},
        output="probabilities",
        metadata=metadata(model),
    )


def channels_of(model: SegmentationUNet) -> list[str]:
    """What the channels of the input are, where it is known; slices of a stack by their place."""
    slices = known_slices(model.info)
    names = model.info.get("channel_names") or []
    return list(channel_names(names, model.config.in_channels // slices, slices))


def metadata(model: SegmentationUNet) -> dict[str, str]:
    """What using the file needs, as texts; lists are JSON."""
    table = ClassTable.from_dict(model.info["classes"])
    regions = known_regions(model.info, table)
    saved = known_normalisation(model.info)
    training = model.info.get("training")
    run = training.get("run", []) if isinstance(training, dict) else []
    pairs = zip(saved.mean, saved.std, strict=True)
    scaling = ", ".join(f"(x - {mean:g}) / {std:g}" for mean, std in pairs)
    unknown = "" if saved.nodata is None else f"; pixels of the value {saved.nodata:g} become 0"
    return {
        "task": "segmentation",
        "input": (
            f"image: float32 (batch, {len(saved.mean)}, height, width), any height and width, with "
            f"the values of {saved.dtype} files as stored"
        ),
        "output": (
            f"probabilities: float32 (batch, {model.out_channels}, height, width), one channel "
            f"per region ({', '.join(regions.names)}), which may overlap"
            if regions
            else (
                f"probabilities: float32 (batch, {len(table.values)}, height, width), one channel "
                "per class, which add up to 1"
            )
        ),
        "dtype": saved.dtype,
        "classes": json.dumps(table.values),
        "names": json.dumps(table.names),
        "channel_names": json.dumps(channels_of(model)),
        **({"regions": json.dumps(regions.values)} if regions else {}),
        "threshold": repr(float(model.info["threshold"])),
        "decision": (
            "each region where its probability is above the threshold; a label map has the first "
            "value of the last one that is there"
            if regions
            else "the second class where its probability is above the threshold"
            if len(table.values) == 2
            else "the class of the largest probability"
        ),
        "normalisation": f"inside, by channel: {scaling}{unknown}",
        "training": "; ".join(line for line in run if isinstance(line, str)),
    }
