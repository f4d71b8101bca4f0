"""A set in shards trains both models to the losses of the same set in files, resumed as well."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusion.data.images import DiffusionData
from diffusion.options import DiffusionOptions
from segmentation.options import SegmentationOptions
from segmentation.training import train
from unet.files.images import write_image
from unet.training.batches import BatchKeys, make_batches
from unet.training.cli import run_script
from unet.training.run import read_log
from unet_diffusion import train_ddpm

RNG = np.random.default_rng(0)
DIGITS = RNG.integers(0, 256, (24, 8, 8), np.uint8)
LABELS = np.arange(24) % 3
CELLS = RNG.integers(0, 256, (6, 40, 40), np.uint8)


def save_shards(folder: Path, members: dict[str, np.ndarray | bytes], each: int) -> Path:
    folder.mkdir()
    names = list(members)
    for start in range(0, len(names), each):
        with tarfile.open(folder / f"x-{start:04d}.tar", "w") as tar:
            for name in names[start : start + each]:
                data, stream = members[name], io.BytesIO()
                if isinstance(data, bytes):
                    stream.write(data)
                else:
                    Image.fromarray(data).save(stream, "PNG")
                header = tarfile.TarInfo(name)
                header.size = stream.tell()
                stream.seek(0)
                tar.addfile(header, stream)
    return folder


def digits(folder: Path) -> Path:
    members: dict[str, Any] = {}
    for i, (image, label) in enumerate(zip(DIGITS, LABELS, strict=True)):
        members |= {f"{i:03d}.png": image, f"{i:03d}.cls": str(label).encode()}
    return save_shards(folder, members, 20)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_log(run / "metrics.jsonl") if "loss" in line]


def test_digits_in_shards_train_to_the_losses_of_the_npz(tmp_path: Path, short_runs: None) -> None:
    np.savez(tmp_path / "digits.npz", images=DIGITS, labels=LABELS)
    digits(tmp_path / "shards")

    def run(*argv: object) -> None:
        small = ("--width", 8, "--batch-size", 4, "--evaluations", 1, "--log-every", 1)
        fixed = () if "--resume" in argv else (*small, "--classes", "--schedule", "constant")
        given = ["--out", tmp_path / str(argv[0]), *fixed, *argv[1:]]
        assert run_script(train_ddpm.main, DiffusionOptions, list(map(str, given))) == 0

    run("npz", "--data", tmp_path / "digits.npz", "--steps", 4)
    run("tar", "--data", tmp_path / "shards", "--steps", 2)
    run("tar", "--resume", "--steps", 4)
    assert len(losses(tmp_path / "npz")) == 4
    assert losses(tmp_path / "tar") == losses(tmp_path / "npz")
    ours, theirs = (
        torch.load(tmp_path / name / "state/state.pt", weights_only=True)["model"]
        for name in ("tar", "npz")
    )
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_processes_share_the_samples_of_shards(tmp_path: Path) -> None:
    """Also where they are sent to another process, and read for the first time there."""
    samples = DiffusionData(digits(tmp_path / "shards"), classes=True).samples(0)
    sent = pickle.loads(pickle.dumps(samples))

    def batch(of: Any, **share: int) -> Any:
        keys = BatchKeys(len(samples), 8, seed=0, start_step=3, **share)
        return next(make_batches(of, keys, 0, pin=False))

    whole = batch(samples)
    halves = [batch(sent, process=i, processes=2) for i in (0, 1)]
    for key in ("image", "label", "index"):
        assert torch.equal(torch.cat([half[key] for half in halves]), whole[key])


def test_a_segmentation_learns_the_same_of_shards_and_folders(
    tmp_path: Path, short_runs: None
) -> None:
    members: dict[str, Any] = {}
    for i, image in enumerate(CELLS):
        mask = (image > 127).astype(np.uint8)
        members |= {f"{i}.png": image, f"{i}.mask.png": mask}
        write_image(tmp_path / "files/image" / f"{i}.png", image)
        write_image(tmp_path / "files/label" / f"{i}.png", mask)
    save_shards(tmp_path / "shards", members, 8)
    small: dict[str, Any] = {"width": 4, "crop": 32, "batch_size": 2, "evaluations": 1}
    for name in ("files", "shards"):
        out, data = tmp_path / f"run-{name}", str(tmp_path / name)
        train(SegmentationOptions(out=out, data=data, log_every=1, steps=2, **small))
    assert losses(tmp_path / "run-shards") == losses(tmp_path / "run-files") != []
