"""Images to train a diffusion model on: a folder, an .npz, a stack, or `shapes`, read by one class.

Whatever the source, an image is decoded, its values are brought to levels from black to white, its
colours to those of the set, and its sides to one size, and it is kept that way if all of them fit;
of larger sets every image is read when it is needed. Networks see [-1, 1]: see
`diffusion.data.pixels`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from diffusion.data.conditions import Asked, Condition, find_condition, partners
from diffusion.data.masks import Coding, MaskCoding, find_masks
from diffusion.data.pixels import (
    WHOLE,
    Pixels,
    RangeFinder,
    ValueRange,
    as_bytes,
    as_levels,
    as_tensor,
    resized,
)
from diffusion.data.sources import HowToRead, open_source
from unet.errors import InputError
from unet.files.pages import ImageInfo
from unet.symmetries import Symmetries, find_symmetries
from unet.training.batches import Key, sample_rng
from unet.words import counted

CACHE_BYTES = 2**31  # images that together take no more are kept in memory, in each process
CHECKED = 20_000  # files whose headers are read before training; of more, as many spread evenly
RANGED_PIXELS = 2**28  # values that say what range images use
CHECKED_PIXELS = 2**28  # up to so many in all, these files are decoded before training, too
CROP = 64  # side of a crop where no size is given
LEAST_VAL, MOST_VAL = 16, 1000  # held-out images where a share is asked for


class DiffusionData:
    """Training and held-out images, with their classes and captions where there are any.

    An index stands for an image; with crops, for one of a grid of crops, which training replaces by
    one at a random place in the same image. Of up to 20,000 files with 2^28 pixels in all, every
    one is decoded here, so that a bad one is found before training; others when they are needed.

    Args:
        data: a folder of images, searched with its subfolders: these are the classes where every
            image lies in one of two or more, and text files beside the images, a `metadata.jsonl`
            or a `metadata.csv` give captions (`diffusion.data.captions`); an .npz with `images`
            (N, H, W) or (N, H, W, C) and perhaps `labels` (N,); a TIFF or NPY stack; "shapes":
            drawn (`diffusion.data.shapes`).
        size: side in pixels to which images are resized (the shorter side) and cropped (at the
            centre), or of a crop; None: as they are, which must be alike; crops 64, shapes 32.
        channels: 1 for grey, 3 for RGB, 4 for RGB with alpha; None: as they are, RGB if any is.
        crops: cut parts out of large images instead of resizing them.
        flips: mirror left to right at random; None: where the training images cannot be told from
            their mirror images, and never with `captions` or `classes`, in which left may mean
            something.
        val: held-out images: below 1 a share, but at least 16 (of a small set a quarter) and at
            most 1,000; from 1 on a number. The seed chooses them; with crops, the last images, or
            of a single one the lowest rows of crops.
        skip_bad: leave out files that cannot be read, saying so once, instead of stopping.
        captions: samples have captions, and the data must.
        classes: the data must have classes; samples have labels wherever there are classes.
        how: axes, channels, no data, background and captions of image files; None: as they say
            themselves, over white (with 4 channels: alpha is one of them).
        condition: what each picture is made from: a recipe or a folder, see
            `diffusion.data.conditions`; or that of a model.
        pictures: the folder of a model's condition, where it is of one.
        masks: the files are masks, of which each class becomes a code: see `diffusion.data.masks`.
        joint: a folder of masks with the images' names, whose codes lie behind the channels of the
            image; `masks` says which codes.
        ranges: the values of each type that become black and white; None: those that are used.
        fine: keep the precision of 16 bits and of floats, where all images have the one or the
            other; else, and of a set of several types, images are brought to 8 bits.
        seed: of the choice of held-out images, and of the pictures of "shapes".

    Attributes:
        size, channels: height and width, and channels, of every image, codes among them.
        codes: how many of the channels, the last ones, are codes of a mask.
        dtype: uint8, uint16 or float32: the type of the images as they are kept.
        classes: their names, empty where there are none; `labels` (N,) are indices into them.
        train, val: indices, in random order (with crops, in their order in the images).

    Raises:
        InputError: a file that is missing, damaged or of another size; too few images; no such
            classes or captions; arguments that do not go together. Methods raise it for files.
    """

    def __init__(
        self,
        data: str | Path,
        *,
        size: int | None = None,
        channels: int | None = None,
        crops: bool = False,
        flips: bool | None = None,
        val: float = 0.02,
        skip_bad: bool = False,
        captions: bool = False,
        classes: bool = False,
        how: HowToRead | None = None,
        ranges: Mapping[str, ValueRange] | None = None,
        fine: bool = True,
        condition: str | Condition | None = None,
        pictures: str | Path | None = None,
        masks: Coding | None = None,
        joint: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        if size is not None and size < 1:
            raise InputError(f"size {size}: give at least 1 pixel")
        if flips and captions:
            raise InputError("flips make left of what a caption calls right: leave one of them off")
        if how is None:
            how = HowToRead(background=None) if channels == 4 else HowToRead()
        self.how = how
        self.source = source = open_source(data, captions, size, seed, how)
        if captions and not source.captioned:
            raise InputError(
                f"'{data}' has no captions: put a .txt beside each image, or a metadata.jsonl of "
                'lines such as {"file_name": "0.png", "text": "a red circle"} into the folder'
            )
        if classes and not source.classes:
            raise InputError(
                f"'{data}' has no classes: put the images of each of two or more classes into a "
                "subfolder of its own, or give an .npz with labels"
            )
        self.classes, self.captioned = source.classes, captions
        self.crops, self.skip_bad = crops, skip_bad
        self._bad: set[int] = set()  # images that are left out
        self._cache: dict[int, Pixels] = {}
        self._infos = self._check_headers()
        self.condition: Condition | None = None
        self._partners: list[str] = []
        self.masks: MaskCoding | None = None
        self.joint = joint is not None
        if joint is not None:
            self._partners = self._named_as_images("--joint", Path(joint), "mask")
            self.masks = find_masks(self._partners, masks or "bits")
        elif masks is not None:
            if not source.files:
                raise InputError(f"'{data}': masks are made of a folder of masks, one a file")
            self.masks = find_masks(source.files, masks)
        self.codes = 0 if self.masks is None else self.masks.channels
        self.ranges = dict(ranges or {})
        self.channels, self.dtype = self.codes, "uint8"
        if self.masks is None or self.joint:
            types = {info.dtype for info in self._infos.values()}
            self.dtype = types.pop() if fine and len(types) == 1 else "uint8"
            self.channels += channels or max(info.channels for info in self._infos.values())
            self._find_ranges()
        if condition is not None:
            self._find_condition(condition, pictures)
        self._alike = size is None and not crops
        self.size = self._choose_size(size)
        self._keeps = self._bytes() <= CACHE_BYTES
        self._check_pixels()
        self._places = self._find_places()  # (N, 3): image, top, left
        self._end: int | None = None  # row of a single image below which all is held out
        self.train, self.val = self._split(val, seed)
        self._held_out = np.isin(np.arange(len(self._places)), self.val)
        self.labels = None if source.labels is None else source.labels[self._places[:, 0]]
        if flips is not None:
            chosen = Symmetries("mirror" if flips else False, "as asked for")
        elif captions or classes:
            given = "captions" if captions else "classes"
            chosen = Symmetries(False, f"the {given} may tell left from right")
        else:
            chosen = self._find_symmetries()
        self.flips, self.flips_why = bool(chosen.flips), chosen.why

    def samples(self, seed: int = 0) -> TrainingSamples:
        """The training images, cut and mirrored at random."""
        return TrainingSamples(self, seed)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) in [-1, 1], neither moved nor mirrored, and labels (B,) or zeros."""
        used, pixels = zip(*map(self.load, indices), strict=True)
        labels = [0 if self.labels is None else int(self.labels[i]) for i in used]
        images = [as_tensor(p[..., : self.channels]) for p in pixels]
        return torch.stack(images), torch.tensor(labels)

    def conditions(self, indices: Sequence[int]) -> list[Asked]:
        """The caption of each image where captions were asked for, else its class, or None; with a
        condition its picture (K, H, W), the same at each call.
        """
        found = []
        for index in indices:
            used, pixels = self.load(index)
            shown = None if self.labels is None else int(self.labels[used])
            picture = self._parted(pixels, np.random.default_rng(index))[1]
            found.append(Asked(self.caption(used) if self.captioned else shown, picture))
        return found

    def images(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """The same images as bytes (N, H, W, C), masks as greys, (N, H, W, 1), and both side by
        side, (N, H, 2 W, C).
        """
        found = np.stack([as_bytes(self.load(i)[1][..., : self.channels]) for i in indices])
        return found if self.masks is None else self.masks.shown(self.masks.decode(found))

    def caption(self, index: int) -> str:
        """The caption of an image, where captions were asked for."""
        return self.source.caption(int(self._places[index, 0]))

    def name(self, index: int) -> str:
        """Where an image comes from."""
        return self.source.names[int(self._places[index, 0])]

    def load(self, index: int, rng: np.random.Generator | None = None) -> tuple[int, Pixels]:
        """The index and pixels (H, W, C) of an image; with skip_bad of the next that is readable.

        Args:
            rng: draws the place of a crop and whether to mirror; None: the grid's place, as it is.
        """
        count = len(self._places)
        for used in ((index + step) % count for step in range(count)):
            image, top, left = self._places[used].tolist()
            if self._held_out[used] != self._held_out[index] or (whole := self._try(image)) is None:
                continue
            if rng is not None and self.crops:
                room = self._end or whole.shape[0], whole.shape[1]
                top, left = (int(rng.integers(room[i] - self.size[i] + 1)) for i in (0, 1))
            pixels = whole[top : top + self.size[0], left : left + self.size[1]]
            mirrored = rng is not None and self.flips and rng.random() < 0.5
            return used, pixels[:, ::-1] if mirrored else pixels
        raise InputError("no image is left that can be read")

    def draw(self, index: int, rng: np.random.Generator) -> tuple[int, Tensor, Tensor | None]:
        """The image that `load` gives, its index, and its condition, cut and mirrored at random."""
        used, pixels = self.load(index, rng)
        return used, *self._parted(pixels, rng)

    def _parted(self, pixels: Pixels, rng: np.random.Generator) -> tuple[Tensor, Tensor | None]:
        """Image (C, H, W) and condition (K, H, W) of what `load` gives."""
        image = as_tensor(pixels[..., : self.channels])
        if self.condition is None:
            return image, None
        if self.condition.from_image:
            return image, self.condition.make(image, rng)
        return image, self.condition.as_tensor(pixels[..., self.channels :])

    def _find_condition(self, said: str | Condition, folder: str | Path | None) -> None:
        if isinstance(said, Condition):
            self.condition = said
        else:
            nodata = self.how.reading.nodata
            self.condition, folder = find_condition(said, self.channels, nodata), said
        if not self.condition.from_image:
            assert folder is not None
            self._partners = self._named_as_images("--condition", Path(folder), "condition")

    def _named_as_images(self, flag: str, folder: Path, what: str) -> list[str]:
        """The file of a folder that goes with each image."""
        if not self.source.files or self.source.names != self.source.files:
            raise InputError(
                f"{flag} {folder} goes with a folder of images, one a file, not with stacks, "
                "archives or generated pictures"
            )
        return partners(self.source.files, folder, what)

    @property
    def resized(self) -> bool:
        """Whether images are seen smaller or larger than they are."""
        return not self.crops and any(
            (info.height, info.width) != self.size for info in self._infos.values()
        )

    def describe(self) -> str:
        """What was found, for people: images, sizes, classes, captions, split."""
        infos = self._infos.values()
        sizes = sorted({(info.height, info.width) for info in infos})
        size = " to ".join(f"{h} x {w}" for h, w in dict.fromkeys((sizes[0], sizes[-1])))
        if self.crops:
            size = f"{size} for crops of {self.size[0]} x {self.size[1]}"
        elif sizes != [self.size]:
            size = f"{size}, resized to {self.size[0]} x {self.size[1]} and cropped at the centre"
        kinds = sorted({f"{_colour(info.channels)} {info.dtype}" for info in infos})
        lines = [f"{counted(len(self.source.names) - len(self._bad), 'image')} of {size}"]
        pictured = self.channels - self.codes
        if pictured:
            lines.append(", ".join(kinds))
        if pictured and kinds != [used := f"{_colour(pictured)} {self.dtype}"]:
            lines[1] += f", all converted to {used}"
        if self.masks is not None:
            lines.append(f"{'with ' if pictured else ''}{self.masks.said()}")
        for dtype in sorted({info.dtype for info in infos} - {"uint8"}):
            found = self.ranges.get(dtype, WHOLE[dtype])
            kept = f"; images are made as {dtype}" if dtype == self.dtype else ""
            lines.append(f"values of {dtype}: {found} fill the range of the network{kept}")
        if any(info.has_alpha for info in infos):
            colour = " ".join(map(str, self.how.background or ()))
            lines.append(f"transparent pixels are laid over the colour {colour}")
        if self.labels is not None and pictured:
            counts = np.bincount(self.labels, minlength=len(self.classes)).tolist()
            shown = [f"{name} ({n:,})" for name, n in zip(self.classes, counts, strict=True)]
            shown = shown if len(shown) <= 12 else [*shown[:10], "...", shown[-1]]
            lines.append(f"{counted(len(counts), 'class')}: {', '.join(shown)}")
        if self.source.captioned:
            like = f"such as {self.caption(self.train[0])!r}" if self.captioned else "not used"
            lines.append(f"captions, {like}{self.source.note}")
        unit = "crop" if self.crops else "image"
        mirrored = "mirrored at random" if self.flips else "not mirrored"
        lines.append(f"{counted(len(self.train), unit)} to train on, {mirrored}")
        if self.condition is not None:
            lines.append(f"condition: {self.condition.said()}")
        return "\n".join([*lines, f"{counted(len(self.val), unit)} held out"])

    def _try(self, image: int) -> Pixels | None:
        """The levels of a whole image, resized; None: it cannot be read and is left out."""
        if image in self._cache or image in self._bad:
            return self._cache.get(image)
        beside: list[Pixels] = []
        try:
            pixels = self._read(image)
            if self._alike:
                self._check_size(image, pixels.shape[:2], self.size)
            if self._partners:
                file = self._partners[image]
                if self.condition is not None:
                    other = self.condition.read(Path(file), self.how.reading.nodata)
                else:
                    assert self.masks is not None
                    other = self.masks.read(Path(file))
                if other.shape[:2] != pixels.shape[:2]:
                    raise InputError(
                        f"'{file}' is {other.shape[0]} x {other.shape[1]}, but its image "
                        f"{pixels.shape[0]} x {pixels.shape[1]}"
                    )
                beside = [other]
        except InputError as error:
            self._leave_out(image, error)
            return None
        parts = [pixels, *beside]
        if not self.crops:
            masks = [self.masks is not None and not self.joint, self.joint]
            parts = [self._resized(*part) for part in zip(parts, masks, strict=False)]
        pixels = np.concatenate(parts, axis=2) if beside else parts[0]
        if self._keeps:
            self._cache[image] = pixels
        return pixels

    def _read(self, image: int) -> Pixels:
        """An image as levels (H, W, C), a mask as its codes."""
        if self.masks is not None and not self.joint:
            return self.masks.read(Path(self.source.files[image]))
        pixels, channels = self.source.read(image), self.channels - self.codes
        try:
            known, fine = self.ranges.get(pixels.dtype.name), self.dtype != "uint8"
            return as_levels(pixels, channels, known, self._nodata(image), fine=fine)
        except InputError as error:
            raise InputError(f"'{self.source.names[image]}': {error}") from error

    def _resized(self, pixels: Pixels, mask: bool) -> Pixels:
        """Pixels of the size of all images; those of masks are of a class then, too."""
        found = resized(pixels, self.size)
        return self.masks.nearest(found) if self.masks and mask else found

    def _leave_out(self, image: int, error: InputError) -> None:
        if not self.skip_bad:
            raise error
        self._bad.add(image)
        print(f"left out: {error}", file=sys.stderr)

    def _check_size(self, image: int, size: tuple[int, ...], first: tuple[int, ...]) -> None:
        if size != first:
            name = self.source.names[next(iter(self._infos))]
            raise InputError(
                f"the images have different sizes, such as {first[0]} x {first[1]} ('{name}') and "
                f"{size[0]} x {size[1]} ('{self.source.names[image]}'): give a size to which all "
                "are resized and cropped, such as 64"
            )

    def _check_headers(self) -> dict[int, ImageInfo]:
        """What the headers say: of all images, or of some where these are many."""
        count, infos = len(self.source.names), {}
        many = count > CHECKED and not self.crops
        chosen = np.linspace(0, count - 1, CHECKED).astype(int) if many else np.arange(count)
        for image in chosen[:1].tolist() if self.source.kind else chosen.tolist():
            try:
                infos[image] = self.source.info(image)
            except InputError as error:
                self._leave_out(image, error)
        if not infos:
            raise InputError(f"none of {count:,} images can be read")
        return infos

    def _nodata(self, image: int) -> float | None:
        info = self._infos.get(image)
        return self.how.reading.nodata if info is None else info.nodata

    def _find_ranges(self) -> None:
        """The range of values of each type but uint8, of images spread over the set; where channels
        are no colours, which belong together, that of each.
        """
        of: dict[str, list[int]] = {}
        for image, info in self._infos.items():
            if info.dtype != "uint8" and info.dtype not in self.ranges:
                of.setdefault(info.dtype, []).append(image)
        if self.source.kind and self.source.kind.dtype in of:
            count = len(self.source.names)
            of[self.source.kind.dtype] = list(range(count))
        pictured = self.channels - self.codes
        rgba = pictured == 4 and self.how.background is None
        apart = pictured if pictured not in (1, 3) and not rgba else 1
        for dtype, images in of.items():
            finders, left = [RangeFinder(dtype) for _ in range(apart)], RANGED_PIXELS
            for image in np.random.default_rng(0).permutation(images).tolist():
                try:
                    pixels = self.source.read(image)
                except InputError:
                    continue  # which is raised, or left out, where the image is used
                parts = [pixels] if apart == 1 else np.split(pixels, pixels.shape[2], axis=2)
                for finder, part in zip(finders, parts, strict=False):
                    finder.add(part, self.source.names[image], self._nodata(image))
                left -= pixels.size
                if left < 0:
                    break
            self.ranges[dtype] = ValueRange.of_channels([finder.found() for finder in finders])

    def _choose_size(self, size: int | None) -> tuple[int, int]:
        side = size or CROP
        first = next((info.height, info.width) for info in self._infos.values())
        for image, info in self._infos.items():
            if self._alike:
                self._check_size(image, (info.height, info.width), first)
            elif self.crops and min(info.height, info.width) < side:
                raise InputError(
                    f"'{self.source.names[image]}' is {info.height} x {info.width}, too small for "
                    f"crops of {side} x {side}: give a smaller size, or leave crops off"
                )
        return first if self._alike else (side, side)

    def _bytes(self) -> int:
        """Of all images as they would be kept, as far as those say that were looked at."""
        sizes = [(i.height, i.width) for i in self._infos.values()] if self.crops else [self.size]
        mean = sum(height * width for height, width in sizes) / len(sizes)
        fine = self.dtype != "uint8" or (self.condition is not None and self.condition.fine)
        return round(mean * len(self.source.names) * self.channels * (4 if fine else 1))

    def _check_pixels(self) -> None:
        """Decodes a small set, so that a bad file is found before training."""
        pixels = sum(info.height * info.width for info in self._infos.values())
        if not self.source.kind and len(self.source.names) <= CHECKED and pixels <= CHECKED_PIXELS:
            self._infos = {i: info for i, info in self._infos.items() if self._try(i) is not None}

    def _find_places(self) -> NDArray[np.int64]:
        images = [i for i in range(len(self.source.names)) if i not in self._bad]
        if not self.crops:
            return np.pad(np.array(images, np.int64)[:, None], ((0, 0), (0, 2)))
        places = []
        for image in images:
            info = self._infos.get(image) or self.source.info(image)
            tops, lefts = (
                np.linspace(0, n - side, n // side).astype(int).tolist()
                for n, side in zip((info.height, info.width), self.size, strict=True)
            )
            places += [(image, top, left) for top in tops for left in lefts]
        return np.array(places, np.int64).reshape(-1, 3)

    def _find_symmetries(self) -> Symmetries:
        """What whole training images, or crops of them, are like."""
        images = list(dict.fromkeys(self._places[self.train, 0].tolist()))

        def load(image: int) -> Pixels:
            whole = self._try(image)
            blank = np.zeros((*self.size, self.channels), np.uint8)  # cannot be read: left out
            return rearrange(blank if whole is None else whole[: self._end], "h w c -> c h w")

        return find_symmetries(load, images, self.size)

    def _split(self, val: float, seed: int) -> tuple[list[int], list[int]]:
        if val <= 0 or (val >= 1 and val != int(val)):
            raise InputError(f"val {val}: give a share between 0 and 1, or a number of images")
        images = np.unique(self._places[:, 0])
        if self.crops and len(images) == 1:
            return self._split_rows(val)
        group = np.arange(len(self.source.names))
        if self._partners:  # those that are made from one picture are on one side
            group = np.unique(self._partners, return_inverse=True)[1]
        groups = list(dict.fromkeys(group[images].tolist()))
        count = len(groups)
        least = 1 if self.crops else max(1, min(LEAST_VAL, count // 4))
        held_out = int(val) if val >= 1 else min(max(round(val * count), least), MOST_VAL)
        if held_out >= count:
            raise InputError(
                f"{held_out} of {counted(count, 'image')} held out leave none to train "
                "on: give more images"
            )
        if self.crops:
            last = np.isin(group[self._places[:, 0]], groups[-held_out:])
            return np.flatnonzero(~last).tolist(), np.flatnonzero(last).tolist()
        order = np.random.default_rng(seed).permutation(count).tolist()
        of: dict[int, list[int]] = {}
        for place, image in enumerate(self._places[:, 0].tolist()):
            of.setdefault(int(group[image]), []).append(place)
        parts = order[:-held_out], order[-held_out:]
        train, held = ([place for i in part for place in of[groups[i]]] for part in parts)
        return train, held

    def _split_rows(self, val: float) -> tuple[list[int], list[int]]:
        """The crops of a single image: its lowest rows of crops are held out."""
        tops = self._places[:, 1]
        rows = np.unique(tops)
        held_out = max(1, round(len(rows) * (val if val < 1 else val / len(tops))))
        if held_out >= len(rows):
            raise InputError(
                f"a single image with {counted(len(rows), 'row')} of crops of which {held_out} "
                "are held out leaves none to train on: give more or larger images, or a smaller "
                "size"
            )
        self._end = int(rows[-held_out])
        last = tops >= self._end
        return np.flatnonzero(~last).tolist(), np.flatnonzero(last).tolist()


class Drawable(Protocol):
    """What `TrainingSamples` needs of its data; see `DiffusionData`."""

    train: list[int]
    labels: NDArray[np.int64] | None
    captioned: bool

    def draw(self, index: int, rng: np.random.Generator) -> tuple[int, Tensor, Tensor | None]: ...

    def caption(self, index: int) -> str: ...

    def name(self, index: int) -> str: ...


class TrainingSamples:
    """`samples[epoch, index]`: "image" (C, H, W), of pixels in [-1, 1] or of latents; "picture"
    (K, H, W), the condition, where there is one; "label" ()
    where there are classes; "caption" (str) where captions were asked for. See
    `unet.training.batches.Samples`.
    """

    def __init__(self, data: Drawable, seed: int) -> None:
        self.data, self.seed = data, seed

    def __len__(self) -> int:
        return len(self.data.train)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        used, image, picture = self.data.draw(self.data.train[key[1]], sample_rng(self.seed, *key))
        sample: dict[str, Any] = {"image": image}
        if picture is not None:
            sample["picture"] = picture
        if self.data.labels is not None:
            sample["label"] = torch.tensor(int(self.data.labels[used]))
        if self.data.captioned:
            sample["caption"] = self.data.caption(used)
        return sample

    def name(self, index: int) -> str:
        return self.data.name(self.data.train[index])


def _colour(channels: int) -> str:
    return {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels of")
