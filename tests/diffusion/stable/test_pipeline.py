from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from diffusion.model import DiffusionUNet
from diffusion.process.samplers import finish
from diffusion.stable.folder import config_from_compvis
from diffusion.stable.pipeline import StableDiffusion
from diffusion.stable.recipe import PictureSettings, Recipe, merged, read_recipe, write_picture
from diffusion.stable.schedule import PipelineSchedule
from tests.diffusion.stable.tiny_pipeline import SCHEDULER, SIDE, TOKENS, write_pipeline
from unet import PRESETS
from unet.errors import InputError, RunError
from unet.weights.convert import to_layout
from unet.weights.layouts import COMPVIS_PREFIX

THEIRS = {
    "ddim": DDIMScheduler,
    "dpmpp-2m": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
}
SEEDS = [3, 4]
STEPS = 5  # divides 1000, so that DDIM steps to the same timesteps as diffusers
PROMPT, NEGATIVE = "a cat, big", "dog"
CHECKED = {"safety_checker": None, "requires_safety_checker": False}

every_sampler = pytest.mark.parametrize("sampler", THEIRS)
every_version = pytest.mark.parametrize("version", ["v1", "v2"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function from version and input channels to a pipeline folder."""
    root = tmp_path_factory.mktemp("pipelines")

    def make(version: str = "v1", in_channels: int = 4) -> Path:
        path = root / f"{version}-{in_channels}"
        return path if path.exists() else write_pipeline(path, version, in_channels)

    return make


@cache
def read(path: Path) -> StableDiffusion:
    """The model of a folder, which no test changes."""
    return StableDiffusion.from_pretrained(path)


@cache
def their_parts(path: Path) -> dict[str, Any]:
    return StableDiffusionPipeline.from_pretrained(path, **CHECKED).components


@pytest.fixture
def model(folder: Callable[..., Path]) -> StableDiffusion:
    return read(folder())


def settings(sampler: Any = "dpmpp-2m", **more: Any) -> PictureSettings:
    values = {"prompt": PROMPT, "negative": NEGATIVE, "steps": STEPS, "sampler": sampler}
    return PictureSettings(**(values | more))


def picture(seed: int = 0) -> Tensor:
    """A smooth image (1, 3, H, W) in [-1, 1]."""
    rough = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(rough, (SIDE, SIDE), mode="bilinear").tanh()


def half() -> Tensor:
    """A mask (1, 1, H, W) whose border is no multiple of 8."""
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., 20:, :45] = 1
    return mask


def their_pipeline(kind: Any, path: Path, sampler: str, **scheduler: Any) -> Any:
    parts = their_parts(path)
    pipeline = kind(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    config = {k: v for k, v in parts["scheduler"].config.items() if not k.startswith("_")}
    pipeline.scheduler = THEIRS[sampler].from_config(config | scheduler)
    return pipeline


def assert_same_as_theirs(model: StableDiffusion, run: Any, theirs: Any, **given: Any) -> None:
    """Latents within 1e-4, pictures within 1/255, with guidance 7.5 and a negative prompt."""
    x = theirs(
        prompt=[PROMPT] * len(SEEDS),
        negative_prompt=[NEGATIVE] * len(SEEDS),
        guidance_scale=7.5,
        num_inference_steps=STEPS,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="latent",
        **given,
    ).images
    ours = finish(run)
    assert_close(ours, x, atol=1e-4, rtol=0)
    with torch.no_grad():
        decoded = theirs.vae.decode(x / theirs.vae.config.scaling_factor).sample
    images = theirs.image_processor.postprocess(decoded, output_type="np")
    assert np.abs(model.decode(ours) / 255 - images).max() <= 1 / 255


# ----------------------------------------------------------------------------------------------
# Against diffusers, end to end


@every_version
@every_sampler
def test_text_to_image_is_that_of_diffusers(folder, version: str, sampler: str) -> None:
    model = read(folder(version))
    run = model.sample(settings(sampler), SEEDS)
    theirs = their_pipeline(StableDiffusionPipeline, folder(version), sampler)
    assert_same_as_theirs(model, run, theirs)


@every_version
@every_sampler
def test_image_to_image_is_that_of_diffusers(folder, version: str, sampler: str) -> None:
    model = read(folder(version))
    run = model.sample(settings(sampler, strength=0.6), SEEDS, image=picture())
    theirs = their_pipeline(StableDiffusionImg2ImgPipeline, folder(version), sampler)
    images = (picture().expand(2, -1, -1, -1) + 1) / 2
    assert_same_as_theirs(model, run, theirs, image=images, strength=0.6)


@pytest.mark.parametrize(("channels", "strength"), [(4, 1.0), (4, 0.6), (9, 0.6)])
@every_sampler
def test_inpainting_is_that_of_diffusers(
    folder, channels: int, strength: float, sampler: str
) -> None:
    """4 channels: the known latents are put back. 9: the U-Net of an inpainting model sees them."""
    path = folder("v1", channels)
    model = read(path)
    wanted = settings(sampler, strength=strength)
    run = model.sample(wanted, SEEDS, image=picture(), mask=half())
    theirs = their_pipeline(StableDiffusionInpaintPipeline, path, sampler)
    two = {
        "image": (picture().expand(2, -1, -1, -1) + 1) / 2,
        "mask_image": half().expand(2, -1, -1, -1),
        "strength": strength,
        "height": SIDE,
        "width": SIDE,
    }
    assert_same_as_theirs(model, run, theirs, **two)


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [
        ("ddim", {"timestep_spacing": "trailing"}),
        ("ddim", {"timestep_spacing": "leading", "set_alpha_to_one": True, "steps_offset": 0}),
        ("ddim", {"timestep_spacing": "leading", "steps_offset": 0}),
        ("ddim", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
        ("euler", {"timestep_spacing": "linspace"}),
        ("euler", {"timestep_spacing": "trailing"}),
        ("euler", {"timestep_spacing": "linspace", "use_karras_sigmas": True}),
        ("dpmpp-2m", {"timestep_spacing": "linspace"}),
        ("dpmpp-2m", {"timestep_spacing": "trailing"}),
        ("dpmpp-2m", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
        ("dpmpp-2m", {"num_train_timesteps": 500, "beta_schedule": "linear"}),
        ("ddim", {"beta_schedule": "squaredcos_cap_v2"}),
    ],
)
def test_every_field_of_the_scheduler_counts(folder, sampler: str, scheduler: Any) -> None:
    path = folder("v2")
    theirs = their_pipeline(StableDiffusionPipeline, path, sampler, **scheduler)
    named = {"_class_name": THEIRS[sampler].__name__}
    config = named | SCHEDULER | {"prediction_type": "v_prediction", "timestep_spacing": "leading"}
    model = copy.copy(read(path))
    model.schedule = PipelineSchedule.from_dict(config | scheduler)
    assert_same_as_theirs(model, model.sample(settings(sampler), SEEDS), theirs)


@every_sampler
def test_a_file_without_a_spacing_leaves_it_to_the_sampler(sampler: str) -> None:
    """Old pipelines name none; their scheduler is PNDM."""
    config: dict[str, Any] = SCHEDULER | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
    scheduler = THEIRS[sampler].from_config(config)
    scheduler.set_timesteps(25)
    times, _ = PipelineSchedule.from_dict(config).timesteps(sampler, 25)
    assert_close(torch.tensor(times).float(), scheduler.timesteps.float(), atol=1e-3, rtol=0)


# ----------------------------------------------------------------------------------------------
# Laws


def test_the_comparison_would_see_the_text_and_the_picture(model) -> None:
    """That is, the tiny networks do not ignore what they are given."""
    x = finish(model.sample(settings(), [3]))
    for other in (
        finish(model.sample(settings(prompt="dog"), [3])),
        finish(model.sample(settings(negative=""), [3])),
        finish(model.sample(settings(guidance=1.0), [3])),
        finish(model.sample(settings(strength=0.9), [3], image=picture())),
        finish(model.sample(settings(), [3], image=picture(), mask=half())),
    ):
        assert (x - other).abs().max() > 0.01


def test_a_picture_depends_on_its_own_seed_alone(model) -> None:
    both = finish(model.sample(settings(), [3, 4], image=picture()))
    alone = finish(model.sample(settings(), [4], image=picture()))
    assert_close(both[1:], alone, atol=1e-4, rtol=1e-4)


def test_outside_the_mask_the_latents_are_those_of_the_image(model) -> None:
    x, y = (
        finish(model.sample(settings(prompt=p), [3], image=picture(), mask=half()))
        for p in (PROMPT, "dog")
    )
    same = (x == y).all(dim=1)[0]
    anew = half()[0, 0, ::8, ::8] > 0
    assert (same == ~anew).all()


def test_half_precision_is_close(folder) -> None:
    path = folder("v2")
    x, y = (
        finish(StableDiffusion.from_pretrained(path, dtype=d).sample(settings(guidance=2.0), [3]))
        for d in (torch.float32, torch.bfloat16)
    )
    assert y.dtype == torch.float32
    assert 0 < (x - y).abs().mean() < 0.05 * x.std()


def test_large_pictures_can_be_decoded_in_tiles(folder) -> None:
    model = StableDiffusion.from_pretrained(folder())
    x = torch.randn(1, 4, 20, 12, generator=torch.Generator().manual_seed(0))
    whole = model.decode(x)
    model.save_memory()
    tiled = model.decode(x)
    assert whole.shape == tiled.shape == (1, 160, 96, 3)
    assert (whole != tiled).any()  # group normalisation sees a tile
    assert np.abs(whole.astype(float) - tiled).mean() < 20


def test_what_is_cut_off_a_prompt_is_said(model) -> None:
    long = f"{'a ' * (TOKENS - 2)}cat, dog"
    cut = model.cut_prompts(settings(prompt=long))
    assert cut["prompt"].replace(" ,", ",") == "cat, dog"  # the tokenizer's versions differ
    assert model.cut_prompts(settings(negative="a " * (TOKENS - 2))) == {}
    context = model.text.encode([long, "a " * (TOKENS - 2)]).context
    assert_close(context[0], context[1])


def test_a_size_of_its_own(model) -> None:
    images = model.decode(finish(model.sample(settings(size="40x72"), [3])))
    assert images.shape == (1, 72, 40, 3)
    assert model.pixels(settings()) == (SIDE, SIDE)


# ----------------------------------------------------------------------------------------------
# Single-file checkpoints


def compvis(path: Path) -> tuple[DiffusionUNet, dict[str, Tensor]]:
    """A folder's U-Net, and a full CompVis checkpoint of it with another part and an EMA copy."""
    unet = read(path).unet
    state = to_layout(unet.state_dict(), unet.config, "compvis", prefix=COMPVIS_PREFIX)
    others = {"first_stage_model.conv.weight": torch.ones(2), "model_ema.decay": torch.ones(())}
    return unet, {k: v.contiguous() for k, v in (others | state).items()}


@every_version
@pytest.mark.parametrize(
    ("kind", "with_config"), [("safetensors", False), ("ckpt", True), ("old ckpt", False)]
)
def test_a_checkpoint_is_read_by_its_shapes(
    folder, tmp_path: Path, version: str, kind: str, with_config: bool
) -> None:
    unet, state = compvis(folder(version))
    path = tmp_path / "pipeline"
    shutil.copytree(folder(version), path)
    if not with_config:
        shutil.rmtree(path / "unet")
    file = tmp_path / f"any-name.{kind.split()[-1]}"
    if kind == "safetensors":
        save_file(state, file)
    else:
        content = {"state_dict": state, "global_step": 7}
        torch.save(content, file, _use_new_zipfile_serialization=kind == "ckpt")
    found = StableDiffusion.from_pretrained(path, file).unet
    if with_config:
        assert found.config == unet.config
    assert_close(found.state_dict(), unet.state_dict())
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([7, 800]), torch.randn(2, 5, 16)
    assert_close(found(x, t, context), unet(x, t, context))


def test_the_unets_file_of_another_folder_is_a_checkpoint(folder) -> None:
    path = folder()
    file = path / "unet" / "diffusion_pytorch_model.safetensors"
    unet = StableDiffusion.from_pretrained(path, file).unet
    assert_close(unet.state_dict(), read(path).unet.state_dict())


@pytest.mark.parametrize("name", ["sd-v1", "sd-v2"])
def test_full_size_checkpoints_are_told_apart_by_their_shapes(name: str) -> None:
    preset = PRESETS[name]
    with torch.device("meta"):
        unet = DiffusionUNet(preset.config, preset.out_channels)
    state = to_layout(unet.state_dict(), preset.config, "compvis")
    assert config_from_compvis(state) == (preset.config, 4)


# ----------------------------------------------------------------------------------------------
# Recipes


def test_a_picture_says_how_it_was_made(tmp_path: Path) -> None:
    recipe = Recipe(prompt="a wolf, 雪\n'☃'", model="sd", seed=7, guidance=3, size="8x16")
    image = np.random.default_rng(0).integers(0, 256, (16, 8, 3), np.uint8)
    write_picture(tmp_path / "a.png", image, recipe)
    assert merged({}, tmp_path / "a.png") == recipe
    assert merged({"seed": 8, "steps": None}, tmp_path / "a.png") == replace(recipe, seed=8)


def test_another_model_or_image_leaves_out_what_belongs_to_the_old_one(tmp_path: Path) -> None:
    recipe = Recipe(
        prompt="a", model="sd", checkpoint="c.ckpt", inpaint="a.png", mask="m.png", strength=0.3
    )
    write_picture(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8), recipe)
    assert merged({"model": "other"}, tmp_path / "a.png").checkpoint is None
    other = merged({"init": "b.png"}, tmp_path / "a.png")
    assert (other.init, other.inpaint, other.mask, other.strength) == ("b.png", None, None, None)


# ----------------------------------------------------------------------------------------------
# Bad input


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


class Code:
    def __reduce__(self) -> Any:
        return print, ("code ran",)


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda p: shutil.rmtree(p), "is no folder"),
    **{
        f"no {part}": (lambda p, part=part: shutil.rmtree(p / part), f"lacks {part}/")
        for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    },
    "no config": (lambda p: (p / "vae/config.json").unlink(), "lacks vae/config.json"),
    "no weights": (
        lambda p: (p / "unet/diffusion_pytorch_model.safetensors").unlink(),
        "lacks its weights",
    ),
    "broken weights": (
        lambda p: (p / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"x" * 99),
        "cannot be read as safetensors",
    ),
    "broken autoencoder": (
        lambda p: (p / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"x" * 99),
        "vae cannot be read",
    ),
    "other autoencoder": (
        lambda p: edit_json(p / "vae/config.json", _class_name="VQModel"),
        "'VQModel', but Stable Diffusion's is 'AutoencoderKL'",
    ),
    "autoencoder of another shape": (
        lambda p: edit_json(p / "vae/config.json", layers_per_block=2),
        "vae",
    ),
    "latents of another shape": (
        lambda p: edit_json(p / "vae/config.json", latent_channels=8),
        "vae",
    ),
    "no json": (lambda p: (p / "unet/config.json").write_text("{"), "cannot be read as JSON"),
    "a list": (lambda p: (p / "unet/config.json").write_text("[]"), "must hold one JSON object"),
    "unknown field": (lambda p: edit_json(p / "unet/config.json", new=1), "unet/config.json.*new"),
    "a picture that is too wide": (
        lambda p: edit_json(p / "unet/config.json", sample_size=[8, 2**30]),
        "sample_size",
    ),
    "other text": (
        lambda p: edit_json(p / "text_encoder/config.json", model_type="t5"),
        "model_type 't5'",
    ),
    "text of another width": (
        lambda p: edit_json(p / "text_encoder/config.json", hidden_size=32),
        "text_encoder",
    ),
    "schedule": (
        lambda p: edit_json(p / "scheduler/scheduler_config.json", beta_schedule="exp"),
        "scheduler_config.json: beta_schedule='exp'",
    ),
    "prediction": (
        lambda p: edit_json(p / "scheduler/scheduler_config.json", prediction_type=["v"]),
        "prediction_type=",
    ),
    "betas": (
        lambda p: edit_json(p / "scheduler/scheduler_config.json", trained_betas=[0.1]),
        "trained_betas",
    ),
    "zero snr": (
        lambda p: edit_json(p / "scheduler/scheduler_config.json", rescale_betas_zero_snr=True),
        "eps-prediction is undefined",
    ),
    "timesteps": (
        lambda p: edit_json(p / "scheduler/scheduler_config.json", num_train_timesteps="1000"),
        "num_train_timesteps='1000'",
    ),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_bad_folder_is_one_sentence(folder, tmp_path: Path, name: str) -> None:
    spoil, message = BAD_FOLDERS[name]
    path = tmp_path / "pipeline"
    shutil.copytree(folder(), path)
    spoil(path)
    with pytest.raises(InputError, match=message):
        StableDiffusion.from_pretrained(path)


def torch_file(content: Any) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        torch.save(content, path / "a.ckpt")
        return path / "a.ckpt"

    return write


def safetensors_file(content: dict[str, Tensor]) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        save_file(content, path / "a.safetensors")
        return path / "a.safetensors"

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: p / "missing.ckpt", "there is no checkpoint"),
        (torch_file({"state_dict": {"a": Code()}}), "pickle with code in it"),
        (torch_file([torch.ones(1)]), "holds a list"),
        (torch_file({"a": torch.ones(1)}), "no Stable Diffusion U-Net"),
        (torch_file({f"{COMPVIS_PREFIX}input_blocks.0.0.weight": torch.ones(1)}), "of version 1"),
        (safetensors_file({"input_blocks.0.0.weight": torch.ones(4, 4)}), "of version 1, 2 or XL"),
        (lambda p: (p / "a.ckpt").write_bytes(b"junk") and p / "a.ckpt", "a.ckpt"),
        (lambda p: (p / "a.txt").write_bytes(b"junk") and p / "a.txt", "is no checkpoint"),
    ],
)
def test_a_bad_checkpoint_is_one_sentence(
    folder, tmp_path: Path, capsys: Any, write: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        StableDiffusion.from_pretrained(folder(), write(tmp_path))
    assert "code ran" not in capsys.readouterr().out


def test_an_unknown_part_in_a_checkpoint_is_named(folder, tmp_path: Path) -> None:
    """Such as a class embedding."""
    _, state = compvis(folder())
    save_file(
        state | {f"{COMPVIS_PREFIX}label_emb.weight": torch.ones(2)}, tmp_path / "a.safetensors"
    )
    with pytest.raises(InputError, match=r"a\.safetensors: .*unknown label_emb"):
        StableDiffusion.from_pretrained(folder(), tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("values", "given", "message"),
    [
        ({"size": "60x64"}, {}, "size 60x64 must be of multiples of 8.* choose 64x64"),
        ({"steps": 1001}, {}, "1001|1002"),
        ({"steps": 999}, {}, "choose fewer steps|sampling steps"),
        ({"strength": 0.1}, {"image": picture()}, "is not a single one"),
        ({"size": "72x64"}, {"image": picture()}, "the image is"),
        ({}, {"mask": half()}, "come with an image"),
    ],
)
def test_what_cannot_be_sampled_is_said_before(
    model, values: Any, given: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        model.sample(settings(**values), SEEDS, **given)


def test_an_inpainting_model_needs_a_mask(folder) -> None:
    model = StableDiffusion.from_pretrained(folder("v1", 9))
    with pytest.raises(InputError, match="for inpainting alone"):
        model.sample(settings(), SEEDS)


def test_numbers_that_are_not_finite_are_no_black_picture(model) -> None:
    with pytest.raises(RunError, match="--precision fp32"):
        model.decode(torch.full((1, 4, 8, 8), float("nan")))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sampler": "pndm"}, "sampler cannot be 'pndm': choose from"),
        ({"steps": 0}, "steps 0"),
        ({"steps": True}, "steps cannot be True"),
        ({"guidance": float("nan")}, "guidance nan"),
        ({"seed": -1}, "seed -1"),
        ({"size": "512x"}, "must be WIDTHxHEIGHT"),
        ({"size": "99999x8"}, "at most 16384"),
        ({"strength": 0.0, "init": "a"}, "strength 0.0"),
        ({"strength": 0.5}, "--init or --inpaint"),
        ({"init": "a", "inpaint": "b", "mask": "c"}, "give one"),
        ({"inpaint": "b"}, "needs --mask"),
        ({"prompt": None}, "prompt cannot be None"),
    ],
)
def test_a_bad_recipe_is_one_sentence(values: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe(**({"prompt": "a", "model": "sd"} | values))


def test_a_size_of_one_number_is_both_sides() -> None:
    sizes = [Recipe(prompt="a", model="sd", size=size).pixels for size in ("512", "512x768")]
    assert sizes == [(512, 512), (768, 512)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "says nothing"),
        ("{", "cannot be read"),
        ("[]", "not of this"),
        ('{"a": 1}', "not of"),
    ],
)
def test_a_png_without_a_recipe_is_one_sentence(tmp_path: Path, text: Any, message: str) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if text is not None:
        info.add_text("txt2img", text)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(InputError, match=message):
        read_recipe(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(b"junk")
    with pytest.raises(InputError, match="cannot be read as a PNG"):
        read_recipe(tmp_path / "a.png")
