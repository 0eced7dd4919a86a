"""One history for sweeps and epochs."""

from __future__ import annotations

import copy

import pytest

from tensortrain.system.history import History


def test_names_that_come_late_or_stay_away_keep_their_places() -> None:
    history = History()
    history.append(loss=3.0)
    history.append(loss=2.0, accuracy=0.5)
    history.append(accuracy=0.75)
    assert (history.loss, history.accuracy) == ([3.0, 2.0, None], [None, 0.5, 0.75])
    assert len(history) == 3


def test_it_survives_a_checkpoint_and_a_copy() -> None:
    history = History()
    history.append(energy=-1.0, ranks=(1, 2, 1))
    history.stop = "eps"
    assert History.from_state(history.to_state()) == history == copy.deepcopy(history)


def test_an_unknown_name_says_what_there_is() -> None:
    history = History({"loss": [1.0]})
    with pytest.raises(AttributeError, match="no 'losses': it holds loss"):
        history.losses  # noqa: B018
