"""Command lines: what is typed, what is read from YAML, what is saved, and what is refused."""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pytest
import tyro
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from unet.errors import InputError, RunError
from unet.training.cli import parse, run_script
from unet.training.config_file import load_config, save_config
from unet.training.options import FitOptions

ROOT = Path(__file__).parents[3]


class Target(enum.Enum):
    eps = "noise"
    v = "velocity"


@dataclass(frozen=True, kw_only=True)
class Base:
    out: Path
    """The run folder."""
    seed: int = 0
    """Seed of everything random."""


@dataclass(frozen=True, kw_only=True)
class Options(Base):
    lr: float = 1e-3
    """Peak learning rate."""
    flips: bool = True
    """Flip at random."""
    norm: Literal["batch", "group"] = "batch"
    """Normalisation."""
    target: Target = Target.eps
    """What the network predicts."""
    max_minutes: float | None = None
    """Wall-clock budget."""
    size: tuple[int, int] = (64, 64)
    """Height and width of a crop."""
    multipliers: tuple[int, ...] = (1, 2)
    """Channels of each level, in units of the first."""
    tags: list[str] | None = None
    """Words to remember the run by."""
    prompt: str | None = None
    """A sentence."""
    ends: tuple[Path, Path] | None = None
    """Two images, to make others between them."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise InputError(f"lr={self.lr} must be positive; try 1e-3, or read 'the  paper'")


@dataclass
class Plain:
    what: tyro.conf.Positional[str]
    """What to describe."""
    size: int = 512
    """Height and width."""


options = st.builds(
    Options,
    out=st.text(st.characters(exclude_characters="\0/"), min_size=1).map(Path),
    seed=st.integers(),
    lr=st.floats(min_value=0, exclude_min=True, allow_nan=False),
    flips=st.booleans(),
    norm=st.sampled_from(["batch", "group"]),
    target=st.sampled_from(Target),
    max_minutes=st.none() | st.floats(allow_nan=False),
    size=st.tuples(st.integers(), st.integers()),
    multipliers=st.lists(st.integers(), max_size=4).map(tuple),
    tags=st.none() | st.lists(st.text(), max_size=3),
    prompt=st.none()
    | st.text()
    | st.sampled_from(["None", "null", "no", "1e-3", "- a", "2024-01-01"]),
)


@example(config=Options(out=Path("\x85"), prompt="\u2028\ufeff", tags=[" a\r\n b\t", "\0", "é"]))
@given(config=options)
def test_a_saved_config_repeats_the_run(
    config: Options, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "config.yaml"
    save_config(config, file)
    assert parse(Options, ["--config", str(file)]) == config


@given(config=options)
def test_yaml_and_flags_mean_the_same(config: Options) -> None:
    flags: list[str] = []
    for field in fields(config):
        value, option = getattr(config, field.name), "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(option if value else option.replace("--", "--no-"))
        elif isinstance(value, tuple):
            flags += [option, *map(str, value)]
        elif field.name not in ("tags", "prompt"):  # text may look like an option or like None
            flags.append(f"{option}={value.name if isinstance(value, Target) else value}")
    expected = {**vars(config), "tags": None, "prompt": None}
    assert vars(parse(Options, flags)) == expected


def test_a_file_name_that_is_not_utf8_survives(tmp_path: Path) -> None:
    config = Options(out=Path(os.fsdecode(b"caf\xe9")))
    save_config(config, tmp_path / "config.yaml")
    assert parse(Options, [f"--config={tmp_path / 'config.yaml'}"]) == config


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("out: runs/a\nlr: 1e-4\nmax-minutes: 3\nflips: false\n")
    config = parse(Options, ["--flips", "--config", str(file), "--max_minutes", "7"])
    assert config == Options(out=Path("runs/a"), lr=1e-4, max_minutes=7.0, flips=True)
    assert isinstance(config.max_minutes, float)


def test_the_check_sees_the_flags_not_the_file_alone(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("out: a\nlr: -1.0\n")
    assert parse(Options, ["--config", str(file), "--lr", "2"]).lr == 2
    with pytest.raises(InputError, match=r"^lr=-1.0 must be positive; try 1e-3, or read 'the  pap"):
        parse(Options, ["--config", str(file)])


def test_a_budget_takes_the_place_of_one_in_another_unit(tmp_path: Path) -> None:
    run, other = tmp_path / "config.yaml", tmp_path / "other.yaml"
    save_config(FitOptions(out=tmp_path, steps=5, lr=0.1, seed=3), run)
    other.write_text("max-minutes: 2\n")
    for base in (["--config", str(run)], ["--out", str(tmp_path), "--resume"]):
        found = parse(FitOptions, [*base, "--epochs", "2"])
        assert (found.steps, found.epochs, found.seed) == (None, 2.0, 3)
    found = parse(FitOptions, [*base, "--config", str(other), "--lr", "1"])
    assert (found.steps, found.max_minutes, found.seed, found.lr) == (None, 2.0, 3, 1.0)
    with pytest.raises(InputError, match="--steps and --epochs are both budgets: give one"):
        parse(FitOptions, [*base, "--epochs", "2", "--steps", "3"])


def test_a_plain_dataclass_with_a_positional(tmp_path: Path) -> None:
    assert parse(Plain, ["sd-v1", "--size", "64"]) == Plain("sd-v1", 64)
    save_config(Plain("sd-v1", 64), tmp_path / "config.yaml")
    assert parse(Plain, ["--config", str(tmp_path / "config.yaml")]) == Plain("sd-v1", 64)
    assert parse(Plain, ["paper", "--config", str(tmp_path / "config.yaml")]).what == "paper"


def test_an_unsaveable_option_is_a_bug_and_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    save_config(Plain("a"), file)
    before = file.read_text()
    with pytest.raises(TypeError, match="type object"):
        save_config(Plain("a", object()), file)  # type: ignore[arg-type]  # that is the test
    assert file.read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--out a --sed 1", r"^there is no option --sed; did you mean --seed\?$"),
        ("--ot a", r"^there is no option --ot; did you mean --out\?$"),
        ("--out a --max-minuts=3", r"--max-minuts; did you mean --max-minutes\?$"),
        ("--out a --no-flip", r"--no-flip; did you mean --no-flips\?$"),
        ("--out a --confg x", r"--confg; did you mean --config\?$"),
        ("--out a --max-min 3", r"no option --max-min; did"),
        ("--out a --zzzzz 3", r"^there is no option --zzzzz; --help lists the options$"),
        ("--out a b", r"^'b' after 'a' belongs to no option \(--help lists the options\)$"),
        ("--out a --flips 0.5 --lr 1", r"^'0.5' after '--flips' belongs to no option \(--help"),
        ("--out= --seed 1", r"^--out is empty, perhaps an unset variable: give a value$"),
        ("--seed 1", r"--out"),
        ("--out", r"^--out must be a path, and nothing is given$"),
        ("--out a --seed 1.5", r"^--seed must be a whole number, not '1.5'$"),
        ("--out a --seed=x --lr 1", r"^--seed must be a whole number, not 'x'$"),
        ("--out a --lr fast", r"^--lr must be a number, not 'fast'$"),
        ("--out a --norm layer", r"^--norm must be one of batch, group, not 'layer'$"),
        ("--out a --target x0", r"^--target must be one of eps, v, not 'x0'$"),
        ("--out a --size 1", r"^--size must be 2 values, each a whole number, not '1'$"),
        ("--out a --multipliers 1 b", r"^--multipliers must be one value or more, each a whole"),
        ("--out a --ends x", r"^--ends must be 2 values, each a path, not 'x'$"),
        ("--out a --max-minutes x", r"^--max-minutes must be a number, not 'x'$"),
        ("--out a --lr -1", r"^lr=-1.0 must be positive"),
        ("--out a --config", r"^--config needs a value after it$"),
        ("--config --out a", r"^--config needs a value after it$"),
        ("--config a --config b", r"^--config is given twice"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(argv: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        parse(Options, argv.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("sede: 1", r"sets the unknown option 'sede'; did you mean seed\?$"),
        ("max-minuts: 1", r"unknown option 'max_minuts'; did you mean max_minutes\?$"),
        ("3: 1", r"unknown option '3'"),
        ("seed: '1'", r"sets seed to '1', which must be a whole number$"),
        ("seed: 1.0", r"sets seed to 1.0, which must be a whole number$"),
        ("seed: true", r"sets seed to True, which must be a whole number$"),
        ("seed:", r"sets seed to None, which must be a whole number$"),
        ("lr: fast", r"sets lr to 'fast', which must be a number$"),
        ("lr: true", r"sets lr to True, which must be a number$"),
        ("lr: 1" + "0" * 400, r"sets lr to 1000.*, which must be a number$"),
        ("flips: 1", r"sets flips to 1, which must be true or false$"),
        ("norm: no", r"sets norm to False, which must be one of batch, group$"),
        ("target: noise", r"sets target to 'noise', which must be one of eps, v$"),
        ("size: [1, 2, 3]", r"sets size to .*, which must be a list of 2"),
        ("size: 3", r"sets size to 3, which must be a list of 2"),
        ("multipliers: [1, a]", r"which must be a list with each item a whole number$"),
        ("prompt: 12", r"sets prompt to 12, which must be text .* or None"),
        ("out: ''", r"sets out to '', which must be a path$"),
        ("out: [a", r"is not readable as YAML at line 1$"),
        ("- a", r"must be a list of lines 'option: value'$"),
        ("out: !!python/object/apply:os.system ['true']", r"is not readable as YAML at line 1$"),
        ("seed: !!int x", r"is not readable as YAML$"),
        ("seed: !!timestamp x", r"is not readable as YAML$"),
        ("seed: !!bool x", r"is not readable as YAML$"),
        ("seed: 2024-99-99", r"is not readable as YAML$"),
        ("out: \0", r"is not readable as YAML"),
        ("[" * 5000, r"is nested too deeply$"),
        ("#" * 65_537, r"is larger than 65536 bytes"),
    ],
    ids=lambda text: text[:24],
)
def test_a_mistake_in_the_file_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "my config.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=sentence) as caught:
        parse(Options, ["--out", "a", "--config", str(file)])
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(file))


@given(
    text=st.binary()
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(st.sampled_from(list(vars(Options(out=Path("a"))))), inner)
        ),
    ).map(lambda value: yaml.safe_dump(value).encode())
)
def test_any_file_is_read_or_refused(text: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(text)
    with contextlib.suppress(InputError):
        assert set(load_config(Options, file)) <= {field.name for field in fields(Options)}


def test_a_file_that_is_not_there_or_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^there is no config file '.*gone.yaml'$"):
        parse(Options, ["--config", str(tmp_path / "gone.yaml")])
    with pytest.raises(InputError, match=r"^cannot read the config file '.*': "):
        parse(Options, ["--config", str(tmp_path)])


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    argv = ["--out", "a", "--config", str(tmp_path / "empty.yaml")]
    assert parse(Options, argv) == Options(out=Path("a"))


def raising(error: BaseException) -> Any:
    def run(config: Plain) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (InputError("a.png has\n3 channels"), 2, "error: a.png has 3 channels\n"),
        (RunError("the loss is NaN"), 1, "error: the loss is NaN\n"),
        (
            PermissionError(errno.EACCES, "Permission denied", "runs/x"),
            2,
            "error: cannot use 'runs/x': Permission denied\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            2,
            "error: No space left on device; free some space or choose a folder on another disk\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
    ids=["input", "run", "permission", "disk", "interrupt"],
)
def test_what_the_user_can_mend_has_no_traceback(
    error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(raising(error), Plain, ["a"]) == status
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("error", [ValueError("bug"), OSError("broken image"), BrokenPipeError()])
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        run_script(raising(error), Plain, ["a"])


def test_the_status_of_a_script_is_what_it_returns() -> None:
    assert run_script(lambda config: None, Plain, ["a"]) == 0
    assert run_script(lambda config: config.size, Plain, ["a", "--size", "1"]) == 1


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A script as one would write it."""
    file = tmp_path / "train.py"
    file.write_text(
        textwrap.dedent('''
        """Train on FOLDERS of images."""
        from __future__ import annotations
        import sys
        from dataclasses import dataclass
        from pathlib import Path
        from unet.training.cli import run_script
        from unet.training.config_file import save_config

        @dataclass(frozen=True, kw_only=True)
        class Options:
            out: Path
            """The run folder of this very run."""
            flips: bool = True
            """Flip at random."""
            lines: int = 1
            """How much to say."""

        def main(options: Options) -> None:
            save_config(options, options.out / "config.yaml")
            for _ in range(options.lines):
                print(options)

        if __name__ == "__main__":
            status = run_script(main, Options, description=__doc__)
            assert "torch" not in sys.modules
            sys.exit(status)
        ''')
    )
    return file


def start(script: Path, *argv: str, **more: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    return subprocess.run(
        [sys.executable, str(script), *argv], capture_output=True, text=True, env=environment
    )


def test_help_is_quick_and_complete(script: Path) -> None:
    code = (
        f"import runpy, sys\nsys.argv = [{str(script)!r}, '--help']\n"
        f"try:\n    runpy.run_path({str(script)!r}, run_name='__main__')\n"
        "finally:\n    assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    for text in ["FOLDERS", "--config FILE.yaml", "this very run", "(required)", "--no-flips"]:
        assert text in done.stdout


def test_a_run_is_repeated_from_its_folder(script: Path, tmp_path: Path) -> None:
    first = start(script, "--out", str(tmp_path / "run"), "--no-flips")
    again = start(script, "--config", str(tmp_path / "run/config.yaml"))
    assert (first.returncode, first.stderr) == (again.returncode, again.stderr) == (0, "")
    assert first.stdout == again.stdout
    assert "flips=False" in first.stdout


def test_a_mistake_ends_with_status_2_and_one_line(script: Path, tmp_path: Path) -> None:
    unknown = start(script, "--uot", "a", COLUMNS="20")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr == "error: there is no option --uot; did you mean --out?\n"

    (tmp_path / "file").touch()
    refused = start(script, "--out", str(tmp_path / "file" / "run"))
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: cannot use '")
    assert refused.stderr.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="pipes end differently elsewhere")
def test_a_reader_that_goes_away_is_no_error(script: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(script), "--out", str(tmp_path), "--lines", "20000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
