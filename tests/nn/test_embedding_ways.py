"""The short ways of embeddings: what they keep is never stale, and what they do not serve goes the long way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tensortrain as tt
from tensortrain.contract import kernels
from tensortrain.errors import DTypeError, ModeIndexError
from tensortrain.system.native import library

LAYERS = {
    "tt": {"rank": 3},
    "tt by slices": {"rank": 3, "implementation": "factorized"},
    "tt, too large": {"rank": 3},
    "low_rank": {"rank": 3, "format": "low_rank"},
    "low_rank by product": {"rank": 3, "format": "low_rank", "implementation": "factorized"},
}


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    made = tt.nn.Embedding(60, 12, dtype=torch.float64, **LAYERS[request.param])
    if "too large" in request.param:
        made.dense_limit_bytes = 100
    return made


def table_of(layer: Any) -> Tensor:
    chain = layer.format.to_chain(list(layer.cores), layer.spec)
    with kernels.python_only():
        dense: Tensor = tt.contract.chain_to_dense(chain).T[:60]
    return dense


def check(layer: Any, ids: Tensor) -> None:
    table = table_of(layer)
    for _ in range(3):  # the long way, and the short one that it leaves
        with torch.no_grad():
            torch.testing.assert_close(layer(ids), table[ids].detach())
        rows, grad = layer(ids), torch.randn(*ids.shape, 12, dtype=torch.float64)
        torch.testing.assert_close(rows, table[ids])
        found = torch.autograd.grad(rows, list(layer.parameters()), grad)
        wanted = torch.autograd.grad(table[ids], list(layer.parameters()), grad, retain_graph=True)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("sizes", [(7,), (2, 3), (200,), ()])
def test_rows_and_gradients_stay_those_of_the_table(layer: Any, sizes: tuple[int, ...]) -> None:
    check(layer, torch.randint(60, sizes))


def test_rows_follow_the_cores(layer: Any) -> None:
    ids = torch.tensor([0, 59, 7, 7])
    with torch.no_grad():
        layer(ids), layer(ids)
        layer.cores[0].mul_(2)
        torch.testing.assert_close(layer(ids), table_of(layer)[ids])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(ids).sum().backward()
    optimizer.step()
    check(layer, ids)
    layer.load_state_dict(tt.nn.Embedding(60, 12, dtype=torch.float64, **_words(layer)).state_dict())
    check(layer, ids)


def _words(layer: Any) -> dict[str, Any]:
    return {"rank": 3, "format": layer.spec.format}


def test_settings_count_at_once(layer: Any) -> None:
    ids = torch.tensor([[3, 1], [1, 2]])
    check(layer, ids)
    layer.padding_idx = 1
    with torch.no_grad():
        assert not layer(ids)[0, 1].any()
    layer.padding_idx, layer.max_norm = None, 1e-3
    with torch.no_grad():
        assert float(layer(ids).norm(dim=-1).max()) <= 1.001e-3
    layer.max_norm, layer.implementation = None, "factorized"
    check(layer, ids)


@pytest.mark.parametrize("bad", [[-1, 3], [60], [10**9]])
def test_ids_outside_are_refused_on_every_way(layer: Any, bad: list[int]) -> None:
    check(layer, torch.arange(5))
    for recording in (True, False):
        with torch.set_grad_enabled(recording), pytest.raises(ModeIndexError, match="ids must"):
            layer(torch.tensor(bad))
    with pytest.raises(DTypeError):
        layer(torch.tensor([1.0]))


def test_hooks_on_the_cores_run(layer: Any) -> None:
    ids = torch.arange(5)
    check(layer, ids)
    seen = []
    handle = layer.cores.register_forward_hook(lambda *args: seen.append(1))
    layer(ids)
    handle.remove()
    assert seen == [1]


def test_frozen_cores_get_no_gradient(layer: Any) -> None:
    ids = torch.arange(6)
    check(layer, ids)
    first = next(layer.parameters())
    first.requires_grad_(False)
    rows = layer(ids)
    rows.sum().backward()
    assert first.grad is None
    layer.requires_grad_(False)
    assert not layer(ids).requires_grad


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("options", LAYERS.values(), ids=list(LAYERS))
def test_bags_are_those_of_torch_on_every_way(mode: str, options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    bag: Any = tt.nn.EmbeddingBag(60, 12, mode=mode, dtype=torch.float64, **options)  # type: ignore[arg-type]
    dense = bag.to_dense()
    ids, starts = torch.randint(60, (5, 4)), torch.tensor([0, 0, 3, 20])
    weights = torch.rand(20, dtype=torch.float64) if mode == "sum" else None
    for _ in range(3):
        for recording in (False, True):
            with torch.set_grad_enabled(recording):
                torch.testing.assert_close(bag(ids), dense(ids))
                flat = ids.reshape(-1)
                torch.testing.assert_close(bag(flat, starts, weights), dense(flat, starts, weights))
    table, grad = table_of(bag), torch.randn(5, 12, dtype=torch.float64)
    expected = torch.nn.functional.embedding_bag(ids, table, mode=mode)
    found = torch.autograd.grad(bag(ids), list(bag.parameters()), grad)
    for one, other in zip(found, torch.autograd.grad(expected, list(bag.parameters()), grad), strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad(), pytest.raises(ModeIndexError):
        bag(torch.tensor([[60]]))


# -- rows that stand beside the cores -------------------------------------------------------------------

BESIDE: dict[str, dict[str, Any]] = {
    "hot": {"hot_rows": 5},
    "hot and padding": {"hot_rows": 5, "padding_idx": 3},
    "hot and a row of padding": {"hot_rows": 5, "padding_idx": -1, "has_padding_row": True},
    "padding": {"padding_idx": 0},
}


def beside(words: dict[str, Any], dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    torch.manual_seed(0)
    made: Any = tt.nn.Embedding(60, 12, dtype=dtype, **({"rank": 3, "format": "low_rank"} | words | more))
    if made.hot_rows:
        made.populate_hot_rows_(ids=torch.tensor([9, 9, 30, 3, 58]))  # one row stays unused
        with torch.no_grad():
            made.hot_weight.add_(1.0)
    if made.padding_row is not None:
        made.padding_row.copy_(torch.arange(12.0))
    return made


def shortly(made: Any, ids: Tensor) -> Tensor | None:
    rows: Tensor | None = made.runner.way(made, ids)
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("implementation", ["auto", "factorized"])
@pytest.mark.parametrize("format", ["low_rank", "tt"])
@pytest.mark.parametrize("name", list(BESIDE))
def test_rows_beside_the_cores_come_by_the_short_way(
    name: str, format: str, implementation: Any, dtype: torch.dtype
) -> None:
    made = beside(BESIDE[name], dtype, format=format, implementation=implementation)
    given = [
        torch.randint(60, (4, 7)),
        torch.tensor([30, 9, 58]),
        torch.tensor([[5]]),
        torch.arange(60),
        torch.tensor(9),
    ]
    with torch.no_grad():
        with kernels.python_only():
            wanted = [made(ids) for ids in given]
        made.clear_cache()
        made(given[-1])
        for ids, rows in zip(given, wanted, strict=True):
            torch.testing.assert_close(made(ids), rows)
            if library() is not None:
                found = shortly(made, ids)
                assert found is not None
                torch.testing.assert_close(found, rows)


def test_rows_beside_the_cores_are_never_stale() -> None:
    made, ids = beside(BESIDE["hot and a row of padding"]), torch.arange(60)

    def check_again() -> None:
        made(ids)
        torch.testing.assert_close(made(ids), made.weight)

    with torch.no_grad():
        check_again()
        made.hot_weight.mul_(2.0)
        made.padding_row.add_(1.0)
        check_again()
        made.populate_hot_rows_(ids=torch.tensor([1, 2, 2, 50]))
        check_again()
        made.padding_idx = 7
        check_again()
        made.cores[0].mul_(3.0)
        check_again()
        made.load_state_dict(beside(BESIDE["hot and a row of padding"]).state_dict())
        check_again()


def test_rows_beside_the_cores_record_gradients_and_refuse_ids() -> None:
    made, ids = beside(BESIDE["hot and padding"]), torch.arange(60)
    with torch.no_grad():
        made(ids), made(ids)
    made.requires_grad_(False)
    made.hot_weight.requires_grad_()
    rows = made(ids)
    rows.sum().backward()
    assert made.hot_weight.grad is not None
    for bad in ([60], [-1, 9]):
        with torch.no_grad(), pytest.raises(ModeIndexError, match="ids must"):
            made(torch.tensor(bad))
    with torch.no_grad():
        short = made(ids[::2])  # not in a row
        assert torch.equal(short, made(ids[::2].contiguous()))
        assert made(ids.int()).shape == (60, 12)
        assert made(ids[:0]).shape == (0, 12)
