"""Zarr stores (formats 2 and 3): OME-Zarr by its multiscales (0.4, 0.5), and plain arrays.

OME-Zarr: https://ngff.openmicroscopy.org. Of a pyramid the full level is read; what is written has
that level only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zarr

from unet.errors import InputError, said
from unet.files.pages import Volume, named_axes
from unet.files.volumes import split_zarr

_OBJECTS = "it holds objects or text, not numbers that are pixels"
_KINDS = {"T": "time", "C": "channel", "Z": "space", "Y": "space", "X": "space"}


@contextmanager
def open_zarr(path: Path) -> Iterator[Volume]:
    """The array of a store, or at a path inside of one.

    Raises:
        InputError: there is none, or several; a codec that is missing, or that runs what it reads.
    """
    root, inside = split_zarr(path)
    if not root.is_dir():
        raise InputError(f"there is no Zarr store {str(root)!r}")
    node = _node(root, inside)
    if isinstance(node, zarr.Group) and not _multiscales(node):
        found = _arrays(node)
        if len(found) != 1:
            several = f"several: {', '.join(found[:8])}" if found else "none"
            raise InputError(f"which array is meant? It holds {several}; name one, as {root}/PATH")
        inside = f"{inside}/{found[0]}".strip("/")
        node = _node(root, inside)
    scales: dict[str, Any] = {}
    level: dict[str, Any] = {}
    group: zarr.Group | None = None
    if isinstance(node, zarr.Group):
        group, scales = node, _multiscales(node)[0]
        level = scales["datasets"][0]
        node = _node(root, f"{inside}/{level['path']}".strip("/"))
    elif inside:  # perhaps a level of a pyramid, which its group describes
        outside, _, name = inside.rpartition("/")
        group = _node(root, outside)
        for one in _multiscales(group) if isinstance(group, zarr.Group) else ():
            for each in one["datasets"]:
                if each["path"] == name:
                    scales, level = one, each
    if not isinstance(node, zarr.Array):
        raise InputError("it describes a pyramid whose full level is no array")
    _check_codecs(node)
    yield _volume(node, scales, level, _said_by(group) if scales and group else {})


def _volume(
    array: zarr.Array, scales: dict[str, Any], level: dict[str, Any], described: dict[str, Any]
) -> Volume:
    count = array.ndim
    if scales:
        axes = [axis if isinstance(axis, str) else dict(axis) for axis in scales.get("axes", [])]
        names = [axis if isinstance(axis, str) else _axis_name(axis) for axis in axes]
        units = tuple("" if isinstance(a, str) else str(a.get("unit", "")) for a in axes)
        if not names:  # 0.1 and 0.2 had five axes, always
            names, units = list("tczyx"), ("",) * 5
    else:
        said_of = array.metadata.to_dict().get("dimension_names")
        names = list(said_of or array.attrs.get("_ARRAY_DIMENSIONS") or [])
        units = ("",) * count
    letters = named_axes(names)
    if names and len(names) != count:
        raise InputError(f"it names the axes {', '.join(map(str, names))} of {array.shape}")
    scale, translation = _transformed(count, level, scales)
    omero = described.get("omero") or {}
    labels = [str(channel.get("label", "")) for channel in omero.get("channels", [])]
    distinct = all(labels) and len(set(labels)) == len(labels)
    return Volume(
        array=array,
        axes=letters if {"Y", "X"} <= set(letters) else "",
        chunks=tuple(array.chunks),
        shards=None if array.shards is None else tuple(array.shards),
        names=tuple(labels) if distinct else (),
        scale=scale,
        translation=translation,
        units=units,
        zarr_format=array.metadata.zarr_format,
    )


def _axis_name(axis: dict[str, Any]) -> str:
    return {"channel": "c", "time": "t"}.get(str(axis.get("type")), str(axis.get("name", "")))


def _transformed(
    count: int, *levels: dict[str, Any]
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Scale and translation of each axis: those of a level, then those of its pyramid."""
    scale, translation, told = [1.0] * count, [0.0] * count, False
    for level in levels:
        for one in level.get("coordinateTransformations", []):
            kind = one.get("type")
            values = one.get(kind)
            if kind not in ("scale", "translation") or values is None:
                continue
            if len(values) != count:
                raise InputError(f"its {kind} {values} is none of {count} axes")
            told = True
            if kind == "scale":
                scale = [a * float(b) for a, b in zip(scale, values, strict=True)]
                translation = [a * float(b) for a, b in zip(translation, values, strict=True)]
            else:
                translation = [a + float(b) for a, b in zip(translation, values, strict=True)]
    if not told:
        return None, None
    return tuple(scale), tuple(translation) if any(translation) else None


def _node(root: Path, inside: str) -> zarr.Array | zarr.Group:
    try:
        return zarr.open(store=str(root), path=inside, mode="r")
    except FileNotFoundError as error:
        where = f" {inside!r}" if inside else ""
        raise InputError(f"there is no Zarr array or group{where} in {str(root)!r}") from error
    except Exception as error:
        if "object_codec_id" in str(error):
            raise InputError(f"{_OBJECTS} ({said(error)})") from error
        if "Codec" in type(error).__name__:
            raise InputError(
                f"its chunks need a codec that is not installed ({said(error)}): install its "
                "package, or save the array with another one, such as zstd"
            ) from error
        raise


def _said_by(group: zarr.Group) -> dict[str, Any]:
    """What OME-Zarr says of a group: in 0.5 below `ome`."""
    attributes = dict(group.attrs)
    inside = attributes.get("ome", attributes)
    return inside if isinstance(inside, dict) else {}


def _multiscales(group: zarr.Group) -> list[dict[str, Any]]:
    found = _said_by(group).get("multiscales") or []
    if not all(isinstance(one, dict) and one.get("datasets") for one in found):
        raise InputError("its multiscales name no datasets")
    return list(found)


def _arrays(group: zarr.Group, depth: int = 3) -> list[str]:
    """Paths of the arrays and pyramids below a group, at most `depth` steps down."""
    found = []
    for name, node in sorted(group.members(max_depth=0)):
        if isinstance(node, zarr.Array) or _multiscales(node):
            found.append(name)
        elif depth > 1:
            found += [f"{name}/{below}" for below in _arrays(node, depth - 1)]
    return found


def _check_codecs(array: zarr.Array) -> None:
    """Refuses what would run code from the file: a codec that unpickles."""
    said_of = array.metadata.to_dict()
    if array.metadata.zarr_format == 2:
        codecs: Sequence[Any] = [*(said_of.get("filters") or ()), said_of.get("compressor")]
    else:
        codecs = said_of.get("codecs") or ()
    if any("pickle" in repr(codec).lower() for codec in codecs) or array.dtype.kind not in "biufV":
        raise InputError(f"{_OBJECTS} ({array.dtype})")


@dataclass(frozen=True)
class ZarrImage:
    """What `create_ome_zarr` is to make.

    Attributes:
        axes: a letter for each axis.
        scale, translation, units: of each axis.
    """

    shape: tuple[int, ...]
    axes: str
    dtype: Any
    chunks: tuple[int, ...]
    shards: tuple[int, ...] | None = None
    scale: tuple[float, ...] | None = None
    translation: tuple[float, ...] | None = None
    units: tuple[str, ...] | None = None
    zarr_format: int = 3


def create_ome_zarr(path: Path, image: ZarrImage) -> None:
    """Makes an empty OME-Zarr, 0.5 or in Zarr's format 2 0.4, in place of what is there."""
    group = zarr.open_group(str(path), mode="w", zarr_format=_format(image.zarr_format))
    keys = {"name": "v2" if image.zarr_format == 2 else "default", "separator": "/"}
    extra: dict[str, Any] = {}
    if image.zarr_format == 3:
        extra = {"dimension_names": [a.lower() for a in image.axes], "shards": image.shards}
    group.create_array(
        "0",
        shape=image.shape,
        dtype=image.dtype,
        chunks=image.chunks,
        chunk_key_encoding=keys,
        fill_value=0,
        **extra,
    )
    units = image.units or ("",) * len(image.axes)
    axes: list[dict[str, str]] = []
    for letter, unit in zip(image.axes, units, strict=True):
        axes.append({"name": letter.lower()})
        if letter in _KINDS:
            axes[-1]["type"] = _KINDS[letter]
        if unit:
            axes[-1]["unit"] = unit
    steps: list[dict[str, Any]] = [
        {"type": "scale", "scale": list(image.scale or (1.0,) * len(axes))}
    ]
    if image.translation is not None:
        steps.append({"type": "translation", "translation": list(image.translation)})
    scales: dict[str, Any] = {
        "name": path.name.removesuffix(".zarr"),
        "axes": axes,
        "datasets": [{"path": "0", "coordinateTransformations": steps}],
    }
    if image.zarr_format == 2:
        group.attrs["multiscales"] = [{"version": "0.4", **scales}]
    else:
        group.attrs["ome"] = {"version": "0.5", "multiscales": [scales]}


def open_to_write(path: Path) -> Any:
    """The full level of what `create_ome_zarr` made."""
    return zarr.open_array(str(path), path="0", mode="r+")


def _format(number: int) -> Any:
    return 2 if number == 2 else 3
