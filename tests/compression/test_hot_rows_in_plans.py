"""Tables of which the most frequent rows stay as they are, as a plan chooses them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.compression.survey.layers import count_params
from tensortrain.compression.survey.moments import expected_shares


class Reader(nn.Module):
    """Means of rows, so that every row counts as often as it is met."""

    def __init__(self, n: int = 900, dim: int = 24, padding_idx: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.out = nn.Embedding(n, dim, padding_idx=padding_idx), nn.Linear(dim, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.table(ids).mean(1))


def text(n: int = 900, batches: int = 8, seed: int = 0) -> list[Tensor]:
    """Ids that fall off as those of words do."""
    shares = 1 / torch.arange(1, n + 1).double()
    generator = torch.Generator().manual_seed(seed)
    return [torch.multinomial(shares, 64 * 12, True, generator=generator).view(64, 12) for _ in range(batches)]


def test_frequent_rows_stay_and_the_budget_holds() -> None:
    net = Reader().eval()
    result = tt.compress(net, budget="2x", data=text(), heal=False, measure=False, formats=("low_rank",))
    (layer,) = [one for one in result.plan.layers if one.name == "table"]
    assert layer.hot_ids
    small = result.model
    assert count_params(small) == result.plan.params_after <= count_params(net) / 2
    ids = torch.tensor(layer.hot_ids)
    assert torch.equal(small.table(ids), net.table(ids))
    assert set(range(5)) <= set(layer.hot_ids)  # the most frequent words


def test_it_is_better_than_ranks_alone_on_other_text() -> None:
    net, other = Reader().eval(), torch.cat(text(seed=9))
    plan = tt.plan_compression(net, budget="2x", data=text(), formats=("low_rank",))
    (layer,) = [one for one in plan.layers if one.name == "table"]
    rank = layer.params_after // (900 + 24)
    alone = tt.nn.Embedding.from_dense(
        net.table, rank=rank, format="low_rank", input_gram=plan.calibration.grams["table"]
    )
    with_rows = tt.apply_plan_(Reader(), plan).table
    with torch.no_grad():
        wanted = net.table(other)
        assert float((with_rows(other) - wanted).norm()) < 0.9 * float((alone(other) - wanted).norm())


def test_plans_and_checkpoints_keep_them(tmp_path) -> None:  # type: ignore[no-untyped-def]
    net = Reader(padding_idx=0).eval()
    plan = tt.plan_compression(net, budget="2x", data=text(), formats=("low_rank",))
    again = tt.CompressionPlan.from_json(plan.to_json())
    assert again == plan
    assert any(layer.hot_ids for layer in again.layers)
    assert all(0 not in layer.hot_ids for layer in again.layers)  # its row is kept anyway
    small = tt.apply_plan_(Reader(padding_idx=0), again).eval()
    tt.save_pretrained(small, tmp_path)
    ids = text()[0]
    assert torch.equal(tt.load_pretrained(tmp_path, model=lambda: Reader(padding_idx=0))(ids), small(ids))


def test_bags_keep_frequent_rows_too() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.EmbeddingBag(900, 24), nn.Linear(24, 8)).eval()
    result = tt.compress(net, budget="2x", data=text(), heal=False, measure=False, formats=("low_rank",))
    assert result.plan.layers[0].hot_ids
    assert torch.isfinite(result.model(text()[0])).all()


def test_shares_of_ids_to_come() -> None:
    """Of a Zipf law, ids that the sample lacks come as often as Turing's estimate says."""
    shares = 1 / torch.arange(1, 20_001).double()
    shares /= shares.sum()
    ids = torch.multinomial(shares, 10_000, True, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(ids, minlength=20_000).double()
    found = expected_shares(counts)
    assert math.isclose(float(found.sum()), 1.0, rel_tol=1e-12)
    unmet = counts == 0
    assert abs(float(found[unmet].sum()) - float(shares[unmet].sum())) < 0.02
    assert torch.equal(expected_shares(torch.ones(4)), torch.full((4,), 0.25))
    positions = expected_shares(torch.tensor([20.0] * 7 + [0.0] * 505).double())  # of short texts
    assert 0.04 < float(positions[7:].sum()) < 0.06


def test_positions_beyond_short_texts_are_not_cut_away() -> None:
    """Only the first twelve of its rows are met, and all are worth keeping."""

    class Placed(Reader):
        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.table(torch.arange(ids.shape[1]).expand(ids.shape)).mean(1) + ids[:, :1] / 900)

    net = Placed(n=200).eval()
    plan = tt.plan_compression(net, budget="1.3x", data=text(), formats=("low_rank",))
    small = tt.apply_plan_(Placed(n=200), plan)
    with torch.no_grad():
        error = (small.table(torch.arange(12, 200)) - net.table.weight[12:]).norm() / net.table.weight[12:].norm()
    assert error < 0.8  # a table of noise at three quarters of its numbers; with a rank of one it would be 0.98
