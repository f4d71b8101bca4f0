"""The YAML file that holds the options of a run, by the fields of their dataclass."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import enum
import reprlib
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from unet.errors import InputError
from unet.files.writing import write_text

RENAMED = {"threshold_by": "best_by"}  # options of earlier versions
_CONFIG_BYTES = 2**16  # no config is larger: guards against a mistyped path to data
_MOST_BITS = 4096  # of a whole number; longer ones cannot be printed


class _Loader(yaml.SafeLoader):
    """YAML without what lets a short file take endless time: aliases, and numbers of any length."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "an alias", mark)
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node)
        if value.bit_length() > _MOST_BITS:
            raise yaml.constructor.ConstructorError(None, None, "a number", node.start_mark)
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


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
        content = _Loader(data).get_single_data()
    # beside YAMLError, PyYAML's constructors leak these for tagged or malformed scalars
    except (
        *(yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError),
        ArithmeticError,
    ) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise InputError(f"the config file '{path}' is not readable as YAML{line}") from None
    except RecursionError:
        raise InputError(f"the config file '{path}' is nested too deeply") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"the config file '{path}' must be a list of lines 'option: value'")

    hints = field_types(cls)
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = key.replace("-", "_") if isinstance(key, str) else reprlib.repr(key)
        name, value = _of_today(name, value, hints)
        if name not in hints:
            today = RENAMED.get(name)
            hint = f"; it is {today} now" if today in hints else nearest(name, list(hints))
            raise InputError(f"'{path}' sets the unknown option '{name}'{hint}")
        try:
            values[name] = _decode(value, hints[name])
        except ValueError:
            raise InputError(
                f"'{path}' sets {name} to {reprlib.repr(value)}, "
                f"which must be {expected(hints[name])}"
            ) from None
    return values


def _of_today(name: str, value: Any, hints: Iterable[str]) -> tuple[str, Any]:
    """An option that an earlier version wrote, as it is today."""
    if name == "channels" and "colour" in hints and not isinstance(value, list):
        return "colour", {1: "grey", 3: "rgb"}.get(value)  # it was their number
    if name == "tensorboard" and "trackers" in hints:
        return "trackers", [name] if value else []
    return name, value


def save_config(config: Any, path: Path | str, remarks: Iterable[str] = ()) -> None:
    """Write the dataclass instance `config` as YAML, such that ``--config path`` gives it again.

    The file is replaced whole: a kill leaves the old one or the new one.

    Args:
        remarks: lines of comment at its head.
    """
    values = {name: _encode(getattr(config, name)) for name in field_types(type(config))}
    # escaped to ASCII: PyYAML does not read back every other character that it writes, U+0085 say
    text = yaml.safe_dump(values, sort_keys=False)
    head = ["The options of a run: --config with this file repeats it.", *remarks]
    comments = "".join(f"# {ascii(line)[1:-1].rstrip()}\n" for line in head)
    write_text(Path(path), comments + text)


def keep_config(options: Any, run: Path, remarks: Iterable[str] = ()) -> None:
    """Write the options of a run to its folder; with --resume only where they are other ones.

    A resumed run finds its choices made, and no longer knows the reasons.
    """
    file = run / "config.yaml"
    saved = dataclasses.replace(options, resume=False)
    if options.resume and file.is_file():
        before = load_config(type(options), file)
        if all(before.get(name) == getattr(saved, name) for name in field_types(type(options))):
            return
    save_config(saved, file, remarks)


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


def expected(hint: Any, *, typed: bool = False) -> str:
    """What `_decode` accepts, in words; typed: what a command line takes for it."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        options = (option for option in args if not (typed and option is types.NoneType))
        return " or ".join(expected(option, typed=typed) for option in options)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(str(choice) for choice in args)
    if origin is list or args[1:] == (...,):
        each = "one value or more, each" if typed else "a list with each item"
        return f"{each} {expected(args[0], typed=typed)}"
    if origin is tuple:
        items = list(dict.fromkeys(expected(arg, typed=typed) for arg in args))
        count = f"{len(args)} values" if typed else f"a list of {len(args)}"
        return f"{count}, each {items[0]}" if len(items) == 1 else f"{count}: {', '.join(items)}"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(hint.__members__)
    words = {
        bool: "True or False" if typed else "true or false",
        int: "a whole number",
        float: "a number",
        str: "text" if typed else "text (in quotes, if it looks like something else)",
        Path: "a path",
        types.NoneType: "None (in YAML: null)",
    }
    return words[hint]


def field_types(cls: type) -> dict[str, Any]:
    """Name -> type of the fields that the constructor takes, without Annotated."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def equal(value: Any, other: Any) -> bool:
    """Whether two values of an option are the same, as NaN (--nodata nan) is to itself."""
    return bool(value == other or (value != value and other != other))


def nearest(name: str, valid: list[str]) -> str:
    """The end of a message about the unknown option `name`: which of `valid` was probably meant."""
    match = difflib.get_close_matches(name, valid, n=1)
    return f"; did you mean {match[0]}?" if match else "; --help lists the options"
