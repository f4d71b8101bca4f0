"""`ClassTable`: from mask values to classes and back, saved with a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from einops import repeat
from numpy.typing import NDArray

from unet.errors import InputError
from unet.files.mask_values import (
    MAX_CLASSES,
    Value,
    as_colour,
    code_values,
    codes_of,
    listed,
    places,
    some,
    value_codes,
)
from unet.files.pages import Array
from unet.words import counted

IGNORE = 255  # the class index of pixels that count neither in training nor in a score
DTYPES = ("uint8", "uint16", "float32")  # of images
RARE = 0.01  # share of the pixels below which few crops show a class


@dataclass(frozen=True, kw_only=True)
class ClassTable:
    """Mask values and the classes that they stand for: class i is the i-th smallest value."""

    values: tuple[Value, ...]  # all numbers or all colours
    shares: tuple[float, ...]  # of the pixels that are not ignored
    ignore_value: Value | None = None
    ignored_share: float = 0.0  # of all pixels
    names: tuple[str, ...] = ()  # of the classes, where they are known
    palette: bytes | None = None  # red, green and blue of each value, where masks are indices

    @classmethod
    def of(
        cls,
        masks: Iterable[Array],
        ignore_value: Value | None = None,
        names: Sequence[str] = (),
    ) -> ClassTable:
        """The table of all masks of a set, (H, W) or (H, W, 3); see `counted`."""
        pixels: Counter[Value] = Counter()
        for mask in masks:
            codes, counts = np.unique(value_codes(mask), return_counts=True)
            values = code_values(codes, mask.ndim == 3)
            pixels.update(dict(zip(values, counts.tolist(), strict=True)))
            if len(pixels) > 100 * MAX_CLASSES:
                break
        return cls.counted(pixels, ignore_value, dict(enumerate(names)))

    @classmethod
    def counted(
        cls,
        pixels: Mapping[Value, int],
        ignore_value: Value | None = None,
        known: Mapping[Value, str] | None = None,
        palette: bytes | None = None,
    ) -> ClassTable:
        """The table of masks, from the number of pixels of each value.

        If some masks are grey and some in colour, grey values count as grey colours.

        Args:
            known: the values that are the classes, with their names, whether they occur or not;
                the ignored value need not occur, either.
            palette: red, green and blue of each value in turn, where masks are indices.

        Raises:
            InputError: more than MAX_CLASSES values, or a single one; a value that is not among the
                known ones; an ignored value that does not occur.
        """
        known = known or {}
        found: Counter[Value] = Counter(dict.fromkeys(known, 0))
        found.update(pixels)
        if any(isinstance(value, tuple) for value in found):
            colours: Counter[Value] = Counter()
            for value, count in found.items():
                colours[as_colour(value)] += count
            known = {as_colour(value): name for value, name in known.items()}
            found, ignore_value = (
                colours,
                None if ignore_value is None else as_colour(ignore_value),
            )
        ignored = 0
        if ignore_value is not None:
            if ignore_value not in found and not known:
                raise InputError(
                    f"ignore value {ignore_value} is in no mask: the masks hold {listed(found)}"
                )
            ignored = found.pop(ignore_value, 0)
            known = {value: name for value, name in known.items() if value != ignore_value}
        if known and (strange := [value for value in found if value not in known]):
            raise InputError(
                f"the masks hold {listed(strange)}, which have no name: the named classes are "
                f"{listed(known)}"
            )
        if len(found) > MAX_CLASSES:
            raise InputError(
                f"the masks hold {len(found)} distinct values ({listed(found)}), more than "
                f"{MAX_CLASSES}: if they number objects, give --instances, else save each class "
                "with one value"
            )
        if len(+found) < 2:
            raise InputError(
                f"all mask pixels have the value {listed(+found)}, but two are needed: give masks "
                "in which what is to be found has a value of its own"
            )
        total, ordered = sum(found.values()), sorted(found, key=as_colour)
        return cls(
            values=tuple(ordered),
            shares=tuple(found[value] / total for value in ordered),
            ignore_value=ignore_value,
            ignored_share=ignored / (total + ignored),
            names=tuple(known[value] for value in ordered) if known else (),
            palette=palette,
        )

    @property
    def rare(self) -> tuple[int, ...]:
        """The classes that have pixels, but less than RARE of them."""
        return tuple(k for k, share in enumerate(self.shares) if 0 < share < RARE)

    def ignoring(self, value: Value) -> ClassTable:
        """The same classes with another ignored mask value.

        Raises:
            InputError: the value is that of a class.
        """
        ignored = as_colour(value) if isinstance(self.values[0], tuple) else value
        if ignored in self.values:
            raise InputError(
                f"ignore value {value} is a class of the model; its classes are "
                f"{listed(self.values)}"
            )
        return replace(self, ignore_value=ignored)

    def encode(self, mask: Array, name: str = "mask") -> NDArray[np.uint8]:
        """Class indices (H, W) of mask values (H, W) or (H, W, 3); IGNORE where ignored.

        Raises:
            InputError: a value that is not in the table; the message gives `name`, the values and
                the table.
        """
        colour = isinstance(self.values[0], tuple)
        if colour and mask.ndim == 2:
            mask = repeat(mask, "h w -> h w c", c=3)
        codes, comparable = value_codes(mask), colour == (mask.ndim == 3)
        place, known = places(codes, self.values)
        indices, unknown = place.astype(np.uint8), ~known | (not comparable)
        if self.ignore_value is not None and comparable:
            ignored = codes == codes_of(np.array(self.ignore_value), colour)
            indices[ignored] = IGNORE
            unknown &= ~ignored
        if unknown.any():
            found = code_values(np.unique(codes[unknown]), mask.ndim == 3)
            raise InputError(
                f"{name}: unexpected values {some(found)} in "
                f"{counted(int(unknown.sum()), 'pixel')}; the classes are {listed(self.values)}"
            )
        return indices

    def decode(self, indices: Array) -> Array:
        """Mask values (H, W) or (H, W, 3) of class indices (H, W)."""
        known = np.arange(256) < len(self.values)
        values = np.zeros((256, *np.shape(self.values[0])), np.int64)
        values[known] = self.values
        if self.ignore_value is not None:
            known[IGNORE], values[IGNORE] = True, self.ignore_value
        if not known[indices].all():
            raise ValueError(f"class indices {np.unique(indices)} with {len(self.values)} classes")
        return values.astype(self.dtype)[indices]

    @property
    def dtype(self) -> np.dtype[Any]:
        """A small integer type that holds all values, the ignored one among them."""
        ignored = () if self.ignore_value is None else (self.ignore_value,)
        values = np.array([*self.values, *ignored], np.int64)
        return np.result_type(*map(np.min_scalar_type, (values.min(), values.max())))

    @property
    def suffix(self) -> str:
        """The file suffix for masks: a PNG holds no values below 0 or above 65,535."""
        return "png" if self.dtype in ("uint8", "uint16") else "tif"

    def lines(self) -> list[str]:
        """The table as text: value, class, share of the pixels."""
        kinds = self.names or [f"class {i}" for i in range(len(self.values))]
        rows = list(zip(self.values, kinds, self.shares, strict=True))
        if self.ignore_value is not None:
            rows.append((self.ignore_value, "ignored", self.ignored_share))
        width = max(len(str(value)) for value, _, _ in rows)
        longest = max(8, *(len(what) for _, what, _ in rows))
        lines = [
            f"value {value!s:>{width}} -> {what:{longest}} {share:7.2%}"
            for value, what, share in rows
        ]
        return lines

    def to_dict(self) -> dict[str, Any]:
        """JSON values, which `from_dict` reads back."""
        saved = asdict(self)
        palette = saved.pop("palette")
        return saved if palette is None else {**saved, "palette": palette.hex()}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> ClassTable:
        """The table that `to_dict` gave, from JSON; InputError if it is none."""
        try:
            *values, ignore_value = (
                tuple(map(int, value)) if isinstance(value, (list, tuple)) else value
                for value in [*saved["values"], saved["ignore_value"]]
            )
            shares = tuple(float(share) for share in saved["shares"])
            names = tuple(str(name) for name in saved.get("names", ()))
            numbers = np.array(values if ignore_value is None else [*values, ignore_value])
            fits = 2 <= len(values) == len(shares) <= MAX_CLASSES and numbers.dtype == np.int64
            rising = np.diff(codes_of(numbers, numbers.ndim == 2)[: len(values)]) > 0
            named = len(names) in (0, len(values))
            if not (fits and named and rising.all()) or numbers.shape[1:] not in ((), (3,)):
                raise ValueError(f"values {some(values)}, {len(shares)} shares, {len(names)} names")
            palette = saved.get("palette")
            table = cls(
                palette=None if palette is None else bytes.fromhex(palette),
                values=tuple(values),
                shares=shares,
                ignore_value=ignore_value,
                ignored_share=float(saved["ignored_share"]),
                names=names,
            )
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise InputError(f"the model's class table is damaged: {error}") from error
        return table


def class_names(table: ClassTable) -> list[str]:
    """Short names of the classes, else the mask values: 255, or 255,0,0 for a colour."""
    if table.names:
        return list(table.names)
    return [",".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in table.values]
