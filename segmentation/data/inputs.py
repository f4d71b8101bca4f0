"""The files to predict, or to start from: one file, or those in a folder and below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unet.errors import InputError, not_there
from unet.files.folders import mask_files, mask_folders
from unet.files.images import (
    OURS,
    PREDICTED,
    files_below,
    is_image_file,
    no_images,
    predictions,
)
from unet.files.volumes import is_volume, is_volume_file
from unet.words import left_out


@dataclass(frozen=True)
class Inputs:
    """A file or volume, or the files in a folder and below it.

    Attributes:
        files: images in natural order; volumes where there is no image.
        root: the folder in or below which they lie; None: a single file, which was named itself.
        mask_folders: folders of masks, whose images lie beside or above them, which are left out.
        mask_files: masks beside their images, which are left out.
        left: files that are left out as masks or predictions.
        ours: folders that are left out because this project wrote them.
    """

    files: Sequence[Path]
    root: Path | None = None
    mask_folders: Sequence[Path] = ()
    mask_files: Sequence[Path] = ()
    left: Sequence[Path] = ()
    ours: Sequence[Path] = ()

    @property
    def volumes(self) -> Sequence[Path]:
        """The files where they are volumes, which are predicted one by one."""
        return [file for file in self.files if is_volume(file)]

    def place(self, file: Path) -> Path:
        """The folder of a file below the root, into which its results go below theirs."""
        return file.parent.relative_to(self.root) if self.root else Path()

    @property
    def remark(self) -> str:
        """A sentence about the files that are left out; empty if there are none."""
        masks = {*self.mask_folders, *self.mask_files}
        predicted = [file for file in self.left if masks.isdisjoint([file, *file.parents])]
        return left_out(
            {
                "folder of masks": self.mask_folders,
                "file of masks": self.mask_files,
                "file of predictions": predicted,
                OURS: self.ours,
            }
        )


def find_inputs(source: Path, out: Path | None = None) -> Inputs:
    """A file or volume, or the images of a folder and of those below it, without those that are
    hidden, masks, or written by this project: predictions, runs, evaluations and samples.

    Args:
        out: the folder of the predictions; files named like predictions in or below it are left
            out.

    Raises:
        InputError: no such file or folder, or no image in it.
    """
    if is_volume(source) or source.is_file():
        return Inputs([source])
    if not source.exists():
        raise InputError(f"{str(source)!r}: {not_there(source)}")
    ours: list[Path] = []
    folder, every = source, files_below(source, ours)
    images = [file for file in every if is_image_file(file)]
    volumes = [file for file in every if is_volume_file(file)]
    if not (images or volumes):
        raise no_images(folder)
    made = predictions([*images, *volumes])
    if out is not None and out.resolve().is_relative_to(folder.resolve()):
        # Of one that was interrupted there may be less, and images may lie here as well.
        place = folder / out.resolve().relative_to(folder.resolve())
        made |= {f for f in every if f.is_relative_to(place) and PREDICTED.search(f.stem)}
    kept = [[f for f in files if f not in made] for files in (images, volumes)]
    folders = mask_folders((file.parent for files in kept for file in files), folder)
    beside = mask_files(file for files in kept for file in files)
    masks = {*folders, *beside}
    for files in kept:
        if meant := [file for file in files if masks.isdisjoint([file, *file.parents])]:
            read = set(meant)
            left = [file for file in images or volumes if file not in read]
            return Inputs(meant, folder, folders, beside, left, ours)
    raise InputError(
        f"{str(folder)!r}: nothing but masks and predictions is in it: name the folder of the "
        "images, or one of these files by itself"
    )
