"""The pages of docs/: every page has its place, every link holds, every option is explained."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from unet_diffusion.main import NAMES, module

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NOTEBOOKS = sorted(DOCS.rglob("*.ipynb"))
GENERATED = ("reference/commands/", "reference/python/")
REFERENCE = runpy.run_path(str(DOCS / "reference.py"), run_name="reference")


def in_nav(entry: Any) -> set[str]:
    """The files that a part of the nav of mkdocs.yml names."""
    if isinstance(entry, str):
        return {entry}
    parts = entry.values() if isinstance(entry, dict) else entry
    return set().union(*map(in_nav, parts))


def test_every_page_has_its_place() -> None:
    named = in_nav(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert named - set(GENERATED) == {page.relative_to(DOCS).as_posix() for page in PAGES}


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda p: p.name)
def test_links_inside_the_repository_hold(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target = (page.parent / link.partition("#")[0]).resolve()
        generated = any(f"docs/{part}" in target.as_posix() for part in GENERATED)
        if "://" not in link and not link.startswith("#") and not generated:
            assert target.exists(), f"{page.name} links to {link}"


@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_a_command_is_in_its_page(name: str) -> None:
    page = REFERENCE["command_page"](name)
    options = get_type_hints(module(name).main)["options"]
    for field in dataclasses.fields(options):
        (row,) = re.findall(
            rf"^\| `--{field.name.rstrip('_').replace('_', '-')}` \|.*$", page, re.MULTILINE
        )
        assert len(row.split(" | ")[-1]) > 10


def test_every_module_has_a_page_and_says_what_it_is() -> None:
    for package in REFERENCE["PACKAGES"]:
        for name in REFERENCE["modules"](package):
            assert REFERENCE["first_line"](name).endswith((".", ":", "?")), name


def test_pictures_are_small() -> None:
    for picture in (p for p in DOCS.rglob("*") if p.suffix in (".png", ".jpg", ".gif")):
        assert picture.stat().st_size < 200_000, picture


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_kept_without_their_output(notebook: Path) -> None:
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_run_from_a_clean_kernel(notebook: Path, tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="pip install -e '.[notebooks]'")
    nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[notebooks]'")
    run = nbclient.NotebookClient(
        nbformat.read(notebook, as_version=4),
        timeout=180,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    run.execute()


def test_what_others_run_names_what_is_there() -> None:
    """The workflow's targets are the Makefile's; the container gets every package of the wheel."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    workflow = yaml.safe_load((ROOT / ".github/workflows/checks.yml").read_text("utf-8"))
    steps = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    made = {
        t for step in steps for call in re.findall(r"make ([a-z -]+)", step) for t in call.split()
    }
    assert made
    assert made <= targets
    packages = re.search(r"packages = \[(.*)\]", (ROOT / "pyproject.toml").read_text("utf-8"))
    copied = re.findall(r"^COPY (.+) \S+$", (ROOT / "Dockerfile").read_text("utf-8"), re.M)
    files = {name for names in copied for name in names.split()}
    assert packages
    assert files >= set(re.findall(r'"(\w+)"', packages[1]))
    allowed = set((ROOT / ".dockerignore").read_text("utf-8").split())
    assert files <= {name.removeprefix("!") for name in allowed}


def test_a_network_and_a_training_of_your_own_run_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (DOCS / "how-to/python.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (network,) = (e for e in examples if "import PRESETS" in e)
    exec(compile(network, "python.md", "exec"), {})
    found: dict[str, Any] = {}
    exec(compile(examples[-1], "python.md", "exec"), found)
    sample = {name: x[None] for name, x in found["Squares"]()[1, 0].items()}
    left = found["loss"](found["trained"], sample)
    assert left < 0.5 * found["loss"](lambda noisy: noisy, sample)
