"""Images with masks: the pairs of a data folder.

Files, slices of stacks and arrays in memory all become a `Pair`, and are treated alike from there
on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from segmentation.data.classes import DTYPES
from segmentation.data.layouts import Match, find_layout
from segmentation.data.masks import joined
from segmentation.data.polygons import Drawing
from unet.errors import InputError
from unet.files.images import image_info, read_image, read_mask
from unet.files.mask_values import MaskCleaning, check_colours, joint_palette
from unet.files.pages import AS_STORED, Array, ImageInfo, Reading
from unet.files.volumes import flipped_axes


@dataclass(frozen=True, eq=False, kw_only=True)
class Pair:
    """One image and its mask: two files, a slice of two stacks, or two arrays.

    Attributes:
        image: several files are its channels in turn.
        mask: several files are the objects of a numbered mask; a drawing is drawn when it is read.
        info: of the image.
        page: index of the slice in the stacks, from 0.
        stack: the stack or volume that it is a slice of.
        flipped: whether slices, rows and columns of the mask's volume run the other way.
        around: the slices that are the image's channels in turn, of which it is the middle one.
        window: rows and columns of a part of the image.
        part: "train" or "val" where the folder says it.
        reading: what the user says about the image's file beyond what the file says.
        cleaning: what is done to the values of the mask.
        palette: of a mask of indices: red, green and blue of each in turn.
        colours: the palette's colours are the mask's values instead of the indices.
        nodata: the mask's value of pixels without a label, where its file declares one.
        instances: the mask numbers objects; so does a mask that is drawn.
        classes: names of mask values, where a file says them.
        regions: mask values of each region, where a file says them.
    """

    name: str
    image: Path | Array | tuple[Path, ...]
    mask: Path | Array | tuple[Path, ...] | Drawing
    info: ImageInfo
    page: int | None = None
    stack: str = ""
    flipped: tuple[bool, bool, bool] = (False, False, False)
    around: tuple[Pair, ...] = ()
    window: tuple[slice, slice] | None = None
    part: str = ""
    reading: Reading = AS_STORED
    cleaning: MaskCleaning = field(default_factory=MaskCleaning)
    palette: bytes | None = None
    colours: bool = False
    nodata: int | None = None
    instances: bool = False
    classes: Mapping[int, str] = field(default_factory=dict)
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def read_image(self) -> Array:
        """(H, W, C), as `unet.files.images.read_image`."""
        if self.around:
            image = np.concatenate([slice_.read_image() for slice_ in self.around], axis=2)
        elif isinstance(self.image, Path):
            image = read_image(self.image, self.page, self.reading)
        elif isinstance(self.image, tuple):
            image = np.concatenate([read_image(file, self.page) for file in self.image], axis=2)
        else:
            image = self.image if self.image.ndim == 3 else self.image[:, :, None]
        return image if self.window is None else image[self.window]

    def read_shown(self) -> Array:
        """(H, W, C) to look at: the image without its neighbours."""
        return replace(self, around=()).read_image()

    def read_mask(self) -> Array:
        """(H, W) or (H, W, 3), as `unet.files.images.read_mask`."""
        if isinstance(self.mask, tuple):
            mask = self.join_objects()[0]
        elif isinstance(self.mask, Drawing):
            mask = self.draw_objects()[0]
        elif isinstance(self.mask, Path):
            page, lossy = self._mask_page, bool(self.cleaning)
            mask = read_mask(self.mask, page, colours=self.colours, lossy=lossy)
            if any(self.flipped):
                mask = np.flip(
                    mask, tuple(axis for axis in (0, 1) if self.flipped[1 + axis])
                ).copy()
        else:
            mask = self.mask
        try:
            mask = self.cleaning(mask)
        except InputError as error:
            raise InputError(f"{self.where}: {error}") from error
        return mask if self.window is None else mask[self.window]

    def join_objects(self) -> tuple[Array, int, int]:
        """The numbered mask of several files; see `segmentation.data.masks.joined`."""
        assert isinstance(self.mask, tuple)
        parts = [read_mask(file, lossy=bool(self.cleaning)) for file in self.mask]
        for file, part in zip(self.mask, parts, strict=True):
            if part.shape[:2] != (self.info.height, self.info.width):
                raise InputError(
                    f"{str(file)!r} is {part.shape[0]} x {part.shape[1]}, but its image "
                    f"{self.info.height} x {self.info.width}"
                )
        return joined(parts)

    def draw_objects(self) -> tuple[Array, int, int]:
        """The numbers or the classes of what is drawn; see `segmentation.data.polygons.Drawing`."""
        assert isinstance(self.mask, Drawing)
        return self.mask.read(None if self.instances else self.classes)

    @property
    def source(self) -> tuple[str | int, int | None]:
        """The image itself, or the one that it is a part of."""
        known = isinstance(self.image, Path | tuple)
        return (str(self.image) if known else id(self.image)), self.page

    @property
    def files(self) -> list[Path]:
        """The files that it is read from."""
        parts = (part if isinstance(part, tuple) else (part,) for part in (self.image, self.mask))
        return [file for part in parts for file in part if isinstance(file, Path)]

    @property
    def where(self) -> str:
        """The mask's file, for messages."""
        if isinstance(self.mask, Drawing):
            return f"{self.name} in {str(self.mask.file)!r}"
        mask = self.mask[0].parent if isinstance(self.mask, tuple) else self.mask
        place = repr(str(mask)) if isinstance(mask, Path) else self.name
        return place if self.page is None else f"{place} page {self._mask_page}"

    @property
    def _mask_page(self) -> int | None:
        if self.page is None or not self.flipped[0]:
            return self.page
        return self.info.pages - 1 - self.page

    def meets(self, other: Pair) -> bool:
        """Whether this part of an image has a pixel in common with another one of it."""
        if self.window is None or other.window is None:
            return True
        pairs = zip(self.window, other.window, strict=True)
        return all(max(a.start, b.start) < min(a.stop, b.stop) for a, b in pairs)


def find_pairs(
    data: Path | None = None,
    images: Path | None = None,
    masks: Path | None = None,
    *,
    reading: Reading = AS_STORED,
    cleaning: MaskCleaning | None = None,
) -> list[Pair]:
    """Images and masks that belong together, in natural order; a stack gives a pair per slice.

    Args:
        data: a folder of images and one of masks (`image/ label/`, `images/ masks/`, nnU-Net's
            `imagesTr/ labelsTr/`, ...), or both side by side, `train/ val/` with one of these each,
            a folder per image with a file per object, polygons of COCO, labelme or YOLO, or ISBI
            2012's original stacks; see `segmentation.data.layouts`.
        images, masks: instead of `data`, two folders or two files, or a folder and COCO's JSON
            file.
        reading: how to read the images, beyond what their files say.
        cleaning: what is done to the values of the masks.

    Raises:
        InputError: no such folder; an image without mask or the reverse; sizes that differ;
            channels (but for grey images among RGB ones) or bit depths that differ over the set.
            Names the files.
    """
    layout = find_layout(data, images, masks)
    cleaning = cleaning or MaskCleaning()
    pairs: list[Pair] = []
    for match in layout.matches:
        if match.part == "stack":
            pairs += _stack(match, reading, cleaning)
            continue
        info = _image_info(match.image, reading, layout.channels)
        if isinstance(match.mask, Drawing):
            if info.pages > 1:
                raise InputError(
                    f"{str(match.image[0])!r} is a stack, but polygons are drawn on single images"
                )
            pairs.append(
                Pair(
                    name=match.name,
                    image=match.image[0],
                    mask=match.mask.of_size(info.height, info.width),
                    info=info,
                    part=match.part,
                    reading=reading,
                    cleaning=cleaning,
                    nodata=layout.ignore_value,
                    instances=layout.instances,
                    classes=layout.classes,
                )
            )
            continue
        of_mask = image_info(match.mask[0])
        if (info.height, info.width, info.pages) != (of_mask.height, of_mask.width, of_mask.pages):
            hint = ": save each mask in the size of its image"
            unsaid = "I" in info.axes or match.image[0].suffix.lower() == ".npy"
            if info.pages != of_mask.pages and unsaid and info.pages <= 8:
                hint = f": are its {info.pages} pages channels? Then give --axes CYX"
            raise InputError(
                f"{_size(info)} in {str(match.image[0])!r}, but {_size(of_mask)} in "
                f"{str(match.mask[0])!r}{hint}"
            )
        nodata = of_mask.nodata
        files = match.image
        if len(files) > 1:
            whole = replace(info, channels=len(files), names=layout.channels)
            chosen = reading.chosen(whole)
            files = files if chosen is None else tuple(files[i] for i in chosen)
        common = Pair(
            name=match.name,
            image=match.image[0] if len(match.image) == 1 else files,
            mask=match.mask[0] if not _of_objects(layout.instances, match) else match.mask,
            info=info,
            flipped=flipped_axes(match.image[0], match.mask[0])
            if len(match.mask) == 1
            else (False,) * 3,
            part=match.part,
            reading=reading,
            cleaning=cleaning,
            palette=of_mask.palette,
            nodata=int(nodata) if nodata is not None and nodata == nodata // 1 else None,
            instances=layout.instances,
            classes=layout.classes,
            regions=layout.regions,
        )
        if layout.ignore_value is not None:
            common = replace(common, nodata=layout.ignore_value)
        digits = len(str(info.pages - 1))
        for page in range(info.pages):
            if info.pages == 1:
                pairs.append(common)
            else:
                name, stack = f"{match.name}_{page:0{digits}d}", str(match.image[0])
                pairs.append(replace(common, name=name, page=page, stack=stack))
    pairs = alike(pairs)
    name, times = Counter(pair.name for pair in pairs).most_common(1)[0]
    if times > 1:
        raise InputError(f"{times} images are named {name!r}; rename all but one")
    return _with_palettes(pairs)


def pairs_from_arrays(
    images: ArrayLike,
    masks: ArrayLike,
    *,
    channels: Sequence[str] = (),
    classes: Sequence[str] = (),
) -> list[Pair]:
    """Pairs named "0", "1", ... of uint8, uint16 or float32 (N, H, W[, C]) and masks (N, H, W).

    Args:
        channels, classes: their names, of the mask values 0, 1, ...
    """
    images, masks = np.asarray(images), np.asarray(masks)
    count = images.shape[3] if images.ndim == 4 else 1
    known = count > 0 and len(channels) in (0, count) and images.dtype.name in DTYPES
    if images.ndim not in (3, 4) or images.shape[:3] != masks.shape or not known:
        raise InputError(
            f"{images.dtype} images {images.shape} and masks {masks.shape} do not fit: give "
            f"{', '.join(DTYPES)} (N, H, W) or (N, H, W, C), and (N, H, W)"
        )
    height, width = masks.shape[1:]
    info = ImageInfo(
        height=height,
        width=width,
        channels=count,
        dtype=images.dtype.name,
        names=tuple(channels),
    )
    names = dict(enumerate(classes))
    return [
        Pair(name=str(i), image=image, mask=mask, info=info, classes=names)
        for i, (image, mask) in enumerate(zip(images, masks, strict=True))
    ]


def kind(info: ImageInfo) -> str:
    """Channels and depth in words."""
    named = {1: "grey", 3: "RGB"}.get(info.channels, f"{info.channels} channels of")
    if info.names:
        return f"{', '.join(info.names)} {info.dtype}"
    return f"{named} {info.dtype}"


def _of_objects(instances: bool, match: Match) -> bool:
    return instances or (isinstance(match.mask, tuple) and len(match.mask) > 1)


def _image_info(files: Sequence[Path], reading: Reading, names: tuple[str, ...]) -> ImageInfo:
    """Of an image in one file, or in one for each channel."""
    if len(files) == 1:
        info = image_info(files[0], reading)
        return replace(info, names=names) if names and len(names) == info.channels else info
    infos = [image_info(file) for file in files]
    for file, info in zip(files, infos, strict=True):
        if (info.height, info.width, info.dtype, info.channels, info.pages) != (
            infos[0].height,
            infos[0].width,
            infos[0].dtype,
            1,
            infos[0].pages,
        ):
            raise InputError(
                f"{str(file)!r} is {kind(info)} {_size(info)}, but {str(files[0])!r} "
                f"{kind(infos[0])} {_size(infos[0])}: the channels of an image must be grey files "
                "of one size and type"
            )
    return reading.of(replace(infos[0], channels=len(files), names=names))


def _stack(match: Match, reading: Reading, cleaning: MaskCleaning) -> list[Pair]:
    """A stack of images beside a folder of masks, or the reverse: page i goes with file i."""
    assert isinstance(match.mask, tuple)
    one_image = len(match.image) == 1
    stack = image_info(match.image[0], reading) if one_image else image_info(match.mask[0])
    files = match.mask if one_image else match.image
    if stack.pages != len(files):
        name = match.image[0] if one_image else match.mask[0]
        raise InputError(
            f"{str(name)!r} has {stack.pages} pages, but there are {len(files)} files in "
            f"{str(files[0].parent)!r}: one for each page"
        )
    pairs = []
    for page, file in enumerate(files):
        alone = image_info(file) if one_image else image_info(file, reading)
        if (alone.height, alone.width, alone.pages) != (stack.height, stack.width, 1):
            raise InputError(
                f"{_size(alone)} in {str(file)!r}, but {stack.height} x {stack.width} in the stack"
            )
        masks = match.mask if one_image else match.image
        image = read_image(match.image[0], page, reading) if one_image else file
        mask = file if one_image else read_mask(match.mask[0], page if stack.pages > 1 else None)
        pairs.append(
            Pair(
                name=f"{match.name}_{page:0{len(str(len(masks) - 1))}d}",
                image=image,
                mask=mask,
                info=replace(stack if one_image else alone, pages=1),
                stack=str(match.image[0] if one_image else match.mask[0]),
                reading=reading,
                cleaning=cleaning,
                palette=alone.palette if one_image else stack.palette,
            )
        )
    return pairs


def alike(pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs whose images have the same channels and depth: grey ones among RGB ones become RGB.

    Raises:
        InputError: others that differ; names two files.
    """
    kinds = {(pair.info.channels, pair.info.names) for pair in pairs}
    found = list(pairs)
    if kinds == {(1, ()), (3, ())}:
        found = [as_rgb(pair) if pair.info.channels == 1 else pair for pair in pairs]
    for pair in found:
        _check_alike(pair, found[0])
    return found


def as_rgb(pair: Pair) -> Pair:
    """A grey image with its grey as red, green and blue."""
    reading, image = replace(pair.reading, rgb=True), pair.image
    if isinstance(image, np.ndarray):
        image = np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    return replace(pair, image=image, reading=reading, info=reading.of(pair.info))


def _check_alike(pair: Pair, first: Pair) -> None:
    info, wanted = pair.info, first.info
    where, other = (
        repr(str(p.image[0] if isinstance(p.image, tuple) else p.image))
        if not isinstance(p.image, np.ndarray)
        else p.name
        for p in (pair, first)
    )
    if (info.channels, info.dtype) != (wanted.channels, wanted.dtype):
        chosen = "" if info.channels == wanted.channels else ", or choose --channels that all have"
        raise InputError(
            f"{kind(info)} in {where}, but {kind(wanted)} in {other}; save all images alike{chosen}"
        )
    if info.names != wanted.names and sorted(info.names) == sorted(wanted.names):
        raise InputError(
            f"the channels are {', '.join(info.names)} in {where}, but {', '.join(wanted.names)} "
            f"in {other}: give them in one order, by name, with --channels"
        )


def _with_palettes(pairs: list[Pair]) -> list[Pair]:
    """If all palettes agree, the indices are the mask values, otherwise the colours are.

    Raises:
        InputError: colours must be the values, but one stands for two used indices.
    """
    if len({pair.palette for pair in pairs}) == 1:
        return pairs
    of_indices = [(p.palette, p.mask, p.page) for p in pairs if isinstance(p.mask, Path)]
    if len(of_indices) == len(pairs) and all(palette for palette, _, _ in of_indices):
        masks = ((palette, read_mask(file, page)) for palette, file, page in of_indices)
        if (palette := joint_palette(masks)) is not None:
            return [replace(pair, palette=palette) for pair in pairs]
    found = []
    for pair in pairs:
        if pair.palette is None or not isinstance(pair.mask, Path):
            found.append(pair)
            continue
        check_colours(pair.palette, read_mask(pair.mask, pair.page), pair.where)
        found.append(replace(pair, colours=True))
    return found


def _size(info: ImageInfo) -> str:
    return f"{info.height} x {info.width}" + (f", {info.pages} pages" if info.pages > 1 else "")
