"""Ways to damage a file, and files that were made to do harm."""

from __future__ import annotations

import io
import json
import math
import os
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import imagecodecs
import numpy as np
import tifffile
import torch

from tests.faults.bad_files import COCO, noise, written

# -- damage ---------------------------------------------------------------------------------------

EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63)
WORDS = (
    *("-1", "0", "1e999", "-1e-999", "NaN", "9" * 30, "9" * 5000, "null", "true", "[]", "{}"),
    *('"\\ud800"', "'\\n'", "[[[[", "0x" + "f" * 5000, "!!python/name:os.system", "*a", "\0"),
)
VALUES = (
    *(
        0,
        1,
        -1,
        2,
        3,
        7,
        0.5,
        -0.5,
        2**20,
        2**31,
        2**64,
        10**400,
        1e-300,
        1e300,
        math.nan,
        math.inf,
    ),
    *(None, True, False, "", "x", "a\nb", "\ud800", "relu", "9" * 5000, [], {}, [[]], [1], ["a"]),
)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A damaged copy of a file; archives and PNGs often with checksums that are right again."""
    if data.startswith(b"PK") and rng.random() < 0.7:
        return _in_a_member(data, rng)
    if data[6:10] == b'\0\0{"' and rng.random() < 0.7:  # safetensors: an object behind its length
        end = 8 + int.from_bytes(data[:8], "little")
        header = _in_an_object(data[8:end], rng)
        return struct.pack("<Q", len(header)) + header + data[end:]
    if data.startswith((b'{"', b"{\n")) and rng.random() < 0.7:
        lines = data.splitlines() if data.startswith(b'{"') else [data]
        damaged = rng.randrange(len(lines))
        lines[damaged] = _in_an_object(lines[damaged], rng)
        return b"\n".join(lines)
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        rng.choice(_CHANGES)(found, rng)
    return _with_checksums(bytes(found)) if rng.random() < 0.7 else bytes(found)


def _place(data: bytearray, rng: random.Random) -> int:
    """Headers are at the beginning of a file, the directory of an archive at its end."""
    count = len(data)
    part = rng.choice((64, 400, count))
    at = rng.randrange(min(part, count)) if count else 0
    return count - 1 - at if count and rng.random() < 0.2 else at


def _flip(data: bytearray, rng: random.Random) -> None:
    if data:
        data[_place(data, rng)] ^= 1 << rng.randrange(8)


def _overwrite(data: bytearray, rng: random.Random) -> None:
    kind = rng.choice("bBhHiIqQ")
    value = rng.choice(EXTREMES) % 2 ** (8 * struct.calcsize(kind))
    at = _place(data, rng)
    data[at : at + struct.calcsize(kind)] = struct.pack(rng.choice("<>") + kind.upper(), value)


def _replace_word(data: bytearray, rng: random.Random) -> None:
    """Numbers, names and brackets of a text, or what looks like them."""
    words = list(re.finditer(rb"-?[0-9.]+|\w+|[\[\]{}\"':,]", bytes(data[:20000])))
    if words:
        data[slice(*rng.choice(words).span())] = rng.choice(WORDS).encode()


def _cut(data: bytearray, rng: random.Random) -> None:
    del data[_place(data, rng) :]


def _delete(data: bytearray, rng: random.Random) -> None:
    at = _place(data, rng)
    del data[at : at + rng.randrange(1, 40)]


def _insert(data: bytearray, rng: random.Random) -> None:
    at = _place(data, rng)
    data[at:at] = rng.choice((rng.randbytes(rng.randrange(1, 40)), bytes(8), data[at : at + 200]))


def _swap_halves(data: bytearray, rng: random.Random) -> None:
    at = _place(data, rng)
    data[:] = data[at:] + data[:at]


_CHANGES = (_flip, _overwrite, _overwrite, _replace_word, _cut, _delete, _insert, _swap_halves)


def _in_an_object(data: bytes, rng: random.Random) -> bytes:
    """A JSON object with another value somewhere, or with one more or less."""
    found = json.loads(data)
    part = found
    while isinstance(part, dict | list) and part:
        key = rng.choice(list(part) if isinstance(part, dict) else range(len(part)))
        if not isinstance(part[key], dict | list) or rng.random() < 0.3:
            changes = (rng.choice(VALUES), rng.choice(VALUES), [part[key]] * 2, {"x": part[key]})
            part[key] = rng.choice(changes)
            if rng.random() < 0.1:
                del part[key]
            break
        part = part[key]
    return json.dumps(found).encode()


def _in_a_member(data: bytes, rng: random.Random) -> bytes:
    """An archive whose directory fits to a damaged member."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        damaged = rng.choice(names)
        for name in names:
            content = old.read(name)
            new.writestr(name, mutated(content, rng) if name == damaged else content)
    return out.getvalue()


def _with_checksums(data: bytes) -> bytes:
    """A PNG with right checksums as far as its chunks can be followed; other files as they are."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    found, at = bytearray(data), 8
    while at + 12 <= len(found):
        end = at + 8 + int.from_bytes(found[at : at + 4], "big")
        if end + 4 > len(found):
            break
        found[end : end + 4] = struct.pack(">I", zlib.crc32(found[at + 4 : end]))
        at = end + 4
    return bytes(found)


# -- hostile files --------------------------------------------------------------------------------


class Code:
    """What a pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("it ran",)


class Room:
    """What takes any amount of memory without running code, as PyTorch sees it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (2**31,)


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = (b"IDAT", zlib.compress(bytes(99)))
    parts = (header, *chunks, body, (b"IEND", b""))
    data = b"".join(struct.pack(">I", len(b)) + n + b + bytes(4) for n, b in parts)
    return _with_checksums(b"\x89PNG\r\n\x1a\n" + data)


def tiff(body: bytes = b"", **changed: int) -> bytes:
    """A BigTIFF of 8 x 8 grey pixels with changed tags."""
    tags = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 16, 277: 1, 278: 8, 279: 64}
    tags |= {int(tag[1:]): value for tag, value in changed.items()}
    if body:
        tags |= {273: 16 + 8 + 20 * len(tags) + 8, 279: len(body)}
    data = b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, len(tags))
    data += b"".join(struct.pack("<HHQQ", tag, 16, 1, tags[tag]) for tag in sorted(tags))
    return data + bytes(8) + body


def npy(descr: str, *shape: int) -> bytes:
    text = str({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + bytes(64)


def archive(**members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)
    return out.getvalue()


def claiming(data: bytes, size: int) -> bytes:
    """An archive of ZEROS that says they are so many."""
    return data.replace(struct.pack("<I", len(ZEROS)), struct.pack("<I", size))


def packed_state() -> bytes:
    """A state whose pickle unpacks to far more."""
    out = io.BytesIO()
    state = io.BytesIO(written(lambda f: torch.save({"step": 1}, f)))
    with zipfile.ZipFile(state) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name) + ZEROS * name.endswith("data.pkl"))
    return out.getvalue()


def tensors(**described: Any) -> bytes:
    header = json.dumps(described).encode()
    return struct.pack("<Q", len(header)) + header


def doubling(line: str) -> bytes:
    """YAML in which each line holds the one before twice."""
    rest = "".join("\n" + line.format(i=i, last=f"*a{i - 1}, *a{i - 1}") for i in range(1, 60))
    return f"a0: &a0 {{k: 1}}{rest}".encode()


def described(text: str, **tags: Any) -> bytes:
    """A TIFF of 16 x 16 with a description."""
    return written(
        tifffile.imwrite,
        noise(16, 16),
        description=text,
        metadata=None,
        photometric="minisblack",
        **tags,
    )


def ome(pixels: str, before: str = "", inside: str = "<TiffData/>") -> bytes:
    text = (
        f'<?xml version="1.0"?>{before}'
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">'
        f'<Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint8" {pixels}>'
        f'<Channel ID="Channel:0:0" Name="a"/>{inside}</Pixels></Image></OME>'
    )
    return described(text)


def sizes(**changed: int) -> str:
    found = {"X": 16, "Y": 16, "Z": 1, "C": 1, "T": 1} | changed
    return " ".join(f'Size{axis}="{n}"' for axis, n in found.items())


LAUGHS = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 20))
LAUGHS = f'<!DOCTYPE OME [<!ENTITY a0 "ha">{LAUGHS}]>'


def packed_tile(data: bytes, compression: int, **tags: int) -> bytes:
    return tiff(data, _259=compression, **tags)


@cache
def large_tile(kind: str) -> bytes:
    """A picture of 8000 x 8000 zeros in some kilobytes."""
    zeros = np.zeros((8000, 8000), np.uint8)
    return bytes(
        imagecodecs.jpeg_encode(zeros)
        if kind == "jpeg"
        else imagecodecs.jpeg2k_encode(zeros, level=9)
    )


def many_components() -> bytes:
    """A JPEG 2000 codestream that says it has 16,384 components."""
    data = bytearray(imagecodecs.jpeg2k_encode(noise(8, 8), codecformat="j2k"))
    data[40:42] = struct.pack(">H", 16384)
    return bytes(data)


def coco(**changed: Any) -> bytes:
    return json.dumps(COCO | changed).encode()


def one_annotation(segmentation: Any, **more: Any) -> bytes:
    return coco(annotations=[COCO["annotations"][0] | {"segmentation": segmentation} | more])


ZEROS = bytes(2**28)
HOSTILE: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a PNG of 10^5 x 10^5": ("png: image", lambda: png(10**5, 10**5)),
    "a PNG with a text that unpacks to much": (
        "png: recipe",
        lambda: png(8, 8, (b"iTXt", b"txt2img\0\1\0\0\0" + zlib.compress(ZEROS))),
    ),
    "a PNG with a profile that unpacks to much": (
        "png: image",
        lambda: png(10**5, 8, (b"iCCP", b"x\0\0" + zlib.compress(ZEROS))),
    ),
    **{
        f"a TIFF of 10^9 x 10^9, {use}": (f"tiff: {use}", lambda: tiff(_256=10**9, _257=10**9))
        for use in ("image", "mask", "raster", "diffusion", "segmentation")
    },
    "a TIFF with tiles of 10^9": (
        "tiff: image",
        lambda: tiff(_322=10**9, _323=10**9, _324=16, _325=64),
    ),
    "a TIFF that unpacks to much": ("tiff: image", lambda: tiff(zlib.compress(ZEROS), _259=8)),
    **{
        f"a {kind} tile larger than its place": (
            "tiff: tiles",
            lambda kind=kind, number=number: packed_tile(large_tile(kind), number),
        )
        for kind, number in (("jpeg", 7), ("jpeg2000", 34712), ("jpeg2000", 33003))
    },
    "a JPEG 2000 tile of many components": (
        "tiff: tiles",
        lambda: packed_tile(many_components(), 34712),
    ),
    "ImageJ's description of 10^9 images": (
        "tiff: described",
        lambda: described("ImageJ=1.53\nimages=1000000000\nslices=1000000000\n"),
    ),
    **{
        f"OME's {axis} of 10^9": ("tiff: described", lambda axis=axis: ome(sizes(**{axis: 10**9})))
        for axis in "XYZCT"
    },
    "OME of 10^9 in each axis": (
        "tiff: described",
        lambda: ome(sizes(Z=10**9, C=10**9, T=10**9)),
    ),
    "OME planes of 10^9": (
        "tiff: described",
        lambda: ome(sizes(Z=4), inside='<TiffData IFD="0" PlaneCount="1000000000"/>'),
    ),
    "OME of far planes": (
        "tiff: described",
        lambda: ome(sizes(Z=4), inside='<TiffData FirstZ="1000000000" IFD="1000000000"/>'),
    ),
    "OME with entities of entities": (
        "tiff: described",
        lambda: ome(sizes(), LAUGHS, "<Name>&a19;</Name><TiffData/>"),
    ),
    "OME of many images": (
        "tiff: described",
        lambda: ome(sizes(), inside="<TiffData/></Pixels></Image><Image><Pixels>" * 20000),
    ),
    "a shaped description of 10^9": (
        "tiff: described",
        lambda: described('{"shape": [1000000000, 16, 16]}'),
    ),
    "a palette of a wrong length": (
        "tiff: palette",
        lambda: tiff(bytes(range(64)), _262=3, _320=7),
    ),
    "a value of no data that is no number": (
        "tiff: described",
        lambda: written(
            tifffile.imwrite, noise(16, 16), extratags=[(42113, "s", 0, "x" * 9999, True)]
        ),
    ),
    "a list of classes without end": ("txt: classes", lambda: b"a\n" * 10**7),
    "a caption without end": ("txt: captions", lambda: b"a " * 10**7),
    "a deep COCO file": ("json: COCO", lambda: b'{"images": [], "annotations": ' + b"[" * 10**6),
    "COCO of an image of 10^6 x 10^6": (
        "json: COCO",
        lambda: coco(images=[COCO["images"][0] | {"height": 10**6, "width": 10**6}]),
    ),
    "a polygon of 10^6 far points": (
        "json: COCO",
        lambda: one_annotation([[x * (-1) ** x for x in range(10**6)]]),
    ),
    "a polygon of infinite points": ("json: COCO", lambda: one_annotation([[1e999] * 8])),
    "runs of 10^18 pixels": (
        "json: COCO",
        lambda: one_annotation({"size": [16, 16], "counts": [10**18] * 9}),
    ),
    "runs of an endless number": (
        "json: COCO",
        lambda: one_annotation({"size": [16, 16], "counts": "o" * 10**6}),
    ),
    "a number of 10^6 digits": (
        "json: COCO",
        lambda: coco().replace(b'"year": 2026', b'"year": ' + b"9" * 10**6),
    ),
    "a deep labelme file": ("json: labelme", lambda: b'{"shapes": ' + b"[" * 10**6),
    "an NPY of 10^9 x 10^9": ("npy: image", lambda: npy("|u1", 10**9, 10**9)),
    "an NPY of too many pages": ("npy: image", lambda: npy("|u1", 2**21, 1, 2) + bytes(2**22)),
    "an NPY with pickled objects": (
        "npy: image",
        lambda: written(np.save, np.array([[Code()]]), allow_pickle=True),
    ),
    "an NPZ with pickled objects": (
        "npz: diffusion",
        lambda: written(np.savez, images=np.array([Code()])),
    ),
    "an NPZ with pickled labels": (
        "npz: diffusion",
        lambda: written(np.savez, images=noise(6, 8, 8), labels=np.array([Code()] * 6)),
    ),
    "an NPZ with text for an array": ("npz: diffusion", lambda: archive(images=b"text")),
    "an NPZ that unpacks to much": (
        "npz: diffusion",
        lambda: claiming(archive(images=ZEROS, labels=ZEROS), 2**32 - 2),
    ),
    "a state that unpacks to much": ("pickle: state", packed_state),
    "a state with code in it": ("pickle: state", lambda: written(lambda f: torch.save(Code(), f))),
    "weights with code in them": (
        "pickle: diffusers",
        lambda: written(lambda f: torch.save({"a": Code()}, f)),
    ),
    "weights that ask for room": (
        "pickle: diffusers",
        lambda: written(lambda f: torch.save({"a": Room()}, f)),
    ),
    "old weights that ask for room": (
        "pickle: diffusers",
        lambda: written(
            lambda f: torch.save({"a": Room()}, f, _use_new_zipfile_serialization=False)
        ),
    ),
    "weights without end": (
        "pickle: diffusers",
        lambda: written(lambda f: torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, f)),
    ),
    "safetensors with an endless header": (
        "safetensors: segmentation",
        lambda: struct.pack("<Q", 2**63),
    ),
    "safetensors of an impossible size": (
        "safetensors: diffusers",
        lambda: tensors(a={"dtype": "F32", "shape": [0, 2**64 - 1], "data_offsets": [0, 0]}),
    ),
    "a deep config.json": ("json: segmentation", lambda: b"[" * 10**6),
    "a deep caption": ("jsonl: captions", lambda: b"[" * 10**6),
    "YAML that runs a command": (
        "yaml: options",
        lambda: b"data: !!python/object/apply:os.mkdir ['it ran']",
    ),
    "YAML that names a function": ("yaml: options", lambda: b"data: !!python/name:os.system"),
    "YAML of endless lists": ("yaml: options", lambda: doubling("a{i}: &a{i} [{last}]")),
    "YAML of endless merges": ("yaml: options", lambda: doubling("a{i}: &a{i} {{<<: [{last}]}}")),
    "YAML with an endless number": ("yaml: options", lambda: b"data: 0x" + b"f" * 6000),
    "YAML that counts by sixties": ("yaml: options", lambda: b"lr: " + b"1:" * 300 + b"1.5"),
    "YAML of a megabyte": ("yaml: options", lambda: b"a: 1\n" * 200_000),
}
