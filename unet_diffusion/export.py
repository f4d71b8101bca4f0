"""Write a model as a file for other programs: unet-export --model RUN/model --to onnx model.onnx.

A segmentation takes pixels as files hold them and gives probabilities; of a diffusion model it is
one evaluation of the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from unet.errors import InputError
from unet.training.cli import run_script, say_next
from unet.training.options import check_paths


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is written, and where."""

    out: Positional[Path]
    """The file: .onnx, .pt (TorchScript), .pt2 (torch.export), .xml (OpenVINO, with a .bin beside
    it) or .zip (a package of the BioImage Model Zoo). An earlier one is replaced."""

    model: str
    """Model folder, such as RUN/model."""

    to: Literal["onnx", "torchscript", "pt2", "openvino", "bioimageio"]
    """The format."""

    int8: tuple[Path, ...] = ()
    """With onnx, for a segmentation: a few images like the training images, on which activations
    are measured to quantise convolutions to 8-bit integers: faster, and nearly the same masks."""

    image: Path | None = None
    """With bioimageio: an image like those of the training, for the test and the cover."""

    name: str | None = None
    """With bioimageio: the model's name. None given: U-Net and the name of the run's folder."""

    authors: tuple[str, ...] = ()
    """With bioimageio: the names of the authors."""

    licence: str | None = None
    """With bioimageio: an identifier of spdx.org, such as CC-BY-4.0."""

    def __post_init__(self) -> None:
        about = {name: getattr(self, name) for name in ("image", "name", "authors", "licence")}
        given = [f"--{name}" for name, value in about.items() if value]
        if self.to != "bioimageio" and given:
            raise InputError(
                f"{given[0]} is for --to bioimageio alone, not {self.to}: leave it out"
            )
        if self.int8 and self.to != "onnx":
            raise InputError(f"--int8 is for --to onnx alone, not {self.to}: leave it out")
        if self.to == "bioimageio" and self.image is None:
            raise InputError("--to bioimageio needs --image FILE, an image like the training's")


def main(options: ExportOptions) -> None:
    from unet.weights.folder import model_folder, read_config

    check_paths(options)
    folder = model_folder(options.model)
    task = read_config(folder)["task"]
    if task == "segmentation":
        from segmentation.export.bioimage import NAME
        from segmentation.segmenter import load

        load(folder, device="cpu").export(
            options.to,
            options.out,
            int8=options.int8,
            image=options.image,
            name=options.name or f"U-Net {Path(options.model).resolve().parent.name}"[:NAME],
            authors=options.authors,
            licence=options.licence,
        )
    elif options.to == "bioimageio":
        raise InputError(
            f"{options.model} is a diffusion model, and what the BioImage Model Zoo runs is "
            "called once per image, not once per step: choose --to onnx, torchscript, pt2 or "
            "openvino"
        )
    elif options.int8:
        raise InputError(f"{options.model} is a diffusion model, and --int8 is for a segmentation")
    else:
        from diffusion.export import exportable
        from diffusion.model import DiffusionUNet

        model = DiffusionUNet.from_pretrained(folder).float()
        exportable(model).write(options.to, options.out)
    print(f"written: {options.out}")
    say_next("describe", options.model)


def command(argv: Sequence[str] | None = None) -> int:
    return run_script(main, ExportOptions, argv, description=__doc__)
