"""One yardstick for all layers: torch's own operation on the dense weight, in double precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.nn import FactorizedLayer
from tensortrain.testing import rel_error

IMPLEMENTATIONS = ("auto", "factorized", "dense")
TOLERANCE = {
    torch.float32: 1e-5,
    torch.complex64: 1e-5,
    torch.float64: 1e-12,
    torch.complex128: 1e-12,
}
Apply = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # input, dense weight, bias -> output


def wide(x: Tensor) -> Tensor:
    """A copy in double precision, cut off from autograd; whole numbers stay as they are."""
    if not (x.is_floating_point() or x.is_complex()):
        return x
    return x.detach().to(torch.complex128 if x.is_complex() else torch.float64)


def dense_twin(layer: FactorizedLayer) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Cores in double precision that record gradients, the dense weight built from them, and the bias."""
    cores = [wide(core).requires_grad_() for core in layer.cores]
    weight = layer.format.to_dense(cores, layer.spec)
    return cores, weight, None if layer.bias is None else wide(layer.bias).requires_grad_()


def assert_agrees(layer: FactorizedLayer, x: Tensor, apply: Apply) -> None:
    """Output and the gradients of input, bias and every core equal those of ``apply`` on the dense weight.

    Without gradients the layer is called twice: the second call reads what the first one kept.
    """
    tol = TOLERANCE[layer.cores[0].dtype]
    cores, weight, bias = dense_twin(layer)
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
    mine = _inputs(x, layer.cores, layer.bias)
    theirs = _inputs(exact_x, cores, bias)
    names = ["input"] * x.requires_grad + [f"cores.{k}" for k in range(len(cores))] + ["bias"] * (bias is not None)
    found_grads = torch.autograd.grad(found, mine, upstream.to(found.dtype))
    exact_grads = torch.autograd.grad(exact, theirs, upstream)
    for name, mine_g, exact_g in zip(names, found_grads, exact_grads, strict=True):
        assert mine_g.shape == exact_g.shape, name
        assert rel_error(mine_g, exact_g) <= tol, name


def _inputs(x: Tensor, cores: Sequence[Tensor], bias: Tensor | None) -> list[Tensor]:
    return [*([x] if x.requires_grad else []), *cores, *([] if bias is None else [bias])]


def assert_gradcheck(layer: nn.Module, x: Tensor) -> None:
    """Analytic against numerical gradients, of the input (unless it is whole numbers) and all parameters."""
    names = [name for name, _ in layer.named_parameters()]
    given = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    differentiable = x.is_floating_point() or x.is_complex()

    def call(*tensors: Tensor) -> Tensor:
        values = dict(zip(names, tensors, strict=False))
        inputs: Any = tensors[-1] if differentiable else x
        return torch.func.functional_call(layer, values, (inputs,))

    extra = [x.detach().clone().requires_grad_()] if differentiable else []
    assert torch.autograd.gradcheck(call, (*given, *extra))
