"""Prediction of images of any size: overlapping tiles, symmetries, ensembles.

An image goes through as a whole where it fits into one tile. A larger one is predicted in bands of
overlapping tiles (arXiv 1505.04597, fig. 2), in memory that does not grow with its height.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from segmentation.data.augment import mirror
from segmentation.data.depths import Depth
from segmentation.data.regions import Regions
from segmentation.model import SegmentationUNet
from segmentation.uncertainty import entropy
from unet.device import computing_in, trained_precision
from unet.errors import InputError
from unet.geometry import input_size, output_size, receptive_radius
from unet.layers import ConvBlock
from unet.memory import give_back, ran_out_of_memory
from unet.training.options import Precision

Probability = NDArray[np.float32]


class Source(Protocol):
    """An image that is read a rectangle at a time."""

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        ...

    def read(self, rows: slice, columns: slice, model: SegmentationUNet) -> Tensor:
        """(C, rows, columns), float32, normalised for that model."""
        ...


@dataclass(frozen=True)
class TensorSource:
    """A normalised image (C, H, W) that is in memory."""

    image: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        h, w = self.image.shape[-2:]
        return h, w

    def read(self, rows: slice, columns: slice, model: SegmentationUNet) -> Tensor:
        return self.image[:, rows, columns]


@dataclass(frozen=True)
class _Part:
    """A rectangle of an image as an image of its own."""

    whole: Source
    rows: slice
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    def read(self, rows: slice, columns: slice, model: SegmentationUNet) -> Tensor:
        top, left = self.rows.start, self.columns.start
        return self.whole.read(
            slice(rows.start + top, rows.stop + top),
            slice(columns.start + left, columns.stop + left),
            model,
        )


class Predictor:
    """Class probabilities of one model or the mean of several, and depth if they give it.

    Args:
        models: models for the same classes. Copies of them predict, in evaluation mode.
        tile: largest side of the tiles in pixels, rounded down to a multiple of the models' stride.
            Images up to this size are predicted whole, larger ones in tiles as equal as may be.
            Where memory runs out, smaller tiles are taken from then on, which is said on stderr.
        overlap: pixels that neighbouring tiles share. Where it is at least twice the receptive
            radius, tiles give what the whole image gives; below, they are blended linearly.
        symmetries: average over the symmetries of a square (test-time augmentation) that each
            model was trained with; all eight where it does not say.
        precision: of the models' arithmetic; auto: see `unet.device.trained_precision`; fp32: that
            of the weights, or of an autocast around.

    Raises:
        InputError: no model; models that differ in channels or classes; an unknown precision; an
            overlap of more than half a tile.
    """

    def __init__(
        self,
        models: Sequence[SegmentationUNet],
        *,
        tile: int = 1024,
        overlap: int = 128,
        symmetries: bool = False,
        precision: Precision = "fp32",
    ) -> None:
        if not models:
            raise InputError("a prediction takes one model or more, and none is given")
        first = _shape(models[0])
        for model in models:
            if (theirs := _shape(model)) != first:
                raise InputError(f"a model with {theirs} cannot be averaged with one with {first}")
        self.models = [folded(model) for model in models]
        self.symmetries = [trained_symmetries(model) if symmetries else (0,) for model in models]
        self.temperatures = [temperature(model) for model in models]
        self.depth, self.overlapping = models[0].depth, models[0].overlapping
        self.kinds = 1 if self.depth else models[0].out_channels  # probabilities of a pixel
        self.device = next(models[0].parameters()).device
        self.dtype = trained_precision(precision, self.device)
        # Tiles start at multiples of the stride, so that pooling meets the same pixels as in the
        # whole image.
        self.stride = stride = max(m.config.stride for m in models)
        self.tile = max(stride, tile // stride * stride)
        self.overlap = -(-overlap // stride) * stride
        self._smaller: Predictor | None = None  # what predicts once memory has run out
        if 2 * self.overlap > self.tile:
            raise InputError(
                f"tiles of {self.tile} pixels cannot overlap by {self.overlap}, more than half: "
                "choose a larger tile or a smaller overlap"
            )
        self.radius = max(receptive_radius(m.config) for m in models)

    @property
    def members(self) -> int:
        """Predictions that are averaged: models, times the symmetries of each."""
        return sum(map(len, self.symmetries))

    def __call__(self, source: Source, *, entropies: bool = False) -> Probability:
        """Probabilities (K, H, W) of a whole image; a single one is that of class 1.

        Args:
            entropies: one channel more, the mean of the members' entropies, as a share of the
                largest: see `segmentation.uncertainty`.
        """
        return self.found(source, entropies=entropies)[0]

    def found(self, source: Source, *, entropies: bool = False) -> tuple[Probability, Depth | None]:
        """What the call gives, and the depth (H, W) of models that separate objects by it."""
        whole = self._outputs(source, entropies)
        return whole[: self.kinds + entropies], whole[-1] if self.depth else None

    def bands(
        self, source: Source, *, entropies: bool = False
    ) -> Iterator[tuple[int, Probability]]:
        """Finished bands from top to bottom: their first row, and probabilities (K, rows, W).

        Args:
            entropies: as in a call.
        """
        for top, band in self._bands(source, entropies):
            yield top, band[: self.kinds + entropies]

    def _channels(self, entropies: bool) -> int:
        """Probabilities, entropies where they are asked for, and the depth where there is one."""
        return self.kinds + entropies + self.depth

    def _outputs(self, source: Source, entropies: bool) -> NDArray[np.float32]:
        found = np.empty((self._channels(entropies), *source.shape), np.float32)
        for top, band in self._bands(source, entropies):
            found[:, top : top + band.shape[1]] = band
        return found

    def _bands(self, source: Source, entropies: bool) -> Iterator[tuple[int, NDArray[np.float32]]]:
        height, width = source.shape
        rows, columns = self._spans(height), self._spans(width)
        rectangles = [(slice(*r), slice(*c)) for r in rows for c in columns]
        tiles = self._tiles(source, rectangles, entropies)
        carried: Probability | None = None
        for i, (top, bottom) in enumerate(rows):
            band = np.zeros((self._channels(entropies), bottom - top, width), np.float32)
            vertical = self._weights(rows, i)[:, None]
            for j, (left, right) in enumerate(columns):
                band[:, :, left:right] += next(tiles) * vertical * self._weights(columns, j)
            if carried is not None:
                band[:, : carried.shape[1]] += carried
            end = rows[i + 1][0] if i + 1 < len(rows) else bottom
            carried = band[:, end - top :]
            yield top, band[:, : end - top]

    def _spans(self, n: int) -> list[tuple[int, int]]:
        """First pixel and end of each tile along an axis."""
        if n <= self.tile:
            return [(0, n)]
        new = n - self.overlap  # pixels that the tiles share out among them, as equally as may be
        count = -(-new // (self.tile - self.overlap))
        step = max(self.overlap, -(-new // (count * self.stride)) * self.stride)
        return [(start, min(start + step + self.overlap, n)) for start in range(0, new, step)]

    def _weights(self, spans: list[tuple[int, int]], i: int) -> NDArray[np.float32]:
        """Weights of a tile along an axis; those of all tiles at a pixel add up to 1."""
        weights = np.ones(spans[i][1] - spans[i][0], np.float32)
        if self.overlap and i > 0:
            weights[: self.overlap] = self._ramp()
        if self.overlap and i + 1 < len(spans):
            weights[-self.overlap :] = 1 - self._ramp()
        return weights

    def _ramp(self) -> NDArray[np.float32]:
        """From 0 to 1 over the overlap; flat where only one of the two tiles sees enough."""
        margin = min(self.radius, self.overlap // 2 - 1)
        x = (np.arange(self.overlap) + 0.5 - margin) / (self.overlap - 2 * margin)
        return np.clip(x, 0, 1).astype(np.float32)

    def _tiles(
        self, source: Source, rectangles: Sequence[tuple[slice, slice]], entropies: bool = False
    ) -> Iterator[Probability]:
        """Mean probabilities (K, h, w) of each rectangle in turn, and entropies if asked for.

        A GPU computes one while the next is read and the one before is blended.
        """
        waiting: Tensor | None = None
        for rows, columns in rectangles:
            images = [_with_context(model, source, rows, columns) for model in self.models]
            ready = None if waiting is None else waiting.cpu()
            waiting = self._tile(source, rows, columns, images, entropies)
            if ready is not None:
                yield ready.numpy()
        if waiting is not None:
            yield waiting.cpu().numpy()

    def _tile(
        self,
        source: Source,
        rows: slice,
        columns: slice,
        images: Sequence[Tensor],
        entropies: bool,
    ) -> Tensor:
        """Probabilities of a rectangle, in smaller tiles where memory runs out."""
        if self._smaller is None:
            try:
                size = rows.stop - rows.start, columns.stop - columns.start
                return self._whole(images, *size, entropies)
            except Exception as error:
                side = self.tile // 2 // self.stride * self.stride
                if not ran_out_of_memory(error) or side < 2 * self.stride:
                    raise
            print(f"memory ran out: tiles of {side} pixels instead of {self.tile}", file=sys.stderr)
            give_back(self.device)
            self._smaller = copy.copy(self)
            self._smaller.tile = side
            self._smaller.overlap = min(self.overlap, side // 2 // self.stride * self.stride)
        part = _Part(source, rows, columns)
        return torch.from_numpy(self._smaller._outputs(part, entropies))

    @torch.inference_mode()
    def _whole(self, images: Sequence[Tensor], h: int, w: int, entropies: bool) -> Tensor:
        """Mean over the models and the symmetries, as many at a time as fit into a tile."""
        total = torch.zeros(self._channels(entropies), h, w, device=self.device)
        for model, image, turned, warmth in zip(
            self.models, images, self.symmetries, self.temperatures, strict=True
        ):
            moved = image.to(self.device, next(model.parameters()).dtype)
            at_once = max(1, self.tile**2 // moved[0].numel())
            for turns in _alike(turned, moved, at_once):
                batch = torch.stack([_turned(moved, turn) for turn in turns])
                batch = batch.contiguous(memory_format=torch.channels_last)
                with computing_in(self.dtype, self.device):
                    logits = model(batch)
                found = self._activated(logits.float(), warmth, entropies)
                for turn, one in zip(turns, found, strict=True):
                    total += _turned_back(one, turn)[:, :h, :w] / len(turned)
        return total / len(self.models)

    def _activated(self, logits: Tensor, warmth: float, entropies: bool) -> Tensor:
        """Logits (B, channels, H, W) as what `_channels` says; the depth is as it is."""
        found = probabilities(logits[:, : self.kinds] / warmth, apart=self.overlapping)
        parts = [found, *([entropy(found)[:, None]] if entropies else []), logits[:, self.kinds :]]
        return torch.cat(parts, dim=1)


def trained_symmetries(model: SegmentationUNet) -> tuple[int, ...]:
    """The symmetries that a model was trained with, as `Augmentation.symmetries` numbers them.

    Raises:
        InputError: its config.json names others.
    """
    found = model.info.get("symmetries", list(range(8)))
    if not isinstance(found, list) or not found or any(type(n) is not int for n in found):
        raise InputError(f"the model's symmetries {found!r} are no list of numbers from 0 to 7")
    if not set(found) <= set(range(8)):
        raise InputError(f"the model's symmetries {found!r} are not from 0 to 7")
    return tuple(sorted(set(found)))


def temperature(model: SegmentationUNet) -> float:
    """The divisor of a model's logits before they become probabilities; 1 unless calibrated.

    Raises:
        InputError: its config.json gives no positive number.
    """
    found = model.info.get("temperature", 1.0)
    if type(found) not in (int, float) or not 0 < found < math.inf:
        raise InputError(f"the model's temperature {found!r} in its config.json must be above 0")
    return float(found)


def folded(model: SegmentationUNet) -> SegmentationUNet:
    """A copy for prediction alone: the same function up to rounding, in less time and memory.

    It is in evaluation mode: batch normalisation goes into the weights of the convolution before
    it, activations overwrite their input, and weights are laid out channels_last.
    """
    model = copy.deepcopy(model).eval()
    for block in model.modules():
        if not isinstance(block, ConvBlock):
            continue
        for conv, norm in (("conv1", "norm1"), ("conv2", "norm2")):
            if isinstance(found := getattr(block, norm), nn.BatchNorm2d):
                setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), found))
                setattr(block, norm, nn.Identity())
        if isinstance(block.act, nn.SiLU):  # as a ReLU does in training, too
            block.act.inplace = True
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # stubs lack it


def probabilities(logits: Tensor, *, apart: bool = False) -> Tensor:
    """Class probabilities along dim -3: sigmoid of a single logit (of class 1), else softmax.

    Args:
        apart: they are of regions that may overlap: a sigmoid each.
    """
    return logits.sigmoid() if apart or logits.shape[-3] == 1 else logits.softmax(dim=-3)


def classes(
    probability: NDArray[np.floating], threshold: float = 0.5, regions: Regions | None = None
) -> NDArray[np.uint8]:
    """Class indices (H, W) of probabilities (K, H, W); a single one is class 1 above threshold; of
    regions what their label map has.
    """
    if regions is not None:
        return regions.label_map(probability, threshold)
    if probability.shape[0] == 1:
        return (probability[0] > threshold).astype(np.uint8)
    return probability.argmax(axis=0).astype(np.uint8)


def _turned(image: Tensor, turn: int) -> Tensor:
    """One of the eight symmetries of a square: quarter turns, mirrored from the fifth on."""
    return torch.rot90(image.flip(-1) if turn >= 4 else image, turn % 4, (-2, -1))


def _alike(turns: Sequence[int], image: Tensor, at_once: int) -> Iterator[Sequence[int]]:
    """The symmetries, in batches whose images have one shape."""
    lying = image.shape[-2] != image.shape[-1]
    kinds = [[t for t in turns if t % 2 == odd] for odd in (0, 1)] if lying else [turns]
    for chosen in kinds:
        for start in range(0, len(chosen), at_once):
            yield chosen[start : start + at_once]


def _turned_back(image: Tensor, turn: int) -> Tensor:
    image = torch.rot90(image, -(turn % 4), (-2, -1))
    return image.flip(-1) if turn >= 4 else image


def _shape(model: SegmentationUNet) -> str:
    """The properties that models must share for their outputs to be averaged, in words."""
    kind = "depth" if model.depth else "regions" if model.overlapping else "classes"
    return f"{model.config.in_channels} channels and {model.out_channels} outputs of {kind}"


def _with_context(model: SegmentationUNet, source: Source, rows: slice, columns: slice) -> Tensor:
    """The pixels from which a rectangle is predicted, mirrored beyond the image's border.

    The output begins at the rectangle's first pixel. It is larger where valid convolutions need
    more, and where the rectangle is no multiple of the stride: rotated images are then pooled like
    unrotated ones.
    """
    reads, picks = [], []
    for span, n in zip((rows, columns), source.shape, strict=True):
        context, stride = 0, model.config.stride
        size = -(-(span.stop - span.start) // stride) * stride
        if model.config.padding == "valid":
            size = input_size(model.config, size)
            context = (size - output_size(model.config, size)) // 2
        index = mirror(torch.arange(size) + span.start - context, n)
        first = int(index.min())
        reads.append(slice(first, int(index.max()) + 1))
        picks.append(index - first)
    image = source.read(reads[0], reads[1], model)
    if all(len(p) == n for p, n in zip(picks, image.shape[-2:], strict=True)):
        return image
    return image[:, picks[0][:, None], picks[1][None, :]]
