"""The page of `unet app` in a real browser: what is dropped, painted, drawn, and refused."""

from __future__ import annotations

import io
import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock, Timeout
from PIL import Image

from segmentation.data.pairs import find_pairs
from tests.browser.conftest import PATIENCE, SIDE, Served, opened, run, square
from unet.files.images import read_image, read_mask, write_image

pytestmark = pytest.mark.browser


def drop(tab, *files: Path) -> None:
    tab.set_input_files("#label-files input[type=file]", [str(file) for file in files])


def download(tab, name: str, folder: Path) -> Path:
    """The file of that name, as a click downloads it."""
    link = f"a[download='{name}']"
    tab.wait_for_selector(link)
    with tab.expect_download() as started:
        tab.click(link)
    started.value.save_as(folder / name)
    return folder / name


def sentence(tab) -> str:
    """What the page says in the corner."""
    toast = tab.wait_for_selector(".toast-body")
    text = toast.inner_text()
    tab.click(".toast-close")
    return text


def go(tab, name: str) -> None:
    tab.get_by_role("tab", name=name).click()


def test_masks_that_are_downloaded_are_those_of_the_command(tab, served: Served, tmp_path) -> None:
    stack = np.stack([square(i)[0] for i in (20, 21)])
    np.save(tmp_path / "stack.npy", stack)
    write_image(tmp_path / "new.png", square(22)[0])
    drop(tab, tmp_path / "stack.npy", tmp_path / "new.png")
    names = ("new_mask.png", "new_labels.tif", "stack_0_mask.png", "stack_1_probability.png")
    got = {name: download(tab, name, tmp_path / "got") for name in names}
    (tmp_path / "images").mkdir()
    for name in ("stack.npy", "new.png"):
        (tmp_path / name).rename(tmp_path / "images" / name)
    said = ("--input", tmp_path / "images", "--out", tmp_path / "command", "--labels")
    run("predict-seg", "--model", served.model, *said)
    for name, file in got.items():
        assert file.read_bytes() == (tmp_path / "command" / name).read_bytes(), name
    areas = download(tab, "areas.csv", tmp_path / "got").read_text().splitlines()
    mask = read_mask(got["new_mask.png"])
    row = next(line.split(",") for line in areas if line.startswith("new,7,"))
    assert int(row[3]) == (mask == 7).sum()


def paint(tab, colour: int, lines: list[tuple[float, float, float]]) -> None:
    """Strokes along rows: row, first and last column, in pixels of the image."""
    tab.click("#editor button[title='Color']")
    tab.locator("#editor button.color").nth(colour).click()
    tab.click("#editor button[title='Brush']")
    box = tab.locator("#editor canvas").first.bounding_box()
    percent = int(re.search(r"(\d+)%", tab.inner_text("#editor"))[1])
    scale = percent / 100 * (640 // SIDE)
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    for row, first, last in lines:
        x, y = (
            [middle[i] + scale * (v - SIDE / 2) for v in vs]
            for i, vs in enumerate(((first, last), (row, row)))
        )
        tab.mouse.move(x[0], y[0])
        tab.mouse.down()
        tab.mouse.move(x[1], y[1], steps=2)
        tab.mouse.up()


def shown_on_the_brush(tab) -> None:
    """Waits for the editor with an image in it."""
    tab.wait_for_selector("#editor canvas")
    tab.wait_for_function("document.querySelector('#editor').innerText.includes('%')")
    time.sleep(1)  # the editor fits the image into its place


def test_strokes_count_on_the_image_they_are_painted_on(tab, served: Served, tmp_path) -> None:
    """Learn is pressed as soon as another image is chosen, before the editor holds that."""
    for i in range(2):
        write_image(tmp_path / f"stroke-{i}.png", square(60 + i)[0])
    drop(tab, *(tmp_path / f"stroke-{i}.png" for i in range(2)))
    tab.wait_for_selector("a[download='all.zip']")
    before = {*(served.folder / "lessons").glob("*")}
    go(tab, "Correct and learn")
    tab.click("#learn-show")
    shown_on_the_brush(tab)
    paint(tab, 1, [(SIDE / 2, 8, SIDE - 8)])
    held: list = []  # what is asked of the server, with what is in the editor

    def hold(route) -> None:
        held.append(route) if '"background"' in route.request.post_data else route.continue_()

    def wait_for_held(count: int) -> None:
        while len(held) < count:
            tab.wait_for_timeout(50)

    tab.route("**/queue/join*", hold)
    choose(tab, "learn-image", "stroke-1")
    wait_for_held(1)
    tab.click("#learn")
    wait_for_held(2)
    tab.wait_for_selector("#learn-image input:disabled")
    held[0].continue_()
    tab.wait_for_selector("#learn-image input:not(:disabled)")
    assert len(held) == 2  # one choice is one question
    held[1].continue_()
    tab.unroute_all()
    tab.wait_for_function("document.querySelector('#verdict').innerText.includes('learns from')")
    said = tab.inner_text("#verdict")
    tab.click("#learn-stop")
    assert "of stroke-0" in said
    (lesson,) = {*(served.folder / "lessons").glob("*")} - before
    assert [pair.name for pair in find_pairs(lesson / "labelled")] == ["stroke-0"]


def test_what_is_painted_raises_the_score_on_held_out_images(tab, served, tmp_path) -> None:
    image, mask = square(30)
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    write_image(tmp_path / "painted.png", image)
    drop(tab, tmp_path / "painted.png")
    tab.wait_for_selector("a[download='all.zip']")
    before = {*(served.folder / "lessons").glob("*")}
    go(tab, "Correct and learn")
    tab.click("#learn-show")
    shown_on_the_brush(tab)
    brushes = tab.locator("#editor button.color")
    tab.click("#editor button[title='Color']")
    assert brushes.count() == 3
    # Few strokes: without a graphics card each movement of the mouse takes a second.
    inside = [(rows[0] + r, columns[0] + 4, columns[-1] - 4) for r in (5, 16, 27)]
    outside = [(r, 3, SIDE - 4) for r in (3, SIDE - 4)]
    paint(tab, 1, inside)
    paint(tab, 0, outside)
    tab.fill("#learn-minutes input[type=number]", "0.2")
    tab.click("#learn")
    tab.wait_for_function(
        "/is better|kept the old/.test(document.querySelector('#verdict').innerText)",
        timeout=240_000,
    )
    verdict = tab.inner_text("#verdict")
    old, new = map(float, re.search(r"from ([\d.]+) to ([\d.]+)", verdict).groups())
    assert new > old + 0.1, verdict
    (lesson,) = {*(served.folder / "lessons").glob("*")} - before
    (pair,) = find_pairs(lesson / "labelled")
    drawn = pair.read_mask()
    assert (pair.read_image()[..., 0] == image).all()
    for value in (0, 7):
        of_value = drawn == value
        assert of_value.sum() > 100
        assert (mask[of_value] == value).mean() > 0.95
    assert (lesson / "run-1/model/config.json").is_file()
    run(  # the folder and the run are ordinary ones
        "eval-seg",
        "--model",
        lesson / "run-1/model",
        "--data",
        lesson / "held-out",
        "--out",
        tmp_path / "scores",
    )
    go(tab, "Label")
    assert " + " in tab.locator("#label-model input").input_value()


def test_a_picture_comes_out_of_noise(tab, served, tmp_path) -> None:
    go(tab, "Draw")
    tab.fill("#prompt textarea, #prompt input", "a red circle")
    for name, value in (("count", 2), ("steps", 3)):
        tab.fill(f"#{name} input[type=number]", str(value))
    tab.fill("#seed input", "5")
    assert tab.locator("#sampler input").input_value() == "dpmpp-2m-sde"
    choose(tab, "sampler", "ddim")
    tab.get_by_label("Show where each word is looked at").check()
    tab.click("#draw")
    first = download(tab, "00001.png", tmp_path)
    said = (
        "--prompt",
        "a red circle",
        "--count",
        2,
        "--steps",
        3,
        "--seed",
        5,
        "--sampler",
        "ddim",
    )
    run("sample-ddpm", "--model", served.runs / "shapes/model", *said, "--out", tmp_path / "c")
    assert (read_image(first) == read_image(tmp_path / "c/images/00001.png")).all()
    assert tab.locator("#maps img").count() >= 2


def choose(tab, dropdown: str, name: str) -> None:
    tab.click(f"#{dropdown} input")
    tab.get_by_role("option", name=name, exact=True).click()


@pytest.mark.parametrize("model", ["from-masks", "to-masks"])
def test_a_picture_is_made_from_the_one_that_is_given(tab, served, tmp_path, model) -> None:
    """An image from a mask, and masks from an image: those of the command."""
    given = square(50)[model == "from-masks"]
    write_image(tmp_path / "given.png", given)
    go(tab, "Draw")
    held: list = []  # what is asked of the server
    tab.route("**/queue/join*", lambda route: held.append(route))
    choose(tab, "draw-model", model)
    for field in ("#draw", "#draw-model input", "#sampler input", "#steps input[type=number]"):
        tab.wait_for_selector(f"{field}:disabled")  # lest what is chosen is overwritten
    for route in held:
        route.continue_()
    tab.unroute_all()
    tab.wait_for_selector("#condition")
    for name, value in (("count", 2), ("steps", 3)):
        tab.fill(f"#{name} input[type=number]", str(value))
    tab.fill("#seed input", "6")
    tab.click("#draw")
    assert "this model draws from" in sentence(tab)
    tab.set_input_files("#condition input[type=file]", str(tmp_path / "given.png"))
    tab.wait_for_selector("#condition >> text=given")
    tab.click("#draw")
    second = download(tab, "00001.png", tmp_path)
    said = ("--condition", tmp_path / "given.png", "--each", 2, "--steps", 3, "--seed", 6)
    run("sample-ddpm", "--model", served.runs / model / "model", *said, "--out", tmp_path / "c")
    assert (read_image(second) == read_image(tmp_path / "c/images/given_1.png")).all()
    shown = tab.get_attribute("#drawn img", "src")
    assert shown
    got = read_picture(shown)
    grid = read_picture(tmp_path / "c/grid.png")
    assert (got == grid).all()


def read_picture(place: str | Path) -> np.ndarray:
    """A picture of the page by its address, or of a file, as RGB."""
    if isinstance(place, str):
        with urllib.request.urlopen(place, timeout=20) as reply:
            place = io.BytesIO(reply.read())
    return np.asarray(Image.open(place).convert("RGB"))


def test_zoom_enlarges_what_is_clicked(tab, tmp_path) -> None:
    image = square(23)[0]
    write_image(tmp_path / "new.png", image)
    drop(tab, tmp_path / "new.png")
    tab.wait_for_selector("a[download='all.zip']")
    slide(tab, "opacity", 0)
    slide(tab, "zoom", 4)
    part = SIDE // 4
    middle = (SIDE - part) // 2
    until(lambda: shows(tab, image[middle:, middle:][:part, :part]))
    box = tab.locator("#label-view img").bounding_box()
    side = min(box["width"], box["height"])  # of the picture, in the middle of its place
    corner = [box[p] + (box[n] - side) / 2 for p, n in (("x", "width"), ("y", "height"))]
    tab.mouse.click(*(c + 0.26 * side for c in corner))
    top = middle - part // 4
    until(lambda: shows(tab, image[top:, top:][:part, :part]))


def shows(tab, wanted: np.ndarray) -> bool:
    """Whether the picture on the tab Label is this image (H, W), enlarged pixel by pixel."""
    found = read_picture(tab.get_attribute("#label-view img", "src"))
    times = len(found) // len(wanted)
    if found.shape[:2] != (times * wanted.shape[0], times * wanted.shape[1]):
        return False
    return bool((found[::times, ::times, 0] == wanted).all())


def slide(tab, name: str, value: float) -> None:
    number = tab.locator(f"#{name} input[type=number]")
    number.fill(str(value))
    number.blur()


def test_a_threshold_decides_anew(tab, served: Served, tmp_path) -> None:
    write_image(tmp_path / "images/new.png", square(24)[0])
    drop(tab, tmp_path / "images/new.png")
    before = download(tab, "new_mask.png", tmp_path).read_bytes()
    probability = read_image(download(tab, "new_probability.png", tmp_path)) / 65535
    middle = round(float(np.median(probability)), 2)
    said = ("--input", tmp_path / "images", "--threshold", middle, "--labels")
    run("predict-seg", "--model", served.model, *said, "--out", tmp_path / "command")
    wanted = (tmp_path / "command/new_mask.png").read_bytes()
    assert wanted != before
    slide(tab, "threshold", middle)
    until(lambda: download(tab, "new_mask.png", tmp_path).read_bytes() == wanted)


def test_what_is_no_image_or_too_large_is_a_sentence(tab, tmp_path) -> None:
    (tmp_path / "evil.png").write_bytes(b"\x89PNG\r\n\x1a\n<script>alert(1)</script>")
    drop(tab, tmp_path / "evil.png")
    text = sentence(tab)
    assert "evil.png" in text
    assert str(tmp_path) not in text
    assert "/files/" not in text
    write_image(tmp_path / "wide.png", np.zeros((600, 600), np.uint8))
    tab.reload()
    drop(tab, tmp_path / "wide.png")
    assert "600 x 600 pixels, more than the page takes" in sentence(tab)
    (tmp_path / "huge.tif").write_bytes(bytes(2 * 2**20))
    tab.reload()
    drop(tab, tmp_path / "huge.tif")
    assert "exceed the maximum allowed size of 1.0 Mb" in sentence(tab)


def answer(url: str, data: bytes | None = None, kind: str = "application/json") -> int:
    request = urllib.request.Request(url, data, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


def test_no_path_reaches_a_file_outside_the_folder(tab, served: Served) -> None:
    secret = served.runs / "squares/config.yaml"
    for path in (secret, "/etc/passwd", f"{served.folder}/files/../../{secret.name}"):
        assert answer(f"{served.address}gradio_api/file={path}") in (403, 404)
    # The event of the tab Label, with a file that nobody uploaded.
    fns = json.loads(urllib.request.urlopen(f"{served.address}config", timeout=10).read())
    label = next(d for d in fns["dependencies"] if d["targets"][0][1] == "upload")
    file = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    asked = {"data": ["squares", [file]], "fn_index": label["id"], "session_hash": "../../x"}
    answer(f"{served.address}gradio_api/queue/join", json.dumps(asked).encode())
    stream = f"{served.address}gradio_api/queue/data?session_hash=../../x"
    with urllib.request.urlopen(stream, timeout=20) as reply:
        events = [line for line in reply if b"process_completed" in line]
    assert events
    assert all(b'"success":false' in event for event in events)
    assert not any(b"border_weight" in event for event in events)


def test_a_password_is_asked_for(served: Served, tmp_path: Path) -> None:
    (tmp_path / "password.txt").write_text("sésame\n", encoding="utf-8")
    said = ("--password-file", tmp_path / "password.txt", "--folder", tmp_path / "app")
    with opened("--model", served.model, *said) as address:
        assert answer(f"{address}config") == 401
        for word, status in (("sesame", 400), ("sésame", 200)):
            form = urllib.parse.urlencode({"username": "any", "password": word}).encode()
            kind = "application/x-www-form-urlencoded"
            assert answer(f"{address}login", form, kind) == status


def test_two_people_at_once_get_their_own(tab, browser, served: Served, tmp_path) -> None:
    other = browser.new_context().new_page()
    other.goto(served.address)
    other.wait_for_selector("#label-files")
    for seed, name in ((40, "mine"), (41, "yours")):
        write_image(tmp_path / f"{name}.png", square(seed)[0])
    drop(tab, tmp_path / "mine.png")
    drop(other, tmp_path / "yours.png")
    mine = download(tab, "mine_mask.png", tmp_path)
    yours = download(other, "yours_mask.png", tmp_path)
    assert tab.locator("a[download='yours_mask.png']").count() == 0
    assert (read_mask(mine) != read_mask(yours)).any()
    other.context.close()


def at_work(path: Path) -> bool:
    try:
        with FileLock(path / ".lock", blocking=False):
            return False
    except Timeout:
        return True


def until(condition) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_a_run_goes_on_is_stopped_and_ends_with_its_tab(tab, browser, served: Served) -> None:
    squares = served.runs / "squares"
    log = squares / "metrics.jsonl"
    before = log.stat().st_size
    for end in ("stop", "close"):
        window = browser.new_context().new_page()
        window.goto(served.address)
        go(window, "Runs")
        window.wait_for_selector("#run input")
        choose(window, "run", "squares")
        window.fill("#more-minutes input", "9" if end == "stop" else "10")
        window.click("#resume")
        until(lambda: at_work(squares) and log.stat().st_size > before)
        if end == "stop":
            window.click("#stop-run")
            window.wait_for_selector(".toast-body >> text=has stopped", timeout=PATIENCE)
        window.context.close()
        until(lambda: not at_work(squares))
        assert (squares / "state/state.pt").is_file()
