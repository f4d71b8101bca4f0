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

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from diffusion.data.captions import Captions
from diffusion.data.conditions import Asked, Condition
from diffusion.data.masks import Coding
from diffusion.data.pixels import Pixels, ValueRange, as_bytes, as_tensor
from diffusion.data.samples import TrainingSamples
from diffusion.data.sources import HowToRead, open_source
from diffusion.data.splits import grid_places, split, whole_places
from diffusion.data.whole import WholeImages
from unet.errors import InputError
from unet.files.mask_values import NOT_CLEANED, MaskCleaning
from unet.symmetries import Symmetries, find_symmetries
from unet.training.run import is_main_process
from unet.words import counted, listed


class DiffusionData:
    """Training and held-out images, with their classes and captions where there are any.

    An index stands for an image; with crops, for one of a grid of crops, which training replaces by
    one at a random place in the same image. Of up to 20,000 files with 2^28 pixels in all, every
    one is decoded here, so that a bad one is found before training; others when they are needed.

    Args:
        data: a folder of images, searched with its subfolders: these are the classes where every
            image lies in one of two or more, and text files beside the images or a table such as
            `metadata.jsonl` give captions (`diffusion.data.captions`); an .npz with `images`
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
            most 1,000; from 1 on a number; 0: none. The seed chooses them; with crops, the last
            images, or of a single one the lowest rows of crops.
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
        cleaning: what is done to the values of masks: those that are made, or else the condition.
        ranges: the values of each type that become black and white; None: those that are used.
        fine: keep the precision of 16 bits and of floats, where all images have the one or the
            other; else, and of a set of several types, images are brought to 8 bits.
        seed: of the choice of held-out images, and of the pictures of "shapes".

    Attributes:
        size, channels: height and width, and channels, of every image, codes among them.
        codes: how many of the channels, the last ones, are codes of a mask.
        dtype: uint8, uint16 or float32: the type of the images as they are kept.
        resized: whether images are seen smaller or larger than they are.
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
        cleaning: MaskCleaning = NOT_CLEANED,
        seed: int = 0,
    ) -> None:
        if size is not None and size < 1:
            raise InputError(f"size {size}: give at least 1 pixel")
        if flips and captions:
            raise InputError(
                "flips turn what a caption calls right into left: leave out flips or captions"
            )
        if how is None:
            how = HowToRead(background=None) if channels == 4 else HowToRead()
        self.source = source = open_source(data, captions, size, seed, how)
        if source.left and is_main_process():
            print(source.left, file=sys.stderr)
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
        if masks is not None and joint is None and not source.files:
            raise InputError(f"'{data}': masks are learnt from a folder of masks, one per file")
        self._whole = whole = WholeImages(
            source,
            how,
            size=size,
            channels=channels,
            crops=crops,
            skip_bad=skip_bad,
            ranges=ranges or {},
            fine=fine,
            condition=condition,
            pictures=pictures,
            masks=masks,
            joint=joint,
            cleaning=cleaning,
        )
        self.size, self.channels, self.dtype = whole.size, whole.channels, whole.dtype
        self.ranges, self.resized = whole.ranges, whole.resized
        self.condition, self.masks = whole.condition, whole.masks
        self.joint, self.codes = whole.joint, whole.codes
        self.classes, self._classed, self.captioned = source.classes, classes, captions
        self.crops, self.skip_bad = crops, skip_bad
        self._places = self._find_places()
        self.train, self.val = split(self._places, whole.groups(), val, seed, crops=crops)
        self._held_out = np.isin(np.arange(len(self._places)), self.val)
        # Row below which all is held out, where the crops are of a single image.
        alone = crops and len(np.unique(self._places[:, 0])) == 1
        self._end = int(self._places[self.val, 1].min()) if alone and self.val else None
        self.labels = None if source.labels is None else source.labels[self._places[:, 0]]
        if flips is not None:
            chosen = Symmetries("mirror" if flips else False, "as requested")
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
        """The first caption of each image where captions were asked for, else its class, or None;
        with a condition its picture (K, H, W), the same at each call.
        """
        found = []
        for index in indices:
            used, pixels = self.load(index)
            shown = None if self.labels is None else int(self.labels[used])
            picture = self._parted(pixels, np.random.default_rng(index))[1]
            found.append(Asked(self.captions(used)[0] if self.captioned else shown, picture))
        return found

    def images(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """The same images as bytes (N, H, W, C), masks as `MaskCoding.shown` gives them, and both
        side by side, (N, H, 2 W, C).
        """
        found = np.stack([as_bytes(self.load(i)[1][..., : self.channels]) for i in indices])
        return found if self.masks is None else self.masks.shown(self.masks.decode(found))

    def captions(self, index: int) -> Captions:
        """The captions of an image, where these were asked for."""
        assert self.source.captions is not None
        return self.source.captions(int(self._places[index, 0]))

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
            if self._held_out[used] != self._held_out[index]:
                continue
            if (whole := self._whole.load(image)) is None:
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
            seen = image[: self.channels - self.codes] if self.joint else image
            return image, self.condition.make(seen, rng)
        return image, self.condition.as_tensor(pixels[..., self.channels :])

    def describe(self) -> str:
        """A printable description: images, sizes, classes, captions, split."""
        lines = self._whole.lines()
        if self.labels is not None and self.channels > self.codes:
            counts = np.bincount(self.labels, minlength=len(self.classes)).tolist()
            images = dict(zip(self.classes, counts, strict=True))
            used = "" if self._classed else ", not used"
            lines.append(f"{counted(len(counts), 'class')}{used}: {listed(images)}")
            learnt = {self.classes[label] for label in self.labels[self.train]}
            if self._classed and (lost := {k: n for k, n in images.items() if k not in learnt}):
                lines.append(
                    f"not learnt, as all of its images are held out: {listed(lost)}; add some, or "
                    "hold out none (--val 0)"
                )
        elif self.source.below:
            lines.append(f"of these in folders below: {listed(self.source.below)}")
        if self.source.captioned:
            like = f"such as {self.captions(self.train[0])[0]!r}" if self.captioned else "not used"
            lines.append(f"captions, {like}{self.source.note}")
        unit = "crop" if self.crops else "image"
        mirrored = "mirrored at random" if self.flips else "not mirrored"
        lines.append(f"{counted(len(self.train), unit)} to train on, {mirrored}")
        if self.condition is not None:
            lines.append(f"condition: {self.condition.said()}")
        held_out = f"{counted(len(self.val), unit)} held out" if self.val else "none held out"
        return "\n".join([*lines, held_out])

    def _find_places(self) -> NDArray[np.int64]:
        """Place (image, top, left) of each index, (N, 3)."""
        images = [i for i in range(len(self._whole)) if i not in self._whole.left_out]
        if not self.crops:
            return whole_places(images)
        return grid_places(((i, self._whole.info(i)) for i in images), self.size)

    def _find_symmetries(self) -> Symmetries:
        """What whole training images, or crops of them, are like."""
        images = list(dict.fromkeys(self._places[self.train, 0].tolist()))

        def load(image: int) -> Pixels:
            whole = self._whole.load(image)
            blank = np.zeros((*self.size, self.channels), np.uint8)  # cannot be read: left out
            return rearrange(blank if whole is None else whole[: self._end], "h w c -> c h w")

        return find_symmetries(load, images, self.size)
