"""Torch's recurrent layers as the yardstick, and a plain loop for the convention that torch lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from tensortrain.testing import rel_error


def flat(result: Any) -> list[Tensor]:
    """All tensors of a layer's result: output, states."""
    if isinstance(result, PackedSequence):
        return [result.data]
    return [result] if isinstance(result, Tensor) else [tensor for part in result for tensor in flat(part)]


def assert_same_gradients(
    layer: Any,
    dense: nn.Module,
    x: Tensor,
    state: Any = None,
    *,
    pack: Callable[[Tensor], Any] = lambda x: x,
    tol: float = 1e-12,
) -> None:
    """Results, and gradients of input, initial states and all our parameters, equal those of torch's layer.

    Torch's layer runs on the dense weights built from our parameters, so that its gradients reach them.
    """
    x = x.detach().requires_grad_()
    given = [] if state is None else [s.requires_grad_() for s in flat(state)]

    def arguments() -> tuple[Any, ...]:
        return (pack(x),) if state is None else (pack(x), state)

    found = flat(layer(*arguments()))
    exact = flat(torch.func.functional_call(dense, layer.dense_weights(), arguments()))
    upstream = [torch.randn_like(y) for y in exact]
    wanted = [x, *given, *layer.parameters()]
    mine = torch.autograd.grad(found, wanted, upstream)
    theirs = torch.autograd.grad(exact, wanted, upstream)
    names = ["input", *["state"] * len(given), *(name for name, _ in layer.named_parameters())]
    for name, a, b in zip(["result"] * len(found) + names, (*found, *mine), (*exact, *theirs), strict=True):
        assert a.shape == b.shape, name
        assert rel_error(a, b) <= tol, name
    with torch.no_grad():
        for a, b in zip(flat(layer(*arguments())), exact, strict=True):
            assert rel_error(a, b) <= tol


def gru_reset_before(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """A GRU with the reset gate before the hidden product, one formula per line; ``x`` is (T, b, N)."""
    weights, finals = layer.dense_weights(), []
    for index in range(layer.num_layers):
        outputs = []
        for end in (f"l{index}", f"l{index}_reverse"):
            w_r, w_z, w_n = weights[f"weight_ih_{end}"].chunk(3)
            u_r, u_z, u_n = weights[f"weight_hh_{end}"].chunk(3)
            b_r, b_z, b_n = weights[f"bias_ih_{end}"].chunk(3)
            c_r, c_z, c_n = weights[f"bias_hh_{end}"].chunk(3)
            h, steps = x.new_zeros(x.shape[1], layer.hidden_size), []
            for x_t in reversed(x) if "reverse" in end else x:
                r = torch.sigmoid(F.linear(x_t, w_r, b_r) + F.linear(h, u_r, c_r))
                z = torch.sigmoid(F.linear(x_t, w_z, b_z) + F.linear(h, u_z, c_z))
                n = torch.tanh(F.linear(x_t, w_n, b_n) + F.linear(r * h, u_n, c_n))
                h = (1 - z) * n + z * h
                steps.append(h)
            outputs.append(torch.stack(steps[::-1] if "reverse" in end else steps))
            finals.append(h)
        x = torch.cat(outputs, dim=-1)
    return x, torch.stack(finals)
