"""`load` and `Segmenter`: a trained model that is called with an image and gives its mask."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from segmentation.data.classes import IGNORE, ClassTable
from segmentation.data.depths import Depth, objects_from_depth
from segmentation.data.instances import INSTANCE_NAMES, instances_from_classes, without_small
from segmentation.data.normalisation import Normalisation, joint_normalisation, known_normalisation
from segmentation.data.regions import known_regions
from segmentation.data.slices import Layers, known_slices, near_page
from segmentation.export.bioimage import write_package
from segmentation.export.graph import exportable
from segmentation.model import SegmentationUNet
from segmentation.pictures import grey_or_rgb
from segmentation.predict import Predictor, Probability, Source, classes
from segmentation.uncertainty import disagreement_map, entropy_map
from unet.device import pick_device
from unet.errors import InputError, as_keywords
from unet.files.images import Blocks, image_info
from unet.files.mask_values import Value
from unet.files.pages import ALL, Array, ImageInfo, Reading, missing
from unet.files.rasters import open_raster
from unet.files.volumes import is_volume
from unet.training.options import Precision
from unet.weights.formats import Format
from unet.words import counted

Image: TypeAlias = "Array | Tensor | str | Path"  # or a batch of them


def load(
    *models: str | Path,
    device: str = "auto",
    tta: bool = False,
    threshold: float | None = None,
    min_size: int | None = None,
    tile: int = 1024,
    overlap: int = 128,
    precision: Precision = "auto",
) -> Segmenter:
    """A trained model to call; of several models, their mean.

    The masks are those that `unet predict-seg` writes with the same settings.

    Args:
        models: model folders, such as "runs/mine/model", or repositories on the Hugging Face Hub,
            such as "someone/cells".
        device: auto, or a torch device such as cpu, cuda or mps.
        tta: average over the mirrored and rotated versions of the image that the model was trained
            with, eight for micrographs: better, for as many times the time.
        threshold: probability above which a pixel is of the second of two classes; None: the
            model's.
        min_size: connected parts of fewer pixels take the class around them, and instances of fewer
            pixels are left out; None: 0, or for instances the size below which 1 in 100 instances
            of the training masks are.
        tile: larger images are predicted in tiles of at most that many pixels a side.
        overlap: pixels that neighbouring tiles share.
        precision: arithmetic of the network: fp32, bf16, fp16, or auto, which is bf16 on an NVIDIA
            GPU that supports it, else fp32.

    Raises:
        InputError: no usable model; models for other images or classes; a setting out of range.
    """
    if not models:
        raise InputError('load needs a model folder, such as load("runs/mine/model")')
    for name, value, least in (("tile", tile, 1), ("overlap", overlap, 0)):
        if value < least:
            raise InputError(f"{name}={value} must be at least {least}")
    with as_keywords("device", "precision"):
        loaded, table, found = load_models(models, device)
        predict = Predictor(loaded, tile=tile, overlap=overlap, symmetries=tta, precision=precision)
    return Segmenter(predict, table, found if threshold is None else threshold, min_size=min_size)


def load_models(
    folders: Sequence[str | Path], device: str = "auto"
) -> tuple[list[SegmentationUNet], ClassTable, float]:
    """Models for the same images and classes, their table, and the mean of their thresholds.

    Raises:
        InputError: no usable model, or models for other images or classes.
    """
    models: list[SegmentationUNet] = []
    tables: list[ClassTable] = []
    dtypes: list[str] = []
    for folder in folders:
        model = SegmentationUNet.from_pretrained(folder).to(pick_device(device)).float()
        for name in ("classes", "normalisation", "threshold"):
            if name not in model.info:
                raise InputError(
                    f"{folder} lacks '{name}' in its config.json: it was not saved by train-seg"
                )
        dtypes.append(known_normalisation(model.info).dtype)
        tables.append(ClassTable.from_dict(model.info["classes"]))
        threshold = model.info["threshold"]
        if type(threshold) not in (int, float) or not 0 <= threshold <= 1:
            raise InputError(
                f"{folder} has the threshold {threshold!r} in its config.json, which must be a "
                "number from 0 to 1"
            )
        models.append(model)
        if model.depth != models[0].depth or tables[-1].values != tables[0].values:
            raise InputError(
                f"{folder} knows the classes {tables[-1].values}, but {folders[0]} "
                f"{tables[0].values}: average models for the same classes"
            )
        known = [known_slices(m.info) for m in (model, models[0])]
        regions = [m.info.get("regions") for m in (model, models[0])]
        if regions[0] != regions[1]:
            raise InputError(
                f"{folder} knows other regions than {folders[0]}: average models for the same ones"
            )
        if known[0] != known[1]:
            raise InputError(
                f"{folder} takes {known[0]} slices together, but {folders[0]} {known[1]}: average "
                "models for the same images"
            )
        if dtypes[-1] != dtypes[0]:
            raise InputError(
                f"{folder} takes images of {dtypes[-1]}, but {folders[0]} of {dtypes[0]}: average "
                "models for the same images"
            )
    joint_normalisation(model.info for model in models)  # refuses different no-data values
    return models, tables[0], float(np.mean([float(m.info["threshold"]) for m in models]))


def smallest_object(models: Sequence[SegmentationUNet]) -> int:
    """Pixels of the smallest instance that counts, by the training masks; 0 if none know it.

    Raises:
        InputError: a damaged model.
    """
    known = [model.info.get("smallest_object", 0) for model in models]
    for value in known:
        if type(value) is not int or value < 0:
            raise InputError(
                f"a model has the smallest_object {value!r} in its config.json, which must be a "
                "whole number of 0 or more"
            )
    return int(np.mean(known))


def numbered(decided: NDArray[np.uint8], depth: Depth | None) -> NDArray[np.int32]:
    """Objects numbered from 1, 0 elsewhere: (H, W), of class indices, and the depth (H, W) or else
    a border among the classes.
    """
    if depth is None:
        return instances_from_classes(decided)
    return objects_from_depth(decided == 1, depth)


@dataclass(frozen=True)
class RasterSource:
    """An image as stored, normalised for each model as it is read.

    Attributes:
        pixels: (H, W, C), in memory, or mapped or read from a file, or several slices of such.
        nodata: the value of pixels where nothing was measured, if its file declares one.
    """

    pixels: Array | Blocks | Layers
    nodata: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        h, w = self.pixels.shape[:2]
        return h, w

    def read(self, rows: slice, columns: slice, model: SegmentationUNet) -> Tensor:
        normalisation = known_normalisation(model.info)
        return torch.from_numpy(normalisation(np.asarray(self.pixels[rows, columns]), self.nodata))

    def missing(self, normalisation: Normalisation, rows: slice = ALL) -> NDArray[np.bool_]:
        """Where (rows, W) nothing was measured."""
        return missing(np.asarray(self.shown[rows]), normalisation.nodata_of(self.nodata))

    @property
    def shown(self) -> Array | Blocks:
        """The image (H, W, C) to look at: without the slices next to it."""
        return self.pixels.middle if isinstance(self.pixels, Layers) else self.pixels


class Segmenter:
    """Trained models for the same classes, to be called with an image: `mask = segmenter(image)`.

    An image is

    - an array or tensor (H, W, C), or (H, W) for a model of one channel, or a batch of them, (N, H,
      W, C) or (N, H, W). Channels come last. For a model of one channel three axes are a batch (N,
      H, W), unless the last one is 1, which are channels; if it is 3 or 4, as of colour images, the
      array is refused.
    - a path of an image file; the pages of a stack, and the slices of a volume, are a batch.

    A model of several slices takes a batch for the slices of one stack, and no single image.

    Pixels must have the type and the range of values of the training images: an image of another
    type has another range, and is refused. Types without a range of their own are converted: whole
    numbers such as int64 to the uint8 or uint16 of the model, if all of them fit; float16, float64
    and such whole numbers to float32. The model normalises the images itself.

    Args:
        predict: the models.
        table: of the classes of their masks.
        threshold: probability above which a pixel is of the second of two classes, or of a region.
        min_size: connected parts of fewer pixels become the class that surrounds them, and
            instances of fewer pixels are left out; None: 0, and of instances what the models know.

    Raises:
        InputError (a ValueError): a setting out of range; in calls, an image that does not fit.
    """

    def __init__(
        self,
        predict: Predictor,
        table: ClassTable,
        threshold: float,
        *,
        min_size: int | None = None,
    ) -> None:
        if not 0 <= threshold <= 1:
            raise InputError(f"threshold={threshold} must be from 0 to 1")
        if min_size is not None and min_size < 0:
            raise InputError(f"min_size={min_size} must be at least 0")
        self.predict, self.threshold = predict, threshold
        self.of_regions = known_regions(predict.models[0].info, table)
        self.table = self.of_regions.table if self.of_regions else table
        if min_size and self.of_regions:
            raise InputError(
                f"min_size={min_size} gives small parts to the class around them, which "
                "overlapping regions do not have: leave it out"
            )
        if min_size is None:
            min_size = smallest_object(predict.models) if self.instances else 0
        self.min_size = min_size

    @property
    def channels(self) -> int:
        """Channels of the images, each slice of a stack for itself."""
        return self.predict.models[0].config.in_channels // self.slices

    @property
    def slices(self) -> int:
        """Slices of a stack that the model takes together; 1: images are predicted one by one."""
        return known_slices(self.predict.models[0].info)

    @property
    def dtype(self) -> str:
        """Type of the images: "uint8", "uint16" or "float32"."""
        return self._normalisation.dtype

    @property
    def classes(self) -> tuple[Value, ...]:
        """The mask value of each class: a number, or a colour (R, G, B)."""
        return self.table.values

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each class; empty where they have none."""
        return self.table.names

    @property
    def instances(self) -> bool:
        """Whether the model was trained on masks that number each cell."""
        return self.predict.depth or self.table.names == INSTANCE_NAMES

    def __repr__(self) -> str:
        return (
            f"Segmenter({counted(len(self.predict.models), 'model')}, channels={self.channels}, "
            f"dtype={self.dtype!r}, classes={self.classes})"
        )

    def __call__(self, image: Image) -> Array:
        """The mask (H, W) with the values of the training masks, or (H, W, 3) where these were
        colours, in the smallest integer type; of a batch (N, H, W[, 3]).
        """
        return self._each(image, lambda source: self.table.decode(self.decided_in_bands(source)))

    def probability(self, image: Image) -> NDArray[np.float32]:
        """Probabilities from 0 to 1.

        Returns:
            (H, W) of the second of two classes; of more classes (H, W, K), in the order of
            `classes`, which add up to 1; of regions (H, W, R). Of a batch (N, H, W[, K]).
        """

        def find(source: Source) -> Probability:
            found = self.predict(source)
            return found[0] if len(found) == 1 else rearrange(found, "k h w -> h w k")

        return self._each(image, find)

    def uncertainty(self, image: Image) -> NDArray[np.float32]:
        """Entropy of the probabilities, as a share of its largest, log2 K bits of K classes; of
        regions it is refused.

        Returns:
            (H, W) from 0 (sure) to 1 (all classes as likely); of a batch (N, H, W).
        """
        self._check_classes()
        return self._each(image, lambda source: entropy_map(self.predict(source)))

    def _check_classes(self) -> None:
        if self.of_regions:
            raise InputError(
                "uncertainty needs classes that exclude each other, but this model predicts "
                "regions that overlap: take their probability"
            )

    def disagreement(self, image: Image) -> NDArray[np.float32]:
        """The part of `uncertainty` that is disagreement of the models, or of the symmetries (tta).

        Returns:
            (H, W) from 0 to 1, the mutual information of class and member; of a batch (N, H, W).

        Raises:
            InputError: there is a single prediction, which agrees with itself.
        """
        self._check_classes()
        if self.predict.members == 1:
            raise InputError(
                "a single prediction cannot disagree: load several models, or one with tta=True"
            )

        def find(source: Source) -> NDArray[np.float32]:
            found = self.predict(source, entropies=True)
            return disagreement_map(found[:-1], found[-1])

        return self._each(image, find)

    @property
    def region_names(self) -> tuple[str, ...]:
        """The name of each region; empty where the model knows classes."""
        return self.of_regions.names if self.of_regions else ()

    def regions(self, image: Image) -> NDArray[np.bool_]:
        """Where each region is: (H, W, R), in the order of `region_names`; of a batch (N, H, W, R).

        Raises:
            InputError: a model of classes.
        """
        known = self.of_regions
        if known is None:
            raise InputError("the model predicts classes, not regions that overlap: take the mask")

        def find(source: Source) -> Array:
            found = known.found(self.predict(source), self.threshold)
            return rearrange(found, "r h w -> h w r")

        return self._each(image, find)

    def labels(self, image: Image) -> NDArray[np.int32]:
        """Numbers (H, W) from 1 of the instances, 0 elsewhere; of a batch (N, H, W), each from 1.

        Of a model for two classes they are the 4-connected parts of the second one.

        Raises:
            InputError: a model for more classes that are no instances.
        """
        if not self.has_labels:
            raise InputError(
                "labels number the parts of the second of two classes, but the model has "
                f"{len(self.classes)} classes: take the mask, and number the parts of the class "
                "you mean"
            )

        def find(source: Source) -> Array:
            probability, depth = self.predict.found(source)
            return self.numbered(self.decided(probability, source), depth)

        return self._each(image, find)

    def export(
        self,
        to: Format | Literal["bioimageio"],
        out: str | Path,
        *,
        int8: Sequence[Image] = (),
        image: Image | None = None,
        name: str = "U-Net",
        authors: Sequence[str] = (),
        licence: str | None = None,
    ) -> None:
        """Writes the model as a file for other programs, which gives `probability` of all classes.

        Tiles, `threshold` and `min_size` are not inside. One model is written, not a mean.

        Args:
            to: onnx, torchscript, pt2, openvino, or bioimageio: a package of bioimage.io.
            out: the file, .onnx, .pt, .pt2, .xml or .zip; an earlier one is replaced.
            int8: of onnx: images like those of the training, by which the convolutions are
                quantised to 8-bit integers.
            image: of a package: for its test and its cover; of a batch the first.
            name, authors, licence: of a package; see `segmentation.export.bioimage.write_package`.

        Raises:
            InputError: several models; another ending; a package that is not installed.
        """
        if len(self.predict.models) > 1:
            raise InputError(
                f"{len(self.predict.models)} models cannot be exported as one: load and export "
                "each of them"
            )
        (model,) = self.predict.models
        if to != "bioimageio":
            samples = [pixels for one in int8 for pixels in self._pixels(one)]
            planes = [rearrange(p.astype(np.float32), "h w c -> c h w") for p in samples]
            exportable(model).write(to, Path(out), [torch.from_numpy(p) for p in planes])
            return
        if image is None:
            raise InputError("a package needs an image like the training images: give image=")
        if int8:
            raise InputError("8-bit integers are for onnx alone, not for bioimageio")
        pixels = self._pixels(image)[0]
        write_package(model, Path(out), pixels, name=name, authors=authors, licence=licence)

    def _pixels(self, image: Image) -> list[Array]:
        """The images (H, W, C) of a call, checked and in the type of the training images."""
        sources, _ = self.sources(image)
        return [np.ascontiguousarray(source.pixels[:, :]) for source in sources]

    @property
    def has_labels(self) -> bool:
        """Whether it is clear which parts `labels` numbers."""
        return self.instances or len(self.classes) == 2

    def decided(
        self, probability: Probability, source: Source, rows: slice = ALL
    ) -> NDArray[np.uint8]:
        """Class indices (rows, W) of what `predict` gives for an image, or for rows of it.

        Where the image holds no data they are IGNORE, if the training masks had such a value.
        """
        return self._cleaned(classes(probability, self.threshold, self.of_regions), source, rows)

    def _cleaned(
        self, found: NDArray[np.uint8], source: Source, rows: slice = ALL
    ) -> NDArray[np.uint8]:
        """Of instances it is whole ones that are too small, once they are numbered."""
        if not self.instances:
            found = without_specks(found, self.min_size)
        if self.table.ignore_value is None or not isinstance(source, RasterSource):
            return found
        return np.where(source.missing(self._normalisation, rows), np.uint8(IGNORE), found)

    def picture(self, source: RasterSource, step: int = 1) -> NDArray[np.uint8]:
        """An image (H, W, 3) to look at, or each `step`-th pixel of it."""
        shown = np.asarray(source.shown[::step, ::step])
        return grey_or_rgb(shown, self._normalisation.nodata_of(source.nodata))

    @property
    def _normalisation(self) -> Normalisation:
        return joint_normalisation(model.info for model in self.predict.models)

    @property
    def reading(self) -> Reading:
        """How the files of the training images were read; a model of RGB takes grey ones, too."""
        info = self.predict.models[0].info
        rgb = self.channels == 3 and not info.get("channel_names")
        return replace(Reading.from_dict(info.get("reading", {})), rgb=rgb)

    def numbered(self, decided: NDArray[np.uint8], depth: Depth | None) -> NDArray[np.int32]:
        """What `labels` gives, of class indices (H, W) and what `Predictor.found` gives."""
        if self.instances:
            return without_small(numbered(decided, depth), self.min_size)
        return np.asarray(ndimage.label(decided == 1)[0], np.int32)

    def decided_in_bands(self, source: Source) -> NDArray[np.uint8]:
        """`decided` of an image whose probabilities are never in memory as a whole."""
        bands = [
            classes(band, self.threshold, self.of_regions) for _, band in self.predict.bands(source)
        ]
        return self._cleaned(np.concatenate(bands), source)

    def _each(self, image: Image, find: Callable[[Source], Array]) -> Array:
        """What `find` gives for the image, or for each of a batch."""
        sources, batched = self.sources(image)
        found = [find(source) for source in sources]
        return np.stack(found) if batched else found[0]

    def sources(self, image: Image) -> tuple[Iterator[RasterSource], bool]:
        """The images of a call, for `predict` and `decided`, and whether they are a batch.

        Raises:
            InputError: an image that does not fit.
        """
        get: Callable[[int], Array | Blocks]
        if isinstance(image, (str, Path)):
            info, get = self._pages(Path(image))
            batched = info.pages > 1
        else:
            pages, batched = _as_batch(_as_array(image), self.channels)
            pages = _converted(pages, self.dtype, self._normalisation.nodata)
            count, h, w, _ = pages.shape
            info = ImageInfo(
                height=h, width=w, channels=self.channels, dtype=self.dtype, pages=count
            )
            get = pages.__getitem__
        if self.slices > 1 and not batched:
            raise InputError(
                f"the model takes {self.slices} neighbouring slices together, but this is a "
                "single image: give its stack"
            )
        return (
            RasterSource(self._with_near(get, i, info), info.nodata) for i in range(info.pages)
        ), batched

    def _with_near(
        self, get: Callable[[int], Array | Blocks], page: int, info: ImageInfo
    ) -> Array | Blocks | Layers:
        """A page, with those next to it where the model takes them together."""
        if self.slices == 1:
            return get(page)
        return Layers([get(i) for i in near_page(page, info, self.slices)])

    def _pages(self, path: Path) -> tuple[ImageInfo, Callable[[int], Array | Blocks]]:
        """What a file is, and its images (H, W, C), read one by one."""
        if path.is_dir() and not is_volume(path):
            raise InputError(
                f"{str(path)!r} is a folder: give one of its images, or label all of them with "
                "unet predict-seg"
            )
        reading = self.reading
        info = image_info(path, reading)
        self.check(info, repr(str(path)))

        def get(page: int) -> Array | Blocks:
            return open_raster(path, None if info.pages == 1 else page, info, reading)

        return info, get

    def check(self, info: ImageInfo, where: str) -> None:
        """Refuses an image of other channels or another type than the training images.

        Raises:
            InputError: says both, by name where channels have names.
        """
        known = tuple(self.predict.models[0].info.get("channel_names") or ())
        if (info.channels, info.dtype) != (self.channels, self.dtype):
            some = f" ({', '.join(info.names)})" if info.names else ""
            trained = f" ({', '.join(known)})" if known else ""
            cures = []
            if info.channels > self.channels:
                cures = ["choose among its channels with --channels"]
            elif "I" in info.axes and info.pages == self.channels > 1:
                cures = ["if its pages are channels, say so with --axes CYX"]
            elif info.channels != self.channels:
                cures = ["give a file that has all of these channels"]
            if info.dtype != self.dtype:
                cures.append(f"give it in {self.dtype}, with values as in the training images")
            raise InputError(
                f"{where} has {counted(info.channels, 'channel')}{some} of {info.dtype}, but the "
                f"training images have {self.channels}{trained} of {self.dtype}: "
                f"{', and '.join(cures)}"
            )
        if known and info.names and known != info.names:
            raise InputError(
                f"{where} has the channels {', '.join(info.names)}, but the training images have "
                f"{', '.join(known)}: choose and order them with --channels"
            )


def _as_array(image: object) -> Array:
    if isinstance(image, Tensor):
        try:
            plain = image.detach().float() if image.dtype == torch.bfloat16 else image.detach()
            return plain.cpu().numpy()
        except (RuntimeError, TypeError) as error:
            raise InputError(
                f"a tensor of {image.dtype} on {image.device} has no values that an array can "
                "hold: give a dense tensor of numbers"
            ) from error
    if isinstance(image, np.ndarray):
        return image
    raise InputError(
        f"an image is a NumPy array, a torch tensor or a path, not {type(image).__name__}: convert "
        "it with np.asarray(image), and several of one size with np.stack(images)"
    )


def _as_batch(image: Array, channels: int) -> tuple[Array, bool]:
    """An image or a batch as (N, H, W, C), and whether it was a batch; see `Segmenter`."""
    shape = image.shape
    wanted = f"(H, W, {channels}) or a batch (N, H, W, {channels})"
    if channels == 1:
        wanted = "(H, W), (H, W, 1) or a batch (N, H, W), (N, H, W, 1)"
    kind = {1: "grey images (1 channel)", 3: "RGB images (3 channels)"}.get(
        channels, f"images of {channels} channels"
    )
    cure = f"an image has the shape {wanted}"
    if not image.size:
        raise InputError(f"the image has the shape {shape}, so it holds no pixel: {cure}")
    if image.ndim == 4 and shape[3] == channels:
        return image, True
    if image.ndim == 3 and shape[2] == channels:
        return image[None], False
    if channels == 1 and image.ndim == 2:
        return image[None, :, :, None], False
    if channels == 1 and image.ndim == 3 and shape[2] not in (3, 4):
        return image[..., None], True
    if image.ndim == 2 and channels == 3:
        cure = "give np.stack([image] * 3, axis=-1) if the training images were as grey as this one"
    elif image.ndim in (3, 4) and shape[-1] == 4 and channels == 3:
        cure = "leave out the fourth channel, such as alpha, with image[..., :3]"
    elif image.ndim in (3, 4) and shape[-3] == channels:
        cure = "the channels come last, so give np.moveaxis(image, -3, -1)"
    elif image.ndim in (3, 4) and channels == 1 and shape[-1] in (3, 4):
        cure = "give one channel, such as image[..., 0]"
        if image.ndim == 3:
            cure += f", or image[..., None] if it is a batch of images {shape[2]} pixels wide"
    raise InputError(f"an image of shape {shape} does not fit a model for {kind}: {cure}")


def _converted(pixels: Array, dtype: str, nodata: float | None = None) -> Array:
    """Pixels in the type that the model takes, as `Segmenter` says; NaN only if it is no data."""
    given, wanted = pixels.dtype, np.dtype(dtype)
    # uint8 and uint16 are ranges of values, whatever the values; the other integers are none.
    whole = given.kind in "iu" and given.name not in ("uint8", "uint16")
    if wanted.kind == "f" and (whole or given.kind == "f"):
        with np.errstate(over="ignore"):
            found = pixels.astype(wanted, copy=False)
        gaps = nodata is not None and math.isnan(nodata)
        if (np.isfinite(found) | (np.isnan(found) & gaps)).all():
            return found
        raise InputError(
            f"the image of {given} holds NaN, infinite or too large values: replace them, such as "
            "with np.nan_to_num(image)"
        )
    if given.name == dtype or (whole and pixels.min() >= 0 and pixels.max() <= _white(wanted)):
        return pixels.astype(wanted, copy=False)  # in the byte order of this machine
    values = f" from {pixels.min():g} to {pixels.max():g}" if given.kind in "iuf" else ""
    raise InputError(
        f"the image holds {given}{values}, but the training images were {dtype}: "
        f"{_cure(pixels, wanted)}"
    )


def _white(dtype: np.dtype[Any]) -> int:
    return int(np.iinfo(dtype).max)


def _cure(pixels: Array, wanted: np.dtype[Any]) -> str:
    """How to mend an image whose type is not the wanted one."""
    given, convert = pixels.dtype, f"astype(np.{wanted})"
    if given.kind not in "iuf":
        return f"give image.{convert} * white, with the value that white had in these"
    if wanted.kind == "f":
        return f"give image.{convert} if they had these values, else scale it as they were"
    white, low, high = _white(wanted), pixels.min(), pixels.max()
    if given.kind == "f" and not (np.isfinite(low) and np.isfinite(high)):
        return "replace what is NaN or infinite"
    if given.kind == "f" and low >= 0 and high <= 1:
        return f"give (image * {white}).round().{convert}"
    if given.name == "uint8":
        return f"give image.{convert} * 257, of which {white} is white"
    if low >= 0 and high <= white:
        rounded = "image.round()" if given.kind == "f" else "image"
        return f"give {rounded}.{convert} if {white} is white in it, else scale it to that first"
    return f"scale it to values from 0 to {white}, as theirs, and give it as np.{wanted}"


def without_specks(found: NDArray[np.uint8], min_size: int) -> NDArray[np.uint8]:
    """Classes (H, W) whose 4-connected parts of fewer pixels took the class most around them."""
    if min_size < 2:
        return found
    found = found.copy()
    for value in np.unique(found):
        parts, count = ndimage.label(found == value)
        sizes = np.bincount(parts.ravel(), minlength=count + 1)
        boxes = ndimage.find_objects(parts)
        for i in np.flatnonzero(sizes[1:] < min_size):
            rows, columns = (slice(max(s.start - 1, 0), s.stop + 1) for s in boxes[i])
            part = parts[rows, columns] == i + 1
            ring = ndimage.binary_dilation(part) & ~part
            if ring.any():
                around = np.bincount(found[rows, columns][ring]).argmax()
                found[rows, columns][part] = around
    return found
