"""The labelled images that trained models are scored on."""

from __future__ import annotations

from collections.abc import Sequence

from segmentation.data.classes import ClassTable
from segmentation.data.dataset import SegmentationData
from segmentation.data.instances import INSTANCE_NAMES
from segmentation.data.normalisation import joint_normalisation, known_normalisation
from segmentation.data.pairs import Pair, as_rgb
from segmentation.data.regions import known_regions
from segmentation.data.splits import split_pairs
from segmentation.data.weights import find_cells
from segmentation.model import SegmentationUNet
from segmentation.options import SegmentationOptions
from unet.errors import InputError
from unet.files.mask_values import Value
from unet.words import counted


def labelled_data(
    models: Sequence[SegmentationUNet],
    pairs: Sequence[Pair],
    table: ClassTable,
    ignore_value: Value | None = None,
) -> SegmentationData:
    """Images and masks to score trained models by, read with their classes; all are in `val`.

    Args:
        ignore_value: mask value of pixels that do not count; None: the table's.

    Raises:
        InputError: images with other channels or another bit depth than those that a model was
            trained on; a mask with another value than the classes; as `joint_normalisation`.
    """
    if models[0].config.in_channels == 3 and (pairs[0].info.channels, pairs[0].info.names) == (
        1,
        (),
    ):
        pairs = [as_rgb(pair) for pair in pairs]
    info = pairs[0].info
    for model in models:
        normalisation = known_normalisation(model.info)
        channels, dtype = len(normalisation.mean), normalisation.dtype
        if (info.channels, info.dtype) != (channels, dtype):
            raise InputError(
                f"image {pairs[0].name} has {counted(info.channels, 'channel')} of {info.dtype}, "
                f"but the model was trained on {channels} of {dtype}: convert the images"
            )
    regions = known_regions(models[0].info, table)
    numbered = any(model.depth for model in models)
    if ignore_value is not None and not numbered and table.names != INSTANCE_NAMES:
        table = table.ignoring(ignore_value)
    return SegmentationData(
        (),
        pairs,
        table=table,
        normalisation=joint_normalisation(model.info for model in models),
        ignore_value=ignore_value,
        instances=numbered,
        regions=regions.values if regions else None,
    )


def known_cells(models: Sequence[SegmentationUNet], data: SegmentationData) -> int | None:
    """Which of two classes is cells between membranes, according to the models; None: neither.

    A model of earlier versions does not know it: the masks to score say it.

    Raises:
        InputError: a damaged model.
    """
    if len(data.table.values) != 2:
        return None
    for model in models:
        if (known := model.info.get("cells")) not in (None, 0, 1):
            raise InputError(
                f"a model has the cells {known!r} in its config.json, which must be 0, 1 or null"
            )
        if known is not None:
            return int(known)
    if all("cells" in model.info for model in models):
        return None
    found = find_cells(data.load(i)[1] for i in data.val)
    return found.label if found.parted else None


def held_out(pairs: Sequence[Pair], runs: Sequence[SegmentationOptions]) -> list[Pair]:
    """The images that none of the runs was trained on.

    Raises:
        InputError: there is none.
    """
    splits = [
        split_pairs(pairs, run.val, run.fold, run.val_names or None, ignore_value=run.ignore_value)
        for run in runs
    ]
    seen: dict[object, list[Pair]] = {}
    for pair in (pair for train, _ in splits for pair in train):
        seen.setdefault(pair.source, []).append(pair)
    kept = {pair.name: pair for _, val in splits for pair in val}
    unseen = [p for p in kept.values() if not any(map(p.meets, seen.get(p.source, ())))]
    if not unseen:
        if len(runs) == 1:
            raise InputError(
                "the run held nothing out (--val 0), so each image was trained on: give other "
                "labelled images with --data"
            )
        raise InputError("one of the models was trained on each image: score the models one by one")
    return unseen
