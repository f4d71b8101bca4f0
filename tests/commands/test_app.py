"""The command `unet app` without a browser: what it refuses, each in one sentence."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from filelock import FileLock

from segmentation.data.pairs import find_pairs
from tests.segmentation.test_segmenter import saved
from unet.errors import InputError
from unet.files.images import write_image
from unet_diffusion.app import command, unfit


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (["--port", "0"], "--port 0 must be from 1 to 65535"),
        (["--max-upload", "0"], "--max-upload 0 must be at least 1"),
        (["--password-file", "empty.txt"], "its first line is empty"),
        (["--password-file", "none.txt"], "--password-file 'none.txt': no such file"),
        (["--held-out", "none"], "--held-out 'none': no such file or folder"),
        (["--held-out", "images"], "'images': needs one folder of images"),
    ],
)
def test_a_mistake_is_a_sentence(tmp_path: Path, monkeypatch, capsys, said, sentence) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "images/image").mkdir(parents=True)
    assert command(said) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "unet-app").exists()


def test_without_gradio_it_says_how_to_get_it(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert command(["--folder", str(tmp_path)]) == 2
    assert "pip install 'unet-diffusion[app]'" in capsys.readouterr().err


def test_a_folder_serves_one_page(tmp_path: Path, capsys) -> None:
    with FileLock(tmp_path / ".lock"):
        assert command(["--folder", str(tmp_path)]) == 2
    assert "another page is open" in capsys.readouterr().err


def test_held_out_images_go_with_a_model_or_it_is_said(tmp_path: Path) -> None:
    """Of no model it ends the start; of one of several it is a note."""
    for i in range(2):
        write_image(tmp_path / f"held/image/{i}.png", np.full((16, 16), 90, np.uint8))
        write_image(tmp_path / f"held/label/{i}.png", np.eye(16, dtype=np.uint8) * 255)
    known = partial(SimpleNamespace, task="segmentation")  # as Known, which takes Gradio
    models = {
        name: known(name=name, path=Path(saved(tmp_path / name, values)))
        for name, values in {"fits": [0, 255], "strange": [0, 7]}.items()
    }
    stack = known(name="stack", path=Path(saved(tmp_path / "s", [0, 7], slices=3)))
    said = partial(unfit, tmp_path / "held", find_pairs(tmp_path / "held"))
    assert said([models["fits"], stack]) == []
    (note,) = said([*models.values()])
    assert note.startswith("note: --held-out ")
    assert "does not go with the model strange: " in note
    assert "the classes are 0, 7" in note
    with pytest.raises(InputError, match="does not go with the model strange"):
        said([models["strange"], stack])
