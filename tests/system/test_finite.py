"""Which numbers are finite, part by part."""

from __future__ import annotations

import pytest
import torch

from tensortrain.system import finite as module
from tensortrain.system.finite import are_finite, finite


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (7,), (5, 4), (2, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.complex64, torch.int64])
@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), float("-inf")])
def test_it_answers_as_torch_does(shape, dtype, bad, monkeypatch) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", 4)
    x = torch.ones(shape, dtype=dtype)
    if bad is not None and x.numel() and dtype != torch.int64:
        x.view(-1)[-1] = bad
    assert torch.equal(finite(x), torch.isfinite(x))
    assert are_finite(x) is bool(torch.isfinite(x).all())
    turned = x.transpose(0, -1) if x.ndim else x
    assert torch.equal(finite(turned), torch.isfinite(turned))


def test_a_sum_that_overflows_is_looked_at() -> None:
    assert are_finite(torch.full((9,), 3e38))
    assert not are_finite(torch.tensor([float("inf"), float("-inf")]))
