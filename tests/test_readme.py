"""The code in README.md and docs/ runs and prints what the page says.

The Python blocks of a page are one program, run from top to bottom. Three things are checked against what
they print: a comment after a ``print(...)`` call, a ``text`` block straight after a Python block, and the
links and commands of the page against the repository. ``<!-- needs: package -->`` before a Python block
leaves the page there where the package is missing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tensortrain.contract import CostModel, use_cost_model

_ROOT = Path(__file__).parents[1]
_PAGES = [_ROOT / "README.md", _ROOT / "CONTRIBUTING.md", *sorted((_ROOT / "docs").glob("*.md"))]
_NAMES = [str(page.relative_to(_ROOT)) for page in _PAGES]

_BLOCK = re.compile(
    r"(?:<!-- needs: (?P<needs>[\w, ]+) -->\n)?^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<text>.*?)^```)?",
    re.DOTALL | re.MULTILINE,
)
_PRINTED = re.compile(r"^ *print\(.*\)  # (?P<text>.+)$", re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?:)(?P<path>[^)#\s]*)(?:#(?P<heading>[^)\s]*))?\)")
_MAKE = re.compile(r"\bmake ([a-z][a-z-]+)\b")
_SHELL = re.compile(r"^```(?:sh|bash|console)\n(.*?)^```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    code: str
    printed: tuple[str, ...]
    needs: tuple[str, ...]


def _blocks(page: Path) -> Iterator[Block]:
    for found in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        printed = [match["text"] for match in _PRINTED.finditer(found["code"])]
        needs = tuple(name.strip() for name in (found["needs"] or "").split(",") if name.strip())
        yield Block(found["code"], (*printed, *(found["text"] or "").splitlines()), needs)


@pytest.mark.parametrize("page", _PAGES, ids=_NAMES)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    with use_cost_model(CostModel.reference("cpu")):  # so that plans do not hang on the machine
        for k, block in enumerate(_blocks(page)):
            missing = [name for name in block.needs if importlib.util.find_spec(name) is None]
            if missing:
                pytest.skip(f"block {k} needs {', '.join(missing)}")
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(block.code, f"{page.name}, block {k}", "exec"), namespace)
            _check_printed(block, output.getvalue())


def _check_printed(block: Block, output: str) -> None:
    """The announced lines appear in the output, in this order."""
    lines = iter([line.rstrip() for line in output.splitlines()])
    for expected in block.printed:
        assert any(line == expected.rstrip() for line in lines), f"{expected!r} is not in order in:\n{output}"


@pytest.mark.parametrize("page", _PAGES, ids=_NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    for found in _LINK.finditer(page.read_text(encoding="utf-8")):
        target = page.parent / found["path"] if found["path"] else page
        assert target.exists(), f"{page.name} links to {found['path']}"
        if found["heading"]:
            assert found["heading"] in _anchors(target), f"{page.name} links to {found[0]}"


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", _PAGES, ids=_NAMES)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (_ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    commands = "\n".join([*_SHELL.findall(text), *re.findall(r"`(make [^`]+)`", text)])
    assert set(_MAKE.findall(commands)) <= targets


@pytest.mark.parametrize("page", _PAGES, ids=_NAMES)
def test_commands_and_options_exist(page: Path) -> None:
    from typer.main import get_command

    from tensortrain.cli.app import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    for line in "\n".join(_SHELL.findall(page.read_text(encoding="utf-8"))).splitlines():
        words = line.partition("#")[0].split()
        if words[:1] == ["tensortrain"]:
            known = {option for parameter in commands[words[1]].params for option in parameter.opts} | {"--help"}
            assert {word for word in words if word.startswith("--")} <= known, line


def test_every_page_is_on_the_map() -> None:
    index = (_ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    missing = [page.name for page in _PAGES if page.parent.name == "docs" and f"({page.name})" not in index]
    assert missing == []
