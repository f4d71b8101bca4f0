"""Command lines: one dataclass a script, read by tyro, repeatable from the YAML file it saves.

A script is three parts: a dataclass, a function that takes it, and the call of `run_script`::

    @dataclass(frozen=True, kw_only=True)
    class Options:
        out: Path
        '''The run folder.'''
        lr: float = 1e-3
        '''Peak learning rate.'''

    def main(options: Options) -> None: ...

    if __name__ == "__main__":
        sys.exit(run_script(main, Options, description=__doc__))

The dataclass is flat, may inherit, and documents each field by the string below it, which becomes
the help text. Fields are bool, int, float, str, Path, Enum, Literal, tuples and lists of these, and
unions of these with None; ``config`` is a reserved name. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import enum
import errno
import io
import os
import re
import reprlib
import shlex
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

from unet.errors import InputError, Interrupted, RunError
from unet.files import write_text

T = TypeVar("T")

_CONFIG_HELP = (
    "--config FILE.yaml sets options from a file, such as the config.yaml of an earlier run; "
    "the options given beside it win."
)
_CONFIG_BYTES = 1_000_000  # no config is larger: guards against a mistyped path to data
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


def parse(
    cls: type[T],
    argv: Sequence[str] | None = None,
    *,
    description: str | None = None,
    recipes: Path | None = None,
) -> T:
    """The options on the command line `argv` (default ``sys.argv[1:]``) as a `cls`.

    ``--config FILE.yaml`` is a base that the other flags override; so is ``--recipe NAME``, a file
    of the folder `recipes`; so is the config.yaml of the run in ``--out`` with ``--resume``.

    ``--help`` prints the options and raises SystemExit(0). Anything that is not understood raises
    InputError with one sentence; so does a `cls` whose ``__post_init__`` raises it.
    """
    argv, values = _base(cls, list(sys.argv[1:] if argv is None else argv), recipes)
    _check_names(cls, argv)
    default: Any = _unchecked(cls, values) if values else tyro.MISSING_NONPROP
    text = f"{description or ''}\n\n{_CONFIG_HELP}".strip()
    if recipes is not None:
        names = ", ".join(sorted(file.stem for file in recipes.glob("*.yaml")))
        text += f" --recipe NAME sets them from a recipe: {names}."
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(cls, args=argv, default=default, description=text)
    except SystemExit as stop:
        if not stop.code:
            raise
        if isinstance(stop.__context__, InputError):  # from __post_init__
            raise stop.__context__ from None
        raise InputError(_diagnosis(cls, argv, stderr.getvalue())) from None


def load_config(cls: type, path: Path | str) -> dict[str, Any]:
    """The values of the YAML file `path`, by field name of `cls`; InputError names file and key."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(_CONFIG_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"there is no config file '{path}'") from None
    except OSError as error:
        raise InputError(f"cannot read the config file '{path}': {error.strerror}") from None
    if len(data) > _CONFIG_BYTES:
        raise InputError(f"'{path}' is larger than {_CONFIG_BYTES} bytes, so it is not a config")
    try:
        content = yaml.safe_load(data)
    # beside YAMLError, PyYAML's constructors leak these for tagged or malformed scalars
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise InputError(f"the config file '{path}' is not readable as YAML{line}") from None
    except RecursionError:
        raise InputError(f"the config file '{path}' is nested too deeply") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"the config file '{path}' must be a list of lines 'option: value'")

    hints = _hints(cls)
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = key.replace("-", "_") if isinstance(key, str) else reprlib.repr(key)
        if name not in hints:
            raise InputError(
                f"'{path}' sets the unknown option '{name}'{_nearest(name, list(hints))}"
            )
        try:
            values[name] = _decode(value, hints[name])
        except ValueError:
            raise InputError(
                f"'{path}' sets {name} to {reprlib.repr(value)}, "
                f"which must be {_expected(hints[name])}"
            ) from None
    return values


def save_config(config: Any, path: Path | str) -> None:
    """Write the dataclass instance `config` as YAML, such that ``--config path`` gives it again.

    The file is replaced whole: a kill leaves the old one or the new one.
    """
    values = {name: _encode(getattr(config, name)) for name in _hints(type(config))}
    # escaped to ASCII: PyYAML does not read back every other character that it writes, U+0085 say
    text = yaml.safe_dump(values, sort_keys=False)
    write_text(Path(path), f"# The options of a run: --config with this file repeats it.\n{text}")


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
    that the system refuses or a full disk, each told as ``error: <one sentence>`` on stderr; 128 +
    the signal after an Interrupted, with the command that goes on; 130 after Ctrl-C; 141 when the
    reader of stdout went away. Every other exception is a bug and keeps its traceback.
    """
    try:
        options = parse(cls, argv, description=description, recipes=recipes)
        status = run(options) or 0
        sys.stdout.flush()
        return status
    except (InputError, RunError) as error:
        message = str(error)
        status = 1 if isinstance(error, RunError) else 2
    except Interrupted as stop:
        if int(os.environ.get("RANK", 0)) == 0:
            command = ["python", sys.argv[0], "--out", str(getattr(options, "out", "")), "--resume"]
            print(f"go on with: {shlex.join(command)}", flush=True)
        return int(stop.code or 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _stdout_is_closed():
            return 141
        if error.filename is None and error.errno not in _DISK_FULL:
            raise
        message, status = error.strerror or str(error), 2
        if error.filename is not None:
            message = f"cannot use '{os.fsdecode(error.filename)}': {message}"
        if error.errno in _DISK_FULL:
            message += "; free some space or choose a folder on another disk"
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
            raise InputError(f"{option} needs a value behind it")
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
    if config is None and "--resume" in argv:
        # A run goes on with its own settings.
        out = _take(argv, "--out")[1]
        if out is not None and (Path(out) / "config.yaml").is_file():
            config = str(Path(out) / "config.yaml")
    if config is not None:
        values |= load_config(cls, config)
    return argv, values


def _hints(cls: type) -> dict[str, Any]:
    """Name -> type of the fields that the constructor takes, without Annotated."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _check_names(cls: type, argv: Iterable[str]) -> None:
    """InputError for an option that `cls` does not have; tyro would name a missing one first."""
    valid = ["--config", "--help"]
    for name, hint in _hints(cls).items():
        dashed = name.rstrip("_").replace("_", "-")  # `class_` is --class
        valid += [f"--{dashed}", f"--no-{dashed}"] if hint is bool else [f"--{dashed}"]
    for token in argv:
        option = token.partition("=")[0]
        if option.startswith("--") and option.replace("_", "-") not in valid:
            raise InputError(f"there is no option {option}{_nearest(option, valid)}")


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


def _encode(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (tuple, list)):
        return [_encode(item) for item in value]
    raise TypeError(f"an option of type {type(value).__name__} cannot be saved as YAML")


def _decode(value: Any, hint: Any) -> Any:
    """`value` as YAML gives it, as a `hint`; ValueError where it is something else."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for option in args:  # the first that fits, as on the command line
            with contextlib.suppress(ValueError):
                return _decode(value, option)
        raise ValueError
    if origin is Literal:
        for choice in args:
            if type(choice) is type(value) and choice == value:
                return choice
        raise ValueError
    if origin in (tuple, list) and isinstance(value, list):
        if origin is list or args[1:] == (...,):
            args = (args[0],) * len(value)
        return origin(_decode(item, arg) for item, arg in zip(value, args, strict=True))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        if isinstance(value, str) and value in hint.__members__:
            return hint[value]
    elif hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            return float(value)  # YAML 1.1 reads 1e-4, without a point, as text
    elif hint is Path and isinstance(value, str) and value:
        return Path(value)
    elif hint in (bool, int, str, types.NoneType) and type(value) is hint:
        return value
    raise ValueError


def _expected(hint: Any) -> str:
    """What `_decode` accepts, in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_expected(option) for option in args)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in args)
    if origin is list or args[1:] == (...,):
        return f"a list with each item {_expected(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)}: {', '.join(_expected(arg) for arg in args)}"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(hint.__members__)
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text (in quotes, if it looks like something else)",
        Path: "a path",
        types.NoneType: "None (in YAML: null)",
    }
    return words[hint]


def _stdout_is_closed() -> bool:
    """Whether the reader of stdout (such as head) went away; what is left for it goes nowhere."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _nearest(name: str, valid: list[str]) -> str:
    match = difflib.get_close_matches(name, valid, n=1)
    return f"; did you mean {match[0]}?" if match else "; --help lists the options"


def _diagnosis(cls: type, argv: list[str], box: str) -> str:
    """One sentence for what tyro says in a box: the value that is wrong, or its first paragraph."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│ ") for line in text.splitlines() if not line.startswith(("╭", "╰"))]
    rule = next((i for i, line in enumerate(lines) if line.startswith("─")), len(lines))
    text = " ".join(line for line in lines[:rule] if line)
    for name, hint in _hints(cls).items():
        option = f"--{name.replace('_', '-')}"
        given = _values(argv, option)
        if given is not None and re.search(rf"(^|[\s']){option}($|[\s':])", text):
            return f"{option} must be {_expected(hint)}, not '{' '.join(given)}'"
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
