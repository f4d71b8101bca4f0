"""docs/examples/segment.html: a browser runs an exported model, and no server computes anything."""

from __future__ import annotations

import functools
import http.server
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from segmentation import load
from tests.browser.conftest import PATIENCE, ROOT, SIDE, run, square
from unet.files.images import write_image

pytestmark = pytest.mark.browser


@contextmanager
def files(folder: Path) -> Iterator[str]:
    """The files of a folder at an address of this machine, and nothing else."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_a_static_page_labels_as_python_does(browser, runs, tmp_path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("there is no npm, which brings onnxruntime-web")
    wanted = [
        npm,
        "install",
        "--no-audit",
        "--no-fund",
        "--prefix",
        str(tmp_path),
        "onnxruntime-web",
    ]
    if subprocess.run(wanted, capture_output=True).returncode:
        pytest.skip("npm cannot bring onnxruntime-web here")
    site = tmp_path / "site"
    site.mkdir()
    shutil.copy(ROOT / "docs/examples/segment.html", site / "index.html")
    for file in (tmp_path / "node_modules/onnxruntime-web/dist").iterdir():
        if file.name == "ort.min.js" or file.suffix in (".wasm", ".mjs"):
            shutil.copy(file, site)
    run("export", "--model", runs / "squares/model", "--to", "onnx", site / "model.onnx")
    image = square(30)[0]
    write_image(tmp_path / "new.png", image)
    with files(site) as address:
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        page.set_input_files("#file", str(tmp_path / "new.png"))
        page.wait_for_function("document.getElementById('said').textContent.includes('classes')")
        pixels = page.evaluate(
            "Array.from(document.getElementById('mask').getContext('2d')"
            f".getImageData(0, 0, {SIDE}, {SIDE}).data)"
        )
        page.close()
    found = np.reshape(pixels, (SIDE, SIDE, 4))[..., 0] > 0
    probability = load(runs / "squares/model").probability(image)
    sure = np.abs(probability - 0.5) > 1e-4
    assert (found == (probability > 0.5))[sure].all()
    assert sure.mean() > 0.9
