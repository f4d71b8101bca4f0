"""Images made from pictures, compared with the true images of these pictures.

The mean over samples comes nearest in the mean squared error and looks smooth; a single sample
looks real and lies further off: no method is best at both (Blau and Michaeli 2018, arXiv
1711.06077). So both are in one table, with a baseline that needs no model. Of an image with a hole
the hole alone is judged, as the rest is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from diffusion.data.conditions import Asked, Unread
from diffusion.data.images import DiffusionData
from diffusion.data.pixels import to_bytes
from diffusion.judging.metrics import FloatArray
from diffusion.plans import Wanted
from diffusion.sampling import Images, ImageSampler

WINDOW = 11  # pixels a side that SSIM needs


def psnr(images: Images, truth: Images, where: NDArray[np.bool_] | None = None) -> FloatArray:
    """Peak signal-to-noise ratio of each of uint8 (N, H, W, C) in dB, (N,); of equal ones inf.

    Args:
        where: the pixels that count, (N, H, W); None: all.
    """
    if where is None:
        where = np.ones(truth.shape[:3], bool)
    with np.errstate(divide="ignore"):
        pairs = zip(truth, images, where, strict=True)
        return np.array([peak_signal_noise_ratio(a[w], b[w], data_range=255) for a, b, w in pairs])


def ssim(images: Images, truth: Images, where: NDArray[np.bool_] | None = None) -> FloatArray:
    """Structural similarity of each of uint8 (N, H, W, C), (N,), with the weights of Wang et al.
    2004 (doi:10.1109/TIP.2003.819861); NaN of images that are smaller than its window.

    Args:
        where: the pixels (N, H, W) over whose windows the mean is taken; None: all whose windows
            lie in the image.
    """
    if min(truth.shape[1:3]) < WINDOW:
        return np.full(len(truth), np.nan)
    found = []
    for i, (a, b) in enumerate(zip(truth, images, strict=True)):
        mean, local = structural_similarity(
            a,
            b,
            data_range=255,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )
        found.append(mean if where is None else local[where[i]].mean())
    return np.array(found)


@dataclass(frozen=True)
class Pairs:
    """What samples are made from, and the images that this is of, taken in turn.

    Attributes:
        chosen: indices into the data, one per sample.
        wanted: pictures that are read batch by batch, and classes or captions beside them.
        truth: uint8 (N, H, W, C).
        floor: a baseline without a model, such as bicubic enlargement, uint8 (N, H, W, C); None:
            the pictures are no such images.
        floor_name: for people.
        hole: the pixels (N, H, W) that are not given and alone are judged; None: all are.
    """

    chosen: list[int]
    wanted: Wanted
    truth: Images
    floor: Images | None
    floor_name: str
    hole: NDArray[np.bool_] | None = None

    @classmethod
    def of(
        cls, data: DiffusionData, indices: Sequence[int], count: int, sampler: ImageSampler
    ) -> Pairs:
        """Those of `count` samples of a model with the condition of the data.

        Raises:
            InputError: a class that the model does not know; files that cannot be read.
        """
        condition = data.condition
        assert condition is not None
        chosen = [indices[i % len(indices)] for i in range(count)]
        shape = (condition.channels, *data.size)
        wanted, floors, holes = [], [], []
        for index in chosen:
            asked = data.conditions([index])[0]
            shown = asked.shown
            if not data.captioned and shown is not None:
                shown = sampler.class_index(data.classes[int(shown)]) if sampler.classes else None
            wanted.append(Asked(shown, Unread(shape, _reading(data, index))))
            picture = asked.read()
            assert picture is not None
            if (floor := condition.as_image(picture, data.channels)) is not None:
                floors.append(to_bytes(floor[None]))
            if condition.kind == "hole":
                holes.append(picture[-1].numpy() > 0)
        return cls(
            chosen,
            wanted,
            data.images(chosen),
            np.concatenate(floors) if floors else None,
            condition.image_name,
            np.stack(holes) if holes else None,
        )


def _reading(data: DiffusionData, index: int) -> Callable[[], Tensor]:
    def read() -> Tensor:
        picture = data.conditions([index])[0].read()
        assert picture is not None
        return picture

    return read


def candidates(samples: Images, pairs: Pairs) -> dict[str, Images]:
    """What is judged, by name: the baseline, one sample of each picture, and the mean.

    Args:
        samples: uint8 (S, N, H, W, C), S of each of the N pictures.
    """
    rows = {} if pairs.floor is None else {pairs.floor_name: pairs.floor}
    rows["one sample"] = samples[0]
    if len(samples) > 1:
        mean = samples.mean(axis=0, dtype=np.float32)
        rows[f"mean of {len(samples)} samples"] = np.rint(mean).astype(np.uint8)
    return rows


def restoration(
    rows: Mapping[str, Images],
    pairs: Pairs,
    distance: Callable[[Images], float] | None = None,
) -> dict[str, dict[str, float]]:
    """PSNR and SSIM of images (N, H, W, C) by name, means over the images.

    Args:
        pairs: what they were made from, with the true images.
        distance: of a set of images to real ones, which is also given for the true images.
    """
    found, truth = {}, pairs.truth
    for name, images in rows.items():
        quality = (measure(images, truth, pairs.hole).mean() for measure in (psnr, ssim))
        found[name] = dict(zip(("PSNR", "SSIM"), map(float, quality), strict=True))
        if distance is not None:
            found[name]["Fréchet distance"] = distance(images)
    if distance is not None:
        found["the true images"] = {
            "PSNR": math.inf,
            "SSIM": 1.0,
            "Fréchet distance": distance(truth),
        }
    return found
