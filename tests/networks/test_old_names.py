"""The example networks answer under their old names for one more version, and say where they are."""

from __future__ import annotations

import importlib
import sys
import warnings

import pytest

import tensortrain as tt
from tensortrain import networks


@pytest.mark.parametrize("name", networks.__all__)
def test_old_names_answer_with_a_warning(name: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"tensortrain\.models\.{name} has moved to tensortrain\.networks"):
        found = getattr(tt.models, name)
    assert found is getattr(networks, name)


def test_old_imports_too() -> None:
    with pytest.warns(DeprecationWarning, match="has moved"):
        from tensortrain.models import MLP
    assert MLP is tt.networks.MLP


@pytest.mark.parametrize("name", ["registry", "mlp", "conv_fc"])
def test_old_modules_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, f"tensortrain.models.{name}", raising=False)
    new = importlib.import_module(f"tensortrain.networks.{name}")
    with pytest.warns(DeprecationWarning, match="has moved"):
        old = importlib.import_module(f"tensortrain.models.{name}")
    names = [public for public in vars(new) if not public.startswith("_")]
    assert all(getattr(old, public) is getattr(new, public) for public in names)


def test_new_names_are_silent_and_unknown_ones_unknown() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tt.networks.build("mlp", hidden=(4,)).config["hidden"] == [4]
    with pytest.raises(AttributeError, match="no 'Perceptron'"):
        _ = tt.models.Perceptron
