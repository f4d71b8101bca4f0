"""Command lines: one dataclass per command, read by tyro, repeatable from the YAML file it saves.

A command is three parts: a dataclass, a function that takes it, and the call of `run_script`::

    @dataclass(frozen=True, kw_only=True)
    class Options:
        out: Path
        '''The run folder.'''
        lr: float = 1e-3
        '''Peak learning rate.'''

    def main(options: Options) -> None: ...

    def command(argv: Sequence[str] | None = None) -> int:
        return run_script(main, Options, argv, description=__doc__)

The dataclass is flat, may inherit, and documents each field by the string below it, which becomes
the help text. Fields are bool, int, float, str, Path, Enum, Literal, tuples and lists of these, and
unions of these with None; ``config`` is a reserved name. Nothing here imports torch.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import io
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

import tyro

from unet.errors import InputError, Interrupted, RunError
from unet.files.writing import file_trouble
from unet.memory import keep_freed_memory, ran_out_of_memory
from unet.training.config_file import expected, field_types, load_config, nearest
from unet.training.options import BUDGETS

T = TypeVar("T")

COMPLETION = ("--tyro-print-completion", "--tyro-write-completion")
SHELLS = ("bash", "zsh", "fish")

_SMALLER = ("batch_size", "tile", "size", "crop")  # options that take memory
_TEXTS = {"prompt", "negative"}  # options that may be empty
_CONFIG_HELP = (
    "--config FILE.yaml sets options from a file, such as the config.yaml of an earlier run; "
    "the options given beside it win."
)


def parse(
    cls: type[T],
    argv: Sequence[str] | None = None,
    *,
    description: str | None = None,
    recipes: Path | None = None,
) -> T:
    """The options on the command line `argv` (default ``sys.argv[1:]``) as a `cls`.

    ``--config FILE.yaml`` is a base that the other flags override; so is ``--recipe NAME``, a file
    of the folder `recipes`; so, below these two, is the config.yaml of the run in ``--out`` with
    ``--resume``. A budget takes the place of one in another unit.

    ``--help`` prints the options; ``--tyro-print-completion SHELL`` prints, and
    ``--tyro-write-completion SHELL FILE`` writes, what a shell completes them by. Each raises
    SystemExit(0). Anything that is not understood raises InputError with one sentence; so does a
    `cls` whose ``__post_init__`` raises it.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    words = typed()
    if asks_for_completion(argv):
        if len(words) > 1:
            raise InputError(
                f"a shell completes what is installed: give {argv[0]} to unet, or to unet-train-seg"
            )
        complete(completable(cls, recipes), argv, Path(words[0]).stem)
    argv, values = _base(cls, argv, recipes)
    _check_names(cls, argv)
    _check_given(cls, argv)
    default: Any = _unchecked(cls, values) if values else tyro.MISSING_NONPROP
    text = f"{description or ''}\n\n{_CONFIG_HELP}".strip()
    if recipes is not None:
        names = ", ".join(sorted(file.stem for file in recipes.glob("*.yaml")))
        text += f" --recipe NAME sets them from a recipe: {names}."
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(cls, args=argv, default=default, description=text, prog=" ".join(words))
    except SystemExit as stop:
        if not stop.code:
            raise
        if isinstance(stop.__context__, InputError):  # from __post_init__
            raise stop.__context__ from None
        box = stderr.getvalue()
        text = _missing(cls, argv, values, box) or _diagnosis(cls, argv, box)
        raise InputError(text) from None


def run_script(
    run: Callable[[T], int | None],
    cls: type[T],
    argv: Sequence[str] | None = None,
    *,
    description: str | None = None,
    recipes: Path | None = None,
) -> int:
    """Parse `argv` as a `cls`, call `run` with it, and return the exit status.

    The status is what `run` returns (None is 0); 1 after a RunError; 2 after an InputError, a file
    that the system refuses or a full disk, each printed as ``error: <one sentence>`` on stderr; 128
    + the signal after an Interrupted, with the command that resumes; 130 after Ctrl-C; 141 when the
    reader of stdout has closed it. Every other exception is a bug and keeps its traceback. One of
    several processes ends here, with that status.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that it cannot encode is escaped
            stream.reconfigure(errors="backslashreplace")
    status = _status(run, cls, argv, description, recipes)
    _leave_group(status)
    return status


def typed(command: str | None = None) -> list[str]:
    """The words that run a command, without its options, in the form in which this one was called.

    They are ``python scripts/train_seg.py``, ``unet-train-seg``, ``unet train-seg`` or ``python -m
    unet_diffusion train-seg``, with a path where the shell does not find the program by its name.

    Args:
        command: such as train-seg; None for the one that runs.
    """
    program, called = Path(sys.argv[0]), sys.argv[1:2]
    python = _in_shell(Path(sys.executable))
    if program.parts[-2:] == ("unet_diffusion", "__main__.py"):
        return [python, "-m", "unet_diffusion", *([command] if command else called)]
    if program.stem == "unet":
        return [_in_shell(program), *([command] if command else called)]
    if command is None:
        return [python, str(program)] if program.suffix == ".py" else [_in_shell(program)]
    script = program.with_name(f"{command.replace('-', '_')}.py") if program.name else program
    if program.suffix == ".py" and script.is_file():
        return [python, str(script)]
    if program.stem.startswith("unet-"):
        return [_in_shell(program.with_name(f"unet-{command}{program.suffix}"))]
    return [f"unet-{command}"]  # from a notebook, or somebody's own program


def _in_shell(program: Path) -> str:
    """A program by its name, where the shell finds it by that, else by its path."""
    found = shutil.which(program.name)
    if found and Path(found).parent.resolve() == program.parent.resolve():
        return program.name
    inside = program.is_absolute() and program.is_relative_to(Path.cwd())
    return str(program.relative_to(Path.cwd()) if inside else program)


def say_next(command: str, *arguments: object) -> None:
    """Prints what to type next, in the main process alone: the last line of a command.

    Args:
        command: such as predict-seg, which is named in the form in which this one was called.
        arguments: its options and their values.
    """
    if int(os.environ.get("RANK", 0)) == 0:
        line = shlex.join([*typed(command), *map(str, arguments)])
        print(f"next: {line}", flush=True)


def asks_for_completion(argv: Sequence[str]) -> bool:
    """Whether `argv` asks for what a shell completes a command by."""
    return bool(argv) and argv[0].replace("_", "-") in COMPLETION


def complete(options: Any, argv: Sequence[str], program: str) -> None:
    """Prints or writes what a shell completes `program` by, and raises SystemExit(0).

    Args:
        options: the `completable` of a command, or a union of several as tyro's subcommands.
        argv: ``--tyro-print-completion SHELL`` or ``--tyro-write-completion SHELL FILE``.

    Raises:
        InputError: `argv` is something else.
    """
    writes = argv[0].replace("_", "-") == COMPLETION[1]
    if len(argv) != 2 + writes or argv[1] not in SHELLS:
        file = " and a file" if writes else ""
        raise InputError(f"{argv[0]} needs a shell{file} after it: one of {', '.join(SHELLS)}")
    tyro.cli(options, args=list(argv), prog=program)


def completable(cls: type, recipes: Path | None = None) -> type:
    """`cls` with the options that `parse` takes in addition to its fields, for `complete`."""
    more: list[Any] = [("config", Path | None, dataclasses.field(default=None))]
    if recipes is not None:
        names = tuple(sorted(file.stem for file in recipes.glob("*.yaml")))
        more.append(("recipe", Literal[names] | None, dataclasses.field(default=None)))
    return dataclasses.make_dataclass(cls.__name__, more, bases=(cls,), frozen=True, kw_only=True)


def _leave_group(status: int) -> None:
    """Ends this process if it is one of several, past the end of the interpreter.

    DistributedDataParallel keeps gloo's threads for ever, and one that asks for the interpreter
    while it ends aborts the process: seen in one of forty runs on a busy machine. After an error
    the group is not taken leave of: NCCL waits for what is pending, and so for processes that wait
    for this one. It is its end that lets torchrun end them.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        if status == 0:
            distributed.destroy_process_group()
        atexit._run_exitfuncs()  # ends data workers too
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _status(
    run: Callable[[T], int | None],
    cls: type[T],
    argv: Sequence[str] | None,
    description: str | None,
    recipes: Path | None,
) -> int:
    """The exit status of `run`, and what there is to say on stderr."""
    try:
        options = parse(cls, argv, description=description, recipes=recipes)
        keep_freed_memory()
        status = run(options) or 0
        sys.stdout.flush()
        return status
    except (InputError, RunError) as error:
        message = str(error)
        status = 1 if isinstance(error, RunError) else 2
    except Interrupted as stop:
        if int(os.environ.get("RANK", 0)) == 0:
            command = [*typed(), "--out", str(getattr(options, "out", "")), "--resume"]
            print(f"continue with: {shlex.join(command)}", flush=True)
        return int(stop.code or 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if isinstance(error, BrokenPipeError) and stdout_is_closed():
            return 141
        if (trouble := file_trouble(error)) is None:
            raise
        message, status = trouble, 2
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        fields = field_types(cls)
        smaller = [f"--{n.replace('_', '-')}" for n in _SMALLER if n in fields]
        message = "the memory ran out"
        message += f": give a smaller {' or '.join(smaller)}" if smaller else ""
        status = 1
    print("error:", re.sub(r"\s*\n\s*", " ", message.strip()), file=sys.stderr)
    return status


def _take(argv: list[str], option: str) -> tuple[list[str], str | None]:
    """`argv` without ``option VALUE``, and VALUE."""
    rest: list[str] = []
    found = None
    tokens = iter(argv)
    for token in tokens:
        name, equals, value = token.partition("=")
        if name != option:
            rest.append(token)
            continue
        if found is not None:
            raise InputError(f"{option} is given twice; give one, and options beside it")
        found = value if equals else next(tokens, "")
        if not found or found.startswith("--"):
            raise InputError(f"{option} needs a value after it")
    return rest, found


def _base(cls: type, argv: list[str], recipes: Path | None) -> tuple[list[str], dict[str, Any]]:
    """The flags of `argv` that tyro is to read, and the values that they override."""
    values: dict[str, Any] = {}
    argv, config = _take(argv, "--config")
    if recipes is not None:
        argv, recipe = _take(argv, "--recipe")
        if recipe is not None:
            names = sorted(file.stem for file in recipes.glob("*.yaml"))
            if recipe not in names:
                raise InputError(f"there is no recipe '{recipe}': choose from {', '.join(names)}")
            values = load_config(cls, recipes / f"{recipe}.yaml")
    if config is not None:
        values = _over(values, load_config(cls, config))
    if "--resume" in argv:
        # A resumed run keeps its own settings, except for those that are given anew.
        out = _take(argv, "--out")[1] or values.get("out") or getattr(cls, "out", None)
        if out is not None and (Path(out) / "config.yaml").is_file():
            own = load_config(cls, Path(out) / "config.yaml")
            # The folder may have been moved since.
            values = {**_over(own, values), "out": Path(out)}
    if any(_values(argv, f"--{name.replace('_', '-')}") for name in BUDGETS):
        values = {name: value for name, value in values.items() if name not in BUDGETS}
    return argv, values


def _over(values: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with what was chosen over them; a budget takes the place of another one."""
    if any(chosen.get(name) is not None for name in BUDGETS):
        values = {name: value for name, value in values.items() if name not in BUDGETS}
    return {**values, **chosen}


def _check_names(cls: type, argv: Iterable[str]) -> None:
    """InputError for an option that `cls` does not have; tyro would name a missing one first."""
    valid = ["--config", "--help"]
    for name, hint in field_types(cls).items():
        dashed = name.rstrip("_").replace("_", "-")  # `class_` is --class
        valid += [f"--{dashed}", f"--no-{dashed}"] if hint is bool else [f"--{dashed}"]
    for token in argv:
        option = token.partition("=")[0]
        if option.startswith("--") and option.replace("_", "-") not in valid:
            raise InputError(f"there is no option {option}{nearest(option, valid)}")


def _check_given(cls: type, argv: list[str]) -> None:
    """InputError for an empty value, as of a variable of a shell that is not set, which as a path
    would be the current folder; a text may be empty.
    """
    for name in field_types(cls).keys() - _TEXTS:
        option = f"--{name.rstrip('_').replace('_', '-')}"
        if "" in (_values(argv, option) or ()):
            raise InputError(f"{option} is empty, perhaps an unset variable: give a value")


def _unchecked(cls: type, values: dict[str, Any]) -> Any:
    """A `cls` that holds `values` and defaults, made without ``__init__``.

    tyro only reads it; the checks of ``__post_init__`` come when the flags are in, not before.
    """
    instance: Any = object.__new__(cls)
    for field in dataclasses.fields(cls):
        if field.name in values:
            value = values[field.name]
        elif field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = tyro.MISSING_NONPROP
        object.__setattr__(instance, field.name, value)
    return instance


def stdout_is_closed() -> bool:
    """Whether the reader of stdout (such as head) has closed it; the rest of the output is
    dropped."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _missing(cls: type, argv: list[str], values: Mapping[str, Any], box: str) -> str:
    """One sentence on what is required and missing, or nothing; `box` is what tyro says."""
    hints = get_type_hints(cls, include_extras=True)
    required = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is field.default_factory is dataclasses.MISSING
        and field.name not in values
    ]
    bare = [
        name
        for name in required
        if tyro.conf.Positional in getattr(hints[name], "__metadata__", ())
    ]
    options = [f"--{name.replace('_', '-')}" for name in required if name not in bare]
    missing = [option for option in options if _values(argv, option) is None]
    if not missing and "Required options" in box:
        missing = [name.upper() for name in bare]
    text = " and ".join(filter(None, [", ".join(missing[:-1]), *missing[-1:]]))
    return f"{text} must be given (--help lists the options)" if missing else ""


def _diagnosis(cls: type, argv: list[str], box: str) -> str:
    """One sentence for what tyro says in a box: the value that is wrong, or its first paragraph."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│ ") for line in text.splitlines() if not line.startswith(("╭", "╰"))]
    rule = next((i for i, line in enumerate(lines) if line.startswith("─")), len(lines))
    text = " ".join(line for line in lines[:rule] if line)
    unknown = re.search(r"Unrecognized options: (\S+)", text)
    if unknown and unknown[1] in argv[1:]:
        before = argv[argv.index(unknown[1], 1) - 1]
        return f"'{unknown[1]}' after '{before}' belongs to no option (--help lists the options)"
    for name, hint in field_types(cls).items():
        option = f"--{name.replace('_', '-')}"
        given = _values(argv, option)
        if given is not None and re.search(rf"(^|[\s']){option}($|[\s':])", text):
            found = f"not '{' '.join(given)}'" if given else "and nothing is given"
            return f"{option} must be {expected(hint, typed=True)}, {found}"
    return f"{text} (--help lists the options)"


def _values(argv: list[str], option: str) -> list[str] | None:
    """What follows the last `option` in `argv`, or None without it."""
    values: list[str] | None = None
    current: list[str] = []
    for token in argv:
        name, equals, value = token.partition("=")
        if name.startswith("--"):
            current = [value] if equals else []
            if name.replace("_", "-") == option:
                values = current
        else:
            current.append(token)
    return values
