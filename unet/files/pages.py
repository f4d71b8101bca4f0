"""The common form of all image files: pages of (H, W, C), from named axes."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from unet.errors import InputError, said

Array: TypeAlias = NDArray[Any]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".npy")
MAX_PIXELS = 2**27  # of one page: 11,585 x 11,585
MAX_BYTES = 2**30  # of one page with all its channels
MAX_PAGES = 2**21  # of a stack; it has fewer
WIDEST = 32  # channels that a last axis is taken for, if nothing is said and the others are longer
CHANNELS = (
    "CS"  # axes that become channels: channels and samples; all others but Y and X are slices
)

ALL = slice(None)

# The orientation tag of EXIF and of TIFF, and what turns the stored rows (H, W, C) upright.
_UPRIGHT: dict[int, Callable[[Array], Array]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: rearrange(a, "h w c -> w h c"),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: rearrange(a[::-1, ::-1], "h w c -> w h c"),
    8: lambda a: np.rot90(a),
}


@dataclass(frozen=True, kw_only=True)
class ImageInfo:
    """What a file's header says of the array that `read_image` returns for each of its pages."""

    height: int  # upright, after the orientation tag
    width: int
    channels: int
    dtype: str  # "uint8", "uint16" or "float32"
    pages: int = 1  # slices of a TIFF or NPY stack: all axes but rows, columns and channels
    has_alpha: bool = False  # the file has an alpha channel, which is read where it is asked for
    lossy: bool = False  # JPEG and WebP change values
    names: tuple[str, ...] = ()  # of the channels, where the file says them
    nodata: float | None = None  # the value of pixels where nothing was measured; may be NaN
    palette: bytes | None = None  # of a file of indices: red, green and blue of each in turn
    axes: str = ""  # of a TIFF or NPY array; of what nothing is said, I (TIFF) or Z (NPY)
    series: int = 0  # pages that follow each other, where there are several axes of slices; 0: all


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How files are read, beyond what they say themselves.

    Attributes:
        axes: of TIFF and NPY arrays and volumes, as "CYX"; C and S are channels, others slices.
        channels: those to read, in this order: numbers from 0, or names.
        nodata: value of pixels where nothing was measured, instead of what a file declares.
        rgb: grey images are read as red, green and blue, where no channels are chosen.
    """

    axes: str | None = None
    channels: tuple[str, ...] = ()
    nodata: float | None = None
    rgb: bool = False

    def __post_init__(self) -> None:
        axes = self.axes
        if axes is not None:
            known = axes.isascii() and axes.isalpha() and axes.isupper()
            if not known or len(set(axes)) < len(axes) or not {"Y", "X"} <= set(axes):
                raise InputError(
                    f"axes {axes!r}: name each axis by one letter, such as CYX or ZYXC, with Y for "
                    "rows, X for columns and C for channels"
                )

    def to_dict(self) -> dict[str, Any]:
        """JSON values, which `from_dict` reads back; without `rgb` and what is not given."""
        nodata: float | str | None = self.nodata
        if self.nodata is not None and not math.isfinite(self.nodata):
            nodata = str(nodata)  # JSON has no NaN
        values = {"axes": self.axes, "channels": list(self.channels) or None, "nodata": nodata}
        return {key: value for key, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Reading:
        """What `to_dict` gave, from JSON; InputError if it is none."""
        try:
            nodata = saved.get("nodata")
            return cls(
                axes=None if saved.get("axes") is None else str(saved["axes"]),
                channels=tuple(map(str, saved.get("channels", ()))),
                nodata=None if nodata is None else float(nodata),
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(f"the model's way to read files is damaged: {error}") from error

    def chosen(self, info: ImageInfo) -> list[int] | None:
        """Places of the channels to read in a file; None: all of them.

        Raises:
            InputError: no such channel.
        """
        if not self.channels:
            return [0, 0, 0] if self.rgb and info.channels == 1 and not info.names else None
        found = []
        for channel in self.channels:
            if channel in info.names:
                found.append(info.names.index(channel))
            elif channel.isdecimal() and int(channel) < info.channels:
                found.append(int(channel))
            else:
                named = f", named {', '.join(info.names)}" if info.names else ""
                raise InputError(
                    f"there is no channel {channel!r}: it has {info.channels}, numbered from 0"
                    f"{named}"
                )
        return found

    def of(self, info: ImageInfo) -> ImageInfo:
        """The header of what is read, from the header of the file."""
        if self.nodata is not None:
            info = replace(info, nodata=self.nodata)
        chosen = self.chosen(info)
        if chosen is None:
            return info
        names = tuple(info.names[i] for i in chosen) if info.names else ()
        return replace(info, channels=len(chosen), names=names, has_alpha=False)


AS_STORED = Reading()


@dataclass(frozen=True)
class Page:
    """One image of a file, which is decoded when it is asked for.

    Attributes:
        info: of the file, with all its channels.
        decode: (H, W), or (H, W, C) with alpha behind the channels, in any byte order.
        orientation: the tag's value.
        indices: of a palette file: its values (H, W) instead of their colours.
        mapped: (H, W, C) as a map of the file, where it is stored as it is read.
        rectangle: its rows and columns (H, W, C), where they can be read by themselves.
    """

    info: ImageInfo
    decode: Callable[[], Array]
    orientation: int = 1
    indices: Callable[[], Array] | None = None
    mapped: Callable[[], Array] | None = None
    rectangle: Callable[[slice, slice], Array] | None = None

    def read(self, *, alpha: bool = False, indices: bool = False) -> Array:
        """Upright pixels (H, W, C), with `alpha` (H, W, C + 1); 1-bit as 0 and 255."""
        info = self.info
        if info.height * info.width > MAX_PIXELS:
            raise InputError(
                f"{info.height} x {info.width} is over {MAX_PIXELS:,} pixels; cut it into tiles"
            )
        channels = info.channels + (alpha and info.has_alpha)
        if indices:
            assert self.indices is not None
            channels = 1
        size = info.height * info.width * channels * np.dtype(info.dtype).itemsize
        if size > MAX_BYTES:
            raise InputError(f"{channels} channels take {size:,} bytes; cut it into tiles")
        array = (self.indices or self.decode)() if indices else self.decode()
        array = (array if array.ndim == 3 else array[..., None])[..., :channels]
        array = np.ascontiguousarray(_UPRIGHT.get(self.orientation, np.asarray)(array))
        if array.shape != (info.height, info.width, channels) or not array.size:
            raise InputError(f"its pixels {array.shape} do not fill the size in its header")
        return np.where(array, np.uint8(255), np.uint8(0)) if array.dtype == np.bool_ else array


GetPage: TypeAlias = Callable[[int], Page]  # IndexError past the last page


@dataclass(frozen=True)
class Stored:
    """An array in a file; each index of its leading axes is read by itself.

    Attributes:
        axes, shape: a letter and a length for each axis.
        leading: how many axes are leading ones.
        read: the array of the other axes, at an index of the leading ones; it may be a map.
    """

    axes: str
    shape: tuple[int, ...]
    leading: int
    read: Callable[[tuple[int, ...]], Sliceable]
    key: Any = None  # what else the file says of its pages

    def __post_init__(self) -> None:
        if not {"Y", "X"} <= set(self.axes) or len(self.axes) != len(self.shape):
            raise InputError(f"its axes {self.axes} of {self.shape} are not rows and columns")
        if not {"Y", "X"} <= set(self.axes[self.leading :]):
            raise InputError(f"its axes {self.axes} do not end in rows and columns")

    def named(self, axes: str | None) -> Stored:
        """The same array with these axes, where they are given.

        Raises:
            InputError: another number of axes.
        """
        if axes is None or (len(self.axes) == 2 and axes == "YX"):
            return self
        if len(axes) != len(self.axes):
            raise InputError(
                f"axes {axes} name {len(axes)} axes, but it has {len(self.axes)}: {self.axes} of "
                f"{' x '.join(map(str, self.shape))}"
            )
        return replace(self, axes=axes)

    @property
    def channels(self) -> int:
        """The product of the axes that are channels."""
        lengths = zip(self.axes, self.shape, strict=True)
        return math.prod(n for axis, n in lengths if axis in CHANNELS)

    @property
    def pages(self) -> int:
        """Slices: the product of all axes but rows, columns and channels."""
        lengths = zip(self.axes, self.shape, strict=True)
        return math.prod(n for axis, n in lengths if axis not in "YX" + CHANNELS)

    @property
    def series(self) -> int:
        """Slices along the last of several axes of them, such as Z of TZYX; 0: there is one."""
        lengths = zip(self.axes, self.shape, strict=True)
        found = [n for axis, n in lengths if axis not in "YX" + CHANNELS and n > 1]
        return found[-1] if len(found) > 1 else 0

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.shape[self.axes.index("Y")], self.shape[self.axes.index("X")]

    def page(self, index: int, rows: slice = ALL, columns: slice = ALL) -> Array:
        """(H, W, C) of a slice: a view wherever nothing has to be put together.

        Args:
            rows, columns: of a rectangle of it.
        """
        slices = [i for i, axis in enumerate(self.axes) if axis not in "YX" + CHANNELS]
        at = dict(
            zip(
                slices,
                np.unravel_index(index, [self.shape[i] for i in slices] or [1]),
                strict=False,
            )
        )
        leading = range(self.leading)
        inner = [i for i in leading if i not in at]  # leading axes of channels
        parts = [
            self._part(at | dict(zip(inner, place, strict=True)), rows, columns)
            for place in np.ndindex(*(self.shape[i] for i in inner))
        ]
        rest = [a for i, a in enumerate(self.axes) if i >= self.leading and i not in at]
        if not inner:
            array, axes = parts[0], rest
        else:
            lengths = [self.shape[i] for i in inner]
            array = np.stack(parts).reshape(*lengths, *parts[0].shape)
            axes = [*(self.axes[i] for i in inner), *rest]
        order = [axes.index("Y"), axes.index("X")]
        channels = [i for i in range(len(axes)) if i not in order]
        array = array.transpose(*order, *channels)
        return array if len(channels) == 1 else array.reshape(*array.shape[:2], -1)

    def _part(self, at: dict[int, Any], rows: slice, columns: slice) -> Array:
        array = self.read(tuple(int(at[i]) for i in range(self.leading)))
        if array.shape != self.shape[self.leading :]:
            raise InputError(f"its pixels {array.shape} do not fill the size in its header")
        seen = {"Y": rows, "X": columns}
        inside = range(self.leading, len(self.axes))
        return array[tuple(int(at[i]) if i in at else seen.get(self.axes[i], ALL) for i in inside)]


class Sliceable(Protocol):
    """An array in a file, of which parts are read: by numbers and slices, one for each axis."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __getitem__(self, key: Any) -> Array: ...


@dataclass(frozen=True, kw_only=True)
class Volume:
    """An array that is read in parts, and its metadata.

    Attributes:
        axes: a letter for each; "": not known.
        chunks: the size of a chunk, which is stored and read at once, along each axis.
        shards: the size of what is written at once, where several chunks share a file.
        names: of the channels.
        scale, translation: of each axis: the size of a pixel and the place of the first one.
        units: of these; "" where none is said.
        places: (4, 4), takes (slice, row, column, 1) to mm towards the right, the front and the top
            of the body, where a medical file says it.
        zarr_format: of the Zarr store it is in, and of what is written beside it.
    """

    array: Sliceable
    axes: str
    chunks: tuple[int, ...]
    shards: tuple[int, ...] | None = None
    names: tuple[str, ...] = ()
    scale: tuple[float, ...] | None = None
    translation: tuple[float, ...] | None = None
    units: tuple[str, ...] | None = None
    places: NDArray[np.float64] | None = None
    zarr_format: int = 3

    def stored(self, reading: Reading = AS_STORED) -> Stored:
        """The array with its axes, or with those that `reading` names.

        Raises:
            InputError: no rows and columns among them, or no pixel.
        """
        shape = tuple(map(int, self.array.shape))
        if not math.prod(shape):
            raise InputError(f"its shape {shape} holds no pixel")
        axes = self.axes
        if not axes:
            named = reading.axes is not None and len(reading.axes) == len(shape)
            axes = reading.axes if named and reading.axes else guessed_axes(shape)
        return Stored(axes, shape, 0, lambda _: self.array).named(reading.axes)

    def pages(self, reading: Reading) -> GetPage:
        """Its slices."""
        stored = self.stored(reading)
        info = ImageInfo(
            height=stored.size[0],
            width=stored.size[1],
            channels=stored.channels,
            dtype=image_dtype(self.array.dtype),
            pages=stored.pages,
            names=self.names if len(self.names) == stored.channels else (),
            axes=stored.axes,
            series=stored.series,
        )

        def get_page(index: int) -> Page:
            if not 0 <= index < stored.pages:
                raise IndexError(index)
            return Page(
                info, lambda: stored.page(index), rectangle=lambda y, x: stored.page(index, y, x)
            )

        return get_page


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Any error with a file in this context is an InputError that names it. Warnings are silenced:
    a file is read whole or refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if path.is_symlink() and not path.exists():
                target = os.readlink(path)
                raise InputError(
                    f"a link to {target!r}, which does not exist: mend it, or delete it"
                )
            yield
    except InputError as error:
        raise InputError(f"{str(path)!r}: {error}") from error.__cause__
    except Exception as error:  # decoders raise what a wrong byte leads them to, from any class
        reason = said(error)
        raise InputError(f"{str(path)!r}: not an image, or a damaged one ({reason})") from error


def guessed_axes(shape: Sequence[int]) -> str:
    """The axes of an array that does not name them: (H, W), (H, W, C) or (N, H, W[, C]).

    A last axis of 1, 3 or 4 is taken as channels, and one of up to WIDEST beside longer ones.

    Raises:
        InputError: none of these.
    """
    count = len(shape)
    *others, last = shape if count > 1 else (0,)
    has_channels = count > 2 and (
        last in (1, 3, 4) or (last <= WIDEST and last < min(others[-2:]) and count < 5)
    )
    if not 2 <= count - has_channels <= 3 or not math.prod(shape):
        raise InputError(
            f"its shape {tuple(shape)} is not (H, W), (H, W, C) or (N, H, W[, C]); name its axes, "
            "such as ZCYX"
        )
    axes = "ZYX" if count - has_channels == 3 else "YX"
    return f"{axes}C" if has_channels else axes


def named_axes(names: Sequence[str | None]) -> str:
    """A letter for each axis by what a file calls it, such as "z", "Channel", "time"; "": unknown.

    Raises:
        InputError: two axes of one letter.
    """
    words = {"row": "Y", "rows": "Y", "height": "Y", "col": "X", "column": "X", "columns": "X"}
    words |= {"width": "X", "depth": "Z", "plane": "Z", "slice": "Z", "time": "T", "frame": "T"}
    words |= {"channel": "C", "channels": "C"}
    lower = [(name or "").lower() for name in names]
    found = "".join(words.get(name, name if len(name) == 1 else "?").upper() for name in lower)
    if not (found.isascii() and found.isalpha()):
        return ""
    if len(set(found)) < len(found):
        raise InputError(f"its axes are named {', '.join(map(str, names))}: name them with --axes")
    return found


def as_read(array: Array, info: ImageInfo) -> Array:
    """Pixels in the type that they are read as: 1-bit as 0 and 255.

    Raises:
        InputError: NaN where no data are not declared to be NaN; infinite or too large values.
    """
    if array.dtype == np.bool_:
        array = np.where(array, np.uint8(255), np.uint8(0))
    with np.errstate(over="ignore"):
        array = array.astype(info.dtype, copy=False)
    if array.dtype == np.float32:
        known = np.isfinite(array)
        if info.nodata is not None and math.isnan(info.nodata):
            known |= np.isnan(array)
        if not known.all():
            raise InputError(
                "it holds NaN, infinite or too large values; replace them, or if NaN stands "
                "for no data, say so with --nodata nan"
            )
    return array


def colour_table(palette: bytes) -> NDArray[np.uint8]:
    """The colours (N, 3) of the indices of a palette file; (N, 1) if all of them are grey."""
    table = np.frombuffer(palette, np.uint8).reshape(-1, 3)
    return table[:, :1] if (table == table[:, :1]).all() else table


def image_dtype(stored: np.dtype[Any] | None) -> str:
    """The type that pixels of this type are read as."""
    if stored is None or stored.kind not in "biuf":
        raise InputError(f"pixels of type {stored}; 8 or 16 bits or float can be read")
    return {"bool": "uint8", "uint8": "uint8", "uint16": "uint16"}.get(stored.name, "float32")


def upright(size: Sequence[int], orientation: int) -> tuple[int, int]:
    """Height and width after the orientation tag."""
    height, width = size[:: -1 if 5 <= orientation <= 8 else 1]
    return height, width


def missing(image: Array, nodata: float | None) -> NDArray[np.bool_]:
    """Where (H, W) an image (H, W, C) as stored holds no data.

    The declared value counts in any channel of floats, and in all channels of whole numbers, of
    which 0 is a dark pixel's value, too. NaN counts wherever it is.
    """
    found = np.zeros(image.shape[:2], bool)
    if image.dtype.kind == "f":
        found |= np.isnan(image).any(axis=2)
    if nodata is not None and not math.isnan(nodata):
        equal = image == (np.float32(nodata) if image.dtype.kind == "f" else nodata)
        found |= equal.any(axis=2) if image.dtype.kind == "f" else equal.all(axis=2)
    return found
