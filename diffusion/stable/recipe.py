"""The settings that a picture was made with, and the PNG that holds them. Does not import torch."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from unet.errors import InputError, said
from unet.files.writing import replacing
from unet.training.options import Precision

TextSampler = Literal["ddim", "dpmpp-2m", "euler"]

CHUNK = "txt2img"  # keyword of the PNG's text chunk
_MOST_SEEDS = 2**32  # that differ, see NoiseSource
LARGEST = 2**14  # pixels a side
_BELONGING = {
    "model": {"checkpoint", "lora"},
    "init": {"inpaint", "mask", "strength"},
    "inpaint": {"init", "strength"},
}


@dataclass(frozen=True, kw_only=True)
class PictureSettings:
    """The settings of a picture, apart from the model and the images that it starts from.

    Raises:
        InputError: a value of another type or out of range.
    """

    prompt: str
    negative: str = ""  # what guidance steers away from
    steps: int = 25
    sampler: TextSampler = "dpmpp-2m"
    guidance: float = 7.5  # scale of classifier-free guidance; 1: none
    seed: int = 0  # of the first picture; that of the next is one higher
    size: str | None = None  # WIDTHxHEIGHT in pixels, or a side; None: what it was trained for
    original_size: str | None = None  # XL: WIDTHxHEIGHT it shall look cut from; None: its size
    crop: str | None = None  # XL: LEFTxTOP of the cut; None: 0x0
    strength: float | None = None  # share of a run from an image; None: 0.8, in a mask 1

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not _fits(value, kind):
                choices = f": choose from {get_args(kind)}" if kind is TextSampler else ""
                raise InputError(f"{name} cannot be {value!r}{choices}")
        if self.steps < 1:
            raise InputError(f"steps {self.steps} must be at least 1")
        if not 0 <= self.guidance < math.inf:
            raise InputError(f"guidance {self.guidance} must be a number of 0 or more")
        if not 0 <= self.seed < _MOST_SEEDS:
            raise InputError(f"seed {self.seed} must be from 0 to {_MOST_SEEDS - 1}")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise InputError(f"strength {self.strength} must be above 0 and at most 1")
        if self.size is not None and self.pixels is None:
            raise InputError(
                f"size {self.size!r} must be WIDTHxHEIGHT in pixels, such as 512x768, or one "
                f"number for both, of at most {LARGEST} a side"
            )

        if self.original_size is not None and _numbers(self.original_size, 1) is None:
            raise InputError(
                f"original-size {self.original_size!r} must be WIDTHxHEIGHT in pixels, such as "
                f"1024x1024, of at most {LARGEST} a side"
            )
        if self.crop is not None and _numbers(self.crop, 0) is None:
            raise InputError(f"crop {self.crop!r} must be LEFTxTOP in pixels, such as 0x256")

    @property
    def cut_from(self) -> tuple[int, int, int, int]:
        """Height and width of the image that the picture shall look cut from, and top and left of
        the cut (SDXL, arXiv 2307.01952, sec. 2.2); height and width are 0 where none are given."""
        width, height = _numbers(self.original_size or "", 1) or (0, 0)
        left, top = _numbers(self.crop or "", 0) or (0, 0)
        return height, width, top, left

    @property
    def pixels(self) -> tuple[int, int] | None:
        """(height, width), where a size is given."""
        size = self.size or ""
        found = _numbers(size if "x" in size else f"{size}x{size}", 1)
        return None if found is None else (found[1], found[0])


@dataclass(frozen=True, kw_only=True)
class Recipe(PictureSettings):
    """The settings of a picture with the files it was made from: enough to make it again."""

    model: str  # pipeline folder
    checkpoint: str | None = None  # single-file checkpoint of the U-Net
    lora: tuple[str, ...] | None = None  # LoRA files, each perhaps with :WEIGHT
    precision: Precision = "auto"
    init: str | None = None  # image file to start from
    inpaint: str | None = None  # image file of which a part is made anew
    mask: str | None = None  # image file that says which

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init is not None and self.inpaint is not None:
            raise InputError("--init and --inpaint each say what to start from: give one")
        if (self.inpaint is None) != (self.mask is None):
            raise InputError("--inpaint needs --mask, which says what to make anew: give both")
        if self.strength is not None and self.init is None and self.inpaint is None:
            raise InputError(
                f"--strength {self.strength} says how much of an image is made anew: give one with "
                "--init or --inpaint"
            )


def write_picture(path: Path, image: NDArray[np.uint8], recipe: Recipe) -> None:
    """Writes uint8 (H, W, 3) as PNG, with the recipe as JSON in its text chunk `txt2img`."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    said = {k: v for k, v in dataclasses.asdict(recipe).items() if v is not None}
    info.add_itxt(CHUNK, json.dumps(said, ensure_ascii=False))
    with replacing(path) as temporary:
        Image.fromarray(image).save(temporary, format="png", pnginfo=info)


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe that `write_picture` left in a PNG, by field name.

    Raises:
        InputError: no such file, no PNG, no recipe in it, or one with unknown fields.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a file is read whole or refused
            with Image.open(path, formats=["PNG"]) as picture:
                picture.load()  # a chunk may stand behind the pixels
                text = picture.info.get(CHUNK)
        values = None if text is None else json.loads(text)
    except Exception as error:  # decoders raise what a wrong byte leads them to, from any class
        raise InputError(
            f"{path} cannot be read as a PNG made by txt2img: {said(error)}"
        ) from error
    if values is None:
        raise InputError(f"{path} says nothing of how it was made: give a PNG made by txt2img")
    names = {field.name for field in dataclasses.fields(Recipe)}
    if not isinstance(values, dict) or not set(values) <= names:
        raise InputError(f"the recipe in {path} is not of this version of txt2img: {text!r:.200}")
    return values


def merged(given: Mapping[str, Any], png: Path | None = None) -> Recipe:
    """The recipe of a PNG with the given values (not None) in place of its own. Another model or
    image to start from also drops the settings that belong to those of the PNG.
    """
    values = read_recipe(png) if png else {}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    given = {name: value for name, value in given.items() if value is not None}
    for name, belonging in _BELONGING.items():
        if name in given:
            values = {k: v for k, v in values.items() if k not in belonging}
    values |= given
    for name in ("model", "prompt"):
        if name not in values:
            raise InputError(
                f"--{name} is missing: give it, or --from-png with a picture to repeat"
            )
    return Recipe(**values)


def _numbers(text: str, least: int) -> tuple[int, int] | None:
    """The two numbers of 640x480; None: it is something else, or one is out of range."""
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text, re.ASCII)
    numbers = (int(found[1]), int(found[2])) if found else (-1, -1)
    return numbers if least <= min(numbers) and max(numbers) <= LARGEST else None


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if choices := get_args(kind):
        return any(value == c if isinstance(c, str) else _fits(value, c) for c in choices)
    return type(value) in ((int, float) if kind is float else (kind,))
