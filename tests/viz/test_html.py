"""The page: self-contained, escaped, whole or absent, without empty sections."""

from __future__ import annotations

import dataclasses
import os
import re
from html.parser import HTMLParser

import pytest
from viz_sample import sample_report

from tensortrain.compression.report.report import LayerReport, Report
from tensortrain.viz import write_html
from tensortrain.viz.report.html import report_html

VOID = {"meta", "br", "wbr"}


@pytest.fixture(scope="module")
def page() -> str:
    return report_html(sample_report())


class Balance(HTMLParser):
    """Collects headings, ids and unbalanced tags."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.labels: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        if "id" in values:
            self.ids.append(values["id"] or "")
        if tag == "svg":
            self.labels.append(values.get("aria-label") or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def bare_layer(**changes: object) -> LayerReport:
    layer = LayerReport(name="fc", kind="Linear", shape=(6, 8), params_before=48, params_after=48)
    return dataclasses.replace(layer, **changes)


def parse(page: str) -> Balance:
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_page_is_well_formed_and_ids_are_unique(page: str) -> None:
    found = parse(page)
    assert len(found.ids) == len(set(found.ids))
    targets = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', page)
    assert targets
    assert {a or b for a, b in targets} <= set(found.ids)


def test_page_needs_nothing_from_outside(page: str) -> None:
    assert not re.search(r"https?://|//\w", page)
    assert not {"script", "link", "img", "iframe"} & set(parse(page).tags)
    assert "url(#" in page
    assert "@import" not in page


def test_each_figure_has_words_for_those_who_cannot_see_it(page: str) -> None:
    every = parse(page).labels
    labels = [label for label in every if " of ranks " not in label]
    assert len(every) == len(labels) + len({layer.format for layer in sample_report().layers if layer.spec})
    assert len(labels) == 12
    assert labels[::2] == labels[1::2]  # each is drawn for wide and for narrow screens
    assert all(len(label) > 40 for label in labels)


def test_figures_are_redrawn_for_narrow_screens(page: str) -> None:
    assert page.count("<svg class=wide") == page.count("<svg class=narrow") == 6
    widths = [float(width) for width in re.findall(r'<svg class=narrow[^>]*viewBox="0 0 ([\d.]+)', page)]
    assert len(widths) == 6
    assert all(width < 280 for width in widths)  # points: letters of 9 keep their size on 360 pixels
    assert "overflow-x: auto" not in "".join(re.findall(r"figure[^{}]*{[^}]*}", page))


def test_a_difference_within_the_noise_is_not_claimed() -> None:
    row = dataclasses.replace(sample_report().latency[0], speedup_low=0.8, speedup_high=4.4)
    report = dataclasses.replace(sample_report(), latency=[row], metric_noise=0.02)
    words = re.sub(r"<[^>]+>", " ", report_html(report))
    assert words.count("no difference seen") >= 4  # two tiles, the figure's title twice, the table
    assert "4.23×" not in words
    assert "0.44 points" not in words


def test_headline_numbers(page: str) -> None:
    words = re.sub(r"<[^>]+>", " ", page)
    for expected in ("92.68", "−0.44 points", "4.23×", "1.15× slower", "152,398,312", "7,923,220", "610 MB"):
        assert expected in words


def test_all_sections_stand(page: str) -> None:
    assert headings(page)[5:] == [
        "Accuracy against compression",
        "Parameters by layer",
        "Ranks",
        "What is stored",
        "Singular spectra",
        "Latency",
        "Memory",
        "Healing",
        "Decisions",
        "Notes",
        "Provenance",
    ]


def test_the_largest_layer_of_each_format_is_drawn_with_its_sizes() -> None:
    small = LayerReport(
        name="a", kind="Linear", shape=(12, 20), format="tt", in_modes=(4, 5), out_modes=(3, 4), ranks=(1, 7, 1),
        params_before=240, params_after=175,
    )  # fmt: skip
    large = dataclasses.replace(small, name="b", shape=(12, 35), in_modes=(7, 5), params_before=420, params_after=287)
    page = report_html(minimal(layers=[small, large]))
    (drawing,) = re.findall(r"<svg role.*?</svg>", page, flags=re.DOTALL)
    words = re.findall(r">([^<>\s][^<>]*)</text>", drawing)
    assert {"7", "5", "3", "4"} <= set(words)
    assert any(word.startswith("b, tt: 12·35") for word in words)


def minimal(**changes: object) -> Report:
    required = {"title": "t", "model": "m", "budget": "2x", "params_before": 4, "params_after": 2}
    return Report(**(required | changes))


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, []),
        ({"curve": sample_report().curve[:1]}, ["Metric against compression"]),
        ({"layers": [bare_layer()]}, ["Parameters by layer"]),
        ({"layers": [bare_layer(ranks=(3,))]}, ["Parameters by layer", "Ranks"]),
        ({"layers": [bare_layer(spectra=((1.0, 0.5),))]}, ["Parameters by layer", "Singular spectra"]),
        ({"layers": [bare_layer(decision="why")]}, ["Parameters by layer", "Decisions"]),
        ({"latency": sample_report().latency[:1]}, ["Speed at batch 1", "Latency"]),
        ({"memory": sample_report().memory}, ["Memory"]),
        ({"healing": [{"step": 1, "loss": 1.0}]}, ["Healing"]),
        ({"healing": [{"step": 1, "loss": None}]}, []),
        ({"metric_name": "loss", "metric_after": 0.5}, ["Loss"]),
        ({"metric_name": "loss", "metric_before": 0.5}, []),
        ({"bytes_before": 8}, []),
        ({"notes": ["n"]}, ["Notes"]),
        ({"provenance": {"commit": None}}, []),
        ({"provenance": {"seed": 0}}, ["Provenance"]),
    ],
)
def test_sections_stand_only_where_there_is_data(changes: dict, expected: list[str]) -> None:
    page = report_html(minimal(**changes))
    parse(page)
    assert headings(page) == ["Parameters", *expected]


def test_a_gain_that_is_a_loss_says_so() -> None:
    assert "2× <small>more</small>" in report_html(minimal(params_before=100, params_after=200))


def test_every_text_is_escaped() -> None:
    evil = "<script>alert('&\"')</script>"
    report = sample_report()
    words = {"name": evil, "kind": evil, "format": evil, "implementation": evil, "decision": evil}
    layers = [dataclasses.replace(layer, **words) for layer in report.layers]
    report = dataclasses.replace(
        report,
        title=evil,
        model=evil,
        budget=evil,
        metric_name=evil,
        layers=layers,
        latency=[dataclasses.replace(row, dtype=evil) for row in report.latency],
        curve=[dataclasses.replace(point, label=evil, method=evil) for point in report.curve],
        notes=[evil],
        provenance={evil: evil, "versions": {evil: evil}},
    )
    page = report_html(report)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    parse(page)


def test_dollars_are_no_formulas() -> None:
    assert r"a$\frac$b" in report_html(minimal(layers=[bare_layer(name=r"a$\frac$b")])).partition("</svg>")[0]


def test_page_is_the_same_each_time(page: str) -> None:
    assert report_html(sample_report()) == page


def test_write_is_all_or_nothing(tmp_path, monkeypatch) -> None:
    path = write_html(minimal(), tmp_path / "report.html")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert os.listdir(tmp_path) == ["report.html"]
    path.write_text("old")

    def fail(source: object, target: object) -> None:
        raise OSError("no rename")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no rename"):
        write_html(minimal(), path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]
