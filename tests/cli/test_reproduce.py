"""``tensortrain reproduce``: every card leads to a script, a config and figures of a record; runs end in one."""

import json
from pathlib import Path

import pytest

from tensortrain.cli import reproduce as module
from tensortrain.cli.app import run
from tensortrain.cli.catalogue import MISSING, Card, Figure, find_cards

CARDS = find_cards()
SCRIPT = """
import argparse, json, sys
from pathlib import Path
parser = argparse.ArgumentParser()
for name in ("out", "config", "record", "data", "mode"):
    parser.add_argument("--" + name)
given = parser.parse_args()
config = json.loads(Path(given.config).read_text())
print("working")
if config.get("broken"):
    sys.exit("the disk is full")
runs = [{"seed": seed, "share": 0.5 + seed / 100} for seed in config["seeds"]]
Path(given.record, "results.json").write_text(json.dumps({"runs": runs, "mode": given.mode}))
"""
ABOUT = {
    "name": "toy",
    "system": "toys",
    "question": "Does it run?",
    "published": "50 % (a book)",
    "figures": [{"name": "share", "at": ["runs", "*", "share"], "unit": "%"}],
    "minutes": 5,
    "quick_minutes": 0.1,
    "quick": {"seeds": [0], "extra": None},
    "arguments": ["--mode", "all"],
    "quick_arguments": ["--mode", "some"],
}


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "experiments" / "toy"
    folder.mkdir(parents=True)
    (folder / "run.py").write_text(SCRIPT)
    (folder / "config.json").write_text(json.dumps({"seeds": [0, 1, 2], "extra": 1}))
    (folder / "results.json").write_text(json.dumps({"runs": [{"share": 0.25}]}))
    (folder / "about.json").write_text(json.dumps([ABOUT]))
    monkeypatch.setattr(module, "find_cards", lambda: find_cards(folder.parent))
    return folder


@pytest.mark.parametrize("card", CARDS.values(), ids=list(CARDS))
def test_every_card_leads_to_its_script_its_config_and_its_figures(card: Card) -> None:
    assert (card.folder / card.script).is_file()
    assert 0 < card.quick_minutes < card.minutes
    if card.config:
        config = json.loads((card.folder / card.config).read_text(encoding="utf-8"))
        assert card.part is None or card.part in config
        assert module._merged(config, {card.part: card.quick} if card.part else card.quick) != config or (
            card.quick_arguments
        )
    assert card.figures
    for figure in card.figures:
        assert figure.text(card.recorded()) != MISSING, figure.name


def test_a_run_writes_its_record_and_shows_it_beside_ours(
    toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    assert run(["reproduce", "toy", "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/toy/results.json").read_text())["mode"] == "all"
    out, err = capfd.readouterr()
    assert "25.00 %" in out
    assert "51.00 ± 1.00 %" in out
    assert "published: 50 % (a book)" in out
    assert "working" in err


def test_quick_runs_change_config_and_arguments(toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert run(["reproduce", "toy", "--quick", "--json", "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/toy-quick/config.json").read_text()) == {"seeds": [0]}
    assert json.loads((tmp_path / "out/toy-quick/results.json").read_text())["mode"] == "some"
    (told,) = json.loads(capfd.readouterr().out)
    assert told["figures"] == [{"name": "share", "recorded": "25.00 %", "now": "50.00 %"}]


def test_one_seed_in_place_of_all(toy: Path, tmp_path: Path) -> None:
    assert run(["reproduce", "toy", "--seed", "7", "--out", str(tmp_path / "out")]) == 0
    assert [one["seed"] for one in json.loads((tmp_path / "out/toy/results.json").read_text())["runs"]] == [7]


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"a": {"seeds": [0, 1]}, "b": {"seeds": [2]}}, {"a": {"seeds": [5]}, "b": {"seeds": [5]}}),
        ({"seed": 3, "rates": {"lr": 1}}, {"seed": 5, "rates": {"lr": 1}}),
        ({"lr": 1}, {"lr": 1, "seeds": [5]}),
    ],
)
def test_where_seeds_stand_in_a_config(config: dict, expected: dict) -> None:
    module._with_seed(config, 5)
    assert config == expected


def test_the_projects_record_is_replaced_only_when_asked(toy: Path, tmp_path: Path) -> None:
    assert run(["reproduce", "toy", "--record", "--out", str(tmp_path / "out")]) == 0
    assert len(json.loads((toy / "results.json").read_text())["runs"]) == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["toys"], "one of toy"),
        (["toy", "--record", "--quick"], "leave out --quick"),
        (["toy", "--data", "."], "leave out --data"),
    ],
)
def test_what_cannot_be_run_is_one_line(
    toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    assert run(["reproduce", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_told_before_anything_runs(
    toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    (toy / "about.json").write_text(json.dumps([ABOUT | {"needs": {"no_such_package": "no-such-package"}}]))
    assert run(["reproduce", "toy", "--out", str(tmp_path / "out")]) == 2
    assert "pip install no-such-package" in capfd.readouterr().err


def test_a_script_that_fails_is_an_error_with_its_last_words(
    toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    (toy / "config.json").write_text(json.dumps({"seeds": [0], "broken": True}))
    assert run(["reproduce", "toy", "--out", str(tmp_path / "out")]) == 2
    assert "the disk is full" in capfd.readouterr().err.splitlines()[-1]


def test_the_list_shows_what_was_published_and_what_is_recorded(toy: Path, capfd: pytest.CaptureFixture) -> None:
    assert run(["reproduce", "--list"]) == 0
    out = capfd.readouterr().out
    assert "toy (toys; 5 min, quick 0.1 min)" in out
    assert "share 25.00 %" in out
    assert run(["reproduce", "--list", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)[0]["published"] == "50 % (a book)"


@pytest.mark.parametrize(
    "at, text",
    [
        (["rows", {"net": "a"}, "accuracy_mean"], "0.9 ± 0.1"),
        (["rows", {"net": "b"}, "accuracy_mean"], MISSING),
        (["runs", "*", "loss", -1], "2 ± 1.4"),
        (["rows", 0, "n_mean"], "3"),
        (["nothing"], MISSING),
        (["rows", 0, "net"], MISSING),
    ],
)
def test_figures_are_read_from_any_record(at: list, text: str) -> None:
    found = {
        "rows": [{"net": "a", "accuracy_mean": 0.9, "accuracy_std": 0.1, "n_mean": 3, "n_std": 0.0}],
        "runs": [{"loss": [3, 1]}, {"loss": [5, 3]}],
    }
    assert Figure("a figure", at).text(found) == text


def test_a_real_one_runs(tmp_path: Path) -> None:
    assert run(["reproduce", "bars-and-stripes", "--quick", "--seed", "3", "--out", str(tmp_path)]) == 0
    (found,) = json.loads((tmp_path / "bars-and-stripes-quick/results.json").read_text())["runs"]["patterns"]
    assert abs(found["above_ln_30"][-1]) < 1e-4
