"""Regions that overlap: read, learnt, scored, written and given back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from segmentation.data.classes import IGNORE, ClassTable
from segmentation.data.pairs import find_pairs
from segmentation.data.regions import Regions, parse_regions
from segmentation.export.graph import exportable
from segmentation.judging.evaluation import Evaluation
from segmentation.judging.surface import surface_scores
from segmentation.losses import RegionLoss, cross_entropy
from segmentation.segmenter import load, load_models
from tests.segmentation.test_seg_training import SMALL, run_predict, run_train
from unet import InputError
from unet.files.images import read_image, write_image
from unet_diffusion import eval_seg

zarr = pytest.importorskip("zarr", reason="pip install 'unet-diffusion[zarr]'")

TABLE = ClassTable(values=(0, 1, 2, 3), shares=(0.4, 0.3, 0.2, 0.1))
GIVEN = ("whole=1,2,3", "core=2,3")
RING = np.zeros((40, 40), np.uint8)
RING[6:34, 6:34], RING[12:28, 12:28], RING[17:23, 17:23] = 1, 2, 3


RING_5 = np.roll(RING, (5, -5), (0, 1))


def tumours(folder: Path) -> Path:
    """Six squares in squares, brighter inside, of three classes."""
    for i in range(6):
        mask = np.roll(RING, (i, -i), (0, 1))
        noise = np.random.default_rng(i).normal(0, 8, mask.shape)
        write_image(folder / "image" / f"{i}.png", (60 * mask + 40 + noise).astype(np.uint8))
        write_image(folder / "label" / f"{i}.png", mask)
    return folder


def test_later_regions_overwrite_earlier_ones():
    regions = Regions(parse_regions(GIVEN), TABLE)
    assert regions.members.tolist() == [[False, True, True, True], [False, False, True, True]]
    assert (regions.table.values, regions.table.names) == (
        (0, 1, 2),
        ("background", "whole", "core"),
    )
    assert regions.table.shares == pytest.approx((0.4, 0.3, 0.3))
    mask = np.array([[0, 1, 2, 3, IGNORE]], np.uint8)
    assert regions.true_map(mask).tolist() == [[0, 1, 2, 2, IGNORE]]
    assert regions.true(mask)[1].tolist() == [[0, 0, 1, 1, IGNORE]]
    # A probability decides each region by itself, so that a core may lie outside of the whole.
    found = np.array([[[0.9, 0.9, 0.1, 0.1]], [[0.1, 0.9, 0.9, 0.1]]])
    assert regions.table.decode(regions.label_map(found, 0.5)).tolist() == [[1, 2, 2, 0]]
    # The truth as a probability is the truth as a map.
    truth = regions.true(RING).astype(np.float32)
    assert (regions.label_map(truth, 0.5) == regions.true_map(RING)).all()


def test_the_loss_is_the_mean_of_binary_ones():
    regions, logits = Regions(parse_regions(GIVEN), TABLE), torch.randn(2, 2, 5, 6)
    target = torch.randint(0, 4, (2, 5, 6)).to(torch.uint8)
    target[0, 0] = IGNORE
    known = target != IGNORE
    expected = torch.stack(
        [
            torch.nn.functional.binary_cross_entropy_with_logits(
                logits[:, r][known], (target[known] >= least).float()
            )
            for r, least in enumerate((1, 2))
        ]
    ).mean()
    found = RegionLoss(cross_entropy, regions.members)(logits, target)
    torch.testing.assert_close(found, expected)


def test_scores_are_of_each_region():
    regions = Regions(parse_regions(GIVEN), TABLE)
    found = Evaluation(TABLE, regions=regions)
    probability = np.stack([RING >= 1, RING >= 3]).astype(np.float32) * 0.98 + 0.01
    found.add(0, "a", probability, RING)
    whole, core = found.per_class()
    a, b = (RING >= 3).sum(), (RING >= 2).sum()
    assert (whole["class"], core["class"]) == ("whole", "core")
    assert (whole["dice"], core["dice"]) == (1, pytest.approx(2 * a / (a + b)))
    assert found.scores()["dice"] == pytest.approx((1 + core["dice"]) / 2)
    wrong = (b - a) / RING.size / 2
    expected = -(wrong * np.log(0.01) + (1 - wrong) * np.log(0.99))
    assert found.scores()["loss"] == pytest.approx(expected, rel=1e-4)
    whole_set = Evaluation(TABLE, regions=regions)
    whole_set.merge(found)
    assert whole_set.to_dict() == found.to_dict()
    assert (found.missing(), found.never_predicted()) == ([], [])


def test_regions_from_the_command_to_masks_and_scores(tmp_path, capsys):
    data, run, out = tumours(tmp_path / "data"), tmp_path / "run", tmp_path / "out"
    given = ("--data", data, "--out", run, "--regions", *GIVEN)
    assert run_train(*given, *SMALL[:-4], "--steps", 12, "--evaluations", 1) == 0
    assert "whole = 1, 2, 3; core = 2, 3" in capsys.readouterr().out
    assert run_train("--out", run, "--resume", "--steps", 13) == 0
    model = load(run / "model", device="cpu")
    assert (model.region_names, model.classes) == (("whole", "core"), (0, 1, 2))
    image = data / "image/5.png"
    whole, core = np.moveaxis(model.regions(image), -1, 0)
    mask = model(image)
    assert whole.any()
    assert model.probability(image).shape == (40, 40, 2)
    assert ((mask == 2) == core).all()
    assert ((mask == 1) == (whole & ~core)).all()
    assert run_predict("--model", run / "model", "--input", image, "--out", out) == 0
    for name, expected in (("mask", mask), ("whole", 255 * whole), ("core", 255 * core)):
        assert (read_image(out / f"5_{name}.png")[..., 0] == expected).all()
    volume = tmp_path / "v.zarr"
    zarr.create_array(
        str(volume), data=np.stack([read_image(image)[..., 0]] * 2), chunks=(1, 40, 40)
    )
    assert run_predict("--model", run / "model", "--input", volume, "--out", out) == 0
    found = zarr.open_array(str(out / "v_core.zarr"), path="0", mode="r")[...]
    assert (found == 255 * core).all()
    argv = ["--model", str(run / "model"), "--out", str(tmp_path / "scores")]
    assert eval_seg.command([*argv, "--surface", "2"]) == 0
    scores = json.loads((tmp_path / "scores/scores.json").read_text())
    figures = json.loads((run / "model/config.json").read_text())["info"]["training"]["figures"]
    assert scores["scores"]["dice"] == pytest.approx(figures["dice"], abs=1e-5)
    assert [one["class"] for one in scores["classes"]] == ["whole", "core"]
    (case,) = scores["surface"]["cases"]  # of the regions, not of what they leave in the map
    assert case["nsd whole"] == surface_scores(whole, RING_5 > 0, 2, (1, 1))[1]
    assert "Regions" in (run / "model/README.md").read_text()
    # Exported, the same probabilities come out of the pixels.
    export = exportable(load_models([run / "model"], "cpu")[0][0])
    pixels = torch.from_numpy(read_image(image).astype(np.float32)).permute(2, 0, 1)
    with torch.no_grad():
        found = export.module(pixels[None])[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(found, model.probability(image), atol=1e-5)
    assert json.loads(export.metadata["regions"]) == {"whole": [1, 2, 3], "core": [2, 3]}
    for refused in (("--min-size", 5), ("--uncertainty",), ("--labels",)):
        more = ("--model", run / "model", "--input", image, "--out", tmp_path / "no")
        assert run_predict(*more, *refused) == 2
    assert eval_seg.command([*argv[:3], str(tmp_path / "no"), "--calibrate"]) == 2
    with pytest.raises(InputError, match="overlap"):
        model.uncertainty(image)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["whole"], "such as whole=1,2,3 core=2,3"),
        (["a=1", "a=2"], "each region once"),
        (["a=1", "b=7"], "region b has the mask values 7"),
        (["a=1", "b=1,2"], "each with a different first value"),
        (["a=1,2,3"], "two regions or more"),
        (["a=0,1", "b=2,3"], "one has to be the background"),
        (["mask=1", "b=2"], "names of their own"),
    ],
)
def test_what_are_no_regions_is_one_sentence(given, told):
    with pytest.raises(InputError, match=told):
        Regions(parse_regions(given), TABLE)


def test_regions_of_nnunet_are_read(tmp_path):
    data = tumours(tmp_path)
    (data / "image").rename(data / "imagesTr")
    (data / "label").rename(data / "labelsTr")
    labels = {"background": 0, "whole tumor": [1, 2, 3], "core": [2, 3], "inner": 3}
    said = {"channel_names": {"0": "T1"}, "labels": labels, "regions_class_order": [1, 2, 3]}
    (data / "dataset.json").write_text(json.dumps(said))
    assert dict(find_pairs(data)[0].regions) == {
        "whole tumor": (1, 2, 3),
        "core": (2, 3),
        "inner": (3,),
    }
    (data / "dataset.json").write_text(json.dumps({**said, "regions_class_order": [1]}))
    with pytest.raises(InputError, match="regions_class_order"):
        find_pairs(data)
