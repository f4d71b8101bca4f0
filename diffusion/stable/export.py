"""A trained model as a pipeline folder of diffusers, which `unet-txt2img` reads as well."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from diffusion.model import DiffusionUNet
from diffusion.process.schedule import NoiseSchedule
from diffusion.stable.autoencoder import Autoencoder
from diffusion.stable.folder import STEM, read_unet_config
from diffusion.stable.pipeline import StableDiffusion
from diffusion.stable.schedule import KINDS, PREDICTIONS, PipelineSchedule
from unet.errors import InputError
from unet.files.writing import write_text
from unet.weights.convert import to_layout
from unet.weights.diffusers_config import config_to_diffusers

_KINDS = {ours: theirs for theirs, ours in KINDS.items()}
_PREDICTIONS = {ours: theirs for theirs, ours in PREDICTIONS.items()}
_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def obstacle(model: DiffusionUNet, autoencoder: Autoencoder | None) -> str | None:
    """Why a model cannot be written as a pipeline of diffusers; None: it can."""
    if autoencoder is None:
        return "it works on pixels"
    if "text_encoder" not in model.info:
        return "no CLIP reads its text"
    if autoencoder.shift:
        return "Stable Diffusion's pipeline has no shift_factor"
    if model.out_channels != model.image_channels:
        return "it learns the variance"
    try:
        scheduler_config(model)
        unet_config(model, autoencoder)
    except InputError as error:
        return str(error)
    return None


def unet_config(model: DiffusionUNet, autoencoder: Autoencoder) -> dict[str, Any]:
    """The `config.json` of the U-Net.

    Raises:
        InputError: what UNet2DConditionModel cannot express.
    """
    values = config_to_diffusers(model.config, model.out_channels)
    size = list(autoencoder.size(*model.info["size"]))
    return values | {"sample_size": size[0] if size[0] == size[1] else size}


def scheduler_config(model: DiffusionUNet) -> dict[str, Any]:
    """The `scheduler_config.json` of the model's noise schedule and prediction.

    Steps are spread as `unet-sample-ddpm` does it: the first one is at pure noise, the last one
    ends at the clean image.

    Raises:
        InputError: diffusers has no such schedule.
    """
    schedule = NoiseSchedule.from_dict(model.info["schedule"])
    if schedule.kind not in _KINDS:
        raise InputError(f"diffusers' DDIMScheduler has no noise schedule {schedule.kind!r}")
    if model.info["prediction"] not in _PREDICTIONS:
        raise InputError(f"diffusers' DDIMScheduler knows no {model.info['prediction']}-prediction")
    scale = 1000 / schedule.steps  # our betas are those of T = 1000, diffusers' those of its own T
    values = {
        "_class_name": "DDIMScheduler",
        "beta_end": schedule.beta_end * scale,
        "beta_schedule": _KINDS[schedule.kind],
        "beta_start": schedule.beta_start * scale,
        "clip_sample": False,
        "num_train_timesteps": schedule.steps,
        "prediction_type": _PREDICTIONS[model.info["prediction"]],
        "rescale_betas_zero_snr": schedule.zero_snr,
        "set_alpha_to_one": True,
        "steps_offset": 1,  # which diffusers asks of every pipeline; trailing steps have none
        "timestep_spacing": "trailing",
    }
    PipelineSchedule.from_dict(values)  # as txt2img will read it
    return values


def write_pipeline(
    folder: Path, model: DiffusionUNet, autoencoder: Autoencoder, text: Path
) -> None:
    """Writes the folder whole, in place of an earlier one.

    Args:
        text: pipeline folder with `text_encoder/` and `tokenizer/`, which are copied.

    Raises:
        InputError: see `obstacle`.
    """
    with _anew(folder) as new:
        _write_json(new / "unet" / "config.json", unet_config(model, autoencoder))
        _write_unet(new / "unet", model)
        _write_json(new / "scheduler" / "scheduler_config.json", scheduler_config(model))
        shutil.copytree(autoencoder.folder, new / "vae")
        for name in ("text_encoder", "tokenizer"):
            shutil.copytree(text / name, new / name)
        _write_json(new / "model_index.json", _INDEX)


def write_merged(folder: Path, source: Path, checkpoint: str | None, loras: Sequence[str]) -> None:
    """Writes a pipeline with LoRA files merged into its weights, in float32, in place of an
    earlier one.

    Args:
        source, checkpoint, loras: see `StableDiffusion.from_pretrained`.
    """
    model = StableDiffusion.from_pretrained(source, checkpoint, loras=loras)
    texts = {"text_encoder": model.text, "text_encoder_2": model.second}

    def left_out(where: str, names: list[str]) -> list[str]:
        parts = Path(where).name in ("unet", *texts)
        return [n for n in names if parts and n.endswith((".safetensors", ".bin", ".index.json"))]

    with _anew(folder) as new:
        shutil.copytree(source, new, ignore=left_out)
        file = new / "unet" / "config.json"
        if not file.is_file() or read_unet_config(file.parent)[0] != model.unet.config:
            values = config_to_diffusers(model.unet.config, model.unet.out_channels)
            _write_json(file, values | {"sample_size": [n // model.factor for n in model.size]})
        _write_unet(new / "unet", model.unet)
        for name, text in texts.items():
            if text is not None:
                text.model.save_pretrained(new / name)


@contextmanager
def _anew(folder: Path) -> Iterator[Path]:
    """A folder to be written, which takes the place of an earlier one once it is whole."""
    new = folder.with_name(f".{folder.name}.tmp")
    if new.exists():  # of a kill
        shutil.rmtree(new)
    yield new
    if folder.exists():
        shutil.rmtree(folder)
    new.rename(folder)


def _write_unet(folder: Path, model: DiffusionUNet) -> None:
    state = {k: v.detach().cpu() for k, v in model.state_dict().items()}
    state = {k: v.contiguous() for k, v in to_layout(state, model.config, "diffusers").items()}
    save_file(state, folder / f"{STEM}.safetensors", metadata={"format": "pt"})


def _write_json(file: Path, values: dict[str, Any]) -> None:
    write_text(file, json.dumps(values, indent=2) + "\n")
