"""Stable Diffusion XL: the same latents as diffusers' pipeline, on one of a few random weights."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from diffusion.initial import find_start
from diffusion.model import DiffusionUNet
from diffusion.stable.folder import config_from_compvis
from diffusion.stable.pipeline import StableDiffusion
from diffusion.stable.recipe import PictureSettings, Recipe
from tests.diffusion.stable.tiny_pipeline import SIDE, write_pipeline, write_xl
from unet import PRESETS, InputError
from unet.weights.convert import to_layout
from unet.weights.layouts import COMPVIS_PREFIX

SEEDS = [3, 8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_xl(tmp_path_factory.mktemp("xl") / "pipeline")


def settings(**more: Any) -> PictureSettings:
    given = {"prompt": "a cat", "negative": "dog", "steps": 3, "sampler": "euler", "guidance": 5.0}
    return PictureSettings(**(given | more))


def theirs_of(folder: Path, kind: Any = StableDiffusionXLPipeline) -> Any:
    pipeline = kind.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def made_by(theirs: Any, **given: Any) -> Tensor:
    return theirs(
        prompt=["a cat"] * 2,
        guidance_scale=5.0,
        num_inference_steps=3,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="latent",
        **given,
    ).images


def finish(run: Any) -> Tensor:
    *_, last = run
    return last.x


def test_latents_are_those_of_diffusers(folder: Path) -> None:
    model, theirs = StableDiffusion.from_pretrained(folder), theirs_of(folder)
    x = finish(model.sample(settings(), SEEDS))
    assert_close(x, made_by(theirs, negative_prompt=["dog"] * 2), atol=1e-4, rtol=0)
    # The comparison sees the negative prompt (none: zeros), the size and the cut.
    without = finish(model.sample(settings(negative=""), SEEDS))
    assert_close(without, made_by(theirs), atol=1e-4, rtol=0)
    cut = {"original_size": "320x160", "crop": "8x24", "size": "64x40"}
    cut_theirs = {"original_size": (160, 320), "crops_coords_top_left": (24, 8)}
    cut_theirs |= {"height": 40, "width": 64, "negative_prompt": ["dog"] * 2}
    y = finish(model.sample(settings(**cut), SEEDS))
    assert_close(y, made_by(theirs, **cut_theirs), atol=1e-4, rtol=0)
    uncut = finish(model.sample(settings(size="64x40"), SEEDS))
    assert min((x - without).abs().max(), (y - uncut).abs().max()) > 1e-3
    images = model.decode(x)
    assert images.shape == (2, SIDE, SIDE, 3)
    with torch.no_grad():
        decoded = theirs.vae.decode(x / 0.13025).sample
    wanted = theirs.image_processor.postprocess(decoded, output_type="np")
    assert abs(images / 255 - wanted).max() <= 1 / 255


def test_image_to_image_is_that_of_diffusers(folder: Path) -> None:
    image = torch.linspace(-1, 1, SIDE).expand(1, 3, SIDE, SIDE)
    model = StableDiffusion.from_pretrained(folder)
    x = finish(model.sample(settings(strength=0.7), SEEDS, image=image))
    theirs = theirs_of(folder, StableDiffusionXLImg2ImgPipeline)
    given = {"image": (image.expand(2, -1, -1, -1) + 1) / 2, "strength": 0.7}
    assert_close(x, made_by(theirs, negative_prompt=["dog"] * 2, **given), atol=1e-4, rtol=0)


def test_an_empty_prompt_is_no_zeros_where_the_index_says_so(tmp_path: Path) -> None:
    folder = write_xl(tmp_path / "pipeline", force_zeros_for_empty_prompt=False)
    x = finish(StableDiffusion.from_pretrained(folder).sample(settings(negative=""), SEEDS))
    assert_close(x, made_by(theirs_of(folder)), atol=1e-4, rtol=0)


def test_shards_in_half_precision_are_read(folder: Path, tmp_path: Path) -> None:
    theirs = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False).to(
        dtype=torch.float16
    )
    theirs.save_pretrained(tmp_path / "half", variant="fp16", max_shard_size="100KB")
    assert len(list((tmp_path / "half/unet").glob("*.index.fp16.json"))) == 1
    read, whole = (StableDiffusion.from_pretrained(p) for p in (tmp_path / "half", folder))
    assert read.second
    assert whole.second
    for a, b in ((read.unet, whole.unet), (read.second.model, whole.second.model)):
        rounded = {k: v.to(torch.float16).float() for k, v in b.state_dict().items()}
        assert_close({k: v.float() for k, v in a.state_dict().items()}, rounded, rtol=0, atol=0)


def test_a_single_file_is_read_beside_the_rest_of_a_pipeline(folder: Path, tmp_path: Path) -> None:
    unet = StableDiffusion.from_pretrained(folder).unet
    state = to_layout(unet.state_dict(), unet.config, "compvis", prefix=COMPVIS_PREFIX)
    state |= {"conditioner.embedders.0.transformer.weight": torch.ones(2, 2)}
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "a.safetensors")
    read = StableDiffusion.from_pretrained(folder, tmp_path / "a.safetensors").unet
    assert read.config == unet.config
    assert_close(read.state_dict(), unet.state_dict(), rtol=0, atol=0)


def test_a_full_size_checkpoint_is_told_by_its_shapes() -> None:
    preset = PRESETS["sdxl"]
    with torch.device("meta"):
        unet = DiffusionUNet(preset.config, preset.out_channels)
    state = to_layout(unet.state_dict(), preset.config, "compvis")
    assert config_from_compvis(state) == (preset.config, 4)


def test_a_lora_of_unet_and_both_text_encoders(folder: Path, tmp_path: Path) -> None:
    """As diffusers writes it, with the alphas in the file's metadata."""
    theirs = theirs_of(folder)
    if "unet_lora_adapter_metadata" not in inspect.signature(theirs.save_lora_weights).parameters:
        pytest.skip("this version of diffusers does not write the alphas")
    parts = {
        "unet": (theirs.unet, 4, ["to_q", "proj_in"]),
        "text_encoder": (theirs.text_encoder, 2, ["q_proj", "out_proj"]),
        "text_encoder_2": (theirs.text_encoder_2, 3, ["q_proj", "out_proj"]),
    }
    given: dict[str, Any] = {}
    torch.manual_seed(0)
    for name, (model, alpha, targets) in parts.items():
        lora = LoraConfig(r=2, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
        model.add_adapter(lora)
        state = get_peft_model_state_dict(model, adapter_name="default")
        given[f"{name}_lora_layers"] = {k: 0.3 * torch.randn_like(v) for k, v in state.items()}
        given[f"{name}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    theirs.save_lora_weights(tmp_path, **given)
    fresh = theirs_of(folder)
    fresh.load_lora_weights(tmp_path)
    wanted = made_by(fresh, negative_prompt=["dog"] * 2)
    model = StableDiffusion.from_pretrained(folder, loras=[str(tmp_path)])
    assert_close(finish(model.sample(settings(), SEEDS)), wanted, atol=1e-4, rtol=0)
    assert (wanted - made_by(theirs_of(folder), negative_prompt=["dog"] * 2)).abs().max() > 0.01


def test_parts_of_other_versions_are_one_sentence(folder: Path, tmp_path: Path) -> None:
    half = shutil.copytree(folder, tmp_path / "half")
    shutil.rmtree(half / "text_encoder_2")
    with pytest.raises(InputError, match="lacks text_encoder_2/"):
        StableDiffusion.from_pretrained(half)
    shutil.rmtree(half / "tokenizer_2")
    with pytest.raises(InputError, match="different versions of Stable Diffusion"):
        StableDiffusion.from_pretrained(half)
    refiner = shutil.copytree(folder, tmp_path / "refiner")
    shutil.rmtree(refiner / "text_encoder")
    with pytest.raises(InputError, match="lacks text_encoder/"):
        StableDiffusion.from_pretrained(refiner)
    first = StableDiffusion.from_pretrained(write_pipeline(tmp_path / "first"))
    with pytest.raises(InputError, match="for Stable Diffusion XL, and this is none"):
        first.sample(settings(crop="0x8"), SEEDS)
    for wrong in ({"original_size": "0x8"}, {"crop": "8"}):
        with pytest.raises(InputError, match="must be"):
            Recipe(prompt="a", model="xl", **wrong)
    assert find_start(str(folder)).config.vector_channels == 36  # read, though not trained


@pytest.mark.slow  # 5.1 GiB, and 190 billion multiply-adds
def test_a_step_of_the_full_network_in_bfloat16() -> None:
    preset = PRESETS["sdxl"]
    with torch.device("meta"):
        unet = DiffusionUNet(preset.config, preset.out_channels).to(torch.bfloat16).eval()
    unet.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.normal_(std=0.02)
        x, context = (torch.randn(shape).bfloat16() for shape in ((1, 4, 32, 32), (1, 77, 2048)))
        y = unet(x, torch.tensor([500]), context, vector=torch.randn(1, 2816).bfloat16())
    assert y.shape == x.shape
    assert y.isfinite().all()
