"""Hooks on ``layer.cores`` run: pruning, offloading, parametrizations, and what users hang there."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import tensortrain as tt

ids_of = pytest.mark.parametrize("implementation", ["auto", "factorized", "dense"])
LAYERS: dict[str, tuple[Callable[[], Any], Callable[[], Tensor]]] = {
    "linear": (lambda: tt.nn.Linear(24, 18, rank=3), lambda: torch.randn(5, 24)),
    "conv": (lambda: tt.nn.Conv2d(8, 12, 3, rank=3, implementation="factorized"), lambda: torch.randn(2, 8, 5, 5)),
    "embedding": (lambda: tt.nn.Embedding(50, 12, rank=3), lambda: torch.randint(50, (2, 4))),
    "gru": (
        lambda: tt.nn.GRU(24, 16, rank=2, compress="both", implementation="factorized"),
        lambda: torch.randn(3, 2, 24),
    ),
    "attention": (lambda: Attention(), lambda: torch.randn(2, 3, 16)),
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = tt.nn.MultiheadAttention(16, 4, rank=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Doubled(nn.Module):
    def forward(self, core: Tensor) -> Tensor:
        return 2 * core


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("grad", [True, False])
@ids_of
def test_a_hook_runs_once_in_a_call(implementation: Any, grad: bool) -> None:
    layer, calls = tt.nn.Linear(24, 18, rank=3, implementation=implementation), []
    x = torch.randn(5, 24)
    with torch.set_grad_enabled(grad):
        layer(x)  # the way of the second call is a shorter one
        before = layer(x) - layer.bias
        with_hook = layer.cores.register_forward_hook(lambda *call: calls.append(call) or (2 * call[2][0], call[2][1]))
        torch.testing.assert_close(layer(x) - layer.bias, 2 * before)
        assert len(calls) == 1
        with_hook.remove()
        torch.testing.assert_close(layer(x) - layer.bias, before)


@ids_of
def test_pruned_cores_are_trained(implementation: Any) -> None:
    layer, x = tt.nn.Linear(24, 18, rank=3, implementation=implementation), torch.randn(16, 24)
    with torch.no_grad():
        layer(x)
    prune.l1_unstructured(layer.cores, "0", amount=0.4)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    exact = tt.nn.Linear(24, 18, rank=3)
    with torch.no_grad():
        exact.cores[0].copy_(getattr(layer.cores, "0_orig") * getattr(layer.cores, "0_mask"))
        exact.cores[1].copy_(layer.cores[1])
        exact.bias.copy_(layer.bias)
        torch.testing.assert_close(layer(x), exact(x))
        prune.remove(layer.cores, "0")
        torch.testing.assert_close(layer(x), exact(x))
    assert set(layer.state_dict()) == {"bias", "cores.0", "cores.1"}


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_offloaded_by_accelerate(kind: str, where: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    build, inputs = LAYERS[kind]
    model, x = nn.Sequential(build()).eval(), inputs()
    exact, away = first(model(x)), copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        if where == "cpu":
            accelerate.cpu_offload(away, execution_device=torch.device("cpu"))
        else:
            accelerate.disk_offload(away, folder, execution_device=torch.device("cpu"))
        assert all(parameter.is_meta for parameter in away.parameters())
        for _ in range(2):
            torch.testing.assert_close(first(away(x)), exact)
    assert all(m.resident_cache_bytes == 0 for m in away.modules() if isinstance(m, tt.nn.FactorizedLayer))


def test_parametrized_copied_and_called_by_function() -> None:
    layer, x = tt.nn.Linear(24, 18, rank=3, bias=False), torch.randn(5, 24)
    exact = 4 * layer(x)
    state = {name: 2 * core for name, core in layer.state_dict().items()}
    torch.testing.assert_close(torch.func.functional_call(layer, state, x), exact)
    for other in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(4 * other(x), exact)
    for name in ("0", "1"):
        parametrize.register_parametrization(layer.cores, name, Doubled())
    torch.testing.assert_close(layer(x), exact)


def test_an_empty_layer_is_filled_again() -> None:
    layer = tt.nn.Embedding(50, 12, padding_idx=3, has_padding_row=True, hot_rows=2, device="meta").to_empty(
        device="cpu"
    )
    layer.reset_parameters()
    assert layer(torch.tensor([3])).abs().max() == 0
    assert layer(torch.arange(50)).isfinite().all()
