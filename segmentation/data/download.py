"""Data sets by name: ISBI 2012, fetched once into a cache folder and checked on every use."""

from __future__ import annotations

import hashlib
import http.client
import os
import struct
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib import request
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from filelock import FileLock
from tqdm import tqdm

from unet.errors import InputError
from unet.files.images import image_info, read_image
from unet.files.writing import replacing

ISBI_URL = "https://downloads.imagej.net/ISBI-2012-challenge.zip"

# sha256 of the pixels of each stack, slice after slice. It is the pixels that are checked and not
# the archive: it may be packed anew, and stacks that were put into the cache by hand will do.
ISBI_PIXELS = {
    "train-volume.tif": "200da3d452d726e6c9ca1ce04b869d4edb727320d23b516d01cce707dc8c4760",
    "train-labels.tif": "a7cb64000a1a7e542682927e19c91339f58f9f178e0bcce4e207371116f0ca36",
    "test-volume.tif": "1b58fa7ec1d0ff9d39a855622db3ff66a97863036339b0d04be51b2f5a99b0e9",
}

ARCHIVE_BYTES = 2**28
STACK_BYTES = 2**26  # of a file in the archive, and of its pixels; a stack of ISBI 2012 has 2**23
TIMEOUT = 30  # seconds without a byte
PATIENCE = 600  # seconds to wait for another process that is fetching

_FAILURES = (
    OSError,  # no connection, HTTP errors, time-outs, no space
    http.client.HTTPException,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,  # zipfile lets it through
    EOFError,
    RuntimeError,  # encrypted, or of an unknown kind
    ValueError,  # InputError too
)


def cache_folder() -> Path:
    """$UNET_CACHE, or else `unet-diffusion` in $XDG_CACHE_HOME, or else in ~/.cache."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    own = os.environ.get("UNET_CACHE") or os.path.join(caches, "unet-diffusion")
    return Path(os.path.expanduser(own))


def isbi2012_folder(
    cache: Path | None = None,
    url: str = ISBI_URL,
    *,
    checksums: Mapping[str, str] = ISBI_PIXELS,
    local_http: bool = False,
) -> Path:
    """The folder of ISBI 2012's stacks, for `find_pairs`; fetched if the cache lacks or spoilt it.

    The data: Arganda-Carreras et al. 2015 (doi:10.3389/fnana.2015.00142) and Cardona et al. 2010
    (doi:10.1371/journal.pbio.1000502), which are to be cited; no licence is stated.

    Any number of processes may call it at once: one fetches, the others wait for it.

    Args:
        cache: `cache_folder()` if not given; the stacks are in `isbi2012` in it.
        url: of the archive; https, also after a redirect.
        checksums: file name -> sha256 of the pixels of its slices.
        local_http: allow plain http from 127.0.0.1, for tests.

    Raises:
        InputError: it cannot be fetched or is not what it should be; says what to do instead.
    """
    folder = (cache or cache_folder()) / "isbi2012"
    fault = _fault(folder, checksums)
    if not fault:  # nothing is written: others may share their cache read-only
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=PATIENCE):
            for leftover in folder.glob(".*.tmp"):  # of a kill in the middle of a write
                leftover.unlink(missing_ok=True)
            if _fault(folder, checksums):  # no other process was faster
                print(f"ISBI 2012: {fault}; fetching {url} to {folder}", file=sys.stderr)
                # Has no name, or loses it when it is closed: a kill leaves nothing behind.
                with tempfile.TemporaryFile(dir=folder) as archive:
                    _fetch_zip(url, archive, local_http)
                    _unpack(archive, folder, checksums)
    except _FAILURES as error:
        reason = str(error.reason if type(error) is URLError else error) or type(error).__name__
        if isinstance(error, HTTPError):
            error.close()  # it is the server's answer, too
        *first, last = checksums
        raise InputError(
            f"ISBI 2012 is not in {folder} ({fault}) and could not be fetched from {url} "
            f"({' '.join(reason.split())}): download that archive by other means and put "
            f"{', '.join(first)} and {last} from it into this folder (UNET_CACHE moves the cache)"
        ) from error
    return folder


def _fault(folder: Path, checksums: Mapping[str, str]) -> str:
    """What is wrong with the stacks of a folder; empty if they are as they should be."""
    missing = [name for name in checksums if not os.path.exists(folder / name)]
    if missing:
        return f"{', '.join(missing)} missing"
    try:
        for name, checksum in checksums.items():
            _check_pixels(folder / name, name, checksum)
    except InputError as error:
        return str(error)
    return ""


def _check_pixels(file: Path, name: str, checksum: str) -> None:
    info = image_info(file)
    if info.pages * info.height * info.width > STACK_BYTES:
        raise InputError(f"{name} has {info.pages} slices of {info.height} x {info.width}")
    pixels = hashlib.sha256()
    for page in range(info.pages):
        pixels.update(read_image(file, page).tobytes())
    if pixels.hexdigest() != checksum:
        raise InputError(f"{name} has other pixels than it should: its checksum differs")


def _fetch_zip(url: str, file: IO[bytes], local_http: bool) -> None:
    """Downloads a zip archive of at most ARCHIVE_BYTES."""
    _check_url(url, local_http)
    opener = request.OpenerDirector()  # unlike urlopen's, it knows neither ftp:, file: nor data:
    for handler in (
        request.ProxyHandler(),
        request.HTTPSHandler(),
        request.HTTPHandler(),
        request.HTTPErrorProcessor(),
        request.HTTPDefaultErrorHandler(),
        _Redirects(local_http),
    ):
        opener.add_handler(handler)
    opener.addheaders = [("User-Agent", "unet-diffusion")]
    with opener.open(url, timeout=TIMEOUT) as response:
        size: int | None = response.length
        with tqdm(total=size, unit="B", unit_scale=True, desc="ISBI 2012", disable=None) as bar:
            while max(size or 0, file.tell()) <= ARCHIVE_BYTES and (chunk := response.read(2**16)):
                bar.update(file.write(chunk))
        kind = response.headers.get_content_type()
    if max(size or 0, file.tell()) > ARCHIVE_BYTES:
        raise InputError(f"the archive has more than {ARCHIVE_BYTES:,} bytes")
    if size is not None and file.tell() < size:
        raise InputError(f"the connection ended after {file.tell():,} of {size:,} bytes")
    if not zipfile.is_zipfile(file):
        raise InputError(f"the {file.seek(0, os.SEEK_END):,} bytes of {kind} are no zip archive")


def _check_url(url: str, local_http: bool) -> None:
    parts = urlsplit(url)
    local = local_http and parts.scheme == "http" and parts.hostname == "127.0.0.1"
    if not (parts.scheme == "https" or local):
        raise InputError(f"{url} is refused, since only https is allowed")


class _Redirects(request.HTTPRedirectHandler):
    """Follows a redirect only to where the download may go in the first place."""

    def __init__(self, local_http: bool) -> None:
        self.local_http = local_http

    def redirect_request(
        self, req: request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> request.Request | None:
        try:
            _check_url(newurl, self.local_http)
        except InputError:
            fp.close()
            raise
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _unpack(archive: IO[bytes], folder: Path, checksums: Mapping[str, str]) -> None:
    """Checks the stacks of a zip archive and puts them into a folder, all of them or none.

    Paths in the archive only serve to find the stacks: no file is written to where one leads.
    """
    with zipfile.ZipFile(archive) as zipped, ExitStack() as files:
        for name, checksum in checksums.items():
            members = [m for m in zipped.infolist() if PurePosixPath(m.filename).name == name]
            if len(members) != 1:
                raise InputError(f"the archive holds {len(members)} files named {name}")
            size, packed = members[0].file_size, members[0].compress_type
            if size > STACK_BYTES:
                raise InputError(f"{name} unpacks to {size:,} bytes")
            if packed not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise InputError(f"{name} is packed by method {packed}")
            file = files.enter_context(replacing(folder / name))
            with zipped.open(members[0]) as stream:
                file.write_bytes(stream.read(size + 1))  # read() alone would unpack without a limit
            _check_pixels(file, name, checksum)
