from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from filelock import FileLock
from numpy.typing import NDArray

from segmentation.data import download
from segmentation.data.download import ISBI_PIXELS, cache_folder, isbi2012_folder
from segmentation.data.pairs import find_pairs
from unet.errors import InputError
from unet.files.images import list_images, read_image

NAMES = tuple(ISBI_PIXELS)
RNG = np.random.default_rng(0)
STACKS: dict[str, NDArray[Any]] = {
    name: RNG.integers(0, 256, (3, 16, 20), np.uint8) for name in NAMES
}
STACKS["train-labels.tif"] = (STACKS["train-labels.tif"] > 99) * np.uint8(255)


def checksums_of(stacks: dict[str, NDArray[Any]]) -> dict[str, str]:
    return {name: hashlib.sha256(pixels.tobytes()).hexdigest() for name, pixels in stacks.items()}


def tiff(pixels: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, imagej=True, metadata={"axes": "ZYX"})
    return file.getvalue()


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


FILES = {f"ISBI-2012-challenge/{name}": tiff(pixels) for name, pixels in STACKS.items()}
OTHERS = {
    "ISBI-2012-challenge/": b"",
    "ISBI-2012-challenge/test-labels.tif": b"?",
    "__MACOSX/ISBI-2012-challenge/._train-volume.tif": b"?",
}
ARCHIVE = zipped(OTHERS | FILES)


class Server(ThreadingHTTPServer):
    """Answers every GET with what the test says."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.body = 200, ARCHIVE
        self.headers: dict[str, str] = {"Content-Type": "application/zip"}
        self.says_length = True
        self.requests: list[str] = []
        self.sent_half, self.hurry = threading.Event(), threading.Event()
        self.hurry.set()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/ISBI-2012-challenge.zip"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        self.send_response(self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        if self.server.says_length and "Content-Length" not in self.server.headers:
            self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        half = len(self.server.body) // 2
        self.wfile.write(self.server.body[:half])
        self.wfile.flush()
        self.server.sent_half.set()
        self.server.hurry.wait(20)
        try:
            self.wfile.write(self.server.body[half:])
        except OSError:
            self.close_connection = True  # the client did not wait

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.hurry.set()
        server.shutdown()


def fetch(cache: Path, server: Server, url: str | None = None) -> Path:
    checksums = checksums_of(STACKS)
    return isbi2012_folder(cache, url or server.url, checksums=checksums, local_http=True)


def shown(folder: Path) -> set[str]:
    """What a folder holds, hidden files too, without the lock."""
    return {path.name for path in folder.rglob("*")} - {".lock"}


# -- what should happen


def test_the_stacks_are_fetched_once_and_found_as_pairs(tmp_path: Path, server: Server) -> None:
    folder = fetch(tmp_path / "new" / "cache", server)
    assert folder == tmp_path / "new" / "cache" / "isbi2012"
    assert shown(folder) == set(NAMES)
    pairs = find_pairs(folder)
    np.testing.assert_array_equal(
        [pair.read_image()[..., 0] for pair in pairs], STACKS["train-volume.tif"]
    )
    np.testing.assert_array_equal([pair.read_mask() for pair in pairs], STACKS["train-labels.tif"])
    server.status = 500
    assert fetch(tmp_path / "new" / "cache", server) == folder
    assert len(server.requests) == 1


def test_stacks_put_there_by_hand_need_no_server(tmp_path: Path) -> None:
    for name, pixels in STACKS.items():
        (tmp_path / "isbi2012").mkdir(exist_ok=True)
        tifffile.imwrite(
            tmp_path / "isbi2012" / name, pixels, compression="zlib", photometric="minisblack"
        )
    folder = isbi2012_folder(tmp_path, "https://127.0.0.1:9/", checksums=checksums_of(STACKS))
    assert shown(folder) == set(NAMES)


def test_a_redirect_is_followed_where_it_is_allowed(tmp_path: Path, server: Server) -> None:
    with Server() as other:
        threading.Thread(target=other.serve_forever, args=(0.02,), daemon=True).start()
        other.status, other.body = 302, b""
        other.headers = {"Location": server.url}
        fetch(tmp_path, server, other.url)
        other.shutdown()
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-100]),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(tiff(STACKS["train-labels.tif"] ^ 1)),
        lambda file: file.unlink(),
    ],
)
def test_a_damaged_cache_is_replaced_or_explained(
    tmp_path: Path,
    server: Server,
    spoil: Callable[[Path], object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = fetch(tmp_path, server)
    spoil(folder / "train-labels.tif")
    server.status = 503
    with pytest.raises(InputError, match=r"is not in .*train-labels\.tif.*503"):
        fetch(tmp_path, server)
    server.status = 200
    capsys.readouterr()
    assert fetch(tmp_path, server) == folder
    assert "train-labels.tif" in capsys.readouterr().err
    fetch(tmp_path, server, "https://127.0.0.1:9/")


def test_the_cache_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("UNET_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / "home/.cache/unet-diffusion"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/unet-diffusion"
    monkeypatch.setenv("UNET_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    folder = isbi2012_folder(None, server.url, checksums=checksums_of(STACKS), local_http=True)
    assert folder == tmp_path / "own/isbi2012"


# -- what must not


def set_(**values: Any) -> Callable[[Server], None]:
    return lambda server: vars(server).update(values)


def redirect(to: str) -> Callable[[Server], None]:
    return set_(status=302, body=b"", headers={"Location": to})


def altered(**members: bytes) -> Callable[[Server], None]:
    """An archive with other content in train_volume, train_labels or test_volume."""
    named = {f"{name.replace('_', '-')}.tif": content for name, content in members.items()}
    return set_(body=zipped({name: tiff(STACKS[name]) for name in NAMES} | named))


def forged_size(name: str, size: int) -> bytes:
    """The archive with another uncompressed size of one member in both of its headers."""
    archive = bytearray(zipped({name: tiff(STACKS[name]) for name in NAMES}))
    for signature, size_at, name_at in ((b"PK\3\4", 22, 30), (b"PK\1\2", 24, 46)):
        at = archive.find(signature)
        while archive[at + name_at : at + name_at + len(name)] != name.encode():
            at = archive.find(signature, at + 1)
        archive[at + size_at : at + size_at + 4] = size.to_bytes(4, "little")
    return bytes(archive)


def encrypted() -> bytes:
    archive = bytearray(ARCHIVE)
    for signature, flags_at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = archive.find(signature)
        while at >= 0:
            archive[at + flags_at] |= 1
            at = archive.find(signature, at + 1)
    return bytes(archive)


def linked(name: str, to: str) -> bytes:
    """The archive with a symbolic link in place of one member."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for other in NAMES:
            member = zipfile.ZipInfo(other)
            member.external_attr = (0o120777 if other == name else 0o100644) << 16
            archive.writestr(member, to if other == name else tiff(STACKS[other]))
    return file.getvalue()


PAGE = b"<!DOCTYPE html><title>Sign in</title>"


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (set_(status=404), r"HTTP Error 404: Not Found"),
        (set_(body=PAGE, headers={"Content-Type": "text/html; charset=utf-8"}), "of text/html are"),
        (set_(body=b""), r"the 0 bytes of application/zip are no zip archive"),
        (set_(body=ARCHIVE[:-30]), r"are no zip archive"),
        (
            set_(body=ARCHIVE[:-30], headers={"Content-Length": str(len(ARCHIVE))}),
            rf"ended after {len(ARCHIVE) - 30:,} of {len(ARCHIVE):,} bytes",
        ),
        (set_(body=ARCHIVE, headers={"Content-Length": str(2**40)}), "more than 268,435,456"),
        (set_(body=ARCHIVE, headers={"Content-Length": "900"}), "the 900 bytes .* are no zip"),
        (redirect("file:///etc/passwd"), "file:///etc/passwd' is not allowed"),
        (redirect("data:application/zip,x"), "is not allowed"),
        (redirect("ftp://127.0.0.1/a.zip"), r"ftp://127\.0\.0\.1/a\.zip is refused"),
        (redirect("http://localhost/a.zip"), r"http://localhost/a\.zip is refused"),
        (redirect("/ISBI-2012-challenge.zip"), r"HTTP Error 302: .*infinite loop"),
        (set_(body=zipped(OTHERS)), r"the archive holds 0 files named train-volume\.tif"),
        (set_(body=zipped(FILES | {"b/test-volume.tif": b""})), r"2 files named test-volume\.tif"),
        (altered(train_labels=tiff(STACKS["train-labels.tif"] ^ 1)), "train-labels.tif has other"),
        (altered(train_labels=tiff(STACKS["train-labels.tif"][:2])), "train-labels.tif has other"),
        (altered(test_volume=tiff(STACKS["test-volume.tif"])[:-50]), "damaged|truncated|missing"),
        (altered(test_volume=b"not a TIFF"), "not an image"),
        (set_(body=linked("test-volume.tif", "/etc/passwd")), r"test-volume\.tif.* not an image"),
        (set_(body=forged_size("train-volume.tif", 2**31)), "unpacks to 2,147,483,648 bytes"),
        (set_(body=forged_size("train-volume.tif", 1000)), "CRC-32"),
        (set_(body=encrypted()), "encrypted"),
        (set_(body=zipped(FILES, zipfile.ZIP_LZMA)), "packed by method 14"),
    ],
)
def test_what_is_not_the_archive_is_refused(
    tmp_path: Path, server: Server, prepare: Callable[[Server], None], reason: str
) -> None:
    prepare(server)
    with pytest.raises(InputError, match=reason) as error:
        fetch(tmp_path, server)
    message = str(error.value)
    assert server.url in message
    assert "put train-volume.tif, train-labels.tif and test-volume.tif from it into" in message
    assert str(tmp_path / "isbi2012") in message
    assert "\n" not in message
    assert shown(tmp_path) == {"isbi2012"}


def test_a_server_that_is_away_or_stalls_is_left(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"\(\[Errno \d+\] Connection refused\): download that"):
        fetch(tmp_path, server, "http://127.0.0.1:9/a.zip")
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.hurry.clear()
    with pytest.raises(InputError, match="timed out"):
        fetch(tmp_path, server)
    assert shown(tmp_path) == {"isbi2012"}


def test_only_https_is_allowed(tmp_path: Path, server: Server) -> None:
    for url in (server.url, "ftp://127.0.0.1/a.zip", "file:///a.zip", "a.zip", "http://[/"):
        with pytest.raises(InputError, match=r"is refused, since only https|Invalid"):
            isbi2012_folder(tmp_path, url, checksums=checksums_of(STACKS))
    with pytest.raises(InputError, match=r"SSL|WRONG_VERSION|record layer"):
        isbi2012_folder(tmp_path, server.url.replace("http", "https", 1))
    with pytest.raises(InputError, match="is refused"):
        fetch(tmp_path, server, server.url.replace("127.0.0.1", "127.0.0.1.example.org"))
    assert not server.requests


def test_paths_in_the_archive_lead_nowhere(tmp_path: Path, server: Server) -> None:
    cache = tmp_path / "a" / "b" / "c"
    server.body = zipped(
        {
            "../../train-volume.tif": tiff(STACKS["train-volume.tif"]),
            f"{tmp_path}/train-labels.tif": tiff(STACKS["train-labels.tif"]),
            "x/../../../test-volume.tif": tiff(STACKS["test-volume.tif"]),
            "../../../evil.tif": b"?",
            "../.bashrc": b"?",
        }
    )
    folder = fetch(cache, server)
    assert shown(folder) == set(NAMES)
    assert shown(tmp_path) == {"a", "b", "c", "isbi2012", *NAMES}


@pytest.mark.parametrize("says_length", [True, False])
@pytest.mark.parametrize(
    ("limit", "reason"), [("ARCHIVE_BYTES", "more than 900 bytes"), ("STACK_BYTES", "unpacks to")]
)
def test_sizes_have_a_limit(
    tmp_path: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
    reason: str,
    says_length: bool,
) -> None:
    monkeypatch.setattr(download, limit, 900)
    server.says_length = says_length
    with pytest.raises(InputError, match=reason):
        fetch(tmp_path, server)
    assert shown(tmp_path) == {"isbi2012"}


def test_a_bomb_of_slices_is_not_decoded(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = io.BytesIO()
    tifffile.imwrite(bomb, np.zeros((70, 1000, 1000), np.uint8), compression="deflate")
    assert len(bomb.getvalue()) < 10**6
    altered(test_volume=bomb.getvalue())(server)
    with pytest.raises(InputError, match=r"test-volume\.tif has 70 slices of 1000 x 1000"):
        fetch(tmp_path, server)


def test_any_damage_gives_the_same_exception(tmp_path: Path, server: Server) -> None:
    """Bytes of the archive's own headers are changed; nothing but InputError may come of it."""
    plain = zipped({name: tiff(STACKS[name]) for name in NAMES}, zipfile.ZIP_STORED)
    headers = [i for i in range(len(plain)) if plain[i : i + 2] == b"PK"]
    rng = np.random.default_rng(1)
    for _ in range(40):
        damaged = bytearray(plain)
        for at in rng.choice(headers, 2) + rng.integers(0, 50, 2):
            damaged[min(at, len(damaged) - 1)] = rng.integers(256)
        server.body = bytes(damaged)
        cache = tmp_path / "cache"
        try:
            assert shown(fetch(cache, server)) == set(NAMES)
            for name in NAMES:
                (cache / "isbi2012" / name).unlink()
        except InputError:
            assert shown(cache) == {"isbi2012"}


# -- several processes


def process(cache: Path, server: Server) -> subprocess.Popen[bytes]:
    code = (
        "from pathlib import Path; from segmentation.data.download import isbi2012_folder; "
        f"isbi2012_folder(Path({str(cache)!r}), {server.url!r}, local_http=True, "
        f"checksums={checksums_of(STACKS)!r})"
    )
    root = Path(download.__file__).parents[2]
    return subprocess.Popen([sys.executable, "-c", code], cwd=root, stderr=subprocess.DEVNULL)


def test_processes_at_once_fetch_once(tmp_path: Path, server: Server) -> None:
    server.hurry.clear()
    processes = [process(tmp_path, server) for _ in range(2)]
    assert server.sent_half.wait(20)
    time.sleep(0.3)  # for the other one to come to the lock
    server.hurry.set()
    assert [p.wait(20) for p in processes] == [0, 0]
    assert len(server.requests) == 1
    assert shown(tmp_path) == {"isbi2012", *NAMES}


@pytest.mark.skipif(os.name != "posix", reason="kills with SIGKILL")
def test_a_kill_leaves_nothing_half_written(tmp_path: Path, server: Server) -> None:
    server.hurry.clear()
    killed = process(tmp_path, server)
    assert server.sent_half.wait(20)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(20) == -signal.SIGKILL
    assert shown(tmp_path) == {"isbi2012"}
    server.hurry.set()
    (tmp_path / "isbi2012" / ".train-volume.tif.x.tmp").write_bytes(b"of a kill a little later")
    assert shown(fetch(tmp_path, server)) == set(NAMES)


def test_another_process_is_not_waited_for_without_end(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "PATIENCE", 0.1)
    (tmp_path / "isbi2012").mkdir()
    with (
        FileLock(tmp_path / "isbi2012" / ".lock"),
        pytest.raises(InputError, match=r"lock.* could not be acquired"),
    ):
        fetch(tmp_path, server)


# -- the real thing


def test_the_checksums_are_those_of_isbi_2012(
    isbi2012: Path, tmp_path: Path, server: Server
) -> None:
    members = {}
    for name, part in zip(NAMES, ("image", "label", "test"), strict=True):
        if not (isbi2012 / part).is_dir():
            pytest.skip(f"ISBI2012_DIR has no {part}")
        members[name] = tiff(
            np.stack([read_image(f)[..., 0] for f in list_images(isbi2012 / part)])
        )
    server.body = zipped(members, zipfile.ZIP_STORED)
    folder = isbi2012_folder(tmp_path, server.url, local_http=True)
    assert len(find_pairs(folder)) == 30
    assert isbi2012_folder(tmp_path, "https://127.0.0.1:9/") == folder
