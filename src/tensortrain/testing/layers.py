"""What every factorized layer must hold, by one yardstick: torch's own operation on the dense weight, in double."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.errors import TTError
from tensortrain.formats import FactorSpec
from tensortrain.io import load_pretrained, save_pretrained
from tensortrain.nn import FactorizedLayer

from .compare import check_refused, rel_error, wide

__all__ = ["IMPLEMENTATIONS", "TOLERANCE", "LayerSuite", "assert_agrees", "assert_gradcheck", "dense_parts"]

IMPLEMENTATIONS = ("auto", "factorized", "dense")
TOLERANCE = {
    torch.float32: 1e-5,
    torch.complex64: 1e-5,
    torch.float64: 1e-12,
    torch.complex128: 1e-12,
}
Apply = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]  # input, dense weight, bias -> output


def dense_parts(layer: FactorizedLayer) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Cores in double precision that record gradients, the dense weight built from them, and the bias."""
    cores = [wide(core).requires_grad_() for core in layer.cores]
    weight = layer.placed(layer.format.to_dense(cores, layer.spec))
    return cores, weight, None if layer.bias is None else wide(layer.bias).requires_grad_()


def assert_agrees(layer: FactorizedLayer, x: Tensor, apply: Apply) -> None:
    """Output and the gradients of input, bias and every core equal those of ``apply`` on the dense weight.

    Without gradients the layer is called twice: the second call reads what the first one kept.
    """
    tol = TOLERANCE[layer.cores[0].dtype]
    cores, weight, bias = dense_parts(layer)
    exact_x, x = wide(x), x.detach()
    if x.is_floating_point() or x.is_complex():
        exact_x.requires_grad_()
        x = x.requires_grad_()  # keeps its strides
    exact = apply(exact_x, weight, bias)
    with torch.no_grad():
        for found in (layer(x), layer(x)):
            assert found.shape == exact.shape
            assert found.dtype == layer.cores[0].dtype
            assert rel_error(found, exact) <= tol
    found = layer(x)
    assert found.shape == exact.shape
    assert rel_error(found, exact) <= tol

    upstream = torch.randn(found.shape, dtype=exact.dtype)
    mine = _inputs(x, list(layer.cores), layer.bias)
    theirs = _inputs(exact_x, cores, bias)
    names = ["input"] * x.requires_grad + [f"cores.{k}" for k in range(len(cores))] + ["bias"] * (bias is not None)
    found_grads = torch.autograd.grad(found, mine, upstream.to(found.dtype))
    exact_grads = torch.autograd.grad(exact, theirs, upstream)
    for name, mine_g, exact_g in zip(names, found_grads, exact_grads, strict=True):
        assert mine_g.shape == exact_g.shape, name
        assert rel_error(mine_g, exact_g) <= tol, name


def _inputs(x: Tensor, cores: Sequence[Tensor], bias: Tensor | None) -> list[Tensor]:
    return [*([x] if x.requires_grad else []), *cores, *([] if bias is None else [bias])]


def assert_gradcheck(layer: nn.Module, x: Tensor, *, fast: bool = False) -> None:
    """Analytic against numerical gradients, of the input (unless it is whole numbers) and all parameters.

    ``fast`` compares a random projection of the Jacobian in place of every entry.
    """
    names = [name for name, _ in layer.named_parameters()]
    given = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    differentiable = x.is_floating_point() or x.is_complex()

    def call(*tensors: Tensor) -> Tensor:
        values = dict(zip(names, tensors, strict=False))
        inputs: Any = tensors[-1] if differentiable else x
        return torch.func.functional_call(layer, values, (inputs,))

    extra = [x.detach().clone().requires_grad_()] if differentiable else []
    assert torch.autograd.gradcheck(call, (*given, *extra), fast_mode=fast)


class LayerSuite(ABC):
    """Inherit as ``class TestMine(LayerSuite)`` and say how to make the layer and an input.

    Run it in double precision (``torch.set_default_dtype(torch.float64)`` in a fixture).

    Example:
        >>> import tensortrain as tt
        >>> class TestLinear(LayerSuite):
        ...     def make(self, **options):
        ...         return tt.nn.Linear(12, 20, rank=3, **options)
        ...
        ...     def example(self):
        ...         return torch.randn(5, 12)
    """

    @abstractmethod
    def make(self, **options: Any) -> FactorizedLayer:
        """A layer with new random cores. ``options`` are among ``implementation``, ``dtype`` and ``device``."""

    @abstractmethod
    def example(self) -> Tensor:
        """An input in the default dtype, or ids; its first axis is the batch."""

    def reference(self, layer: FactorizedLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the layer must give: torch's own layer with this weight."""
        twin = layer.dense_type(**layer.arguments_of(layer), device="meta")
        parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return torch.func.functional_call(twin, parameters, (x,))

    def exact(self, layer: FactorizedLayer, x: Tensor) -> Tensor:
        """By the cores of this moment, whatever the layer has kept."""
        weight = layer.placed(layer.format.to_dense([core.detach() for core in layer.cores], layer.spec))
        return self.reference(layer, x, weight, layer.bias)

    def layers(self) -> Iterator[FactorizedLayer]:
        for implementation in IMPLEMENTATIONS:
            yield self.make(implementation=implementation)

    # -- numbers -----------------------------------------------------------------------------------------

    def test_agrees_with_dense(self) -> None:
        for implementation in IMPLEMENTATIONS:
            for dtype in (torch.float64, torch.float32):
                layer, x = self.make(implementation=implementation, dtype=dtype), self.example()
                x = x.to(dtype) if x.is_floating_point() else x
                for each in (x, x[:1], x[:0]):
                    assert_agrees(layer, each, partial(self.reference, layer))

    def test_gradients(self) -> None:
        for implementation in ("factorized", "dense"):
            assert_gradcheck(self.make(implementation=implementation), self.example()[:2], fast=True)

    def test_frozen_cores_still_pass_gradients_to_the_input(self) -> None:
        layer, x = self.make().requires_grad_(False), self.example()
        if not x.is_floating_point():
            assert not layer(x).requires_grad
            return
        for _ in range(2):  # the second call reads the weight that the first one kept
            leaf, other = (x.clone().requires_grad_() for _ in range(2))
            (mine,) = torch.autograd.grad(layer(leaf).square().sum(), leaf)
            (exact,) = torch.autograd.grad(self.exact(layer, other).square().sum(), other)
            assert rel_error(mine, exact) <= 1e-12

    def test_inference_mode_then_training(self) -> None:
        layer, x = self.make(), self.example()
        with torch.inference_mode():
            before = layer(x)
        found = layer(x)
        assert rel_error(found, before) <= 1e-12
        found.sum().backward()
        assert all(p.grad is not None for p in layer.parameters())

    def test_low_precision_under_autocast(self) -> None:
        for implementation in IMPLEMENTATIONS:
            for training in (True, False):
                layer, x = self.make(implementation=implementation, dtype=torch.float32), self.example()
                x = x.float() if x.is_floating_point() else x
                with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(training):
                    found, dense = layer(x), layer.to_dense()(x)
                assert found.dtype == dense.dtype
                assert rel_error(found, self.exact(layer, x)) <= 0.05  # a few roundings of 0.4 % each
                if training:
                    found.float().sum().backward()
                    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())

    # -- manners of a module -----------------------------------------------------------------------------

    def test_state_dict_holds_cores_and_bias_alone(self) -> None:
        layer = self.make()
        with torch.no_grad():
            layer(self.example())  # what is kept for speed stays out
        expected = {f"cores.{k}" for k in range(len(layer.cores))} | ({"bias"} if layer.bias is not None else set())
        assert set(layer.state_dict()) == expected
        assert dict(layer.named_buffers()) == {}
        assert layer.spec.core_shapes == tuple(tuple(core.shape) for core in layer.cores)

    def test_state_dict_goes_through_a_file(self) -> None:
        layer, other, file = self.make(), self.make(), io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        self._check_equal(layer, other)

    def test_config_builds_an_equal_layer(self) -> None:
        layer = self.make()
        twin = type(layer)(**layer.config())
        twin.load_state_dict(layer.state_dict())
        assert twin.spec == layer.spec
        assert FactorSpec.from_dict(layer.spec.to_dict()) == layer.spec
        self._check_equal(layer, twin)

    def test_saved_and_loaded(self) -> None:
        layer = self.make().eval()
        with tempfile.TemporaryDirectory() as folder:
            self._check_equal(layer, load_pretrained(save_pretrained(layer, f"{folder}/layer")))

    def test_copies_are_independent(self) -> None:
        layer, x = self.make(), self.example()
        with torch.no_grad():
            before = layer(x)
            for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
                assert twin.spec == layer.spec
                assert twin.resident_cache_bytes == 0
                assert torch.equal(twin(x), before)
                twin.cores[0].mul_(2)
                assert rel_error(twin(x), self.exact(twin, x)) <= 1e-12
                assert torch.equal(layer(x), before)

    def test_to_another_dtype_and_back(self) -> None:
        layer, x = self.make(), self.example()
        with torch.no_grad():
            before = layer(x)
            layer.to(torch.float32)
            found = layer(x.float() if x.is_floating_point() else x)
            assert found.dtype == torch.float32
            assert rel_error(found, before) <= 1e-5
            layer.double()
            assert layer(x).dtype == torch.float64
            assert rel_error(layer(x), self.exact(layer, x)) <= 1e-12

    def test_train_and_eval_give_the_same(self) -> None:
        layer, x = self.make(), self.example()
        assert rel_error(layer.train()(x), layer.eval()(x)) <= 1e-12

    def test_on_meta_nothing_is_allocated(self) -> None:
        layer, x = self.make(device="meta"), self.example()
        assert all(core.is_meta for core in layer.cores)
        assert layer.spec == self.make().spec
        if x.is_floating_point():  # torch cannot tell which ids are distinct without their values
            assert layer(x.to("meta")).shape == self.make()(x).shape

    # -- derived weights ---------------------------------------------------------------------------------

    def test_no_stale_weight_after_a_change(self) -> None:
        x = self.example()
        for layer in self.layers():
            for name, change in self.changes().items():
                with torch.no_grad():
                    before = layer(x)
                    assert torch.equal(layer(x), before)
                    change(layer)
                    after = layer(x)
                    assert rel_error(after, self.exact(layer, x)) <= 1e-12, name
                    assert rel_error(after, before) > 1e-3, name

    def changes(self) -> dict[str, Callable[[FactorizedLayer], None]]:
        """Ways in which cores get other values."""
        return {
            "in place": lambda layer: layer.cores[-1].mul_(1.5),
            "a slice": lambda layer: layer.cores[0][..., 0].add_(1.0),
            "copy_": lambda layer: layer.cores[0].copy_(torch.randn_like(layer.cores[0])),
            "another parameter": _replace_first_core,
            ".data, then clear_cache": _write_behind_the_back,
            "SGD": lambda layer: self._train(layer, torch.optim.SGD),
            "Adam": lambda layer: self._train(layer, torch.optim.Adam),
            "AdamW, fused": lambda layer: self._train(layer, torch.optim.AdamW, fused=True),
            "Adam, foreach": lambda layer: self._train(layer, torch.optim.Adam, foreach=True),
            "load_state_dict": _load_other,
            "reset_parameters": lambda layer: layer.reset_parameters(),
        }

    def _train(self, layer: FactorizedLayer, optimizer: Any, **options: Any) -> None:
        stepper = optimizer(layer.parameters(), lr=0.1, **options)
        with torch.enable_grad():
            layer(self.example()).square().sum().backward()
        stepper.step()

    def test_the_dense_weight_is_kept_while_nothing_changes(self) -> None:
        layer, x = self.make(implementation="dense"), self.example()
        with torch.no_grad():
            layer(x)
            kept = layer.resident_cache_bytes
            assert kept == layer.spec.weight.n_params * 8
            with _no_dense_weight(layer):
                layer(x)
            layer.cores[0].add_(0)
            check_refused(AssertionError, _call_without_dense_weight, layer, x)
            layer(x)
            assert layer.resident_cache_bytes == kept
        layer.clear_cache()
        assert layer.resident_cache_bytes == 0

    def test_factorized_never_builds_the_dense_weight(self) -> None:
        below = self.make(implementation="auto")
        below.dense_limit_bytes = below.spec.weight.n_params * 8 - 1
        for layer in (self.make(implementation="factorized"), below):
            with _no_dense_weight(layer):
                layer(self.example()).sum().backward()
                with torch.no_grad():
                    layer(self.example())

    # -- counts, and torch's layers ----------------------------------------------------------------------

    def test_counts_and_words(self) -> None:
        layer = self.make()
        n_bias = 0 if layer.bias is None else layer.bias.numel()
        assert layer.n_params == sum(p.numel() for p in layer.parameters()) == layer.spec.n_params + n_bias
        assert layer.compression == (layer.spec.weight.n_params + n_bias) / layer.n_params
        text = repr(layer)
        ranks = ",".join(map(str, layer.ranks))
        for part in (f"format={layer.spec.format}", f"in_modes={layer.in_modes}", f"out_modes={layer.out_modes}"):
            assert part in text
        for part in (ranks, f"params={layer.n_params}", "x smaller"):
            assert part in text
        with torch.no_grad():
            layer(self.example())
        assert layer.how_it_ran()

    def test_plan_prints(self) -> None:
        for layer in self.layers():
            for training in (True, False):
                with torch.set_grad_enabled(training):
                    plan: Any = layer.plan(16)  # type: ignore[operator]
                assert len(str(plan).splitlines()) >= 3
                assert "flops" in str(plan)
                assert plan.predicted_s >= 0
                assert plan.flops >= 0
                if layer.implementation != "auto":
                    assert plan.uses_dense == (layer.implementation == "dense")

    def test_from_torch_and_back(self) -> None:
        dense = self.make().to_dense()
        weight: Any = dense.weight
        before, x = weight.detach().clone(), self.example()
        name = self.make().spec.format
        exact = type(self.make()).from_dense(dense, format=name)
        back = exact.to_dense()
        assert repr(back) == repr(dense)
        assert rel_error(back.weight, before) <= 1e-11
        assert rel_error(exact(x), dense(x)) <= 1e-11
        close = type(exact).from_dense(dense, format=name, eps=0.3)
        assert rel_error(close.to_dense().weight, before) <= 0.3
        assert torch.equal(weight, before)

    def test_from_torch_keeps_mode_and_what_is_frozen(self) -> None:
        dense = self.make(dtype=torch.float32).to_dense().eval()
        dense.weight.requires_grad_(False)
        layer = type(self.make()).from_dense(dense, format=self.make().spec.format, rank=2)
        assert not layer.training
        assert {p.dtype for p in layer.parameters()} == {torch.float32}
        assert not any(core.requires_grad for core in layer.cores)
        back = layer.to_dense()
        assert type(back) is type(dense)
        assert not back.training
        assert not back.weight.requires_grad
        if layer.bias is not None:
            assert torch.equal(layer.bias, dense.bias)
            assert layer.bias is not dense.bias
            assert layer.bias.requires_grad

    def test_what_is_refused(self) -> None:
        layer, other = self.make(), self.make().requires_grad_(False)
        check_refused(TTError, self.make, implementation="nonesuch")
        check_refused(TTError, type(layer).from_dense, nn.ReLU())
        state = {name: torch.cat([value, value]) for name, value in layer.state_dict().items()}
        check_refused(RuntimeError, other.load_state_dict, state)

    def _check_equal(self, layer: nn.Module, other: nn.Module) -> None:
        assert type(other) is type(layer)
        x = self.example()
        assert torch.equal(layer(x), other(x))


def _load_other(layer: FactorizedLayer) -> None:
    layer.load_state_dict({key: _another(value) for key, value in layer.state_dict().items()})


def _another(value: Tensor) -> Tensor:
    """Other numbers; of whole ones, which may be places, the same in another order."""
    return torch.randn_like(value) if value.is_floating_point() or value.is_complex() else value.flip(0)


def _replace_first_core(layer: FactorizedLayer) -> None:
    layer.cores[0] = nn.Parameter(torch.randn_like(layer.cores[0]))


def _write_behind_the_back(layer: FactorizedLayer) -> None:
    layer.cores[0].data = torch.randn_like(layer.cores[0])
    layer.clear_cache()


@contextmanager
def _no_dense_weight(layer: FactorizedLayer) -> Iterator[None]:
    """Building a dense weight fails."""
    kind: Any = type(layer.format)
    had = kind.__dict__.get("dense_group")

    def refuse(*args: Any, **options: Any) -> Tensor:
        raise AssertionError("the dense weight was built")

    kind.dense_group = refuse
    try:
        yield
    finally:
        if had is None:
            del kind.dense_group
        else:
            kind.dense_group = had


def _call_without_dense_weight(layer: FactorizedLayer, x: Tensor) -> None:
    with _no_dense_weight(layer):
        layer(x)
