"""Which files of a folder hold its weights: whole or in shards, of full precision or a variant.

diffusers writes `STEM.safetensors`; in shards `STEM-00001-of-00002.safetensors` ... and an index,
`STEM.safetensors.index.json`; as a variant `STEM.fp16.safetensors`, and the index of its shards,
`STEM.safetensors.index.fp16.json`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from unet.errors import InputError
from unet.files.writing import read_json

_VARIANTS = (None, "fp16", "bf16")  # in the order in which they are taken, and then others


class WeightFile(NamedTuple):
    """The weights of a model, or the index of their shards."""

    file: Path
    variant: str | None


def weight_files(folder: Path, *stems: str) -> list[WeightFile]:
    """The weights in a folder, the best first: safetensors, and full precision before variants.

    Args:
        stems: of their names, such as diffusion_pytorch_model.
    """
    stem = "|".join(map(re.escape, stems))
    pattern = re.compile(
        rf"({stem})(\.(?P<whole>\w+))?\.(?P<kind>safetensors|bin)(\.index(\.(?P<index>\w+))?\.json)?"
    )
    found = []
    for file in folder.iterdir():
        if (name := pattern.fullmatch(file.name)) and file.is_file():
            variant = name["whole"] or name["index"]
            rank = _VARIANTS.index(variant) if variant in _VARIANTS else len(_VARIANTS)
            order = (name["kind"] == "bin", rank, file.suffix == ".json", file.name)
            found.append((order, WeightFile(file, variant)))
    return [weights for _, weights in sorted(found)]


def variant_of(folder: Path, *stems: str) -> str | None:
    """The variant to ask a library for; None: there are weights of full precision, or none."""
    variants = [weights.variant for weights in weight_files(folder, *stems)]
    return None if not variants or None in variants else variants[0]


def shards(index: Path) -> list[Path]:
    """The files that an index names, each once.

    Raises:
        InputError: it is no index, or names a file that is missing or not in its folder.
    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InputError(f"{index} is no index of weights: it lacks a 'weight_map'")
    check_names(index, names.values())
    files = [index.parent / name for name in dict.fromkeys(names.values())]
    for file in files:
        if file.suffix not in (".safetensors", ".bin"):  # an index could name itself
            raise InputError(f"{index} names {file.name}, which holds no weights")
        if not file.is_file():
            raise InputError(f"{index} names {file.name}, which is missing: copy it, too")
    return files


def check_names(file: Path, names: Iterable[Any]) -> None:
    """Raises an InputError for a name in a file that leads out of its folder."""
    for name in names:
        plain = isinstance(name, str) and name not in ("", ".", "..") and "\0" not in name
        if not plain or any(kind(name).name != name for kind in (PurePosixPath, PureWindowsPath)):
            raise InputError(f"{file} names {name!r:.200}, which is no file of its folder")
