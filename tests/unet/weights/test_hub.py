"""Uploads to, and downloads from, a stand-in for the Hugging Face Hub: the same model comes back.

huggingface_hub reads its address when it is imported, so one process of its own does all of it, and
the tests look at what it reports and at what the Hub holds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from huggingface_hub import ModelCard

from tests.unet.weights.hub import READ_ONLY, TOKEN, Hub, running_hub

ROOT = Path(__file__).parents[3]
SESSION = """
import json, sys
from pathlib import Path
import numpy as np
import torch
import segmentation
from segmentation.model import SegmentationUNet
from unet import UNetConfig
from unet.errors import InputError

TOKEN, READ_ONLY, folder = *sys.argv[1:3], Path(sys.argv[3])
report = {}

def attempt(name, call):
    try:
        report[name] = call()
    except InputError as error:
        report[name] = f"InputError: {error}"

info = {
    "classes": {"values": [0, 255], "shares": [0.2, 0.8], "ignore_value": None, "ignored_share": 0},
    "normalisation": {"mean": [128.0], "std": [40.0], "dtype": "uint8"},
    "threshold": 0.5,
}
model = SegmentationUNet(UNetConfig(channels=4, multipliers=(1, 2)), 1, info).eval()
attempt("push", lambda: model.push_to_hub("cells", token=TOKEN))
again = SegmentationUNet.from_pretrained("someone/cells")
pairs = zip(model.state_dict().items(), again.state_dict().items(), strict=True)
report["equal"] = all(k == l and torch.equal(v, w) for (k, v), (l, w) in pairs)
report["info"] = again.info == model.info and again.config == model.config
image = np.arange(256, dtype=np.uint8).reshape(16, 16)
report["mask"] = segmentation.load("someone/cells", device="cpu")(image).shape

model.save_pretrained(folder)
card = folder / "README.md"
card.write_text("# By hand\\n")
(folder / "notes.txt").write_text("not for others")
save = lambda name: model.save_pretrained(folder, repo_id=name, push_to_hub=True, token=TOKEN)
attempt("with an edited card", lambda: save("someone/edited"))
attempt("over an edited card", lambda: model.push_to_hub("someone/edited", token=TOKEN))
card.unlink()
attempt("named like the folder", lambda: save(None))

attempt("no token", lambda: model.push_to_hub("someone/other"))
attempt("a reader's token", lambda: model.push_to_hub("someone/other", token=READ_ONLY))
attempt("another owner", lambda: model.push_to_hub("nobody/other", token=TOKEN))
attempt("an impossible name", lambda: model.push_to_hub("a b", token=TOKEN))
attempt("nothing there", lambda: str(SegmentationUNet.from_pretrained("someone/nothing")))

import unet.weights.folder
from huggingface_hub import HfApi
unet.weights.folder.HfApi = lambda token: HfApi("http://127.0.0.1:9", token=token)
attempt("no network", lambda: model.push_to_hub("someone/other", token=TOKEN))
print(json.dumps(report))
"""


class Session(NamedTuple):
    hub: Hub
    report: dict[str, Any]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    home = tmp_path_factory.mktemp("home")
    with running_hub() as hub:
        ours = {
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(home / "cache"),
            "HF_HUB_DISABLE_XET": "1",  # whose protocol the stand-in does not speak
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": str(ROOT),
            "NO_PROXY": "127.0.0.1",
        }
        others = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        done = subprocess.run(
            [sys.executable, "-c", SESSION, TOKEN, READ_ONLY, str(home / "model")],
            capture_output=True,
            text=True,
            cwd=home,
            env=others | ours,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return Session(hub, json.loads(done.stdout))


FILES = ["README.md", "config.json", "model.safetensors"]


def test_what_was_pushed_comes_back_the_same(session: Session) -> None:
    assert session.report["push"].startswith(f"{session.hub.address}/someone/cells/commit/")
    assert session.hub.commits["someone/cells"] == [FILES]
    assert len(session.hub.blobs) == 1  # the weights, as a large file
    assert session.report["equal"]
    assert session.report["info"]
    assert session.report["mask"] == [16, 16]


def test_the_card_names_the_repository(session: Session) -> None:
    card = ModelCard(session.hub.files["someone/cells"]["README.md"].decode())
    assert card.data.pipeline_tag == "image-segmentation"
    assert 'model = load("someone/cells")' in card.text
    assert "unet-predict-seg --model someone/cells --input images" in card.text
    card = ModelCard(session.hub.files["someone/model"]["README.md"].decode())
    assert 'model = load("someone/model")' in card.text


def test_a_card_that_was_edited_goes_up_and_stays(session: Session) -> None:
    assert session.hub.files["someone/edited"]["README.md"] == b"# By hand\n"
    first, second = session.hub.commits["someone/edited"]
    assert first == FILES
    assert second == FILES[1:]


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("no token", "for someone/other: it knows no valid token of yours; log in with `hf auth"),
        ("a reader's token", "for someone/other: your token has no right to write there; take"),
        ("another owner", "for nobody/other: your token has no right to write there"),
        ("an impossible name", "for a b: Repo id must use alphanumeric chars"),
        ("no network", "for someone/other: it cannot be reached ("),
        (
            "nothing there",
            "someone/nothing is no folder here, and the Hub gives no such model (404",
        ),
    ],
)
def test_what_goes_wrong_is_one_sentence(session: Session, what: str, told: str) -> None:
    found = session.report[what]
    assert found.startswith("InputError: ")
    assert told in found
    assert "\n" not in found
