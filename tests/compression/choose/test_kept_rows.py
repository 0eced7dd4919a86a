"""How many rows of a table may stay as they are."""

from __future__ import annotations

import torch
from torch import nn

from tensortrain.compression import plan_compression


def test_a_mild_budget_keeps_all_rows_that_are_often_looked_up() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(512, 32), nn.Tanh(), nn.Linear(32, 4))
    often = torch.randperm(512)[:110]
    data = [often[torch.randint(110, (16, 8))] for _ in range(6)]
    plan = plan_compression(model, budget="1.25x", data=data, n_batches=6)
    (table,) = (layer for layer in plan.layers if layer.kind == "embedding")
    assert len(table.hot_ids) > 512 // 16
    assert set(often.tolist()) <= set(table.hot_ids)
