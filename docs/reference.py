"""Writes the reference when the site is built: the options of every command, a page a module.

Run by mkdocs-gen-files, from the root of the repository.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from unet_diffusion.main import NAMES, module

PACKAGES = {
    "unet": "The network, files, weights and the training loop",
    "segmentation": "Labelling the pixels of images",
    "diffusion": "Making images",
}


def described(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass, its own and its bases'."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for field, below in itertools.pairwise(body):
            text = below.value if isinstance(below, ast.Expr) else None
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Constant):
                found[field.target.id] = " ".join(str(text.value).split())
    return found


def options_of(name: str) -> Iterator[tuple[str, str, str, str]]:
    """Option, kind of value, default and explanation of each option of a command."""
    cls = get_type_hints(module(name).main)["options"]
    texts, hints = described(cls), get_type_hints(cls)
    for field in dataclasses.fields(cls):
        option = f"`--{field.name.rstrip('_').replace('_', '-')}`"
        yield option, kind(hints[field.name]), default_of(field), texts[field.name]


def kind(hint: Any) -> str:
    """What an option takes, in a word or two."""
    words = {bool: "", int: "whole number", float: "number", str: "text", Path: "path"}
    parts = [part for part in get_args(hint) if part is not type(None) and part is not ...]
    if hint in words:
        return words[hint]
    if get_origin(hint) is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if get_origin(hint) is tuple:
        several = f"{len(parts)} × " if ... not in get_args(hint) else "one or more × "
        return several + kind(parts[0])
    return " or ".join(dict.fromkeys(map(kind, parts)))


def default_of(field: dataclasses.Field[Any]) -> str:
    """What an option is where it is not given; None and nothing are explained by its text."""
    if field.default is field.default_factory is dataclasses.MISSING:
        return "must be given"
    if field.default is dataclasses.MISSING or field.default in (None, (), ""):
        return ""
    value = field.default
    if isinstance(value, bool):
        return "on" if value else ""
    return f"`{' '.join(map(str, value)) if isinstance(value, tuple) else value}`"


def command_page(name: str) -> str:
    """The page of a command: what it does, and its options in a table."""
    rows = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in options_of(name)]
    text = inspect.getdoc(module(name)) or ""
    table = "\n".join(f"| {row} |" for row in rows)
    return (
        f"# unet {name}\n\n{text}\n\n"
        f"| option | value | default | what it does |\n|---|---|---|---|\n{table}\n"
    )


def modules(package: str) -> Iterator[str]:
    """The modules of a package that have something to show, rooms behind the files on top."""
    files = sorted(Path(package).rglob("*.py"), key=lambda p: (len(p.parts), p.parts))
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if file.stem != "__init__" and any(isinstance(n, ast.stmt) for n in tree.body[1:]):
            yield ".".join(file.with_suffix("").parts)


def first_line(module_name: str) -> str:
    """The first sentence of a module's docstring."""
    file = Path(module_name.replace(".", "/") + ".py")
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.split("\n\n")[0].replace("\n", " ")


def main() -> None:
    import mkdocs_gen_files

    def write(file: str, text: str) -> None:
        with mkdocs_gen_files.open(file, "w") as page:
            page.write(text)

    listed, summary = [], []
    for name in NAMES:
        about = (module(name).__doc__ or "").partition(":")[0].replace("\n", " ")
        write(f"reference/commands/{name}.md", command_page(name))
        listed.append(f"| [`unet {name}`]({name}.md) | {about} |")
        summary.append(f"- [{name}]({name}.md)")
    table = "\n".join(listed)
    write("reference/commands/index.md", f"# Commands\n\n| command | |\n|---|---|\n{table}\n")
    write("reference/commands/SUMMARY.md", "\n".join(["- [All](index.md)", *summary]) + "\n")

    parts, summary = ["# Python\n"], ["- [All](index.md)"]
    for package, about in PACKAGES.items():
        parts.append(f"\n## {package}\n\n{about}.\n\n| module | |\n|---|---|")
        summary.append(f"- {package}")
        for name in modules(package):
            write(f"reference/python/{name}.md", f"# {name}\n\n::: {name}\n")
            parts.append(f"| [`{name}`]({name}.md) | {first_line(name)} |")
            summary.append(f"    - [{name.removeprefix(package + '.')}]({name}.md)")
    write("reference/python/index.md", "\n".join(parts) + "\n")
    write("reference/python/SUMMARY.md", "\n".join(summary) + "\n")


if __name__ == "<run_path>":  # which is what mkdocs-gen-files calls it
    main()
