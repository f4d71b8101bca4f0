"""unet-txt2img from the command line to the files, on a pipeline of a few random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image

from diffusion.stable.recipe import read_recipe
from tests.diffusion.stable.tiny_pipeline import SIDE, write_pipeline
from tests.forks import SCRIPTS, run_forked
from unet.training.cli import run_script
from unet_diffusion import txt2img

PROMPT = ("--prompt", "a cat", "--negative", "dog", "--steps", 3)


def run(*arguments: object) -> int:
    return run_script(txt2img.main, txt2img.Txt2ImgOptions, list(map(str, arguments)))


def pixels(path: Path, number: int = 0) -> np.ndarray:
    with Image.open(path / f"images/{number:05d}.png") as picture:
        return np.array(picture)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("sd") / "pipeline")


@pytest.fixture(scope="module")
def made(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures of seeds 5 to 7."""
    out = tmp_path_factory.mktemp("made")
    arguments = ("--count", 3, "--seed", 5, "--batch-size", 2)
    assert run("--model", pipeline, "--out", out, *PROMPT, *arguments) == 0
    return out


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A picture and a mask that is white on its right half."""
    ramp = np.linspace(0, 255, 90).astype(np.uint8)
    Image.fromarray(np.stack([np.tile(ramp, (70, 1))] * 3, axis=2)).save(tmp_path / "a.png")
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:, SIDE // 2 :] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path / "a.png"


def test_each_picture_says_how_it_was_made(made: Path, pipeline: Path) -> None:
    names = {str(path.relative_to(made)) for path in made.rglob("*.png")}
    assert names == {"grid.png", *(f"images/0000{i}.png" for i in range(3))}
    with Image.open(made / "images/00002.png") as picture:
        assert picture.size == (SIDE, SIDE)
        assert json.loads(picture.info["txt2img"]) == {
            "prompt": "a cat",
            "negative": "dog",
            "steps": 3,
            "sampler": "dpmpp-2m",
            "guidance": 7.5,
            "seed": 7,
            "size": f"{SIDE}x{SIDE}",
            "model": str(pipeline),
            "precision": "auto",
        }


def test_the_pictures_are_those_of_diffusers(made: Path, pipeline: Path) -> None:
    theirs = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
    theirs.scheduler = DPMSolverMultistepScheduler.from_config(theirs.scheduler.config)
    images = theirs(
        "a cat",
        negative_prompt="dog",
        num_inference_steps=3,
        num_images_per_prompt=3,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6, 7)],
        output_type="np",
    ).images
    for number, wanted in enumerate(images):
        assert np.abs(pixels(made, number) / 255 - wanted).max() <= 1.01 / 255


def test_a_picture_is_repeated_from_its_png(made: Path, tmp_path: Path) -> None:
    png = made / "images/00001.png"
    assert run("--from-png", png, "--out", tmp_path / "same") == 0
    wanted = pixels(made, 1).astype(int)
    assert np.abs(pixels(tmp_path / "same") - wanted).max() <= 1  # another batch size
    assert not (tmp_path / "same/images/00001.png").exists()
    arguments = ("--prompt", "dog", "--count", 2, "--low-memory")
    assert run("--from-png", png, "--out", tmp_path / "other", *arguments) == 0
    assert (pixels(tmp_path / "other") != pixels(made, 1)).any()
    recipe = read_recipe(tmp_path / "other/images/00001.png")
    assert (recipe["prompt"], recipe["negative"], recipe["seed"]) == ("dog", "dog", 7)


@pytest.mark.slow  # diffusers and transformers are imported twice
def test_two_processes_share_the_pictures(made: Path, pipeline: Path, tmp_path: Path) -> None:
    arguments = ("--model", pipeline, *PROMPT, "--count", 3, "--seed", 5)
    done = run_forked(SCRIPTS / "txt2img.py", *arguments, "--out", tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr
    assert "shared by 2 processes" in done.stdout
    assert done.stdout.count("pictures: ") == 1
    for number in range(3):
        difference = pixels(made, number).astype(int) - pixels(tmp_path / "two", number)
        assert abs(difference).max() <= 1  # other batches may round otherwise
    assert (tmp_path / "two/grid.png").is_file()


def test_pictures_out_of_a_picture(pipeline: Path, image: Path, tmp_path: Path) -> None:
    few = ("--model", pipeline, *PROMPT, "--count", 1, "--sampler", "ddim")
    outs = [tmp_path / name for name in ("init", "inpaint", "again", "half")]
    init = ("--init", image, "--strength", 0.7)
    assert run(*few, "--out", outs[0], *init) == 0
    mask = ("--inpaint", image, "--mask", image.with_name("mask.png"))
    assert run(*few, "--out", outs[1], *mask) == 0
    assert (pixels(outs[0]) != pixels(outs[1])).any()
    assert run("--from-png", outs[1] / "images/00000.png", "--out", outs[2]) == 0
    assert (pixels(outs[1]) == pixels(outs[2])).all()
    assert run(*few, "--out", outs[3], *init, "--precision", "bf16") == 0


def test_a_single_file_and_a_size(pipeline: Path, tmp_path: Path) -> None:
    file = pipeline / "unet/diffusion_pytorch_model.safetensors"
    arguments = ("--checkpoint", file, "--size", "72x40", "--count", 1)
    assert run("--model", pipeline, *PROMPT, "--out", tmp_path / "a", *arguments) == 0
    assert pixels(tmp_path / "a").shape == (40, 72, 3)
    recipe = read_recipe(tmp_path / "a/images/00000.png")
    assert recipe["checkpoint"] == str(file)


def test_a_long_prompt_is_cut_and_said(pipeline: Path, tmp_path: Path, capsys: Any) -> None:
    few = ("--count", 1, "--steps", 2, "--out", tmp_path / "a")
    assert run("--model", pipeline, "--prompt", "a " * 14 + "dog", *few) == 0
    assert "prompt is longer than the text model takes" in capsys.readouterr().out
    recipe = read_recipe(tmp_path / "a/images/00000.png")
    assert recipe["prompt"].endswith("dog")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", "a"), "--model is missing"),
        (("--model", "PIPELINE"), "--prompt is missing"),
        (("--model", "OUT/sd", "--prompt", "a"), "' holds the folder there"),
        (("--model", "PIPELINE", "--prompt", "a", "--size", "60x64"), "multiples of 8"),
        (("--model", "PIPELINE", "--prompt", "a", "--size", "big"), "WIDTHxHEIGHT"),
        (("--model", "PIPELINE", "--prompt", "a", "--count", "0"), "--count 0"),
        (("--model", "PIPELINE", "--prompt", "a", "--steps", "2000"), "1000"),
        (("--model", "PIPELINE", "--prompt", "a", "--seed", "4294967295"), "seed 4294967298"),
        (("--model", "PIPELINE", "--prompt", "a", "--init", "no.png"), "no.png"),
        (("--model", "PIPELINE", "--prompt", "a", "--strength", "0.5"), "--init or --inpaint"),
        (("--model", "PIPELINE", "--prompt", "a", "--mask", "no.png"), "needs --mask"),
        (("--model", "PIPELINE", "--prompt", "a", "--checkpoint", "no.ckpt"), "no checkpoint"),
        (("--from-png", "no.png"), "no.png cannot be read"),
    ],
)
def test_mistakes_are_one_sentence(
    pipeline: Path, tmp_path: Path, capsys: Any, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "there").mkdir()
    given = [str(pipeline) if a == "PIPELINE" else a for a in arguments]
    given = [a.replace("OUT", str(tmp_path)) for a in given]
    assert run(*given, "--out", tmp_path / "out") == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(error) == 1
    assert message in error[0]
    assert not (tmp_path / "out").exists()


def test_an_earlier_run_is_not_overwritten(made: Path, pipeline: Path, capsys: Any) -> None:
    assert run("--model", pipeline, *PROMPT, "--out", made) == 2
    assert "is in use: give --overwrite" in capsys.readouterr().err
