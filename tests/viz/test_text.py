"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from tensortrain.viz.report import text


@pytest.mark.parametrize(
    "words, expected",
    [
        (text.count(1234567), "1,234,567"),
        (text.count(None), "–"),
        (text.compact(999_950), "1M"),
        (text.compact(102_764_544), "103M"),
        (text.compact(0), "0"),
        (text.compact(math.nan), "–"),
        (text.bytes_text(999), "999 B"),
        (text.bytes_text(31_700_000), "31.7 MB"),
        (text.ms_text(0.0123), "12.3 µs"),
        (text.ms_text(12.34), "12.3 ms"),
        (text.ms_text(12_340), "12.3 s"),
        (text.ratio(4.0), "4×"),
        (text.speed_text(2.0), "2× faster"),
        (text.speed_text(0.5), "2× slower"),
        (text.speed_text(1.01), "same speed"),
        (text.speed_text(math.nan), "–"),
        (text.speed_text(3.2, 0.9, 4.0), "no difference seen"),
        (text.speed_text(0.5, 0.4, 1.0), "no difference seen"),
        (text.speed_text(2.0, 1.8, 2.1), "2× faster"),
        (text.speed_text(0.5, 0.4, 0.6), "2× slower"),
        (text.speed_tone(3.2, 0.9, 4.0), ""),
        (text.speed_tone(2.0, 1.8, 2.1), "good"),
        (text.speed_tone(0.5), "bad"),
        (text.between_text(1.8, 2.1), "1.8× to 2.1×"),
        (text.between_text(None, None), "–"),
        (text.metric_change("accuracy", 0.81, 0.82, 0.03), "no difference seen, chance gives ±3.0 points"),
        (text.metric_change("accuracy", 0.81, 0.85, 0.03), "+4.00 points"),
        (text.metric_change("perplexity", 20.0, 20.5, 0.7), "no difference seen, chance gives ±0.7"),
        (text.metric_text("val_accuracy", 0.9268), "92.68 %"),
        (text.metric_text("loss", 0.31), "0.31"),
        (text.metric_text("accuracy", 92.68), "92.68"),
        (text.metric_change("accuracy", 0.9312, 0.9268), "−0.44 points"),
        (text.metric_change("perplexity", 20.0, 21.5), "+1.5"),
        (text.ranks_text((4, 8, 4)), "4·8·4"),
        (text.product(()), "–"),
        (text.shorten("short", 10), "short"),
    ],
)
def test_words(words: str, expected: str) -> None:
    assert words == expected


def test_shorten_keeps_both_ends_and_the_width() -> None:
    short = text.shorten("an_encoder_without_any_dots_in_its_name", 20)
    assert len(short) <= 20
    assert short.startswith("an_enc")
    assert short.endswith("in_its_name")


def test_shortened_names_keep_their_numbers_apart() -> None:
    names = [f"encoder.layer.{k}.attention.output.dense" for k in range(12)]
    short = [text.shorten(name, 30) for name in names]
    assert short[3] == "e.l.3.attention.output.dense"
    assert len(set(short)) == 12
    assert max(map(len, short)) <= 30
    assert text.shorten("fc", 30) == "fc"
    assert len(text.shorten("x" * 50, 30)) <= 30
