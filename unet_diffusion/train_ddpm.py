"""Train a diffusion model on a folder of images: unet-train-ddpm --data DIR --out RUN."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffusion.options import DiffusionOptions
from unet.training.cli import run_script, say_next


def main(options: DiffusionOptions) -> None:
    from diffusion.training import train  # torch takes seconds to import: not before parsing

    train(options)
    pipeline = options.out / "pipeline"
    prompt = ("--prompt", "what it shall show")
    if options.trained == "lora" and Path(str(options.init), "model_index.json").is_file():
        lora = ("--lora", options.out / "model")
        say_next("txt2img", "--model", options.init, *lora, *prompt, "--out", "pictures")
    elif pipeline.is_dir():  # for diffusers, and for the prompts of Stable Diffusion
        say_next("txt2img", "--model", pipeline, *prompt, "--out", "pictures")
    elif options.target == "mask" and options.condition:
        images = ("--samples", "16", "--input", "new_images")
        say_next("predict-seg", "--model", options.out / "model", *images, "--out", "predictions")
    else:
        given = ("--condition", "pictures") if options.condition else ()
        say_next("sample-ddpm", "--model", options.out / "model", *given, "--out", "samples")


def command(argv: Sequence[str] | None = None) -> int:
    return run_script(main, DiffusionOptions, argv, description=__doc__)
