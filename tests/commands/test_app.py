"""The command `unet app` without a browser: what it refuses, each in one sentence."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from filelock import FileLock

from unet_diffusion.app import command


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
