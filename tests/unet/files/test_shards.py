"""Shards: any member at any time gives what webdataset and datasets give of it in turn."""

from __future__ import annotations

import builtins
import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unet import InputError
from unet.files.images import image_info, read_image, read_mask
from unet.files.shards import find_shards, read_shards

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (9, 6, 8, 3), np.uint8)
MASKS = RNG.integers(0, 2, (9, 6, 8), np.uint8)


def encoded(array: Any, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    if kind == "NPY":
        np.save(stream, array)
    else:
        Image.fromarray(array).save(stream, kind)
    return stream.getvalue()


def save_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def sample(i: int, **more: bytes) -> dict[str, bytes]:
    return {f"{i:03d}.png": encoded(IMAGES[i]), f"{i:03d}.mask.png": encoded(MASKS[i]), **more}


def found(data: Path, **said: Any) -> Any:
    return read_shards(find_shards(data), **{"masks": False, **said})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it closes no file
def test_webdataset_reads_the_same_samples(tmp_path: Path) -> None:
    """It cannot read a sample at any place, so what it reads one after the other is the oracle."""
    webdataset = pytest.importorskip("webdataset", reason="pip install webdataset")
    pattern = str(tmp_path / "set-%03d.tar")
    with webdataset.ShardWriter(pattern, maxcount=4) as writer:
        for i, image in enumerate(IMAGES):
            kind = ("PNG", "TIFF", "NPY")[i % 3]
            writer.write(
                {
                    "__key__": f"part/{i:03d}",
                    kind.lower(): encoded(image, kind),
                    "seg.png": encoded(MASKS[i]),
                    "cls": str(i % 2).encode(),
                    "json": json.dumps({"caption": f"picture  {i}"}).encode(),
                }
            )
    files = find_shards(tmp_path)
    assert files == find_shards(tmp_path / "set-{000..002}.tar")
    assert files == find_shards(tmp_path / "set-00{0,1,2}.tar")
    ours = read_shards(files, masks=True)
    dataset = webdataset.WebDataset([str(file) for file in files], shardshuffle=False)
    assert len(ours.images) == len(IMAGES)
    assert ours.label is not None
    assert ours.caption is not None
    theirs = list(dataset)
    for i in RNG.permutation(len(IMAGES)).tolist():
        image, mask = Path(ours.images[i]), Path(ours.masks[i])
        assert image.as_posix().endswith(f"{theirs[i]['__key__']}.{image.suffix[1:]}")
        assert image_info(image).height == 6
        np.testing.assert_array_equal(read_image(image), IMAGES[i])
        np.testing.assert_array_equal(
            read_mask(mask), np.asarray(Image.open(io.BytesIO(theirs[i]["seg.png"])))
        )
        assert ours.label.of(ours.images[i]) == theirs[i]["cls"].decode()
        assert ours.caption.of(ours.images[i]) == f"picture {i}"


def test_rows_are_the_samples_of_parquet_and_arrow(tmp_path: Path, monkeypatch: Any) -> None:
    datasets = pytest.importorskip("datasets", reason="pip install 'unet-diffusion[datasets]'")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.utils.disable_progress_bars()
    columns = {
        "image": [{"bytes": encoded(image), "path": None} for image in IMAGES],
        "mask": [encoded(mask) for mask in MASKS],
        "label": [i % 2 for i in range(len(IMAGES))],
        "text": [f"picture {i}" for i in range(len(IMAGES))],
    }
    kinds = datasets.Features(
        image=datasets.Image(),
        mask=datasets.Value("binary"),
        label=datasets.ClassLabel(names=["cat", "dog"]),
        text=datasets.Value("string"),
    )
    table = datasets.Dataset.from_dict(columns, features=kinds)
    (tmp_path / "rows").mkdir()
    table.to_parquet(str(tmp_path / "rows/train-0.parquet"))
    table.select([0]).to_parquet(str(tmp_path / "rows/test-0.parquet"))
    parts = datasets.DatasetDict(train=table, validation=table.select([0]))
    parts.save_to_disk(str(tmp_path / "saved"), num_shards={"train": 2, "validation": 1})
    for data, part in ((tmp_path / "rows", "train"), (tmp_path / "saved", "train")):
        ours = found(data, masks=True)
        assert ours.parts == ["train"] * 9 + ["val"] * (len(ours.images) - 9)
        assert len(found(data).images) == 9, part
        for i in RNG.permutation(9).tolist():
            np.testing.assert_array_equal(
                read_image(Path(ours.images[i])), np.asarray(table[i]["image"])
            )
            np.testing.assert_array_equal(read_mask(Path(ours.masks[i])), MASKS[i])
            assert ours.label.of(ours.images[i]) == ("cat", "dog")[i % 2]
            assert ours.caption.of(ours.images[i]) == f"picture {i}"
    table.remove_columns("mask").to_parquet(str(tmp_path / "bare.parquet"))
    with pytest.raises(InputError, match=r"bare.parquet': sample '0' has no mask among image, la"):
        found(tmp_path / "bare.parquet", masks=True)
    table.remove_columns(["image", "mask"]).to_parquet(str(tmp_path / "bare.parquet"))
    with pytest.raises(InputError, match=r"bare.parquet': sample '0' has no image among label, t"):
        found(tmp_path / "bare.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(InputError, match=r"bad.parquet': not a Parquet or Arrow file"):
        found(tmp_path / "bad.parquet")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    whole = builtins.__import__

    def without(name: str, *more: Any) -> Any:
        if name.partition(".")[0] == "datasets":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return whole(name, *more)

    monkeypatch.delitem(sys.modules, "unet.files.tables", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    (tmp_path / "x.parquet").touch()
    with pytest.raises(InputError, match=r'pip install "unet-diffusion\[datasets\]"'):
        found(tmp_path / "x.parquet")
    assert found(save_tar(tmp_path / "x.tar", sample(0))).images  # tars take no package


def cut(path: Path, at: int, data: bytes = b"") -> Path:
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + data + (whole[at + len(data) :] if data else b""))
    return path


def test_mistakes_name_the_shard_and_the_member(tmp_path: Path) -> None:
    def told(message: str, members: dict[str, bytes], at: int = 0, data: bytes = b"") -> None:
        path = save_tar(tmp_path / "x.tar", members)
        if at:
            cut(path, at, data)
        with pytest.raises(InputError, match=rf"x\.tar': {message}") as error:
            found(path, masks=True)
        assert "\n" not in str(error.value)

    both = {**sample(0), **sample(1)}
    told("not a whole uncompressed tar", both, 3 * 512)  # within the second header's data
    told("not a whole uncompressed tar", both, 700)
    told("not a whole uncompressed tar", both, 1, b"garbage" * 60)
    told("its header at byte 1,024 is damaged", both, 1024, b"\1" * 512)
    told("it holds no sample", {})
    told("sample '001' has no mask", {**sample(0), "001.png": encoded(IMAGES[1])})
    told("sample '0' has no image", {"0.txt": b"a", "0.mask.png": b""})
    told("sample '0' has 2 that could be the image", {"0.a.png": b"", "0.b.png": b""})
    with tarfile.open(tmp_path / "y.tgz", "w:gz"):
        pass
    with pytest.raises(InputError, match=r"y\.tgz': not a whole uncompressed tar"):
        found(tmp_path / "y.tgz")
    save_tar(tmp_path / "x-0.tar", sample(0))
    with pytest.raises(InputError, match=r"there is no shard .*x-1.tar', one of the 2"):
        found(tmp_path / "x-{0..1}.tar")
    bad = found(save_tar(tmp_path / "z.tar", {"0.png": b"no picture", "0.cls": b"\xff"}))
    with pytest.raises(InputError, match=r"z.tar/0.png': not an image"):
        read_image(Path(bad.images[0]))
    with pytest.raises(InputError, match=r"z.tar/0.cls' cannot be read as text"):
        bad.label.of(bad.images[0])
    with pytest.raises(InputError, match=r"z.tar/1.png': the shard has no such member"):
        read_image(tmp_path / "z.tar/1.png")


def test_of_several_pictures_that_named_image_or_mask_is_taken(tmp_path: Path) -> None:
    names = ("conditioning_image.png", "image.png", "label.png", "mask.png")
    path = save_tar(tmp_path / "x.tar", {f"0.{name}": encoded(IMAGES[0]) for name in names})
    read = found(path, masks=True)
    assert (read.images, read.masks) == ([f"{path}/0.image.png"], [f"{path}/0.mask.png"])


def test_a_list_in_json_holds_several_captions(tmp_path: Path) -> None:
    said: tuple[Any, ...] = (
        {"caption": ["a", " b"]},
        {"caption": "c"},
        {"caption": []},
        {"caption": ["a", None]},
    )
    members = {f"{i:03d}.json": json.dumps(one).encode() for i, one in enumerate(said)}
    for i in range(len(said)):
        members |= sample(i)
    read = found(save_tar(tmp_path / "x.tar", members))
    assert [read.caption.all_of(image) for image in read.images[:2]] == [("a", "b"), ("c",)]
    for image in read.images[2:]:
        with pytest.raises(
            InputError, match=r"x\.tar/00\d\.json' cannot be read as text with a 'c"
        ):
            read.caption.all_of(image)


def test_tables_beside_tars_of_their_names_are_no_shards(tmp_path: Path) -> None:
    """img2dataset writes 00000.tar, 00000.parquet and 00000_stats.json."""
    tar = save_tar(tmp_path / "00000.tar", sample(0))
    for name in ("00000.parquet", "00000_stats.json"):
        (tmp_path / name).touch()
    assert find_shards(tmp_path) == [tar]


def test_shards_in_the_folder_data_of_a_copied_repository_are_found(tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    tar = save_tar(tmp_path / "data/train-0.tar", sample(0))
    assert find_shards(tmp_path) == [tar]
    (tmp_path / "sample.png").write_bytes(encoded(IMAGES[0]))
    assert find_shards(tmp_path) == []
    (tmp_path / "sample.png").rename(tmp_path / "data/sample.png")
    assert find_shards(tmp_path) == []


def test_a_packed_data_folder_gives_no_masks_as_images(tmp_path: Path) -> None:
    members = {f"set/{of}/{i}.png": encoded(IMAGES[i]) for of in ("label", "image") for i in (0, 1)}
    path = save_tar(tmp_path / "x.tar", members)
    read = found(path)
    assert read.images == [f"{path}/set/image/{i}.png" for i in (0, 1)]
    assert read.left == [f"{path}/set/label"]
    with pytest.raises(InputError, match=r"x.tar': the masks in it .* set/label, .*: unpack it"):
        found(path, masks=True)
    classes = {f"{of}/0.png": encoded(IMAGES[0]) for of in ("mask", "no_mask")}  # of faces
    assert len(found(save_tar(tmp_path / "y.tar", classes)).images) == 2


def test_an_archive_beside_images_is_no_set_of_shards(tmp_path: Path) -> None:
    save_tar(tmp_path / "x.tar", sample(0))
    assert find_shards(tmp_path) == [tmp_path / "x.tar"]
    (tmp_path / "images").mkdir()
    assert find_shards(tmp_path) == []
