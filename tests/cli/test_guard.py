"""No input, terminal or signal gets a traceback out of the command line."""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fresh
import pytest
import typer

from tensortrain import _command
from tensortrain.cli import guard
from tensortrain.cli.app import run
from tensortrain.errors import ShapeError

Captured = pytest.CaptureFixture[str]

# Values that were meant as something else, or as an attack.
ODD = (
    "", " ", "-1", "0", "1e5", "nan", "inf", "٣", "9" * 20, "9" * 5000, "0x10", "1,,2", "x", "x".join("1" * 300),
    "日本", "\udcff", "a\x00b", "\x1b[31m", "a\nb", "..", "/", "/dev/null", "/no/such", "n" * 300, "*", "[", "torch:",
    "os:getcwd", "json:loads", "torch.nn:Linear", "math:pi", "--json", "--", "-", "=", "params=", "flops=x",
    "params=" + "9" * 5000, "{}",
)  # fmt: skip
OPTIONS = {
    "inspect": ("--weights", "--shape", "--seed", "--json", "--nonsense"),
    "bench": ("--weights", "--shape", "--batch", "--repeats", "--seed"),
    "evaluate": ("--weights", "--data", "--dataset", "--tokenizer", "--limit", "--seed"),
    "compress": (
        "--weights",
        "--data",
        "--dataset",
        "--epochs",
        "--steps",
        "--lr",
        "--formats",
        "--include",
        "--shape",
    ),
    "demo": ("--data", "--dataset", "--seed"),
}


def odd_line(draw: random.Random, folder: Path) -> list[str]:
    """A command with one to three odd words; one that would do long work has a budget that stops it."""
    name = draw.choice(list(OPTIONS))
    line = [name] if name == "demo" else [name, draw.choice(("mlp", "mlp", draw.choice(ODD)))]
    for option in draw.sample(OPTIONS[name], k=draw.randint(1, 3)):
        line += [option, draw.choice(ODD)]
    if name in ("compress", "demo"):
        line += ["--budget", draw.choice([word for word in ODD if "params" not in word]), "--out", str(folder / "out")]
    return [*line, "--dataset", "digits"] if name in ("evaluate", "compress", "demo") else line


@pytest.mark.parametrize("seed", range(60))
def test_odd_arguments_end_in_one_line(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    line = odd_line(random.Random(seed), tmp_path)
    code = run(line)
    captured = capsys.readouterr()
    assert code in (0, 2), line
    assert "Traceback" not in captured.out + captured.err
    if code == 2:
        *_, last = captured.err.splitlines()
        assert last.startswith("error: "), line
        assert last.isprintable()
        assert len(last) < 1100
        assert "cannot go on" not in last, line  # each of these is foreseen


@pytest.mark.parametrize(
    "line, words",
    [
        (["bench", "mlp", "--shape", "9" * 14], "half of the memory"),
        (["bench", "mlp", "--batch", "9" * 12], "half of the memory"),
        (["bench", "mlp", "--batch", "9" * 30], "batch sizes must be"),
        (["inspect", "mlp", "--shape", "9" * 30], "a shape must be"),
        (["inspect", "mlp", "--seed", "1" + "0" * 20], "--seed"),
        (["inspect", "sys:exit"], "must run without arguments"),
    ],
)
def test_sizes_nobody_can_hold(line: list[str], words: str, capsys: Captured) -> None:
    assert run(line) == 2
    assert words in capsys.readouterr().err


# -- errors on their way out -------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    "error, code, words",
    [
        (ShapeError("sizes\n must\tfit"), 2, "error: sizes must fit"),
        (FileNotFoundError(2, "No such file", "a\x1bb"), 2, "error: No such file: a\\x1bb"),
        (OSError("odd"), 2, "odd"),
        (MemoryError(), 2, "memory enough"),
        (RuntimeError("can't allocate memory: you tried to allocate 12 bytes."), 2, "12 bytes"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), 2, "TENSORTRAIN_TRACEBACK=1"),
        (OSError(28, "No space left on device"), 2, "error: No space left on device"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 2, "error: No space left on device"),
        (RecursionError("deep"), 2, "RecursionError: deep"),
        (ZeroDivisionError(), 2, "ZeroDivisionError"),
        (typer.BadParameter("no"), 2, "error: Invalid value: no"),
        (typer.Abort(), 2, "input ended"),
        (SystemExit("bye"), 2, "error: bye"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_each_error_is_one_line(error: BaseException, code: int, words: str, capsys: Captured) -> None:
    assert guard.guarded(raising(error)) == code
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("given, code", [(None, 0), (1, 1), ("text", 0)])
def test_codes_are_passed_on(given: object, code: int) -> None:
    assert guard.guarded(lambda: given) == code
    assert guard.guarded(raising(SystemExit(code))) == code


def test_traceback_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORTRAIN_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        guard.guarded(raising(ZeroDivisionError()))


def test_an_interrupt_that_became_another_error_is_an_interrupt(capsys: Captured) -> None:
    def command() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise ImportError("as extension modules do") from error

    outer = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start its jobs deaf to interrupts
    try:
        before = signal.getsignal(signal.SIGINT)
        assert guard.guarded(command) == 130
        assert capsys.readouterr().err == "interrupted\n"
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, outer)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "utf-16"])
def test_any_text_can_be_written_in_any_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    guard.ready_streams()
    print("1 → 2 × 3 · µ – ━ … 日 \udcff", flush=True)
    written = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert "\\udcff" in written
    if encoding == "ascii":
        assert written == "1 -> 2 x 3 . u - - ... \\u65e5 \\udcff\n"


@pytest.mark.parametrize("width", ["abc", "1", "0", "-5", "99999999999", "٣", ""])
def test_widths_that_are_none_are_forgotten(width: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    guard.ready_streams()
    assert "COLUMNS" not in os.environ
    assert os.environ["TERMINAL_WIDTH"] == "80"


@pytest.mark.parametrize(
    "arguments, given, is_command",
    [
        (["/bin/tensortrain", "x"], ["python", "/bin/tensortrain", "x"], True),
        (["-m", "x"], ["python", "-m", "tensortrain", "x"], True),
        (["/site/tensortrain/__main__.py"], ["python", "-m", "tensortrain"], True),
        (["-m"], ["python", "-m", "pytest", "tensortrain"], False),
        (["train.py"], ["python", "train.py"], False),
        ([""], ["python"], False),
        ([], [], False),
    ],
)
def test_which_process_is_the_command(
    arguments: list[str], given: list[str], is_command: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(sys, "orig_argv", given)
    assert _command.is_command() is is_command


# -- whole processes ---------------------------------------------------------------------------------

COMMAND = f"{sys.executable} -m tensortrain"
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs a shell")


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    paths = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        ["sh", "-c", line], capture_output=True, env={**os.environ, "PYTHONPATH": paths, **environment}, check=False
    )


@POSIX
@pytest.mark.parametrize(
    "line, environment, codes",
    [
        (f"{COMMAND} inspect conv-fc", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {0}),
        (f"{COMMAND} inspect conv-fc --json | head -c 5", {"COLUMNS": "abc", "TERM": "dumb"}, {0}),
        (f"{COMMAND} inspect mlp <&- >&- 2>&-", {}, {0}),
        (f"{COMMAND} inspect nope --json 2>&-", {"PYTHONIOENCODING": "latin-1"}, {2}),
        (f"{COMMAND} inspect mlp >/dev/full", {"HOME": "/no/such"}, {2}),
    ],
)
def test_streams_of_every_kind(line: str, environment: dict[str, str], codes: set[int]) -> None:
    if "/dev/full" in line and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    done = shell(line, **environment)
    assert b"Traceback" not in done.stderr
    assert b"Exception" not in done.stderr
    assert done.returncode in codes


@POSIX
@pytest.mark.parametrize("delay_s", [0.6, 1.7])
def test_interrupt_while_it_is_imported_or_at_work(delay_s: float, tmp_path: Path) -> None:
    said = tmp_path / "said"
    # Not all Pythons here take SIGINT: a shell that runs tests in the background makes its children ignore it.
    program = "import signal, sys, runpy; signal.signal(signal.SIGINT, signal.default_int_handler);"
    program += "sys.argv[0] = 'tensortrain'; import tensortrain; from tensortrain.cli import main;"
    program += "print('ready', file=sys.stderr, flush=True); main()"
    process = fresh.start(program, "bench", "mlp", "--batch", "1", "--repeats", "1000000", stderr=said)
    while not (said.exists() and said.read_bytes()) and process.is_alive():
        time.sleep(0.01)
    time.sleep(delay_s)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join()
    error = said.read_bytes()
    assert process.exitcode == 130
    assert b"Traceback" not in error
    assert error.splitlines()[-1] == b"interrupted"
