"""LoRA: what is trained, written, read and merged, with peft and diffusers as the oracles."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from diffusion.model import DiffusionUNet
from diffusion.stable.folder import read_unet
from diffusion.stable.lora import LoraLayer, add_lora, lora_state, merge_loras
from diffusion.stable.pipeline import StableDiffusion
from diffusion.stable.recipe import PictureSettings
from tests.diffusion.stable.tiny_pipeline import tiny_unet, write_pipeline
from unet.errors import InputError
from unet.layers import Linear
from unet.presets import PRESETS
from unet.training.ema import EMA
from unet.weights.layouts import module_names

X, T, C = torch.randn(2, 4, 8, 8), torch.tensor([7, 800]), torch.randn(2, 5, 16)
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("lora") / "pipeline")


def adapted(unet: DiffusionUNet, rank: int = 3, seed: int = 0) -> DiffusionUNet:
    """A copy with LoRA layers, at random in both of their matrices."""
    model = copy.deepcopy(unet)
    add_lora(model, rank)
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for part in (layer.down, layer.up):
                weight = part.get_parameter("weight")
                weight.data.normal_(std=0.3, generator=generator)
    return model


def written(model: DiffusionUNet, file: Path) -> Path:
    save_file(lora_state(model), file, metadata={"format": "pt"})
    return file


def test_layers_and_gradients_are_those_of_peft(pipeline: Path) -> None:
    unet = read_unet(pipeline / "unet")
    model = adapted(unet)
    theirs: Any = tiny_unet()
    config = LoraConfig(r=3, lora_alpha=3, target_modules=TARGETS, init_lora_weights=False)
    inject_adapter_in_model(config, theirs)
    wanted = {k: v for k, v in theirs.named_parameters() if ".lora_" in k}
    mine = {
        key.removeprefix("unet.").replace(".weight", ".default.weight"): value
        for key, value in lora_state(model).items()
    }
    assert mine.keys() == wanted.keys()
    for key, value in mine.items():
        wanted[key].data.copy_(value)
    y, y_theirs = model(X, T, C), theirs(X, T, C).sample
    assert_close(y, y_theirs, atol=1e-4, rtol=0)
    y.square().sum().backward()
    y_theirs.square().sum().backward()
    names = module_names(unet.config, "diffusers")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in model.named_parameters() if p.grad is not None}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            for part, own in (("A", layer.down), ("B", layer.up)):
                key = f"{names[name]}.lora_{part}.default.weight"
                grad = own.get_parameter("weight").grad
                assert_close(grad, wanted[key].grad, atol=1e-3, rtol=1e-3)


def test_a_model_with_fresh_layers_is_the_model(pipeline: Path) -> None:
    unet = read_unet(pipeline / "unet")
    model = copy.deepcopy(unet)
    add_lora(model, 2)
    assert_close(model(X, T, C), unet(X, T, C))
    average = EMA(model, 0.5).model
    shared = {id(p) for p in model.parameters() if not p.requires_grad}
    assert {id(p) for p in average.parameters()} & {id(p) for p in model.parameters()} == shared


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_diffusers_loads_what_is_written_and_makes_the_same(pipeline: Path, tmp_path: Path) -> None:
    first, second = (
        written(adapted(read_unet(pipeline / "unet"), rank, seed), tmp_path / f"{seed}.safetensors")
        for rank, seed in ((3, 1), (2, 2))
    )
    theirs: Any = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    for name, file in (("a", first), ("b", second)):
        theirs.load_lora_weights(tmp_path, weight_name=file.name, adapter_name=name)
    theirs.set_adapters(["a", "b"], [1.0, 0.5])
    wanted = theirs(
        prompt="cat",
        negative_prompt="dog",
        num_inference_steps=3,
        generator=[torch.Generator().manual_seed(3)],
        output_type="latent",
    ).images
    settings = PictureSettings(prompt="cat", negative="dog", steps=3, sampler="ddim")
    loras = (str(first), f"{second}:0.5")
    model = StableDiffusion.from_pretrained(pipeline, loras=loras)
    *_, last = model.sample(settings, [3])
    assert_close(last.x, wanted, atol=1e-4, rtol=0)
    *_, plain = StableDiffusion.from_pretrained(pipeline).sample(settings, [3])
    assert (plain.x - last.x).abs().max() > 0.01


def test_a_network_without_transformers_is_changed_in_all_its_layers(tmp_path: Path) -> None:
    """Such as ours, which works on patches and has no names in diffusers."""
    given = {"in_channels": 4, "channels": 8, "head_channels": None, "zero_init": False}
    unet = DiffusionUNet(replace(PRESETS["diffusion"].config, **given), 4).eval()
    model = adapted(unet, rank=2)
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    assert {type(m.base) for m in layers} >= {torch.nn.Conv2d, Linear}
    wanted = model(X, T)
    assert (wanted - unet(X, T)).abs().max() > 0.01
    merge_loras([str(written(model, tmp_path / "a.safetensors"))], unet)
    assert_close(unet(X, T), wanted, atol=1e-3, rtol=1e-3)


def kohya(state: dict[str, Tensor], table: dict[str, str], alpha: float) -> dict[str, Tensor]:
    """The file in kohya's names, with another scale in its alpha and its matrices."""
    found = {}
    for key, value in state.items():
        layer, _, part = key.removeprefix("unet.").removesuffix(".weight").rpartition(".")
        name = f"lora_unet_{table[layer].replace('.', '_')}"
        down = part == "lora_A"
        found[f"{name}.lora_{'down' if down else 'up'}.weight"] = value
        if down:
            found[f"{name}.alpha"] = torch.tensor(alpha)
    return found


@pytest.mark.parametrize("layout", ["diffusers", "compvis"])
def test_kohyas_names_and_alphas_are_read(pipeline: Path, tmp_path: Path, layout: Any) -> None:
    unet = read_unet(pipeline / "unet")
    model = adapted(unet, rank=4)
    state = lora_state(model)
    theirs, names = (module_names(unet.config, n) for n in ("diffusers", layout))
    file = tmp_path / "a.safetensors"
    save_file(kohya(state, {theirs[ours]: names[ours] for ours in names}, alpha=2.0), file)
    merge_loras([f"{file}:2"], unet)  # alpha / rank is a half
    assert_close(unet(X, T, C), model(X, T, C), atol=1e-4, rtol=1e-4)


def test_convolutions_text_encoders_and_older_names_are_read(
    pipeline: Path, tmp_path: Path
) -> None:
    file, g = tmp_path / "a.safetensors", torch.Generator().manual_seed(0)
    text = "encoder_layers_1_self_attn_q_proj"
    shapes = {
        "lora_unet_mid_block_resnets_0_conv1.lora_down.weight": (2, 128, 3, 3),
        "lora_unet_mid_block_resnets_0_conv1.lora_up.weight": (128, 2, 1, 1),
        f"lora_te_text_model_{text}.lora_down.weight": (2, 16),
        f"lora_te_text_model_{text}.lora_up.weight": (16, 2),
        "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora.down.weight": (
            *(2, 128),
        ),
        "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora.up.weight": (
            *(128, 2),
        ),
    }
    state = {key: torch.randn(shape, generator=g) for key, shape in shapes.items()}
    save_file(state, file)
    before, after = (
        StableDiffusion.from_pretrained(pipeline, loras=given) for given in ((), (str(file),))
    )
    pairs = ((before.unet, after.unet), (before.text.model, after.text.model))
    changed = {
        name: after.state_dict()[name] - value
        for before, after in pairs
        for name, value in before.state_dict().items()
        if not torch.equal(value, after.state_dict()[name])
    }
    assert len(changed) == 3
    down, up = (state[key] for key in list(shapes)[:2])
    conv = changed["trunk.middle.block1.conv1.weight"]
    assert_close(conv, torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down), atol=1e-4, rtol=1e-4)
    assert any(name.endswith("layers.1.self_attn.q_proj.weight") for name in changed)


OTHER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({f"{OTHER}.lora_A.weight": (2, 64), f"{OTHER}.lora_B.weight": (64, 2)}, "the layer is"),
        ({f"{OTHER}s.lora_A.weight": (2, 64), f"{OTHER}s.lora_B.weight": (64, 2)}, "to_qs"),
        ({f"{OTHER}.lora_A.weight": (2, 128), f"{OTHER}.lora_B.weight": (128, 3)}, "the layer is"),
        ({f"{OTHER}.lora_A.weight": (2, 128)}, "lacks the up matrix of unet.mid_block"),
        ({f"{OTHER}.lora_magnitude_vector": (128,)}, "magnitude_vector' in it shows"),
        ({"lora_unet_mid_block.hada_w1_a": (2, 2)}, "is no LoRA that is read here"),
        ({"lora_te2_x.lora_up.weight": (2, 2), "lora_te2_x.lora_down.weight": (2, 2)}, "lora_te2"),
        ({}, "is empty"),
    ],
)
def test_a_lora_that_does_not_fit_changes_nothing(
    pipeline: Path, tmp_path: Path, content: dict[str, tuple[int, ...]], told: str
) -> None:
    unet = read_unet(pipeline / "unet")
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    good = lora_state(adapted(unet)) if "the layer" in told else {}
    save_file(
        good | {k: torch.ones(shape) for k, shape in content.items()}, tmp_path / "a.safetensors"
    )
    with pytest.raises(InputError, match=told):
        merge_loras([str(tmp_path / "a.safetensors")], unet)
    assert_close(unet.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("given", "told"),
    [("gone.safetensors", "there is no LoRA"), ("a.pt:0.5", "a.pt"), ("a:nan", "must be a number")],
)
def test_what_is_no_lora_file_is_one_sentence(tmp_path: Path, given: str, told: str) -> None:
    (tmp_path / "a.pt").write_bytes(b"x")
    with pytest.raises(InputError, match=told):
        merge_loras([str(tmp_path / given)], DiffusionUNet(PRESETS["diffusion"].config, 3))
