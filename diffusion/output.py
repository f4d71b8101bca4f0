"""Samples as files: a grid, one file per image, an .npz, a GIF."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from diffusion.attention_maps import attention_figure
from diffusion.pictures import Images, fewer_pixels, grid, write_gif
from unet.errors import InputError
from unet.files.images import SAMPLES, files_below, read_image, read_mask, write_image
from unet.files.pages import Array
from unet.files.writing import replacing, write_text
from unet.training.task import Processes
from unet.words import counted

FOLDERS = ("images", "image", "label", "attention")  # with a file per image
FILES = ("grid.png", "samples.npz", "appearing.gif")  # of all
_MARK = """A model made these images. Commands that read a folder above this one leave them
out; to use them, name this folder, or images/ in it. Without this file they are not left out.
"""
IN_GRID = 100  # images in grid.png, at most


class SampleFolder:
    """Where a sampling run puts its images: images/00000.png, ..., grid.png.

    Images with masks become data for `train-seg`: image/00000.png, ... and label/00000.png, ...

    Args:
        overwrite: empty what an earlier run wrote there.

    Raises:
        InputError: the folder is in use.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        self.path, self.suffix = path, "png"
        self.names: Sequence[str] | None = None
        self.masks, self.labelled = 0, False
        self.palette: bytes | None = None
        if path.is_file() or (path.is_dir() and any(path.iterdir()) and not overwrite):
            raise InputError(f"--out {path} is in use: give --overwrite or another folder")

    def begin(
        self,
        processes: Processes,
        channels: int = 3,
        names: Sequence[str] | None = None,
        *,
        masks: int = 0,
        palette: bytes | None = None,
        dtype: str = "uint8",
    ) -> None:
        """Makes the folder, and removes what an earlier run wrote to it (nothing else).

        All of the processes call it, and go on together.

        Args:
            channels: of all that is made.
            names: of the files of images 0, 1, ..., instead of their numbers; with the folders
                that they are in.
            masks: how many channels, the last ones, are the values of a mask.
            palette: of masks of indices, see `write_image`.
            dtype: of the images, which are PNG files where these hold so many channels of 8 bits,
                else TIFF files.
        """
        self.names, self.masks, self.palette = names, masks, palette
        self.labelled = 0 < masks < channels
        pictured = channels - masks if self.labelled else channels
        plain = pictured in (1, 3, 4) and dtype == "uint8"
        self.suffix = "png" if plain else "tif"
        processes.wait()  # so that none finds what another has written already
        if processes.main:
            self._empty()
            self._tell_of_others()
        processes.wait()

    def _empty(self) -> None:
        for folder in ("image", "label") if self.labelled else ("images",):
            (self.path / folder).mkdir(parents=True, exist_ok=True)
        for folder in FOLDERS:
            for old in (self.path / folder).glob("*"):
                if re.fullmatch(r"[0-9]{5,}\.(png|tif)", old.name):
                    old.unlink()
        for name in FILES:
            (self.path / name).unlink(missing_ok=True)
        write_text(self.path / SAMPLES, _MARK)

    def _tell_of_others(self) -> None:
        """Prints which other files stay among the images."""
        ours = {file for number in range(len(self.names or ())) for file in self.files(number)}
        below = (file for name in FOLDERS for file in files_below(self.path / name))
        if others := [file for file in below if file not in ours]:
            print(
                f"note: --out {self.path} still holds {counted(len(others), 'file')} that this "
                f"run does not write, such as {others[0]}: delete them if an earlier run made them",
                file=sys.stderr,
            )

    def add(self, images: Array, first: int) -> None:
        """Writes images (N, H, W, C), the first of them under this number."""
        for number, image in enumerate(images, first):
            files = self.files(number)
            if self.labelled:
                write_image(files[0], image[..., : -self.masks])
                image = image[..., -self.masks :].astype(np.uint8)
            write_image(files[-1], image, self.palette)

    def read(self, numbers: Sequence[int]) -> Array:
        """What was written, by whatever process."""
        found = []
        for number in numbers:
            *images, last = self.files(number)
            parts = [read_image(file, alpha=True) for file in images]
            if self.masks:
                mask = read_mask(last)
                parts.append(mask.reshape(*mask.shape[:2], -1))
            else:
                parts.append(read_image(last, alpha=True))
            found.append(np.concatenate(parts, axis=2))
        return np.stack(found)

    def files(self, number: int) -> tuple[Path, ...]:
        """Of an image, and its mask where it has one."""
        name = f"{number:05d}" if self.names is None else self.names[number]
        if not self.labelled:
            return (self.path / "images" / f"{name}.{self.suffix}",)
        return self.path / "image" / f"{name}.{self.suffix}", self.path / "label" / f"{name}.png"

    def write_grid(
        self, numbers: Sequence[int], shown: Callable[[Array], Images] = lambda images: images
    ) -> Path:
        """Of the first hundred of these images, as they are shown; large ones are made smaller."""
        cells = [fewer_pixels(shown(self.read([number]))[0]) for number in numbers[:IN_GRID]]
        sides = np.max([cell.shape[:2] for cell in cells], axis=0)
        found = []
        for cell in cells:  # white beside the smaller ones
            more = [(0, n - m) for n, m in zip(sides, cell.shape, strict=False)]
            found.append(np.pad(cell, [*more, (0, 0)], constant_values=255))
        return self._save(grid(np.stack(found)), "grid.png")

    def write_npz(self, numbers: Sequence[int], labels: Sequence[int] | None) -> None:
        """`images` (N, H, W, C), with masks (N, H, W, C + 1), or C + 3 of colours, and `labels`
        int64 (N,) where there are classes.
        """
        images = self.read(numbers)
        with replacing(self.path / "samples.npz") as temporary, temporary.open("wb") as file:
            if labels is None:
                np.savez_compressed(file, images=images)
            else:
                np.savez_compressed(file, images=images, labels=np.asarray(labels))

    def write_gif(self, frames: Sequence[Images]) -> None:
        write_gif(self.path / "appearing.gif", frames)

    def write_attention(
        self, images: Images, words: Sequence[Sequence[str]], maps: Tensor, first: int = 0
    ) -> None:
        """attention/00000.png, ...: an image and where each of its words is looked at.

        Args:
            words, maps: of each image, as `attention_figure` takes them.
        """
        (self.path / "attention").mkdir(exist_ok=True)
        for i, picture in enumerate(map(attention_figure, images, words, maps)):
            self._save(picture, f"attention/{first + i:05d}.png")

    def _save(self, picture: Image.Image, name: str) -> Path:
        with replacing(self.path / name) as temporary:
            picture.save(temporary, format="png")
        return self.path / name
