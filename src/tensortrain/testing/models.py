"""What every tensor-network model must hold, whatever it says of its data."""

from __future__ import annotations

import copy
import pickle
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensortrain.errors import CheckpointError
from tensortrain.io import load_pretrained, save_pretrained
from tensortrain.models.base import TensorModel

from .compare import check_refused, rel_error

__all__ = ["ModelSuite"]


class ModelSuite(ABC):
    """Inherit as ``class TestMine(ModelSuite)`` and say how to make a model, its data, and its values the long way.

    Example:
        >>> import tensortrain as tt
        >>> class TestBorn(ModelSuite):
        ...     def make(self, dtype):
        ...         return tt.models.BornMachine(3, dtype=dtype)
        ...
        ...     def data(self, dtype):
        ...         return torch.cartesian_prod(*[torch.arange(2)] * 3)
        ...
        ...     def exact(self, model, data):
        ...         return model.state.to_dense().flatten().square().log()
        ...
        ...     def learn(self, model, **options):
        ...         return model.fit(self.data(torch.float32), n_sweeps=3, **options)
    """

    tol = 1e-11

    @abstractmethod
    def make(self, dtype: torch.dtype) -> TensorModel:
        """A small model, the same one at every call."""

    @abstractmethod
    def data(self, dtype: torch.dtype) -> Tensor:
        """A small batch, samples along the first axis."""

    @abstractmethod
    def exact(self, model: Any, data: Tensor) -> Tensor:
        """What ``evaluate`` gives, from a dense tensor or by counting."""

    def evaluate(self, model: Any, data: Tensor) -> Tensor:
        """What the model says of a batch: its forward, unless another method is meant."""
        found: Tensor = model(data)
        return found

    def learn(self, model: Any, **options: Any) -> Any:
        """Fit for three sweeps; gives the history. ``NotImplemented`` for models without a ``fit``."""
        return NotImplemented

    def bad(self, model: Any) -> Iterable[tuple[Any, ...]]:
        """Calls that must be refused: the error, what to call, its arguments, and perhaps its keywords."""
        return ()

    def test_values_agree_with_the_long_way(self) -> None:
        model, data = self.make(torch.float64), self.data(torch.float64)
        assert rel_error(self.evaluate(model, data).detach(), self.exact(model, data)) <= self.tol

    def test_single_precision_agrees(self) -> None:
        model, data = self.make(torch.float32), self.data(torch.float32)
        found = self.evaluate(model, data)
        assert found.dtype == torch.float32
        assert rel_error(found.detach(), self.exact(copy.deepcopy(model).double(), data.clone())) <= 1e-4

    def test_gradients_by_name(self) -> None:
        model, data = self.make(torch.float64), self.data(torch.float64)
        names = [name for name, _ in model.named_parameters()]
        given = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]

        def call(*tensors: Tensor) -> Tensor:
            with torch.nn.utils.stateless._reparametrize_module(model, dict(zip(names, tensors, strict=True))):
                return self.evaluate(model, data)

        assert torch.autograd.gradcheck(call, tuple(given), fast_mode=True)
        grads = torch.autograd.grad(call(*given).sum(), given, allow_unused=True)
        for name, grad in zip(names, grads, strict=True):
            assert grad is not None, name
            assert bool((grad != 0).any()), name

    def test_a_batch_is_its_samples(self) -> None:
        model, data = self.make(torch.float64), self.data(torch.float64)
        whole = self.evaluate(model, data).detach()
        apart = torch.cat([self.evaluate(model, data[k : k + 1]).detach() for k in range(len(data))])
        assert rel_error(apart, whole) <= self.tol
        assert self.evaluate(model, data[:0]).shape[0] == 0

    def test_saves_and_loads_to_equal_bits(self) -> None:
        for dtype in (torch.float32, torch.float64):
            model = self.make(dtype)
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                for loaded in (type(model).from_pretrained(folder), load_pretrained(folder)):
                    _check_same(model, loaded)
                    same = self.evaluate(loaded, self.data(dtype)), self.evaluate(model, self.data(dtype))
                    assert torch.equal(*same)

    def test_another_class_is_refused(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            save_pretrained(torch.nn.Linear(2, 2), folder)
            check_refused(CheckpointError, type(self.make(torch.float32)).from_pretrained, folder)

    def test_copies_are_models_of_their_own(self) -> None:
        model = self.make(torch.float64)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            _check_same(model, other)
            with torch.no_grad():
                next(other.parameters()).zero_()
            assert not torch.equal(next(other.parameters()), next(model.parameters()))
        other = self.make(torch.float64)
        other.load_state_dict(model.state_dict())
        _check_same(model, other)

    def test_a_fit_goes_on_after_a_kill(self) -> None:
        whole = self.make(torch.float64)
        history = self.learn(whole)
        if history is NotImplemented:
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run"
            for stop_at in (1, 2):
                killed = self.make(torch.float64)
                try:
                    self.learn(killed, checkpoint=path, observer=_Stopping(stop_at))
                except _StoppedError:
                    pass
                else:
                    raise AssertionError("the observer's error must pass through")
            resumed = self.make(torch.float64)
            again = self.learn(resumed, checkpoint=path)
            _check_same(whole, resumed)
            assert again.columns == history.columns
            done = self.make(torch.float64)
            self.learn(done, checkpoint=path)  # nothing is left to do
            _check_same(whole, done)

    def test_bad_input_is_refused(self) -> None:
        model = self.make(torch.float32)
        for error, function, arguments, *keywords in self.bad(model):
            before = copy.deepcopy(model.state_dict())
            check_refused(error, partial(function, **(keywords[0] if keywords else {})), *arguments)
            assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    def test_a_print_is_short(self) -> None:
        assert len(repr(self.make(torch.float32)).splitlines()[0]) <= 200


class _StoppedError(Exception):
    pass


class _Stopping:
    """Ends a run after some sweeps, as a kill would."""

    def __init__(self, after: int) -> None:
        self.after, self.seen = after, 0

    def __call__(self, history: object) -> None:
        self.seen += 1
        if self.seen >= self.after:
            raise _StoppedError


def _check_same(model: torch.nn.Module, other: torch.nn.Module) -> None:
    mine, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert value.dtype == theirs[name].dtype, name
        assert torch.equal(value, theirs[name]), name
