"""Bad input gets one clear error of ours, which is also the built-in that a caller would catch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tensortrain as tt
from tensortrain.errors import DTypeError, KindError, ModeIndexError, NonFiniteError, RankError, ShapeError, TTError

Linear, Conv1d, Conv2d, Conv3d, Embedding = tt.nn.Linear, tt.nn.Conv1d, tt.nn.Conv2d, tt.nn.Conv3d, tt.nn.Embedding


def broken(layer: Any, value: float = float("nan")) -> Any:
    with torch.no_grad():
        layer.weight.flatten()[3] = value
    return layer


CASES: dict[str, tuple[Callable[[], Any], type[TTError], type[Exception], str]] = {
    # formats
    "unknown format": (lambda: Linear(12, 20, format="nonesuch"), ShapeError, ValueError, "'nonesuch'.*low_rank.*tt"),
    "a format that is no name": (lambda: Linear(12, 20, format=["tt"]), ShapeError, ValueError, "registered"),
    "tucker2 for a linear": (lambda: Linear(12, 20, format="tucker2"), ShapeError, ValueError, "kind of layer"),
    "tt_naive for an embedding": (lambda: Embedding(12, 20, format="tt_naive"), ShapeError, ValueError, "kind"),
    "unknown format, from_dense": (
        lambda: Linear.from_dense(nn.Linear(4, 4), format="x"),
        ShapeError,
        ValueError,
        "'x'",
    ),
    # modes
    "in_modes do not multiply": (lambda: Linear(12, 20, in_modes=(3, 5)), ShapeError, ValueError, "in_modes.*12"),
    "out_modes do not multiply": (lambda: Linear(12, 20, out_modes=(3, 5)), ShapeError, ValueError, "out_modes.*20"),
    "modes do not pair up": (
        lambda: Linear(12, 20, in_modes=(3, 4), out_modes=(20,)),
        ShapeError,
        ValueError,
        "pair up.*2 and 1",
    ),
    "negative modes": (lambda: Linear(12, 20, in_modes=(-3, -4)), ShapeError, ValueError, "positive"),
    "no modes": (lambda: Linear(12, 20, in_modes=()), ShapeError, ValueError, "in_modes"),
    "modes of a channel": (lambda: Conv2d(12, 20, 3, in_modes=(5, 2)), ShapeError, ValueError, "in_modes.*12"),
    "modes of one group": (lambda: Conv2d(12, 20, 3, groups=2, in_modes=(4, 3)), ShapeError, ValueError, "6"),
    "vocabulary below": (
        lambda: Embedding(50, 8, in_modes=(7, 7), out_modes=(4, 2)),
        ShapeError,
        ValueError,
        "at least 50",
    ),
    "low_rank modes": (lambda: Linear(12, 20, format="low_rank", in_modes=(3, 5)), ShapeError, ValueError, "in_modes"),
    "tucker2 modes": (lambda: Conv2d(12, 20, 3, format="tucker2", out_modes=(3,)), ShapeError, ValueError, "out_modes"),
    "no inputs": (lambda: Linear(0, 20), ShapeError, ValueError, "at least 1"),
    "negative outputs": (lambda: Linear(12, -20), ShapeError, ValueError, "at least 1"),
    # ranks
    "rank 0": (lambda: Linear(12, 20, rank=0), RankError, ValueError, "at least 1"),
    "rank negative": (lambda: Linear(12, 20, rank=-2), RankError, ValueError, "at least 1"),
    "rank 1.5": (lambda: Linear(12, 20, rank=1.5), RankError, ValueError, r"\(0, 1\]"),
    "rank NaN": (lambda: Linear(12, 20, rank=float("nan")), RankError, ValueError, r"\(0, 1\]"),
    "rank all": (lambda: Linear(12, 20, rank="all"), RankError, ValueError, "'all'.*same"),
    "rank None": (lambda: Linear(12, 20, rank=None), RankError, ValueError, "None"),
    "rank True": (lambda: Linear(12, 20, rank=True), RankError, ValueError, "True"),
    "rank tuple too long": (lambda: Linear(12, 20, rank=(1, 2, 3, 4, 5, 1)), RankError, ValueError, "entries"),
    "rank tuple, ends": (lambda: Linear(12, 20, rank=(2, 3, 1)), RankError, ValueError, "boundary"),
    "rank tuple with 0": (lambda: Linear(12, 20, rank=(1, 0, 1)), RankError, ValueError, "at least 1"),
    "rank tuple with 1.5": (lambda: Linear(12, 20, rank=(1, 1.5, 1)), RankError, ValueError, "whole number"),
    "tucker2 rank 0": (lambda: Conv2d(4, 6, 3, format="tucker2", rank=0), RankError, ValueError, "at least 1"),
    "tucker2 rank 1.5": (lambda: Conv2d(4, 6, 3, format="tucker2", rank=1.5), RankError, ValueError, "share"),
    "tucker2 rank full": (lambda: Conv2d(4, 6, 3, format="tucker2", rank="all"), RankError, ValueError, "'all'"),
    "tucker2 rank None": (lambda: Conv2d(4, 6, 3, format="tucker2", rank=None), RankError, ValueError, "None"),
    "tucker2 three ranks": (lambda: Conv2d(4, 6, 3, format="tucker2", rank=(1, 2, 1)), RankError, ValueError, "two"),
    "tucker2 ranks of 1.5": (lambda: Conv2d(4, 6, 3, format="tucker2", rank=(1.5, 2)), RankError, ValueError, "two"),
    "low_rank rank 0": (lambda: Linear(12, 20, format="low_rank", rank=0), RankError, ValueError, "at least 1"),
    "from_dense, rank 0": (lambda: Linear.from_dense(nn.Linear(4, 4), rank=0), RankError, ValueError, "at least 1"),
    "eps above 1": (lambda: Linear.from_dense(nn.Linear(4, 4), eps=1.5), RankError, ValueError, r"\[0, 1\)"),
    "eps negative": (lambda: Linear.from_dense(nn.Linear(4, 4), eps=-0.1), RankError, ValueError, r"\[0, 1\)"),
    "eps NaN, tucker2": (
        lambda: Conv2d.from_dense(nn.Conv2d(4, 4, 3), format="tucker2", eps=float("nan")),
        RankError,
        ValueError,
        r"\[0, 1\)",
    ),
    # layer options
    "implementation": (lambda: Linear(12, 20, implementation="fast"), ShapeError, ValueError, "'fast'"),
    "init": (lambda: Linear(12, 20, init="orthogonal"), ShapeError, ValueError, "'orthogonal'"),
    "init NaN": (lambda: Linear(12, 20, init=float("nan")), ShapeError, ValueError, "nan"),
    "init negative": (lambda: Linear(12, 20, init=-1.0), ShapeError, ValueError, "-1.0"),
    "padding in words": (lambda: Conv2d(4, 6, 3, padding="full"), ShapeError, ValueError, "'full'.*Pass one"),
    "padding per axis": (lambda: Conv2d(4, 6, 3, padding=(1, 1, 1)), ShapeError, ValueError, "padding.*2"),
    "padding negative": (lambda: Conv2d(4, 6, 3, padding=-1), ShapeError, ValueError, "padding.*at least 0"),
    "padding 1.5": (lambda: Conv2d(4, 6, 3, padding=1.5), ShapeError, ValueError, "padding.*1.5"),
    "padding same with stride": (lambda: Conv2d(4, 6, 3, 2, "same"), ShapeError, ValueError, "stride 1"),
    "padding_mode": (lambda: Conv2d(4, 6, 3, padding_mode="mirror"), ShapeError, ValueError, "'mirror'"),
    "stride 0": (lambda: Conv1d(4, 6, 3, stride=0), ShapeError, ValueError, "stride.*at least 1"),
    "dilation 0": (lambda: Conv3d(4, 6, 3, dilation=0), ShapeError, ValueError, "dilation.*at least 1"),
    "kernel 0": (lambda: Conv2d(4, 6, (3, 0)), ShapeError, ValueError, "kernel_size.*at least 1"),
    "kernel per axis": (lambda: Conv2d(4, 6, (3, 3, 3)), ShapeError, ValueError, "kernel_size"),
    "groups": (lambda: Conv2d(4, 6, 3, groups=4), ShapeError, ValueError, "groups"),
    "groups 0": (lambda: Conv2d(4, 6, 3, groups=0), ShapeError, ValueError, "groups"),
    "padding_idx": (lambda: Embedding(50, 8, padding_idx=50), ShapeError, ValueError, "padding_idx"),
    # input
    "input size": (lambda: Linear(12, 20)(torch.randn(3, 13)), ShapeError, ValueError, r"\(3, 13\).*12"),
    "input without axes": (lambda: Linear(12, 20)(torch.tensor(1.0)), ShapeError, ValueError, "12"),
    "input channels": (lambda: Conv2d(4, 6, 3)(torch.randn(2, 5, 8, 8)), ShapeError, ValueError, "C = 4"),
    "input axes": (lambda: Conv2d(4, 6, 3)(torch.randn(4, 8)), ShapeError, ValueError, r"\(4, 8\)"),
    "an id past the end": (lambda: Embedding(50, 8)(torch.tensor([50])), ModeIndexError, IndexError, "0 to 49"),
    "a negative id": (lambda: Embedding(50, 8)(torch.tensor([-1])), ModeIndexError, IndexError, "-1"),
    "ids that are no integers": (lambda: Embedding(50, 8)(torch.randn(3)), DTypeError, TypeError, "float64"),
    "ids that are flags": (lambda: Embedding(50, 8)(torch.tensor([True])), DTypeError, TypeError, "bool"),
    # weights
    "NaN weight": (lambda: Linear.from_dense(broken(nn.Linear(4, 4))), NonFiniteError, ValueError, "1 NaN or Inf"),
    "Inf weight": (
        lambda: Conv2d.from_dense(broken(nn.Conv2d(4, 4, 3), float("inf")), format="tucker2"),
        NonFiniteError,
        ValueError,
        "1 NaN or Inf",
    ),
    "NaN table": (lambda: Embedding.from_dense(broken(nn.Embedding(9, 4))), NonFiniteError, ValueError, "36"),
    "NaN gram": (
        lambda: Linear.from_dense(nn.Linear(4, 4), rank=2, input_gram=torch.full((4, 4), float("nan"))),
        NonFiniteError,
        ValueError,
        "second moment",
    ),
    "gram of another size": (
        lambda: Linear.from_dense(nn.Linear(4, 4), rank=2, input_gram=torch.eye(5)),
        ShapeError,
        ValueError,
        "N = 4",
    ),
    "gram of a complex weight": (
        lambda: Linear.from_dense(nn.Linear(4, 4, dtype=torch.complex128), rank=2, input_gram=torch.eye(4)),
        DTypeError,
        TypeError,
        "complex128",
    ),
    "another layer": (lambda: Linear.from_dense(nn.Conv2d(4, 4, 3)), KindError, TypeError, "torch.nn.Linear.*Conv2d"),
    "a factorized layer": (lambda: Linear.from_dense(Linear(4, 4)), KindError, TypeError, "to_dense"),
    # functional
    "functional input": (
        lambda: tt.nn.functional.tt_linear(torch.randn(2, 5), [torch.randn(1, 2, 3, 1)]),
        ShapeError,
        ValueError,
        "3",
    ),
    "functional cores": (
        lambda: tt.nn.functional.tt_linear(torch.randn(2, 3), [torch.randn(1, 3, 1)]),
        ShapeError,
        ValueError,
        "order 4",
    ),
    "suggest_modes": (lambda: tt.nn.suggest_modes(0), ShapeError, ValueError, "n=0"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_clear_error(name: str) -> None:
    call, error, builtin, words = CASES[name]
    with pytest.raises(error, match=words) as caught:
        call()
    assert isinstance(caught.value, TTError)
    assert isinstance(caught.value, builtin)
    text = str(caught.value)
    assert ":" in text  # what must hold: what was found
    assert text.endswith(".")
    assert "\n" not in text
    assert len(text) < 400
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_failed_from_dense_leaves_the_layer_as_it_was() -> None:
    dense = broken(nn.Linear(4, 4))
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    with pytest.raises(NonFiniteError):
        Linear.from_dense(dense)
    for key, value in dense.state_dict().items():
        assert torch.equal(value.isnan(), before[key].isnan())
        assert torch.equal(value.nan_to_num(), before[key].nan_to_num())
