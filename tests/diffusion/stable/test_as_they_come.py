"""Checkpoints and pipelines as people share them: read, or refused by the name of what they are."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import CLIPTextModel

from diffusion.initial import find_start
from diffusion.model import DiffusionUNet
from diffusion.stable.clip import ClipText
from diffusion.stable.folder import config_from_compvis, read_checkpoint, read_unet
from diffusion.stable.pipeline import StableDiffusion
from diffusion.stable.schedule import _SCHEDULERS, PipelineSchedule
from tests.diffusion.stable.tiny_pipeline import write_pipeline
from unet.errors import InputError
from unet.weights.convert import to_layout
from unet.weights.layouts import COMPVIS_PREFIX

WEIGHTS = "diffusion_pytorch_model"
PARTS: dict[str, Any] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
}
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("pipelines") / "whole")


@pytest.fixture(scope="module")
def unet(whole: Path) -> DiffusionUNet:
    return read_unet(whole / "unet")


@pytest.fixture
def pipeline(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "pipeline")


def behind(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": value.contiguous() for key, value in state.items()}


# -- single files ---------------------------------------------------------------------------------

WRAPPINGS: dict[str, Callable[[State], dict[str, Any]]] = {
    **{
        f"{prefix}.safetensors": lambda state, prefix=prefix: behind(prefix, state)
        for prefix in ("module.", "model.", "_orig_mod.", "unet.", f"module.{COMPVIS_PREFIX}")
    },
    **{
        f"{name}.pt": lambda state, name=name: {name: behind(COMPVIS_PREFIX, state), "epoch": 1}
        for name in ("state_dict", "model_state_dict", "ema", "params_ema")
    },
    "lightning.ckpt": lambda state: {
        "state_dict": behind("model.", state) | {"loss.weight": torch.ones(1)},
        "hyper_parameters": argparse.Namespace(root=Path("data"), lr=1e-4),
        "optimizer_states": [{"state": {0: {"step": torch.ones(1)}}}],
        "epoch": 4,
    },
}


@pytest.mark.parametrize("layout", ["compvis", "diffusers"])
@pytest.mark.parametrize("name", WRAPPINGS)
def test_the_unet_is_found_in_a_checkpoint(
    whole: Path, unet: DiffusionUNet, tmp_path: Path, name: str, layout: Any
) -> None:
    content = WRAPPINGS[name](to_layout(unet.state_dict(), unet.config, layout))
    file = tmp_path / name
    save_file(content, file) if file.suffix == ".safetensors" else torch.save(content, file)
    assert_close(read_checkpoint(file, whole).state_dict(), unet.state_dict(), rtol=0, atol=0)


def test_what_lightning_saves_beside_the_weights_is_not_made(
    whole: Path, unet: DiffusionUNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the first files of Stable Diffusion: a class as a key, settings in a class."""
    lightning = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    settings = types.ModuleType("pytorch_lightning.utilities.parsing")

    class ModelCheckpoint:
        def __init__(self) -> None:
            self.best = 1

    class AttributeDict(dict[str, Any]):
        pass

    for module, kind in ((lightning, ModelCheckpoint), (settings, AttributeDict)):
        kind.__module__, kind.__qualname__ = module.__name__, kind.__name__
        setattr(module, kind.__name__, kind)
        names = module.__name__.split(".")
        for n in range(1, 1 + len(names)):
            monkeypatch.setitem(sys.modules, ".".join(names[:n]), module)
    content = {
        "state_dict": behind(COMPVIS_PREFIX, to_layout(unet.state_dict(), unet.config, "compvis")),
        "callbacks": {ModelCheckpoint: {"best": torch.ones(())}, "kept": ModelCheckpoint()},
        "hyper_parameters": AttributeDict(lr=1),
    }
    torch.save(content, tmp_path / "a.ckpt")
    monkeypatch.delattr(lightning, "ModelCheckpoint")  # nobody asks for them
    monkeypatch.delattr(settings, "AttributeDict")
    read = read_checkpoint(tmp_path / "a.ckpt", whole)
    assert_close(read.state_dict(), unet.state_dict(), rtol=0, atol=0)


class Callback:
    """What is in some checkpoints, too."""


def test_other_code_is_named(whole: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "callbacks": Callback()}, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=r"code in it \(.*test_as_they_come\.Callback\)"):
        read_checkpoint(tmp_path / "a.ckpt", whole)


# -- variants and shards --------------------------------------------------------------------------


def as_variant(pipeline: Path, variant: str | None, shards: int, dtype: torch.dtype) -> None:
    """Writes the weights of all parts anew, by the libraries that define them."""
    for part, kind in PARTS.items():
        model = kind.from_pretrained(pipeline / part).to(dtype)
        for file in (pipeline / part).glob("*.safetensors"):
            file.unlink()
        size = sum(p.nbytes for p in model.parameters())
        model.save_pretrained(pipeline / part, max_shard_size=2 * size // shards, variant=variant)
        assert len(list((pipeline / part).glob("*.index*.json"))) == (shards > 1)


@pytest.mark.parametrize("variant", [None, "fp16", "bf16", "mine"])
@pytest.mark.parametrize("shards", [1, 5])
def test_variants_and_shards_of_a_pipeline_are_read(
    whole: Path, pipeline: Path, variant: str | None, shards: int
) -> None:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(str(variant), torch.float32)
    as_variant(pipeline, variant, shards, dtype)
    read, wanted = (StableDiffusion.from_pretrained(path) for path in (pipeline, whole))
    read_text = ClipText.from_pretrained(pipeline).model
    pairs = (
        (read.unet, wanted.unet),
        (read.autoencoder, wanted.autoencoder),
        (read.text.model, wanted.text.model),
        (read_text, wanted.text.model),
    )
    assert all(p.dtype == torch.float32 for p in read_text.parameters())
    for found, model in pairs:
        rounded = {k: v.to(dtype).float() for k, v in model.state_dict().items()}
        assert_close({k: v.float() for k, v in found.state_dict().items()}, rounded, rtol=0, atol=0)
    start = find_start(str(pipeline)).read()
    assert all(torch.equal(start[k], v.float()) for k, v in read.unet.state_dict().items())


def test_full_precision_comes_before_variants_and_fp16_before_others(
    whole: Path, unet: DiffusionUNet, tmp_path: Path
) -> None:
    folder = shutil.copytree(whole / "unet", tmp_path / "unet")
    plain = folder / f"{WEIGHTS}.safetensors"
    state = to_layout(unet.state_dict(), unet.config, "diffusers")
    for n, variant in enumerate((".fp16", ".bf16", ".non_ema"), start=1):
        other = {key: (value + n).contiguous() for key, value in state.items()}
        save_file(other, folder / f"{WEIGHTS}{variant}.safetensors")
    names = ("", ".fp16", ".bf16", ".non_ema")
    for n, name in enumerate(names):
        found = read_unet(folder).state_dict()["head.conv.bias"]
        assert torch.equal(found, unet.state_dict()["head.conv.bias"] + n)
        plain.with_name(f"{WEIGHTS}{name}.safetensors").unlink()
    with pytest.raises(InputError, match="lacks its weights"):
        read_unet(folder)


def test_the_index_of_shards_is_a_checkpoint_and_a_shard_alone_is_none(
    whole: Path, unet: DiffusionUNet, pipeline: Path
) -> None:
    as_variant(pipeline, None, 5, torch.float32)
    index = pipeline / f"unet/{WEIGHTS}.safetensors.index.json"
    assert_close(read_checkpoint(index, whole).state_dict(), unet.state_dict(), rtol=0, atol=0)
    shard = min((pipeline / "unet").glob("*-00001-of-*"))
    with pytest.raises(InputError, match=r"is one of several shards: give their index"):
        read_checkpoint(shard, whole)
    shard.unlink()
    with pytest.raises(InputError, match=r"names .*-00001-of-.*, which is missing"):
        StableDiffusion.from_pretrained(pipeline)


@pytest.mark.parametrize(
    ("index", "told"),
    [
        ({}, "lacks a 'weight_map'"),
        ({"weight_map": []}, "lacks a 'weight_map'"),
        ({"weight_map": {"a": f"../unet/{WEIGHTS}.safetensors"}}, "no file of its folder"),
        ({"weight_map": {"a": ["x"]}}, "no file of its folder"),
        ({"weight_map": {"a": f"{WEIGHTS}.safetensors.index.json"}}, "holds no weights"),
    ],
)
@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_a_bad_index_is_one_sentence(pipeline: Path, index: Any, variant: str, told: str) -> None:
    (pipeline / f"unet/{WEIGHTS}.safetensors").unlink()
    file = pipeline / f"unet/{WEIGHTS}.safetensors.index{variant}.json"
    file.write_text(json.dumps(index))
    with pytest.raises(InputError, match=told):
        StableDiffusion.from_pretrained(pipeline)


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_the_index_of_a_variant_leads_to_no_other_folder(pipeline: Path, part: str) -> None:
    stem = "model" if part == "text_encoder" else WEIGHTS
    index = pipeline / part / f"{stem}.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(InputError, match="no file of its folder"):
        StableDiffusion.from_pretrained(pipeline)


# -- schedulers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", _SCHEDULERS)
@pytest.mark.parametrize("given", [{}, {"beta_schedule": "scaled_linear", "beta_end": 0.012}])
def test_the_noise_of_each_known_scheduler_is_ours(name: str, given: Any) -> None:
    try:
        theirs = getattr(diffusers, name)(**given)
    except ImportError as error:  # of the package of a solver
        pytest.skip(str(error).strip())
    schedule = PipelineSchedule.from_dict({"_class_name": name, **given}).noise
    signal, _ = schedule.rates(torch.arange(1000), torch.zeros(1000, 1, dtype=torch.float64))
    assert_close(signal.flatten().float() ** 2, theirs.alphas_cumprod, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        *(
            ({"_class_name": name, "beta_schedule": "scaled_linear"}, f"scheduler '{name}' cannot")
            for name in (
                "FlowMatchEulerDiscreteScheduler",
                "LCMScheduler",
                "TCDScheduler",
                "EDMEulerScheduler",
                "CMStochasticIterativeScheduler",
                "MyScheduler",
            )
        ),
        ({"_class_name": ["DDIMScheduler"]}, "scheduler"),
        ({}, "scheduler None cannot be used"),
        *(
            ({"_class_name": "DPMSolverMultistepScheduler", name: True}, f"{name} of the scheduler")
            for name in ("use_flow_sigmas", "use_beta_sigmas", "use_exponential_sigmas")
        ),
        (
            {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
            "timestep_type='continuous'",
        ),
    ],
)
def test_a_scheduler_that_is_not_ours_is_refused_by_name(
    pipeline: Path, values: dict[str, Any], told: str
) -> None:
    file = pipeline / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(values))
    with pytest.raises(InputError, match=rf"scheduler_config\.json: .*{told}"):
        StableDiffusion.from_pretrained(pipeline)


# -- other kinds ----------------------------------------------------------------------------------

LORAS: dict[str, tuple[str, ...]] = {
    "kohya": ("lora_unet_mid_block_proj_in.alpha", "lora_unet_mid_block_proj_in.lora_up.weight"),
    "diffusers": ("unet.down_blocks.0.to_q.lora_A.weight", "unet.down_blocks.0.to_q.lora_B.weight"),
    "older": ("down_blocks.0.attn1.processor.to_q_lora.down.weight",),
    "unloaded": ("down_blocks.0.attn1.to_q.lora.up.weight",),
    "LyCORIS": ("lycoris_mid_block_proj_in.hada_w1_a",),
}


@pytest.mark.parametrize("name", LORAS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_lora_is_told_as_one(whole: Path, tmp_path: Path, name: str, suffix: str) -> None:
    content, file = {key: torch.ones(2, 2) for key in LORAS[name]}, tmp_path / f"a{suffix}"
    if suffix == ".safetensors":
        save_file(content, file)
    else:
        torch.save({"state_dict": content}, file)
    with pytest.raises(InputError, match=rf"{suffix} is a LoRA, .*as '.*' in it shows: give the"):
        read_checkpoint(file, whole)


def test_a_lora_that_was_never_taken_out_of_the_network_is_told(
    whole: Path, unet: DiffusionUNet, tmp_path: Path
) -> None:
    state = to_layout(unet.state_dict(), unet.config, "diffusers")
    lora = {"mid_block.attentions.0.proj_in.lora_A.default.weight": torch.ones(2, 2)}
    save_file(behind("", state | lora), tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="is a LoRA"):
        read_checkpoint(tmp_path / "a.safetensors", whole)


@pytest.mark.parametrize("read", [StableDiffusion.from_pretrained, lambda p: find_start(str(p))])
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("pytorch_lora_weights.safetensors", "is a LoRA"),
        ("adapter_config.json", "is a LoRA"),
        ("transformer/config.json", "is of a diffusion transformer"),
    ],
)
def test_a_folder_of_another_kind_is_told(tmp_path: Path, read: Any, name: str, told: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}")
    with pytest.raises(InputError, match=told):
        read(tmp_path)


def test_another_vector_beside_the_timestep_is_a_vector(unet: DiffusionUNet) -> None:
    """unCLIP's, which no pipeline that is run here gives."""
    state = to_layout(unet.state_dict(), unet.config, "compvis")
    state["label_emb.0.0.weight"] = torch.ones(4, 2048)
    assert config_from_compvis(state)[0] == replace(unet.config, vector_channels=2048)
