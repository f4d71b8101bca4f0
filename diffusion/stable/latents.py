"""Training in latents: each image is encoded once, and the posteriors are kept in the run folder.

latents/moments.npy   float32 (N, 2, c, h, w): mean and standard deviation of each image's latents
latents/used.npy      int64 (N,): the image that they are of (another one where one is unreadable)
latents/encoded.json  what is encoded, and how many are done
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from diffusion.data.captions import Captions
from diffusion.data.conditions import Asked
from diffusion.data.images import DiffusionData
from diffusion.data.pixels import as_tensor
from diffusion.data.samples import TrainingSamples
from diffusion.stable.autoencoder import Autoencoder
from unet.errors import InputError, Interrupted, RunError
from unet.files.writing import write_text
from unet.training.batches import sample_rng
from unet.training.run import is_main_process, signals_caught
from unet.words import counted

PART = 4  # images that are encoded at a time
SAVED = 20.0  # seconds of encoding that a kill loses, at most
_ARRAYS = ("moments.npy", "used.npy")
WAITING = 0.5  # seconds between looks of the processes that wait


class LatentData:
    """The latents of a `DiffusionData`, as training sees them: of the same interface.

    `size` and `channels` are those of the latents, `image_size` that of the images. Nothing is
    encoded before `encode`.

    Args:
        source: the images, neither cut out nor mirrored at random.
        folder: of the latents; all processes of a run must see it.

    Raises:
        InputError: images whose sides or channels the autoencoder cannot take.
    """

    def __init__(self, source: DiffusionData, autoencoder: Autoencoder, folder: Path) -> None:
        if source.crops or source.flips:
            raise InputError("latents are of whole images: leave out --crops and --flips")
        if source.channels != autoencoder.image_channels:
            raise InputError(
                f"the images have {counted(source.channels, 'channel')}, but the autoencoder in "
                f"'{autoencoder.folder}' takes {autoencoder.image_channels}: leave out "
                "--colour and --channels"
            )
        self.source, self.autoencoder, self.folder = source, autoencoder, folder
        self.image_size = source.size
        self.size = autoencoder.size(*source.size)
        self.channels = autoencoder.channels
        self.train, self.val = source.train, source.val
        self.classes, self.captioned, self.labels = source.classes, source.captioned, source.labels
        self.count = len(self.train) + len(self.val)
        self._moments: NDArray[np.float32] = np.empty((0, 2, self.channels, *self.size), np.float32)
        self._used: NDArray[np.int64] = np.empty(0, np.int64)

    def __getstate__(self) -> dict[str, Any]:
        """For processes that are spawned to prepare batches, which need no network, and read the
        latents from their files."""
        return {**vars(self), "autoencoder": None, "_moments": None, "_used": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._moments, self._used = (self._open(name, "r") for name in _ARRAYS)

    def describe(self) -> str:
        """A printable description."""
        height, width = self.size
        folder = "/".join(self.autoencoder.folder.parts[-2:])  # the model's card shows it
        return (
            f"{self.source.describe()}\nlatents of {self.channels} x {height} x {width} by "
            f"'{folder}', times {self.autoencoder.scale:g}"
        )

    # ------------------------------------------------------------------------------------------
    # Encoding

    def encode(self) -> None:
        """Encodes what is not encoded yet: in the main process, while the others wait.

        Raises:
            InputError: the folder holds the latents of something else; no space; a bad image.
            RunError: latents that are not finite.
            Interrupted: SIGINT or SIGTERM came; what is done is kept.
        """
        if is_main_process():
            if (done := self._done()) < self.count:
                self._encode_from(done)
        else:
            while self._done() < self.count:
                time.sleep(WAITING)
        self._moments, self._used = (self._open(name, "r") for name in _ARRAYS)
        if not ((self._used >= 0) & (self._used < self.count)).all():
            raise self._damaged("used.npy")

    def _encode_from(self, done: int) -> None:
        needed = sum(dtype.itemsize * math.prod(shape) for dtype, shape in self._kinds.values())
        self.folder.mkdir(parents=True, exist_ok=True)
        if not done and needed > shutil.disk_usage(self.folder).free:
            raise InputError(
                f"the latents need {needed / 1e9:.1f} GB, more than is free where '{self.folder}' "
                "is: give an --out on another disk"
            )
        moments, used = (self._open(name, "r+" if done else "w+") for name in _ARRAYS)

        def save() -> None:
            moments.flush()
            used.flush()
            progress = {"of": self._fingerprint, "done": done}
            write_text(self.folder / "encoded.json", json.dumps(progress, indent=2) + "\n")

        print(f"encoding {self.count - done:,} of {counted(self.count, 'image')}, once", flush=True)
        saved = time.monotonic()
        bar = tqdm(total=self.count, initial=done, unit="image", disable=None, dynamic_ncols=True)
        with signals_caught() as caught, bar:
            try:
                while done < self.count and not caught:
                    part = slice(done, min(done + PART, self.count))
                    used[part], moments[part] = self._posteriors(range(self.count)[part])
                    bar.update(part.stop - done)
                    done = part.stop
                    if time.monotonic() - saved > SAVED:
                        save()
                        saved = time.monotonic()
            finally:
                save()
        if done < self.count:
            print(
                f"stopped after {done:,} of {counted(self.count, 'image')}, whose latents are kept"
            )
            raise Interrupted(128 + max(caught))

    def _posteriors(self, indices: Sequence[int]) -> tuple[list[int], Tensor]:
        """The images that are taken for these, and their posteriors (B, 2, c, h, w)."""
        used, pixels = zip(*map(self.source.load, indices), strict=True)
        found = torch.stack(
            self.autoencoder.encode(torch.stack([as_tensor(p) for p in pixels])), dim=1
        )
        for image, moments in zip(used, found, strict=True):
            if not moments.isfinite().all():
                raise RunError(f"the latents of '{self.name(image)}' are not finite")
        return list(used), found

    def _done(self) -> int:
        """How many images are encoded."""
        file = self.folder / "encoded.json"
        if not file.exists():
            return 0
        try:
            progress = json.loads(file.read_text(encoding="utf-8"))
            of, done = progress["of"], progress["done"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._damaged(file.name) from error
        if type(done) is not int or done < 0:
            raise self._damaged(file.name)
        if of != self._fingerprint or not all((self.folder / n).is_file() for n in _ARRAYS):
            raise InputError(
                f"'{self.folder}' holds the latents of other images, or of another autoencoder: "
                "remove it, or give another --out"
            )
        return done

    @property
    def _kinds(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """The type and the shape of each array."""
        posteriors = (self.count, 2, self.channels, *self.size)
        kinds = (np.dtype(np.float32), posteriors), (np.dtype(np.int64), (self.count,))
        return dict(zip(_ARRAYS, kinds, strict=True))

    def _open(self, name: str, mode: Literal["r", "r+", "w+"]) -> np.memmap[Any, Any]:
        dtype, shape = self._kinds[name]
        try:
            array = np.lib.format.open_memmap(self.folder / name, mode, dtype, shape)
        except OSError:
            raise  # such as a full disk
        except Exception as error:  # numpy raises what a wrong byte leads it to
            raise self._damaged(name) from error
        if array.dtype != dtype or array.shape != shape:
            raise self._damaged(name)
        return array

    def _damaged(self, name: str) -> InputError:
        return InputError(f"'{self.folder / name}' cannot be read: remove '{self.folder}'")

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:
        """What is encoded, and by what, as JSON values."""
        source = self.source
        names = "\n".join(map(source.name, range(self.count)))
        # Which image stands for an unreadable one depends on what is held out.
        split = sorted(self.val) if source.skip_bad else []
        return {
            "images": hashlib.sha256(f"{names}\n{split}".encode()).hexdigest(),
            "count": self.count,
            "size": list(self.image_size),
            "channels": source.channels,
            "autoencoder": self.autoencoder.fingerprint(),
        }

    # ------------------------------------------------------------------------------------------
    # What training and pictures ask for

    def samples(self, seed: int = 0) -> TrainingSamples:
        """The training latents, drawn anew from their posteriors in each epoch."""
        return TrainingSamples(self, seed)

    def draw(self, index: int, rng: np.random.Generator) -> tuple[int, Tensor, None]:
        """The image that the latents are of, and latents (c, h, w) from their posterior, scaled."""
        mean, std = moments = self._moments[index]
        if not np.isfinite(moments).all():
            raise self._damaged(_ARRAYS[0])
        latents = mean + std * rng.standard_normal(mean.shape, dtype=np.float32)
        return self.used(index), torch.from_numpy(latents), None

    def used(self, index: int) -> int:
        """The image that the latents of this index are of."""
        return int(self._used[index])

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Latents (B, c, h, w), the same at each call, and labels (B,) or zeros."""
        labels = [0 if self.labels is None else int(self.labels[self.used(i)]) for i in indices]
        latents = [self.draw(i, sample_rng(0, 0, i))[1] for i in indices]
        return torch.stack(latents), torch.tensor(labels)

    def conditions(self, indices: Sequence[int]) -> list[Asked]:
        """The first caption of each image where these were asked for, else its class, or None."""
        used = [self.used(i) for i in indices]
        if self.captioned:
            return [Asked(self.captions(i)[0]) for i in used]
        return [Asked(None if self.labels is None else int(self.labels[i])) for i in used]

    def images(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """The images themselves, as bytes (N, H, W, C)."""
        return self.source.images(indices)

    def captions(self, index: int) -> Captions:
        return self.source.captions(index)

    def name(self, index: int) -> str:
        return self.source.name(index)


Data: TypeAlias = DiffusionData | LatentData


def images_of(data: Data) -> DiffusionData:
    """The images that are trained on, or that the latents are of."""
    return data.source if isinstance(data, LatentData) else data


def autoencoder_of(data: Data) -> Autoencoder | None:
    """The autoencoder of latents; None: of pixels."""
    return data.autoencoder if isinstance(data, LatentData) else None
