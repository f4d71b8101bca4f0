"""Small files of every kind, written by our own code, and everything that reads them."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion.data.images import DiffusionData
from diffusion.judging.classifier import ClassifierUNet
from diffusion.model import DiffusionUNet
from diffusion.options import SamplingOptions
from diffusion.process.schedule import NoiseSchedule
from diffusion.sampling import ImageSampler
from diffusion.stable.folder import read_schedule, read_unet
from diffusion.stable.latents import LatentData
from diffusion.stable.recipe import Recipe, read_recipe, write_picture
from diffusion.text import WordEncoder
from segmentation.data.classes import ClassTable
from segmentation.data.dataset import SegmentationData
from segmentation.data.normalisation import Normalisation
from segmentation.data.pairs import find_pairs
from segmentation.model import SegmentationUNet
from segmentation.options import SegmentationOptions
from segmentation.predict import Predictor, TensorSource
from segmentation.segmenter import load_models
from tests.unet.training.toy_training import ToyOptions, toy_task
from unet import UNetConfig
from unet.errors import InputError
from unet.files import rasters
from unet.files.images import image_info, read_image, read_mask
from unet.files.rasters import open_raster
from unet.training.config_file import load_config, save_config
from unet.training.fit import Trainer, fit
from unet.training.plan import plan_fit
from unet.training.run import RunFolder, read_log, run_folder
from unet.weights.convert import to_layout
from unet.weights.diffusers_config import config_to_diffusers

Array = NDArray[Any]

# -- seeds ----------------------------------------------------------------------------------------


def noise(*shape: int, dtype: str = "uint8", seed: int = 0) -> Array:
    high = 2 if dtype == "bool" else 256
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


def written(save: Callable[..., Any], *arguments: Any, **options: Any) -> bytes:
    """What a function writes to a file."""
    buffer = io.BytesIO()
    save(buffer, *arguments, **options)
    return buffer.getvalue()


def picture(kind: str, array: Array, mode: str | None = None, **options: Any) -> bytes:
    image = Image.fromarray(array)
    return written((image.convert(mode) if mode else image).save, kind, **options)


SIDE = 16
GREY, RGB = noise(SIDE, SIDE), noise(SIDE, SIDE, 3)
IMAGES: dict[str, list[bytes]] = {
    "png": [
        picture("PNG", GREY),
        picture("PNG", RGB),
        picture("PNG", RGB, "P"),
        picture("PNG", GREY, "1"),
        picture("PNG", noise(SIDE, SIDE, dtype="uint16")),
    ],
    "jpeg": [picture("JPEG", GREY), picture("JPEG", RGB), picture("JPEG", RGB, "CMYK")],
    "bmp": [picture("BMP", GREY), picture("BMP", RGB)],
    "gif": [picture("GIF", GREY), picture("GIF", RGB)],
    "webp": [picture("WEBP", RGB)],
    "tiff": [
        written(tifffile.imwrite, GREY),
        written(tifffile.imwrite, GREY, bigtiff=True),
        written(tifffile.imwrite, RGB, photometric="rgb", compression="zlib", predictor=True),
        written(tifffile.imwrite, GREY, compression="lzw", rowsperstrip=3),
        written(tifffile.imwrite, GREY, compression="zstd", tile=(16, 16)),
        written(tifffile.imwrite, noise(3, SIDE, SIDE), imagej=True),
    ],
    "npy": [
        written(np.save, GREY),
        written(np.save, noise(3, SIDE, SIDE, dtype="uint16")),
        written(np.save, RGB / 255),
    ],
}
HYPER = noise(2, 3, 2, SIDE, SIDE)  # T, Z, C
TABLE = np.arange(768, dtype=np.uint16).reshape(3, 256) * 85


def pyramid() -> bytes:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as out:
        out.write(noise(2 * SIDE, 2 * SIDE), tile=(16, 16), subifds=1)
        out.write(GREY, tile=(16, 16), subfiletype=1)
    return buffer.getvalue()


def hyperstack(**options: Any) -> bytes:
    return written(tifffile.imwrite, HYPER, metadata={"axes": "TZCYX"}, **options)


def smooth_tiles(kind: str) -> bytes:
    y, x = np.mgrid[:SIDE, :SIDE]
    image = np.stack([y * 9, x * 9, y + x], axis=-1).astype(np.uint8)
    options = {"photometric": "rgb", "compression": kind, "tile": (16, 16)}
    return written(tifffile.imwrite, image, **options)


DESCRIBED = [
    hyperstack(ome=True),
    hyperstack(ome=True, compression="zlib", tile=(16, 16)),
    hyperstack(imagej=True),
    hyperstack(imagej=True, truncate=True),
    hyperstack(photometric="minisblack"),
    pyramid(),
    written(tifffile.imwrite, GREY, extratags=[(42113, "s", 0, "-9999", True)]),
    written(tifffile.imwrite, RGB, photometric="rgb", planarconfig="contig", metadata=None),
]
TILES = [smooth_tiles(kind) for kind in ("jpeg", "jpeg2000", "zstd", "lzw")]
PALETTES = {
    "tiff": written(tifffile.imwrite, GREY % 5, photometric="palette", colormap=TABLE),
    "png": picture("PNG", RGB, "P"),
    "gif": picture("GIF", RGB, "P"),
}
MASK = picture("PNG", noise(SIDE, SIDE, dtype="bool").astype(np.uint8))
NPZ = [
    written(np.savez_compressed, images=noise(6, 8, 8), labels=np.arange(6) % 2),
    written(np.savez, images=noise(6, 8, 8, 3), labels=np.array(["red", "a blue", "7"] * 2)),
]
NAMES = [f"{i}.png" for i in range(4)] + [f"x.{kind}" for kind in IMAGES]
CAPTIONS = "".join(json.dumps({"file_name": name, "text": "ä"}) + "\n" for name in NAMES)
COCO_CAPTIONS = {
    "images": [{"id": i, "file_name": f"{i}.png"} for i in range(4)],
    "annotations": [{"image_id": i, "caption": "a red ä"} for i in range(4)],
}
CSV = "file_name,text\n" + "".join(f'{name},"ä, red"\n' for name in NAMES)
NNUNET = {
    "channel_names": {"0": "DAPI"},
    "labels": {"background": 0, "cell": 1, "ignore": 2},
    "numTraining": 2,
    "file_ending": ".png",
}
COCO = {
    "info": {"year": 2026},
    "images": [
        {"id": 7 * i, "file_name": f"{i}.png", "height": SIDE, "width": SIDE} for i in range(2)
    ],
    "categories": [{"id": 1, "name": "cell"}, {"id": 3, "name": "dirt"}],
    "annotations": [
        {
            "id": i,
            "image_id": 7 * (i % 2),
            "category_id": 1 + 2 * (i // 2),
            "iscrowd": int(i == 4),
            "segmentation": segmentation,
        }
        for i, segmentation in enumerate(
            [
                [[1, 1, 9.5, 1, 9.5, 8, 1, 8]],
                [[3, 3, 12, 4, 8, 15], [1, 1, 2, 1, 2, 2]],
                {"size": [SIDE, SIDE], "counts": [33, 9, 200, 5, 9]},
                {"size": [SIDE, SIDE], "counts": "Q19X6LQJ"},
                [[0, 0, 5, 0, 5, 5]],
            ]
        )
    ],
}
LABELME = {
    "version": "5.5.0",
    "flags": {},
    "shapes": [
        {"label": "cell", "points": [[1, 1], [9, 1], [9, 9]], "shape_type": "polygon"},
        {"label": "dirt", "points": [[10, 3], [14, 9]], "shape_type": "rectangle", "group_id": 3},
        {"label": "cell", "points": [[5, 12], [5, 14]], "shape_type": "circle", "group_id": None},
    ],
    "imagePath": "0.png",
    "imageData": None,
    "imageHeight": SIDE,
    "imageWidth": SIDE,
}
LOG = "".join(json.dumps({"step": i, "loss": 1 / (i + 1)}) + "\n" for i in range(9))
LOG += json.dumps({"step": 9, "val_loss": math.nan, "kept": True}) + "\n"
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 100,
    "beta_schedule": "scaled_linear",
    "beta_end": 0.012,
}


def segmentation_model() -> SegmentationUNet:
    info = {
        "classes": ClassTable(values=(0, 255), shares=(0.5, 0.5)).to_dict(),
        "normalisation": Normalisation((9.0,), (4.0,), "uint8").to_dict(),
        "threshold": 0.5,
    }
    return SegmentationUNet(UNetConfig(channels=4, multipliers=(1, 2)), 1, info)


def diffusion_model(**info: Any) -> DiffusionUNet:
    text = WordEncoder(("a", "red"), 4, width=32, depth=1) if "text" in info else None
    config = UNetConfig(
        **{"in_channels": 3, "channels": 8, "multipliers": (1, 2), "norm": "group", "groups": 4},
        **{"block": "res", "skips": "block", "down": "conv", "up": "nearest-conv"},
        **{"time": True, "activation": "silu", "attention_levels": (1,)},
        middle_attention=True,
        attention="transformer" if text else "self",
        context_channels=text.channels if text else None,
    )
    return DiffusionUNet(config, 3, info | ({"text": text.to_dict()} if text else {}))


SAMPLED = {"schedule": NoiseSchedule().to_dict(), "prediction": "v", "size": [8, 8]}
MODELS: dict[str, Callable[[], Any]] = {
    "segmentation": segmentation_model,
    "diffusion": partial(diffusion_model, **SAMPLED, classes=["a", "b"]),
    "text": partial(diffusion_model, **SAMPLED, text=True),
    "classifier": lambda: ClassifierUNet(
        UNetConfig(channels=4, multipliers=(1, 2)), 2, {"classes": ["a", "b"], "size": [8, 8]}
    ),
}


def write_model(kind: str, folder: Path) -> None:
    torch.manual_seed(0)
    MODELS[kind]().save_pretrained(folder)


def write_unet(folder: Path) -> None:
    """The U-Net of a diffusers pipeline, and its schedule."""
    torch.manual_seed(0)
    model = diffusion_model()
    for part in ("unet", "scheduler"):
        (folder / part).mkdir(parents=True)
    (folder / "unet/config.json").write_text(json.dumps(config_to_diffusers(model.config, 3)))
    state = to_layout(model.state_dict(), model.config, "diffusers")
    save_file(state, folder / "unet" / "diffusion_pytorch_model.safetensors")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))


def write_shard(folder: Path) -> None:
    """The same with its weights in the one shard of an index."""
    write_unet(folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    names = dict.fromkeys(load_file(weights), "a.safetensors")
    weights.rename(weights.with_name("a.safetensors"))
    index = weights.with_name(f"{weights.name}.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))


def write_checkpoint(folder: Path) -> None:
    """The same with its weights as a pickle."""
    write_unet(folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()


def toy_options(out: Path, *, resume: bool) -> ToyOptions:
    return ToyOptions(out=out, steps=1, batch_size=2, device="cpu", resume=resume)


def write_run(folder: Path) -> None:
    options = toy_options(folder, resume=False)
    with run_folder(plan_fit(options)), contextlib.redirect_stdout(io.StringIO()):
        fit(toy_task(options), plan_fit(options))


def write_settings(folder: Path) -> None:
    save_config(SegmentationOptions(out=folder, val_names=("a", "7-9")), folder / "config.yaml")


def write_picture_with_recipe(folder: Path) -> None:
    write_picture(folder / "made.png", RGB, Recipe(prompt="a fox", model="m"))


def write_images(folder: Path) -> None:
    for i in range(4):
        (folder / f"{i}.png").write_bytes(picture("PNG", noise(SIDE, SIDE, seed=i)))
    (folder / "metadata.jsonl").write_text(CAPTIONS)


def write_pairs(folder: Path) -> None:
    for name, data in (("images", picture("PNG", GREY)), ("masks", MASK)):
        (folder / name).mkdir(parents=True)
        for i in range(2):
            (folder / name / f"{i}.png").write_bytes(data)


def write_classes(folder: Path) -> None:
    write_pairs(folder)
    (folder / "classes.txt").write_text("ground\n1: cell\n", encoding="utf-8")


def write_nnunet(folder: Path) -> None:
    for name, data in (("imagesTr/{}_0000", picture("PNG", GREY)), ("labelsTr/{}", MASK)):
        for i in range(2):
            file = folder / f"{name.format(i)}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
    (folder / "dataset.json").write_text(json.dumps(NNUNET))


def write_polygons(folder: Path) -> None:
    for i in range(2):
        (folder / f"{i}.png").write_bytes(picture("PNG", GREY))


def write_labelme(folder: Path) -> None:
    write_polygons(folder)
    (folder / "1.json").write_text(json.dumps(LABELME))


def write_texts(folder: Path) -> None:
    write_images(folder)
    (folder / "metadata.jsonl").unlink()
    for i in range(4):
        (folder / f"{i}.txt").write_text("a red ä", encoding="utf-8")


def write_csv(folder: Path) -> None:
    write_images(folder)
    (folder / "metadata.jsonl").unlink()


class NoAutoencoder:
    """What latents ask of an autoencoder, in no time."""

    folder, image_channels, channels, scale = Path("vae"), 1, 1, 1.0

    def size(self, height: int, width: int) -> tuple[int, int]:
        return height // 2, width // 2

    def fingerprint(self) -> str:
        return "none"

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images[..., ::2, ::2], images[..., ::2, ::2]


def write_latents(folder: Path) -> None:
    (folder / "x.npz").write_bytes(NPZ[0])
    fake: Any = NoAutoencoder()
    data = LatentData(DiffusionData(folder / "x.npz", flips=False), fake, folder / "latents")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        data.encode()
    for i in range(data.count):
        data.draw(i, np.random.default_rng(0))


# -- readers --------------------------------------------------------------------------------------


class Reader(NamedTuple):
    """How a file is read, in a folder in which `prepare` has put what else is needed."""

    file: str
    read: Callable[[Path], object]
    prepare: Callable[[Path], object] = bool
    seeds: Sequence[bytes] = ()  # none: what `prepare` has put there


def _image(file: Path) -> None:
    info = image_info(file)
    image = read_image(file, 0)
    assert (*image.shape, image.dtype) == (info.height, info.width, info.channels, info.dtype)


def _mapped(file: Path) -> None:
    with patch.object(rasters, "MAX_PIXELS", 0):
        open_raster(file, 0 if image_info(file).pages > 1 else None).sum()


def _diffusion(data: Path, **options: Any) -> None:
    found = DiffusionData(data, size=8, **options)
    found.batch(found.train)
    found.describe()


def _pairs(file: Path) -> None:
    _labelled(file.parents[1])


def _beside(file: Path) -> None:
    _labelled(file.parent)


def _labelled(folder: Path) -> None:
    pairs = find_pairs(folder)
    SegmentationData(pairs[:1], pairs[1:]).describe()


def _segmented(file: Path) -> None:
    models, _, _ = load_models([str(file.parent)], "cpu")
    Predictor(models)(TensorSource(torch.zeros(1, SIDE, SIDE)))


@torch.no_grad()
def _sampled(file: Path) -> None:
    ImageSampler(DiffusionUNet.from_pretrained(file.parent), SamplingOptions(steps=2))(1)


@torch.no_grad()
def _classified(file: Path) -> None:
    model = ClassifierUNet.from_pretrained(file.parent)
    assert len(model.classes) == len(model(torch.zeros(1, 1, *model.size))[0])


@torch.no_grad()
def _stable(file: Path) -> None:
    read_unet(file.parent)(torch.zeros(1, 3, 8, 8), torch.tensor([5.0]))


def _options(file: Path) -> None:
    given = load_config(SegmentationOptions, file)
    SegmentationOptions(**{"out": file.parent, **given})


def _resumed(file: Path) -> None:
    options = toy_options(file.parents[1], resume=True)
    with contextlib.redirect_stdout(io.StringIO()):
        Trainer(toy_task(options), plan_fit(options))


def _latents(file: Path) -> None:
    write_latents(file.parents[1])


def _schedule(file: Path) -> None:
    read_schedule(file.parents[1]).timesteps("euler", 5)


def _logged(file: Path) -> None:
    RunFolder(file.parent).cut_log(5)
    assert all(entry["step"] <= 5 for entry in (read_log(file) if file.exists() else []))


def _readers() -> Iterator[tuple[str, Reader]]:
    for kind, seeds in IMAGES.items():
        file = f"x.{kind}"
        yield f"{kind}: image", Reader(file, _image, seeds=seeds)
        if kind not in ("jpeg", "webp"):
            masks = [seed for seed in seeds if b"<f8" not in seed]
            yield f"{kind}: mask", Reader(file, lambda f: read_mask(f, 0), seeds=masks)
        if kind in ("tiff", "npy"):
            plain = [seeds[i] for i in (0, 1, -1)]
            yield f"{kind}: raster", Reader(file, _mapped, seeds=plain)
        captioned = lambda f: _diffusion(f.parent, captions=True)  # noqa: E731
        yield f"{kind}: diffusion", Reader(file, captioned, write_images, seeds)
        if kind != "webp":
            yield f"{kind}: segmentation", Reader("images/0.png", _pairs, write_pairs, seeds[:1])
    yield "tiff: described", Reader("x.tiff", _image, seeds=DESCRIBED)
    yield "tiff: tiles", Reader("x.tiff", _image, seeds=TILES)
    for kind, seed in PALETTES.items():
        yield f"{kind}: palette mask", Reader("x", lambda f: read_mask(f, 0), seeds=[seed])
        yield f"{kind}: palette", Reader("x", _image, seeds=[seed])
    yield "txt: classes", Reader("classes.txt", _beside, write_classes)
    yield "json: nnU-Net", Reader("dataset.json", _beside, write_nnunet)
    yield "json: COCO", Reader("x.json", _beside, write_polygons, [json.dumps(COCO).encode()])
    labelme = [json.dumps(LABELME).encode()]
    yield "json: labelme", Reader("0.json", _beside, write_labelme, labelme)
    yield "png: segmentation mask", Reader("masks/0.png", _pairs, write_pairs)
    yield "png: recipe", Reader("made.png", read_recipe, write_picture_with_recipe)
    yield "npz: diffusion", Reader("x.npz", _diffusion, seeds=NPZ)
    for part in ("moments.npy", "used.npy"):
        yield f"npy: latents {part}", Reader(f"latents/{part}", _latents, write_latents)
    for kind, read in (
        ("segmentation", _segmented),
        ("diffusion", _sampled),
        ("text", _sampled),
        ("classifier", _classified),
    ):
        prepare = partial(write_model, kind)
        yield f"json: {kind}", Reader("config.json", read, prepare)
        yield f"safetensors: {kind}", Reader("model.safetensors", read, prepare)
    weights = "unet/diffusion_pytorch_model.safetensors"
    yield "json: diffusers", Reader("unet/config.json", _stable, write_unet)
    yield "json: shards", Reader(f"{weights}.index.json", _stable, write_shard)
    yield "json: scheduler", Reader("scheduler/scheduler_config.json", _schedule, write_unet)
    yield "safetensors: diffusers", Reader(weights, _stable, write_unet)
    yield "pickle: diffusers", Reader(weights[:-11] + "bin", _stable, write_checkpoint)
    yield "pickle: state", Reader("state/state.pt", _resumed, write_run)
    yield "yaml: options", Reader("config.yaml", _options, write_settings)
    yield "jsonl: log", Reader("metrics.jsonl", _logged, seeds=[LOG.encode()])
    captioned = lambda f: _diffusion(f.parent, captions=True)  # noqa: E731
    yield "jsonl: captions", Reader("metadata.jsonl", captioned, write_images)
    yield "csv: captions", Reader("metadata.csv", captioned, write_csv, [CSV.encode()])
    listed = [json.dumps(COCO_CAPTIONS).encode()]
    yield "json: captions", Reader("captions.json", captioned, write_csv, listed)
    yield "txt: captions", Reader("0.txt", captioned, write_texts)
    yield "json: latents", Reader("latents/encoded.json", _latents, write_latents)


READERS = dict(_readers())


class Bench:
    """A folder for each reader, in which its file is replaced again and again."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._prepared: dict[str, tuple[Path, Sequence[bytes]]] = {}

    def prepared(self, name: str) -> tuple[Path, Sequence[bytes]]:
        """The path of the file that a reader reads, and what it should find there."""
        if name not in self._prepared:
            reader = READERS[name]
            file = self.root / name / reader.file
            file.parents[reader.file.count("/")].mkdir()
            reader.prepare(self.root / name)
            self._prepared[name] = file, reader.seeds or [file.read_bytes()]
        return self._prepared[name]

    def read(self, name: str, data: bytes) -> str | None:
        """The sentence that refuses the file; None: it was read."""
        file, _ = self.prepared(name)
        file.unlink(missing_ok=True)  # it may be mapped
        file.write_bytes(data)
        return refusal(READERS[name].read, file)


def refusal(read: Callable[[Path], object], file: Path) -> str | None:
    """The sentence by which a file is refused; None: it was read."""
    try:
        read(file)
    except InputError as error:
        return str(error)
    return None
