"""Stable Diffusion (arXiv 2112.10752): its weights in our U-Net, schedule, samplers and guidance.

The autoencoder is diffusers', the text model transformers'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.data.pixels import to_bytes
from diffusion.model import DiffusionUNet
from diffusion.pictures import Images
from diffusion.process.denoiser import Denoiser
from diffusion.process.editing import sdedit_timesteps
from diffusion.process.guidance import Guided
from diffusion.process.noise import NoiseSource
from diffusion.process.prediction import DenoiserLike
from diffusion.process.samplers import Step, sample
from diffusion.stable.clip import ClipText
from diffusion.stable.folder import (
    check_folder,
    is_xl,
    read_autoencoder,
    read_checkpoint,
    read_schedule,
    read_text_model,
    read_unet,
)
from diffusion.stable.lora import merge_loras
from diffusion.stable.recipe import LARGEST, PictureSettings
from diffusion.stable.schedule import PipelineSchedule
from unet.errors import InputError, RunError
from unet.files.writing import read_json
from unet.layers import sinusoids

STRENGTH = 0.8  # of image to image, where none is asked for
_LATENT_SIZE = 64  # of a U-Net whose config names none
_SIZES = 6  # numbers for a picture's size and crop, which XL gets


class StableDiffusion:
    """A text-to-image model: text -> context, noise -> latents, latents -> image.

    Args:
        unet: ours, of 4 input channels; of 9 it is a model for inpainting, which sees the mask and
            the masked image.
        autoencoder: diffusers' AutoencoderKL. It stays in float32, since half precision overflows
            in some of them.
        text_encoder, tokenizer: transformers' CLIPTextModel and CLIPTokenizer.
        schedule: noise and prediction.
        size: (height, width) in pixels that the model was trained for.
        second: of Stable Diffusion XL (arXiv 2307.01952), its other text model, a
            CLIPTextModelWithProjection, and tokenizer.
        zeros: of XL, no negative prompt is zeros, not the text models' empty text.

    Raises:
        InputError: parts that do not fit each other.
    """

    def __init__(
        self,
        unet: DiffusionUNet,
        autoencoder: Any,
        text_encoder: Any,
        tokenizer: Any,
        schedule: PipelineSchedule,
        size: tuple[int, int] | None = None,
        *,
        second: tuple[Any, Any] | None = None,
        zeros: bool = True,
    ) -> None:
        self.unet, self.autoencoder, self.schedule = unet, autoencoder, schedule
        self.text = ClipText(tokenizer, text_encoder)
        self.second = ClipText(second[1], second[0]) if second else None
        self.zeros = zeros
        config = autoencoder.config
        self.factor: int = 2 ** (len(config.block_out_channels) - 1)  # pixels a latent
        self.scale: float = config.scaling_factor
        self.size = size or (_LATENT_SIZE * self.factor, _LATENT_SIZE * self.factor)
        self.channels: int = config.latent_channels
        taken, made = unet.config.in_channels, unet.out_channels
        self.inpaints = taken == 2 * self.channels + 1
        if made != self.channels or not (self.inpaints or taken == self.channels):
            raise InputError(
                f"the U-Net takes {taken} channels and makes {made}, which does not fit the "
                f"autoencoder's latents of {self.channels}"
            )
        channels = self.text.channels + (self.second.channels if self.second else 0)
        if unet.config.context_channels != channels:
            raise InputError(
                f"the U-Net reads text of {unet.config.context_channels} channels, but the text "
                f"encoder makes {channels}: they are of different versions of Stable Diffusion"
            )
        vector = 0
        if self.second:
            pooled = self.second.model.config.projection_dim
            vector = pooled + _SIZES * unet.config.vector_waves
            if self.second.longest != self.text.longest:
                raise InputError(
                    f"one text encoder takes {self.text.longest} tokens and the other "
                    f"{self.second.longest}: take both from one pipeline"
                )
        if unet.config.vector_channels != vector:
            raise InputError(
                f"the U-Net takes a vector of {unet.config.vector_channels} numbers beside the "
                f"text, but the text encoders and the sizes make {vector}: they are of different "
                "versions of Stable Diffusion (the refiner of XL is not run)"
            )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        checkpoint: str | Path | None = None,
        *,
        loras: Sequence[str] = (),
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> StableDiffusion:
        """The model of a diffusers pipeline folder: unet/, vae/, text_encoder/, tokenizer/,
        scheduler/; of XL text_encoder_2/ and tokenizer_2/, too.

        Args:
            checkpoint: a single file (.safetensors or .ckpt) whose U-Net is used instead; the other
                parts are those of the folder, even if the file has them.
            loras: LoRA files, which are merged into the weights: see `merge_loras`.
            dtype: of the U-Net and the text encoders.

        Raises:
            InputError: a part that is missing, unreadable, or cannot be expressed.
        """
        folder = Path(path)
        check_folder(folder, with_unet=checkpoint is None)
        schedule = read_schedule(folder)
        unet = (
            read_checkpoint(Path(checkpoint), folder) if checkpoint else read_unet(folder / "unet")
        )
        text_encoder, tokenizer = read_text_model(folder)
        second = read_text_model(folder, second=True) if is_xl(folder) else None
        texts = {"text_encoder": text_encoder} | ({"text_encoder_2": second[0]} if second else {})
        merge_loras(loras, unet, texts)
        autoencoder = read_autoencoder(folder / "vae")
        factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
        return cls(
            unet.to(device, dtype),
            autoencoder.to(device),
            text_encoder.to(device, dtype),
            tokenizer,
            schedule,
            _trained_size(folder, factor),
            second=(second[0].to(device, dtype), second[1]) if second else None,
            zeros=_zeros(folder),
        )

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    # ------------------------------------------------------------------------------------------
    # Sampling

    @torch.no_grad()
    def sample(
        self,
        settings: PictureSettings,
        seeds: Sequence[int],
        *,
        image: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Iterator[Step]:
        """A run from noise to latents, for `decode`; from an image, if one is given.

        A picture depends on its own seed alone, and is that of diffusers' pipeline with
        `generator=[torch.Generator().manual_seed(seed) for seed in seeds]`.

        Args:
            seeds: one for each picture of the batch.
            image: (1, 3, H, W) in [-1, 1]: image to image (SDEdit, arXiv 2108.01073).
            mask: (1, 1, H, W), 0.5 or more where the image is to be made anew; the rest of its
                latents is put back after each step, with the noise of its level.

        Raises:
            InputError: before the first step: a size that the autoencoder cannot make, more steps
                than the schedule has, a strength of less than a step, a model that cannot do it.
        """
        self._check(settings, image, mask)
        size = self.pixels(settings)
        times, end = self.timesteps(settings, image=image is not None, mask=mask is not None)
        given, null = self._conditioning(settings, size)

        # The noise is drawn in the order of diffusers' pipelines.
        source = NoiseSource(seeds)
        anew = strength_of(settings, mask=mask is not None) == 1 and mask is not None
        known = None
        if image is not None and not (anew and self.inpaints):
            known = self.encode(image, source)
        noise = source.draw((self.channels, *(n // self.factor for n in size))).to(self.device)
        if known is None or anew:
            x = self.schedule.start_scale(settings.sampler, times[0]) * noise
        else:
            x = self.schedule.noise.q_sample(known, times[0], noise)
        hint, put_back = None, None
        if image is not None and mask is not None:
            small = F.interpolate((mask >= 0.5).float(), x.shape[2:]).to(self.device)
            if self.inpaints:
                hidden = self.encode(image * (mask < 0.5), source)
                hint = torch.cat([small.expand(len(hidden), -1, -1, -1), hidden], dim=1)
            else:
                put_back = self._put_back(known, small, noise, end)
        return sample(
            self._denoiser(settings.guidance, null, hint),
            x,
            times,
            settings.sampler,
            conditioning=given,
            end=end,
            constrain=put_back,
        )

    def timesteps(
        self, settings: PictureSettings, *, image: bool = False, mask: bool = False
    ) -> tuple[list[float], float]:
        """The timesteps of a run, from noise or from an image, and the level where it ends."""
        times, end = self.schedule.timesteps(settings.sampler, settings.steps)
        if image:
            times = list(sdedit_timesteps(times, strength_of(settings, mask=mask)))
        if times[-1] == end:  # a step that would change nothing
            times = times[:-1]
        if not times:
            raise InputError(f"{settings.steps} steps are too few for this model: choose more")
        return times, end

    def pixels(self, settings: PictureSettings) -> tuple[int, int]:
        """(height, width) of the pictures.

        Raises:
            InputError: they are not multiples of the autoencoder's factor.
        """
        height, width = settings.pixels or self.size
        if height % self.factor or width % self.factor:
            near = "x".join(
                str(max(1, round(n / self.factor)) * self.factor) for n in (width, height)
            )
            raise InputError(
                f"size {width}x{height} must be of multiples of {self.factor}, which is what the "
                f"autoencoder makes: choose {near}"
            )
        return height, width

    def _check(self, settings: PictureSettings, image: Tensor | None, mask: Tensor | None) -> None:
        size = self.pixels(settings)
        if image is not None and image.shape != (1, 3, *size):
            raise InputError(f"the image is {tuple(image.shape)}, but must be {(1, 3, *size)}")
        if not self.second and (settings.original_size or settings.crop):
            raise InputError(
                "original-size and crop are for Stable Diffusion XL, and this is none: leave them "
                "out"
            )
        if mask is not None and (image is None or mask.shape != (1, 1, *size)):
            raise InputError(f"a mask must be {(1, 1, *size)}, and come with an image")
        if self.inpaints and mask is None:
            raise InputError(
                "this model is for inpainting alone, as its U-Net sees a mask: give --inpaint and "
                "--mask, or another model"
            )

    def _denoiser(
        self, guidance: float, null: dict[str, Tensor], hint: Tensor | None
    ) -> DenoiserLike:
        dtype = next(self.unet.parameters()).dtype

        def predict(x: Tensor, t: Tensor, **given: Tensor) -> Tensor:
            if hint is not None:  # x holds the batch once, or twice for guidance
                x = torch.cat([x, hint.repeat(len(x) // len(hint), 1, 1, 1)], dim=1)
            return self.unet(x.to(dtype), t, **{k: v.to(dtype) for k, v in given.items()})

        denoiser = Denoiser(predict, self.schedule.noise, self.schedule.prediction)
        return Guided(denoiser, guidance, null)

    def _put_back(
        self, known: Tensor | None, mask: Tensor, noise: Tensor, end: float
    ) -> Callable[[Tensor, float], Tensor]:
        assert known is not None  # the image was encoded, as the U-Net does not see it

        def put_back(x: Tensor, t: float) -> Tensor:
            noisy = known if t == end else self.schedule.noise.q_sample(known, t, noise)
            return torch.where(mask > 0, x, noisy)

        return put_back

    # ------------------------------------------------------------------------------------------
    # Text and images

    def _conditioning(
        self, settings: PictureSettings, size: tuple[int, int]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the U-Net is given for the prompt and for the negative prompt, in rows of one."""
        prompts = [settings.prompt, settings.negative]
        if self.second is None:
            context = self.text.encode(prompts).context
            return {"context": context[:1]}, {"context": context[1:]}
        (first, _), (second, pooled) = (t.encode_below(prompts) for t in (self.text, self.second))
        assert pooled is not None
        context = torch.cat([first, second], dim=2)
        if self.zeros and not settings.negative:
            context[1], pooled[1] = 0, 0
        height, width, top, left = settings.cut_from
        numbers = torch.tensor([height or size[0], width or size[1], top, left, *size])
        config = self.unet.config
        waves = sinusoids(
            numbers,
            config.vector_waves,
            cos_first=config.time_cos_first,
            freq_shift=config.time_freq_shift,
        )
        sizes = waves.flatten().to(pooled).expand(2, -1)
        vector = torch.cat([pooled, sizes], dim=1)
        return (
            {"context": context[:1], "vector": vector[:1]},
            {"context": context[1:], "vector": vector[1:]},
        )

    def cut_prompts(self, settings: PictureSettings) -> dict[str, str]:
        """What of "prompt" and "negative" is cut off, since the text model takes no more."""
        texts = {"prompt": settings.prompt, "negative": settings.negative}
        return {name: cut for name, text in texts.items() if (cut := self.text.cut(text))}

    @torch.no_grad()
    def encode(self, images: Tensor, source: NoiseSource) -> Tensor:
        """Latents (B, C, H / 8, W / 8) of images (B or 1, 3, H, W) in [-1, 1], drawn from the
        autoencoder's posterior with noise from the source."""
        posterior = self.autoencoder.encode(images.to(self.device)).latent_dist
        noise = source.draw(posterior.mean.shape[1:]).to(self.device)
        return self.scale * (posterior.mean + posterior.std * noise)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Images:
        """Images uint8 (B, H, W, 3) of latents (B, C, H / 8, W / 8), one at a time.

        Raises:
            RunError: latents that are not finite, which half precision can lead to.
        """
        if not latents.isfinite().all():
            raise RunError("the U-Net made numbers that are not finite: use --precision fp32")
        parts = (latents.float() / self.scale).split(1)
        return np.concatenate([to_bytes(self.autoencoder.decode(part).sample) for part in parts])

    def save_memory(self) -> None:
        """Decodes large images in tiles that overlap; their seams are blended."""
        self.autoencoder.enable_tiling()


def strength_of(settings: PictureSettings, *, mask: bool) -> float:
    """The share of a run from an image that is taken."""
    return settings.strength or (1.0 if mask else STRENGTH)


def _zeros(folder: Path) -> bool:
    """Whether no negative prompt is zeros, as the index of a pipeline of XL says."""
    file = folder / "model_index.json"
    found = read_json(file).get("force_zeros_for_empty_prompt", True) if file.is_file() else True
    return bool(found)


def _trained_size(folder: Path, factor: int) -> tuple[int, int] | None:
    """(height, width) in pixels, by `sample_size` of the U-Net's config, where there is one."""
    file = folder / "unet" / "config.json"
    side = read_json(file).get("sample_size") if file.is_file() else None
    height, width = side if isinstance(side, list) and len(side) == 2 else (side, side)
    if type(height) is not int or type(width) is not int or min(height, width) < 1:
        return None
    if max(height, width) * factor > LARGEST:
        raise InputError(
            f"{file} has sample_size {side!r:.200}, {factor} pixels each, more than {LARGEST}"
        )
    return height * factor, width * factor
