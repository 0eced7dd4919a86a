"""What comes into a model is looked at in one way, whichever model it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

import tensortrain as tt
from tensortrain.errors import DataError, KindError, RankError
from tensortrain.models.checks import checked_sizes

M = tt.models


def numbers(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


X, S, Y = numbers(20, 5), numbers(20, 6, 3), torch.arange(20) % 3


def linear_cell() -> Any:
    return M.HOTTRNNCell(3, 3, n_lags=2, degree=2, rank=3, activation=None)


FITS: dict[str, tuple[Callable[[], Any], tuple[Tensor, ...], dict[str, Any]]] = {
    "classifier, two sites": (lambda: M.MPSClassifier(5, 3, bond_dim=3), (X, Y), {"method": "two-site"}),
    "classifier, adam": (lambda: M.MPSClassifier(5, 3, bond_dim=3), (X, Y), {"method": "adam"}),
    "machine, manifold": (lambda: M.ExponentialMachine(5, rank=3), (X, Y.float()), {"method": "riemannian"}),
    "machine, adam": (lambda: M.ExponentialMachine(5, rank=3), (X, Y.float()), {"method": "adam"}),
    "machine, gradient": (lambda: M.ExponentialMachine(5, rank=3), (X, Y.float()), {"method": "gradient"}),
    "score": (lambda: M.ScoreNetwork(6, 3, 3, rank=3, n_features=4), (S, Y), {}),
    "circuit": (lambda: M.RecurrentArithmeticCircuit(3, 3, n_outputs=3), (S, Y), {}),
    "forecast, adam": (lambda: M.Forecaster(linear_cell(), 3), (S[:, :4], S[:, 4:]), {"method": "adam"}),
    "forecast, als": (lambda: M.Forecaster(linear_cell(), 3), (S[:, :4], S[:, 4:]), {"method": "als"}),
    "unitary": (lambda: tt.quantum.UnitaryClassifier(5, 3), (X, Y), {}),
    "born, two sites": (lambda: M.BornMachine(5, 3), ((3 * X).long(),), {"method": "two-site"}),
    "born, adam": (lambda: M.BornMachine(5, 3), ((3 * X).long(),), {"method": "adam"}),
}


@pytest.mark.parametrize("name", FITS)
def test_a_fit_has_passes_and_what_it_watches_is_data(name: str) -> None:
    make, data, options = FITS[name]
    for n_sweeps in (0, -1, 2.5, None):
        with pytest.raises(RankError, match="n_sweeps"):
            make().fit(*data, **options, n_sweeps=n_sweeps)
    empty = tuple(part[:0] for part in data)
    for validation in (3, (1, 2, 3, 4), empty if len(data) > 1 else empty[0]):
        with pytest.raises(DataError):
            make().fit(*data, **options, n_sweeps=1, validation=validation)


@pytest.mark.parametrize("name", [name for name in FITS if name.endswith(("adam", "score", "circuit", "unitary"))])
def test_steps_have_a_length(name: str) -> None:
    make, data, options = FITS[name]
    for lr in (-1.0, math.nan, math.inf, "fast"):
        with pytest.raises(RankError, match="lr"):
            make().fit(*data, **options, n_sweeps=1, lr=lr)


@pytest.mark.parametrize("name", ["classifier, two sites", "classifier, adam", "born, two sites", "born, adam"])
def test_caps_and_cuts_are_within_their_range(name: str) -> None:
    make, data, options = FITS[name]
    for bad in ({"max_bond": 0}, {"max_bond": 2.5}, {"cutoff": 2.0}, {"cutoff": math.nan}, {"n_steps": 0}):
        with pytest.raises(RankError, match=next(iter(bad))):
            make().fit(*data, **options, n_sweeps=1, **bad)


def test_other_options_are_within_their_range() -> None:
    for name, bad in (
        ("classifier, two sites", {"ridge": -1.0}),
        ("machine, manifold", {"penalty": -1.0}),
        ("machine, manifold", {"tol": math.nan}),
        ("machine, adam", {"batch_size": 0}),
        ("circuit", {"grad_clip": -1.0}),
        ("forecast, adam", {"share": 2.0}),
        ("born, two sites", {"patience": 0}),
    ):
        make, data, options = FITS[name]
        with pytest.raises(RankError, match=next(iter(bad))):
            make().fit(*data, **options, n_sweeps=1, **bad)


def test_adam_does_not_pass_over_a_cap() -> None:
    model = M.MPSClassifier(5, 3, bond_dim=6)
    with pytest.raises(RankError, match="bond_dim=4"):
        model.fit(X, Y, method="adam", max_bond=4, n_sweeps=1)


CALLS: dict[str, tuple[Callable[[], Any], tuple[int, ...], tuple[int, ...]]] = {  # with the shape, and arguments behind
    "score": (lambda: M.ScoreNetwork(6, 3, 2, rank=3, n_features=4), (7, 6, 3), ()),
    "circuit": (lambda: M.RecurrentArithmeticCircuit(3, 3), (7, 6, 3), ()),
    "forecast": (lambda: M.Forecaster(M.HOTTLSTMCell(3, 4, n_lags=2, degree=2, rank=2), 3), (7, 6, 3), (4,)),
    "nonlinear": (lambda: M.NonlinearTT((2, 3), 2, rank=3), (7, 5), ()),
    "classifier": (lambda: M.MPSClassifier(5, 3), (7, 5), ()),
    "machine": (lambda: M.ExponentialMachine(5, rank=3), (7, 5), ()),
    "unitary": (lambda: tt.quantum.UnitaryClassifier(5, 3), (7, 5), ()),
}


@pytest.mark.parametrize("name", CALLS)
def test_numbers_of_another_precision_are_converted_and_others_refused(name: str) -> None:
    make, shape, more = CALLS[name]
    model, x = make(), numbers(*shape)
    found = model(x.double(), *more)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, model(x, *more))
    bad = [x * math.nan, x.to(torch.complex64), x.numpy(), x[0]]
    for other in bad + ([] if name == "machine" else [x.long()]):
        with pytest.raises(DataError):
            model(other, *more)


def test_cells_take_states_of_their_shape() -> None:
    cell = M.HOTTLSTMCell(3, 4, n_lags=2, degree=2, rank=2)
    lags, c = cell(S[:, 0].double())
    assert lags.dtype == c.dtype == torch.float32
    for state in (lags, (lags, c[:, :2]), (lags, c, c), (lags[:, :1], c)):
        with pytest.raises(DataError, match=r"newest first|a pair|shape"):
            cell(S[:, 0], state)


@pytest.mark.parametrize("kind", ["real", "complex", "positive", "purified"])
def test_gradients_of_every_string_at_once(kind: str) -> None:
    model = M.BornMachine(4, 3, bond_dim=3, kind=kind, dtype=torch.float64)
    x = torch.cartesian_prod(*[torch.arange(3)] * 4)[::11]
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def log_prob(values: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(model, values, (one[None],)).sum()

    found = vmap(grad(log_prob), in_dims=(None, 0))(parameters, x)
    for k, one in enumerate(x):
        model.zero_grad()
        model.log_prob(one[None]).sum().backward()
        for name, value in model.named_parameters():
            torch.testing.assert_close(found[name][k], value.grad)


def test_a_born_machine_is_exported() -> None:
    model, x = M.BornMachine(4, 3, bond_dim=3), torch.cartesian_prod(*[torch.arange(3)] * 4)
    program = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(program(x), model(x))


def test_sizes_may_be_numbers_of_numpy() -> None:
    assert checked_sizes(n=np.int64(3), m=2) == (3, 2)
    model = M.MPSClassifier(np.int64(5), np.int32(3), bond_dim=np.int64(4))
    assert model.config == M.MPSClassifier(5, 3, bond_dim=4).config
    assert all(type(value) is not np.int64 for value in model.config.values())
    for size in (0, 2.0, True, "3", None):
        with pytest.raises(RankError, match="n_sites"):
            M.BornMachine(size)
    for bond_dim in (0, 2.0, "22", [2, 0, 2], [2.5, 2, 2], None):
        with pytest.raises(RankError, match="bond_dim"):
            M.BornMachine(4, bond_dim=bond_dim)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_parameters_are_real_and_floating(dtype: torch.dtype) -> None:
    makers: list[Callable[[], Any]] = [
        lambda: M.BornMachine(4, dtype=dtype),
        lambda: M.MPSClassifier(4, 2, dtype=dtype),
        lambda: M.ExponentialMachine(4, rank=2, dtype=dtype),
        lambda: M.ScoreNetwork(4, 3, 2, rank=2, n_features=2, dtype=dtype),
        lambda: M.HOTTRNNCell(4, 2, n_lags=1, degree=1, rank=1, dtype=dtype),
        lambda: M.NonlinearTT((4, 2), 2, rank=1, dtype=dtype),
        lambda: M.RecurrentArithmeticCircuit(4, 2, dtype=dtype),
        lambda: tt.quantum.UnitaryClassifier(4, dtype=dtype),
    ]
    for make in makers:
        with pytest.raises(KindError, match="dtype"):
            make()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_sites_learn_in_half_precision(dtype: torch.dtype) -> None:
    model = M.MPSClassifier(5, 3, bond_dim=3, dtype=dtype)
    history = model.fit(X, Y, n_sweeps=2, max_bond=4)
    assert math.isfinite(history.loss[-1])
    assert {core.dtype for core in model.cores} == {dtype}
    machine = M.BornMachine(4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    strings = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])
    history = machine.fit(strings, n_sweeps=10)
    assert history.nll[-1] == float(machine.nll(strings).detach())
    assert history.nll[-1] == pytest.approx(math.log(2), abs=0.02)
    assert {core.dtype for core in machine.cores} == {dtype}
