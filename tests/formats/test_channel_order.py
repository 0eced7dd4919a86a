from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import tensortrain as tt
from tensortrain.errors import ShapeError
from tensortrain.formats import PLAIN, FactorSpec, Weighting, WeightShape, get_format
from tensortrain.formats.chain import ChainFormat
from tensortrain.formats.channel_order import NATURAL, ChannelOrder, search_order
from tensortrain.testing import rel_error


def shuffled_train(rank: int, *, noise: float = 0.0) -> tuple[Tensor, FactorSpec, Tensor, Tensor]:
    """A weight that is a train once its channels are put back, with its spec and the shuffles."""
    outs, ins = (6, 4), (4, 6)
    train = tt.randn_matrix(outs, ins, rank).to_dense()
    train = train + noise * train.norm() / math.sqrt(train.numel()) * torch.randn_like(train)
    rows, columns = torch.randperm(24), torch.randperm(24)
    spec = get_format("tt").spec(WeightShape("linear", 24, 24), rank=rank, out_modes=outs, in_modes=ins)
    return train[rows][:, columns], spec, rows, columns


def made_by(spec: FactorSpec):
    fmt = get_format(spec.format)
    assert isinstance(fmt, ChainFormat)
    return lambda matrix, weighting: fmt.roughly(matrix, spec, weighting)


def test_the_true_order_makes_a_shuffled_train_exact() -> None:
    weight, spec, rows, columns = shuffled_train(3)
    order = ChannelOrder.of(rows.argsort().tolist(), columns.argsort().tolist())
    found = get_format("tt").fit(order.of_weight(weight), spec)
    assert found.rel_error <= 1e-10
    assert get_format("tt").fit(weight, spec).rel_error > 0.3


@pytest.mark.parametrize("weighted", [False, True])
def test_a_search_lowers_the_error_and_never_raises_it(weighted: bool) -> None:
    weighting = PLAIN
    if weighted:
        x, g = torch.randn(200, 24) * torch.rand(24), torch.randn(200, 24)
        weighting = Weighting(x.T @ x / 200, g.T @ g / 200)
    for seed in range(3):
        torch.manual_seed(seed)
        weight, spec, _, _ = shuffled_train(2, noise=0.05)
        found = search_order(weight, weighting, made_by(spec))
        assert found.rel_error < 0.97 * found.before
        placed, weighed = found.order.of_weight(weight), found.order.of_weighting(weighting)
        exact = weighed.rel_error(placed.double() - made_by(spec)(placed.double(), weighed), placed.double())
        assert exact == pytest.approx(found.rel_error, rel=0.05)  # sketched decompositions
        for order in (found.order.outputs, found.order.inputs):
            assert order is not None
            assert sorted(order) == list(range(24))


def test_a_start_near_the_true_order_finds_it() -> None:
    weight, spec, rows, columns = shuffled_train(2)
    near = weight[rows.argsort()][:, columns.argsort()]
    near[[3, 17]] = near[[17, 3]]
    near[:, [5, 9]] = near[:, [9, 5]]
    found = search_order(near, PLAIN, made_by(spec))
    assert found.rel_error <= 1e-6 < found.before


def test_what_may_not_move_stays() -> None:
    weight, spec, _, _ = shuffled_train(2)
    found = search_order(weight, PLAIN, made_by(spec), outputs=False)
    assert found.order.outputs is None
    assert found.order.sides == "in"
    assert search_order(weight, PLAIN, made_by(spec), outputs=False, inputs=False).order == NATURAL


def test_moments_go_with_their_channels() -> None:
    weight, gram = torch.randn(6, 8), torch.rand(8)
    order = ChannelOrder.of(torch.randperm(6).tolist(), torch.randperm(8).tolist())
    full = Weighting(torch.diag(gram), torch.diag(torch.rand(6)))
    change = torch.randn(6, 8)
    for weighting in (full, Weighting(gram)):
        exact = weighting.rel_error(change, weight)
        found = order.of_weighting(weighting).rel_error(order.of_weight(change), order.of_weight(weight))
        assert rel_error(torch.tensor(found), torch.tensor(exact)) <= 1e-12


@pytest.mark.parametrize("order", [(0, 1), (0, 0, 2), (1, 2, 3)])
def test_what_is_no_order_is_refused(order: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="name every channel once: in_order"):
        ChannelOrder.of(None, order).check(WeightShape("linear", 4, 3))
