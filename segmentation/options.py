"""`SegmentationOptions`: the command line of `unet-train-seg`. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unet.errors import InputError
from unet.training.options import FitOptions, MaskOptions, OptimizerName

BestBy = Literal["loss", "dice", "v_rand", "ap"]
RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True, kw_only=True)
class LabelOptions(MaskOptions):
    """What a command line says of masks beside what they say themselves."""

    images: Path | None = None
    """Folder of the images, where --data does not hold both, or a stack or volume; with --masks."""

    masks: Path | None = None
    """Folder, stack or volume of the masks, or a COCO JSON file of polygons; with --images."""

    ignore_value: int | tuple[int, int, int] | None = None
    """Mask value of pixels without a label, which do not count: a number, an index of a palette, or
    a colour (224 224 192). They may be most of a mask: one corner, or scribbles. None given: what
    the files declare, or 255 where it marks the edges of objects."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.images is None) != (self.masks is None):
            raise InputError("--images and --masks name one folder each: give both, or only --data")


@dataclass(frozen=True, kw_only=True)
class SegmentationOptions(LabelOptions, FitOptions):
    """Train a U-Net that labels every pixel of an image."""

    batch_size: int | None = None
    """Crops per optimizer step, over all processes and accumulated parts together; none given: 4.
    """

    optimizer: OptimizerName | None = None
    """Optimizer. muon makes the steps of matrices orthogonal and leaves the rest to adamw. None
    given: muon, but adamw with --shard, with --lr, and where --init is a segmentation."""

    lr: float | None = None
    """Highest learning rate; none given: 2e-3, with muon 0.08."""

    momentum: float | None = None
    """Momentum of muon, sgd and rmsprop, beta1 of adamw; none given: 0.9, with muon 0.8."""

    data: str = "phantom"
    """A folder with images and masks (image/ label/, images/ masks/, ..., polygons of COCO,
    labelme or YOLO, or the two ISBI 2012 stacks), or shards (WebDataset's tars, Parquet, Arrow);
    isbi2012: the challenge's stacks, downloaded once; phantom: generated membrane images;
    annotators: such images with six masks each, which disagree;
    stains: generated cells in two channels."""

    val_data: Path | None = None
    """A folder of images and masks to hold out, beside --data; a val/ or validation/ beside a
    train/ in --data is found by itself."""

    slices: int = 1
    """Slices of a stack or volume that are taken together, an odd number such as 3: the neighbours
    of a slice become further channels, and only its own labels are learnt. At the ends the nearest
    slice is repeated. The files of a folder are a stack if they have one size and are numbered
    without a gap."""

    class_names: tuple[str, ...] = ()
    """Names of the classes, in the order of their mask values; none given: those of a classes.txt
    or dataset.json in --data."""

    regions: tuple[str, ...] = ()
    """Learn regions that may overlap instead of classes: each by its name and mask values, such as
    whole=1,2,3 core=2,3, with a sigmoid each. In label maps later ones overwrite earlier ones, by
    their first values. None given: those of nnU-Net's dataset.json, if it has some."""

    instances: bool = False
    """The masks number each cell: learn where cells are, and how deep each pixel lies in its cell,
    which separates cells that touch. Masks that clearly number objects are recognised."""

    val: float = 0.2
    """Share of the images, from the end, that is held out from training; of a single labelled image
    the share of its labelled pixels. 0: nothing is held out, and no figure tells of other images.
    """

    fold: str | None = None
    """Hold out a contiguous fold instead, such as 2/5 for the second of five."""

    val_names: tuple[str, ...] = ()
    """Hold out these images instead: names, or ranges of their numbers such as 24-29."""

    network: str | None = None
    """Preset of the network (unet describe --list shows them); none given: segmentation, with
    --init that of the model."""

    width: int | None = None
    """Channels of the finest level, instead of the preset's."""

    init: str | None = None
    """Model folder whose weights to start from: a segmentation, or a diffusion model, which becomes
    a network without a timestep. Its network and the scaling of its images come with them, and its
    head where that fits. Or OWNER/NAME of one on the Hugging Face Hub, or a checkpoint of
    milesial's Pytorch-UNet, or of segmentation_models.pytorch's Unet with vgg13_bn."""

    unlabelled: Path | None = None
    """Folder of images without labels, of the same kind, in it and below it. For the first half of
    the budget a diffusion model learns from them, in RUN/pretraining. A segmentation starts from
    it, in RUN/teacher, and labels these images; the segmentation in RUN learns from these labels
    as well. For further labels, use the diffusion model again: --init RUN/pretraining/model."""

    synthetic: Path | None = None
    """Folder of generated images and masks to train on as well, laid out as --data, such as that of
    sample-ddpm; they are never held out or scored, and count in no statistic."""

    synthetic_share: float = 0.5
    """With --synthetic or --unlabelled: share of the training crops from these images."""

    loss: Literal["ce", "dice", "dice-ce", "focal", "tversky", "lovasz"] = "ce"
    """Loss: ce is the binary cross-entropy where there are two classes."""

    deep_supervision: bool = False
    """Judge the coarser levels of the decoder, too, each half as much as the next finer one."""

    best_by: BestBy | None = None
    """Which score on the held-out images decides the weights that are kept: the cross-entropy, the
    mean Dice, V_Rand, which rewards closed membranes, or the average precision of numbered objects;
    none given: ap where masks number objects, v_rand where thin membranes separate the cells, else
    loss. With two classes a threshold is saved with the weights: the best one for V_Rand, else for
    the mean Dice. All figures are at this threshold."""

    label_smoothing: float = 0.0
    """With ce and dice-ce: share of the target that is spread over all classes."""

    focal_gamma: float | None = None
    """With focal: exponent by which the loss favours hard pixels."""

    class_weights: tuple[float, ...] = ()
    """Weight of each class in the loss, in the order of their values; none given: 1."""

    balance: bool = False
    """Weight each class by the inverse of its share of the pixels; one without pixels by 0."""

    border_weight: float | None = None
    """Weight w0 of the narrow gaps between cells (U-Net of 2015: 10). With two classes the cells
    are the one in more pieces, with more they are class 1. None given: 10 where thin membranes
    separate the cells, else 0."""

    border_sigma: float = 5.0
    """Width in pixels of that weight (U-Net of 2015: 5)."""

    crop: int | None = None
    """Side of the square training crops, in pixels; 0: whole images. None given: 256, or less where
    the images are smaller."""

    flips: bool | Literal["mirror"] | None = None
    """True: rotate the crops by quarter turns and mirror them; mirror: mirror them left to right
    only; False: neither. None given: whatever makes no difference in the training images."""

    rotation: float | None = None
    """Rotate the crops by up to that many degrees either way; none given: 180 with --flips True, 15
    with mirror, else 0."""

    scale: float = 0.15
    """Zoom the crops by up to a factor of 1 + this either way."""

    elastic: float = 10.0
    """Standard deviation in pixels of random displacements at 3 x 3 points (2015: 10)."""

    brightness: float = 0.2
    """Shift the grey values by up to that many of their standard deviations."""

    contrast: float = 0.2
    """Stretch the grey values by up to a factor of 1 + this either way."""

    gamma: float = 0.2
    """Bend the grey values by an exponent of up to 1 + this either way."""

    blur: float = 1.0
    """Blur by a Gaussian of up to that many pixels."""

    noise: float = 0.1
    """Add noise of up to that many standard deviations of the grey values."""

    def __post_init__(self) -> None:
        LabelOptions.__post_init__(self)
        FitOptions.__post_init__(self)
        if self.val_data is not None and (self.fold is not None or self.val_names):
            raise InputError(
                "--val-data holds out images of its own: leave out --fold, --val-names"
            )
        if not 0 < self.synthetic_share < 1:
            raise InputError(
                f"--synthetic-share {self.synthetic_share} must be above 0 and below 1"
            )
        beside = self.synthetic or self.unlabelled
        if beside is None and self.synthetic_share != type(self).synthetic_share:
            raise InputError(
                f"--synthetic-share {self.synthetic_share} has no effect without --synthetic or "
                "--unlabelled: give one of them"
            )
        if self.regions and (self.instances or self.balance or self.class_weights):
            raise InputError(
                "--regions overlap, so that neither --instances nor weights of classes (--balance, "
                "--class-weights) have a meaning with them: leave these out"
            )
        if self.slices < 1 or self.slices % 2 == 0:
            raise InputError(
                f"--slices {self.slices} must be an odd number, such as 3: a slice and as many "
                "before as after it"
            )
        if self.slices > 1 and self.unlabelled is not None:
            raise InputError(
                "--unlabelled learns from single images, and --slices takes several together: "
                "leave one of them out"
            )
        if self.crop is not None and self.crop < 0:
            raise InputError(f"--crop {self.crop} must be 0 (whole images) or the side in pixels")
        if self.balance and self.class_weights:
            raise InputError("--balance and --class-weights both weight the classes: give one")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"--label-smoothing {self.label_smoothing} must be in [0, 1)")
        if not ((self.border_weight or 0) >= 0 and self.border_sigma > 0):
            raise InputError(
                f"--border-weight {self.border_weight} must be 0 (off) or more, --border-sigma "
                f"{self.border_sigma} above 0"
            )
        if self.width is not None and self.width < 1:
            raise InputError(f"--width {self.width} must be at least 1")
