"""`unet` and how commands are found: listed, run, completed, and named as they were typed."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import get_type_hints

import pytest
import tomllib

import unet_diffusion
from unet.training.cli import say_next, typed
from unet.training.config_file import field_types
from unet_diffusion.main import COMMANDS, NAMES, every_command, main, module

ROOT = Path(__file__).parents[2]
SHARED = {"faithfulness", "interactive", "pretraining", "sampled", "starting"}  # by commands
ENTRY_POINTS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]


def test_alone_or_asked_for_help_it_lists_every_command_with_a_line(capsys) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert main(["--help"]) == main(["-h"]) == 0
    assert capsys.readouterr().out == 2 * text
    for name in NAMES:
        assert re.search(rf"(?m)^  {name} +[A-Z][^:]{{15,}}$", text), name
    assert all(f"\n{title}\n" in text for title in COMMANDS)
    assert all(len(line) <= 100 for line in text.splitlines())


def test_version(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"unet-diffusion {version('unet-diffusion')}\n"
    assert unet_diffusion.__version__ == version("unet-diffusion")
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = unet_diffusion.other


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["trian-seg"], "there is no command trian-seg; did you mean train-seg?"),
        (["predict"], "there is no command predict; did you mean predict-seg?"),
        (["xyzzy"], "there is no command xyzzy; unet --help lists the commands"),
        (["--versoin"], "there is no option --versoin; did you mean --version?"),
        (["train-seg", "--uot", "x"], "there is no option --uot; did you mean --out?"),
        (["predict-seg", "--model", "m"], "--input and --out must be given"),
        (["export", "--model", "m", "a.onnx"], "error: --to must be given"),
        (["export", "--model", "m", "--to", "onyx", "a.onnx"], "--to must be one of onnx, "),
        (["export", "--model", "m", "--to", "onnx"], "error: OUT must be given"),
        (["--tyro-print-completion"], "--tyro-print-completion needs a shell after it"),
        (["--tyro-print-completion", "elvish"], "one of bash, zsh, fish"),
        (["--tyro-write-completion", "bash"], "needs a shell and a file after it"),
        (["--tyro-write-completion", "bash", "/gone/x"], "No such file or directory: '/gone/x'"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(capsys, argv: list[str], sentence: str) -> None:
    assert main(argv) == 2
    said = capsys.readouterr()
    assert sentence in said.err
    assert said.err.startswith("error: ")
    assert (said.out, said.err.count("\n")) == ("", 1)


def test_a_config_with_a_key_that_is_no_option_of_the_command(tmp_path, capsys) -> None:
    (tmp_path / "old.yaml").write_text("learning_rate: 0.1\nsteps: 3\n")
    assert main(["train-seg", "--config", str(tmp_path / "old.yaml")]) == 2
    assert "sets the unknown option 'learning_rate'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["describe", "train-seg", "train_seg"])
def test_a_command_is_run_with_what_follows_it(name, capsys, monkeypatch) -> None:
    asked = []
    command = f"unet_diffusion.{name.replace('-', '_')}.command"
    monkeypatch.setattr(command, lambda argv: asked.append(argv) or 7)
    assert main([name, "--out", "x"]) == 7
    assert asked == [["--out", "x"]]


def test_every_command_is_installed_and_listed() -> None:
    for name, place in ENTRY_POINTS.items():
        module, _, function = place.partition(":")
        assert callable(getattr(importlib.import_module(module), function)), name
    modules = {p.stem for p in (ROOT / "unet_diffusion").glob("*.py")}
    commands = modules - {"__init__", "__main__", "main", *SHARED}
    assert {name.replace("-", "_") for name in NAMES} == commands
    places = {f"unet-{name}": f"unet_diffusion.{name.replace('-', '_')}:command" for name in NAMES}
    assert {"unet": "unet_diffusion.main:main"} | places == ENTRY_POINTS


def test_every_script_is_its_command_and_nothing_else() -> None:
    scripts = {path.stem: path for path in (ROOT / "scripts").glob("*.py")}
    assert set(scripts) == {"__init__", *(name.replace("-", "_") for name in NAMES)}
    for name, path in scripts.items():
        if name == "__init__":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert [ast.unparse(node) for node in tree.body[1:]] == [
            "import sys",
            f"from unet_diffusion.{name} import command",
            "if __name__ == '__main__':\n    sys.exit(command())",
        ]


def test_listing_loads_no_torch_and_python_m_is_the_same(capsys) -> None:
    main([])
    code = (
        "import runpy, sys\n"
        "try:\n    runpy.run_module('unet_diffusion', run_name='__main__')\n"
        "finally:\n    assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == capsys.readouterr().out


# -- completion -----------------------------------------------------------------------------------


def completed(capsys, argv: list[str], *words: str) -> list[str]:
    """What bash offers for the last of these words."""
    with pytest.raises(SystemExit) as stop:
        main(argv) if words[0] == "unet" else train_seg(argv)
    assert not stop.value.code
    if not shutil.which("bash"):
        pytest.skip("needs bash")
    script = capsys.readouterr().out + (
        '\nCOMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}\n'
        'set -- $(complete -p "$1"); "$3"\nprintf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(["bash", "-s", *words], input=script, capture_output=True, text=True)
    return done.stdout.split()


def train_seg(argv: list[str]) -> int:
    return importlib.import_module("unet_diffusion.train_seg").command(argv)


def test_a_shell_completes_commands_options_and_choices(capsys, monkeypatch) -> None:
    ask = ["--tyro-print-completion", "bash"]
    names = completed(capsys, ask, "unet", "train")
    assert sorted(names) == ["train-classifier", "train-ddpm", "train-seg"]
    assert completed(capsys, ask, "unet", "train-seg", "--res") == ["--resume"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/unet-train-seg", *ask])
    offered = completed(capsys, ask, "unet-train-seg", "--reci")
    assert offered == ["--recipe"]
    assert "tutorial" in completed(capsys, ask, "unet-train-seg", "--recipe", "tut")
    assert completed(capsys, ask, "unet-train-seg", "--optimizer", "mu") == ["muon"]
    assert completed(capsys, ask, "unet-train-seg", "--conf") == ["--config"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_is_written_to_a_file(shell, tmp_path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--tyro-write-completion", shell, str(tmp_path / "unet")])
    assert not stop.value.code
    assert "crossval-seg" in (tmp_path / "unet").read_text()


@pytest.mark.parametrize("argv", [["unet", "train-seg"], ["scripts/train_seg.py"]])
def test_what_a_shell_cannot_complete_says_where_to_ask(argv, monkeypatch, capsys) -> None:
    ask = ["--tyro-print-completion", "bash"]
    monkeypatch.setattr(sys, "argv", [*argv, *ask])
    assert train_seg(ask) == 2
    assert "give --tyro-print-completion to unet, or to unet-train-seg" in capsys.readouterr().err


def test_every_command_has_its_options_in_the_completion() -> None:
    assert len(every_command().__args__) == len(NAMES)


# -- commands as they were typed ------------------------------------------------------------------


@pytest.fixture
def activated(monkeypatch, tmp_path) -> Path:
    """A folder of programs that the shell looks into, and the Python there."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("python", "unet", *(f"unet-{name}" for name in NAMES)):
        (programs / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    return programs


@pytest.mark.parametrize(
    ("argv", "this", "other"),
    [
        (["scripts/train_seg.py"], "python scripts/train_seg.py", "python scripts/demo.py"),
        (["BIN/unet-train-seg"], "unet-train-seg", "unet-demo"),
        (["BIN/unet", "train-seg", "--out", "x"], "unet train-seg", "unet demo"),
        (
            ["/site/unet_diffusion/__main__.py", "train-seg"],
            "python -m unet_diffusion train-seg",
            "python -m unet_diffusion demo",
        ),
        (["my/own.py"], "python my/own.py", "unet-demo"),
        (["/site/pytest/__main__.py"], "python /site/pytest/__main__.py", "unet-demo"),
        ([""], "", "unet-demo"),
    ],
)
def test_a_command_is_named_in_the_form_that_was_typed(
    activated, monkeypatch, argv: list[str], this: str, other: str
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [word.replace("BIN", str(activated)) for word in argv])
    if this:
        assert " ".join(typed()) == this
    assert " ".join(typed("demo")) == other


def test_what_the_shell_does_not_find_is_named_by_its_path(activated, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(activated.parent)
    monkeypatch.setattr(sys, "argv", ["bin/unet-train-seg"])
    assert typed("demo") == ["bin/unet-demo"]
    monkeypatch.setattr(sys, "argv", [str(activated / "unet"), "train-seg"])
    assert typed("demo") == ["bin/unet", "demo"]
    monkeypatch.setattr(sys, "argv", [str(ROOT / "scripts/train_seg.py")])
    assert typed("demo") == ["bin/python", str(ROOT / "scripts/demo.py")]


def test_the_next_command_is_said_by_the_main_process_alone(activated, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [str(activated / "unet"), "train-seg"])
    say_next("predict-seg", "--model", Path("my run/model"), "--tile", 64)
    assert capsys.readouterr().out == "next: unet predict-seg --model 'my run/model' --tile 64\n"
    monkeypatch.setenv("RANK", "1")
    say_next("predict-seg")
    assert capsys.readouterr().out == ""


def said_next(name: str) -> list[tuple[str, list[str]]]:
    """The commands that a command's source says are next, each with the options it names."""
    source = module(name).__file__
    assert source is not None
    tree = ast.parse(Path(source).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found = []
    for call in (c for c in calls if ast.unparse(c.func) == "say_next"):
        spread = {ast.unparse(arg.value) for arg in call.args if isinstance(arg, ast.Starred)}
        assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
        first = [ast.unparse(a.targets[0]).strip("()").split(",")[0] for a in assigned]
        named = [a.value for a, target in zip(assigned, first, strict=True) if target in spread]
        words = [
            n.value for p in (call, *named) for n in ast.walk(p) if isinstance(n, ast.Constant)
        ]
        found.append((words[0], [w for w in words if str(w).startswith("--")]))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_next_command_exists_and_takes_the_options_it_is_given(name: str) -> None:
    assert said_next(name)
    for command, options in said_next(name):
        known = field_types(get_type_hints(module(command).main)["options"])
        assert {o.removeprefix("--").replace("-", "_") for o in options} <= set(known)
