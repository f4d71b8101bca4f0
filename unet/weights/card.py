"""The model card: the README.md of a model folder, as the Hugging Face Hub shows it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from unet.files.writing import write_text

CARD = "README.md"
SAMPLES = "samples.png"  # a picture beside the card, which the card shows where it is
_MOST_BYTES = 2**20  # of a card that is read to see who wrote it
_LONGEST = 300  # characters of a fact
_MOST = 50  # lines and figures of a training
_MARK = re.compile(r"^<!-- Written by unet-diffusion, .*-->\n", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What the class of a model gives for its card."""

    title: str
    summary: str
    """One sentence: what the model does."""

    pipeline_tag: str
    """The Hub's name of the task: https://huggingface.co/tasks."""

    tags: tuple[str, ...]
    """More words by which the Hub's users find it."""

    python: str
    """Lines that load and use it."""

    commands: tuple[str, ...]
    """Command lines that use it."""

    facts: Mapping[str, str]
    """Facts for using it, such as the classes, by name."""


def model_card(
    usage: Usage, network: str, training: object = None, *, pictured: bool = False
) -> str:
    """The text of a card.

    Args:
        network: the size of the network, for people.
        training: what `info["training"]` holds of the run: {"data": [lines], "run": [lines],
            "figures": {name: number}}; parts that are missing or something else are left out.
        pictured: whether samples.png lies beside the card.
    """
    front = yaml.safe_dump(
        {
            "library_name": "unet-diffusion",
            "pipeline_tag": usage.pipeline_tag,
            "tags": ["u-net", "pytorch", *usage.tags],
        },
        sort_keys=False,
    )
    facts = "\n".join(
        f"| {_plain(k)} | {_plain(v)} |" for k, v in {"Network": network, **usage.facts}.items()
    )
    top = f"---\n{front}# license: yours to choose, such as cc-by-4.0\n---\n"
    commands = "\n".join(usage.commands)
    picture = f"\n![Samples]({SAMPLES})\n" if pictured else ""
    text = f"""
# {usage.title}

{usage.summary}
{picture}
## Use

In Python, with the package `unet-diffusion`:

```python
{usage.python}
```

On the command line:

```
{commands}
```

## Model

| | |
|---|---|
{facts}

## Training

{_training(training)}

## Licence

None is stated: choose one, in the field `license` at the top of this file.
"""
    return f"{top}{_mark(top + text)}{text}"


def write_card(folder: Path, card: str) -> None:
    """Writes README.md to a model folder, unless one was written or edited by hand there."""
    file = folder / CARD
    if is_ours(file):
        write_text(file, card)


def is_ours(file: Path) -> bool:
    """Whether there is no card at `file`, or one that `model_card` wrote and nobody edited."""
    if not file.exists():
        return True
    try:
        with file.open("rb") as stream:
            text = stream.read(_MOST_BYTES).decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return False  # whatever it is, it stays
    mark = _MARK.search(text)
    return mark is not None and mark[0] == _mark(_MARK.sub("", text, count=1))


def _mark(text: str) -> str:
    """The line that tells whether the rest of a card is as it was written."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return (
        f"<!-- Written by unet-diffusion, {digest}. Saving the model again replaces this file, but "
        "not once it has been edited. -->\n"
    )


def _training(training: object) -> str:
    """The section on the run, of whatever a config.json holds."""
    held: Mapping[str, Any] = training if isinstance(training, Mapping) else {}
    parts = []
    for title, key in (("Data", "data"), ("Run", "run")):
        if lines := list(_lines(held.get(key))):
            parts.append("\n".join([f"{title}:\n", *lines]))
    if rows := list(_rows(held.get("figures"))):
        parts.append("\n".join(["On held-out data:\n", "| figure | value |", "|---|---|", *rows]))
    return "\n\n".join(parts) or "What it was trained on was not saved with it: say so here."


def _lines(found: object) -> Iterator[str]:
    if isinstance(found, list | tuple):
        yield from (f"- {_plain(line)}" for line in found[:_MOST] if isinstance(line, str))


def _rows(found: object) -> Iterator[str]:
    if isinstance(found, Mapping):
        for name, value in list(found.items())[:_MOST]:
            if isinstance(value, int | float) and not isinstance(value, bool):
                with suppress(OverflowError):  # an integer beyond all floats
                    yield f"| {_plain(str(name))} | {value:.4g} |"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line, cut where it is very long."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    line = line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."
    return re.sub(r"([\\`*_\[\]<>#|~$&])", r"\\\1", line)
