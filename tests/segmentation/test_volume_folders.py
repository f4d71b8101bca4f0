"""Folders of volumes: each a case, on one side of a split, and predicted one by one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from segmentation.data.classes import ClassTable
from segmentation.data.inputs import find_inputs
from segmentation.data.pairs import find_pairs
from segmentation.data.phantom import phantom_stack
from segmentation.data.slices import with_neighbours
from segmentation.data.splits import split_pairs
from segmentation.judging.surface import surface_scores
from segmentation.model import SegmentationUNet
from segmentation.segmenter import load
from tests.commands.test_seg_commands import run_crossval
from tests.forks import SCRIPTS, run_forked
from tests.segmentation.test_seg_training import SMALL, run_predict, run_train
from unet import UNetConfig
from unet.files.images import list_images, write_image
from unet.training.run import read_log
from unet_diffusion import eval_seg

IMAGES, MASKS = (a.reshape(4, 3, 40, 48) for a in phantom_stack(12, (40, 48), seed=1))


@pytest.fixture
def nnunet(tmp_path: Path) -> Path:
    """Four cases of three slices, in nnU-Net's folders."""
    nibabel = pytest.importorskip("nibabel", reason="pip install 'unet-diffusion[medical]'")
    folder = tmp_path / "Dataset001"
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for i, (image, mask) in enumerate(zip(IMAGES, MASKS, strict=True)):
        for name, array in (
            (f"imagesTr/case_{i}_0000", image),
            (f"labelsTr/case_{i}", np.uint8(mask > 0)),
        ):
            nifti = nibabel.Nifti1Image(array.T, np.diag([0.5, 0.5, 2, 1]))
            nifti.header.set_xyzt_units("mm")
            nibabel.save(nifti, folder / f"{name}.nii.gz")
    said = {"channel_names": {"0": "EM"}, "labels": {"membrane": 0, "cell": 1}}
    (folder / "dataset.json").write_text(json.dumps(said))
    return folder


def test_volumes_of_one_name_lie_in_a_folder_a_patient(nnunet, tmp_path):
    for i in range(4):
        for place, file in (
            (f"images/p{i}/scan.nii.gz", f"imagesTr/case_{i}_0000.nii.gz"),
            (f"masks/p{i}/scan.nii.gz", f"labelsTr/case_{i}.nii.gz"),
        ):
            (tmp_path / place).parent.mkdir(parents=True)
            (nnunet / file).rename(tmp_path / place)
    shutil.rmtree(nnunet)
    pairs = find_pairs(tmp_path)
    assert [p.name for p in pairs][2:5] == ["p0_scan_2", "p1_scan_0", "p1_scan_1"]
    for pair, image, mask in zip(
        pairs, IMAGES.reshape(12, 40, 48), MASKS.reshape(12, 40, 48), strict=True
    ):
        assert np.array_equal(pair.read_image()[..., 0], image)
        assert np.array_equal(pair.read_mask(), mask > 0)


def test_volumes_are_split_whole(nnunet):
    pairs = find_pairs(nnunet)
    assert [p.name for p in pairs][:4] == ["case_0_0", "case_0_1", "case_0_2", "case_1_0"]
    for given, held in (
        ({}, ["case_3"]),
        ({"val": 0.5}, ["case_2", "case_3"]),
        ({"fold": "1/4"}, ["case_0"]),
        ({"val_names": ["case_1_0000"]}, ["case_1"]),
    ):
        train, val = split_pairs(pairs, **given)
        assert {p.name[:6] for p in val} == set(held)
        assert len(val) == 3 * len(held)
        assert len(train) == 12 - len(val)
    train, val = split_pairs(pairs, val_names=["case_1_0"])
    assert [p.name for p in val] == ["case_1_0"]
    # Neighbours are those of the same volume.
    around = with_neighbours(pairs, 3)[3].around
    assert [p.name for p in around] == ["case_1_0", "case_1_0", "case_1_1"]


def test_volumes_with_several_modalities_have_channels(nnunet):
    nibabel = pytest.importorskip("nibabel")
    for i, image in enumerate(IMAGES):
        nifti = nibabel.Nifti1Image(255 - image.T, np.eye(4))
        nibabel.save(nifti, nnunet / f"imagesTr/case_{i}_0001.nii.gz")
    said = {"channel_names": {"0": "EM", "1": "inverse"}}
    (nnunet / "dataset.json").write_text(json.dumps(said))
    pair = find_pairs(nnunet)[4]
    assert (pair.info.channels, pair.info.names) == (2, ("EM", "inverse"))
    assert (pair.read_image() == np.stack([IMAGES[1, 1], 255 - IMAGES[1, 1]], 2)).all()


def test_other_kinds_and_layouts(tmp_path):
    h5py = pytest.importorskip("h5py", reason="pip install 'unet-diffusion[hdf5]'")
    for i in (2, 10):
        for part, array in (("", IMAGES[0]), ("_mask", MASKS[0])):
            with h5py.File(tmp_path / f"v{i}{part}.h5", "w") as file:
                file["x"] = array
    pairs = find_pairs(tmp_path)
    assert [p.name for p in pairs] == [f"v{i}_{k}" for i in (2, 10) for k in range(3)]
    assert (pairs[4].read_image()[..., 0] == IMAGES[0, 1]).all()
    write_image(tmp_path / "0.png", IMAGES[0, 0])  # beside images volumes are passed over
    assert list_images(tmp_path) == [tmp_path / "0.png"]
    assert find_inputs(tmp_path).volumes == []


def test_from_cases_to_masks_and_scores(nnunet, tmp_path, capsys):
    zarr = pytest.importorskip("zarr", reason="pip install 'unet-diffusion[zarr]'")
    run, out = tmp_path / "run", tmp_path / "out"
    assert run_train("--data", nnunet, "--out", run, *SMALL) == 0
    printed = capsys.readouterr().out
    assert "training: 9 images of 3 volumes" in printed
    assert "validation: 3 images of 1 volume" in printed

    given = ("--model", run / "model", "--input", nnunet / "imagesTr", "--out", out)
    broken = nnunet / "imagesTr/case_1_0000.nii.gz"
    whole = broken.read_bytes()
    broken.write_bytes(b"nothing")
    assert run_predict(*given) == 1
    assert "case_1_0000.nii.gz" in capsys.readouterr().err
    model = load(run / "model", device="cpu")
    for i in (0, 2, 3):
        found = zarr.open_array(str(out / f"case_{i}_0000_mask.zarr"), path="0", mode="r")
        assert (found[...] == model(IMAGES[i])).all()
    # The same command goes on with what is not done, and with nothing else.
    broken.write_bytes(whole)
    assert run_predict(*given) == 0
    printed = capsys.readouterr().out
    assert "case_1_0000.nii.gz:" in printed
    assert "case_0_0000" not in printed
    assert not list(out.glob("*_progress"))
    assert run_predict(*given) == 2
    assert "exists already" in capsys.readouterr().err
    # Patients' folders come to folders of the same names.
    for i in (0, 2):
        place = tmp_path / f"patients/{i}/scan.nii.gz"
        place.parent.mkdir(parents=True)
        place.write_bytes((nnunet / f"imagesTr/case_{i}_0000.nii.gz").read_bytes())
    given = ("--model", run / "model", "--input", tmp_path / "patients")
    assert run_predict(*given, "--out", tmp_path / "patients/out") == 0
    assert run_predict(*given, "--out", tmp_path / "patients/out", "--overwrite") == 0
    for i in (0, 2):
        found = zarr.open_array(
            str(tmp_path / f"patients/out/{i}/scan_mask.zarr"), path="0", mode="r"
        )
        assert (found[...] == model(IMAGES[i])).all()
    assert {p.name for p in (tmp_path / "patients/out").iterdir()} == {"0", "2"}

    argv = ["--model", str(run / "model"), "--data", str(nnunet), "--out", str(tmp_path / "s")]
    assert eval_seg.command([*argv, "--surface", "1.5"]) == 0
    # Distances are of the volume, whose slices are 2 mm apart.
    assert "HD95 (millimeter)" in capsys.readouterr().out
    found, true = model(IMAGES[3]), np.uint8(MASKS[3] > 0)
    expected = [surface_scores(found == k, true == k, 1.5, (2, 0.5, 0.5)) for k in (0, 1)]
    scores = json.loads((tmp_path / "s/scores.json").read_text())
    assert {one["name"][:6] for one in scores["per_image"]} == {"case_3"}
    (case,) = scores["surface"]["cases"]
    assert case["name"] == "case_3_0000"
    for kind, both in zip(("membrane", "cell"), expected, strict=True):
        assert (case[f"hd95 {kind}"], case[f"nsd {kind}"]) == pytest.approx(both, rel=1e-6)


def test_a_cross_validation_of_cases_with_slices_and_regions(nnunet, tmp_path, capsys, short_runs):
    """Each case is scored by the model that saw none of its slices, as eval-seg scores it."""
    nibabel = pytest.importorskip("nibabel")
    for i, mask in enumerate(MASKS):  # with a third class, a corner
        mask = np.uint8(mask > 0)
        mask[:, :9, :9] = 2
        nibabel.save(nibabel.Nifti1Image(mask.T, np.eye(4)), nnunet / f"labelsTr/case_{i}.nii.gz")
    said = {"channel_names": {"0": "EM"}, "labels": {"membrane": 0, "cell": 1, "corner": 2}}
    (nnunet / "dataset.json").write_text(json.dumps(said))
    out = tmp_path / "cv"
    more = ("--slices", 3, "--regions", "all=1,2", "corner=2", "--folds", 2)
    assert run_crossval("--data", nnunet, "--out", out, *more, *SMALL) == 0
    printed = capsys.readouterr().out
    assert "training: 6 images of 2 volumes" in printed
    assert "in 4 stacks of 3 slices" in printed
    facts = json.loads((out / "crossval.json").read_text())
    folds = {image["name"]: image["fold"] for image in facts["per_image"]}
    assert folds == {f"case_{i}_{k}": f"{1 + i // 2}/2" for i in range(4) for k in range(3)}
    for k, fold in enumerate(facts["folds"], 1):
        argv = ["--model", str(out / f"fold-{k}/model"), "--out", str(tmp_path / f"s{k}")]
        assert eval_seg.command(argv) == 0
        scores = json.loads((tmp_path / f"s{k}/scores.json").read_text())
        assert scores["classes"] == fold["classes"]
        assert [kind["class"] for kind in fold["classes"]] == ["all", "corner"]
        assert scores["scores"] == pytest.approx(fold["scores"])
    capsys.readouterr()
    more = ("--folds", 5, "--out", tmp_path / "other")
    assert run_crossval("--data", nnunet, *more, *SMALL) == 2
    assert "fold '1/5' of 4 volumes" in capsys.readouterr().err


@pytest.mark.slow  # two runs, by three processes; tests of `BatchKeys` show the sharing itself
def test_two_processes_train_on_cases_as_one(nnunet, tmp_path):
    # Normalised in each sample by itself, so that two halves of a batch are a whole one.
    network = ("--network", "shared", "--width", 8, "--crop", 16, "--batch-size", 4)
    flags = ("--data", nnunet, "--slices", 3, "--precision", "fp32", "--device", "cpu", *network)
    flags = (*flags, "--steps", 3, "--log-every", 1, "--evaluations", 1)
    losses = []
    for processes in (1, 2):
        run = tmp_path / f"run-{processes}"
        argv = (*flags, "--out", run)
        done = run_forked(SCRIPTS / "train_seg.py", *argv, processes=processes, short=True)
        assert done.returncode == 0, done.stderr
        losses.append([e["loss"] for e in read_log(run / "metrics.jsonl") if "loss" in e])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_two_processes_predict_each_case_once(nnunet, tmp_path, capsys):
    """Cases of three kinds and one that cannot be read, which is left for another run."""
    zarr = pytest.importorskip("zarr", reason="pip install 'unet-diffusion[zarr]'")
    h5py = pytest.importorskip("h5py", reason="pip install 'unet-diffusion[hdf5]'")
    info = {
        "classes": ClassTable(values=(0, 255), shares=(0.2, 0.8)).to_dict(),
        "normalisation": {"mean": [128.0], "std": [40.0], "dtype": "uint8"},
        "threshold": 0.5,
    }
    SegmentationUNet(UNetConfig(channels=2, multipliers=(1, 2)), 1, info).save_pretrained(
        tmp_path / "model"
    )
    cases, out = tmp_path / "cases", tmp_path / "out"
    cases.mkdir()
    zarr.create_array(str(cases / "a.zarr"), data=IMAGES[0], chunks=(1, 40, 48))
    with h5py.File(cases / "b.h5", "w") as file:
        file["x"] = IMAGES[1]
    shutil.copy(nnunet / "imagesTr/case_2_0000.nii.gz", cases / "c.nii.gz")
    (cases / "d.h5").write_bytes(b"nothing")
    given = ("--model", tmp_path / "model", "--input", cases, "--device", "cpu", "--out", out)
    done = run_forked(SCRIPTS / "predict_seg.py", *given, processes=2)
    assert done.returncode == 1
    assert "d.h5" in done.stderr
    assert done.stdout.count("3 of 3 slabs predicted") == 3
    with h5py.File(cases / "d.h5", "w") as file:
        file["x"] = IMAGES[3]
    assert run_predict(*given) == 0
    assert capsys.readouterr().out.count("slabs predicted") == 1
    model = load(tmp_path / "model", device="cpu")
    for name, images in zip("abcd", IMAGES, strict=True):
        found = zarr.open_array(str(out / f"{name}_mask.zarr"), path="0", mode="r")
        assert (found[...] == model(images)).all()
    assert not list(out.glob("*_progress"))
