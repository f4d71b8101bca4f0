"""The options of training and of sampling on the command line. Does not import torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unet.errors import InputError
from unet.training.options import FitOptions, MaskOptions, OptimizerName, Precision

Colour = Literal["grey", "rgb", "rgba"]
CHANNELS = {"grey": 1, "rgb": 3, "rgba": 4}


@dataclass(frozen=True, kw_only=True)
class DiffusionOptions(MaskOptions, FitOptions):
    """Train a diffusion model: a U-Net that predicts the noise in an image."""

    out: Path = Path("runs/ddpm")
    """Run folder to make: config.yaml, metrics.jsonl, samples/, model/, state/."""

    batch_size: int | None = None
    """Images per optimizer step, over all processes and accumulated parts together; none given: 32,
    with adamw and without captions 64."""

    optimizer: OptimizerName | None = None
    """Optimizer. muon makes the steps of matrices orthogonal and leaves the rest to adamw. None
    given: muon, but adamw with --shard, --lr or --init, unless --few-steps, the masks of --joint or
    a start from a segmentation leave much to learn."""

    lr: float | None = None
    """Highest learning rate; none given: 2e-3, with captions 7e-4, with muon ten times as much,
    with --few-steps a quarter; 1e-4 for a LoRA of a pipeline."""

    beta2: float | None = None
    """Decay of adamw's mean of squared gradients; none given: 0.999, with captions 0.99."""

    weight_decay: float = 0.01
    """Weight decay."""

    data: str = "shapes"
    """A folder of images, an .npz with `images` (and `labels`), a TIFF stack, a volume such as
    x.zarr, shards (WebDataset's tars, Parquet, Arrow); shapes: generated pictures of coloured
    shapes."""

    size: int | None = None
    """Side in pixels to which the images are resized and cropped; none given: as they are."""

    colour: Colour | None = None
    """Read all images as grey, as RGB, or as RGB with alpha as a fourth channel; none given: as
    they are, RGB if any is."""

    background: tuple[int, int, int] = (255, 255, 255)
    """Colour (red green blue, 0 to 255) under transparent pixels, those of --condition included;
    not with --colour rgba."""

    caption_key: str | None = None
    """Key of the captions in a metadata.jsonl, or column of a metadata.csv; none given: text,
    caption, prompt, captions or comment."""

    crops: bool = False
    """Cut random squares of --size out of large images, instead of resizing them."""

    flips: bool | None = None
    """Mirror images left to right at random; none given: where the training images cannot be told
    from their mirror images, and never with --classes or --captions."""

    val: float = 0.02
    """Images that are held out from training: below 1 a share, but at least 16 images, or a quarter
    of fewer than 64 (of crops the last image); from 1 on a number; 0: none, and the last weights
    are kept."""

    skip_bad: bool = False
    """Leave out images that cannot be read, naming them, instead of stopping."""

    classes: bool = False
    """Learn to make images of a class: subfolders, or the `labels` of an .npz."""

    captions: bool = False
    """Learn to make images of a text: `shapes`, shards, or a folder with 0.txt beside 0.png, or
    with a metadata.jsonl of lines such as {"file_name": "0.png", "text": "a red circle"}."""

    condition: str | None = None
    """Learn to make each image from a picture: a folder of pictures or masks with the images'
    names, in folders like theirs; or from the image itself lowres:4 (a version 4 times smaller),
    grey, noise:0.2 or hole."""

    target: Literal["image", "mask"] = "image"
    """What is made. mask: --data is a folder of masks, which are made from noise alone, or with
    --condition each from the image of its name; those of several annotators are in a folder each.
    """

    joint: Path | None = None
    """Folder of masks with the images' names, in folders like theirs: learn to make image and mask
    together, which are data to train a segmentation on."""

    mask_coding: Literal["bits", "one-hot"] = "bits"
    """With --target mask or --joint: the classes as binary digits, or a channel for each."""

    label_dropout: float = 0.1
    """Share of the images that are shown without their class, caption or condition, which guidance
    needs; with a condition beside classes or captions, as many again are shown without one of the
    two."""

    network: str = "auto"
    """auto: width and levels are chosen by image size, number of images and budget; or a preset
    (unet describe --list shows them)."""

    width: int | None = None
    """Channels of the finest level, instead of the network's."""

    latents: Path | None = None
    """Train in the latents of this autoencoder: a folder of diffusers' AutoencoderKL, or a pipeline
    folder with vae/. Each image is encoded once, to OUT/latents."""

    text_encoder: Path | None = None
    """With --captions: pipeline folder whose CLIP, text_encoder/ and tokenizer/, reads them; none
    given: that of a pipeline in --latents, else a small one is trained as well."""

    init: str | None = None
    """Model folder whose weights to start from, and whose network to take; what differs, such as a
    head or the classes, starts anew. Or OWNER/NAME of one on the Hugging Face Hub, a diffusers
    pipeline, or its unet/."""

    trained: Literal["all", "attention", "lora"] = "all"
    """attention: train only the spatial transformers of the network in --init. lora: leave it as
    it is, and train and save only small matrices beside its layers."""

    rank: int = 8
    """With --trained lora: rank of the small matrices."""

    prior: str | None = None
    """With --init and --captions that CLIP reads: a folder of captioned images of what the model
    knows already, such as its own pictures. Every second training image is one of them, so that the
    model does not forget (the prior loss of DreamBooth)."""

    few_steps: float | None = None
    """With --init: learn to make in 1, 2 or 4 evaluations what that model makes in 20 or more, with
    this scale of guidance built in (1: none; 1.3 makes digits clearer and hardly less varied).
    """

    noise: Literal["cosine", "linear", "scaled-linear", "sigmoid", "flow", "edm"] | None = None
    """Noise schedule; none given: that of the model in --init, else that of --prediction flow or
    edm, else flow, the straight path of flow matching; but cosine with another --prediction,
    --zero-snr, --learn-variance, --joint, --latents or --target mask."""

    timesteps: int | None = None
    """Noise levels T; none given: those of a pipeline's schedule, else 1000."""

    zero_snr: bool = False
    """Leave no signal at all at the last noise level (not with eps or edm)."""

    prediction: Literal["v", "eps", "x0", "flow", "edm"] | None = None
    """What the network predicts: the noise (eps), the image (x0), v, a mixture of both, the
    velocity of flow matching, or what EDM's preconditioning leaves; none given: what the model in
    --init predicts, else that of --noise flow or edm, else v."""

    learn_variance: bool = False
    """Learn the variance of the reverse steps as well, by the hybrid loss."""

    weighting: Literal["plain", "min-snr"] = "plain"
    """Weight of the noise levels in the loss."""

    shift: float | None = None
    """Above 1, noisy levels are trained on more often; none given: 1, with captions 3, with
    captions and flow noise 6."""

    levels: Literal["uniform", "log-normal"] | None = None
    """How noise levels are drawn: uniform over the timesteps, or with a normal log(sigma), where
    sigma is noise per signal; none given: log-normal with flow noise, where it is logit-normal, and
    with --prediction edm, else uniform."""

    log_sigma: tuple[float, float] | None = None
    """With log-normal levels: mean and standard deviation of log(sigma); none given: 0 1 with
    flow noise, 0 1.5 with captions as well, else -1.2 1.2."""

    coupling: Literal["independent", "ot"] = "independent"
    """ot: among the images that go through the network together, or those of one class among them,
    each image gets noise near it (optimal transport), which straightens the paths between the
    two."""

    def __post_init__(self) -> None:
        MaskOptions.__post_init__(self)
        FitOptions.__post_init__(self)
        if not all(0 <= value <= 255 for value in self.background):
            raise InputError(f"--background {self.background}: give three numbers from 0 to 255")
        if self.channels and self.colour:
            raise InputError("--channels and --colour both say which channels are used: give one")
        if self.size is not None and self.size < 1:
            raise InputError(f"--size {self.size} must be at least 1 pixel")
        if self.shift is not None and not 0 < self.shift < math.inf:
            raise InputError(f"--shift {self.shift} must be a number above 0")
        if not 0 <= self.label_dropout < 1:
            raise InputError(f"--label-dropout {self.label_dropout} must be in [0, 1)")
        if self.width is not None and self.width < 1:
            raise InputError(f"--width {self.width} must be at least 1")
        if self.classes and self.captions:
            raise InputError("--classes and --captions each say what an image shows: give one")
        if self.text_encoder and not self.captions:
            raise InputError(
                f"--text-encoder {self.text_encoder} has nothing to read: give --captions"
            )
        if self.condition and self.latents:
            raise InputError("--condition does not go with --latents: leave one of them out")
        if self.target == "mask" and (self.colour or self.latents or self.classes or self.captions):
            raise InputError(
                "--target mask makes masks, from noise alone or from the images of --condition: "
                "leave out --colour, --latents, --classes and --captions"
            )
        if self.joint and (self.latents or self.target == "mask" or self.colour == "rgba"):
            raise InputError(
                f"--joint {self.joint} makes grey or colour images and their masks together: "
                "leave out --target mask, --latents and --colour rgba"
            )
        cleaned = self.mask_values or self.threshold_masks
        if cleaned and not (self.joint or self.condition or self.target == "mask"):
            raise InputError(
                "--mask-values and --threshold-masks say what masks mean, and there are none: give "
                "a folder of masks as --joint or --condition, or as --data with --target mask"
            )
        if self.latents and (self.crops or self.flips):
            raise InputError(
                "--latents encodes each image once and whole: leave out --crops and --flips"
            )
        if self.trained != "all" and not self.init:
            raise InputError(
                f"--trained {self.trained} leaves the rest of the network as it is: give one with "
                "--init"
            )
        if self.prior and not (self.init and self.captions):
            raise InputError(
                f"--prior {self.prior} keeps what the model of --init makes of texts: give --init "
                "and --captions"
            )
        if self.rank < 1:
            raise InputError(f"--rank {self.rank} must be at least 1")
        if self.rank != type(self).rank and self.trained != "lora":
            raise InputError(f"--rank {self.rank} is that of --trained lora: give both")
        if self.trained == "lora" and (self.network != "auto" or self.width or self.shard):
            raise InputError(
                "--trained lora takes the network of --init as it is, on each device whole: leave "
                "out --network, --width and --shard"
            )
        needing = {
            "--trained lora": self.trained == "lora",
            "--latents": self.latents,
            "--text-encoder": self.text_encoder,
        }
        for flag in (flag for flag, given in needing.items() if given and self.push_to_hub):
            raise InputError(
                f"--push-to-hub uploads models that are whole by themselves, and one of {flag} "
                "needs the files of another: leave it out, and upload a folder of the run with "
                "`hf upload`"
            )
        if self.few_steps is not None:
            if not 0 < self.few_steps < math.inf:
                raise InputError(f"--few-steps {self.few_steps} must be a number above 0")
            if not self.init:
                raise InputError(
                    "--few-steps makes a trained model faster: give that model with --init"
                )
            given = {
                "--trained": self.trained != "all",
                "--prior": self.prior,
                "--learn-variance": self.learn_variance,
                "--weighting": self.weighting != "plain",
                "--coupling": self.coupling != "independent",
            }
            for flag in (flag for flag, value in given.items() if value):
                raise InputError(
                    "--few-steps trains the model of --init on its own predictions: leave out "
                    f"{flag}"
                )
        if self.log_sigma is not None and not (
            math.isfinite(self.log_sigma[0]) and 0 < self.log_sigma[1] < math.inf
        ):
            raise InputError(
                f"--log-sigma {self.log_sigma}: give a mean and a standard deviation above 0"
            )
        if self.coupling == "ot" and (self.captions or self.condition):
            raise InputError(
                "--coupling ot would make the noise depend on the text or picture of an image, "
                "while sampling draws it without regard to them: leave it out with --captions and "
                "--condition"
            )
        if self.zero_snr and self.prediction == "eps":
            raise InputError(
                "--zero-snr leaves no signal at the last noise level, where --prediction eps says "
                "nothing about the image: choose --prediction v or x0"
            )


Samplers = Literal["ddpm", "ddim", "euler", "heun", "flow-heun", "dpmpp-2m", "dpmpp-2m-sde", "jump"]
CHURNING = ("euler", "heun", "flow-heun")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How images are made by a trained model."""

    steps: int | None = None
    """Steps from noise to image; none given: those that the training found to be enough, 8 or 20,
    with another --sampler 20, with jump 4."""

    sampler: Samplers | None = None
    """Sampler. heun and flow-heun evaluate the network twice a step, the others once. ddpm and
    dpmpp-2m-sde draw noise in each step, which corrects errors of a network that was trained for a
    short time; jump is for models of --few-steps. None given: jump for these, dpmpp-2m for models
    of --coupling ot, else dpmpp-2m-sde."""

    spacing: Literal["trailing", "leading", "linspace", "karras", "logsnr"] | None = None
    """How the steps are spread over the noise levels; none given: logsnr, evenly in the logarithm
    of noise per signal (of fewer than 4 steps trailing), and with flow noise, --shift or --sampler
    jump trailing."""

    shift: float = 1.0
    """Above 1, more of the steps are at high noise: 3 is usual for large images by flow matching
    (not with --spacing karras or logsnr)."""

    eta: float = 0.0
    """With ddim: share of fresh noise in each step, from 0 (none) to 1 (as ddpm)."""

    churn: float = 0.0
    """With euler, heun or flow-heun: noise that is added before each step (EDM's S_churn)."""

    churn_interval: tuple[float, float] = (0.0, math.inf)
    """With --churn: only between these noise levels (noise per signal; S_min and S_max)."""

    churn_noise: float = 1.0
    """With --churn: standard deviation of that noise (S_noise)."""

    variance: Literal["fixed-small", "fixed-large", "learned"] = "fixed-small"
    """With ddpm: variance of the noise in each step."""

    guidance: float = 1.0
    """Scale of guidance: how far the prediction for the class, text or condition is extrapolated
    away from the prediction without it; 1: none."""

    guide: str | None = None
    """With --guidance: model folder of a weaker version of the model, smaller or trained for less
    time, to steer away from instead (autoguidance). It needs no classes."""

    negative: str = ""
    """With --guidance and captions: a text to steer away from."""

    guidance_rescale: float = 0.0
    """How far the standard deviation, which guidance raises, is brought back, from 0 to 1."""

    guidance_interval: tuple[float, float] = (0.0, math.inf)
    """Guide only between these noise levels (noise per signal)."""

    clip: Literal["static", "dynamic", "none"] = "static"
    """How predicted images are kept in range: clamped (static), scaled by their largest values
    (dynamic), or not at all (none)."""

    seed: int = 0
    """Seed; image 7 of a seed is the same whatever the number of images and the batch size."""

    batch_size: int = 64
    """Images at a time."""

    precision: Precision = "auto"
    """Arithmetic of the network; auto: bf16 on an NVIDIA GPU that supports it, else fp32."""

    device: str = "auto"
    """auto, or a torch device such as cpu, cuda or mps."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} {value} must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed {self.seed} must be from 0 to below 2^32")
        if self.eta and self.sampler != "ddim":
            raise InputError(f"--eta {self.eta} is for --sampler ddim, not {self._sampler_said}")
        if self.churn and self.sampler not in CHURNING:
            raise InputError(
                f"--churn {self.churn} is for --sampler {', '.join(CHURNING)}, not "
                f"{self._sampler_said}"
            )
        if not self.churn and (self.churn_noise != 1 or self.churn_interval != (0.0, math.inf)):
            raise InputError("--churn-interval and --churn-noise do nothing without --churn")
        if self.variance != "fixed-small" and self.sampler != "ddpm":
            raise InputError(
                f"--variance {self.variance} is for --sampler ddpm, not {self._sampler_said}"
            )
        if self.guide and self.negative:
            raise InputError("--guide and --negative each say what to steer away from: give one")
        if self.guidance == 1:
            given = {
                "--guide": self.guide,
                "--negative": self.negative,
                "--guidance-rescale": self.guidance_rescale,
                "--guidance-interval": self.guidance_interval != (0.0, math.inf),
            }
            for flag in (flag for flag, value in given.items() if value):
                raise InputError(f"{flag} does nothing without --guidance above 1: give both")

    @property
    def _sampler_said(self) -> str:
        return self.sampler or "dpmpp-2m-sde"
