"""Label every pixel of images: predict_seg.py --model RUN/model --input FILE_OR_DIR --out DIR."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from unet.errors import InputError
from unet.training.cli import run_script


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Masks, probabilities and overlays of images."""

    model: str
    """Model folder, such as RUN/model."""

    input: Path
    """An image, or a folder of images. Stacks are predicted slice by slice."""

    out: Path
    """Folder for NAME_mask.png, NAME_probability.png and NAME_overlay.png."""

    threshold: float | None = None
    """Probability above which a pixel is of the second of two classes; default: the model's."""

    device: str = "auto"
    """auto, or a torch device such as cpu, cuda or mps."""

    overwrite: bool = False
    """Replace files that are there already."""


def main(options: PredictOptions) -> int:
    if options.threshold is not None and not 0 <= options.threshold < 1:
        raise InputError(f"--threshold {options.threshold} must be in [0, 1)")
    from segmentation.output import predict_files

    failed = predict_files(
        options.model,
        options.input,
        options.out,
        threshold=options.threshold,
        device=options.device,
        overwrite=options.overwrite,
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_script(main, PredictOptions, description=__doc__))
