"""Training in latents, from images and tiny components to a pipeline that diffusers reads."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import CLIPTokenizer

import diffusion
from diffusion import training
from diffusion.data.images import DiffusionData
from diffusion.data.pixels import to_bytes, to_unit
from diffusion.decisions import chosen_noise, decide, without_patches
from diffusion.initial import find_start, load_model
from diffusion.model import DiffusionUNet, noted_path
from diffusion.options import DiffusionOptions, SamplingOptions
from diffusion.process.samplers import finish
from diffusion.process.schedule import NoiseSchedule
from diffusion.sampling import ImageSampler, image_seeds
from diffusion.stable.autoencoder import Autoencoder
from diffusion.stable.clip import ClipText
from diffusion.stable.export import obstacle
from diffusion.stable.folder import read_schedule, read_unet
from diffusion.stable.latents import LatentData
from diffusion.stable.lora import LORA, lora_targets
from diffusion.stable.pipeline import StableDiffusion
from diffusion.stable.recipe import PictureSettings
from diffusion.text import WordEncoder
from diffusion.training import DiffusionTask, NoisedSamples, make_model
from tests.diffusion.stable.tiny_pipeline import SCHEDULER, SIDE, write_pipeline
from tests.forks import as_spawned
from unet import PRESETS, InputError
from unet.files.images import read_image, write_image
from unet.training.cli import run_script
from unet.training.run import read_log
from unet_diffusion import describe, sample_ddpm, train_ddpm, txt2img

pytestmark = pytest.mark.usefixtures("short_runs")

COUNT = 30
PROMPT = "a dog"
SMALL = ("--batch-size", 8, "--evaluations", 1, "--log-every", 1, "--precision", "fp32")


def run(module: Any, options: str, *arguments: object) -> int:
    return run_script(module.main, getattr(module, options), list(map(str, arguments)))


def run_train(*arguments: object) -> int:
    return run(train_ddpm, "DiffusionOptions", *arguments)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("sd") / "pipeline")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reddish cats and bluish dogs, with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    rng, lines = np.random.default_rng(0), []
    for i in range(COUNT):
        image = rng.integers(0, 60, (SIDE, SIDE, 3), np.uint8)
        image[..., 2 * (i % 2)] += np.uint8(150)
        write_image(folder / f"{i:02d}.png", image)
        lines.append({"file_name": f"{i:02d}.png", "text": ("a cat", "a dog")[i % 2]})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def trained(
    pipeline: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory, short_runs: None
) -> Path:
    """The run folder of a model that was trained from scratch, which no test changes."""
    out = tmp_path_factory.mktemp("runs") / "scratch"
    arguments = ("--data", pictures, "--captions", "--latents", pipeline, "--out", out, *SMALL)
    assert run_train(*arguments, "--steps", 40, "--width", 16, "--lr", 4e-3) == 0
    return out


def latent_data(pipeline: Path, pictures: Path, folder: Path, **values: Any) -> LatentData:
    data = DiffusionData(pictures, **{"captions": True, **values})
    return LatentData(data, Autoencoder.from_folder(pipeline), folder)


def written(folder: Path) -> tuple[bytes, ...]:
    names = ("moments.npy", "used.npy", "encoded.json")
    return tuple((folder / name).read_bytes() for name in names)


# -- from images to latents


@pytest.mark.parametrize("shift", [None, 0.3])
def test_latents_are_drawn_from_the_scaled_posterior_of_the_autoencoder(
    pipeline: Path, pictures: Path, tmp_path: Path, shift: float | None
) -> None:
    shutil.copytree(pipeline / "vae", tmp_path / "vae")
    file = tmp_path / "vae/config.json"
    values = {"scaling_factor": 2.5, "shift_factor": shift}
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    data = latent_data(tmp_path, pictures, tmp_path / "latents")
    data.encode()
    assert (data.size, data.channels, data.image_size) == ((8, 8), 4, (SIDE, SIDE))

    index, theirs = data.train[3], AutoencoderKL.from_pretrained(tmp_path / "vae")
    image = to_unit(torch.from_numpy(data.images([index]))).permute(0, 3, 1, 2)
    with torch.no_grad():
        posterior = theirs.encode(image).latent_dist
    samples = data.samples(seed=1)
    drawn = torch.stack([samples[epoch, 3]["image"] for epoch in range(4000)])
    assert torch.equal(drawn[7], data.samples(seed=1)[7, 3]["image"])
    assert (drawn[0] != drawn[1]).any()
    mean, std = 2.5 * (posterior.mean[0] - (shift or 0)), 2.5 * posterior.std[0]
    assert (((drawn.mean(dim=0) - mean) / std).abs() < 6 / 4000**0.5).all()
    assert (drawn.std(dim=0) / std - 1).abs().max() < 0.1

    with torch.no_grad():
        decoded = theirs.decode(posterior.mean).sample
    assert_close(data.autoencoder.decode(mean[None]), decoded, atol=1e-4, rtol=0)
    batch, _ = data.batch([index, data.val[0]])
    assert torch.equal(batch, data.batch([index, data.val[0]])[0])
    assert samples[0, 3]["caption"] == data.conditions([index])[0].shown == data.captions(index)[0]
    assert samples.name(3) == data.name(index)


def test_latents_and_words_can_be_handed_to_a_process_that_is_spawned(
    pipeline: Path, pictures: Path, tmp_path: Path
) -> None:
    """Without autoencoder and CLIP, and reading the files of the latents, which are not pickled."""
    given = {"captions": True, "latents": pipeline, "text_encoder": pipeline}
    data = latent_data(pipeline, pictures, tmp_path / "latents")
    data.encode()
    plan = decide(DiffusionOptions(data=str(pictures), **given), data)
    samples = NoisedSamples(data, plan, make_model(plan))
    again = as_spawned(samples)
    assert_close(again[2, 5], samples[2, 5], rtol=0, atol=0)
    assert isinstance(again.samples.data._moments, np.memmap)


@pytest.mark.parametrize("ending", ["error", "signal"])
def test_an_interrupted_encoding_goes_on_and_gives_the_same(
    pipeline: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    latent_data(pipeline, pictures, tmp_path / "whole").encode()
    data, calls = latent_data(pipeline, pictures, tmp_path / "parts"), []
    encode = Autoencoder.encode

    def counted(self: Autoencoder, images: torch.Tensor) -> Any:
        calls.append(len(images))
        if len(calls) == 3:
            if ending == "error":
                raise OSError("the disk is gone")
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(self, images)

    monkeypatch.setattr(Autoencoder, "encode", counted)
    with pytest.raises((OSError, SystemExit)) as stop:
        data.encode()
    assert ending == "error" or stop.value.code == 128 + signal.SIGTERM
    done = json.loads((tmp_path / "parts/encoded.json").read_text())["done"]
    assert done == sum(calls[: 2 if ending == "error" else 3])
    calls[:] = [0, 0, 0]
    latent_data(pipeline, pictures, tmp_path / "parts").encode()
    assert sum(calls) == COUNT - done
    assert written(tmp_path / "parts") == written(tmp_path / "whole")
    calls[:] = [0, 0, 0]
    monkeypatch.setenv("RANK", "1")  # the other processes read what the main one has written
    other = latent_data(pipeline, pictures, tmp_path / "parts")
    other.encode()
    assert not any(calls)
    assert torch.equal(other.batch([0])[0], latent_of(pipeline, pictures, tmp_path / "whole"))


def latent_of(pipeline: Path, pictures: Path, folder: Path) -> torch.Tensor:
    data = latent_data(pipeline, pictures, folder)
    data.encode()
    return data.batch([0])[0]


def test_latents_of_other_images_are_not_taken(
    pipeline: Path, pictures: Path, tmp_path: Path
) -> None:
    latent_data(pipeline, pictures, tmp_path / "latents").encode()
    other = write_pipeline(tmp_path / "v2", "v2")
    weights = other / "vae/diffusion_pytorch_model.safetensors"
    changed = AutoencoderKL.from_pretrained(other / "vae")
    torch.nn.init.normal_(changed.quant_conv.weight)
    weights.unlink()
    changed.save_pretrained(other / "vae")
    for data in (
        latent_data(pipeline, pictures, tmp_path / "latents", size=32),
        latent_data(other, pictures, tmp_path / "latents"),
    ):
        with pytest.raises(InputError, match="holds the latents of other images"):
            data.encode()


def test_an_unreadable_image_is_left_out_with_its_caption(
    pipeline: Path, pictures: Path, tmp_path: Path
) -> None:
    shutil.copytree(pictures, tmp_path / "pictures")
    data = latent_data(pipeline, tmp_path / "pictures", tmp_path / "latents", skip_bad=True)
    data.encode()
    bad = data.train[0]
    data.source._whole._cache.clear()
    Path(data.name(bad)).write_bytes(b"no image")
    again = latent_data(pipeline, tmp_path / "pictures", tmp_path / "new", skip_bad=True)
    again.encode()
    for key in ((0, i) for i in range(len(again.train))):
        sample, index = again.samples()[key], again.used(again.train[key[1]])
        assert sample["caption"] == again.captions(index)[0]
    assert again.count == COUNT - 1


# -- training


def test_the_loss_falls(trained: Path) -> None:
    losses = [e["loss"] for e in read_log(trained / "metrics.jsonl") if "loss" in e]
    assert len(losses) == 40
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:3])
    pictures = {path.name for path in (trained / "samples").iterdir()}
    assert {"forward.png", "samples-000040.png", "noise-000040.png"} <= pictures
    model = DiffusionUNet.from_pretrained(trained / "model")
    assert model.config.patch == 1
    assert model.config.context_channels == 16
    assert model.info["size"] == [SIDE, SIDE]
    assert not any("text" in key for key in model.state_dict())


def test_diffusers_reads_the_pipeline_strictly_and_generates_the_same(trained: Path) -> None:
    folder = trained / "pipeline"
    _, report = UNet2DConditionModel.from_pretrained(folder / "unet", output_loading_info=True)
    assert not any(report.values())
    theirs = StableDiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    seeds = image_seeds(0, 2)
    made = theirs(
        prompt=[PROMPT] * 2,
        num_inference_steps=5,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
    ).images
    assert made.shape == (2, 4, 8, 8)
    ours = StableDiffusion.from_pretrained(folder)
    settings = PictureSettings(prompt=PROMPT, steps=5, sampler="ddim", guidance=3.0)
    latents = finish(ours.sample(settings, seeds))
    assert_close(latents, made, atol=1e-4, rtol=0)

    options = SamplingOptions(steps=5, sampler="ddim", spacing="trailing", guidance=3.0)
    model = DiffusionUNet.from_pretrained(trained / "model")
    images = ImageSampler(model, options)(2, [PROMPT] * 2)
    assert images.shape == (2, SIDE, SIDE, 3)
    assert np.abs(images.astype(int) - ours.decode(latents)).max() <= 1


def test_scripts_make_pictures_with_the_model_and_with_the_pipeline(
    trained: Path, pictures: Path, tmp_path: Path
) -> None:
    prompt = ("--prompt", PROMPT, "--steps", 2, "--count", 2)
    given = ("--model", trained / "pipeline", "--out", tmp_path / "a")
    assert run(txt2img, "Txt2ImgOptions", *given, *prompt) == 0
    image = pictures / "00.png"
    write_image(tmp_path / "mask.png", 255 * np.eye(SIDE, dtype=np.uint8))
    for name, more in {
        "plain": ("--attention",),
        "variants": ("--init", image),
        "inpainted": ("--inpaint", image, "--mask", tmp_path / "mask.png"),
        "between": ("--interpolate", image, pictures / "01.png"),
    }.items():
        given = ("--model", trained / "model", "--out", tmp_path / name)
        assert run(sample_ddpm, "SampleOptions", *given, *prompt, *more) == 0
        assert len(list((tmp_path / name / "images").iterdir())) == 2


def test_a_run_that_was_moved_with_its_pipeline_finds_its_parts_there(
    trained: Path, pipeline: Path, tmp_path: Path
) -> None:
    root = Path(os.path.commonpath([trained, pipeline]))
    moved, parts = (tmp_path / path.relative_to(root) for path in (trained / "model", pipeline))
    shutil.copytree(trained / "model", moved)
    shutil.copytree(pipeline, parts)
    file = moved / "config.json"
    saved = json.loads(file.read_text())["info"]
    assert saved["autoencoder"] == os.path.relpath(pipeline / "vae", trained / "model")
    assert saved["text_encoder"] == os.path.relpath(pipeline, trained / "model")
    here = {"autoencoder": str(parts / "vae"), "text_encoder": str(parts)}
    model = DiffusionUNet.from_pretrained(moved)
    assert {key: model.info[key] for key in here} == here
    model.save_pretrained(tmp_path / "elsewhere/deep/model")  # as averages and --merged are
    again = DiffusionUNet.from_pretrained(tmp_path / "elsewhere/deep/model")
    assert again.info == model.info
    described = json.loads(file.read_text())
    absolute = described["info"] | here  # as earlier versions wrote them
    file.write_text(json.dumps(described | {"info": absolute}))
    assert DiffusionUNet.from_pretrained(moved).info == model.info
    # What has its name alone, as over the root, is where the run says it.
    names = described["info"] | {"autoencoder": "vae", "text_encoder": "pipeline"}
    file.write_text(json.dumps(described | {"info": names}))
    shutil.copy(trained / "config.yaml", moved.parent)
    found = DiffusionUNet.from_pretrained(moved).info
    assert (found["autoencoder"], found["text_encoder"]) == (str(pipeline),) * 2


@pytest.mark.parametrize("key", ["autoencoder", "text_encoder"])
def test_a_model_without_its_parts_says_which_and_how_to_mend_it(
    trained: Path, tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = DiffusionUNet.from_pretrained(trained / "model")
    model.info[key] = str(tmp_path / "gone")
    model.save_pretrained(tmp_path / "model")
    given = ("--model", tmp_path / "model", "--out", tmp_path / "out", "--prompt", PROMPT)
    assert run(sample_ddpm, "SampleOptions", *given) == 2
    said = capsys.readouterr().err
    assert f"of '{tmp_path / 'gone'}', which cannot be read" in said
    assert f"into info.{key} of the model's config.json" in said
    assert "use txt2img with the pipeline/ of its run" in said


@contextmanager
def without_pictures() -> Iterator[pytest.MonkeyPatch]:
    """Runs write no pictures, which take most of the time of a few steps."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("pictures", "forward_pictures"):
            patch.setattr(DiffusionTask, name, lambda *_: {})
        yield patch


@pytest.fixture(scope="module")
def tuned(pipeline: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a few steps from the pipeline's own weights, in attention alone."""
    out = tmp_path_factory.mktemp("runs") / "tuned"
    arguments = ("--data", pictures, "--captions", "--latents", pipeline, "--out", out, *SMALL)
    more = ("--init", pipeline, "--trained", "attention", "--steps", 3, "--weight-decay", 0.1)
    with without_pictures():
        assert run_train(*arguments, *more) == 0
    return out


def test_training_attention_leaves_all_else_as_it_was(pipeline: Path, tuned: Path) -> None:
    name = "unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(pipeline / name), load_file(tuned / "pipeline" / name)
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if ".attentions." in key}
    model = DiffusionUNet.from_pretrained(tuned / "model")
    schedule = read_schedule(pipeline)
    assert model.info["schedule"] == schedule.noise.to_dict()
    assert model.info["prediction"] == schedule.prediction == "eps"
    written = read_schedule(tuned / "pipeline")
    assert_close(written.noise.alpha_bar, schedule.noise.alpha_bar)
    assert written.prediction == "eps"


@pytest.fixture(scope="module")
def small(pipeline: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a few steps of a LoRA for the pipeline."""
    out = tmp_path_factory.mktemp("runs") / "small"
    arguments = ("--data", pictures, "--captions", "--latents", pipeline, "--out", out, *SMALL)
    with without_pictures():
        assert run_train(*arguments, *LORA_OPTIONS, "--init", pipeline) == 0
    return out


LORA_OPTIONS = ("--trained", "lora", "--rank", 2, "--steps", 4, "--lr", 0.05)


def test_a_lora_run_holds_small_weights_alone_and_what_they_belong_to(
    pipeline: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {path.name for path in (small / "model").iterdir()} == {"config.json", "README.md", LORA}
    assert not (small / "pipeline").exists()
    state = torch.load(small / "state/state.pt", weights_only=True)
    for part in ("model", "ema"):
        assert all(".down." in key or ".up." in key for key in state[part])
    base = os.path.relpath(pipeline, small / "model")
    noted = json.loads((small / "model/config.json").read_text())["info"]["lora"]
    assert noted["base"] == base  # without the folders of this machine
    assert f"to be used with {base}" in (small / "model/README.md").read_text()
    assert run(describe, "Options", small / "model") == 0
    shown = capsys.readouterr().out
    assert re.search(rf"LoRA of rank 2: [\d,]+ parameters beside \d+ layers of {base}", shown)
    model, before = load_model(small / "model"), read_unet(pipeline / "unet").state_dict()
    after = model.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {f"{name}.weight" for name in lora_targets(model)}
    again = find_start(str(small / "model"))  # from which more can be trained
    assert_close(dict(again.read()), dict(after), rtol=0, atol=0)
    moved = shutil.copytree(small / "model", tmp_path / "model")
    described = json.loads((moved / "config.json").read_text())

    def note(**values: str) -> None:
        lora = described["info"]["lora"] | {"base": str(pipeline)} | values
        changed_info = described | {"info": described["info"] | {"lora": lora}}
        (moved / "config.json").write_text(json.dumps(changed_info))

    note()  # as earlier versions did, and as a person may
    assert_close(dict(load_model(moved).state_dict()), dict(after), rtol=0, atol=0)
    for values, told in (({"base": "gone"}, "put it back"), ({"stamp": "x"}, "not")):
        note(**values)
        with pytest.raises(InputError, match=f"is a LoRA of .*{told}"):
            load_model(moved)
    note(base="pipeline")  # a name alone: the run knows where it is
    shutil.copy(small / "config.yaml", tmp_path)
    assert_close(dict(load_model(moved).state_dict()), dict(after), rtol=0, atol=0)


def test_a_note_of_another_model_names_no_folders_of_the_machine() -> None:
    for base, folder, noted in (
        ("/home/me/models/base", "/home/me/runs/fox/model", "../../../models/base"),
        ("/home/me/base", "/data/runs/fox/model", "base"),
        ("runs/photos/model", "runs/fox/model", "../../photos/model"),
    ):
        assert noted_path(base, Path(folder)) == noted


def test_diffusers_and_both_commands_take_a_trained_lora(
    pipeline: Path, small: Path, tmp_path: Path
) -> None:
    theirs: Any = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
    theirs.load_lora_weights(small / "model")
    seeds = image_seeds(0, 2)
    made = theirs(
        prompt=[PROMPT] * 2,
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
    ).images
    ours = StableDiffusion.from_pretrained(pipeline, loras=[str(small / "model")])
    settings = PictureSettings(prompt=PROMPT, steps=3, sampler="ddim", guidance=3.0)
    assert_close(finish(ours.sample(settings, seeds)), made, atol=1e-4, rtol=0)

    prompt = ("--prompt", PROMPT, "--steps", 2, "--count", 2)
    given = ("--model", small / "model", "--out", tmp_path / "sampled", *prompt)
    assert run(sample_ddpm, "SampleOptions", *given, "--lora", f"{small / 'model'}:-1") == 0
    given = ("--model", pipeline, "--lora", small / "model", f"{small / 'model'}:0.5", *prompt)
    merged = tmp_path / "merged"
    more = ("--out", tmp_path / "a", "--merged", merged)
    assert run(txt2img, "Txt2ImgOptions", *given, *more) == 0
    again = ("--from-png", tmp_path / "a/images/00001.png", "--out", tmp_path / "b")
    assert run(txt2img, "Txt2ImgOptions", *again) == 0
    given = ("--model", merged, *prompt, "--out", tmp_path / "c")
    assert run(txt2img, "Txt2ImgOptions", *given) == 0
    pictures = [(tmp_path / n / "images/00001.png") for n in "ac"]
    pictures.append(tmp_path / "b/images/00000.png")
    first, *others = (read_image(path).astype(int) for path in pictures)
    assert all(np.abs(first - other).max() <= 1 for other in others)
    assert run(txt2img, "Txt2ImgOptions", *given, "--merged", tmp_path / "no", "--overwrite") == 2


@pytest.mark.slow  # that of attention goes the same way, but for what is saved
def test_an_interrupted_lora_run_ends_with_the_same_weights(
    pipeline: Path, pictures: Path, small: Path, tmp_path: Path
) -> None:
    arguments = ("--data", pictures, "--captions", "--latents", pipeline, "--out", tmp_path / "run")
    loss, calls = DiffusionTask.loss, []

    def stopping(self: DiffusionTask, model: Any, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, model, batch)

    with without_pictures() as patch:
        patch.setattr(DiffusionTask, "loss", stopping)
        more = (*LORA_OPTIONS, "--init", pipeline)
        assert run_train(*arguments, *more, *SMALL) == 128 + signal.SIGTERM
        assert run_train("--out", tmp_path / "run", "--resume") == 0
    name = f"model/{LORA}"
    assert (tmp_path / "run" / name).read_bytes() == (small / name).read_bytes()


def test_every_second_image_is_of_the_prior(pipeline: Path, pictures: Path, tmp_path: Path) -> None:
    """Each once in as many epochs as they need; a run with them trains, and holds both latents."""
    folder = shutil.copytree(pictures, tmp_path / "prior")
    given = {"captions": True, "latents": pipeline, "init": str(pipeline), "out": tmp_path / "out"}
    options = DiffusionOptions(data=str(pictures), prior=str(folder), trained="lora", **given)
    data = training.load_data(options)
    prior = training.load_prior(options, data)
    assert prior
    for part in (data, prior):
        part.encode()
    plan = decide(options, data)
    samples = NoisedSamples(data, plan, make_model(plan), prior)
    assert len(samples) == 2 * len(data.train)
    names = [samples.name(i) for i in range(len(samples))]
    assert names[::2] == [data.name(i) for i in data.train]
    assert all(name.startswith(str(folder)) for name in names[1::2])
    mixed = samples.samples
    seen = [mixed[0, 2 * i + 1]["image"] for i in range(len(data.train))]
    first, again = prior.samples(0)[0, 3]["image"], seen[3]
    assert torch.equal(first, again)
    arguments = ("--data", pictures, "--captions", "--latents", pipeline, "--init", pipeline)
    more = ("--prior", folder, "--trained", "lora", "--steps", 1, "--out", tmp_path / "run")
    with without_pictures():
        assert run_train(*arguments, *more, *SMALL) == 0
    for name in ("latents", "prior"):
        assert (tmp_path / "run" / name / "moments.npy").is_file()


def test_a_lora_of_our_own_model_with_its_words(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its text encoder is taken over, words that it does not know and all; no layer is left out."""
    base = tmp_path / "base"
    small = {"channels": 8, "head_channels": None, "attention": "transformer", "blocks": 1}
    info = {
        "schedule": NoiseSchedule().to_dict(),
        "prediction": "v",
        "size": [16, 16],
        "text": WordEncoder.from_captions(["a dog"], width=32, depth=1).to_dict(),
    }
    config = replace(PRESETS["diffusion"].config, **small, context_channels=32, zero_init=False)
    DiffusionUNet(config, 3, info).save_pretrained(base)
    given = ("--data", pictures, "--size", 16, "--steps", 2, *SMALL)
    lora = ("--trained", "lora", "--init", base, "--lr", 0.05)
    with without_pictures():
        assert run_train(*given, "--captions", *lora, "--out", tmp_path / "small") == 0
        assert run_train(*given, *lora, "--out", tmp_path / "no") == 2
        assert "reads text: give --captions" in capsys.readouterr().err
    prompt = ("--prompt", PROMPT, "--steps", 2, "--count", 2)
    outs = [tmp_path / n for n in "abc"]
    merged = tmp_path / "merged"
    models = (
        (tmp_path / "small/model",),
        (base, "--lora", tmp_path / "small/model", "--merged", merged),
        (merged,),
    )
    for out, model in zip(outs, models, strict=True):
        assert run(sample_ddpm, "SampleOptions", "--model", *model, *prompt, "--out", out) == 0
    first, *others = (read_image(out / "images/00001.png") for out in outs)
    assert all((first == other).all() for other in others)
    loaded = diffusion.load(base, lora=str(tmp_path / "small/model"))
    assert (loaded(2, prompts=PROMPT, steps=2)[1] == first).all()
    plain = diffusion.load(base)(2, prompts=PROMPT, steps=2)[1]
    assert (plain != first).any()


def test_noise_is_that_of_the_pipeline_unless_another_is_asked_for(pipeline: Path) -> None:
    def noise(init: Path, **values: Any) -> tuple[Any, Any, str]:
        given = DiffusionOptions(out=Path("unused"), init=str(init), **values)
        schedule, prediction, decisions = chosen_noise(given, find_start(str(init)))
        return schedule, prediction, " ".join(d.why for d in decisions)

    for init in (pipeline, pipeline / "unet"):
        schedule, prediction, told = noise(init)
        assert (schedule.beta_start, prediction) == (SCHEDULER["beta_start"], "eps")
        assert told.count(f"that of {pipeline}") == 2
    schedule, prediction, told = noise(pipeline, noise="linear", timesteps=50, prediction="v")
    assert (schedule.kind, schedule.steps, prediction) == ("linear", 50, "v")
    assert "as of" not in told
    assert noise(pipeline, zero_snr=True, prediction="v")[0].zero_snr
    with pytest.raises(InputError, match="--timesteps 50 is not that of --init"):
        noise(pipeline, timesteps=50)


def test_an_interrupted_run_goes_on_with_resume_from_its_first_weights(
    pipeline: Path, pictures: Path, tuned: Path, tmp_path: Path
) -> None:
    encode = Autoencoder.encode

    def stopping(self: Autoencoder, images: torch.Tensor) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return encode(self, images)

    arguments = ("--data", pictures, "--captions", "--latents", pipeline, "--out", tmp_path / "run")
    more = ("--init", pipeline, "--trained", "attention", "--steps", 3, "--weight-decay", 0.1)
    with without_pictures() as patch:
        patch.setattr(Autoencoder, "encode", stopping)
        assert run_train(*arguments, *more, *SMALL) == 128 + signal.SIGTERM
        patch.setattr(Autoencoder, "encode", encode)
        assert run_train("--out", tmp_path / "run", "--resume") == 0
    name = "pipeline/unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tuned / name).read_bytes()


def test_what_diffusers_cannot_hold_is_said(
    trained: Path,
    pipeline: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ("--data", pictures, "--latents", pipeline / "vae", *SMALL, "--width", 8)
    with without_pictures():
        assert run_train(*arguments, "--captions", "--out", tmp_path / "run", "--steps", 1) == 0
    assert "no pipeline of this model: no CLIP reads its text" in capsys.readouterr().out
    assert not (tmp_path / "run/pipeline").exists()
    autoencoder = Autoencoder.from_folder(pipeline)
    model = DiffusionUNet.from_pretrained(trained / "model")
    assert obstacle(model, autoencoder) is None
    assert "on pixels" in str(obstacle(model, None))
    model.info["schedule"] |= {"kind": "sigmoid"}
    assert "'sigmoid'" in str(obstacle(model, autoencoder))
    info = model.info | {"schedule": {"kind": "cosine"}}
    patched = DiffusionUNet(replace(model.config, patch=2), 4, info)
    assert "patch=2" in str(obstacle(patched, autoencoder))
    assert "variance" in str(obstacle(DiffusionUNet(model.config, 8, info), autoencoder))
    autoencoder.shift = 0.1
    assert "shift_factor" in str(obstacle(model, autoencoder))


def test_levels_take_the_place_of_patches() -> None:
    config = replace(PRESETS["diffusion"].config, patch=4)
    changed = without_patches(config)
    assert (changed.stride, changed.patch, changed.levels) == (config.stride, 1, config.levels + 2)
    assert changed.attention_levels == (changed.levels - 1,)
    assert without_patches(changed) == changed


def test_the_mask_that_clip_is_given_is_its_tokenizer_s(pipeline: Path) -> None:
    clip = ClipText.from_pretrained(pipeline)
    texts = ["", "a cat", "a dog, " * 20]
    whole = clip.encode(texts).context
    clip.model.config.use_attention_mask = True
    tokenizer = CLIPTokenizer.from_pretrained(pipeline / "tokenizer")
    tokens = tokenizer(
        texts, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        masked = clip.model(tokens.input_ids, attention_mask=tokens.attention_mask)
    assert_close(clip.encode(texts).context, masked.last_hidden_state)
    assert not torch.equal(whole, clip.encode(texts).context)


# -- refusals


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ((), "holds no autoencoder"),
        (("--latents", "{}/unet"), "has _class_name 'UNet2DConditionModel'"),
        (("--latents", "{}", "--size", 20), "a multiple of 8, such as 16"),
        (("--latents", "{}", "--crops"), "leave out --crops and --flips"),
        (("--latents", "{}", "--flips", "True"), "leave out --crops and --flips"),
        (("--latents", "{}", "--colour", "grey"), "takes 3: leave out --colour"),
        (("--text-encoder", "{}"), "--text-encoder .* has nothing to read: give --captions"),
        (("--latents", "{}", "--captions", "--text-encoder", "{}/vae"), "has no tokenizer/"),
        (("--latents", "{}", "--trained", "attention"), "give one with --init"),
        (("--latents", "{}", "--trained", "lora"), "give one with --init"),
        (("--init", "{}", "--prior", "x"), "give --init and --captions"),
        (("--init", "{}", "--captions", "--prior", "x"), "needs captions that CLIP reads"),
        (("--latents", "{}", "--rank", 4), "--rank 4 is that of --trained lora"),
        (("--trained", "lora", "--init", "{}", "--rank", 0), "--rank 0 must be at least 1"),
        (("--trained", "lora", "--init", "{}", "--width", 8), "leave out --network, --width"),
        (("--latents", "{}", "--init", "{}"), "reads text: give --captions"),
        (("--init", "{}", "--captions"), "works on latents of an autoencoder, not on pixels: give"),
    ],
)
def test_mistakes_are_told_in_a_sentence_before_anything_is_encoded(
    pipeline: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[Any, ...],
    told: str,
) -> None:
    given = [str(word).format(pipeline) for word in more]
    latents = () if more else ("--latents", pictures)
    out = tmp_path / "run"
    assert run_train("--data", pictures, "--out", out, *SMALL, "--steps", 1, *latents, *given) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(told, error), error
    assert not out.exists()


def test_a_network_that_does_not_fit_its_text_or_task_is_refused(
    pipeline: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pipeline, tmp_path / "other")
    file = tmp_path / "other/unet/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"cross_attention_dim": 32}))
    given = ("--data", pictures, "--latents", pipeline, "--out", tmp_path / "run", "--steps", 1)
    assert run_train(*given, "--captions", "--init", tmp_path / "other") == 2
    assert "reads text of 32 channels" in capsys.readouterr().err
    assert run_train(*given, "--init", pixels(tmp_path), "--trained", "attention") == 2
    assert "spatial transformers" in capsys.readouterr().err


def pixels(folder: Path) -> Path:
    """A model without text, of four channels."""
    config = replace(PRESETS["diffusion"].config, in_channels=4, channels=8, head_channels=None)
    DiffusionUNet(config, 4).save_pretrained(folder / "plain")
    return folder / "plain"


def test_images_survive_the_way_there_and_back_in_shape(pipeline: Path) -> None:
    autoencoder = Autoencoder.from_folder(pipeline)
    mean, std = autoencoder.encode(torch.zeros(2, 3, 32, 48))
    assert mean.shape == std.shape == (2, 4, *autoencoder.size(32, 48))
    assert to_bytes(autoencoder.decode(mean)).shape == (2, 32, 48, 3)
