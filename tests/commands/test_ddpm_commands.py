"""unet-train-ddpm, unet-sample-ddpm, unet-eval-ddpm: what they write, and their refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion import load
from diffusion.judging import evaluation, report
from diffusion.judging.classifier import ClassifierUNet, classifier_config
from diffusion.model import DiffusionUNet
from diffusion.options import DiffusionOptions
from tests.forks import SCRIPTS, run_forked
from tests.short_runs import with_reports
from unet.files.images import read_image, write_image
from unet.training.cli import run_script
from unet.training.config_file import load_config
from unet.training.run import read_log
from unet_diffusion import eval_ddpm, sample_ddpm, train_classifier, train_ddpm

pytestmark = pytest.mark.usefixtures("short_runs")

SMALL = ("--width", "8", "--batch-size", "4", "--evaluations", "1", "--log-every", "1")


def run(module: Any, options: str, *arguments: object) -> int:
    return run_script(module.main, getattr(module, options), list(map(str, arguments)))


def run_train(*arguments: object) -> int:
    return run(train_ddpm, "DiffusionOptions", *arguments)


def run_sample(*arguments: object) -> int:
    return run(sample_ddpm, "SampleOptions", *arguments)


def run_eval(*arguments: object) -> int:
    return run(eval_ddpm, "EvalOptions", *arguments)


def discs(count: int, side: int = 12) -> np.ndarray:
    """Bright discs on black, small ones and large ones in turn, (N, H, W)."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side]
    images = []
    for i in range(count):
        cy, cx = rng.uniform(4, side - 4, 2)
        images.append(255.0 * ((y - cy) ** 2 + (x - cx) ** 2 < (4 if i % 2 else 12)))
    return np.stack(images).astype(np.uint8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, short_runs: None) -> Path:
    """A folder with discs.npz and the run of a class-conditional model, with its report."""
    folder = tmp_path_factory.mktemp("ddpm")
    np.savez(folder / "discs.npz", images=discs(80), labels=np.arange(80) % 2)
    with pytest.MonkeyPatch.context() as patch:
        with_reports(patch)
        assert run_train("--out", folder / "run", *training_of(folder)) == 0
    return folder


def training_of(folder: Path) -> tuple[object, ...]:
    data = ("--data", folder / "discs.npz", "--classes")
    return *data, *SMALL, "--steps", 4, "--precision", "fp32", "--timesteps", 100


def test_a_run_holds_the_model_and_the_pictures(trained: Path) -> None:
    names = {path.name for path in (trained / "run").iterdir()}
    assert names == {
        *(".lock", "config.yaml", "metrics.jsonl", "model", "state", "samples"),
        *("report.png", "errors.json"),
    }
    pictures = {path.name for path in (trained / "run/samples").iterdir()}
    assert pictures == {
        *("forward.png", "samples-000004.png", "noise-000004.png"),
        *("appearing.png", "appearing.gif"),
    }
    files = {path.name for path in (trained / "run/model").iterdir()}
    assert files == {"config.json", "model.safetensors", "README.md", "samples.png"}
    assert "\n![Samples](samples.png)\n" in (trained / "run/model/README.md").read_text()
    with Image.open(trained / "run/model/samples.png") as picture:
        assert min(picture.size) > 2 * 12
    with Image.open(trained / "run/samples/appearing.gif") as film:
        assert film.n_frames == report.FRAMES + 1
    model = DiffusionUNet.from_pretrained(trained / "run/model")
    assert model.config.classes == 3
    assert model.info["classes"] == ["0", "1"]
    assert model.info["size"] == [12, 12]
    figures = [e for e in read_log(trained / "run/metrics.jsonl") if "val_loss" in e]
    assert {"val_loss", "val_seen"} <= set(figures[-1])
    errors = json.loads((trained / "run/errors.json").read_text())
    assert len(errors["t"]) == len(errors["held_out"]) == 10
    assert all(np.isfinite(errors["held_out"]))


@pytest.mark.parametrize(
    "options",
    [
        ("--prediction", "eps", "--noise", "linear", "--learn-variance"),
        ("--prediction", "x0", "--weighting", "min-snr", "--timesteps", "100"),
        ("--zero-snr", "--noise", "scaled-linear", "--ema", "0"),
        ("--noise", "flow", "--coupling", "ot"),
        ("--noise", "sigmoid", "--network", "diffusion"),
        ("--timesteps", "4", "--noise", "linear"),
        ("--precision", "fp32"),  # after the others in "auto", in the same process
        ("--precision", "bf16", "--device", "cpu"),
    ],
)
def test_every_kind_of_training_runs_and_samples(trained, tmp_path, options) -> None:
    data = trained / "discs.npz"
    assert run_train("--data", data, "--out", tmp_path / "run", *SMALL, "--steps", 2, *options) == 0
    losses = [e["loss"] for e in read_log(tmp_path / "run/metrics.jsonl") if "loss" in e]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    variance = ("--sampler", "ddpm", "--variance", "learned") if "eps" in options else ()
    arguments = ("--model", tmp_path / "run/model", "--out", tmp_path / "out", "--count", 2)
    assert run_sample(*arguments, "--steps", 3, *variance) == 0


@pytest.mark.slow  # two trainings and six samplings of each kind: the laws are in process/
@pytest.mark.parametrize(
    ("kind", "options", "refused", "told"),
    [
        (
            "flow",
            ("--noise", "flow", "--coupling", "ot", "--levels", "uniform"),
            ("--sampler", "ddpm"),
            "--sampler ddpm draws noise on the way",
        ),
        (
            "edm",
            ("--prediction", "edm", "--learn-variance"),
            ("--churn", "3"),
            "--churn 3.0 is for --sampler euler",
        ),
    ],
)
def test_flow_and_edm_do_all_that_other_models_do(
    trained, tmp_path, capsys, kind, options, refused, told
) -> None:
    data, run, image = trained / "discs.npz", tmp_path / "run", tmp_path / "image.png"
    arguments = ("--data", data, "--classes", *SMALL, "--out", run, *options)
    assert run_train(*arguments, "--steps", 1) == 0
    assert run_train("--resume", "--out", run, "--data", data, "--classes", "--steps", 2) == 0
    info = DiffusionUNet.from_pretrained(run / "model").info
    assert (info["prediction"], info["schedule"]["kind"]) == (kind, kind)
    card = (run / "model/README.md").read_text()
    assert f"kind {kind}" in card
    assert ("coupling" in info) == ("sample without fresh noise" in card) == (kind == "flow")
    write_image(image, discs(1)[0])
    model = ("--model", run / "model", "--count", 2, "--steps", 4)
    churn = ("--sampler", "heun", "--churn", "4", "--spacing", "karras")
    for i, given in enumerate(
        (
            ("--guidance", "2"),
            ("--init", image),
            ("--inpaint", image, "--mask", image),
            ("--interpolate", image, image),
            churn if kind == "edm" else ("--sampler", "flow-heun", "--shift", "3"),
        )
    ):
        assert run_sample(*model, "--out", tmp_path / f"out{i}", *given) == 0
    capsys.readouterr()
    assert run_sample(*model, "--out", tmp_path / "no", *refused) == 2
    assert told in capsys.readouterr().err
    judged = ("--model", run / "model", "--data", data, "--count", 4, "--steps", 2)
    assert run_eval(*judged, "--bits", 1, "--out", tmp_path / "found.json") == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert np.isfinite(found["bits"]["bits per dimension"])


@pytest.fixture(scope="module")
def reads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of a run on a folder of discs with captions."""
    folder = tmp_path_factory.mktemp("captions")
    for i, image in enumerate(discs(24)):
        write_image(folder / f"discs/{i}.png", image)
    lines = [
        {"file_name": f"{i}.png", "text": f"a {('large', 'small')[i % 2]} disc"} for i in range(24)
    ]
    (folder / "discs/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = ("--data", folder / "discs", "--captions", "--out", folder / "run", *SMALL)
    assert run_train(*arguments, "--steps", 3) == 0
    return folder / "run/model"


def test_a_model_makes_images_of_prompts_and_shows_where_their_words_are(
    reads, tmp_path, capsys
) -> None:
    prompts = ("--prompt", "a large disc", "an odd disc")
    arguments = ("--model", reads, "--count", 3, "--steps", 3)
    for name, more in {
        "plain": (),
        "attention": ("--attention",),
        "part": ("--attention", "--attention-steps", 1, 2),
        "guided": ("--guidance", 3),
        "negative": ("--guidance", 3, "--negative", "a small disc"),
    }.items():
        assert run_sample(*arguments, *prompts, *more, "--out", tmp_path / name) == 0
    assert capsys.readouterr().err.count("the model was trained without 'an', 'odd'") == 5
    images = {
        folder.name: np.stack([read_image(f) for f in sorted((folder / "images").iterdir())])
        for folder in tmp_path.iterdir()
    }
    assert (images["plain"] == images["attention"]).all()
    assert (images["plain"] != images["guided"]).any()
    assert (images["guided"] != images["negative"]).any()
    maps = [read_image(tmp_path / name / "attention/00000.png") for name in ("attention", "part")]
    assert maps[0].shape == maps[1].shape
    assert (maps[0] != maps[1]).any()
    assert len(list((tmp_path / "attention/attention").iterdir())) == 3


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--prompt", "a b c d e"), "reads 3, as many as the longest caption"),
        (("--guidance", "2", "--negative", "a b c d e"), "reads 3, as many"),
        (("--negative", "a disc"), "--negative does nothing without --guidance"),
        (("--guidance-rescale", "0.5"), "--guidance-rescale does nothing without"),
        (("--attention",), "give a --prompt"),
        (("--prompt", "a disc", "--class", "1"), "give one"),
        (("--prompt", "a disc", "--attention", "--attention-steps", "2", "9"), "end <= --steps 3"),
        (("--class", "1"), "class '1' is none of the model's, which was trained without classes"),
    ],
)
def test_a_mistaken_prompt_is_one_sentence_before_sampling(
    reads, tmp_path, capsys, arguments, told
) -> None:
    given = ("--model", reads, "--out", tmp_path / "out", "--steps", 3, *arguments)
    assert run_sample(*given) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert told in error
    assert not (tmp_path / "out").exists()


def test_a_run_can_be_given_more_steps(trained, tmp_path) -> None:
    """As if they had been asked for at once; the noise, its levels and the labels go on exactly."""
    data = ("--data", trained / "discs.npz", "--classes", *SMALL)
    constant = ("--schedule", "constant", "--warmup", "0")
    assert run_train(*data, "--out", tmp_path / "whole", *constant, "--steps", 6) == 0
    assert run_train(*data, "--out", tmp_path / "part", *constant, "--steps", 3) == 0
    assert run_train("--out", tmp_path / "part", "--resume", "--steps", 6) == 0
    ours, theirs = (
        torch.load(tmp_path / name / "state/state.pt", weights_only=True)["model"]
        for name in ("part", "whole")
    )
    assert all(torch.equal(ours[k], v) for k, v in theirs.items())


def test_a_run_goes_on_with_its_own_network_whatever_the_budget(trained, tmp_path) -> None:
    data = ("--data", trained / "discs.npz", "--batch-size", 4, "--evaluations", 1)
    assert run_train(*data, "--out", tmp_path / "run", "--steps", 1) == 0
    longer = ("--resume", "--max-minutes", 0.01)
    assert run_train("--out", tmp_path / "run", *longer) == 0
    assert load_config(DiffusionOptions, tmp_path / "run/config.yaml")["width"] == 32


OTHERS = {
    "--data": "other.npz",
    "--seed": 1,
    "--batch-size": 2,
    "--network": "shared",
    "--width": 16,
    "--optimizer": "sgd",
    "--ema": 0.5,
    "--val": 3.0,
    "--size": 8,
    "--noise": "linear",
    "--prediction": "eps",
    "--shift": 2.0,
    "--flips": "True",
    "--init": "model",
}


@pytest.mark.parametrize("option", OTHERS)
def test_a_run_is_not_made_another_one_when_it_goes_on(trained, tmp_path, capsys, option) -> None:
    run = shutil.copytree(trained / "run", tmp_path / "run")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    saved = load_config(DiffusionOptions, run / "config.yaml")[option[2:].replace("-", "_")]
    assert run_train("--out", run, "--resume", option, OTHERS[option], "--steps", 9) == 2
    told, error = capsys.readouterr()
    was = f"no {option}" if saved is None else f"{option} {saved}"
    assert f"run was started with {was}, not {option} {OTHERS[option]}: leave that out" in error
    assert not told
    assert {file: file.read_bytes() for file in before} == before


def test_how_a_run_trains_may_change_and_is_said(trained, tmp_path, capsys) -> None:
    run = shutil.copytree(trained / "run", tmp_path / "run")
    step = load_config(DiffusionOptions, run / "config.yaml")["steps"] + 1
    more = ("--lr", 0.5, "--device", "cpu", "--save-every", 7, "--steps", step)
    assert run_train("--out", run, "--resume", *more) == 0
    told = capsys.readouterr().out
    assert f"continuing with --steps {step}, --lr 0.5, --device cpu, --save-every 7 instead" in told
    found = load_config(DiffusionOptions, run / "config.yaml")
    assert (found["lr"], found["steps"], found["save_every"]) == (0.5, step, 7)


def test_a_run_in_the_default_folder_goes_on_with_its_own_settings(
    trained, tmp_path, monkeypatch
) -> None:
    shutil.copytree(trained / "run", tmp_path / "runs/ddpm")
    monkeypatch.chdir(tmp_path)
    log = (trained / "run/metrics.jsonl").read_bytes()
    saved = load_config(DiffusionOptions, trained / "run/config.yaml")
    assert run_train("--resume", "--steps", saved["steps"] + 1) == 0
    found = load_config(DiffusionOptions, tmp_path / "runs/ddpm/config.yaml")
    assert (found["data"], found["width"]) == (saved["data"], saved["width"])
    assert found["steps"] == saved["steps"] + 1
    assert (trained / "run/metrics.jsonl").read_bytes() == log  # where it was before


def test_all_images_are_trained_on_where_none_is_held_out(tmp_path, reports, capsys) -> None:
    np.savez(tmp_path / "one.npz", images=discs(2, 16)[1:])
    data = ("--data", tmp_path / "one.npz")
    train = (*data, *SMALL, "--steps", 2, "--val", 0, "--out", tmp_path / "run")
    assert run_train(*train, "--evaluations", 2) == 0
    log = read_log(tmp_path / "run/metrics.jsonl")
    assert [line["step"] for line in log if line.get("kept")] == [1, 2]  # the last weights
    assert not any("val_loss" in line for line in log)
    assert "held_out" not in json.loads((tmp_path / "run/errors.json").read_text())
    assert "kept weights" in (said := capsys.readouterr().out)
    assert "none held out" in said
    judge = ("--model", tmp_path / "run/model", *data, "--count", 4, "--steps", 2)
    assert run_eval(*judge) == 0
    assert "no image was held out to compare with" in capsys.readouterr().out
    assert run_eval(*judge, "--bits", 1) == 2
    assert "give others as --data" in capsys.readouterr().err


def test_five_images_are_enough(tmp_path, reports) -> None:
    for i, image in enumerate(discs(5)):
        write_image(tmp_path / f"images/{i}.png", image)
    run = tmp_path / "run"
    assert run_train("--data", tmp_path / "images", "--out", run, *SMALL, "--steps", 1) == 0
    assert (run / "report.png").exists()


def test_shapes_need_no_argument_but_a_place(tmp_path, capsys) -> None:
    options = ("--out", tmp_path / "run", *SMALL, "--steps", 1)
    assert run_train(*options) == 0
    assert load_config(DiffusionOptions, tmp_path / "run/config.yaml")["data"] == "shapes"
    assert "so that attention works at 8 x 8" in capsys.readouterr().out


def test_training_can_start_from_a_model(trained, tmp_path) -> None:
    """With a learning rate of next to nothing the weights are those that it started from."""
    options = ("--data", trained / "discs.npz", *SMALL, "--steps", 1, "--lr", 1e-12, "--ema", 0)
    start = ("--init", trained / "run/model", "--weight-decay", 0)
    assert run_train(*options, *start, "--classes", "--out", tmp_path / "same") == 0
    theirs, ours = (
        DiffusionUNet.from_pretrained(path / "model").state_dict()
        for path in (trained / "run", tmp_path / "same")
    )
    assert all(torch.allclose(ours[k], v, atol=1e-6) for k, v in theirs.items())
    assert run_train(*options, *start, "--out", tmp_path / "other") == 0  # without classes


# -- sampling


def test_few_steps_are_learnt_from_a_model_and_sampled_by_default(
    trained, reads, tmp_path, capsys
) -> None:
    teacher, run = trained / "run/model", tmp_path / "run"
    data = ("--data", trained / "discs.npz", "--classes", *SMALL, "--init", teacher)
    few = ("--few-steps", "1.3", "--steps")
    assert run_train("--out", run, *data, *few, 1) == 0
    assert run_train("--out", run, *data, *few, 2, "--resume") == 0
    steps = [e["step"] for e in read_log(run / "metrics.jsonl") if "loss" in e]
    assert steps == [1, 2]
    model = DiffusionUNet.from_pretrained(run / "model")
    assert model.config.jumps
    assert model.info["few_steps"] == 1.3
    assert "in 1, 2 or 4 (--sampler jump, the default)" in (run / "model/README.md").read_text()
    capsys.readouterr()
    samples = ("--model", run / "model", "--count", 2, "--out")
    assert run_sample(*samples, tmp_path / "four") == 0
    assert "with jump: 4 evaluations" in capsys.readouterr().out
    assert run_sample(*samples, tmp_path / "one", "--steps", 1, "--guidance", 2) == 0
    assert "with jump: 1 evaluation of" in capsys.readouterr().out
    assert run_sample(*samples, tmp_path / "plain", "--sampler", "ddim", "--steps", 3) == 0
    python = load(run / "model")(2)
    for i in range(2):
        assert np.array_equal(python[i], read_image(tmp_path / f"four/images/0000{i}.png"))
    on = ("--data", trained / "discs.npz", "--classes", "--init", run / "model", "--steps", 1)
    assert run_train("--out", tmp_path / "on", *on, "--batch-size", 4, "--evaluations", 1) == 0
    assert not DiffusionUNet.from_pretrained(tmp_path / "on/model").config.jumps
    words = ("--data", reads.parents[1] / "discs", "--captions")
    learnt = ("--init", reads, "--batch-size", 4, "--few-steps", 2, "--steps", 1)
    assert run_train("--out", tmp_path / "words", *words, *learnt) == 0
    for arguments, error in (
        ((*data[:2], *learnt), "guides by a class or a text"),
        ((*words, *few, 1, "--init", teacher), "differ in --captions"),
        ((*data[:2], "--few-steps", 1, "--init", teacher), "--few-steps needs --classes, and data"),
        ((*data, *few, 1, "--noise", "flow"), "leave out --noise"),
        ((*data, *few, 1, "--weighting", "min-snr"), "leave out --weighting"),
    ):
        assert run_train("--out", tmp_path / "no", *arguments) == 2
        assert error in capsys.readouterr().err
    assert run_sample(*samples, tmp_path / "no", "--guide", teacher, "--guidance", 2) == 2
    assert "takes no jumps" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_samples_are_written_as_asked_for(trained, tmp_path, capsys) -> None:
    model, out = trained / "run/model", tmp_path / "out"
    common = ("--model", model, "--steps", 4, "--count", 5, "--class", 1, 0)
    assert run_sample(*common, "--out", out, "--npz", "--gif", "--guidance", 2) == 0
    assert "4 evaluations of the network per image, each for twice" in capsys.readouterr().out
    with np.load(out / "samples.npz") as arrays:
        images, labels = arrays["images"], arrays["labels"]
    assert (images.shape, images.dtype) == ((5, 12, 12, 1), np.uint8)
    assert labels.tolist() == [1, 0, 1, 0, 1]
    for i in range(5):
        assert (read_image(out / f"images/{i:05d}.png") == images[i]).all()
    with Image.open(out / "appearing.gif") as film:
        assert film.n_frames == 5
    assert (out / "grid.png").exists()

    # image 3 is image 3 whatever is made beside it
    again = (*common, "--out", tmp_path / "again", "--guidance", 2, "--first", 3, "--batch-size", 1)
    assert run_sample(*again) == 0
    difference = read_image(tmp_path / "again/images/00003.png").astype(int) - images[3]
    assert abs(difference).max() <= 1


def test_nothing_is_overwritten_unless_asked(trained, tmp_path, capsys) -> None:
    common = ("--model", trained / "run/model", "--steps", 2, "--out", tmp_path / "out")
    assert run_sample(*common, "--count", 3) == 0
    assert run_sample(*common, "--count", 2) == 2
    assert "is in use: give --overwrite" in capsys.readouterr().err
    assert len(list((tmp_path / "out/images").iterdir())) == 3
    assert run_sample(*common, "--count", 2, "--overwrite") == 0
    assert len(list((tmp_path / "out/images").iterdir())) == 2


def test_images_can_be_edited(trained, tmp_path) -> None:
    for i, image in enumerate(discs(2, 24)):  # twice the model's size: resized
        write_image(tmp_path / f"{i}.png", image)
    mask = np.zeros((12, 12), np.uint8)
    mask[:, 6:] = 255
    write_image(tmp_path / "mask.png", mask)
    layer = np.dstack([np.full((12, 12, 3), 255, np.uint8), mask])  # white on nothing
    write_image(tmp_path / "painted.png", layer)
    common = ("--model", trained / "run/model", "--steps", 4, "--count", 2)
    first, last = tmp_path / "0.png", tmp_path / "1.png"
    for name, options in (
        ("init", ("--init", first, "--strength", 0.5)),
        ("inpaint", ("--inpaint", first, "--mask", tmp_path / "mask.png")),
        ("painted", ("--inpaint", first, "--mask", tmp_path / "painted.png")),
        ("between", ("--interpolate", first, last)),
    ):
        assert run_sample(*common, "--out", tmp_path / name, *options) == 0
    images = [read_image(tmp_path / f"{n}/images/00001.png") for n in ("inpaint", "painted")]
    assert np.array_equal(*images)
    kept = images[0][:, :6].astype(int)
    whole = np.asarray(Image.open(first).resize((12, 12), Image.Resampling.LANCZOS))[:, :6, None]
    assert abs(kept - whole).max() <= 1


# -- judging


def test_samples_are_judged(trained, tmp_path, capsys) -> None:
    data = ("--data", trained / "discs.npz")
    classifier = ("--out", tmp_path / "c", "--width", 8, "--steps", 5, "--batch-size", 16)
    assert run(train_classifier, "ClassifierOptions", *data, *classifier) == 0
    common = ("--model", trained / "run/model", *data, "--count", 8)
    options = ("--classifier", tmp_path / "c/model", "--bits", 2, "--out", tmp_path / "found.json")
    assert run_eval(*common, *options, "--compare", "ddim:3", "heun:2") == 0
    printed = capsys.readouterr().out
    assert "sampler heun, steps 2, seed 0, evaluations 2; samples 8" in printed
    table = printed.split("evaluations   seconds")[1].splitlines()[1:3]
    assert [line.split()[0] for line in table] == ["ddim:3", "heun:2"]
    assert table[0].split()[4] == "1.000"
    assert "FID" not in printed
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["settings"]["sampler"] for row in found["rows"]] == ["ddim", "heun"]
    assert all("worst class" in row for row in found["rows"])
    for row in found["rows"]:
        assert row["samples"] == 8
        assert 0 <= row["class accuracy"] <= 1
        assert any(key.startswith("Fréchet distance (features of the classifier") for key in row)
        assert row["notes"]  # too few images for these features
    assert found["bits"]["bits per dimension"] > 0


def test_options_of_one_sampler_go_to_it_alone(trained, tmp_path, capsys) -> None:
    data = ("--data", trained / "discs.npz", "--model", trained / "run/model", "--count", 4)
    options = ("--compare", "ddpm:2", "ddim:2", "--eta", 0.5, "--variance", "fixed-large")
    assert run_eval(*data, *options, "--out", tmp_path / "found.json") == 0
    assert "sampler ddim, steps 2, seed 0, evaluations 2, eta 0.5;" in capsys.readouterr().out
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    found = [(row["settings"]["eta"], row["settings"]["variance"]) for row in rows]
    assert found == [(0, "fixed-large"), (0.5, "fixed-small")]


def test_figures_are_written_row_by_row(trained, tmp_path, monkeypatch) -> None:
    made = evaluation.timed_samples

    def stops_at_the_second(sampler, wanted):
        if sampler.options.steps == 3:
            raise KeyboardInterrupt
        return made(sampler, wanted)

    monkeypatch.setattr(evaluation, "timed_samples", stops_at_the_second)
    data = ("--data", trained / "discs.npz", "--model", trained / "run/model", "--count", 4)
    options = ("--compare", "ddim:2", "ddim:3", "--out", tmp_path / "found.json")
    assert run_eval(*data, *options) == 130
    (row,) = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert row["settings"]["steps"] == 2


def test_copies_are_said_to_be_looked_for_in_other_data(trained, tmp_path, capsys) -> None:
    np.savez(tmp_path / "other.npz", images=discs(40), labels=np.arange(40) % 2)
    options = ("--data", tmp_path / "other.npz", "--count", 4, "--steps", 2)
    assert run_eval("--model", trained / "run/model", *options) == 0
    assert f"other.npz, not in {trained / 'discs.npz'}" in capsys.readouterr().out


# -- mistakes


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--data", "no/such"), "no/such"),
        (("--size", "0"), "--size 0"),
        (("--width", "0"), "--width 0"),
        (("--label-dropout", "1"), "--label-dropout"),
        (("--zero-snr", "--prediction", "eps"), "--prediction v or x0"),
        (("--timesteps", "1"), "steps from 2"),
        (("--noise", "flow", "--prediction", "edm"), "edm-prediction is undefined"),
        (("--noise", "flow", "--zero-snr"), "flow ends without"),
        (("--levels", "uniform", "--log-sigma", "0", "1"), "is for --levels log-normal"),
        (("--log-sigma", "0", "0"), "a standard deviation above 0"),
        (("--coupling", "ot", "--captions"), "leave it out with --captions and --condition"),
        (("--few-steps", "1.3"), "give that model with --init"),
        (("--few-steps", "0", "--init", "x"), "--few-steps 0.0 must be a number above 0"),
        (("--seed", str(2**32)), "--seed 4294967296"),
        (
            ("--network", "paper"),
            "is no preset of a network that takes a timestep and is without text",
        ),
        (("--network", "odd"), "'odd' is no preset"),
        (("--classes",), "has no classes"),
    ],
)
def test_a_mistake_is_one_sentence_before_training(tmp_path, capsys, arguments, told) -> None:
    assert run_train("--out", tmp_path / "run", *SMALL, "--steps", 1, *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert told in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--prompt", "a disc"), "trained with --captions, and this one was not"),
        (("--guidance", "2", "--negative", "a disc"), "--negative 'a disc' needs a model"),
        (("--class", "7"), "class '7' is none of the model's, which knows 0, 1"),
        (("--steps", "1001"), "1001 sampling steps"),
        (("--init", "a.png", "--inpaint", "b.png", "--mask", "c.png"), "give one"),
        (("--inpaint", "b.png"), "--inpaint needs --mask"),
        (("--init", "nowhere.png"), "nowhere.png"),
        (("--count", "0"), "--count 0"),
        (("--first", "-1"), "--first -1"),
        (("--variance", "learned", "--sampler", "ddpm"), "--learn-variance"),
        (("--steps", "3", "--init", "IMAGE", "--strength", "0.1"), "strength 0.1"),
        (("--init", "IMAGE", "--strength", "1.5"), "--strength 1.5"),
        (("--strength", "0.5"), "--strength 0.5 says how much of an image is made anew: give that"),
        (("--inpaint", "IMAGE", "--mask", "BLACK"), "is white nowhere"),
        (("--inpaint", "IMAGE", "--mask", "SMALL"), "of the same proportions"),
        (("--interpolate", "IMAGE", "IMAGE", "--count", "1"), "there are at least 2"),
        (("--init", "IMAGE", "--gif"), "out of noise alone"),
        (("--sampler", "jump"), "is for models of train-ddpm --few-steps"),
        (("--churn-noise", "1.1"), "do nothing without --churn"),
        (("--shift", "0.5"), "shift 0.5 must be a number of 1 or more"),
    ],
)
def test_a_mistake_is_one_sentence_before_sampling(
    trained, tmp_path, capsys, arguments, told
) -> None:
    write_image(tmp_path / "image.png", discs(1)[0])
    write_image(tmp_path / "black.png", np.zeros((12, 12), np.uint8))
    write_image(tmp_path / "small.png", np.full((6, 7), 255, np.uint8))
    files = {name: tmp_path / f"{name.lower()}.png" for name in ("IMAGE", "BLACK", "SMALL")}
    given = [files.get(a, a) for a in arguments]
    kept = tmp_path / "kept/images"
    kept.mkdir(parents=True)
    write_image(kept / "00000.png", discs(1)[0])
    into = ("--model", trained / "run/model", "--out", tmp_path / "kept", "--overwrite")
    assert run_sample(*into, *given) == 2
    assert (kept / "00000.png").exists()
    assert run_sample("--model", trained / "run/model", "--out", tmp_path / "out", *given) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert told in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--compare", "ddim"), "write sampler:steps"),
        (("--compare", "odd:3"), "write sampler:steps"),
        (("--compare", "ddim:²"), "'ddim:²': write sampler:steps"),
        (("--compare", "ddim:0"), "--steps 0 must be at least 1"),
        (("--compare", "ddim:3", "ddim:1001"), "1001 sampling steps"),
        (("--compare", "ddpm:3", "heun:3", "--eta", "0.5"), "--eta 0.5 is for --sampler ddim"),
        (("--compare", "ddim:3", "--variance", "learned"), "is for --sampler ddpm, not ddim"),
        (("--eta", "0.5"), "--eta 0.5 is for --sampler ddim, not dpmpp-2m"),
        (("--count", "3"), "--count 3"),
        (("--out", "no/such/found.json"), "found.json: give a file in a folder"),
        (("--out", "MODEL"), "model is a folder: give a file"),
        (("--data", "no/such.npz"), "no/such.npz"),
        (("--classifier", "a", "--inception", "b"), "give one"),
        (("--classifier", "MODEL"), "diffusion"),
        (("--classifier", "OTHER"), "knows cat, dog, but the model makes 0, 1"),
    ],
)
def test_a_mistake_is_one_sentence_before_judging(
    trained, tmp_path, capsys, monkeypatch, arguments, told
) -> None:
    monkeypatch.setattr(evaluation, "timed_samples", lambda *_: pytest.fail("it samples"))
    if "OTHER" in arguments:
        info = {"classes": ["cat", "dog"], "size": [12, 12]}
        model = ClassifierUNet(classifier_config((12, 12), 1, 4), 2, info)
        model.save_pretrained(tmp_path / "other")
    places = {"MODEL": trained / "run/model", "OTHER": tmp_path / "other"}
    given = [str(places.get(a, a)) for a in arguments]
    data = ("--model", trained / "run/model")
    if "--data" not in given:
        data = (*data, "--data", trained / "discs.npz")
    assert run_eval(*data, *given) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert told in error


def test_two_processes_share_the_images(trained: Path, tmp_path: Path) -> None:
    arguments = ("--model", trained / "run/model", "--count", 5, "--steps", 2, "--batch-size", 2)
    assert run_sample(*arguments, "--npz", "--out", tmp_path / "one") == 0
    two = (*arguments, "--npz", "--out", tmp_path / "two")
    done = run_forked(SCRIPTS / "sample_ddpm.py", *two, processes=2)
    assert done.returncode == 0, done.stderr
    assert "shared by 2 processes" in done.stdout
    one, two = (np.load(tmp_path / name / "samples.npz") for name in ("one", "two"))
    assert one["images"].shape[0] == 5
    # Other threads may round otherwise.
    np.testing.assert_allclose(two["images"].astype(int), one["images"].astype(int), atol=1)
    np.testing.assert_array_equal(one["labels"], two["labels"])
    assert (tmp_path / "two/grid.png").is_file()


def test_two_processes_give_the_losses_of_one(trained: Path, tmp_path: Path) -> None:
    arguments = ("--out", tmp_path / "run", *training_of(trained))
    done = run_forked(SCRIPTS / "train_ddpm.py", *arguments, processes=2, short=True)
    assert done.returncode == 0, done.stderr
    one, two = (
        [e["loss"] for e in read_log(path / "run/metrics.jsonl") if "loss" in e]
        for path in (trained, tmp_path)
    )
    assert len(one) == 4
    assert two == pytest.approx(one, abs=1e-5)
