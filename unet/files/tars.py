"""Tar files of samples, as WebDataset names them: one pass over the headers, then any member."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from unet.errors import InputError, said
from unet.files.pages import SUFFIXES

_BLOCK = 512  # bytes of a header


class Tar:
    """The members of a local, uncompressed tar, of which names and places alone are kept.

    Raises:
        InputError: cut off, damaged, compressed, or with two members of one name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        names, places = [], []
        try:
            with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # which would keep every header
                    hidden = os.path.basename(member.name).startswith(".")
                    if member.isreg() and not member.issparse() and not hidden:
                        names.append(member.name.removeprefix("./").encode())
                        places.append((member.offset_data, member.size))
                file.seek(tar.offset)
                if any(file.read(_BLOCK)):  # tarfile takes a damaged header for the end
                    raise InputError(f"its header at byte {tar.offset:,} is damaged: copy it anew")
        except tarfile.TarError as error:
            raise InputError(
                f"not a whole uncompressed tar ({said(error)}): copy it anew, or decompress it, "
                "since samples are read in any order"
            ) from error
        stored = np.array(names, np.bytes_)
        order = np.argsort(stored, kind="stable")
        self._names = stored[order]
        self._places = np.array(places, np.int64).reshape(-1, 2)[order]
        self._stored = np.argsort(order)  # where each member of the file is among them
        twice = np.flatnonzero(self._names[1:] == self._names[:-1])
        if len(twice):
            raise InputError(f"it has two members {self._names[twice[0]].decode()!r}")

    def samples(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """The key of each sample, and the endings of its members, in the order of the file.

        A key is a path up to the first dot of the file's name.
        """
        found: dict[str, tuple[str, ...]] = {}
        shared: dict[tuple[str, ...], tuple[str, ...]] = {}
        for at in self._stored.tolist():
            folder, slash, name = self._names[at].decode().rpartition("/")
            stem, dot, ending = name.partition(".")
            if dot:
                key = f"{folder}{slash}{stem}"
                endings = (*found.get(key, ()), ending)
                found[key] = shared.setdefault(endings, endings)
        yield from found.items()

    def holds_picture(self, part: str) -> bool:
        return f".{part}".lower().endswith(SUFFIXES)

    def read(self, key: str, part: str) -> bytes:
        name = f"{key}.{part}".encode()
        at = int(np.searchsorted(self._names, name))
        if at == len(self._names) or self._names[at] != name:
            raise InputError("the shard has no such member")
        start, size = self._places[at].tolist()
        with self.path.open("rb") as file:
            file.seek(start)
            data = file.read(size)
        if len(data) != size:
            raise InputError(f"the shard is cut off: {len(data):,} of {size:,} bytes are there")
        return data
